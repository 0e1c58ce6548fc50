"""Modelfiles as Ollama reads them: a port of ``ParseFile`` in its ``parser/parser.go``."""

from __future__ import annotations

_COMMANDS = ("from", "license", "template", "system", "adapter", "parameter", "message")


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """Commands and their values, in order.

    Raises:
        ValueError: Ollama would refuse the file.
    """
    commands: list[tuple[str, str]] = []
    rest = text
    while rest := rest.lstrip(" \t\r\n"):
        if rest[0] == "#":
            rest = rest.partition("\n")[2]
            continue
        word, _, rest = rest.partition(" ")
        if word.lower() not in _COMMANDS:
            raise ValueError(f"not a command: {word!r}")
        name = {"from": "model"}.get(word.lower(), word.lower())
        if name == "parameter":
            name, _, rest = rest.partition(" ")
        value, rest = _value(rest)
        commands.append((name, value))
    if "model" not in dict(commands):
        raise ValueError("no FROM line")
    return commands


def _value(text: str) -> tuple[str, str]:
    """A value, which ends with the first line break at which it is whole; what Go does not print is dropped."""
    read = ""
    for place, letter in enumerate(text):
        if letter in "\r\n" and (whole := _unquoted(read)) is not None:
            return whole, text[place:]
        if letter.isprintable() or letter in "\r\n\t":
            read += letter
    whole = _unquoted(read)
    if whole is None:
        raise ValueError("a value never ends")
    return whole, ""


def _unquoted(text: str) -> str | None:
    text = text.strip()
    if text.startswith('"""'):
        return text[3:-3] if len(text) >= 6 and text.endswith('"""') else None
    if text.startswith('"'):
        return text[1:-1] if len(text) >= 2 and text.endswith('"') else None
    return text
