"""A metric of a variant's replies beside the base's, as ``evaluate`` puts it together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.compare.intervals import Estimate, Verdict, verdict
from tunesmith.compare.metrics import Metric, difference, estimate


@dataclass(frozen=True)
class Paired:
    """Both values, and the difference of the two."""

    rows: int
    value: Estimate
    base: Estimate
    difference: Estimate
    verdict: Verdict


def paired(
    metric: Metric,
    replies: Sequence[str],
    *,
    base_replies: Sequence[str],
    expected: Sequence[str | None],
    comparisons: int = 1,
) -> Paired:
    """Measure replies and the base's to the same rows."""
    numbers, base_numbers = metric.rows(replies, expected), metric.rows(base_replies, expected)
    found = difference(metric, numbers, base_numbers=base_numbers, comparisons=comparisons)
    return Paired(
        rows=len(numbers),
        value=estimate(metric, numbers),
        base=estimate(metric, base_numbers),
        difference=found,
        verdict=verdict(found, metric.higher_is_better),
    )
