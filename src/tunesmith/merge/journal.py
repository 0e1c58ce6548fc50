"""What of a merge is done: a line for every unit, so that a killed merge goes on where it was.

The first line is the fingerprint of all that decides the bytes.  Then comes one line a unit, in the order of each
file's bytes: how far the file is whole, the SHA-256 of all its bytes up to there, and what rounding kept.  A line is
believed only where the bytes on the disk have that hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.merge.tiles import TileSums
from tunesmith.merge.units import Unit

JOURNAL_FILE = "journal.jsonl"
_READ_BYTES = 1 << 18  # fits the second cache, so that the hash reads what was just copied there

Sums = dict[str, TileSums]


class Journal:
    """The journal of one stage.

    Args:
        path: its file.
        fingerprint: what decides the bytes; where the file has another, it is begun anew.

    Attributes:
        entries: the lines of an earlier merge by file name, in order.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        self.entries: dict[str, list[dict[str, Any]]] = {}
        lines = _lines(path)
        self.same = bool(lines) and lines[0].get("fingerprint") == fingerprint
        if self.same:
            for line in lines[1:]:
                self.entries.setdefault(str(line.get("file")), []).append(line)
        self._descriptor: int | None = None
        self._lock = threading.Lock()

    def begin(self, kept: Sequence[dict[str, Any]]) -> None:
        """Write the file anew with the lines that hold, and leave it open for more."""
        beside = self.path.with_suffix(".new")
        text = "".join(_sealed(line) for line in ({"fingerprint": self.fingerprint}, *kept))
        beside.write_text(text, encoding="utf-8")
        beside.replace(self.path)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def add(self, line: dict[str, Any]) -> None:
        """Add one line."""
        data = _sealed(line).encode()
        with self._lock:
            if self._descriptor is not None:
                while data:
                    data = data[os.write(self._descriptor, data) :]

    def close(self) -> None:
        """Leave the file as it is."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _sealed(line: dict[str, Any]) -> str:
    """A line with a hash of itself, so that one which was torn or edited is known."""
    return json.dumps({**line, "seal": _seal(line)}) + "\n"


def _seal(line: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(line, sort_keys=True).encode()).hexdigest()[:16]


def _lines(path: Path) -> list[dict[str, Any]]:
    """Every line up to the first that is not whole; a kill may have torn the last."""
    found: list[dict[str, Any]] = []
    try:
        for raw in path.read_bytes().splitlines():
            line = json.loads(raw)
            if not isinstance(line, dict) or line.pop("seal", None) != _seal(line):
                break
            found.append(line)
    except (OSError, ValueError):
        pass
    return found


@dataclass
class FileLedger:
    """One output file: which of its units are written, and the hash of all that is whole from its start.

    Attributes:
        path: the file, in the stage.
        units: its units, in the order of their bytes.
        sums: what rounding kept in those that are hashed.
        hashed: how many units that are.
    """

    path: Path
    units: list[Unit]
    sums: Sums = field(default_factory=dict)
    hashed: int = 0
    _ready: dict[int, Sums] = field(default_factory=dict)
    _hasher: Any = field(default_factory=hashlib.sha256)
    _busy: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def sha256(self) -> str:
        """The hash of all that is whole from the start."""
        return str(self._hasher.hexdigest())

    def check(self, entries: Sequence[dict[str, Any]], tick: Callable[[int], None]) -> list[dict[str, Any]]:
        """Read what an earlier merge wrote, and believe as much of it as has the hash that its journal says.

        Args:
            entries: the journal's lines of this file.
            tick: called with the bytes that were read.

        Returns:
            The lines that hold.
        """
        kept: list[dict[str, Any]] = []
        if not self.path.is_file() or self.path.stat().st_size != self.units[-1].end:
            return kept
        hasher = hashlib.sha256()
        for entry, unit in zip(entries, self.units, strict=False):
            if entry.get("end") != unit.end:
                break
            self._feed(hasher, unit)
            tick(unit.end - unit.begin)
            if hasher.hexdigest() != entry.get("sha256"):
                break
            self._hasher = hasher.copy()
            self._absorb({name: TileSums(*values) for name, values in entry["sums"].items()})
            kept.append(entry)
        return kept

    def prepare(self) -> None:
        """Make the file, at its full size; what is whole of it stays."""
        with self.path.open("ab") as file:
            file.truncate(self.units[-1].end)

    def written(self, number: int, sums: Sums) -> bool:
        """Take note of a unit; returns whether somebody must call :meth:`advance`."""
        with self._lock:
            self._ready[number] = sums
            if self._busy or self.hashed not in self._ready:
                return False
            self._busy = True
            return True

    def advance(self, journal: Journal) -> None:
        """Hash every unit that is written and has no gap before it, and put each into the journal."""
        while True:
            with self._lock:
                sums = self._ready.pop(self.hashed, None)
                if sums is None:
                    self._busy = False
                    return
            unit = self.units[self.hashed]
            self._feed(self._hasher, unit)
            journal.add(
                {
                    "file": self.path.name,
                    "end": unit.end,
                    "sha256": self.sha256,
                    "sums": {name: astuple(kept) for name, kept in sums.items()},
                }
            )
            self._absorb(sums)

    def flush(self) -> None:
        """Bring what is written so far to the disk."""
        descriptor = os.open(self.path, os.O_RDWR)
        try:
            getattr(os, "fdatasync", os.fsync)(descriptor)
        finally:
            os.close(descriptor)

    def _absorb(self, sums: Sums) -> None:
        for name, kept in sums.items():
            self.sums[name] = self.sums.get(name, TileSums()) + kept
        self.hashed += 1

    def _feed(self, hasher: Any, unit: Unit) -> None:
        buffer = memoryview(bytearray(_READ_BYTES))
        with self.path.open("rb", buffering=0) as file:
            file.seek(unit.begin)
            left = unit.end - unit.begin
            while left:
                count = file.readinto(buffer[: min(left, _READ_BYTES)])
                if not count:
                    raise OSError(f"{self.path} became shorter while it was read")
                hasher.update(buffer[:count])
                left -= count
