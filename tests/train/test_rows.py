"""Rows: what is held out is never trained on, and what is cut or dropped is counted."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tunesmith.conversations import Conversation, Message, chat_template_of, read_conversations
from tunesmith.errors import Cancelled, DataError, RecipeError
from tunesmith.progress import Cancellation, Progress
from tunesmith.train.rows import IGNORED, Counted, encode_rows, read_rows, split, write_held_out

from .conftest import RecipeMaker


def row(number: int, answer: str = "yes") -> Conversation:
    """A row with an answer."""
    turns = (Message(role="user", content=f"q{number}"), Message(role="assistant", content=answer))
    return Conversation(id=f"row-{number}", messages=turns)


@pytest.fixture(scope="module")
def tokenizer(base_dir: Path) -> Any:
    """The tiny base's."""
    return AutoTokenizer.from_pretrained(base_dir)


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


def write(path: Path, *rows: Any) -> str:
    """Write rows as JSON lines; the file's path."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def asked(*numbers: int, answer: str = "yes") -> list[dict[str, str]]:
    """Alpaca rows."""
    return [{"instruction": f"q{number}", "output": answer} for number in numbers]


def test_rows_that_cannot_be_trained_on_are_left_out_counted_and_named(recipe_for: RecipeMaker, tmp_path: Path) -> None:
    """No answer, roles out of turn, tools, images; the others are trained on, and a copy is only counted."""
    turns = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "q"}]
    more = {"messages": turns[::-1]}
    rows = [*asked(1, 2), {"instruction": "b"}, {"messages": turns}, more | {"tools": [1]}, more | {"images": ["1"]}]
    found = read_rows(recipe_for(dataset=write(tmp_path / "a.jsonl", *rows, *asked(2), *asked(3, answer=" \n"))))
    assert [turn.question for turn in found.train] == ["q1", "q2", "q2"]
    health = found.health
    assert (health.read, health.no_answer) == (8, Counted(count=2, ids=("row-2", "row-7")))
    assert (health.wrong_order.ids, health.tools.ids, health.media.ids) == (("row-3",), ("row-4",), ("row-5",))
    assert health.duplicates == Counted(count=1, ids=("row-6",))
    codes = [finding.code for finding in health.findings]
    assert codes == ["rows_no_answer", "rows_wrong_order", "rows_tools", "rows_media", "rows_duplicate"]
    assert health.findings[0].params == {"count": 2, "rows": 8, "listed": "row-2, row-7"}


def test_a_data_set_without_a_fit_row_is_refused(recipe_for: RecipeMaker, tmp_path: Path) -> None:
    """There is nothing to learn."""
    with pytest.raises(DataError, match="None of 2 rows"):
        read_rows(recipe_for(dataset=write(tmp_path / "a.jsonl", {"instruction": "b"}, "c")))


def test_ten_of_many_rows_are_named() -> None:
    """And the rest are counted."""
    counted = Counted.of(f"row-{number}" for number in range(25))
    assert (counted.count, counted.ids[-1]) == (25, "row-9")
    both = counted + counted
    assert (both.count, len(both.ids)) == (50, 10)


def test_held_out_rows_that_are_trained_on_are_left_out(recipe_for: RecipeMaker, tmp_path: Path) -> None:
    """They would flatter the result; training keeps them."""
    train, held_out = write(tmp_path / "a.jsonl", *asked(1, 2, 3)), write(tmp_path / "b.jsonl", *asked(3, 4, 1))
    rows = read_rows(recipe_for(dataset=train, eval_dataset=held_out))
    assert ([turn.question for turn in rows.held_out], len(rows.train)) == (["q4"], 3)
    assert rows.health.trained_on == Counted(count=2, ids=("b.jsonl/row-0", "b.jsonl/row-2"))
    assert [finding.code for finding in rows.health.findings] == ["rows_trained_on"]


def test_held_out_rows_that_are_all_trained_on_are_none(recipe_for: RecipeMaker, tmp_path: Path) -> None:
    """Training goes on without them, and says so."""
    train, held_out = write(tmp_path / "a.jsonl", *asked(1, 2, 3)), write(tmp_path / "b.jsonl", *asked(3, 1))
    rows = read_rows(recipe_for(dataset=train, eval_dataset=held_out))
    assert (rows.held_out, len(rows.train)) == ([], 3)
    assert [finding.code for finding in rows.health.findings] == ["rows_trained_on", "held_out_all_trained_on"]


def test_data_sets_are_read_by_name_and_put_one_after_another(recipe_for: RecipeMaker, tmp_path: Path) -> None:
    """Each with its file, its hash and its rows, which bear its name; ``max_samples`` is for each of them."""
    write(tmp_path / "one.jsonl", *asked(1, 2, 3))
    write(tmp_path / "two.jsonl", *asked(4, 5, 6))
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({name: {"file_name": f"{name}.jsonl"} for name in ("one", "two")})
    )
    rows = read_rows(recipe_for(dataset="two,one", dataset_dir=str(tmp_path), max_samples=2))
    assert [(turn.id, turn.question) for turn in rows.train] == [
        ("two/row-0", "q4"),
        ("two/row-1", "q5"),
        ("one/row-0", "q1"),
        ("one/row-1", "q2"),
    ]
    assert [(file.name, file.rows) for file in rows.dataset] == [("two", 2), ("one", 2)]
    assert rows.dataset[0].sha256 == hashlib.sha256((tmp_path / "two.jsonl").read_bytes()).hexdigest()


MIXED = {
    "interleave_under": ["a0", "b0", "a1", "b1"],
    "interleave_over": ["a0", "b0", "a1", "b1", "a2", "b0", "a3", "b1"],
    "interleave_once": ["a0", "b0", "a1", "b1", "a2", "a3"],
}


@pytest.mark.parametrize("strategy", MIXED)
def test_data_sets_are_mixed_as_the_recipe_asks(recipe_for: RecipeMaker, tmp_path: Path, strategy: str) -> None:
    """In turn until the shortest, or the longest, is at its end; copies that this makes are no duplicates."""
    names = [
        write(
            tmp_path / f"{name}.jsonl",
            *({"instruction": f"{name}{number}", "output": "yes"} for number in range(count)),
        )
        for name, count in (("a", 4), ("b", 2))
    ]
    rows = read_rows(recipe_for(dataset=names, mix_strategy=strategy))
    assert [turn.question for turn in rows.train] == MIXED[strategy]
    assert rows.health.duplicates.count == 0


def test_rows_are_drawn_by_probability_and_seed(recipe_for: RecipeMaker, tmp_path: Path) -> None:
    """As the datasets library draws them; the seed is the recipe's."""
    names = [
        write(tmp_path / f"{name}.jsonl", *asked(*range(start, start + 20))) for name, start in (("a", 0), ("b", 100))
    ]

    def drawn(seed: int) -> list[str]:
        changes = {"mix_strategy": "interleave_under", "interleave_probs": [0.9, 0.1], "seed": seed}
        return [turn.question for turn in read_rows(recipe_for(dataset=names, **changes)).train]

    assert drawn(1) == drawn(1) != drawn(2)
    assert sum(len(question) < 4 for question in drawn(1)) > 12


