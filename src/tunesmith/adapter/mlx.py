"""The adapters that mlx-lm writes, in PEFT's terms.

``adapters.safetensors`` holds, for a module X, ``X.lora_a`` of shape (in, r) and ``X.lora_b`` of (r, out), so that
Δ = scale·(lora_a·lora_b)ᵀ; a stack of E matrices has (E, r, in) and (E, out, r); DoRA adds ``X.m``.  Beside it,
``adapter_config.json`` holds the arguments of the training: ``fine_tune_type``, ``lora_parameters`` with ``rank`` and
``scale``, ``model``.

Source: https://github.com/ml-explore/mlx-lm: ``mlx_lm/lora.py``, and ``tuner/`` beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith.adapter.config import positive
from tunesmith.adapter.keys import Key, KeyPart
from tunesmith.checkpoint import Array, Header, TensorInfo, is_file, is_there
from tunesmith.record import Finding

MLX_WEIGHTS = "adapters.safetensors"

# A merge is checked against the live adapter, and nothing here can run one of mlx-lm's.
MLX_REFUSAL = (
    "adapters.safetensors: mlx-lm's own form, which is read here and not merged; fuse it with mlx_lm.fuse, or save it "
    "in PEFT's form: lora_A = lora_aᵀ, lora_B = lora_bᵀ, lora_alpha = scale · rank"
)

_PARTS: dict[str, KeyPart] = {"lora_a": "lora_A", "lora_b": "lora_B", "m": "magnitude"}

View = Callable[[Array], Array]


class MlxScaling:
    """Rank and scaling, which are the same for all modules.

    Args:
        config: the parsed ``adapter_config.json``.

    Raises:
        AdapterError: rank or scale is not what mlx-lm writes.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        parameters = _parameters(config)
        self._rank = int(positive(parameters, "rank", of="lora_parameters."))
        self._scale = positive(parameters, "scale", of="lora_parameters.")
        self.overlapping: list[Finding] = []

    def rank(self, module: str) -> int:  # noqa: ARG002 - as of PEFT's, which has patterns
        """The rank of a module."""
        return self._rank

    def scaling(self, module: str, r: int) -> float:  # noqa: ARG002
        """What multiplies B·A."""
        return self._scale


def is_mlx(path: Path, weights: str) -> bool:
    """Whether a directory holds an adapter of mlx-lm and none of PEFT, whose weights have another name."""
    return not is_there(path / weights) and is_file(path / MLX_WEIGHTS)


def as_peft_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration in PEFT's words; what PEFT has no word for is left out.

    Args:
        config: the parsed ``adapter_config.json`` of mlx-lm.
    """
    # What mlx-lm does not know it takes for LoRA.
    full = config.get("fine_tune_type") == "full"
    return {
        "peft_type": "FULL" if full else "LORA",
        "base_model_name_or_path": config.get("model"),
        "r": None if full else _parameters(config).get("rank"),
        "use_dora": config.get("fine_tune_type") == "dora",
    }


def mlx_keys(header: Header) -> list[Key]:
    """What every tensor of the file is.

    Args:
        header: the file's.
    """
    keys = []
    for name in header.tensors:
        module, _, leaf = name.rpartition(".")
        part = _PARTS.get(leaf)
        if part and module:
            keys.append(Key(tensor=name, part=part, module=module))
        else:
            keys.append(Key(tensor=name, part="saved", module=module, leaf=leaf))
    return keys


def as_peft_tensors(header: Header) -> tuple[Header, dict[str, View]]:
    """The header with the factors in PEFT's shapes, and what makes their numbers so.

    Args:
        header: the file's.

    Returns:
        A header whose shapes are A (r, in) and B (out, r), of a stack (E·r, in) and (out, r·E) with a matrix in every
        E-th column; and, by name, the function that turns the stored tensor into such a one.
    """
    tensors, views = dict(header.tensors), {}
    for name, info in header.tensors.items():
        leaf = name.rpartition(".")[2]
        if leaf in ("lora_a", "lora_b") and len(info.shape) in (2, 3):
            shape, view = _turned(info) if len(info.shape) == 2 else _unstacked(info, leaf)
            tensors[name], views[name] = replace(info, shape=shape), view
    return replace(header, tensors=tensors), views


def _turned(info: TensorInfo) -> tuple[tuple[int, ...], View]:
    return info.shape[::-1], lambda stored: stored.T


def _unstacked(info: TensorInfo, leaf: str) -> tuple[tuple[int, ...], View]:
    experts, rows, columns = info.shape
    if leaf == "lora_a":
        return (experts * rows, columns), lambda stored: stored.reshape(experts * rows, columns)
    shape = (rows, columns * experts)
    return shape, lambda stored: stored.transpose(1, 2, 0).reshape(shape)


def _parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    found = config.get("lora_parameters")
    return found if isinstance(found, dict) else {}
