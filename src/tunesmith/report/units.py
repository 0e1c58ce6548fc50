"""Figures as people read them, the same in every language."""

from __future__ import annotations

import math

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def human_bytes(size: float) -> str:
    """A size with a binary unit: ``9.3 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def human_count(count: int) -> str:
    """A count, shortened from a million on: ``4.88 M``."""
    for limit, unit in ((10**9, "B"), (10**6, "M")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return f"{count:,}"


def human_seconds(seconds: float) -> str:
    """A duration: ``8.2 s``, ``2 min 5 s`` or ``1 h 4 min``."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def human_share(share: float) -> str:
    """A share as a percentage that is 0% or 100% only where it is exactly that."""
    if share in (0, 1):
        return f"{share:.0%}"
    if 0 < share < 0.0001:
        return "< 0.01%"
    if 0.9999 < share < 1:
        return "> 99.99%"
    return f"{share:.2%}" if share < 0.01 or share > 0.99 else f"{share:.1%}"


def figure(value: float | None) -> str:
    """A number to three significant digits; a dash where there is none."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == 0:
        return "0"
    if 0.001 <= abs(value) < 10000:
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        return f"{value:,.{digits}f}".replace("-", "−")
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.replace('-', '−')}×10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def loss_figure(value: float | None) -> str:
    """A loss, or a difference of two, to three decimals; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return figure(value)
    return f"{value:.3f}".replace("-", "−")


def nats(value: float) -> str:
    """A loss, or a difference of two, to three decimals; below a hundredth to two significant digits."""
    if not 1e-6 <= abs(value) < 1e6:
        return loss_figure(value) if value == 0 else figure(value)
    if abs(value) >= 0.00995:
        return loss_figure(value)
    digits = 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{digits}f}".replace("-", "−")


def percent(share: float) -> str:
    """A share, or a relative change, in per cent to one decimal; a huge one to three significant digits."""
    return f"{points(share)}%"


def points(share: float) -> str:
    """A share in hundredths to one decimal, without a sign of its unit."""
    hundredths = 100 * share
    if not math.isfinite(hundredths) or abs(hundredths) >= 10000:
        return figure(hundredths)
    return f"{round(hundredths, 1) + 0.0:,.1f}".replace("-", "−")  # no −0.0
