"""``config.json`` against the base's, field by field: what must differ, what must not, and what may, and why."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tunesmith.checkpoint import CONFIG_FILE, Checkpoint, read_json_object
from tunesmith.errors import CheckpointError
from tunesmith.record import Finding
from tunesmith.verify.structure import quantized_as

# Fields that a writer or a loader puts in of itself, and that do not change what the model computes, by the reason; the
# finding ``config_noise_<reason>`` tells it.  Written by Transformers 4 and 5 where no other is named.
NOISE: Mapping[str, tuple[str, ...]] = {
    "writer": (
        "transformers_version",
        "_name_or_path",
        "_model_name_or_path",
        "_commit_hash",
        "_from_model_config",
        "model_name",
        "unsloth_*",
        "peft_version",
        "mlx_version",
    ),
    "dtype": ("torch_dtype", "dtype"),  # the structure level reads it from the tensors
    "speed": (
        "use_cache",  # training with gradient checkpointing switches it off; axolotl and LLaMA-Factory leave it so
        "attn_implementation",
        "_attn_implementation*",
        "experts_implementation",
        "_experts_implementation*",
        "_flash_attn_2_enabled",
    ),
    "outputs": ("return_dict", "output_attentions", "output_hidden_states", "torchscript", "keys_to_ignore_*"),
    "training": (
        "initializer_range",
        "initializer_factor",
        "attention_dropout",
        "hidden_dropout*",
        "attention_probs_dropout*",
        "*_pdrop",
        "gradient_checkpointing",
        "router_aux_loss_coef",
        "output_router_logits",
        "router_jitter_noise",
    ),
    "padding": ("pad_token_id",),  # Unsloth, ms-swift and every trainer set one where the base has none
}

_QUANTIZED = ("quantization_config", "quantization", "compression_config")  # mlx-lm writes the first two
_NO_ANSWER = {"architectures", *_QUANTIZED}  # looked at on their own
_LABELS = ("id2label", "label2id", "num_labels")
_TIED = "tie_word_embeddings"


def check_config(
    merged_dir: Path,
    base_dir: Path,
    changes: Mapping[str, object],
    *,
    head_written_out: bool = False,
    token_ids: Mapping[str, int] | None = None,
) -> list[Finding]:
    """Hold a configuration against the base's, with what the adapters change in it.

    Args:
        merged_dir: the merged model.
        base_dir: the base model.
        changes: what the adapters change, by dotted key; this, and nothing else, must differ.
        head_written_out: a tied head is there as a copy, so that it does not matter whether it is declared tied.
        token_ids: the run's own tokens (``eos_token_id`` and its like), which a trainer writes over the base's.

    Returns:
        Every field that differs and should not; else what is the same, what was adapted, and what was passed over.
    """
    try:
        ours, base = (read_json_object(folder / CONFIG_FILE) for folder in (merged_dir, base_dir))
    except CheckpointError as error:
        return [Finding(code="config_unreadable", severity="error", params={"what": error.what})]
    wanted = _changed(base, changes)
    passed = _noise(ours, wanted)
    twice = _said_twice(ours, wanted)
    differing = [key for key in _differing(*(_flat(_meaning(config)) for config in (ours, wanted))) if key not in twice]
    passed["defaults"] = _defaults(
        differing, ours, wanted, lambda: (_loaded_config(merged_dir), _loaded_config(base_dir, wanted))
    )
    differing = [key for key in differing if key not in passed["defaults"]]
    if ours.get("architectures") != wanted.get("architectures"):
        differing = ["architectures", *differing]
    passed["spelling"] = _respelled(ours, wanted, differing) + twice
    if head_written_out and _TIED not in changes:
        differing = [key for key in differing if key != _TIED]
    aligned = [key for key in differing if key in (token_ids or {}) and _at(ours, key) == (token_ids or {})[key]]
    passed["tokenizer"] = aligned
    differing = [key for key in differing if key not in aligned]
    errors = _quantization(ours, wanted, merged_dir) + [
        _differs(key, ours, wanted, declared_tied=key.endswith(_TIED) and key in changes) for key in differing
    ]
    return errors or _same(wanted, changes, passed)


def _same(wanted: Mapping[str, Any], changes: Mapping[str, object], passed: Mapping[str, list[str]]) -> list[Finding]:
    """That nothing is wrong, and what was passed over for which reason."""
    findings = [Finding(code="config_same", severity="ok", params={"fields": len(_flat(_meaning(wanted)))})]
    if changes:
        fields = ", ".join(sorted(changes))
        findings.append(Finding(code="config_adapted", severity="info", params={"fields": fields}))
    for reason, keys in passed.items():
        if keys:
            fields = ", ".join(sorted(set(keys)))
            findings.append(Finding(code=f"config_noise_{reason}", severity="info", params={"fields": fields}))
    return findings


def _differs(key: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], *, declared_tied: bool) -> Finding:
    pair = [_flat(_meaning(config)).get(key, _at(config, key)) for config in (theirs, ours)]
    return Finding(
        code="head_declared_tied" if declared_tied else "config_differs",
        severity="error",
        params={"field": key, "expected": shown(pair[0]), "found": shown(pair[1])},
    )


def _defaults(
    differing: list[str],
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    load: Callable[[], tuple[dict[str, Any], dict[str, Any]]],
) -> list[str]:
    """The fields that one side leaves to the loader, which makes the same of them as the other side says.

    A later version writes out what an earlier one left to its defaults, such as ``layer_types``.
    """
    first, second = _flat(_meaning(ours)), _flat(_meaning(theirs))
    absent = [key for key in differing if key not in first or key not in second]
    pair = load() if absent else ({}, {})
    if not all(pair):
        return []
    still = {*_differing(*pair), "rope_parameters"}  # left over only where the two spellings disagree
    return [key for key in absent if key not in still]


def _quantization(ours: Mapping[str, Any], theirs: Mapping[str, Any], merged_dir: Path) -> list[Finding]:
    """A quantization that is declared, where the tensors are stored in full."""
    declared = [key for key in _QUANTIZED if ours.get(key) and ours[key] != theirs.get(key)]
    if not declared or _is_quantized(merged_dir):
        return []
    section = ours[declared[0]]
    method = section.get("quant_method") or section.get("mode") if isinstance(section, dict) else section
    params = {"field": declared[0], "method": shown(method)}
    return [Finding(code="quantization_declared", severity="error", params=params)]


def _is_quantized(folder: Path) -> bool:
    """Whether the tensors are as they are declared, which is then the structure level's affair."""
    try:
        return quantized_as(Checkpoint(folder)) is not None
    except CheckpointError:
        return True  # nothing to contradict it


