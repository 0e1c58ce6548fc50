"""Rows of files: what a file of rows holds, and what the forms in use mean that are known by their keys."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.conversations.records import Conversation, Message
from tunesmith.errors import DataError, MissingExtraError

FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".txt")
"""The endings of files whose rows can be read."""

_SHOWN = 10
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


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

    Files: ``.txt`` (one prompt a line), ``.json`` (a list, or a row a line), ``.jsonl``, ``.csv`` (with a header),
    ``.parquet`` and ``.arrow``.  Rows: Alpaca (``instruction``, ``input``, ``output``, ``system``, ``history``), OpenAI
    ``messages``, ShareGPT ``conversations``, TRL ``prompt``/``completion``, or a bare string.

    Args:
        path: the file; text is UTF-8.

    Returns:
        One conversation a row, in the file's order.

    Raises:
        DataError: the file is absent, empty, not UTF-8, or has a row of no known format (all such rows are named).
        MissingExtraError: Parquet or Arrow, and pyarrow is not installed.
    """
    source = Path(path)
    return conversations_of(rows_of_file(source), where=source)


def conversations_of(rows: Iterable[object], *, where: object) -> list[Conversation]:
    """The conversations that rows hold, whose form is known by their keys.

    Raises:
        DataError: no rows, or some of no known format.
    """
    return converted(
        rows, messages_of, where=where, expected="Alpaca, messages, conversations or prompt/completion rows"
    )


