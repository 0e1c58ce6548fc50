"""Safetensors files and indexed directories, sound and spoilt, each drawn from a seed; and what must be said of them.

The reference for a single file is the safetensors package: what it refuses, we refuse; what both accept, both read as
the same.  Where we refuse alone, the reason is one of ``STRICTER``.  For a directory, the reference is what was put
into it.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from safetensors import SafetensorError, deserialize, safe_open

from tunesmith.checkpoint import Checkpoint, read_header
from tunesmith.checkpoint.header import DTYPE_BITS
from tunesmith.errors import CheckpointError

STRICTER = {
    "a duplicate key": "readers differ in which of the two they take",
    "an unknown field": "a later version of the format could mean something by it",
    "white space before the header": "the format says that it begins with a brace",
    "a shape that no array has": "more than 32 sizes, or an empty tensor whose other sizes no array library takes",
}

NUMBERS = ["-0", "-1", "0", "1", "3", "1e0", "1.0", "01", "+1", "0x1", "NaN", "-Infinity", "1e999", "9" * 5000,
           *(str(2**power + more) for power in (31, 32, 53, 61, 62, 63, 64) for more in (-1, 0, 1))]  # fmt: skip
VALUES = [*NUMBERS, "true", "false", "null", "[]", "{}", "[[]]", '""', '"F32"', '"BF16"', '"F128"', '"f32"', '{"a":1}']
TEXTS = ["\\u0000", "\\ud800", "\\udc00\\ud800", "\\ud83d\\ude00", "\\x", "\\u12", "\x00", "\n", "\u2028", "\ufeff",
         "é", "/", "../x", "\\", '"', "a" * 300]  # fmt: skip
PIECES = [*VALUES, *TEXTS, ",", ":", "[", "]", "{", "}", " ", "\t", "\r\n", "//", "/**/", "'", '"a":', '"dtype":"U8",']


@dataclass(frozen=True)
class Spoilt:
    """One file.

    Attributes:
        kind: how it was made.
        content: its bytes.
    """

    kind: str
    content: bytes


def framed(raw: bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file of a header's bytes and data; with another length than the header's where one is given."""
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def sound_entries(rng: Random) -> tuple[dict[str, Any], int]:
    """A sound header, as a mapping in any order, and the length of its data."""
    entries: dict[str, Any] = {}
    position = 0
    for index in range(rng.choice([0, 1, 2, 2, 3, 5])):
        dtype = rng.choice(sorted(DTYPE_BITS))
        shape = [rng.choice([0, 1, 1, 2, 3, 8]) for _ in range(rng.choice([0, 1, 2, 2, 3]))]
        bits = math.prod(shape) * DTYPE_BITS[dtype]
        if bits % 8:
            shape, bits = [*shape, 8], bits * 8
        name = rng.choice(["a", "w", "model.x", "é", "a b", ""]) + str(index)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + bits // 8]}
        position += bits // 8
    if rng.random() < 0.4:
        entries["__metadata__"] = {rng.choice(["format", "é", ""]): rng.choice(["pt", "", "\n"])}
    names = list(entries)
    rng.shuffle(names)
    return {name: entries[name] for name in names}, position


def _dumped(rng: Random, entries: object) -> str:
    text = json.dumps(entries, ensure_ascii=rng.random() < 0.5, separators=rng.choice([(",", ":"), (", ", " : ")]))
    return text + rng.choice(["", " ", "\n", "\t\r\n ", " " * rng.randrange(9)])


def _sound(rng: Random) -> bytes:
    entries, size = sound_entries(rng)
    return framed(_dumped(rng, entries).encode(), rng.randbytes(size))


def _pieces(rng: Random) -> bytes:
    entries, size = sound_entries(rng)
    text = _dumped(rng, entries)
    for _ in range(rng.choice([1, 1, 2, 3])):
        start = rng.randrange(len(text) + 1)
        text = text[:start] + rng.choice(PIECES) + text[start + rng.choice([0, 0, 1, 1, 2, 5]) :]
    return framed(text.encode(), rng.randbytes(size))


def _bytes(rng: Random) -> bytes:
    content = bytearray(_sound(rng))
    for _ in range(rng.choice([1, 1, 2, 4])):
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


def _length(rng: Random) -> bytes:
    entries, size = sound_entries(rng)
    raw, data = _dumped(rng, entries).encode(), rng.randbytes(size)
    near = [len(raw) + step for step in (-2, -1, 1, 2, 8)] + [len(raw) + size, len(raw) + size + 1]
    far = [0, 1, 2, 7, 8, 10**8 - 1, 10**8, 10**8 + 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1]
    return framed(raw, data, length=max(0, rng.choice([*near, *far])))


