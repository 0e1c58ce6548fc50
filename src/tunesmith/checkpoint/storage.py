"""Where bytes are, if not on a disk: addresses such as ``s3://bucket/model``, read by range through fsspec.

A :class:`StoragePath` answers what the house asks of a ``Path``, so that the rest reads one as the other.  It is no
``os.PathLike``: what would open a local file of that name fails instead.  Credentials are the library's matter, from
its own environment; an address that holds some is refused, and none is ever part of a message.

Every request may fail and be repeated.  An answer of another length than what was asked for is a failure too: nothing
is ever filled up.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from tunesmith.errors import CheckpointError, MissingExtraError, OutputError, TunesmithError

if TYPE_CHECKING:
    from pathlib import Path as _PathBase
else:
    _PathBase = object

SCHEMES = ("s3", "gs", "gcs", "hf", "memory")

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)://(?P<key>.*)", re.DOTALL)
_COLLAPSED = re.compile(
    rf"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/(?P<key>[^/].*)|(?P<bare>{'|'.join(SCHEMES)}):", re.DOTALL
)
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
_LIBRARIES = ("aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "hf_xet", "httpcore", "httpcore2",
              "httpx", "httpx2", "huggingface_hub", "requests", "s3fs", "urllib3")  # fmt: skip
_CREDENTIALS = ("Credential", "TokenRetrieval", "LocalTokenNotFound")
_FINAL_STATUS = (400, 401, 402, 403, 413)
_FINAL = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
_STAMPS = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "last_modified", "mtime", "created")

_TRIES = 3  # beside those of the libraries
_FIRST_WAIT_S = 0.1  # doubled every time
_HUB_TRIES = 6  # its client has none of its own; and it makes one commit at a time, and tells others to come again
_HUB_FIRST_WAIT_S = 1.0

_T = TypeVar("_T")


@dataclass(frozen=True)
class StoredStat:
    """What a storage tells of one object.

    Attributes:
        st_mode: as of a file, or of a directory.
        st_size: bytes.
        stamp: its ETag, or its time; what another text of it has another one of.
        sha256: its SHA-256, of a storage that knows it.
    """

    st_mode: int
    st_size: int
    stamp: str
    sha256: str | None = None


class StoragePath(_PathBase):
    """The address of an object, or of all objects below a prefix.

    Args:
        scheme: one of ``SCHEMES``.
        key: bucket and key; what a file system of that scheme calls a path.
    """

    def __init__(self, scheme: str, key: str) -> None:
        self.scheme = scheme
        self.key = str(PurePosixPath(key.strip("/")))

    def __str__(self) -> str:
        return f"{self.scheme}://{self.key}"

    def __repr__(self) -> str:
        return f"StoragePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoragePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: PurePath) -> bool:
        return str(self) < str(other)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.scheme, self.key)

    def __truediv__(self, name: str | os.PathLike[str]) -> StoragePath:
        return type(self)(self.scheme, f"{self.key}/{os.fspath(name)}")

    @property
    def name(self) -> str:
        """The last part."""
        return PurePosixPath(self.key).name

    @property
    def stem(self) -> str:
        """The last part without its ending."""
        return PurePosixPath(self.key).stem

    @property
    def suffix(self) -> str:
        """The last part's ending."""
        return PurePosixPath(self.key).suffix

    @property
    def parent(self) -> StoragePath:
        """What it lies in; a bucket lies in itself."""
        above = str(PurePosixPath(self.key).parent)
        return self if above == "." else type(self)(self.scheme, above)

    @property
    def parents(self) -> tuple[StoragePath, ...]:
        """All that it lies in, innermost first."""
        return () if self.parent == self else (self.parent, *self.parent.parents)

    def with_name(self, name: str) -> StoragePath:
        """Another one beside it."""
        return self.parent / name

    def resolve(self, strict: bool = False) -> StoragePath:  # noqa: ARG002 - Path's own signature
        """Itself: nothing is relative, and there are no links."""
        return self

    absolute = expanduser = resolve

    def stat(self, *, follow_symlinks: bool = True) -> StoredStat:  # type: ignore[override]  # noqa: ARG002
        """What the storage tells of it, asked anew.

        Raises:
            FileNotFoundError: there is nothing.
            CheckpointError: the storage does not answer, or refuses.
        """
        info = self._asked(lambda fs: fs.info(self.key, **self._all_told(fs)))
        told = next((str(info[key]) for key in _STAMPS if info.get(key)), "")
        if info.get("type") == "directory":
            return StoredStat(stat.S_IFDIR, 0, told)
        sha256 = getattr(info.get("lfs"), "sha256", None)
        return StoredStat(stat.S_IFREG, int(info["size"]), told, sha256)

    def _all_told(self, fs: Any) -> dict[str, Any]:
        """The hub lists a file's whole directory and tells little of it, unless it is asked for all of that file."""
        return {"expand_info": True} if self.scheme == "hf" and fs.resolve_path(self.key).path else {}

    def exists(self, *, follow_symlinks: bool = True) -> bool:  # noqa: ARG002
        """Whether there is an object, or one below it."""
        return self._mode() is not None

    def is_file(self, *, follow_symlinks: bool = True) -> bool:  # noqa: ARG002
        """Whether it is an object."""
        return self._mode() == stat.S_IFREG

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:  # noqa: ARG002
        """Whether there are objects below it."""
        return self._mode() == stat.S_IFDIR

    def is_symlink(self) -> bool:
        """Never."""
        return False

    def iterdir(self) -> Iterator[StoragePath]:  # type: ignore[override]
        """What lies in it."""
        names = {PurePosixPath(str(key)).name for key in self._asked(lambda fs: fs.ls(self.key, detail=False))}
        return (self / name for name in sorted(names - {"", self.name}))

    def glob(self, pattern: str, **_: Any) -> Iterator[StoragePath]:  # type: ignore[override]
        """What lies in it and has such a name; nothing where there is nothing."""
        try:
            return (path for path in self.iterdir() if fnmatchcase(path.name, pattern))
        except FileNotFoundError:
            return iter(())

    def read_bytes(self) -> bytes:
        """All of it."""
        from tunesmith.checkpoint.ranges import read_at

        return read_at(self, 0, self.stat().st_size)

    def read_text(self, encoding: str | None = "utf-8", errors: str | None = None, newline: str | None = None) -> str:  # noqa: ARG002
        """All of it as text."""
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def write_bytes(self, data: Any) -> int:
        """Make it of these bytes."""
        from tunesmith.checkpoint.upload import put

        put(self, bytes(data))
        return len(data)

    def write_text(
        self,
        data: str,
        encoding: str | None = "utf-8",
        errors: str | None = None,
        newline: str | None = None,  # noqa: ARG002
    ) -> int:
        """Make it of this text."""
        return self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove it."""
        from tunesmith.checkpoint.upload import remove

        if not missing_ok:
            self.stat()
        remove(self)

    def mkdir(self, *_: Any, **__: Any) -> None:
        """Nothing: there are no directories."""

    def open(self, mode: str = "rb", *_: Any, **__: Any) -> Any:
        """Open it to read; every read is a request of its own."""
        if mode != "rb":
            raise ValueError(f"an object cannot be opened in mode {mode!r}")
        from tunesmith.checkpoint.ranges import RangeFile

        return RangeFile(self)

    def _mode(self) -> int | None:
        try:
            return self.stat().st_mode
        except FileNotFoundError:
            return None

    def _asked(self, ask: Callable[[Any], _T]) -> _T:
        return asked(self, lambda: ask(filesystem(self)))


def storage_path(path: str | os.PathLike[str]) -> Path:
    """A path of the disk, or an address of a storage, whichever it is.

    Args:
        path: either; ``file://`` is the disk.  A ``Path`` that was made of an address has lost a slash, and is known.

    Returns:
        A ``Path``; a :class:`StoragePath` for an address.

    Raises:
        CheckpointError: no such storage is known, or the address holds credentials.
    """
    if isinstance(path, StoragePath):
        return path
    text = os.fspath(path)
    match = _URL.fullmatch(text) or _COLLAPSED.fullmatch(text)
    if match is None:
        return Path(path)
    told = match.groupdict()
    scheme, key = (told["scheme"] or told["bare"]).lower(), told["key"] or ""
    if scheme == "file":
        return Path("/" + key.lstrip("/"))
    if scheme not in SCHEMES:
        if "://" not in text and os.path.lexists(text.partition("/")[0]):
            return Path(path)  # a folder whose name ends in a colon
        raise CheckpointError(
            "There is no such storage.",
            where=f"{scheme}://",
            expected="s3://, gs:// or hf://, or a path of this machine",
        )
    if "@" in key.split("/")[0] or (scheme != "hf" and re.search(r"[?#]", key)):
        raise CheckpointError(
            "An address must not hold credentials or a query.",
            where=f"{scheme}://",
            expected=f"{scheme}://bucket/path",
            next_step="give credentials by the storage's own environment variables or files",
        )
    if not key.strip("/"):
        raise CheckpointError("The address names no bucket.", where=text, expected=f"{scheme}://bucket/path")
    return StoragePath(scheme, key)


def stored_path(path: object) -> StoragePath | None:
    """The address that a text or a path is; None for one of the disk."""
    found = storage_path(path) if isinstance(path, str | os.PathLike | StoragePath) else None
    return found if isinstance(found, StoragePath) else None


def local_target(path: str | os.PathLike[str]) -> Path:
    """Where something is to be written that goes to a disk only.

    Args:
        path: of the disk; ``file://`` is that too.

    Raises:
        OutputError: an address of a storage, of whose scheme a folder would be made.
        CheckpointError: of a storage that is not known.
    """
    found = storage_path(path)
    if isinstance(found, StoragePath):
        raise OutputError("Only a merge writes to a storage.", where=found, expected="a path of this machine")
    return found


def filesystem(path: StoragePath) -> Any:
    """The file system of an address, made once a process by fsspec.

    Raises:
        MissingExtraError: the storage's package is not installed.
    """
    try:
        import fsspec

        # A listing that was kept would hide a change; the hub's file system keeps its own all the same.
        found = fsspec.filesystem(path.scheme, use_listings_cache=False)
    except ImportError as error:
        package = _PACKAGES.get(path.scheme, "fsspec")
        raise MissingExtraError("Object storage", "scale", package) from error
    if path.scheme == "hf":
        found.dircache.clear()
    return found


def asked(path: StoragePath, ask: Callable[[], _T]) -> _T:
    """Ask a storage, a few times where it fails.

    Args:
        path: what about.
        ask: the request.

    Raises:
        FileNotFoundError: there is nothing.
        CheckpointError: it refuses, or fails every time.
    """
    wait, tries = (_FIRST_WAIT_S, _TRIES) if path.scheme != "hf" else (_HUB_FIRST_WAIT_S, _HUB_TRIES)
    for left in reversed(range(tries)):
        try:
            return ask()
        except FileNotFoundError:
            raise
        except Exception as error:
            if not is_theirs(error):
                raise
            if not left or isinstance(error, _FINAL) or _lacks_credentials(error) or status_of(error) in _FINAL_STATUS:
                raise explained(path, error) from error
        time.sleep(wait)
        wait *= 2
    raise AssertionError("the last try returns or raises")


def failed_by_storage(error: TunesmithError) -> bool:
    """Whether an error says that a storage failed, so that the same work may do later."""
    return (
        error.__cause__ is not None
        and is_theirs(error.__cause__)
        and not isinstance(error.__cause__, FileNotFoundError)
    )


def stamp_of(path: Path) -> list[Any]:
    """What changes when a file does: its size, and its time or its storage's tag."""
    found = path.stat()
    return [found.st_size, found.stamp if isinstance(found, StoredStat) else found.st_mtime_ns]


