"""How far a stored number may be from the one it stands for, type by type.

A block type holds codes, each of which means a level, and a step: a number is step · level, above a minimum in some
types.  Whoever writes it takes the nearest level.  So a number is no further away than half the gap to the next level
on its side, and what the stored step's own rounding moves it by.  Only beyond the two outer levels may more be missing,
and only outwards: the step is fitted to the block, and K types round it to a few bits more.  A step that is larger than
the block's numbers warrant would hide an error below it; that is held against the block's own numbers.

How much a fit leaves out, and by how much it widens a step, was measured: 14 kinds of numbers (a model's, normal,
heavy-tailed, sparse, of one sign, tiny ones) by llama.cpp's own ``ggml_quantize_chunk``; the constants are that and
some more.  An importance matrix decides the fit by what is not in the file: beyond the outer levels anything may then
be missing, and in Q4_0 to Q5_1, where the codes are those of another step than the stored one, nothing is known.

Source: ``quantize_row_*_ref``, ``make_qx_quants``, ``make_qkx2_quants`` and ``make_q3_quants`` (ggml-quants.c), and
``gguf.quants`` for the layouts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tunesmith.checkpoint import Array, Float64

_FP16 = 2.0**-11  # half a unit in the last place, relative
_FP16_TINY = 2.0**-25  # half the smallest float16
_SLACK = 1 + 2.0**-10  # float32 arithmetic on the way to a code
_CANCELLED = 2.0**-20  # the same where a minimum is taken off first, relative to the number
_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float64)


@dataclass(frozen=True)
class Stored:
    """What a block type stored beside its codes; float64, a row a block and a column a sub-block.

    Attributes:
        unit: the stored float16 step, or what a unit of a sub-block's scale is worth; one column.
        scale: each sub-block's scale, a small integer; 1 where there is none.
        low_unit: the same of the minimum.
        low_scale: each sub-block's minimum in such units, taken off.
    """

    unit: Float64
    scale: Float64
    low_unit: Float64
    low_scale: Float64


@dataclass(frozen=True)
class Kind:
    """A block type.

    Attributes:
        size: numbers of a block.
        levels: what its codes mean, in steps.
        read: its stored steps.
        widest: the largest step, in those that just reach the sub-block's numbers.
        clip: what the fit may leave out beyond the outer levels, in steps.
        clip_reach: the same as a share of the sub-block's range.
        scales: how many units the largest sub-block's scale has; None where there are no sub-blocks.
        top_scale: the largest scale that can be stored, where a larger one may have been wanted.
        recoded: codes are made with the stored step, after it was rounded.
        weighable: codes are also made so where there is an importance matrix.
    """

    size: int
    levels: Float64
    read: Callable[[Array], Stored]
    widest: float
    clip: float = 0.0
    clip_reach: float = 0.0
    scales: int | None = None
    top_scale: int | None = None
    recoded: bool = True
    weighable: bool = True

    @property
    def with_minimum(self) -> bool:
        """Whether its codes count from a minimum."""
        return bool(self.levels[0] == 0)

    @property
    def clips(self) -> bool:
        """Whether a fit may leave anything out."""
        return bool(self.clip or self.clip_reach)

    @property
    def span(self) -> float:
        """The outermost level."""
        return float(np.abs(self.levels).max())


def outside(kind: str, raw: Array, stored: Float64, exact: Float64, *, weighted: bool = False) -> Array | None:
    """Which of some rows' numbers their type's rounding does not explain.

    Args:
        kind: the type, such as ``Q8_0``.
        raw: the rows as they are stored.
        stored: the numbers that they mean.
        exact: the model's numbers, of the same shape.
        weighted: an importance matrix took part in it.

    Returns:
        bool of the same shape; None where this type's rounding is not known here.
    """
    if not known(kind, weighted=weighted):
        return None
    finite = np.isfinite(stored)
    if kind in _ROUNDED:
        rounded: Array = ~((stored == _ROUNDED[kind](exact)) & finite)
        return rounded
    good = _explained(_KINDS[kind], raw, stored, exact, weighted=weighted)
    bad: Array = ~(good.reshape(stored.shape) & finite)
    return bad


def known(kind: str, *, weighted: bool = False) -> bool:
    """Whether a type's rounding is known here, with an importance matrix or without one."""
    return kind in _ROUNDED or (kind in _KINDS and (_KINDS[kind].weighable or not weighted))


