"""Level 3 of a quantized model: every code of every quantized tensor against the exact number that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial

from threadpoolctl import threadpool_limits

from tunesmith.executors import workers_of
from tunesmith.progress import Cancellation, ProgressCallback, SharedProgress
from tunesmith.verify.quantized.tally import CodeTally, tally_codes
from tunesmith.verify.records import QuantizedTensor
from tunesmith.verify.structure import Dequantized
from tunesmith.verify.weights import Expectation
from tunesmith.verify.weights.check import parts_of
from tunesmith.verify.weights.parts import Part, in_order, settle_in


def check_codes(
    model: Dequantized,
    expectation: Expectation,
    *,
    sample: bool = False,
    executor: Executor | None = None,
    progress: ProgressCallback,
    cancellation: Cancellation,
) -> tuple[QuantizedTensor, ...]:
    """Hold every code against its number.

    Args:
        model: the quantized model.
        expectation: what it would hold in full.
        sample: only look at the first, the last and another tile of each tensor.
        executor: what classifies the parts; None for a pool of threads, one a core.
        progress: told of elements done.
        cancellation: read between tiles, or between parts where an executor was given.

    Returns:
        One record a quantized tensor, in the base's order; their counts are of what was looked at.
    """
    names = [name for name in expectation.names if name in model.layers]
    parts = [part for name in names for part in parts_of(expectation, name, sample=sample)]
    total = sum(part.elements for part in parts)
    report = SharedProgress("verify codes", total, "elements", progress=progress, cancellation=cancellation)
    tallies = {name: CodeTally() for name in names}
    job = partial(tally_part, model, expectation)
    with threadpool_limits(1), workers_of(executor) as workers:  # threads of BLAS would fight ours
        for part, tally in zip(parts, in_order(workers, job, parts, report), strict=True):
            tallies[part.name].add(tally)
    return tuple(
        tallies[name].verdict(name, expectation.tensor(name).module, model.layers[name].scheme) for name in names
    )


def tally_part(
    model: Dequantized, expectation: Expectation, part: Part, told: Callable[[int, str], None] | None = None
) -> CodeTally:
    """Classify a part, tile by tile.

    Args:
        model: the quantized model.
        expectation: what it would hold in full.
        part: which rows.
        told: called with the elements of each tile and the tensor's name.

    Returns:
        The sums.
    """
    settle_in()
    expected, layer, total = expectation.tensor(part.name), model.layers[part.name], CodeTally()
    for start, stop in expected.tiles(part.start, part.stop):
        tile = expected.tile(start, stop)
        codes, scales = layer.codes(start, stop), layer.scales(start, stop)
        tally = tally_codes(layer.scheme, codes, scales, tile.start + tile.delta, tile.delta, tile.bound)
        if layer.scheme.strategy == "tensor" and start:
            tally.groups = tally.bad_scales = 0  # its one scale was counted with the first rows
        total.add(tally)
        if told is not None:
            told(tally.elements, part.name)
    return total
