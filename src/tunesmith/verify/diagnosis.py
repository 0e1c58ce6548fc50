"""Why a merged model differs: from the tallies, and by asking "what if" of a few tensors.

An answer to "what if" is taken where it makes nearly all that was outside vanish and makes no more numbers inexact.
It is asked of the first tiles with something outside in a few of the bad tensors, so its price does not grow with the
model.  The questions, in order: was nothing added; is it another checkpoint's update; is it this one's times a factor;
are these the values, or the update, of another tensor; was the update transposed; did all go through fp16; and, where
nothing explains it: is it one number, one tensor, the update, or the base?
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.adapter import Adapter, LowRank
from tunesmith.checkpoint import Array, Checkpoint, Float64, as_float64
from tunesmith.errors import TunesmithError
from tunesmith.record import Finding, Value
from tunesmith.verify.records import TensorVerdict
from tunesmith.verify.weights import (
    FEW_ELEMENTS,
    Tally,
    classify,
    low_rank_rows,
    row_tiles,
    strays,
    with_neighbours,
)

_ASKED_TENSORS = 6
_EXPLAINS = 0.02  # a hypothesis is taken where it leaves at most this share of what was outside
_SAME_FACTOR = 0.01  # a measured factor this close to a known mistake's is tried as that
_HALF_STEP = 2.0**-24  # the spacing of fp16 below its normal numbers

# What the findings of the other levels mean as a cause; the weights' causes take more asking.
_CAUSE_OF = {
    "structure_broken": "cause_unreadable",
    "tensors_missing": "cause_tensors_missing",
    "tensors_extra": "cause_tensors_extra",
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
        name: the tensor.
        update: what should have been added to it.
        rows: from and up to.
        tally: how they stand against base + adapter.
    """

    name: str
    update: LowRank | None
    rows: tuple[int, int]
    tally: Tally


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
    base: Checkpoint,
    adapter: Adapter,
    others: Sequence[tuple[str, Adapter]],
) -> list[Finding]:
    """The likeliest causes of weights that are not base + adapter.

    Args:
        tensors: every tensor's verdict.
        merged: the merged model.
        base: the base model.
        adapter: the adapter that should have been merged.
        others: the run's other adapters, by name.

    Returns:
        Modules that were left out first, then what became of the others; empty where nothing is outside.
    """
    bad = [tensor for tensor in tensors if tensor.outside]
    touched = [tensor for tensor in tensors if tensor.module is not None]
    if bad and touched and all(tensor.unchanged == tensor.elements for tensor in touched):
        causes, bad = [_cause("cause_not_applied")], [tensor for tensor in bad if tensor.module is None]
    else:
        absent = [tensor for tensor in bad if tensor.module is not None and tensor.unchanged == tensor.elements]
        causes = [_left_out(absent, touched)] if absent else []
        bad = [tensor for tensor in bad if tensor not in absent]
    if bad:
        causes.append(_Inquiry(merged, base, adapter, bad).cause(tensors, others))
    elif not causes and (few := strays(tensors)):
        causes.append(_few_elements(few))
    return causes


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

    def __init__(self, merged: Checkpoint, base: Checkpoint, adapter: Adapter, bad: Sequence[TensorVerdict]) -> None:
        self.merged, self.base, self.adapter, self.bad = merged, base, adapter, bad
        self.updates = {update.name: update for update in adapter.updates}
        # Untouched tensors say nothing about the update, so both kinds are heard.
        kinds = [[t.name for t in bad if (t.module is None) is untouched] for untouched in (False, True)]
        self.evidence = [self._evidence(name) for names in kinds for name in _spread(names)]
        self.of_updates = [piece for piece in self.evidence if piece.update is not None]

    def cause(self, tensors: Sequence[TensorVerdict], others: Sequence[tuple[str, Adapter]]) -> Finding:
        """The first question that is answered with yes, or what is left when none is."""
        if self.of_updates:
            for name, other in others:
                theirs = {update.name: update for update in other.updates}
                if all(self._explains(piece, theirs.get(piece.name), other) for piece in self.of_updates):
                    return _cause("cause_other_checkpoint", checkpoint=name)
            factor = self._factor()
            if factor is not None:
                return _scaled(factor, self.of_updates[0].update)
        return self._misplaced() or self._through_half() or self._unexplained(tensors)

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

    def _evidence(self, name: str) -> Evidence:
        """The first tile of a bad tensor that holds something outside."""
        update = self.updates.get(name)
        for rows in row_tiles(self.base.info(name)):
            tally = self._tally(name, rows, self._expected(update, rows))
            if tally.outside:
                break
        return Evidence(name, update, rows, tally)

    def _tally(self, name: str, rows: tuple[int, int], delta: tuple[Float64, Float64], source: str = "") -> Tally:
        stored = self.merged.read(name, *rows)
        before = self.base.read_float64(source or name, *rows)
        return classify(stored, self.merged.info(name).dtype, before, np.broadcast_to(delta[0], before.shape), delta[1])

    def _expected(
        self, update: LowRank | None, rows: tuple[int, int], adapter: Adapter | None = None, *, scaled_by: float = 1.0
    ) -> tuple[Float64, Float64]:
        """Δ of some rows, and a bound on its error."""
        if update is None:
            return np.zeros(()), np.zeros(())
        a_RI, b_OR = (adapter or self.adapter).factors(update)
        return low_rank_rows(a_RI, b_OR[slice(*rows)], update.scaling * scaled_by)

    def _explains(
        self,
        piece: Evidence,
        update: LowRank | None,
        adapter: Adapter | None = None,
        *,
        scaled_by: float = 1.0,
        source: str = "",
    ) -> bool:
        """Whether rows are those of ``source`` + scaled_by·Δ of an update."""
        try:
            delta = self._expected(update, piece.rows, adapter, scaled_by=scaled_by)
            return _better(self._tally(piece.name, piece.rows, delta, source), piece.tally)
        except (TunesmithError, ValueError):  # another adapter may have other shapes, or be damaged
            return False

    def _factor(self) -> float | None:
        """A factor on Δ that explains the rows; None where no one factor does."""
        update = self.of_updates[0].update
        assert update is not None  # noqa: S101 - of_updates holds no other
        measured = self._measured_factor()
        r, scaling = update.r, update.scaling
        known = (2.0, -1.0, 1 / scaling, math.sqrt(r), 1 / math.sqrt(r), float(r), 1 / r, scaling, 0.5)
        close = [factor for factor in known if math.isclose(factor, measured, rel_tol=_SAME_FACTOR)]
        for factor in (*close, measured):
            if all(self._explains(piece, piece.update, scaled_by=factor) for piece in self.of_updates):
                return factor
        return None

    def _measured_factor(self) -> float:
        """The factor that the most elements agree with.

        A stored value says that W + factor·Δ lies between its two neighbours, which is an interval for the factor.  The
        middle of where most intervals overlap is found by sweeping over their ends.
        """
        lows, highs = [], []
        for piece in self.of_updates:
            info = self.merged.info(piece.name)
            _, below, above = with_neighbours(self.merged.read(piece.name, *piece.rows), info.dtype)
            before = self.base.read_float64(piece.name, *piece.rows)
            delta, _ = self._expected(piece.update, piece.rows)
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                ends = np.stack([(below - before) / delta, (above - before) / delta])
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

    def _misplaced(self) -> Finding | None:
        """Whether a tensor holds what belongs to another of its shape, or its own update transposed."""
        for piece in self.evidence:
            shape = self.base.info(piece.name).shape
            for name, info in self.base.tensors.items():
                if name != piece.name and info.shape == shape:
                    other = self.updates.get(name)
                    if self._explains(piece, other, source=name):
                        return _cause("cause_misplaced", tensor=piece.name, source=name, count=len(self.bad))
                    if piece.update and other and self._explains(piece, other):
                        return _cause("cause_other_module", tensor=piece.name, source=name, count=len(self.bad))
            if piece.update and len(set(shape)) == 1 and self._transposed(piece, piece.update):
                return _cause("cause_transposed", tensor=piece.name, count=len(self.bad))
        return None

    def _transposed(self, piece: Evidence, update: LowRank) -> bool:
        a_RI, b_OR = self.adapter.factors(update)
        delta = low_rank_rows(b_OR.T, a_RI.T[slice(*piece.rows)], update.scaling)
        return _better(self._tally(piece.name, piece.rows, delta), piece.tally)

    def _through_half(self) -> Finding | None:
        """Whether what is outside is what fp16 makes of numbers that are too small for it."""
        for piece in self.evidence:
            stored = as_float64(self.merged.read(piece.name, *piece.rows), self.merged.info(piece.name).dtype)
            delta, _ = self._expected(piece.update, piece.rows)
            right = self.base.read_float64(piece.name, *piece.rows) + delta
            small = np.abs(right) < _HALF_STEP * 2**9  # above this, fp16 holds all that bf16 does
            on_grid = bool((stored[small] % _HALF_STEP == 0).all())
            moved = np.abs(stored - right)[small] <= _HALF_STEP
            elsewhere = self._tally_where(piece, ~small)
            if not (on_grid and moved.all() and small.any() and not elsewhere.outside):
                return None
        return _cause("cause_through_fp16", count=len(self.bad)) if self.evidence else None

    def _tally_where(self, piece: Evidence, chosen: Array) -> Tally:
        delta, bound = (np.broadcast_to(part, chosen.shape) for part in self._expected(piece.update, piece.rows))
        stored = self.merged.read(piece.name, *piece.rows)[chosen]
        before = self.base.read_float64(piece.name, *piece.rows)[chosen]
        return classify(stored, self.merged.info(piece.name).dtype, before, delta[chosen], bound[chosen])


def _better(asked: Tally, before: Tally) -> bool:
    return asked.outside <= _EXPLAINS * before.outside and asked.exact >= before.exact


def _scaled(factor: float, update: LowRank | None) -> Finding:
    if factor == 2:
        return _cause("cause_merged_twice", factor=factor)
    if factor == -1:
        return _cause("cause_sign")
    root = math.sqrt(update.r) if update else 0.0
    return _cause("cause_rslora" if factor in (root, 1 / root) else "cause_scaled", factor=factor)


def _spread(names: Sequence[str]) -> list[str]:
    """A few names, evenly over all."""
    step = max(1, math.ceil(len(names) / _ASKED_TENSORS))
    return list(names[::step])


def _cause(code: str, **params: Value) -> Finding:
    return Finding(code=code, severity="error", params=params)
