"""read_header: every invariant of the format, and never more lenient than the safetensors package."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from tunesmith.checkpoint import read_header
from tunesmith.checkpoint.header import DTYPE_BITS, MAX_HEADER_BYTES
from tunesmith.errors import CheckpointError

SOUND: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
    "b.weight": {"dtype": "F32", "shape": [2], "data_offsets": [12, 20]},
    "empty": {"dtype": "F32", "shape": [0, 7], "data_offsets": [20, 20]},
    "scalar": {"dtype": "I64", "shape": [], "data_offsets": [20, 28]},
}
DATA = bytes(range(28))

# Fragments that break JSON, types, ranges, numbers and texts; each replaces a piece of a sound header.
FRAGMENTS = [
    "-0", "-1", "0", "1", "2", "12", "1e0", "1.0", "01", "true", "null", "NaN", "Infinity", "[]", "{}", '""', '"F32"',
    '"F64"', '"F4"', '"\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"', "\x00", "\n", " ", "\t", "\ufeff", "\u2028", ",",
    ":", '"a"', '"b.weight"', '"dtype":"U8",', str(2**62), str(2**63), str(2**64), "9" * 400, "é", "/**/",
]  # fmt: skip


def file_of(header: object, data: bytes = DATA) -> bytes:
    """A safetensors file: the header as given where it is text or bytes, else as JSON."""
    raw = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def written(path: Path, content: bytes) -> Path:
    """The file ``x.safetensors`` with this content."""
    file = path / "x.safetensors"
    file.write_bytes(content)
    return file


def accepted(file: Path) -> bool:
    """Whether we accept it; anything but a CheckpointError is a crash."""
    try:
        read_header(file)
    except CheckpointError:
        return False
    return True


def accepted_by_safetensors(content: bytes) -> bool:
    """Whether the format's own package does."""
    try:
        deserialize(content)
    except (SafetensorError, UnicodeDecodeError):
        return False
    return True


def changed(key: str, **fields: Any) -> dict[str, Any]:
    """The sound header with some fields of one tensor changed."""
    return {**SOUND, key: {**SOUND[key], **fields}}


def test_a_sound_header_is_read_with_absolute_offsets(tmp_path: Path) -> None:
    """Names in the order of their data, offsets from the start of the file, metadata apart."""
    content = file_of(SOUND)
    header = read_header(written(tmp_path, content))
    start = len(content) - len(DATA)
    assert list(header.tensors) == ["a", "b.weight", "empty", "scalar"]
    assert [(info.begin - start, info.end - start) for info in header.tensors.values()] == [
        (0, 12), (12, 20), (20, 20), (20, 28),
    ]  # fmt: skip
    assert header.metadata == {"format": "pt"}
    assert (header.data_start, header.file_bytes) == (start, len(content))
    assert header.tensors["a"].shape == (2, 3)
    assert header.tensors["a"].elements == 6
    assert header.tensors["scalar"].elements == 1


def test_a_file_of_the_safetensors_package_is_read(tmp_path: Path) -> None:
    """Whatever order it wrote them in."""
    import numpy as np

    arrays = {"z": np.zeros((3, 2), np.float32), "y": np.ones(5, np.float16), "x": np.zeros((), np.int8)}
    header = read_header(written(tmp_path, save(arrays, {"k": "v"})))
    assert {name: info.shape for name, info in header.tensors.items()} == {"z": (3, 2), "y": (5,), "x": ()}
    assert header.metadata == {"k": "v"}


@pytest.mark.parametrize("padding", range(8))
def test_header_lengths_of_any_alignment_are_read(tmp_path: Path, padding: int) -> None:
    """Odd lengths exist in the wild, and the safetensors package reads them too."""
    content = file_of(json.dumps(SOUND) + " " * padding)
    assert accepted_by_safetensors(content)
    assert list(read_header(written(tmp_path, content)).tensors) == ["a", "b.weight", "empty", "scalar"]


