"""A base that an adapter was not trained on: which parts do not fit, and what model the adapter's shapes speak of."""

from __future__ import annotations

import statistics

from tunesmith.adapter.bind import Binder
from tunesmith.adapter.load import Adapter
from tunesmith.adapter.places import Places, layer_of
from tunesmith.checkpoint import Checkpoint
from tunesmith.errors import AdapterError
from tunesmith.record import Finding, Value

_NAMED = 3

# Modules that are given the residual stream, whose width is the model's.
_READERS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "gate_proj",
    "up_proj",
    "c_attn",
    "query_key_value",
    "qkv_proj",
    "gate_up_proj",
)


def misfit(adapter: Adapter, base: Checkpoint) -> list[Finding]:
    """What of an adapter has no place in a base, or another shape.

    Args:
        adapter: any adapter; one that cannot be merged is looked at all the same.
        base: the model that it would be put on.

    Returns:
        Nothing where it fits; else one finding, ``base_does_not_fit``, with the first names and shapes, and the width
        and depth that either side speaks of.
    """
    places = Places(base)
    try:
        bound = Binder(adapter, 0, 1.0, places).bind()
    except AdapterError:  # a configuration that is none: told where it is read
        return []
    if not bound.misfits:
        return []
    absent = len(bound.absent)
    names = list(dict.fromkeys(problem.partition(":")[0] for problem in bound.misfits))
    params: dict[str, Value] = {
        "count": len(bound.misfits),
        "total": len(adapter.adapted) + len(adapter.whole),
        "absent": absent,
        "misshapen": len(bound.misfits) - absent,
        "names": ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else ""),
        "shapes": _first_shapes(adapter, places),
        "named": adapter.base_model,
        "width": _width(adapter),
        "layers": _layers(adapter),
        "base_width": places.setting("hidden_size"),
        "base_layers": places.setting("num_hidden_layers"),
    }
    return [Finding(code="base_does_not_fit", severity="error", params=params)]


def _first_shapes(adapter: Adapter, places: Places) -> str | None:
    """``model.layers.0.self_attn.q_proj: 64×32, 128×64``, the adapter's shape and the base's."""
    for adapted in adapter.adapted:
        name = places.find(f"{adapted.module}.weight")
        a, b = (adapter.header.tensors[tensor].shape for tensor in (adapted.lora_A, adapted.lora_B))
        ours = (b[0], *a[1:])
        if name is not None and sorted(places.tensors[name].shape) != sorted(ours):
            return f"{adapted.module}: {_times(ours)}, {_times(places.tensors[name].shape)}"
    return None


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _width(adapter: Adapter) -> int | None:
    widths = [
        adapter.header.tensors[adapted.lora_A].shape[1]
        for adapted in adapter.adapted
        if adapted.module.rpartition(".")[2] in _READERS and not adapted.embedding
    ]
    return statistics.mode(widths) if widths else None


def _layers(adapter: Adapter) -> int | None:
    places = [layer_of(adapted.module + ".") for adapted in adapter.adapted]
    numbers = [place[1] for place in places if place is not None]
    return 1 + max(numbers) if numbers else None