def _cut(rng: Random) -> bytes:
    content = _sound(rng)
    where = rng.choice([rng.randrange(len(content) + 1), len(content) - 1, rng.randrange(10)])
    return rng.choice([content[:where], content + rng.randbytes(rng.choice([1, 8])), content + content, b""])


def _ranges(rng: Random) -> bytes:
    entries, size = sound_entries(rng)
    for entry in [entry for name, entry in entries.items() if name != "__metadata__"]:
        if rng.random() < 0.6:
            step = rng.choice([-size, -8, -1, 1, 2, 8, size, 2**62, 2**64])
            moved = rng.choice([(step, step), (0, step), (step, 0)])
            entry["data_offsets"] = [place + by for place, by in zip(entry["data_offsets"], moved, strict=True)]
        if rng.random() < 0.2:
            entry["shape"] = rng.choice(
                [entry["shape"][::-1], [*entry["shape"], 1], [*entry["shape"], *[1] * 40], [0, 2**62], [2**62, 0], []]
            )
    return framed(_dumped(rng, entries).encode(), rng.randbytes(size))


def _values(rng: Random) -> bytes:
    """One value, at any depth, becomes another literal, well-formed or not."""
    entries, size = sound_entries(rng)
    entries = {"t": {"dtype": "U8", "shape": [0, 3], "data_offsets": [0, 0]}, **entries}
    holder: Any = entries
    for _ in range(rng.choice([1, 2, 2, 3, 3])):
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = rng.choice(keys)
        if not isinstance(holder[key], dict | list) or not holder[key]:
            break
        parent, holder = holder, holder[key]
    else:
        holder, key = parent, key
    holder[key] = "@@"
    return framed(_dumped(rng, entries).replace('"@@"', rng.choice(VALUES)).encode(), rng.randbytes(size))


def _names(rng: Random) -> bytes:
    entries, size = sound_entries(rng)
    entries["@@"] = {"dtype": "U8", "shape": [0], "data_offsets": [size, size]}
    text = _dumped(rng, entries).replace("@@", rng.choice(["", "n"]) + rng.choice(TEXTS))
    return framed(text.encode("utf-8", "surrogatepass"), rng.randbytes(size))


def _duplicates(rng: Random) -> bytes:
    entries, size = sound_entries(rng)
    text = _dumped(rng, entries).rstrip()
    twin = rng.choice(['"a0":', '"w1":', '"__metadata__":']) + rng.choice(["{}", "null", '{"x":"y","x":"z"}'])
    entry = '{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    more = rng.choice([twin, f"{twin},{twin}", f'"d":{entry}', text[1:-1] or '"x":1'])
    return framed((text[:-1] + ("," if entries else "") + more + "}").encode(), rng.randbytes(size))


def _fields(rng: Random) -> bytes:
    entries, size = sound_entries(rng)
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    change = rng.choice(["extra", "dtype", "shape", "data_offsets", "metadata"])
    if change == "extra":
        entry["extra"] = rng.choice([1, None, "x", [[]]])
    elif change == "metadata":
        entries["__metadata__"] = rng.choice([None, [], {}, 1, "x", {"a": 1}, {"a": None}, {"a": {"b": "c"}}])
    else:
        del entry[change]
    return framed(_dumped(rng, {"f": entry, **entries}).encode(), rng.randbytes(size))


def _encoded(rng: Random) -> bytes:
    entries, size = sound_entries(rng)
    text = _dumped(rng, entries)
    raw = rng.choice(
        [
            b"\xef\xbb\xbf" + text.encode(), text.encode("utf-16"), text.encode("utf-32"), b" " + text.encode(),
            text.encode() + b"\0", text.encode() + b"\xc2\xa0", text.encode() + b"{}", b"\xff" + text.encode(),
            text.encode().replace(b"{", b"{\xc0\x80", 1), text.encode("utf-7"), text.encode().replace(b'"', b"'"),
        ]
    )  # fmt: skip
    return framed(raw, rng.randbytes(size))


def _nested(rng: Random) -> bytes:
    depth = rng.choice([1, 20, 126, 127, 128, 129, *range(900, 1010, 7), 10_000])
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
    value = opening * depth + rng.choice(["", "1"]) + closing * rng.choice([depth, depth, depth - 1])
    place = rng.choice(
        ['{"a":%s}', '{"__metadata__":{"a":%s}}', '{"a":{"dtype":"U8","shape":%s,"data_offsets":[0,0]}}']
    )
    return framed((place % value).encode())


