"""The numbers beside the weights: shapes, norms and rotary positions, in ``config.json`` and in the file.

Where a file says nothing llama.cpp takes a default; that counts as what it says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tunesmith.checkpoint import Checkpoint, Float64
from tunesmith.record import Finding
from tunesmith.verify.gguf.families import Family
from tunesmith.verify.gguf.file import GgufFile

_RELATIVE = 1e-6  # numbers are stored as float32
_ROPE_BASE = 10000.0
_GEMMA_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
_GRANITE = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}
_ROPE_KEYS = ("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length")

Expected = tuple[str, object, object]  # the key, what it must say, and what is meant where it says nothing


def check_settings(file: GgufFile, model: Checkpoint, family: Family) -> list[Finding]:
    """Hold a file's numbers against ``config.json``.

    Args:
        file: the GGUF file.
        model: the model.
        family: its family.

    Returns:
        One good finding, or an error for every number that differs.
    """
    expected = [*_shapes(model.config), *_attention(model.config, family), *_rope(model.config)]
    differ = []
    for key, wanted, default in expected:
        found = file.of_architecture(key)
        meant = default if found is None else found
        if not _same(meant, wanted):
            differ.append(_differs(key, wanted, found))
    differ += _factors(file, model.config) + _no_rope(model.config, family)
    return differ or [Finding(code="gguf_settings_same", severity="ok", params={"count": len(expected)})]


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings, whichever of the ways they are written: Transformers 4 and 5 differ."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if isinstance(found.get("full_attention"), dict):
        found = found["full_attention"]
    theta = found.get("rope_theta", config.get("rope_theta", _ROPE_BASE))
    return {**found, "rope_theta": theta, "rope_type": found.get("rope_type") or found.get("type") or "default"}


def head_dim(config: Mapping[str, Any]) -> int:
    """The size of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _shapes(config: Mapping[str, Any]) -> list[Expected]:
    heads = config["num_attention_heads"]
    kept = config.get("num_key_value_heads") or heads
    default_head = config["hidden_size"] // heads
    expected: list[Expected] = [
        ("block_count", config["num_hidden_layers"], None),
        ("embedding_length", config["hidden_size"], None),
        ("attention.head_count", heads, None),
        ("attention.head_count_kv", kept, heads),
        ("attention.key_length", head_dim(config), default_head),
        ("attention.value_length", head_dim(config), default_head),
        ("context_length", config.get("max_position_embeddings"), None),
    ]
    if not config.get("num_experts"):
        expected.append(("feed_forward_length", config["intermediate_size"], None))
    for field in ("num_local_experts", "num_experts"):
        if config.get(field):
            expected.append(("expert_count", config[field], 0))
            expected.append(("expert_used_count", config["num_experts_per_tok"], 0))
    return [one for one in expected if one[1] is not None]


def _attention(config: Mapping[str, Any], family: Family) -> list[Expected]:
    expected: list[Expected] = [("attention.layer_norm_rms_epsilon", config.get("rms_norm_eps", 1e-6), None)]
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if family.gguf in ("phi3", "gemma2", "gemma3"):
        expected.append(("attention.sliding_window", window or 0, 0))
    if family.gguf == "gemma2":
        expected += [(key, config.get(field), None) for field, key in _GEMMA_CAPS.items()]
    if family.gguf == "granite":
        expected += [(key, config[field], None) for field, key in _GRANITE.items() if config.get(field) is not None]
    return expected


