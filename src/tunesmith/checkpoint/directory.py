"""A directory of safetensors weights, as a loader sees it, read lazily."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tunesmith.checkpoint.header import Header, TensorInfo, read_header
from tunesmith.checkpoint.tensors import Array, Float64, as_float64, stored_array
from tunesmith.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that must hold one JSON object.

    Raises:
        CheckpointError: it is absent, unreadable, not JSON, or not an object.
    """
    try:
        document = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise CheckpointError("A file cannot be read.", where=path, found=error.strerror or error) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError("A file is not valid JSON.", where=path, expected="a JSON object", found=error) from error
    if not isinstance(document, dict):
        raise CheckpointError(
            "A file is not a JSON object.", where=path, expected="an object", found=type(document).__name__
        )
    return document


class Checkpoint:
    """The weights and configuration of one model directory.

    Only headers are read when it is opened; tensors are read by range when asked for.

    Args:
        path: the directory: ``config.json`` with ``model.safetensors``, or with an index and its shards.

    Attributes:
        path: the directory.
        config: ``config.json``.
        shards: the header of every weights file, by file name.

    Raises:
        CheckpointError: not a directory of safetensors weights, or one that breaks the format; every shard that the
            index and the files disagree about is named.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(
                "The model directory is not there." if not self.path.exists() else "The model is not a directory.",
                where=self.path,
                expected="a directory with config.json and model.safetensors",
            )
        self.config = read_json_object(self.path / CONFIG_FILE)
        index = self.path / INDEX_FILE
        # A loader prefers the single file; where both are there, so do we.
        if (self.path / SINGLE_FILE).exists():
            self.shards = {SINGLE_FILE: read_header(self.path / SINGLE_FILE)}
        elif index.exists():
            self.shards = self._read_shards(index)
        else:
            raise self._no_weights()
        self._shard_of = {name: shard for shard, header in self.shards.items() for name in header.tensors}

    @property
    def indexed(self) -> bool:
        """Whether an index names the shards."""
        return not (self.path / SINGLE_FILE).exists()

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name, shard by shard in the order of their data."""
        return {name: info for header in self.shards.values() for name, info in header.tensors.items()}

    def shard_of(self, name: str) -> str:
        """The file that holds a tensor."""
        return self._shard_of[name]

    def info(self, name: str) -> TensorInfo:
        """Where a tensor lies."""
        return self.shards[self._shard_of[name]].tensors[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Read rows ``start:stop`` of a tensor's first dimension, as stored (BF16 as uint16 patterns)."""
        header = self.shards[self._shard_of[name]]
        return read_rows(header, name, start, stop)

    def read_float64(self, name: str, start: int = 0, stop: int | None = None) -> Float64:
        """Read rows of a tensor exactly, in float64."""
        return as_float64(self.read(name, start, stop), self.info(name).dtype)

    def _read_shards(self, index: Path) -> dict[str, Header]:
        weight_map = read_json_object(index).get("weight_map")
        named = isinstance(weight_map, dict) and all(isinstance(value, str) for value in weight_map.values())
        if not isinstance(weight_map, dict) or not named or not weight_map:
            raise CheckpointError("The index has no weight_map.", where=index, expected="names mapped to file names")
        escaping = sorted({shard for shard in weight_map.values() if Path(shard).name != shard or shard in ("", "..")})
        if escaping:
            raise CheckpointError("The index names files outside its directory.", where=index, details=escaping[:10])
        shards = {shard: read_header(self.path / shard) for shard in dict.fromkeys(weight_map.values())}
        found = {name: shard for shard, header in shards.items() for name in header.tensors}
        problems = [
            f"{name}: the index says {weight_map.get(name, 'nothing')}, the files say {found.get(name, 'nothing')}"
            for name in sorted(weight_map.keys() | found.keys())
            if weight_map.get(name) != found.get(name)
        ]
        if sum(len(header.tensors) for header in shards.values()) != len(found):
            problems.append("a tensor lies in more than one shard")
        if problems:
            raise CheckpointError("The index and the shards disagree.", where=index, details=problems[:10])
        return shards

    def _no_weights(self) -> CheckpointError:
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in self.path.glob(pattern))
        if pickles:
            return CheckpointError(
                "The weights are pickles, which can run code when they are read; Tunesmith never reads one.",
                where=self.path / pickles[0],
                expected=SINGLE_FILE,
                next_step="save the model again with save_pretrained(..., safe_serialization=True)",
            )
        return CheckpointError(
            "The model directory has no safetensors weights.",
            where=self.path,
            expected=f"{SINGLE_FILE} or {INDEX_FILE}",
            found=", ".join(sorted(file.name for file in self.path.iterdir())[:10]) or "an empty directory",
        )


def read_rows(header: Header, name: str, start: int = 0, stop: int | None = None) -> Array:
    """Read rows ``start:stop`` of one tensor of a file, as stored (BF16 as uint16 patterns).

    Args:
        header: the file's header.
        name: the tensor.
        start: first row of the first dimension.
        stop: row to stop before; None for all.

    Returns:
        Array of shape ``(stop - start, *shape[1:])``; the whole tensor where it has no dimensions.
    """
    info = header.tensors[name]
    rows = info.shape[0] if info.shape else 1
    stop = rows if stop is None else min(stop, rows)
    row_bytes = info.size_bytes // rows if rows else 0
    with header.path.open("rb") as file:
        file.seek(info.begin + start * row_bytes)
        data = file.read((stop - start) * row_bytes)
    if len(data) != (stop - start) * row_bytes:
        raise CheckpointError("The file became shorter while it was read.", where=header.path)
    return stored_array(data, info.dtype, (stop - start, *info.shape[1:]) if info.shape else ())
