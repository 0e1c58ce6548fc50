"""A directory of safetensors weights, as a loader sees it, read lazily."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from tunesmith.checkpoint.header import Header, TensorInfo, is_there, open_regular, quoted, read_header, size_of
from tunesmith.checkpoint.ranges import read_on
from tunesmith.checkpoint.storage import StoragePath, storage_path
from tunesmith.checkpoint.tensors import Array, Float64, as_float64, stored_array
from tunesmith.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"

_COMPARED_ELEMENTS = 1 << 20

_MAX_JSON_BYTES = 100_000_000
_MAX_DEPTH = 100
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that must hold one JSON object.

    Raises:
        CheckpointError: it is absent, unreadable, no regular file, over 100 MB, not JSON, or not an object; or it could
            not be written again: it holds half a surrogate pair, or is nested more than a hundred levels deep.
    """
    with open_regular(path) as file:
        try:
            size = size_of(file)
            raw = file.read(size) if size <= _MAX_JSON_BYTES else b""
        except OSError as error:
            raise CheckpointError("The file cannot be read.", where=path, found=error.strerror or error) from error
    if size > _MAX_JSON_BYTES:
        raise CheckpointError(
            "A JSON file is far too long.", where=path, expected=f"at most {_MAX_JSON_BYTES} bytes", found=size
        )
    try:
        document = json.loads(raw.decode("utf-8-sig"))
        if _SURROGATE.search(raw):  # half a pair is no text, though Python reads it
            json.dumps(document, ensure_ascii=False).encode("utf-8")
        _check_depth(document)
    except (ValueError, RecursionError) as error:
        raise CheckpointError("A file is not valid JSON.", where=path, expected="a JSON object", found=error) from error
    if not isinstance(document, dict):
        raise CheckpointError(
            "A file is not a JSON object.", where=path, expected="an object", found=type(document).__name__
        )
    return document


def _check_depth(document: object) -> None:
    level: list[Any] = [document]
    for _ in range(_MAX_DEPTH + 1):
        level = [node for node in level if isinstance(node, dict | list)]
        if not level:
            return
        level = [value for node in level for value in (node.values() if isinstance(node, dict) else node)]
    raise ValueError(f"nested more than {_MAX_DEPTH} levels deep")


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
        self.path = storage_path(path)
        try:
            is_directory = stat.S_ISDIR(self.path.stat().st_mode)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                "The model directory is not there.",
                where=self.path,
                expected="a directory with config.json and model.safetensors",
                found=getattr(error, "strerror", None) or error,
            ) from error
        if not is_directory:
            raise CheckpointError("The model is not a directory.", where=self.path, expected="a directory")
        self.config = read_json_object(self.path / CONFIG_FILE)
        index = self.path / INDEX_FILE
        # A loader prefers the single file; where both are there, so do we.
        if is_there(self.path / SINGLE_FILE):
            self.shards = {SINGLE_FILE: read_header(self.path / SINGLE_FILE)}
        elif is_there(index):
            self.shards = self._read_shards(index)
        else:
            raise self._no_weights()
        self._tensors = {name: info for header in self.shards.values() for name, info in header.tensors.items()}
        self._shard_of = {name: shard for shard, header in self.shards.items() for name in header.tensors}

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """To a worker goes the path, and what tells whether the worker finds the same there; it opens it once."""
        if type(self) is not Checkpoint:
            return super().__reduce_ex__(protocol)
        return _opened, (str(self.path.absolute()), self._identity)

    @cached_property
    def _identity(self) -> str:
        """A hash of every header."""
        text = [
            [shard, header.data_start, header.file_bytes, [astuple(info) for info in header.tensors.values()]]
            for shard, header in self.shards.items()
        ]
        return hashlib.sha256(json.dumps(text).encode()).hexdigest()

    @property
    def indexed(self) -> bool:
        """Whether an index names the shards."""
        return SINGLE_FILE not in self.shards

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name, shard by shard in the order of their data."""
        return self._tensors

    def shard_of(self, name: str) -> str:
        """The file that holds a tensor."""
        return self._shard_of[name]

    def info(self, name: str) -> TensorInfo:
        """Where a tensor lies."""
        return self._tensors[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Read rows ``start:stop`` of a tensor's first dimension, as stored (BF16 as uint16 patterns)."""
        header = self.shards[self._shard_of[name]]
        return read_rows(header, name, start, stop)

    def read_float64(self, name: str, start: int = 0, stop: int | None = None) -> Float64:
        """Read rows of a tensor exactly, in float64."""
        return as_float64(self.read(name, start, stop), self.info(name).dtype)

    def blocks(self, name: str, starts: Iterable[int], count: int) -> Iterator[Float64]:
        """Blocks of ``count`` rows of a tensor, from a file that is opened once.

        Args:
            name: the tensor, of one dimension at least.
            starts: the first row of each; none beyond the tensor's rows less ``count``.
            count: rows of each.

        Yields:
            float64 of shape ``(count, *shape[1:])``.
        """
        info, header = self.info(name), self.shards[self._shard_of[name]]
        row_bytes = info.size_bytes // max(1, info.shape[0])
        places = (info.begin + start * row_bytes for start in starts)
        for data in _read_at(header, places, count * row_bytes):
            yield as_float64(stored_array(data, info.dtype, (count, *info.shape[1:])), info.dtype)

    def _read_shards(self, index: Path) -> dict[str, Header]:
        weight_map = read_json_object(index).get("weight_map")
        named = isinstance(weight_map, dict) and all(isinstance(value, str) for value in weight_map.values())
        if not isinstance(weight_map, dict) or not named or not weight_map:
            raise CheckpointError("The index has no weight_map.", where=index, expected="names mapped to file names")
        filenames = list(dict.fromkeys(weight_map.values()))
        if escaping := sorted(name for name in filenames if Path(name).name != name or name in ("", "..")):
            details = map(quoted, escaping[:10])
            raise CheckpointError("The index names files outside its directory.", where=index, details=details)
        # A loader unpickles what has another ending, and the output has a file of every shard's name.
        if odd := sorted(name for name in filenames if not name.isprintable() or not name.endswith(".safetensors")):
            raise CheckpointError(
                "The index names files that cannot be shards.",
                where=index,
                expected="printable names that end in .safetensors",
                details=map(quoted, odd[:10]),
            )
        self._check_complete(filenames)
        shards = {shard: read_header(self.path / shard) for shard in filenames}
        found = {name: shard for shard, header in shards.items() for name in header.tensors}
        problems = [
            f"{_shown(name)}: the index says {weight_map.get(name, 'nothing')}, "
            f"the files say {found.get(name, 'nothing')}"
            for name in sorted(weight_map.keys() | found.keys())
            if weight_map.get(name) != found.get(name)
        ]
        if sum(len(header.tensors) for header in shards.values()) != len(found):
            problems.append("a tensor lies in more than one shard")
        if problems:
            raise CheckpointError("The index and the shards disagree.", where=index, details=problems[:10])
        return shards

    def _check_complete(self, filenames: list[str]) -> None:
        missing = [name for name in filenames if not is_there(self.path / name)]
        if missing:
            raise CheckpointError(
                f"The model is incomplete: {len(missing)} of the {len(filenames)} shards that its index names are not "
                "there.",
                where=self.path / missing[0],
                details=missing[:10],
                next_step="finish the download or the copy of the model",
            )

    def _no_weights(self) -> CheckpointError:
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in self.path.glob(pattern))
        if pickles:
            return CheckpointError(
                "The weights are pickles, which can run code when they are read; Tunesmith never reads one.",
                where=self.path / pickles[0],
                expected=SINGLE_FILE,
                next_step="save the model again with save_pretrained(..., safe_serialization=True)",
            )
        if (self.path / SINGLE_FILE).is_symlink():
            return CheckpointError(
                "The weights are a symlink that leads nowhere.",
                where=self.path / SINGLE_FILE,
                expected="a file",
                found=(self.path / SINGLE_FILE).readlink(),
                next_step="finish the download or the copy of the model",
            )
        return CheckpointError(
            "The model directory has no safetensors weights.",
            where=self.path,
            expected=f"{SINGLE_FILE} or {INDEX_FILE}",
            found=", ".join(sorted(file.name for file in self.path.iterdir())[:10]) or "an empty directory",
        )


