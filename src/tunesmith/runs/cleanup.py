"""What of a run may be deleted without losing the fine-tune: planned first, deleted only on request.

Only files that nothing but resuming reads, and copies of a record that the run's root holds too.  Never an adapter, a
tokenizer, a configuration, a log or a data set, nothing that is not known, and nothing of the best checkpoint.
"""

from __future__ import annotations

import filecmp
import os
import re
import stat
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Literal

from tunesmith.errors import RunError
from tunesmith.record import Part, Record
from tunesmith.runs.files import classify, walk
from tunesmith.runs.records import Run, RunCheckpoint, RunFile

Reason = Literal["resuming", "duplicate"]
KeptReason = Literal["best_checkpoint", "resumable", "no_adapter", "inference", "resuming", "record", "unknown"]
FailedReason = Literal["gone", "changed", "not_a_file", "outside", "protected", "refused"]

RECENT_SECONDS = 600

STATE_KINDS = frozenset(
    {
        "optimizer",
        "scheduler",
        "scaler",
        "rng_state",
        "sampler_state",
        "deepspeed_optimizer",
        "deepspeed_model",
        "deepspeed_latest",
        "deepspeed_script",
        "fsdp_optimizer",
        "fsdp_model",
    }
)
COPIED_KIND = "training_args_bin"
_COPIED_BYTES = 2**20
_ADAPTERS = frozenset({"adapter_weights", "adapter_pickle", "mlx_weights"})
_UNFINISHED = frozenset({"run_unfinished", "steps_missing", "training_crashed"})
_STATE_FOLDER = re.compile(r"global_step\d+|optimizer_\d+|pytorch_model_fsdp_\d+|rng_state")
_KEPT_ORDER = ("best_checkpoint", "resumable", "no_adapter", "inference", "resuming", "record", "unknown")


class Removable(Part):
    """A file that may go.

    Attributes:
        path: relative to the run, with forward slashes.
        size_bytes: its size.
        kind: the key of its explanation.
        reason: ``resuming``, only training that is resumed reads it; ``duplicate``, the root holds the same bytes.
        modified_ns: when it was last written, in nanoseconds since 1970.
    """

    path: str
    size_bytes: int
    kind: str
    reason: Reason
    modified_ns: int


class Kept(Part):
    """Files that stay, and why.

    Attributes:
        reason: ``best_checkpoint``; ``resumable``, the last checkpoint of training that did not reach its end;
            ``no_adapter``, state with no adapter beside it, which may be all that there is of one; else what the files
            are needed for.
        checkpoint: the checkpoint that they are in; None where they are in several places.
        files: how many.
        size_bytes: their size.
    """

    reason: KeptReason
    checkpoint: str | None = None
    files: int
    size_bytes: int


class Cleanup(Record):
    """What of a run may go.

    Attributes:
        path: absolute directory of the run.
        files: what may go, by path.
        frees_bytes: what that frees; a file that has another name elsewhere frees nothing.
        kept: what stays, and why.
    """

    path: str
    files: tuple[Removable, ...]
    frees_bytes: int
    kept: tuple[Kept, ...]


class Failed(Part):
    """A file that was to go and is still there, or that was gone already.

    Attributes:
        path: relative to the run.
        reason: ``gone``; ``changed`` since it was planned; ``not_a_file``, or ``outside`` the run by now;
            ``protected``, of a kind that is never deleted; ``refused`` by the system.
        detail: the system's own words.
    """

    path: str
    reason: FailedReason
    detail: str | None = None


class Cleaned(Record):
    """What was deleted.

    Attributes:
        path: absolute directory of the run.
        removed: paths relative to the run.
        freed_bytes: what that freed.
        errors: what was not deleted.
    """

    path: str
    removed: tuple[str, ...]
    freed_bytes: int
    errors: tuple[Failed, ...] = ()


