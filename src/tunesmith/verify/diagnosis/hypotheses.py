"""What may have become of a tensor instead: questions asked of the first of its tiles that holds something outside.

An answer is taken where it makes nearly all that was outside vanish and makes no more numbers inexact.  The questions,
in order: is it another checkpoint's update; was a trained magnitude left out, or were trained rows; is it this update
times a factor; did it begin as the base seen otherwise (dequantized, or not), or as another base; are these the values,
or the update, of another tensor; was the update transposed, or an expert's cut out of its stack in another way; did all
go through fp16, or through a narrower dtype than they are stored in; is it the update, or twice that, rounded more than
once or beyond its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.adapter import LowRank, Magnitude, Rows, Update
from tunesmith.checkpoint import BaseView, Checkpoint, Float64, ViewKind, as_float64
from tunesmith.errors import TunesmithError
from tunesmith.record import Finding, Value
from tunesmith.verify.records import TensorVerdict
from tunesmith.verify.weights import (
    FEW_ELEMENTS,
    UNIT_ROUNDOFF,
    Expectation,
    Expected,
    Matrix,
    Tally,
    classify,
    matrix_of,
    tally_rows,
    to_dtype,
    with_neighbours,
)

ASKED_TENSORS = 6
_ASKED_NAMES = 256  # of a mixture of experts' thousands of one shape
_EXPLAINS = 0.02  # a hypothesis is taken where it leaves at most this share of what was outside
_SAME_FACTOR = 0.01  # a measured factor this close to a known mistake's is tried as that
_LOOSE_GAIN, _LOOSE_STEPS, _LOOSE_SHARE = 0.15, 6, 0.999  # of a merge that was rounded in some other way
_HALF_STEP = 2.0**-24  # the spacing of fp16 below its normal numbers
_VIEWS: tuple[ViewKind, ...] = ("nf4", "nf4-double", "int8")


@dataclass(frozen=True)
class Evidence:
    """Rows of one tensor that hold something outside.

    Attributes:
        verdict: what was found of the whole tensor.
        expected: what the tensor should be.
        stored: what it is.
        rows: from and up to.
        tally: how the one stands against the other.
    """

    verdict: TensorVerdict
    expected: Expected
    stored: Matrix
    rows: tuple[int, int]
    tally: Tally

    @classmethod
    def of(cls, verdict: TensorVerdict, merged: Checkpoint, expectation: Expectation) -> Evidence:
        """The first tile of a bad tensor that holds something outside."""
        expected = expectation.tensor(verdict.name)
        stored = matrix_of(merged, expected)
        for rows in expected.tiles():
            tally = tally_rows(stored, expected, *rows)
            if tally.outside:
                break
        return cls(verdict, expected, stored, rows, tally)

    @property
    def name(self) -> str:
        """The tensor."""
        return self.expected.name

    @property
    def updates(self) -> tuple[Update, ...]:
        """What should have been made of it."""
        return self.expected.updates

    @property
    def low_rank(self) -> LowRank | None:
        """The first of its low-rank updates."""
        return next((update for update in self.updates if isinstance(update, LowRank)), None)

    @property
    def low_rank_only(self) -> bool:
        """Whether it is the base's own tensor plus low-rank updates, and nothing else."""
        return bool(self.updates) and all(isinstance(update, LowRank) for update in self.updates)

    def explained_by(self, other: Expected) -> bool:
        """Whether the rows are those that another expectation has there."""
        if (other.rows, other.columns) != (self.expected.rows, self.expected.columns):
            return False
        try:
            asked = tally_rows(self.stored, other, *self.rows)
        except (TunesmithError, ValueError):  # another adapter may have other shapes, or be damaged
            return False
        return asked.outside <= _EXPLAINS * self.tally.outside and asked.exact >= self.tally.exact


@dataclass(frozen=True)
class Hypothesis:
    """One thing that may have happened, to one tensor or to many.

    Attributes:
        explains: whether it explains a tile.
        cause: the finding, from all tensors that it explains; None where they are too little to be it.
    """

    explains: Callable[[Evidence], bool]
    cause: Callable[[Sequence[TensorVerdict]], Finding | None]


