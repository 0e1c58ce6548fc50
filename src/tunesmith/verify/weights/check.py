"""Level 3: every element of every tensor, recomputed in float64 by arithmetic of its own.

For a stored value v and the exact value x of :mod:`tunesmith.verify.weights.expected`, with v's own neighbours
v⁻ < v < v⁺ in the stored dtype:

- *exact*: no neighbour is nearer to x than v (on a tie either will do: x's own error spans it);
- *twice-rounded*: something was rounded before the sum was: |v − x| is within half a step and the rounding errors of W
  and Δ in the stored dtype, of Δ summed in float32, and of a float32 sum that is then stored in fewer bits; or v is
  within half a step of what becomes of x when W is cast to the stored dtype first and a trained magnitude is applied in
  float32, or when several adapters are merged one after another;
- *faithful*: v⁻ < x < v⁺, so that v is one of the two values that bracket x, as after stochastic rounding;
- *outside*: none of these explains v.

Whoever rounds to nearest leaves no faithful element, and whoever rounds otherwise leaves many.  A few among very many
are therefore *strays* (:func:`strays`): numbers that changed after the merge.  Where nothing is added, only the nearest
value will do, which is x itself where the dtype is the same.  A tensor in a dtype that cannot be computed with is held
against the base's byte for byte.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np
from threadpoolctl import threadpool_limits

from tunesmith.checkpoint import FLOAT_DTYPES, Array, Checkpoint, Float64, TensorInfo, as_float64
from tunesmith.executors import workers_of
from tunesmith.progress import Cancellation, ProgressCallback, SharedProgress
from tunesmith.verify.records import TensorVerdict
from tunesmith.verify.weights.expected import Expectation, Expected, Interval, Matrix, early_rounding
from tunesmith.verify.weights.kernel import available, tally_bf16
from tunesmith.verify.weights.parts import Part, in_order, settle_in
from tunesmith.verify.weights.rounding import is_nearest, with_neighbours

FEW_ELEMENTS = 64
_STRAY_SHARE = 1e-4
_CHUNK_BYTES = 1 << 20
_PART_ELEMENTS = 1 << 23  # what is handed to one worker at once
_READ_ELEMENTS = 1 << 19  # system calls are dear
_PAYS_TO_COMPILE = 50_000_000


@dataclass
class Tally:
    """Sums over tiles of one tensor; the first seven count elements, in the order of :func:`tally_bf16`'s counts.

    ``either`` counts those among the twice-rounded that would be faithful, had none been rounded twice.
    """

    elements: int = 0
    exact: int = 0
    faithful: int = 0
    twice_rounded: int = 0
    either: int = 0
    outside: int = 0
    unchanged: int = 0
    delta_delta: float = 0.0
    added_delta: float = 0.0
    error_error: float = 0.0
    not_finite: int = 0

    def add(self, other: Tally) -> None:
        """Add another tile's sums."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def verdict(self, name: str, module: str | None) -> TensorVerdict:
        """The tensor's record."""
        moved = self.delta_delta > 0
        # One way of rounding made the tensor.  Near a midpoint both explain a number; it is the commoner one's.
        by_neighbour = self.either if self.faithful > self.twice_rounded else 0
        return TensorVerdict(
            name=name,
            module=module,
            elements=self.elements,
            exact=self.exact,
            faithful=self.faithful + by_neighbour,
            twice_rounded=self.twice_rounded - by_neighbour,
            outside=self.outside,
            not_finite=self.not_finite,
            unchanged=self.unchanged,
            gain=self.added_delta / self.delta_delta if moved else None,
            relative_error=(self.error_error / self.delta_delta) ** 0.5 if moved else None,
            delta_norm=self.delta_delta**0.5,
        )


