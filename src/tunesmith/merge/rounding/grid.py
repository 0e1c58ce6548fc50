"""The numbers that can be stored: the nearest to a value, and the two that bracket it.

Rounding twice (float64 → float32 → bf16, or Δ → bf16 and then the sum) changes bytes; :func:`round_once` goes from
float64 to the stored dtype in one step, to the nearest value, ties to even (IEEE 754-2019, 4.3.1).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from tunesmith.checkpoint import Array, Float64
from tunesmith.merge.rounding.hessian import Indices

_BF16_SHIFT = 45  # float64 keeps 52 bits of fraction, bf16 keeps 7
_BF16_MIN_NORMAL = 2.0**-126
_BF16_STEP_BELOW = 2.0**-133  # the spacing of bf16's subnormal numbers
_BF16_MAX = float.fromhex("0x1.fep127")


class Grid(Protocol):
    """Numbers that can be stored; every array has its rows' elements along the last axis, (columns, rows)."""

    def at(self, columns: Indices) -> Grid:
        """The numbers that some columns can take, one by one; a grid that is the same everywhere gives itself."""

    def row(self, place: int) -> Grid:
        """The numbers of one of this grid's columns."""

    def bracket(self, values: Float64) -> tuple[Float64, Float64, Float64]:
        """The largest number ≤ each value, the smallest ≥ it, and what a target must exceed to take the latter.

        That threshold is their midpoint, or just below it where the tie goes to the larger number.
        """

    def nearest(self, values: Float64) -> Float64:
        """The nearest number to each value; on a tie as :meth:`bracket`."""


class Bfloat16Grid:
    """bf16, as float64 values.  Ties go to the even pattern."""

    def at(self, columns: Indices) -> Grid:  # noqa: ARG002 - the same everywhere
        """As :meth:`Grid.at`."""
        return self

    def row(self, place: int) -> Grid:  # noqa: ARG002 - the same everywhere
        """As :meth:`Grid.row`."""
        return self

    def bracket(self, values: Float64) -> tuple[Float64, Float64, Float64]:
        """As :meth:`Grid.bracket`; beyond the largest number both are that number, or the value where not finite."""
        bits = np.ascontiguousarray(values).view(np.uint64)
        inner_bits = bits & ~np.uint64((1 << _BF16_SHIFT) - 1)
        inner = inner_bits.view(np.float64)  # towards zero
        outer = (inner_bits + np.uint64(1 << _BF16_SHIFT)).view(np.float64)
        outer_is_even = (bits >> np.uint64(_BF16_SHIFT)) & np.uint64(1) == 1
        size = np.abs(values)
        small = size < _BF16_MIN_NORMAL
        if small.any():
            count = np.floor(size / _BF16_STEP_BELOW)
            inner = np.where(small, np.copysign(count * _BF16_STEP_BELOW, values), inner)
            outer = np.where(small, np.copysign((count + 1) * _BF16_STEP_BELOW, values), outer)
            outer_is_even = np.where(small, count % 2 == 1, outer_is_even)
        outer = np.where(inner == values, inner, outer)
        beyond = ~(size < _BF16_MAX)
        if beyond.any():
            inner = np.where(beyond & np.isfinite(values), np.copysign(_BF16_MAX, values), inner)
            outer = np.where(beyond, inner, outer)
        below, above = np.minimum(inner, outer), np.maximum(inner, outer)
        with np.errstate(invalid="ignore"):
            middle = below + (above - below) / 2
        above_is_even = np.where(values < 0, ~outer_is_even, outer_is_even)
        return below, above, np.where(above_is_even, np.nextafter(middle, -np.inf), middle)

    def nearest(self, values: Float64) -> Float64:
        """As :meth:`Grid.nearest`; beyond the largest number that number."""
        below, above, threshold = self.bracket(values)
        return np.where(values > threshold, above, below)