class Questions:
    """The questions to the bad tensors of one merged model.

    Args:
        expectation: what it should hold.
        others: what it would hold with the run's other adapters, by name.
        bases: what it would hold on other bases, by their names.
    """

    def __init__(
        self, expectation: Expectation, others: Mapping[str, Expectation], bases: Mapping[str, Expectation]
    ) -> None:
        self.expectation, self.others, self.bases = expectation, others, bases

    def ask(self, seed: Evidence, alike: Sequence[Evidence], *, base_is_right: bool) -> Iterator[Hypothesis]:
        """What may have become of a tensor, in order; the hypotheses are about other tensors too.

        Args:
            seed: the tensor.
            alike: tensors, it among them, that were changed in like measure, to measure that by.
            base_is_right: whether the tensors that no adapter touches are the base's; where not, one that is near to
                what it should be need not have been rounded to it.
        """
        if seed.low_rank is not None:
            yield from self._other_adapters()
            yield self._without(Magnitude, "cause_magnitude_ignored")
        yield self._without(Rows, "cause_rows_missing")
        if seed.low_rank is not None:
            yield from self._factors(seed.low_rank, [piece for piece in alike if piece.low_rank_only])
        yield from self._other_starts(seed)
        yield from self._elsewhere(seed)
        yield Hypothesis(self._transposed, _counted("cause_transposed"))
        yield Hypothesis(self._sliced, _counted("cause_experts_sliced"))
        yield Hypothesis(self._halves_swapped, _counted("cause_gate_up_swapped"))
        yield Hypothesis(_through_half, _counted("cause_through_fp16"))
        if seed.stored.info.dtype == "F32":
            yield Hypothesis(_stored_wider("BF16"), _counted("cause_stored_wider", dtype="BF16"))
            yield Hypothesis(_stored_wider("F16"), _counted("cause_stored_wider", dtype="F16"))
        if base_is_right:
            yield from self._loose()

    def _other_adapters(self) -> Iterator[Hypothesis]:
        for name, other in self.others.items():
            yield Hypothesis(_holding(other, adapted=True), _counted("cause_other_checkpoint", checkpoint=name))

    def _without(self, kind: type[Update], code: str) -> Hypothesis:
        """Whether one kind of update was left out."""

        def explains(piece: Evidence) -> bool:
            rest = [update for update in piece.updates if not isinstance(update, kind)]
            return len(rest) < len(piece.updates) and piece.explained_by(self.expectation.tensor(piece.name, rest))

        return Hypothesis(explains, _counted(code))

    def _factors(self, update: LowRank, linear: Sequence[Evidence]) -> Iterator[Hypothesis]:
        """Whether the update is there so many times."""
        known = _known_factors(update)
        measured = _measured_factor(linear) if linear else None
        if measured is not None:
            near = [pair for pair in known if math.isclose(pair[0], measured, rel_tol=_SAME_FACTOR)]
            known = [*near, (measured, "cause_scaled")]
        for factor, code in known:
            yield Hypothesis(self._multiplied(factor), _counted(code, factor=factor))

    def _multiplied(self, factor: float) -> Callable[[Evidence], bool]:
        return lambda piece: piece.low_rank is not None and piece.explained_by(self._times(piece, factor))

    def _times(self, piece: Evidence, factor: float) -> Expected:
        """A tensor with all its low-rank updates so many times as strong."""
        updates = [
            update.model_copy(update={"scaling": factor * update.scaling}) if isinstance(update, LowRank) else update
            for update in piece.updates
        ]
        return self.expectation.tensor(piece.name, updates)

    def _other_starts(self, seed: Evidence) -> Iterator[Hypothesis]:
        """Whether the merge began with the base as a quantized training saw it, or did not, or with another base."""
        whole = self.expectation
        if whole.view is not None:
            stored = Expectation(whole.base, whole.stack, whole.binding)
            yield Hypothesis(_holding(stored), _counted("cause_base_not_dequantized"))
        for view in [BaseView(kind) for kind in _VIEWS] if whole.view is None else []:
            try:
                applies = view.applies_to(whole.base, seed.name)
            except TunesmithError:  # a kind of model that such training does not take
                continue
            if applies:
                seen = Expectation(whole.base, whole.stack, whole.binding, view=view)
                yield Hypothesis(_holding(seen), _counted("cause_base_dequantized", view=view.kind))
        for name, other in self.bases.items():
            yield Hypothesis(_holding(other), _of_base(name))

    def _elsewhere(self, seed: Evidence) -> Iterator[Hypothesis]:
        """Whether tensors hold what belongs to others of their shape."""
        for name in self._alike(seed.name):
            for code, holds in (("cause_misplaced", self._holds), ("cause_other_module", self._holds_update_of)):
                if holds(seed, name):
                    yield Hypothesis(self._moved(holds, _renaming(seed.name, name)), _counted(code, source=name))

    def _moved(
        self, holds: Callable[[Evidence, str], bool], renamed: Callable[[str], list[str]]
    ) -> Callable[[Evidence], bool]:
        def explains(piece: Evidence) -> bool:
            likely = (*renamed(piece.name), *self._alike(piece.name)[:ASKED_TENSORS])
            return any(holds(piece, other) for other in likely if other in self.expectation.names)

        return explains

    def _alike(self, name: str) -> list[str]:
        """Other tensors of its shape, those whose names differ least first: another layer's, or a sibling."""
        shape, parts = self.expectation.shape(name), name.split(".")
        others = [other for other in self.expectation.names if other != name and self.expectation.shape(other) == shape]

        def distance(other: str) -> int:
            theirs = other.split(".")
            same = sum(ours == part for ours, part in zip(parts, theirs, strict=False))
            return max(len(parts), len(theirs)) - same

        return sorted(others, key=distance)[:_ASKED_NAMES]

    def _holds(self, piece: Evidence, name: str) -> bool:
        return piece.explained_by(self.expectation.tensor(name))

    def _holds_update_of(self, piece: Evidence, name: str) -> bool:
        other = self.expectation.updates.get(name, ())
        if not piece.low_rank_only or not other or not all(isinstance(update, LowRank) for update in other):
            return False
        return piece.explained_by(self.expectation.tensor(piece.name, other))

    def _transposed(self, piece: Evidence) -> bool:
        def turned(update: LowRank) -> tuple[Float64, Float64]:
            a, b = self.expectation.stack.factors(update)
            return b.T, a.T

        square = len(set(self.expectation.shape(piece.name)[-2:])) == 1
        return (
            square
            and piece.low_rank_only
            and piece.explained_by(self.expectation.tensor(piece.name, piece.updates, factors=turned))
        )

    def _sliced(self, piece: Evidence) -> bool:
        """Whether every expert was given r columns of B beside each other, and not every E-th one."""
        updates = [_in_one_slice(update) for update in piece.updates]
        return updates != list(piece.updates) and piece.explained_by(self.expectation.tensor(piece.name, updates))

    def _halves_swapped(self, piece: Evidence) -> bool:
        """Whether the two projections that one stack of matrices holds were given each other's update."""

        def turned(update: LowRank) -> tuple[Float64, Float64]:
            a, b = self.expectation.stack.factors(update)
            return (
                (np.roll(a, a.shape[1] // 2, axis=1), b) if update.transposed else (a, np.roll(b, len(b) // 2, axis=0))
            )

        fused = any(isinstance(update, LowRank) and update.block is not None for update in piece.updates)
        return fused and piece.explained_by(self.expectation.tensor(piece.name, piece.updates, factors=turned))

    def _loose(self) -> Iterator[Hypothesis]:
        """Whether the update is there, or there twice, but rounded more than once, or not to a neighbour."""
        yield Hypothesis(self._near(1.0), _many("cause_beyond_neighbours", factor=1.0))
        yield Hypothesis(self._near(2.0), _many("cause_merged_twice", factor=2.0))

    def _near(self, factor: float) -> Callable[[Evidence], bool]:
        return lambda piece: self._within(piece, factor)

    def _within(self, piece: Evidence, factor: float) -> bool:
        """Whether nearly all of a tile is within some steps of the update times a factor."""
        gain = piece.verdict.gain
        if piece.low_rank is None or gain is None or abs(gain - factor) > _LOOSE_GAIN * factor:
            return False
        values = piece.stored.read(*piece.rows)
        value, below, above = with_neighbours(values, piece.stored.info.dtype)
        tile = self._times(piece, factor).tile(*piece.rows)
        with np.errstate(invalid="ignore", over="ignore"):
            usual = 2 * UNIT_ROUNDOFF[piece.stored.info.dtype] * np.sqrt(np.mean(np.square(value)))
            step = np.maximum((above - below) / 2, usual)
            near = np.abs(value - tile.start - tile.delta) <= _LOOSE_STEPS * step
        return bool(np.mean(near) >= _LOOSE_SHARE)


def cause(code: str, **params: Value) -> Finding:
    """A finding that names a cause."""
    return Finding(code=code, severity="error", params=params)


def spread(items: Sequence[TensorVerdict], most: int) -> list[TensorVerdict]:
    """A few, evenly over all."""
    return list(items[:: max(1, math.ceil(len(items) / most))])


def _counted(code: str, **params: Value) -> Callable[[Sequence[TensorVerdict]], Finding]:
    return lambda found: cause(code, tensor=found[0].name, count=len(found), **params)


def _of_base(name: str) -> Callable[[Sequence[TensorVerdict]], Finding]:
    """That the merge began with another base; where that is a merge of this adapter already, that it went in twice."""

    def told(found: Sequence[TensorVerdict]) -> Finding:
        again = abs(_gain(found) - 2.0) <= 2 * _LOOSE_GAIN
        code, params = ("cause_merged_twice", {"factor": 2.0}) if again else ("cause_base_is", {"base": name})
        return _counted(code, **params)(found)

    return told


def _gain(found: Sequence[TensorVerdict]) -> float:
    """The gain over all of them; 0 where nothing was to be added."""
    moved = [(tensor.gain, tensor.delta_norm**2) for tensor in found if tensor.gain is not None]
    return sum(gain * weight for gain, weight in moved) / (sum(weight for _, weight in moved) or 1.0)


def _many(code: str, *, factor: float) -> Callable[[Sequence[TensorVerdict]], Finding | None]:
    def told(found: Sequence[TensorVerdict]) -> Finding | None:
        outside = sum(tensor.outside for tensor in found)
        if outside <= FEW_ELEMENTS:  # so few are damage
            return None
        return _counted(code, factor=factor, gain=_gain(found), outside=outside)(found)

    return told


def _holding(other: Expectation, *, adapted: bool = False) -> Callable[[Evidence], bool]:
    """Whether a tensor is what another expectation has there; with ``adapted``, only asked of those with an update."""
    return lambda piece: (not adapted or piece.low_rank is not None) and piece.explained_by(other.tensor(piece.name))


def _known_factors(update: LowRank) -> list[tuple[float, str]]:
    """What a wrong scaling makes of an update that should be alpha / r (or alpha / √r) times B·A."""
    r, scaling = update.r, update.scaling
    root = math.sqrt(r)
    known = [(2.0, "cause_merged_twice"), (-1.0, "cause_sign")]
    known += [(1 / scaling, "cause_scaling_ignored")] if scaling else []
    known += [(root, "cause_rslora"), (1 / root, "cause_rslora")]
    known += [(math.sqrt(2), "cause_rslora"), (1 / math.sqrt(2), "cause_rslora")]  # of a rank that was fused of two
    return [*known, (float(r), "cause_not_divided"), (scaling, "cause_scaling_twice"), (1 / r, "cause_scaled")]


def _in_one_slice(update: Update) -> Update:
    """An expert's update with as many columns of B, from where they would begin if experts lay beside each other."""
    if not isinstance(update, LowRank) or update.B_columns is None or update.A_rows is None:
        return update
    start = update.A_rows[0]
    return update.model_copy(update={"B_columns": (start, start + update.r, 1)})


def _renaming(name: str, source: str) -> Callable[[str], list[str]]:
    """Names that come of others as one name comes of another, or the other way round: q for k, or one layer further."""
    pairs = enumerate(zip(name.split("."), source.split("."), strict=False))
    places = {place: pair for place, pair in pairs if pair[0] != pair[1]}

    def renamed(other: str) -> list[str]:
        parts, found = other.split("."), []
        for sign in (1, -1):
            exchanged, shifted = list(parts), list(parts)
            for place, pair in places.items():
                old, new = pair[::sign]
                part = parts[place] if place < len(parts) else ""
                exchanged[place : place + 1] = [new if part == old else part]
                numbers = all(one.isdecimal() for one in (part, old, new))
                moved = str(int(part) + int(new) - int(old)) if numbers else exchanged[place]
                shifted[place : place + 1] = [moved]
            found += [".".join(exchanged), ".".join(shifted)]
        return [candidate for candidate in dict.fromkeys(found) if candidate != other]

    return renamed


def _through_half(piece: Evidence) -> bool:
    """Whether what is outside is what fp16 makes of numbers that are too small for it."""
    tile = piece.expected.tile(*piece.rows)
    values = piece.stored.read(*piece.rows)
    stored, right = as_float64(values, piece.stored.info.dtype), tile.start + tile.delta
    small = np.abs(right) < _HALF_STEP * 2**9  # above this, fp16 holds all that bf16 does
    on_grid = bool((stored[small] % _HALF_STEP == 0).all())
    step = 2 * UNIT_ROUNDOFF[piece.stored.info.dtype] * np.abs(right[small])  # what was lost may have been a neighbour
    moved = np.abs(stored - right)[small] <= _HALF_STEP + step
    chosen, bound = ~small, np.broadcast_to(tile.bound, small.shape)
    elsewhere = classify(values[chosen], piece.stored.info.dtype, tile.start[chosen], tile.delta[chosen], bound[chosen])
    return on_grid and bool(moved.all()) and bool(small.any()) and not elsewhere.outside


def _stored_wider(dtype: str) -> Callable[[Evidence], bool]:
    """Whether the numbers are those of a merge in a narrower dtype, which were then stored in float32."""

    def explains(piece: Evidence) -> bool:
        values = piece.stored.read(*piece.rows)
        if piece.stored.info.dtype != "F32" or not np.array_equal(to_dtype(values.astype(np.float64), dtype), values):
            return False
        bits = values.view(np.uint32)
        narrow = (bits >> 16).astype(np.uint16) if dtype == "BF16" else values.astype(np.float16)
        tile = piece.expected.tile(*piece.rows)
        found = classify(narrow, dtype, tile.start, tile.delta, tile.bound, early=tile.early)
        return found.outside <= _EXPLAINS * piece.tally.outside

    return explains


def _measured_factor(pieces: Sequence[Evidence]) -> float:
    """The factor that the most elements agree with.

    A stored value says that W + factor·Δ lies between its two neighbours, which is an interval for the factor.  The
    middle of where most intervals overlap is found by sweeping over their ends.
    """
    lows, highs = [], []
    for piece in pieces:
        _, below, above = with_neighbours(piece.stored.read(*piece.rows), piece.stored.info.dtype)
        tile = piece.expected.tile(*piece.rows)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            ends = np.stack([(below - tile.start) / tile.delta, (above - tile.start) / tile.delta])
        usable = np.isfinite(ends).all(axis=0)
        lows.append(ends.min(axis=0)[usable])
        highs.append(ends.max(axis=0)[usable])
    low, high = np.concatenate(lows), np.concatenate(highs)
    if not low.size:
        return 0.0
    ends = np.concatenate([low, high])
    order = np.argsort(ends, kind="stable")
    depth = np.cumsum(np.where(order < low.size, 1, -1))
    deepest = int(depth.argmax())
    return float(ends[order[deepest : deepest + 2]].mean())
