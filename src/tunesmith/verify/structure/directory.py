"""A directory's files: what they are instead of weights, why they cannot be opened, and what lies beside them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from tunesmith.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, read_header, read_json_object
from tunesmith.errors import CheckpointError
from tunesmith.record import Finding, Value

_ADAPTER = "adapter_config.json"
_FOREIGN = {"weights_pickled": (".bin", ".pt", ".pth"), "weights_gguf": (".gguf",)}
_OF_TRAINING = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")  # pickles, and no weights

# What quantizers call the parts that they make of a weight.
_QUANTIZED_NAMES = (
    ("bitsandbytes", re.compile(r"\.weight\.(absmax|quant_map|quant_state\.\w+|nested_absmax)$|\.SCB$")),
    ("GPTQ / AWQ", re.compile(r"\.(qweight|qzeros)$")),
    ("FP8 / compressed-tensors", re.compile(r"\.(weight_packed|weight_scale(_inv)?)$")),
    ("MXFP4", re.compile(r"_(blocks|scales)$")),
    ("MLX", re.compile(r"\.(scales)$")),
)


def foreign_format(folder: Path) -> Finding | None:
    """Weights in a format that is not read: pickles, which are never opened, and GGUF.

    Args:
        folder: the merged model.

    Returns:
        An error that names the files; None where there are safetensors, or nothing of the kind.
    """
    try:
        files = {file.name for file in folder.iterdir() if file.is_file()}
    except OSError:
        return None
    if any(name.endswith(".safetensors") or name == INDEX_FILE for name in files):
        return None
    for code, endings in _FOREIGN.items():
        names = sorted(name for name in files if name.endswith(endings) and not name.startswith(_OF_TRAINING))
        if names:
            params: dict[str, Value] = {"names": some_of(names), "folder": folder.resolve().name}
            return Finding(code=code, severity="error", params=params)
    return None


def quantized_as(model: Checkpoint) -> str | None:
    """Which quantizer made a model's tensors, by what they are called; None where none did."""
    for method, pattern in _QUANTIZED_NAMES:
        if any(pattern.search(name) for name in model.tensors):
            return method
    return None


def beside(merged: Checkpoint) -> list[Finding]:
    """Files that a loader may take for the model's, or in their place."""
    names = {file.name for file in merged.path.iterdir()}
    findings = []
    stray = sorted(
        name
        for name in names - merged.shards.keys()
        if name.endswith(".safetensors") or fnmatchcase(name, "pytorch_model*.bin") or name == "consolidated.00.pth"
    )
    if INDEX_FILE in names and not merged.indexed and not _names_the_single_file(merged.path / INDEX_FILE):
        stray.append(INDEX_FILE)
    if stray:
        findings.append(Finding(code="stray_weights", severity="warning", params={"names": some_of(stray)}))
    if _ADAPTER in names:
        findings.append(Finding(code="adapter_beside_weights", severity="error"))
    return findings


def _names_the_single_file(index: Path) -> bool:
    """Whether an index beside ``model.safetensors`` is of that file, as mlx-lm writes one."""
    try:
        weight_map = read_json_object(index).get("weight_map")
    except CheckpointError:
        return False
    return isinstance(weight_map, dict) and set(map(str, weight_map.values())) == {SINGLE_FILE}


def why_not_opened(error: CheckpointError, folder: Path) -> str:
    """What is wrong, where, and the figures, on one line and without the directory's own path."""
    expected = f"expected {error.expected}" if error.expected and error.found else None
    details = _in_two_shards(folder) or error.details[:1]
    parts = [error.what, error.where and Path(error.where).name, expected, error.found, *details]
    return " · ".join(str(part) for part in parts if part)


def _in_two_shards(folder: Path) -> list[str]:
    """The first tensor that lies in two of the shards that the index names, with both."""
    try:
        weight_map = read_json_object(folder / INDEX_FILE).get("weight_map")
        files = sorted({Path(str(file)).name for file in weight_map.values()}) if isinstance(weight_map, dict) else []
        found: dict[str, str] = {}
        for file in files:
            for name in read_header(folder / file).tensors:
                if name in found:
                    return [f"{name}: {found[name]}, {file}"]
                found[name] = file
    except CheckpointError:
        pass
    return []


def some_of(names: Sequence[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:4]) + (" …" if len(names) > 4 else "")
