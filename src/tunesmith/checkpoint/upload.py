"""Writing to a storage: whole objects, streamed in order, there at their end or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from tunesmith.checkpoint.hub_commits import Spool, commit_files, commit_removal, require_repository
from tunesmith.checkpoint.storage import StoragePath, StoredStat, asked, explained, filesystem, is_theirs
from tunesmith.errors import CheckpointError, OutputError

_BLOCK_BYTES = 16 << 20  # of one part of an upload; S3 takes 10,000 of them
_OF_THE_HUB = (".gitattributes",)  # in every new repository


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
        with self._explained():
            if self.path.scheme == "hf":
                self._file = Spool(self.path)
            else:
                self._file = filesystem(self.path).open(self.path.key, "wb", block_size=_BLOCK_BYTES)
        return self

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Write bytes; every call goes on where the one before ended."""
        view = memoryview(data).cast("B")
        if offset != self.written:
            raise ValueError(f"an upload goes on at byte {self.written}, not {offset}")
        with self._explained():
            self._file.write(bytes(view))
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
            with self._explained():
                self._file.close()
                self.stored = self.path.stat()
        except BaseException:
            self._call_off()
            raise
        written = (self.written, self.sha256.hexdigest())
        there = (self.stored.st_size, self.stored.sha256 or written[1])
        if there != written:
            self._call_off()
            raise OutputError(
                "The storage holds other bytes than were written.",
                where=self.path,
                expected="{} bytes, SHA-256 {}".format(*written),
                found="{} bytes, SHA-256 {}".format(*there),
            )

    def _call_off(self) -> None:
        with suppress(Exception):  # what is wrong is told already
            self._file.discard()
        with suppress(AttributeError):
            self._file.closed = True  # or its end would complete it
        with suppress(Exception):
            remove(self.path)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            raise _as_output(error) from (error.__cause__ or error)
        except Exception as error:
            if not is_theirs(error):
                raise
            raise _as_output(explained(self.path, error)) from error


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


def put_all(target: Path, files: Mapping[str, bytes]) -> None:
    """Write small files below a directory or an address, in their order; to the hub, all at once.

    Raises:
        OutputError: the storage does not take one.
    """
    if not (isinstance(target, StoragePath) and target.scheme == "hf"):
        for name, data in files.items():
            (target / name).write_bytes(data)
        return
    try:
        commit_files(target, files)
    except CheckpointError as error:
        raise _as_output(error) from (error.__cause__ or error)


def remove_all(target: StoragePath, names: Iterable[str]) -> None:
    """Remove objects below an address, those that are there, in their order; from the hub, all at once.

    Raises:
        OutputError: the storage does not let one go.
    """
    if target.scheme != "hf":
        for name in names:
            remove(target / name)
        return
    try:
        commit_removal(target, names)
    except FileNotFoundError:
        pass
    except CheckpointError as error:
        raise _as_output(error) from (error.__cause__ or error)


def remove(path: StoragePath) -> None:
    """Remove an object, where there is one.

    Raises:
        OutputError: the storage does not let it go.
    """
    if path.scheme == "hf":
        remove_all(path.parent, [path.name])
        return
    try:
        asked(path, lambda: filesystem(path).rm_file(path.key))
    except FileNotFoundError:
        pass
    except CheckpointError as error:
        raise _as_output(error) from (error.__cause__ or error)


def check_target(target: StoragePath, *, force: bool, own: tuple[str, ...]) -> None:
    """Refuse a target in a storage that could cost the user something.

    Args:
        target: the address to be filled.
        force: whether the user asked to replace what is there.
        own: names of objects that an unfinished work of ours left there.

    Raises:
        OutputError: it is to be replaced, there are objects already, or there is no such repository of the hub.
    """
    if target.scheme == "hf":
        require_repository(target)
    try:
        there = {path.name for path in target.iterdir()} - {*_OF_THE_HUB, *own}
    except FileNotFoundError:
        return
    if not there and not target.is_file():
        return
    if force:
        raise OutputError(
            "What lies in a storage is not replaced.",
            where=target,
            found=", ".join(sorted(there)[:5]),
            next_step="choose another --out, or remove the objects there with the storage's own tool",
        )
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