def test_a_system_text_is_given_to_rows_that_have_none(recipe_for: RecipeMaker, tmp_path: Path) -> None:
    """To held-out ones too, so that they are asked as the others; it is said, as chats elsewhere must give it too."""
    rows = [asked(1)[0] | {"system": "mine"}, *asked(2, 3, 4)]
    found = read_rows(recipe_for(dataset=write(tmp_path / "a.jsonl", *rows), default_system="Be brief.", val_size=2))
    texts = {turn.question: turn.messages[0].content for turn in (*found.train, *found.held_out)}
    assert texts == {"q1": "mine", "q2": "Be brief.", "q3": "Be brief.", "q4": "Be brief."}
    assert [finding.code for finding in found.health.findings] == ["system_text_added"]


def test_eval_dataset_is_held_out_whole(recipe_for: RecipeMaker, tmp_path: Path) -> None:
    """Its rows come from its own file, and that file is recorded."""
    path = tmp_path / "eval.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n', encoding="utf-8")
    rows = read_rows(recipe_for(eval_dataset=str(path)))
    assert [turn.answer for turn in rows.held_out] == ["b"]
    assert [(file.name, file.rows) for file in rows.eval_dataset] == [("eval.jsonl", 1)]
    assert len(rows.train) == 24


def test_long_rows_are_cut_and_counted(tokenizer: Any, recipe_for: RecipeMaker) -> None:
    """What is beyond the limit is lost, and said to be; how long they were is kept."""
    rows = [row(1), row(2, "a very long answer " * 20)]
    encoded = encode_rows(tokenizer, rows, recipe=recipe_for(cutoff_len=40))
    assert (encoded.cut, encoded.dropped, encoded.cut_rows.ids) == (1, 0, ("row-2",))
    assert [len(example["input_ids"]) for example in encoded.examples][1] == 40
    assert encoded.lengths[0] == len(encoded.examples[0]["input_ids"])
    assert encoded.lengths[1] > 40


