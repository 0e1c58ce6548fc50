"""intervals: closed forms, scipy, and experiments whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray

from tunesmith.compare.intervals import (
    Estimate,
    independent_means,
    independent_proportions,
    jackknife_estimate,
    mean_estimate,
    paired_proportions,
    proportion,
    quantile_estimate,
    quotient_estimate,
    ratio_estimate,
    verdict,
)

TRIALS = 1500
ROWS = 50
# Three standard errors of a share of 95 % over that many trials, on top of the band that is promised, 93 to 97 %.
SLACK = 3 * math.sqrt(0.05 * 0.95 / TRIALS)
FEW = 120  # trials of what takes a search for each end
SLACK_OF_FEW = 3 * math.sqrt(0.05 * 0.95 / FEW)
Draw = Callable[[np.random.Generator], NDArray[np.float64]]


def ends(estimate: Estimate) -> tuple[float, float]:
    """Both ends of an interval that must be there."""
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low, estimate.high


def share_held(truth: float, once: Callable[[np.random.Generator], Estimate], *, trials: int = TRIALS) -> float:
    """In what share of experiments the interval holds the truth."""
    rng = np.random.default_rng(11)
    found = [ends(once(rng)) for _ in range(trials)]
    return sum(low <= truth + 1e-12 and truth <= high + 1e-12 for low, high in found) / trials


def ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """First sum by second."""
    return np.asarray(sums[..., 0] / sums[..., 1])


MEANS: dict[str, tuple[float, Draw]] = {
    "normal": (0.3, lambda rng: rng.normal(0.3, 1, ROWS)),
    "heavy tails on both sides": (0.0, lambda rng: rng.standard_t(3, ROWS)),
    "a difference of lognormals": (0.0, lambda rng: rng.lognormal(size=ROWS) - rng.lognormal(size=ROWS)),
    "exponential": (1.0, lambda rng: rng.exponential(1, ROWS)),
    "exponential, downwards": (-1.0, lambda rng: -rng.exponential(1, ROWS)),
}


@pytest.mark.parametrize("name", MEANS)
def test_the_interval_of_a_mean_holds_the_truth_as_often_as_it_says(name: str) -> None:
    """At 50 rows; for the exponential, t alone misses the band, which the experiment notices."""
    truth, draw = MEANS[name]
    held = share_held(truth, lambda rng: mean_estimate(draw(rng)))
    assert 0.93 - SLACK / 2 <= held <= 0.97 + SLACK / 2


def test_the_experiment_notices_an_interval_that_is_too_narrow() -> None:
    """The normal quantile of a lognormal's rows, which is what people write by hand, is caught."""
    rng = np.random.default_rng(11)
    held = 0
    for _ in range(TRIALS):
        values = rng.lognormal(size=ROWS)
        held += abs(values.mean() - math.exp(0.5)) <= 1.96 * values.std() / math.sqrt(ROWS)
    assert held / TRIALS < 0.93 - SLACK / 2


def test_the_interval_of_a_function_of_sums_holds_the_truth() -> None:
    """A ratio of sums over rows of very unequal length, a saturating function of it, as BLEU's brevity is one."""

    def once(rng: np.random.Generator) -> Estimate:
        tokens = np.rint(rng.lognormal(4, 0.7, ROWS)).clip(2)
        matches = rng.binomial(tokens.astype(int), rng.beta(4, 4, ROWS))
        return jackknife_estimate(lambda sums: np.exp(-1 / ratio(sums)), np.column_stack([matches, tokens]))

    held = share_held(math.exp(-2), once)
    assert 0.93 - SLACK / 2 <= held <= 0.97 + SLACK / 2


@pytest.mark.parametrize("truth", [0.1, 0.3, 0.5])
def test_the_interval_of_a_share_holds_the_truth(truth: float) -> None:
    """Exactly, by adding up the binomial's probabilities."""
    inside = [low <= truth <= high for low, high in (ends(proportion(k, ROWS)) for k in range(ROWS + 1))]
    chance = scipy.stats.binom.pmf(np.arange(ROWS + 1), ROWS, truth)
    assert 0.93 <= chance @ np.array(inside, float) <= 0.975


