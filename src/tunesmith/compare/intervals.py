"""What a number of rows leaves open: estimates, their 95 % intervals, and what may be concluded from them.

Rows are what was drawn, never tokens: every interval comes from the spread of the rows.  Two variants that answered the
same rows are compared row by row, so that rows being hard or easy cancels.

=====================================  =========================================================
mean of a figure, or of differences    ``mean_estimate``: paired t, widened towards a long tail
nats a token                           ``ratio_estimate``: t of the linearised ratio
a function of sums: BLEU, chrF         ``jackknife_estimate``: t of the jackknife's pseudo-values
a share of rows                        ``proportion``: Wilson
a share, of the same rows, twice       ``paired_proportions``: Bonett and Price
two sets of different rows             ``independent_means``, ``independent_proportions``
a quotient of two means of the rows    ``quotient_estimate``: Fieller, by the means' intervals
a quantile of figures within rows      ``quantile_estimate``: Woodruff, by the means' intervals
=====================================  =========================================================

``benchmarks/interval_coverage.py`` prints how often each but the last two holds the truth at 50 rows.  The BCa
bootstrap, beside them in its table, holds it less often: 93 or 94 times of 100 for BLEU and chrF, and 90 to 93 where a
few rows make the figure.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tunesmith.record import Part

CONFIDENCE = 0.95
Bounds = tuple[float, float]
Verdict = Literal["better", "worse", "different", "no_difference", "unknown"]

_ROUNDING = 1e-9  # of pseudo-values, relative: n times the rounding of what they were computed from, with room
_MOST_SKEWED = 0.8  # skewness times quantile; at 1 the cubic turns, and two rows of twenty would say that all is open
_FIRST_STEP = 1e-3  # from a quotient towards the end of its interval, relative; doubled until it is past the end
_HALVINGS = 32
_SYMMETRIC = 1e-6  # a skewness below which the cubic's root loses more digits than the correction has


class Estimate(Part):
    """A figure and what its rows leave open.

    Attributes:
        value: the figure over all rows, in its own unit (a loss: nats a token); NaN where there is no row.
        low: lower end of its confidence interval; None where nothing is known of the spread: below two rows, or where a
            row is not finite.
        high: upper end.
    """

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def half(self) -> float | None:
        """Half the interval's width: what stands behind ±."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def verdict(difference: Estimate, higher_is_better: bool | None) -> Verdict:
    """What a difference to the base says.

    Args:
        difference: variant minus base.
        higher_is_better: of the figure itself; None where neither direction is better, as for a length.

    Returns:
        ``no_difference`` where 0 lies in the interval: none can be told, which does not say that there is none.
        ``unknown`` where there is no interval.  Else ``better`` or ``worse``, or ``different`` where neither is meant.
    """
    if difference.low is None or difference.high is None:
        return "unknown"
    if difference.low <= 0 <= difference.high:
        return "no_difference"
    if higher_is_better is None:
        return "different"
    return "better" if (difference.low > 0) == higher_is_better else "worse"


def mean_estimate(values: ArrayLike, *, bounds: Bounds | None = None, comparisons: int = 1) -> Estimate:
    """The mean of one figure a row; of differences of one row under two variants, it is the paired interval.

    Student's t, and on the side of the long tail no narrower than Hall's correction for skewness.  With 50 rows t alone
    covers 89 to 93 % where differences are skewed like an exponential or a lognormal, because a few rows make them;
    Hall's alone 92 % where they have heavy tails on both sides.  Where rows are not skewed this is the paired t.

    Args:
        values: one a row.
        bounds: what the figure can be at all; the interval ends there.
        comparisons: among how many intervals the 5 % are shared (Bonferroni), so that all hold together with 95 %.

    Returns:
        The estimate.  Rows that all say the same show no spread, which does not mean that there is none: within bounds
        a share of other rows that n rows may well have missed, 1 − 0.025^(1/n), is set to the bounds (the rule of
        three, two-sided); without bounds the interval is 0 to 0 where all are 0, and else None.

    Source: P. Hall, On the removal of skewness by transformation, Journal of the Royal Statistical Society B 54 (1992).
    """
    observed = np.asarray(values, np.float64)
    value = float(observed.mean()) if observed.size else math.nan
    return _t_interval(value, observed, bounds=bounds, comparisons=comparisons)


