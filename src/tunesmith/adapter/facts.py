"""What an adapter is, in numbers, without torch and without forming a single d×d product."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from tunesmith.adapter.factors import effective_rank, has_product, matrices, norm, singular_values
from tunesmith.adapter.load import Adapted, Adapter
from tunesmith.adapter.places import Places, layer_of
from tunesmith.adapter.records import AdapterFacts, ModuleFacts
from tunesmith.adapter.sense import findings
from tunesmith.checkpoint import FLOAT_DTYPES, Checkpoint
from tunesmith.errors import AdapterError

GLANCE_BYTES = 224 << 20
"""What may be read where an answer is wanted at once; ``benchmarks/inspect_cost.py`` prints what that takes."""

_THREADS = min(4, os.cpu_count() or 1)
_WORTH_A_THREAD = 1 << 20
_SAMPLE_ELEMENTS = 1 << 17
_SAMPLE_BLOCKS = 8
_SAMPLE_COST = 1 << 19
_PAIR_COST = 1 << 17
_CUBE_COST = 2
_PRODUCTS_PER_BYTE = 64

_NEGLIGIBLE = 1e-6
_MOST_KINDS = 64


def describe(
    adapter: Adapter, base: Checkpoint | None = None, *, budget_bytes: int | None = GLANCE_BYTES
) -> AdapterFacts:
    """Describe an adapter, and its size against the base where that is at hand.

    Args:
        adapter: any adapter that could be read, mergeable or not, broken or not.
        base: the base model, or None.
        budget_bytes: how much may be measured, as the bytes of factors of a low rank that would take as long.  What is
            measured then lies evenly in each kind of module (``q_proj``, …), at least one of each that there is room
            for.  None to measure all.

    Returns:
        The facts; base norms are estimates from evenly spaced rows of every tensor.
    """
    chosen = _chosen(adapter, budget_bytes, sampled=base is not None)
    modules = _with_moved(adapter, _modules(adapter, chosen, Places(base) if base else None))
    infos = list(adapter.header.tensors.values())
    config = adapter.config
    scalings = [module.scaling for module in modules]
    ranks = [module.effective_rank for module in modules if module.effective_rank is not None]
    facts = AdapterFacts(
        path=str(adapter.path.resolve()),
        format=adapter.format,
        base_model=adapter.base_model,
        peft_type=str(config.get("peft_type")),
        r=config["r"] if isinstance(config.get("r"), int) else None,
        lora_alpha=_finite(config.get("lora_alpha")),
        scaling=max(set(scalings), key=scalings.count) if scalings else None,
        use_rslora=bool(config.get("use_rslora")),
        target_modules=tuple(sorted({_kind(module.module) for module in modules})),
        modules=tuple(modules),
        measured=len(chosen),
        parameters=sum(info.elements for info in infos),
        dtype=", ".join(sorted({info.dtype for info in infos})),
        size_bytes=adapter.header.file_bytes,
        relative_update=_relative_update(modules),
        effective_rank=statistics.median(ranks) if ranks else None,
        refusal="; ".join([*adapter.refusals, *([adapter.residual] if adapter.residual else [])]) or None,
    )
    return facts.model_copy(update={"findings": findings(adapter, facts)})


def delta_norm(adapter: Adapter, adapted: Adapted) -> float:
    """‖s·B·A‖ (Frobenius), from r×r Gram matrices: ‖BA‖² = tr((BᵀB)(AAᵀ)); of a stack, over all its matrices.

    Raises:
        AdapterError: a factor holds NaN or infinity.
    """
    norms = (norm(a_ri @ a_ri.T, b_or.T @ b_or) for a_ri, b_or in matrices(adapter, adapted))
    return abs(adapted.scaling) * math.hypot(*norms)


def _modules(adapter: Adapter, chosen: Sequence[int], places: Places | None) -> list[ModuleFacts]:
    """All modules, and the figures of those that are chosen."""
    modules = [_unread(adapted) for adapted in adapter.adapted]
    # Small products are over before another thread has the interpreter.
    size = sum(_size(adapter, adapter.adapted[index]) for index in chosen) / max(1, len(chosen))
    threads = _THREADS if size >= _WORTH_A_THREAD else 1
    # Threads of BLAS take turns at matrices as small as r×r, and wait long for each other on a busy machine.
    with threadpool_limits(1), ThreadPoolExecutor(threads) as pool:
        read = pool.map(lambda index: _measured(adapter, adapter.adapted[index], places), chosen)
        for index, module in zip(chosen, read, strict=True):
            modules[index] = module
    return modules


def _unread(adapted: Adapted, *, finite: bool | None = None) -> ModuleFacts:
    return ModuleFacts(module=adapted.module, r=adapted.r, scaling=adapted.scaling, delta_norm=None, finite=finite)


def _measured(adapter: Adapter, adapted: Adapted, places: Places | None) -> ModuleFacts:
    try:
        pairs = list(matrices(adapter, adapted))
    except AdapterError:  # NaN or infinity: the facts tell of it, so that such a run can be looked at
        return _unread(adapted, finite=False)
    if not has_product(adapter, adapted):
        return _unread(adapted, finite=True)
    name = places.find(f"{adapted.module}.weight") if places else None
    grams = [(a_ri @ a_ri.T, b_or.T @ b_or) for a_ri, b_or in pairs]
    total = math.hypot(*(norm(gram_a, gram_b) for gram_a, gram_b in grams))
    values = singular_values(*grams[0]) if len(grams) == 1 and total else None
    scale = abs(adapted.scaling)
    return _unread(adapted, finite=True).model_copy(
        update={
            "delta_norm": scale * total,
            "base_norm": _sampled_norm(places.base, name) if places and name else None,
            "spectral_norm": None if values is None else scale * float(values[0]),
            "effective_rank": None if values is None else effective_rank(values),
        }
    )


def _with_moved(adapter: Adapter, modules: list[ModuleFacts]) -> list[ModuleFacts]:
    """Say of every module whether training changed it, where the others tell what a change is."""
    norms = [module.delta_norm for module in modules if module.delta_norm is not None]
    if not norms or adapter.residual:
        return modules
    least = _NEGLIGIBLE * statistics.median(norms)
    told = []
    for adapted, module in zip(adapter.adapted, modules, strict=True):
        moved = None if module.delta_norm is None else module.delta_norm > least
        if moved is False and adapted.magnitude:
            moved = None
        told.append(module.model_copy(update={"moved": moved}))
    return told


def _sampled_norm(base: Checkpoint, name: str) -> float | None:
    info = base.info(name)
    if len(info.shape) != 2 or info.dtype not in FLOAT_DTYPES:
        return None
    rows, columns = info.shape
    block = min(rows, max(1, _SAMPLE_ELEMENTS // _SAMPLE_BLOCKS // max(1, columns)))
    starts = sorted({(rows - block) * part // (_SAMPLE_BLOCKS - 1) for part in range(_SAMPLE_BLOCKS)})
    squares = sum(float(np.vdot(part, part)) for part in base.blocks(name, starts, block))
    seen = len(starts) * block * columns
    norm = math.sqrt(squares / seen * info.elements) if seen else 0.0
    return norm if math.isfinite(norm) else None


def _relative_update(modules: Sequence[ModuleFacts]) -> float | None:
    """‖Δ‖ / ‖W‖ over all, each kind's measured modules standing for those that were not."""
    known = [module for module in modules if module.delta_norm is not None]
    if not known or any(module.base_norm is None for module in known):
        return None
    delta = base = 0.0
    for kind, count in _counted(modules).items():
        seen = [module for module in known if _kind(module.module) == kind]
        weight = count / max(1, len(seen))
        delta += weight * math.fsum((module.delta_norm or 0.0) ** 2 for module in seen)
        base += weight * math.fsum((module.base_norm or 0.0) ** 2 for module in seen)
    return math.sqrt(delta / base) if base else None


