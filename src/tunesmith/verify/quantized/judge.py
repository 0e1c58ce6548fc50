"""What the records of quantized tensors come to: is each code a rounding's, and is the whole update there?

The limits stand between what sound roundings do to a real model and what breaks it, measured on int4 (groups of 32 and
64) and int8 with rounding to nearest, searched scales and errors passed on (GPTQ):

===============================  =========  =====================================================
figure                           sound      broken
===============================  =========  =====================================================
correlation                      0.8 - 4.6  7.6 and more (scales of another group, × 2)
steps                            0.2 - 0.65 0.75 and more (scales of another group), 1.3 (× 2)
a group's gain                   0.6 - 1.4  below 0.56, above 1.7 (scale × ½, × 2)
saturation's share of ‖x‖²       to 0.005   0.03 and more (scales × ½, with new codes)
the update's gain                0.6 - 1.1  0 (the base), its own factor (wrong scaling)
===============================  =========  =====================================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from tunesmith.record import Finding, Value
from tunesmith.verify.certificate import CertifiedCodes
from tunesmith.verify.records import QuantizedTensor

_CORRELATION, _CORRELATION_SPREAD = 6.5, 8.0
_SOME_CORRELATION, _SOME_STEPS = 4.0, 0.7
_STEPS = 1.5
_CLIPPED = 0.02
_FEW_CODES = 1e-3  # a share of codes below which no rounding passes errors on
_FED_CODES = 5e-3  # and from which one does
_ODD_TENSORS = 0.1  # fewer tensors than that are not rounded in a way of their own
_FEW_GROUPS, _MANY_GROUPS = 1e-4, 5e-3

# Of the update's gain: deviations that chance may take, what is left for all else, and when nothing can be said.
_DEVIATIONS = 6.0
_ALLOWANCE = 0.05
_RESOLVED = 0.5


@dataclass(frozen=True)
class Gain:
    """How much of the update is there.

    Attributes:
        gain: over all tensors.
        error: its standard error, with that of what is expected.
        low: the least that a sound rounding makes of it.
        high: the most.
    """

    gain: float
    error: float
    low: float
    high: float

    @property
    def resolved(self) -> bool:
        """Whether having the update and not having it can be told apart."""
        return self.low - self._tolerance > 0 and _DEVIATIONS * self.error < _RESOLVED

    @property
    def _tolerance(self) -> float:
        return _DEVIATIONS * self.error + _ALLOWANCE

    @property
    def right(self) -> bool:
        """Whether it is what a sound rounding makes of the update."""
        return self.low - self._tolerance <= self.gain <= self.high + self._tolerance

    @property
    def absent(self) -> bool:
        """Whether it is none of it."""
        return abs(self.gain) <= _DEVIATIONS * self.error + _ALLOWANCE

    @property
    def factor(self) -> float:
        """How many times as strong the update is, as far as the rounding lets that be seen."""
        return self.gain / ((self.low + self.high) / 2)


def gain_of(tensors: Sequence[QuantizedTensor]) -> Gain | None:
    """The gain of the update over some tensors; None where it has none of it."""
    moved = [(tensor, tensor.delta_norm**2) for tensor in tensors if tensor.gain is not None and tensor.delta_norm]
    total = sum(weight for _, weight in moved)
    if not total:
        return None
    gain = sum((tensor.gain or 0.0) * weight for tensor, weight in moved) / total
    expected = sum((tensor.gain_expected or 0.0) * weight for tensor, weight in moved) / total
    errors = (
        math.sqrt(sum(((error or 0.0) * weight) ** 2 for error, weight in pairs)) / total
        for pairs in (
            [(tensor.gain_error, weight) for tensor, weight in moved],
            [(tensor.gain_expected_error, weight) for tensor, weight in moved],
        )
    )
    # Passing errors on brings back what the borders take; and a number that set its own scale keeps beside a border.
    return Gain(gain=gain, error=math.hypot(*errors), low=min(1.0, expected), high=max(1.0, expected))


def _share(tensor: QuantizedTensor) -> float:
    return tensor.unexplained / max(1, tensor.elements)


def stray_codes(tensors: Sequence[QuantizedTensor]) -> dict[str, int]:
    """Codes that no rounding explains where all others are the nearest, by tensor."""
    found: dict[str, int] = {}
    for touched in (True, False):
        kind = [tensor for tensor in tensors if (tensor.module is not None) is touched]
        if not kind or median(map(_share, kind)) >= _FEW_CODES:
            continue
        fed = [tensor for tensor in kind if _share(tensor) >= _FED_CODES]
        own_way = len(fed) >= max(2, _ODD_TENSORS * len(kind))
        odd = [tensor for tensor in kind if tensor.unexplained and not (own_way and tensor in fed)]
        found |= {tensor.name: tensor.unexplained for tensor in odd}
    return found


def misshapen(tensors: Sequence[QuantizedTensor]) -> dict[str, str]:
    """Tensors whose errors are not a rounding's, each with what says so."""
    groups = sum(tensor.groups for tensor in tensors)
    few = 0 < sum(tensor.bad_groups for tensor in tensors) <= _FEW_GROUPS * groups + 1
    found = {}
    for tensor in tensors:
        spread = _CORRELATION_SPREAD / math.sqrt(max(1, tensor.groups))
        some = tensor.steps > _SOME_STEPS and tensor.correlation > _SOME_CORRELATION + spread
        # Where each code is its own number's, sums over them have nothing to add.
        if tensor.unexplained and (some or tensor.correlation > _CORRELATION + spread):
            found[tensor.name] = "correlation"
        elif tensor.unexplained and tensor.steps > _STEPS:
            found[tensor.name] = "steps"
        elif tensor.clipped > _CLIPPED:
            found[tensor.name] = "clipped"
        elif tensor.bad_groups > _MANY_GROUPS * tensor.groups or (few and tensor.bad_groups):
            found[tensor.name] = "groups"
    return found


