"""Directories that appear whole or not at all, and the copying that fills them."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunesmith.errors import OutputError

_CHUNK_BYTES = 8 << 20


def check_out_dir(out: Path, *, force: bool, inputs: dict[str, Path]) -> None:
    """Refuse a target that could cost the user something.

    Args:
        out: the directory to be made.
        force: whether a non-empty directory may be replaced.
        inputs: directories that are read, by what they are; the target may not be, hold, or lie in one of them.

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


def check_free_space(out: Path, needed_bytes: int) -> None:
    """Refuse to begin what cannot end.

    Raises:
        OutputError: the file system of ``out`` has less than ``needed_bytes`` free.
    """
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
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        if isinstance(error, OSError):
            raise write_error(error, target) from error
        raise


def write_error(error: OSError, where: Path) -> OutputError:
    """What a failed write means to the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            "The disk is full; nothing was left behind.",
            where=where,
            found=error.strerror,
            next_step="free some space, or choose a target on another disk",
        )
    return OutputError("The target cannot be written.", where=where, found=error.strerror or error)


def copy_range(source: int, target: int, offset: int, count: int) -> None:
    """Copy ``count`` bytes at ``offset`` of one open file to the same place of another, in the kernel where it can."""
    end = offset + count
    while offset < end:
        try:
            copied = os.copy_file_range(source, target, min(end - offset, 1 << 30), offset, offset)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in (
                errno.EXDEV,
                errno.ENOSYS,
                errno.EOPNOTSUPP,
                errno.EINVAL,
            ):
                raise
            data = os.pread(source, min(end - offset, _CHUNK_BYTES), offset)
            copied = write_at(target, data, offset)
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


def weights_sha256(directory: Path) -> str:
    """One hash for all safetensors files of a directory: the SHA-256 of ``sha256sum``'s own listing of them."""
    listing = "".join(f"{sha256_of(file)}  {file.name}\n" for file in sorted(directory.glob("*.safetensors")))
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
