"""A model in the compressed-tensors format, seen with each quantized layer's weight as one tensor of the base's form.

Which layers are quantized is said twice, by ``config.json`` and by the tensors; here the two are held against each
other, and against the base's shapes.  A loader believes the configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from tunesmith.checkpoint import (
    QUANTIZED_METHOD,
    Array,
    Checkpoint,
    Float64,
    Quantization,
    QuantizedScheme,
    QuantizedWeight,
    TensorInfo,
    quantization_of,
    read_rows,
)
from tunesmith.errors import CheckpointError
from tunesmith.record import Finding, Value
from tunesmith.verify.structure.directory import some_of

Shapes = Mapping[str, tuple[int, ...] | None]

_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
_EMBEDDINGS = ("embed_tokens", "wte", "wpe", "word_embeddings", "embed_in", "tok_embeddings", "embeddings")
_HEAD = "lm_head"


class Dequantized(Checkpoint):
    """A quantized model by the base's names.

    Args:
        model: the model.
        layers: its quantized layers, by the name that the weight has in the base.
        dtypes: the dtype that the base stores each of these weights in.

    Attributes:
        layers: likewise.
        schemes: the schemes' short names, each once.
    """

    def __init__(
        self, model: Checkpoint, layers: Mapping[str, QuantizedWeight], dtypes: Mapping[str, str] | None = None
    ) -> None:
        self.path, self.config, self.layers = model.path, model.config, dict(layers)
        self.schemes = tuple(dict.fromkeys(layer.scheme.name for layer in layers.values()))
        stored = {name for layer in layers.values() for name in layer.scheme.tensors(layer.module, 0, 0)}
        self.shards = {
            file: replace(header, tensors={name: one for name, one in header.tensors.items() if name not in stored})
            for file, header in model.shards.items()
        }
        self._files = {name: file for file, header in self.shards.items() for name in header.tensors}
        self._infos = {name: self.shards[file].tensors[name] for name, file in self._files.items()}
        for name, layer in layers.items():
            dtype = (dtypes or {}).get(name, "BF16")
            self._infos[name] = TensorInfo(name, dtype, (layer.rows, layer.columns), 0, 0)
            self._files[name] = model.shard_of(f"{layer.module}.weight_scale")

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by the base's name; a quantized one lies nowhere as it is shown."""
        return self._infos

    def shard_of(self, name: str) -> str:
        """The file that holds a tensor, or a quantized one's scales."""
        return self._files[name]

    def info(self, name: str) -> TensorInfo:
        """A tensor's dtype and shape, and where it lies."""
        return self._infos[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Read rows of a tensor as stored.

        Raises:
            CheckpointError: it is a quantized one, which is stored as codes.
        """
        if name in self.layers:
            raise CheckpointError("A quantized layer's weight is stored as codes.", where=self.path, found=name)
        return read_rows(self.shards[self._files[name]], name, start, stop)

    def read_float64(self, name: str, start: int = 0, stop: int | None = None) -> Float64:
        """Read rows of a tensor exactly, in float64, a quantized one as code · scale."""
        if name in self.layers:
            layer = self.layers[name]
            return layer.float64(start, layer.rows if stop is None else min(stop, layer.rows))
        return super().read_float64(name, start, stop)


@dataclass
class _Seen:
    """What the layers turned out to be, by the base's names of their weights."""

    layers: dict[str, QuantizedWeight] = field(default_factory=dict)
    misfits: list[str] = field(default_factory=list)
    unstated: list[str] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)
    aside: set[str] = field(default_factory=set)


def as_dequantized(
    model: Checkpoint, expected: Shapes, dtypes: Mapping[str, str]
) -> tuple[Dequantized | None, list[Finding], set[str]]:
    """See a quantized model with its weights as tensors of the base's form.

    Args:
        model: the model, whose tensors are named as a quantizer names them.
        expected: every tensor that an unquantized model would hold, with its shape.
        dtypes: the dtypes that the base stores its tensors in.

    Returns:
        The model (None where its configuration says nothing of compressed-tensors, or what is not known here); what was
        seen; and the tensors, by the names of either side, that an error is about already.
    """
    section = model.config.get("quantization_config")
    if isinstance(section, dict) and section.get("quant_method") not in (None, QUANTIZED_METHOD):
        return None, [], set()
    try:
        quantization = quantization_of(model.config)
    except CheckpointError as error:
        params: dict[str, Value] = {"what": "; ".join(error.details)}
        return None, [Finding(code="quantization_unknown", severity="error", params=params)], set()
    if quantization is None:
        return None, [], set()
    seen = _look(model, quantization, expected)
    findings = _findings(seen, quantization, expected, model)
    return Dequantized(model, seen.layers, dtypes), findings, seen.aside


def _look(model: Checkpoint, quantization: Quantization, expected: Shapes) -> _Seen:
    seen = _Seen()
    for name, shape in expected.items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or shape is None or len(shape) != 2 or module.rpartition(".")[2] in _EMBEDDINGS:
            continue
        stored = [f"{module}.{part}" for part in _PARTS if f"{module}.{part}" in model.tensors]
        scheme = quantization.scheme_of(module)
        if scheme is None and stored:
            seen.unstated.append(module)
            seen.aside |= {name, *stored}
        elif scheme is not None and not stored:
            seen.plain += [module] if name in model.tensors else []
        elif scheme is not None:
            _take(seen, model, name, (shape[0], shape[1]), scheme)
    return seen


def _take(seen: _Seen, model: Checkpoint, name: str, shape: tuple[int, int], scheme: QuantizedScheme) -> None:
    """Take one layer as its scheme says it is stored, or say how it is not."""
    module = name.removesuffix(".weight")
    try:
        layer = QuantizedWeight(model, module, scheme)
    except CheckpointError as error:
        wrong = list(error.details)
    else:
        if (layer.rows, layer.columns) == shape:
            seen.layers[name] = layer
            return
        wrong = [f"{module}: [{layer.rows}, {layer.columns}] instead of {list(shape)}"]
    seen.misfits += wrong
    seen.aside |= {name, *(f"{module}.{part}" for part in _PARTS)}


def _findings(seen: _Seen, quantization: Quantization, expected: Shapes, model: Checkpoint) -> list[Finding]:
    """Whether configuration and tensors agree, and what is quantized."""
    found = []
    if seen.misfits:
        found.append(_counted("quantized_misfit", seen.misfits))
    if seen.unstated:
        found.append(_counted("quantized_unstated", seen.unstated))
    # A name alone does not tell a Linear layer from another module with a matrix; its siblings do.
    leaves = {name.split(".")[-2] for name in seen.layers}
    left = [module for module in seen.plain if module.rpartition(".")[2] in {*leaves, _HEAD}]
    if _HEAD not in left and not any(name.endswith(f"{_HEAD}.weight") for name in (*expected, *model.tensors)):
        # A tied head is no tensor, but a Linear layer to the loader.
        left += [_HEAD] if quantization.scheme_of(_HEAD) is not None else []
    if left:
        found.append(_counted("quantized_left_plain", left))
    if seen.layers:
        schemes = ", ".join(dict.fromkeys(layer.scheme.name for layer in seen.layers.values()))
        numbers = sum(layer.rows * layer.columns for layer in seen.layers.values())
        params: dict[str, Value] = {"scheme": schemes, "layers": len(seen.layers), "elements": numbers}
        found.append(Finding(code="quantized_layers", severity="ok", params=params))
    return found


def _counted(code: str, names: Iterable[str]) -> Finding:
    listed = list(names)
    return Finding(code=code, severity="error", params={"count": len(listed), "names": some_of(listed)})
