"""Level 2: all that is not weights (configuration, tokenizer, chat template), by content and by behaviour."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.checkpoint import read_json_object
from tunesmith.errors import CheckpointError
from tunesmith.record import Finding, Severity, Value

# Fields that a loader writes of itself, or spells anew, and that do not change what the model computes.
_NOISE = {
    "transformers_version": "the writer's version",
    "_name_or_path": "where the writer had it from",
    "_model_name_or_path": "where the writer had it from",
    "torch_dtype": "dtype, as transformers 4 spells it",
    "dtype": "the stored dtype, which the structure level reads from the tensors",
    "use_cache": "whether generation keeps its cache",
    "architectures": "checked on its own",
    "_attn_implementation_autoset": "how attention is computed",
    "unsloth_version": "the writer's version",
    "_from_model_config": "how the file came to be",
}

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_SWITCHES = ("add_bos_token", "add_eos_token", "add_prefix_space")
_GENERATION = "generation_config.json"
_TIED = "tie_word_embeddings"

PROBES = (
    "The quick brown fox jumps over the lazy dog, 3.14159 times; isn't it?",
    "微调完成后，请先验证合并后的模型，再发布。１２３ 全角 ",
    "def f(x: int) -> int:\n\treturn x ** 2  # comment\n\n\n",
    "日本語のテキスト、カタカナ、そして漢字。 한국어 문장입니다.",
    "Привет, мир! Γειά σου. مرحبا بالعالم שלום עולם नमस्ते ไทย",
    "  leading, trailing   and\u00a0odd\u2003spaces \r\n tabs\t.",
    "emoji 👩‍🔧🎻🇨🇳 e\u0301 é \u200b zero-width",
    "https://example.org/a?b=c&d=%20 user@example.org $1,234.56 100% <b>html</b>",
)


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
    changes = dict(config_changes or {})
    immaterial = {_TIED} if head_written_out and _TIED not in changes else set()
    findings = _check_config(merged_dir, base_dir, changes, immaterial=immaterial)
    if tokenizer_from is not None:
        findings += _check_tokenizer(merged_dir, tokenizer_from)
        findings += _check_special_tokens(merged_dir, tokenizer_from)
        findings += _check_template(merged_dir, tokenizer_from)
    own = generation_from is not None and (generation_from / _GENERATION).is_file()
    return findings + _check_generation(merged_dir, generation_from if own and generation_from else base_dir)


def _check_config(
    merged_dir: Path, base_dir: Path, changes: Mapping[str, object], *, immaterial: set[str]
) -> list[Finding]:
    try:
        ours, base = read_json_object(merged_dir / "config.json"), read_json_object(base_dir / "config.json")
    except CheckpointError as error:
        return [Finding(code="config_unreadable", severity="error", params={"what": error.what})]
    wanted = _changed(base, changes)
    architectures = ours.get("architectures"), wanted.get("architectures")
    ours, theirs = _flat(_meaning(ours)), _flat(_meaning(wanted))
    differing = [key for key in _differing(ours, theirs) if key not in immaterial]
    # A later version writes out what an earlier one left to its defaults: ask a loader what is absent on one side.
    if any(key not in ours or key not in theirs for key in differing):
        loaded = _loaded_config(merged_dir), _loaded_config(base_dir, wanted if changes else None)
        if loaded[0] and loaded[1]:
            still = {*_differing(*loaded), "rope_parameters"}  # left over only where the two spellings disagree
            differing = [key for key in differing if (key in ours and key in theirs) or key in still]
    if architectures[0] != architectures[1]:
        ours["architectures"], theirs["architectures"] = architectures
        differing = ["architectures", *differing]
    findings = [
        Finding(
            code="head_declared_tied" if key.endswith(_TIED) and key in changes else "config_differs",
            severity="error",
            params={"field": key, "expected": _short(theirs.get(key)), "found": _short(ours.get(key))},
        )
        for key in differing
    ]
    if not findings and changes:
        fields = ", ".join(sorted(changes))
        findings = [Finding(code="config_adapted", severity="info", params={"fields": fields})]
    same = Finding(code="config_same", severity="ok", params={"fields": len(theirs)})
    return findings if any(finding.severity == "error" for finding in findings) else [same, *findings]


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


def _differing(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
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
            shutil.copy(folder / "config.json", place)
            if document is not None:
                (Path(place) / "config.json").write_text(json.dumps(document), encoding="utf-8")
            loaded = AutoConfig.from_pretrained(place, trust_remote_code=False, local_files_only=True)
            return _flat(_meaning(loaded.to_dict()))
        except Exception:  # noqa: BLE001 - whatever it is, a loader has nothing to say
            return {}


def _meaning(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration, at every depth, without what changes nothing and with one spelling for RoPE and labels."""
    plain = {
        key: _meaning(value) if isinstance(value, dict) and not key.startswith("rope_") else value
        for key, value in config.items()
        if key not in _NOISE
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


def _check_tokenizer(merged_dir: Path, source: Path) -> list[Finding]:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")
    expected = [name for name in names if (source / name).is_file()]
    missing = [name for name in expected if not (merged_dir / name).is_file()]
    if "tokenizer.json" in expected and "tokenizer.json" not in missing:
        return _check_fast_tokenizer(merged_dir / "tokenizer.json", source / "tokenizer.json")
    if missing:
        return [Finding(code="tokenizer_missing_in_merged", severity="error", params={"names": ", ".join(missing)})]
    changed = [name for name in expected if (merged_dir / name).read_bytes() != (source / name).read_bytes()]
    if changed:
        return [Finding(code="tokenizer_differs", severity="error", params={"where": ", ".join(changed)})]
    return [Finding(code="tokenizer_same", severity="ok", params={"probes": 0})]


def _check_fast_tokenizer(ours: Path, theirs: Path) -> list[Finding]:
    from tokenizers import Tokenizer

    try:
        first, second = Tokenizer.from_file(str(ours)), Tokenizer.from_file(str(theirs))
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises nothing narrower
        return [_tokenizer_differs(str(error)[:120])]
    for tokenizer in (first, second):
        # Left behind by whatever was encoded last; loaders set their own.
        tokenizer.no_truncation()
        tokenizer.no_padding()
    if ours.read_bytes() != theirs.read_bytes():
        # Written out by one version, because versions spell the same merges and defaults in different ways.
        documents = [json.loads(tokenizer.to_str()) for tokenizer in (first, second)]
        parts = [key for key in _differing(*documents) if key != "version"]
        if parts:
            return [_tokenizer_differs(", ".join(parts))]
    for number, probe in enumerate(PROBES):
        for special in (False, True):
            pair = [tokenizer.encode(probe, add_special_tokens=special).ids for tokenizer in (first, second)]
            if pair[0] != pair[1]:
                return [_tokenizer_differs(f"probe {number}")]
    return [Finding(code="tokenizer_same", severity="ok", params={"probes": len(PROBES)})]


def _tokenizer_differs(where: str, *, severity: Severity = "error") -> Finding:
    return Finding(code="tokenizer_differs", severity=severity, params={"where": where})


def _check_special_tokens(merged_dir: Path, source: Path) -> list[Finding]:
    try:
        ours, theirs = _tokens(merged_dir), _tokens(source)
    except CheckpointError as error:
        return [_tokenizer_differs(error.what)]
    # What is not said is left to the tokenizer's class, whose doings the probes have seen.
    changed = [key for key in _SWITCHES if key in ours and key in theirs and ours[key] != theirs[key]]
    changed += [key for key in _SPECIAL if ours.get(key) != theirs.get(key)]
    if not changed:
        return []
    # Padding is masked, so a tool that sets a token for it changes no answer.
    return [_tokenizer_differs(", ".join(changed), severity="warning" if changed == ["pad_token"] else "error")]


def _tokens(folder: Path) -> dict[str, Any]:
    """The special tokens and switches of a tokenizer, whichever of the ways they are written."""
    tokens: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the latter goes before
        config = read_json_object(folder / name) if (folder / name).is_file() else {}
        for key in (*_SPECIAL, *_SWITCHES):
            value = config.get(key)
            if value is not None:
                tokens[key] = value.get("content") if isinstance(value, dict) else value
    return tokens


def _check_template(merged_dir: Path, source: Path) -> list[Finding]:
    ours, theirs = chat_template(merged_dir), chat_template(source)
    if ours == theirs:
        return [Finding(code="chat_template_same", severity="ok")] if theirs is not None else []
    if ours is None:
        return [Finding(code="chat_template_missing", severity="error")]
    at = next((i for i, pair in enumerate(zip(ours, theirs or "", strict=False)) if pair[0] != pair[1]), None)
    place = at if at is not None else min(len(ours), len(theirs or ""))
    params: dict[str, Value] = {
        "position": place,
        "expected": _short((theirs or "")[place : place + 30]),
        "found": _short(ours[place : place + 30]),
    }
    return [Finding(code="chat_template_differs", severity="error", params=params)]


def chat_template(folder: Path) -> str | None:
    """The chat template that a loader would use from a directory: its own file before the tokenizer's configuration."""
    own = folder / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8", errors="replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            try:
                template = read_json_object(folder / name).get("chat_template")
            except CheckpointError:
                continue
            if isinstance(template, list):  # several, by name
                template = next(
                    (
                        item.get("template")
                        for item in template
                        if isinstance(item, dict) and item.get("name") == "default"
                    ),
                    None,
                )
            if isinstance(template, str):
                return template
    return None


def _check_generation(merged_dir: Path, source: Path) -> list[Finding]:
    if not (source / _GENERATION).is_file():
        return []
    try:
        theirs = read_json_object(source / _GENERATION)
        ours = read_json_object(merged_dir / _GENERATION) if (merged_dir / _GENERATION).is_file() else {}
    except CheckpointError:
        ours = {}
    keys = ("eos_token_id", "bos_token_id", "temperature", "top_p", "top_k", "repetition_penalty", "do_sample")
    changed = [key for key in keys if _listed(ours.get(key)) != _listed(theirs.get(key))]
    if not changed:
        return [Finding(code="generation_config_same", severity="ok")]
    severity: Severity = "error" if "eos_token_id" in changed and ours else "warning"
    return [Finding(code="generation_config_differs", severity=severity, params={"fields": ", ".join(changed)})]


def _listed(value: object) -> object:
    """One token or a list of one mean the same."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
