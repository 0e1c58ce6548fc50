"""Level 3: every element of every tensor, recomputed in float64 by arithmetic of its own.

For a stored value v and the exact value x of :mod:`tunesmith.verify.expected`, with v's own neighbours v⁻ < v < v⁺ in
the stored dtype:

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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np

from tunesmith.allocator import keep_freed_memory
from tunesmith.checkpoint import FLOAT_DTYPES, Array, Checkpoint, Float64, TensorInfo, as_float64
from tunesmith.progress import Cancellation, Progress, ProgressCallback
from tunesmith.verify.expected import Expectation, Expected, Interval, Matrix, early_rounding
from tunesmith.verify.records import TensorVerdict
from tunesmith.verify.rounding import is_nearest, with_neighbours

FEW_ELEMENTS = 64
_STRAY_SHARE = 1e-4
_CHUNK_BYTES = 1 << 20


@dataclass
class Tally:
    """Sums over tiles of one tensor; the first seven count elements.

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
            unchanged=self.unchanged,
            gain=self.added_delta / self.delta_delta if moved else None,
            relative_error=(self.error_error / self.delta_delta) ** 0.5 if moved else None,
            delta_norm=self.delta_delta**0.5,
        )


def check_weights(
    merged: Checkpoint, expectation: Expectation, *, progress: ProgressCallback, cancellation: Cancellation
) -> tuple[TensorVerdict, ...]:
    """Classify every element of every tensor that the merged model should hold and does.

    Args:
        merged: the merged model.
        expectation: what it should hold.
        progress: told of elements done.
        cancellation: read between tiles.

    Returns:
        One verdict a tensor, in the base's order, new tensors last.
    """
    keep_freed_memory()
    stored = merged.tensors
    names = [name for name in expectation.names if name in stored and _comparable(stored[name], expectation)]
    total = sum(stored[name].elements for name in names)
    done = 0
    verdicts = []
    for name in names:
        tally = Tally()
        expected = expectation.tensor(name)
        for tile in _tallies(merged, expectation, expected):
            tally.add(tile)
            done += tile.elements
            progress(Progress("verify weights", done, total, "elements", name))
            cancellation.check()
        verdicts.append(tally.verdict(name, expected.module))
    return tuple(verdicts)


def _tallies(merged: Checkpoint, expectation: Expectation, expected: Expected) -> Iterator[Tally]:
    """The tallies of one tensor's tiles."""
    if merged.info(expected.name).dtype not in FLOAT_DTYPES:
        yield from _compare_bytes(merged, expectation.base, expected.name)
        return
    stored = matrix_of(merged, expected)
    for start, stop in expected.tiles():
        yield tally_rows(stored, expected, start, stop)


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
    if expected.kept(start, stop) == (values.tobytes(), dtype):
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


def _compare_bytes(merged: Checkpoint, base: Checkpoint, name: str) -> Iterator[Tally]:
    """The tallies of a tensor in a dtype that is no floating-point one of ours, whole numbers of elements at a time."""
    ours, theirs = merged.info(name), base.info(name)
    bits = 8 * ours.size_bytes // max(1, ours.elements)
    width = max(1, bits // 8)
    paths = [checkpoint.shards[checkpoint.shard_of(name)].path for checkpoint in (merged, base)]
    with paths[0].open("rb") as first, paths[1].open("rb") as second:
        first.seek(ours.begin)
        second.seek(theirs.begin)
        for done in range(0, ours.size_bytes, _CHUNK_BYTES):
            count = min(_CHUNK_BYTES, ours.size_bytes - done)
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
        # The half steps; beside the largest number stands infinity, whose step is that of the other side.
        up, down = above - value, value - below
        up, down = np.where(np.isfinite(up), up, down) / 2, np.where(np.isfinite(down), down, up) / 2
        margin = np.minimum(np.abs(x - below), np.abs(above - x)) - np.abs(value - x)
        exact = margin >= -2 * slack
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
