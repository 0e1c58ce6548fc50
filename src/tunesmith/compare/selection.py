"""From row scores to the checkpoint that is to be taken: the statistics alone, without a model.

A loss is a ratio, nats of all rows over tokens of all rows, as the trainer's is.  Rows are what was drawn, not tokens:
intervals come from the spread of the rows.  Checkpoints are compared row by row, so that rows being hard or easy, which
is most of a loss's own uncertainty, cancels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tunesmith.compare.intervals import Estimate, ratio_estimate
from tunesmith.models import BASE, RowScore


@dataclass(frozen=True)
class Selection:
    """Which checkpoint is to be taken.

    Attributes:
        verdict: why: ``clear`` (the last one is the best, beyond noise), ``earliest`` (a later one is lower, but not
            beyond noise), ``best_early`` (it is the lowest, and later ones are not worse beyond noise), ``all_alike``
            (none can be told from another), ``overfit`` (it is the lowest, and the last one is worse),
            ``overfit_earliest`` (the last one is worse, and a lower one is not better beyond noise), ``only_one``,
            ``base_alike`` (no difference to the base can be seen), ``base_better``, ``too_few_rows``, ``not_finite``.
        recommended: the checkpoint's name; None where nothing can be said.
        best: the one of the lowest loss; None where no loss is finite.
        last: the last one whose loss is finite.
        alike: those that cannot be told apart from the best, itself among them, in order.
        losses: by name.
        to_best: differences to the best, by name; without the best itself.
        to_base: differences to the base, by name; empty where it was not scored.
        comparisons: the number of differences that the confidence of each is shared among.
    """

    verdict: str
    recommended: str | None
    best: str | None
    last: str | None
    alike: tuple[str, ...]
    losses: Mapping[str, Estimate]
    to_best: Mapping[str, Estimate]
    to_base: Mapping[str, Estimate]
    comparisons: int


def select(scores: Mapping[str, Sequence[RowScore]]) -> Selection:
    """Choose among checkpoints that were scored on the same rows.

    One stays in the running unless it is worse than the best beyond noise: the interval of its paired difference to the
    best, Bonferroni over all comparisons since the best was picked as the best, lies wholly above 0.  So the checkpoint
    that is truly best is left out with a chance of at most 5 %, however many there are (multiple comparisons with the
    best).  Of those in the running that also beat the base beyond noise, the earliest is taken: it has had least time
    to learn the rows by heart.

    Args:
        scores: row scores by name, at least one row, in order of step; the base's by the name ``base``, where it was
            scored.

    Source: J. C. Hsu, Multiple Comparisons: Theory and Methods, 1996, chapter 4.
    """
    losses = {name: _loss(rows) for name, rows in scores.items()}
    finite = [name for name, loss in losses.items() if math.isfinite(loss.value)]
    saved = [name for name in finite if name != BASE]
    comparisons = max(1, len(finite) - 1)
    if not saved:
        return Selection("not_finite", None, None, None, (), losses, {}, {}, comparisons)

    def differences(to: str) -> dict[str, Estimate]:
        return {name: _difference(scores[name], scores[to], comparisons) for name in finite if name != to}

    best = min(saved, key=lambda name: losses[name].value)
    to_best = differences(best)
    to_base = differences(BASE) if BASE in finite else {}
    alike = tuple(name for name in saved if name == best or not _above_zero(to_best[name]))
    better = [name for name in alike if not to_base or _below_zero(to_base[name])]
    if losses[best].low is None:
        return Selection("too_few_rows", None, best, saved[-1], (), losses, to_best, to_base, comparisons)
    recommended = (better or alike)[0]
    verdict = _verdict(saved, alike, best, to_base=to_base, recommended=recommended)
    return Selection(verdict, recommended, best, saved[-1], alike, losses, to_best, to_base, comparisons)


def _verdict(
    saved: Sequence[str], alike: Sequence[str], best: str, *, to_base: Mapping[str, Estimate], recommended: str
) -> str:
    if to_base and _above_zero(to_base[best]):
        return "base_better"
    if to_base and not _below_zero(to_base[best]):
        return "base_alike"
    if len(saved) == 1:
        return "only_one"
    if saved[-1] not in alike:
        return "overfit" if recommended == best else "overfit_earliest"
    if recommended == saved[-1]:
        return "clear"
    if len(alike) == len(saved) and recommended == saved[0]:
        return "all_alike"
    return "best_early" if recommended == best else "earliest"


def _loss(rows: Sequence[RowScore]) -> Estimate:
    return ratio_estimate([row.nll for row in rows], [row.tokens for row in rows])


def _difference(rows: Sequence[RowScore], others: Sequence[RowScore], comparisons: int) -> Estimate:
    nats = [row.nll - other.nll for row, other in zip(rows, others, strict=True)]
    return ratio_estimate(nats, [row.tokens for row in rows], comparisons=comparisons)


def _above_zero(difference: Estimate) -> bool:
    return difference.low is not None and difference.low > 0


def _below_zero(difference: Estimate) -> bool:
    return difference.high is not None and difference.high < 0
