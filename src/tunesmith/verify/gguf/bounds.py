"""How far a stored number may be from the one it stands for, type by type.

A block type holds codes and a step, stored in float16.  Whoever writes it divides by the step, rounds to the nearest
code, and stores the step's own rounding: so a number is within half a step, and what the step's rounding moves its code
by.  At the two outer codes the range ends, and what lies beyond it is clipped: for these a whole step is allowed, and
in K types what rounding a sub-block's six-bit scale takes from its range.  A step that is larger than the block's
numbers warrant would hide an error below it; that is held against the block's largest number.

Source: ggml's ``quantize_row_*_ref`` and ``make_qx_quants`` (ggml-quants.c), and ``gguf.quants`` for the layouts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tunesmith.checkpoint import Array, Float64

_FP16 = 2.0**-11  # half a unit in the last place, relative
_FP16_TINY = 2.0**-25  # half the smallest float16
_SLACK = 1 + 2.0**-10  # float32 arithmetic on the way to a code
_WIDE = 1.2  # an importance matrix moves a range's ends by up to a tenth


@dataclass(frozen=True)
class Steps:
    """What a block type stored, for every number of some rows; float64 of shape (blocks, numbers of a block).

    Attributes:
        step: the distance between two codes.
        code: the code, counted in steps from the offset.
        outer: whether the code is the first or the last.
        slop: what the stored float16 numbers' own rounding moves the value by.
        clip: what may be missing beyond the outer codes.
        limit: the largest step that the block's numbers warrant; None where the type's own fitting decides it.
    """

    step: Float64
    code: Float64
    outer: Array
    slop: Float64
    clip: Float64
    limit: Float64 | None = None


def outside(kind: str, raw: Array, stored: Float64, exact: Float64) -> Array | None:
    """Which of some rows' numbers their type's rounding does not explain.

    Args:
        kind: the type, such as ``Q8_0``.
        raw: the rows as they are stored.
        stored: the numbers that they mean.
        exact: the model's numbers, of the same shape.

    Returns:
        bool of the same shape; None where this type's rounding is not known here.
    """
    finite = np.isfinite(stored)
    if kind in _ROUNDED:
        rounded: Array = ~((stored == _ROUNDED[kind](exact)) & finite)
        return rounded
    if kind not in _STEPS:
        return None
    size = _BLOCK[kind]
    x = exact.reshape(-1, size)
    steps = _STEPS[kind](raw.reshape(x.shape[0], -1), x)
    half = np.abs(steps.step) / 2 * _SLACK + steps.slop + np.abs(x) * 2.0**-20
    bound = np.where(steps.outer, half + steps.clip, half)
    with np.errstate(invalid="ignore"):
        good = np.abs(stored.reshape(x.shape) - x) <= bound
    if steps.limit is not None:
        good &= np.abs(steps.step) <= steps.limit + _FP16_TINY
    bad: Array = ~(good.reshape(stored.shape) & finite)
    return bad


def known(kind: str) -> bool:
    """Whether a type's rounding is known here."""
    return kind in _ROUNDED or kind in _STEPS


def _to_f32(exact: Float64) -> Float64:
    with np.errstate(over="ignore"):
        return exact.astype(np.float32).astype(np.float64)


def _to_f16(exact: Float64) -> Float64:
    with np.errstate(over="ignore"):
        return exact.astype(np.float16).astype(np.float64)


def _to_bf16(exact: Float64) -> Float64:
    with np.errstate(over="ignore"):
        bits = exact.astype(np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32).astype(np.float64)


def _half(raw: Array, start: int) -> Float64:
    """A float16 of every block, as a column."""
    return np.ascontiguousarray(raw[:, start : start + 2]).view(np.float16).astype(np.float64)


def _nibbles(raw: Array) -> Float64:
    return np.concatenate([raw & 15, raw >> 4], axis=1).astype(np.float64)


def _fifth_bits(raw: Array) -> Float64:
    return np.unpackbits(raw, axis=1, bitorder="little").astype(np.float64)


def _symmetric(step: Float64, code: Float64, x: Float64, *, last: int, warrant: float) -> Steps:
    """Codes around 0, the largest number of which set the step: at most ``amax / warrant``."""
    limit = np.abs(x).max(axis=1, keepdims=True) / warrant * (1 + 4 * _FP16)
    outer = (code == last) | (code == -last - 1)
    slop = np.abs(code) * (np.abs(step) * _FP16 * _SLACK + _FP16_TINY)
    return Steps(step=step, code=code, outer=outer, slop=slop, clip=np.abs(step) / 2, limit=limit)


def _q8_0(raw: Array, x: Float64) -> Steps:
    code = np.ascontiguousarray(raw[:, 2:]).view(np.int8).astype(np.float64)
    return _symmetric(_half(raw, 0), code, x, last=127, warrant=127)


def _q4_0(raw: Array, x: Float64) -> Steps:
    return _symmetric(_half(raw, 0), _nibbles(raw[:, 2:]) - 8, x, last=7, warrant=7.1)


