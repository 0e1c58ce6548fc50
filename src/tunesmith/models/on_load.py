"""Quantizing while loading: a choice for this process's memory, which leaves no file behind.

What computes are bitsandbytes' own layers; adapters stay beside them in float32, as in a training by QLoRA.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from tunesmith.errors import DataError, MissingExtraError

# What each is called here, and the package that does it.
QUANTIZATIONS = {"nf4": "bitsandbytes", "fp4": "bitsandbytes", "int8": "bitsandbytes"}


def on_load_arguments(quantization: str, *, dtype: str, device: str) -> dict[str, Any]:
    """What Transformers' ``from_pretrained`` is given to quantize every Linear layer but the head as it loads.

    Args:
        quantization: ``nf4`` or ``fp4`` (4 bits, a scale for 64 numbers), or ``int8`` (LLM.int8(): rows of 8-bit
            integers, inputs too, but for outlying columns).
        dtype: products are computed in it.
        device: where the model goes.

    Raises:
        DataError: an unknown name.
        MissingExtraError: the package is not installed.
    """
    package = QUANTIZATIONS.get(quantization)
    if package is None:
        raise DataError("There is no such quantization.", expected=" or ".join(QUANTIZATIONS), found=quantization)
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError("Quantizing a model while it is loaded", package, package)
    import torch
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=quantization, bnb_4bit_compute_dtype=getattr(torch, dtype)
        )
    return {"quantization_config": config, "device_map": {"": device}}