class WrongBytesError(OSError):
    """A storage gave other bytes than were asked for."""


def is_theirs(error: BaseException) -> bool:
    """Whether an error is of a storage or of the way to it, and none of ours."""
    causes = causes_of(error) if type(error) is RuntimeError else [error]  # in which the hub's client wraps its own
    return any(isinstance(cause, OSError) or type(cause).__module__.split(".")[0] in _LIBRARIES for cause in causes)


def causes_of(error: BaseException) -> list[BaseException]:
    """An error and what it was raised from, the outermost first."""
    found: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in found:
        found.append(one)
        one = one.__cause__ or one.__context__
    return found


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error is about; None where it is about none."""
    for cause in causes_of(error):
        status = getattr(getattr(cause, "response", cause), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _lacks_credentials(error: Exception) -> bool:
    return any(mark in type(error).__name__ for mark in _CREDENTIALS)


def explained(path: StoragePath, error: Exception) -> CheckpointError:
    """What an error of a storage means to the user."""
    if _lacks_credentials(error):
        return CheckpointError(
            "There are no credentials for this storage.",
            where=path,
            found=type(error).__name__,
            next_step="give them by the storage's own environment variables or files; for S3, AWS_PROFILE or "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )
    if isinstance(error, PermissionError) or status_of(error) in (401, 403):
        return CheckpointError(
            "The storage refuses access.",
            where=path,
            found=_first_line(error),
            next_step="check the credentials and what they may read",
        )
    if isinstance(error, WrongBytesError):
        return CheckpointError("The storage gives other bytes than were asked for.", where=path, found=str(error))
    return CheckpointError(
        "The storage could not be reached, however often it was asked.",
        where=path,
        found=f"{type(error).__name__}: {_first_line(error)}",
        next_step="check the connection and the address, then repeat the command",
    )


def _first_line(error: Exception) -> str:
    """The beginning of a message, without the queries of addresses, which may be signed."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"\?\S+", "", lines[0])[:200]
