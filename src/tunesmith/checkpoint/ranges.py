"""Bytes of an object in a storage: just those that are asked for, as few requests as may be."""

from __future__ import annotations

import io
import os
import threading
from functools import partial
from typing import Any

from tunesmith.checkpoint.storage import StoragePath, WrongBytesError, asked, filesystem
from tunesmith.errors import CheckpointError

_REQUEST_BYTES = 16 << 20
HELD_BYTES = 96 << 20
_WINDOW_BYTES = 8 << 20
_WINDOWS = 4  # a thread: a merged model, its base, its adapter

_THREAD = threading.local()


class RangeFile(io.RawIOBase):
    """An object, open to be read; every read is a request of its own.

    Args:
        path: its address.

    Attributes:
        size: its size when it was opened.
    """

    def __init__(self, path: StoragePath) -> None:
        super().__init__()
        self.path, self.size, self._position = path, path.stat().st_size, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Begin the next read elsewhere."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read what is left, as much as fits."""
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self.size - self._position))
        read_into(self.path, view[:count], self._position)
        self._position += count
        return count


class RangeReader:
    """Reads of one object, the most of them in one range: that is asked for once, and held while it is read.

    Args:
        path: the object's address.
        held: where the range begins, and just past its end; beyond ``HELD_BYTES``, as much of it at once.
    """

    def __init__(self, path: StoragePath, held: tuple[int, int] = (0, 0)) -> None:
        self.path = path
        self._begin, self._end = held
        self._data, self._at = memoryview(b""), 0

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill memory with the bytes from ``offset`` on.

        Raises:
            CheckpointError: the storage does not give them.
        """
        if not self._begin <= offset <= offset + len(view) <= self._end:
            read_into(self.path, view, offset)
            return
        if not self._at <= offset <= offset + len(view) <= self._at + len(self._data):
            begin = self._begin if self._end - self._begin <= HELD_BYTES else offset
            end = min(self._end, max(begin + HELD_BYTES, offset + len(view)))
            self._data = memoryview(b"")  # before the next is made
            data = memoryview(bytearray(end - begin))
            read_into(self.path, data, begin)
            self._data, self._at = data, begin
        view[:] = self._data[offset - self._at : offset - self._at + len(view)]


def read_at(path: StoragePath, offset: int, count: int) -> bytes:
    """Read bytes of an object.

    Args:
        path: its address.
        offset: where they begin.
        count: how many.

    Raises:
        CheckpointError: the storage does not give just those, however often it is asked.
    """
    data = bytearray(count)
    read_into(path, memoryview(data), offset)
    return bytes(data)


def read_into(path: StoragePath, view: memoryview, offset: int) -> None:
    """Fill memory with the bytes of an object from ``offset`` on; as :func:`read_at`."""
    for start in range(0, len(view), _REQUEST_BYTES):  # for none, nothing is asked
        part = view[start : start + _REQUEST_BYTES]
        try:
            part[:] = asked(path, partial(_range, path, offset + start, len(part)))
        except FileNotFoundError as error:
            raise CheckpointError("The file cannot be read.", where=path, found="not there") from error


class _Window:
    """What was read ahead of one file."""

    def __init__(self, owner: object) -> None:
        self.owner, self.begin, self.data, self.next = owner, 0, b"", -1


def read_on(path: StoragePath, offset: int, count: int, *, end: int, owner: object) -> bytes:
    """Read bytes of an object; where a thread reads on and on, some more are asked for at once.

    Args:
        path: its address.
        offset: where they begin.
        count: how many.
        end: where reading on ends at the latest.
        owner: who reads; no other one is given what was read ahead for it, so that an object may change between two.

    Raises:
        CheckpointError: the storage does not give just those, however often it is asked.
    """
    windows: list[_Window] = _THREAD.__dict__.setdefault("windows", [])
    window = next((one for one in windows if one.owner is owner), None)
    if window is None:
        window = _Window(owner)
        windows[:] = [window, *windows[: _WINDOWS - 1]]
    goes_on, window.next = offset == window.next, offset + count
    begin = offset - window.begin
    if not 0 <= begin <= begin + count <= len(window.data):
        if not goes_on:
            return read_at(path, offset, count)
        window.data = b""
        window.begin, window.data = offset, read_at(path, offset, max(count, min(_WINDOW_BYTES, end - offset)))
        begin = 0
    return window.data[begin : begin + count]


def _range(path: StoragePath, offset: int, count: int) -> bytes:
    fs = filesystem(path)
    if path.scheme == "s3":
        said, data = _s3_range(fs, path.key, offset, count)
    elif path.scheme == "hf":
        said, data = _hub_range(fs, path.key, offset, count)
    else:
        said, data = "", fs.cat_file(path.key, start=offset, end=offset + count)
    if len(data) != count or (said and not said.startswith(f"bytes {offset}-{offset + count - 1}/")):
        raise WrongBytesError(f"{said or len(data)} for {count} bytes from byte {offset} on")
    return data


def _s3_range(fs: Any, key: str, offset: int, count: int) -> tuple[str, bytes]:
    """What S3 says that it gives, and gives; s3fs's own read keeps the former for itself."""
    from fsspec.asyn import sync

    async def ask() -> tuple[str, bytes]:
        bucket, name, _ = fs.split_path(key)
        answer = await fs._call_s3(
            "get_object", Bucket=bucket, Key=name, Range=f"bytes={offset}-{offset + count - 1}", **fs.req_kw
        )
        try:
            return answer.get("ContentRange", ""), await answer["Body"].read()
        finally:
            answer["Body"].close()

    found: tuple[str, bytes] = sync(fs.loop, ask)
    return found


def _hub_range(fs: Any, key: str, offset: int, count: int) -> tuple[str, bytes]:
    """What the hub says that it gives, and gives; its file system would list the repository before every read."""
    from huggingface_hub import constants, get_session, hf_hub_url
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import hf_raise_for_status

    headers = {**build_hf_headers(token=fs.token), "Range": f"bytes={offset}-{offset + count - 1}"}
    place = fs.resolve_path(key)
    url = hf_hub_url(
        place.repo_id, place.path_in_repo, repo_type=place.repo_type, revision=place.revision, endpoint=fs.endpoint
    )
    answer = get_session().get(url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    hf_raise_for_status(answer)
    return answer.headers.get("Content-Range", ""), answer.content