@pytest.mark.parametrize(("gained", "lost"), [(0.25, 0.05), (0.1, 0.1), (0.15, 0.0), (0.04, 0.01)])
def test_the_interval_of_a_paired_difference_of_shares_holds_the_truth(gained: float, lost: float) -> None:
    """Exactly, by adding up the trinomial's probabilities; where few rows change it holds more often, never less."""
    inside = total = 0.0
    for up in range(ROWS + 1):
        for down in range(ROWS + 1 - up):
            chance = scipy.stats.multinomial.pmf([up, down, ROWS - up - down], ROWS, [gained, lost, 1 - gained - lost])
            low, high = ends(paired_proportions(up, down, rows=ROWS))
            total += chance
            inside += chance * (low <= gained - lost <= high)
    assert total == pytest.approx(1)
    assert 0.93 <= inside <= (0.97 if gained + lost >= 0.15 else 1)


@pytest.mark.parametrize(("one", "other", "most"), [(0.3, 0.3, 0.97), (0.2, 0.02, 0.98)])
def test_the_interval_of_two_independent_shares_holds_the_truth(one: float, other: float, most: float) -> None:
    """Exactly, for 100 training rows against 50 held-out ones."""
    inside = 0.0
    theirs = scipy.stats.binom.pmf(np.arange(ROWS + 1), ROWS, other)
    for k in np.flatnonzero(scipy.stats.binom.pmf(np.arange(101), 100, one) > 1e-6):
        for m in np.flatnonzero(theirs > 1e-6):
            low, high = ends(independent_proportions((int(k), 100), (int(m), ROWS)))
            inside += scipy.stats.binom.pmf(k, 100, one) * theirs[m] * (low <= one - other <= high)
    assert 0.93 <= inside <= most


def test_without_skewness_a_mean_has_the_paired_t_interval() -> None:
    """Against scipy's, and wider for ten comparisons by the quantile of a share of the 5 %."""
    values = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    expected = scipy.stats.ttest_rel(values, np.zeros(5)).confidence_interval(0.95)
    assert ends(mean_estimate(values)) == pytest.approx((expected.low, expected.high))
    tenth = scipy.stats.ttest_rel(values, np.zeros(5)).confidence_interval(0.995)
    assert ends(mean_estimate(values, comparisons=10)) == pytest.approx((tenth.low, tenth.high))


def test_with_skewness_it_is_wider_on_the_side_of_the_tail_only() -> None:
    """By as much as Hall's transformation, put back into its own definition, says; the mirror image mirrors it."""
    values = np.array([0.0, 0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 4.0, 6.0])
    n = len(values)
    low, high = ends(mean_estimate(values))
    t = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert low == pytest.approx(t.low)
    assert high > t.high
    statistic = (values.mean() - high) / (values.std(ddof=1) / math.sqrt(n))
    s = scipy.stats.skew(values) / math.sqrt(n)
    transformed = statistic + s * statistic**2 / 3 + s**2 * statistic**3 / 27 + s / 6
    assert transformed == pytest.approx(scipy.stats.t.ppf(0.025, n - 1))
    assert ends(mean_estimate(-values)) == pytest.approx((-high, -low))


def test_two_rows_of_twenty_do_not_open_everything() -> None:
    """Beyond what the cubic can tell the correction stays: half as wide again there, not four times."""
    values = np.array([9.0, 8.0, 8.5, 9.5, 7.5, 8.0] * 3 + [-12.0, -11.0])
    low, high = ends(mean_estimate(values))
    t = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert high == pytest.approx(t.high)
    assert 1.2 < (values.mean() - low) / (values.mean() - t.low) < 1.7


def test_the_jackknife_of_a_mean_is_the_mean() -> None:
    """Pseudo-values of a mean are the values themselves."""
    values = np.random.default_rng(0).exponential(size=20)
    found = jackknife_estimate(ratio, np.column_stack([values, np.ones(20)]))
    mean = mean_estimate(values)
    assert (found.value, *ends(found)) == pytest.approx((mean.value, *ends(mean)))


