"""Why a merged model differs: from the tallies, and by asking "what if" of a few tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from tunesmith.adapter import Adapter, LowRank
from tunesmith.checkpoint import Checkpoint
from tunesmith.errors import TunesmithError
from tunesmith.record import Finding, Value
from tunesmith.verify.records import TensorVerdict
from tunesmith.verify.weights import Tally, tally_tiles

_ASKED_TENSORS = 6
_ASKED_ROWS = 64
_FEW_ELEMENTS = 64
_EXPLAINS = 0.02  # a hypothesis is taken where it leaves at most this share of what was outside

# What the findings of the other levels mean as a cause; the weights' causes take more asking.
_CAUSE_OF = {
    "structure_broken": "cause_structure",
    "tensors_missing": "cause_structure",
    "tensors_extra": "cause_structure",
    "shape_differs": "cause_structure",
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


def diagnose_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Causes that the findings of the structure, assets and behaviour levels name by themselves, each once."""
    causes: dict[str, Finding] = {}
    for finding in findings:
        code = _CAUSE_OF.get(finding.code)
        if finding.severity == "error" and code is not None:
            causes.setdefault(code, Finding(code=code, severity="error", params=finding.params))
    return list(causes.values())


def diagnose_weights(
    tensors: Sequence[TensorVerdict],
    merged: Checkpoint,
    base: Checkpoint,
    adapter: Adapter,
    others: Sequence[tuple[str, Adapter]],
) -> list[Finding]:
    """The likeliest cause of weights that are not base + adapter.

    Args:
        tensors: every tensor's verdict.
        merged: the merged model.
        base: the base model.
        adapter: the adapter that should have been merged.
        others: the run's other adapters, by name.

    Returns:
        One cause, or two where untouched tensors differ as well; empty where nothing is outside.
    """
    bad = [tensor for tensor in tensors if tensor.outside]
    if not bad:
        return []
    if sum(tensor.outside for tensor in bad) <= _FEW_ELEMENTS:
        worst = max(bad, key=lambda tensor: tensor.outside)
        count = sum(tensor.outside for tensor in bad)
        return [_cause("cause_one_element", tensor=worst.name, count=count)]
    untouched = [tensor for tensor in bad if tensor.module is None]
    touched = [tensor for tensor in tensors if tensor.module is not None]
    causes = [_cause("cause_other_base", count=len(untouched), worst=untouched[0].name)] if untouched else []
    if any(tensor.outside for tensor in touched):
        causes.append(_touched_cause(touched, merged, base, adapter, others))
    return causes


def _touched_cause(
    touched: Sequence[TensorVerdict],
    merged: Checkpoint,
    base: Checkpoint,
    adapter: Adapter,
    others: Sequence[tuple[str, Adapter]],
) -> Finding:
    bad = [tensor for tensor in touched if tensor.outside]
    absent = [tensor for tensor in bad if tensor.unchanged == tensor.elements]
    if len(absent) == len(touched):
        return _cause("cause_not_applied")
    if len(absent) == len(bad):
        modules = ", ".join(str(tensor.module) for tensor in absent[:3]) + (" …" if len(absent) > 3 else "")
        return _cause("cause_partly_applied", modules=modules, count=len(absent), total=len(touched))
    asked = _spread([tensor.name for tensor in bad])
    for name, other in others:
        if _explains(merged, base, other, asked):
            return _cause("cause_other_checkpoint", checkpoint=name)
    factor = _scale(merged, base, adapter, asked)
    if factor is not None:
        return _scaled(factor, adapter)
    worst = max(bad, key=lambda tensor: tensor.outside / tensor.elements)
    return _cause("cause_tensors_outside", count=len(bad), total=len(touched), worst=worst.name)


def _scaled(factor: float, adapter: Adapter) -> Finding:
    if math.isclose(factor, 2, rel_tol=1e-3):
        return _cause("cause_merged_twice", factor=2.0)
    if math.isclose(factor, -1, rel_tol=1e-3):
        return _cause("cause_sign")
    r = adapter.updates[0].r
    if math.isclose(factor, math.sqrt(r), rel_tol=1e-3) or math.isclose(factor, 1 / math.sqrt(r), rel_tol=1e-3):
        return _cause("cause_rslora", factor=factor)
    return _cause("cause_scaled", factor=factor)


def _scale(merged: Checkpoint, base: Checkpoint, adapter: Adapter, asked: Sequence[str]) -> float | None:
    """A factor on Δ that explains the asked tensors; None where no one factor does.

    Known mistakes are tried first, because their factors are exact; then the measured gain.
    """
    updates = {update.name: update for update in adapter.updates}
    r, scaling = adapter.updates[0].r, adapter.updates[0].scaling
    known = (2.0, -1.0, 1 / scaling, math.sqrt(r), 1 / math.sqrt(r), float(r), 1 / r, scaling, 0.5)
    tally = Tally()
    for name in asked:
        for tile in tally_tiles(merged, base, adapter, name, updates[name], rows=_ASKED_ROWS):
            tally.add(tile)
    measured = tally.added_delta / tally.delta_delta if tally.delta_delta else 0.0
    for factor in (*known, measured):
        if factor and _explains(merged, base, adapter, asked, scaled_by=factor, unexplained=tally.outside):
            return factor
    return None


def _explains(
    merged: Checkpoint,
    base: Checkpoint,
    adapter: Adapter,
    asked: Sequence[str],
    *,
    scaled_by: float = 1.0,
    unexplained: int | None = None,
) -> bool:
    """Whether the asked tensors are base + scaled_by·Δ of this adapter."""
    updates: dict[str, LowRank] = {update.name: update for update in adapter.updates}
    tally = Tally()
    for name in asked:
        if name not in updates:
            return False
        try:
            for tile in tally_tiles(merged, base, adapter, name, updates[name], scaled_by=scaled_by, rows=_ASKED_ROWS):
                tally.add(tile)
        except (TunesmithError, ValueError):  # another adapter may have other shapes, or be damaged
            return False
    return tally.outside <= _EXPLAINS * (tally.elements if unexplained is None else unexplained)


def _spread(names: Sequence[str]) -> list[str]:
    """A few names, evenly over all."""
    step = max(1, len(names) // _ASKED_TENSORS)
    return list(names[::step][:_ASKED_TENSORS])


def _cause(code: str, **params: Value) -> Finding:
    return Finding(code=code, severity="error", params=params)
