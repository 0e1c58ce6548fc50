"""Why a quantized model is not base plus adapter: asked of a tensor's first rows, as of a merge's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from tunesmith.checkpoint import VIEW_KINDS, Array, BaseView, Float64, QuantizedWeight
from tunesmith.errors import TunesmithError
from tunesmith.record import Finding, Value
from tunesmith.verify.quantized.judge import Gain, gain_of, misshapen, stray_codes, wrong_updates
from tunesmith.verify.records import QuantizedTensor
from tunesmith.verify.structure import Dequantized
from tunesmith.verify.weights import Expectation, Tile

_ASKED_ROWS = 256
_ASKED_NAMES = 64
_HELD_TENSORS = 8
_HELD_ELEMENTS = 1 << 20
_FITS = 0.4  # a hypothesis is taken where it leaves a relative error below this and below half of what there was
_CLEARLY = 4.0  # standard errors by which one checkpoint must fit better than another
_CONSISTENT, _ALLOWANCE = 3.0, 0.05  # and how near to the other's own place it must be
_SAME_FACTOR = 0.15
_STARTED = (
    0.75  # of the way to another start; benchmarks/quantized_limits.py: up to 0.09, and from 0.91 where it is the other
)
_START_ERROR = 0.05  # the standard error that this may have


def diagnose_codes(
    tensors: Sequence[QuantizedTensor],
    model: Dequantized,
    expectation: Expectation,
    others: Mapping[str, Expectation],
) -> list[Finding]:
    """The likeliest causes of codes that do not stand for base + adapter.

    Args:
        tensors: every quantized tensor's record.
        model: the quantized model.
        expectation: what it would hold in full.
        others: what it would hold with the run's other adapters, by name.

    Returns:
        What is wrong with scales and codes first, then with the update; empty where nothing is wrong.
    """
    causes = []
    endless = {tensor.name: tensor.bad_scales for tensor in tensors if tensor.bad_scales}
    if endless:
        causes.append(_counted("cause_quantized_scales", endless))
    sound = [tensor for tensor in tensors if not tensor.bad_scales]
    wrong = misshapen(sound)
    causes += _of_misshapen([tensor for tensor in sound if tensor.name in wrong], model, expectation)
    strays = {name: count for name, count in stray_codes(sound).items() if name not in wrong}
    shaped = [tensor for tensor in sound if tensor.name not in wrong]
    of_update = _of_update(shaped, model, expectation, others)
    if strays and not of_update:
        causes.append(_counted("cause_quantized_codes", strays))
    return [*of_update, *causes]


def other_checkpoint(
    tensors: Sequence[QuantizedTensor],
    model: Dequantized,
    expectation: Expectation,
    others: Mapping[str, Expectation],
) -> str | None:
    """The run's other adapter that the codes fit clearly better than the one that was asked about.

    With D the difference between the two updates, ⟨e, D⟩/‖D‖² is near 0 where the codes are ours, and near 1 where they
    are the other's; a few tensors, those whose noise is smallest beside their update, are asked.

    Args:
        tensors: every quantized tensor's record.
        model: the quantized model.
        expectation: what it would hold in full.
        others: what it would hold with the run's other adapters, by name.
    """
    asked = sorted((t for t in tensors if t.gain_error is not None), key=lambda t: t.gain_error or 0.0)[:_HELD_TENSORS]
    whole = gain_of(asked)
    if whole is None:
        return None
    best, found = _CLEARLY, None
    for name, other in others.items():
        try:
            lead = _lead(asked, model, expectation, other, whole)
        except (TunesmithError, ValueError):  # another adapter may have other shapes, or be damaged
            continue
        if lead > best:
            best, found = lead, name
    return found


def other_start(tensors: Sequence[QuantizedTensor], model: Dequantized, expectation: Expectation) -> Finding | None:
    """Whether the codes began with the base as it is stored, or as 4-bit training saw it, and not as was asked about.

    At 4 bits an ``nf4`` view is within the codes' own noise of the stored base, number by number; over many numbers
    ⟨e, D⟩/‖D‖², with D the difference between the two, is near 0 where the start is ours and near 1 where it is the
    other.  A view of 8 bits is nearer than that can tell, and the same where the codes have 8 bits themselves.

    Args:
        tensors: every quantized tensor's record.
        model: the quantized model.
        expectation: what it would hold in full.
    """
    asked = tensors[:: max(1, len(tensors) // _HELD_TENSORS)][:_HELD_TENSORS]
    views: list[BaseView | None] = [BaseView(kind) for kind in VIEW_KINDS if kind != "int8"]
    best, found = _STARTED, None
    for view in [None] if expectation.view is not None else views:
        other = Expectation(expectation.base, expectation.stack, expectation.binding, view=view)
        try:
            share = _share([tensor.name for tensor in asked], model, expectation, other)
        except TunesmithError:  # a kind of model that such training does not take
            return None
        if share > best:
            code = "quantized_stored_start" if view is None else "quantized_viewed_start"
            params: dict[str, Value] = {"count": len(tensors)} | ({} if view is None else {"view": view.kind})
            best, found = share, Finding(code=code, severity="error", params=params)
    return found


def _share(names: Sequence[str], model: Dequantized, ours: Expectation, theirs: Expectation) -> float:
    """How much of the way from one start to the other the codes lie; 0 where that cannot be told."""
    ed = dd = eedd = 0.0
    for error, tile, other in _held(names, model, ours, theirs):
        apart = other.start - tile.start
        ed += _dot(error, apart)
        dd += _dot(apart, apart)
        eedd += _dot(error * error, apart * apart)
    return ed / dd if dd and eedd**0.5 / dd <= _START_ERROR else 0.0


def _lead(
    tensors: Sequence[QuantizedTensor], model: Dequantized, ours: Expectation, theirs: Expectation, whole: Gain
) -> float:
    """By how many standard errors the other's update fits better; at most 0 where it does not."""
    ed = dd = eedd = mine = others = 0.0
    for error, tile, other in _held([tensor.name for tensor in tensors], model, ours, theirs):
        apart = (other.start + other.delta) - (tile.start + tile.delta)
        ed += _dot(error, apart)
        dd += _dot(apart, apart)
        eedd += _dot(error * error, apart * apart)
        mine += _dot(tile.delta, apart)
        others += _dot(other.delta, apart)
    if not dd:
        return 0.0
    # What rounding to nearest takes of an update, it takes of the part of it that D is made of.
    taken = min(whole.low, 1.0) - 1
    fits = [_distance(ed / dd, [base, base + taken * share / dd]) for base, share in ((0.0, mine), (1.0, others))]
    deviation = eedd**0.5 / dd
    if not deviation or fits[1] > _CONSISTENT * deviation + _ALLOWANCE:
        return 0.0  # it fits neither: another strength, or another adapter
    lead: float = (fits[0] - fits[1]) / deviation
    return lead