def test_what_every_row_says_is_not_certain() -> None:
    """0 of 50 leaves up to 7 % open, by whichever rule; without bounds, rows that agree on 0.3 say nothing more."""
    missed = 1 - 0.025 ** (1 / 50)
    assert ends(mean_estimate(np.zeros(50), bounds=(-1, 1))) == pytest.approx((-missed, missed))
    assert ends(mean_estimate(np.full(50, 0.1), bounds=(0, 1))) == pytest.approx(
        (0.1 - 0.1 * missed, 0.1 + 0.9 * missed)
    )
    assert ends(proportion(0, 50)) == pytest.approx((0, 0.0714), abs=1e-4)
    assert ends(proportion(50, 50)) == pytest.approx((1 - 0.0714, 1), abs=1e-4)
    low, high = ends(paired_proportions(0, 0, rows=50))
    assert -0.06 < low < -0.05
    assert high == -low
    assert mean_estimate(np.full(50, 0.3)).value == pytest.approx(0.3)
    assert mean_estimate(np.full(50, 0.3)).half is None
    assert independent_means([1.0, 1.0], [0.0, 0.0]) == Estimate(value=1)


def test_a_variant_against_itself_is_exactly_no_difference() -> None:
    """However it is measured."""
    nothing = [
        mean_estimate(np.zeros(50)),
        mean_estimate(np.zeros(50), bounds=(-1, 1)),
        ratio_estimate([0.0] * 50, [7] * 50),
        paired_proportions(0, 0, rows=50),
        jackknife_estimate(lambda sums: ratio(sums) - ratio(sums), np.random.default_rng(0).random((50, 2))),
    ]
    for found in nothing:
        assert found.value == 0
        assert verdict(found, True) == "no_difference"


def test_nothing_is_said_where_nothing_is_known() -> None:
    """No row, one row, and rows that are no numbers: a value at most, and never an error or a warning."""
    empty = np.zeros((0, 2))
    for found in (
        mean_estimate([]),
        ratio_estimate([], []),
        jackknife_estimate(ratio, empty),
        proportion(0, 0),
        paired_proportions(0, 0, rows=0),
        independent_proportions((1, 2), (0, 0)),
        independent_means([], [1.0, 2.0]),
    ):
        assert math.isnan(found.value)
        assert found.half is None
    assert mean_estimate([2.0]) == Estimate(value=2)
    assert jackknife_estimate(ratio, np.array([[1.0, 2.0]])) == Estimate(value=0.5)
    assert independent_means([1.0], [1.0, 2.0]) == Estimate(value=-0.5)
    for bad in (math.nan, math.inf):
        assert mean_estimate([1.0, 2.0, bad]).half is None
        assert independent_means([1.0, bad], [1.0, 2.0]).half is None


def test_bounds_end_an_interval() -> None:
    """A share of words is not above 1."""
    values = np.array([1.0] * 9 + [0.0])
    free, bounded = mean_estimate(values), mean_estimate(values, bounds=(0, 1))
    assert (free.high or 0) > 1 == bounded.high
    assert free.low == bounded.low


def test_welchs_interval_is_scipys() -> None:
    """Two sets of different sizes and spreads."""
    rng = np.random.default_rng(4)
    a, b = rng.normal(1, 3, 40), rng.normal(0, 1, 12)
    expected = scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert ends(independent_means(a, b)) == pytest.approx((expected.low, expected.high))


def test_newcombes_interval_is_the_published_one() -> None:
    """56/70 against 48/80: table II of the paper, method 10."""
    assert ends(independent_proportions((56, 70), (48, 80))) == pytest.approx((0.0524, 0.3339), abs=5e-5)


