"""evaluate: what helped, what broke, what was learned by heart, and no figure from rows that chose."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.compare.pairing import paired
from tests.tiny_models import TinyRun, build_adapter, build_base, row
from tunesmith.compare import Evaluation, VariantInfo, evaluate
from tunesmith.compare.evaluation import _halves
from tunesmith.compare.general import LANGUAGES, general_instructions, general_texts
from tunesmith.compare.intervals import ratio_estimate
from tunesmith.compare.metrics import METRICS
from tunesmith.conversations import Conversation
from tunesmith.errors import Cancelled, DataError
from tunesmith.models import Capabilities, GenerationSettings, LocalEngine, Request, RowScore, VariantSet
from tunesmith.models.engine import Generation
from tunesmith.progress import Cancellation, Progress

GREEDY = GenerationSettings(greedy=True, max_new_tokens=4)
ROWS = [row(i, f"question {i}", f"the answer {i * i}") for i in range(12)]

Answering = Callable[[str, str], str]


class Scripted:
    """An engine whose variants say and think what a test wants."""

    def __init__(
        self,
        losses: Mapping[str, Callable[[int], float]],
        says: Answering = lambda name, question: f"{name} {question}",
    ) -> None:
        self.losses, self.says = losses, says
        self.capabilities = Capabilities(kind="local", where="cpu", dtype="float32")
        self.asked: list[str] = []

    @property
    def names(self) -> tuple[str, ...]:
        """The variants."""
        return tuple(self.losses)

    def identity(self, variant: str) -> str:
        """Its name."""
        return variant

    def generate(self, requests: Sequence[Request], *_: Any, **__: Any) -> list[Generation]:
        """What the test wants it to say."""
        answers = []
        for request in requests:
            question = request.prompt[-1].content
            self.asked.append(question)
            answers.append(Generation(self.says(request.variant, question), (1,), 1, 1, "eos", 0.1, 0.1, None))
        return answers

    def score(self, names: Sequence[str], rows: Sequence[Any], **_: Any) -> dict[str, list[RowScore]]:
        """Two tokens a row, one of them right, each as likely as the test wants."""

        def one(name: str, item: Any) -> RowScore:
            place = int(item.id.rpartition("-")[2]) if isinstance(item, Conversation) else 0
            loss = self.losses[name](place)
            return RowScore(item.id, (-loss, -loss), 1, None if name == "base" else 0.5)

        return {name: [one(name, item) for item in rows] for name in names}


def run(engine: Any, rows: Sequence[Conversation] = ROWS, **changes: Any) -> Evaluation:
    """Evaluate all variants of an engine."""
    infos = [VariantInfo(name=name, kind="base" if name == "base" else "adapter", path="/") for name in engine.names]
    given: dict[str, Any] = {
        "run_name": "run",
        "rows_from": "held_out",
        "choose": False,
        "general": False,
        "answers": 4,
        "tasks": 20,
        "settings": GREEDY,
    }
    return evaluate(engine, infos, rows, **{**given, **changes})


def codes(evaluation: Evaluation) -> list[str]:
    """Of its findings."""
    return [finding.code for finding in evaluation.findings]


def test_the_choice_rests_on_other_rows_than_the_report() -> None:
    """Each checkpoint is lucky in some rows; those that chose are not reported."""
    rows = [row(i, f"q {i}", f"a {i}") for i in range(40)]
    first, second = _halves(rows, 0)
    assert sorted(one.id for one in (*first, *second)) == sorted(one.id for one in rows)
    assert (len(first), len(second)) == (20, 20)
    lucky = {int(one.id.removeprefix("row-")) for one in first}
    engine = Scripted(
        {
            "base": lambda i: 3.0 + 0.01 * (i % 7),
            "checkpoint-1": lambda i: 2.0 + 0.01 * (i % 5),
            "checkpoint-2": lambda i: (1.0 if i in lucky else 2.5) + 0.01 * (i % 3),
        }
    )
    found = run(engine, rows, choose=True)
    assert found.chosen == "checkpoint-2"
    assert (found.chosen_on_rows, found.rows) == (20, 20)
    loss = found.measure("loss")
    assert loss is not None
    assert loss.rows == 20
    figure = loss.figure("checkpoint-2")
    assert figure is not None
    assert figure.value.value == pytest.approx(2.5, abs=0.02), "its luck is not reported"
    assert found.candidates == ("checkpoint-1", "checkpoint-2")
    assert "evaluation_chosen" in codes(found)


def test_halves_do_not_depend_on_the_order_of_rows_but_on_the_seed() -> None:
    """A file that was sorted gives the same halves."""
    rows = [row(i, f"q {i}", f"a {i}") for i in range(30)]
    ids = [{one.id for one in _halves(each, 0)[0]} for each in (rows, rows[::-1])]
    assert ids[0] == ids[1]
    assert {one.id for one in _halves(rows, 1)[0]} != ids[0]


def test_only_base_chosen_and_last_are_reported_unless_variants_were_named() -> None:
    """A hundred checkpoints are scored, not asked."""
    losses = {"base": lambda i: 3.0 + 0.1 * (i % 2)} | {
        f"checkpoint-{n}": (lambda i, n=n: abs(n - 2) + 0.1 * (i % 3) + 0.5) for n in range(1, 6)
    }
    chosen = run(Scripted(losses), choose=True)
    assert [info.name for info in chosen.variants] == ["base", "checkpoint-2", "checkpoint-5"]
    named = run(Scripted(losses), choose=False)
    assert len(named.variants) == 6
    assert named.chosen == "checkpoint-2"


def test_one_checkpoint_or_few_rows_are_not_halved() -> None:
    """There is nothing to choose, or a half would say nothing."""
    two = {"base": lambda i: 3.0 + i % 2, "final": lambda i: 2.0 + i % 3}
    assert (run(Scripted(two)).chosen, run(Scripted(two)).rows) == (None, len(ROWS))
    three = {**two, "other": lambda _: 2.5}
    assert (run(Scripted(three), ROWS[:7]).chosen, run(Scripted(three), ROWS[:7]).rows) == (None, 7)


@pytest.mark.parametrize(
    ("final", "code", "verdict"),
    [
        (lambda i: 1.0 + 0.1 * (i % 3), "evaluation_helped", "better"),
        (lambda i: 4.0 + 0.1 * (i % 3), "evaluation_hurt", "worse"),
        (lambda i: 2.0 + (1.0 if i % 2 else -1.0), "evaluation_no_difference", "no_difference"),
        (lambda _: 2.0, "evaluation_no_difference", "no_difference"),
    ],
)
def test_the_answer_is_the_losss(final: Callable[[int], float], code: str, verdict: str) -> None:
    """Better, worse, or none can be told; identical variants are the last."""
    found = run(Scripted({"base": lambda _: 2.0, "final": final}))
    assert code in codes(found)
    loss = found.measure("loss")
    assert loss is not None
    figure = loss.figure("final")
    assert figure is not None
    assert figure.verdict == verdict
    base = loss.figure("base")
    assert base is not None
    assert (base.difference, base.verdict) == (None, None)


def test_loss_perplexity_and_accuracy_are_of_one_estimate() -> None:
    """Perplexity is the loss's exponential, and its difference a relative change."""
    found = run(Scripted({"base": lambda i: 2.0 + 0.1 * (i % 4), "final": lambda i: 1.5 + 0.1 * (i % 3)}))
    loss, perplexity, accuracy = (found.measure(name) for name in ("loss", "perplexity", "token_accuracy"))
    assert loss is not None
    assert perplexity is not None
    assert accuracy is not None
    ours, theirs = loss.figure("final"), perplexity.figure("final")
    assert ours is not None
    assert theirs is not None
    assert ours.difference is not None
    assert theirs.difference is not None
    changes = [2 * (1.5 + 0.1 * (i % 3) - 2.0 - 0.1 * (i % 4)) for i in range(12)]
    expected = ratio_estimate(changes, [2] * 12)
    assert (ours.difference.value, ours.difference.low) == pytest.approx((expected.value, expected.low))
    assert theirs.value.value == pytest.approx(math.exp(ours.value.value))
    assert theirs.difference.value == pytest.approx(math.exp(ours.difference.value) - 1)
    assert theirs.verdict == ours.verdict
    assert [figure.value.value for figure in accuracy.figures] == [0.5, 0.5]