@lru_cache(maxsize=4)
def _opened(path: str, identity: str) -> Checkpoint:
    found = Checkpoint(path)
    if found._identity != identity:
        raise CheckpointError("A worker finds another model there than was sent to it.", where=path)
    return found


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
    start = min(start, stop)
    row_bytes = info.size_bytes // rows if rows else 0
    (data,) = _read_at(header, [info.begin + start * row_bytes], (stop - start) * row_bytes, end=info.end)
    return stored_array(data, info.dtype, (stop - start, *info.shape[1:]) if info.shape else ())


def read_together(header: Header, names: Sequence[str]) -> list[Array]:
    """Read tensors that lie behind each other in a file, at once, as :func:`read_rows` does each.

    Args:
        header: the file's header.
        names: the tensors, in the file's order.
    """
    infos = [header.tensors[name] for name in names]
    begin, end = infos[0].begin, infos[-1].end
    (data,) = _read_at(header, [begin], end - begin, end=end)
    return [stored_array(data[info.begin - begin : info.end - begin], info.dtype, info.shape) for info in infos]


def _read_at(header: Header, places: Iterable[int], count_bytes: int, *, end: int = 0) -> Iterator[bytes]:
    """So many bytes at each of some places of a file; ``end`` is where reading on would end."""
    if isinstance(header.path, StoragePath):
        for place in places:
            yield read_on(header.path, place, count_bytes, end=end, owner=header)
        return
    with open_regular(header.path) as file:
        for place in places:
            file.seek(place)
            data = file.read(count_bytes)
            if len(data) != count_bytes:
                raise CheckpointError("The file became shorter while it was read.", where=header.path)
            yield data


def _shown(name: str) -> str:
    return name if name.isprintable() and len(name) <= 200 else quoted(name)


def same_values(first: Header, name: str, second: Header, other: str) -> bool:
    """Whether two stored tensors hold the same numbers, whatever their dtypes, read a few rows at a time."""
    ours, theirs = first.tensors[name], second.tensors[other]
    if ours.shape != theirs.shape:
        return False
    rows = ours.shape[0] if ours.shape else 1
    step = max(1, _COMPARED_ELEMENTS * rows // max(1, ours.elements))
    return all(
        np.array_equal(
            as_float64(read_rows(first, name, row, row + step), ours.dtype),
            as_float64(read_rows(second, other, row, row + step), theirs.dtype),
        )
        for row in range(0, rows, step)
    )
