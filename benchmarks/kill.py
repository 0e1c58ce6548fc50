"""What a merge leaves behind when it is killed: SIGKILL at random moments, then the same command again.

    python benchmarks/kill.py --work DIR [--kills 200] [--size 1.5b] [--seed 0]

Every merge is killed after a random part of the time that an undisturbed one takes; it rounds as a merge does by
default.  After each kill the target must not exist, or be whole; base and adapter must be as they were.  Four kills in
a row hit the same unfinished merge; the fifth command runs to its end, and its files must have the bytes of an
undisturbed merge.

There is no peer: a script that is killed while it writes leaves half a directory under the final name.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from synthetic import SIZES, write_adapter, write_base

IN_A_ROW = 4


def digest(directory: Path) -> dict[str, str]:
    """SHA-256 of every file of a directory."""
    found = {}
    for file in sorted(directory.rglob("*")):
        if file.is_file():
            with file.open("rb") as handle:
                found[str(file.relative_to(directory))] = hashlib.file_digest(handle, "sha256").hexdigest()
    return found


def stamps(*directories: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of every file: what would tell that somebody wrote to it."""
    files = [file for directory in directories for file in sorted(directory.rglob("*"))]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def killed_after(command: list[str], seconds: float) -> bool:
    """Start a process and kill it; False where it had ended before."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    return False


def main() -> None:
    """Kill, count, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--size", choices=SIZES, default="1.5b")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    base = write_base(options.work / f"base-{options.size}", options.size)
    adapter = write_adapter(options.work / f"adapter-{options.size}", options.size, base)
    out = options.work / "killed"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "tunesmith", "merge", str(adapter), "--base", str(base), "--out", str(out)]
    inputs, before = digest(base) | digest(adapter), stamps(base, adapter)
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603
    whole = time.perf_counter() - started
    reference = digest(out)
    shutil.rmtree(out)
    rng, seen = random.Random(options.seed), Counter[str]()  # noqa: S311 - moments, not secrets
    while seen["kills"] < options.kills:
        finished = False
        for _ in range(min(IN_A_ROW, options.kills - seen["kills"])):
            if not killed_after(command, rng.uniform(0, whole)):
                finished = True
                break
            seen["kills"] += 1
            if out.exists():
                seen["killed after it was whole" if digest(out) == reference else "half-made directories"] += 1
                finished = True
                break
            seen["touched inputs"] += stamps(base, adapter) != before
        if not finished:
            result = subprocess.run(command, check=False, capture_output=True)  # noqa: S603
            seen["reruns that failed"] += result.returncode != 0
        seen["merges finished"] += 1
        seen["merges of other bytes"] += digest(out) != reference
        shutil.rmtree(out, ignore_errors=True)
    seen["touched inputs"] += digest(base) | digest(adapter) != inputs
    left = [path.name for path in options.work.iterdir() if path.name.startswith(".killed")]
    seen["files left over at the end"] = len(left)
    print(f"{options.size}, an undisturbed merge takes {whole:.2f} s, seed {options.seed}")
    for name in (
        "kills", "merges finished", "killed after it was whole", "half-made directories", "touched inputs",
        "reruns that failed", "merges of other bytes", "files left over at the end",
    ):  # fmt: skip
        print(f"{name:<28}{seen[name]:>6}")


if __name__ == "__main__":
    main()
