"""The plain arithmetic of a merge: one tile of rows, summed in float64 and rounded once.

    W' = round(W + s · B·A)

Legend: I input features, O output features, R rank, M columns of U, T rows of the tile.  A_RI, B_TR, W_TI.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from tunesmith.checkpoint import Array, Float64, as_float64
from tunesmith.merge.rounding import Rounder, round_once


@dataclass(frozen=True)
class TileSums:
    """What rounding kept of Δ in one tile; sums, so that tiles add up.

    With E = realised − Δ, where realised is stored result − W.

    Attributes:
        elements: numbers in the tile.
        unchanged: those whose stored bits are the base's.
        delta_delta: Σ Δ².
        realised_delta: Σ realised·Δ.
        error_error: Σ E².
        overflowed: results that are infinite or NaN.
        inside: ‖E·basis‖², the error within the update's row space.
        inside_of: Σ Δ² of the tiles for which that was asked.
        beyond: results that are neither of the two numbers that bracket the exact one.
        nearest_unchanged: ``unchanged``, had every number been rounded to nearest.
        nearest_realised_delta: ``realised_delta``, likewise.
        nearest_error_error: ``error_error``, likewise.
        nearest_inside: ``inside``, likewise.
    """

    elements: int = 0
    unchanged: int = 0
    delta_delta: float = 0.0
    realised_delta: float = 0.0
    error_error: float = 0.0
    overflowed: int = 0
    inside: float = 0.0
    inside_of: float = 0.0
    beyond: int = 0
    nearest_unchanged: int = 0
    nearest_realised_delta: float = 0.0
    nearest_error_error: float = 0.0
    nearest_inside: float = 0.0

    def __add__(self, other: TileSums) -> TileSums:
        return TileSums(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @classmethod
    def of_nearest(cls, elements: int, unchanged: int, *products: float, overflowed: int = 0) -> TileSums:
        """The sums where what was stored is the nearest.

        Args:
            elements: numbers in the tile.
            unchanged: those whose stored bits are the base's.
            *products: Σ Δ², Σ realised·Δ and Σ E².
            overflowed: results that are infinite or NaN.
        """
        delta_delta, realised_delta, error_error = products
        return cls(
            elements,
            unchanged,
            delta_delta,
            realised_delta,
            error_error,
            overflowed,
            nearest_unchanged=unchanged,
            nearest_realised_delta=realised_delta,
            nearest_error_error=error_error,
        )


def settle_tile(
    w_TI: Float64,
    delta_TI: Float64,
    dtype: str,
    *,
    kept_TI: Array | None = None,
    result_TI: Float64 | None = None,
    rounder: Rounder | None = None,
    first_row: int = 0,
) -> tuple[Array, TileSums]:
    """Round a tile to what is stored, once, and sum up what that keeps.

    Args:
        w_TI: what the rows begin as.
        delta_TI: what is added to them.
        dtype: the dtype to store.
        kept_TI: the beginning in stored form, which stays wherever nothing is added; None to round it.
        result_TI: the exact result, where it is not the sum (DoRA's ratio); nothing is kept then.
        rounder: how to round; None to nearest.
        first_row: the tile's first row in its tensor.

    Returns:
        The stored rows, and what rounding kept.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is counted, and refused by the caller
        begun_TI = round_once(w_TI, dtype) if kept_TI is None else kept_TI
        exact_TI = w_TI + delta_TI if result_TI is None else result_TI
        nearest_TI = round_once(exact_TI, dtype)
        if result_TI is None:
            # W + 0 is W, but −0.0 + 0.0 is 0.0: where nothing is added the base's own bits stay.
            nearest_TI = np.where(delta_TI == 0, begun_TI, nearest_TI)
        error_TI = as_float64(nearest_TI, dtype) - w_TI - delta_TI
        nearest = TileSums.of_nearest(
            nearest_TI.size,
            int(np.count_nonzero(nearest_TI == begun_TI)),
            _dot(delta_TI, delta_TI),
            _dot(error_TI + delta_TI, delta_TI),
            _dot(error_TI, error_TI),
            overflowed=int(np.count_nonzero(~np.isfinite(error_TI))),
        )
        if rounder is None or nearest.overflowed:
            return nearest_TI, nearest
    rounded_TI = rounder.round(exact_TI, first_row)
    merged_TI = round_once(rounded_TI, dtype)
    if kept_TI is not None and result_TI is None:
        merged_TI = np.where((delta_TI == 0) & (rounded_TI == w_TI), kept_TI, merged_TI)
    chosen_TI = as_float64(merged_TI, dtype) - w_TI - delta_TI
    basis_IM = rounder.basis_IM
    inside, nearest_inside = (
        0.0 if basis_IM is None else float(np.square(part_TI @ basis_IM).sum()) for part_TI in (chosen_TI, error_TI)
    )
    below_TI, above_TI, _ = rounder.grid.bracket(exact_TI)
    return merged_TI, TileSums(
        elements=nearest.elements,
        unchanged=int(np.count_nonzero(merged_TI == begun_TI)),
        delta_delta=nearest.delta_delta,
        realised_delta=_dot(chosen_TI + delta_TI, delta_TI),
        error_error=_dot(chosen_TI, chosen_TI),
        inside=inside,
        inside_of=0.0 if basis_IM is None else nearest.delta_delta,
        beyond=int(np.count_nonzero((rounded_TI != below_TI) & (rounded_TI != above_TI))),
        nearest_unchanged=nearest.unchanged,
        nearest_realised_delta=nearest.realised_delta,
        nearest_error_error=nearest.error_error,
        nearest_inside=nearest_inside,
    )


def _dot(first_TI: Float64, second_TI: Float64) -> float:
    return float(np.einsum("ti,ti->", first_TI, second_TI))
