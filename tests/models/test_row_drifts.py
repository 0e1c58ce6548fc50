"""row_drifts against PEFT and transformers in float64, a row at a time and without padding."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaForCausalLM

from tests.tiny_models import WINDOW, TinyRun, build_base, edit_json, peft_alone, row
from tunesmith.conversations import Conversation, Text, encode, encode_text
from tunesmith.errors import Cancelled, DataError, PromptError
from tunesmith.models import RowDrift, ScoredRow, VariantSet, row_drifts
from tunesmith.progress import Cancellation, Progress

# float32 logits of size 10 against float64: nats of a token's log-likelihood, and of its KL, which is no larger.
NATS_PER_TOKEN = 2e-5

ROWS = [
    row(0, "hi", "hello there"),
    row(1, "a much longer question than the others, so that it is padded less", "no"),
    row(2, "one", "two", "three 猫", "four"),
    row(3, "?", "a long answer " * 10),
    row(4, "x", "y"),
]


def log_probs(model: LlamaForCausalLM, ids: Sequence[int], places: Sequence[int]) -> NDArray[np.float64]:
    """Of the tokens at these places the log-probabilities of the whole vocabulary, in float64."""
    with torch.no_grad():
        logits = model.double()(input_ids=torch.tensor([list(ids)])).logits[0].numpy()
    chosen = logits[[place - 1 for place in places]]
    chosen = chosen - chosen.max(-1, keepdims=True)
    result: NDArray[np.float64] = chosen - np.log(np.exp(chosen).sum(-1, keepdims=True))
    return result


@pytest.fixture(scope="module")
def oracle(tiny: TinyRun) -> dict[str, LlamaForCausalLM]:
    """Models of their own, by name."""
    return {
        "base": LlamaForCausalLM.from_pretrained(tiny.base, dtype=torch.float32),
        "final": peft_alone(LlamaForCausalLM.from_pretrained(tiny.base, dtype=torch.float32), tiny.adapters["final"]),
    }


def by_hand(oracle: dict[str, LlamaForCausalLM], variants: VariantSet, rows: Sequence[ScoredRow]) -> list[RowDrift]:
    """Base beside adapter by the formulas: Σ p·(log p − log q), and where both are largest."""
    found = []
    for item in rows:
        tokenizer = variants.tokenizer("final")
        encoded = encode(tokenizer, item) if isinstance(item, Conversation) else encode_text(tokenizer, item)
        places = [place for place, counts in enumerate(encoded.supervised) if counts and place > 0]
        p, q = (log_probs(oracle[name], encoded.input_ids, places) for name in ("final", "base"))
        tokens = [encoded.input_ids[place] for place in places]
        kl = (np.exp(p) * (p - q)).sum(-1)
        agreed = int((p.argmax(-1) == q.argmax(-1)).sum())
        likelihoods = [-float(one[range(len(tokens)), tokens].sum()) for one in (p, q)]
        found.append(RowDrift(item.id, likelihoods[0], likelihoods[1], tuple(kl), agreed))
    return found


def close(found: Sequence[RowDrift], expected: Sequence[RowDrift]) -> bool:
    """Equal up to float32's noise, token by token."""
    return [(one.id, one.tokens, one.agreed) for one in found] == [
        (one.id, one.tokens, one.agreed) for one in expected
    ] and all(
        np.allclose(one.kl, other.kl, rtol=0, atol=NATS_PER_TOKEN)
        and abs(one.nll - other.nll) <= NATS_PER_TOKEN * one.tokens
        and abs(one.reference_nll - other.reference_nll) <= NATS_PER_TOKEN * one.tokens
        for one, other in zip(found, expected, strict=True)
    )


def test_drifts_equal_the_formulas_in_float64(variants: VariantSet, oracle: dict[str, LlamaForCausalLM]) -> None:
    """Rows of several lengths, some with more than one answer, and a text of which every token counts."""
    rows: list[ScoredRow] = [*ROWS, Text(id="text", text="every token but the first")]
    expected = by_hand(oracle, variants, rows)
    found = row_drifts(variants, "base", rows, reference="final")
    assert close(found, expected)
    assert all(sum(one.kl) > 0.1 for one in expected), "the two are far apart, or nothing would be shown"
    assert any(0 < one.agreed < one.tokens for one in expected)


