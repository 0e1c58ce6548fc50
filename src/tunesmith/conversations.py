"""Conversations: the rows of every data-set format in use, and their one way through a chat template.

Training, scoring, comparing and verifying all read rows and render prompts here, so that what was trained on, what
is compared and what is verified are the same token ids.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError
from tunesmith.record import Part

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


class Message(Part):
    """One turn of a conversation.

    Attributes:
        role: ``system``, ``user`` or ``assistant``.
        content: the text of the turn.
    """

    role: str
    content: str


class Conversation(Part):
    """A prompt, and the answer where there is one.

    Attributes:
        id: stable within its file: ``row-3`` is the fourth row.
        messages: the turns in order; the last is the answer where it is an assistant's.
    """

    id: str
    messages: tuple[Message, ...]

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The turns before the last answer."""
        return self.messages[:-1] if self.answer is not None else self.messages

    @property
    def answer(self) -> str | None:
        """The text of the last turn where that is the assistant's, else None."""
        last = self.messages[-1]
        return last.content if last.role == "assistant" else None

    @property
    def question(self) -> str:
        """The last user turn: what a person recognises the row by."""
        return next((turn.content for turn in reversed(self.messages) if turn.role == "user"), "")


class Text(Part):
    """A passage of plain text, all of which is scored: no question, no answer.

    Attributes:
        id: stable within its file.
        text: the passage.
    """

    id: str
    text: str


def built_in_prompts() -> tuple[Conversation, ...]:
    """Prompts in English, Chinese and code in turn, for a run that keeps no held-out rows: 8 of the general ones."""
    # Read as files: verification asks these too, and must not import the room of comparing for it.
    folder = resources.files("tunesmith") / "compare" / "general"
    kinds = [(folder / f"instructions-{kind}.jsonl").read_text(encoding="utf-8") for kind in ("en", "zh", "code")]
    rows = [line for turn in zip(*(kind.splitlines()[:3] for kind in kinds), strict=True) for line in turn]
    asked = (Conversation.model_validate_json(row) for row in rows[:8])
    return tuple(Conversation(id=row.id, messages=row.prompt) for row in asked)


def read_conversations(path: str | os.PathLike[str]) -> list[Conversation]:
    """Read every row of a file.

    Formats: ``.txt`` (one prompt a line), ``.json`` (a list) and ``.jsonl`` whose rows are Alpaca
    (``instruction``, ``input``, ``output``, ``system``), OpenAI ``messages``, ShareGPT ``conversations``,
    TRL ``prompt``/``completion``, or a bare string.

    Args:
        path: the file, UTF-8.

    Returns:
        One conversation a row, in the file's order.

    Raises:
        DataError: the file is absent, empty, not UTF-8, or has a row of no known format (all such rows are named).
    """
    source = Path(path)
    # Lines end at "\n", as in JSON Lines; str.splitlines would also cut at U+2028 and its like, within a text.
    text = _read_text(source)
    if source.suffix == ".txt":
        rows: list[object] = [line for line in text.split("\n") if line.strip()]
    elif source.suffix == ".jsonl":
        rows = [_parse_json(line, source, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    elif source.suffix == ".json":
        document = _parse_json(text, source, 1)
        if not isinstance(document, list):
            raise DataError(
                "A .json data file must hold a list of rows.",
                where=source,
                expected="a list",
                found=type(document).__name__,
            )
        rows = document
    else:
        raise DataError(
            "This file's format is not known by its name.",
            where=source,
            expected=".jsonl, .json or .txt",
            found=source.suffix or "no suffix",
        )
    conversations, problems = [], []
    for index, row in enumerate(rows):
        try:
            conversations.append(Conversation(id=f"row-{index}", messages=tuple(_messages_of(row))))
        except ValueError as error:
            problems.append(f"row {index}: {error}")
    if problems or not conversations:
        raise DataError(
            f"{len(problems)} of {len(rows)} rows cannot be read." if problems else "The file has no rows.",
            where=source,
            expected="Alpaca, messages, conversations or prompt/completion rows",
            details=problems[:10] + ([f"… and {len(problems) - 10} more"] if len(problems) > 10 else []),
        )
    return conversations


@dataclass(frozen=True)
class Encoded:
    """Token ids of a conversation or a text.

    Attributes:
        input_ids: all token ids, in order.
        supervised: for each of them, whether it counts in the loss: in a conversation, whether it belongs to an answer.
    """

    input_ids: list[int]
    supervised: list[bool]


def encode_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """The token ids that a model is given to answer ``messages``: the chat template with its generation prompt.

    Raises:
        DataError: the tokenizer has no chat template.
    """
    return _ids(tokenizer, _render(tokenizer, messages, add_generation_prompt=True))


def encode(tokenizer: Any, conversation: Conversation) -> Encoded:
    """Encode a conversation with its answers marked, whatever the template.

    Every assistant turn is found by rendering the turns before it with a generation prompt: what the template adds
    after that is the answer, its end-of-turn token included.  A template under which the two renderings do not share
    that beginning cannot be supervised and is refused.

    Raises:
        DataError: no chat template, no answer in the row, or a template that rewrites earlier turns.
    """
    text = _render(tokenizer, conversation.messages, add_generation_prompt=False)
    spans = []
    for index, turn in enumerate(conversation.messages):
        if turn.role != "assistant":
            continue
        start = _render(tokenizer, conversation.messages[:index], add_generation_prompt=True)
        end = _render(tokenizer, conversation.messages[: index + 1], add_generation_prompt=False)
        if not (text.startswith(start) and text.startswith(end) and len(end) > len(start)):
            raise DataError("The chat template rewrites earlier turns, so answers cannot be told from prompts.")
        spans.append((start, end))
    if not spans:
        raise DataError("A row without an answer cannot be trained on or scored.", where=conversation.id)
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids: list[int] = []
    supervised: list[bool] = []
    done = 0
    for start, end in spans:
        context, answer = _ids(tokenizer, text[done : len(start)]), _ids(tokenizer, text[len(start) : len(end)])
        # Some templates put a line break after the end-of-turn token; generation never reaches it.
        length = max((place + 1 for place, index in enumerate(answer) if index in special), default=len(answer))
        ids += context + answer
        supervised += [False] * len(context) + [place < length for place in range(len(answer))]
        done = len(end)
    return Encoded(ids, supervised)


def encode_text(tokenizer: Any, text: Text) -> Encoded:
    """Encode plain text as a model was pretrained on it: no chat template, the tokenizer's own special tokens.

    Every token counts but the first, before which there is nothing to predict it from.

    Raises:
        DataError: there are not two tokens, so that there is nothing to score.
    """
    ids = list(tokenizer(text.text, add_special_tokens=True)["input_ids"])
    if len(ids) < 2:
        raise DataError(
            "A text of fewer than two tokens cannot be scored.", where=text.id, expected="2 or more", found=len(ids)
        )
    return Encoded(ids, [False] + [True] * (len(ids) - 1))


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _render(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            "This tokenizer has no chat template, so a conversation cannot be rendered.",
            where=getattr(tokenizer, "name_or_path", None),
            next_step="put the template that the model was trained with into chat_template.jinja beside the tokenizer",
        )
    turns = [turn.model_dump() for turn in messages]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt))


