"""Level 4: two models' answers and predictions."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny_models import TinyRun, row
from tunesmith.conversations import encode_prompt
from tunesmith.models import Generation, GenerationSettings, Request, VariantSet, generate, token_logits
from tunesmith.progress import Cancellation, Cancelled, no_progress
from tunesmith.record import Finding
from tunesmith.verify.behaviour.check import (
    ADAPTER,
    MAX_NEW_TOKENS,
    MAX_PROMPTS,
    MERGED,
    _estimate_limits,
    _Exchange,
    _judge,
    _largest,
    _Limits,
    _mean_kl,
    check_behaviour,
    tolerated_share,
)
from tunesmith.verify.records import BehaviourRow, Divergence, TensorVerdict

PROMPTS = [row(0, "Who are you?"), row(1, "什么是合并？"), row(2, "a")]


@pytest.fixture(scope="module")
def pair(tiny: TinyRun) -> VariantSet:
    """The base with the live adapter, and PEFT's merge of it."""
    return VariantSet.load(
        tiny.base, adapters={ADAPTER: tiny.adapters["final"]}, full={MERGED: tiny.merged}, tokenizer_dir=tiny.base
    )


def compared(variants: VariantSet, tolerated: float = 1e-3) -> tuple[tuple[BehaviourRow, ...], dict[str, Finding]]:
    """Rows, and findings by code."""
    rows, findings = check_behaviour(
        variants, PROMPTS, tolerated_share=tolerated, progress=no_progress, cancellation=Cancellation()
    )
    return rows, {finding.code: finding for finding in findings}


