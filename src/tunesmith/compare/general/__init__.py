"""Texts and instructions that ship with the package: what a tuning was to leave as it was.

Both were written for this package.  The texts are scored token by token; the instructions are what any instruct model
does, some with their one right answer, some harmless ones that a model which was tuned too far refuses.
"""

from __future__ import annotations

from functools import cache
from importlib import resources

from tunesmith.conversations import Conversation, Text
from tunesmith.errors import DataError

LANGUAGES = ("en", "zh", "code")
_ALL = "general"


@cache
def general_texts(language: str) -> tuple[Text, ...]:
    """Passages of 60 to 150 tokens for which no answer is asked: every token of them is predicted.

    Args:
        language: ``en``, ``zh`` or ``code`` (programs, queries, settings and what compilers say).

    Raises:
        DataError: there are none in this language.
    """
    return tuple(Text.model_validate_json(line) for line in _lines("texts", language))


@cache
def general_instructions(language: str) -> tuple[Conversation, ...]:
    """Short tasks of many kinds; where one answer alone is right, it is the last turn.

    Args:
        language: ``en``, ``zh`` or ``code`` (asked in either language).

    Raises:
        DataError: there are none in this language.
    """
    return tuple(Conversation.model_validate_json(line) for line in _lines("instructions", language))


def built_in_set(name: str) -> tuple[Conversation, ...] | None:
    """The instructions that a name stands for where a file of prompts is expected.

    Args:
        name: ``general`` for those of all languages, one of each in turn; ``general-en``, ``general-zh`` or
            ``general-code`` for one.

    Returns:
        The instructions, or None where the name is not one of these.
    """
    if name == _ALL:
        return tuple(task for tasks in zip(*map(general_instructions, LANGUAGES), strict=True) for task in tasks)
    language = name.removeprefix(f"{_ALL}-")
    return general_instructions(language) if language != name and language in LANGUAGES else None


def _lines(kind: str, language: str) -> list[str]:
    if language not in LANGUAGES:
        raise DataError(
            f"No general {kind} are kept in this language.", expected=", ".join(LANGUAGES), found=repr(language)
        )
    file = resources.files("tunesmith.compare.general") / f"{kind}-{language}.jsonl"
    return file.read_text(encoding="utf-8").splitlines()