def _rope(config: Mapping[str, Any]) -> list[Expected]:
    rope = rope_of(config)
    kind = {"linear": "linear", "yarn": "yarn", "longrope": "longrope", "su": "longrope"}.get(rope["rope_type"])
    share = float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)
    dims = int(head_dim(config) * share)
    expected: list[Expected] = [
        ("rope.freq_base", rope["rope_theta"], _ROPE_BASE),
        ("rope.dimension_count", dims, head_dim(config)),
        # The factors of longrope are tensors; the converter does not name it, and llama.cpp does not ask.
        ("rope.scaling.type", kind or "none", "longrope" if kind == "longrope" else "none"),
    ]
    if kind in ("linear", "yarn"):
        expected.append(("rope.scaling.factor", rope.get("factor", 1.0), 1.0))
    else:
        expected.append(("rope.scaling.factor", 0.0, 0.0))
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    if kind == "longrope" and original:
        expected.append(("rope.scaling.attn_factor", longrope_attention(rope, config, float(original)), 1.0))
    if kind in ("yarn", "longrope"):
        expected.append(("rope.scaling.original_context_length", original, config.get("max_position_embeddings")))
    return expected


def longrope_attention(rope: Mapping[str, Any], config: Mapping[str, Any], original: float) -> float:
    """What cosines and sines are multiplied by with longrope.

    Source: ``_compute_longrope_parameters`` of transformers' ``modeling_rope_utils``.
    """
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    longer = float(config.get("max_position_embeddings") or original) / original
    return 1.0 if longer <= 1 else math.sqrt(1 + math.log(longer) / math.log(original))


def _no_rope(config: Mapping[str, Any], family: Family) -> list[Finding]:
    """Layers without positions: llama.cpp knows every fourth, and a file has no place for others."""
    layers = config.get("no_rope_layers")
    if family.gguf != "smollm3" or not layers:
        return []
    known = [int((layer + 1) % 4 != 0) for layer in range(len(layers))]
    return [] if layers == known else [_differs("no_rope_layers", layers, known)]


def _factors(file: GgufFile, config: Mapping[str, Any]) -> list[Finding]:
    """The tensors that are computed from the configuration: divisors of the rotary frequencies."""
    rope = rope_of(config)
    wanted: dict[str, Float64] = {}
    if rope["rope_type"] == "llama3":
        wanted["rope_freqs.weight"] = llama3_factors(rope, head_dim(config))
    if rope["rope_type"] in ("longrope", "su", "yarn") and rope.get("long_factor"):
        wanted["rope_factors_long.weight"] = np.asarray(rope["long_factor"], dtype=np.float64)
        wanted["rope_factors_short.weight"] = np.asarray(rope["short_factor"], dtype=np.float64)
    findings = []
    for name in sorted({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}):
        if name not in wanted and name not in file.tensors:
            continue
        if name not in wanted or name not in file.tensors:
            findings.append(_differs(name, name in wanted, name in file.tensors))
            continue
        found = file.values(name, file.raw(name, None, 0, 1)).reshape(-1)
        if found.shape != wanted[name].shape or not np.allclose(found, wanted[name], rtol=1e-5, atol=0):
            findings.append(_differs(name, _short(wanted[name]), _short(found)))
    return findings


def llama3_factors(rope: Mapping[str, Any], dims: int) -> Float64:
    """What every rotary frequency is divided by in Llama 3.1 and later.

    Source: ``_compute_llama3_parameters`` of transformers' ``modeling_rope_utils``.
    """
    frequency = float(rope["rope_theta"]) ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(rope["original_max_position_embeddings"])
    length = 2 * math.pi / frequency
    smooth = (original / length - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(length < original / high, 1.0, np.where(length > original / low, factor, between))


def _same(found: object, wanted: object) -> bool:
    if isinstance(found, list):  # one number a layer
        return all(_same(each, wanted) for each in found)
    if isinstance(found, int | float) and isinstance(wanted, int | float):
        return math.isclose(found, wanted, rel_tol=_RELATIVE)
    return found == wanted


def _differs(key: str, wanted: object, found: object) -> Finding:
    show: Callable[[object], str] = lambda value: "–" if value is None else str(value)  # noqa: E731
    return Finding(
        code="gguf_setting_differs",
        severity="error",
        params={"setting": key, "expected": show(wanted), "found": show(found)},
    )


def _short(values: Float64) -> str:
    return ", ".join(f"{value:g}" for value in values[:4]) + (", …" if values.size > 4 else "")