def ratio_estimate(nats: Sequence[float], tokens: Sequence[int], *, comparisons: int = 1) -> Estimate:
    """Nats a token over all rows, with a confidence interval whose observations are the rows.

    Args:
        nats: of every row; or differences of nats, of one row under two models.
        tokens: of every row, positive.
        comparisons: among how many intervals the 5 % are shared (Bonferroni), so that all hold together with 95 %.

    Returns:
        The ratio, with Student's t interval of its linearisation: residuals (nats_i − ratio·tokens_i) / mean(tokens).
        Long rows pull the ratio towards themselves: their residuals are widened by their leverage tokens_i / Σ tokens
        (HC2), and rows count as (Σ tokens)² / Σ tokens² in the degrees of freedom.  For rows of one length both leave
        the mean's textbook interval.

    Source: W. G. Cochran, Sampling Techniques, 3rd edition, section 6.4; J. G. MacKinnon and H. White, Some
    heteroskedasticity-consistent covariance matrix estimators, Journal of Econometrics 29 (1985), for HC2.
    """
    d, t = np.asarray(nats, np.float64), np.asarray(tokens, np.float64)
    if not len(d):
        return Estimate(value=math.nan)
    value = float(d.sum() / t.sum())
    if len(d) < 2 or not math.isfinite(value):
        return Estimate(value=value)
    residuals = (d - value * t) / t.mean()
    error = math.sqrt(float(np.sum(residuals**2 / (1 - t / t.sum())))) / len(d)
    degrees = max(1.0, float(t.sum() ** 2 / (t @ t)) - 1)
    half = _quantile(1 - _tail(comparisons), degrees) * error
    return Estimate(value=value, low=value - half, high=value + half)


def quotient_estimate(above: ArrayLike, below: ArrayLike, *, comparisons: int = 1) -> Estimate:
    """The quotient of two means of the same rows, such as the share of one gain that another keeps.

    Args:
        above: one a row.
        below: one a row.
        comparisons: among how many intervals the 5 % are shared (Bonferroni).

    Returns:
        Σ above / Σ below, with all quotients q at which the mean of above − q·below cannot be told from 0, as
        :func:`mean_estimate` tells it.  Where the mean of ``below`` itself cannot be, these have no end, and no
        interval is given.

    Source: E. C. Fieller, Some problems in interval estimation, Journal of the Royal Statistical Society B 16 (1954).
    """
    a, b = np.asarray(above, np.float64), np.asarray(below, np.float64)
    total = float(b.sum())
    value = float(a.sum()) / total if total else math.nan
    if len(a) < 2 or not math.isfinite(value) or not _apart(b, comparisons):
        return Estimate(value=value)

    def end(towards: int) -> float:
        inside, outside = 0.0, _FIRST_STEP * max(1.0, abs(value))
        while not _apart(a - (value + towards * outside) * b, comparisons):
            inside, outside = outside, 2 * outside
        for _ in range(_HALVINGS):
            middle = (inside + outside) / 2
            apart = _apart(a - (value + towards * middle) * b, comparisons)
            inside, outside = (inside, middle) if apart else (middle, outside)
        return value + towards * inside

    return Estimate(value=value, low=end(-1), high=end(1))


def quantile_estimate(rows: Sequence[ArrayLike], share: float, *, comparisons: int = 1) -> Estimate:
    """A quantile of figures of which every row has several, such as the 99th percentile of its tokens' KL.

    Figures of one row resemble each other, so that rows are what was drawn here too.

    Args:
        rows: of every row its figures, at least one.
        share: of all figures that lie at or below the quantile, between 0 and 1.
        comparisons: among how many intervals the 5 % are shared (Bonferroni).

    Returns:
        The smallest figure that so many do not exceed, with all figures x at which the number of a row's figures up to
        x, less the share of its figures, cannot be told from 0 by the rows' mean, as :func:`mean_estimate` tells it.
        It ends at the smallest and the largest figure that were seen.

    Source: R. S. Woodruff, Confidence intervals for medians and other position measures, Journal of the American
    Statistical Association 47 (1952).
    """
    each = [np.sort(np.asarray(row, np.float64)) for row in rows]
    figures = np.sort(np.concatenate(each)) if each else np.empty(0)
    if not len(figures):
        return Estimate(value=math.nan)
    sizes = np.array([len(row) for row in each], np.float64)
    last = len(figures) - 1
    found = min(last, max(0, math.ceil(share * len(figures) * (1 - _ROUNDING)) - 1))
    if len(each) < 2 or not np.isfinite(figures).all():
        return Estimate(value=float(figures[found]))

    def apart(place: int) -> bool:
        counts = [np.searchsorted(row, figures[place], "right") for row in each]
        return _apart(np.array(counts) - share * sizes, comparisons)

    low = bisect_left(range(found), x=True, key=lambda place: not apart(place))
    high = found + bisect_left(range(found + 1, last + 1), x=True, key=apart)
    return Estimate(value=float(figures[found]), low=float(figures[low]), high=float(figures[min(last, high + 1)]))


