"""selection: the statistics of a choice, against closed forms and against experiments whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.stats

from tunesmith.compare.intervals import Estimate, ratio_estimate
from tunesmith.compare.selection import Selection, select
from tunesmith.models import RowScore

TRIALS = 1500
KEPT_TRIALS = 300
# Three standard errors of a share near 95 % over that many trials are 1.7 %.
SLACK = 3 * math.sqrt(0.05 * 0.95 / TRIALS)


def row(name: str, nll: float, tokens: int) -> RowScore:
    """A row of that many tokens whose first one takes all the nats."""
    return RowScore(name, (-nll, *[0.0] * (tokens - 1)))


def scored(nats: Sequence[float], tokens: Sequence[int] | None = None) -> list[RowScore]:
    """Row scores of these nats; ten tokens a row where nothing else is said."""
    return [row(f"row-{i}", nll, tokens[i] if tokens else 10) for i, nll in enumerate(nats)]


def experiment(
    rng: np.random.Generator, losses: Sequence[float], *, rows: int, skewed: bool = False
) -> dict[str, list[RowScore]]:
    """One draw of rows, scored under models whose true losses are known, the first being the base.

    Rows differ in length and in difficulty, and a row that is hard for one model is hard for all: what models differ in
    is small beside it.
    """
    tokens = rng.integers(10, 200, rows)
    hard = rng.lognormal(0, 0.5, rows) if skewed else rng.normal(1, 0.3, rows)
    hard -= math.exp(0.125) if skewed else 1
    names = ["base", *(f"checkpoint-{step}" for step in range(1, len(losses)))]
    own = rng.normal(0, 0.05, (len(losses), rows)) * (1 + 0.5 * hard)
    return {
        name: [row(str(i), float(tokens[i] * (loss + hard[i] + own[place, i])), int(tokens[i])) for i in range(rows)]
        for place, (name, loss) in enumerate(zip(names, losses, strict=True))
    }


def chosen(*losses: float, rows: int = 30, noise: float = 0.02, base: float | None = 4.0) -> Selection:
    """A choice among checkpoints of these true losses, with a little noise of each row's own."""
    rng = np.random.default_rng(7)
    hard = rng.normal(0, 0.5, rows)
    named = ({"base": base} if base is not None else {}) | {
        f"checkpoint-{10 * i + 10}": x for i, x in enumerate(losses)
    }
    return select(
        {name: scored([10 * (x + h + n) for h, n in zip(hard, rng.normal(0, noise, rows), strict=True)])
         for name, x in named.items()}
    )  # fmt: skip


def test_equal_lengths_give_students_interval() -> None:
    """Where all rows have as many tokens, the ratio is the mean of the rows' own losses."""
    nats = [10.0, 20.0, 30.0, 45.0]
    expected = scipy.stats.ttest_1samp([value / 10 for value in nats], 0).confidence_interval(0.95)
    found = ratio_estimate(nats, [10] * 4)
    assert found.value == pytest.approx(2.625)
    assert (found.low, found.high) == pytest.approx(tuple(expected))
    assert found.half == pytest.approx((expected.high - expected.low) / 2)


def test_a_long_row_weighs_by_its_tokens() -> None:
    """As in the trainer's loss: nats over tokens, not a mean of means; the interval by hand."""
    found = ratio_estimate([30.0, 2.0], [10, 2])
    assert found.value == pytest.approx(32 / 12)
    long, short = (30 - 10 * 32 / 12) / 6, (2 - 2 * 32 / 12) / 6
    half = 12.706205 * math.sqrt(long**2 / (1 - 10 / 12) + short**2 / (1 - 2 / 12)) / 2
    assert found.half == pytest.approx(half, rel=1e-6)


def test_many_comparisons_widen_the_interval() -> None:
    """By the quantile of a share of the 5 %."""
    nats, tokens = [10.0, 20.0, 30.0, 45.0], [10] * 4
    one, ten = ratio_estimate(nats, tokens), ratio_estimate(nats, tokens, comparisons=10)
    wider = scipy.stats.t.ppf(1 - 0.0025, 3) / scipy.stats.t.ppf(0.975, 3)
    assert (ten.half or 0) / (one.half or 1) == pytest.approx(wider)


def test_one_row_and_numbers_that_are_none_have_no_interval() -> None:
    """Nothing is known of the spread."""
    assert ratio_estimate([5.0], [10]) == Estimate(value=0.5)
    assert ratio_estimate([5.0, math.inf], [10, 10]).half is None


@pytest.mark.parametrize(("rows", "skewed"), [(10, False), (40, False), (40, True)])
def test_the_interval_of_a_loss_holds_the_truth_in_95_of_100_experiments(rows: int, skewed: bool) -> None:
    """Rows of very unequal length; what few rows with a long tail cost is said here, as no interval can see a tail."""
    rng = np.random.default_rng(rows)
    hits = 0
    for _ in range(TRIALS):
        (scores,) = experiment(rng, [3.0], rows=rows, skewed=skewed).values()
        found = ratio_estimate([row.nll for row in scores], [row.tokens for row in scores])
        hits += (found.low or 0) <= 3.0 <= (found.high or 0)
    lost = 0.02 if skewed else 0.0
    assert 0.95 - SLACK - lost <= hits / TRIALS <= 0.95 + SLACK


