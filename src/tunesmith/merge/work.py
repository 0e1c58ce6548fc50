"""Carry out one unit of work: read, compute tile by tile, write.  Nothing whole is ever in memory but the factors."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import xxhash
from threadpoolctl import threadpool_limits

from tunesmith.adapter import Copied, LowRank, Magnitude, Stack
from tunesmith.allocator import keep_freed_memory
from tunesmith.checkpoint import Array, Float64, Upload, copy_range, open_regular, stored_path, write_at
from tunesmith.checkpoint import read_at as read_stored
from tunesmith.errors import CheckpointError
from tunesmith.merge.exact import (
    Segment,
    Start,
    column_norms,
    exact_tile,
    not_finite,
    read_at,
    row_tiles,
    segments,
    stack_of,
)
from tunesmith.merge.kernel import can_settle, settle_bf16, settle_panel
from tunesmith.merge.rounders import (
    CALIBRATED,
    ENOUGH,
    LESS_IF_SCALED,
    WIDEST,
    calibrated,
    faithful,
    recorded_inputs,
    rounding_of,
    stochastic,
)
from tunesmith.merge.rounding import Feedback, Rounder
from tunesmith.merge.tiles import TileSums, settle_tile
from tunesmith.merge.units import Compute, Context, Copy, Literal, TensorTask, Unit

TILE_ELEMENTS = 1 << 16
_SAMPLED_ROWS = 32
FEEDBACK_TILES = 16  # so many tiles at once
_COPY_BYTES = 16 << 20
_READ_BYTES = 1 << 18  # fits the second cache, so that the checksum reads what was just copied there

Sums = dict[str, TileSums]

Tick = Callable[[int, str], None]


@dataclass(frozen=True)
class UnitReceipt:
    """What one unit of work wrote.

    Attributes:
        checksum: XXH3 (128 bits, hexadecimal) of its bytes, in their order.
        sums: by tensor, what rounding kept of what is added to it.
        sha256: SHA-256 of its bytes, where they went into a storage.
    """

    checksum: str
    sums: Sums
    sha256: str | None = None


class _Target:
    """The unit's file: what is written to it goes into the checksum as it passes."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDWR)
        self.checksum = xxhash.xxh3_128()

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Write bytes; every call goes on where the one before ended."""
        write_at(self.descriptor, data, offset)
        self.checksum.update(data)


def run_unit(unit: Unit, tick: Tick | None = None) -> UnitReceipt:
    """Write one unit's bytes.

    Args:
        unit: what to write.
        tick: called with the bytes of each part that is written and what it belongs to.

    Returns:
        What was written.

    Raises:
        CheckpointError: a tensor is not finite, or does not stay finite in its dtype.
        OSError: something cannot be read or written.
    """
    keep_freed_memory()
    if multiprocessing.parent_process() is not None:
        one_thread_of_blas()
    tick = tick or _silent
    if (far := stored_path(unit.target)) is not None:
        with Upload(far) as upload:
            sums = _pieces(unit, upload, tick)
        return UnitReceipt(upload.checksum.hexdigest(), sums, upload.sha256.hexdigest())
    target = _Target(unit.target)
    try:
        sums = _pieces(unit, target, tick)
    finally:
        os.close(target.descriptor)
    return UnitReceipt(target.checksum.hexdigest(), sums)


def _pieces(unit: Unit, target: _Target | Upload, tick: Tick) -> Sums:
    sums: Sums = {}
    for piece in unit.pieces:
        if isinstance(piece, Compute):
            kept = _compute(piece, unit.context, target, tick)
            if piece.task.adds:
                name = piece.task.info.name
                sums[name] = sums.get(name, TileSums()) + kept
        elif isinstance(piece, Copy):
            _copy(piece, target, tick)
        else:
            _literal(piece, target, tick)
    return sums


def checksum_of(path: Path, begin: int, end: int) -> str:
    """The checksum of a range of a file, as :func:`run_unit` makes it; of what there is, where the file ends before."""
    checksum, buffer = xxhash.xxh3_128(), memoryview(bytearray(_READ_BYTES))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while begin < end:
            count = read_at(descriptor, buffer[: min(_READ_BYTES, end - begin)], begin)
            if not count:
                break
            checksum.update(buffer[:count])
            begin += count
    finally:
        os.close(descriptor)
    return checksum.hexdigest()


@lru_cache(maxsize=1)
def one_thread_of_blas() -> None:
    """In a worker process of a pool, for good: its siblings use the other cores.  Threads are the caller's matter."""
    threadpool_limits(1)


def _silent(_count: int, _detail: str) -> None:
    pass


def _literal(piece: Literal, target: _Target | Upload, tick: Tick) -> None:
    target.write(piece.data, piece.begin)
    tick(piece.count, "header")


