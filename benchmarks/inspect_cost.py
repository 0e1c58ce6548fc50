"""What it costs to look: ``tunesmith inspect``, whatever the size of the weights, beside what a script pays.

    python benchmarks/inspect_cost.py RUN --work DIR [--rounds 5]

Whole processes, in turn, medians of wall and CPU seconds after a warm-up.  RUN is a real run with a base at hand; the
7 B adapters are of random numbers in the shapes of Qwen2.5-7B (``benchmarks/synthetic.py``), on all linear layers, and
their base is a file of holes, which a kernel reads as zeros.  A run of 200 checkpoints is RUN's own, 200 times by hard
links.  The peers: ``import peft``, the least that any script pays which reads an adapter through PEFT, and the short
script that forms every B·A with torch to take its norm.

The bars: at most 0.8 s of wall time, 2 s with 200 checkpoints, and torch is never imported; ``--help`` takes at most
0.30 s of CPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import synthetic

CHECKPOINTS = 200
RANKS = (8, 64)

SCRIPT = """
import sys, torch
from peft import PeftConfig
from safetensors.torch import load_file
config = PeftConfig.from_pretrained(sys.argv[1])
tensors = load_file(sys.argv[1] + "/adapter_model.safetensors")
scaling = config.lora_alpha / config.r
for name, a in tensors.items():
    if "lora_A" in name:
        print(name, scaling * torch.linalg.norm(tensors[name.replace("lora_A", "lora_B")] @ a).item())
"""

WITHOUT_TORCH = """
import runpy, sys
try:
    runpy.run_module("tunesmith", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "transformers", "peft"} & sys.modules.keys()
assert not heavy, heavy
"""


def many_checkpoints(run: Path, directory: Path) -> Path:
    """The run, with as many checkpoints as none has; their files are one file each."""
    shutil.rmtree(directory, ignore_errors=True)
    one = next(folder for folder in sorted(run.glob("checkpoint-*")) if folder.is_dir())
    ignore = shutil.ignore_patterns("checkpoint-*")
    shutil.copytree(run, directory, copy_function=os.link, ignore=ignore)
    for number in range(1, CHECKPOINTS + 1):
        shutil.copytree(one, directory / f"checkpoint-{number}", copy_function=os.link)
    return directory


def cost(command: Sequence[str], rounds: int) -> tuple[float, float]:
    """Median wall and CPU seconds of a command."""
    wall, cpu = [], []
    for _ in range(rounds + 1):
        before, started = os.times(), time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603
        after = os.times()
        wall.append(time.perf_counter() - started)
        cpu.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return statistics.median(wall[1:]), statistics.median(cpu[1:])


def commands(run: Path, work: Path) -> dict[str, list[str]]:
    """All that is measured, by name."""
    base, absent = synthetic.write_base(work / "base-7b", "7b", hollow=True), work / "absent"
    adapters = {r: synthetic.write_adapter(work / f"adapter-7b-r{r}", "7b", absent, r=r) for r in RANKS}
    inspect = [sys.executable, "-m", "tunesmith", "inspect"]
    found = {"RUN": [*inspect, str(run)], "RUN --json": [*inspect, str(run), "--json"]}
    for r, adapter in adapters.items():
        found[f"7 B, r = {r}, no base at hand"] = [*inspect, str(adapter)]
        found[f"7 B, r = {r}, its base at hand"] = [*inspect, str(adapter), "--base", str(base)]
    found[f"7 B, r = {RANKS[-1]}, --thorough"] = [*inspect, str(adapters[RANKS[-1]]), "--thorough"]
    found[f"RUN, {CHECKPOINTS} checkpoints"] = [*inspect, str(many_checkpoints(run, work / "many"))]
    found["tunesmith --help"] = [sys.executable, "-m", "tunesmith", "--help"]
    found["peer: import peft"] = [sys.executable, "-c", "import peft"]
    found[f"peer: a script, 7 B, r = {RANKS[0]}"] = [sys.executable, "-c", SCRIPT, str(adapters[RANKS[0]])]
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="What it costs to look.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    measured = commands(options.run, options.work)
    for name, command in measured.items():
        if "inspect" in command:
            subprocess.run(  # noqa: S603
                [sys.executable, "-c", WITHOUT_TORCH, *command[3:]], check=True, stdout=subprocess.DEVNULL
            )
            print(f"no torch, transformers or PEFT: {name}", flush=True)
    costs = {name: cost(command, options.rounds) for name, command in measured.items()}
    peer = costs["peer: import peft"][0]
    print(f"{'inspect':<34}{'wall s':>8}{'CPU s':>8}{'peft / it':>11}")
    for name, (wall, cpu) in costs.items():
        print(f"{name:<34}{wall:>8.2f}{cpu:>8.2f}{peer / wall:>11.1f}")


if __name__ == "__main__":
    main()