def check_weights(
    merged: Checkpoint,
    expectation: Expectation,
    *,
    without: Collection[str] = (),
    sample: bool = False,
    executor: Executor | None = None,
    progress: ProgressCallback,
    cancellation: Cancellation,
) -> tuple[TensorVerdict, ...]:
    """Classify every element of every tensor that the merged model should hold and does.

    Args:
        merged: the merged model.
        expectation: what it should hold.
        without: tensors to pass over, such as those that are stored as codes.
        sample: only look at the first, the last and another tile of each tensor.
        executor: what classifies the parts; None for a pool of threads, one a core.
        progress: told of elements done.
        cancellation: read between tiles, or between parts where an executor was given.

    Returns:
        One verdict a tensor, in the base's order, new tensors last; their counts are of what was looked at.
    """
    stored = {name: info for name, info in merged.tensors.items() if name not in without}
    names = [name for name in expectation.names if name in stored and _comparable(stored[name], expectation)]
    parts = [part for name in names for part in parts_of(expectation, name, sample=sample)]
    total = sum(part.elements for part in parts)
    report = SharedProgress("verify weights", total, "elements", progress=progress, cancellation=cancellation)
    parts = [replace(part, compiled=True) for part in parts] if _pays_to_compile(parts, expectation) else parts
    tallies = {name: Tally() for name in names}
    with threadpool_limits(1), workers_of(executor) as workers:  # threads of BLAS would fight ours
        job = partial(tally_part, merged, expectation)
        for part, tally in zip(parts, in_order(workers, job, parts, report), strict=True):
            tallies[part.name].add(tally)
    return tuple(tallies[name].verdict(name, expectation.tensor(name).module) for name in names)


def _pays_to_compile(parts: Sequence[Part], expectation: Expectation) -> bool:
    """Whether the compiled arithmetic is there, and saves more time than it takes to load."""
    changed = sum(part.elements for part in parts if expectation.updates.get(part.name))
    return changed > _PAYS_TO_COMPILE and available()


def parts_of(expectation: Expectation, name: str, *, sample: bool) -> list[Part]:
    """The parts of one tensor; of a sample, the first, the last and another."""
    expected = expectation.tensor(name)
    whole = Part(name, 0, expected.rows, expected.rows * expected.columns)
    if expected.whole_at_once or whole.elements == 0:
        return [whole]
    rows = list(expected.tiles(elements=None if sample else _PART_ELEMENTS))
    if sample:
        rows = sorted({rows[0], rows[zlib.crc32(name.encode()) % len(rows)], rows[-1]})
    return [Part(name, start, stop, (stop - start) * expected.columns) for start, stop in rows]


def tally_part(
    merged: Checkpoint, expectation: Expectation, part: Part, told: Callable[[int, str], None] | None = None
) -> Tally:
    """Classify a part, tile by tile.

    Args:
        merged: the merged model.
        expectation: what it should hold.
        part: which rows.
        told: called with the elements of each tile and the tensor's name.

    Returns:
        The sums.
    """
    settle_in()
    expected, total = expectation.tensor(part.name), Tally()
    for tally in _tiles_of(merged, expectation, expected, part):
        total.add(tally)
        if told is not None:
            told(tally.elements, part.name)
    return total


def _tiles_of(merged: Checkpoint, expectation: Expectation, expected: Expected, part: Part) -> Iterator[Tally]:
    if merged.info(expected.name).dtype not in FLOAT_DTYPES:
        yield from _compare_bytes(merged, expectation.base, expected, part)
        return
    stored = matrix_of(merged, expected)
    for start, stop in expected.tiles(part.start, part.stop, elements=_READ_ELEMENTS):
        tally = _at_once(stored, expected, start, stop, compiled=part.compiled)
        if tally is not None:
            yield tally
        else:
            yield from (tally_rows(stored, expected, *rows) for rows in expected.tiles(start, stop))


def _at_once(stored: Matrix, expected: Expected, start: int, stop: int, *, compiled: bool) -> Tally | None:
    """Rows that are kept as they were, or that the compiled pass knows; None where they need a closer look."""
    values, dtype = stored.read(start, stop), stored.info.dtype
    kept = expected.kept(start, stop)
    if kept is not None:
        if not _same_bits(kept, (values, dtype)) or not expected.begins_as_itself:
            return None
        return Tally(elements=values.size, exact=values.size, unchanged=values.size)
    update = expected.one_update(start, stop) if dtype == "BF16" and compiled else None
    if update is None:
        return None
    total = Tally()
    for first, last in expected.tiles(start, stop):
        rows = slice(first - start, last - start)
        delta_TC = update.b_TR[rows] @ update.a_RC
        told = tally_bf16(values[rows], update.begin[rows], delta_TC, update.bound_T[rows])
        if told is None:
            return None
        total.add(Tally((last - first) * expected.columns, *told[0], *told[1]))
    return total


