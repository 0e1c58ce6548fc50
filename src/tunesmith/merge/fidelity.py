"""What rounding keeps of an update: told after a merge, and foretold from a few rows before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from threadpoolctl import threadpool_limits

from tunesmith.adapter import Binding, LowRank, Stack
from tunesmith.checkpoint import Checkpoint
from tunesmith.merge.records import Forecast, Kept, MergePlan, TensorFidelity
from tunesmith.merge.rounders import CALIBRATED, faithful, rounding_of
from tunesmith.merge.tiles import TileSums, settle_tile
from tunesmith.record import Finding, Value

WEAK_GAIN = 0.95
STRONG_GAIN = 0.98

_FORECAST_TENSORS = 4
_FORECAST_ROWS = 32
_FORECAST_COLUMNS = 4096  # of all tensors together: feedback takes so many steps, one after another


def fidelity_of(name: str, sums: TileSums, rounding: str) -> TensorFidelity:
    """What rounding kept of one tensor's update.

    Args:
        name: the tensor.
        sums: over all its tiles.
        rounding: how it was to be rounded.
    """
    kept, nearest = kept_of(sums)
    if rounding == "faithful" and not sums.inside_of:
        rounding = "nearest"  # found out by the merge that nothing was to be won
    return TensorFidelity(
        name=name,
        elements=sums.elements,
        delta_norm=sums.delta_delta**0.5,
        rounding=rounding,
        share_beyond=sums.beyond / max(1, sums.elements),
        nearest=None if rounding == "nearest" else nearest,
        **dict(kept),
    )


def kept_of(sums: TileSums) -> tuple[Kept, Kept]:
    """What rounding kept, and what rounding to nearest would have kept."""
    nearest = replace(
        sums,
        unchanged=sums.nearest_unchanged,
        realised_delta=sums.nearest_realised_delta,
        error_error=sums.nearest_error_error,
        inside=sums.nearest_inside,
    )
    return _kept(sums), _kept(nearest)


def _kept(sums: TileSums) -> Kept:
    delta = sums.delta_delta
    return Kept(
        share_unchanged=sums.unchanged / max(1, sums.elements),
        relative_error=(sums.error_error / delta) ** 0.5 if delta else 0.0,
        gain=sums.realised_delta / delta if delta else 1.0,
        error_inside=(sums.inside / sums.inside_of) ** 0.5 if sums.inside_of else None,
    )


def judged(plan: MergePlan, kept: Kept, nearest: Kept) -> tuple[Finding, ...]:
    """What the user should know of what rounding did."""
    params: dict[str, Value] = {
        "gain": kept.gain,
        "share_unchanged": kept.share_unchanged,
        "dtype": plan.dtype,
        "nearest_gain": nearest.gain,
    }
    # Calibrated rounding keeps what the update does to the inputs that occur, and need not keep the rest.
    if kept.gain < WEAK_GAIN and plan.rounding not in CALIBRATED:
        code = "update_finer_than_bf16" if plan.rounding == "faithful" else "update_lost_in_rounding"
        return (Finding(code=code, severity="warning", params=params),)
    if plan.rounding != "nearest" and nearest.gain > STRONG_GAIN:
        return (Finding(code="rounding_gains_little", severity="info", params=params),)
    return ()


def forecast(base: Checkpoint, stack: Stack, binding: Binding) -> Forecast | None:
    """What rounding would keep, from a few rows of a few tensors.

    Args:
        base: the base model.
        stack: the adapters.
        binding: what they make of it.

    Returns:
        None where no tensor of the base's own floating-point dtype has nothing but low-rank updates.
    """
    # So few rows are no work for several threads of BLAS, which wait for each other on a busy machine.
    with threadpool_limits(1):
        return _forecast(base, stack, binding)


def _forecast(base: Checkpoint, stack: Stack, binding: Binding) -> Forecast | None:
    total, seen, dtype = TileSums(), 0, ""
    for name, updates in _sampled(base, binding):
        dtype, rows = base.info(name).dtype, base.info(name).shape[0]
        start = max(0, (rows - _FORECAST_ROWS) // 2)
        stored_TI, w_TI = (read(name, start, start + _FORECAST_ROWS) for read in (base.read, base.read_float64))
        pairs = [(update.scaling, *stack.factors(update)) for update in updates]
        delta_TI = sum(
            (s * b_OR[start : start + _FORECAST_ROWS] @ a_RI for s, a_RI, b_OR in pairs), np.zeros(w_TI.shape)
        )
        rounding = rounding_of("faithful", dtype, updates)
        rounder = faithful(np.concatenate([a_RI for _, a_RI, _ in pairs])) if rounding == "faithful" else None
        total += settle_tile(w_TI, delta_TI, dtype, kept_TI=stored_TI, rounder=rounder)[1]
        seen += 1
    if not seen:
        return None
    rounding = "faithful" if dtype == "BF16" else "nearest"
    kept, nearest = kept_of(total)
    return Forecast(dtype=dtype, rounding=rounding, tensors=seen, elements=total.elements, kept=kept, nearest=nearest)


def _sampled(base: Checkpoint, binding: Binding) -> Iterator[tuple[str, list[LowRank]]]:
    """A few tensors, evenly spaced, of one dtype, with low-rank updates of the whole tensor and nothing else."""
    plain = [
        (name, [update for update in updates if isinstance(update, LowRank)])
        for name, updates in binding.by_name.items()
        if name in base.tensors
        and len(base.info(name).shape) == 2
        and all(isinstance(update, LowRank) and update.block is None for update in updates)
    ]
    plain = [one for one in plain if base.info(one[0]).dtype == base.info(plain[0][0]).dtype]
    plain = [one for one in plain if base.info(one[0]).shape[1] <= _FORECAST_COLUMNS] or plain
    columns = 0
    places = {(len(plain) - 1) * part // (_FORECAST_TENSORS - 1) for part in range(_FORECAST_TENSORS)} if plain else ()
    for place in sorted(places):
        name, updates = plain[place]
        columns += base.info(name).shape[1]
        if columns > _FORECAST_COLUMNS and columns > base.info(name).shape[1]:
            return
        yield name, updates