def test_kl_is_the_naive_float64_formula() -> None:
    """Σ p·ln(p/q), averaged over positions, also for extreme logits."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 7, 50)) * 10
    p, q = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) for logits in (first, second))
    expected = (p * np.log(p / q)).sum(-1).mean()
    assert _mean_kl(torch.tensor(first), torch.tensor(second)) == pytest.approx(expected, rel=1e-12)
    assert _mean_kl(torch.tensor(first), torch.tensor(first)) == 0.0
    assert np.isfinite(_mean_kl(torch.tensor([[1e4, -1e4]]), torch.tensor([[1e4, -1e4 + 1]])))


def test_a_true_merge_answers_as_the_adapter_does(pair: VariantSet) -> None:
    """Same texts, and a KL that is nothing beside what the tuning did."""
    rows, findings = compared(pair)
    assert [line.prompt_id for line in rows] == ["row-0", "row-1", "row-2"]
    assert all(line.same_text and line.first_difference is None and line.top1_agreement == 1 for line in rows)
    assert all(line.mean_kl < 1e-6 * line.base_kl and line.base_kl > 0.01 for line in rows)
    assert all(line.adapter_text == line.merged_text for line in rows)
    assert findings.keys() == {"behaviour_close", "behaviour_limit_estimated", "behaviour_texts"}


def test_a_rows_figures_are_those_of_the_logits_along_the_adapters_answer(pair: VariantSet) -> None:
    """Recomputed from the prompt and the reply, position by position."""
    rows, _ = compared(pair)
    with pair.active(ADAPTER) as (_, tokenizer):
        prompt = encode_prompt(tokenizer, PROMPTS[2].prompt)
    settings = GenerationSettings(greedy=True, max_new_tokens=MAX_NEW_TOKENS)
    (reply,) = generate(pair, [Request(ADAPTER, PROMPTS[2].prompt)], settings)
    answer = reply.token_ids
    assert rows[2].tokens == len(answer)
    ids = [*prompt, *answer]
    keep = slice(len(prompt) - 1, len(ids) - 1)
    adapter, base = (token_logits(pair, name, ids, keep).double() for name in (ADAPTER, "base"))
    expected = (adapter.softmax(-1) * (adapter.log_softmax(-1) - base.log_softmax(-1))).sum(-1).mean()
    assert rows[2].base_kl == pytest.approx(float(expected), rel=1e-9)


def test_identical_models_differ_by_nothing(tiny: TinyRun) -> None:
    """The merged model held against itself under both names, so that the arithmetic is the very same."""
    twins = VariantSet.load(
        tiny.merged, adapters={}, full={ADAPTER: tiny.merged, MERGED: tiny.merged}, tokenizer_dir=tiny.base
    )
    rows, findings = compared(twins)
    assert all(line.mean_kl == line.base_kl == line.max_logit_difference == 0 for line in rows)
    assert findings["behaviour_close"].params["share"] == 0.0


def test_the_base_in_place_of_the_merge_is_far(tiny: TinyRun) -> None:
    """All of the tuning is missing: a share of one."""
    variants = VariantSet.load(
        tiny.base, adapters={ADAPTER: tiny.adapters["final"]}, full={MERGED: tiny.base}, tokenizer_dir=tiny.base
    )
    rows, findings = compared(variants)
    assert findings["behaviour_far"].severity == "error"
    assert findings["behaviour_far"].params["share"] == pytest.approx(1.0, rel=1e-4)
    assert any(line.first_difference is not None for line in rows)


def test_another_template_shows_in_the_prompts_tokens(tiny: TinyRun, tmp_path: Path) -> None:
    """The weights agree, and the same question is another prompt."""
    merged = shutil.copytree(tiny.merged, tmp_path / "merged")
    template = merged / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "assistant "))
    variants = VariantSet.load(
        tiny.base, adapters={ADAPTER: tiny.adapters["final"]}, full={MERGED: merged}, tokenizer_dir=tiny.base
    )
    assert compared(variants)[1]["behaviour_prompt_ids_differ"].severity == "error"


def test_no_more_prompts_are_used_than_said(pair: VariantSet) -> None:
    """Many held-out rows do not make a verification long."""
    many = [row(index, "a") for index in range(MAX_PROMPTS + 3)]
    rows, _ = check_behaviour(pair, many, tolerated_share=0.1, progress=no_progress, cancellation=Cancellation())
    assert len(rows) == MAX_PROMPTS


def test_it_stops_when_it_is_told_to(pair: VariantSet) -> None:
    """Between tokens and prompts."""
    cancellation = Cancellation()
    cancellation.cancel()
    with pytest.raises(Cancelled):
        check_behaviour(pair, PROMPTS, tolerated_share=0.1, progress=no_progress, cancellation=cancellation)


def tensor(delta_norm: float, relative_error: float | None, outside: int = 0) -> TensorVerdict:
    """A measured tensor."""
    counts = {"elements": 100, "exact": 100 - outside, "faithful": 0, "twice_rounded": 0, "unchanged": 0}
    return TensorVerdict(
        name="w", module="m", outside=outside, delta_norm=delta_norm, relative_error=relative_error, **counts
    )


def test_the_tolerated_share_is_four_times_the_squared_relative_error() -> None:
    """Weighted by the squared size of the update."""
    assert tolerated_share([tensor(1.0, 0.2)]) == pytest.approx(0.16)
    assert tolerated_share([tensor(1.0, 0.2), tensor(3.0, 0.4)]) == pytest.approx(4 * (0.04 * 1 + 0.16 * 9) / 10)


def test_the_tolerated_share_leaves_room_for_arithmetic_and_needs_measured_weights() -> None:
    """A thousandth at least; a half where nothing was measured, a tenth where something was wrong."""
    assert tolerated_share([tensor(1.0, 0.0)]) == 1e-3
    assert tolerated_share([]) == tolerated_share([tensor(0.0, None)]) == 0.5
    assert tolerated_share([tensor(1.0, 0.9, outside=1)]) == 0.1


def line(mean_kl: float, base_kl: float, tokens: int = 10) -> BehaviourRow:
    """A row of the comparison."""
    return BehaviourRow(
        prompt_id="p", question="q", tokens=tokens, mean_kl=mean_kl, base_kl=base_kl, max_logit_difference=0.0,
        top1_agreement=1.0, same_text=True, first_difference=None, adapter_text="", merged_text="",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("share", "tolerated", "code"),
    [
        (0.0005, 0.001, "behaviour_close"),
        (0.0020, 0.001, "behaviour_far"),
        (0.0900, 0.300, "behaviour_close"),
        (0.2000, 0.300, "behaviour_rounding_loss"),
        (0.4000, 0.300, "behaviour_far"),
    ],
)
def test_the_judgement_follows_the_limit_and_the_share(share: float, tolerated: float, code: str) -> None:
    """Close, close but with a notable loss to rounding, or far; weighted by tokens."""
    rows = [line(2 * share, 2.0, tokens=10), line(share, 1.0, tokens=30)]
    finding = _judge(rows, _Limits(kl=tolerated * 1.25, margin=0.1), same_ids=True)[0]
    assert finding.code == code
    assert finding.params["share"] == pytest.approx(share)
    assert finding.params["base_kl"] == pytest.approx(1.25)
    assert finding.params["limit"] == pytest.approx(tolerated * 1.25)


@pytest.mark.parametrize(
    ("loading", "sound", "code", "severity"),
    [
        (0.9e-9, True, "behaviour_as_stored", "ok"),
        (1.1e-9, True, "behaviour_read_otherwise", "error"),
        (1.1e-9, False, "behaviour_beyond_rounding", "error"),
    ],
)
def test_what_is_loaded_may_differ_from_the_reference_by_arithmetic_only(
    loading: float, sound: bool, code: str, severity: str
) -> None:
    """Beyond that it is the loader's doing where the files are right, and the numbers' where they are not."""
    limits = _Limits(kl=1.0, margin=0.1, rounding=1e-4, loading=loading, arithmetic=1e-9, sound=sound)
    finding = _judge([line(1e-4, 1.0)], limits, same_ids=True)[1]
    assert (finding.code, finding.severity) == (code, severity)


def parted(margin: float, noise: float) -> BehaviourRow:
    """A row whose texts part."""
    divergence = Divergence(
        adapter_choice="a", merged_choice="b", adapter_probabilities=(0.5, 0.4), merged_probabilities=(0.4, 0.5),
        margin=margin, noise=noise, tie=margin <= noise,
    )  # fmt: skip
    changes = {"same_text": False, "first_difference": 3, "divergence": divergence}
    return line(1e-4, 1.0).model_copy(update=changes)


def test_a_tie_counts_as_no_differing_text_and_a_flip_is_named() -> None:
    """A warning: whether a flip is a fault, the KL decides."""
    rows = [line(1e-4, 1.0), parted(0.01, 0.02), parted(0.5, 0.02).model_copy(update={"prompt_id": "row-7"})]
    limits = _Limits(kl=1.0, margin=0.02)
    texts, flips = _judge(rows, limits, same_ids=True)[2:]
    assert (texts.params["same"], texts.params["ties"], texts.params["total"]) == (1, 1, 3)
    assert (flips.code, flips.severity, dict(flips.params)) == (
        "behaviour_flips",
        "warning",
        {"count": 1, "prompts": "row-7"},
    )
    calm = _judge(rows[:2], limits, same_ids=True)[2:]
    assert [(finding.code, finding.severity) for finding in calm] == [("behaviour_texts", "ok")]


def exchange(ours: tuple[int, ...], theirs: tuple[int, ...], **shifts: list[float]) -> _Exchange:
    """One prompt's answers, with what two variants move the margins by."""
    answers = [Generation("", tokens, len(tokens), None, "length", 0.0, None, None) for tokens in (ours, theirs)]
    measures = {"base_kl": 2.0}
    return _Exchange(row(0, "a"), [9, *ours], *answers, same_prompt=True, measures=measures, shifts=shifts)


