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
from tunesmith.merge.rounding import BLOCK, Feedback, blocks
from tunesmith.merge.tiles import TileSums

_SETTLE_BF16 = "b1(u2[::1], f8[::1], u2[::1], f8[::1])"
_ROUND_BLOCK = (
    "b1(u2[:, ::1], i8[::1], f8[:, ::1], f8[:, ::1], f8[:, ::1], b1, u2[:, ::1], f8[:, ::1], f8[:, ::1], f8[::1])"
)

_compiling = threading.Lock()


def available() -> bool:
    """Whether numba is installed; it is not imported for that."""
    return importlib.util.find_spec("numba") is not None


def prepare(feedback: bool) -> None:
    """Compile, or load, what a merge will need."""
    if feedback:
        _compiled(_round_block, _ROUND_BLOCK)
    else:
        _compiled(_settle_bf16, _SETTLE_BF16)


def _compiled(function: Callable[..., bool], signature: str) -> Any:
    """The compiled form; compiled once, and kept on the disk beside the package or in the user's cache.

    Returns:
        None where numba is there but does not go with the installed NumPy.
    """
    with _compiling:  # threads that come together wait for the first one's
        return _compile(function, signature)


@lru_cache
def _compile(function: Callable[..., bool], signature: str) -> Any:
    try:
        import numba
    except ImportError:  # it refuses a NumPy that is newer than itself
        return None

    # Only the sums may be added up in any order: every other number comes from one operation on its own inputs.
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc"}}
    try:
        return numba.njit(signature, cache=True, **options)(function)
    except RuntimeError:  # no folder that can be written to
        return numba.njit(signature, **options)(function)


def settle_bf16(stored_TI: Array, delta_TI: Float64, merged_TI: Array) -> TileSums | None:
    """As :func:`tunesmith.merge.tiles.settle_tile` for BF16 that stays BF16.

    Args:
        stored_TI: the rows as stored, uint16 patterns, C-contiguous.
        delta_TI: what is added to them.
        merged_TI: the stored rows after it, written here.

    Returns:
        What rounding kept; None where something is rare or nothing is compiled, and ``merged_TI`` is not to be used.
    """
    compiled, sums = _compiled(_settle_bf16, _SETTLE_BF16), np.empty(4)
    ordinary = compiled is not None and compiled(
        stored_TI.reshape(-1), delta_TI.reshape(-1), merged_TI.reshape(-1), sums
    )
    if not ordinary:
        return None
    unchanged, delta_delta, realised_delta, error_error = sums.tolist()
    return TileSums.of_nearest(stored_TI.size, int(unchanged), delta_delta, realised_delta, error_error)


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


def settle_panel(
    stored_TI: Array, b_TR: Float64, a_RI: Float64, rounder: Feedback, merged_TI: Array
) -> TileSums | None:
    """As :func:`tunesmith.merge.tiles.settle_tile` with feedback, for BF16 that stays BF16 and W' = W + B·A.

    Args:
        stored_TI: a panel of rows as stored, uint16 patterns, C-contiguous.
        b_TR: its rows of B, scaled.
        a_RI: A.
        rounder: how to round.
        merged_TI: the stored rows after it, written here.

    Returns:
        What rounding kept; None where something is rare or nothing is compiled, and ``merged_TI`` is not to be used.
    """
    compiled, hessian = _compiled(_round_block, _ROUND_BLOCK), rounder.hessian
    if compiled is None:
        return None
    rows, columns = stored_TI.shape
    places_I = np.arange(columns) if hessian.order is None else np.ascontiguousarray(hessian.order)
    a_IR, b_RT = np.ascontiguousarray(a_RI.T[places_I]), np.ascontiguousarray(b_TR.T)
    basis_IM = np.empty((columns, 0)) if rounder.basis_IM is None else rounder.basis_IM[places_I]
    inside_MT, nearest_inside_MT = np.zeros((2, basis_IM.shape[1], rows))
    e_IT, nearest_BT, sums, passing = np.zeros((columns, rows)), np.empty((BLOCK, rows)), np.zeros(8), np.zeros(8)
    state, again_from = hessian.begin(rows), columns - hessian.revisited
    for walk, begin in ((hessian.first, 0), (hessian.again, again_from)):
        if walk is hessian.again and hessian.revisited:
            state = hessian.turn(state, e_IT)
        for start, stop in blocks(columns, begin):
            part = slice(start, stop)
            final = walk is hessian.again or start < again_from
            e_BT, before_BT = e_IT[part], e_IT[part].copy()
            if not compiled(
                stored_TI,
                places_I[part],
                a_IR[part] @ b_RT,
                np.ascontiguousarray(walk.shift(state, start, stop, before_BT)),
                walk.within(start, stop),
                rounder.clamp,
                merged_TI,
                e_BT,
                nearest_BT,
                sums if final else passing,
            ):
                return None
            walk.take(state, start, stop, e_BT - before_BT)
            if final and basis_IM.shape[1]:
                inside_MT += basis_IM[part].T @ e_BT
                nearest_inside_MT += basis_IM[part].T @ nearest_BT[: stop - start]
    unchanged, beyond, nearest_unchanged, *products = sums.tolist()
    delta_delta, realised_delta, error_error, nearest_realised, nearest_error = products
    return TileSums(
        stored_TI.size,
        int(unchanged),
        delta_delta,
        realised_delta,
        error_error,
        inside=float(np.square(inside_MT).sum()),
        beyond=int(beyond),
        nearest_unchanged=int(nearest_unchanged),
        nearest_realised_delta=nearest_realised,
        nearest_error_error=nearest_error,
        nearest_inside=float(np.square(nearest_inside_MT).sum()),
    )


