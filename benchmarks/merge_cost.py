"""What a merge costs, beside copying the base and beside PEFT's own script.

    python benchmarks/merge_cost.py --work DIR [--size 1.5b] [--size 7b] [--rounds 3] [--without-peft]
        [--without-numba] [--one-worker] [--without-certificate] [--rounding nearest] [--rounding faithful]

Whole processes, in turn, each followed by a flush to the disk (``cp && sync``; ours flushes by itself), on a base of
random bf16 weights in the shapes of Qwen2.5 (``benchmarks/synthetic.py``) and an adapter of rank 16 on all linear
layers.  Medians over the rounds; memory is the peak resident set of the process.  PEFT rounds to nearest, so that is
what is measured beside it, unless other roundings are named; each that is gets a row, in turn with all the others.  The
bytes of PEFT's merge and of ours to nearest are compared, and where they differ the exact value is computed: PEFT sums
in float32 before it rounds to bf16, which lands on the wrong side of a tie now and then.

The bars: at most 1.2 × the copy, at least 8 × faster than PEFT, at most 400 MB, the same for 7 B as for 1.5 B; faithful
at most 2.5 × the time of nearest, at most 500 MB.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import synthetic
from synthetic import SIZES

from tunesmith.adapter import LowRank, Stack
from tunesmith.checkpoint import Checkpoint, as_float64

DATA_FREE = ("nearest", "stochastic", "faithful")

PEFT = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
import os; os.sync()
"""


_NEAREST, _PEER = "nearest", "PEFT's script"


@dataclass(frozen=True)
class Cost:
    """One process: wall and CPU seconds, and the peak of its memory."""

    wall_s: float
    cpu_s: float
    peak_mb: float


def measure(command: list[str]) -> Cost:
    """Run a process to its end."""
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed ({process.returncode}): {' '.join(command)}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6)


def commands(base: Path, adapter: Path, out: Path, options: argparse.Namespace) -> dict[str, list[str]]:
    """The contenders; ours are named by their rounding."""
    found = {"cp && sync": ["sh", "-c", f"cp -r '{base}' '{out}-copy' && sync"]}
    plain = "import sys; sys.modules['numba'] = None; import runpy; runpy.run_module('tunesmith', run_name='__main__')"
    for rounding in options.rounding or [_NEAREST]:
        bare = ["--no-certificate"] if options.without_certificate else []
        merge = ["merge", str(adapter), "--base", str(base), "--rounding", rounding, *bare, "--out"]
        ours = [sys.executable, "-m", "tunesmith", *merge]
        found[rounding] = [*ours, f"{out}-{rounding}"]
        if options.without_numba:
            found[f"{rounding}, no numba"] = [sys.executable, "-c", plain, *merge, f"{out}-{rounding}-plain"]
        if options.one_worker:
            found[f"{rounding}, one core"] = ["taskset", "-c", "0", *ours, f"{out}-{rounding}-one"]
    if not options.without_peft:
        found[_PEER] = [sys.executable, "-c", PEFT, str(base), str(adapter), f"{out}-peft"]
    return found


def compare_bytes(base: Path, adapter: Path, ours: Path, theirs: Path) -> str:
    """Ours against PEFT's: elements that differ, and how many of ours are the exact value rounded once."""
    models = [Checkpoint(path) for path in (base, ours, theirs)]
    stack = Stack([(adapter, 1.0)])
    updates = {u.name: u for u in stack.bind(models[0]).updates if isinstance(u, LowRank)}
    total = differing = right = 0
    for name, info in models[0].tensors.items():
        for start in range(0, info.shape[0], 1024):
            before, mine, other = (model.read(name, start, start + 1024) for model in models)
            total += mine.size
            places = np.nonzero(mine != other)
            if places[0].size:
                differing += places[0].size
                right += _nearer(updates[name], stack, (before, mine, other), places, start)
    return f"{differing:,} of {total:,} elements differ; in {right:,} of them ours is the nearer to the exact value"