@pytest.mark.parametrize("rows_at_once", [1, 2, 5])
def test_neighbours_and_padding_do_not_count(variants: VariantSet, rows_at_once: int) -> None:
    """Whatever the batch's size, and whatever the order of its rows."""
    alone = [row_drifts(variants, "base", [item], reference="final")[0] for item in ROWS]
    assert close(row_drifts(variants, "base", ROWS, reference="final", rows_at_once=rows_at_once), alone)
    turned = row_drifts(variants, "base", ROWS[::-1], reference="final", rows_at_once=rows_at_once)
    assert close(turned, alone[::-1])


def test_a_variant_is_at_no_distance_from_itself(variants: VariantSet) -> None:
    """Exactly; and the adapter merged in float32 is so up to rounding."""
    for one in row_drifts(variants, "final", ROWS, reference="final"):
        assert (sum(one.kl), one.agreed, one.nll) == (0.0, one.tokens, one.reference_nll)
    for one in row_drifts(variants, "merged", ROWS, reference="final"):
        assert max(one.kl) < 1e-9
        assert one.agreed == one.tokens


def test_numbers_that_are_not_finite_are_not_taken_for_nearness(tiny: TinyRun, tmp_path: Path) -> None:
    """A comparison with 0 must not hide them."""
    broken = shutil.copytree(tiny.merged, tmp_path / "broken")
    model = LlamaForCausalLM.from_pretrained(broken, dtype=torch.float32)
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    model.save_pretrained(broken)
    loaded = VariantSet.load(tiny.base, adapters=tiny.adapters, full={"broken": broken}, tokenizer_dir=tiny.base)
    (found,) = row_drifts(loaded, "broken", ROWS[:1], reference="final")
    assert all(np.isnan(one) for one in found.kl)


def test_another_template_or_another_vocabulary_is_refused(tiny: TinyRun, tmp_path: Path) -> None:
    """Tokens that are not the same cannot be compared; the first rows that differ are named."""
    other = shutil.copytree(tiny.merged, tmp_path / "other")
    template = (other / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").write_text(template.replace("<|im_end|>", "<|im_end|> "))
    wide = tmp_path / "wide"
    build_base(wide, vocab_size=300)
    full = {"other": other, "wide": wide}
    loaded = VariantSet.load(tiny.base, adapters=tiny.adapters, full=full, tokenizer_dir=tiny.base)
    with pytest.raises(DataError, match=r"(?s)other tokens than the run.*row-0.*row-4"):
        row_drifts(loaded, "other", ROWS, reference="final")
    with pytest.raises(DataError, match=r"(?s)another number of tokens.*wide.*300"):
        row_drifts(loaded, "wide", ROWS, reference="final")


def test_rows_beyond_either_window_are_refused(tiny: TinyRun, tmp_path: Path) -> None:
    """The model's own window may be the smaller one."""
    short = shutil.copytree(tiny.merged, tmp_path / "short")
    edit_json(short / "config.json", max_position_embeddings=WINDOW // 4)
    loaded = VariantSet.load(tiny.base, adapters=tiny.adapters, full={"short": short}, tokenizer_dir=tiny.base)
    with pytest.raises(PromptError, match=f"(?s)row-3.*at most {WINDOW // 4} tokens"):
        row_drifts(loaded, "short", ROWS, reference="final")


def test_progress_counts_rows_and_cancelling_stops(variants: VariantSet) -> None:
    """Between batches."""
    seen: list[Progress] = []
    cancellation = Cancellation()

    def on_progress(step: Progress) -> None:
        seen.append(step)
        if step.done >= 4:
            cancellation.cancel()

    with pytest.raises(Cancelled):
        row_drifts(
            variants,
            "base",
            ROWS,
            reference="final",
            progress=on_progress,
            cancellation=cancellation,
            rows_at_once=2,
        )
    assert [(step.stage, step.done, step.total, step.detail) for step in seen] == [
        ("drift", 2, 5, "base"),
        ("drift", 4, 5, "base"),
    ]
