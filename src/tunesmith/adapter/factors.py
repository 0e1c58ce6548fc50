"""What two factors say of their product, from their r×r Gram matrices: the d×d product is never formed.

The triangular factors of B = QR and Aᵀ = Q'R' would say the same, and take LAPACK several times as long.  Gram matrices
(Cholesky's way to R) square the condition: a norm keeps nearly all its digits, a singular value below about 10⁻⁷ of the
largest is lost, and none of the figures here would show it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from tunesmith.adapter.load import Adapted, Adapter
from tunesmith.checkpoint import Float64

_LOST = 1e-7
"""Singular values below this share of the largest are rounding of float64 Gram matrices (√ε = 1.5e-8, times √r)."""


def matrices(adapter: Adapter, adapted: Adapted) -> Iterator[tuple[Float64, Float64]]:
    """The factors of every matrix that a pair adapts.

    Args:
        adapter: the adapter.
        adapted: one of its pairs.

    Yields:
        A of shape (r, in) and B of shape (out, r), float64; a stack's matrices in turn.

    Raises:
        AdapterError: a factor holds NaN or infinity.
    """
    a_ri, b_or = adapter.finite(adapted.lora_A), adapter.finite(adapted.lora_B)
    for matrix in range(adapted.stacked):
        yield a_ri[matrix * adapted.r : (matrix + 1) * adapted.r], b_or[:, matrix :: adapted.stacked]


def has_product(adapter: Adapter, adapted: Adapted) -> bool:
    """Whether B·A is the update: not of a convolution with groups, whose B covers a group's share of A."""
    a, b = (adapter.header.tensors[name].shape for name in (adapted.lora_A, adapted.lora_B))
    return a[0] == b[1]


def inner_product(a_ri: Float64, b_or: Float64, c_si: Float64, d_os: Float64) -> float:
    """⟨B·A, D·C⟩ (Frobenius) = Σ (BᵀD) ∘ (ACᵀ)."""
    return float(np.sum((b_or.T @ d_os) * (a_ri @ c_si.T)))


def norm(gram_a: Float64, gram_b: Float64) -> float:
    """‖B·A‖ (Frobenius), of AAᵀ and BᵀB."""
    return math.sqrt(max(0.0, float(np.sum(gram_a * gram_b))))


def singular_values(gram_a: Float64, gram_b: Float64) -> Float64:
    """The singular values of B·A, largest first, shape (r,); those that float64 cannot tell from zero are zero.

    With AAᵀ = S·Sᵀ the squares are the eigenvalues of SᵀBᵀBS.

    Args:
        gram_a: AAᵀ, shape (r, r).
        gram_b: BᵀB, shape (r, r).
    """
    values, vectors = np.linalg.eigh(gram_a)
    root_rr = vectors * np.sqrt(np.maximum(values, 0.0))
    found = np.sqrt(np.maximum(np.linalg.eigvalsh(root_rr.T @ gram_b @ root_rr)[::-1], 0.0))
    return np.where(found > _LOST * found[0], found, 0.0)


def effective_rank(singular_values: Float64) -> float | None:
    """The exponential of the entropy of the normalised singular values; None where all are zero.

    Source: O. Roy and M. Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    """
    found = singular_values[singular_values > 0]
    if not found.size:
        return None
    shares = found / found.sum()
    return math.exp(float(-np.sum(shares * np.log(shares))))
