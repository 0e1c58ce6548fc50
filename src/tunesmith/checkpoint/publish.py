"""Directories that appear whole or not at all, and the copying that fills them."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tunesmith.checkpoint.hashing import hash_files
from tunesmith.checkpoint.storage import StoragePath
from tunesmith.checkpoint.upload import check_target
from tunesmith.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None  # type: ignore[assignment]

_CHUNK_BYTES = 8 << 20


def check_out_dir(out: Path, *, force: bool, inputs: dict[str, Path], own: tuple[str, ...] = ()) -> None:
    """Refuse a target that could cost the user something.

    Args:
        out: the directory to be made.
        force: whether a non-empty directory may be replaced.
        inputs: directories that are read, by what they are; the target may not be, hold, or lie in one of them.
        own: of a target in a storage: names of objects that an unfinished work of ours left there.

    Raises:
        OutputError: the target is a file, is not empty without ``force``, is an input, or cannot be made.
    """
    target = out.resolve()
    for role, path in inputs.items():
        source = path.resolve()
        if target == source or target in source.parents or source in target.parents:
            raise OutputError(
                f"The target overlaps the {role}, which is never written.",
                where=out,
                found=f"{role}: {path}",
                next_step="choose another --out",
            )
    if isinstance(out, StoragePath):
        check_target(out, force=force, own=own)
        return
    if out.exists() and not out.is_dir():
        raise OutputError("The target is a file.", where=out, expected="a new or empty directory")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise OutputError(
            "The target directory is not empty.",
            where=out,
            expected="a new or empty directory",
            next_step="choose another --out, or pass --force to replace it",
        )
    parent = next(folder for folder in target.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError("The target's parent directory cannot be written.", where=parent)


def check_free_space(out: Path, needed_bytes: int) -> int | None:
    """Refuse to begin what cannot end.

    Returns:
        The bytes that are free; None of a storage, which does not tell.

    Raises:
        OutputError: the file system of ``out`` has less than ``needed_bytes`` free.
    """
    if isinstance(out, StoragePath):
        return None
    folder = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OutputError(
            "There is not enough disk space.",
            where=folder,
            expected=f"{needed_bytes / 2**20:,.0f} MiB free",
            found=f"{free / 2**20:,.0f} MiB free",
            next_step="free some space, or choose an --out on another disk",
        )
    return free


@contextmanager
def staged_directory(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Fill a directory beside ``out`` and move it into place at the end; on any error nothing is left.

    Args:
        out: the directory to publish.
        force: replace a non-empty one, which stays whole until the new one is.

    Yields:
        The directory to fill.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    target = out.resolve()
    made = _make_parents(target.parent)
    stage: Path | None = None
    try:
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        stage.chmod(0o777 & ~_umask())
        yield stage
        for file in stage.rglob("*"):
            if file.is_file():
                _fsync(file)
        _fsync(stage)
        _swap(stage, target, force=force)
    except BaseException as error:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
        _remove_empty(made)
        if isinstance(error, OSError):
            raise write_error(error, target) from error
        raise


class Stage:
    """A directory beside the target in which the new one is made; it outlives what stops the work, and is gone on with.

    Attributes:
        target: the directory to publish.
        root: the stage, ``.NAME.partial`` beside the target; whoever works in it holds a lock on it.
        new: the directory to fill.
        keep: whether the stage stays when the work ends in an error that is not the system's own.
    """

    def __init__(self, target: Path, *, force: bool) -> None:
        self.target, self.force = target, force
        self.root = stage_of(target)
        self.new = self.root / "new"
        self._replaced = self.root / "replaced"
        self.keep = False

    @property
    def holds_the_old(self) -> bool:
        """Whether the directory that is replaced lies aside, with nothing in its place yet."""
        return self._replaced.exists() and self.new.exists()

    def keep_only(self, names: set[str]) -> None:
        """Remove what an earlier, other work left."""
        for stray in self.new.iterdir():
            if stray.name not in names:
                stray.unlink()

    def recover(self) -> None:
        """Put back what a kill between the two renames of :meth:`publish` left aside.

        Raises:
            OutputError: somebody has made another directory in its place meanwhile, or the target is not empty.
        """
        if self._replaced.is_dir():
            if self.target.is_dir() and not any(self.target.iterdir()):
                self.target.rmdir()
            if not self.target.exists():
                self._replaced.rename(self.target)
                _fsync(self.target.parent)
            elif self.new.exists():
                raise OutputError(
                    "An earlier merge stopped while it replaced the target, and another target was made since.",
                    where=self._replaced,
                    expected=f"nothing at {self.target}",
                    next_step="move one of the two away",
                )
            else:
                shutil.rmtree(self._replaced, ignore_errors=True)
        if not self.force and self.target.is_dir() and any(self.target.iterdir()):
            raise OutputError("The target directory is not empty.", where=self.target, next_step="pass --force")
        self.new.mkdir(exist_ok=True)

    def publish(self) -> None:
        """Move the new directory into place, all of it on the disk; the old one is whole until then.

        Raises:
            OSError: something failed; the old directory is in its place, and the new one in the stage.
        """
        for file in self.new.rglob("*"):
            if file.is_file():
                _fsync(file)
        _fsync(self.new)
        try:
            if self.force and self.target.is_dir() and any(self.target.iterdir()):
                self.target.rename(self._replaced)
            self.new.rename(self.target)
        except BaseException:
            if self._replaced.exists() and not self.target.exists():
                self._replaced.rename(self.target)
            raise
        with suppress(OSError):  # it is in place; to report a failure now would be a lie
            _fsync(self.target.parent)


def stage_of(target: Path) -> Path:
    """Where the stage of a target is."""
    return target.parent / f".{target.name}.partial"


def done_bytes(out: Path) -> int:
    """How much disk space an unfinished stage of a target takes, which the same work will not need again."""
    if isinstance(out, StoragePath):
        return 0
    new = stage_of(out.resolve()) / "new"
    if not new.is_dir():
        return 0
    return sum(min(stat.st_size, stat.st_blocks * 512) for stat in (file.stat() for file in new.iterdir()))


@contextmanager
def resumable_stage(out: Path, *, force: bool = False) -> Iterator[Stage]:
    """A stage that an earlier, killed work into the same target may have left half filled.

    It is removed at the end, and whenever the work is refused or cancelled.  Where the system fails (a full disk, a
    broken one) it stays.

    Args:
        out: the directory to publish.
        force: replace a non-empty one, which stays whole until the new one is.

    Yields:
        The stage, locked.

    Raises:
        OutputError: another process works in it, or the disk is full or cannot be written.
    """
    target = out.resolve()
    made = _make_parents(target.parent)
    stage = Stage(target, force=force)
    try:
        lock = _lock(stage.root)
    except OSError as error:
        _remove_empty(made)
        raise write_error(error, target) from error
    try:
        stage.recover()
        yield stage
        shutil.rmtree(stage.root, ignore_errors=True)
    except BaseException as error:
        if stage.keep or isinstance(error, OSError):
            if isinstance(error, OSError):
                raise write_error(error, target, resume=stage.root) from error
            raise
        if not stage.holds_the_old:  # what could not be put back is not thrown away
            shutil.rmtree(stage.root, ignore_errors=True)
        _remove_empty(made)
        raise
    finally:
        os.close(lock)


def _lock(root: Path) -> int:
    """Lock a directory, made where it is not there; the lock ends with the process, however that ends."""
    while True:
        root.mkdir(exist_ok=True)
        descriptor = os.open(root, os.O_RDONLY)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if root.exists() and os.path.samestat(os.fstat(descriptor), root.stat()):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise OutputError(
                "Another process is writing this target.",
                where=root,
                next_step="wait for it to end, or choose another --out",
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # whoever held it has finished and removed it: take the new one


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def write_error(error: OSError, where: Path, *, resume: Path | None = None) -> OutputError:
    """What a failed write means to the user.

    Args:
        error: the system's own.
        where: what was to be written.
        resume: the stage that stays, for the same work to go on from.
    """
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    what = "The disk is full" if full else "The target cannot be written"
    if resume is not None:
        return OutputError(
            f"{what}; what was done so far stays in {resume}.",
            where=where,
            found=error.strerror or error,
            next_step=f"{'free some space' if full else 'mend that'} and repeat the same command, which goes on from "
            f"there; or remove {resume}",
        )
    if full:
        return OutputError(
            f"{what}; nothing was left behind.",
            where=where,
            found=error.strerror,
            next_step="free some space, or choose a target on another disk",
        )
    return OutputError("The target cannot be written.", where=where, found=error.strerror or error)


def copy_range(source: int, target: int, offset: int, count: int, *, to: int | None = None) -> None:
    """Copy bytes of one open file to another, in the kernel where it can.

    Args:
        source: descriptor of the file to read.
        target: descriptor of the file to write.
        offset: where the bytes begin in the source.
        count: how many.
        to: where they go in the target; None for the same offset.
    """
    shift = 0 if to is None else to - offset
    end = offset + count
    while offset < end:
        try:
            copied = os.copy_file_range(source, target, min(end - offset, 1 << 30), offset, offset + shift)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in (
                errno.EXDEV,
                errno.ENOSYS,
                errno.EOPNOTSUPP,
                errno.EINVAL,
            ):
                raise
            data = os.pread(source, min(end - offset, _CHUNK_BYTES), offset)
            copied = write_at(target, data, offset + shift)
        if copied == 0:
            raise OSError(errno.EIO, "the source became shorter while it was copied")
        offset += copied


def write_at(target: int, data: bytes | memoryview, offset: int) -> int:
    """Write all of ``data`` at ``offset`` of an open file; returns how many bytes that were."""
    view = memoryview(data).cast("B")
    written = 0
    while written < len(view):
        written += os.pwrite(target, view[written:], offset + written)
    return written


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(path)


def weights_sha256(directory: Path, *, tick: Callable[[int], None] = lambda _: None) -> str:
    """One hash for all safetensors files of a directory: the SHA-256 of ``sha256sum``'s own listing of them.

    Args:
        directory: the directory.
        tick: told of every few bytes that were hashed.

    Raises:
        CheckpointError: a file cannot be read.
    """
    return listing_sha256(hash_files({file.name: file for file in weights_files(directory)}, tick=tick))


def weights_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory, by name."""
    return [file for file in sorted(directory.glob("*.safetensors")) if file.is_file()]  # no pipe, which would block


def listing_sha256(hashes: Mapping[str, str]) -> str:
    """The SHA-256 of ``sha256sum``'s own listing.

    Args:
        hashes: of every file, by its name, in the order of the listing.
    """
    listing = "".join(f"{digest}  {name}\n" for name, digest in hashes.items())
    return hashlib.sha256(listing.encode()).hexdigest()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _make_parents(folder: Path) -> list[Path]:
    """Make a folder and its parents; returns those that were not there, innermost first."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(error, folder) from error
    return missing


def _swap(stage: Path, target: Path, *, force: bool) -> None:
    if not (force and target.is_dir() and any(target.iterdir())):
        stage.rename(target)
        _fsync(target.parent)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.replaced-", dir=target.parent))
    try:
        target.rename(aside)
        stage.rename(target)
        _fsync(target.parent)
    finally:  # whatever stopped it: the old one is deleted only where the new one is in its place
        if not target.exists():
            aside.rename(target)
        elif not stage.exists():
            shutil.rmtree(aside, ignore_errors=True)
        elif not any(aside.iterdir()):
            aside.rmdir()


def _fsync(path: Path) -> None:
    if os.name == "nt":  # Windows can neither open a directory nor needs to
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