@pytest.mark.parametrize(
    ("low", "high", "higher_is_better", "expected"),
    [
        (0.1, 0.2, True, "better"),
        (0.1, 0.2, False, "worse"),
        (-0.2, -0.1, True, "worse"),
        (-0.2, -0.1, False, "better"),
        (-0.2, -0.1, None, "different"),
        (-0.1, 0.1, True, "no_difference"),
        (0.0, 0.1, True, "no_difference"),
        (-0.1, 0.1, None, "no_difference"),
        (None, None, True, "unknown"),
    ],
)
def test_a_verdict_is_what_the_interval_says(
    low: float | None, high: float | None, higher_is_better: bool | None, expected: str
) -> None:
    """Of a loss lower is better; of a length neither is."""
    assert verdict(Estimate(value=0.0, low=low, high=high), higher_is_better) == expected


def test_quotient_is_fiellers_where_no_row_is_skewed() -> None:
    """The roots of his parabola, where the means' interval is the plain t."""
    half = np.random.default_rng(4).normal(0, 1, ROWS // 2)
    above, below = 1.0 + np.concatenate([half, -half]), 2.0 + 0.3 * np.concatenate([half[::-1], -half[::-1]])
    found = quotient_estimate(above, below)
    factor = scipy.stats.t.ppf(0.975, ROWS - 1) ** 2 / ROWS
    covariance = np.cov(above, below)
    parabola = [
        below.mean() ** 2 - factor * covariance[1, 1],
        -2 * (above.mean() * below.mean() - factor * covariance[0, 1]),
        above.mean() ** 2 - factor * covariance[0, 0],
    ]
    assert found.value == pytest.approx(above.sum() / below.sum())
    assert ends(found) == pytest.approx(tuple(sorted(np.roots(parabola))), rel=1e-6)


def test_quotient_of_what_may_be_nothing_has_no_interval() -> None:
    """Whatever is divided by it."""
    below = np.random.default_rng(4).normal(0.1, 1, ROWS)
    assert quotient_estimate(np.ones(ROWS), below).low is None
    assert quotient_estimate([1.0], [2.0]) == Estimate(value=0.5)
    assert math.isnan(quotient_estimate([], []).value)
    assert ends(quotient_estimate(below + 3, below + 3)) == pytest.approx((1.0, 1.0), abs=1e-12)
    assert ends(quotient_estimate(np.zeros(ROWS), below + 3)) == pytest.approx((0.0, 0.0), abs=1e-12)


def test_quotient_holds_the_truth() -> None:
    """Of a skewed gain, of which a skewed, noisy part is kept."""

    def once(rng: np.random.Generator) -> Estimate:
        tokens = rng.integers(20, 200, ROWS)
        below = tokens * rng.gamma(3, 0.2, ROWS)
        return quotient_estimate(0.9 * below + tokens * (rng.exponential(0.1, ROWS) - 0.1), below)

    assert share_held(0.9, once, trials=FEW) >= 0.93 - SLACK_OF_FEW


def test_quantile_is_the_smallest_figure_that_the_share_does_not_exceed() -> None:
    """Of all figures, whichever rows they are of."""
    rows = [[5.0, 1.0], [4.0, 2.0, 3.0]]
    assert [quantile_estimate(rows, share).value for share in (0.2, 0.21, 0.6, 0.99)] == [1.0, 2.0, 3.0, 5.0]
    assert quantile_estimate([[1.0, 2.0]], 0.5) == Estimate(value=1.0)
    assert math.isnan(quantile_estimate([], 0.5).value)
    assert ends(quantile_estimate([[0.0, 0.0]] * 5, 0.99)) == (0.0, 0.0)
    assert quantile_estimate([[1.0], [math.nan]], 0.5).low is None


def test_quantile_holds_the_truth_though_a_rows_figures_resemble_each_other() -> None:
    """The 99th percentile of lognormal figures whose rows differ as much as within."""

    def once(rng: np.random.Generator) -> Estimate:
        sizes = rng.integers(20, 120, ROWS)
        return quantile_estimate([np.exp(rng.normal() / 2 + rng.normal(0, 1, n)) for n in sizes], 0.99)

    truth = math.exp(scipy.stats.norm.ppf(0.99) * math.sqrt(1.25))
    assert share_held(truth, once, trials=FEW) >= 0.93 - SLACK_OF_FEW