def jackknife_estimate(
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    rows: NDArray[np.float64],
    *,
    bounds: Bounds | None = None,
    comparisons: int = 1,
) -> Estimate:
    """A smooth function of sums over rows, such as corpus BLEU, or of two variants' sums, such as its difference.

    Leaving out each row in turn gives a pseudo-value a row, n·θ − (n − 1)·θ₋ᵢ; the interval is that of their mean, as
    :func:`mean_estimate` makes it.

    Args:
        statistic: maps sums of shape ``(..., k)`` to figures of shape ``(...)``.
        rows: what is summed, of shape ``(rows, k)``.
        bounds: what the figure can be at all; the interval ends there.
        comparisons: among how many intervals the 5 % are shared (Bonferroni).

    Source: J. W. Tukey, Bias and confidence in not-quite large samples, Annals of Mathematical Statistics 29 (1958);
    R. G. Miller, The jackknife: a review, Biometrika 61 (1974).
    """
    n = len(rows)
    if not n:
        return Estimate(value=math.nan)
    total = rows.sum(axis=0)
    value = float(statistic(total))
    if n < 2:
        return Estimate(value=value)
    pseudo_values = n * value - (n - 1) * statistic(total - rows)
    return _t_interval(value, pseudo_values, bounds=bounds, comparisons=comparisons)


def proportion(successes: int, rows: int, *, comparisons: int = 1) -> Estimate:
    """A share of rows, 0 to 1, with Wilson's interval: 0 of 50 is 0 to 7 %, and not nothing.

    Args:
        successes: how many rows.
        rows: of how many.
        comparisons: among how many intervals the 5 % are shared (Bonferroni).

    Source: L. D. Brown, T. T. Cai and A. DasGupta, Interval estimation for a binomial proportion, Statistical Science
    16 (2001).
    """
    from scipy.stats import binomtest

    if not rows:
        return Estimate(value=math.nan)
    found = binomtest(successes, rows).proportion_ci(1 - 2 * _tail(comparisons), method="wilson")
    return Estimate(value=successes / rows, low=float(found.low), high=float(found.high))


def paired_proportions(gained: int, lost: int, *, rows: int, comparisons: int = 1) -> Estimate:
    """The difference of two shares of the same rows; where no row changed it is 0, and not surely so.

    Args:
        gained: rows that count under the variant and not under the base.
        lost: rows that count under the base only.
        rows: all of them, those included that count under both or neither.
        comparisons: among how many intervals the 5 % are shared (Bonferroni).

    Returns:
        (gained − lost) / rows, −1 to 1, with the adjusted Wald interval, which adds a row to either kind.

    Source: D. G. Bonett and R. M. Price, Adjusted Wald confidence interval for a difference of binomial proportions
    based on paired data, Journal of Educational and Behavioral Statistics 37 (2012).
    """
    if not rows:
        return Estimate(value=math.nan)
    more, less = (gained + 1) / (rows + 2), (lost + 1) / (rows + 2)
    centre = more - less
    half = _quantile(1 - _tail(comparisons), math.inf) * math.sqrt((more + less - centre**2) / (rows + 2))
    return Estimate(value=(gained - lost) / rows, low=max(-1.0, centre - half), high=min(1.0, centre + half))


