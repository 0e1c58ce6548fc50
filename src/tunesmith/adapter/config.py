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
    "peft_type", "task_type", "base_model_name_or_path", "revision", "peft_version", "r", "lora_alpha", "use_rslora",
    "rank_pattern", "alpha_pattern", "init_lora_weights", "bias", "use_dora", "lora_bias", "modules_to_save",
    "trainable_token_indices", "target_parameters", "ensure_weight_tying", "layer_replication", "fan_in_fan_out",
    "corda_config", "lora_ga_config", "loftq_config",
}  # fmt: skip

# The tensors are the truth about what was tuned; the rest acts in training only.  VeLoRA compresses what the backward
# pass keeps; what the forward pass computes, and so the update, is LoRA's.
HARMLESS = {
    "auto_mapping", "inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "lora_dropout", "eva_config", "megatron_core", "runtime_config", "qalora_group_size", "velora_config",
}  # fmt: skip

REFUSED = {
    "use_qalora": "QALoRA: A acts on inputs that are pooled in groups, for a GPTQ base, which holds no plain weights",
    "use_bdlora": "BD-LoRA: block-diagonal factors, whose blocks the file does not tell apart",
    "alora_invocation_tokens": "aLoRA: it acts only after its invocation tokens, so no merged model can equal it",
    "arrow_config": "Arrow: it routes between adapters for every token, so no merged model can equal it",
    "megatron_config": "Megatron's fused, sharded layers; convert the adapter to the names of transformers first",
    "kasa_config": "KaSA: it changes the base's weights when training begins, and puts a diagonal between A and B",
    "monteclora_config": "MonteCLoRA: its update is sampled, not B·A",
}

# Initialisations that leave the base as it is.  The others subtract the adapter's start from the base's weights.
PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")

_RESIDUAL_CONFIGS = ("corda_config", "lora_ga_config", "loftq_config")

# What else PEFT trains, and what would merge it, where anything can.
_OTHER_METHODS = {
    "ADALORA": "PEFT's merge_and_unload merges it",
    "BOFT": "PEFT's merge_and_unload merges it",
    "HRA": "PEFT's merge_and_unload merges it",
    "IA3": "PEFT's merge_and_unload merges it",
    "LN_TUNING": "PEFT's merge_and_unload merges it",
    "LOHA": "PEFT's merge_and_unload merges it",
    "LOKR": "PEFT's merge_and_unload merges it",
    "OFT": "PEFT's merge_and_unload merges it",
    "VERA": "PEFT's merge_and_unload merges it",
    "TRAINABLE_TOKENS": "PEFT's merge_and_unload merges it",
    "PROMPT_TUNING": "it prepends trained tokens to the input, which no weights can hold; serve it with PEFT",
    "PREFIX_TUNING": "it prepends trained keys and values, which no weights can hold; serve it with PEFT",
    "P_TUNING": "it prepends trained tokens to the input, which no weights can hold; serve it with PEFT",
    "MULTITASK_PROMPT_TUNING": "it prepends trained tokens to the input, which no weights can hold; serve it with PEFT",
    "ADAPTION_PROMPT": "it adds a gated attention of its own, which no weights can hold; serve it with PEFT",
    "CPT": "it prepends trained tokens to the input, which no weights can hold; serve it with PEFT",
}


_LARGEST_NUMBER = 1e9
_ENDLESS = re.compile(r"[*+}]\)+[*+{]")


def refusals(config: Mapping[str, Any]) -> list[str]:
    """Why an adapter of this configuration cannot be merged truly by this version; empty where it can.

    Args:
        config: the parsed ``adapter_config.json``.

    Returns:
        One line a reason, each naming its field.
    """
    method = config.get("peft_type")
    if method != "LORA":
        way = _OTHER_METHODS.get(str(method), "see whether PEFT's merge_and_unload does")
        return [f"peft_type = {_short(method)}: only LORA adapters can be merged here; {way}"]
    reasons = [
        f"{field} = {_short(config[field])}: {meaning}" for field, meaning in REFUSED.items() if config.get(field)
    ]
    if config.get("bias") not in (None, "none", "all", "lora_only"):
        reasons.append(f"bias = {_short(config['bias'])}: not none, all or lora_only")
    known = USED | HARMLESS | REFUSED.keys()
    reasons += [
        f"{field} = {_short(value)}: a field that this version does not know; a newer one may"
        for field, value in config.items()
        if field not in known and value
    ]
    return reasons


def residual_init(config: Mapping[str, Any]) -> str | None:
    """The initialisation that changed the base when training began, as ``field = value``; None where none did.

    PiSSA (arXiv:2404.02948), OLoRA (arXiv:2406.01775), CorDA (arXiv:2406.05223), LoftQ (arXiv:2310.08659) and LoRA-GA
    (arXiv:2407.05000) subtract the adapter's start from the base, so that both together begin as the base did.
    """
    init = config.get("init_lora_weights", True)
    if init not in PLAIN_INITS:
        return f"init_lora_weights = {_short(init)}"
    # The settings of a method that was not chosen say nothing, except where a tool left the choice out.
    if "init_lora_weights" not in config:
        return next((f"{field} = {_short(config[field])}" for field in _RESIDUAL_CONFIGS if config.get(field)), None)
    return None


def listed(config: Mapping[str, Any], field: str) -> list[str]:
    """A field that lists names; PEFT takes a single name as well.

    Raises:
        AdapterError: it is neither.
    """
    value = config.get(field) or []
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise AdapterError(
            "A list of names is not one.",
            where=f"adapter_config.json: {field}",
            expected="names of modules or parameters",
            found=_short(value),
        )
    return names


class Scaling:
    """Rank and scaling of every module, as the configuration says.

    Args:
        config: the parsed ``adapter_config.json``.

    Raises:
        AdapterError: r, lora_alpha or a pattern is not what PEFT writes.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._r = positive(config, "r")
        self._alpha = positive(config, "lora_alpha")
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
    endless = [key for key in table if _ENDLESS.search(key)]
    if endless:
        raise AdapterError(
            "A pattern repeats a repetition, which can take for ever to match.", where=field, found=_short(endless[0])
        )
    try:
        # PEFT's own matching: the pattern is the module's name or its end.
        patterns = [(re.compile(rf"(.*\.)?({key})$"), float(value)) for key, value in table.items()]
    except (re.error, TypeError, ValueError, OverflowError) as error:
        raise AdapterError("A pattern cannot be read.", where=field, found=error) from error
    if not all(math.isfinite(value) for _, value in patterns):
        raise AdapterError("A pattern's value is not a finite number.", where=field, found=_short(table))
    return patterns


def positive(config: Mapping[str, Any], field: str, *, of: str = "") -> float:
    """A configured number that must be positive.

    Args:
        config: the object that holds it.
        field: its name.
        of: what leads to that object, such as ``lora_parameters.``.

    Raises:
        AdapterError: it is not there, no number, or not between zero and a thousand million.
    """
    value = config.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _LARGEST_NUMBER:
        raise AdapterError(
            "The adapter's configuration lacks a usable number.",
            where=f"adapter_config.json: {of}{field}",
            expected="a positive number",
            found=_short(value),
        )
    return float(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
