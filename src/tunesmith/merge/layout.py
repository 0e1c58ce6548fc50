"""Which tensor lies where in the merged model: the base's own files where they can stay as they are, else new ones.

File format: https://github.com/huggingface/safetensors#format.  Shards are named and indexed as transformers does it.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.adapter import Binding, Copied, Replaced, Stack, Update
from tunesmith.checkpoint import (
    DTYPE_BITS,
    FLOAT_DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
    Header,
    TensorInfo,
    header_bytes,
    read_json_object,
)

_SHARD_NAME = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}\.safetensors")
_ALIGNMENT = 8  # of the data's first byte, as the format's own writer does it


@dataclass(frozen=True)
class OutputFile:
    """One file of the merged model.

    Attributes:
        filename: its name.
        header: all its bytes before the first tensor's.
        tensors: its tensors, in the order of their data, with offsets from the start of the file.
        layout_of: the base's file that has the same header, byte for byte.
    """

    filename: str
    header: bytes
    tensors: tuple[TensorInfo, ...]
    layout_of: str | None = None

    @property
    def size_bytes(self) -> int:
        """Its size."""
        return self.tensors[-1].end if self.tensors else len(self.header)


@dataclass(frozen=True)
class _Wanted:
    """A tensor before it has a place."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def layout_of(
    base: Checkpoint,
    binding: Binding,
    stack: Stack,
    *,
    convert_to: str | None = None,
    shard_bytes: int | None = None,
    instead: Mapping[str, Mapping[str, tuple[str, tuple[int, ...]]]] | None = None,
) -> tuple[OutputFile, ...]:
    """Lay out the merged model.

    Args:
        base: the base model.
        binding: what the adapters make of it.
        stack: the adapters.
        convert_to: the dtype of every floating-point tensor; None for the base's own.
        shard_bytes: the size that no file of more than one tensor exceeds; None keeps the base's files, with the
            same header bytes wherever no tensor of a file changes its dtype or shape.
        instead: by the name of a tensor, dtype and shape of those that it is stored as instead, by their names.

    Returns:
        The files in order.
    """
    wanted = _stored_as(_wanted_tensors(base, binding, stack, convert_to), instead or {})
    if shard_bytes is not None:
        groups = _split(wanted.values(), shard_bytes)
        names = _shard_names("model", len(groups)) if len(groups) > 1 else [SINGLE_FILE]
        metadata = _common_metadata(base)
        return tuple(_new_file(name, group, metadata) for name, group in zip(names, groups, strict=True))
    kept = {
        filename: [one for name in header.tensors for one in wanted.get(name, ())]
        for filename, header in base.shards.items()
    }
    kept = {filename: tensors for filename, tensors in kept.items() if tensors}
    fresh = [one for name, group in wanted.items() if name not in base.tensors for one in group]
    names = _renamed(base, list(kept), extra=bool(fresh))
    files = [
        _file_as_in_base(name, base.shards[filename], tensors)
        for name, (filename, tensors) in zip(names, kept.items(), strict=False)
    ]
    if fresh:
        files.append(_new_file(names[-1], fresh, _common_metadata(base)))
    return tuple(files)


