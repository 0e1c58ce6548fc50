"""The arithmetic of :mod:`tunesmith.merge.tiles` for bf16 in one pass over the numbers, where numba is installed.

The bytes are the same: Δ comes from the same product of matrices, and what follows is, number by number, the same
float64 sum rounded by the same integer arithmetic.  What is rare (subnormal or non-finite results) is not done here but
left to the plain form.  Only the sums of what rounding kept are added up in another order.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from tunesmith.checkpoint import Array, Float64
from tunesmith.merge.tiles import TileSums

Kernel = Callable[[Array, Float64, Array, Float64], bool]

_compiling = threading.Lock()


def available() -> bool:
    """Whether numba is installed; it is not imported for that."""
    return importlib.util.find_spec("numba") is not None


def kernel() -> Kernel | None:
    """The compiled pass; compiled once, and kept on the disk beside the package or in the user's cache.

    Returns:
        None where numba is there but does not go with the installed NumPy.
    """
    with _compiling:  # threads that come together wait for the first one's
        return _compiled()


@lru_cache(maxsize=1)
def _compiled() -> Kernel | None:
    try:
        import numba
    except ImportError:  # it refuses a NumPy that is newer than itself
        return None

    # Only the sums may be added up in any order: every other number comes from one operation on its own inputs.
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc"}}
    signature = "b1(u2[::1], f8[::1], u2[::1], f8[::1])"
    try:
        compiled: Any = numba.njit(signature, cache=True, **options)(_settle_bf16)
    except RuntimeError:  # no folder that can be written to
        compiled = numba.njit(signature, **options)(_settle_bf16)
    return compiled  # type: ignore[no-any-return]


def settle_bf16(stored_TI: Array, delta_TI: Float64, merged_TI: Array) -> TileSums | None:
    """As :func:`tunesmith.merge.tiles.settle_tile` for BF16 that stays BF16.

    Args:
        stored_TI: the rows as stored, uint16 patterns, C-contiguous.
        delta_TI: what is added to them.
        merged_TI: the stored rows after it, written here.

    Returns:
        What rounding kept; None where something is rare or nothing is compiled, and ``merged_TI`` is not to be used.
    """
    compiled, sums = kernel(), np.empty(4)
    ordinary = compiled is not None and compiled(
        stored_TI.reshape(-1), delta_TI.reshape(-1), merged_TI.reshape(-1), sums
    )
    if not ordinary:
        return None
    unchanged, delta_delta, realised_delta, error_error = sums.tolist()
    return TileSums(stored_TI.size, int(unchanged), delta_delta, realised_delta, error_error, 0)


def _settle_bf16(stored: Array, delta: Float64, merged: Array, sums: Float64) -> bool:
    rare = 0
    unchanged = 0
    delta_delta = realised_delta = error_error = 0.0
    for i in range(stored.size):
        before = np.uint32(stored[i])
        d = delta[i]
        w = np.float64(np.uint32(before << np.uint32(16)).view(np.float32))
        # W + 0 is W, but −0.0 + 0.0 is 0.0; and −0.0 is what changes nothing.
        bits = np.float64(w + (d if d != 0.0 else -0.0)).view(np.uint64)
        size = bits & np.uint64(0x7FFFFFFFFFFFFFFF)
        # Zero, or from bf16's least normal number to where rounding gives infinity.
        ordinary = (size == np.uint64(0)) | (
            (size >= np.uint64(0x3810000000000000)) & (size < np.uint64(0x47EFF00000000000))
        )
        rare += int(not ordinary)
        odd = (bits >> np.uint64(45)) & np.uint64(1)
        rounded = np.uint64((bits + np.uint64(0xFFFFFFFFFFF) + odd) & np.uint64(0xFFFFE00000000000)).view(np.float64)
        after = np.uint32(np.float32(rounded).view(np.uint32) >> np.uint32(16))
        merged[i] = np.uint16(after)
        realised = rounded - w
        error = realised - d
        unchanged += int(after == before)
        delta_delta += d * d
        realised_delta += realised * d
        error_error += error * error
    sums[0] = unchanged
    sums[1] = delta_delta
    sums[2] = realised_delta
    sums[3] = error_error
    return rare == 0
