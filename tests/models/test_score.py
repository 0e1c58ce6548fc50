"""score and token_logits against the most naive computation."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.tiny_models import WINDOW, build_base, build_tokenizer, row
from tunesmith.conversations import Conversation, Text, encode
from tunesmith.errors import Cancelled, CheckpointError, DataError, PromptError
from tunesmith.models import RowScore, ScoredRow, VariantSet, score, token_logits
from tunesmith.progress import Cancellation, Progress

MODULE: Any = sys.modules["tunesmith.models.score"]  # the package's attribute of that name is the function

# float32 logits of size 10, 64 features, 2 layers.
NATS_PER_TOKEN = 1e-5

ROWS = [
    row(0, "hi", "hello there"),
    row(1, "a much longer question than the others, so that it is padded less", "no"),
    row(2, "one", "two", "three 猫", "four"),
    row(3, "?", "a long answer " * 10),
    row(4, "x", "y"),
]


def ask(variants: VariantSet, name: str, rows: Sequence[ScoredRow], **changes: Any) -> list[RowScore]:
    """Every row under one variant."""
    return score(variants, [name], rows, **changes)[name]


def naive_logits(variants: VariantSet, name: str, conversation: Conversation) -> list[tuple[int, NDArray[np.float64]]]:
    """The oracle: a forward pass for every answer token, as float64."""
    with variants.active(name) as (model, tokenizer):
        encoded = encode(tokenizer, conversation)
        return [
            (token, model(input_ids=torch.tensor([encoded.input_ids[:place]])).logits[0, -1].double().numpy())
            for place, (token, supervised) in enumerate(zip(encoded.input_ids, encoded.supervised, strict=True))
            if supervised
        ]


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """In float64."""
    shifted = logits - logits.max()
    result: NDArray[np.float64] = shifted - math.log(np.exp(shifted).sum())
    return result


def naive(variants: VariantSet, name: str, conversation: Conversation) -> RowScore:
    """The oracle's score."""
    found = naive_logits(variants, name, conversation)
    log_probs = tuple(float(log_softmax(logits)[token]) for token, logits in found)
    return RowScore(conversation.id, log_probs, sum(int(logits.argmax()) == token for token, logits in found))


def close(left: list[RowScore], right: list[RowScore]) -> bool:
    """Whether scores are of the same rows and equal up to float32 noise, token by token."""
    return [(a.id, a.tokens, a.correct) for a in left] == [(b.id, b.tokens, b.correct) for b in right] and all(
        abs(x - y) <= NATS_PER_TOKEN
        for a, b in zip(left, right, strict=True)
        for x, y in zip(a.log_probs, b.log_probs, strict=True)
    )


@pytest.mark.parametrize("name", ["base", "final", "merged"])
def test_score_equals_a_naive_float64_loop(variants: VariantSet, name: str) -> None:
    """Nats and tokens, end-of-turn tokens included, in the order of the rows."""
    expected = [naive(variants, name, item) for item in ROWS]
    assert close(ask(variants, name, ROWS), expected)
    assert len({round(item.loss, 3) for item in expected}) == len(ROWS)


@pytest.mark.parametrize("rows_at_once", [1, 2, 5])
def test_padding_changes_nothing(variants: VariantSet, rows_at_once: int) -> None:
    """Any batch size, and any order of the rows."""
    one_by_one = [ask(variants, "final", [item])[0] for item in ROWS]
    assert close(ask(variants, "final", ROWS, rows_at_once=rows_at_once), one_by_one)
    assert close(ask(variants, "final", ROWS[::-1], rows_at_once=rows_at_once), one_by_one[::-1])


