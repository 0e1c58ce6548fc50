"""What the codes of some rows say, held against the exact numbers that they stand for.

For a code c, its scale s and the exact number x, in steps of the code's grid, with u = x/s:

- *nearest*: |c − u| ≤ ½;
- *twice-rounded*: within half a step and what rounding x to bf16 first, as any merge does, and then the quotient can
  move it by;
- *saturated*: c is the lowest or the highest code and u lies beyond it;
- *neighbour*: |c − u| < 1, as where a rounding error is passed on to the columns that follow;
- *further*: none of these, which passing errors on makes too, where they add up.

What no single code can show, sums do.  With e = c·s − x and Δ the update:

- of a group of columns that share a scale, the gain 1 + Σe·x/Σx² and z = Σe·x/√Σe²x².  Rounding errors know nothing of
  x, so z² is about 1, and somewhat more where scales were searched for or numbers saturate; with the scales of another
  group it is about the group's size;
- of the tensor, the update's gain γ = 1 + Σe·Δ/ΣΔ², with a standard error √Σe²Δ²/ΣΔ² that needs no further assumption.
  A model without the update has γ ≈ 0, and one with twice the update γ ≈ 2;
- the density p of the x at the borders between two codes, weighted by Δ² (1 where the borders lie anywhere).  A small
  change of x moves codes only there, so that γ is about p for codes that are the nearest: scales that were searched for
  keep numbers away from the borders, and lose that share of a small update.

Legend: T rows of the tile, I columns, G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from tunesmith.checkpoint import Array, Float64, QuantizedScheme
from tunesmith.verify.records import QuantizedTensor

# What a group's gain can be: twice or half the scale is outside, and what passing errors on does to it is inside.
_GAINS = (0.56, 1.6)
# And how much of its errors' energy that gain must make up: errors passed on from other columns may be as large as the
# numbers of a small group, but do not point along them (benchmarks/quantized_limits.py: up to
# 0.43, and from 0.93 where a scale is halved).
_ALONG = 0.55
_CLIPPED = 0.25  # the share of a group's energy that saturation may take
_BF16_STEPS = 3 * 2.0**-8  # bf16's roundings of x, to a neighbour at most, and of the quotient; relative
_BORDER = 0.05  # how near to a border is at it, in steps
_SMALLEST_EXPONENT = -6  # of E4M3
_MANTISSA = 3


@dataclass
class CodeTally:
    """Sums over tiles of one tensor; the first counts are of numbers, then of groups."""

    elements: int = 0
    nearest: int = 0
    twice_rounded: int = 0
    saturated: int = 0
    neighbour: int = 0
    further: int = 0
    not_finite: int = 0
    groups: int = 0
    bad_scales: int = 0
    bad_groups: int = 0
    measured_groups: int = 0
    squared_z: float = 0.0
    squared_steps: float = 0.0
    clipped: float = 0.0
    xx: float = 0.0
    ee: float = 0.0
    ex: float = 0.0
    xd: float = 0.0
    dd: float = 0.0
    ed: float = 0.0
    eedd: float = 0.0
    border: float = 0.0
    border_squared: float = 0.0

    def add(self, other: CodeTally) -> None:
        """Add another tile's sums."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))

    def verdict(self, name: str, module: str | None, scheme: QuantizedScheme) -> QuantizedTensor:
        """The tensor's record."""
        moved = self.dd > 0
        # What shrinks or stretches all of x does so to the part of Δ that points along it.
        drift = abs(self.ex * self.xd) / (self.xx * self.dd) if moved and self.xx else 0.0
        return QuantizedTensor(
            name=name,
            module=module,
            scheme=scheme.name,
            elements=self.elements,
            nearest=self.nearest,
            twice_rounded=self.twice_rounded,
            saturated=self.saturated,
            neighbour=self.neighbour,
            further=self.further,
            not_finite=self.not_finite,
            groups=self.groups,
            bad_scales=self.bad_scales,
            bad_groups=self.bad_groups,
            correlation=self.squared_z / max(1, self.measured_groups),
            steps=(self.squared_steps / max(1, self.elements)) ** 0.5,
            clipped=self.clipped / self.xx if self.xx else 0.0,
            relative_error=(self.ee / self.xx) ** 0.5 if self.xx else None,
            gain=1 + self.ed / self.dd if moved else None,
            gain_error=self.eedd**0.5 / self.dd + drift if moved else None,
            gain_expected=self.border / self.dd if moved else None,
            gain_expected_error=self.border_squared**0.5 / self.dd if moved else None,
            delta_norm=self.dd**0.5,
        )


