"""Hashes that are worked out while others read and write."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest

from tunesmith.checkpoint import TrailingHashes, hash_files, hashing, listing_sha256, weights_files, weights_sha256
from tunesmith.errors import Cancelled, CheckpointError

SIZES = (0, 1, 1 << 20, 3_000_001)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Files of odd sizes, one of them empty."""
    found = {}
    for number, size in enumerate(SIZES):
        found[str(number)] = tmp_path / f"{number}.bin"
        found[str(number)].write_bytes(os.urandom(size))
    return found


def expected(files: dict[str, Path]) -> dict[str, str]:
    """Their hashes, from all their bytes at once."""
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def test_both_ways_give_the_hashes_of_the_bytes(files: dict[str, Path]) -> None:
    """By name and in the order that was given."""
    with TrailingHashes(files) as hashes:
        assert list(hashes.result().items()) == list(expected(files).items())
    ticks: list[int] = []
    assert list(hash_files(files, tick=ticks.append).items()) == list(expected(files).items())
    assert sum(ticks) == sum(SIZES)
    with TrailingHashes({}) as none:
        assert none.result() == {}


def test_no_byte_is_read_before_it_was_written(tmp_path: Path) -> None:
    """A file is filled piece by piece, with a pause after each: the hash is that of the end."""
    path, data = tmp_path / "growing", os.urandom(100_000)
    path.write_bytes(b"\0" * len(data))
    with TrailingHashes({"growing": path}) as hashes, path.open("r+b", buffering=0) as file:
        for begin in range(0, len(data), 777):
            file.write(data[begin : begin + 777])
            hashes.allow(min(begin + 777, len(data)))
            time.sleep(0.001)
        assert hashes.result() == {"growing": hashlib.sha256(data).hexdigest()}


def test_a_reader_is_followed_at_a_distance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies far ahead of the reader stays unread, so that it is not pushed out of the cache again."""
    monkeypatch.setattr(hashing, "AHEAD_BYTES", 1000)
    path, data = tmp_path / "x", os.urandom(10_000)
    path.write_bytes(data)
    with TrailingHashes({"x": path}) as hashes:
        hashes.follow(0.0)
        time.sleep(0.05)
        with path.open("r+b") as file:  # who had read it by now would hash what was there before
            file.seek(5000)
            file.write(b"!" * 5000)
        assert hashes.result() == {"x": hashlib.sha256(data[:5000] + b"!" * 5000).hexdigest()}


def test_the_thread_ends_with_its_block(files: dict[str, Path]) -> None:
    """Also where nothing was allowed, and where something else went wrong."""

    def fails() -> None:
        with TrailingHashes(files):
            raise KeyError

    before = threading.active_count()
    with TrailingHashes(files):
        pass
    with pytest.raises(KeyError):
        fails()
    assert threading.active_count() == before


def test_a_wait_ends_where_the_work_is_cancelled(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the rest would take."""

    def stop(_: int = 0) -> None:
        raise Cancelled

    stuck = threading.Event()
    monkeypatch.setattr(hashing, "_digest", lambda *_: stuck.wait(10))

    def wait() -> None:
        hashes = TrailingHashes(files)
        try:
            hashes.result(stop)
        finally:
            stuck.set()
            hashes.close()

    with pytest.raises(Cancelled):
        wait()
    with pytest.raises(Cancelled):
        hash_files(files, tick=stop)


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    """A file that is not there, one that became shorter, and a pipe, which is not waited for."""
    with pytest.raises(CheckpointError, match="cannot be read"):
        TrailingHashes({"x": tmp_path / "none"})
    with pytest.raises(CheckpointError, match="cannot be read"):
        hash_files({"x": tmp_path / "none"})
    path = tmp_path / "x"
    path.write_bytes(b"12345678")
    with TrailingHashes({"x": path}) as hashes:
        path.write_bytes(b"1234")
        with pytest.raises(CheckpointError, match="became shorter"):
            hashes.result()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="cannot be read"):
        hash_files({"x": tmp_path / "pipe"})


def test_a_listing_has_the_hash_of_its_directory(tmp_path: Path) -> None:
    """Hashes that are known already need no second reading."""
    for name in ("b", "a"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    (tmp_path / "c.json").write_bytes(b"{}")
    hashes = hash_files({file.name: file for file in weights_files(tmp_path)})
    assert list(hashes) == ["a.safetensors", "b.safetensors"]
    assert listing_sha256(hashes) == weights_sha256(tmp_path)
