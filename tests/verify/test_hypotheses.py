"""What a diagnosis guesses from one tensor for the others."""

from __future__ import annotations

import pytest

from tunesmith.verify.diagnosis.hypotheses import _renaming


@pytest.mark.parametrize(
    ("pair", "other", "expected"),
    [
        (("layers.0.q.w", "layers.1.q.w"), "layers.17.q.w", "layers.18.q.w"),
        (("layers.5.q.w", "layers.2.q.w"), "layers.9.k.w", "layers.6.k.w"),
        (("layers.3.q.w", "layers.7.q.w"), "layers.7.q.w", "layers.3.q.w"),
        (("layers.3.q.w", "layers.3.k.w"), "layers.8.q.w", "layers.8.k.w"),
        (("layers.3.q.w", "layers.3.k.w"), "layers.8.k.w", "layers.8.q.w"),
        (("layers.3.q.w", "layers.4.k.w"), "layers.8.q.w", "layers.9.k.w"),
    ],
)
def test_a_name_is_moved_as_another_was(pair: tuple[str, str], other: str, expected: str) -> None:
    """Numbers by as much, words for each other, and either way round."""
    assert expected in _renaming(*pair)(other)


def test_a_name_that_does_not_change_is_none() -> None:
    """A tensor is not in its own place by mistake; nor has a short name a part to change."""
    assert _renaming("layers.3.q.w", "layers.3.k.w")("layers.8.v.w") == []
    assert "norm" not in _renaming("layers.3.q.w", "layers.4.q.w")("norm")
