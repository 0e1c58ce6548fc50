"""Figures as people read them."""

from __future__ import annotations

import math

import pytest

from tunesmith.report.units import figure, human_bytes, human_count, human_seconds, human_share, loss_figure


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (human_bytes(373), "373 B"),
        (human_bytes(19_593_528), "18.7 MiB"),
        (human_bytes(15 * 1024**3), "15.0 GiB"),
        (human_bytes(3 * 1024**4), "3.0 TiB"),
        (human_count(331_776), "331,776"),
        (human_count(4_884_480), "4.88 M"),
        (human_seconds(0.04), "0.04 s"),
        (human_seconds(125), "2 min 5 s"),
        (human_seconds(3840), "1 h 4 min"),
        (human_share(0.524), "52.4%"),
        (human_share(0.0031), "0.31%"),
        (figure(0.937), "0.937"),
        (figure(6.2e-4), "6.2×10⁻⁴"),
        (figure(-1.21), "−1.21"),
        (figure(None), "–"),
        (figure(math.nan), "NaN"),
        (loss_figure(-0.7261), "−0.726"),
    ],
)
def test_a_figure_has_its_unit_and_no_more_digits_than_it_needs(shown: str, expected: str) -> None:
    """The same in every language."""
    assert shown == expected


def test_a_share_is_whole_only_where_it_is_exactly_so() -> None:
    """One damaged number in a billion must not read as 100%."""
    assert human_share(1.0) == "100%"
    assert human_share(1 - 1e-9) == "> 99.99%"
    assert human_share(1e-9) == "< 0.01%"
    assert human_share(0.0) == "0%"
