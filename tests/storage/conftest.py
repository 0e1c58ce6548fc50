"""Models in a storage: fsspec's own one in memory, with what was asked of it written down."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

Answer = Callable[[int, int, bytes], bytes]


@dataclass
class Asked:
    """What was asked of the storage in memory.

    Attributes:
        ranges: every read, as name, start and stop.
        answer: what an answer of a read becomes, by how many reads there were before, where it began, and its bytes.
    """

    ranges: list[tuple[str, int, int]] = field(default_factory=list)
    answer: Answer = lambda _count, _start, data: data

    @property
    def total(self) -> int:
        """How many bytes were read."""
        return sum(stop - start for _, start, stop in self.ranges)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    """The storage in memory, empty at first and at last."""
    seen = Asked()
    plain = MemoryFileSystem.cat_file

    def cat_file(self: Any, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        data = plain(self, path, start=start, end=end, **options)
        count = len(seen.ranges)
        seen.ranges.append((path, start or 0, (start or 0) + len(data)))
        return seen.answer(count, start or 0, data)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    monkeypatch.setattr("tunesmith.checkpoint.storage._FIRST_WAIT_S", 0.001)
    _clear()
    yield seen
    _clear()


def _clear() -> None:
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def upload(folder: Path, url: str) -> str:
    """Put the files of a directory into a storage."""
    fs, key = fsspec.url_to_fs(url)
    for file in folder.iterdir():
        if file.is_file():
            fs.pipe_file(f"{key}/{file.name}", file.read_bytes())
    return url


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a directory by name."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}
