"""Whether an adapter's figures make sense: what is broken, what never moved, what is out of proportion."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from tunesmith.adapter.load import Adapter
from tunesmith.adapter.places import layer_of
from tunesmith.adapter.records import AdapterFacts, ModuleFacts
from tunesmith.record import Finding, Value

# alpha / r as people set it: PEFT's default is 1, twice the rank is the custom, QLoRA's 16 / 64 is the least known.
_USUAL_SCALING = (0.25, 8.0)
_LARGEST_USUAL = 0.3
"""‖Δ‖ / ‖W‖: fine-tunes that work lie between 0.001 and 0.05."""
_SMALLEST_USUAL = 1e-6
_FAR_BEYOND = 10.0

_LOW_RANK_SHARE = 0.25
"""Trained adapters fill half of their rank or more; a quarter is telling."""
_LEAST_RANK = 8

_NAMED = 3
_LISTED = 8


def findings(adapter: Adapter, facts: AdapterFacts) -> tuple[Finding, ...]:
    """What the user should know of an adapter; nothing where all is well.

    Args:
        adapter: the adapter.
        facts: what was measured of it.
    """
    found = [*adapter.findings[:1], *_not_finite(facts), *_never_moved(adapter, facts)]
    found += [*_scaling(facts), *_rank_exceeds(adapter)]
    if adapter.residual is None:  # relative to another base, an update has no size against this one
        found += [*_rank_low(facts), *_proportion(facts)]
    return tuple(found)


def _not_finite(facts: AdapterFacts) -> Iterator[Finding]:
    broken = [module.module for module in facts.modules if module.finite is False]
    if broken:
        yield Finding(
            code="adapter_not_finite",
            severity="error",
            params={"count": len(broken), "measured": facts.measured, "names": _first(broken)},
        )


def _never_moved(adapter: Adapter, facts: AdapterFacts) -> Iterator[Finding]:
    told = [module for module in facts.modules if module.moved is not None]
    still = [module for module in told if not module.moved]
    # Saved before the first step: nothing has moved, and nothing was to.
    if not still or adapter.path.name == "checkpoint-0":
        return
    if len(still) == len(told):
        yield Finding(code="update_zero", severity="warning", params={"measured": len(told)})
        return
    params: dict[str, Value] = {
        "count": len(still),
        "measured": len(told),
        "share": len(still) / len(told),
        "kinds": _kinds(still, told),
        "layers": _layers(module.module for module in still),
    }
    yield Finding(code="modules_never_moved", severity="warning", params=params)


def _scaling(facts: AdapterFacts) -> Iterator[Finding]:
    r, alpha, scaling = facts.r, facts.lora_alpha, facts.scaling
    # mlx-lm has a scale and no alpha, and other customs.
    if r is None or r < 1 or alpha is None or scaling is None:
        return
    low, high = _USUAL_SCALING
    params: dict[str, Value] = {"r": r, "alpha": alpha, "scaling": scaling, "low": low, "high": high}
    params |= {"plain": alpha / r, "rslora": alpha / math.sqrt(r)}
    if facts.use_rslora and scaling > high:
        yield Finding(code="rslora_scaling_high", severity="warning", params=params)
    elif not facts.use_rslora and scaling < low:
        yield Finding(code="scaling_low", severity="info", params=params)
    elif not facts.use_rslora and scaling > high:
        yield Finding(code="scaling_high", severity="warning", params=params)


def _rank_exceeds(adapter: Adapter) -> Iterator[Finding]:
    over = []
    for adapted in adapter.adapted:
        a, b = (adapter.header.tensors[name].shape for name in (adapted.lora_A, adapted.lora_B))
        size = min(math.prod(a[1:]), b[0])
        if adapted.r > size:
            over.append((adapted.module, adapted.r, size))
    if over:
        module, r, size = max(over, key=lambda one: one[1] - one[2])
        params: dict[str, Value] = {"count": len(over), "module": module, "r": r, "size": size}
        yield Finding(code="rank_exceeds_module", severity="info", params=params)


def _rank_low(facts: AdapterFacts) -> Iterator[Finding]:
    ranks = [(module.effective_rank, module.r) for module in facts.modules if module.effective_rank is not None]
    if not ranks:
        return
    r, used = statistics.median(r for _, r in ranks), statistics.median(rank for rank, _ in ranks)
    if r >= _LEAST_RANK and used < _LOW_RANK_SHARE * r:
        suggested = 2 ** math.ceil(math.log2(max(2.0, 2 * used)))
        params = {"r": int(r), "effective_rank": used, "measured": len(ranks), "suggested": suggested}
        yield Finding(code="effective_rank_low", severity="info", params=params)


def _proportion(facts: AdapterFacts) -> Iterator[Finding]:
    overall = facts.relative_update
    known = [(module.relative_update, module.module) for module in facts.modules]
    sized = [(size, name) for size, name in known if size is not None]
    if overall is None or not sized:
        return
    largest, module = max(sized)
    typical = statistics.median(size for size, _ in sized)
    params: dict[str, Value] = {"relative": overall, "module": module, "largest": largest, "typical": typical}
    if overall > _LARGEST_USUAL:
        yield Finding(code="update_very_large", severity="warning", params=params)
    elif largest > _LARGEST_USUAL and largest > _FAR_BEYOND * typical:
        yield Finding(code="module_update_very_large", severity="warning", params=params)
    elif 0 < overall < _SMALLEST_USUAL and not any(module.moved is None for module in facts.modules if module.finite):
        yield Finding(code="update_negligible", severity="warning", params={"relative": overall})


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")


def _kinds(some: Iterable[ModuleFacts], of: Iterable[ModuleFacts]) -> str:
    """``q_proj 3/28, k_proj 28/28``."""
    parts, wholes = (Counter(module.module.rpartition(".")[2] for module in modules) for modules in (some, of))
    told = [f"{kind} {count}/{wholes[kind]}" for kind, count in parts.most_common(_LISTED)]
    return ", ".join(told) + (", …" if len(parts) > _LISTED else "")


def _layers(modules: Iterable[str]) -> str:
    """``0-3, 7``; a dash where they are in none."""
    places = (layer_of(module + ".") for module in modules)
    numbers = sorted({place[1] for place in places if place is not None})
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    told = [str(first) if first == last else f"{first}-{last}" for first, last in runs[:_LISTED]]
    return ", ".join(told) + (", …" if len(runs) > _LISTED else "") or "–"
