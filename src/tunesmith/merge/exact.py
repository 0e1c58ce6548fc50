"""What a merged tensor exactly is, rows at a time, in float64: the one place that a base is read through.

Nothing whole is ever in memory but the factors.

Legend: I columns, O rows, R rank, T rows of one tile.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from tunesmith.adapter import Added, LowRank, Magnitude, Replaced, Rows, Stack
from tunesmith.checkpoint import (
    Array,
    BaseView,
    Checkpoint,
    Float64,
    RangeReader,
    as_float64,
    stored_array,
    stored_path,
)
from tunesmith.errors import CheckpointError
from tunesmith.merge.units import Context, TensorTask

_NORM_ELEMENTS = 1 << 16


@lru_cache(maxsize=1)
def stack_of(context: Context) -> Stack:
    """The adapters of a context, opened once."""
    return Stack(context.adapters)


@lru_cache(maxsize=1)
def base_of(context: Context) -> Checkpoint:
    """The base of a context, opened once."""
    return Checkpoint(context.base)


@dataclass(frozen=True)
class Segment:
    """Rows of a tensor's matrix that share their factors.

    Attributes:
        start: the first row.
        stop: the row to stop before.
        a_RI: the factors A of all their updates, stacked; None where nothing is added.
        b_OR: the factors B, scaled, side by side; row 0 is ``start``'s.
    """

    start: int
    stop: int
    a_RI: Float64 | None = None
    b_OR: Float64 | None = None


@dataclass
class Start:
    """What a tensor is before anything is added to it, rows at a time.  The one place that a base is read through.

    Attributes:
        rows: those that will be read, most of all, where that is known: of a storage they are asked for at once.
    """

    task: TensorTask
    stack: Stack
    context: Context
    rows: tuple[int, int] | None = None
    _file: int | RangeReader | None = field(default=None, init=False)

    def __enter__(self) -> Start:
        if self.task.source is not None:
            far = stored_path(self.task.source)
            held = self._held()
            self._file = os.open(self.task.source, os.O_RDONLY) if far is None else RangeReader(far, held)
        return self

    def __exit__(self, *_: object) -> None:
        if isinstance(self._file, int):
            os.close(self._file)
        self._file = None

    def _held(self) -> tuple[int, int]:
        """The bytes of the rows that will be read."""
        info = self.task.source_info
        if info is None:
            return 0, 0
        row_bytes = info.size_bytes // max(1, self.task.matrix[0])
        start, stop = self.rows or (0, self.task.matrix[0])
        return info.begin + start * row_bytes, info.begin + stop * row_bytes

    def read(self, start: int, stop: int) -> tuple[Float64, Array | None]:
        """Rows of the matrix in float64, and as they are stored where that is already the dtype to store."""
        w_TI, kept_TI = self._begin(start, stop)
        for update in self.task.updates:
            if not isinstance(update, Rows):
                continue
            for place, index in enumerate(update.indices):
                if start <= index < stop:
                    row = as_float64(self.stack.rows(update, place, place + 1), self.stack.info(update).dtype)
                    w_TI[index - start] = row.reshape(-1)
                    kept_TI = None
        return w_TI, kept_TI

    def _begin(self, start: int, stop: int) -> tuple[Float64, Array | None]:
        if self.task.view is not None and self.task.source_info is not None:
            base = base_of(self.context)
            return BaseView(self.task.view).rows(base, self.task.source_info.name, start, stop), None
        stored, dtype = self._stored(start, stop)
        return as_float64(stored, dtype), stored if dtype == self.task.info.dtype else None

    def read_into(self, stored_TI: Array, start: int) -> None:
        """Read rows from ``start`` on, as the base stores them, into memory that is there."""
        info = self.task.source_info
        assert info is not None, "only a base's tensor can be read so"  # noqa: S101
        row_bytes = info.size_bytes // self.task.matrix[0]
        self._fill(stored_TI.data.cast("B"), info.begin + start * row_bytes)

    def _stored(self, start: int, stop: int) -> tuple[Array, str]:
        task, columns = self.task, self.task.matrix[1]
        info = task.source_info
        if self._file is None or info is None:
            update = next(update for update in task.updates if isinstance(update, Replaced))
            stored = self.stack.rows(update, *_indices(task, start, stop))
            return _matrix_rows(task, stored, start, stop), self.stack.info(update).dtype
        row_bytes = info.size_bytes // task.matrix[0]
        data = bytearray((stop - start) * row_bytes)
        self._fill(memoryview(data), info.begin + start * row_bytes)
        return stored_array(bytes(data), info.dtype, (stop - start, columns)), info.dtype

    def _fill(self, view: memoryview, offset: int) -> None:
        if isinstance(self._file, RangeReader):
            self._file.read_into(view, offset)
            return
        while view and self._file is not None:
            try:
                count = read_at(self._file, view, offset)
            except OSError as error:
                raise CheckpointError(
                    "The base model cannot be read.", where=self.task.source, found=error.strerror or error
                ) from error
            if not count:
                raise CheckpointError("The file became shorter while it was read.", where=self.task.source)
            offset, view = offset + count, view[count:]


def column_norms(task: TensorTask, stack: Stack, begun: Start, *, height: int) -> Float64:
    """‖V‖ of every column, V being all that the magnitude is applied to.

    Args:
        task: the tensor.
        stack: the adapters.
        begun: what it begins as.
        height: how many rows are read at once.
    """
    rows, columns = task.matrix
    squares = np.zeros(columns)
    for segment in segments(task, 0, rows, stack):
        for start, stop in row_tiles(segment.start, segment.stop, height):
            w_TI, _ = begun.read(start, stop)
            v_TI = w_TI + _delta(task, stack, segment, rows=(start, stop), like=w_TI)
            squares += np.einsum("ti,ti->i", v_TI, v_TI)
    return np.asarray(np.sqrt(squares))


def segments(task: TensorTask, start: int, stop: int, stack: Stack) -> Iterator[Segment]:
    """Parts of ``start:stop`` with one set of factors each; a block's factors are read when it is reached."""
    lows = [update for update in task.updates if isinstance(update, LowRank)]
    height = task.block_rows or max(1, task.matrix[0])
    for block in range(start // height, -(-stop // height)):
        first, last = max(start, block * height), min(stop, (block + 1) * height)
        mine = [update for update in lows if update.block in (None, block)]
        if not mine:
            yield Segment(first, last)
            continue
        pairs = [(update.scaling, *stack.factors(update)) for update in mine]
        a_RI = np.concatenate([a for _, a, _ in pairs]) if len(pairs) > 1 else pairs[0][1]
        part = slice(first - block * height, last - block * height)
        b_OR = np.concatenate([scaling * b[part] for scaling, _, b in pairs], axis=1)
        yield Segment(first, last, np.ascontiguousarray(a_RI), np.ascontiguousarray(b_OR))


@dataclass(frozen=True)
class ExactTile:
    """Some rows of a tensor.

    Attributes:
        w_TI: what they begin as.
        delta_TI: what is added to them.
        kept_TI: the beginning as it is stored, where that is already the dtype to store.
        result_TI: what they exactly are, where that is not the sum (DoRA's ratio).
    """

    w_TI: Float64
    delta_TI: Float64
    kept_TI: Array | None = None
    result_TI: Float64 | None = None

    @property
    def exact(self) -> Float64:
        """What they exactly are."""
        return self.w_TI + self.delta_TI if self.result_TI is None else self.result_TI


def exact_tile(
    task: TensorTask, stack: Stack, begun: Start, segment: Segment, *, rows: tuple[int, int], norms: Float64 | None
) -> ExactTile:
    """Work out some rows of one segment.

    Args:
        task: the tensor.
        stack: the adapters.
        begun: what it begins as.
        segment: the rows' factors.
        rows: the first row, and the row to stop before.
        norms: of :func:`column_norms`, where the tensor's magnitude is per column.
    """
    w_TI, kept_TI = begun.read(*rows)
    delta_TI, result_TI = _delta(task, stack, segment, rows=rows, like=w_TI), None
    for update in task.updates:
        if isinstance(update, Magnitude):
            result_TI = _scaled(update, stack, w_TI + delta_TI, rows=rows, norms=norms)
            delta_TI = result_TI - w_TI
    return ExactTile(w_TI, delta_TI, kept_TI, result_TI)


def row_tiles(start: int, stop: int, height: int) -> Iterator[tuple[int, int]]:
    """Rows ``start:stop``, so many at once."""
    return ((first, min(first + height, stop)) for first in range(start, stop, height))


def read_at(file: int, into: memoryview, offset: int) -> int:
    """Read bytes at an offset into memory that is there; returns how many, 0 at the file's end."""
    if hasattr(os, "preadv"):
        return os.preadv(file, [into], offset)
    data = os.pread(file, len(into), offset)
    into[: len(data)] = data
    return len(data)


def not_finite(task: TensorTask, w_TI: Float64) -> CheckpointError:
    """The error that a tensor is not finite, or does not stay so; ``w_TI`` is what some rows begin as."""
    return CheckpointError(
        f"The merged tensor would not be finite in {task.info.dtype}."
        if np.isfinite(w_TI).all()
        else "The base tensor holds NaN or infinity.",
        where=f"{task.source or Path('adapter')}: {task.info.name}",
        next_step="check the training run for divergence, and the base model's files",
    )


def _scaled(update: Magnitude, stack: Stack, v_TI: Float64, *, rows: tuple[int, int], norms: Float64 | None) -> Float64:
    m = as_float64(stack.rows(update), stack.info(update).dtype).reshape(-1)
    with np.errstate(divide="ignore", invalid="ignore"):  # what is not finite is refused by the caller
        if update.per == "row":
            ratio_T = m[slice(*rows)] / np.sqrt(np.einsum("ti,ti->t", v_TI, v_TI))
            return np.asarray(ratio_T[:, None] * v_TI)
        assert norms is not None, "found before the first tile"  # noqa: S101
        return np.asarray((m / norms) * v_TI)


def _delta(task: TensorTask, stack: Stack, segment: Segment, *, rows: tuple[int, int], like: Float64) -> Float64:
    start, stop = rows
    if segment.a_RI is not None and segment.b_OR is not None:
        delta_TI = segment.b_OR[start - segment.start : stop - segment.start] @ segment.a_RI
    else:
        delta_TI = np.zeros_like(like)
    for update in task.updates:
        if isinstance(update, Added):
            added = as_float64(stack.rows(update, *_indices(task, start, stop)), stack.info(update).dtype)
            delta_TI += update.scaling * _matrix_rows(task, added, start, stop)
    return delta_TI


def _indices(task: TensorTask, start: int, stop: int) -> tuple[int, int]:
    """The indices of the first dimension that rows ``start:stop`` of the matrix lie in."""
    each = task.block_rows or 1
    return start // each, -(-stop // each)


def _matrix_rows(task: TensorTask, values: Float64, start: int, stop: int) -> Float64:
    """Rows of the matrix, of what was read for :func:`_indices`."""
    first = _indices(task, start, stop)[0] * (task.block_rows or 1)
    return values.reshape(-1, task.matrix[1])[start - first : stop - first]


class ExactRows:
    """The exact rows of one merged tensor, for whoever stores them in another form; used in a ``with``.

    Args:
        task: the tensor.
        context: the base and the adapters.

    Attributes:
        shape: rows and columns of the tensor as a matrix.
        a_RI: the factors A of all its low-rank updates, stacked; None where there are none, or where the tensor is a
            stack of matrices, each with factors of its own.
    """

    def __init__(self, task: TensorTask, context: Context) -> None:
        self.task, self.shape = task, task.matrix
        self._stack = stack_of(context)
        self._begun = Start(task, self._stack, context)
        self.a_RI = self._stacked(tuple(u for u in task.updates if isinstance(u, LowRank) and u.block is None))
        self._norms: Float64 | None = None

    def _stacked(self, updates: tuple[LowRank, ...]) -> Float64 | None:
        factors = [self._stack.factors(update)[0] for update in updates]
        return np.ascontiguousarray(np.concatenate(factors)) if factors else None

    def __enter__(self) -> ExactRows:
        self._begun.__enter__()
        if self.task.whole:
            height = max(1, _NORM_ELEMENTS // max(1, self.shape[1]))
            self._norms = column_norms(self.task, self._stack, self._begun, height=height)
        return self

    def __exit__(self, *_: object) -> None:
        self._begun.__exit__()

    def tiles(self, start: int, stop: int, height: int) -> Iterator[tuple[int, Float64, Float64]]:
        """Rows ``start:stop``, at most ``height`` at once.

        Yields:
            The first row's place, the exact rows, and what the update adds to them, (T, I), float64.

        Raises:
            CheckpointError: what the tensor begins as, or what it becomes, is not finite.
        """
        for segment in segments(self.task, start, stop, self._stack):
            for rows in row_tiles(segment.start, segment.stop, height):
                tile = exact_tile(self.task, self._stack, self._begun, segment, rows=rows, norms=self._norms)
                exact_TI = tile.exact
                if not np.isfinite(exact_TI).all():
                    raise not_finite(self.task, tile.w_TI)
                yield rows[0], exact_TI, tile.delta_TI
