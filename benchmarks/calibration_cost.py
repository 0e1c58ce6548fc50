"""What calibrated rounding costs: whole processes, wall and CPU seconds and peak memory.

    python benchmarks/calibration_cost.py RUN --work DIR [--base BASE]

RUN is a real run of the embedded model, merged by ``nearest``, ``faithful``, ``calibrated`` and ``calibrated-free``.
Then come one and three layers in the shapes of Qwen2.5-1.5B, of random numbers (``benchmarks/synthetic.py``), with the
embedded model's tokenizer; what a layer costs is half their difference, and all 28 are extrapolated from that.  No peer
rounds with calibration when it merges, so there is none to run.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import synthetic
from merge_cost import Cost, measure

from tunesmith.checkpoint import Checkpoint, locate_base

LAYERS = 28
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


def merged(run: Path, base: str, out: Path, rounding: str) -> Cost:
    """One merge, in a process of its own."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "tunesmith", "merge", str(run), "--base", base, "--out", str(out)]
    try:
        return measure([*command, "--rounding", rounding])
    finally:
        shutil.rmtree(out, ignore_errors=True)


def row(name: str, cost: Cost) -> None:
    """Print one row."""
    print(f"{name:<34}{cost.wall_s:>9.1f}{cost.cpu_s:>9.1f}{cost.peak_mb:>10.0f}", flush=True)


def layer_mb(base: Path) -> float:
    """What the weights of one layer take in float32."""
    tensors = Checkpoint(base).tensors.items()
    return 4 * sum(info.elements for name, info in tensors if ".layers.0." in name) / 1e6


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--base", default="demo")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    print(f"{'merge':<34}{'wall s':>9}{'CPU s':>9}{'peak MB':>10}")
    for rounding in ("nearest", "faithful", "calibrated", "calibrated-free"):
        row(f"135M, {rounding}", merged(options.run, options.base, options.work / "out", rounding))
    tokenizer = locate_base("demo", relative_to=Path())
    costs = []
    for size, layers in (("1.5b-1", 1), ("1.5b-3", 3)):
        base = synthetic.write_base(options.work / f"base-{size}", size)
        for name in TOKENIZER:
            if (tokenizer / name).is_file():
                shutil.copy(tokenizer / name, base)
        adapter = synthetic.write_adapter(options.work / f"adapter-{size}", size, base)
        costs.append(merged(adapter, str(base), options.work / "out", "calibrated"))
        row(f"1.5b, {layers} layers, calibrated", costs[-1])
    one, three = costs
    # The peak of a few layers is the embedding's; of all of them, it is the live model's, in float32.
    layer = Cost((three.wall_s - one.wall_s) / 2, (three.cpu_s - one.cpu_s) / 2, layer_mb(options.work / "base-1.5b-3"))
    row("1.5b, a layer more", layer)
    every = [getattr(one, name) + (LAYERS - 1) * getattr(layer, name) for name in ("wall_s", "cpu_s")]
    row(f"1.5b, {LAYERS} layers, extrapolated", Cost(*every, three.peak_mb + (LAYERS - 3) * layer.peak_mb))


if __name__ == "__main__":
    main()