def _round_block(
    stored: Array,
    places: Array,
    delta: Float64,
    shift: Float64,
    within: Float64,
    clamp: bool,
    merged: Array,
    errors: Float64,
    nearest_errors: Float64,
    sums: Float64,
) -> bool:
    """One block of columns, (columns, rows) but for ``stored`` and ``merged``; False where a number is rare."""
    columns, rows = delta.shape
    before = np.empty(rows, np.uint32)
    after = np.empty((columns, rows), np.uint16)
    aim = np.empty(rows)
    rare = 0
    unchanged = beyond = nearest_unchanged = 0
    delta_delta = realised_delta = error_error = nearest_realised = nearest_error = 0.0
    for j in range(columns):
        place = places[j]
        for t in range(rows):
            before[t] = stored[t, place]
        for t in range(rows):
            aim[t] = shift[j, t]
        for k in range(columns):
            factor = within[k, j]
            if factor != 0.0:
                for t in range(rows):
                    aim[t] += factor * errors[k, t]
        for t in range(rows):
            d = delta[j, t]
            w = np.float64(np.uint32(before[t] << np.uint32(16)).view(np.float32))
            # W + 0 is W, but −0.0 + 0.0 is 0.0; and −0.0 is what changes nothing.
            exact = np.float64(w + (d if d != 0.0 else -0.0))
            wish = np.float64(exact - aim[t])
            bits = exact.view(np.uint64)
            wish_bits = wish.view(np.uint64)
            size = bits & np.uint64(0x7FFFFFFFFFFFFFFF)
            wish_size = wish_bits & np.uint64(0x7FFFFFFFFFFFFFFF)
            # Zero, or from bf16's least normal number to where rounding gives infinity or its outer neighbour is that.
            ordinary = (size == np.uint64(0)) | (
                (size >= np.uint64(0x3810000000000000)) & (size < np.uint64(0x47EFE00000000000))
            )
            ordinary &= (
                clamp
                | (wish_size == np.uint64(0))
                | ((wish_size >= np.uint64(0x3810000000000000)) & (wish_size < np.uint64(0x47EFE00000000000)))
            )
            rare += int(not ordinary)
            inner_bits = np.uint64(bits & np.uint64(0xFFFFE00000000000))
            on_grid = inner_bits == bits
            outer_bits = np.uint64(inner_bits + (np.uint64(0) if on_grid else np.uint64(0x200000000000)))
            odd = (bits >> np.uint64(45)) & np.uint64(1)
            near_bits = np.uint64((bits + np.uint64(0xFFFFFFFFFFF) + odd) & np.uint64(0xFFFFE00000000000))
            inner, outer, near = inner_bits.view(np.float64), outer_bits.view(np.float64), near_bits.view(np.float64)
            past = wish - (inner + outer) * 0.5
            past = past if exact >= 0.0 else -past
            further = (past > 0.0) | ((past == 0.0) & (odd == np.uint64(1)))
            taken_bits = np.uint64(outer_bits if further else inner_bits)
            wish_odd = (wish_bits >> np.uint64(45)) & np.uint64(1)
            free_bits = np.uint64((wish_bits + np.uint64(0xFFFFFFFFFFF) + wish_odd) & np.uint64(0xFFFFE00000000000))
            taken_bits = np.uint64(taken_bits if clamp else free_bits)
            taken = taken_bits.view(np.float64)
            error, near_error = taken - exact, near - exact
            errors[j, t] = error
            nearest_errors[j, t] = near_error
            stored_now = np.uint32(np.float32(taken).view(np.uint32) >> np.uint32(16))
            after[j, t] = np.uint16(stored_now)
            unchanged += int(stored_now == before[t])
            nearest_unchanged += int(near == w)
            beyond += int((taken_bits != inner_bits) & (taken_bits != outer_bits))
            realised, near_realised = taken - w, near - w
            delta_delta += d * d
            realised_delta += realised * d
            error_error += (realised - d) * (realised - d)
            nearest_realised += near_realised * d
            nearest_error += (near_realised - d) * (near_realised - d)
    for t in range(rows):
        for j in range(columns):
            merged[t, places[j]] = after[j, t]
    sums[0] += unchanged
    sums[1] += beyond
    sums[2] += nearest_unchanged
    sums[3] += delta_delta
    sums[4] += realised_delta
    sums[5] += error_error
    sums[6] += nearest_realised
    sums[7] += nearest_error
    return rare == 0