MAKERS: dict[str, Callable[[Random], bytes]] = {
    "sound": _sound,
    "pieces of text": _pieces,
    "bytes": _bytes,
    "header lengths": _length,
    "cut or grown": _cut,
    "ranges and shapes": _ranges,
    "values": _values,
    "names": _names,
    "duplicates": _duplicates,
    "fields and metadata": _fields,
    "encodings": _encoded,
    "nesting": _nested,
}


def spoilt_file(seed: int) -> Spoilt:
    """The file of a seed; consecutive seeds go through all kinds."""
    kind = list(MAKERS)[seed % len(MAKERS)]
    return Spoilt(kind, MAKERS[kind](Random(seed)))  # noqa: S311 - a test is to be repeatable


def judged_file(path: Path, content: bytes) -> str:
    """Read one file as we and as the safetensors package do.

    Args:
        path: where to write it.
        content: the file.

    Returns:
        ``both read the same``, ``both refuse``, ``we refuse alone: …`` with a key of ``STRICTER``; or what must not
        be: ``we accept what safetensors refuses``, ``read differently``, ``we refuse alone: unexplained …``.

    Raises:
        Exception: anything that read_header raises but a CheckpointError.
    """
    path.write_bytes(content)
    theirs = _theirs(path, content)
    try:
        header = read_header(path)
    except CheckpointError as error:
        return "both refuse" if theirs is None else f"we refuse alone: {_why_stricter(error)}"
    if theirs is None:
        return "we accept what safetensors refuses"
    ours = {name: (i.dtype, list(i.shape), content[i.begin : i.end]) for name, i in header.tensors.items()}
    return "both read the same" if (ours, header.metadata) == theirs else "read differently"


def _theirs(path: Path, content: bytes) -> tuple[dict[str, Any], dict[str, str]] | None:
    try:
        tensors = {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in deserialize(content)}
        with safe_open(path, framework="numpy") as file:
            return tensors, file.metadata() or {}
    except (SafetensorError, UnicodeDecodeError):
        return None


def _why_stricter(error: CheckpointError) -> str:
    if "duplicate key" in str(error.found):
        return "a duplicate key"
    if str(error.expected).startswith("dtype, shape and data_offsets for"):
        return "an unknown field"
    if str(error.expected).startswith("a shape that an array can have"):
        return "a shape that no array has"
    if error.expected == "a header that starts with '{'" and re.match(r"b['\"]( |\\t|\\n|\\r)", str(error.found)):
        return "white space before the header"
    return f"unexplained, {error.expected}, {error.found}"


# Directories with an index.

SHARDS = {"s1.safetensors": ("a", "b"), "s2.safetensors": ("c",)}
WEIGHT_MAP = {name: shard for shard, names in SHARDS.items() for name in names}
SHARD_NAMES = [
    "s1.safetensors", "s2.safetensors", "../secret.safetensors", "/etc/passwd", "/dev/zero", "..", ".", "",
    "./s1.safetensors", "s1.safetensors/", "sub/../s1.safetensors", "s1.safetensors\0",
    "s1\n.safetensors", "\x1b[2J.safetensors", "\ud800",
    "x" * 300 + ".safetensors", "x" * 5000, "config.json", "model.safetensors.index.json", "..\\secret.safetensors",
    "C:\\x.safetensors", "~/x.safetensors", "s3.safetensors", "*.safetensors", "secret.safetensors", "S1.safetensors",
]  # fmt: skip


def shard_bytes(shard: str) -> bytes:
    """A sound shard, whose tensors' bytes are their names."""
    entries, data = {}, b""
    for name in SHARDS.get(shard, ("secret",)):
        entries[name] = {"dtype": "U8", "shape": [len(name)], "data_offsets": [len(data), len(data) + len(name)]}
        data += name.encode()
    return framed(json.dumps(entries).encode(), data)


def _spoilt_index(rng: Random) -> tuple[str, bytes]:
    table: dict[str, Any] = dict(WEIGHT_MAP)
    kind = rng.choice(["names", "names", "keys", "values", "text", "text", "bytes", "shape", "sound"])
    if kind == "names":
        table[rng.choice([*table, "new"])] = rng.choice(SHARD_NAMES)
    elif kind == "keys":
        table[rng.choice(["", "\n", "\ud800", "a\0", "__metadata__", "x" * 9999])] = rng.choice(SHARD_NAMES[:2])
    elif kind == "values":
        table[rng.choice(list(table))] = "@@"
    document: Any = {"metadata": {"total_size": 3}, "weight_map": table}
    if kind == "shape":
        document = rng.choice([[], 1, None, {}, {"weight_map": rng.choice([[], None, {}, "s1.safetensors", [table]])}])
    text = json.dumps(document).replace('"@@"', rng.choice(VALUES))
    for _ in range(rng.choice([1, 2]) if kind == "text" else 0):
        start = rng.randrange(len(text) + 1)
        text = text[:start] + rng.choice(PIECES) + text[start + rng.choice([0, 1, 4]) :]
    raw = bytearray(text.encode())
    if kind == "bytes":
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    return f"index, {kind}", bytes(raw)