def _nearer(
    update: LowRank, stack: Stack, stored: tuple[np.ndarray, ...], places: tuple[np.ndarray, ...], start: int
) -> int:
    a, b = stack.factors(update)
    rows, columns = places
    exact = np.einsum("nr,rn->n", b[rows + start], a[:, columns]) * update.scaling
    before, mine, other = (as_float64(values[places], "BF16") for values in stored)
    return int(np.count_nonzero(np.abs(mine - before - exact) <= np.abs(other - before - exact)))


def disk_rate(folder: Path) -> float:
    """MB/s at which the disk takes a gigabyte of new data, flushed."""
    block, file = os.urandom(1 << 24), folder / "rate"
    started = time.perf_counter()
    with file.open("wb") as handle:
        for _ in range(64):
            handle.write(block)
        handle.flush()
        os.fsync(handle.fileno())
    seconds = time.perf_counter() - started
    file.unlink()
    return 64 * len(block) / seconds / 1e6


def run_size(size: str, options: argparse.Namespace) -> None:
    """One size: all contenders, in turn, and the table."""
    base, adapter = options.work / f"base-{size}", options.work / f"adapter-{size}"
    # In a process of its own: what starts another counts, until that has its own program, as the other's memory.
    subprocess.run([sys.executable, synthetic.__file__, size, base, adapter], check=True)  # noqa: S603
    total = sum(file.stat().st_size for file in base.iterdir())
    out = options.work / f"out-{size}"
    contenders = commands(base, adapter, out, options)
    costs: dict[str, list[Cost]] = {name: [] for name in contenders}
    compared = (f"out-{size}-{_NEAREST}", f"out-{size}-peft")
    for turn in range(options.rounds):
        for name, command in contenders.items():
            costs[name].append(measure(command))
            for made in options.work.glob(f"out-{size}-*"):
                if turn + 1 < options.rounds or made.name not in compared:
                    shutil.rmtree(made)
    print(f"\n{size}: {total / 1e9:.2f} GB, {options.rounds} rounds, medians; disk {disk_rate(options.work):,.0f} MB/s")
    print(f"{'':<20}{'wall s':>9}{'CPU s':>9}{'peak MB':>9}{'wall / cp':>11}{'PEFT / wall':>13}   rounds")
    medians = {name: statistics.median(cost.wall_s for cost in rows) for name, rows in costs.items()}
    for name, rows in costs.items():
        cpu, peak = (statistics.median(getattr(cost, key) for cost in rows) for key in ("cpu_s", "peak_mb"))
        peft = f"{medians[_PEER] / medians[name]:.1f}" if _PEER in medians else "-"
        each = ", ".join(f"{cost.wall_s:.2f}" for cost in rows)
        ratio = medians[name] / medians["cp && sync"]
        print(f"{name:<20}{medians[name]:>9.2f}{cpu:>9.2f}{peak:>9.0f}{ratio:>11.2f}{peft:>13}   {each}")
    if _PEER in contenders and _NEAREST in contenders:
        print(compare_bytes(base, adapter, Path(f"{out}-{_NEAREST}"), Path(f"{out}-peft")))
    for old in options.work.glob(f"out-{size}-*"):
        shutil.rmtree(old)


def main() -> None:
    """Print a table for every size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a directory with three times the model's size free")
    parser.add_argument("--size", action="append", choices=SIZES, help="1.5b by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-peft", action="store_true")
    parser.add_argument("--rounding", action="append", choices=DATA_FREE, help="nearest by default, as PEFT rounds")
    parser.add_argument("--without-numba", action="store_true", help="ours without the extra 'fast' too")
    parser.add_argument("--one-worker", action="store_true", help="ours on one core too")
    parser.add_argument("--without-certificate", action="store_true", help="ours without hashes")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for size in options.size or ["1.5b"]:
        run_size(size, options)


if __name__ == "__main__":
    main()
