"""Models that are stored quantized, in the compressed-tensors format: loaded by Transformers, and then made plain.

A layer's codes become its weight, code · scale, once at load: exact in float32, and rounded to the dtype in a narrower
one, as engines do that multiply in it.  Memory is therefore that of a model that was never quantized.  What is left of
the quantization is what acts while the model computes: a scheme that quantizes activations does so here too, in
floating-point numbers that hold integers.

The package would decompress on the first forward, with modules of its own around the layers, which a batch of rows
cannot route.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.checkpoint import Checkpoint, quantization_of, read_json_object
from tunesmith.errors import CheckpointError, MissingExtraError

_PACKED = ".weight_packed"
_WORD = 32


def is_stored_quantized(path: Path) -> bool:
    """Whether a model's ``config.json`` says that it is stored in the compressed-tensors format.

    Args:
        path: the model's directory.

    Raises:
        MissingExtraError: it is, and the package that reads it is not installed.
    """
    try:
        section = read_json_object(path / "config.json").get("quantization_config")
    except CheckpointError:
        return False  # loading it tells what is wrong
    found = isinstance(section, dict) and section.get("quant_method") == "compressed-tensors"
    if found and importlib.util.find_spec("compressed_tensors") is None:
        raise MissingExtraError("Loading a quantized model", "quantize", "compressed_tensors")
    return found


@contextlib.contextmanager
def quiet_bars() -> Iterator[None]:
    """Keep the package's progress bars off the terminal; it has no switch for them."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def make_plain(model: Any) -> Any:
    """Turn every quantized layer of a loaded model into one with a floating-point weight.

    Args:
        model: a ``PreTrainedModel``, just loaded from a quantized directory.

    Returns:
        The model.
    """
    from compressed_tensors.compressors.base import decompress_module

    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        acts = scheme.input_activations is not None
        decompress_module(module, leave_decompressed=acts)
        if not acts:
            module.__dict__.pop("forward", None)  # the class's own again, put back by the package
    hook = model.__dict__.pop("ct_decompress_hook", None)
    if hook is not None:
        hook.remove()
    return model


def elements_of(checkpoint: Checkpoint) -> int:
    """How many numbers a model has once it is loaded; packed codes count as what they become."""
    try:
        quantization = quantization_of(checkpoint.config)
    except CheckpointError:
        quantization = None
    total = 0
    for name, info in checkpoint.tensors.items():
        scheme = quantization.scheme_of(name.removesuffix(_PACKED)) if quantization and name.endswith(_PACKED) else None
        total += info.elements if scheme is None else info.elements * _WORD // scheme.bits
    return total
