"""How to multiply rows with a weight: measured once, because no library's default is quick on every machine.

A row of activations times a weight is bound by reading the weight, so two rows should cost what one does.  On many CPUs
they cost twice as much and more, because the libraries change to another kernel there; the same product written the
other way round, with a row too many, or by another library that torch carries, is then several times as fast.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Product = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor | None"], "torch.Tensor"]

_SHAPES = {"tall": (1536, 576), "wide": (576, 1536)}
# By the most rows that a measurement stands for: what is worth a try beside ``plain``.
_TRIED = {
    1: ("doubled", "onednn"),
    2: ("turned", "onednn"),
    4: ("turned", "onednn"),
    8: ("turned", "onednn"),
    16: ("onednn",),
    64: ("onednn",),
}
_WAYS = ("plain", "doubled", "turned", "onednn")
_SEEN_BYTES = 64 << 20  # so much weight is gone through in turn, so that no cache holds it
_REPETITIONS = 2
_MUST_WIN_BY = 1.05


def product_of(module: Any) -> Product | None:
    """The product to use for a linear layer; None where its own is the one to use.

    Args:
        module: any module.
    """
    import torch

    if type(module) is not torch.nn.Linear:
        return None
    weight = module.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    ways = quickest("tall" if weight.shape[0] >= weight.shape[1] else "wide")
    return lambda x, w, bias: _multiply(x, w, bias, _way(ways, x))


def _way(ways: Mapping[int, str], x: torch.Tensor) -> str:
    rows = x.numel() // x.shape[-1]
    return ways[next((most for most in _TRIED if rows <= most), max(_TRIED))]


def _multiply(x: torch.Tensor, weight_OI: torch.Tensor, bias: torch.Tensor | None, way: str) -> torch.Tensor:
    """x (…, in) @ weight.T (in, out) + bias, (…, out)."""  # noqa: D403
    import torch

    if way == "plain":
        return torch.nn.functional.linear(x, weight_OI, bias)
    if way == "onednn":
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias, "none", [], "")
        return result
    flat = x.reshape(-1, x.shape[-1])
    columns = torch.cat([flat, flat]).t() if way == "doubled" else flat.t()
    turned = (weight_OI @ columns).t()[: flat.shape[0]]
    turned = turned.contiguous() if bias is None else turned + bias
    return turned.view(*x.shape[:-1], weight_OI.shape[0])


@cache
def quickest(shape: str) -> Mapping[int, str]:
    """The quickest way by the most rows that it is for: measured on this machine, and kept for later processes.

    Args:
        shape: ``tall`` (more outputs than inputs, or as many) or ``wide``.
    """
    from tunesmith.checkpoint import cache_dir
    from tunesmith.models.compute import machine_name

    machine, file = machine_name(), cache_dir() / "products.json"
    known = _read(file).get(machine, {})
    if shape not in known:
        known = {**known, **{each: _measure(*_SHAPES[each]) for each in _SHAPES}}
        _write(file, {**_read(file), machine: known})
    return known[shape]


def _measure(outputs: int, inputs: int) -> dict[int, str]:
    import torch

    generator = torch.Generator().manual_seed(0)
    count = max(1, _SEEN_BYTES // (4 * outputs * inputs))
    weights = [torch.randn(outputs, inputs, generator=generator) for _ in range(count)]
    found = {}
    with torch.inference_mode():
        for rows, tried in _TRIED.items():
            x = torch.randn(rows, inputs, generator=generator)
            plain = _seconds(x, weights, "plain")
            times = {way: _seconds(x, weights, way) for way in tried}
            best = min(times, key=lambda way: times[way])
            found[rows] = best if times[best] * _MUST_WIN_BY <= plain else "plain"
    return found


def _seconds(x: torch.Tensor, weights: list[torch.Tensor], way: str) -> float:
    """CPU seconds of one product with every weight; infinite where this torch has no such product."""
    best = float("inf")
    for _ in range(_REPETITIONS):
        started = time.process_time()
        try:
            for weight in weights:
                _multiply(x, weight, None, way)
        except (RuntimeError, AttributeError, TypeError):
            return float("inf")
        best = min(best, time.process_time() - started)
    return best


def _read(file: Path) -> dict[str, dict[str, dict[int, str]]]:
    try:
        machines = json.loads(file.read_bytes())["machines"]
        found = {
            str(machine): {
                str(shape): {int(rows): str(way) for rows, way in ways.items()} for shape, ways in shapes.items()
            }
            for machine, shapes in machines.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}  # an unreadable measurement is taken again
    whole = [
        machine
        for machine, shapes in found.items()
        if all(ways.keys() == _TRIED.keys() and set(ways.values()) <= set(_WAYS) for ways in shapes.values())
    ]
    return {machine: found[machine] for machine in whole}


def _write(file: Path, machines: dict[str, Any]) -> None:
    beside = file.with_name(f".{file.name}.{os.getpid()}.partial")
    with suppress(OSError):  # a measurement that cannot be kept is taken again
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps({"machines": machines}, indent=1) + "\n", encoding="utf-8")
        beside.replace(file)
    with suppress(OSError):
        beside.unlink(missing_ok=True)