def test_replies_are_measured_as_the_metrics_do() -> None:
    """Every metric, paired with the base's replies to the same rows; a scorer among them."""
    says = {"base": "a wrong reply", "final": "the answer 4"}
    found = run(
        Scripted({"base": lambda _: 2.0, "final": lambda _: 1.0}, lambda name, _: says[name]),
        scorers={"mine:length": lambda prompt, reply, expected: float(len(reply) - len(expected or "") + len(prompt))},
    )
    assert found.answered == 4
    expected = [one.answer for one in ROWS[:4]]
    for name, metric in METRICS.items():
        measure = found.measure(name)
        assert measure is not None
        figure = measure.figure("final")
        assert figure is not None
        truth = paired(metric, [says["final"]] * 4, base_replies=[says["base"]] * 4, expected=expected)
        assert (figure.value, figure.difference, figure.verdict) == (truth.value, truth.difference, truth.verdict)
    scorer = found.measure("mine:length")
    assert scorer is not None
    assert scorer.unit == "score"
    figure = scorer.figure("final")
    assert figure is not None
    assert figure.difference is not None
    assert figure.difference.value == pytest.approx(len(says["final"]) - len(says["base"]))


def test_damage_is_of_general_texts_and_of_faults_in_general_replies() -> None:
    """A variant that refuses everything, and finds Chinese less likely, is caught at both."""

    def says(name: str, question: str) -> str:
        return "I'm sorry, but I can't help with that." if name == "final" else f"Well, here is {question[:20]}."

    found = run(Scripted({"base": lambda _: 2.0, "final": lambda _: 2.5}, says), general=True)
    assert {measure.about for measure in found.measures if measure.name == "general_loss"} == set(LANGUAGES)
    tasks = sum(len(general_instructions(language)) for language in LANGUAGES)
    refused = found.measure("refused")
    assert refused is not None
    assert refused.rows == tasks
    figure = refused.figure("final")
    assert figure is not None
    assert figure.value.value > 0.95, "one task asks for a refusal, which is none then"
    assert figure.verdict == "worse"
    moved = found.measure("general_kl", "zh")
    assert moved is not None
    assert moved.rows == len(general_texts("zh"))
    assert [(one.variant, one.value.value) for one in moved.figures] == [("final", 0.5)]
    assert codes(found).count("evaluation_forgot") == len(LANGUAGES)
    assert "evaluation_more_refused" in codes(found)
    assert "evaluation_nothing_broken" not in codes(found)


