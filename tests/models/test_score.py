"""score and token_logits against the most naive computation."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny_models import WINDOW, build_base, build_tokenizer, row
from tunesmith.conversations import Conversation, encode
from tunesmith.errors import Cancelled, CheckpointError, DataError, PromptError
from tunesmith.models import RowScore, VariantSet, score, token_logits
from tunesmith.progress import Cancellation, Progress

MODULE: Any = sys.modules["tunesmith.models.score"]  # the package's attribute of that name is the function

# float32 logits of size 10, 64 features, 2 layers: errors of about 1e-5 nats a token.
NATS_PER_TOKEN = 1e-4

ROWS = [
    row(0, "hi", "hello there"),
    row(1, "a much longer question than the others, so that it is padded less", "no"),
    row(2, "one", "two", "three 猫", "four"),
    row(3, "?", "a long answer " * 10),
    row(4, "x", "y"),
]


def naive(variants: VariantSet, name: str, conversation: Conversation) -> tuple[float, int]:
    """The oracle: a forward pass for every answer token, and a float64 softmax in numpy."""
    with variants.active(name) as (model, tokenizer):
        encoded = encode(tokenizer, conversation)
        total = 0.0
        for place, (token, supervised) in enumerate(zip(encoded.input_ids, encoded.supervised, strict=True)):
            if supervised:
                logits = model(input_ids=torch.tensor([encoded.input_ids[:place]])).logits[0, -1].double().numpy()
                total -= logits[token] - logits.max() - math.log(np.exp(logits - logits.max()).sum())
    return total, sum(encoded.supervised)


def close(left: list[RowScore], right: list[RowScore]) -> bool:
    """Whether scores are of the same rows and equal up to float32 noise."""
    return [(a.id, a.tokens) for a in left] == [(b.id, b.tokens) for b in right] and all(
        abs(a.nll - b.nll) <= NATS_PER_TOKEN * a.tokens for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("name", ["base", "final", "merged"])
def test_score_equals_a_naive_float64_loop(variants: VariantSet, name: str) -> None:
    """Nats and tokens, end-of-turn tokens included, in the order of the rows."""
    expected = [RowScore(item.id, *naive(variants, name, item)) for item in ROWS]
    assert close(score(variants, name, ROWS), expected)
    assert len({round(item.loss, 3) for item in expected}) == len(ROWS)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_padding_changes_nothing(variants: VariantSet, batch_size: int) -> None:
    """Any batch size, and any order of the rows."""
    one_by_one = [score(variants, "final", [item])[0] for item in ROWS]
    assert close(score(variants, "final", ROWS, batch_size=batch_size), one_by_one)
    assert close(score(variants, "final", ROWS[::-1], batch_size=batch_size), one_by_one[::-1])


def test_a_small_logits_budget_changes_nothing(variants: VariantSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches shrink to one row, and long answers are taken in parts."""
    expected = score(variants, "base", ROWS)
    monkeypatch.setattr(MODULE, "_LOGITS_BUDGET_BYTES", 1)
    monkeypatch.setattr(MODULE, "_POSITIONS_AT_ONCE", 3)
    assert close(score(variants, "base", ROWS), expected)


def test_logits_are_computed_for_answers_only(variants: VariantSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt costs no logits, which would take most of the memory."""
    shapes = []
    original = MODULE._logits

    def spy(*arguments: Any) -> torch.Tensor:
        logits: torch.Tensor = original(*arguments)
        shapes.append(logits.shape[1])
        return logits

    monkeypatch.setattr(MODULE, "_logits", spy)
    score(variants, "base", [row(0, "long " * 40, "yes")])
    assert shapes == [len("yes") + 1]


def test_a_row_without_an_answer_is_refused(variants: VariantSet) -> None:
    """It is named."""
    with pytest.raises(DataError, match="row-7"):
        score(variants, "base", [row(7, "hi")])


def test_rows_longer_than_the_window_are_all_named(variants: VariantSet) -> None:
    """Cut rows would be other rows."""
    rows = [row(0, "x", "y"), row(1, "x" * WINDOW, "y"), row(2, "x", "y" * WINDOW)]
    with pytest.raises(PromptError, match=r"(?s)row-1: .*row-2: .*512"):
        score(variants, "base", rows)


def test_progress_counts_rows_and_cancelling_stops(variants: VariantSet) -> None:
    """Between batches."""
    seen: list[Progress] = []
    cancellation = Cancellation()

    def on_progress(step: Progress) -> None:
        seen.append(step)
        if step.done >= 4:
            cancellation.cancel()

    with pytest.raises(Cancelled):
        score(variants, "base", ROWS, progress=on_progress, cancellation=cancellation, batch_size=2)
    assert [(step.stage, step.done, step.total, step.unit) for step in seen] == [
        ("score", 2, 5, "rows"),
        ("score", 4, 5, "rows"),
    ]
    assert score(variants, "base", []) == []


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    """Rather than an index error out of an embedding."""
    build_base(tmp_path / "base", vocab_size=200)
    variants = VariantSet.load(tmp_path / "base", adapters={}, tokenizer_dir=tmp_path / "base")
    with pytest.raises(CheckpointError, match="no embedding"):
        score(variants, "base", [row(0, "猫", "猫")])


@pytest.mark.parametrize(
    ("keep", "places"), [(3, slice(-3, None)), (99, slice(None)), (0, slice(0, 0)), (slice(2, -1), slice(2, -1))]
)
def test_token_logits_are_the_models_own(variants: VariantSet, keep: int | slice, places: slice) -> None:
    """Of the positions that were asked for, in float32."""
    ids = encode(build_tokenizer(), row(0, "hi", "yes")).input_ids
    logits = token_logits(variants, "final", ids, keep)
    with variants.active("final") as (model, _):
        expected = model(input_ids=torch.tensor([ids])).logits[0, places]
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_token_logits_of_too_long_a_sequence_are_refused(variants: VariantSet) -> None:
    """The window is named."""
    with pytest.raises(PromptError, match="512"):
        token_logits(variants, "base", [1] * (WINDOW + 1), 1)
