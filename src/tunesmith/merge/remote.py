"""A merge into a storage: a shard is one unit, and what is done of it lies beside the shards until all is done.

Nothing can be moved into place there.  A model without ``config.json`` is none to any loader, so that comes last; what
an error leaves is removed, unless the storage itself failed: then whole shards stay, and the same merge goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple
from pathlib import Path
from typing import Any

from tunesmith.checkpoint import (
    CONFIG_FILE,
    INDEX_FILE,
    StoragePath,
    cache_dir,
    check_target,
    failed_by_storage,
    read_json_object,
    remove_all,
    stamp_of,
    storage_path,
)
from tunesmith.errors import CheckpointError, OutputError, TunesmithError
from tunesmith.merge.journal import FileLedger, Journal
from tunesmith.merge.records import MergePlan
from tunesmith.merge.tiles import TileSums
from tunesmith.merge.work import UnitReceipt

_JOURNAL = ".tunesmith"


class StorageStage:
    """The target of a merge in a storage, while it is filled.

    Attributes:
        new: the target.
        root: where what is done is written down.
        keep: whether all stays where an error ends the work.
        shards: the names of the files of weights.
        small: the names of the others, the last one last.
        begun: whether it is written down there that this merge is under way.
    """

    def __init__(self, plan: MergePlan, fingerprint: str) -> None:
        target = storage_path(plan.out)
        assert isinstance(target, StoragePath), "asked for by the caller"  # noqa: S101
        self.new: StoragePath = target
        self.root = _journal_of(target)
        self.keep = self.begun = False
        self.fingerprint = fingerprint
        self.shards = tuple(shard.filename for shard in plan.shards)
        self.small = (*(asset.filename for asset in plan.assets), INDEX_FILE, CONFIG_FILE)

    def check(self) -> None:
        """See that nobody else has begun to write there.

        Raises:
            OutputError: somebody has; what lies there is theirs.
        """
        marker: dict[str, Any] | None = None
        with suppress(TunesmithError):  # a storage that fails says nothing of others
            marker = _object(_marker_of(self.new))
        if self.begun and marker is not None and marker.get("fingerprint") != self.fingerprint:
            self.keep = True
            raise OutputError(
                "Another merge has begun at the same target meanwhile.",
                where=self.new,
                next_step="wait for it to end, verify what it wrote, and choose another --out for this one",
            )

    def keep_only(self, names: set[str]) -> None:
        """Remove what an earlier, other merge left."""
        others = sorted(set(_own_files(self.new)) - names)
        remove_all(self.new, others)
        for name in others:
            _receipt_of(self.new, name).unlink(missing_ok=True)

    def publish(self) -> None:
        """Remove what was written down meanwhile: the model is whole."""
        with suppress(TunesmithError):  # it is in place; to report a failure now would be a lie
            self._forget()

    def clear(self) -> None:
        """Remove all that this merge wrote."""
        remove_all(self.new, (*self.small[::-1], *self.shards))
        self._forget()

    def _forget(self) -> None:
        for name in self.shards:
            _receipt_of(self.new, name).unlink(missing_ok=True)
        _marker_of(self.new).unlink(missing_ok=True)


def what_is_ours(target: StoragePath) -> tuple[str, ...]:
    """The names of what an unfinished merge of ours may have left at a target."""
    return (_JOURNAL, *_own_files(target))


def _own_files(target: StoragePath) -> tuple[str, ...]:
    try:
        names = read_json_object(_marker_of(target)).get("files")
    except CheckpointError:
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()


@contextmanager
def storage_stage(plan: MergePlan, fingerprint: str) -> Iterator[StorageStage]:
    """A target in a storage, to be filled and published.

    Args:
        plan: of the merge.
        fingerprint: what decides its bytes.

    Yields:
        The stage.

    Raises:
        OutputError: there are objects that are not ours, or of another merge, which may be under way; or the storage
            failed, and what was done stays.
    """
    stage = StorageStage(plan, fingerprint)
    check_target(stage.new, force=plan.force, own=what_is_ours(stage.new))
    if not plan.force and _object(_marker_of(stage.new)).get("fingerprint", fingerprint) != fingerprint:
        raise OutputError(
            "An unfinished merge of something else lies at the target.",
            where=stage.new,
            next_step="choose another --out; or, where that merge no longer runs, pass --force to begin anew there",
        )
    try:
        yield stage
    except BaseException as error:
        if isinstance(error, TunesmithError) and failed_by_storage(error):
            advice = (error.next_step or "mend that").removesuffix(", then repeat the command")
            raise OutputError(
                error.what,
                where=error.where,
                expected=error.expected,
                found=error.found,
                details=error.details,
                next_step=f"{advice}; repeat the same command: it goes on from the whole shards in {stage.new}",
            ) from error
        stage.check()
        if not stage.keep:
            with suppress(TunesmithError):
                stage.clear()
        raise


class StorageJournal(Journal):
    """What of a merge into a storage is done: an object for every shard."""

    def __init__(self, stage: StorageStage) -> None:
        self.stage, self.fingerprint = stage, stage.fingerprint
        self.entries: dict[tuple[str, int], dict[str, Any]] = {}
        marker = _object(_marker_of(stage.new))
        self.same = marker.get("fingerprint") == self.fingerprint
        if self.same:
            found = {name: _object(_receipt_of(stage.new, name)) for name in stage.shards}
            self.entries = {(name, 0): entry for name, entry in found.items() if entry}

    def begin(self, kept: Sequence[dict[str, Any]]) -> None:
        """Say what will be there; receipts of what is no longer so go."""
        for name in set(self.stage.shards) - {str(entry.get("file")) for entry in kept}:
            _receipt_of(self.stage.new, name).unlink(missing_ok=True)
        names = [*self.stage.shards, *self.stage.small]
        self._put(_marker_of(self.stage.new), {"fingerprint": self.fingerprint, "files": names})
        self.stage.begun = True

    def add(self, line: dict[str, Any]) -> None:
        """Write down one shard, where the target is still ours."""
        self.stage.check()
        self._put(_receipt_of(self.stage.new, str(line["file"])), line)

    def close(self) -> None:
        """Nothing is open."""

    def _put(self, path: Path, document: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(json.dumps(document).encode())


class StorageLedger(FileLedger):
    """One shard in a storage, which is one unit."""

    def holds(self, number: int, entry: dict[str, Any]) -> bool:
        """Believe an earlier merge where the storage's tag of the object is still the one that it had then."""
        if entry.get("end") != self.units[number].end or entry.get("stamp") != stamp_of(self.path):
            return False
        self.sha256 = entry.get("sha256")
        self.done[number] = {name: TileSums(*values) for name, values in entry["sums"].items()}
        return True

    def prepare(self) -> None:
        """An object is made by its upload."""

    def written(self, number: int, receipt: UnitReceipt, journal: Journal) -> None:
        """Take note of the shard."""
        self.done[number], self.sha256 = receipt.sums, receipt.sha256
        journal.add(
            {
                "file": self.path.name,
                "begin": 0,
                "end": self.units[number].end,
                "checksum": receipt.checksum,
                "sha256": receipt.sha256,
                "stamp": stamp_of(self.path),
                "sums": {name: astuple(kept) for name, kept in receipt.sums.items()},
            }
        )

    def flush(self) -> None:
        """What is uploaded is stored."""


def _journal_of(target: StoragePath) -> Path:
    """Where it is written down what is done: beside the objects; for the hub, where each would be a commit, here."""
    if target.scheme == "hf":
        return cache_dir() / "merges" / hashlib.sha256(str(target).encode()).hexdigest()[:32]
    return target / _JOURNAL


def _marker_of(target: StoragePath) -> Path:
    """The file that says that a target is being made, and of which files."""
    return _journal_of(target) / "merge.json"


def _receipt_of(target: StoragePath, name: str) -> Path:
    return _journal_of(target) / f"{name}.json"


def _object(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except CheckpointError as error:
        if failed_by_storage(error):
            raise
        return {}
