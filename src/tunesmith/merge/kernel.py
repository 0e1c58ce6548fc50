"""The arithmetic of :mod:`tunesmith.merge.tiles` for bf16 in one pass over the numbers, where numba is installed.

The bytes are the same.  To nearest, Δ comes from the same product of matrices, and what follows is, number by number,
the same float64 sum rounded by the same integer arithmetic.  With feedback the products are made here, panel by panel,
so that an aim may differ in its last bit.  What is rare (subnormal or non-finite results) is not done here but left to
the plain form.  The sums of what rounding kept are added up in another order; the error of rounding to nearest inside
the row space, by which nothing is decided, in float32.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from tunesmith.checkpoint import Array, Float64
from tunesmith.merge.rounding import Feedback, LowRankHessian, Rounder
from tunesmith.merge.tiles import TileSums

_SETTLE_BF16 = "b1(u2[::1], f8[::1], u2[::1], f8[::1])"
_ROUND_PANEL = f"b1(u2[:, ::1], {'f8[:, ::1], ' * 5}f4[:, ::1], f8[:, ::1], f4[:, ::1], u2[:, ::1], f8[::1])"

_compiling = threading.Lock()


def available() -> bool:
    """Whether numba is installed; it is not imported for that."""
    return importlib.util.find_spec("numba") is not None


def prepare(feedback: bool) -> None:
    """Compile, or load, what a merge will need."""
    if feedback:
        _compiled(_round_panel, _ROUND_PANEL)
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
        from numba.extending import register_jitable
    except ImportError:  # it refuses a NumPy that is newer than itself
        return None

    # The sums may be added up in any order.  A product and a sum may be one operation, so that an aim may differ by its
    # last bit from the plain form's: a chance of 1e-15 a number that it is then rounded otherwise.
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract"}}
    register_jitable(**options)(_add_products)
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
    stored_TI: Array, b_TR: Float64, a_IR: Float64, rounder: Feedback, merged_TI: Array
) -> TileSums | None:
    """As :func:`tunesmith.merge.tiles.settle_tile` with feedback, for BF16 that stays BF16 and W' = W + B·A.

    Args:
        stored_TI: a panel of rows as stored, uint16 patterns, C-contiguous.
        b_TR: its rows of B, scaled.
        a_IR: A's transpose, C-contiguous.
        rounder: how to round; one that :func:`can_settle` knows.
        merged_TI: the stored rows after it, written here.

    Returns:
        What rounding kept; None where something is rare or nothing is compiled, and ``merged_TI`` is not to be used.
    """
    compiled, hessian, basis_IM = _compiled(_round_panel, _ROUND_PANEL), rounder.hessian, rounder.basis_IM
    inside_of_state = rounder.inside_of_state
    assert isinstance(hessian, LowRankHessian), "can_settle was asked"  # noqa: S101
    assert basis_IM is not None and inside_of_state is not None, "can_settle was asked"  # noqa: S101, PT018
    rows, sums = len(stored_TI), np.empty(7)
    state_MT, nearest_MT = hessian.begin(rows), np.zeros((basis_IM.shape[1], rows), np.float32)
    ordinary = compiled is not None and compiled(
        stored_TI,
        a_IR,
        np.ascontiguousarray(b_TR.T),
        hessian.u_IM,
        hessian.v_IM,
        hessian.within_IB,
        basis_IM.astype(np.float32),
        state_MT,
        nearest_MT,
        merged_TI,
        sums,
    )
    if not ordinary:
        return None
    unchanged, nearest_unchanged, *products = sums.tolist()
    delta_delta, realised_delta, error_error, nearest_realised, nearest_error = products
    return TileSums(
        stored_TI.size,
        int(unchanged),
        delta_delta,
        realised_delta,
        error_error,
        inside=float(np.square(inside_of_state @ state_MT).sum()),
        inside_of=delta_delta,
        nearest_unchanged=int(nearest_unchanged),
        nearest_realised_delta=nearest_realised,
        nearest_error_error=nearest_error,
        nearest_inside=float(np.square(nearest_MT, dtype=np.float64).sum()),
    )


def can_settle(rounder: Rounder | None) -> bool:
    """Whether the compiled pass knows a way of rounding: to nearest, and :func:`tunesmith.merge.rounders.faithful`."""
    if rounder is None:
        return True
    if not isinstance(rounder, Feedback) or not rounder.clamp or rounder.basis_IM is None:
        return False
    hessian = rounder.hessian
    alike = isinstance(hessian, LowRankHessian) and hessian.order is None and not hessian.revisited
    return alike and rounder.inside_of_state is not None


def _add_products(total: Array, factors: Array, rows: Array, count: int) -> None:
    """Add Σ factors[i]·rows[i], over the first so many, to a total; eight at once, so that it is seldom read."""
    whole = count - count % 8
    for i in range(0, whole, 8):
        f0, f1, f2, f3 = factors[i], factors[i + 1], factors[i + 2], factors[i + 3]
        f4, f5, f6, f7 = factors[i + 4], factors[i + 5], factors[i + 6], factors[i + 7]
        for t in range(total.size):
            total[t] += (
                (f0 * rows[i, t] + f1 * rows[i + 1, t])
                + (f2 * rows[i + 2, t] + f3 * rows[i + 3, t])
                + (f4 * rows[i + 4, t] + f5 * rows[i + 5, t])
                + (f6 * rows[i + 6, t] + f7 * rows[i + 7, t])
            )
    for i in range(whole, count):
        factor = factors[i]
        for t in range(total.size):
            total[t] += factor * rows[i, t]


def _round_panel(
    stored: Array,
    a: Float64,
    b: Float64,
    u: Float64,
    v: Float64,
    within: Float64,
    basis: Array,
    state: Float64,
    nearest_state: Array,
    merged: Array,
    sums: Float64,
) -> bool:
    """Every column of a panel of rows, block by block; False where a number is rare."""
    rows, columns = stored.shape
    width = within.shape[1]
    block = np.empty((width, rows), np.uint16)  # beside each other, or all would meet in a few lines of the cache
    pattern = np.empty(rows, np.uint32)
    delta, aim = np.empty(rows), np.empty(rows)
    errors, nearest_errors = np.empty((width, rows)), np.empty((width, rows), np.float32)
    u_block, basis_block = np.empty((u.shape[1], width)), np.empty((basis.shape[1], width), np.float32)
    rare = unchanged = nearest_unchanged = 0
    delta_delta = error_delta = error_error = nearest_delta = nearest_error = 0.0
    for start in range(0, columns, width):
        count = min(width, columns - start)
        for t in range(rows):
            for j in range(count):
                block[j, t] = stored[t, start + j]
        for j in range(count):
            column = start + j
            for t in range(rows):
                pattern[t] = block[j, t]
                delta[t] = 0.0
                aim[t] = 0.0
            _add_products(delta, a[column], b, a.shape[1])
            _add_products(aim, v[column], state, v.shape[1])
            _add_products(aim, within[column], errors, j)
            # What comes of a number takes its place: with more arrays than these, the compiler fears that they overlap.
            for t in range(rows):
                d, before = delta[t], pattern[t]
                w = np.float64(np.uint32(before << np.uint32(16)).view(np.float32))
                # W + 0 is W, but −0.0 + 0.0 is 0.0; and −0.0 is what changes nothing.
                exact = np.float64(w + (d if d != 0.0 else -0.0))
                bits = exact.view(np.uint64)
                size = bits & np.uint64(0x7FFFFFFFFFFFFFFF)
                # Zero, or from bf16's least normal number to where the outer neighbour is infinity.
                ordinary = (size == np.uint64(0)) | (
                    (size >= np.uint64(0x3810000000000000)) & (size < np.uint64(0x47EFE00000000000))
                )
                rare += int(not ordinary)
                inner_bits = np.uint64(bits & np.uint64(0xFFFFE00000000000))
                on_grid = inner_bits == bits
                outer_bits = np.uint64(inner_bits + (np.uint64(0) if on_grid else np.uint64(0x200000000000)))
                odd = (bits >> np.uint64(45)) & np.uint64(1)
                near_bits = np.uint64((bits + np.uint64(0xFFFFFFFFFFF) + odd) & np.uint64(0xFFFFE00000000000))
                inner, outer = inner_bits.view(np.float64), outer_bits.view(np.float64)
                past = exact - aim[t] - (inner + outer) * 0.5
                past = past if exact >= 0.0 else -past
                further = (past > 0.0) | ((past == 0.0) & (odd == np.uint64(1)))
                taken = outer if further else inner
                near = near_bits.view(np.float64)
                error, near_error = taken - exact, near - exact
                aim[t] = error
                delta[t] = near_error
                stored_now = np.uint32(np.float32(taken).view(np.uint32) >> np.uint32(16))
                pattern[t] = stored_now
                unchanged += int(stored_now == before)
                nearest_unchanged += int(near == w)
                delta_delta += d * d
                error_delta += error * d
                error_error += error * error
                nearest_delta += near_error * d
                nearest_error += near_error * near_error
            errors_j, nearest_errors_j = errors[j], nearest_errors[j]
            for t in range(rows):
                block[j, t] = np.uint16(pattern[t])
                errors_j[t] = aim[t]
                nearest_errors_j[t] = np.float32(delta[t])
        for t in range(rows):
            for j in range(count):
                merged[t, start + j] = block[j, t]
        for j in range(count):
            for m in range(u.shape[1]):
                u_block[m, j] = u[start + j, m]
            for m in range(basis.shape[1]):
                basis_block[m, j] = basis[start + j, m]
        for m in range(u.shape[1]):
            _add_products(state[m], u_block[m], errors, count)
        for m in range(basis.shape[1]):
            _add_products(nearest_state[m], basis_block[m], nearest_errors, count)
    sums[0] = unchanged
    sums[1] = nearest_unchanged
    sums[2] = delta_delta
    sums[3] = delta_delta + error_delta  # Σ realised·Δ
    sums[4] = error_error
    sums[5] = delta_delta + nearest_delta
    sums[6] = nearest_error
    return rare == 0
