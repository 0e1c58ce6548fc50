"""What a hub's client means when it fails: one sentence each, and never a token or a signed address.

The client's own error is not chained: its text holds addresses, and its frames hold the request's headers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from tunesmith.checkpoint import causes_of, status_of
from tunesmith.errors import Cancelled, OutputError, TunesmithError
from tunesmith.export.push.records import PushPlan

_LONGEST_WAIT_S = 60.0
_LONGEST_MESSAGE = 300
_NETWORK = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
_SECRET = re.compile(r"\b(?:hf|api_org|ms)[_-][A-Za-z0-9-]{16,}|(?<=[?&])[^\s&?]*[Ss]ignature[^\s]*|Bearer\s+\S+")
_URL = re.compile(r"https?://\S+")

Result = TypeVar("Result")


def explained(plan: PushPlan, token: Callable[[], str | None], work: Callable[[], Result]) -> Result:
    """Do what asks a hub; of an error of its client's say in one sentence what it means, and what to do.

    Args:
        plan: what is to be sent.
        token: reads what must be in no message; it is not kept.
        work: what asks the hub.

    Raises:
        OutputError: in the place of the client's error.
        Cancelled: stopped on request.
    """
    try:
        return work()
    except (TunesmithError, Cancelled):
        raise
    except Exception as error:  # the client raises its HTTP library's errors, and storage's, too
        causes = causes_of(error)
        if isinstance(causes[-1], TypeError | AttributeError | AssertionError | KeyError | ImportError):
            raise  # our own mistake, or a client of another version
        stopped = any(isinstance(cause, Cancelled) for cause in causes)
        what, next_step = _meaning(causes, plan)
        found = _message(causes, token() or "")
    # Outside the handler, so that nothing of the client's is kept with it.
    if stopped:
        raise Cancelled
    raise OutputError(what, where=plan.repo_id, found=found, next_step=next_step)


def wait_before_retry(error: BaseException, attempt: int) -> float | None:
    """How long to wait before the hub is asked again.

    Args:
        error: what came of asking.
        attempt: how often it was asked before.

    Returns:
        Seconds; None where asking again is of no use, or the hub wants longer than a minute.
    """
    status = status_of(error)
    if status is None:
        return float(2**attempt) if _is_network(causes_of(error)) else None
    if status not in (408, 429, 500, 502, 503, 504):
        return None
    asked = _retry_after(error)
    if asked is None:
        return float(2**attempt)
    return asked if asked <= _LONGEST_WAIT_S else None


def _retry_after(error: BaseException) -> float | None:
    for cause in causes_of(error):
        headers = getattr(getattr(cause, "response", None), "headers", None)
        if headers is not None and re.fullmatch(r"\d{1,6}", value := str(headers.get("Retry-After", ""))):
            return float(value)
    return None


def _is_network(causes: list[BaseException]) -> bool:
    return any(
        isinstance(cause, ConnectionError | TimeoutError) or type(cause).__module__.split(".")[0] in _NETWORK
        for cause in causes
    )


def _message(causes: list[BaseException], token: str) -> str:
    """What the hub said, in one line without secrets and without addresses."""
    said = next((text for cause in causes if (text := getattr(cause, "server_message", None))), None)
    if said is None:
        named = [cause for cause in causes if str(cause).strip()] or causes
        innermost = named[-1]
        said = str(innermost).strip() or type(innermost).__name__
    if token:
        said = said.replace(token, "***")
    lines = [line.strip() for line in _SECRET.sub("***", str(said)).splitlines() if line.strip()]
    return _URL.sub(_host, " ".join(lines))[:_LONGEST_MESSAGE] or type(causes[0]).__name__


def _host(match: re.Match[str]) -> str:
    return match[0].split("?")[0].rsplit("@", 1)[-1]


def _meaning(causes: list[BaseException], plan: PushPlan) -> tuple[str, str | None]:
    names = {type(cause).__name__ for cause in causes}
    said = " ".join(map(str, causes)).lower()
    status = status_of(causes[0])
    if "OfflineModeIsEnabled" in names:
        return "The hub was not asked, for HF_HUB_OFFLINE is set.", "unset HF_HUB_OFFLINE, and push again"
    if "RevisionNotFoundError" in names:
        return "The repository has no such revision.", f"make the branch first: {_branch(plan)}"
    if status == 401 or "XetAuthenticationError" in names:
        return "The hub does not accept the token.", _login(plan)
    if status == 402 or "quota" in said or "storage limit" in said or "exceeded your" in said:
        return "The account's storage on the hub is full.", "delete what is no longer needed there, or get more storage"
    if status == 403:
        return "The token may not write to this repository.", "use a token with write access to it"
    if status in (404, 405) or "RepositoryNotFoundError" in names:
        return (
            "This address takes no uploads, or the hub knows no such owner.",
            "check the owner's name and --endpoint; mirrors of the hub are for reading only",
        )
    if status in (409, 412):
        return "The repository was changed by another while this was sent.", "push again, which sends only what is new"
    if status == 413:
        return "A file is larger than the hub takes.", "split the weights: tunesmith merge --shard-size 5GB"
    if status == 429:
        return "The hub has had too many requests from this account.", f"push again {_later(causes)}"
    if status is not None and status >= 500:
        return "The hub failed.", "push again later, which sends only what is missing"
    if any("metadata in readme" in str(cause).lower() for cause in causes):
        return "The hub refuses the card's front matter.", "mend the lines between the dashes, and pass --card"
    if _is_network(causes):
        return "The hub cannot be reached.", "check the network and --endpoint, and push again: it goes on from there"
    return "The hub's client failed.", "push again, which sends only what is missing"


def _later(causes: list[BaseException]) -> str:
    asked = _retry_after(causes[0])
    after = "later" if asked is None else f"in {asked:.0f} seconds"
    return f"{after}, which sends only what is missing"


def _login(plan: PushPlan) -> str:
    if plan.to == "modelscope":
        return "set MODELSCOPE_API_TOKEN to a token of this site's"
    return "hf auth login with a token of this hub's; HF_TOKEN, where it is set, goes before"


def _branch(plan: PushPlan) -> str:
    if plan.to == "modelscope":
        return f"on the page of {plan.repo_id}"
    return f"hf repos branch create {plan.repo_id} {plan.revision or 'main'}"
