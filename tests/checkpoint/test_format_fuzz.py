"""Spoilt files and directories by the hundred: an error or the right answer, never a crash, a hang, or another's file.

The long form, with 100,000 of them, is ``benchmarks/fuzz_headers.py``.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoint.mutations import (
    LONG,
    MAKERS,
    STRICTER,
    framed,
    judged_directory,
    judged_file,
    shard_bytes,
    spoilt_directory,
    spoilt_file,
)
from tunesmith.checkpoint import Checkpoint, read_header, read_json_object, read_rows
from tunesmith.checkpoint.header import MAX_HEADER_BYTES, _open_at_once
from tunesmith.errors import CheckpointError

ALLOWED = {"both read the same", "both refuse", *(f"we refuse alone: {reason}" for reason in STRICTER)}
seeds = st.integers(0, 2**40)


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """A test that waits for what never comes fails, and does not keep the others waiting."""

    def fail(*_: object) -> None:
        raise TimeoutError("hung")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all cases share."""
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=500, deadline=None, derandomize=True)
@given(seed=seeds)
def test_a_spoilt_file_is_read_as_safetensors_reads_it_or_refused(work: Path, seed: int) -> None:
    """Never more lenient; where we alone refuse, the reason is one of the stated."""
    assert judged_file(work / "x.safetensors", spoilt_file(seed).content) in ALLOWED


@settings(max_examples=150, deadline=None, derandomize=True)
@given(seed=seeds)
def test_a_spoilt_directory_is_read_as_it_was_written_or_refused(work: Path, seed: int) -> None:
    """With indexes that are wrong in any way, and pipes, sockets, devices and dead links in the place of files."""
    spoilt_directory(seed, work / "outer" / "model")
    assert judged_directory(work / "outer" / "model") in {"read as it was written", "refused"}


def test_the_mutations_reach_every_outcome(work: Path) -> None:
    """A fuzzer that is always refused, or never, tests nothing."""
    outcomes = {judged_file(work / "y.safetensors", spoilt_file(seed).content) for seed in range(60 * len(MAKERS))}
    assert outcomes == ALLOWED


def test_the_long_form_runs_clean(work: Path) -> None:
    """Its short form: no bad outcome, and no file opened outside the model's directory."""
    script = Path(__file__).parents[2] / "benchmarks" / "fuzz_headers.py"
    options = ["--cases", "500", "--seed", "7", "--long-bytes", "200000"]
    result = subprocess.run(
        [sys.executable, str(script), *options], capture_output=True, text=True, check=False, cwd=work
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 that must not be" in result.stdout


@pytest.mark.parametrize("kind", LONG)
def test_a_header_whose_size_is_the_attack_takes_no_time(work: Path, kind: str) -> None:
    """What is quadratic in the header takes minutes and is stopped."""
    file = work / "long.safetensors"
    size = 5_000_000 if "large sizes" in kind or "duplicate" in kind else 500_000
    file.write_bytes(framed(LONG[kind](size), b"x" if "ones" in kind else b""))
    signal.alarm(15)
    if kind in ("white space", "many tensors"):
        assert len(read_header(file).tensors) == (0 if kind == "white space" else 500_000 // 70)
        return
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    assert len(str(caught.value)) < 2000


def test_a_header_over_the_limit_is_refused_unread(work: Path) -> None:
    """As the safetensors package does, at 100 MB; the file is sparse, and one byte less is read and found empty."""
    file = work / "limit.safetensors"
    for more, expected in ((1, "a header length that fits the file"), (0, "a header that starts with '{'")):
        with file.open("wb") as sparse:
            sparse.write(struct.pack("<Q", MAX_HEADER_BYTES + more))
            sparse.truncate(8 + MAX_HEADER_BYTES + more)
        with pytest.raises(CheckpointError) as caught:
            read_header(file)
        assert caught.value.expected == expected


def made(place: Path, kind: str) -> Path:
    """Something at a place that is no regular file."""
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(place.name)  # from its own folder, for a socket's path is short
    elif kind == "device":
        place.symlink_to("/dev/zero")
    elif kind == "terminal":
        place.symlink_to("/dev/tty")
    else:
        place.mkdir()
    return place


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "terminal", "directory"])
@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "config.json"])
def test_what_is_no_file_is_refused_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    """A pipe has no end, and a device may act when it is opened; the message says which place it is."""
    monkeypatch.chdir(tmp_path)
    place = made(tmp_path / name, kind)
    if name != "config.json":
        (tmp_path / "config.json").write_text("{}")
    signal.alarm(5)
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        Checkpoint(tmp_path)
    assert caught.value.where == str(place)
    assert caught.value.expected == "a regular file"
    with pytest.raises(CheckpointError):
        read_header(place)
    with pytest.raises(CheckpointError):
        read_json_object(place)


