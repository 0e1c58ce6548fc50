"""What is unhealthy in a training, as its log tells it; nothing is said where all is well."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from operator import attrgetter
from statistics import fmean, median

from tunesmith.record import Finding, Value
from tunesmith.runs.records import LogRow

Points = list[tuple[int, float]]

_FEWEST = 4  # below, four quarters have no row each
_ENOUGH = 8  # so many rows for a level at the end, and one before
_ENOUGH_FOR_NOISE = 20  # below, the median of second differences may come out small by chance
_FEWEST_EVALS = 3
_ABSURD = 1e100  # sums of larger numbers overflow; NaN is not below it either
_MOST_STEPS = 10**12
_SAMPLE = 4_000  # of a long log, so many values tell its median well enough
# Loss.  A quarter's mean of sound rows strays by three standard errors once in several hundred runs.
_SURE = 3.0
_SURE_OF_FEW = 2.0
_BLOWN_UP = 2.0  # a diverged loss at least doubles ...
_BLOWN_UP_NATS = 0.5  # ... and is not just 0.02 where it was 0.01
_BLOWN_UP_NOISE = 6.0
_AROUND = 10
_CALM = 0.25  # of the rise; what lies above is part of it
_HARDLY_FELL = 0.01  # new text to read on lowers a loss by a few percent, tuning by tens of them
_FELL_WITHIN = 10  # of thousands of rows, these may be all that fell
_FLAT_ROWS = 20
_FROM_THE_START = 0.1  # a log that begins later is a resumed run's, and may lie in the flat end alone
_SPOILED = 0.1  # a loss scaler that finds its scale spoils a few of the first rows
_SPOILED_ROWS = 3
_ZERO_ROWS = 2
_TURNED_ROUND = 0.02
# Learning rate.
_AT_PEAK = 0.95
_STILL_HIGH = 0.5  # a linear or cosine schedule is lower from its middle on
_NEAR_THE_END = 0.9
_REACHED = 0.9
_DECAYING = {"linear", "cosine", "polynomial"}
_DEFAULT_SCHEDULE = "linear"
_SCHEDULES = ("lr_scheduler_type", "lr_scheduler")
_WARMUP_STEPS = ("warmup_steps", "lr_scheduler_warmup_steps")
_WARMUP_RATIOS = ("warmup_ratio", "lr_scheduler_warmup_ratio")
# Gradients.
_DEFAULT_CLIPPING = 1.0
_GROWN = 10.0  # the first, large gradients of a run are none: late ones are compared with the first half's
_BEYOND_CLIPPING = 5.0
_SPIKE = 100.0
# Throughput.
_SLOWED = 0.5
_SHORTEST_S = 5  # a clock of whole seconds tells a shorter stretch too badly
_STRETCHES = 40
_REWARDED = {"dpo", "kto", "orpo", "simpo", "cpo", "ppo", "grpo", "rlhf", "rm", "gkd"}


def health(log: Sequence[LogRow], settings: Mapping[str, Value], planned_steps: int | None) -> list[Finding]:
    """What looks unhealthy in a log.

    The loss of preference and reinforcement trainers need not fall; of theirs, only what holds for every training is
    looked at.

    Args:
        log: the logged rows in order of step.
        settings: what is recorded of the training's settings, by name.
        planned_steps: optimizer steps that were planned; None where that is not recorded.

    Returns:
        Findings with their figures; none where all is well, or where there are too few rows to tell.
    """
    planned = planned_steps if planned_steps is not None and 0 < planned_steps < _MOST_STEPS else None
    losses = _logged(log, "loss")
    rewarded = _is_rewarded(log, settings)
    broken = _not_finite(losses)
    if not rewarded and not broken:
        broken = _zero_losses(log, len(losses))
    others = [] if broken else _gradients(_logged(log, "grad_norm"), _setting(settings, "max_grad_norm"))
    others += _learning_rate(log, settings, planned)
    if rewarded:
        return [*broken, *others, *_throughput(log)]
    moved = not any(finding.code in ("gradients_zero", "learning_rate_zero") for finding in others)
    shape = _loss_shape(_finite(losses), may_be_flat=settings.get("stage") == "pt" or not moved)
    if not any(finding.code == "loss_diverged" for finding in shape):
        shape += _overfitting(_finite(_logged(log, "eval_loss")))
    return [*broken, *shape, *others, *_throughput(log)]


# -- loss


def _not_finite(losses: Points) -> list[Finding]:
    steps = [step for step, loss in losses if not abs(loss) < _ABSURD]
    if not steps:
        return []
    params: dict[str, Value] = {"step": steps[0], "count": len(steps), "rows": len(losses)}
    return [Finding(code="loss_not_finite", severity="error", params=params)]


def _zero_losses(log: Sequence[LogRow], rows: int) -> list[Finding]:
    """A loss of exactly 0 without a gradient: the HF Trainer logs losses that are no numbers so."""
    pairs = [(row.step, row.grad_norm) for row in log if row.loss == 0 and row.grad_norm is not None]
    zero = [(step, norm) for step, norm in pairs if norm == 0 or not math.isfinite(norm)]
    if len(zero) < _ZERO_ROWS or len(zero) <= _SPOILED * rows:
        return []
    step, norm = zero[0]
    params: dict[str, Value] = {"step": step, "count": len(zero), "rows": rows, "norm": "0" if norm == 0 else "NaN"}
    return [Finding(code="loss_zero", severity="error", params=params)]


def _loss_shape(points: Points, *, may_be_flat: bool) -> list[Finding]:
    """Blown up, risen or never fallen; one of them at most."""
    values = [value for _, value in points]
    if len(values) < _FEWEST:
        return []
    noise = _noise(values)
    diverged = _divergence(points, noise)
    if diverged is not None:
        return [diverged]
    quarter = len(values) // 4
    first, last = fmean(values[:quarter]), fmean(values[-quarter:])
    sure = _SURE if len(values) >= _ENOUGH else _SURE_OF_FEW
    # The medians, too: a few bad batches raise a mean.
    rose = median(values[-quarter:]) > median(values[:quarter])
    if rose and last - first > sure * noise * math.sqrt(2 / quarter):
        return [Finding(code="loss_rose", severity="warning", params={"first": first, "last": last})]
    return [] if may_be_flat else _flat(points, noise)


def _divergence(points: Points, noise: float) -> Finding | None:
    """Where the loss's level at the end is far above the lowest one before it, and since when."""
    values = [value for _, value in points]
    if len(values) < _ENOUGH:
        return None
    width = max(3, len(values) // 10)
    starts = range(0, len(values) - width, width)
    levels = [(fmean(values[:2]), 0, 2), *((median(values[start : start + width]), start, width) for start in starts)]
    low, start, rows = min(levels)
    last = median(values[-width:])
    # What comes after may be so wild that it passes for noise.
    noise = min(noise, _noise(values[max(0, start - _AROUND) : start + rows + _AROUND]))
    bounds = (_BLOWN_UP * low, low + _BLOWN_UP_NATS, low + _BLOWN_UP_NOISE * noise / math.sqrt(rows))
    if not last > max(bounds):
        return None
    calm = low + _CALM * (last - low)
    begins = 1 + max((at for at in range(len(values) - width) if values[at] <= calm), default=start)
    params: dict[str, Value] = {"step": points[begins][0], "last": last, "low": low}
    params["low_step"] = points[start + rows - 1][0]
    return Finding(code="loss_diverged", severity="error", params=params)


def _flat(points: Points, noise: float) -> list[Finding]:
    """A loss that surely fell by next to nothing; a fine-tune that is flat at its end alone is as it should be."""
    values = [value for _, value in points]
    if len(values) < _FLAT_ROWS or points[0][0] > _FROM_THE_START * points[-1][0]:
        return []
    quarter, half = len(values) // 4, len(values) // 2
    first, later = median(values[:quarter]), median(values[half:])
    little = _HARDLY_FELL * abs(first)
    # A median strays by 1.25 times what a mean does.
    surely = first - later + 2.5 * noise * math.sqrt(1 / quarter + 1 / half) < little
    at_once = fmean(values[:_FELL_WITHIN]) - later > little + 2 * noise / math.sqrt(_FELL_WITHIN)
    if not surely or at_once:
        return []
    params: dict[str, Value] = {"first": first, "last": later, "rows": len(values)}
    return [Finding(code="loss_flat", severity="warning", params=params)]


def _overfitting(held_out: Points) -> list[Finding]:
    if len(held_out) < _FEWEST_EVALS:
        return []
    step, best = min(held_out, key=lambda point: point[1])
    last = held_out[-1][1]
    noise = _noise([value for _, value in held_out]) if len(held_out) >= _ENOUGH else 0.0
    if not last - best > max(_TURNED_ROUND * abs(best), 2 * noise):
        return []
    return [Finding(code="overfitting", severity="warning", params={"step": step, "best": best, "last": last})]


# -- learning rate


def _learning_rate(log: Sequence[LogRow], settings: Mapping[str, Value], planned: int | None) -> list[Finding]:
    rates = [point for point in _finite(_logged(log, "learning_rate")) if point[1] >= 0]
    if len(rates) < _FEWEST:
        return []
    peak = max(rate for _, rate in rates)
    if peak == 0:
        return [Finding(code="learning_rate_zero", severity="error", params={"rows": len(rates)})]
    findings = _warmup(rates, peak, settings, planned)
    return findings + _decay(rates, peak, settings, planned) if planned and log[-1].step >= planned else findings


def _warmup(rates: Points, peak: float, settings: Mapping[str, Value], planned: int | None) -> list[Finding]:
    """A warmup that was asked for and did not happen; it shows only if a row lies in its first half."""
    asked = _warmup_steps(settings, planned)
    step, rate = rates[0]
    if not (0 < 2 * step <= asked and rate >= _AT_PEAK * peak):
        return []
    params: dict[str, Value] = {"asked": round(asked), "step": step, "rate": rate, "schedule": _schedule(settings)}
    return [Finding(code="learning_rate_not_warmed", severity="warning", params=params)]


def _decay(rates: Points, peak: float, settings: Mapping[str, Value], steps: int) -> list[Finding]:
    """A run that did all its steps at a learning rate that never came down, or never came up."""
    step, last = rates[-1]
    asked = _setting(settings, "learning_rate")
    if step < _NEAR_THE_END * steps:
        return []
    if asked is not None and last < _REACHED * asked and all(one[1] < two[1] for one, two in pairwise(rates)):
        params: dict[str, Value] = {"steps": steps, "last": last, "asked": asked}
        return [Finding(code="learning_rate_still_rising", severity="warning", params=params)]
    schedule = _schedule(settings)
    if schedule not in _DECAYING or last <= _STILL_HIGH * peak:
        return []
    params = {"steps": steps, "last": last, "peak": peak, "share": last / peak, "schedule": schedule}
    return [Finding(code="learning_rate_not_decayed", severity="warning", params=params)]


def _schedule(settings: Mapping[str, Value]) -> str | None:
    """The schedule's name; trainers leave out what is the default, so it is known where the learning rate is."""
    for name in _SCHEDULES:
        value = settings.get(name)
        if isinstance(value, str) and value:
            return value.rpartition(".")[2].lower()  # a model card may say SchedulerType.COSINE
    return _DEFAULT_SCHEDULE if _setting(settings, "learning_rate") is not None else None


def _warmup_steps(settings: Mapping[str, Value], planned: int | None) -> float:
    """How many steps of warmup were asked for; steps win over the share, and a number below 1 is one."""
    for name in (*_WARMUP_STEPS, *_WARMUP_RATIOS):
        asked = _setting(settings, name)
        if asked is None or asked <= 0:
            continue
        if asked < 1 or name in _WARMUP_RATIOS:
            return asked * planned if planned else 0.0
        return asked
    return 0.0


# -- gradients


def _gradients(norms: Points, clipping: float | None) -> list[Finding]:
    if len(norms) < _FEWEST:
        return []
    sound = _finite(norms)
    if not any(norm for _, norm in norms):
        return [Finding(code="gradients_zero", severity="error", params={"rows": len(norms)})]
    spoiled = len(norms) - len(sound)
    if spoiled >= _SPOILED_ROWS and spoiled > _SPOILED * len(norms):
        last = next(step for step, norm in reversed(norms) if not abs(norm) < _ABSURD)
        params: dict[str, Value] = {"count": spoiled, "rows": len(norms), "step": last}
        return [Finding(code="gradients_not_finite", severity="warning", params=params)]
    return _large_gradients(sound, clipping) if len(sound) >= _ENOUGH else []


def _large_gradients(norms: Points, clipping: float | None) -> list[Finding]:
    """Gradients that grew far beyond what clipping is for, or leapt while nothing clipped them."""
    values = [norm for _, norm in norms]
    usual = _median(values[: len(values) // 2])
    late = _median(values[-(len(values) // 4) :])
    step, largest = max(norms, key=lambda point: point[1])
    params: dict[str, Value] = {"usual": usual, "late": late, "largest": largest, "step": step}
    floor = _BEYOND_CLIPPING * (clipping or _DEFAULT_CLIPPING)
    if late > _GROWN * usual and late > floor:
        return [Finding(code="gradients_exploded", severity="warning", params=params)]
    if clipping == 0 and largest > max(_SPIKE * usual, floor):
        return [Finding(code="gradients_unclipped", severity="warning", params=params)]
    return []


# -- throughput


def _throughput(log: Sequence[LogRow]) -> list[Finding]:
    rates = _rates(log)
    if len(rates) < _ENOUGH:
        return []
    first, last = _median(rates[: len(rates) // 2]), _median(rates[-(len(rates) // 4) :])
    if not 0 < last < _SLOWED * first:
        return []
    return [Finding(code="throughput_fell", severity="info", params={"first": first, "last": last})]


def _rates(log: Sequence[LogRow]) -> list[float]:
    """Tokens a second between rows: LLaMA-Factory logs the mean since the start, which hides the course."""
    counted = [(row.elapsed_s, row.total_tokens) for row in log if row.elapsed_s is not None and row.total_tokens]
    if not counted:
        return [rate for _, rate in _finite(_logged(log, "tokens_per_s"))]
    stride = max(1, len(counted) // _STRETCHES)
    return [
        (tokens - tokens_before) / (clock - clock_before)
        for (clock_before, tokens_before), (clock, tokens) in pairwise(counted[::stride])
        if clock - clock_before >= _SHORTEST_S  # a resumed run's clock begins anew
    ]


# -- numbers


def _is_rewarded(log: Sequence[LogRow], settings: Mapping[str, Value]) -> bool:
    """Whether a preference or reinforcement trainer wrote it."""
    named = {str(settings.get(name, "")).lower() for name in ("stage", "rlhf_type", "rl")}
    return bool(named & _REWARDED) or any(row.reward is not None for row in log)


def _logged(log: Sequence[LogRow], name: str) -> Points:
    numbers = zip(log, map(attrgetter(name), log), strict=True)
    return [(row.step, number) for row, number in numbers if number is not None]


def _finite(points: Points) -> Points:
    return [point for point in points if abs(point[1]) < _ABSURD]


def _setting(settings: Mapping[str, Value], name: str) -> float | None:
    value = settings.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _median(values: Sequence[float]) -> float:
    return median(values[:: max(1, len(values) // _SAMPLE)])


def _noise(values: Sequence[float]) -> float:
    """The standard deviation of a row about the curve, from differences, in which the curve itself cancels.

    Second differences have 6 times a row's variance, first ones twice; a normal variable's is (1.4826 · median)².
    """
    stride = max(1, len(values) // _SAMPLE)
    places = range(0, len(values) - 2, stride)
    second = median([abs(values[at] - 2 * values[at + 1] + values[at + 2]) for at in places]) / math.sqrt(6)
    if len(values) >= _ENOUGH_FOR_NOISE:
        return 1.4826 * second
    first = median([abs(one - two) for one, two in pairwise(values)]) / math.sqrt(2)
    return 1.4826 * max(first, second)
