"""What goes back over the wire: valid JSON whatever a record holds, and errors in one shape."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import secrets
import sys
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

import pydantic_core
from fastapi.responses import Response
from pydantic import BaseModel, ValidationError

import tunesmith as ts

_SHOWN_PROBLEMS = 20
_SHOWN_CHARACTERS = 200
_STATUSES = {"Busy": 409, "StillRunningError": 409, "NotThereError": 404, "RequestError": 422}


# What a user can mend, wherever it strikes; any other OSError that escapes is our bug.
_OUTSIDE = frozenset(
    {
        errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR,
        errno.ENOENT, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP,
    }
)  # fmt: skip


class RequestError(ts.TunesmithError):
    """A request that does not fit its schema."""


class NotThereError(ts.TunesmithError):
    """A path, a job or an address that there is not."""


class StillRunningError(ts.TunesmithError):
    """Something that can be done only once a job has ended."""


class JsonReply(Response):
    """A JSON document; what JSON has no word for is a string in it.

    Args:
        content: plain values and records.
    """

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The document's bytes."""
        return to_json(content)


def to_json(content: object) -> bytes:
    """Plain values and records as JSON: NaN and infinities as strings, as records write them themselves.

    File names that are not UTF-8 are shown with replacement characters.
    """
    try:
        return pydantic_core.to_json(content, inf_nan_mode="strings")
    except (pydantic_core.PydanticSerializationError, ValueError, RecursionError):
        # Lone surrogates, or numbers too long to be printed; slower, and nearly never.
        return json.dumps(_plain(content), ensure_ascii=False, allow_nan=False).encode()


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return _plain(value.model_dump())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {_text(str(key)): _plain(one) for key, one in value.items()}
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        return value if abs(value) < 1 << 1024 else "Infinity" if value > 0 else "-Infinity"
    return [_plain(one) for one in value] if isinstance(value, Iterable) else _text(str(value))


def _text(value: str) -> str:
    return value.encode("utf-8", "replace").decode()


def mendable(error: OSError) -> ts.TunesmithError | None:
    """A failure of the file system as an error that the user can mend; None where it is our bug."""
    if error.errno not in _OUTSIDE:
        return None
    return ts.TunesmithError("A file cannot be read or written.", where=error.filename, found=error.strerror)


def error_reply(error: ts.TunesmithError) -> JsonReply:
    """An error that the user can mend, with the status that its kind has."""
    return JsonReply(error_body(error), status_code=_STATUSES.get(type(error).__name__, 400))


def error_body(error: ts.TunesmithError) -> dict[str, object]:
    """The document of an error: ``{"error": {...}}``, with who holds the model where that is why."""
    body: dict[str, object] = dict(error.as_dict())
    holder = getattr(error, "holder", None)
    return {"error": body | ({"holder": holder} if holder is not None else {})}


def plain_error(status: int, name: str, what: str, **more: object) -> JsonReply:
    """An error of the server's own, in the same shape."""
    blank: dict[str, object] = {"where": None, "expected": None, "found": None, "details": [], "next": None}
    return JsonReply({"error": {"error": name, "what": what, **blank, **more}}, status_code=status)


def unexpected(error: BaseException) -> dict[str, object]:
    """The document of our bug: a reference, under which the traceback is on standard error."""
    reference = secrets.token_hex(4)
    told = "".join(traceback.format_exception(error)).replace("\x1b", "")
    sys.stderr.write(f"[{reference}] {told}")
    sys.stderr.flush()
    return {
        "error": "InternalError",
        "what": "Something went wrong that should not; it is a bug of Tunesmith.",
        "where": reference,
        "expected": None,
        "found": None,
        "details": [],
        "next": "look for this reference in the server's own output",
    }


def misfit(problems: Iterable[Mapping[str, Any]], *, what: str = "The request does not fit.") -> RequestError:
    """What does not fit a schema, a line each.

    Args:
        problems: as pydantic lists them.
        what: the sentence above them.
    """
    lines = [f"{'.'.join(str(part) for part in one['loc']) or 'request'}: {one['msg']}" for one in problems]
    shown = [_text(line)[:_SHOWN_CHARACTERS] for line in lines[:_SHOWN_PROBLEMS]]
    return RequestError(what, details=shown)


def misfit_of(error: ValidationError, what: str) -> RequestError:
    """The same of a model's own complaint."""
    return misfit(error.errors(include_url=False, include_input=False, include_context=False), what=what)
