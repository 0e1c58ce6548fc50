"""Adapters written tensor by tensor, so that every oddity can be had without PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.0.self_attn.v_proj"

Arrays = dict[str, npt.NDArray[Any]]


def pair(module: str, *, r: int = 2, inputs: int = 6, outputs: int = 4, prefix: str = PREFIX, seed: int = 0) -> Arrays:
    """Random float32 factors of one module, A of (r, inputs) and B of (outputs, r)."""
    rng = np.random.default_rng(seed)
    return {
        f"{prefix}{module}.lora_A.weight": rng.standard_normal((r, inputs)).astype(np.float32),
        f"{prefix}{module}.lora_B.weight": rng.standard_normal((outputs, r)).astype(np.float32),
    }


def write_adapter(directory: Path, tensors: Arrays | None = None, **config: Any) -> Path:
    """An adapter directory; ``q_proj`` alone where no tensors are given."""
    directory.mkdir(exist_ok=True, parents=True)
    settings = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 2, "lora_alpha": 8, **config}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    save_file(pair(Q) if tensors is None else tensors, directory / "adapter_model.safetensors")
    return directory


def write_base(directory: Path, shapes: dict[str, tuple[int, ...]], dtype: Any = np.float32, **config: Any) -> Path:
    """A model directory of random tensors."""
    directory.mkdir(exist_ok=True, parents=True)
    rng = np.random.default_rng(7)
    save_file(
        {name: (rng.standard_normal(shape) * 10).astype(dtype) for name, shape in shapes.items()},
        directory / "model.safetensors",
    )
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return directory
