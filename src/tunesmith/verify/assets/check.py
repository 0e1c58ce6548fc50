"""Level 2: all that is not weights (configuration, tokenizer, chat template), by content and by behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.checkpoint import CONFIG_FILE, read_json_object
from tunesmith.errors import CheckpointError
from tunesmith.record import Finding, Severity
from tunesmith.verify.assets.configuration import check_config, shown
from tunesmith.verify.assets.template import check_template
from tunesmith.verify.assets.tokenizer import check_tokenizer, special_token_ids

_GENERATION = "generation_config.json"
_EOS = "eos_token_id"

# What a loader takes where nothing is said, so that it may be written out or left out.
_DEFAULTS: Mapping[str, object] = {
    "do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "typical_p": 1.0,
    "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "max_length": 20, "use_cache": True,
    "output_attentions": False, "output_hidden_states": False, "return_dict_in_generate": False,
}  # fmt: skip
# Written by whoever saved the file, or of padding, which is masked.
_NO_SETTING = {"transformers_version", "_from_model_config", "pad_token_id", "use_cache", "_commit_hash"}


def check_assets(
    merged_dir: Path,
    base_dir: Path,
    tokenizer_from: Path | None,
    *,
    generation_from: Path | None = None,
    head_written_out: bool = False,
    config_changes: Mapping[str, object] | None = None,
) -> list[Finding]:
    """Hold everything but the weights against where it should have come from.

    Args:
        merged_dir: the merged model.
        base_dir: the base model, for configuration.
        tokenizer_from: the directory whose tokenizer belongs to the adapter; None where there is none.
        generation_from: the adapter's directory, whose ``generation_config.json`` goes before the base's.
        head_written_out: a tied head is there as a copy, so that it does not matter whether it is declared tied.
        config_changes: what the adapters change in ``config.json``, by dotted key; this, and nothing else, must differ
            from the base's.

    Returns:
        What was looked at and seen.
    """
    token_ids = special_token_ids(tokenizer_from) if tokenizer_from is not None else {}
    findings = check_config(
        merged_dir, base_dir, dict(config_changes or {}), head_written_out=head_written_out, token_ids=token_ids
    )
    if tokenizer_from is not None:
        findings += check_tokenizer(merged_dir, tokenizer_from)
        findings += check_template(merged_dir, tokenizer_from)
    own = generation_from is not None and (generation_from / _GENERATION).is_file()
    source = generation_from if own and generation_from else base_dir
    return findings + _check_generation(merged_dir, source, own_eos=token_ids.get(_EOS))


def _check_generation(merged_dir: Path, source: Path, *, own_eos: int | None) -> list[Finding]:
    """Hold the default decoding settings against the run's or the base's.

    Where answers end is part of the model; how tokens are drawn is a default that every caller may replace.
    """
    if not (source / _GENERATION).is_file():
        return []
    try:
        theirs = read_json_object(source / _GENERATION)
        if not (merged_dir / _GENERATION).is_file():
            return [_missing(theirs, read_json_object(merged_dir / CONFIG_FILE))]
        ours = read_json_object(merged_dir / _GENERATION)
    except CheckpointError:
        return [_unlike([_GENERATION], severity="warning")]
    keys = sorted((ours.keys() | theirs.keys()) - _NO_SETTING)
    changed = [key for key in keys if _meaning(key, ours) != _meaning(key, theirs)]
    if not changed:
        return [Finding(code="generation_config_same", severity="ok")]
    # A trainer adds the tokenizer's own end to those of the base.
    extended = _ids(ours.get(_EOS)) == _ids(theirs.get(_EOS)) | {own_eos}
    return [_unlike(changed, severity="error" if _EOS in changed and not extended else "warning")]


def _unlike(fields: list[str], *, severity: Severity) -> Finding:
    return Finding(code="generation_config_differs", severity=severity, params={"fields": ", ".join(fields)})


def _missing(theirs: Mapping[str, Any], config: Mapping[str, Any]) -> Finding:
    """What a loader does without the file: it decodes greedily, and ends where ``config.json`` says."""
    wanted, taken = _ids(theirs.get(_EOS)), _ids(config.get(_EOS))
    lost = [key for key in sorted(theirs.keys() - _NO_SETTING - {_EOS}) if _meaning(key, theirs) != _meaning(key, {})]
    return Finding(
        code="generation_config_missing",
        # An answer that cannot end is wrong; one that can end in fewer ways is another default.
        severity="error" if wanted and not wanted & taken else "warning",
        params={
            "expected_eos": shown(sorted(wanted)),
            "eos": shown(sorted(taken)),
            "fields": ", ".join(lost) or "–",
        },
    )


def _meaning(key: str, settings: Mapping[str, Any]) -> object:
    value = settings.get(key, _DEFAULTS.get(key))
    return _ids(value) if key.endswith("_token_id") else value


def _ids(value: object) -> set[Any]:
    """Token ids, stated as one or as several, in whatever order."""
    listed = value if isinstance(value, list) else [value]
    return {item for item in listed if isinstance(item, int)}