def index_of(base: Checkpoint, files: Sequence[OutputFile]) -> str | None:
    """The index of a layout: the base's own bytes where it still holds; None where one file needs none."""
    if [file.filename for file in files] == [SINGLE_FILE]:
        return None
    path = base.path / INDEX_FILE
    old: dict[str, Any] = read_json_object(path) if base.indexed else {}
    found = old.get("metadata")
    metadata = dict(found) if isinstance(found, dict) else {}
    metadata["total_size"] = sum(tensor.size_bytes for file in files for tensor in file.tensors)  # bytes, no count
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(tensor.elements for file in files for tensor in file.tensors)
    weight_map = {tensor.name: file.filename for file in files for tensor in file.tensors}
    new = {**old, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    if new == old:
        return path.read_bytes().decode("utf-8-sig")
    return json.dumps(new, indent=2, ensure_ascii=False) + "\n"


def _wanted_tensors(base: Checkpoint, binding: Binding, stack: Stack, convert_to: str | None) -> dict[str, _Wanted]:
    """Every tensor of the merged model: the base's in its order, then the new ones in the binding's."""
    by_name, there = binding.by_name, base.tensors
    usual = _usual_dtype(base)
    wanted = {}
    for name in [*there, *(name for name in binding.shapes if name not in there)]:
        if name in binding.dropped:
            continue
        dtype = there[name].dtype if name in there else _dtype_of_new(by_name[name], base, stack, usual)
        if convert_to is not None and dtype in FLOAT_DTYPES:
            dtype = convert_to
        shape = binding.shapes.get(name) or (there[name].shape if name in there else ())
        wanted[name] = _Wanted(name, dtype, tuple(shape))
    return wanted


def _stored_as(
    wanted: Mapping[str, _Wanted], instead: Mapping[str, Mapping[str, tuple[str, tuple[int, ...]]]]
) -> dict[str, list[_Wanted]]:
    return {
        name: [_Wanted(other, *form) for other, form in instead[name].items()] if name in instead else [one]
        for name, one in wanted.items()
    }


def _dtype_of_new(updates: Sequence[Update], base: Checkpoint, stack: Stack, usual: str) -> str:
    """As the base's tensor that it begins as; where it begins as the adapter's, what the base mostly uses."""
    for update in updates:
        if isinstance(update, Copied):
            return base.info(update.source).dtype
        if isinstance(update, Replaced) and stack.info(update).dtype not in FLOAT_DTYPES:
            return stack.info(update).dtype
    return usual


def _usual_dtype(base: Checkpoint) -> str:
    counts: Counter[str] = Counter()
    for info in base.tensors.values():
        if info.dtype in FLOAT_DTYPES:
            counts[info.dtype] += info.size_bytes
    return counts.most_common(1)[0][0] if counts else "F32"


def _split(tensors: Iterable[Sequence[_Wanted]], shard_bytes: int) -> list[list[_Wanted]]:
    """Into files; what one tensor is stored as stays together."""
    groups: list[list[_Wanted]] = [[]]
    size = 0
    for parts in tensors:
        more = sum(part.size_bytes for part in parts)
        if groups[-1] and size + more > shard_bytes:
            groups.append([])
            size = 0
        groups[-1] += parts
        size += more
    return groups


def _common_metadata(base: Checkpoint) -> dict[str, str]:
    merged: dict[str, str] = {}
    for header in base.shards.values():
        merged = {**header.metadata, **merged}
    return {"format": "pt", **merged}  # some versions of transformers refuse a file that does not name one


def _renamed(base: Checkpoint, kept: list[str], *, extra: bool) -> list[str]:
    """File names: as they are where their number stays, else counted anew."""
    if not extra and len(kept) == len(base.shards):
        return kept
    total = len(kept) + extra
    if not base.indexed:
        return _shard_names(Path(SINGLE_FILE).stem, total) if total > 1 else [SINGLE_FILE]
    stems = {match["stem"] if (match := _SHARD_NAME.fullmatch(name)) else None for name in kept}
    stem = next(iter(stems)) if len(stems) == 1 else None
    if stem is not None:
        return _shard_names(stem, total)
    return [*kept, *([_free_name(base)] if extra else [])]


def _shard_names(stem: str, total: int) -> list[str]:
    return [f"{stem}-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]


def _free_name(base: Checkpoint) -> str:
    number = 1
    while f"model-merged-{number}.safetensors" in base.shards:
        number += 1
    return f"model-merged-{number}.safetensors"


def _file_as_in_base(filename: str, header: Header, tensors: Sequence[_Wanted]) -> OutputFile:
    same = len(tensors) == len(header.tensors) and all(
        tensor.name in header.tensors
        and (tensor.dtype, tensor.shape) == (header.tensors[tensor.name].dtype, header.tensors[tensor.name].shape)
        for tensor in tensors
    )
    if not same:
        return _new_file(filename, tensors, header.metadata)
    return OutputFile(filename, header_bytes(header), tuple(header.tensors.values()), header.path.name)


def _new_file(filename: str, tensors: Sequence[_Wanted], metadata: dict[str, str]) -> OutputFile:
    # Wide numbers first, as the format's own writer does it, so that every tensor is aligned to its numbers.
    ordered = sorted(tensors, key=lambda tensor: -DTYPE_BITS[tensor.dtype])
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    spans, end = [], 0
    for tensor in ordered:
        spans.append((end, end + tensor.size_bytes))
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": list(spans[-1])}
        end = spans[-1][1]
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    placed = (
        TensorInfo(tensor.name, tensor.dtype, tensor.shape, len(header) + begin, len(header) + stop)
        for tensor, (begin, stop) in zip(ordered, spans, strict=True)
    )
    return OutputFile(filename, header, tuple(placed))
