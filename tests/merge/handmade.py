"""Bases, adapters and bindings made by hand, so that the engine is tested without anybody's reading of an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.merge.exact import TORCH
from tunesmith.adapter import Binding, Stack
from tunesmith.checkpoint import Checkpoint
from tunesmith.merge.layout import OutputFile, index_of, layout_of
from tunesmith.merge.tiles import TileSums
from tunesmith.merge.units import Context, units_of
from tunesmith.merge.work import run_unit

Tensors = dict[str, torch.Tensor]


def numbers(*shape: int, seed: int = 0, scale: float = 1.0, dtype: str = "BF16") -> torch.Tensor:
    """Random numbers of a dtype."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.asarray(rng.standard_normal(shape) * scale)).to(TORCH[dtype])


def write_model(folder: Path, *shards: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    """A base in one file, or in several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "bfloat16"}))
    metadata = {"format": "pt"} if metadata is None else metadata
    if len(shards) == 1:
        save_file(dict(shards[0]), folder / "model.safetensors", metadata)
        return folder
    weight_map, total = {}, 0
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(dict(tensors), folder / name, metadata)
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_tensors(folder: Path, tensors: Tensors) -> Path:
    """An adapter directory of arbitrary tensors, whose configuration means nothing to anybody."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "BY_HAND"}))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def carry_out(
    base: Path,
    adapters: list[Path],
    binding: Binding,
    out: Path,
    *,
    convert_to: str | None = None,
    shard_bytes: int | None = None,
    rounding: str = "nearest",
    compiled: bool = False,
    executor: Executor | None = None,
) -> tuple[tuple[OutputFile, ...], dict[str, TileSums]]:
    """Lay a binding's result out and run every unit of it, last unit first, as order must not matter."""
    model, weighted = Checkpoint(base), tuple((str(adapter), 1.0) for adapter in adapters)
    files = layout_of(model, binding, Stack(weighted), convert_to=convert_to, shard_bytes=shard_bytes)
    out.mkdir(parents=True)
    for file in files:
        with (out / file.filename).open("wb") as target:
            target.truncate(file.size_bytes)
    context = Context(str(base), weighted, rounding=rounding, compiled=compiled, fingerprint=str(out))
    units = units_of(files, model, binding, stage=out, context=context)[::-1]
    run: Callable[..., Any] = map if executor is None else executor.map
    sums: dict[str, TileSums] = {}
    for part in run(run_unit, units):
        for name, kept in part.sums.items():
            sums[name] = sums.get(name, TileSums()) + kept
    index = index_of(model, files)
    if index is not None:
        (out / "model.safetensors.index.json").write_text(index)
    (out / "config.json").write_text("{}")
    return files, sums


def load(folder: Path) -> Tensors:
    """Every tensor, as the format's own reader sees it."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def file_bytes(folder: Path) -> dict[str, bytes]:
    """Every weights file."""
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}
