"""How to multiply rows with a weight: measured once, because no library's default is quick on every machine.

A row of activations times a weight is bound by reading the weight, so two rows should cost what one does.  On many CPUs
they cost twice as much and more, because the libraries change to another kernel there, or put the weight into another
order at every call.  The same product written the other way round, with a row too many, by another library that torch
carries, or with a weight that was put into that library's order once, is then several times as fast.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.models.compute import free_bytes, machine_name, read_measurements, write_measurements
from tunesmith.models.loading import sample

if TYPE_CHECKING:
    import torch

Product = Callable[["torch.Tensor"], "torch.Tensor"]

_SHAPES = {"tall": (1536, 576), "wide": (576, 1536)}
# By dtype and the most rows that a measurement stands for: what is worth a try beside ``plain``.
_TRIED: Mapping[str, Mapping[int, tuple[str, ...]]] = {
    "float32": {
        1: ("doubled",),
        2: ("turned", "packed"),
        4: ("turned", "onednn", "packed"),
        8: ("turned", "onednn", "packed"),
        16: ("onednn", "packed"),
        64: ("onednn", "packed"),
    },
    "bfloat16": {1: ("packed",), 4: ("packed",), 16: ("packed",), 64: ("packed",)},
}
# A weight so small stays in the processor's cache, and its product takes less time than its call.
_SMALL_BYTES = 128 << 10
_SEEN_BYTES = 24 << 20  # so much weight is gone through in turn, so that no cache holds it
_REPETITIONS = 2
_MUST_WIN_BY = 1.05
# Packed weights are copies: of the memory that is free when the first is made, this much at most.
_PACKED_SHARE = 0.25

Times = dict[int, dict[str, float]]


class Products:
    """The products of one model's linear layers.

    Args:
        model: a torch module.
    """

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)
        self._packed: dict[int, tuple[Any, tuple[int, int], float, torch.Tensor]] = {}
        self._may_pack: bool | None = None

    def of(self, module: Any) -> Product | None:
        """What to use in a layer's place; None where its own product is the one to use.

        Args:
            module: any module of the model.
        """
        import torch

        if type(module) is not torch.nn.Linear or module.weight.device.type != "cpu":
            return None
        if getattr(module, "quantization_scheme", None) is not None:  # its activations are quantized as well
            return None
        weight = module.weight
        dtype = str(weight.dtype).removeprefix("torch.")
        if dtype not in _TRIED or weight.numel() * weight.itemsize < _SMALL_BYTES:
            return None
        tall = weight.shape[0] >= weight.shape[1]
        ways = quickest(f"{dtype} {'tall' if tall else 'wide'}", packed=self._room_to_pack())
        if set(ways.values()) == {"plain"}:
            return None
        return lambda x: self._multiply(module, x, ways)

    def _multiply(self, module: Any, x: torch.Tensor, ways: Mapping[int, str]) -> torch.Tensor:
        import torch

        rows = x.numel() // x.shape[-1]
        way = next((way for most, way in ways.items() if rows <= most), None) or list(ways.values())[-1]
        if way == "plain" or not rows:
            return torch.nn.functional.linear(x, module.weight, module.bias)
        weight = self._pack(module) if way == "packed" else module.weight
        return _multiply(x, weight, module.bias, way)

    def _pack(self, module: Any) -> torch.Tensor:
        """A layer's weight in oneDNN's own order, made again when the weight was written since."""
        weight = module.weight
        state = (weight._version, weight.data_ptr())
        found = self._packed.get(id(module))
        if found is None or found[1] != state:
            found = self._packed[id(module)] = (weight, state, sample(weight), _packed(weight.detach()))
        return found[3]

    def forget_changed(self) -> None:
        """Drop copies of weights that were written since without autograd's knowing, as through ``weight.data``."""
        changed = [key for key, (weight, _, before, _) in self._packed.items() if sample(weight) != before]
        for key in changed:
            del self._packed[key]

    def _room_to_pack(self) -> bool:
        """Whether copies of all weights are a small matter on this machine."""
        if self._may_pack is None:
            model = self._model()
            size = sum(one.numel() * one.itemsize for one in model.parameters()) if model is not None else 0
            self._may_pack = size <= _PACKED_SHARE * free_bytes()
        return self._may_pack


