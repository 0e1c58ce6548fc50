"""Stored bytes as numbers: every dtype that weights come in, decoded exactly to float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tunesmith.errors import CheckpointError

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]

_STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def stored_array(data: bytes, dtype: str, shape: tuple[int, ...]) -> Array:
    """View bytes as an array of the stored numbers; BF16 as its 16-bit patterns (uint16).

    Raises:
        CheckpointError: the dtype is not a floating-point one of ``FLOAT_DTYPES``.
    """
    if dtype not in _STORED:
        raise CheckpointError(
            "A tensor is stored in a dtype that cannot be computed with here.",
            expected=", ".join(FLOAT_DTYPES),
            found=dtype,
            next_step="use the model in its full-precision form, not a quantized one",
        )
    return np.frombuffer(data, dtype=_STORED[dtype]).reshape(shape)


def as_float64(stored: Array, dtype: str) -> Float64:
    """The numbers that :func:`stored_array` views, exactly, in float64."""
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        if dtype == "BF16":
            return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return stored.astype(np.float64)