def _copy(piece: Copy, target: _Target | Upload, tick: Tick) -> None:
    """Copy in the kernel, and read back for the checksum what lies in its cache then."""
    if isinstance(target, Upload) or stored_path(piece.source) is not None:
        _pass_on(piece, target, tick)
        return
    source, buffer = os.open(piece.source, os.O_RDONLY), memoryview(bytearray(_READ_BYTES))
    try:
        for position in range(0, piece.count, _COPY_BYTES):
            count = min(_COPY_BYTES, piece.count - position)
            begin = piece.begin + position
            copy_range(source, target.descriptor, piece.offset + position, count, to=begin)
            for start in range(begin, begin + count, _READ_BYTES):
                size = read_at(target.descriptor, buffer[: min(_READ_BYTES, begin + count - start)], start)
                target.checksum.update(buffer[:size])
            tick(count, "untouched tensors")
    finally:
        os.close(source)


def _pass_on(piece: Copy, target: _Target | Upload, tick: Tick) -> None:
    """Copy from a storage, or into one."""
    for position in range(0, piece.count, _COPY_BYTES):
        count = min(_COPY_BYTES, piece.count - position)
        target.write(_bytes_of(piece.source, piece.offset + position, count), piece.begin + position)
        tick(count, "untouched tensors")


def _bytes_of(source: str, offset: int, count: int) -> bytes:
    if (far := stored_path(source)) is not None:
        return read_stored(far, offset, count)
    with open_regular(source) as file:
        file.seek(offset)
        data = file.read(count)
    if len(data) != count:
        raise CheckpointError("The file became shorter while it was read.", where=source)
    return data


def _compute(piece: Compute, context: Context, target: _Target | Upload, tick: Tick) -> TileSums:
    task, stack, total = piece.task, stack_of(context), TileSums()
    with Start(task, stack, context, rows=None if task.whole else (piece.start, piece.stop)) as begun:
        norms = column_norms(task, stack, begun, height=_tile_rows(task, None)) if task.whole else None
        for segment in segments(task, piece.start, piece.stop, stack):
            rounder = _rounder(task, segment, context, begun, norms)
            fast = _Fast.of(task, context, rounder)
            height = fast.height if fast else _tile_rows(task, rounder)
            for rows in row_tiles(segment.start, segment.stop, height):
                done = fast.merge(begun, segment, rows=rows) if fast else None
                for part, (merged, sums) in (
                    [(rows, done)] if done else _plainly(task, stack, begun, segment, rows, norms, rounder)
                ):
                    if sums.overflowed:
                        raise not_finite(task, begun.read(*part)[0])
                    data = np.ascontiguousarray(merged).reshape(-1).view(np.uint8).data
                    target.write(data, task.info.begin + part[0] * task.row_bytes)
                    total += sums
                    tick(merged.nbytes, task.info.name)
    return total


def _rounder(
    task: TensorTask, segment: Segment, context: Context, begun: Start, norms: Float64 | None
) -> Rounder | None:
    """How a segment's rows are rounded; None for to nearest."""
    rounding, a_RI = rounding_of(context.rounding, task.info.dtype, task.updates), segment.a_RI
    if rounding == "stochastic":
        return stochastic(context.seed, task.info.name, a_RI)
    if rounding == "nearest" or a_RI is None:
        return None
    inputs_NI = None
    if rounding in CALIBRATED and context.inputs is not None:
        module = next(update.module for update in task.updates if isinstance(update, LowRank))
        inputs_NI = recorded_inputs(context.inputs, module)
    scaled = any(isinstance(update, Magnitude) for update in task.updates)
    enough = ENOUGH - LESS_IF_SCALED * scaled
    if rounding == "faithful" and _nearest_keeps(task, segment, stack_of(context), begun, norms) >= enough:
        return None
    calibrates = inputs_NI is not None and inputs_NI.shape[1] == task.matrix[1]
    narrow = len(a_RI) + sum(update.r for update in task.beside) <= WIDEST
    beside = task.beside if calibrates or narrow else ()
    beside_RI = [stack_of(context).factors(update)[0] for update in beside]
    if calibrates and inputs_NI is not None:
        return calibrated(inputs_NI, _squared_steps(task, begun), a_RI, beside_RI, clamp=rounding == "calibrated")
    return faithful(a_RI, beside_RI)


def _nearest_keeps(task: TensorTask, segment: Segment, stack: Stack, begun: Start, norms: Float64 | None) -> float:
    """The gain of rounding to nearest, from some rows in the middle of the tensor, or of its block.

    They hang on nothing but the tensor, so that all its rows are rounded in one way wherever it is cut.
    """
    height = task.block_rows or task.matrix[0]
    first = segment.start // max(1, height) * height + max(0, (height - _SAMPLED_ROWS) // 2)
    rows = first, min(first + _SAMPLED_ROWS, first + height)
    (sampled,) = segments(task, *rows, stack)
    _, sums = _tile(task, stack, begun, sampled, rows=rows, norms=norms, rounder=None)
    return sums.realised_delta / sums.delta_delta if sums.delta_delta else 1.0


