"""ModelScope, through its own small client, the package ``modelscope-hub``, which is given a folder of links.

Its client makes one commit of what fits into one request, which a model's files do; what the site has already is not
sent again.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tunesmith.errors import MissingExtraError, OutputError
from tunesmith.export.push.failures import explained
from tunesmith.export.push.files import a_loader_would_read
from tunesmith.export.push.records import Pushed, PushPlan
from tunesmith.progress import Cancellation, Progress, ProgressCallback

_MESSAGE = "Upload with tunesmith push"
_MAIN = "master"
_STAGE = "push"


def push_to_modelscope(plan: PushPlan, *, progress: ProgressCallback, cancellation: Cancellation) -> Pushed:
    """Send a plan's files to ModelScope, and compare the hashes there with the plan's.

    Args:
        plan: what to send.
        progress: told of bytes sent, after each of the client's commits.
        cancellation: read before the client begins, which cannot be stopped.

    Returns:
        What lies there.

    Raises:
        MissingExtraError: its client is not installed.
        OutputError: the site, the network or the account does not allow it; says which, and what to do.
        Cancelled: stopped on request, before anything was sent.
    """
    try:
        from modelscope_hub import HubApi, HubConfig  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise MissingExtraError("Pushing to ModelScope", "modelscope", "modelscope_hub") from error
    config: Any = HubConfig(endpoint=plan.endpoint)
    if not config.token:
        raise OutputError(
            "Nobody is logged in to the hub.",
            where=plan.endpoint,
            expected="a token with write access",
            next_step="modelscope login, or set MODELSCOPE_API_TOKEN",
        )
    push = partial(_push, HubApi(config), plan, progress, cancellation)
    return explained(plan, lambda: config.token, push)


def _push(api: Any, plan: PushPlan, progress: ProgressCallback, cancellation: Cancellation) -> Pushed:
    started, revision = time.monotonic(), plan.revision or _MAIN
    with _quiet(), tempfile.TemporaryDirectory(prefix="tunesmith-push-") as folder:
        foreign = _prepare(api, plan, revision)
        cancellation.check()
        progress(Progress(_STAGE, 0, plan.size_bytes, "bytes"))
        _link(plan, Path(folder))
        answer = api.upload_folder(
            plan.repo_id,
            "model",
            folder,
            commit_message=_MESSAGE,
            revision=revision,
            use_cache=False,
            disable_tqdm=True,
            progress_callback=lambda event: _tell(plan, progress, event),
        )
        if foreign:
            api.delete_files(plan.repo_id, "model", list(foreign), commit_message=_MESSAGE, revision=revision)
        _compare(api, plan, revision)
    progress(Progress(_STAGE, plan.size_bytes, plan.size_bytes, "bytes"))
    return Pushed(
        repo_id=plan.repo_id,
        to=plan.to,
        url=f"{plan.endpoint}/models/{plan.repo_id}",
        commit=_commit_of(answer),
        unchanged=answer is None,
        files=len(plan.files),
        size_bytes=plan.size_bytes,
        removed=foreign,
        seconds=time.monotonic() - started,
    )


def _prepare(api: Any, plan: PushPlan, revision: str) -> tuple[str, ...]:
    """Make the repository where it is not there; what lies in it that a loader would mix up is refused, or named."""
    if not api.repo_exists(plan.repo_id, "model"):
        api.create_repo(plan.repo_id, "model", visibility="private" if plan.private else "public", license=plan.licence)
        return ()
    if plan.private and api.get_repo(plan.repo_id, "model").private is False:
        raise OutputError(
            "The repository is there already, and public; --private makes new ones only.",
            where=plan.repo_id,
            next_step="make it private in its settings, or choose another name",
        )
    ours = {file.name for file in plan.files}
    there = [file.path for file in api.list_repo_files(plan.repo_id, "model", revision=revision) if not file.is_dir]
    foreign = tuple(name for name in there if name not in ours and a_loader_would_read(name, plan.kind))
    foreign = tuple(name for name in foreign if name != "configuration.json")  # the site's own, in every repository
    if foreign and not plan.replace:
        raise OutputError(
            "The repository holds other files, which a loader would read together with these.",
            where=plan.repo_id,
            details=foreign[:10],
            next_step="push to another repository, or pass --replace to remove them too",
        )
    return foreign


def _link(plan: PushPlan, folder: Path) -> None:
    """Lay out what goes up: links to the files, and the texts that stand in the place of some."""
    for file in plan.files:
        target = folder / file.name
        target.parent.mkdir(exist_ok=True)
        if file.text is not None:
            target.write_bytes(file.text.encode())
        else:
            target.symlink_to(Path(plan.directory) / file.name)


def _tell(plan: PushPlan, progress: ProgressCallback, event: dict[str, Any]) -> None:
    done = event.get("committed_bytes")
    if isinstance(done, int):
        progress(Progress(_STAGE, min(done, plan.size_bytes), plan.size_bytes, "bytes"))


def _compare(api: Any, plan: PushPlan, revision: str) -> None:
    there = {file.path: file for file in api.list_repo_files(plan.repo_id, "model", revision=revision)}
    wrong = []
    for file in plan.files:
        found = there.get(file.name)
        if found is None:
            wrong.append(f"{file.name}: is not there")
        elif found.sha256 and found.sha256 != file.sha256:
            wrong.append(f"{file.name}: {file.sha256} was sent, {found.sha256} is there")
        elif not found.sha256 and found.size != file.size_bytes:
            wrong.append(f"{file.name}: {file.size_bytes} bytes were sent, {found.size} are there")
    if wrong:
        raise OutputError(
            "What lies in the repository is not what was sent.",
            where=f"{plan.repo_id}@{revision}",
            details=wrong[:10],
            next_step="push again; where it stays so, tell the hub",
        )


def _commit_of(answer: Any) -> str:
    """The last commit that the client tells of; empty where it tells of none."""
    last = answer[-1] if isinstance(answer, list) and answer else answer
    if not isinstance(last, dict):
        return ""
    return next((str(last[key]) for key in ("oid", "CommitId", "commit_id", "Id", "sha") if last.get(key)), "")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the client from telling of every step."""
    logger = logging.getLogger("modelscope_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a report
            yield
    finally:
        logger.setLevel(level)