def plan_cleanup(run: Run) -> Cleanup:
    """What of a run may go; nothing is deleted.

    Args:
        run: the run.

    Returns:
        Files that only resuming reads, in checkpoints that hold their adapter and are not the best one, and
        ``training_args.bin`` of checkpoints where the root has the same.  Training that did not reach its end keeps the
        state of its last checkpoint, so that it can be resumed.
    """
    judge, root = _Judge(run), Path(run.path)
    removable: list[tuple[Removable, os.stat_result]] = []
    kept: dict[tuple[KeptReason, str | None], list[int]] = {}
    for file in run.files:
        may_go, why, checkpoint = judge(file)
        status = _regular(root / file.path) if may_go else None
        if may_go and status is not None:
            removable.append((_removable(file, status, may_go), status))
        else:
            kept.setdefault((why, checkpoint), []).append(file.size_bytes)
    return Cleanup(
        path=run.path,
        files=tuple(file for file, _ in removable),
        frees_bytes=_freed([status for _, status in removable]),
        kept=tuple(
            Kept(reason=why, checkpoint=checkpoint, files=len(sizes), size_bytes=sum(sizes))
            for (why, checkpoint), sizes in sorted(kept.items(), key=lambda item: _KEPT_ORDER.index(item[0][0]))
        ),
    )


def apply_cleanup(cleanup: Cleanup, *, allow_recent: bool = False) -> Cleaned:
    """Delete what was planned, each file only if it is still what it was.

    A file that another process has changed, moved or put a link in place of stays, and is reported; the others go on.
    Folders of DeepSpeed's or FSDP's state that become empty go too.

    Args:
        cleanup: the plan.
        allow_recent: delete although the run was written to in the last ten minutes.

    Returns:
        What was deleted, and what was not.

    Raises:
        RunError: the run is not there, or may still be training; nothing was deleted.
    """
    root = Path(cleanup.path)
    if not root.is_dir():
        raise RunError("The run directory is not there.", where=root, expected="the directory that was planned for")
    root = root.resolve()
    if not allow_recent:
        _refuse_recent(root)
    removed, freed, errors = [], 0, []
    for file in cleanup.files:
        try:
            freed += _remove(root, file)
        except _StaysError as error:
            errors.append(Failed(path=file.path, reason=error.reason, detail=error.detail))
        else:
            removed.append(file.path)
    _remove_empty(root, removed)
    return Cleaned(path=cleanup.path, removed=tuple(removed), freed_bytes=freed, errors=tuple(errors))


class _Judge:
    """Whether each file of a run may go, and if not, why it stays."""

    def __init__(self, run: Run) -> None:
        self._root = Path(run.path)
        self._checkpoints: dict[str, RunCheckpoint] = {}
        for checkpoint in run.checkpoints:
            with suppress(ValueError):
                self._checkpoints[_folder(Path(checkpoint.path).relative_to(self._root).as_posix())] = checkpoint
        self._with_adapter = {
            _folder_of(file.path) for file in run.files if file.kind in _ADAPTERS and file.size_bytes > 0
        }
        unfinished = any(finding.code in _UNFINISHED for finding in run.findings)
        self._resumable = self._last_with_state(run) if unfinished else None

    def __call__(self, file: RunFile) -> tuple[Reason | None, KeptReason, str | None]:
        """Why a file may go, or None; why it stays if it does; and the checkpoint that this is about."""
        inside = self._inside(file.path)
        if inside is not None and inside.is_best and (file.kind in STATE_KINDS or inside.path != str(self._root)):
            return None, "best_checkpoint", inside.name
        if file.kind in STATE_KINDS:
            if self._of_checkpoint(file.path) is None:
                return None, "no_adapter", None
            if inside is not None and inside is self._resumable:
                return None, "resumable", inside.name
            return "resuming", "resuming", None
        in_checkpoint = inside is not None and inside.path != str(self._root) and inside is not self._resumable
        copied = file.kind == COPIED_KIND and in_checkpoint
        return ("duplicate" if copied and self._same_at_root(file) else None), file.needed_for, None

    def _inside(self, path: str) -> RunCheckpoint | None:
        """The checkpoint in whose folder, however deep, a file is."""
        folders = [_folder(parent.as_posix()) for parent in PurePosixPath(path).parents]
        return next((self._checkpoints[folder] for folder in folders if folder in self._checkpoints), None)

    def _of_checkpoint(self, path: str) -> RunCheckpoint | None:
        """The checkpoint whose state a file is, where its adapter is there too."""
        folder = PurePosixPath(path).parent
        home = _folder((folder.parent if _STATE_FOLDER.fullmatch(folder.name) else folder).as_posix())
        return self._checkpoints.get(home) if home in self._with_adapter else None

    def _last_with_state(self, run: Run) -> RunCheckpoint | None:
        holders = [self._inside(file.path) for file in run.files if file.kind in STATE_KINDS]
        return max(filter(None, holders), key=lambda checkpoint: checkpoint.step or 0, default=None)

    def _same_at_root(self, file: RunFile) -> bool:
        """Whether the root holds the same bytes under the same name."""
        copy, original = self._root / file.path, self._root / PurePosixPath(file.path).name
        if file.size_bytes > _COPIED_BYTES or not (_regular(copy) and _regular(original)):
            return False
        with suppress(OSError):
            return filecmp.cmp(copy, original, shallow=False)
        return False