def _held(
    names: Sequence[str], model: Dequantized, ours: Expectation, theirs: Expectation
) -> Iterator[tuple[Float64, Tile, Tile]]:
    """Of the first rows of some tensors, tile by tile: what the codes are off by, and what each expects."""
    for name in names:
        expected, alternative, layer = ours.tensor(name), theirs.tensor(name), model.layers[name]
        rows = min(expected.rows, max(1, _HELD_ELEMENTS // max(1, expected.columns)))
        for start, stop in expected.tiles(0, rows):
            tile = expected.tile(start, stop)
            yield layer.float64(start, stop) - tile.start - tile.delta, tile, alternative.tile(start, stop)


def _distance(value: float, ends: Sequence[float]) -> float:
    return max(0.0, min(ends) - value, value - max(ends))


def _of_update(
    tensors: Sequence[QuantizedTensor], model: Dequantized, expectation: Expectation, others: Mapping[str, Expectation]
) -> list[Finding]:
    """What became of the update, where it is not there as it should be."""
    touched = [tensor for tensor in tensors if tensor.gain is not None]
    whole = gain_of(touched)
    wrong = wrong_updates(touched)
    if whole is None:
        return []
    checkpoint = other_checkpoint(touched, model, expectation, others)
    if checkpoint is not None:
        return [_cause("cause_other_checkpoint", checkpoint=checkpoint)]
    if not wrong and (whole.right or not whole.resolved):
        return []
    if whole.resolved and whole.absent:
        return [_cause("cause_quantized_without", count=len(touched))]
    # Of one tensor alone, its own noise may hide a half as well as nothing; so the others must have it all.
    together, rest = gain_of(wrong), gain_of([tensor for tensor in touched if tensor not in wrong])
    if together is not None and together.absent and (rest is None or rest.right):
        modules = ", ".join(str(tensor.module) for tensor in wrong[:3]) + (" …" if len(wrong) > 3 else "")
        return [_cause("cause_partly_applied", modules=modules, count=len(wrong), total=len(touched))]
    worst = wrong[0] if wrong else touched[0]
    factor = _factor(whole, wrong)
    return [_cause("cause_scaled", factor=factor, tensor=worst.name, count=len(wrong) or len(touched))]


def _factor(whole: Gain, wrong: Sequence[QuantizedTensor]) -> float:
    """How many times as strong the update is; a round number where it is near one."""
    measured = whole if not whole.right else gain_of(wrong)
    factor = measured.factor if measured is not None else whole.factor
    near = [known for known in (0.25, 0.5, 2.0, 4.0, -1.0) if abs(factor - known) <= _SAME_FACTOR * abs(known)]
    return near[0] if near else factor


def _of_misshapen(bad: Sequence[QuantizedTensor], model: Dequantized, expectation: Expectation) -> list[Finding]:
    """What became of tensors whose codes and scales do not make their numbers; causes that are the same as one."""
    found: dict[str, list[tuple[QuantizedTensor, Finding]]] = {}
    for tensor in bad[:_ASKED_NAMES]:
        cause = _asked(tensor, model, expectation)
        found.setdefault(cause.code, []).append((tensor, cause))
    rest = len(bad) - min(len(bad), _ASKED_NAMES)
    causes = []
    for number, listed in enumerate(found.values()):
        count = len(listed) + (rest if number == 0 else 0)
        causes.append(listed[0][1].model_copy(update={"params": {**listed[0][1].params, "count": count}}))
    return causes


def _asked(tensor: QuantizedTensor, model: Dequantized, expectation: Expectation) -> Finding:
    layer, expected = model.layers[tensor.name], expectation.tensor(tensor.name)
    rows = min(expected.rows, _ASKED_ROWS)
    tile = expected.tile(0, rows)
    x = tile.start + tile.delta
    now = _off(layer.float64(0, rows), x)
    for code, params, left in _guesses(tensor, layer, model, expectation, x):
        if left < min(_FITS, now / 2):
            return _cause(code, tensor=tensor.name, **params)
    if tensor.clipped > 0.02:
        return _cause("cause_quantized_clipped", tensor=tensor.name, share=tensor.clipped)
    if tensor.bad_groups and tensor.bad_groups <= tensor.groups // 2:
        return _cause("cause_quantized_groups", tensor=tensor.name, groups=tensor.bad_groups)
    return _cause("cause_quantized_outside", tensor=tensor.name)


def _guesses(
    tensor: QuantizedTensor, layer: QuantizedWeight, model: Dequantized, expectation: Expectation, x: Float64
) -> Iterator[tuple[str, dict[str, Value], float]]:
    """How far the tensor's first rows would be off, were one thing undone."""
    rows = len(x)
    stored, codes, scales = layer.float64(0, rows), layer.codes(0, rows), layer.scales(0, rows)
    factor = float(np.sum(stored * x) / np.sum(x * x)) if x.any() else 0.0
    if factor and abs(factor - 1) > _SAME_FACTOR:
        yield "cause_quantized_scaled", {"factor": factor}, _off(stored / factor, x)
    yield from _guessed_starts(tensor.name, stored, expectation)
    whole = layer.scales(0, layer.rows)
    for shift in (1, -1) if whole.ndim == 2 else ():
        for moved in (np.roll(scales, shift, axis=1), np.roll(whole, shift, axis=0)[:rows]):
            yield "cause_quantized_shifted", {}, _off(layer.scheme.dequantized(codes, moved), x)
    for other in _reordered(codes):
        yield "cause_quantized_order", {}, _off(layer.scheme.dequantized(other, scales), x)
    if layer.rows == layer.columns:
        yield "cause_quantized_transposed", {}, _off(layer.float64(0, layer.rows).T[:rows], x)
    for name in _alike(tensor.name, model):
        theirs = expectation.tensor(name).tile(0, rows)
        yield "cause_misplaced", {"source": name}, _off(stored, theirs.start + theirs.delta)
        swapped = layer.scheme.dequantized(model.layers[name].codes(0, rows), scales)
        yield "cause_misplaced", {"source": name}, _off(swapped, x)


def _guessed_starts(name: str, stored: Float64, whole: Expectation) -> Iterator[tuple[str, dict[str, Value], float]]:
    """How far some first rows would be off, had the sum begun with the base as it is stored, or as another view of it.

    The stored base goes first: what was rounded to 8 bits from it lies on the ``int8`` view as well.  Of the views,
    which are near each other, the nearest is the one.
    """

    def left(view: BaseView | None) -> float:
        tile = Expectation(whole.base, whole.stack, whole.binding, view=view).tensor(name).tile(0, len(stored))
        return _off(stored, tile.start + tile.delta)

    if whole.view is not None:
        yield "cause_base_not_dequantized", {}, left(None)
    asked = getattr(whole.view, "kind", None)
    views = [BaseView(kind) for kind in VIEW_KINDS if kind != asked]
    try:
        fits = [(left(view), view.kind) for view in views if view.applies_to(whole.base, name)]
    except TunesmithError:  # a kind of model that such training does not take
        return
    if fits:
        nearest, kind = min(fits)
        yield "cause_base_dequantized", {"view": kind}, nearest


def _reordered(codes: Array) -> Iterator[Array]:
    """Codes as they would stand, had they been packed the other way round."""
    width = codes.shape[1]
    for size in (2, 8):
        if width % size == 0:
            yield codes.reshape(len(codes), -1, size)[:, :, ::-1].reshape(codes.shape)
    if width % 8 == 0:  # AWQ's order
        yield codes.reshape(len(codes), -1, 8)[:, :, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(codes.shape)


def _alike(name: str, model: Dequantized) -> list[str]:
    """Other quantized tensors of its shape, those whose names differ least first."""
    layer, parts = model.layers[name], name.split(".")
    others = [
        other
        for other, one in model.layers.items()
        if other != name and (one.rows, one.columns) == (layer.rows, layer.columns)
    ]

    def distance(other: str) -> int:
        theirs = other.split(".")
        return max(len(parts), len(theirs)) - sum(a == b for a, b in zip(parts, theirs, strict=False))

    return sorted(others, key=distance)[:_ASKED_NAMES]


def _off(stored: Float64, x: Float64) -> float:
    """‖stored − x‖ / ‖x‖."""
    with np.errstate(over="ignore", invalid="ignore"):
        found = float(np.linalg.norm(stored - x) / (np.linalg.norm(x) or 1.0))
    return found if np.isfinite(found) else float("inf")


def _dot(first: Float64, second: Float64) -> float:
    return float(np.einsum("i,i->", first.reshape(-1), second.reshape(-1)))


def _cause(code: str, **params: Value) -> Finding:
    return Finding(code=code, severity="error", params=params)


def _counted(code: str, counts: Mapping[str, int]) -> Finding:
    return _cause(code, tensor=max(counts, key=lambda name: counts[name]), count=sum(counts.values()))