def _replaced(rng: Random, place: Path) -> str:
    """Something else in a file's place; what it is."""
    kind = rng.choice(["pipe", "directory", "socket", "device", "link to nothing", "link to a device", "loop", "cut"])
    content = place.read_bytes()
    place.unlink()
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "directory":
        place.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(place))
    elif kind in ("device", "link to a device"):
        place.symlink_to("/dev/zero")
    elif kind == "loop":
        place.symlink_to(place.name)
    elif kind == "link to nothing":
        place.symlink_to("nothing")
    else:
        place.write_bytes(content[: rng.randrange(len(content))])
    return kind


def spoilt_directory(seed: int, folder: Path) -> str:
    """Make the directory of a seed, with a sound file outside it that an index may try to reach.

    Args:
        seed: which.
        folder: where; what is in it is replaced.

    Returns:
        How it was spoilt.
    """
    rng = Random(seed)  # noqa: S311 - a test is to be repeatable
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.rmdir() if old.is_dir() and not old.is_symlink() else old.unlink()
    (folder.parent / "secret.safetensors").write_bytes(shard_bytes("secret"))
    for shard in SHARDS:
        (folder / shard).write_bytes(shard_bytes(shard))
    (folder / "config.json").write_text("{}")
    kind, index = _spoilt_index(rng)
    (folder / "model.safetensors.index.json").write_bytes(index)
    if rng.random() < 0.3:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": WEIGHT_MAP}))
        place = folder / rng.choice([*SHARDS, "model.safetensors.index.json", "config.json"])
        kind = f"files, {_replaced(rng, place)}"
    return kind


def judged_directory(folder: Path) -> str:
    """Open a directory.

    Returns:
        ``read as it was written`` or ``refused``; or what must not be: ``read differently``.

    Raises:
        Exception: anything that Checkpoint raises but a CheckpointError.
    """
    try:
        model = Checkpoint(folder)
    except CheckpointError as error:
        str(error).encode()  # it can be printed
        return "refused"
    found = {}
    for name, info in model.tensors.items():
        with (folder / model.shard_of(name)).open("rb") as file:
            found[name] = file.read()[info.begin : info.end]
    sound = found == {name: name.encode() for name in WEIGHT_MAP} and dict(model._shard_of) == WEIGHT_MAP
    return "read as it was written" if sound else "read differently"


# Headers whose size alone is the attack: what takes more than linear time or memory is noticed on them.

_DUPLICATE = b'"%07d":1,'

LONG: dict[str, Callable[[int], bytes]] = {
    "one long name": lambda size: b'{"' + b"a" * size + b'":1}',
    "a name without end": lambda size: b'{"' + b"a" * size,
    "a name of escapes": lambda size: b'{"' + b"\\u00e9" * (size // 6) + b'":1}',
    "a long dtype": lambda size: b'{"a":{"dtype":"' + b"U" * size + b'","shape":[0],"data_offsets":[0,0]}}',
    "white space": lambda size: b"{" + b" " * size + b"}",
    "a long integer": lambda size: b'{"a":' + b"1" * size + b"}",
    "long integers": lambda size: b'{"a":[' + b",".join([b"7" * 4300] * (size // 4301)) + b"]}",
    "a long fraction": lambda size: b'{"a":0.' + b"0" * size + b"1}",
    "empty lists": lambda size: b'{"a":[' + b",".join([b"[]"] * (size // 3)) + b"]}",
    "empty objects": lambda size: b'{"a":[' + b",".join([b"{}"] * (size // 3)) + b"]}",
    "open lists": lambda size: b'{"a":' + b"[" * size,
    "open objects": lambda size: b'{"a":' * (size // 5),
    "a duplicate at the end": lambda size: b"{" + b"".join(_DUPLICATE % n for n in range(size // 12)) + b'"0000000":1}',
    "a shape of ones": lambda size: _shape(b"1", size // 2),
    "a shape of large sizes": lambda size: _shape(b"4611686018427387904", size // 20),
    "an empty shape of large sizes": lambda size: _shape(b"0,4611686018427387904", size // 22),
    "many tensors": lambda size: _many(size // 70),
}  # fmt: skip


def _shape(size: bytes, count: int) -> bytes:
    return b'{"a":{"dtype":"U8","shape":[' + b",".join([size] * count) + b'],"data_offsets":[0,1]}}'


def _many(count: int) -> bytes:
    entry = b'"%08d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return b"{" + b",".join(entry % index for index in range(count)) + b"}"