def _squared_steps(task: TensorTask, begun: Start) -> Float64:
    """Mean over all rows of step², where step is the distance of a bf16 number to the next, in every column."""
    rows, columns = task.matrix
    total_I = np.zeros(columns)
    for start, stop in row_tiles(0, rows, _tile_rows(task, None)):
        _, exponents_TI = np.frexp(begun.read(start, stop)[0])
        total_I += np.ldexp(1.0, 2 * (np.maximum(exponents_TI, -125) - 8)).sum(0)
    return np.asarray(total_I / max(1, rows))


def _is_plain(task: TensorTask) -> bool:
    """Whether a tensor is the base's in bf16, stays in bf16, and has nothing but low-rank updates."""
    dtypes = (task.info.dtype, task.source_info.dtype if task.source_info else None, task.view)
    return dtypes == ("BF16", "BF16", None) and all(isinstance(update, LowRank | Copied) for update in task.updates)


def _tile_rows(task: TensorTask, rounder: Rounder | None) -> int:
    """Rows that the plain arithmetic takes at once; with feedback many, for it goes column by column."""
    elements = TILE_ELEMENTS * (FEEDBACK_TILES if isinstance(rounder, Feedback) else 1)
    return max(1, elements // max(1, task.matrix[1]))


class _Fast:
    """The compiled arithmetic, with memory that is used again for all rows of a segment.

    It reads and writes more at once than it computes at once: system calls are dear, and so is memory beyond the
    second cache.

    Args:
        task: the tensor.
        rounder: how it is rounded; None for to nearest.

    Attributes:
        height: how many rows it merges at once.
    """

    ELEMENTS = 1 << 19
    PANEL_ROWS = 128  # with feedback; what a block of their columns takes fits the second cache

    def __init__(self, task: TensorTask, rounder: Feedback | None) -> None:
        columns = max(1, task.matrix[1])
        self._rounder = rounder
        self._a_IR: Float64 | None = None
        self.height = max(1, self.ELEMENTS // columns) if rounder is None else self.PANEL_ROWS
        self._tile_rows = max(1, TILE_ELEMENTS // columns)
        self._delta_TI = np.empty((min(self._tile_rows, self.height), columns)) if rounder is None else None
        self._stored_TI = np.empty((self.height, columns), np.uint16)
        self._merged_TI = np.empty((self.height, columns), np.uint16)

    @classmethod
    def of(cls, task: TensorTask, context: Context, rounder: Rounder | None) -> _Fast | None:
        """The compiled arithmetic for a tensor; None where it has to be done the plain way."""
        if context.compiled and can_settle(rounder) and _is_plain(task):
            return cls(task, rounder if isinstance(rounder, Feedback) else None)
        return None

    def merge(self, begun: Start, segment: Segment, *, rows: tuple[int, int]) -> tuple[Array, TileSums] | None:
        """Merge some rows; None where it must be done the plain way."""
        if segment.a_RI is None or segment.b_OR is None:
            return None
        height = rows[1] - rows[0]
        begun.read_into(self._stored_TI[:height], rows[0])
        b_TR = segment.b_OR[rows[0] - segment.start : rows[1] - segment.start]
        if self._rounder is None:
            total = self._nearest(b_TR, segment.a_RI)
        else:
            stored_TI, merged_TI = self._stored_TI[:height], self._merged_TI[:height]
            if self._a_IR is None:
                self._a_IR = np.ascontiguousarray(segment.a_RI.T)
            total = settle_panel(stored_TI, b_TR, self._a_IR, self._rounder, merged_TI)
        return None if total is None else (self._merged_TI[:height], total)

    def _nearest(self, b_TR: Float64, a_RI: Float64) -> TileSums | None:
        height, total = len(b_TR), TileSums()
        assert self._delta_TI is not None, "made where nothing feeds back"  # noqa: S101
        for start in range(0, height, self._tile_rows):
            part = slice(start, min(start + self._tile_rows, height))
            delta_TI = self._delta_TI[: part.stop - start]
            np.matmul(b_TR[part], a_RI, out=delta_TI)
            sums = settle_bf16(self._stored_TI[part], delta_TI, self._merged_TI[part])
            if sums is None:
                return None
            total += sums
        return total


def _plainly(
    task: TensorTask,
    stack: Stack,
    begun: Start,
    segment: Segment,
    rows: tuple[int, int],
    norms: Float64 | None,
    rounder: Rounder | None,
) -> Iterator[tuple[tuple[int, int], tuple[Array, TileSums]]]:
    for part in row_tiles(*rows, _tile_rows(task, rounder)):
        yield part, _tile(task, stack, begun, segment, rows=part, norms=norms, rounder=rounder)


def _tile(
    task: TensorTask,
    stack: Stack,
    begun: Start,
    segment: Segment,
    *,
    rows: tuple[int, int],
    norms: Float64 | None,
    rounder: Rounder | None,
) -> tuple[Array, TileSums]:
    tile = exact_tile(task, stack, begun, segment, rows=rows, norms=norms)
    return settle_tile(
        tile.w_TI,
        tile.delta_TI,
        task.info.dtype,
        kept_TI=tile.kept_TI,
        result_TI=tile.result_TI,
        rounder=rounder,
        first_row=rows[0],
    )
