"""Writing to a storage: whole objects, streamed in order, there at their end or not at all."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from types import TracebackType
from typing import Any

import xxhash

from tunesmith.checkpoint.storage import StoragePath, StoredStat, asked, explained, filesystem, is_theirs
from tunesmith.errors import CheckpointError, OutputError

_BLOCK_BYTES = 16 << 20  # of one part of an upload; S3 takes 10,000 of them
_JOURNAL = ".tunesmith"
_MARKER = "merge.json"


class Upload:
    """One object that is written from its first byte to its last; used in a ``with``.

    Where the block is left by an error, the upload is called off and there is no object.

    Args:
        path: its address.

    Attributes:
        checksum: XXH3 of what was written.
        sha256: its SHA-256.
        written: how many bytes that were.
        stored: what the storage says of it, once it is whole.
    """

    stored: StoredStat

    def __init__(self, path: StoragePath) -> None:
        self.path = path
        self.checksum, self.sha256, self.written = xxhash.xxh3_128(), hashlib.sha256(), 0
        self._file: Any = None

    def __enter__(self) -> Upload:
        try:
            self._file = filesystem(self.path).open(self.path.key, "wb", block_size=_BLOCK_BYTES)
        except Exception as error:
            raise self._failure(error) from error
        return self

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Write bytes; every call goes on where the one before ended."""
        view = memoryview(data).cast("B")
        if offset != self.written:
            raise ValueError(f"an upload goes on at byte {self.written}, not {offset}")
        try:
            self._file.write(bytes(view))
        except Exception as error:
            raise self._failure(error) from error
        self.checksum.update(view)
        self.sha256.update(view)
        self.written += len(view)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._call_off()
            return
        try:
            self._file.close()
            self.stored = self.path.stat()
        except Exception as failure:
            self._call_off()
            raise self._failure(failure) from failure
        if self.stored.st_size != self.written:
            self._call_off()
            raise OutputError(
                "The storage holds another number of bytes than was written.",
                where=self.path,
                expected=self.written,
                found=self.stored.st_size,
            )

    def _call_off(self) -> None:
        with suppress(Exception):  # what is wrong is told already
            self._file.discard()
        with suppress(AttributeError):
            self._file.closed = True  # or its end would complete it
        with suppress(Exception):
            remove(self.path)

    def _failure(self, error: Exception) -> Exception:
        if isinstance(error, CheckpointError):
            return _as_output(error)
        return _as_output(explained(self.path, error)) if is_theirs(error) else error


def put(path: StoragePath, data: bytes) -> None:
    """Write a small object.

    Raises:
        OutputError: the storage does not take it.
    """
    try:
        asked(path, lambda: filesystem(path).pipe_file(path.key, data))
    except FileNotFoundError as error:
        raise OutputError("There is no such bucket.", where=path) from error
    except CheckpointError as error:
        raise _as_output(error) from (error.__cause__ or error)


def remove(path: StoragePath) -> None:
    """Remove an object, where there is one.

    Raises:
        OutputError: the storage does not let it go.
    """
    try:
        asked(path, lambda: filesystem(path).rm_file(path.key))
    except FileNotFoundError:
        pass
    except CheckpointError as error:
        raise _as_output(error) from (error.__cause__ or error)


def journal_of(target: StoragePath) -> StoragePath:
    """Where a target in a storage keeps what is done of it while it is made."""
    return target / _JOURNAL


def marker_of(target: StoragePath) -> StoragePath:
    """The object that says that a target is being made, and of which files."""
    return journal_of(target) / _MARKER


def check_target(target: StoragePath, *, force: bool, own: tuple[str, ...]) -> None:
    """Refuse a target in a storage that could cost the user something.

    Args:
        target: the address to be filled.
        force: whether the user asked to replace what is there.
        own: names of objects that an unfinished work of ours left there.

    Raises:
        OutputError: it is the hub's, it is to be replaced, or there are objects already.
    """
    if target.scheme == "hf":
        raise OutputError(
            "The hub is not written to by a merge.",
            where=target,
            expected="a directory, or an address such as s3://bucket/path",
            next_step="merge into a directory, then: tunesmith push DIR org/name",
        )
    if force:
        raise OutputError(
            "What lies in a storage is not replaced.",
            where=target,
            next_step="choose another --out, or remove the objects there with the storage's own tool",
        )
    try:
        there = {path.name for path in target.iterdir()} - {_JOURNAL, *own}
    except FileNotFoundError:
        return
    if there or target.is_file():
        raise OutputError(
            "There are objects at the target already.",
            where=target,
            expected="an address without objects",
            found=", ".join(sorted(there)[:5]),
            next_step="choose another --out",
        )


def _as_output(error: CheckpointError) -> OutputError:
    return OutputError(
        error.what, where=error.where, expected=error.expected, found=error.found, next_step=error.next_step
    )