_of_models: weakref.WeakKeyDictionary[Any, Products] = weakref.WeakKeyDictionary()


def products_of(model: Any) -> Products:
    """The products of a model, the same ones for as long as it lives.

    Args:
        model: a torch module.
    """
    if model not in _of_models:
        _of_models[model] = Products(model)
    return _of_models[model]


def _packed(weight_OI: torch.Tensor) -> torch.Tensor:
    import torch

    result: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI)
    return result


def _multiply(x: torch.Tensor, weight_OI: torch.Tensor, bias: torch.Tensor | None, way: str) -> torch.Tensor:
    """x (…, in) @ weight.T (in, out) + bias, (…, out)."""  # noqa: D403
    import torch

    if way == "plain":
        return torch.nn.functional.linear(x, weight_OI, bias)
    if way in ("onednn", "packed"):
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias, "none", [], "")
        return result
    flat = x.reshape(-1, x.shape[-1])
    columns = torch.cat([flat, flat]).t() if way == "doubled" else flat.t()
    turned = (weight_OI @ columns).t()[: flat.shape[0]]
    turned = turned.contiguous() if bias is None else turned + bias
    return turned.view(*x.shape[:-1], -1)


def quickest(kind: str, *, packed: bool) -> Mapping[int, str]:
    """The quickest way by the most rows that it is for: measured on this machine, and kept for later processes.

    Args:
        kind: the weight's dtype, and ``tall`` (more outputs than inputs, or as many) or ``wide``.
        packed: whether weights may be packed.
    """
    found = {}
    for rows, times in _times(kind).items():
        best = min((way for way in times if packed or way != "packed"), key=lambda way: times[way])
        found[rows] = best if times[best] * _MUST_WIN_BY <= times["plain"] else "plain"
    return found


@cache
def _times(kind: str) -> Times:
    """CPU seconds by rows and way."""
    from tunesmith.checkpoint import cache_dir

    machine, file = machine_name(), cache_dir() / "products.json"
    known = _read(file).get(machine, {})
    if kind not in known:
        dtype = kind.partition(" ")[0]
        known = {**known, **{f"{dtype} {shape}": _measure(dtype, *_SHAPES[shape]) for shape in _SHAPES}}
        write_measurements(file, {**_read(file), machine: known})
    return known[kind]


def _measure(dtype: str, outputs: int, inputs: int) -> Times:
    import torch

    generator = torch.Generator().manual_seed(0)
    like = getattr(torch, dtype)
    count = max(1, _SEEN_BYTES // (like.itemsize * outputs * inputs))
    weights = [torch.randn(outputs, inputs, generator=generator).to(like) for _ in range(count)]
    found: Times = {}
    with torch.inference_mode():
        try:
            packed = [_packed(weight) for weight in weights]
        except (RuntimeError, AttributeError):  # a torch without oneDNN
            packed = []
        for rows, tried in _TRIED[dtype].items():
            x = torch.randn(rows, inputs, generator=generator).to(like)
            found[rows] = {way: _seconds(x, packed if way == "packed" else weights, way) for way in ("plain", *tried)}
    return found


def _seconds(x: torch.Tensor, weights: list[torch.Tensor], way: str) -> float:
    """CPU seconds of one product with every weight; very many where this torch has no such product."""
    best = 1e9
    for _ in range(_REPETITIONS if weights else 0):
        started = time.process_time()
        try:
            for weight in weights:
                _multiply(x, weight, None, way)
        except (RuntimeError, AttributeError, TypeError):
            return 1e9
        best = min(best, time.process_time() - started)
    return best


def _read(file: Path) -> dict[str, dict[str, Times]]:
    """What was measured by machine and kind; what is not whole is passed over, and taken again."""
    try:
        return {
            machine: {
                kind: times
                for kind, found in kinds.items()
                if (times := {int(rows): {way: float(s) for way, s in each.items()} for rows, each in found.items()})
                and _is_whole(kind, times)
            }
            for machine, kinds in read_measurements(file).items()
        }
    except (ValueError, TypeError, AttributeError):
        return {}


def _is_whole(kind: str, times: Times) -> bool:
    dtype, _, shape = kind.partition(" ")
    wanted = {rows: {"plain", *tried} for rows, tried in _TRIED.get(dtype, {}).items()}
    return shape in _SHAPES and {rows: set(each) for rows, each in times.items()} == wanted
