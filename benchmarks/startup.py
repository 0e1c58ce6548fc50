"""What it costs to ask: ``tunesmith --help`` and ``tunesmith inspect RUN``, beside importing PEFT.

    python benchmarks/startup.py RUN

Whole processes, five runs each after a warm-up, medians.  The peer is ``import peft``: the least that any script pays
that reads an adapter through PEFT.  The bars: ``--help`` at most 0.30 s of CPU, ``inspect`` at most 0.8 s of wall time.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

RUNS = 5


def cost(command: list[str]) -> tuple[float, float]:
    """Median CPU seconds (user and system) and wall seconds of a command."""
    cpu, wall = [], []
    for _ in range(RUNS + 1):
        before, started = os.times(), time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603
        after = os.times()
        wall.append(time.perf_counter() - started)
        cpu.append(
            after.children_user + after.children_system - before.children_user - before.children_system,
        )
    return statistics.median(cpu[1:]), statistics.median(wall[1:])


def main() -> None:
    """Print the table."""
    run = sys.argv[1]
    rows = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "tunesmith --help": [sys.executable, "-m", "tunesmith", "--help"],
        "tunesmith inspect RUN": [sys.executable, "-m", "tunesmith", "inspect", run],
        "python -c 'import peft'": [sys.executable, "-c", "import peft"],
    }
    costs = {name: cost(command) for name, command in rows.items()}
    peer = costs["python -c 'import peft'"]
    print(f"{'command':<26}{'CPU s':>8}{'wall s':>8}{'wall / peft':>13}")
    for name, (cpu, wall) in costs.items():
        print(f"{name:<26}{cpu:>8.2f}{wall:>8.2f}{wall / peer[1]:>13.2f}")


if __name__ == "__main__":
    main()
