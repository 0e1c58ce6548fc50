"""Level 3: every element of every tensor, recomputed in float64 by arithmetic of its own.

For a stored value v and the exact value x = W + s·B·A, with v's own neighbours v⁻ < v < v⁺ in the stored dtype:

- *exact*: no neighbour is nearer to x than v (on a tie either will do: x's own error spans it);
- *twice-rounded*: something was rounded before the sum was: |v − x| is within half a step and the rounding errors of W
  and Δ in the stored dtype, of Δ summed in float32, and of a float32 sum that is then stored in fewer bits;
- *faithful*: v⁻ < x < v⁺, so that v is one of the two values that bracket x, as after stochastic rounding;
- *outside*: none of these explains v.

Whoever rounds to nearest leaves no faithful element, and whoever rounds otherwise leaves many.  A few among very many
are therefore *strays* (:func:`strays`): numbers that changed after the merge.  In a tensor that the adapter does not
touch, x is on the grid, and nothing but x itself will do.

x itself carries the error of an r-term float64 dot product; comparisons allow for its standard bound
(r + 3)·2⁻⁵³·Σ|terms| (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1).

Legend: I input features, O output features, R rank, T rows of the tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from tunesmith.adapter import Adapter, LowRank
from tunesmith.allocator import keep_freed_memory
from tunesmith.checkpoint import Array, Checkpoint, Float64, TensorInfo, as_float64
from tunesmith.progress import Cancellation, Progress, ProgressCallback
from tunesmith.verify.records import TensorVerdict

_TILE_ELEMENTS = 1 << 16

FEW_ELEMENTS = 64
_STRAY_SHARE = 1e-4

# Unit roundoff 2^-p: half the distance from 1 to the next number.
_UNIT_ROUNDOFF = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24, "F64": 2.0**-53}
_SMALLEST = {"BF16": 2.0**-133, "F16": 2.0**-24, "F32": 2.0**-149, "F64": 2.0**-1074}
_NUMPY = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
_PATTERNS = {"BF16": np.int16, "F16": np.int16, "F32": np.int32, "F64": np.int64}


@dataclass
class Tally:
    """Sums over tiles of one tensor; the first six count elements."""

    elements: int = 0
    exact: int = 0
    faithful: int = 0
    twice_rounded: int = 0
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
        return TensorVerdict(
            name=name,
            module=module,
            elements=self.elements,
            exact=self.exact,
            faithful=self.faithful,
            twice_rounded=self.twice_rounded,
            outside=self.outside,
            unchanged=self.unchanged,
            gain=self.added_delta / self.delta_delta if moved else None,
            relative_error=(self.error_error / self.delta_delta) ** 0.5 if moved else None,
            delta_norm=self.delta_delta**0.5,
        )


def check_weights(
    merged: Checkpoint, base: Checkpoint, adapter: Adapter, *, progress: ProgressCallback, cancellation: Cancellation
) -> tuple[TensorVerdict, ...]:
    """Classify every element of every tensor that base and merged model share.

    Args:
        merged: the merged model.
        base: the base model.
        adapter: the adapter, already bound to the base.
        progress: told of elements done.
        cancellation: read between tiles.

    Returns:
        One verdict a tensor, in the base's order.
    """
    keep_freed_memory()
    updates = {update.name: update for update in adapter.updates}
    names = [name for name in base.tensors if name in merged.tensors and _comparable(merged, base, name)]
    total = sum(base.info(name).elements for name in names)
    done = 0
    verdicts = []
    for name in names:
        update = updates.get(name)
        tally = Tally()
        for tile in _tallies(merged, base, adapter, name, update):
            tally.add(tile)
            done += tile.elements
            progress(Progress("verify weights", done, total, "elements", name))
            cancellation.check()
        verdicts.append(tally.verdict(name, update.module if update else None))
    return tuple(verdicts)


def _tallies(
    merged: Checkpoint, base: Checkpoint, adapter: Adapter, name: str, update: LowRank | None
) -> Iterator[Tally]:
    """The tallies of one tensor's tiles; ``update`` is what should have been added to it, None for nothing."""
    info = base.info(name)
    a_RI, b_OR = adapter.factors(update) if update else (None, None)
    scaling = update.scaling if update else 0.0
    for start, stop in row_tiles(info):
        stored = merged.read(name, start, stop)
        before = base.read(name, start, stop)
        same_form = merged.info(name).dtype == info.dtype
        if a_RI is None or b_OR is None:
            if same_form and stored.tobytes() == before.tobytes():
                yield Tally(elements=stored.size, exact=stored.size, unchanged=stored.size)
                continue
            delta = bound = np.zeros(stored.shape)
        else:
            delta, bound = low_rank_rows(a_RI, b_OR[start:stop], scaling)
        yield classify(stored, merged.info(name).dtype, as_float64(before, info.dtype), delta, bound)