def _read_text(source: Path) -> str:
    try:
        return source.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError("The file is not UTF-8 text.", where=source, found=error) from error
    except OSError as error:
        raise DataError("The file cannot be read.", where=source, found=error.strerror or error) from error


def _parse_json(text: str, source: Path, line: int) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError("The file is not valid JSON.", where=f"{source}, line {line}", found=error) from error


def _messages_of(row: object) -> Iterable[Message]:
    if isinstance(row, str):
        return _pair(row, None)
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, found {type(row).__name__}")
    if "messages" in row:
        return _turns(row["messages"], "role", "content")
    if "conversations" in row:
        return [*_system(row), *_turns(row["conversations"], "from", "value")]
    if "instruction" in row:
        parts = [part for part in (row["instruction"], row.get("input")) if part]
        question = "\n".join(parts) if all(isinstance(part, str) for part in parts) else None
        return [*_system(row), *_pair(question, row.get("output"))]
    if isinstance(row.get("prompt"), list):
        return _turns(row["prompt"] + _completion(row), "role", "content")
    if "prompt" in row:
        return [*_system(row), *_pair(row["prompt"], row.get("completion"))]
    raise ValueError(f"no known keys among {', '.join(map(str, row)) or 'none'}")


def _pair(question: object, answer: object) -> list[Message]:
    if not isinstance(question, str) or not question:
        raise ValueError("the question is empty or not text")
    if answer is not None and not isinstance(answer, str):
        raise ValueError("the answer is not text")
    turns = [Message(role="user", content=question)]
    return [*turns, Message(role="assistant", content=answer)] if answer else turns


def _system(row: dict[str, Any]) -> list[Message]:
    text = row.get("system")
    if text and not isinstance(text, str):
        raise ValueError("the system text is not text")
    return [Message(role="system", content=text)] if text else []


def _completion(row: dict[str, Any]) -> list[Any]:
    turns = row.get("completion") or []
    if not isinstance(turns, list):
        raise ValueError("the prompt is a list of turns, the completion is not")
    return turns


def _turns(turns: object, role_key: str, text_key: str) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise ValueError("the list of turns is empty or not a list")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get(text_key), str):
            raise ValueError(f"a turn has no text under {text_key!r}")
        role = _SHAREGPT_ROLES.get(str(turn.get(role_key)))
        if role is None:
            raise ValueError(f"unknown role {turn.get(role_key)!r}")
        messages.append(Message(role=role, content=turn[text_key]))
    return messages