def tally_codes(
    scheme: QuantizedScheme, codes_TI: Array, scales_TG: Float64, x_TI: Float64, delta_TI: Float64, bound: Float64
) -> CodeTally:
    """Hold the codes of some rows against exact numbers.

    Args:
        scheme: how they are stored.
        codes_TI: the codes.
        scales_TG: their scales.
        x_TI: what they stand for.
        delta_TI: the part of it that the adapters made.
        bound: bound on the error of x, broadcastable to it.

    Returns:
        The sums; what has no usable scale, or is no number, is counted and left out of them.
    """
    tally = CodeTally(elements=codes_TI.size, groups=scales_TG.size)
    # A negative scale turns the codes round, which gives the larger side of a group the longer half of the range.
    good_TG = np.isfinite(scales_TG) & (scales_TG != 0)
    tally.bad_scales = int(np.count_nonzero(~good_TG))
    scale = scheme.spread(np.where(good_TG, scales_TG, 1.0), codes_TI.shape[1])
    code = codes_TI.astype(np.float64)
    usable = np.broadcast_to(scheme.spread(good_TG.astype(np.float64), codes_TI.shape[1]) > 0, code.shape)
    usable = usable & ~np.isnan(code)
    tally.not_finite = int(np.count_nonzero(np.isnan(code)))
    code = np.where(usable, code, 0.0)
    u = np.where(usable, x_TI / scale, 0.0)
    _classify(tally, scheme, code, u, bound / np.abs(scale))
    x, delta = np.where(usable, x_TI, 0.0), np.where(usable, delta_TI, 0.0)
    error = code * scale - x
    tally.xx, tally.ee, tally.ex = _dot(x, x), _dot(error, error), _dot(error, x)
    if delta.any():
        squares = delta * delta
        tally.dd, tally.ed, tally.xd = float(squares.sum()), _dot(error, delta), _dot(x, delta)
        tally.eedd = _dot(error * error, squares)
        at = _at_border(scheme, u) / (2 * _BORDER)
        tally.border, tally.border_squared = _dot(at, squares), _dot(at * squares, at * squares)
    _judge_groups(tally, scheme, error, x, np.where(_beyond(scheme, code, u), error, 0.0))
    return tally


def _classify(tally: CodeTally, scheme: QuantizedScheme, code: Float64, u: Float64, bound: Float64) -> None:
    """Count every code in its class."""
    step = _steps(scheme, np.maximum(np.abs(u), np.abs(code)))
    away = np.abs(code - u) / step
    slack = (bound + 2.0**-50 * np.abs(u)) / step
    nearest = away <= 0.5 + slack
    saturated = _beyond(scheme, code, u) & ~nearest
    early = (away <= 0.5 + slack + _BF16_STEPS * np.abs(u) / step) & ~nearest & ~saturated
    rest = ~(nearest | saturated | early)
    tally.nearest, tally.saturated, tally.twice_rounded, others = (
        int(np.count_nonzero(one)) for one in (nearest, saturated, early, rest)
    )
    tally.neighbour = int(np.count_nonzero(rest & (away < 1)))
    tally.further = others - tally.neighbour
    tally.squared_steps = float(np.square(np.where(saturated, 0.0, away)).sum())


def _steps(scheme: QuantizedScheme, size: Float64) -> Any:
    """The distance between codes of that size: 1 for integers; E4M3's, of three bits below the leading one."""
    if not scheme.is_float:
        return 1.0
    exponent = np.frexp(np.minimum(size, scheme.highest))[1] - 1
    return np.ldexp(1.0, np.maximum(exponent, _SMALLEST_EXPONENT) - _MANTISSA)


def _beyond(scheme: QuantizedScheme, code: Float64, u: Float64) -> Any:
    return ((code == scheme.highest) & (u > code)) | ((code == scheme.lowest) & (u < code))


def _at_border(scheme: QuantizedScheme, u: Float64) -> Float64:
    """1 where a number is at a border between two codes that there are, else 0."""
    step = _steps(scheme, np.abs(u))
    place = u / step
    below = np.floor(place)
    inside = (below * step >= scheme.lowest) & ((below + 1) * step <= scheme.highest)
    return np.asarray((np.abs(place - below - 0.5) < _BORDER) & inside, np.float64)


def _judge_groups(tally: CodeTally, scheme: QuantizedScheme, error: Float64, x: Float64, lost: Float64) -> None:
    """Whether each group's errors know of its numbers, and how much saturation took of it."""
    product = error * x
    xx, ee, ex = (_by_group(scheme, one) for one in (x * x, error * error, product))
    eexx, clipped = (_by_group(scheme, one) for one in (product * product, lost * lost))
    tally.clipped = float(clipped.sum())
    some, measured = xx > 0, eexx > 0
    gain = 1 + ex[some] / xx[some]
    along = ex[some] ** 2 > _ALONG * ee[some] * xx[some]
    bad = along & ((gain < _GAINS[0]) | (gain > _GAINS[1])) | (clipped[some] > _CLIPPED * xx[some])
    tally.bad_groups = int(np.count_nonzero(bad))
    tally.measured_groups = int(np.count_nonzero(measured))
    tally.squared_z = float((ex[measured] ** 2 / eexx[measured]).sum())


def _by_group(scheme: QuantizedScheme, values: Float64) -> Float64:
    """Sums over the columns that share a scale, T × G."""
    if scheme.group_size is None:
        return np.asarray(values.sum(axis=1, keepdims=True))
    return np.asarray(np.add.reduceat(values, np.arange(0, values.shape[1], scheme.group_size), axis=1))


def _dot(first: Float64, second: Float64) -> float:
    return float(np.einsum("i,i->", first.reshape(-1), second.reshape(-1)))
