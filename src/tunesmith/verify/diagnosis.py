"""Why a merged model differs: from the tallies, and by asking "what if" of a few tensors.

An answer to "what if" is taken where it makes nearly all that was outside vanish and makes no more numbers inexact.
It is asked of the first tiles with something outside in a few of the bad tensors, so its price does not grow with the
model.  The questions, in order: was nothing added, or nothing put in; was a head that is untied written as one with its
embedding; is it another checkpoint's update; was a trained magnitude left out, or were trained rows; is it this update
times a factor; are these the values, or the update, of another tensor; was the update transposed; did all go through
fp16; is it the update, or twice that, rounded more than once or beyond its neighbours; and, where nothing explains it:
is it one number, one tensor, the update, or the base?
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.adapter import Copied, LowRank, Magnitude, Rows, Update
from tunesmith.checkpoint import FLOAT_DTYPES, Checkpoint, Float64, as_float64
from tunesmith.errors import TunesmithError
from tunesmith.record import Finding, Value
from tunesmith.verify.expected import Expectation, Expected, Matrix
from tunesmith.verify.records import TensorVerdict
from tunesmith.verify.rounding import UNIT_ROUNDOFF, with_neighbours
from tunesmith.verify.structure import embeddings_of, is_copy, is_head, unties
from tunesmith.verify.weights import FEW_ELEMENTS, Tally, classify, matrix_of, strays, tally_rows

_ASKED_TENSORS = 6
_ASKED_NAMES = 256  # of a mixture of experts' thousands of one shape
_EXPLAINS = 0.02  # a hypothesis is taken where it leaves at most this share of what was outside
_SAME_FACTOR = 0.01  # a measured factor this close to a known mistake's is tried as that
_LOOSE_GAIN, _LOOSE_STEPS, _LOOSE_SHARE = 0.15, 6, 0.999  # of a merge that was rounded in some other way
_HALF_STEP = 2.0**-24  # the spacing of fp16 below its normal numbers

# What the findings of the other levels mean as a cause; the weights' causes take more asking.
_CAUSE_OF = {
    "structure_broken": "cause_unreadable",
    "tensors_missing": "cause_tensors_missing",
    "tensors_extra": "cause_tensors_extra",
    "tied_head_missing": "cause_tied_head",
    "head_declared_tied": "cause_tied_head",
    "shape_differs": "cause_shape",
    "dtype_unknown": "cause_structure",
    "base_changed": "cause_base_changed",
    "tokenizer_differs": "cause_tokenizer",
    "tokenizer_missing_in_merged": "cause_tokenizer",
    "chat_template_differs": "cause_chat_template",
    "chat_template_missing": "cause_chat_template",
    "config_differs": "cause_config",
    "config_unreadable": "cause_config_unreadable",
    "generation_config_differs": "cause_generation_config",
    "behaviour_far": "cause_behaviour",
    "behaviour_unloadable": "cause_behaviour",
    "behaviour_prompt_ids_differ": "cause_behaviour",
}


@dataclass(frozen=True)
class Evidence:
    """Rows of one tensor that hold something outside.

    Attributes:
        expected: what the tensor should be.
        stored: what it is.
        rows: from and up to.
        tally: how the one stands against the other.
    """

    expected: Expected
    stored: Matrix
    rows: tuple[int, int]
    tally: Tally

    @property
    def name(self) -> str:
        """The tensor."""
        return self.expected.name

    @property
    def updates(self) -> tuple[Update, ...]:
        """What should have been made of it."""
        return self.expected.updates

    @property
    def low_rank_only(self) -> bool:
        """Whether it is the base's own tensor plus low-rank updates, and nothing else."""
        return bool(self.updates) and all(isinstance(update, LowRank) for update in self.updates)

    def explained_by(self, other: Expected) -> bool:
        """Whether the rows are those that another expectation has there."""
        if (other.rows, other.columns) != (self.expected.rows, self.expected.columns):
            return False
        try:
            return _better(tally_rows(self.stored, other, *self.rows), self.tally)
        except (TunesmithError, ValueError):  # another adapter may have other shapes, or be damaged
            return False


