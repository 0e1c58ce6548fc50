"""What base and adapters should have become, recomputed in float64, with a bound on its own error.

A tensor begins as the base's of its name, as a copy of another, or as the adapter stores it whole; rows are put in;
x = start + Σ s·B·A + Σ s·b; and with a trained magnitude x = m/‖V‖ · V, where V is that sum and ‖V‖ is taken of its
rows or columns as a matrix.

The bound, with u = 2⁻⁵³:

- s·B·A, r terms: (r + 3)·u·Σ|terms|, and k times that where k updates meet (Higham, Accuracy and Stability of Numerical
  Algorithms, 2nd ed., section 3.1);
- s·b: u·|s·b|;
- m/‖V‖ · V, with e the bound on V, over n elements: a sum of n squares is known to n·u, so its root to n/2·u, and e
  moves ‖V‖ by at most ‖e‖.  Division, product and the sums before add less than 8·u.  Together
  |m|/‖V‖·e + |x|·(‖e‖/‖V‖ + (n/2 + 8)·u).

Legend: R rank, T rows of the tile, C columns.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np

from tunesmith.adapter import Added, Binding, Copied, LowRank, Magnitude, Replaced, Rows, Stack, Update
from tunesmith.checkpoint import FLOAT_DTYPES, Array, Checkpoint, Float64, Header, TensorInfo, as_float64, read_rows
from tunesmith.errors import CheckpointError, UnsupportedAdapterError
from tunesmith.verify.weights.rounding import DOUBLE, SINGLE, SMALLEST, UNIT_ROUNDOFF, to_dtype

_TILE_ELEMENTS = 1 << 16

# How far a float32 sum of n squares may be off, in units of n^½·2⁻²⁴: its roundings go either way, so their sum grows
# as the root of their number (Higham & Mary, SIAM J. Sci. Comput. 41(5), 2019); eight deviations, halved by the root.
_RANDOM_WALK = 4.0

Interval = tuple[Float64, Float64]
Factors = Callable[[LowRank], tuple[Float64, Float64]]


class StartView(Protocol):
    """The base as something else than its files say, such as a quantized training saw it."""

    def applies_to(self, checkpoint: Checkpoint, name: str) -> bool:
        """Whether a tensor is seen otherwise than it is stored."""

    def rows(self, checkpoint: Checkpoint, name: str, start: int, stop: int) -> Float64:
        """Rows of the tensor as they are seen, exact, in float64."""


@dataclass(frozen=True)
class Matrix:
    """A stored tensor of whatever shape, read as rows of a matrix.

    Attributes:
        header: header of its file, in which it has the matrix's shape.
        info: where it lies.
    """

    header: Header
    info: TensorInfo

    @classmethod
    def of(cls, header: Header, name: str, columns: int) -> Matrix:
        """A tensor as a matrix of so many columns."""
        info = header.tensors[name]
        shaped = replace(info, shape=(info.elements // max(1, columns), columns))
        return cls(Header(header.path, {name: shaped}, {}, header.data_start, header.file_bytes), shaped)

    def read(self, start: int, stop: int) -> Array:
        """Rows as stored."""
        return read_rows(self.header, self.info.name, start, stop)

    def float64(self, start: int, stop: int) -> Float64:
        """Rows, exactly."""
        return as_float64(self.read(start, stop), self.info.dtype)


@dataclass(frozen=True)
class Tile:
    """Rows of one tensor as they should be: x = start + delta.

    Attributes:
        start: what they begin as, exact, shape (T, C).
        delta: what x differs from it by, shape (T, C).
        bound: bound on x's error, broadcastable to (T, C).
        summed: whether anything is added or scaled here, so that x need not be on the grid of the stored dtype.
        early: for a dtype, the intervals that x may have moved to by roundings before the last one, in the merges that
            are not one sum; None where the usual one (rounded Δ, float32 sum) is all.
    """

    start: Float64
    delta: Float64
    bound: Float64
    summed: bool
    early: Callable[[str], list[Interval]] | None = None


@dataclass(frozen=True)
class OneUpdate:
    """Rows of a bf16 tensor that one low-rank update is added to, and nothing else.

    Attributes:
        begin: the base's rows as stored, uint16 patterns, shape (T, C).
        b_TR: the update's rows of B.
        a_RC: its A, scaled.
        bound_T: bound on the error of ``b_TR @ a_RC``, a row.
    """

    begin: Array
    b_TR: Float64
    a_RC: Float64
    bound_T: Float64


class Expectation:
    """Every tensor that a merge should hold.

    Args:
        base: the base model.
        stack: the adapters.
        binding: what they make of the base.
        view: how the base is to be seen; None for as it is stored.
        base_is_residual: whether the adapters were bound so.

    Attributes:
        updates: the updates by tensor.
        names: every tensor, in the base's order, then the new ones.
    """

    def __init__(
        self,
        base: Checkpoint,
        stack: Stack,
        binding: Binding,
        *,
        view: StartView | None = None,
        base_is_residual: bool = False,
    ) -> None:
        self.base, self.stack, self.binding, self.view = base, stack, binding, view
        self._base_is_residual = base_is_residual
        self.updates: Mapping[str, tuple[Update, ...]] = binding.by_name
        self.infos = base.tensors
        kept = [name for name in self.infos if name not in binding.dropped]
        self.names = (*kept, *(name for name in self.updates if name not in self.infos))

    def __reduce__(self) -> tuple[Any, ...]:
        """To a worker goes what it is made of; it is made there once, and not sent with each of 90,000 parts."""
        return _made, (self.base, self.stack, self.view, self._base_is_residual, self._identity)

    @cached_property
    def _identity(self) -> str:
        """A hash of the binding."""
        return hashlib.sha256(self.binding.model_dump_json().encode()).hexdigest()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that a tensor should have."""
        if name in self.binding.shapes:
            return tuple(self.binding.shapes[name])
        source = next((u.source for u in self.updates.get(name, ()) if isinstance(u, Copied)), name)
        return self.infos[source].shape if source in self.infos else ()

    def tensor(self, name: str, updates: Sequence[Update] | None = None, *, factors: Factors | None = None) -> Expected:
        """One tensor of it, or with other updates than it should have.

        Args:
            name: the tensor.
            updates: what to make of it; None for what should be.
            factors: where the factors of low-rank updates come from; None for the adapters.
        """
        chosen = self.updates.get(name, ()) if updates is None else updates
        return Expected(self, name, chosen, factors=factors or self.stack.factors)


