"""Tokens, merges, special ids and chat template of a GGUF file against those of the model's directory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.checkpoint import CONFIG_FILE, read_json_object
from tunesmith.errors import CheckpointError
from tunesmith.record import Finding, Severity, Value
from tunesmith.verify.assets.template import DEFAULT, chat_templates
from tunesmith.verify.assets.tokenizer import PROBES, loaded_tokenizer, special_token_ids, special_tokens
from tunesmith.verify.gguf.file import GgufFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PREFIX = "tokenizer.ggml."
_FAST, _GENERATION = "tokenizer.json", "generation_config.json"
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5
_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "unknown": "unk_token_id", "padding": "pad_token_id"}
_PROBED_TOKENS = 32
# What llama.cpp ends an answer at of itself, by the token's text (llama-vocab.cpp).
_KNOWN_ENDS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_turn|>",
    "<end_of_utterance>",
}  # fmt: skip
# Names that llama.cpp has for a way of cutting text, by the way itself.  Several names may mean one way.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS: Mapping[str, frozenset[str]] = {
    "ByteLevel+": frozenset({"gpt-2", "phi-2", "mpt", "olmo", "jais"}),
    "Digits1 ByteLevel+": frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "granite"}),
    f"{_LLAMA3} ByteLevel": frozenset({"llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe", "falcon3"}),
    f"{_LLAMA3.replace('{1,3}', '')} ByteLevel": frozenset({"qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"}),
}
_BEGIN_WITH_BOS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken", "chameleon"}


def check_vocabulary(file: GgufFile, folder: Path) -> list[Finding]:
    """Hold what a file says of its tokens against the model's directory.

    Args:
        file: the GGUF file.
        folder: the model's directory.

    Returns:
        What was looked at and seen.
    """
    findings: list[Finding | None] = [_check_template(file, folder), *_check_ids(file, folder)]
    if not (folder / _FAST).is_file():
        findings.append(Finding(code="gguf_tokens_unproven", severity="warning", params={"missing": _FAST}))
        return [finding for finding in findings if finding is not None]
    tokenizer = loaded_tokenizer(folder)
    findings += [_check_tokens(file, tokenizer), _check_merges(file, folder), _check_cut(file, folder)]
    findings += check_added(file, folder)
    return [finding for finding in findings if finding is not None]


def probes_of(folder: Path) -> list[str]:
    """Texts whose token ids are compared: many scripts, and the tokens that were added to the vocabulary."""
    tokenizer = loaded_tokenizer(folder)
    added = [token.content for _, token in sorted(tokenizer.get_added_tokens_decoder().items()) if token.special]
    return [text for text in PROBES if text] + [f"x{text}y\n{text}" for text in added[:_PROBED_TOKENS]]


def check_tokenizing(folder: Path, probes: Sequence[str], found: Sequence[Sequence[int]]) -> Finding:
    """Hold the token ids that llama.cpp gave against those of the model's tokenizer.

    Args:
        folder: the model's directory.
        probes: the texts.
        found: llama.cpp's ids of each, without those that it would put around them.
    """
    tokenizer = loaded_tokenizer(folder)
    wanted = [encoding.ids for encoding in tokenizer.encode_batch(list(probes), add_special_tokens=False)]
    wrong = [text for text, ours, theirs in zip(probes, wanted, found, strict=True) if list(ours) != list(theirs)]
    if not wrong:
        return Finding(code="gguf_tokenizes_same", severity="ok", params={"probes": len(probes)})
    params: dict[str, Value] = {
        "count": len(wrong),
        "probes": len(probes),
        "probe": json.dumps(wrong[0][:40], ensure_ascii=False),
    }
    return Finding(code="gguf_tokenizes_differently", severity="error", params=params)


def _check_template(file: GgufFile, folder: Path) -> Finding:
    wanted, found = chat_templates(folder).get(DEFAULT), file.get("tokenizer.chat_template")
    if wanted == found:
        return Finding(code="gguf_template_same" if wanted else "gguf_template_none", severity="ok")
    if found is None:
        return Finding(code="gguf_template_missing", severity="error")
    if wanted is None:
        return Finding(code="gguf_template_added", severity="error")
    pairs = zip(wanted, str(found), strict=False)
    place = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(wanted), len(str(found))))
    return Finding(code="gguf_template_differs", severity="error", params={"position": place + 1})


def _check_ids(file: GgufFile, folder: Path) -> list[Finding]:
    stated, config = special_token_ids(folder), read_json_object(folder / CONFIG_FILE)
    findings = []
    for name, field in _IDS.items():
        wanted, found = stated.get(field, config.get(field)), file.get(f"{_PREFIX}{name}_token_id")
        if found is None and name in ("unknown", "padding"):
            continue  # nothing is masked or replaced in llama.cpp
        same = found in wanted if isinstance(wanted, list) else found == wanted or wanted is None
        if not same:
            severity: Severity = "warning" if name == "padding" else "error"
            params: dict[str, Value] = {
                "name": name,
                "expected": str(wanted),
                "found": "–" if found is None else str(found),
            }
            findings.append(Finding(code="gguf_special_id_differs", severity=severity, params=params))
    findings += _check_ends(file, folder)
    return findings or [Finding(code="gguf_special_ids_same", severity="ok")]


def _check_ends(file: GgufFile, folder: Path) -> list[Finding]:
    """Whether llama.cpp ends an answer at every token that ends one in transformers."""
    try:
        ends = read_json_object(folder / _GENERATION).get("eos_token_id")
    except CheckpointError:
        return []
    named = {file.get(f"{_PREFIX}{name}_token_id") for name in ("eos", "eot", "eom")}
    tokens = file.get(f"{_PREFIX}tokens") or []
    others = [
        end
        for end in (ends if isinstance(ends, list) else [ends])
        if isinstance(end, int) and end not in named and not (end < len(tokens) and tokens[end] in _KNOWN_ENDS)
    ]
    if not others:
        return []
    return [Finding(code="gguf_other_ends", severity="warning", params={"ids": ", ".join(map(str, others))})]


def _check_tokens(file: GgufFile, tokenizer: Tokenizer) -> Finding:
    tokens = file.get(f"{_PREFIX}tokens") or []
    types = file.get(f"{_PREFIX}token_type") or [1] * len(tokens)
    wanted = {number: token for token, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    wrong = [number for number, token in wanted.items() if number >= len(tokens) or not _is(tokens[number], token)]
    if wrong:
        first = min(wrong)
        found = str(tokens[first]) if first < len(tokens) else "–"
        params: dict[str, Value] = {"count": len(wrong), "id": first, "expected": wanted[first], "found": found}
        return Finding(code="gguf_tokens_differ", severity="error", params=params)
    kinds = [number for number in sorted(special) if types[number] not in (_UNKNOWN, _CONTROL)]
    # A padded vocabulary may name tokens that no text can give; an ordinary one there would be found.
    kinds += [number for number in range(len(tokens)) if number not in wanted and types[number] not in (_UNUSED, 1)]
    if kinds:
        params = {"count": len(kinds), "id": kinds[0], "token": str(tokens[kinds[0]])}
        return Finding(code="gguf_token_types_differ", severity="error", params=params)
    return Finding(code="gguf_tokens_same", severity="ok", params={"count": len(wanted)})


def _is(found: str, token: str) -> bool:
    return found == token or found == token.replace("\u2581", " ")


def _check_merges(file: GgufFile, folder: Path) -> Finding | None:
    model = read_json_object(folder / _FAST).get("model")
    merges = model.get("merges") if isinstance(model, dict) else None
    if file.get(f"{_PREFIX}model") != "gpt2" or not isinstance(merges, list):
        return None
    wanted = [_merge(pair) for pair in merges]
    found = file.get(f"{_PREFIX}merges") or []
    if wanted == found:
        return Finding(code="gguf_merges_same", severity="ok", params={"count": len(wanted)})
    pairs = zip(wanted, found, strict=False)
    place = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(wanted), len(found)))
    params: dict[str, Value] = {"expected": len(wanted), "found": len(found), "place": place + 1}
    return Finding(code="gguf_merges_differ", severity="error", params=params)


def _merge(pair: str | Sequence[str]) -> str:
    """A merge as GGUF has it: two tokens and a space, with a space within one of them moved out of the way."""
    return pair if isinstance(pair, str) else " ".join(token.replace(" ", "\u0120") for token in pair)


def _check_cut(file: GgufFile, folder: Path) -> Finding:
    """Whether the file names the way of cutting text that the tokenizer has, where that is one known here."""
    found = str(file.get(f"{_PREFIX}pre") or "")
    if file.get(f"{_PREFIX}model") != "gpt2":
        return Finding(code="gguf_cut_not_used", severity="ok")
    names = _CUTS.get(_cut_of(read_json_object(folder / _FAST).get("pre_tokenizer")))
    if names is None:
        return Finding(code="gguf_cut_unknown", severity="info", params={"found": found or "–"})
    if found in names:
        return Finding(code="gguf_cut_same", severity="ok", params={"found": found})
    params: dict[str, Value] = {"found": found or "–", "expected": ", ".join(sorted(names))}
    return Finding(code="gguf_cut_differs", severity="error", params=params)


def _cut_of(stated: Any) -> str:
    """A pre-tokenizer in one line."""
    if not isinstance(stated, dict):
        return ""
    if stated.get("type") == "Sequence":
        return " ".join(_cut_of(part) for part in stated.get("pretokenizers") or [])
    if stated.get("type") == "Split":
        pattern = stated.get("pattern")
        return str(pattern.get("Regex", pattern)) if isinstance(pattern, dict) else ""
    if stated.get("type") == "Digits":
        return "Digits1" if stated.get("individual_digits") else "Digits"
    return str(stated.get("type")) + ("+" if stated.get("use_regex", False) else "")


def adds(file: GgufFile, name: str) -> bool:
    """Whether llama.cpp puts the begin (``bos``) or end (``eos``) token around a text: so stated, or its default."""
    found = file.get(f"{_PREFIX}add_{name}_token")
    if found is not None:
        return bool(found)
    pieces = file.get(f"{_PREFIX}model") == "llama"
    return name == "bos" and (pieces or file.get(f"{_PREFIX}pre") in _BEGIN_WITH_BOS)


def check_added(file: GgufFile, folder: Path) -> list[Finding]:
    """Whether llama.cpp begins and ends a text, and begins a chat, as the model's tokenizer and template do."""
    if not (folder / _FAST).is_file():
        return []
    tokenizer = loaded_tokenizer(folder)
    return [*_check_bos(file, folder, tokenizer), *_check_chat_begin(file, folder)]