def _q5_0(raw: Array, x: Float64) -> Steps:
    code = _nibbles(raw[:, 6:]) + 16 * _fifth_bits(raw[:, 2:6]) - 16
    return _symmetric(_half(raw, 0), code, x, last=15, warrant=15.1)


def _with_offset(raw: Array, code: Float64, x: Float64, *, last: int) -> Steps:
    """Codes from 0 above a stored minimum, over the block's own range."""
    step, low = _half(raw, 0), _half(raw, 2)
    reach = np.maximum(x.max(axis=1, keepdims=True), 0) - np.minimum(x.min(axis=1, keepdims=True), 0)
    slop = code * (np.abs(step) * _FP16 * _SLACK + _FP16_TINY) + np.abs(low) * _FP16 * _SLACK + _FP16_TINY
    return Steps(
        step=step,
        code=code,
        outer=(code == 0) | (code == last),
        slop=slop,
        clip=np.abs(step) / 2,
        limit=_WIDE * reach / last,
    )


def _q4_1(raw: Array, x: Float64) -> Steps:
    return _with_offset(raw, _nibbles(raw[:, 4:]), x, last=15)


def _q5_1(raw: Array, x: Float64) -> Steps:
    return _with_offset(raw, _nibbles(raw[:, 8:]) + 16 * _fifth_bits(raw[:, 4:8]), x, last=31)


def _k_scales(raw: Array) -> tuple[Float64, Float64]:
    """The six-bit scales and minima of a super-block's eight sub-blocks: (blocks, 8) each."""
    low, high, mixed = raw[:, 0:4], raw[:, 4:8], raw[:, 8:12]
    scale = np.concatenate([low & 63, (mixed & 15) | ((low >> 2) & 48)], axis=1)
    minimum = np.concatenate([high & 63, (mixed >> 4) | ((high >> 2) & 48)], axis=1)
    return scale.astype(np.float64), minimum.astype(np.float64)


def _k_with_minimum(raw: Array, code: Float64, *, last: int) -> Steps:
    """Q4_K and Q5_K: value = d·scale·code - dmin·minimum, in eight sub-blocks of 32."""
    d, dmin = _half(raw, 0), _half(raw, 2)
    scale, _ = _k_scales(raw[:, 4:16])
    each = np.repeat(scale, 32, axis=1)
    outer = (code == 0) | (code == last) | (each == 0)
    step = d * each
    # What half a unit of a six-bit number takes from the range, and one step that the fit may leave out.
    clip = np.broadcast_to(d * last / 2 + np.abs(dmin) / 2, step.shape) + step
    return Steps(step=step, code=code, outer=outer, slop=np.zeros_like(step), clip=clip)


def _q4_k(raw: Array, x: Float64) -> Steps:
    nibbles = raw[:, 16:144].reshape(-1, 4, 1, 32) >> np.array([0, 4], dtype=np.uint8).reshape(1, 1, 2, 1)
    return _k_with_minimum(raw, (nibbles & 15).reshape(x.shape).astype(np.float64), last=15)


def _q5_k(raw: Array, x: Float64) -> Steps:
    nibbles = raw[:, 48:176].reshape(-1, 4, 1, 32) >> np.array([0, 4], dtype=np.uint8).reshape(1, 1, 2, 1)
    fifth = (raw[:, 16:48].reshape(-1, 1, 32) >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1)) & 1
    code = (nibbles & 15).reshape(x.shape) | (fifth.reshape(x.shape) << 4)
    return _k_with_minimum(raw, code.astype(np.float64), last=31)


def _q6_k(raw: Array, x: Float64) -> Steps:
    """Value = d·scale·(code - 32), in sixteen sub-blocks of 16 with eight-bit scales."""
    low = raw[:, 0:128].reshape(-1, 2, 1, 64) >> np.array([0, 4], dtype=np.uint8).reshape(1, 1, 2, 1)
    high = raw[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 1, 4, 1)
    code = ((low & 15).reshape(-1, 8, 32) | ((high & 3) << 4).reshape(-1, 8, 32)).reshape(x.shape).astype(np.float64)
    scale = np.repeat(np.ascontiguousarray(raw[:, 192:208]).view(np.int8).astype(np.float64), 16, axis=1)
    d = _half(raw, 208)
    step = d * scale
    outer = (code == 0) | (code == 63) | (scale == 0)
    clip = np.abs(np.broadcast_to(d * 32 / 2, step.shape)) + np.abs(step)
    return Steps(step=step, code=code - 32, outer=outer, slop=np.zeros_like(step), clip=clip)


_ROUNDED: dict[str, Callable[[Float64], Float64]] = {"F32": _to_f32, "F16": _to_f16, "BF16": _to_bf16}
_STEPS: dict[str, Callable[[Array, Float64], Steps]] = {
    "Q8_0": _q8_0, "Q4_0": _q4_0, "Q5_0": _q5_0, "Q4_1": _q4_1, "Q5_1": _q5_1,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
_BLOCK = {kind: 256 if kind.endswith("_K") else 32 for kind in _STEPS}
