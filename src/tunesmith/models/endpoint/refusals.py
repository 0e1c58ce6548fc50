"""What goes wrong between us and a server, as errors that say how it is mended.

Whatever a server writes is shown in part, without control characters and without the key, and is never evaluated.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tunesmith.errors import DataError, PromptError, TunesmithError

RETRIES = 4
_SHOWN_CHARACTERS = 300
_SHOWN_ROWS = 10
_CONTEXT = re.compile(
    r"context.{0,20}(length|window|size)|(length|window|size).{0,20}context", re.IGNORECASE | re.DOTALL
)
_WINDOW = re.compile(
    r"(?:maximum context length (?:is|of)|context (?:window|size)[^0-9]{0,20}|context length of)\s*(\d+)"
)
_PROMPT_TOKENS = re.compile(
    r"(\d+) (?:in the (?:messages|prompt)|in your (?:messages|prompt)|(?:input|prompt) tokens|tokens from the input)"
)


@dataclass(frozen=True)
class Contact:
    """A server and how it is spoken to.

    Attributes:
        url: the base address, which ends before ``/models``.
        api_key: sent with every request; in no message, record or representation.
        timeout_s: how long a server may say nothing.
    """

    url: str
    api_key: str | None
    timeout_s: float

    def __repr__(self) -> str:
        return f"Contact({self.where!r})"

    @property
    def where(self) -> str:
        """The address to be shown: without a password, and without a query, which may hold one."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")

    def shown(self, text: object) -> str:
        """What a server or a library wrote, fit to be shown: one line, not long, and without the key."""
        line = "".join(letter if letter.isprintable() else " " for letter in str(text))
        secrets = [self.api_key, urlsplit(self.url).password, urlsplit(self.url).query]
        for secret in filter(None, secrets):
            line = line.replace(secret, "…")
        return line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 1] + "…"


@dataclass(frozen=True)
class Refusal:
    """One request that failed.

    Attributes:
        error: what is said of it.
        final: whether further requests would fare no better, so that none is begun.
        room: tokens that the context window leaves for an answer, where the server told it with its refusal.
    """

    error: TunesmithError
    final: bool = False
    room: int | None = None


def transport_errors() -> tuple[type[Exception], ...]:
    """What the HTTP library beneath ``openai`` raises while a stream is read; older versions let it through."""
    return _transport("HTTPError")


def _transport(name: str) -> tuple[type[Exception], ...]:
    return tuple(getattr(sys.modules[library], name) for library in ("httpx", "httpx2") if library in sys.modules)


def refusal(error: Exception, contact: Contact, *, model: str, sent: Iterable[str] = ()) -> Refusal:
    """Say what a failed request means.

    Args:
        error: what ``openai``, its HTTP library or the JSON parser raised.
        contact: the server.
        model: the model's id.
        sent: the names of the settings that were sent.
    """
    import openai

    found = contact.shown(_message(error))
    if isinstance(error, openai.APIStatusError):
        return _status(error, contact, found=found, model=model, sent=sent)
    if isinstance(error, (openai.APITimeoutError, *_transport("TimeoutException"))):
        return silent(contact)
    if isinstance(error, openai.APIConnectionError):
        return unreachable(error, contact)
    if isinstance(error, openai.APIError):
        return Refusal(
            TunesmithError("The server broke an answer off with an error.", where=contact.where, found=found)
        )
    if isinstance(error, transport_errors()):
        return broken_off(contact, found)
    return Refusal(
        TunesmithError(
            "The server's answer is not what OpenAI's protocol says.",
            where=contact.where,
            expected="JSON in server-sent events",
            found=found,
            next_step="check that the address is that of an OpenAI-compatible server; most end in /v1",
        )
    )


def nobody_there(error: BaseException) -> bool:
    """Whether no connection came about, rather than one that broke."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (*_transport("ConnectError"), *_transport("ConnectTimeout"))):
            return True
        cause = cause.__cause__
    return False


def unreachable(error: Exception, contact: Contact) -> Refusal:
    """Nobody answers at the address, or the connection broke before an answer began."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return Refusal(
        TunesmithError(
            "The server cannot be reached.",
            where=contact.where,
            found=contact.shown(cause) or type(cause).__name__,
            next_step="start the server, or check the address",
        ),
        final=True,
    )


def silent(contact: Contact) -> Refusal:
    """The server said nothing for as long as it may."""
    return Refusal(
        TunesmithError(
            "The server does not answer.",
            where=contact.where,
            found=f"nothing for {contact.timeout_s:g} s",
            next_step="look at the server's log, ask for fewer rows at once, or allow more time",
        ),
        final=True,
    )