@lru_cache(maxsize=2)
def _made(base: Checkpoint, stack: Stack, view: StartView | None, base_is_residual: bool, identity: str) -> Expectation:
    binding = stack.bind(base, base_is_residual=base_is_residual)
    found = Expectation(base, stack, binding, view=view, base_is_residual=base_is_residual)
    if found._identity != identity:
        raise CheckpointError("A worker finds another adapter there than was sent to it.", where=stack.adapters[0].path)
    return found


class Expected:
    """One tensor, recomputed tile by tile as a matrix.

    Args:
        whole: what it belongs to.
        name: its name.
        updates: what to make of it.
        factors: where factors come from.

    Attributes:
        rows: rows of the matrix.
        columns: its columns.

    Raises:
        UnsupportedAdapterError: two trained magnitudes for one tensor, which have no one meaning.
    """

    def __init__(self, whole: Expectation, name: str, updates: Sequence[Update], *, factors: Factors) -> None:
        self.whole, self.name, self.updates, self._read_factors = whole, name, tuple(updates), factors
        self.low_rank = [update for update in updates if isinstance(update, LowRank)]
        self._added = [update for update in updates if isinstance(update, Added)]
        self._put_in = [update for update in updates if isinstance(update, Rows)]
        magnitudes = [update for update in updates if isinstance(update, Magnitude)]
        if len(magnitudes) > 1:
            raise UnsupportedAdapterError("Two trained magnitudes scale one tensor.", where=name)
        self.magnitude = magnitudes[0] if magnitudes else None
        shape = whole.shape(name)
        self._block_rows = shape[1] if any(update.block is not None for update in self.low_rank) else None
        self.rows, self.columns = _grid(shape, updates)
        self._factors: dict[int, tuple[Float64, Float64]] = {}
        self._column_norms: dict[str | None, tuple[Float64, Float64]] = {}
        self._scaled_A: dict[int, tuple[Float64, Float64]] = {}

    @property
    def module(self) -> str | None:
        """The adapted module; None where no adapter touches the tensor."""
        return next((update.module for update in self.updates if not isinstance(update, Copied)), None)

    @property
    def begins_as_itself(self) -> bool:
        """Whether it starts as the base's own tensor, as stored, with all its rows."""
        return not self._put_in and not any(isinstance(update, Copied | Replaced) for update in self.updates)

    @property
    def whole_at_once(self) -> bool:
        """Whether every row depends on all of them: a norm of every column."""
        return self.magnitude is not None and self.magnitude.per == "column"

    def tiles(
        self, start: int = 0, stop: int | None = None, *, elements: int | None = None
    ) -> Iterator[tuple[int, int]]:
        """Rows from and up to, of every tile between two rows; none crosses a block's border.

        Args:
            start: the first row.
            stop: the row to stop before; None for all.
            elements: how many numbers a tile has at most, unless one row has more; None for what fits a cache.
        """
        stop = self.rows if stop is None else stop
        height = max(1, (elements or _TILE_ELEMENTS) // max(1, self.columns))
        block = max(1, self._block_rows or self.rows)
        while start < stop:
            end = min(start + height, start - start % block + block, stop)
            yield start, end
            start = end

    def kept(self, start: int, stop: int) -> tuple[Array, str] | None:
        """What some rows keep from where they begin, and its dtype; None where anything acts on them."""
        acts = self.magnitude or self._added or self._of(start) or any(self._hits(u, start, stop) for u in self._put_in)
        return None if acts or self._seen else (self._source.read(start, stop), self._source.info.dtype)

    def one_update(self, start: int, stop: int) -> OneUpdate | None:
        """The parts of some rows, where the tensor is the base's own in bf16 and one low-rank update acts on them."""
        terms = self._of(start)
        others = self.magnitude or self._added or self._put_in or self._seen or not self.begins_as_itself
        if others or len(terms) != 1 or self._source.info.dtype != "BF16":
            return None
        number, update, row = terms[0]
        b_TR = self._factor(number, update)[1][row : row + stop - start]
        a_RC, largest_R = self._scaled(number, update)
        terms_T = abs(update.scaling) * (np.abs(b_TR) @ largest_R)
        bound_T = (a_RC.shape[0] + 3) * DOUBLE * terms_T
        return OneUpdate(self._source.read(start, stop), b_TR, a_RC, bound_T)

    def _scaled(self, number: int, update: LowRank) -> tuple[Float64, Float64]:
        """An update's A, scaled, and the largest |A| of every rank."""
        if number not in self._scaled_A:
            a_RC, _ = self._factor(number, update)
            # Of a stack of matrices, only those of the one at hand are held.
            self._scaled_A = {number: (np.ascontiguousarray(update.scaling * a_RC), np.abs(a_RC).max(axis=1))}
        return self._scaled_A[number]

    def of_base(self, start: int, stop: int) -> Float64 | None:
        """The base's own rows, whatever the tensor begins as; None where it has none of that shape."""
        info = self.whole.infos.get(self.name)
        if info is None or info.shape != self.whole.shape(self.name) or info.dtype not in FLOAT_DTYPES:
            return None
        return self._matrix(self.name).float64(start, stop)

    def tile(self, start: int, stop: int) -> Tile:
        """Rows as they should be."""
        begin, parts, bound = self._sums(start, stop)
        delta = parts[0] if len(parts) == 1 else sum(parts, np.zeros(begin.shape))
        if self.magnitude is None:
            several = len(parts) > 1
            early = (lambda dtype: _one_after_another(begin, parts, bound, dtype)) if several else None
            return Tile(begin, delta, bound, bool(parts), early)
        return self._under_magnitude(begin, delta, bound, slice(start, stop))

    def _under_magnitude(self, begin: Float64, delta: Float64, bound: Float64, rows: slice) -> Tile:
        """Rows under the trained magnitude."""
        terms = self.columns if self.magnitude and self.magnitude.per == "row" else self.rows

        def scaled(first: Float64, norms: Float64, bound_norms: Float64, walk: float) -> tuple[Float64, Float64]:
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                factor = self._magnitudes(rows) / norms
                x = factor * (first + delta)
                return x, np.abs(factor) * bound + np.abs(x) * (bound_norms / norms + walk)

        def early(dtype: str) -> list[Interval]:
            # PEFT casts the base to its own dtype first, and then computes all of this in float32.
            cast = to_dtype(begin, dtype)
            norms, bound_norms = self._norms(rows, dtype)
            walk = (min(terms / 2, _RANDOM_WALK * math.sqrt(terms)) + 8) * DOUBLE
            x, error = scaled(cast, norms, bound_norms, walk)
            return [(x - error * (SINGLE / DOUBLE), x + error * (SINGLE / DOUBLE))]

        x, error = scaled(begin, *self._norms(rows, None), (terms / 2 + 8) * DOUBLE)
        return Tile(begin, x - begin, error, True, early)

    def _magnitudes(self, rows: slice) -> Float64:
        assert self.magnitude is not None  # noqa: S101 - asked for only where there is one
        vector = self._vector
        return vector[rows, None] if self.magnitude.per == "row" else vector[None, :]

    @cached_property
    def _vector(self) -> Float64:
        assert self.magnitude is not None  # noqa: S101 - as above
        stack = self.whole.stack
        return as_float64(stack.rows(self.magnitude), stack.info(self.magnitude).dtype).reshape(-1)

    def _norms(self, rows: slice, dtype: str | None) -> tuple[Float64, Float64]:
        """‖V‖ of every row of a tile or of every column, and the norm of V's error bound there.

        With a dtype, of V with what it begins as cast to it.
        """
        if self.magnitude is not None and self.magnitude.per == "column":
            if dtype not in self._column_norms:
                parts = [self._squares(start, stop, dtype, "tc,tc->c") for start, stop in self.tiles()]
                nothing = np.zeros(self.columns)
                self._column_norms[dtype] = (
                    sum((part[0] for part in parts), nothing),
                    sum((part[1] for part in parts), nothing),
                )
            squares, errors = self._column_norms[dtype]
            return np.sqrt(squares)[None, :], np.sqrt(errors)[None, :]
        squares, errors = self._squares(rows.start, rows.stop, dtype, "tc,tc->t")
        return np.sqrt(squares)[:, None], np.sqrt(errors)[:, None]

    def _squares(self, start: int, stop: int, dtype: str | None, along: str) -> tuple[Float64, Float64]:
        begin, parts, bound = self._sums(start, stop)
        v = sum(parts, to_dtype(begin, dtype) if dtype else begin)
        wide = np.broadcast_to(bound, v.shape)
        return np.einsum(along, v, v), np.einsum(along, wide, wide)

    def _sums(self, start: int, stop: int) -> tuple[Float64, list[Float64], Float64]:
        """What some rows begin as, what each adapted module adds to them, and a bound on the error of their sum."""
        begin = self._begin(start, stop)
        parts: dict[tuple[int, str], Float64] = {}
        bound = np.zeros((stop - start, 1))
        terms = self._of(start)
        for number, update, row in terms:
            a_RC, b_TR = self._factor(number, update)
            delta, error = low_rank_rows(a_RC, b_TR[row : row + stop - start], update.scaling)
            part = (update.adapter, update.module)
            parts[part] = parts[part] + delta if part in parts else delta
            bound = bound + error
        bound *= max(1, len(terms) + len(self._added))
        for added in self._added:
            delta = added.scaling * self._whole_tensor(added).float64(start, stop)
            part = (added.adapter, added.module)
            parts[part] = parts[part] + delta if part in parts else delta
            bound = bound + 2 * DOUBLE * np.abs(delta)
        return begin, list(parts.values()), bound

    def _of(self, start: int) -> list[tuple[int, LowRank, int]]:
        """The low-rank updates that act on the tile at a row, with their numbers and the row of B."""
        block = start // self._block_rows if self._block_rows else None
        within = start % self._block_rows if self._block_rows else start
        return [(i, u, within) for i, u in enumerate(self.low_rank) if u.block == block]

    def _factor(self, number: int, update: LowRank) -> tuple[Float64, Float64]:
        if number not in self._factors:
            # Of a stack of matrices, only the factors of the one at hand are held.
            self._factors = {n: pair for n, pair in self._factors.items() if self.low_rank[n].block == update.block}
            self._factors[number] = self._read_factors(update)
        return self._factors[number]

    def _begin(self, start: int, stop: int) -> Float64:
        if self._seen:
            assert self.whole.view is not None  # noqa: S101 - only a view sees
            begin = self.whole.view.rows(self.whole.base, self._origin, start, stop).reshape(-1, self.columns)
        else:
            begin = self._source.float64(start, stop)
        for update in self._put_in:
            begin = np.array(begin)
            for place in self._hits(update, start, stop):
                begin[update.indices[place] - start] = self._whole_tensor(update).float64(place, place + 1)[0]
        return begin

    def _hits(self, update: Rows, start: int, stop: int) -> list[int]:
        """Which of an update's rows lie in a tile."""
        indices = np.asarray(update.indices)
        return [int(place) for place in np.flatnonzero((indices >= start) & (indices < stop))]

    @cached_property
    def _origin(self) -> str:
        """The base's tensor that it begins as, where no adapter stores it whole."""
        return next((update.source for update in self.updates if isinstance(update, Copied)), self.name)

    @cached_property
    def _replaced(self) -> Replaced | None:
        return next((update for update in reversed(self.updates) if isinstance(update, Replaced)), None)

    @cached_property
    def _seen(self) -> bool:
        view = self.whole.view
        return view is not None and self._replaced is None and view.applies_to(self.whole.base, self._origin)

    @cached_property
    def _source(self) -> Matrix:
        return self._matrix(self._origin) if self._replaced is None else self._whole_tensor(self._replaced)

    def _matrix(self, name: str) -> Matrix:
        base = self.whole.base
        return Matrix.of(base.shards[base.shard_of(name)], name, self.columns)

    def _whole_tensor(self, update: Added | Replaced | Rows) -> Matrix:
        return Matrix.of(self.whole.stack.adapters[update.adapter].header, update.tensor, self.columns)


def _grid(shape: tuple[int, ...], updates: Sequence[Update]) -> tuple[int, int]:
    """Rows and columns of the matrix that a tensor is looked at as."""
    if any(isinstance(update, LowRank) and update.block is not None for update in updates):
        return shape[0] * shape[1], math.prod(shape[2:])
    if len(shape) < 2:
        return math.prod(shape), 1
    if any(isinstance(update, LowRank | Magnitude | Rows) for update in updates):
        return shape[0], math.prod(shape[1:])
    return math.prod(shape[:-1]), shape[-1]


def low_rank_rows(a_RC: Float64, b_TR: Float64, scaling: float) -> tuple[Float64, Float64]:
    """s·B·A, and for each row a bound on its error: (r + 3)·2⁻⁵³·|s|·Σ_r |b_r|·max|a_r|."""
    delta = b_TR @ (scaling * a_RC)
    terms = abs(scaling) * (np.abs(b_TR) @ np.abs(a_RC).max(axis=1, keepdims=True))
    return delta, (a_RC.shape[0] + 3) * DOUBLE * terms


def early_rounding(begin: Float64, delta: Float64, bound: Float64, dtype: str) -> Interval:
    """Where x may have moved to where Δ or W was rounded before their sum, or the sum was made in float32.

    Args:
        begin: W.
        delta: Δ.
        bound: bound on Δ's error in float64.
        dtype: that W and Δ may have been rounded to.

    Returns:
        The lowest and the highest such value; both x itself where nothing was to be added.
    """
    unit, x = UNIT_ROUNDOFF[dtype], begin + delta
    with np.errstate(over="ignore", invalid="ignore"):
        rounded_base = np.nan_to_num(np.abs(to_dtype(begin, dtype) - begin), posinf=0.0)
    rounded_delta = unit * (1 + unit) * np.abs(delta) + SMALLEST[dtype] / 2
    summed_in_float32 = bound * (SINGLE / DOUBLE)
    sum_in_float32 = SINGLE * np.abs(x) if unit > SINGLE else 0.0
    reach = np.where(delta != 0, rounded_base + rounded_delta + summed_in_float32 + sum_in_float32, 0.0)
    return x - reach, x + reach


def _one_after_another(begin: Float64, parts: Sequence[Float64], bound: Float64, dtype: str) -> list[Interval]:
    """Where x may have moved to where updates were merged one after another, rounded after each, in either order."""
    intervals = [early_rounding(begin, sum(parts, np.zeros(begin.shape)), bound, dtype)]
    for order in (list(parts), list(parts)[::-1]):
        low = high = to_dtype(begin, dtype)
        for number, part in enumerate(order):
            if number:
                low, high = to_dtype(low, dtype), to_dtype(high, dtype)
            _, above = early_rounding(np.zeros(part.shape), part, bound, dtype)
            reach = (above - part) + SINGLE * np.abs(high + part)
            low, high = low + part - reach, high + part + reach
        intervals.append((low, high))
    return intervals
