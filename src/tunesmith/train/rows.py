"""Training rows: read, kept apart from the held-out ones, and encoded with their answers marked."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from tunesmith.checkpoint import sha256_of
from tunesmith.conversations import REASONS, Conversation, Dataset, Message, encode_all, read_dataset, with_system
from tunesmith.errors import DataError, RecipeError
from tunesmith.progress import Cancellation, Progress, ProgressCallback, no_progress
from tunesmith.record import Finding
from tunesmith.train.manifest import Counted, DataFile, DataHealth
from tunesmith.train.recipe import Recipe

IGNORED = -100
"""The label of a token that does not count in the loss."""

_REPORT_EVERY = 256
_STOPPING = {
    "interleave_under": "first_exhausted",
    "interleave_over": "all_exhausted",
    "interleave_once": "all_exhausted_without_replacement",
}


@dataclass(frozen=True)
class Rows:
    """The rows of a run, and where they were read from.

    Attributes:
        train: trained on, in the order of their data sets.
        held_out: kept from training.
        dataset: what the training rows, and held-out ones that were split off them, were read from.
        eval_dataset: what the held-out rows were read from, where that is something of its own.
        health: what was found in them, and left out.
    """

    train: list[Conversation]
    held_out: list[Conversation]
    dataset: tuple[DataFile, ...]
    eval_dataset: tuple[DataFile, ...]
    health: DataHealth


@dataclass(frozen=True)
class Examples:
    """Encoded rows.

    Attributes:
        examples: ``input_ids`` and ``labels`` of each row, of one length; a label is the token itself or ``IGNORED``.
        cut_rows: rows that lost their end.
        dropped_rows: rows without a supervised token, left out of ``examples``.
        passed_over: rows with earlier answers that do not count.
        lengths: tokens of every row before it was cut, those of dropped ones too.
    """

    examples: list[dict[str, list[int]]]
    cut_rows: Counted = field(default_factory=Counted)
    dropped_rows: Counted = field(default_factory=Counted)
    passed_over: Counted = field(default_factory=Counted)
    lengths: list[int] = field(default_factory=list)

    @property
    def cut(self) -> int:
        """How many rows lost their end."""
        return self.cut_rows.count

    @property
    def dropped(self) -> int:
        """How many rows were left out."""
        return self.dropped_rows.count

    @property
    def supervised_tokens(self) -> int:
        """Tokens that count in the loss."""
        return sum(label != IGNORED for example in self.examples for label in example["labels"])


def read_rows(recipe: Recipe) -> Rows:
    """Read the recipe's data sets and part training rows from held-out rows.

    Rows that cannot be trained on are left out and counted; so are held-out rows that are trained on.

    Raises:
        DataError: a data set or a row cannot be read, or one has no row that can be trained on.
        RecipeError: ``val_size`` leaves nothing to train on, or the rows cannot be mixed as the recipe asks.
    """
    several = len(recipe.dataset) + len(recipe.eval_dataset or ()) > 1
    sets = [_read(name, recipe, several=several) for name in recipe.dataset]
    eval_sets = [_read(name, recipe, several=several) for name in recipe.eval_dataset or ()]
    rows = _mixed([one.rows for one in sets], recipe)
    if eval_sets:
        train, given = rows, list(chain.from_iterable(one.rows for one in eval_sets))
    else:
        train, given = split(rows, val_size=recipe.val_size, seed=recipe.seed)
    learned = {row.messages for row in train}
    held_out = [row for row in given if row.messages not in learned]
    trained_on = Counted.of(row.id for row in given if row.messages in learned)
    return Rows(
        train=train,
        held_out=held_out,
        dataset=tuple(map(_data_file, sets)),
        eval_dataset=tuple(map(_data_file, eval_sets)),
        health=_health(sets, eval_sets, recipe, trained_on=trained_on, lost=bool(given) and not held_out),
    )


def _health(
    sets: Sequence[Dataset], eval_sets: Sequence[Dataset], recipe: Recipe, *, trained_on: Counted, lost: bool
) -> DataHealth:
    every = [*sets, *eval_sets]
    notes = [note for one in every for note in one.findings]
    if lost:
        notes.append(Finding(code="held_out_all_trained_on", severity="warning", params={"rows": trained_on.count}))
    added = recipe.default_system
    if added and any(row.messages[0].content == added for one in every for row in one.rows):
        notes.append(Finding(code="system_text_added", severity="info", params={"text": added[:200]}))
    left_out = {key: Counted.of(chain.from_iterable(one.left_out.get(key, ()) for one in every)) for key in REASONS}
    return DataHealth(
        read=sum(one.read for one in every),
        duplicates=Counted.of(_repeated(chain.from_iterable(one.rows for one in sets))),
        trained_on=trained_on,
        notes=tuple(notes),
        **left_out,
    )


def _read(name: str, recipe: Recipe, *, several: bool) -> Dataset:
    """A data set; its rows bear its name where there are more, and the recipe's system text where they have none."""
    found = read_dataset(name, dataset_dir=recipe.dataset_dir, max_samples=recipe.max_samples, seed=recipe.seed)
    label = f"{Path(name).name}/" if several else ""
    rows = [row.model_copy(update={"id": f"{label}{row.id}"}) for row in found.rows] if label else found.rows
    if recipe.default_system:
        rows = [with_system(row, recipe.default_system) for row in rows]
    left_out = {reason: tuple(f"{label}{one}" for one in ids) for reason, ids in found.left_out.items()}
    return Dataset(found.name, found.files, found.read, rows, left_out, found.findings)