def converted(
    rows: Iterable[object], convert: Callable[[object], Iterable[Message]], *, where: object, expected: str
) -> list[Conversation]:
    """One conversation a row.

    Args:
        rows: what a file holds.
        convert: the messages of a row; it raises ValueError where it cannot say.
        where: what an error names as its place.
        expected: what a row should be.

    Raises:
        DataError: no rows, or some that cannot be read; ten of these are named, the rest counted.
    """
    conversations, problems = [], []
    for index, row in enumerate(rows):
        try:
            conversations.append(Conversation(id=f"row-{index}", messages=tuple(convert(row))))
        except ValueError as error:
            problems.append(f"row {index}: {error}")
    if problems or not conversations:
        total = len(conversations) + len(problems)
        raise DataError(
            f"{len(problems)} of {total} rows cannot be read." if problems else "The file has no rows.",
            where=where,
            expected=expected,
            details=problems[:_SHOWN] + ([f"… and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []),
        )
    return conversations


def rows_of_file(source: Path) -> list[object]:
    """The rows of a file as it holds them: objects, or the lines of a text.

    Raises:
        DataError: the file cannot be read as what its name says.
        MissingExtraError: Parquet or Arrow, and pyarrow is not installed.
    """
    readers: dict[str, Callable[[Path], list[object]]] = {
        ".txt": _text_lines,
        ".jsonl": _json_lines,
        ".json": _json_document,
        ".csv": _csv_rows,
        ".parquet": _table_rows,
        ".arrow": _table_rows,
    }
    if source.suffix not in readers:
        if not source.is_file():
            raise DataError("The file cannot be read.", where=source, found="no file of that name")
        raise DataError(
            "This file's format is not known by its name.",
            where=source,
            expected=f"{', '.join(FILE_TYPES[:-1])} or {FILE_TYPES[-1]}",
            found=source.suffix or "no suffix",
        )
    return readers[source.suffix](source)


def _text_lines(source: Path) -> list[object]:
    return [line for line in _lines(_read_text(source)) if line.strip()]


def _json_lines(source: Path) -> list[object]:
    return _parsed_lines(_read_text(source), source)


def _json_document(source: Path) -> list[object]:
    text = _read_text(source)
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # a row a line, as many files of this name have it
            return _parsed_lines(text, source)
        raise _not_json(source, error.lineno, error) from error
    except (ValueError, RecursionError) as error:
        raise _not_json(source, 1, error) from error
    if not isinstance(document, list):
        raise DataError(
            "A .json data file must hold a list of rows.",
            where=source,
            expected="a list",
            found=type(document).__name__,
        )
    return document


def _csv_rows(source: Path) -> list[object]:
    reader = csv.DictReader(io.StringIO(_read_text(source), newline=""), strict=True)
    try:
        return [dict(row) for row in reader]
    except csv.Error as error:
        raise DataError("The file is not valid CSV.", where=f"{source}, line {reader.line_num}", found=error) from error


def _table_rows(source: Path) -> list[object]:
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError("reading Parquet or Arrow", "train", "pyarrow") from error
    try:
        read = pyarrow.parquet.read_table if source.suffix == ".parquet" else _arrow_table
        return list(read(source).to_pylist())
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        kind = source.suffix.removeprefix(".").capitalize()
        raise DataError(f"The file cannot be read as {kind}.", where=source, found=error) from error


def _arrow_table(source: Path) -> Any:
    """Of either of the two forms of Arrow's files: a stream, or one with a footer."""
    import pyarrow

    with pyarrow.OSFile(str(source), "rb") as file:
        try:
            return pyarrow.ipc.open_stream(file).read_all()
        except pyarrow.ArrowInvalid:
            file.seek(0)
            return pyarrow.ipc.open_file(file).read_all()


def _lines(text: str) -> list[str]:
    # Lines end at "\n", as in JSON Lines; str.splitlines would also cut at U+2028 and its like, within a text.
    return text.split("\n")


def _parsed_lines(text: str, source: Path) -> list[object]:
    rows = []
    for number, line in enumerate(_lines(text), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise _not_json(source, number, error) from error
    return rows


def _not_json(source: Path, line: int, error: Exception) -> DataError:
    return DataError("The file is not valid JSON.", where=f"{source}, line {line}", found=error)


def _read_text(source: Path) -> str:
    try:
        return source.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError("The file is not UTF-8 text.", where=source, found=error) from error
    except OSError as error:
        raise DataError("The file cannot be read.", where=source, found=error.strerror or error) from error


def messages_of(row: object) -> Iterable[Message]:
    """The turns of a row whose form is known by its keys.

    Raises:
        ValueError: it is of no known form.
    """
    if isinstance(row, str):
        return _pair(row, None)
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, found {type(row).__name__}")
    if "messages" in row:
        return _turns(row["messages"], "role", "content")
    if "conversations" in row:
        return [*system_turn(row.get("system")), *_turns(row["conversations"], "from", "value")]
    if "instruction" in row:
        question = joined(row["instruction"], row.get("input"))
        return [
            *system_turn(row.get("system")),
            *earlier_rounds(row.get("history")),
            *_pair(question, row.get("output")),
        ]
    if isinstance(row.get("prompt"), list):
        return _turns(row["prompt"] + _completion(row), "role", "content")
    if "prompt" in row:
        return [*system_turn(row.get("system")), *_pair(row["prompt"], row.get("completion"))]
    raise ValueError(f"no known keys among {', '.join(map(str, islice(row, _SHOWN))) or 'none'}")


def joined(*parts: object) -> str | None:
    """Alpaca's question: its parts that are not empty, a line each; None where one is no text."""
    given = [part for part in parts if part]
    return "\n".join(str(part) for part in given) if all(isinstance(part, str) for part in given) else None


def earlier_rounds(history: object) -> list[Message]:
    """Alpaca's ``history``: pairs of a question and its answer.

    Raises:
        ValueError: it is something else.
    """
    turns = []
    for pair in history if isinstance(history, list) else [history] if history else []:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise ValueError("the history is not a list of pairs of texts")
        turns += [Message(role="user", content=pair[0]), Message(role="assistant", content=pair[1])]
    return turns


def _pair(question: object, answer: object) -> list[Message]:
    if answer is not None and not isinstance(answer, str):
        raise ValueError("the answer is not text")
    if not isinstance(question, str) or not (question or answer):
        raise ValueError("the question is empty or not text")
    turns = [Message(role="user", content=question)]
    return [*turns, Message(role="assistant", content=answer)] if answer else turns


def system_turn(text: object) -> list[Message]:
    """A system text as the turn that it is; none where it is empty.

    Raises:
        ValueError: it is no text.
    """
    if text and not isinstance(text, str):
        raise ValueError("the system text is not text")
    return [Message(role="system", content=str(text))] if text else []


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
