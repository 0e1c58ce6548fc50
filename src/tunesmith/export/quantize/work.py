"""Carry out one unit of work: one tensor, read, merged, rounded and stored, rows at a time."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import dataclass, fields

import numpy as np

from tunesmith.adapter import LowRank
from tunesmith.allocator import keep_freed_memory
from tunesmith.checkpoint import Array, Float64, QuantizedScheme, TensorInfo, write_at
from tunesmith.export.quantize.rounders import Rule, rule_of
from tunesmith.export.quantize.scales import codes_of, scales_of
from tunesmith.merge import (
    Context,
    ExactRows,
    ScaledGrid,
    TensorTask,
    Tick,
    Unit,
    one_thread_of_blas,
    round_once,
    round_to_grid,
    run_unit,
)

_TILE_ELEMENTS = 1 << 17
_FEEDBACK_TILES = 8  # with feedback so many at once, for it goes column by column


@dataclass(frozen=True)
class QuantizeUnit:
    """One tensor to quantize.

    Attributes:
        target: the file to write into; it is there, at its full size.
        task: what makes the tensor.
        scheme: how it is stored.
        rounding: how it is to be rounded.
        codes: where its codes go.
        scales: where its scales go.
        shape: where its shape goes; None for a format that does not store it.
        context: what all units share; its ``inputs`` are the recorded ones.
    """

    target: str
    task: TensorTask
    scheme: QuantizedScheme
    rounding: str
    codes: TensorInfo
    scales: TensorInfo
    shape: TensorInfo | None
    context: Context

    @property
    def size_bytes(self) -> int:
        """How many bytes it writes."""
        return self.codes.size_bytes + self.scales.size_bytes + (self.shape.size_bytes if self.shape else 0)


@dataclass(frozen=True)
class RoundedSums:
    """What rounding did to one tensor, in sums, so that tiles add up.

    With E = Ŵ − W' and Δ = W' − W, as :class:`tunesmith.export.quantize.TensorRounded` has them.

    Attributes:
        elements: numbers.
        exact_exact: Σ W'².
        error_error: Σ E².
        delta_delta: Σ Δ².
        error_delta: Σ E·Δ.
        inside: ‖E·basis‖².
        clipped: numbers that lie beyond the outermost codes.
    """

    elements: int = 0
    exact_exact: float = 0.0
    error_error: float = 0.0
    delta_delta: float = 0.0
    error_delta: float = 0.0
    inside: float = 0.0
    clipped: int = 0

    def __add__(self, other: RoundedSums) -> RoundedSums:
        return RoundedSums(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True)
class UnitDone:
    """What one unit wrote.

    Attributes:
        name: the tensor; empty where it was not quantized.
        rounding: how it was rounded.
        sums: what that did.
        measured_inside: whether the error within the row space was.
    """

    name: str = ""
    rounding: str = ""
    sums: RoundedSums = RoundedSums()
    measured_inside: bool = False


def run_any(unit: QuantizeUnit | Unit, tick: Tick | None = None) -> UnitDone:
    """Write one unit's bytes.

    Args:
        unit: a tensor to quantize, or what a merge would write.
        tick: called with the bytes of each part that is written and what it belongs to.

    Returns:
        What was done.

    Raises:
        CheckpointError: a tensor is not finite, or the inputs cannot be read.
        OSError: something cannot be read or written.
    """
    if isinstance(unit, Unit):
        run_unit(unit, tick)
        return UnitDone()
    keep_freed_memory()
    if multiprocessing.parent_process() is not None:
        one_thread_of_blas()
    target = os.open(unit.target, os.O_RDWR)
    try:
        return _quantize(unit, target, tick)
    finally:
        os.close(target)


def _quantize(unit: QuantizeUnit, target: int, tick: Tick | None) -> UnitDone:
    lows = [update for update in unit.task.updates if isinstance(update, LowRank)]
    module = lows[0].module if lows else unit.task.info.name.removesuffix(".weight")
    total = RoundedSums()
    with ExactRows(unit.task, unit.context) as rows:
        count, columns = rows.shape
        rule = rule_of(unit.rounding, rows, unit.scheme, inputs=unit.context.inputs, module=module)
        height = max(1, _TILE_ELEMENTS * (_FEEDBACK_TILES if rule.hessian else 1) // max(1, columns))
        for first, exact_TI, delta_TI in rows.tiles(0, count, height):
            scale_TG = scales_of(exact_TI, unit.scheme, unit.scales.dtype, weights_I=rule.weights_I, signed=rule.signed)
            rounded_TI = _rounded(exact_TI, scale_TG, unit.scheme, rule)
            codes_TI = rounded_TI / unit.scheme.spread(scale_TG, columns)
            total += _sums(exact_TI, delta_TI, rounded_TI, scale_TG=scale_TG, scheme=unit.scheme, rule=rule)
            written = _write_rows(target, unit.codes, first, stored_codes(codes_TI, unit.scheme))
            written += _write_rows(target, unit.scales, first, round_once(scale_TG, unit.scales.dtype))
            if tick is not None:
                tick(written, unit.task.info.name)
    if unit.shape is not None:
        written = write_at(target, np.array(rows.shape, "<i8").tobytes(), unit.shape.begin)
        if tick is not None:
            tick(written, unit.task.info.name)
    return UnitDone(unit.task.info.name, rule.name, total, rule.basis_IM is not None)


def _rounded(exact_TI: Float64, scale_TG: Float64, scheme: QuantizedScheme, rule: Rule) -> Float64:
    grid = ScaledGrid(scale_TG, codes_of(scheme), group_size=scheme.group_size)
    if rule.hessian is None:
        return grid.at(np.arange(exact_TI.shape[1])).nearest(exact_TI.T).T
    return round_to_grid(exact_TI, rule.hessian, grid, clamp=False)


def stored_codes(codes_TI: Float64, scheme: QuantizedScheme) -> Array:
    """Codes as they are stored, by the compressed-tensors package's own packing and torch's own E4M3.

    Args:
        codes_TI: numbers that a code can be, float64.
        scheme: how they are stored.

    Returns:
        Bytes of T rows.
    """
    import torch

    if scheme.is_float:
        floats_TI = torch.from_numpy(np.ascontiguousarray(codes_TI, np.float32)).to(torch.float8_e4m3fn)
        return np.asarray(floats_TI.view(torch.uint8).numpy())
    codes = torch.from_numpy(np.ascontiguousarray(np.rint(codes_TI), np.int8))
    if scheme.format == "pack-quantized":
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        codes = pack_to_int32(codes, scheme.bits)
    return np.asarray(codes.numpy())


def _write_rows(target: int, info: TensorInfo, first: int, rows: Array) -> int:
    data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
    return write_at(target, data, info.begin + first * (info.size_bytes // info.shape[0]))


def _sums(
    exact_TI: Float64,
    delta_TI: Float64,
    rounded_TI: Float64,
    *,
    scale_TG: Float64,
    scheme: QuantizedScheme,
    rule: Rule,
) -> RoundedSums:
    error_TI = rounded_TI - exact_TI
    aim_TI = exact_TI / scheme.spread(scale_TG, exact_TI.shape[1])
    beyond_TI = (aim_TI > scheme.highest + 0.5) | (aim_TI < scheme.lowest - 0.5)
    return RoundedSums(
        elements=exact_TI.size,
        exact_exact=_dot(exact_TI, exact_TI),
        error_error=_dot(error_TI, error_TI),
        delta_delta=_dot(delta_TI, delta_TI),
        error_delta=_dot(error_TI, delta_TI),
        inside=0.0 if rule.basis_IM is None else float(np.square(error_TI @ rule.basis_IM).sum()),
        clipped=int(np.count_nonzero(beyond_TI)),
    )


def _dot(first_TI: Float64, second_TI: Float64) -> float:
    return float(np.einsum("ti,ti->", first_TI, second_TI))