def _same_bits(first: tuple[Array, str], second: tuple[Array, str]) -> bool:
    (ours, dtype), (theirs, other) = first, second
    return dtype == other and np.array_equal(ours.reshape(-1).view(np.uint8), theirs.reshape(-1).view(np.uint8))


def matrix_of(merged: Checkpoint, expected: Expected) -> Matrix:
    """A tensor of the merged model in the rows and columns that it is recomputed in."""
    return Matrix.of(merged.shards[merged.shard_of(expected.name)], expected.name, expected.columns)


def tally_rows(stored: Matrix, expected: Expected, start: int, stop: int) -> Tally:
    """Classify some rows.

    Args:
        stored: the merged model's tensor.
        expected: what it is held against, with as many rows and columns.
        start: the first row.
        stop: the row to stop before.

    Returns:
        The sums; ``unchanged`` counts what equals the base's own tensor of that name.
    """
    values, dtype = stored.read(start, stop), stored.info.dtype
    kept = expected.kept(start, stop)
    if kept is not None and _same_bits(kept, (values, dtype)):
        tally = Tally(elements=values.size, exact=values.size, unchanged=values.size)
    else:
        tile = expected.tile(start, stop)
        tally = classify(values, dtype, tile.start, tile.delta, tile.bound, early=tile.early)
        if not tile.summed:
            # A value that is only stored anew has no second neighbour to choose.
            tally.outside, tally.faithful = tally.outside + tally.faithful, 0
            tally.either = 0
    if not expected.begins_as_itself:
        before = expected.of_base(start, stop)
        tally.unchanged = 0 if before is None else int(np.count_nonzero(as_float64(values, dtype) == before))
    return tally


