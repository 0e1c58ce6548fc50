"""Level 3: every element of every tensor, recomputed in float64 by arithmetic of its own.

For a stored value v and the exact value x = W + s·B·A, with v's own neighbours v⁻ < v < v⁺ in the stored dtype:

- *exact*: no neighbour is nearer to x than v (on a tie either will do: x's own error spans it);
- *faithful*: v⁻ < x < v⁺, so that v is one of the two values that bracket x;
- *twice-rounded*: |v − x| is within half a step and the rounding error of Δ itself, as when Δ was rounded first;
- *outside*: none of these explains v.

x itself carries the error of an r-term float64 dot product; comparisons allow for its standard bound
(r + 3)·2⁻⁵³·Σ|terms| (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1).

Legend: I input features, O output features, R rank, T rows of the tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from tunesmith.adapter import Adapter, LowRank
from tunesmith.checkpoint import Array, Checkpoint, Float64, as_float64, keep_freed_memory
from tunesmith.progress import Cancellation, Progress, ProgressCallback
from tunesmith.verify.records import TensorVerdict

_TILE_ELEMENTS = 1 << 16

# Unit roundoff 2^-p: half the distance from 1 to the next number.
_UNIT_ROUNDOFF = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24, "F64": 2.0**-53}
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
        for tile in tally_tiles(merged, base, adapter, name, update):
            tally.add(tile)
            done += tile.elements
            progress(Progress("verify weights", done, total, "elements", name))
            cancellation.check()
        verdicts.append(tally.verdict(name, update.module if update else None))
    return tuple(verdicts)


def tally_tiles(
    merged: Checkpoint,
    base: Checkpoint,
    adapter: Adapter,
    name: str,
    update: LowRank | None,
    *,
    scaled_by: float = 1.0,
    rows: int | None = None,
) -> Iterator[Tally]:
    """The tallies of one tensor's tiles.

    Args:
        merged: the merged model.
        base: the base model.
        adapter: where the factors are read from.
        name: the tensor.
        update: what should have been added to it; None for a tensor that should be as it was.
        scaled_by: a further factor on Δ, for asking "what if".
        rows: look at the first rows only; None for all.
    """
    info = base.info(name)
    count = info.shape[0] if info.shape else 1
    height = max(1, _TILE_ELEMENTS // max(1, info.elements // max(1, count)))
    a_RI, b_OR = adapter.factors(update) if update else (None, None)
    scaling = update.scaling * scaled_by if update else 0.0
    stop_at = count if rows is None else min(rows, count)
    for start in range(0, stop_at, height):
        stop = min(start + height, stop_at)
        stored = merged.read(name, start, stop)
        before = base.read(name, start, stop)
        same_form = merged.info(name).dtype == info.dtype
        if a_RI is None or b_OR is None:
            if same_form and stored.tobytes() == before.tobytes():
                yield Tally(elements=stored.size, exact=stored.size, unchanged=stored.size)
                continue
            delta = bound = np.zeros(stored.shape)
        else:
            delta, bound = _delta(a_RI, b_OR[start:stop], scaling)
        yield classify(stored, merged.info(name).dtype, as_float64(before, info.dtype), delta, bound)


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
    finite = bool(np.isfinite(np.vdot(value, value)))
    tally = Tally(
        elements=value.size,
        unchanged=int(np.count_nonzero(added == 0)),
        delta_delta=float(np.vdot(delta, delta)),
        added_delta=float(np.vdot(added, delta)) if finite else 0.0,
        error_error=float(np.vdot(error, error)) if finite else float("inf"),
    )
    plain = _is_nearest(stored, x, dtype)
    tally.exact = int(np.count_nonzero(plain))
    if tally.exact < tally.elements:
        rest = ~plain
        bounds = np.broadcast_to(bound, x.shape)[rest]
        _classify_rest(tally, stored[rest], dtype, x[rest], delta[rest], bounds)
    return tally


def _is_nearest(stored: Array, x: Float64, dtype: str) -> npt.NDArray[np.bool_]:
    """Where the stored value surely is x rounded to nearest; False where only a closer look can tell."""
    with np.errstate(over="ignore"):
        if dtype != "BF16":
            return np.asarray(stored == x.astype(stored.dtype))
        single = x.astype(np.float32).view(np.uint32)
    # Rounding to float32 first misleads only where that lands half-way between two bf16 values.
    half_way = (single & 0xFFFF) == 0x8000
    return np.asarray(((single + 0x8000) >> 16 == stored) & ~half_way)


def _classify_rest(tally: Tally, stored: Array, dtype: str, x: Float64, delta: Float64, bound: Float64) -> None:
    """Count what :func:`_is_nearest` could not settle, one dimension."""
    value, below, above = _with_neighbours(stored, dtype)
    slack = bound + 2.0**-52 * np.abs(x)
    with np.errstate(invalid="ignore"):
        distance = np.abs(value - x)
        margin = np.minimum(np.abs(x - below), np.abs(above - x)) - distance
        exact = margin >= -2 * slack
        faithful = ~exact & (x > below - slack) & (x < above + slack)
        unit = _UNIT_ROUNDOFF[dtype]
        step = np.maximum(above - value, value - below)
        twice = ~exact & ~faithful & (delta != 0)
        twice &= distance <= step / 2 + unit * (1 + unit) * np.abs(delta) + slack
    finite = np.isfinite(value)
    tally.exact += int(np.count_nonzero(exact & finite))
    tally.faithful += int(np.count_nonzero(faithful & finite))
    tally.twice_rounded += int(np.count_nonzero(twice & finite))
    tally.outside += int(np.count_nonzero(~(exact | faithful | twice) | ~finite))


def _delta(a_RI: Float64, b_TR: Float64, scaling: float) -> tuple[Float64, Float64]:
    """s·B·A, and for each row a bound on its error: (r + 3)·2⁻⁵³·|s|·Σ_r |b_r|·max|a_r|."""
    delta = b_TR @ (scaling * a_RI)
    terms = abs(scaling) * (np.abs(b_TR) @ np.abs(a_RI).max(axis=1, keepdims=True))
    return delta, (a_RI.shape[0] + 3) * 2.0**-53 * terms


def _with_neighbours(stored: Array, dtype: str) -> tuple[Float64, Float64, Float64]:
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
    if dtype == "BF16":
        return (patterns.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return patterns.view({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]).astype(np.float64)


def _comparable(merged: Checkpoint, base: Checkpoint, name: str) -> bool:
    ours, theirs = merged.info(name), base.info(name)
    return ours.shape == theirs.shape and ours.dtype in _PATTERNS and theirs.dtype in _PATTERNS