def independent_proportions(one: tuple[int, int], other: tuple[int, int], *, comparisons: int = 1) -> Estimate:
    """The difference of two shares of different rows, such as training rows and held-out ones.

    Args:
        one: successes and rows.
        other: the same of the other set.
        comparisons: among how many intervals the 5 % are shared (Bonferroni).

    Returns:
        Share of the one minus share of the other, with the interval that their two Wilson intervals span.

    Source: R. G. Newcombe, Interval estimation for the difference between independent proportions, Statistics in
    Medicine 17 (1998), method 10.
    """
    a, b = proportion(*one, comparisons=comparisons), proportion(*other, comparisons=comparisons)
    value = a.value - b.value
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return Estimate(value=value)
    down, up = math.hypot(a.value - a.low, b.high - b.value), math.hypot(a.high - a.value, b.value - b.low)
    return Estimate(value=value, low=value - down, high=value + up)


def independent_means(values: ArrayLike, others: ArrayLike, *, comparisons: int = 1) -> Estimate:
    """The difference of the means of two sets of different rows, with Welch's t interval.

    Args:
        values: one figure a row.
        others: those of the other set.
        comparisons: among how many intervals the 5 % are shared (Bonferroni).

    Returns:
        Mean of the values minus mean of the others; without an interval below two rows in either set, where a figure is
        not finite, or where neither set shows any spread.

    Source: B. L. Welch, The generalization of Student's problem, Biometrika 34 (1947).
    """
    a, b = np.asarray(values, np.float64), np.asarray(others, np.float64)
    if not a.size or not b.size:
        return Estimate(value=math.nan)
    value = float(a.mean() - b.mean())
    known = min(a.size, b.size) >= 2 and math.isfinite(value)
    if not known or not (_spread(a) or _spread(b)):
        return Estimate(value=value)
    u, v = a.var(ddof=1) / a.size, b.var(ddof=1) / b.size
    degrees = float((u + v) ** 2 / (u**2 / (a.size - 1) + v**2 / (b.size - 1)))
    half = _quantile(1 - _tail(comparisons), degrees) * math.sqrt(u + v)
    return Estimate(value=value, low=value - half, high=value + half)


def _apart(values: NDArray[np.float64], comparisons: int) -> bool:
    """Whether the mean of one figure a row can be told from 0; that of figures that are all the same can be."""
    found = mean_estimate(values, comparisons=comparisons)
    return found.low is None or found.high is None or not found.low <= 0 <= found.high


def _t_interval(value: float, observed: NDArray[np.float64], *, bounds: Bounds | None, comparisons: int) -> Estimate:
    n = len(observed)
    if n < 2 or not math.isfinite(value) or not np.isfinite(observed).all():
        return Estimate(value=value)
    spread = _spread(observed)
    if not spread:
        return _without_spread(value, n, bounds=bounds, comparisons=comparisons)
    deviations = observed - observed.mean()
    skewness = float(np.mean(deviations**3) / np.mean(deviations**2) ** 1.5) / math.sqrt(n)
    quantile = _quantile(1 - _tail(comparisons), n - 1)
    error = spread / math.sqrt(n)
    low = value - error * max(quantile, _corrected(quantile, skewness))
    high = value - error * min(-quantile, _corrected(-quantile, skewness))
    if bounds is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Estimate(value=value, low=low, high=high)


def _corrected(quantile: float, skewness: float) -> float:
    """Where a statistic of that skewness has the quantile: the root of Hall's cubic, t + s·t²/3 + s²·t³/27 + s/6."""
    if abs(skewness) < _SYMMETRIC:
        return quantile
    most = _MOST_SKEWED / abs(quantile)
    skewness = max(-most, min(skewness, most))
    return float(3 * (np.cbrt(1 + skewness * (quantile - skewness / 6)) - 1) / skewness)


def _spread(observed: NDArray[np.float64]) -> float:
    spread = float(observed.std(ddof=1)) if len(observed) > 1 else 0.0
    return spread if spread > _ROUNDING * float(np.abs(observed).max(initial=0.0)) else 0.0


def _without_spread(value: float, rows: int, *, bounds: Bounds | None, comparisons: int) -> Estimate:
    if bounds is None:
        return Estimate(value=value, low=value, high=value) if value == 0 else Estimate(value=value)
    missed = 1 - _tail(comparisons) ** (1 / rows)
    return Estimate(value=value, low=value + missed * (bounds[0] - value), high=value + missed * (bounds[1] - value))


def _tail(comparisons: int) -> float:
    """The chance that is left to each side of each interval."""
    return (1 - CONFIDENCE) / (2 * comparisons)


@cache
def _quantile(probability: float, degrees: float) -> float:
    from scipy.stats import t

    return float(t.ppf(probability, degrees))
