"""The number formats that weights are stored in: their neighbours, and rounding to the nearest of them.

``merge/`` rounds by arithmetic of its own; nothing here is shared with it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tunesmith.checkpoint import Array, Float64

# Unit roundoff 2^-p: half the distance from 1 to the next number.
UNIT_ROUNDOFF = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24, "F64": 2.0**-53}
SMALLEST = {"BF16": 2.0**-133, "F16": 2.0**-24, "F32": 2.0**-149, "F64": 2.0**-1074}
SINGLE, DOUBLE = UNIT_ROUNDOFF["F32"], UNIT_ROUNDOFF["F64"]

_NUMPY = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
_PATTERNS = {"BF16": np.int16, "F16": np.int16, "F32": np.int32, "F64": np.int64}


def is_nearest(stored: Array, x: Float64, dtype: str) -> npt.NDArray[np.bool_]:
    """Where the stored value surely is x rounded to nearest; False where only a closer look can tell.

    Not to be asked where x is not a number.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != "BF16":
            return np.asarray(stored == x.astype(stored.dtype))
        single = x.astype(np.float32).view(np.uint32)
    # Rounding to float32 first misleads only where that lands half-way between two bf16 values.
    half_way = (single & 0xFFFF) == 0x8000
    return np.asarray(((single + 0x8000) >> 16 == stored) & ~half_way)


def to_dtype(values: Float64, dtype: str) -> Float64:
    """Values rounded to nearest in a dtype, ties to even; BF16 by way of float32, whose error is far below."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "BF16":
            single = values.astype(np.float32).view(np.uint32)
            even = (single >> 16) & np.uint32(1)
            return ((single + (0x7FFF + even)) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)
        return values.astype(_NUMPY[dtype]).astype(np.float64)


def with_neighbours(stored: Array, dtype: str) -> tuple[Float64, Float64, Float64]:
    """Stored values with the next smaller and the next larger value of their dtype, in float64.

    IEEE patterns of one sign are ordered as integers are, so a neighbour is one step away as an integer.
    """
    kind = _PATTERNS[dtype]
    patterns = np.ascontiguousarray(stored).view(kind)
    lowest = -(1 << (8 * patterns.itemsize - 1))
    ordered = np.where(patterns < 0, lowest - patterns.astype(np.int64), patterns)
    pair = []
    for step in (-1, 1):
        moved = ordered + step
        raw = np.where(moved < 0, lowest - moved, moved).astype(kind)
        pair.append(_decode(raw, dtype))
    return _decode(patterns, dtype), pair[0], pair[1]


def _decode(patterns: Array, dtype: str) -> Float64:
    with np.errstate(invalid="ignore"):  # beside infinity stands a signalling NaN
        if dtype == "BF16":
            return (patterns.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return patterns.view(_NUMPY[dtype]).astype(np.float64)