def _check_chat_begin(file: GgufFile, folder: Path) -> list[Finding]:
    """llama.cpp puts the begin token before a chat too; transformers leaves that to the template."""
    template, begin = chat_templates(folder).get(DEFAULT), special_tokens(folder).get("bos_token")
    token = begin.get("content") if isinstance(begin, dict) else begin
    if not template or not token or not adds(file, "bos") or "bos_token" in template or str(token) in template:
        return []
    return [Finding(code="gguf_chat_begins_otherwise", severity="warning", params={"token": str(token)})]


def _check_bos(file: GgufFile, folder: Path, tokenizer: Tokenizer) -> list[Finding]:
    """Whether llama.cpp begins and ends a text with the tokens that the model's tokenizer does."""
    ids, stated = special_token_ids(folder), special_tokens(folder)
    around = tokenizer.encode("a", add_special_tokens=True).ids
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    does = {
        "bos": bool(around) and len(around) > len(plain) and around[0] == ids.get("bos_token_id"),
        "eos": bool(around) and len(around) > len(plain) and around[-1] == ids.get("eos_token_id"),
    }
    findings = []
    for name, observed in does.items():
        wanted = bool(stated.get(f"add_{name}_token", observed))
        found = file.get(f"{_PREFIX}add_{name}_token")
        if adds(file, name) != wanted:
            params: dict[str, Value] = {
                "name": name,
                "expected": wanted,
                "found": "–" if found is None else str(bool(found)),
            }
            findings.append(Finding(code="gguf_add_token_differs", severity="error", params=params))
    return findings