def test_nothing_broken_is_said_too() -> None:
    """Of variants that say the same."""
    found = run(Scripted({"base": lambda _: 2.0, "final": lambda _: 2.0}, lambda _, q: f"On {q}."), general=True)
    assert "evaluation_nothing_broken" in codes(found)


def test_answers_of_training_given_word_for_word_are_memorisation() -> None:
    """Against how often it gives unseen ones; case and spacing do not count."""
    known = [row(i, f"trained {i}", f"Learned answer {i}") for i in range(30)]

    def says(name: str, question: str) -> str:
        return f"learned  ANSWER {question.split()[-1]}" if name == "final" and "trained" in question else "no"

    found = run(Scripted({"base": lambda _: 2.0, "final": lambda _: 1.0}, says), training_rows=known, answers=12)
    shares = found.measure("verbatim_trained")
    assert shares is not None
    assert [figure.value.value for figure in shares.figures] == [0.0, 1.0]
    more = found.measure("verbatim_more")
    assert more is not None
    figure = more.figure("final")
    assert figure is not None
    assert figure.value.low is not None
    assert figure.value.low > 0
    assert "evaluation_memorised" in codes(found)
    honest = run(Scripted({"base": lambda _: 2.0, "final": lambda _: 1.0}), training_rows=known, answers=12)
    assert "evaluation_not_memorised" in codes(honest)


