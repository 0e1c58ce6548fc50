"""What of a merge is done: a line for every unit, so that a killed merge goes on where it was.

The first line is the fingerprint of all that decides the bytes.  Then comes one line a unit, as they end: where it
lies, a checksum of its bytes (XXH3, 128 bits: against accidents, not against malice), and what rounding kept.  A line
is believed only where the bytes on the disk have that checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.merge.tiles import TileSums
from tunesmith.merge.units import Unit
from tunesmith.merge.work import Sums, UnitReceipt, checksum_of

JOURNAL_FILE = "journal.jsonl"


class Journal:
    """The journal of one stage.

    Args:
        path: its file.
        fingerprint: what decides the bytes; where the file has another, it is begun anew.

    Attributes:
        entries: the lines of an earlier merge, by file and by where the unit begins there.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        self.entries: dict[tuple[str, int], dict[str, Any]] = {}
        lines = _lines(path)
        self.same = bool(lines) and lines[0].get("fingerprint") == fingerprint
        if self.same:
            for line in lines[1:]:
                self.entries[str(line.get("file")), int(line["begin"])] = line
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
    """One output file, and which of its units are done.

    Attributes:
        path: the file, in the stage.
        units: its units, in the order of their bytes.
        done: what rounding kept in each that is, by its number.
        sha256: its hash, where its writer made it.
    """

    path: Path
    units: list[Unit]
    done: dict[int, Sums] = field(default_factory=dict)
    sha256: str | None = None

    @property
    def sums(self) -> Sums:
        """What rounding kept, by tensor, added up in the order of the file."""
        total: Sums = {}
        for number in sorted(self.done):
            for name, kept in self.done[number].items():
                total[name] = total.get(name, TileSums()) + kept
        return total

    def whole(self) -> bool:
        """Whether the file is there, at its full size."""
        return self.path.is_file() and self.path.stat().st_size == self.units[-1].end

    def holds(self, number: int, entry: dict[str, Any]) -> bool:
        """Read what an earlier merge wrote, and believe it where it has the checksum that the journal says.

        Args:
            number: the unit's.
            entry: the journal's line of it.
        """
        unit = self.units[number]
        if entry.get("end") != unit.end or checksum_of(self.path, unit.begin, unit.end) != entry.get("checksum"):
            return False
        self.done[number] = {name: TileSums(*values) for name, values in entry["sums"].items()}
        return True

    def prepare(self) -> None:
        """Make the file, at its full size; what is whole of it stays."""
        with self.path.open("ab") as file:
            file.truncate(self.units[-1].end)

    def written(self, number: int, receipt: UnitReceipt, journal: Journal) -> None:
        """Take note of a unit."""
        unit, sums = self.units[number], receipt.sums
        self.done[number] = sums
        journal.add(
            {
                "file": self.path.name,
                "begin": unit.begin,
                "end": unit.end,
                "checksum": receipt.checksum,
                "sums": {name: astuple(kept) for name, kept in sums.items()},
            }
        )

    def flush(self) -> None:
        """Bring what is written so far to the disk."""
        descriptor = os.open(self.path, os.O_RDWR)
        try:
            getattr(os, "fdatasync", os.fsync)(descriptor)
        finally:
            os.close(descriptor)
