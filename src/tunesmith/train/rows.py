"""Training rows: read, kept apart from the held-out ones, and encoded with their answers marked."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.checkpoint import sha256_of
from tunesmith.conversations import Conversation, Message, encode, read_conversations
from tunesmith.errors import DataError, RecipeError
from tunesmith.progress import Cancellation
from tunesmith.train.manifest import DataFile
from tunesmith.train.recipe import Recipe

IGNORED = -100
"""The label of a token that does not count in the loss."""


@dataclass(frozen=True)
class Rows:
    """The rows of a run, and the files they were read from."""

    train: list[Conversation]
    held_out: list[Conversation]
    dataset: DataFile
    eval_dataset: DataFile | None


@dataclass(frozen=True)
class Examples:
    """Encoded rows.

    Attributes:
        examples: ``input_ids`` and ``labels`` of each row, of one length; a label is the token itself or ``IGNORED``.
        cut: rows that lost their end.
        dropped: rows without a supervised token, left out of ``examples``.
    """

    examples: list[dict[str, list[int]]]
    cut: int
    dropped: int

    @property
    def supervised_tokens(self) -> int:
        """Tokens that count in the loss."""
        return sum(label != IGNORED for example in self.examples for label in example["labels"])


def read_rows(recipe: Recipe) -> Rows:
    """Read the recipe's files and part training rows from held-out rows.

    Raises:
        DataError: a file cannot be read, or has rows without an answer (all of them are named).
        RecipeError: ``val_size`` leaves nothing to train on.
    """
    rows, dataset = _read(recipe.dataset)
    if recipe.eval_dataset is not None:
        held_out, eval_dataset = _read(recipe.eval_dataset)
        return Rows(rows, held_out, dataset, eval_dataset)
    train, held_out = split(rows, val_size=recipe.val_size, seed=recipe.seed)
    return Rows(train, held_out, dataset, None)


def split(rows: Sequence[Conversation], *, val_size: float, seed: int) -> tuple[list[Conversation], list[Conversation]]:
    """Part ``rows`` into training and held-out ones, both in the file's order.

    Rows of the same text stay on one side, lest a held-out row be trained on; so a few more than asked for may be
    held out.

    Raises:
        RecipeError: nothing would be left to train on.
    """
    wanted = math.ceil(len(rows) * val_size) if val_size < 1 else int(val_size)
    copies = Counter(row.messages for row in rows)
    distinct = list(copies)
    random.Random(seed).shuffle(distinct)  # noqa: S311 - a split, not a secret
    chosen: set[tuple[Message, ...]] = set()
    held_out = 0
    while distinct and held_out < wanted:
        chosen.add(distinct[-1])
        held_out += copies[distinct.pop()]
    if not distinct:
        raise RecipeError(
            "Holding out that many rows leaves none to train on.",
            where="val_size",
            expected=f"fewer than {len(rows)} rows",
            found=f"{wanted} of {len(rows)}",
        )
    sides: tuple[list[Conversation], list[Conversation]] = ([], [])
    for row in rows:
        sides[row.messages in chosen].append(row)
    return sides


def encode_rows(
    tokenizer: Any, rows: Sequence[Conversation], *, cutoff_len: int, cancellation: Cancellation | None = None
) -> Examples:
    """Encode rows, cut at ``cutoff_len`` tokens, and leave out those of which no answer is left.

    Raises:
        DataError: a row cannot be rendered, or no row has an answer left.
        Cancelled: that was asked for.
    """
    examples, cut, dropped = [], 0, 0
    for row in rows:
        if cancellation is not None:
            cancellation.check()
        encoded = encode(tokenizer, row)
        cut += len(encoded.input_ids) > cutoff_len
        ids, supervised = encoded.input_ids[:cutoff_len], encoded.supervised[:cutoff_len]
        # Nothing precedes the first token, so it is never predicted.
        supervised[0] = False
        labels = [token if counts else IGNORED for token, counts in zip(ids, supervised, strict=True)]
        if all(label == IGNORED for label in labels):
            dropped += 1
        else:
            examples.append({"input_ids": ids, "labels": labels})
    if rows and not examples:
        raise DataError(
            f"No row has an answer within its first {cutoff_len} tokens, so there is nothing to learn.",
            where="cutoff_len",
            next_step="raise cutoff_len, or shorten the prompts",
        )
    return Examples(examples, cut, dropped)


def write_held_out(rows: Sequence[Conversation], path: Path) -> None:
    """Write rows as JSON lines of ``messages``."""
    lines = [json.dumps({"messages": [turn.model_dump() for turn in row.messages]}, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _read(path: Path) -> tuple[list[Conversation], DataFile]:
    rows = read_conversations(path)
    unanswered = [row.id for row in rows if row.answer is None]
    if unanswered:
        raise DataError(
            f"{len(unanswered)} of {len(rows)} rows have no answer to learn.",
            where=path,
            expected="rows that end with an assistant's turn",
            details=unanswered[:10] + ([f"… and {len(unanswered) - 10} more"] if len(unanswered) > 10 else []),
        )
    return rows, DataFile(name=path.name, sha256=sha256_of(path), rows=len(rows))