def _folder(path: str) -> str:
    return "" if path == "." else path


def _folder_of(path: str) -> str:
    return path.rpartition("/")[0]


def _removable(file: RunFile, status: os.stat_result, reason: Reason) -> Removable:
    return Removable(
        path=file.path, size_bytes=status.st_size, kind=file.kind, reason=reason, modified_ns=status.st_mtime_ns
    )


def _regular(path: Path) -> os.stat_result | None:
    """The status of a regular file that is no link; else None."""
    try:
        status = path.lstat()
    except (OSError, ValueError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _freed(statuses: list[os.stat_result]) -> int:
    """What deleting all of these frees: a file with further names elsewhere keeps its bytes."""
    names = Counter((status.st_dev, status.st_ino) for status in statuses)
    last = {(status.st_dev, status.st_ino): status for status in statuses}
    return sum(status.st_size for place, status in last.items() if names[place] >= status.st_nlink)


def _refuse_recent(root: Path) -> None:
    newest = max(walk(root).entries, key=lambda entry: entry.status.st_mtime, default=None)
    if newest is None or time.time() - newest.status.st_mtime >= RECENT_SECONDS:
        return
    raise RunError(
        "The run may still be training.",
        where=root / newest.path,
        expected=f"no file written in the last {RECENT_SECONDS // 60} minutes",
        found=f"it was written {max(0, round(time.time() - newest.status.st_mtime))} seconds ago",
        next_step="wait until the training has ended",
    )


class _StaysError(Exception):
    """A file is not deleted."""

    def __init__(self, reason: FailedReason, detail: str | None = None) -> None:
        super().__init__(reason)
        self.reason: FailedReason = reason
        self.detail = detail


def _remove(root: Path, file: Removable) -> int:
    """Delete one file; the bytes that this frees.

    Raises:
        _StaysError: it is not what was planned, or the system refuses.
    """
    folder = root / PurePosixPath(file.path).parent
    path = folder / PurePosixPath(file.path).name
    if classify(file.path).kind not in {*STATE_KINDS, COPIED_KIND}:
        raise _StaysError("protected")
    try:
        if not folder.is_relative_to(root) or folder.resolve() != folder:
            raise _StaysError("outside")
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise _StaysError("not_a_file")
        if (status.st_size, status.st_mtime_ns) != (file.size_bytes, file.modified_ns):
            raise _StaysError("changed")
        path.unlink()
    except FileNotFoundError as error:
        raise _StaysError("gone") from error
    except (OSError, ValueError) as error:
        raise _StaysError("refused", getattr(error, "strerror", None) or str(error)) from error
    return status.st_size if status.st_nlink == 1 else 0


def _remove_empty(root: Path, removed: list[str]) -> None:
    folders = {PurePosixPath(path).parent for path in removed}
    for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
        if _STATE_FOLDER.fullmatch(folder.name):
            with suppress(OSError):  # not empty, so it stays
                (root / folder).rmdir()
