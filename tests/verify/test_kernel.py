"""The compiled pass of the weights level counts as the plain form does."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from tunesmith.checkpoint import as_float64
from tunesmith.verify.weights.check import Tally, classify
from tunesmith.verify.weights.kernel import tally_bf16

pytest.importorskip("numba")


def bf16(values: np.ndarray) -> np.ndarray:
    """Rounded to nearest, as patterns."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def both(stored: np.ndarray, begin: np.ndarray, delta: np.ndarray, bound: np.ndarray) -> tuple[Tally, Tally]:
    """The compiled and the plain tally."""
    told = tally_bf16(stored, begin, delta, bound)
    assert told is not None
    compiled = Tally(stored.size, *told[0], *told[1])
    return compiled, classify(stored, "BF16", as_float64(begin, "BF16"), delta, bound[:, None])


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("bound", [0.0, 1e-18, 1e-5])
def test_counts_are_those_of_the_plain_form(scale: float, steps: int, bound: float) -> None:
    """Numbers exact, beside it, rounded early and far off; both signs, zeros, and numbers next to nothing."""
    rng = np.random.default_rng(int(1e7 * scale) + steps)
    begin = bf16(rng.standard_normal((40, 250)) * rng.choice([1.0, 1e-3, 1e-38, 1e30], (40, 250)))
    begin[rng.random(begin.shape) < 0.02] = 0x0000
    begin[rng.random(begin.shape) < 0.02] = 0x8000
    base = as_float64(begin, "BF16")
    delta = rng.standard_normal(begin.shape) * scale * np.abs(base)
    delta[rng.random(begin.shape) < 0.05] = 0.0
    stored = bf16(base + delta)
    stored += rng.integers(-steps, steps + 1, stored.shape).astype(np.uint16)
    stored[(stored & 0x7FFF) >= 0x7F7F] = 0x3F80
    stored[rng.random(begin.shape) < 0.01 * steps] = rng.choice([0, 1, 0x8000, 0x0080])  # as a disk may leave them
    compiled, plain = both(stored, begin, delta, np.abs(base).max(axis=1) * bound)
    ours, theirs = asdict(compiled), asdict(plain)
    for key in ("elements", "exact", "faithful", "twice_rounded", "either", "outside", "unchanged"):
        assert ours[key] == theirs[key], key
    assert ours == pytest.approx(theirs, rel=1e-9)
    assert theirs["exact"] > 0
    assert theirs["outside"] > 0 or not steps


@pytest.mark.parametrize("pattern", [0x7F7F, 0xFF7F, 0x7F80, 0x7FC0])
@pytest.mark.parametrize("where", ["stored", "begin"])
def test_what_is_rare_is_left_to_the_plain_form(pattern: int, where: str) -> None:
    """The largest number has infinity beside it, and NaN nothing."""
    arrays = {name: np.full((3, 5), 0x3F80, np.uint16) for name in ("stored", "begin")}
    arrays[where][1, 2] = pattern
    told = tally_bf16(arrays["stored"], arrays["begin"], np.zeros((3, 5)), np.zeros(3))
    assert (told is None) == (where == "stored" or pattern & 0x7FFF >= 0x7F80)
