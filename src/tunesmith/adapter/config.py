"""``adapter_config.json``: every field of PEFT's ``LoraConfig`` is used, harmless, or refused with its reason.

Source: ``peft.LoraConfig`` of PEFT 0.18 to 0.21.  Nothing is skipped in silence: a field that is in none of the three
tables and says anything is refused, because a newer PEFT may mean by it what changes the merge.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from tunesmith.errors import AdapterError
from tunesmith.record import Finding

USED = {
    "peft_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "use_rslora", "rank_pattern",
    "alpha_pattern", "init_lora_weights",
}  # fmt: skip

# The tensors are the truth about what was tuned; the rest acts in training only.
HARMLESS = {
    "task_type", "auto_mapping", "peft_version", "inference_mode", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "lora_dropout", "eva_config", "megatron_core", "runtime_config",
    "qalora_group_size", "fan_in_fan_out",
}  # fmt: skip

REFUSED = {
    "bias": "trained biases",
    "modules_to_save": "whole modules that were trained beside the adapter",
    "trainable_token_indices": "trained token rows",
    "target_parameters": "adapters on fused expert parameters",
    "ensure_weight_tying": "an adapter on tied embeddings",
    "use_dora": "DoRA (a trained magnitude)",
    "lora_bias": "a bias on lora_B",
    "use_qalora": "QALoRA (adapters on pooled inputs)",
    "use_bdlora": "BD-LoRA (block-diagonal factors)",
    "alora_invocation_tokens": "aLoRA: it acts only after its invocation tokens, so no merged model can equal it",
    "arrow_config": "Arrow: it routes between adapters for every token, so no merged model can equal it",
    "layer_replication": "replicated layers",
    "megatron_config": "Megatron's fused, sharded layers",
    "corda_config": "CorDA: the update is relative to a changed base",
    "lora_ga_config": "LoRA-GA: the update is relative to a changed base",
    "loftq_config": "LoftQ: the update is relative to a changed base",
    "kasa_config": "KaSA: the update is relative to a changed base",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}

# The other initialisations subtract the adapter's start from the base's weights.
PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


def refusals(config: Mapping[str, Any]) -> list[str]:
    """Why an adapter of this configuration cannot be merged truly by this version; empty where it can.

    Args:
        config: the parsed ``adapter_config.json``.

    Returns:
        One line a reason, each naming its field.
    """
    method = config.get("peft_type")
    if method != "LORA":
        return [
            f"peft_type is {method!r}: only LORA adapters can be merged here (PEFT's merge_and_unload knows others)"
        ]
    reasons = [
        f"{field} = {_short(config[field])}: {meaning}"
        for field, meaning in REFUSED.items()
        if config.get(field) and config[field] != "none"
    ]
    init = config.get("init_lora_weights", True)
    if init not in PLAIN_INITS:
        reasons.append(
            f"init_lora_weights = {_short(init)}: the update is relative to a changed base, not to the one named"
        )
    known = USED | HARMLESS | REFUSED.keys()
    reasons += [
        f"{field} = {_short(value)}: a field that this version does not know"
        for field, value in config.items()
        if field not in known and value
    ]
    return reasons


class Scaling:
    """Rank and scaling of every module, as the configuration says.

    Args:
        config: the parsed ``adapter_config.json``.

    Raises:
        AdapterError: r, lora_alpha or a pattern is not what PEFT writes.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._r = _number(config, "r")
        self._alpha = _number(config, "lora_alpha")
        self._rslora = bool(config.get("use_rslora"))
        self._ranks = _patterns(config, "rank_pattern")
        self._alphas = _patterns(config, "alpha_pattern")
        self.overlapping: list[Finding] = []

    def rank(self, module: str) -> int:
        """The rank that the configuration gives a module."""
        return int(self._first(self._ranks, module, self._r))

    def scaling(self, module: str, r: int) -> float:
        """What multiplies B·A: alpha / r, or alpha / √r with ``use_rslora`` (rsLoRA, arXiv:2312.03732)."""
        alpha = self._first(self._alphas, module, self._alpha)
        return alpha / math.sqrt(r) if self._rslora else alpha / r

    def _first(self, patterns: list[tuple[re.Pattern[str], float]], module: str, default: float) -> float:
        hits = [value for pattern, value in patterns if pattern.match(module)]
        if len(set(hits)) > 1:
            # Saved JSON is sorted by key, so training may have resolved the overlap the other way.
            self.overlapping.append(Finding(code="overlapping_patterns", severity="warning", params={"module": module}))
        return hits[0] if hits else default


def _patterns(config: Mapping[str, Any], field: str) -> list[tuple[re.Pattern[str], float]]:
    table = config.get(field) or {}
    if not isinstance(table, dict):
        raise AdapterError("A pattern table is not one.", where=field, expected="an object", found=_short(table))
    try:
        # PEFT's own matching: the pattern is the module's name or its end.
        patterns = [(re.compile(rf"(.*\.)?({key})$"), float(value)) for key, value in table.items()]
    except (re.error, TypeError, ValueError) as error:
        raise AdapterError("A pattern cannot be read.", where=field, found=error) from error
    if not all(math.isfinite(value) for _, value in patterns):
        raise AdapterError("A pattern's value is not a finite number.", where=field, found=_short(table))
    return patterns


def _number(config: Mapping[str, Any], field: str) -> float:
    value = config.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise AdapterError(
            "The adapter's configuration lacks a usable number.",
            where=f"adapter_config.json: {field}",
            expected="a positive number",
            found=_short(value),
        )
    return float(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