def _noise(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, list[str]]:
    """The fields that differ and change nothing, by reason."""
    found: dict[str, list[str]] = {reason: [] for reason in NOISE}
    pair = [dict(_leaves(config)) for config in (ours, theirs)]
    for key in _differing(*pair):
        reason = _reason(key.rpartition(".")[2])
        if reason is not None:
            found[reason].append(key)
    return found


def _reason(key: str) -> str | None:
    """Why a field changes nothing; None where it may."""
    return next((reason for reason, names in NOISE.items() if any(fnmatchcase(key, name) for name in names)), None)


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field as it is written, by dotted key."""
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config") and key not in _QUANTIZED:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _respelled(ours: Mapping[str, Any], theirs: Mapping[str, Any], wrong: list[str]) -> list[str]:
    """The fields that say the same in another way: RoPE and labels have two."""
    if any("rope" in key or key.endswith(_LABELS) for key in wrong):
        return []
    changed = _differing(*(dict(_leaves(config)) for config in (ours, theirs)))
    return [key for key in changed if key.rpartition(".")[2].startswith("rope_") or key.endswith(_LABELS)]


def _said_twice(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What one side alone states at the top, repeating the language model's section (ms-swift does, for DeepSpeed)."""
    found = []
    for one, other in ((ours, theirs), (theirs, ours)):
        section = one.get("text_config")
        if isinstance(section, dict):
            found += [key for key in one if key in section and section[key] == one[key] and key not in other]
    return found