class ScaledGrid:
    """Codes times a scale: code · scale, where the scale belongs to a row, or to a row's group of columns.

    Products are exact in float64 for codes of 8 bits and scales of 24.  Beyond the outermost codes there are none.

    Args:
        scale_TG: the scales of some rows, one a group of columns, none of them 0, as they are stored.
        codes: which numbers a code can be.
        group_size: columns of a group; None where a row has one scale.
    """

    def __init__(self, scale_TG: Float64, codes: Codes, *, group_size: int | None = None) -> None:
        self._scale_GT, self._codes, self._group_size = np.ascontiguousarray(scale_TG.T), codes, group_size

    def at(self, columns: Indices) -> Grid:
        """As :meth:`Grid.at`."""
        groups = columns * 0 if self._group_size is None else columns // self._group_size
        return ScaledGrid(self._scale_GT[groups].T, self._codes, group_size=1)

    def row(self, place: int) -> Grid:
        """As :meth:`Grid.row`."""
        return ScaledGrid(self._scale_GT[place][:, None], self._codes)

    def bracket(self, values: Float64) -> tuple[Float64, Float64, Float64]:
        """As :meth:`Grid.bracket`; beyond the outermost number both are that number."""
        scale = self._scale_GT
        lower, upper, threshold = (codes * scale for codes in self._codes.bracket(values / scale))
        turned = np.broadcast_to(scale < 0, lower.shape)  # there the upper code is the lower number
        threshold = np.where(turned, np.nextafter(threshold, -np.inf), threshold)
        return np.where(turned, upper, lower), np.where(turned, lower, upper), threshold

    def nearest(self, values: Float64) -> Float64:
        """As :meth:`Grid.nearest`."""
        scale = self._scale_GT if values.ndim > 1 else self._scale_GT[0]
        return np.asarray(self._codes.nearest(values / scale) * scale)


class Codes(Protocol):
    """The numbers that a code can be.

    Attributes:
        lowest: the lowest of them.
        highest: the highest.
    """

    lowest: float
    highest: float

    def bracket(self, values: Float64) -> tuple[Float64, Float64, Float64]:
        """As :meth:`Grid.bracket`."""

    def nearest(self, values: Float64) -> Float64:
        """As :meth:`Grid.nearest`; ties go to the even code."""


class IntegerCodes:
    """Integers of so many bits, two's complement.

    Args:
        bits: 2 to 8.
    """

    def __init__(self, bits: int) -> None:
        self.lowest, self.highest = -float(1 << (bits - 1)), float((1 << (bits - 1)) - 1)

    def bracket(self, values: Float64) -> tuple[Float64, Float64, Float64]:
        """As :meth:`Grid.bracket`."""
        inside = np.clip(values, self.lowest, self.highest)
        below, above = np.floor(inside), np.ceil(inside)
        middle = below + (above - below) / 2
        return below, above, np.where(above % 2 == 0, np.nextafter(middle, -np.inf), middle)

    def nearest(self, values: Float64) -> Float64:
        """As :meth:`Codes.nearest`."""
        return np.asarray(np.clip(np.rint(values), self.lowest, self.highest))


class Float8Codes:
    """8-bit floating-point numbers: 4 bits of exponent (bias 7), 3 of mantissa, the largest 448 (E4M3FN).

    Source: OCP 8-bit Floating Point Specification 1.0, table 1.
    """

    lowest, highest = -448.0, 448.0
    _LEAST_EXPONENT = -6  # of a normal number; below it the step stays

    def _step(self, values: Float64) -> Float64:
        _, exponents = np.frexp(values)
        return np.asarray(np.ldexp(1.0, np.maximum(exponents - 1, self._LEAST_EXPONENT) - 3))

    def bracket(self, values: Float64) -> tuple[Float64, Float64, Float64]:
        """As :meth:`Grid.bracket`."""
        inside = np.clip(values, self.lowest, self.highest)
        step = self._step(inside)
        below, above = np.floor(inside / step) * step, np.ceil(inside / step) * step
        middle = below + (above - below) / 2
        goes_up = np.rint(middle / step) * step == above
        return below, above, np.where(goes_up, np.nextafter(middle, -np.inf), middle)

    def nearest(self, values: Float64) -> Float64:
        """As :meth:`Codes.nearest`."""
        inside = np.clip(values, self.lowest, self.highest)
        step = self._step(inside)
        return np.asarray(np.clip(np.rint(inside / step) * step, self.lowest, self.highest))


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