def _compare_bytes(merged: Checkpoint, base: Checkpoint, expected: Expected, part: Part) -> Iterator[Tally]:
    """The tallies of a tensor in a dtype that is no floating-point one of ours, whole numbers of elements at a time."""
    name = expected.name
    ours, theirs = merged.info(name), base.info(name)
    bits = 8 * ours.size_bytes // max(1, ours.elements)
    width = max(1, bits // 8)
    row_bytes = ours.size_bytes // max(1, expected.rows)
    begin, end = part.start * row_bytes, ours.size_bytes if part.stop == expected.rows else part.stop * row_bytes
    paths = [checkpoint.shards[checkpoint.shard_of(name)].path for checkpoint in (merged, base)]
    with paths[0].open("rb") as first, paths[1].open("rb") as second:
        first.seek(ours.begin + begin)
        second.seek(theirs.begin + begin)
        for done in range(begin, end, _CHUNK_BYTES):
            count = min(_CHUNK_BYTES, end - done)
            pair = [np.frombuffer(file.read(count), np.uint8).reshape(-1, width) for file in (first, second)]
            elements = 8 * count // bits
            differing = int((pair[0] != pair[1]).any(axis=1).sum()) * max(1, 8 // bits)
            same = elements - min(differing, elements)
            yield Tally(elements=elements, exact=same, unchanged=same, outside=elements - same)


def strays(tensors: Sequence[TensorVerdict]) -> dict[str, int]:
    """Faithful elements too few to come from a way of rounding, by tensor; empty where there are none or many."""
    found = {tensor.name: tensor.faithful for tensor in tensors if tensor.faithful}
    total, elements = sum(found.values()), sum(tensor.elements for tensor in tensors)
    return found if 0 < total <= max(1, min(FEW_ELEMENTS, _STRAY_SHARE * elements)) else {}


def classify(
    stored: Array,
    dtype: str,
    base: Float64,
    delta: Float64,
    bound: Float64,
    *,
    early: Callable[[str], list[Interval]] | None = None,
) -> Tally:
    """Classify stored values against base + delta.

    Args:
        stored: the merged model's values as stored (BF16 as uint16 patterns), any shape.
        dtype: their safetensors dtype.
        base: the base's values, exact.
        delta: what should have been added.
        bound: bound on |delta|'s own error, broadcastable to it.
        early: where roundings before the last one may have moved base + delta to; None for the usual ones, of which
            there are none where nothing was to be added.

    Returns:
        The sums.
    """
    value, x = as_float64(stored, dtype), base + delta
    added = value - base
    error = added - delta
    finite = bool(np.isfinite(_dot(value, value)))
    tally = Tally(
        elements=value.size,
        unchanged=int(np.count_nonzero(added == 0)),
        delta_delta=_dot(delta, delta),
        added_delta=_dot(added, delta) if finite else 0.0,
        error_error=_dot(error, error) if finite else float("inf"),
        not_finite=0 if finite else int(np.count_nonzero(~np.isfinite(value))),
    )
    plain = is_nearest(stored, x, dtype)
    if not finite:
        plain &= ~np.isnan(value)
    tally.exact = int(np.count_nonzero(plain))
    if tally.exact < tally.elements:
        rest = ~plain
        bounds = np.broadcast_to(bound, x.shape)[rest]
        intervals = [early_rounding(base[rest], delta[rest], bounds, dtype)] if early is None else early(dtype)
        if early is not None:
            intervals = [(low[rest], high[rest]) for low, high in intervals]
        _classify_rest(tally, stored[rest], dtype, x[rest], intervals, bounds)
    return tally


def _dot(first: Float64, second: Float64) -> float:
    """Σ first·second by numpy itself: BLAS shares out even so short a sum, and waits long for it on a busy machine."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.einsum("i,i->", first.reshape(-1), second.reshape(-1)))


def _classify_rest(
    tally: Tally, stored: Array, dtype: str, x: Float64, early: Sequence[Interval], bound: Float64
) -> None:
    """Count what :func:`is_nearest` could not settle, one dimension."""
    value, below, above = with_neighbours(stored, dtype)
    slack = bound + 2.0**-52 * np.abs(x)
    with np.errstate(invalid="ignore"):
        # From step to step, and not by which of the three is nearest: of numbers far below x, float64 cannot tell.
        exact = (x <= value + (above - value) / 2 + slack) & (x >= value - (value - below) / 2 - slack)
        # The half steps; beside the largest number stands infinity, whose step is that of the other side.
        up, down = above - value, value - below
        up, down = np.where(np.isfinite(up), up, down) / 2, np.where(np.isfinite(down), down, up) / 2
        twice = np.zeros(exact.shape, bool)
        for low, high in early:
            twice |= (low < high) & (value + up + slack >= low) & (value - down - slack <= high)
        twice &= ~exact
        # Strictly between: who stands on a value of the grid has no second neighbour to choose.
        between = ~exact & (x > below + slack) & (x < above - slack)
        faithful = between & ~twice
    finite = np.isfinite(value)
    tally.exact += int(np.count_nonzero(exact & finite))
    tally.faithful += int(np.count_nonzero(faithful & finite))
    tally.twice_rounded += int(np.count_nonzero(twice & finite))
    tally.either += int(np.count_nonzero(between & twice & finite))
    tally.outside += int(np.count_nonzero(~(exact | faithful | twice) | ~finite))


def _comparable(ours: TensorInfo, expectation: Expectation) -> bool:
    """Whether a tensor is of the right shape, and can be computed with or compared byte for byte."""
    if ours.shape != expectation.shape(ours.name):
        return False
    if ours.name not in expectation.infos or ours.name in expectation.updates:
        return ours.dtype in FLOAT_DTYPES
    theirs = expectation.infos[ours.name].dtype
    return ours.dtype == theirs or (ours.dtype in FLOAT_DTYPES and theirs in FLOAT_DTYPES)