def _at(config: Mapping[str, Any], dotted: str) -> Any:
    """A field by dotted key; None where it is not there."""
    value: Any = config
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _changed(config: Mapping[str, Any], changes: Mapping[str, object]) -> dict[str, Any]:
    """A configuration with what the adapters change in it, by dotted key."""
    result: dict[str, Any] = copy.deepcopy(dict(config))
    for dotted, value in changes.items():
        section, (*path, key) = result, dotted.split(".")
        for part in path:
            if not isinstance(section.get(part), dict):
                section[part] = {}
            section = section[part]
        section[key] = json.loads(json.dumps(value))  # as a file would hold it: tuples are lists, keys are texts
    return result


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    return [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]


def _loaded_config(folder: Path, document: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What Transformers makes of a configuration, its defaults filled in; empty where it knows no such model.

    Args:
        folder: the directory that holds it.
        document: another configuration in its place.
    """
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as place:
        try:
            (Path(place) / CONFIG_FILE).write_bytes((folder / CONFIG_FILE).read_bytes())
            if document is not None:
                (Path(place) / CONFIG_FILE).write_text(json.dumps(document), encoding="utf-8")
            loaded = AutoConfig.from_pretrained(place, trust_remote_code=False, local_files_only=True)
        except Exception:  # noqa: BLE001 - whatever it is, a loader has nothing to say
            return {}
    return _flat(_meaning(json.loads(json.dumps(loaded.to_dict(), default=str))))


def _meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration, at every depth, without what changes nothing and with one spelling for RoPE and labels."""
    # It reads the answer at the last token that is no padding.
    classifier = "ForSequenceClassification" in str(config.get("architectures"))
    plain = {
        key: _meaning(value) if isinstance(value, dict) and not key.startswith("rope_") else value
        for key, value in config.items()
        if key not in _NO_ANSWER
        if _reason(key) is None or (classifier and key == "pad_token_id")
    }
    return _plain_labels(_plain_rope(plain))


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Sections of a configuration by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        section = isinstance(value, dict) and key.endswith("_config")
        flat |= _flat(value, f"{prefix}{key}.") if section else {f"{prefix}{key}": value}
    return flat


def _plain_labels(config: dict[str, Any]) -> dict[str, Any]:
    """One spelling for labels: their number, or the names both ways, of which some files hold one and some the other.

    Two labels without names are every model's default.
    """
    plain = dict(config)
    names, back, count = plain.pop("id2label", None), plain.pop("label2id", None), plain.pop("num_labels", None)
    if isinstance(names, dict):
        given = {str(label): str(name) for label, name in names.items()}
    elif isinstance(back, dict):
        given = {str(label): str(name) for name, label in back.items()}
    else:
        given = {str(label): f"LABEL_{label}" for label in range(count if isinstance(count, int) else 2)}
    if given != {"0": "LABEL_0", "1": "LABEL_1"}:
        plain["id2label"] = given
    if isinstance(back, dict) and {str(label): str(name) for name, label in back.items()} != given:
        plain["label2id"] = back
    return plain


def _plain_rope(config: dict[str, Any]) -> dict[str, Any]:
    """One spelling for RoPE: transformers 5 nests what transformers 4 writes flat, and some files hold both."""
    plain = dict(config)
    rope = plain.pop("rope_parameters", None)
    if isinstance(rope, dict):
        for key, value in rope.items():
            # Where both spellings are there and disagree, different loaders load different models.
            if key == "rope_theta" and plain.get("rope_theta", value) != value:
                plain["rope_parameters"] = rope
            plain.setdefault(f"rope_{key}" if not key.startswith("rope") else key, value)
    scaling = plain.pop("rope_scaling", None)
    if isinstance(scaling, dict):
        for key, value in scaling.items():
            name = "rope_type" if key == "type" else key
            plain.setdefault(name if name.startswith("rope") else f"rope_{name}", value)
    if plain.get("rope_type") == "default":  # the same as none
        del plain["rope_type"]
    return plain


def shown(value: object) -> str:
    """A value as a report shows it: as JSON, on one line, not without end."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