def test_the_noise_of_a_margin_is_the_largest_at_positions_where_no_texts_part() -> None:
    """Where they do, the shift is what is being judged."""
    pair = [
        exchange((1, 2, 3), (1, 5), merged=[0.1, 0.9, 0.2], base=[1, 30, 2]),
        exchange((4,), (4,), merged=[0.3], base=[3]),
    ]
    assert _largest(pair, MERGED) == 0.3
    assert _largest([], MERGED) == 0.0


def test_estimated_limits_are_a_share_of_the_effect_and_its_root_for_margins() -> None:
    """A merge that departs a lot must not make ties of its own departures."""
    far = [exchange((1, 2), (1, 2), merged=[5.0, 7.0], base=[3.0, 8.0])]
    near = [exchange((1, 2), (1, 2), merged=[0.5, 0.7], base=[3.0, 8.0])]
    assert (_estimate_limits(far, 0.04).kl, _estimate_limits(far, 0.04).margin) == pytest.approx((0.08, 1.6))
    assert _estimate_limits(near, 0.04).margin == 0.7


def test_texts_after_other_prompts_or_past_an_end_have_no_candidates() -> None:
    """Nothing was chosen there after the same tokens."""
    assert exchange((1, 2), (1, 3)).parting == 1
    assert exchange((1, 2), (1,)).parting is None
    other = exchange((1, 2), (1, 3))
    other.same_prompt = False
    assert other.parting is None


def test_where_texts_part_both_candidates_are_given_with_their_probabilities(tiny: TinyRun) -> None:
    """Those that the two models themselves give after the prompt and the answer up to there."""
    variants = VariantSet.load(
        tiny.base, adapters={ADAPTER: tiny.adapters["final"]}, full={MERGED: tiny.base}, tokenizer_dir=tiny.base
    )
    rows, _ = compared(variants)
    index, row_parted = next((i, each) for i, each in enumerate(rows) if not each.same_text)
    divergence, place = row_parted.divergence, row_parted.first_difference
    assert divergence is not None
    assert place is not None
    settings = GenerationSettings(greedy=True, max_new_tokens=MAX_NEW_TOKENS)
    answers = [
        generate(variants, [Request(name, PROMPTS[index].prompt)], settings)[0].token_ids for name in (ADAPTER, MERGED)
    ]
    with variants.active(ADAPTER) as (_, tokenizer):
        ids = [*encode_prompt(tokenizer, PROMPTS[index].prompt), *answers[0][:place]]
        names = [tokenizer.decode([answer[place]]) for answer in answers]
    pair = [answer[place] for answer in answers]
    for name, found in ((ADAPTER, divergence.adapter_probabilities), (MERGED, divergence.merged_probabilities)):
        expected = token_logits(variants, name, ids, 1)[0].double().softmax(-1)[pair]
        assert found == pytest.approx(expected.tolist(), rel=1e-4)
    assert divergence.adapter_probabilities[0] > divergence.adapter_probabilities[1]
    assert divergence.merged_probabilities[1] > divergence.merged_probabilities[0]
    assert divergence.margin == pytest.approx(np.log(np.divide(*divergence.adapter_probabilities)), rel=1e-4)
    assert [shown for shown in (divergence.adapter_choice, divergence.merged_choice) if "\ufffd" in shown] == []
    assert {name for name in names if "\ufffd" not in name} <= {divergence.adapter_choice, divergence.merged_choice}