def test_a_pipe_that_takes_a_file_s_place_in_that_moment_is_not_waited_for(tmp_path: Path) -> None:
    """Between the look at the file and its opening."""
    os.mkfifo(tmp_path / "pipe")
    signal.alarm(5)
    os.close(_open_at_once(str(tmp_path / "pipe"), os.O_RDONLY))


def test_a_file_that_becomes_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """Between the header and the data."""
    file = tmp_path / "x.safetensors"
    file.write_bytes(shard_bytes("s1.safetensors"))
    header = read_header(file)
    file.unlink()
    os.mkfifo(file)
    signal.alarm(5)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_rows(header, "a")


def test_the_hubs_cache_reads_through_its_links(tmp_path: Path) -> None:
    """Snapshots are symlinks to blobs; and the directory itself may be one."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    index = json.dumps({"weight_map": {"a": "s1.safetensors", "b": "s1.safetensors", "c": "s2.safetensors"}}).encode()
    files = {name: shard_bytes(name) for name in ("s1.safetensors", "s2.safetensors")}
    for name, content in {**files, "config.json": b"{}", "model.safetensors.index.json": index}.items():
        (blobs / f"sha-of-{name}").write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/sha-of-{name}")
    (tmp_path / "link").symlink_to(snapshot)
    for place in (snapshot, tmp_path / "link"):
        assert set(Checkpoint(place).tensors) == {"a", "b", "c"}
        assert judged_directory(place) == "read as it was written"


@pytest.mark.parametrize("shape", [[0, 2**62], [2**62, 0], [0, 2**31, 2**31], [1] * 33, [2**63, 0]])
def test_a_shape_that_no_array_can_have_is_refused(tmp_path: Path, shape: list[int]) -> None:
    """The safetensors package takes some of them; NumPy would fail on them when they are read."""
    data = b"" if 0 in shape else b"xx"
    entry: dict[str, Any] = {"dtype": "F16", "shape": shape, "data_offsets": [0, len(data)]}
    (tmp_path / "x.safetensors").write_bytes(framed(json.dumps({"a": entry}).encode(), data))
    with pytest.raises(CheckpointError, match="not a sound safetensors file"):
        read_header(tmp_path / "x.safetensors")


def test_a_shape_at_the_limit_is_read(tmp_path: Path) -> None:
    """As an array of that shape."""
    shapes = {"wide": [0, 2**59], "deep": [1] * 32}
    entries = {
        name: {"dtype": "F16", "shape": shape, "data_offsets": [0, 0 if 0 in shape else 2]}
        for name, shape in shapes.items()
    }
    (tmp_path / "x.safetensors").write_bytes(framed(json.dumps(entries).encode(), b"xx"))
    header = read_header(tmp_path / "x.safetensors")
    assert {name: list(read_rows(header, name).shape) for name in shapes} == shapes


def test_the_model_of_60000_tensors_in_160_shards_opens_in_seconds(tmp_path: Path) -> None:
    """The layout of a model of 671 B parameters, as sparse files; about half a second, and far more if quadratic."""
    weight_map = {}
    for number in range(160):
        shard, entries, position = f"model-{number + 1:05}-of-00160.safetensors", {}, 0
        for index in range(375):
            name = f"model.layers.{number}.mlp.experts.{index}.up_proj.weight"
            entries[name] = {
                "dtype": "F8_E4M3",
                "shape": [2048, 7168],
                "data_offsets": [position, position + 2048 * 7168],
            }
            position += 2048 * 7168
            weight_map[name] = shard
        raw = json.dumps(entries).encode()
        with (tmp_path / shard).open("wb") as file:
            file.write(struct.pack("<Q", len(raw)) + raw)
            file.truncate(8 + len(raw) + position)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text("{}")
    signal.alarm(30)
    model = Checkpoint(tmp_path)
    assert sum(model.tensors[name].size_bytes for name in weight_map) == 60_000 * 2048 * 7168
    assert all(model.shard_of(name) == shard for name, shard in weight_map.items())
