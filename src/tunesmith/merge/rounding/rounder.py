"""The ways of rounding but to nearest, ready to be used on the rows of one tensor."""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np

from tunesmith.checkpoint import Float64
from tunesmith.merge.rounding.grid import Bfloat16Grid, Grid
from tunesmith.merge.rounding.hessian import Hessian
from tunesmith.merge.rounding.solve import round_to_grid

_DRAWS_A_COUNT = 4  # a step of Philox's counter gives four numbers


class Rounder(Protocol):
    """A way of rounding.

    Attributes:
        grid: the numbers that can be stored.
        basis_IM: an orthonormal basis of the update's row space, within which the error is to be told; None for none.
    """

    grid: Grid
    basis_IM: Float64 | None

    def round(self, exact_TI: Float64, first_row: int) -> Float64:
        """Round some rows.

        Args:
            exact_TI: what they should be, float64, finite.
            first_row: the first one's place in the tensor.

        Returns:
            Numbers of the grid, float64, of the same shape; they do not depend on where a tile begins.
        """


class Feedback:
    """Each column makes up for the errors of the columns before it: :func:`round_to_grid`.

    Args:
        hessian: which errors hurt.
        basis_IM: see :class:`Rounder`.
        clamp: whether only the two numbers that bracket the exact one may be taken.
        grid: the numbers that can be stored.
        inside_of_state: what turns the state at the end of a row into its error within the basis, where that is all
            in the state; None where it is not.
    """

    def __init__(
        self,
        hessian: Hessian,
        *,
        basis_IM: Float64 | None,
        clamp: bool = True,
        grid: Grid | None = None,
        inside_of_state: Float64 | None = None,
    ) -> None:
        self.hessian, self.basis_IM, self.clamp, self.inside_of_state = hessian, basis_IM, clamp, inside_of_state
        self.grid = grid or Bfloat16Grid()

    def round(self, exact_TI: Float64, first_row: int) -> Float64:  # noqa: ARG002 - rows do not know their places
        """As :meth:`Rounder.round`."""
        return round_to_grid(exact_TI, self.hessian, self.grid, clamp=self.clamp)


class Stochastic:
    """Up or down by chance, so that the mean is the exact value (https://arxiv.org/abs/1502.02551).

    Args:
        seed: of the random numbers.
        name: of the tensor, so that no two tensors have the same ones.
        basis_IM: see :class:`Rounder`.
    """

    def __init__(self, seed: int, name: str, *, basis_IM: Float64 | None = None) -> None:
        self.grid: Grid = Bfloat16Grid()
        self.basis_IM = basis_IM
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        self._key = np.frombuffer(digest[:16], np.uint64)

    def round(self, exact_TI: Float64, first_row: int) -> Float64:
        """As :meth:`Rounder.round`."""
        rows, columns = exact_TI.shape
        counts = -(-columns // _DRAWS_A_COUNT)
        random = np.random.Generator(np.random.Philox(key=self._key, counter=first_row * counts))
        drawn_TI = random.random((rows, counts * _DRAWS_A_COUNT))[:, :columns]
        below_TI, above_TI, _ = self.grid.bracket(exact_TI)
        return np.where(drawn_TI * (above_TI - below_TI) < exact_TI - below_TI, above_TI, below_TI)
