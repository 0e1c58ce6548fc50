"""Two limits by which ``verify`` judges codes, measured on quantized models that are sound.

    python benchmarks/quantized_limits.py --run demo/run DIR [DIR=nf4 …]

The directories are those that ``benchmarks/quantize_drift.py --keep`` leaves, also llmcompressor's; ``=VIEW`` says from
which view of the base a directory was made.  A line for each:

- *along*: of groups whose strength is out of bounds, the largest share of their errors' energy that lies along their
  numbers.  Errors that are passed on make groups so too, and a wrong scale does; ``_ALONG`` stands between.
- *halved*: the same, the least, of 200 groups of the directory whose scales are halved here.
- *own*, *other*: how much of the way to the other start the codes lie, held against their own start and against the
  other (the stored base, or its nf4 view).  ``_STARTED`` stands between.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import tunesmith as ts
from tunesmith.adapter import Stack
from tunesmith.api.places import base_of
from tunesmith.checkpoint import BaseView, Checkpoint, QuantizedWeight, quantization_of
from tunesmith.runs import checkpoint_of
from tunesmith.verify.quantized import causes, tally
from tunesmith.verify.structure import Dequantized
from tunesmith.verify.weights import Expectation

HALVED = 200


def layers_of(model: Checkpoint) -> dict[str, QuantizedWeight]:
    """The quantized layers by the names of their weights."""
    quantization = quantization_of(model.config)
    assert quantization is not None  # noqa: S101 - a benchmark
    modules = [name.removesuffix(".weight_scale") for name in model.tensors if name.endswith(".weight_scale")]
    found = {module: quantization.scheme_of(module) for module in modules}
    return {f"{module}.weight": QuantizedWeight(model, module, scheme) for module, scheme in found.items() if scheme}


def along(layer: QuantizedWeight, x_TI: np.ndarray, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Of every group, its gain and the share of its errors' energy that lies along its numbers."""
    stored = factor * layer.float64(0, len(x_TI))
    groups = (len(x_TI), -1, layer.scheme.group_size or x_TI.shape[1])
    x, error = x_TI.reshape(groups), (stored - x_TI).reshape(groups)
    xx, ee, ex = (x * x).sum(2), (error * error).sum(2), (error * x).sum(2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1 + ex / xx, np.nan_to_num(ex * ex / (ee * xx))


def measure(run: Path, directory: Path, view: str | None) -> str:
    """One line."""
    opened = ts.open_run(run)
    chosen = checkpoint_of(opened, "final")
    base = Checkpoint(base_of(opened, chosen, None)[1])
    stack = Stack([(chosen.path, 1.0)])
    binding = stack.bind(base)
    stored, seen = (Expectation(base, stack, binding, view=one) for one in (None, BaseView("nf4")))
    own, other = (stored, seen) if view is None else (Expectation(base, stack, binding, view=BaseView(view)), stored)
    model = Checkpoint(directory)
    layers = layers_of(model)
    most, least = 0.0, 1.0
    for number, (name, layer) in enumerate(layers.items()):
        rows = own.tensor(name).tile(0, min(layer.rows, 512))
        gain, share = along(layer, rows.start + rows.delta, 1.0)
        out = (gain < tally._GAINS[0]) | (gain > tally._GAINS[1])
        most = max(most, float(share[out].max(initial=0.0)))
        if number % max(1, len(layers) // 8) == 0:
            least = min(least, float(along(layer, rows.start + rows.delta, 0.5)[1].ravel()[:HALVED].min()))
    whole, names = Dequantized(model, layers), list(layers)[:: max(1, len(layers) // 8)][:8]
    shares = [causes._share(names, whole, mine, theirs) for mine, theirs in ((own, other), (other, own))]
    made = "stored" if view is None else view
    return f"| {directory.name} | {made} | {most:.2f} | {least:.2f} | {shares[0]:.2f} | {shares[1]:.2f} |"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("directories", nargs="+")
    options = parser.parse_args()
    print(f"limits: along {tally._ALONG}, start {causes._STARTED}")
    print("| directory | start | along, out of bounds | halved, least | own | other |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for given in options.directories:
        directory, _, view = given.partition("=")
        print(measure(options.run, Path(directory), view or None), flush=True)


if __name__ == "__main__":
    main()
