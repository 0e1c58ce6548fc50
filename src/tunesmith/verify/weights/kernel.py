"""What :mod:`tunesmith.verify.weights.check` finds of bf16, in one pass over the numbers, where numba is installed.

For a base in bf16, a merge in bf16 and one update a tensor: what most of a large model's numbers are.  The counts are
those of the plain form, comparison by comparison; the sums are added up in another order.  What is rare (infinities,
NaN, and bf16's largest number, beside which stands infinity) is left to the plain form.
"""

from __future__ import annotations

import importlib.util
import threading
from functools import lru_cache
from typing import Any

import numpy as np

from tunesmith.checkpoint import Array, Float64
from tunesmith.verify.weights.rounding import DOUBLE, SINGLE, SMALLEST, UNIT_ROUNDOFF

_HALF_SMALLEST = SMALLEST["BF16"] / 2
_OF_DELTA = UNIT_ROUNDOFF["BF16"] * (1 + UNIT_ROUNDOFF["BF16"])
_OF_BOUND = SINGLE / DOUBLE
_SINGLE, _OF_X = SINGLE, 2.0**-52  # globals that the compiler reads as constants

_compiling = threading.Lock()


def available() -> bool:
    """Whether numba is installed; it is not imported for that."""
    return importlib.util.find_spec("numba") is not None


def _compiled() -> Any:
    """The compiled form; compiled once, and kept on the disk beside the package or in the user's cache.

    Returns:
        None where numba is there but does not go with the installed NumPy.
    """
    with _compiling:  # threads that come together wait for the first one's
        return _compile()


@lru_cache
def _compile() -> Any:
    try:
        import numba
    except ImportError:  # it refuses a NumPy that is newer than itself
        return None
    # The sums may be added up in any order.
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc"}}
    read = numba.types.Array(numba.uint16, 2, "C", readonly=True)  # as what comes of a file's bytes is
    row, number = numba.float64[::1], numba.int64[::1]
    signature = numba.types.boolean(read, read, numba.float64[:, ::1], row, number, row)
    try:
        return numba.njit(signature, cache=True, **options)(_tally_bf16)
    except RuntimeError:  # no folder that can be written to
        return numba.njit(signature, **options)(_tally_bf16)


def tally_bf16(
    stored_TC: Array, begin_TC: Array, delta_TC: Float64, bound_T: Float64
) -> tuple[tuple[int, ...], tuple[float, ...]] | None:
    """Classify rows as :func:`tunesmith.verify.weights.check.classify` does.

    Args:
        stored_TC: the merged model's numbers, uint16 patterns, C-contiguous.
        begin_TC: the base's, likewise.
        delta_TC: what should have been added.
        bound_T: bound on its error, a row.

    Returns:
        Counts (exact, faithful, twice-rounded, those of the twice-rounded that are a neighbour too, outside, unchanged)
        and sums (Δ·Δ, added·Δ, error·error); None where something is rare or nothing is compiled.
    """
    compiled, counts, sums = _compiled(), np.zeros(6, np.int64), np.zeros(3)
    if compiled is None or not compiled(stored_TC, begin_TC, delta_TC, bound_T, counts, sums):
        return None
    return tuple(counts.tolist()), tuple(sums.tolist())


def _tally_bf16(stored: Array, begin: Array, delta: Float64, bound: Float64, counts: Array, sums: Float64) -> bool:
    exact_n = near_n = twice_n = either_n = unchanged = rare = 0
    delta_delta = added_delta = error_error = 0.0
    for t in range(stored.shape[0]):
        bound_t = bound[t]
        for c in range(stored.shape[1]):
            bits, d = np.uint32(stored[t, c]), delta[t, c]
            size = bits & np.uint32(0x7FFF)
            base = np.uint32(begin[t, c])
            rare += int(size >= np.uint32(0x7F7F)) + int((base & np.uint32(0x7FFF)) >= np.uint32(0x7F80))
            w = np.float64(np.uint32(base << np.uint32(16)).view(np.float32))
            v = np.float64(np.uint32(bits << np.uint32(16)).view(np.float32))
            x = w + d
            added = v - w
            error = added - d
            unchanged += int(v == w)
            delta_delta += d * d
            added_delta += added * d
            error_error += error * error
            # Seen from 0, where the next number outwards and inwards are one step away as integers.
            negative = bits != size
            x = -x if negative else x
            at = np.float64(np.uint32(size << np.uint32(16)).view(np.float32))
            out = np.float64(np.uint32((size + np.uint32(1)) << np.uint32(16)).view(np.float32))
            down = size - np.uint32(1) if size > np.uint32(0) else np.uint32(0x8001)
            inn = np.float64(np.uint32(down << np.uint32(16)).view(np.float32))
            slack = bound_t + _OF_X * abs(x)
            exact = (x <= at + (out - at) * 0.5 + slack) & (x >= at - (at - inn) * 0.5 - slack)
            between = (not exact) & (x > inn + slack) & (x < out - slack)
            reach = _OF_DELTA * abs(d) + _HALF_SMALLEST + bound_t * _OF_BOUND + _SINGLE * abs(x) if d != 0.0 else 0.0
            low, high = x - reach, x + reach
            twice = (
                (not exact)
                & (low < high)
                & (at + (out - at) * 0.5 + slack >= low)
                & (at - (at - inn) * 0.5 - slack <= high)
            )
            exact_n += int(exact)
            twice_n += int(twice)
            near_n += int(between & (not twice))
            either_n += int(between & twice)
    counts[0] = exact_n
    counts[1] = near_n
    counts[2] = twice_n
    counts[3] = either_n
    counts[4] = stored.size - exact_n - near_n - twice_n
    counts[5] = unchanged
    sums[0] = delta_delta
    sums[1] = added_delta
    sums[2] = error_error
    return rare == 0
