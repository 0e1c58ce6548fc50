"""Scales: how far the codes of a group reach.

Stored scales are numbers of the model's own dtype, so that code · scale is the same product everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tunesmith.checkpoint import Float64, QuantizedScheme, as_float64
from tunesmith.merge import Codes, Float8Codes, IntegerCodes, round_once

# A few of many numbers lie far out; to give up some of their reach makes the steps of all others finer.
_REACHES = {4: np.linspace(0.66, 1.05, 14), 8: np.linspace(0.78, 1.02, 13)}
_SEARCHED_ELEMENTS = 1 << 15  # at once, so that all that a scale takes fits the second cache
_EPSILON = {"BF16": 2.0**-7, "F16": 2.0**-10, "F32": 2.0**-23}


def codes_of(scheme: QuantizedScheme) -> Codes:
    """The numbers that a scheme's codes can be."""
    return Float8Codes() if scheme.is_float else IntegerCodes(scheme.bits)


def scales_of(
    exact_TI: Float64, scheme: QuantizedScheme, dtype: str, *, weights_I: Float64 | None = None, signed: bool = False
) -> Float64:
    """The scales of some rows, as they are stored.

    Codes reach one further below 0 than above it.  A scale of the sign that gives a group's outermost number the lowest
    code has steps 1/16 finer at 4 bits, and clips nothing; llama.cpp's Q4_0 does the same.

    Args:
        exact_TI: what the rows should be, float64.
        scheme: how they are stored.
        dtype: what scales are stored in.
        weights_I: how much an error in each column hurts, to search for the scale with the least of Σ weight·error²
            among some; None for the largest absolute value over half the range of codes, as compressed-tensors'
            ``calculate_qparams`` has it.
        signed: whether a scale may be negative.

    Returns:
        float64, (T, groups), none of them 0.
    """
    rows, columns = exact_TI.shape
    groups_TGK = exact_TI.reshape(rows, -1, scheme.group_size or columns)
    codes = codes_of(scheme)
    largest_TG = np.abs(groups_TGK).max(axis=2)
    plain_TG = largest_TG / ((codes.highest - codes.lowest) / 2)
    if weights_I is None or scheme.is_float:
        above_TG = groups_TGK.max(axis=2) >= largest_TG
        return _stored(np.where(above_TG, 1, -1) * largest_TG / codes.lowest if signed else plain_TG, dtype)
    weights_GK = weights_I.reshape(groups_TGK.shape[1:])
    reaches = _REACHES[scheme.bits]
    reaches = np.concatenate([reaches, -reaches]) if signed else reaches
    height = max(1, _SEARCHED_ELEMENTS // columns)
    parts = [slice(start, start + height) for start in range(0, rows, height)]
    searched = [
        _searched(groups_TGK[part], [_stored(reach * plain_TG[part], dtype) for reach in reaches], codes, weights_GK)
        for part in parts
    ]
    return np.concatenate(searched)


def _searched(groups_TGK: Float64, scales: Sequence[Float64], codes: Codes, weights_GK: Float64) -> Float64:
    """Of some scales of every group the one with the least error."""
    best_TG, least_TG = scales[0], np.full(scales[0].shape, np.inf)
    for scale_TG in scales:
        error_TG = _error(groups_TGK, scale_TG, codes, weights_GK)
        better_TG = error_TG < least_TG
        best_TG, least_TG = np.where(better_TG, scale_TG, best_TG), np.where(better_TG, error_TG, least_TG)
    return best_TG


def _stored(scale_TG: Float64, dtype: str) -> Float64:
    """As they are stored; a scale of nothing but zeros is the dtype's epsilon, as compressed-tensors has it."""
    stored_TG = as_float64(round_once(scale_TG, dtype), dtype)
    return np.where(stored_TG == 0, _EPSILON[dtype], stored_TG)


def _error(groups_TGK: Float64, scale_TG: Float64, codes: Codes, weights_GK: Float64) -> Float64:
    """Σ weight·error² of every group, its codes to nearest."""
    scale_TG1 = scale_TG[:, :, None]
    error_TGK = groups_TGK / scale_TG1
    np.rint(error_TGK, out=error_TGK)
    np.clip(error_TGK, codes.lowest, codes.highest, out=error_TGK)
    error_TGK *= scale_TG1
    error_TGK -= groups_TGK
    return np.asarray(np.einsum("tgk,tgk,gk->tg", error_TGK, error_TGK, weights_GK))
