"""Under which licence a base may be passed on, as far as the files at hand tell, and whether that restricts anybody."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tunesmith.export.push.files import CARD_FILE

_HEAD_BYTES = 20_000

# The hub's word, and what the beginning of such a licence's text says; the first that fits is it.
_TEXTS: tuple[tuple[str, str], ...] = (
    ("llama4", r"llama 4 community license"),
    ("llama3.3", r"llama 3\.3 community license"),
    ("llama3.2", r"llama 3\.2 community license"),
    ("llama3.1", r"llama 3\.1 community license"),
    ("llama3", r"llama 3 community license"),
    ("llama2", r"llama 2 community license"),
    ("gemma", r"gemma terms of use"),
    ("qwen-research", r"qwen research license"),
    ("tongyi-qianwen", r"tongyi qianwen (?:research )?license"),
    ("deepseek", r"deepseek (?:model )?license"),
    ("cc-by-nc-4.0", r"attribution-noncommercial 4\.0|cc[- ]by[- ]nc[- ]4\.0"),
    ("apache-2.0", r"apache license\s+version 2\.0|apache-2\.0"),
    ("mit", r"mit license|permission is hereby granted, free of charge"),
)
# Families whose models are handed out under terms of their own, by the base's name.
_NAMES: tuple[tuple[str, str], ...] = (
    ("llama4", r"llama-?4"),
    ("llama3.3", r"llama-?3\.3"),
    ("llama3.2", r"llama-?3\.2"),
    ("llama3.1", r"llama-?3\.1"),
    ("llama3", r"llama-?3(?![\d.])"),
    ("llama2", r"llama-?2(?![\d.])"),
    ("gemma", r"google/(?:code)?gemma-[123]"),
)
_OF_THE_HUB = re.compile(
    r"(?:llama[\d.]*|gemma|apache-2\.0|mit|cc-[a-z0-9.\-]+|bsd[a-z0-9.\-]*|openrail.*|unknown|other)"
)
_RESTRICTIVE = re.compile(
    r"llama.*|gemma|.*-nc(?:-.*)?|.*research.*|.*openrail.*|tongyi-.*|deepseek|other|cc-by-nd.*|bigscience.*"
)


@dataclass(frozen=True)
class Licence:
    """A licence.

    Attributes:
        name: its name: the hub's word where the hub has one.
        source: where it is said: ``given``, a file's name, or ``name`` (of the base's family).
    """

    name: str
    source: str

    @property
    def word(self) -> str:
        """What the card's ``license`` says: the hub's word, or ``other``."""
        return self.name if self.source == "given" or _OF_THE_HUB.fullmatch(self.name) else "other"

    @property
    def restrictive(self) -> bool:
        """Whether it allows less than to use, change and pass on for any purpose."""
        return _RESTRICTIVE.fullmatch(self.name) is not None


def licence_of(folders: Iterable[Path], base_model: str | None, *, given: str | None = None) -> Licence | None:
    """What is known of a base's licence.

    Args:
        folders: the base's directory, and that of the model, as far as they are at hand: their cards and licence files
            are read, in this order.
        base_model: the base's name.
        given: what the user says it is.

    Returns:
        The licence; None where nothing tells.
    """
    if given is not None:
        return Licence(given, "given")
    for folder in folders:
        if found := _of_card(folder / CARD_FILE) or _of_text(folder):
            return found
    name = (base_model or "").lower()
    return next((Licence(word, "name") for word, pattern in _NAMES if re.search(pattern, name)), None)


def front_matter(text: str) -> dict[str, Any]:
    """The YAML between the two lines of dashes that a card begins with; empty where there is none that can be read."""
    match = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(?:\n|$)", text, re.DOTALL)
    try:
        found = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _of_card(path: Path) -> Licence | None:
    said = front_matter(_head(path))
    word, name = said.get("license"), said.get("license_name")
    if word == "other" and isinstance(name, str):
        return Licence(name.lower(), path.name)
    return Licence(word, path.name) if isinstance(word, str) and word not in ("unknown", "license") else None


def _of_text(folder: Path) -> Licence | None:
    for path in sorted(folder.glob("LICEN[SC]E*")):
        text = re.sub(r"\s+", " ", _head(path).lower())
        for word, pattern in _TEXTS:
            if re.search(pattern, text):
                return Licence(word, path.name)
        if text:
            return Licence("other", path.name)
    return None


def _head(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_HEAD_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