def wrong_updates(tensors: Sequence[QuantizedTensor]) -> list[QuantizedTensor]:
    """Tensors whose own update can be made out, and is not what it should be."""
    measured = [(tensor, gain) for tensor in tensors if (gain := gain_of([tensor])) is not None]
    return [tensor for tensor, gain in measured if gain.resolved and not gain.right]


def judge_codes(tensors: Sequence[QuantizedTensor], *, sampled: bool) -> list[Finding]:
    """Findings on all quantized tensors.

    Args:
        tensors: their records.
        sampled: whether only some rows were looked at.

    Returns:
        That the codes are a rounding of base plus adapter, or what is not, and whether the update is there.
    """
    keys = ("elements", "nearest", "twice_rounded", "saturated", "neighbour", "further")
    counts: dict[str, Value] = {key: sum(getattr(tensor, key) for tensor in tensors) for key in keys}
    errors = [*_of_scales(tensors), *_of_codes(tensors)]
    update = _of_update(tensors)
    good = "quantized_sampled" if sampled else "quantized_proven"
    first = Finding(code=good, severity="ok", params={**counts, "relative_error": _relative(tensors)})
    return [*errors, *update] if errors else [first, *update]


def certified_codes(tensors: Sequence[QuantizedTensor]) -> CertifiedCodes | None:
    """What a certificate says of the quantized tensors; None where there are none."""
    if not tensors:
        return None
    keys = ("elements", "nearest", "twice_rounded", "saturated", "neighbour", "further")
    whole = gain_of(tensors)
    return CertifiedCodes(
        tensors=len(tensors),
        **{key: sum(getattr(tensor, key) for tensor in tensors) for key in keys},
        gain=whole.gain if whole is not None else None,
        gain_error=whole.error if whole is not None else None,
    )


def _relative(tensors: Sequence[QuantizedTensor]) -> float:
    """The tensors' mean relative error."""
    errors = [tensor.relative_error for tensor in tensors if tensor.relative_error is not None]
    return sum(errors) / max(1, len(errors))


def _of_scales(tensors: Sequence[QuantizedTensor]) -> list[Finding]:
    found = []
    for code, key in (("quantized_bad_scales", "bad_scales"), ("quantized_not_numbers", "not_finite")):
        counts = {tensor.name: getattr(tensor, key) for tensor in tensors if getattr(tensor, key)}
        if counts:
            found.append(_worst(code, counts))
    return found


def _of_codes(tensors: Sequence[QuantizedTensor]) -> list[Finding]:
    found = []
    sound = [tensor for tensor in tensors if not tensor.bad_scales]
    wrong = misshapen(sound)
    if wrong:
        worst = max((t for t in sound if t.name in wrong), key=lambda tensor: tensor.relative_error or 0.0)
        params: dict[str, Value] = {
            "count": len(wrong),
            "total": len(tensors),
            "tensor": worst.name,
            "relative_error": worst.relative_error or 0.0,
            "bad_groups": worst.bad_groups,
        }
        found.append(Finding(code="quantized_outside", severity="error", params=params))
    strays = {name: count for name, count in stray_codes(sound).items() if name not in wrong}
    return [*found, _worst("quantized_strays", strays)] if strays else found


def _worst(code: str, counts: dict[str, int]) -> Finding:
    tensor = max(counts, key=lambda name: counts[name])
    return Finding(code=code, severity="error", params={"count": sum(counts.values()), "tensor": tensor})


def _of_update(tensors: Sequence[QuantizedTensor]) -> list[Finding]:
    whole = gain_of(tensors)
    if whole is None:
        return []
    params: dict[str, Value] = {
        "gain": whole.gain,
        "error": whole.error,
        "low": whole.low,
        "high": whole.high,
        "tensors": sum(tensor.gain is not None for tensor in tensors),
    }
    if whole.resolved and not whole.right:
        return [Finding(code="quantized_update_wrong", severity="error", params=params)]
    wrong = wrong_updates(tensors)
    if wrong:
        named: dict[str, Value] = {"count": len(wrong), "tensor": wrong[0].name, "gain": wrong[0].gain or 0.0}
        return [Finding(code="quantized_update_partly", severity="error", params=named)]
    if not whole.resolved:
        return [Finding(code="quantized_update_unresolved", severity="warning", params=params)]
    return [Finding(code="quantized_update", severity="ok", params=params)]
