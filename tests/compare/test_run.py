"""compare: every prompt and variant, and differences that are paired."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_models import TinyRun, chat, row
from tunesmith.compare import Comparison, VariantInfo, compare, summarize
from tunesmith.compare.intervals import ratio_estimate
from tunesmith.conversations import Conversation
from tunesmith.errors import Cancelled, DataError
from tunesmith.models import GenerationSettings, LocalEngine, Request, RowScore, VariantSet, generate, score
from tunesmith.progress import Cancellation, Progress

SETTINGS = GenerationSettings(greedy=True, max_new_tokens=8)
PROMPTS = [row(0, "hi"), row(1, "hello", "what was expected"), row(2, "one", "two", "three")]
ROWS = [row(i, f"question {i}", f"the answer {i * i}") for i in range(6)]


def infos(variants: VariantSet, *names: str) -> list[VariantInfo]:
    """What the caller knows of the variants."""
    return [VariantInfo(**variants.variant(name).model_dump()) for name in names]


def run(variants: VariantSet, *names: str, rows: list[Conversation] | None = None) -> Comparison:
    """Compare over the prompts above."""
    return compare(
        LocalEngine(variants),
        infos(variants, *names),
        PROMPTS,
        run_name="run",
        settings=SETTINGS,
        scored_rows=rows or [],
    )


def test_there_is_one_reply_for_every_prompt_and_variant(variants: VariantSet) -> None:
    """Each is what that variant generates by itself."""
    names = ["final", "base", "merged"]
    comparison = run(variants, *names)
    assert len(comparison.replies) == len(PROMPTS) * len(names)
    for name in names:
        for prompt, generation in zip(
            PROMPTS, generate(variants, [Request(name, item.prompt) for item in PROMPTS], SETTINGS), strict=True
        ):
            reply = comparison.reply(prompt.id, name)
            assert (reply.text, reply.stop_reason) == (generation.text, generation.stop_reason)
            assert reply.tokens == len(generation.token_ids)
    assert comparison.scores == ()


def test_the_record_says_how_it_was_made_and_survives_json(variants: VariantSet, tmp_path: Path) -> None:
    """Order of the variants, settings and dtype."""
    comparison = run(variants, "final", "base", rows=ROWS)
    assert [info.name for info in comparison.variants] == ["final", "base"]
    assert (comparison.run, comparison.settings, comparison.engine.dtype) == ("run", SETTINGS, "float32")
    assert Comparison.read(comparison.write(tmp_path / "comparison.json")) == comparison


def test_an_expected_answer_is_not_shown_to_the_model(variants: VariantSet) -> None:
    """The model answers the question that the answer belongs to."""
    reply = run(variants, "base").reply("row-1", "base")
    assert reply.text == generate(variants, [Request("base", tuple(chat("hello")))], SETTINGS)[0].text


def test_differences_are_paired_with_the_base(variants: VariantSet) -> None:
    """Row by row, and the interval is of the rows."""
    comparison = run(variants, "final", "base", rows=ROWS)
    final, base = comparison.scores
    scores = score(variants, ["final", "base"], ROWS)
    differences = [a.nll - b.nll for a, b in zip(scores["final"], scores["base"], strict=True)]
    expected = ratio_estimate(differences, [row.tokens for row in scores["base"]])
    assert final.difference == pytest.approx(sum(differences) / base.tokens)
    assert (final.difference_low, final.difference_high) == pytest.approx((expected.low, expected.high))
    assert final.better_rows == sum(value < 0 for value in differences)
    assert (base.difference, base.difference_low, base.difference_high, base.better_rows) == (None,) * 4
    assert final.rows == base.rows == 6
    assert base.loss == pytest.approx(sum(item.nll for item in scores["base"]) / base.tokens)


def test_without_the_base_there_is_no_difference(variants: VariantSet) -> None:
    """Nothing is loaded or guessed that was not asked for."""
    (final,) = run(variants, "final", rows=ROWS).scores
    assert (final.difference, final.better_rows) == (None, None)


def scored(name: str, nll: float, tokens: int) -> RowScore:
    """A row whose tokens are all as likely."""
    return RowScore(name, (-nll / tokens,) * tokens)


def test_loss_and_difference_are_means_over_tokens() -> None:
    """The difference is that of the two losses, as a person would subtract them."""
    base = [scored("a", 10.0, 10), scored("b", 4.0, 2)]
    other = [scored("a", 5.0, 10), scored("b", 6.0, 2)]
    result = summarize("other", other, base)
    assert result.loss == pytest.approx(11 / 12)
    assert result.difference == pytest.approx(11 / 12 - 14 / 12)
    assert (result.rows, result.tokens, result.better_rows) == (2, 12, 1)


def test_rows_of_different_tokens_have_no_difference() -> None:
    """Nats per token of two tokenizers cannot be subtracted."""
    assert summarize("other", [scored("a", 5.0, 10)], [scored("a", 5.0, 9)]).difference is None


def test_one_row_has_a_difference_and_no_interval() -> None:
    """Nothing is known of the spread."""
    result = summarize("other", [scored("a", 5.0, 10)], [scored("a", 10.0, 10)])
    assert (result.difference, result.difference_low, result.difference_high) == (pytest.approx(-0.5), None, None)


def test_no_variant_or_one_twice_is_refused(variants: VariantSet) -> None:
    """Before anything is generated."""
    with pytest.raises(DataError, match="no variant"):
        run(variants)
    with pytest.raises(DataError, match="base"):
        run(variants, "base", "final", "base")
    with pytest.raises(DataError, match="no such variant"):
        compare(LocalEngine(variants), [VariantInfo(name="x", kind="full", path="/")], PROMPTS, run_name="run")


def test_a_prompt_id_twice_is_refused(variants: VariantSet) -> None:
    """Replies are looked up by it."""
    with pytest.raises(DataError, match="row-0"):
        compare(LocalEngine(variants), infos(variants, "base"), [row(0, "a"), row(0, "b")], run_name="run")


def test_scores_alone_and_replies_alone(variants: VariantSet) -> None:
    """Either list may be empty."""
    comparison = compare(LocalEngine(variants), infos(variants, "base"), [], run_name="run", scored_rows=ROWS)
    assert comparison.replies == ()
    assert len(comparison.scores) == 1


def test_progress_is_of_the_whole_and_cancelling_stops(variants: VariantSet) -> None:
    """Both stages count all variants; a cancelled comparison is none."""
    seen: list[Progress] = []
    cancellation = Cancellation()
    both = infos(variants, "base", "final")
    compare(
        LocalEngine(variants), both, PROMPTS, run_name="run", settings=SETTINGS, scored_rows=ROWS, progress=seen.append
    )
    for stage, total in (("generate", 6), ("score", 12)):
        steps = [step for step in seen if step.stage == stage]
        assert {step.total for step in steps} == {total}
        assert [step.done for step in steps] == sorted(step.done for step in steps)
        assert steps[-1].done == total
    with pytest.raises(Cancelled):
        compare(
            LocalEngine(variants),
            both,
            PROMPTS,
            run_name="run",
            settings=SETTINGS,
            progress=lambda _: cancellation.cancel(),
            cancellation=cancellation,
        )


def test_merged_and_adapter_differ_from_the_base_alike(tiny: TinyRun, variants: VariantSet) -> None:
    """The merged model's score is the live adapter's."""
    _, final, merged = run(variants, "base", "final", "merged", rows=ROWS).scores
    assert final.difference == pytest.approx(merged.difference, abs=1e-4)
    assert abs(final.difference or 0) > 0.01
    assert tiny.merged.exists()
