"""Writing to the hub: what is large is spooled here and becomes a commit, what is small goes together in one."""

from __future__ import annotations

import errno
import importlib.util
import logging
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tunesmith.checkpoint.storage import StoragePath, asked, filesystem
from tunesmith.errors import OutputError

HOME = "https://huggingface.co"

_LOUD = threading.Lock()
_quiet_for = 0
_before = (logging.WARNING, False)


class Spool:
    """One file for the hub, which is told its size and hash before the first byte is sent.

    Args:
        path: its address.

    Raises:
        OutputError: the disk is full.
    """

    def __init__(self, path: StoragePath) -> None:
        self.path = path
        self._file = tempfile.NamedTemporaryFile(prefix="tunesmith-")  # noqa: SIM115 - closed by its user

    def write(self, data: bytes) -> None:
        """Write on."""
        self._on_disk(lambda: self._file.write(data))

    def close(self) -> None:
        """Send the file, make the commit that names it, and remove it here.

        Raises:
            CheckpointError: the hub does not take it.
        """
        from huggingface_hub import CommitOperationAdd

        self._on_disk(self._file.flush)
        fs = filesystem(self.path)
        place = fs.resolve_path(self.path.key)
        by_xet = asked(self.path, lambda: takes_xet(fs.endpoint, place.repo_id, place.revision))

        def operations(folder: str) -> list[Any]:
            self._file.seek(0)
            # the client sends open files by LFS, whatever it has
            content: Any = self._file.name if by_xet else self._file.file
            return [CommitOperationAdd(folder + self.path.name, content)]

        _commit(self.path.parent, f"Add {self.path.name}", operations)
        self._file.close()

    def discard(self) -> None:
        """Remove what is here; nothing was sent."""
        self._file.close()

    def _on_disk(self, work: Callable[[], object]) -> None:
        try:
            work()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OutputError(
                "The disk is full.",
                where=tempfile.gettempdir(),
                expected="room for a shard of every worker, until it is sent",
                next_step="make room, set TMPDIR to another disk, or pass a smaller --shard-size",
            ) from error


def takes_xet(endpoint: str, repo_id: str, revision: str | None) -> bool:
    """Whether large files go by xet storage: where the client has it, and the hub does.

    The client takes it for granted of every hub; of others than Hugging Face's own the hub is asked.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils._headers import build_hf_headers

    if constants.HF_HUB_DISABLE_XET or importlib.util.find_spec("hf_xet") is None:
        return False
    if endpoint == HOME:
        return True
    url = f"{endpoint}/api/models/{repo_id}/xet-write-token/{(revision or 'main').replace('/', '%2F')}"
    answer = get_session().get(url, headers=build_hf_headers())
    return answer.status_code == 200 and "X-Xet-Cas-Url" in answer.headers


def commit_files(target: StoragePath, files: Mapping[str, bytes]) -> None:
    """Put small files below an address of the hub, all in one commit.

    Raises:
        CheckpointError: the hub does not take them.
    """
    from huggingface_hub import CommitOperationAdd

    _commit(
        target,
        f"Add {', '.join(files)}",
        lambda folder: [CommitOperationAdd(folder + name, data) for name, data in files.items()],
    )


def commit_removal(target: StoragePath, names: Iterable[str]) -> None:
    """Remove those of the files below an address of the hub that are there, in one commit.

    Raises:
        CheckpointError: the hub does not let them go.
    """
    from huggingface_hub import CommitOperationDelete

    there = {path.name for path in target.iterdir()} & set(names)
    if there:
        _commit(
            target,
            "Remove an unfinished merge",
            lambda folder: [CommitOperationDelete(folder + name, is_folder=False) for name in sorted(there)],
        )


def require_repository(target: StoragePath) -> None:
    """See that there is a repository: to make one is to publish, and that is asked for by another command.

    Raises:
        OutputError: there is none, or no such revision of it.
    """
    fs = filesystem(target)
    fs.invalidate_cache()  # it may have been made since
    try:
        asked(target, lambda: fs.resolve_path(target.key))
    except FileNotFoundError as error:
        raise OutputError(
            "There is no such repository, or no such revision of it.",
            where=target,
            next_step=f"make it first: hf repos create {'/'.join(target.key.split('/')[:2]).split('@')[0]} --private",
        ) from error


def _commit(target: StoragePath, message: str, operations: Callable[[str], list[Any]]) -> None:
    """Make one commit of what lies in the folder that ``operations`` is told; again where the hub has no time."""
    fs = filesystem(target)
    place = fs.resolve_path(target.key)
    folder = f"{place.path_in_repo}/" if place.path_in_repo else ""
    with quiet_client():
        asked(
            target,
            # anew every time, for the client remembers in them what it has done
            lambda: fs._api.create_commit(
                place.repo_id,
                operations(folder),
                commit_message=message,
                repo_type=place.repo_type,
                revision=place.revision,
            ),
        )


@contextmanager
def quiet_client() -> Iterator[None]:
    """Keep the hub's client from drawing bars and from telling of every try, with the addresses that it tried.

    For the whole process, while any of its threads is in here.
    """
    from huggingface_hub.utils import logging as told
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    global _quiet_for, _before
    with _LOUD:
        if not _quiet_for:
            _before = told.get_verbosity(), are_progress_bars_disabled()
            told.set_verbosity(logging.ERROR)
            disable_progress_bars()
        _quiet_for += 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        with _LOUD:
            _quiet_for -= 1
            if not _quiet_for:
                told.set_verbosity(_before[0])
                if not _before[1]:
                    enable_progress_bars()
