"""What an adapter is, in numbers, without torch and without forming a single d×d product."""

from __future__ import annotations

import math

import numpy as np

from tunesmith.adapter.load import Adapted, Adapter
from tunesmith.adapter.places import Places
from tunesmith.adapter.records import AdapterFacts, ModuleFacts
from tunesmith.checkpoint import Checkpoint

_SAMPLE_ELEMENTS = 1 << 15
_SAMPLE_BLOCKS = 8


def describe(adapter: Adapter, base: Checkpoint | None = None) -> AdapterFacts:
    """Describe an adapter, and its size against the base where that is at hand.

    Args:
        adapter: any adapter that could be read, mergeable or not.
        base: the base model, or None.

    Returns:
        The facts; base norms are estimates from evenly spaced rows of every tensor.
    """
    places = Places(base) if base else None
    modules = []
    for adapted in adapter.adapted:
        name = places.find(f"{adapted.module}.weight") if places else None
        modules.append(
            ModuleFacts(
                module=adapted.module,
                r=adapted.r,
                scaling=adapted.scaling,
                delta_norm=delta_norm(adapter, adapted),
                base_norm=_sampled_norm(base, name) if base and name and len(base.info(name).shape) == 2 else None,
            )
        )
    infos = list(adapter.header.tensors.values())
    config = adapter.config
    scalings = [module.scaling for module in modules]
    return AdapterFacts(
        path=str(adapter.path.resolve()),
        base_model=adapter.base_model,
        peft_type=str(config.get("peft_type")),
        r=config["r"] if isinstance(config.get("r"), int) else None,
        lora_alpha=float(config["lora_alpha"]) if isinstance(config.get("lora_alpha"), int | float) else None,
        scaling=max(set(scalings), key=scalings.count) if scalings else None,
        use_rslora=bool(config.get("use_rslora")),
        target_modules=tuple(sorted({module.module.rpartition(".")[2] for module in modules})),
        modules=tuple(modules),
        parameters=sum(info.elements for info in infos),
        dtype=", ".join(sorted({info.dtype for info in infos})),
        size_bytes=adapter.header.file_bytes,
        relative_update=_ratio(modules),
        refusal="; ".join([*adapter.refusals, *([adapter.residual] if adapter.residual else [])]) or None,
    )


def delta_norm(adapter: Adapter, adapted: Adapted) -> float:
    """‖s·B·A‖ (Frobenius), from r×r Gram matrices: ‖BA‖² = tr((BᵀB)(AAᵀ)); of a stack, over all its matrices."""
    a_ri, b_or = adapter.finite(adapted.lora_A), adapter.finite(adapted.lora_B)
    squared = 0.0
    for matrix in range(adapted.stacked):
        a = a_ri[matrix * adapted.r : (matrix + 1) * adapted.r]
        b = b_or[:, matrix :: adapted.stacked]
        squared += float(np.sum((b.T @ b) * (a @ a.T)))
    return abs(adapted.scaling) * math.sqrt(max(squared, 0.0))


def _sampled_norm(base: Checkpoint, name: str) -> float:
    rows, columns = base.info(name).shape
    block = max(1, _SAMPLE_ELEMENTS // _SAMPLE_BLOCKS // max(1, columns))
    starts = np.unique(np.linspace(0, max(0, rows - block), _SAMPLE_BLOCKS).astype(int))
    squares = [np.square(base.read_float64(name, int(start), int(start) + block)) for start in starts]
    seen = sum(part.size for part in squares)
    return math.sqrt(sum(float(part.sum()) for part in squares) / seen * rows * columns) if seen else 0.0


def _ratio(modules: list[ModuleFacts]) -> float | None:
    if not modules or any(module.base_norm is None for module in modules):
        return None
    base = math.fsum((module.base_norm or 0.0) ** 2 for module in modules)
    delta = math.fsum(module.delta_norm**2 for module in modules)
    return math.sqrt(delta / base) if base else None