def test_the_overfit_gap_is_what_training_rows_gained_more() -> None:
    """Nats a token, the fall on rows of training minus that on unseen ones."""
    losses = {"base": lambda _: 3.0, "final": lambda i: 1.0 if i >= 100 else 2.5 + 0.01 * (i % 3)}
    known = [row(100 + i, f"trained {i}", "x") for i in range(25)]
    found = run(Scripted(losses), training_rows=known)
    gap = found.measure("overfit_gap")
    assert gap is not None
    figure = gap.figure("final")
    assert figure is not None
    assert figure.value.value == pytest.approx(2.0 - np.mean([0.5 - 0.01 * (i % 3) for i in range(12)]))
    assert gap.figure("base") is None


def test_an_engine_that_cannot_score_is_told_and_still_measured_by_its_replies() -> None:
    """As a server without prompt log-probabilities."""
    engine = Scripted({"base": lambda _: 2.0, "final": lambda _: 1.0})
    engine.capabilities = Capabilities(kind="endpoint", where="http://x", scores=False)
    found = run(engine, general=True)
    assert found.measure("loss") is None
    assert found.measure("general_loss", "en") is None
    assert found.measure("bleu") is not None
    assert found.measure("refused") is not None
    assert "evaluation_unscored" in codes(found)


def test_nothing_to_evaluate_on_is_refused() -> None:
    """Neither rows nor the general sets."""
    with pytest.raises(DataError, match="nothing to evaluate on"):
        run(Scripted({"base": lambda _: 2.0}), [])


def test_the_record_survives_json_and_counts_its_differences(tmp_path: Path) -> None:
    """Of so many, one in twenty leaves 0 out by chance."""
    found = run(Scripted({"base": lambda i: 2.0 + i % 2, "final": lambda i: 1.0 + i % 3}), general=True)
    assert Evaluation.read(found.write(tmp_path / "e.json")) == found
    assert found.differences == sum(one.difference is not None for each in found.measures for one in each.figures)
    assert found.comparisons == 1


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A tiny base with a window for general texts, byte by byte, and an adapter."""
    root = tmp_path_factory.mktemp("roomy")
    build_base(root / "base", max_position_embeddings=4096)
    return TinyRun(root / "base", {"final": build_adapter(root / "base", root / "final", seed=1)}, root)


def test_real_variants_give_the_figures_that_their_scores_and_replies_give(roomy: TinyRun) -> None:
    """End to end on the local engine; the second time from what is remembered is the same record."""
    variants = VariantSet.load(roomy.base, adapters=roomy.adapters, tokenizer_dir=roomy.base)
    engine = LocalEngine(variants)
    found = run(engine, general=True, training_rows=ROWS[:3], answers=2)
    scores = engine.score(["base", "final"], ROWS)
    loss = found.measure("loss")
    assert loss is not None
    for name in ("base", "final"):
        figure = loss.figure(name)
        assert figure is not None
        rows = scores[name]
        assert figure.value.value == pytest.approx(sum(one.nll for one in rows) / sum(one.tokens for one in rows))
    cut = found.measure("cut")
    assert cut is not None
    assert all(figure.value.value > 0.5 for figure in cut.figures), "four tokens are not enough"
    moved = found.measure("general_kl", "en")
    assert moved is not None
    assert [one.variant for one in moved.figures] == ["final"], "the base is the reference"
    assert moved.figures[0].value.value > 0
    assert len(found.replies) == 2 * (2 + 3 + sum(len(general_instructions(one)) for one in LANGUAGES))


def test_cancelling_stops_it(roomy: TinyRun) -> None:
    """At the next token or batch."""
    variants = VariantSet.load(roomy.base, adapters=roomy.adapters, tokenizer_dir=roomy.base)
    cancellation = Cancellation()

    def stop(step: Progress) -> None:
        if step.stage == "generate":
            cancellation.cancel()

    with pytest.raises(Cancelled):
        run(LocalEngine(variants), progress=stop, cancellation=cancellation)
