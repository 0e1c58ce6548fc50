"""Which rounding errors hurt: E·H·Eᵀ, row by row of the error E, and how other columns make up for an error.

Rounding walks the columns, twice.  On its first walk,

    H = N·D·Nᵀ,  N unit upper triangular  ⇒  e·H·eᵀ = Σⱼ Dⱼⱼ·(eⱼ + Σ_{k<j} e_k·N_kj)²

so that a column j which is rounded after the columns k < j is best aimed at  tⱼ − Σ_{k<j} e_k·N_kj :  what is then left
is the least that later columns could reach, were they not to be rounded (the successive rounding of GPTQ,
https://arxiv.org/abs/2210.17323, and of Babai's nearest plane).  The last columns find none that make up for them.  So
these are visited again, all other errors being known:  e·H·eᵀ  is then least in eⱼ at  −Σ_{k≠j} e_k·H_kj / H_jj.

Both walks aim at  tⱼ − Σ_k e_k·F_kj  and differ in F.  Two forms of H give the same F at different prices:

- identity plus low rank, H = I + U·Uᵀ:  F_kj = u_k·v_j.  On the first walk v_j = (I + Σ_{l≥j} u_l·u_lᵀ)⁻¹·u_j, on the
  second v_j = u_j / (1 + u_j·u_j).  So a row carries Σ e_k·u_k, as many numbers as U has columns, and nothing else;
- any positive definite matrix, by its triangular factor.

Legend: I input features (columns), M columns of U, B columns of one block, T rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tunesmith.checkpoint import Float64

BLOCK = 32

Indices = npt.NDArray[np.intp]


class Walk(Protocol):
    """How errors that were made move the aims of columns, block by block; a state is what a panel of rows carries."""

    def within(self, start: int, stop: int) -> Float64:
        """F_kj for k and j in one block, (B, B), 0 on the diagonal."""

    def shift(self, state: Float64, start: int, stop: int, e_BT: Float64) -> Float64:
        """Σ e_k·F_kj over all columns k outside one block, for the columns j in it, (B, T).

        Args:
            state: what the rows carry.
            start: the block's first place.
            stop: the place to stop before.
            e_BT: the errors that the block's own columns have so far.
        """

    def take(self, state: Float64, start: int, stop: int, change_BT: Float64) -> None:
        """Carry on with what has been added to the errors of one block."""


class Hessian(Protocol):
    """A form of H.

    Attributes:
        columns: I.
        order: the columns in the order in which they are rounded; None for as they lie.
        revisited: how many of the last are visited again.
        first: the first walk.
        again: the second.
    """

    columns: int
    order: Indices | None
    revisited: int
    first: Walk
    again: Walk

    def begin(self, rows: int) -> Float64:
        """What a panel of rows carries before its first column."""

    def turn(self, state: Float64, errors_IT: Float64) -> Float64:
        """What it carries on its second walk, from what it carried at the end of the first and all its errors."""


def blocks(columns: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """The blocks of places from ``start`` on, in their order."""
    return ((first, min(first + BLOCK, columns)) for first in range(start, columns, BLOCK))


class LowRankHessian:
    """H = I + U·Uᵀ.

    Args:
        u_IM: U, float64; its rows in the order of the matrix's columns.
        order: the order in which columns are rounded; None for as they lie.
        revisited: how many of the last are visited again; whole blocks of them are.

    Attributes:
        u_IM: U, its rows in the order in which columns are rounded.
        v_IM: the v of the first walk.
        within_IB: N_kj of the first walk for the columns k before j in its block, by j and by k's place in the block.
    """

    def __init__(self, u_IM: Float64, *, order: Indices | None = None, revisited: int = 0) -> None:
        self.columns, self.order = u_IM.shape[0], order
        self.revisited = _whole_blocks(self.columns, revisited)
        u_IM = np.ascontiguousarray(u_IM if order is None else u_IM[order])
        self.u_IM, self.v_IM = u_IM, _later_columns_free(u_IM)
        self.within_IB = np.zeros((self.columns, BLOCK))
        for start, stop in blocks(self.columns):
            part = slice(start, stop)
            self.within_IB[part, : stop - start] = np.tril(self.v_IM[part] @ u_IM[part].T, -1)
        self.first: Walk = _FirstLowRankWalk(u_IM, self.v_IM, self.within_IB)
        self.again: Walk = _SecondLowRankWalk(u_IM)
        self._width = u_IM.shape[1]

    def begin(self, rows: int) -> Float64:
        """Σ e_k·u_k, (M, T)."""
        return np.zeros((self._width, rows))

    def turn(self, state: Float64, errors_IT: Float64) -> Float64:  # noqa: ARG002 - the sum is of all errors already
        """As :meth:`Hessian.turn`."""
        return state


class _FirstLowRankWalk:
    """F_kj = u_k·v_j."""

    def __init__(self, u_IM: Float64, v_IM: Float64, within_IB: Float64) -> None:
        self._u_IM, self._v_IM, self._within_IB = u_IM, v_IM, within_IB

    def within(self, start: int, stop: int) -> Float64:
        """As :meth:`Walk.within`."""
        return np.asarray(self._within_IB[start:stop, : stop - start].T)

    def shift(self, state: Float64, start: int, stop: int, e_BT: Float64) -> Float64:  # noqa: ARG002 - still 0
        """As :meth:`Walk.shift`."""
        return np.asarray(self._v_IM[start:stop] @ state)

    def take(self, state: Float64, start: int, stop: int, change_BT: Float64) -> None:
        """As :meth:`Walk.take`."""
        state += self._u_IM[start:stop].T @ change_BT


class _SecondLowRankWalk:
    """F_kj = u_k·u_j / (1 + u_j·u_j)."""

    def __init__(self, u_IM: Float64) -> None:
        self._u_IM, self._h_I1 = u_IM, 1 + np.einsum("im,im->i", u_IM, u_IM)[:, None]

    def within(self, start: int, stop: int) -> Float64:
        """As :meth:`Walk.within`."""
        f_BB: Float64 = self._u_IM[start:stop] @ (self._u_IM[start:stop] / self._h_I1[start:stop]).T
        return f_BB - np.diag(np.diagonal(f_BB))

    def shift(self, state: Float64, start: int, stop: int, e_BT: Float64) -> Float64:
        """As :meth:`Walk.shift`."""
        outside = state - self._u_IM[start:stop].T @ e_BT
        return np.asarray(self._u_IM[start:stop] @ outside / self._h_I1[start:stop])

    def take(self, state: Float64, start: int, stop: int, change_BT: Float64) -> None:
        """As :meth:`Walk.take`."""
        state += self._u_IM[start:stop].T @ change_BT


class DenseHessian:
    """H as a whole matrix; every column is visited again.

    Args:
        h_II: positive definite, float64.
        order: the order in which columns are rounded; None for as they lie.
        revisited: how many of the last are visited again; None for all.

    Raises:
        numpy.linalg.LinAlgError: it is not positive definite.
    """

    def __init__(self, h_II: Float64, *, order: Indices | None = None, revisited: int | None = None) -> None:
        self.columns, self.order = h_II.shape[0], order
        self.revisited = _whole_blocks(self.columns, self.columns if revisited is None else revisited)
        if order is not None:
            h_II = h_II[np.ix_(order, order)]
        self.first: Walk = _DenseWalk(unit_upper_factor(h_II)[0])
        self._f_II = h_II / np.diagonal(h_II)
        self.again: Walk = _DenseWalk(self._f_II, again=True)

    def begin(self, rows: int) -> Float64:
        """Σ e_k·F_kj for every column j, (I, T)."""
        return np.zeros((self.columns, rows))

    def turn(self, state: Float64, errors_IT: Float64) -> Float64:  # noqa: ARG002 - another F
        """As :meth:`Hessian.turn`."""
        return np.asarray(self._f_II.T @ errors_IT)


class _DenseWalk:
    """F as a whole matrix."""

    def __init__(self, f_II: Float64, *, again: bool = False) -> None:
        self._f_II, self._again = f_II, again

    def within(self, start: int, stop: int) -> Float64:
        """As :meth:`Walk.within`."""
        f_BB = self._f_II[start:stop, start:stop]
        return f_BB - np.diag(np.diagonal(f_BB)) if self._again else np.triu(f_BB, 1)

    def shift(self, state: Float64, start: int, stop: int, e_BT: Float64) -> Float64:
        """As :meth:`Walk.shift`."""
        if not self._again:
            return state[start:stop]
        return np.asarray(state[start:stop] - self._f_II[start:stop, start:stop].T @ e_BT)

    def take(self, state: Float64, start: int, stop: int, change_BT: Float64) -> None:
        """As :meth:`Walk.take`."""
        if self._again:
            state += self._f_II[start:stop].T @ change_BT
        else:
            state[stop:] += self._f_II[start:stop, stop:].T @ change_BT


def _whole_blocks(columns: int, revisited: int) -> int:
    return columns - max(0, columns - revisited) // BLOCK * BLOCK if revisited > 0 else 0


def _later_columns_free(u_IM: Float64) -> Float64:
    """v_j = (I + Σ_{l≥j} u_l·u_lᵀ)⁻¹·u_j for every j.

    From the last block to the first; P = (I + Σ_{l later} u_l·u_lᵀ)⁻¹.  In a block, with K = U_B·P·U_Bᵀ and
    I + K = R·D·Rᵀ, R unit upper triangular, the rows of Y = R⁻¹·U_B·P are those that Sherman and Morrison's formula
    gives column by column: V_B = D⁻¹·Y, and P becomes P − Yᵀ·D⁻¹·Y.
    """
    v_IM = np.empty_like(u_IM)
    p_MM = np.eye(u_IM.shape[1])
    for start, stop in reversed(list(blocks(len(u_IM)))):
        up_BM = u_IM[start:stop] @ p_MM
        r_BB, d_B = unit_upper_factor(np.eye(stop - start) + up_BM @ u_IM[start:stop].T)
        y_BM = np.linalg.solve(r_BB, up_BM)
        v_IM[start:stop] = y_BM / d_B[:, None]
        p_MM -= y_BM.T @ v_IM[start:stop]
    return v_IM


def unit_upper_factor(h_II: Float64) -> tuple[Float64, Float64]:
    """H = N·D·Nᵀ with N unit upper triangular and D diagonal: Cholesky's factor, from the last row to the first.

    Args:
        h_II: symmetric positive definite.

    Returns:
        N and the diagonal of D.

    Raises:
        numpy.linalg.LinAlgError: it is not positive definite.
    """
    upper_II = np.linalg.cholesky(h_II[::-1, ::-1])[::-1, ::-1]
    diagonal_I = np.diagonal(upper_II).copy()
    return upper_II / diagonal_I, diagonal_I**2


def row_space(*factors_RI: Float64) -> Float64:
    """An orthonormal basis of the space that the rows of some matrices span together.

    Args:
        factors_RI: matrices with as many columns each, float64.

    Returns:
        (I, rank): the basis.  What lies within float64's rounding of the others' span is left out.
    """
    stacked_RI = np.concatenate(factors_RI)
    lengths_R = np.linalg.norm(stacked_RI, axis=1)
    stacked_RI = stacked_RI[lengths_R > 0] / lengths_R[lengths_R > 0][:, None]
    if not len(stacked_RI):
        return np.zeros((stacked_RI.shape[1], 0))
    basis_IR, triangle_RR = np.linalg.qr(stacked_RI.T)
    left_RR, values_R, _ = np.linalg.svd(triangle_RR)
    kept = values_R > values_R[0] * max(stacked_RI.shape) * np.finfo(np.float64).eps
    return np.asarray(basis_IR @ left_RR[:, : len(values_R)][:, kept])
