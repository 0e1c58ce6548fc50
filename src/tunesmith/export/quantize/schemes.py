"""Schemes of quantization by name, and the ``quantization_config`` that compressed-tensors makes of them."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from typing import Any

from tunesmith.checkpoint import QuantizedScheme
from tunesmith.errors import MissingExtraError, OutputError

GROUP_SIZES = (128, 64, 32)
DEFAULT_GROUP = GROUP_SIZES[0]

_PACKED, _INTEGERS, _FLOATS = "pack-quantized", "int-quantized", "float-quantized"
_PLAIN = {
    "int8": QuantizedScheme(_PACKED, 8, "channel"),
    "w8a8": QuantizedScheme(_INTEGERS, 8, "channel", activations=8),
    "fp8": QuantizedScheme(_FLOATS, 8, "channel", activations=8),
}
_INT4 = re.compile(r"int4(?::(\d+))?")

SCHEMES = ("int8", "int4", *(f"int4:{size}" for size in GROUP_SIZES[1:]), "w8a8", "fp8")


def scheme_of(word: str) -> QuantizedScheme:
    """The scheme of a name: one of ``SCHEMES``; ``int4`` is ``int4:128``.

    Raises:
        OutputError: there is none of that name.
    """
    if word in _PLAIN:
        return _PLAIN[word]
    match = _INT4.fullmatch(word)
    size = int(match[1] or DEFAULT_GROUP) if match else 0
    if size not in GROUP_SIZES:
        raise OutputError("There is no such scheme of quantization.", where=word, expected=", ".join(SCHEMES))
    return QuantizedScheme(_PACKED, 4, "group", group_size=size)


def require_package() -> None:
    """Make sure that compressed-tensors is installed; it is not imported for that.

    Raises:
        MissingExtraError: it is not.
    """
    if importlib.util.find_spec("compressed_tensors") is None:
        raise MissingExtraError("quantize", "quantize", "compressed_tensors")


def quantization_section(scheme: QuantizedScheme, ignore: Sequence[str]) -> dict[str, Any]:
    """What ``config.json`` says of a quantization, as the package's own writer says it.

    Args:
        scheme: of every Linear layer.
        ignore: the Linear layers that are stored as they were.
    """
    import compressed_tensors
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.quant_config import QuantizationStatus

    kind = "float" if scheme.is_float else "int"
    weights = QuantizationArgs(
        num_bits=scheme.bits, type=kind, strategy=scheme.strategy, group_size=scheme.group_size, symmetric=True
    )
    activations = None
    if scheme.activations:
        activations = QuantizationArgs(
            num_bits=scheme.activations, type=kind, strategy="token", symmetric=True, dynamic=True
        )
    group = QuantizationScheme(
        targets=["Linear"], weights=weights, input_activations=activations, format=CompressionFormat(scheme.format)
    )
    config = QuantizationConfig(
        config_groups={"group_0": group},
        format=scheme.format,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=list(ignore),
    )
    return {
        "version": compressed_tensors.__version__,
        "sparsity_config": {},
        "transform_config": {},
        **config.model_dump(mode="json"),
    }