def broken_off(contact: Contact, found: str) -> Refusal:
    """A stream that ended before its answer did."""
    return Refusal(
        TunesmithError(
            "The server ended an answer before it was whole.",
            where=contact.where,
            found=found,
            next_step="look at the server's log, then ask again",
        )
    )


def raise_all(failures: Sequence[tuple[str, Refusal]], *, undone: int, total: int) -> None:
    """Raise one error for all requests that failed; nothing where none did.

    Args:
        failures: what each was about, and why it failed.
        undone: how many requests have no answer, those that were not begun included.
        total: how many requests there were.

    Raises:
        PromptError: all failed because they do not fit the context window.
        DataError: the server refused what was asked.
        TunesmithError: anything else.
    """
    if not failures:
        return
    # The gravest explains the others: where a server went away, that is what is to be mended.
    errors = [refusal.error for _, refusal in failures]
    first = min(errors, key=lambda error: (type(error) is not TunesmithError, isinstance(error, PromptError)))
    details = [f"{about}: {error.found or error.what}" for (about, _), error in zip(failures, errors, strict=True)]
    if len(details) > _SHOWN_ROWS:
        details = [*details[:_SHOWN_ROWS], f"… and {len(details) - _SHOWN_ROWS} more"]
    raise type(first)(
        f"{first.what} {undone} of {total} requests have no answer.",
        where=", ".join(dict.fromkeys(error.where for error in errors if error.where and error.what == first.what)),
        expected=first.expected,
        details=details,
        next_step=first.next_step,
    )


def _status(error: Any, contact: Contact, *, found: str, model: str, sent: Iterable[str]) -> Refusal:
    code, where = error.status_code, contact.where
    if code in (401, 403):
        return Refusal(
            TunesmithError(
                "The server wants another key.", where=where, found=found, next_step="set OPENAI_API_KEY to its key"
            ),
            final=True,
        )
    if code == 404:
        return Refusal(
            DataError(
                "The server has no such model, or none at this address.",
                where=where,
                expected=model,
                found=found,
                next_step="check the model's name, and the address; most end in /v1",
            ),
            final=True,
        )
    if _about_context(error):
        return _too_long(error, found=found, where=where)
    if code == 429 or code >= 500:
        return Refusal(
            TunesmithError(
                f"The server is busy or failed; it was asked {RETRIES + 1} times.",
                where=where,
                found=f"{code}: {found}",
                next_step="look at the server's log, or ask for fewer rows at once",
            ),
            final=code in (429, 503),
        )
    return _refused_setting(f"{code}: {found}", where=where, text=_message(error), sent=sent)


def _refused_setting(found: str, *, where: str, text: str, sent: Iterable[str]) -> Refusal:
    named = [name for name in sent if re.search(rf"\b{re.escape(name)}\b", text)]
    if named:
        what = f"The server does not take the setting {', '.join(named)}."
        step = "leave that setting at its default, or ask a server that has it"
        return Refusal(DataError(what, where=where, found=found, next_step=step), final=True)
    return Refusal(DataError("The server refused a request.", where=where, found=found))


def _about_context(error: Any) -> bool:
    marks = f"{error.code} {error.type}"
    if "context_length_exceeded" in marks or "exceed_context_size" in marks:
        return True
    return error.status_code in (400, 413, 422) and _CONTEXT.search(_message(error)) is not None


def _too_long(error: Any, *, found: str, where: str) -> Refusal:
    text, body = _message(error), error.body if isinstance(error.body, dict) else {}
    window = _number(body.get("n_ctx")) or _number(_WINDOW.search(text))
    length = _number(body.get("n_prompt_tokens")) or _number(_PROMPT_TOKENS.search(text))
    fits = window is not None and length is not None and length < window
    what = "A prompt does not fit the server's context window."
    refused = PromptError(
        what,
        where=where,
        expected=None if window is None else f"at most {window - 1} tokens",
        found=found if length is None else f"{length} tokens",
    )
    return Refusal(refused, room=window - length if fits and window is not None and length is not None else None)


def _number(value: object) -> int | None:
    if isinstance(value, re.Match):
        value = int(value.group(1)[:12])
    return value if isinstance(value, int) and value > 0 else None


def _message(error: Exception) -> str:
    """What a server wrote: its JSON's own message, where there is one."""
    body = getattr(error, "body", None)
    if isinstance(body, dict):
        inner = body.get("error")
        body = inner if isinstance(inner, dict) else body
        for key in ("message", "detail", "error"):
            if body.get(key):
                return str(body[key])
    return str(body or getattr(error, "message", None) or error)