def test_a_small_logits_budget_changes_nothing(variants: VariantSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches shrink to one row, and long answers are taken in parts."""
    expected = ask(variants, "base", ROWS)
    monkeypatch.setattr(MODULE, "_LOGITS_BUDGET_BYTES", 1)
    monkeypatch.setattr(MODULE, "_POSITIONS_AT_ONCE", 3)
    assert close(ask(variants, "base", ROWS), expected)


def test_logits_are_computed_for_answers_only(variants: VariantSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt costs no logits, which would take most of the memory."""
    shapes = []
    original = MODULE._logits

    def spy(*arguments: Any) -> torch.Tensor:
        logits: torch.Tensor = original(*arguments)
        shapes.append(logits.shape[1])
        return logits

    monkeypatch.setattr(MODULE, "_logits", spy)
    ask(variants, "base", [row(0, "long " * 40, "yes")])
    assert shapes == [len("yes") + 1]


def test_a_row_without_an_answer_is_refused(variants: VariantSet) -> None:
    """It is named."""
    with pytest.raises(DataError, match="row-7"):
        ask(variants, "base", [row(7, "hi")])


def test_rows_longer_than_the_window_are_all_named(variants: VariantSet) -> None:
    """Cut rows would be other rows."""
    rows = [row(0, "x", "y"), row(1, "x" * WINDOW, "y"), row(2, "x", "y" * WINDOW)]
    with pytest.raises(PromptError, match=r"(?s)row-1: .*row-2: .*512"):
        ask(variants, "base", rows)


def test_progress_counts_rows_and_cancelling_stops(variants: VariantSet) -> None:
    """Between batches."""
    seen: list[Progress] = []
    cancellation = Cancellation()

    def on_progress(step: Progress) -> None:
        seen.append(step)
        if step.done >= 4:
            cancellation.cancel()

    with pytest.raises(Cancelled):
        ask(variants, "base", ROWS, progress=on_progress, cancellation=cancellation, rows_at_once=2)
    assert [(step.stage, step.done, step.total, step.unit) for step in seen] == [
        ("score", 2, 5, "rows"),
        ("score", 4, 5, "rows"),
    ]
    assert ask(variants, "base", []) == []


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    """Rather than an index error out of an embedding."""
    build_base(tmp_path / "base", vocab_size=200)
    variants = VariantSet.load(tmp_path / "base", adapters={}, tokenizer_dir=tmp_path / "base")
    with pytest.raises(CheckpointError, match="no embedding"):
        ask(variants, "base", [row(0, "猫", "猫")])


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


# ---------------------------------------------------------------------------------------------------------------------
# several variants at once


@pytest.mark.parametrize("reference", ["base", "final", "merged"])
def test_kl_is_measured_against_the_reference_token_by_token(variants: VariantSet, reference: str) -> None:
    """Adapters, base and a model with weights of its own, whichever of them the others are held against."""
    names, rows = ["final", "base", "merged", "checkpoint-10"], ROWS[:3]
    found = score(variants, names, rows, reference=reference)
    assert list(found) == names
    oracle = {
        name: [np.array([log_softmax(logits) for _, logits in naive_logits(variants, name, one)]) for one in rows]
        for name in names
    }
    for name in names:
        for place, item in enumerate(found[name]):
            p, q = oracle[reference][place], oracle[name][place]
            if name == reference:
                assert item.kl is None
            else:
                assert item.kl == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), abs=1e-5, rel=1e-5)
        assert close(found[name], ask(variants, name, rows))
    assert all(item.kl is None for scores in score(variants, names, rows).values() for item in scores)


def test_every_row_of_every_variant_is_told_once(variants: VariantSet) -> None:
    """With the score that is returned, also where the reference is computed again beside another model."""
    told: list[tuple[str, int, RowScore]] = []
    found = score(
        variants,
        ["merged", "base", "final"],
        ROWS,
        reference="merged",
        on_done=lambda name, index, item: told.append((name, index, item)),
    )
    assert len(told) == len({(name, index) for name, index, _ in told}) == 3 * len(ROWS)
    assert all(found[name][index] == item for name, index, item in told)


def test_a_reference_that_is_not_scored_is_refused(variants: VariantSet) -> None:
    """Those that are, are named."""
    with pytest.raises(DataError, match="final"):
        score(variants, ["final"], ROWS, reference="base")


def test_a_text_is_scored_from_its_second_token_on(variants: VariantSet) -> None:
    """All of it, beside conversations, each in its place."""
    text = Text(id="text", text="plain 猫")
    found = ask(variants, "final", [ROWS[0], text, ROWS[1]])
    with variants.active("final") as (model, tokenizer):
        ids = tokenizer(text.text)["input_ids"]
        log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    expected = [float(log_p[place - 1, token]) for place, token in enumerate(ids) if place]
    assert [item.id for item in found] == ["row-0", "text", "row-1"]
    np.testing.assert_allclose(found[1].log_probs, expected, rtol=0, atol=NATS_PER_TOKEN)
    assert found[1].loss == pytest.approx(-sum(expected) / len(expected), abs=NATS_PER_TOKEN)
