"""Rows: what is held out is never trained on, and what is cut or dropped is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.conversations import Conversation, Message, read_conversations
from tunesmith.errors import Cancelled, DataError, RecipeError
from tunesmith.progress import Cancellation
from tunesmith.train.fit import load_tokenizer
from tunesmith.train.rows import IGNORED, encode_rows, read_rows, split, write_held_out

from .conftest import RecipeMaker


def row(number: int, answer: str = "yes") -> Conversation:
    """A row with an answer."""
    turns = (Message(role="user", content=f"q{number}"), Message(role="assistant", content=answer))
    return Conversation(id=f"row-{number}", messages=turns)


@pytest.fixture(scope="module")
def tokenizer(base_dir: Path) -> Any:
    """The tiny base's."""
    return load_tokenizer(base_dir)


@pytest.mark.parametrize(("val_size", "held_out"), [(0, 0), (0.1, 2), (0.25, 5), (1, 1), (7, 7)])
def test_split_holds_out_a_share_or_a_number(val_size: float, held_out: int) -> None:
    """Below one a share, rounded up; from one on a number."""
    train, held = split([row(number) for number in range(20)], val_size=val_size, seed=1)
    assert (len(train), len(held)) == (20 - held_out, held_out)


def test_split_keeps_the_order_and_follows_the_seed() -> None:
    """One seed, one split; another seed, another."""
    rows = [row(number) for number in range(40)]
    first, again, other = (split(rows, val_size=10, seed=seed)[1] for seed in (1, 1, 2))
    assert first == again != other
    assert first == sorted(first, key=rows.index)


def test_rows_of_one_text_stay_on_one_side_of_the_split() -> None:
    """A copy of a held-out row in the training rows would flatter the result."""
    rows = [row(number % 5) for number in range(20)]
    for seed in range(10):
        train, held_out = split(rows, val_size=3, seed=seed)
        assert {turn.messages for turn in train}.isdisjoint(turn.messages for turn in held_out)
        assert len(held_out) == 4


def test_split_that_leaves_nothing_to_train_on_is_refused() -> None:
    """All rows held out is a mistake."""
    with pytest.raises(RecipeError, match="none to train on"):
        split([row(number) for number in range(4)], val_size=4, seed=1)


def test_rows_without_an_answer_are_all_named(recipe_for: RecipeMaker, tmp_path: Path) -> None:
    """There is nothing to learn from them, and dropping them in silence would hide a mistake."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"instruction": "a"}\n{"instruction": "b", "output": "c"}\n"d"\n', encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_rows(recipe_for(dataset=path))
    assert caught.value.details == ("row-0", "row-2")


def test_eval_dataset_is_held_out_whole(recipe_for: RecipeMaker, tmp_path: Path) -> None:
    """Its rows come from its own file, and that file is recorded."""
    path = tmp_path / "eval.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n', encoding="utf-8")
    rows = read_rows(recipe_for(eval_dataset=path))
    assert [turn.answer for turn in rows.held_out] == ["b"]
    assert rows.eval_dataset is not None
    assert (rows.eval_dataset.name, rows.eval_dataset.rows, len(rows.train)) == ("eval.jsonl", 1, 24)


def test_long_rows_are_cut_and_counted(tokenizer: Any) -> None:
    """What is beyond the limit is lost, and said to be."""
    rows = [row(1), row(2, "a very long answer " * 20)]
    encoded = encode_rows(tokenizer, rows, cutoff_len=40)
    assert (encoded.cut, encoded.dropped) == (1, 0)
    assert [len(example["input_ids"]) for example in encoded.examples][1] == 40


def test_rows_that_lose_their_answer_are_dropped_and_counted(tokenizer: Any) -> None:
    """A row of which only the prompt fits teaches nothing."""
    long = Conversation(
        id="row-1",
        messages=(Message(role="user", content="why " * 99), Message(role="assistant", content="so")),
    )
    encoded = encode_rows(tokenizer, [row(0), long], cutoff_len=32)
    assert (encoded.cut, encoded.dropped, len(encoded.examples)) == (1, 1, 1)
    with pytest.raises(DataError, match="nothing to learn"):
        encode_rows(tokenizer, [long], cutoff_len=32)


def test_supervised_tokens_are_the_answers_with_their_end(tokenizer: Any) -> None:
    """The count in the manifest is the count in the loss."""
    encoded = encode_rows(tokenizer, [row(0, "no"), row(1, "yes")], cutoff_len=99)
    answers = tokenizer("no<|im_end|>yes<|im_end|>", add_special_tokens=False)["input_ids"]
    assert encoded.supervised_tokens == len(answers)
    assert [label for example in encoded.examples for label in example["labels"] if label != IGNORED] == answers


def test_encoding_stops_on_request(tokenizer: Any) -> None:
    """A large file can be abandoned before training begins."""
    cancellation = Cancellation()
    cancellation.cancel()
    with pytest.raises(Cancelled):
        encode_rows(tokenizer, [row(0)], cutoff_len=99, cancellation=cancellation)


def test_held_out_rows_can_be_read_back(tmp_path: Path) -> None:
    """They are written in a format of our own readers."""
    rows = [row(0, "ja"), row(1, "是")]
    write_held_out(rows, tmp_path / "held_out.jsonl")
    assert read_conversations(tmp_path / "held_out.jsonl") == rows
    assert json.loads((tmp_path / "held_out.jsonl").read_text(encoding="utf-8").splitlines()[0]).keys() == {"messages"}