def _explained(kind: Kind, raw: Array, stored: Float64, exact: Float64, *, weighted: bool) -> Array:
    """Whether each number is where rounding puts it, and each step one that its numbers warrant."""
    blocks = exact.size // kind.size
    of = kind.read(raw.reshape(blocks, -1))
    parts = (blocks, of.scale.shape[1], -1)
    x, y = exact.reshape(parts), stored.reshape(parts)
    step, low = (of.unit * of.scale)[:, :, None], -(of.low_unit * of.low_scale)[:, :, None]
    reach = _reach(kind, x)
    natural = reach / kind.span
    unit, low_unit = _warranted(kind, of, natural, weighted=weighted)
    missed = _missed_scale(kind, of, unit)
    with np.errstate(invalid="ignore", divide="ignore"):
        place = np.searchsorted((kind.levels[1:] + kind.levels[:-1]) / 2, np.nan_to_num((y - low) / step))
    size = np.abs(step)
    noise = _noise(kind, of, size, np.abs(kind.levels[place]), low) + np.abs(x) * _CANCELLED
    rounded_step = kind.span * (size * _FP16 + np.maximum(np.abs(of.scale), 1)[:, :, None] * _FP16_TINY)
    # With no step at all, half the outer gap of the one that was wanted is missing too.
    beyond = ((kind.span + kind.clip + np.diff(kind.levels).max() / 2) * missed + low_unit + kind.clip_reach * reach)[
        :, :, None
    ]
    beyond = beyond + kind.clip * size + rounded_step
    if weighted and kind.clips:
        beyond = np.where(of.unit == 0, 0, reach)[:, :, None] + beyond
    gaps = np.diff(kind.levels) / 2 * _SLACK
    # Every number is then an outer one, on both sides.
    upwards = np.append(gaps, gaps[-1])[place] * size + noise
    upwards += np.where((place == len(gaps)) | (size == 0), beyond, 0)
    downwards = np.insert(gaps, 0, gaps[0])[place] * size + noise
    downwards += np.where((place == 0) | (size == 0), beyond, 0)
    with np.errstate(invalid="ignore"):
        error = (x - y) * np.where(step < 0, -1, 1)
        good: Array = (error <= upwards) & (error >= -downwards)
    widest = kind.span if weighted else kind.widest
    limit = widest * natural * (1 + 4 * _FP16) + missed + np.maximum(np.abs(of.scale), 1) * _FP16_TINY
    return good & (size <= limit[:, :, None])


def _reach(kind: Kind, x: Float64) -> Float64:
    """How far a sub-block's numbers go: from 0, or over all of its range with 0, where there is a minimum."""
    reach: Float64
    if not kind.with_minimum:
        reach = np.abs(x).max(axis=2)
        return reach
    reach = np.maximum(x.max(axis=2), 0) - np.minimum(x.min(axis=2), 0)
    return reach


def _warranted(kind: Kind, of: Stored, natural: Float64, *, weighted: bool) -> tuple[Float64, Float64]:
    """What a unit of a scale, and half of one of a minimum, is worth: no more than the largest sub-block warrants."""
    none = np.zeros((natural.shape[0], 1))
    if kind.scales is None:
        return none, none
    widest = natural.max(axis=1, keepdims=True) * (kind.span if weighted else kind.widest)
    unit = np.minimum(np.abs(of.unit), widest / kind.scales + _FP16_TINY)
    low = np.minimum(np.abs(of.low_unit), widest * kind.span / kind.scales + _FP16_TINY) / 2
    return unit, low if kind.with_minimum else none


def _missed_scale(kind: Kind, of: Stored, unit: Float64) -> Float64:
    """How much larger a step was wanted, at most, than the one that a scale of few bits gave."""
    if kind.scales is None:
        return np.zeros_like(of.scale)
    missed = np.where(of.scale == kind.top_scale, 1.5, 0.5) * unit
    # A unit too small for float16: the whole block is nothing.
    return np.where(of.unit == 0, kind.scales * _FP16_TINY, missed)


def _noise(kind: Kind, of: Stored, size: Float64, level: Float64, low: Float64) -> Float64:
    """What the stored numbers' own rounding to float16 moves a value by, where its code was made before that."""
    if kind.recoded:
        return np.zeros_like(size)
    moved: Float64 = (level + np.diff(kind.levels).max() / 2) * (
        size * _FP16 * _SLACK + np.maximum(np.abs(of.scale), 1)[:, :, None] * _FP16_TINY
    )
    return moved if not kind.with_minimum else moved + (np.abs(low) * _FP16 * _SLACK + _FP16_TINY)


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


