"""The safetensors file format, parsed strictly: https://github.com/huggingface/safetensors#format.

A file is an unsigned little-endian 64-bit header length N, N bytes of one JSON object, then the data.  The object maps
each tensor's name to its dtype, its shape and the range of its bytes in the data; ``__metadata__`` maps strings to
strings.  The ranges start at 0, leave no hole, do not overlap, and end where the file ends.  N may be odd.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from tunesmith.checkpoint.ranges import RangeFile, read_at
from tunesmith.checkpoint.storage import StoragePath, storage_path
from tunesmith.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000

_FIRST_BYTES = 64 << 10

_MAX_ELEMENTS = 2**60  # in float64, fewer than 2⁶³ bytes
_MAX_DIMENSIONS = 32  # NumPy 1's limit, the narrowest

DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        name: its name.
        dtype: its safetensors dtype, such as ``BF16``.
        shape: its shape.
        begin: offset of its first byte from the start of the file.
        end: offset just past its last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        """How many bytes it takes."""
        return self.end - self.begin

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """One safetensors file's header.

    Attributes:
        path: the file.
        tensors: every tensor by name, in the order of their data.
        metadata: the file's string metadata.
        data_start: offset of the first tensor's first byte.
        file_bytes: the file's size.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    file_bytes: int


def is_file(path: Path) -> bool:
    """Whether a path leads to a regular file; what no file system can hold, as a link may name, is not there."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_there(path: Path) -> bool:
    """Whether a path leads to something."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file to read it, where it is a regular file or a symlink to one.

    A named pipe would keep the reader waiting for ever, and some devices act when they are opened.

    Args:
        path: the file.

    Returns:
        The open file, in binary mode.

    Raises:
        CheckpointError: it is absent, unreadable, or no regular file.
    """
    source = storage_path(path)
    try:
        if isinstance(source, StoragePath):
            return cast(BinaryIO, RangeFile(source))
        if stat.S_ISREG(source.stat().st_mode):
            file = open(source, "rb", opener=_open_at_once)  # noqa: SIM115 - a Path has no opener
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file
            file.close()
    except OSError as error:
        raise CheckpointError("The file cannot be read.", where=source, found=error.strerror or error) from error
    except ValueError as error:  # an index may name what no file system can
        raise CheckpointError("The file's name is not one.", where=repr(str(source)), found=error) from error
    raise CheckpointError(
        "The file cannot be read.",
        where=source,
        expected="a regular file",
        found="a directory" if source.is_dir() else "a pipe, a socket or a device",
    )


def size_of(file: BinaryIO) -> int:
    """The size of a file that :func:`open_regular` opened."""
    return file.size if isinstance(file, RangeFile) else os.fstat(file.fileno()).st_size


def header_bytes(header: Header) -> bytes:
    """All bytes of a file before the first tensor's."""
    if isinstance(header.path, StoragePath):
        return read_at(header.path, 0, header.data_start)
    with header.path.open("rb") as file:
        return file.read(header.data_start)


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check a safetensors file's header; the data is not read.

    Args:
        path: the file.

    Returns:
        The header, every invariant of the format checked.

    Raises:
        CheckpointError: the file cannot be read or breaks the format.
    """
    source = storage_path(path)
    with open_regular(source) as file:
        try:
            file_bytes = size_of(file)
            # Of a storage every read is a request: most headers come with the first.
            head = file.read(min(file_bytes, _FIRST_BYTES)) if isinstance(file, RangeFile) else file.read(8)
            length = int.from_bytes(head[:8], "little") if file_bytes >= 8 else -1
            if not 2 <= length <= min(MAX_HEADER_BYTES, file_bytes - 8):
                raise _broken(source, "a header length that fits the file", f"{length} in {file_bytes} bytes")
            raw = head[8 : 8 + length]
            raw += file.read(length - len(raw))
        except OSError as error:
            raise CheckpointError("The file cannot be read.", where=source, found=error.strerror or error) from error
    entries = _parse_object(source, raw)
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # mlx writes null for none, as the reference reader takes it
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(source, "string-only __metadata__", metadata)
    data_start = 8 + length
    tensors = [_tensor(source, name, entry, data_start) for name, entry in entries.items()]
    tensors.sort(key=lambda info: (info.begin, info.end))
    _check_ranges(source, tensors, data_start, file_bytes)
    return Header(source, {info.name: info for info in tensors}, metadata, data_start, file_bytes)


def _broken(source: Path, expected: object, found: object) -> CheckpointError:
    # A hostile value may be as long, or as deep, as the header: only its beginning is told.
    told = str(found) if isinstance(found, str | int | Exception) else reprlib.repr(found)
    return CheckpointError(
        "This is not a sound safetensors file.",
        where=source,
        expected=expected,
        found=told[:200],
        next_step="copy or download the file again: it is truncated, damaged or of another format",
    )


def quoted(name: str) -> str:
    """A name from a file as an error may show it: on one line, printable, and not without end."""
    return repr(name if len(name) <= 200 else name[:200] + "…")


def _parse_object(source: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError(f"duplicate key {quoted(Counter(key for key, _ in pairs).most_common(1)[0][0])}")
        return table

    if not raw.startswith(b"{"):
        raise _broken(source, "a header that starts with '{'", raw[:16])
    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_int=_integer)
        if b"\\u" in raw:  # half a surrogate pair is no text, though Python reads it
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise _broken(source, "a JSON header", error) from error
    if not isinstance(document, dict):
        raise _broken(source, "a JSON object", type(document).__name__)
    return document


def _integer(digits: str) -> int:
    if digits == "-0":  # a float to every other reader of the format
        raise ValueError("-0 is not an integer")
    return int(digits)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**64


def _is_array_shape(shape: list[int]) -> bool:
    """Whether an array library could hold it; an empty tensor's other sizes could be anything."""
    elements = 1
    for size in shape:
        elements *= size or 1
        if elements >= _MAX_ELEMENTS:  # at once, for the whole product of a hostile shape takes hours
            return False
    return len(shape) <= _MAX_DIMENSIONS


def _tensor(source: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _broken(source, f"dtype, shape and data_offsets for {quoted(name)}", entry)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _broken(source, f"a known dtype for {quoted(name)}", dtype)
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise _broken(source, f"a shape of non-negative integers for {quoted(name)}", shape)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise _broken(source, f"two data_offsets for {quoted(name)}", offsets)
    if not _is_array_shape(shape):
        raise _broken(source, f"a shape that an array can have for {quoted(name)}", shape)
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or offsets[1] - offsets[0] != bits // 8:
        expected = f"{bits / 8:g} bytes for {quoted(name)} ({dtype} {reprlib.repr(shape)})"
        raise _broken(source, expected, f"{offsets[1] - offsets[0]} bytes")
    return TensorInfo(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _check_ranges(source: Path, tensors: list[TensorInfo], data_start: int, file_bytes: int) -> None:
    position = data_start
    for info in tensors:
        if info.begin != position:
            raise _broken(source, f"{quoted(info.name)} to begin at byte {position}", f"byte {info.begin}")
        position = info.end
    if position != file_bytes:
        raise _broken(source, f"{position} bytes in all", f"{file_bytes} bytes")
