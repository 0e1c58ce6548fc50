"""Chat templates: found as a loader finds them, compared by their characters and by what they write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tunesmith.checkpoint import read_json_object
from tunesmith.errors import CheckpointError
from tunesmith.record import Finding, Value
from tunesmith.verify.assets.configuration import shown
from tunesmith.verify.assets.tokenizer import special_tokens

DEFAULT = "default"
_FILE, _LEGACY, _SETTINGS = "chat_template.jinja", "chat_template.json", "tokenizer_config.json"
_FOLDER = "additional_chat_templates"

_ASK, _ASK_ZH = "Why is the sky blue?", "天空为什么是蓝色的？"
_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}


def _turns(*contents: Any, system: str | None = None) -> list[dict[str, Any]]:
    """Turns that begin with the user's and alternate, after a system's where there is one."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, *({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents))]


# What a template is given: every role, one turn and several, what templates are known to treat apart.
CONVERSATIONS: tuple[dict[str, Any], ...] = (
    {"messages": _turns(_ASK)},
    {"messages": _turns(_ASK, system="You are a careful physicist.")},
    {"messages": _turns(_ASK_ZH, system="")},
    {"messages": _turns(_ASK_ZH, "因为瑞利散射。", "短一点。", system="你是一位物理老师。")},
    {"messages": _turns(_ASK, "Rayleigh scattering.", "And at dusk?", "A longer way through the air.")},
    {"messages": _turns("  spaces, \"quotes\" & <tags> {{ braces }}  \n\n", "\n line \n", "")},
    {"messages": _turns(_ASK, "<think>\nShort waves scatter more.\n</think>\n\nScattering.", "Sure?")},
    {"messages": _turns(_ASK), "enable_thinking": False},
    {"messages": _turns([{"type": "text", "text": _ASK}])},
    {"messages": _turns("What is the weather in Beijing?"), "tools": [_TOOL]},
    {
        "messages": [
            *_turns("北京天气如何？"),
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "name": "weather", "content": '{"celsius": 21}'},
        ],
        "tools": [_TOOL],
    },
)  # fmt: skip


def check_template(merged_dir: Path, source: Path) -> list[Finding]:
    """Hold the chat templates of a merged model against the run's.

    Args:
        merged_dir: the merged model.
        source: the directory whose template belongs to the adapter.

    Returns:
        The same characters are good; others that write the same text of every probe are a warning; a template that
        writes another text, or that only one side has, is an error.
    """
    ours, theirs = chat_templates(merged_dir), chat_templates(source)
    tokens = special_tokens(source)
    # The usual one first: what is wrong with it is the cause that is told.
    names = sorted(ours.keys() | theirs.keys(), key=lambda name: (name != DEFAULT, name))
    findings = [_compare(name, ours.get(name), theirs.get(name), tokens) for name in names]
    wrong = [finding for finding in findings if finding.severity != "ok"]
    return wrong or findings[:1]


def _compare(name: str, ours: str | None, theirs: str | None, tokens: Mapping[str, Any]) -> Finding:
    if ours == theirs:
        return Finding(code="chat_template_same", severity="ok")
    if ours is None:
        return Finding(code="chat_template_missing", severity="error", params={"name": name})
    place = _departs(ours, theirs or "")
    params: dict[str, Value] = {
        "name": name,
        "position": place,
        "expected": shown((theirs or "")[place : place + 30]),
        "found": shown(ours[place : place + 30]),
    }
    written = list(zip(_written(ours, tokens), _written(theirs, tokens), strict=True))
    number = next((number for number, pair in enumerate(written) if pair[0] != pair[1]), None)
    if number is None:
        return Finding(code="chat_template_respelled", severity="warning", params={**params, "probes": len(written)})
    at = _departs(*written[number])
    params |= {
        "probe": number,
        "place": at,
        "should_write": shown(written[number][1][at : at + 30]),
        "writes": shown(written[number][0][at : at + 30]),
    }
    return Finding(code="chat_template_differs", severity="error", params=params)


def _departs(ours: str, theirs: str) -> int:
    """The first character at which two texts are not the same."""
    at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    return at if at is not None else min(len(ours), len(theirs))


def _written(template: str | None, tokens: Mapping[str, Any]) -> Iterator[str]:
    """What a template makes of every probe, without and with the beginning of an answer; errors by their own text."""
    for probe in CONVERSATIONS:
        for opened in (False, True):
            try:
                yield "" if template is None else render(template, **tokens, **probe, add_generation_prompt=opened)
            except Exception as error:  # noqa: BLE001 - a template may raise anything
                yield f"{type(error).__name__}: {error}"


def render(template: str, *, messages: list[dict[str, Any]], **variables: Any) -> str:
    """What a chat template writes, as Transformers renders it, in its sandbox.

    Args:
        template: the template.
        messages: a conversation.
        variables: what else it sees: ``add_generation_prompt``, ``tools``, the special tokens.

    Raises:
        Exception: whatever the template raises.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    return str(render_jinja_template([messages], chat_template=template, **variables)[0][0])


def chat_templates(folder: Path) -> dict[str, str]:
    """The chat templates that a loader would use from a directory, by name; the usual one is ``default``.

    Files of their own (``chat_template.jinja``, and named ones in ``additional_chat_templates``) go before
    ``chat_template.json``, which goes before the tokenizer's configuration.
    """
    own = {DEFAULT: folder / _FILE} | {file.stem: file for file in sorted((folder / _FOLDER).glob("*.jinja"))}
    texts = {name: _text(file) for name, file in own.items() if file.is_file()}
    if texts:
        return texts
    for file in (folder / _LEGACY, folder / _SETTINGS):
        if templates := _stated(file):
            return templates
    return {}


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _stated(file: Path) -> dict[str, str]:
    """The templates that a JSON file states: one, several in a list, or several by name."""
    try:
        stated = read_json_object(file).get("chat_template") if file.is_file() else None
    except CheckpointError:
        return {}
    if isinstance(stated, str):
        return {DEFAULT: stated}
    if isinstance(stated, list):
        stated = {item.get("name"): item.get("template") for item in stated if isinstance(item, dict)}
    if not isinstance(stated, dict):
        return {}
    return {name: text for name, text in stated.items() if isinstance(name, str) and isinstance(text, str)}