@pytest.mark.parametrize("rows", [8, 40])
@pytest.mark.parametrize(
    "losses",
    [
        pytest.param([4.0, 3.0, 3.0, 3.0, 3.0, 3.0], id="all equal"),
        pytest.param([4.0, 3.2, 3.02, 3.0, 3.01, 3.03], id="close"),
        pytest.param([4.0, *(3.0 + 0.002 * i for i in range(20))], id="many"),
    ],
)
def test_the_truly_best_one_stays_in_the_running(losses: list[float], rows: int) -> None:
    """In at least 95 of 100 experiments, however many checkpoints there are and however close they lie."""
    rng = np.random.default_rng(len(losses) * rows)
    true_best = f"checkpoint-{int(np.argmin(losses[1:])) + 1}"
    kept = sum(true_best in select(experiment(rng, losses, rows=rows)).alike for _ in range(KEPT_TRIALS))
    assert kept / KEPT_TRIALS >= 0.95


def test_a_worse_one_does_not_stay() -> None:
    """The procedure can tell: 0.15 nats between checkpoints are seen with 40 rows, 0.003 are not."""
    rng = np.random.default_rng(0)
    sets = [select(experiment(rng, [4.0, 3.15, 3.003, 3.0], rows=40)).alike for _ in range(100)]
    assert sum("checkpoint-1" in alike for alike in sets) == 0
    assert sum("checkpoint-2" in alike for alike in sets) > 90


def test_a_base_as_good_as_the_tuned_is_not_beaten_by_chance() -> None:
    """Of twenty checkpoints one looks best; that it beats the base must not be luck more often than 1 in 20."""
    rng = np.random.default_rng(1)
    verdicts = [select(experiment(rng, [3.0] * 21, rows=30)).verdict for _ in range(300)]
    assert verdicts.count("base_alike") / 300 >= 0.95


def test_a_difference_is_paired() -> None:
    """Rows differ by 0.5 nats, checkpoints by 0.1: unpaired nothing could be said."""
    choice = chosen(3.2, 3.1, 3.0)
    assert choice.verdict == "clear"
    assert choice.recommended == choice.best == choice.last == "checkpoint-30"
    assert (choice.losses["checkpoint-30"].half or 0) > 0.15 > (choice.to_best["checkpoint-20"].low or 0) > 0.05


def test_the_earliest_of_those_that_cannot_be_told_apart_is_taken() -> None:
    """The last is lower by less than noise."""
    choice = chosen(3.2, 3.001, 3.0, noise=0.05)
    assert (choice.verdict, choice.recommended, choice.last) == ("earliest", "checkpoint-20", "checkpoint-30")
    assert choice.alike == ("checkpoint-20", "checkpoint-30")


def test_all_alike_and_overfitting_are_called_so() -> None:
    """Where no loss differs, and where the last is worse than the best."""
    assert chosen(3.0, 3.0, 3.0, noise=0.05).verdict == "all_alike"
    assert chosen(3.0, 3.0, 3.0, noise=0.05).recommended == "checkpoint-10"
    choice = chosen(3.2, 3.0, 3.3)
    assert (choice.verdict, choice.recommended) == ("overfit", "checkpoint-20")
    choice = chosen(3.2, 3.001, 3.0, 3.3, noise=0.05)
    assert (choice.verdict, choice.recommended) == ("overfit_earliest", "checkpoint-20")


def test_a_lowest_one_before_the_last_is_taken() -> None:
    """Later ones are higher by less than noise: that is no overfitting yet."""
    choice = chosen(3.2, 3.0, 3.02, noise=0.05)
    assert (choice.verdict, choice.recommended, choice.best) == ("best_early", "checkpoint-20", "checkpoint-20")


def test_a_base_that_is_not_beaten_is_called_so_and_one_is_named_all_the_same() -> None:
    """No difference, and a base that is better."""
    assert chosen(3.0, 3.0, base=3.0, noise=0.05).verdict == "base_alike"
    choice = chosen(3.4, 3.2, base=3.0)
    assert (choice.verdict, choice.recommended) == ("base_better", "checkpoint-20")


def test_one_that_beats_the_base_by_chance_only_is_passed_over() -> None:
    """A noisy early checkpoint cannot be told from the best, nor from the base: it is not the one to take."""
    rng = np.random.default_rng(3)
    noisy, quiet = rng.normal(0, 1.0, 30), rng.normal(0, 0.01, 30)
    nats = {"base": np.full(30, 40.0), "checkpoint-1": 38 + 10 * noisy, "checkpoint-2": 38 + 10 * quiet}
    choice = select({name: scored(list(values)) for name, values in nats.items()})
    assert choice.alike == ("checkpoint-1", "checkpoint-2")
    assert choice.recommended == "checkpoint-2"


def test_one_checkpoint_one_row_and_no_finite_loss() -> None:
    """Each has its own word; below two rows nothing is recommended."""
    assert chosen(3.0).verdict == "only_one"
    few = select({"base": scored([40.0]), "checkpoint-1": scored([30.0]), "checkpoint-2": scored([31.0])})
    assert (few.verdict, few.recommended, few.best) == ("too_few_rows", None, "checkpoint-1")
    broken = select({"base": scored([40.0, 40.0]), "checkpoint-1": scored([math.nan, 1.0])})
    assert (broken.verdict, broken.recommended, broken.best) == ("not_finite", None, None)


def test_a_checkpoint_that_diverged_does_not_spoil_the_others() -> None:
    """It is in no comparison, and counts in none."""
    rows = {f"checkpoint-{i}": scored([30.0 + i, 31.0 + i, 33.0 + i + i * i]) for i in (1, 2, 3)}
    whole = select(rows)
    with_nan = select({**rows, "checkpoint-4": scored([math.nan, 1.0, 1.0])})
    assert (with_nan.recommended, with_nan.last) == (whole.recommended, "checkpoint-3")
    assert with_nan.to_best == whole.to_best
