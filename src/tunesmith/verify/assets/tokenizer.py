"""Tokenizers, by what they do with texts and by what they hold.

What a loader makes of a directory is more than ``tokenizer.json``: the settings beside it add tokens, and change what
those in it do with the spaces around them.  Both sides are therefore made as a loader makes them, and then compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.checkpoint import read_json_object, stored_path
from tunesmith.errors import CheckpointError
from tunesmith.record import Finding, Severity, Value

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

_FAST, _SETTINGS, _MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
_FILES = (_FAST, "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "tiktoken.model")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_MORE_SPECIAL = (*_SPECIAL, "sep_token", "cls_token", "mask_token")
_LISTED = ("additional_special_tokens", "extra_special_tokens")
_SWITCHES = ("add_bos_token", "add_eos_token", "add_prefix_space")
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")

# Parts that can be written in several ways and do the same; what tokens there are, and how they merge, cannot.
_SPELLINGS = {"normalizer", "pre_tokenizer", "post_processor", "decoder"}

PROBES = (
    "The quick brown fox jumps over the lazy dog, 3.14159 times; isn't it?",
    "微调完成后，请先验证合并后的模型，再发布。１２３ 全角 ",
    "def f(x: int) -> int:\n\treturn x ** 2  # comment\n\n\n",
    "日本語のテキスト、カタカナ、そして漢字。 한국어 문장입니다.",
    "Привет, мир! Γειά σου. مرحبا بالعالم שלום עולם नमस्ते ไทย",
    "  leading, trailing   and\u00a0odd\u2003spaces \r\n tabs\t.",
    "emoji 👩‍🔧🎻🇨🇳 e\u0301 é \u200b zero-width",
    "https://example.org/a?b=c&d=%20 user@example.org $1,234.56 100% <b>html</b>",
    "",
    " ",
    "\n",
    "CamelCase snake_case SCREAMING_CASE don't WE'LL they'Re",
    "1 12 123 1234 12345 123456 1234567 0x1F 1e-9 ½ ² Ⅳ",
    "繁體中文與简体混排；「引号」、《书名》……——㐀𠮷",
    "ﬁ ﬂ Å Å ｆｕｌｌ ①②③ ㎏ İ ß ſ",
    "a\u0300\u0301b \ufeff\u00ad\u202e \x07\x1b \ufffd",
    "∑ᵢ xᵢ² ≤ ‖W‖·√n ⇒ ∂f/∂x → ∞",
    "#include <cstdio>\nint main() { return 0; }\n        // eight spaces\n\t\tx += 1;",
    '{"key": ["value", 1.5e3, null], "嵌套": {"a": true}}',
    "| a | b |\n|---|---|\n* item\n1. one\n```py\nx\n```",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "Tiếng Việt, Türkçe, Čeština, Íslenska, ქართული, አማርኛ, বাংলা, தமிழ், မြန်မာ, ខ្មែរ",
)

# Around an added token: whether it takes spaces with it, is found within words, and is matched before or after the text
# is normalized.
_AROUND = ("{}", "a{}b", "x {} y", "  {}\n{}", "中{}文", "{}{}")


def check_tokenizer(merged_dir: Path, source: Path) -> list[Finding]:
    """Hold a tokenizer against the run's.

    Args:
        merged_dir: the merged model.
        source: the directory whose tokenizer belongs to the adapter.

    Returns:
        Whether it gives the same token ids, with and without special tokens, and the same texts back, for texts in many
        scripts and around every added token; and whether it names the same special tokens.  Without ``tokenizer.json``
        its files are held byte for byte.
    """
    return _check_vocabulary(merged_dir, source) + _check_special_tokens(merged_dir, source)


def _check_vocabulary(merged_dir: Path, source: Path) -> list[Finding]:
    expected = [name for name in _FILES if (source / name).is_file()]
    missing = [name for name in expected if not (merged_dir / name).is_file()]
    if _FAST in expected and _FAST not in missing:
        return _check_fast(merged_dir, source)
    if missing:
        return [Finding(code="tokenizer_missing_in_merged", severity="error", params={"names": ", ".join(missing)})]
    changed = [name for name in expected if (merged_dir / name).read_bytes() != (source / name).read_bytes()]
    if changed:
        return [_differs(", ".join(changed))]
    return [Finding(code="tokenizer_same", severity="ok", params={"probes": 0})]


def _check_fast(merged_dir: Path, source: Path) -> list[Finding]:
    try:
        ours, theirs = loaded_tokenizer(merged_dir), loaded_tokenizer(source)
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises nothing narrower
        return [_differs(str(error)[:120])]
    parts = [] if _same_files(merged_dir, source) else _parts_apart(ours, theirs)
    if set(parts) - _SPELLINGS:
        return [_differs(", ".join(parts))]
    probes = [*PROBES, *_token_probes(theirs)]
    found = _first_difference(ours, theirs, probes)
    if found is not None:
        return [_differs(", ".join(parts) or found)]
    if parts:
        params: dict[str, Value] = {"parts": ", ".join(parts), "probes": len(probes)}
        return [Finding(code="tokenizer_respelled", severity="warning", params=params)]
    return [Finding(code="tokenizer_same", severity="ok", params={"probes": len(probes)})]


def _same_files(merged_dir: Path, source: Path) -> bool:
    """Whether both directories hold the same tokenizer, and say the same of its tokens beside it."""
    if (merged_dir / _FAST).read_bytes() != (source / _FAST).read_bytes():
        return False
    return list(_stated_tokens(merged_dir)) == list(_stated_tokens(source))


def _parts_apart(ours: Tokenizer, theirs: Tokenizer) -> list[str]:
    """The parts that differ, written out by one version: versions spell the same merges and defaults in other ways."""
    first, second = (json.loads(tokenizer.to_str()) for tokenizer in (ours, theirs))
    parts = sorted((first.keys() | second.keys()) - {"version"})
    return [part for part in parts if first.get(part) != second.get(part)]


def _token_probes(tokenizer: Tokenizer) -> list[str]:
    """Texts around every added token, and around what its letters are in the other case."""
    added = [token.content for _, token in sorted(tokenizer.get_added_tokens_decoder().items())]
    return [around.format(text, text) for content in added for text in _cases(content) for around in _AROUND]


def _cases(text: str) -> list[str]:
    return list(dict.fromkeys([text, text.swapcase()]))


def _first_difference(ours: Tokenizer, theirs: Tokenizer, probes: Sequence[str]) -> str | None:
    """Where two tokenizers first part: at the ids of a text, or at the text that its ids give back."""
    for special in (False, True):
        pairs = zip(
            probes, *(_encoded(tokenizer, probes, special=special) for tokenizer in (ours, theirs)), strict=True
        )
        for number, (probe, first, second) in enumerate(pairs):
            if first.ids != second.ids:
                return _probe_name(number, probe)
            for skip in (False, True):
                texts = [tokenizer.decode(first.ids, skip_special_tokens=skip) for tokenizer in (ours, theirs)]
                if texts[0] != texts[1]:
                    return f"{_probe_name(number, probe)}, decoded"
    return None


def _probe_name(number: int, probe: str) -> str:
    return f"probe {number}" if number < len(PROBES) else f"probe {json.dumps(probe[:60], ensure_ascii=False)}"


def _encoded(tokenizer: Tokenizer, probes: Sequence[str], *, special: bool) -> list[Encoding]:
    return list(tokenizer.encode_batch(list(probes), add_special_tokens=special))


def loaded_tokenizer(folder: Path) -> Tokenizer:
    """A directory's tokenizer with the tokens that its settings add, as Transformers makes it.

    Args:
        folder: the directory, with ``tokenizer.json``.

    Raises:
        Exception: it cannot be read; the tokenizers library raises nothing narrower.
    """
    from tokenizers import AddedToken, Tokenizer

    file = folder / _FAST
    far = stored_path(file) is not None
    tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8")) if far else Tokenizer.from_file(str(file))
    # Left behind by whatever was encoded last; loaders set their own.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for content, flags in _stated_tokens(folder):
        held = next((t for t in tokenizer.get_added_tokens_decoder().values() if t.content == content), None)
        if held is None or any(getattr(held, flag) != value for flag, value in flags.items()):
            kept = {flag: getattr(held, flag) for flag in _FLAGS} if held is not None else {}
            token = AddedToken(content, **({**kept, **flags} or {"special": True}))
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    return tokenizer


def _stated_tokens(folder: Path) -> Iterator[tuple[str, dict[str, bool]]]:
    """The tokens that a directory's settings add, or give other flags than ``tokenizer.json`` does.

    One that is only named as special is added as such; where it is there already, it stays what it is.
    """
    settings = [read_json_object(folder / name) for name in (_MAP, _SETTINGS) if (folder / name).is_file()]
    for config in settings:
        listed = config.get("added_tokens_decoder")
        for _, stated in sorted(listed.items(), key=_by_number) if isinstance(listed, dict) else ():
            if isinstance(stated, dict) and isinstance(stated.get("content"), str):
                yield stated["content"], {flag: bool(stated[flag]) for flag in _FLAGS if flag in stated}
    for config in settings:
        named = [config.get(key) for key in _MORE_SPECIAL]
        for key in _LISTED:
            more = config.get(key)
            named += more if isinstance(more, list) else more.values() if isinstance(more, dict) else []
        for value in named:
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str) and content:
                yield content, {}


def _by_number(item: tuple[str, object]) -> tuple[int, str]:
    return int(item[0]) if item[0].isdecimal() else 0, item[0]


def _differs(where: str, *, severity: Severity = "error") -> Finding:
    return Finding(code="tokenizer_differs", severity=severity, params={"where": where})


def _check_special_tokens(merged_dir: Path, source: Path) -> list[Finding]:
    try:
        ours, theirs = special_tokens(merged_dir), special_tokens(source)
    except CheckpointError as error:
        return [_differs(error.what)]
    # What is not said is left to the tokenizer's class, whose doings the probes have seen.
    changed = [key for key in _SWITCHES if key in ours and key in theirs and ours[key] != theirs[key]]
    changed += [key for key in _SPECIAL if ours.get(key) != theirs.get(key)]
    if not changed:
        return []
    # Padding is masked, so a tool that sets a token for it changes no answer.
    return [_differs(", ".join(changed), severity="warning" if changed == ["pad_token"] else "error")]


def special_tokens(folder: Path) -> dict[str, Any]:
    """The special tokens and switches of a tokenizer, whichever of the ways they are written.

    Raises:
        CheckpointError: a file that holds them cannot be read.
    """
    tokens: dict[str, Any] = {}
    for name in (_MAP, _SETTINGS):  # the latter goes before
        config = read_json_object(folder / name) if (folder / name).is_file() else {}
        for key in (*_SPECIAL, *_SWITCHES):
            value = config.get(key)
            if value is not None:
                tokens[key] = value.get("content") if isinstance(value, dict) else value
    return tokens


def special_token_ids(folder: Path) -> dict[str, int]:
    """The ids of a tokenizer's special tokens, as configurations name them (``eos_token_id``)."""
    try:
        named = special_tokens(folder)
        tokenizer = loaded_tokenizer(folder)
    except Exception:  # noqa: BLE001 - a tokenizer that cannot be read is told of elsewhere
        return {}
    ids = {f"{key}_id": tokenizer.token_to_id(named[key]) for key in _SPECIAL if isinstance(named.get(key), str)}
    return {key: number for key, number in ids.items() if number is not None}
