"""The model that a merge's own rounding makes: the base as it was loaded, with the weights that level 3 recomputed.

How far it is from the live adapter is what this merge's rounding costs, whether that was to the nearest number or to a
neighbour.  How far the merged directory is from it, loaded by its own config and names, is what a loader made of
weights that are known: nothing but the arithmetic's noise.

The weights are read by verify's own reading of the files, tensor by tensor, and are written over those of the loaded
base, so that no further model is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.checkpoint import FLOAT_DTYPES, Checkpoint, Float64
from tunesmith.verify.records import TensorVerdict
from tunesmith.verify.structure import Dequantized
from tunesmith.verify.weights import Expectation, Expected, matrix_of, to_dtype, with_neighbours

if TYPE_CHECKING:
    import torch

Place = tuple["torch.nn.Module", str]

# What PEFT puts around a layer of the base, and what it puts beside its weights.
_WRAPPINGS = ("base_layer", "original_module", "token_adapter")
_BESIDE = ("lora_", "modules_to_save", "trainable_tokens")


class Reference:
    """The recomputed weights of one merge, to be written into the base that was loaded for it.

    Args:
        merged: the merged model.
        expectation: what it should hold.
        tensors: the verdicts of the weights level.

    Attributes:
        sound: whether no number is outside, so that the merged model holds these weights itself.
    """

    def __init__(self, merged: Checkpoint, expectation: Expectation, tensors: Sequence[TensorVerdict]) -> None:
        self._merged, self._expectation = merged, expectation
        self._layers = merged.layers if isinstance(merged, Dequantized) else {}
        self._outside = {tensor.name for tensor in tensors if tensor.outside}
        self.sound = not self._outside

    def write_into(self, model: Any) -> bool:
        """Write the weights over those of a loaded base; adapters on it must be off, here and from then on.

        A stored value is taken where the weights level explained it, and the nearest one where it did not.

        Args:
            model: the loaded base, a ``PreTrainedModel``, in any dtype.

        Returns:
            False where a tensor of the files is not one parameter of the model, as with experts that were fused on
            loading; some may then have been written, so that the model is of no more use.
        """
        places = _places(model)
        prefix = f"{model.base_model_prefix}."
        touched = self._expectation.updates.keys()
        known = {name: places.get(name) or places.get(prefix + name, []) for name in self._expectation.names}
        _untie({name: known[name] for name in known if known[name]}, touched)
        for name in self._expectation.names:
            if name not in touched and self._is_bases_own(name):
                continue
            if name not in self._merged.tensors or not known[name] or not self._write(name, known[name][0]):
                return False
        return True

    def _is_bases_own(self, name: str) -> bool:
        """Whether the loaded base holds what the merged model should; a copy of another tensor may be left out."""
        dtype = self._expectation.infos[name].dtype
        left_out = name not in self._merged.tensors
        if name in self._layers:
            return False
        return left_out or dtype not in FLOAT_DTYPES or self._merged.info(name).dtype == dtype

    def _write(self, name: str, place: Place) -> bool:
        import torch

        parameter = getattr(*place).data
        expected = self._expectation.tensor(name)
        stored = self._merged.info(name)
        if tuple(parameter.shape) != self._expectation.shape(name) or stored.elements != parameter.numel():
            return False
        rows_TC = parameter.view(expected.rows, expected.columns)
        for start, stop in expected.tiles():
            before = expected.of_base(start, stop) if expected.begins_as_itself else None
            tile = rows_TC[start:stop]
            if before is not None and not torch.equal(torch.from_numpy(before).to(tile), tile):
                return False  # loaded turned, fused or scaled: another layout than the files'
            tile.copy_(torch.from_numpy(self._values(expected, start, stop)))
        return True

    def _values(self, expected: Expected, start: int, stop: int) -> Float64:
        if expected.name in self._layers:
            return self._layers[expected.name].float64(start, stop)
        stored = matrix_of(self._merged, expected)
        if expected.name not in self._outside:
            return stored.float64(start, stop)
        value, below, above = with_neighbours(stored.read(start, stop), stored.info.dtype)
        tile = expected.tile(start, stop)
        x = tile.start + tile.delta
        with np.errstate(invalid="ignore"):
            return np.where((below < x) & (x < above), value, to_dtype(x, stored.info.dtype))


def _places(model: Any) -> dict[str, list[Place]]:
    """Where every parameter of the base is held, by its name without what PEFT wraps it in."""
    places: dict[str, list[Place]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        parts = path.split(".") if path else []
        if any(part.startswith(_BESIDE) for part in parts):
            continue
        for attribute, parameter in module._parameters.items():
            if parameter is not None and not attribute.startswith(_BESIDE):
                name = ".".join([*(part for part in parts if part not in _WRAPPINGS), attribute])
                places.setdefault(name, []).append((module, attribute))
    return places


def _untie(places: dict[str, list[Place]], touched: Any) -> None:
    """Give each of several names of one parameter its own, where the adapter changes one of them."""
    import torch

    names: dict[int, list[str]] = {}
    for name, (place, *_) in places.items():
        names.setdefault(id(getattr(*place)), []).append(name)
    for shared in names.values():
        if any(name in touched for name in shared):
            for name in shared[1:]:
                own = torch.nn.Parameter(getattr(*places[name][0]).detach().clone(), requires_grad=False)
                for module, attribute in places[name]:
                    setattr(module, attribute, own)
