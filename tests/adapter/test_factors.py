"""Norms, singular values and ranks of a product, from its factors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tunesmith.adapter.factors import effective_rank, inner_product, norm, singular_values
from tunesmith.checkpoint import Float64

# Gram matrices square the condition: √ε of the largest, times √r.
SINGULAR_TOLERANCE = 1e-7


def factors(r: int, *, inputs: int = 40, outputs: int = 30, seed: int = 0) -> tuple[Float64, Float64]:
    """Random A of (r, inputs) and B of (outputs, r)."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((r, inputs)), rng.standard_normal((outputs, r))


def values_of(a: Float64, b: Float64) -> Float64:
    """The singular values, as the room works them out."""
    return singular_values(a @ a.T, b.T @ b)


@pytest.mark.parametrize("r", [1, 2, 8, 64])
def test_singular_values_are_those_of_the_dense_product(r: int) -> None:
    """Against LAPACK's, of the product itself; of r = 64 too, which is more than the product has."""
    a, b = factors(r)
    exact = np.linalg.svd(b @ a, compute_uv=False)[:r]
    found = values_of(a, b)[: len(exact)]
    assert found.shape == exact.shape
    assert found == pytest.approx(exact, abs=SINGULAR_TOLERANCE * exact[0])


def test_singular_values_of_a_product_that_decays_keep_their_digits() -> None:
    """Down to a millionth of the largest, as trained adapters have them; a plain norm would not notice."""
    a, b = factors(6)
    u, v = np.linalg.qr(b)[0], np.linalg.qr(a.T)[0]
    wanted = 10.0 ** -np.arange(6)
    assert values_of(v.T, u * wanted) == pytest.approx(wanted, rel=1e-3)


def test_directions_that_are_lost_in_rounding_are_zero() -> None:
    """Twice the same direction is a rank of one, not of one and some noise."""
    a, b = factors(4)
    a[1:], b[:, 1:] = a[0], b[:, :1]
    found = values_of(a, b)
    assert (found > 0).tolist() == [True, False, False, False]
    assert effective_rank(found) == pytest.approx(1.0)


def test_the_norm_and_the_inner_product_are_those_of_the_dense_products() -> None:
    """Of unlike ranks too."""
    (a, b), (c, d) = factors(3), factors(5, seed=1)
    assert norm(a @ a.T, b.T @ b) == pytest.approx(np.linalg.norm(b @ a), rel=1e-12)
    assert inner_product(a, b, c, d) == pytest.approx(float(np.sum((b @ a) * (d @ c))), rel=1e-12)


def test_the_effective_rank_is_the_exponential_of_the_entropy() -> None:
    """Equal values: their number; one alone: one; 3 and 1: exp(H(3/4, 1/4)), whatever their scale; none: none."""
    assert effective_rank(np.array([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3.0)
    assert effective_rank(np.array([5.0])) == pytest.approx(1.0)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(np.array([3e-20, 1e-20])) == pytest.approx(math.exp(entropy))
    assert effective_rank(np.zeros(4)) is None
