"""Which adapters a server would serve as they were tuned, and why it would not the others.

vLLM: as its ``lora/peft_helper.py`` and ``lora/lora_model.py`` of 0.32 refuse, and what these read without a word.
SGLang: as ``srt/lora/lora_manager.py`` refuses, and what ``srt/lora/lora.py`` reads without a word: it scales every
module by lora_alpha / r.  llama.cpp: as ``tunesmith gguf --adapter-only`` refuses.  What a server ignores in silence is
refused here: it would answer as another model than the one that was tuned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from tunesmith.adapter import Adapter
from tunesmith.export.serving.records import ServingEngine
from tunesmith.record import Finding, Value

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for ``--max-lora-rank``."""

_SKIPPED_BY_VLLM = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
_SHOWN = 3

Limit = Callable[[Adapter], dict[str, Value] | None]


def refusals(adapter: Adapter, variant: str, engine: ServingEngine) -> list[Finding]:
    """Why a server cannot serve an adapter as it was tuned; empty where it can.

    Args:
        adapter: the adapter.
        variant: what it is called.
        engine: the server's program.
    """
    return [
        Finding(code=code, severity="warning", params={"variant": variant, "engine": engine, **params})
        for code, params in _refused(adapter, engine)
    ]


def mergeable(adapter: Adapter) -> bool:
    """Whether merging is a way around."""
    return not adapter.refusals and adapter.residual is None


def highest_rank(adapter: Adapter) -> int:
    """The largest rank of its modules, as configured."""
    return max([one.r for one in adapter.adapted], default=1)


def warnings(adapter: Adapter, variant: str, engine: ServingEngine) -> list[Finding]:
    """What is to be known of an adapter that is served."""
    params: dict[str, Value] = {"variant": variant, "engine": engine}
    findings: list[Finding] = []
    if engine == "vllm" and (adapter.config.get("rank_pattern") or adapter.config.get("alpha_pattern")):
        findings.append(Finding(code="serve_patterns", severity="warning", params=params))
    if engine == "vllm" and any(one.module.rpartition(".")[2] == "lm_head" for one in adapter.adapted):
        findings.append(Finding(code="serve_head_scores", severity="warning", params=params))
    if engine in ("vllm", "sglang") and _experts(adapter) is not None:
        findings.append(Finding(code="serve_experts", severity="warning", params=params))
    return findings


def _refused(adapter: Adapter, engine: ServingEngine) -> Iterator[tuple[str, dict[str, Value]]]:
    if adapter.refusals:  # then nothing more can be relied on
        yield "serve_cannot_method", {"why": "; ".join(adapter.refusals[:_SHOWN])}
        return
    for code, limit, engines in _LIMITS:
        found = limit(adapter) if engine in engines else None
        if found is not None:
            yield code, found


def _residual(adapter: Adapter) -> dict[str, Value] | None:
    return {"init": adapter.residual} if adapter.residual else None


def _dora(adapter: Adapter) -> dict[str, Value] | None:
    return {} if any(one.magnitude for one in adapter.adapted) else None


def _whole(adapter: Adapter) -> dict[str, Value] | None:
    names = [key.tensor for key in adapter.whole if key.leaf != "bias" and not key.tensor.endswith(_SKIPPED_BY_VLLM)]
    more = f", … ({len(names)})" if len(names) > _SHOWN else ""
    return {"tensors": ", ".join(names[:_SHOWN]) + more} if names else None


def _bias(adapter: Adapter) -> dict[str, Value] | None:
    trained = adapter.config.get("bias") not in (None, "none") or any(one.bias for one in adapter.adapted)
    return {} if trained or any(key.leaf == "bias" for key in adapter.whole) else None


def _rank(adapter: Adapter) -> dict[str, Value] | None:
    rank = highest_rank(adapter)
    return {"rank": rank, "most": VLLM_RANKS[-1]} if rank > VLLM_RANKS[-1] else None


def _scales(adapter: Adapter) -> dict[str, Value] | None:
    plain = float(adapter.config["lora_alpha"]) / int(adapter.config["r"])
    rank = int(adapter.config["r"])
    others = [one for one in adapter.adapted if one.r != rank or not math.isclose(one.scaling, plain, rel_tol=1e-9)]
    return {"modules": len(others), "scale": f"{plain:g}"} if others else None


def _experts(adapter: Adapter) -> dict[str, Value] | None:
    found = any(one.stacked > 1 or one.parameter is not None for one in adapter.adapted)
    return {} if found else None


def _layers(adapter: Adapter) -> dict[str, Value] | None:
    return {} if adapter.config.get("layer_replication") else None


def _no_pair(adapter: Adapter) -> dict[str, Value] | None:
    """What a GGUF adapter has no place for, among factors."""
    odd = [one.module for one in adapter.adapted if one.embedding or one.parameter is not None or one.stacked > 1]
    if adapter.config.get("fan_in_fan_out"):
        odd = [one.module for one in adapter.adapted]
    return {"modules": len(odd), "first": odd[0]} if odd else None


_LIMITS: tuple[tuple[str, Limit, tuple[ServingEngine, ...]], ...] = (
    ("serve_cannot_residual", _residual, ("vllm", "sglang", "llama.cpp", "ollama")),
    ("serve_cannot_dora", _dora, ("vllm", "sglang", "llama.cpp")),
    ("serve_cannot_whole", _whole, ("vllm", "sglang", "llama.cpp")),
    ("serve_cannot_bias", _bias, ("vllm", "sglang", "llama.cpp")),
    ("serve_cannot_layers", _layers, ("vllm", "sglang", "llama.cpp")),
    ("serve_cannot_rank", _rank, ("vllm",)),
    ("serve_cannot_scales", _scales, ("sglang",)),
    ("serve_cannot_pairs", _no_pair, ("llama.cpp",)),
)
