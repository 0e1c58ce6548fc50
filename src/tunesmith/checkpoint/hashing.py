"""SHA-256 of whole files: in a thread behind those who write or read them, on all cores at once, or on a cluster.

hashlib lets go of the interpreter while it works, and what was just written or read still lies in the page cache.  So
the hashes of a merge cost a core's time, and no second pass over the disk.  On a cluster what is in whose cache is not
known, and one machine would hold up the others: there a file is a unit of work.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from types import TracebackType

from tunesmith.checkpoint.header import open_regular
from tunesmith.checkpoint.storage import stored_path
from tunesmith.errors import Cancelled, CheckpointError
from tunesmith.executors import ClusterExecutor

AHEAD_BYTES = 1 << 30

_CHUNK_BYTES = 1 << 20
_LOOK_EVERY_S = 0.05


class TrailingHashes:
    """The hashes of some files, one after another, by a thread that stays behind whoever works on them.

    It reads no byte before :meth:`allow` or :meth:`follow` says that it may, and is ended by :meth:`close`, or where
    the block of a ``with`` is left.

    Args:
        files: the files by name, in the order in which they are worked on; each has its full size by now.
        executor: what does the work.  A cluster hashes each file as soon as all of it may be read, as many at once as
            it has slots; for any other executor, and for None, the thread itself reads.

    Raises:
        CheckpointError: a file is not there.

    Attributes:
        total_bytes: the size of all of them.
    """

    def __init__(self, files: Mapping[str, Path], executor: Executor | None = None) -> None:
        try:
            self._files = [(name, path, path.stat().st_size) for name, path in files.items()]
        except OSError as error:
            raise CheckpointError("The file cannot be read.", where=error.filename, found=error.strerror) from error
        self.total_bytes = sum(size for _, _, size in self._files)
        self._cluster = executor if isinstance(executor, ClusterExecutor) else None
        self._hashes: dict[str, str] = {}
        self._error: Exception | None = None
        self._allowed = 0
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="hashes", daemon=True)
        if self._files:
            self._thread.start()

    def allow(self, count: int) -> None:
        """Let the first ``count`` bytes of all files together be read; what was allowed stays so."""
        with self._changed:
            self._allowed = max(self._allowed, count)
            self._changed.notify()

    def follow(self, share: float) -> None:
        """Stay at most ``AHEAD_BYTES`` ahead of a reader.

        Args:
            share: how much of all bytes the reader has read, from 0 to 1.
        """
        self.allow(AHEAD_BYTES + int(share * self.total_bytes))

    def result(self, check: Callable[[], None] = lambda: None) -> dict[str, str]:
        """Wait for the end; all may be read now.

        Args:
            check: called some times a second; what it raises ends the wait.

        Returns:
            The SHA-256 of every file, hexadecimal, by name.

        Raises:
            CheckpointError: a file cannot be read, or became shorter.
            OSError: the system could not read one.
            BrokenExecutor: the cluster is lost.
        """
        self.allow(self.total_bytes)
        while self._thread.is_alive():
            check()
            self._thread.join(_LOOK_EVERY_S)
        if self._error is not None:
            raise self._error
        return {name: self._hashes[name] for name, _, _ in self._files}

    def close(self) -> None:
        """End the thread, wherever it is."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._files:
            self._thread.join()

    def __enter__(self) -> TrailingHashes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        try:
            if self._cluster is None:
                self._hash_here()
            else:
                self._hash_on(self._cluster)
        except Exception as error:  # noqa: BLE001 - raised again where the result is asked for
            self._error = error

    def _hash_here(self) -> None:
        begin = 0
        for name, path, size in self._files:
            self._hashes[name] = _digest(path, size, partial(self._may_read, begin))
            begin += size

    def _hash_on(self, cluster: ClusterExecutor) -> None:
        running: dict[Future[str], str] = {}
        begin = 0
        try:
            for name, path, size in self._files:
                while len(running) >= max(1, cluster.slots):
                    self._collect(running)
                self._may_read(begin, size - 1)
                begin += size
                running[cluster.submit(hash_file, str(path.absolute()), size)] = name
            while running:
                self._collect(running)
        finally:
            for future in running:
                future.cancel()
            wait(running)  # what they read may be removed next

    def _collect(self, running: dict[Future[str], str]) -> None:
        """Take in what has ended within a moment."""
        done, _ = wait(running, timeout=_LOOK_EVERY_S, return_when=FIRST_COMPLETED)
        for future in done:
            self._hashes[running.pop(future)] = future.result()
        if self._stopped:
            raise Cancelled

    def _may_read(self, begin: int, done: int) -> int:
        """Wait until more than ``done`` bytes of the file that begins at ``begin`` may be read; returns how many."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._allowed > begin + done)
            if self._stopped:
                raise Cancelled
            return self._allowed - begin


def hash_file(path: str, size: int) -> str:
    """Hash a file: a cluster's unit of work.

    Args:
        path: the file.
        size: how many bytes it has.

    Returns:
        Its SHA-256, hexadecimal.

    Raises:
        CheckpointError: it became shorter, or is no regular file.
        OSError: it cannot be read, which may be otherwise the next time.
    """
    try:
        return _digest(Path(path), size, lambda _: size)
    except CheckpointError as error:
        cause = error.__cause__
        if not isinstance(cause, OSError):
            raise
    raise cause  # out here, for it must not be its own context's cause where it is pickled


def _digest(path: Path, size: int, may_read: Callable[[int], int]) -> str:
    """The hash of a file's first ``size`` bytes.

    Args:
        path: the file.
        size: how many.
        may_read: waits until more than so many bytes of it may be read, and says how many; what it raises ends this.
    """
    digest, buffer, done = hashlib.sha256(), memoryview(bytearray(_CHUNK_BYTES)), 0
    # Unbuffered: a buffer would hold bytes from beyond what may be read.
    with open_regular(path) as file, io.FileIO(file.fileno(), closefd=False) as raw:
        while done < size:
            count = raw.readinto(buffer[: min(_CHUNK_BYTES, may_read(done) - done, size - done)])
            if not count:
                raise CheckpointError("The file became shorter while it was read.", where=path)
            digest.update(buffer[:count])
            done += count
    return digest.hexdigest()


def hash_files(
    files: Mapping[str, Path],
    *,
    executor: Executor | None = None,
    tick: Callable[[int], None] = lambda _: None,
) -> dict[str, str]:
    """Hash files, as many at once as there are cores, or as a cluster has slots.

    Args:
        files: the files by name.
        executor: a cluster's executor, which then does it, each file a unit; all others have no part in it.
        tick: told of every few bytes that were hashed, by any of the threads; what it raises ends the work.  While a
            cluster is at work it is told of 0.

    Returns:
        The SHA-256 of every file, hexadecimal, by name.

    Raises:
        CheckpointError: a file is not there, is no regular file, cannot be read, or lies in a storage.
        BrokenExecutor: the cluster is lost.
    """
    if far := next((path for path in map(stored_path, files.values()) if path is not None), None):
        raise CheckpointError("What lies in a storage is not read again to be hashed.", where=far)
    if isinstance(executor, ClusterExecutor):
        with TrailingHashes(files, executor) as hashes:
            return hashes.result(lambda: tick(0))
    failed = threading.Event()

    def one(path: Path) -> str:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK_BYTES))
        try:
            with open_regular(path) as file:
                while not failed.is_set() and (count := file.readinto(buffer)):  # type: ignore[attr-defined]
                    digest.update(buffer[:count])
                    tick(count)
        except BaseException as error:
            failed.set()
            if isinstance(error, OSError):
                raise CheckpointError("The file cannot be read.", where=path, found=error.strerror or error) from error
            raise
        return digest.hexdigest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        largest_first = sorted(files, key=lambda name: -_size(files[name]))
        running = {name: pool.submit(one, files[name]) for name in largest_first}
        try:
            return {name: running[name].result() for name in files}
        except BaseException:
            failed.set()
            for future in running.values():
                future.cancel()
            raise


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # said where it is opened
        return 0
