"""The Hugging Face hub: one commit with all files in it, resumed where it broke, compared with what was meant.

``upload_folder`` would make several commits of a large model, each of which somebody could load; so files are sent
ahead, and one commit then names them all.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tunesmith.checkpoint import quiet_client, takes_xet
from tunesmith.errors import OutputError
from tunesmith.export.push.failures import explained, wait_before_retry
from tunesmith.export.push.files import a_loader_would_read
from tunesmith.export.push.records import Pushed, PushFile, PushPlan
from tunesmith.progress import Cancellation, Progress, ProgressCallback

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

_MESSAGE = "Upload with tunesmith push"
_SMALL_BYTES = 1 << 20
_STAGE = "push"
_PATHS_AT_ONCE = 200
_ATTEMPTS = 4

Result = TypeVar("Result")


def push_to_hub(plan: PushPlan, *, progress: ProgressCallback, cancellation: Cancellation) -> Pushed:
    """Send a plan's files to the hub, and compare what lies there with what was meant.

    Args:
        plan: what to send.
        progress: told of bytes sent; of bytes that the hub had already, too.
        cancellation: read while files are sent.

    Returns:
        What lies there.

    Raises:
        OutputError: the hub, the network or the account does not allow it; says which, and what to do.
        Cancelled: stopped on request; no commit was made.
    """
    from huggingface_hub import get_token

    return explained(plan, get_token, partial(_push, plan, progress, cancellation))


def _push(plan: PushPlan, progress: ProgressCallback, cancellation: Cancellation) -> Pushed:
    from huggingface_hub import HfApi, get_token

    started = time.monotonic()
    if get_token() is None:
        raise OutputError(
            "Nobody is logged in to the hub.",
            where=plan.endpoint,
            expected="a token with write access",
            next_step="hf auth login, or set HF_TOKEN",
        )
    with quiet_client(), ExitStack() as opened:
        upload = _Upload(plan, HfApi(endpoint=plan.endpoint), progress, cancellation)
        head, foreign = upload.prepare()
        additions = upload.send(opened)
        upload.check_sent(additions)
        cancellation.check()
        commit = upload.commit(additions, foreign, head)
        upload.compare(commit)
    return Pushed(
        repo_id=plan.repo_id,
        to=plan.to,
        url=f"{plan.endpoint}/{plan.repo_id}" + (f"/tree/{plan.revision}" if plan.revision else ""),
        commit=commit,
        unchanged=commit == head,
        files=len(plan.files),
        size_bytes=plan.size_bytes,
        removed=foreign,
        seconds=time.monotonic() - started,
    )


class _Upload:
    """One push on its way."""

    def __init__(self, plan: PushPlan, api: HfApi, progress: ProgressCallback, cancellation: Cancellation) -> None:
        self._plan, self._api = plan, api
        self._report = _Report(plan.files, progress, cancellation)
        self._cancellation = cancellation

    def prepare(self) -> tuple[str, tuple[str, ...]]:
        """Make the repository where it is not there, and look what lies in it.

        Returns:
            The commit that the new one follows, and the files to be removed in it.

        Raises:
            OutputError: it is public where a private one was asked for, or holds files that a loader would mix up.
        """
        plan, api = self._plan, self._api
        self._again(lambda: api.create_repo(plan.repo_id, private=plan.private or None, exist_ok=True))
        info = self._again(lambda: api.model_info(plan.repo_id, revision=plan.revision))
        if plan.private and info.private is False:
            raise OutputError(
                "The repository is there already, and public; --private makes new ones only.",
                where=plan.repo_id,
                next_step="make it private in its settings, or choose another name",
            )
        head = str(info.sha)
        files = self._again(lambda: list(api.list_repo_tree(plan.repo_id, recursive=True, revision=head)))
        ours = {file.name for file in plan.files}
        there = [file.path for file in files if hasattr(file, "blob_id")]
        foreign = tuple(name for name in there if name not in ours and a_loader_would_read(name, plan.kind))
        if foreign and not plan.replace:
            raise OutputError(
                "The repository holds other files, which a loader would read together with these.",
                where=plan.repo_id,
                details=foreign[:10],
                next_step="push to another repository, or pass --replace to remove them in the same commit",
            )
        return head, foreign

    def send(self, opened: ExitStack) -> list[CommitOperationAdd]:
        """Send what is large ahead of the commit; what the hub has already is not sent again."""
        from huggingface_hub import CommitOperationAdd

        plan = self._plan
        by_xet = self._again(lambda: takes_xet(plan.endpoint, plan.repo_id, plan.revision))
        additions: dict[str, CommitOperationAdd] = {}
        for file in self._plan.files:
            self._cancellation.check()
            path = Path(self._plan.directory) / file.name
            content: Any
            # The client sends open files by LFS, whatever it has; and reading them tells how far they are.
            if file.text is not None:
                content = file.text.encode() if by_xet else io.BytesIO(file.text.encode())
            else:
                content = str(path) if by_xet else opened.enter_context(_Told(path, file.name, self._report))
            additions[file.name] = CommitOperationAdd(file.name, content)
        large = [additions[file.name] for file in self._plan.files if file.size_bytes > _SMALL_BYTES]
        small = [additions[file.name] for file in self._plan.files if file.size_bytes <= _SMALL_BYTES]
        self._report.begin()
        # By xet each alone, so that there is something to tell; by LFS several at once.
        batches = [[one] for one in large] if by_xet else [large]
        for batch in filter(None, [small, *batches]):
            self._cancellation.check()
            self._api.preupload_lfs_files(self._plan.repo_id, batch, revision=self._plan.revision, free_memory=False)
            self._report.whole([one.path_in_repo for one in batch])
        return list(additions.values())

    def check_sent(self, additions: Sequence[CommitOperationAdd]) -> None:
        """Refuse to commit what is not what was planned, as where a file was written meanwhile."""
        planned = {file.name: file.sha256 for file in self._plan.files}
        changed = [one.path_in_repo for one in additions if one.upload_info.sha256.hex() != planned[one.path_in_repo]]
        if changed:
            raise OutputError(
                "Files changed while they were sent; nothing was committed.",
                where=self._plan.directory,
                details=changed[:10],
                next_step="wait for what writes them to end, and push again",
            )

    def commit(self, additions: Sequence[CommitOperationAdd], foreign: Sequence[str], head: str) -> str:
        """Make the one commit that names all files.

        Returns:
            The commit; ``head`` where all of it lay there already.
        """
        from huggingface_hub import CommitOperationDelete

        plan = self._plan
        operations: list[Any] = [*additions, *(CommitOperationDelete(name, is_folder=False) for name in foreign)]
        try:
            made = self._again(
                lambda: self._api.create_commit(
                    plan.repo_id, operations, commit_message=_MESSAGE, revision=plan.revision, parent_commit=head
                )
            )
            return str(made.oid)
        except Exception:
            # The commit may have been made, and its answer lost; asked again, the hub then calls it a conflict.
            now = str(self._api.model_info(plan.repo_id, revision=plan.revision).sha)
            if now == head or self._wrong(now):
                raise
            return now

    def compare(self, commit: str) -> None:
        """Hold every file's hash in the repository against the plan's.

        Raises:
            OutputError: a file is another there, or is missing.
        """
        if wrong := self._wrong(commit):
            raise OutputError(
                "What lies in the repository is not what was sent.",
                where=f"{self._plan.repo_id}@{commit}",
                details=wrong[:10],
                next_step="push again; where it stays so, tell the hub",
            )

    def _wrong(self, commit: str) -> list[str]:
        """What of a commit is not what was sent, a line each."""
        plan = self._plan
        names = [file.name for file in plan.files]
        there: dict[str, Any] = {}
        for start in range(0, len(names), _PATHS_AT_ONCE):
            some = names[start : start + _PATHS_AT_ONCE]
            found = self._again(
                lambda some=some: self._api.get_paths_info(plan.repo_id, some, revision=commit)  # type: ignore[misc]
            )
            there |= {one.path: one for one in found}
        return [line for file in plan.files if (line := _difference(plan, file, there.get(file.name)))]

    def _again(self, ask: Callable[[], Result]) -> Result:
        """Ask, and where the hub is busy or the line breaks, ask again after a while."""
        attempt = 0
        while True:
            try:
                return ask()
            except Exception as error:
                wait = wait_before_retry(error, attempt)
                attempt += 1
                if wait is None or attempt == _ATTEMPTS:
                    raise
                self._report.pause(wait)


class _Report:
    """How many bytes of each file are there, told as one sum."""

    def __init__(self, files: Sequence[PushFile], progress: ProgressCallback, cancellation: Cancellation) -> None:
        self._sizes = {file.name: file.size_bytes for file in files}
        self._done: dict[str, int] = {}
        self._progress, self._cancellation = progress, cancellation
        self._lock, self._begun = threading.Lock(), False

    def begin(self) -> None:
        """From now on what is read is sent; before, it was hashed."""
        self._begun = True
        self.whole([])

    def at(self, name: str, done: int) -> None:
        """So many bytes of a file were read.

        Raises:
            Cancelled: that was asked for.
        """
        self._cancellation.check()
        if self._begun:
            with self._lock:
                self._done[name] = max(done, self._done.get(name, 0))
                self._progress(Progress(_STAGE, sum(self._done.values()), sum(self._sizes.values()), "bytes", name))

    def whole(self, names: Sequence[str]) -> None:
        """These files are there."""
        for name in names:
            self.at(name, self._sizes[name])

    def pause(self, seconds: float) -> None:
        """Wait, and stop at once where that is asked for."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._cancellation.check()
            time.sleep(min(left, 0.1))


class _Told(io.BufferedReader):
    """An open file that tells how far it was read."""

    def __init__(self, path: Path, name: str, report: _Report) -> None:
        super().__init__(io.FileIO(path))
        self._name_there, self._report = name, report

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size)
        self._report.at(self._name_there, self.tell())
        return data


def _difference(plan: PushPlan, file: PushFile, there: Any) -> str | None:
    """What is wrong with a file of the repository; None where nothing is."""
    if there is None:
        return f"{file.name}: is not there"
    if there.lfs is not None:
        expected, found = file.sha256, there.lfs.sha256
    else:
        content = file.text.encode() if file.text is not None else (Path(plan.directory) / file.name).read_bytes()
        expected, found = _git_hash(content), there.blob_id
    return None if expected == found else f"{file.name}: {expected} was sent, {found} is there"


def _git_hash(content: bytes) -> str:
    """What git calls a file's content: the SHA-1 of it behind its length."""
    from huggingface_hub.utils.sha import git_hash

    return str(git_hash(content))