def test_rows_that_lose_their_answer_are_dropped_and_counted(tokenizer: Any, recipe_for: RecipeMaker) -> None:
    """A row of which only the prompt fits teaches nothing."""
    long = Conversation(
        id="row-1",
        messages=(Message(role="user", content="why " * 99), Message(role="assistant", content="so")),
    )
    recipe = recipe_for(cutoff_len=32)
    encoded = encode_rows(tokenizer, [row(0), long], recipe=recipe)
    assert (encoded.cut, encoded.dropped, len(encoded.examples)) == (1, 1, 1)
    with pytest.raises(DataError, match="nothing to learn"):
        encode_rows(tokenizer, [long], recipe=recipe)
    health = read_rows(recipe_for()).health.with_encoded(encoded, encoded)
    assert health.cut == health.dropped == Counted(count=2, ids=("row-1", "row-1"))
    assert [finding.code for finding in health.findings] == ["rows_duplicate", "rows_cut", "rows_dropped"]


def supervised(tokenizer: Any, example: dict[str, list[int]]) -> str:
    """What counts in the loss, as the model is shown it: a label is its own token."""
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (IGNORED, token)
    return str(tokenizer.decode([label for label in example["labels"] if label != IGNORED]))


def test_supervised_tokens_are_the_answers_with_their_end(tokenizer: Any, recipe_for: RecipeMaker) -> None:
    """The count in the manifest is the count in the loss."""
    encoded = encode_rows(tokenizer, [row(0, "no"), row(1, "yes")], recipe=recipe_for())
    answers = tokenizer("no<|im_end|>yes<|im_end|>", add_special_tokens=False)["input_ids"]
    assert encoded.supervised_tokens == len(answers)
    assert [label for example in encoded.examples for label in example["labels"] if label != IGNORED] == answers


def test_the_recipe_says_what_counts(tokenizer: Any, recipe_for: RecipeMaker) -> None:
    """Answers; the last one alone; or all but the first token, which nothing predicts."""
    turns = [Message(role=("user", "assistant")[place % 2], content=f"t{place}") for place in range(4)]
    talk = [Conversation(id="row-0", messages=tuple(turns))]

    def counted(**changes: bool) -> str:
        return supervised(tokenizer, encode_rows(tokenizer, talk, recipe=recipe_for(**changes)).examples[0])

    assert counted() == "t1<|im_end|>t3<|im_end|>"
    assert counted(mask_history=True) == "t3<|im_end|>"
    shown = tokenizer.apply_chat_template([turn.model_dump() for turn in turns], tokenize=False)
    assert counted(train_on_prompt=True) == shown.removeprefix("<|im_start|>")


def test_answers_that_a_template_shows_otherwise_as_history_are_counted(
    tokenizer: Any, recipe_for: RecipeMaker
) -> None:
    """The row teaches its last answer."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = chat_template_of("qwen3", tokenizer)
    turns = tuple(Message(role=("user", "assistant")[place % 2], content=f"t{place}") for place in range(4))
    encoded = encode_rows(other, [row(0), Conversation(id="row-1", messages=turns)], recipe=recipe_for())
    assert encoded.passed_over == Counted(count=1, ids=("row-1",))
    assert supervised(other, encoded.examples[1]) == "<think>\n\n</think>\n\nt3<|im_end|>"


def test_encoding_stops_on_request_and_says_where_it_is(tokenizer: Any, recipe_for: RecipeMaker) -> None:
    """A large file can be abandoned before training begins."""
    cancellation, seen = Cancellation(), list[Progress]()

    def progress(event: Progress) -> None:
        seen.append(event)
        if event.done:
            cancellation.cancel()

    with pytest.raises(Cancelled):
        encode_rows(tokenizer, [row(0)] * 600, recipe=recipe_for(), progress=progress, cancellation=cancellation)
    assert [(event.stage, event.done, event.total, event.unit) for event in seen] == [
        ("encode", 0, 600, "rows"),
        ("encode", 256, 600, "rows"),
    ]


def test_held_out_rows_can_be_read_back(tmp_path: Path) -> None:
    """They are written in a format of our own readers."""
    rows = [row(0, "ja"), row(1, "是")]
    write_held_out(rows, tmp_path / "held_out.jsonl")
    assert read_conversations(tmp_path / "held_out.jsonl") == rows
    assert json.loads((tmp_path / "held_out.jsonl").read_text(encoding="utf-8").splitlines()[0]).keys() == {"messages"}