def _chosen(adapter: Adapter, budget_bytes: int | None, *, sampled: bool) -> list[int]:
    """Which of the adapter's pairs to measure, in the file's order."""
    costs = [_cost(adapter, adapted, sampled=sampled) for adapted in adapter.adapted]
    if budget_bytes is None or sum(costs) <= budget_bytes:
        return list(range(len(costs)))
    kinds = sorted(_by_kind(adapter).values(), key=lambda kind: min(costs[index] for index in kind))
    chosen, left = [], budget_bytes
    for turn in zip_longest(*map(_spread, kinds)):
        for index in turn:
            if index is not None and costs[index] <= left:
                chosen.append(index)
                left -= costs[index]
    return sorted(chosen)


def _spread(places: Sequence[int]) -> list[int]:
    """Reordered, so that however many come first, they lie evenly: the middle, then the quarters, then the eighths."""
    count = len(places)
    halvings = range(count.bit_length() + 1)
    evenly = (count * (2 * part + 1) >> depth + 1 for depth in halvings for part in range(1 << depth))
    return [places[place] for place in dict.fromkeys(place for place in evenly if place < count)]


def _cost(adapter: Adapter, adapted: Adapted, *, sampled: bool) -> int:
    """What it takes to measure one pair, in bytes of factors of a low rank."""
    size = _size(adapter, adapted)
    products = size * adapted.r // _PRODUCTS_PER_BYTE  # the Gram matrices
    return _PAIR_COST + size + products + _CUBE_COST * adapted.r**3 + (_SAMPLE_COST if sampled else 0)


def _size(adapter: Adapter, adapted: Adapted) -> int:
    return sum(adapter.header.tensors[name].size_bytes for name in (adapted.lora_A, adapted.lora_B))


def _by_kind(adapter: Adapter) -> dict[str, list[int]]:
    """The places of the adapter's pairs, by kind, in the order of their layers."""
    kinds: dict[str, list[int]] = {}
    for index, adapted in enumerate(adapter.adapted):
        kinds.setdefault(_kind(adapted.module), []).append(index)
    if len(kinds) > _MOST_KINDS:  # no model's: names that are as many as the modules
        return {"": list(range(len(adapter.adapted)))}
    for kind in kinds.values():
        kind.sort(key=lambda index: (layer_of(adapter.adapted[index].module) or ("", 0, ""))[1])
    return kinds


def _counted(modules: Iterable[ModuleFacts]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for module in modules:
        kind = _kind(module.module)
        counts[kind] = counts.get(kind, 0) + 1
    return counts


def _kind(module: str) -> str:
    return module.rpartition(".")[2]


def _finite(value: Any) -> float | None:
    """A configured number as a record can hold it."""
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
