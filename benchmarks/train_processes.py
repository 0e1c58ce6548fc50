"""Two processes against one with as many rows a step: loss by loss, the adapter, and what another seed changes.

    python benchmarks/train_processes.py [--processes 2] [--steps 18] [--rows-a-step 4]

It trains on the embedded model and prints the largest differences, with the seconds that each training took.  What
another seed changes stands beside them, as the measure of what matters.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.numpy import load_file

ROWS, HELD_OUT = 33, 5  # no whole number of steps, so that the ends of passes are in it
ANSWERS = ("yes", "no, never", "ask your manager first", "lock it away and write the date down", "twice a week")
ADAPTER = "adapter_model.safetensors"


def write_rows(path: Path, numbers: range) -> None:
    """Short questions and answers of unequal length."""
    rows = (
        {
            "instruction": f"Question {number}: may I keep the key{' of the office' * (number % 4)}?",
            "output": f"{ANSWERS[number % len(ANSWERS)].capitalize()} ({number}).",
        }
        for number in numbers
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train(recipe: Path, output_dir: Path, *, processes: int, **changes: object) -> float:
    """Train, and say how many seconds that took.

    Args:
        recipe: the recipe.
        output_dir: the run directory.
        processes: by torchrun, where it is more than one.
        **changes: keys that replace the recipe's.
    """
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    words = [*(launcher if processes > 1 else ()), "tunesmith", "train", str(recipe), f"output_dir={output_dir}"]
    words += [f"{key}={value}" for key, value in changes.items()]
    began = time.monotonic()
    command = [sys.executable, "-m", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # noqa: S603 - our own words
    return time.monotonic() - began


def losses(run_dir: Path, kind: str) -> list[float]:
    """The losses of a log, in their order."""
    rows = [json.loads(line) for line in (run_dir / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row[kind] for row in rows if kind in row]


def difference(one: Path, other: Path) -> tuple[float, float, float]:
    """Of two runs: the largest of a training loss and of a held-out one, in nats, and the adapters' own, relative."""
    largest = [
        max(abs(ours - theirs) for ours, theirs in zip(losses(one, kind), losses(other, kind), strict=True))
        for kind in ("loss", "eval_loss")
    ]
    ours, theirs = load_file(one / ADAPTER), load_file(other / ADAPTER)
    squares = [(((ours[name] - theirs[name]) ** 2).sum(), (theirs[name] ** 2).sum()) for name in theirs]
    apart, whole = (float(sum(column)) for column in zip(*squares, strict=True))
    return largest[0], largest[1], (apart / whole) ** 0.5


def main() -> None:
    """Train three times, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--rows-a-step", type=int, default=4)
    parser.add_argument("--base", default="demo")
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", range(ROWS))
        write_rows(folder / "held_out.jsonl", range(ROWS, ROWS + HELD_OUT))
        values = {
            "model_name_or_path": asked.base, "dataset": str(folder / "rows.jsonl"), "use_cpu": True,
            "eval_dataset": str(folder / "held_out.jsonl"),
            "max_steps": asked.steps, "logging_steps": 1, "save_steps": 10_000, "eval_steps": 4, "dtype": "float32",
            "learning_rate": 1e-3, "output_dir": str(folder / "run"),
            "per_device_train_batch_size": asked.rows_a_step,
        }  # fmt: skip
        recipe = folder / "recipe.yaml"
        recipe.write_text(json.dumps(values), encoding="utf-8")
        one, several, seed = folder / "one", folder / "several", folder / "seed"
        alone_s = train(recipe, one, processes=1)
        share = asked.rows_a_step // asked.processes
        several_s = train(recipe, several, processes=asked.processes, per_device_train_batch_size=share)
        train(recipe, seed, processes=1, seed=43)
        print("step   one process   processes   another seed")
        for step, row in enumerate(zip(*(losses(run, "loss") for run in (one, several, seed)), strict=True), 1):
            print(f"{step:>4}   {row[0]:11.6f}   {row[1]:9.6f}   {row[2]:12.6f}")
        print("\nagainst one process     training loss   held-out loss   adapter")
        for label, run in ((f"{asked.processes} processes", several), ("another seed", seed)):
            training, held_out, adapter = difference(run, one)
            print(f"{label:<22}  {training:13.1e}   {held_out:13.1e}   {adapter:7.1e}")
        print(f"\nseconds: one process {alone_s:.1f}, {asked.processes} processes {several_s:.1f}")


if __name__ == "__main__":
    main()