def _stored(
    unit: Float64, scale: Array | None = None, low_unit: Float64 | None = None, low: Array | None = None
) -> Stored:
    one = np.ones_like(unit)
    scales = one if scale is None else scale.astype(np.float64)
    if low_unit is None:
        return Stored(unit, scales, np.zeros_like(unit), np.zeros_like(scales))
    return Stored(unit, scales, low_unit, one if low is None else low.astype(np.float64))


def _step_first(raw: Array) -> Stored:
    """Q4_0, Q5_0, Q8_0, IQ4_NL."""
    return _stored(_half(raw, 0))


def _step_and_minimum(raw: Array) -> Stored:
    """Q4_1, Q5_1: the minimum is added."""
    return _stored(_half(raw, 0), low_unit=-_half(raw, 2))


def _q2_k(raw: Array) -> Stored:
    return _stored(_half(raw, 80), raw[:, :16] & 15, _half(raw, 82), raw[:, :16] >> 4)


def _q3_k(raw: Array) -> Stored:
    low, high = raw[:, 96:104], raw[:, 104:108]
    fours = np.concatenate([low & 15, low >> 4], axis=1)
    twos = np.concatenate([(high >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    return _stored(_half(raw, 108), (fours | (twos << 4)).astype(np.int16) - 32)


def _q4_k(raw: Array) -> Stored:
    """Q4_K, Q5_K: twelve bytes of six-bit scales and minima."""
    low, high, mixed = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
    scale = np.concatenate([low & 63, (mixed & 15) | ((low >> 2) & 48)], axis=1)
    minimum = np.concatenate([high & 63, (mixed >> 4) | ((high >> 2) & 48)], axis=1)
    return _stored(_half(raw, 0), scale, _half(raw, 2), minimum)


def _q6_k(raw: Array) -> Stored:
    return _stored(_half(raw, 208), np.ascontiguousarray(raw[:, 192:208]).view(np.int8))


def _iq4_xs(raw: Array) -> Stored:
    high = np.ascontiguousarray(raw[:, 2:4]).view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    fours = np.stack([raw[:, 4:8] & 15, raw[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    return _stored(_half(raw, 0), (fours | (high << 4)).astype(np.int16) - 32)


def _range(first: int, stop: int) -> Float64:
    return np.arange(first, stop, dtype=np.float64)


_ROUNDED: dict[str, Callable[[Float64], Float64]] = {"F32": _to_f32, "F16": _to_f16, "BF16": _to_bf16}
# Measured, in the same units: clip 0.51, 0.48, 0.46 and 0.03 of Q3_K to Q6_K and 3.1 of IQ4; 0.49 of the range in Q2_K,
# of blocks that are nearly empty; widest 2.31, 1.39, 1.13, 1.05, 1.04 and 1.13.
_KINDS: dict[str, Kind] = {
    "Q8_0": Kind(32, _range(-127, 128), _step_first, 1.0, recoded=False),
    "Q4_0": Kind(32, _range(-8, 8), _step_first, 1.0, clip=0.5, recoded=False, weighable=False),
    "Q5_0": Kind(32, _range(-16, 16), _step_first, 1.0, clip=0.5, recoded=False, weighable=False),
    "Q4_1": Kind(32, _range(0, 16), _step_and_minimum, 1.0, recoded=False, weighable=False),
    "Q5_1": Kind(32, _range(0, 32), _step_and_minimum, 1.0, recoded=False, weighable=False),
    "Q2_K": Kind(256, _range(0, 4), _q2_k, 2.5, clip_reach=0.55, scales=15),
    "Q3_K": Kind(256, _range(-4, 4), _q3_k, 1.6, clip=0.75, scales=32, top_scale=31),
    "Q4_K": Kind(256, _range(0, 16), _q4_k, 1.2, clip=0.75, scales=63),
    "Q5_K": Kind(256, _range(0, 32), _q4_k, 1.1, clip=0.75, scales=63),
    "Q6_K": Kind(256, _range(-32, 32), _q6_k, 1.1, clip=0.25, scales=128, top_scale=127),
    "IQ4_NL": Kind(32, _IQ4, _step_first, 1.2, clip=5.0, recoded=False),
    "IQ4_XS": Kind(256, _IQ4, _iq4_xs, 1.2, clip=5.0, scales=32, top_scale=31, recoded=False),
}
