"""Level 2: all that is not weights (configuration, tokenizer, chat template), by content and by behaviour."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tunesmith.checkpoint import read_json_object
from tunesmith.errors import CheckpointError
from tunesmith.record import Finding, Value

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


def check_assets(merged_dir: Path, base_dir: Path, tokenizer_from: Path | None) -> list[Finding]:
    """Hold everything but the weights against where it should have come from.

    Args:
        merged_dir: the merged model.
        base_dir: the base model, for configuration.
        tokenizer_from: the directory whose tokenizer belongs to the adapter; None where there is none.

    Returns:
        What was looked at and seen.
    """
    findings = _check_config(merged_dir, base_dir)
    if tokenizer_from is not None:
        findings += _check_tokenizer(merged_dir, tokenizer_from)
        findings += _check_special_tokens(merged_dir, tokenizer_from)
        findings += _check_template(merged_dir, tokenizer_from)
    return findings + _check_generation(merged_dir, base_dir)


def _check_config(merged_dir: Path, base_dir: Path) -> list[Finding]:
    try:
        ours, theirs = read_json_object(merged_dir / "config.json"), read_json_object(base_dir / "config.json")
    except CheckpointError as error:
        return [Finding(code="config_unreadable", severity="error", params={"what": error.what})]
    ours, theirs = _plain_rope(ours), _plain_rope(theirs)
    differing = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    if ours.get("architectures") != theirs.get("architectures"):
        differing = ["architectures", *differing]
    findings = [
        Finding(
            code="config_differs",
            severity="error",
            params={"field": key, "expected": _short(theirs.get(key)), "found": _short(ours.get(key))},
        )
        for key in dict.fromkeys(differing)
        if key == "architectures" or key not in _NOISE
    ]
    return findings or [Finding(code="config_same", severity="ok", params={"fields": len(theirs)})]


def _plain_rope(config: dict[str, Any]) -> dict[str, Any]:
    """One spelling for RoPE: transformers 5 nests what transformers 4 writes flat, and some files hold both."""
    plain = {key: _plain_rope(value) if isinstance(value, dict) else value for key, value in config.items()}
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
    plain.setdefault("rope_type", "default")
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
    if ours.read_bytes() != theirs.read_bytes():
        try:
            documents = [json.loads(path.read_bytes()) for path in (ours, theirs)]
        except (ValueError, RecursionError) as error:
            return [Finding(code="tokenizer_differs", severity="error", params={"where": f"not JSON: {error}"})]
        # Truncation and padding are left behind by whatever was encoded last; loaders set their own.
        parts = [
            key
            for key in sorted(documents[0].keys() | documents[1].keys())
            if key not in ("truncation", "padding", "version") and documents[0].get(key) != documents[1].get(key)
        ]
        if parts:
            return [Finding(code="tokenizer_differs", severity="error", params={"where": ", ".join(parts)})]
    from tokenizers import Tokenizer

    try:
        first, second = Tokenizer.from_file(str(ours)), Tokenizer.from_file(str(theirs))
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises nothing narrower
        return [Finding(code="tokenizer_differs", severity="error", params={"where": str(error)[:120]})]
    for number, probe in enumerate(PROBES):
        if first.encode(probe, add_special_tokens=False).ids != second.encode(probe, add_special_tokens=False).ids:
            return [Finding(code="tokenizer_differs", severity="error", params={"where": f"probe {number}"})]
    return [Finding(code="tokenizer_same", severity="ok", params={"probes": len(PROBES)})]


def _check_special_tokens(merged_dir: Path, source: Path) -> list[Finding]:
    keys = ("bos_token", "eos_token", "pad_token", "unk_token", "add_bos_token", "add_eos_token", "add_prefix_space")
    try:
        ours, theirs = (_tokens(folder / "tokenizer_config.json", keys) for folder in (merged_dir, source))
    except CheckpointError as error:
        return [Finding(code="tokenizer_differs", severity="error", params={"where": error.what})]
    changed = [key for key in keys if ours.get(key) != theirs.get(key)]
    if not changed:
        return []
    return [Finding(code="tokenizer_differs", severity="error", params={"where": ", ".join(changed)})]


def _tokens(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """The special tokens of a tokenizer's configuration, whichever of the two ways they are written."""
    config = read_json_object(path) if path.is_file() else {}
    return {key: value["content"] if isinstance(value := config.get(key), dict) else value for key in keys}


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
            if isinstance(template, str):
                return template
    return None


def _check_generation(merged_dir: Path, base_dir: Path) -> list[Finding]:
    name = "generation_config.json"
    if not (base_dir / name).is_file():
        return []
    try:
        theirs = read_json_object(base_dir / name)
        ours = read_json_object(merged_dir / name) if (merged_dir / name).is_file() else {}
    except CheckpointError:
        ours = {}
    keys = ("eos_token_id", "bos_token_id", "temperature", "top_p", "top_k", "repetition_penalty", "do_sample")
    changed = [key for key in keys if ours.get(key) != theirs.get(key)]
    if not changed:
        return [Finding(code="generation_config_same", severity="ok")]
    severity: Any = "error" if "eos_token_id" in changed and ours else "warning"
    return [Finding(code="generation_config_differs", severity=severity, params={"fields": ", ".join(changed)})]


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