def row_tiles(info: TensorInfo) -> Iterator[tuple[int, int]]:
    """Rows from and up to, of every tile of a tensor."""
    count = info.shape[0] if info.shape else 1
    height = max(1, _TILE_ELEMENTS // max(1, info.elements // max(1, count)))
    return ((start, min(start + height, count)) for start in range(0, count, height))


def strays(tensors: Sequence[TensorVerdict]) -> dict[str, int]:
    """Faithful elements too few to come from a way of rounding, by tensor; empty where there are none or many."""
    found = {tensor.name: tensor.faithful for tensor in tensors if tensor.faithful}
    total, elements = sum(found.values()), sum(tensor.elements for tensor in tensors)
    return found if 0 < total <= max(1, min(FEW_ELEMENTS, _STRAY_SHARE * elements)) else {}


def classify(stored: Array, dtype: str, base: Float64, delta: Float64, bound: Float64) -> Tally:
    """Classify stored values against base + delta.

    Args:
        stored: the merged model's values as stored (BF16 as uint16 patterns), any shape.
        dtype: their safetensors dtype.
        base: the base's values, exact.
        delta: what should have been added.
        bound: bound on |delta|'s own error, broadcastable to it.

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
    plain = _is_nearest(stored, x, dtype)
    tally.exact = int(np.count_nonzero(plain))
    if tally.exact < tally.elements:
        rest = ~plain
        bounds = np.broadcast_to(bound, x.shape)[rest]
        early = _early_rounding(base[rest], delta[rest], x[rest], bounds, dtype)
        _classify_rest(tally, stored[rest], dtype, x[rest], early, bounds)
    return tally


def _dot(first: Float64, second: Float64) -> float:
    """Σ first·second by numpy itself: BLAS shares out even so short a sum, and waits long for it on a busy machine."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.einsum("i,i->", first.reshape(-1), second.reshape(-1)))


def _is_nearest(stored: Array, x: Float64, dtype: str) -> npt.NDArray[np.bool_]:
    """Where the stored value surely is x rounded to nearest; False where only a closer look can tell."""
    with np.errstate(over="ignore"):
        if dtype != "BF16":
            return np.asarray(stored == x.astype(stored.dtype))
        single = x.astype(np.float32).view(np.uint32)
    # Rounding to float32 first misleads only where that lands half-way between two bf16 values.
    half_way = (single & 0xFFFF) == 0x8000
    return np.asarray(((single + 0x8000) >> 16 == stored) & ~half_way)


def _early_rounding(base: Float64, delta: Float64, x: Float64, bound: Float64, dtype: str) -> Float64:
    """How far rounding before the last one may have moved x; 0 where nothing was to be added."""
    unit, single = _UNIT_ROUNDOFF[dtype], _UNIT_ROUNDOFF["F32"]
    with np.errstate(over="ignore", invalid="ignore"):
        rounded_base = np.abs(_to_dtype(base, dtype) - base)
    rounded_delta = unit * (1 + unit) * np.abs(delta) + _SMALLEST[dtype] / 2
    summed_in_float32 = bound * (single / _UNIT_ROUNDOFF["F64"])
    sum_in_float32 = single * np.abs(x) if unit > single else 0.0
    early = np.nan_to_num(rounded_base, posinf=0.0) + rounded_delta + summed_in_float32 + sum_in_float32
    return np.where(delta != 0, early, 0.0)


def _to_dtype(values: Float64, dtype: str) -> Float64:
    """Values rounded to nearest in a dtype; BF16 by way of float32, whose error is far below."""
    if dtype == "BF16":
        single = values.astype(np.float32).view(np.uint32)
        return ((single + 0x8000) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)
    return values.astype(_NUMPY[dtype]).astype(np.float64)


def _classify_rest(tally: Tally, stored: Array, dtype: str, x: Float64, early: Float64, bound: Float64) -> None:
    """Count what :func:`_is_nearest` could not settle, one dimension."""
    value, below, above = with_neighbours(stored, dtype)
    slack = bound + 2.0**-52 * np.abs(x)
    with np.errstate(invalid="ignore"):
        # The step on x's side; beside the largest number stands infinity, whose step is that of the other side.
        up, down = above - value, value - below
        step = np.where(x > value, np.where(np.isfinite(up), up, down), np.where(np.isfinite(down), down, up))
        distance = np.abs(value - x)
        margin = np.minimum(np.abs(x - below), np.abs(above - x)) - distance
        exact = margin >= -2 * slack
        twice = ~exact & (early > 0) & (distance <= step / 2 + early + slack)
        # Strictly between: who stands on a value of the grid has no second neighbour to choose.
        faithful = ~exact & ~twice & (x > below + slack) & (x < above - slack)
    finite = np.isfinite(value)
    tally.exact += int(np.count_nonzero(exact & finite))
    tally.faithful += int(np.count_nonzero(faithful & finite))
    tally.twice_rounded += int(np.count_nonzero(twice & finite))
    tally.outside += int(np.count_nonzero(~(exact | faithful | twice) | ~finite))


def low_rank_rows(a_RI: Float64, b_TR: Float64, scaling: float) -> tuple[Float64, Float64]:
    """s·B·A, and for each row a bound on its error: (r + 3)·2⁻⁵³·|s|·Σ_r |b_r|·max|a_r|."""
    delta = b_TR @ (scaling * a_RI)
    terms = abs(scaling) * (np.abs(b_TR) @ np.abs(a_RI).max(axis=1, keepdims=True))
    return delta, (a_RI.shape[0] + 3) * 2.0**-53 * terms


def with_neighbours(stored: Array, dtype: str) -> tuple[Float64, Float64, Float64]:
    """Stored values with the next smaller and the next larger value of their dtype, in float64.

    IEEE patterns of one sign are ordered as integers are, so a neighbour is one step away as an integer.
    """
    kind = _PATTERNS[dtype]
    patterns = np.ascontiguousarray(stored).view(kind)
    lowest = -(1 << (8 * patterns.itemsize - 1))
    ordered = np.where(patterns < 0, lowest - patterns.astype(np.int64), patterns)
    pair = []
    for step in (-1, 1):
        moved = ordered + step
        raw = np.where(moved < 0, lowest - moved, moved).astype(kind)
        pair.append(_decode(raw, dtype))
    return _decode(patterns, dtype), pair[0], pair[1]


def _decode(patterns: Array, dtype: str) -> Float64:
    with np.errstate(invalid="ignore"):  # beside infinity stands a signalling NaN
        if dtype == "BF16":
            return (patterns.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return patterns.view(_NUMPY[dtype]).astype(np.float64)


def _comparable(merged: Checkpoint, base: Checkpoint, name: str) -> bool:
    ours, theirs = merged.info(name), base.info(name)
    return ours.shape == theirs.shape and ours.dtype in _PATTERNS and theirs.dtype in _PATTERNS