def diagnose_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Causes that the findings of the structure, assets and behaviour levels name by themselves, each once."""
    causes: dict[str, Finding] = {}
    for finding in findings:
        code = _CAUSE_OF.get(finding.code)
        if finding.severity == "error" and code is not None:
            causes.setdefault(code, Finding(code=code, severity="error", params=finding.params))
    if "cause_config_unreadable" in causes:  # then the directory could not be opened for that reason
        causes.pop("cause_unreadable", None)
    return list(causes.values())


def diagnose_weights(
    tensors: Sequence[TensorVerdict],
    merged: Checkpoint,
    expectation: Expectation,
    others: Sequence[tuple[str, Expectation]],
) -> list[Finding]:
    """The likeliest causes of weights that are not base + adapter.

    Args:
        tensors: every tensor's verdict.
        merged: the merged model.
        expectation: what it should hold.
        others: what it would hold with the run's other adapters, by name.

    Returns:
        What was left out first, then what became of the others; empty where nothing is outside.
    """
    bad = [tensor for tensor in tensors if tensor.outside]
    touched = [tensor for tensor in tensors if tensor.module is not None]
    of_head = _of_tied_head(bad, merged, expectation)
    causes = [_cause("cause_tied_head")] if of_head else []
    bad = [tensor for tensor in bad if tensor.name not in of_head]
    if bad and touched and all(tensor.unchanged == tensor.elements for tensor in touched):
        causes, bad = [_cause("cause_not_applied"), *causes], [tensor for tensor in bad if tensor.module is None]
    else:
        absent = [tensor for tensor in bad if tensor.module is not None and tensor.unchanged == tensor.elements]
        rows = [tensor for tensor in absent if _is_of_rows(expectation.updates[tensor.name])]
        rest = [tensor for tensor in absent if tensor not in rows]
        causes = [*([_left_out(rest, touched)] if rest else []), *([_rows_missing(rows)] if rows else []), *causes]
        bad = [tensor for tensor in bad if tensor not in absent]
    # What is there no arithmetic for is its own cause.
    opaque = [tensor for tensor in bad if merged.info(tensor.name).dtype not in FLOAT_DTYPES]
    bad = [tensor for tensor in bad if tensor not in opaque]
    if bad:
        causes.append(_Inquiry(merged, expectation, bad).cause(tensors, others))
    elif opaque:
        causes.append(_few_elements({tensor.name: tensor.outside for tensor in opaque}))
    elif not causes and (few := strays(tensors)):
        causes.append(_few_elements(few))
    return causes


def _of_tied_head(bad: Sequence[TensorVerdict], merged: Checkpoint, expectation: Expectation) -> set[str]:
    """The bad tensors that are so because a head that the adapters untie was written as one with its embedding."""
    heads = [name for name in expectation.updates if is_head(name)] if unties(expectation.binding) else []
    names = {tensor.name for tensor in bad}
    found = set()
    for head in heads:
        updates = expectation.updates[head]
        bare = [update for update in updates if isinstance(update, Copied)]
        own = [update for update in updates if not isinstance(update, Copied)]
        for embedding in embeddings_of(expectation.base):
            if head in names and (
                (embedding in merged.tensors and is_copy(merged, head, embedding))
                or (bare and _evidence(merged, expectation, head).explained_by(expectation.tensor(head, bare)))
            ):
                found.add(head)
            # What was meant for the head alone went into the one tensor that both are.
            both = [*expectation.updates.get(embedding, ()), *own]
            if embedding in names and _evidence(merged, expectation, embedding).explained_by(
                expectation.tensor(embedding, both)
            ):
                found.add(embedding)
    return found


def _is_of_rows(updates: Sequence[Update]) -> bool:
    return all(isinstance(update, Rows) for update in updates)


def _rows_missing(tensors: Sequence[TensorVerdict]) -> Finding:
    return _cause("cause_rows_missing", tensor=tensors[0].name, count=len(tensors))


def _evidence(merged: Checkpoint, expectation: Expectation, name: str) -> Evidence:
    """The first tile of a bad tensor that holds something outside."""
    expected = expectation.tensor(name)
    stored = matrix_of(merged, expected)
    for rows in expected.tiles():
        tally = tally_rows(stored, expected, *rows)
        if tally.outside:
            break
    return Evidence(expected, stored, rows, tally)


def _left_out(absent: Sequence[TensorVerdict], touched: Sequence[TensorVerdict]) -> Finding:
    names = _by_layer([str(tensor.module) for tensor in absent], [str(tensor.module) for tensor in touched])
    modules = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
    return _cause("cause_partly_applied", modules=modules, count=len(absent), total=len(touched))


def _by_layer(modules: Sequence[str], every: Sequence[str]) -> list[str]:
    """Module names, those of a wholly listed layer as one (``model.layers.3.*``)."""

    def layer(module: str) -> str:
        parts = module.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        return module if place is None else ".".join(parts[: place + 1]) + ".*"

    listed = set(modules)
    partial = {layer(module) for module in every if module not in listed}
    return list(dict.fromkeys(module if layer(module) in partial else layer(module) for module in modules))


def _few_elements(counts: dict[str, int]) -> Finding:
    return _cause("cause_one_element", tensor=max(counts, key=lambda name: counts[name]), count=sum(counts.values()))


class _Inquiry:
    """The questions to the bad tensors of one merged model."""

    def __init__(self, merged: Checkpoint, expectation: Expectation, bad: Sequence[TensorVerdict]) -> None:
        self.expectation, self.bad = expectation, bad
        # Untouched tensors say nothing about the update, so both kinds are heard.
        kinds = [[t.name for t in bad if (t.module is None) is untouched] for untouched in (False, True)]
        self.evidence = [_evidence(merged, expectation, name) for names in kinds for name in _spread(names)]
        self.of_updates = [piece for piece in self.evidence if _has(piece.updates, LowRank)]

    def cause(self, tensors: Sequence[TensorVerdict], others: Sequence[tuple[str, Expectation]]) -> Finding:
        """The first question that is answered with yes, or what is left when none is."""
        if self.of_updates:
            for name, other in others:
                if all(piece.explained_by(other.tensor(piece.name)) for piece in self.of_updates):
                    return _cause("cause_other_checkpoint", checkpoint=name)
        found = self._without(Magnitude, "cause_magnitude_ignored") or self._without(Rows, "cause_rows_missing")
        if found is None and self.of_updates and (factor := self._factor()) is not None:
            found = _scaled(factor, _first(self.of_updates[0].updates))
        return found or self._misplaced() or self._through_half() or self._loose() or self._unexplained(tensors)

    def _without(self, kind: type[Update], code: str) -> Finding | None:
        """Whether leaving out one kind of update explains all the tensors that have it."""
        pieces = [piece for piece in self.evidence if _has(piece.updates, kind)]
        for piece in pieces:
            rest = [update for update in piece.updates if not isinstance(update, kind)]
            if not piece.explained_by(self.expectation.tensor(piece.name, rest)):
                return None
        if not pieces:
            return None
        bad = {tensor.name for tensor in self.bad}
        count = sum(_has(updates, kind) for name, updates in self.expectation.updates.items() if name in bad)
        return _cause(code, tensor=pieces[0].name, count=count)

    def _unexplained(self, tensors: Sequence[TensorVerdict]) -> Finding:
        outside = {tensor.name: tensor.outside for tensor in self.bad}
        if sum(outside.values()) <= FEW_ELEMENTS:
            return _few_elements(outside)
        touched = [tensor for tensor in tensors if tensor.module is not None]
        bad_touched = [tensor for tensor in self.bad if tensor.module is not None]
        untouched = [tensor for tensor in self.bad if tensor.module is None]
        if len(bad_touched) == len(touched) > 1:
            if untouched:
                return _cause("cause_other_base", count=len(untouched), worst=untouched[0].name)
            return _cause("cause_other_adapter", count=len(touched))
        if not bad_touched and 2 * len(untouched) > len(tensors) - len(touched) and len(untouched) > 1:
            return _cause("cause_other_base", count=len(untouched), worst=untouched[0].name)
        worst = max(self.bad, key=lambda tensor: tensor.outside / tensor.elements)
        return _cause("cause_tensors_outside", count=len(self.bad), total=len(tensors), worst=worst.name)

    def _times(self, piece: Evidence, factor: float) -> Expected:
        """A tensor with all its low-rank updates so many times as strong."""
        updates = [
            update.model_copy(update={"scaling": factor * update.scaling}) if isinstance(update, LowRank) else update
            for update in piece.updates
        ]
        return self.expectation.tensor(piece.name, updates)

    def _factor(self) -> float | None:
        """A factor on Δ that explains the rows; None where no one factor does."""
        update = _first(self.of_updates[0].updates)
        r, scaling = update.r, update.scaling
        known = [2.0, -1.0, math.sqrt(r), 1 / math.sqrt(r), float(r), 1 / r, scaling, 0.5]
        known[2:2] = [1 / scaling] if scaling else []
        linear = [piece for piece in self.of_updates if piece.low_rank_only]
        measured = _measured_factor(linear) if linear else None
        if measured is not None:
            known = [factor for factor in known if math.isclose(factor, measured, rel_tol=_SAME_FACTOR)] + [measured]
        for factor in known:
            if all(piece.explained_by(self._times(piece, factor)) for piece in self.of_updates):
                return factor
        return None

    def _loose(self) -> Finding | None:
        """Whether the update is there, or there twice, but rounded more than once, or not to a neighbour."""
        moved = [(tensor.gain, tensor.delta_norm**2) for tensor in self.bad if tensor.gain is not None]
        weight = sum(size for _, size in moved)
        outside = sum(tensor.outside for tensor in self.bad)
        if not weight or outside <= FEW_ELEMENTS or any(tensor.module is None for tensor in self.bad):
            return None
        gain = sum(gain * size for gain, size in moved) / weight
        for factor, code in ((1.0, "cause_beyond_neighbours"), (2.0, "cause_merged_twice")):
            if abs(gain - factor) <= _LOOSE_GAIN * factor and all(self._within(p, factor) for p in self.of_updates):
                return _cause(code, factor=factor, gain=gain, count=outside)
        return None

    def _within(self, piece: Evidence, factor: float) -> bool:
        """Whether nearly all of a tile is within some steps of the update times a factor."""
        values = piece.stored.read(*piece.rows)
        value, below, above = with_neighbours(values, piece.stored.info.dtype)
        tile = self._times(piece, factor).tile(*piece.rows)
        with np.errstate(invalid="ignore", over="ignore"):
            usual = 2 * UNIT_ROUNDOFF[piece.stored.info.dtype] * np.sqrt(np.mean(np.square(value)))
            step = np.maximum((above - below) / 2, usual)
            near = np.abs(value - tile.start - tile.delta) <= _LOOSE_STEPS * step
        return bool(np.mean(near) >= _LOOSE_SHARE)

    def _misplaced(self) -> Finding | None:
        """Whether a tensor holds what belongs to another of its shape, or its own update transposed."""
        for piece in self.evidence:
            for name in self._alike(piece.name):
                if piece.explained_by(self.expectation.tensor(name)):
                    return _cause("cause_misplaced", tensor=piece.name, source=name, count=len(self.bad))
                if self._holds_update_of(piece, name):
                    return _cause("cause_other_module", tensor=piece.name, source=name, count=len(self.bad))
            shape = self.expectation.shape(piece.name)
            if piece.low_rank_only and len(set(shape[-2:])) == 1 and self._transposed(piece):
                return _cause("cause_transposed", tensor=piece.name, count=len(self.bad))
        return None

    def _alike(self, name: str) -> list[str]:
        """Other tensors of its shape, those whose names differ least first: another layer's, or a sibling."""
        shape, parts = self.expectation.shape(name), name.split(".")
        others = [other for other in self.expectation.names if other != name and self.expectation.shape(other) == shape]

        def distance(other: str) -> int:
            theirs = other.split(".")
            same = sum(ours == part for ours, part in zip(parts, theirs, strict=False))
            return max(len(parts), len(theirs)) - same

        return sorted(others, key=distance)[:_ASKED_NAMES]

    def _holds_update_of(self, piece: Evidence, name: str) -> bool:
        other = self.expectation.updates.get(name, ())
        if not piece.low_rank_only or not other or not all(isinstance(update, LowRank) for update in other):
            return False
        return piece.explained_by(self.expectation.tensor(piece.name, other))

    def _transposed(self, piece: Evidence) -> bool:
        def turned(update: LowRank) -> tuple[Float64, Float64]:
            a, b = self.expectation.stack.factors(update)
            return b.T, a.T

        return piece.explained_by(self.expectation.tensor(piece.name, piece.updates, factors=turned))

    def _through_half(self) -> Finding | None:
        """Whether what is outside is what fp16 makes of numbers that are too small for it."""
        for piece in self.evidence:
            tile = piece.expected.tile(*piece.rows)
            values = piece.stored.read(*piece.rows)
            stored, right = as_float64(values, piece.stored.info.dtype), tile.start + tile.delta
            small = np.abs(right) < _HALF_STEP * 2**9  # above this, fp16 holds all that bf16 does
            on_grid = bool((stored[small] % _HALF_STEP == 0).all())
            moved = np.abs(stored - right)[small] <= _HALF_STEP
            chosen, bound = ~small, np.broadcast_to(tile.bound, small.shape)
            elsewhere = classify(
                values[chosen], piece.stored.info.dtype, tile.start[chosen], tile.delta[chosen], bound[chosen]
            )
            if not (on_grid and moved.all() and small.any() and not elsewhere.outside):
                return None
        return _cause("cause_through_fp16", count=len(self.bad)) if self.evidence else None


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


def _has(updates: Sequence[Update], kind: type[Update]) -> bool:
    return any(isinstance(update, kind) for update in updates)


def _first(updates: Sequence[Update]) -> LowRank:
    return next(update for update in updates if isinstance(update, LowRank))


def _better(asked: Tally, before: Tally) -> bool:
    return asked.outside <= _EXPLAINS * before.outside and asked.exact >= before.exact


def _scaled(factor: float, update: LowRank) -> Finding:
    if factor == 2:
        return _cause("cause_merged_twice", factor=factor)
    if factor == -1:
        return _cause("cause_sign")
    root = math.sqrt(update.r)
    return _cause("cause_rslora" if factor in (root, 1 / root) else "cause_scaled", factor=factor)


def _spread(names: Sequence[str]) -> list[str]:
    """A few names, evenly over all."""
    step = max(1, math.ceil(len(names) / _ASKED_TENSORS))
    return list(names[::step])


def _cause(code: str, **params: Value) -> Finding:
    return Finding(code=code, severity="error", params=params)