def _repeated(rows: Iterable[Conversation]) -> list[str]:
    """The ids of rows that say what an earlier row of another id said."""
    first: dict[tuple[Message, ...], str] = {}
    return [row.id for row in rows if first.setdefault(row.messages, row.id) != row.id]


def _mixed(sets: Sequence[list[Conversation]], recipe: Recipe) -> list[Conversation]:
    """Several data sets as one, as the recipe mixes them."""
    if len(sets) == 1 or recipe.mix_strategy == "concat":
        return list(chain.from_iterable(sets))
    import datasets

    places = [
        datasets.Dataset.from_dict({"set": [number] * len(rows), "row": list(range(len(rows)))})
        for number, rows in enumerate(sets)
    ]
    try:
        order = datasets.interleave_datasets(
            places,
            probabilities=list(recipe.interleave_probs) if recipe.interleave_probs is not None else None,
            seed=recipe.seed,
            stopping_strategy=_STOPPING[recipe.mix_strategy],
        )
    except (ValueError, NotImplementedError) as error:
        raise RecipeError(
            "The data sets cannot be mixed as the recipe asks.",
            where=f"mix_strategy: {recipe.mix_strategy}",
            found=error,
            next_step="leave mix_strategy out, which puts the data sets one after another",
        ) from error
    return [sets[number][row] for number, row in zip(order["set"], order["row"], strict=True)]


def _data_file(dataset: Dataset) -> DataFile:
    """What a data set was read from: one file's hash, or the hash of several files' or of the hub's rows."""
    name = Path(dataset.name).name
    if len(dataset.files) == 1:
        return DataFile(name=name, sha256=sha256_of(dataset.files[0]), rows=dataset.read)
    digest = hashlib.sha256()
    for file in dataset.files:
        digest.update(f"{sha256_of(file)}  {file.name}\n".encode())
    for row in () if dataset.files else dataset.rows:
        digest.update(row.model_dump_json().encode())
    return DataFile(name=name, sha256=digest.hexdigest(), rows=dataset.read)


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
    tokenizer: Any,
    rows: Sequence[Conversation],
    *,
    recipe: Recipe,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> Examples:
    """Encode rows, cut at the recipe's ``cutoff_len`` tokens, and leave out those of which no answer is left.

    Args:
        tokenizer: with the chat template to train with.
        rows: each with an answer.
        recipe: ``cutoff_len``, ``train_on_prompt`` and ``mask_history`` are read.
        progress: told every few hundred rows.
        cancellation: read between rows.

    Raises:
        DataError: a row cannot be rendered, or no row has an answer left.
        Cancelled: that was asked for.
    """
    examples: list[dict[str, list[int]]] = []
    cut, dropped, passed_over, lengths = [], [], [], []
    encoded = encode_all(tokenizer, rows, train_on_prompt=recipe.train_on_prompt, mask_history=recipe.mask_history)
    for done, (row, one) in enumerate(zip(rows, encoded, strict=True)):
        if cancellation is not None:
            cancellation.check()
        if done % _REPORT_EVERY == 0:
            progress(Progress("encode", done, len(rows), "rows"))
        lengths.append(len(one.input_ids))
        if lengths[-1] > recipe.cutoff_len:
            cut.append(row.id)
        if one.passed_over:
            passed_over.append(row.id)
        example = _example(one.input_ids[: recipe.cutoff_len], one.supervised[: recipe.cutoff_len])
        if example is None:
            dropped.append(row.id)
        else:
            examples.append(example)
    if rows and not examples:
        raise DataError(
            f"No row has an answer within its first {recipe.cutoff_len} tokens, so there is nothing to learn.",
            where="cutoff_len",
            next_step="raise cutoff_len, or shorten the prompts",
        )
    return Examples(
        examples,
        cut_rows=Counted.of(cut),
        dropped_rows=Counted.of(dropped),
        passed_over=Counted.of(passed_over),
        lengths=lengths,
    )


def _example(ids: list[int], supervised: list[bool]) -> dict[str, list[int]] | None:
    """A row with its labels; None where none of its tokens counts."""
    supervised[0] = False  # nothing precedes the first token, so it is never predicted
    if not any(supervised):
        return None
    return {
        "input_ids": ids,
        "labels": [token if counts else IGNORED for token, counts in zip(ids, supervised, strict=True)],
    }


def write_held_out(rows: Sequence[Conversation], path: Path) -> None:
    """Write rows as JSON lines of ``messages``."""
    lines = [json.dumps({"messages": [turn.model_dump() for turn in row.messages]}, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
