"""Marks of replies, filters by them, and the table for spreadsheets."""

from __future__ import annotations

import csv
import io

import pytest

from tests.tiny_models import row
from tunesmith.compare import Comparison, Reply, RowLoss, VariantInfo, filtered, marks_of, to_csv
from tunesmith.errors import DataError
from tunesmith.models import Capabilities, GenerationSettings


def comparison(*, losses: bool = True, variants: tuple[str, ...] = ("final", "base")) -> Comparison:
    """Four prompts: the same, another, cut, and without an expected answer."""
    texts = {
        "row-0": {"base": "the same", "final": "the same"},
        "row-1": {"base": "what was expected", "final": 'nonsense, "quoted"\nin two lines'},
        "row-2": {"base": "long", "final": "long and cut"},
        "row-3": {"base": "=1+1", "final": "二"},
    }
    nll = {
        "row-0": {"base": 4.0, "final": 2.0},
        "row-1": {"base": 2.0, "final": 5.0},
        "row-2": {"base": 1.0, "final": 1.0},
    }
    return Comparison(
        run="run",
        variants=tuple(VariantInfo(name=name, kind="adapter", path="/") for name in variants),
        prompts=(row(0, "a", "the same"), row(1, "b", "what was expected"), row(2, "c", "long"), row(3, "d")),
        replies=tuple(
            Reply(
                prompt_id=prompt,
                variant=name,
                text=texts[prompt].get(name, "x"),
                tokens=3,
                stop_reason="length" if (prompt, name) == ("row-2", "final") else "eos",
            )
            for prompt in texts
            for name in variants
        ),
        row_losses=tuple(
            RowLoss(row_id=prompt, variant=name, nll=each[name], tokens=2)
            for prompt, each in nll.items()
            for name in variants
            if name in each
        )
        if losses
        else (),
        settings=GenerationSettings(greedy=True),
        engine=Capabilities(kind="local", where="cpu", dtype="float32"),
    )


def test_marks_are_against_the_base_wherever_it_stands() -> None:
    """By the likelihood of the expected answer, where it was scored."""
    marks = marks_of(comparison())
    shown = {
        prompt: [name for name in ("different", "truncated", "regressed") if getattr(marks[prompt, "final"], name)]
        for prompt in ("row-0", "row-1", "row-2", "row-3")
    }
    assert shown == {
        "row-0": [],
        "row-1": ["different", "regressed"],
        "row-2": ["different", "truncated"],
        "row-3": ["different"],
    }
    assert not any(mark for (_, name), one in marks.items() if name == "base" for _, mark in one)


def test_without_scores_a_reply_further_from_the_expected_one_has_regressed() -> None:
    """By chrF of the texts."""
    marks = marks_of(comparison(losses=False))
    assert [marks[f"row-{i}", "final"].regressed for i in range(4)] == [False, True, True, False]


def test_without_the_base_the_first_variant_is_the_reference() -> None:
    """Two checkpoints can be held against each other."""
    marks = marks_of(comparison(variants=("final", "other")))
    assert not any(marks[f"row-{i}", "final"].different for i in range(4))
    assert all(marks[f"row-{i}", "other"].different for i in range(4))


@pytest.mark.parametrize(
    ("wanted", "rows"),
    [
        (["different"], ["row-1", "row-2", "row-3"]),
        (["truncated"], ["row-2"]),
        (["regressed"], ["row-1"]),
        (["truncated", "regressed"], ["row-1", "row-2"]),
    ],
)
def test_a_filter_keeps_the_prompts_that_bear_a_mark(wanted: list[str], rows: list[str]) -> None:
    """All their replies stay, so that they can be compared; the scores are of all rows still."""
    kept = filtered(comparison(), wanted)
    assert [prompt.id for prompt in kept.prompts] == rows
    assert {reply.prompt_id for reply in kept.replies} == set(rows)
    assert len(kept.replies) == 2 * len(rows)
    assert kept.row_losses == comparison().row_losses


def test_an_unknown_filter_is_refused_with_the_known_ones() -> None:
    """A typing mistake would otherwise show nothing."""
    with pytest.raises(DataError, match="different, truncated, regressed"):
        filtered(comparison(), ["shorter"])


def test_the_table_reads_back_cell_by_cell() -> None:
    """Quotes, line breaks, Chinese and what looks like a formula stay what they are."""
    rows = list(csv.DictReader(io.StringIO(to_csv(comparison()), newline="")))
    assert len(rows) == 8
    cell = next(one for one in rows if (one["prompt_id"], one["variant"]) == ("row-1", "final"))
    assert cell["reply"] == 'nonsense, "quoted"\nin two lines'
    assert (cell["question"], cell["expected"], cell["stop_reason"]) == ("b", "what was expected", "eos")
    assert float(cell["loss"]) == 2.5
    assert (cell["different"], cell["truncated"], cell["regressed"]) == ("1", "0", "1")
    assert next(one["reply"] for one in rows if one["prompt_id"] == "row-3") == "二"
