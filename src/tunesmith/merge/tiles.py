"""The arithmetic of a merge: one tile of rows, summed in float64 and rounded once.

    W' = round(W + s · B·A)

Legend: I input features, O output features, R rank, T rows of the tile.  A_RI, B_TR, W_TI.

Rounding twice (float64 → float32 → bf16, or Δ → bf16 and then the sum) changes bytes; :func:`round_once` goes from
float64 to the stored dtype in one step, to the nearest value, ties to even (IEEE 754-2019, 4.3.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tunesmith.checkpoint import Array, Float64, as_float64

_BF16_SHIFT = 45  # float64 keeps 52 bits of fraction, bf16 keeps 7
_BF16_MIN_NORMAL = 2.0**-126
_BF16_STEP_BELOW = 2.0**-133  # the spacing of bf16's subnormal numbers


@dataclass(frozen=True)
class TileSums:
    """What rounding kept of Δ in one tile; sums, so that tiles add up.

    Attributes:
        elements: numbers in the tile.
        unchanged: those whose stored bits are the base's.
        delta_delta: Σ Δ².
        realised_delta: Σ realised·Δ, where realised is stored result − W.
        error_error: Σ (realised − Δ)².
        overflowed: results that are infinite or NaN.
    """

    elements: int = 0
    unchanged: int = 0
    delta_delta: float = 0.0
    realised_delta: float = 0.0
    error_error: float = 0.0
    overflowed: int = 0

    def __add__(self, other: TileSums) -> TileSums:
        return TileSums(
            self.elements + other.elements,
            self.unchanged + other.unchanged,
            self.delta_delta + other.delta_delta,
            self.realised_delta + other.realised_delta,
            self.error_error + other.error_error,
            self.overflowed + other.overflowed,
        )


def merge_tile(stored_TI: Array, dtype: str, a_RI: Float64, b_TR: Float64, scaling: float) -> tuple[Array, TileSums]:
    """Merge one tile of rows.

    Args:
        stored_TI: rows of the base tensor as stored (BF16 as uint16 patterns).
        dtype: its safetensors dtype.
        a_RI: lora_A.
        b_TR: the same rows of lora_B.
        scaling: what multiplies B·A.

    Returns:
        The merged rows in the same stored form, and what rounding kept.
    """
    return settle_tile(as_float64(stored_TI, dtype), (scaling * b_TR) @ a_RI, dtype, kept_TI=stored_TI)


def settle_tile(
    w_TI: Float64,
    delta_TI: Float64,
    dtype: str,
    *,
    kept_TI: Array | None = None,
    result_TI: Float64 | None = None,
) -> tuple[Array, TileSums]:
    """Round a tile to what is stored, once, and sum up what that keeps.

    Args:
        w_TI: what the rows begin as.
        delta_TI: what is added to them.
        dtype: the dtype to store.
        kept_TI: the beginning in stored form, which stays wherever nothing is added; None to round it.
        result_TI: the exact result, where it is not the sum (DoRA's ratio); nothing is kept then.

    Returns:
        The stored rows, and what rounding kept.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is counted, and refused by the caller
        begun_TI = round_once(w_TI, dtype) if kept_TI is None else kept_TI
        if result_TI is None:
            # W + 0 is W, but −0.0 + 0.0 is 0.0: where nothing is added the base's own bits stay.
            merged_TI = np.where(delta_TI == 0, begun_TI, round_once(w_TI + delta_TI, dtype))
        else:
            merged_TI = round_once(result_TI, dtype)
        realised_TI = as_float64(merged_TI, dtype) - w_TI
        error_TI = realised_TI - delta_TI
        return merged_TI, TileSums(
            elements=merged_TI.size,
            unchanged=int(np.count_nonzero(merged_TI == begun_TI)),
            delta_delta=float(np.einsum("ti,ti->", delta_TI, delta_TI)),
            realised_delta=float(np.einsum("ti,ti->", realised_TI, delta_TI)),
            error_error=float(np.einsum("ti,ti->", error_TI, error_TI)),
            overflowed=int(np.count_nonzero(~np.isfinite(realised_TI))),
        )


def round_once(values: Float64, dtype: str) -> Array:
    """Round float64 to a stored dtype in one step, to nearest, ties to even.

    Args:
        values: any shape.
        dtype: ``BF16``, ``F16``, ``F32`` or ``F64``.

    Returns:
        The stored numbers, of the same shape; BF16 as uint16 patterns.  Too large values become infinite.
    """
    if dtype == "BF16":
        return _bf16_patterns(values)
    with np.errstate(over="ignore"):
        return values.astype({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype])


def _bf16_patterns(values: Float64) -> Array:
    bits = np.ascontiguousarray(values).view(np.uint64)
    kept_is_odd = (bits >> np.uint64(_BF16_SHIFT)) & np.uint64(1)
    half = np.uint64((1 << (_BF16_SHIFT - 1)) - 1)
    rounded = (bits + half + kept_is_odd) & ~np.uint64((1 << _BF16_SHIFT) - 1)
    nearest = rounded.view(np.float64)
    small = np.abs(values) < _BF16_MIN_NORMAL
    with np.errstate(over="ignore"):
        if small.any():
            subnormal = np.copysign(np.rint(values / _BF16_STEP_BELOW) * _BF16_STEP_BELOW, values)
            nearest = np.where(small, subnormal, nearest)
        single = nearest.astype(np.float32)
    patterns = (single.view(np.uint32) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), patterns)