BROKEN = {
    "an empty file": b"",
    "seven bytes": b"1234567",
    "a length and no header": struct.pack("<Q", 10),
    "a length beyond the file": struct.pack("<Q", 1000) + b"{}",
    "a length beyond the limit": struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}",
    "a length of 2**63": struct.pack("<Q", 2**63) + b"{}",
    "a length of 2**64 - 1": struct.pack("<Q", 2**64 - 1) + b"{}",
    "a length of zero": struct.pack("<Q", 0),
    "a list": file_of([], b""),
    "a pickle": b"\x80\x04\x95" + bytes(100),
    "a leading space": file_of(" " + json.dumps(SOUND)),
    "a byte order mark": file_of("\ufeff" + json.dumps(SOUND)),
    "bytes that are not UTF-8": file_of(b'{"\xff": 1}'),
    "text after the object": file_of(json.dumps(SOUND) + "{}"),
    "nesting without end": file_of('{"a":' + "[" * 100_000, b""),
    "a truncated file": file_of(SOUND)[:-1],
    "a trailing byte": file_of(SOUND) + b"\0",
    "a hole at the start": file_of({"a": {"dtype": "U8", "shape": [4], "data_offsets": [1, 5]}}, bytes(5)),
    "a hole": file_of(changed("scalar", data_offsets=[21, 29]), bytes(29)),
    "an overlap": file_of(changed("b.weight", data_offsets=[11, 19])),
    "two tensors in one place": file_of({**SOUND, "twin": SOUND["scalar"]}),
    "offsets that run backwards": file_of(changed("a", data_offsets=[12, 0])),
    "a negative offset": file_of(changed("a", data_offsets=[-12, 0])),
    "three offsets": file_of(changed("a", data_offsets=[0, 6, 12])),
    "a float offset": file_of(changed("a", data_offsets=[0, 12.0])),
    "a boolean offset": file_of(changed("a", data_offsets=[False, 12])),
    "a shape that is not its bytes": file_of(changed("a", shape=[2, 4])),
    "a negative dimension": file_of(changed("a", shape=[-2, -3])),
    "a float dimension": file_of(changed("a", shape=[2.0, 3])),
    "a dimension of minus zero": file_of(json.dumps(SOUND).replace("[0, 7]", "[-0, 7]")),
    "a shape beyond 64 bits": file_of(changed("empty", shape=[2**62, 4, 0])),
    "a shape beyond all floats": file_of(changed("empty", shape=[2**62] * 20)),
    "an unknown dtype": file_of(changed("a", dtype="BF17")),
    "a dtype that is a list": file_of(changed("a", dtype=["BF16"])),
    "half a byte": file_of({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}, bytes(2)),
    "no dtype": file_of({"a": {"shape": [0], "data_offsets": [0, 0]}}, b""),
    "a tensor that is a number": file_of({"a": 1}, b""),
    "a duplicate tensor": file_of(json.dumps(SOUND)[:-1] + ', "a": ' + json.dumps(SOUND["a"]) + "}"),
    "a duplicate field": file_of(json.dumps(SOUND).replace('"dtype": "BF16"', '"dtype": "BF16", "dtype": "BF16"')),
    "metadata that is a number": file_of({**SOUND, "__metadata__": {"step": 3}}),
    "metadata that is a list": file_of({**SOUND, "__metadata__": []}),
    "half a surrogate pair": file_of('{"\\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}', b""),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_naming_it(tmp_path: Path, name: str) -> None:
    """One check for each invariant; the message names the file and what was expected."""
    file = written(tmp_path, BROKEN[name])
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    assert caught.value.where == str(file)
    assert caught.value.expected
    assert "copy or download" in str(caught.value.next_step)


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_known_dtype_has_the_size_that_the_package_gives_it(dtype: str) -> None:
    """Eight elements take as many bytes as one takes bits; a byte more or less is refused by the package too."""
    for size, sound in ((DTYPE_BITS[dtype], True), (DTYPE_BITS[dtype] + 1, False)):
        header = {"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, size]}}
        assert accepted_by_safetensors(file_of(header, bytes(size))) is sound


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    """A sound file with some of its header's text replaced, its bytes changed, or its data cut or grown."""
    text = json.dumps(SOUND, separators=draw(st.sampled_from([(",", ":"), (", ", ": ")])))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(text)))
        stop = start + draw(st.integers(0, 6))
        text = text[:start] + draw(st.sampled_from([*FRAGMENTS, ""])) + text[stop:]
    content = bytearray(file_of(text, draw(st.sampled_from([DATA, DATA[:-1], DATA + b"x", b""]))))
    for _ in range(draw(st.integers(0, 2))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content)


@st.composite
def structured(draw: st.DrawFn) -> bytes:
    """A header of odd but well-formed JSON values in the places of the format."""
    number = st.sampled_from([0, 1, 2, 3, 4, 8, 12, 20, 28, -1, 2**31, 2**62, 2**63, 2**64, 1.0, True, None, "1"])
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from([*DTYPE_BITS, "C128", "", 1, None]),
            "shape": st.lists(number, max_size=4),
            "data_offsets": st.lists(number, min_size=2, max_size=3),
        },
        optional={"extra": number},
    )
    metadata = st.none() | st.dictionaries(st.text(max_size=3), st.text(max_size=3) | number, max_size=2)
    header: dict[str, Any] = draw(st.dictionaries(st.text(max_size=4), entry, max_size=3))
    if draw(st.booleans()):
        header["__metadata__"] = draw(metadata)
    return file_of(header, draw(st.binary(max_size=30)))


@given(content=mutations() | structured())
@example(content=file_of(SOUND))
@example(content=file_of({}, b""))
@settings(max_examples=700, deadline=None)
def test_what_the_safetensors_package_refuses_is_refused(tmp_path_factory: Any, content: bytes) -> None:
    """Never more lenient than the reader that will load the file; and never a crash."""
    file = written(tmp_path_factory.getbasetemp(), content)
    if accepted(file):
        assert accepted_by_safetensors(content)


@given(
    shapes=st.lists(
        st.tuples(st.sampled_from(sorted(DTYPE_BITS)), st.lists(st.integers(0, 5), max_size=3)), max_size=5
    ),
    padding=st.integers(0, 9),
)
@settings(max_examples=200, deadline=None)
def test_every_sound_header_is_accepted(tmp_path_factory: Any, shapes: list[Any], padding: int) -> None:
    """Any dtypes, shapes and header length; the strictness costs no sound file."""
    header, position = {}, 0
    for index, (dtype, shape) in enumerate(shapes):
        bits = DTYPE_BITS[dtype]
        for size in shape:
            bits *= size
        if bits % 8:
            continue
        header[f"t{index}"] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + bits // 8]}
        position += bits // 8
    content = file_of(json.dumps(header) + " " * padding, bytes(position))
    assert accepted_by_safetensors(content)
    found = read_header(written(tmp_path_factory.getbasetemp(), content))
    assert {name: list(info.shape) for name, info in found.tensors.items()} == {
        name: entry["shape"] for name, entry in header.items()
    }


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    """As a CheckpointError that names the place."""
    for place in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_header(place)


def test_a_name_that_no_file_can_have_is_refused() -> None:
    """An index may hold any text."""
    with pytest.raises(CheckpointError, match="name"):
        read_header("a\0b.safetensors")
