"""What every request passes first: who asks, from where, how much, how long; and what every reply says of itself.

A plain ASGI middleware, so that streams go through it unbuffered.  Only a request's body is collected: it is small, and
must arrive whole, in time, before anything is done.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import re
import socket
from contextlib import suppress
from urllib.parse import unquote_to_bytes

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunesmith.web.answers import JsonReply, plain_error, unexpected
from tunesmith.web.settings import LOOPBACK_NAMES, Settings

MOST_BODY_BYTES = 8 * 1024 * 1024
BODY_SECONDS = 20.0
# A client that is still sending would not read the answer; what it sends is thrown away for a while first.
_DRAINED_BYTES = 4 * MOST_BODY_BYTES
_DRAINED_SECONDS = 3.0
_QUIET_SECONDS = 0.2
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; frame-src 'self'"
)
_COOKIE = "tunesmith-download"
_DOWNLOAD = re.compile(r"/api/v1/jobs/[^/]+/download")
_WILDCARDS = frozenset({"0.0.0.0", "::", ""})  # noqa: S104 - compared with, not bound


class _Refused(Exception):  # noqa: N818 - an answer, not an error
    def __init__(self, reply: JsonReply) -> None:
        super().__init__()
        self.reply = reply


class Safety:
    """The middleware.

    Args:
        app: what comes after it.
        settings: the host that is bound, and the token.
        body_seconds: how long a body may take to arrive.
    """

    def __init__(self, app: ASGIApp, *, settings: Settings, body_seconds: float = BODY_SECONDS) -> None:
        self._app, self._settings, self._body_seconds = app, settings, body_seconds
        token = (settings.token or "").encode()
        # A frame and a download cannot send a header; this cookie opens them and nothing else.
        self._download_key = hmac.new(token, b"download", hashlib.sha256).hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or hand it on and see to its reply's headers."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        reply = _Reply(scope, send, cookie=self._cookie(scope))
        try:
            self._check(scope)
            body = await _whole_body(scope, receive, seconds=self._body_seconds)
            await self._app(scope, _replayed(body, receive), reply.send)
        except _Refused as refused:
            refused.reply.headers["connection"] = "close"  # what is still to come of it is not read
            await refused.reply(scope, receive, reply.send)
        except Exception as error:  # noqa: BLE001 - a reply without a traceback, whatever it was
            told = JsonReply({"error": unexpected(error)}, status_code=500)
            if not reply.started:
                await told(scope, receive, reply.send)

    def _check(self, scope: Scope) -> None:
        _check_path(scope)
        headers = Headers(scope=scope)
        self._check_host(headers)
        path: str = scope["path"]
        if not path.startswith(("/api/", "/v1/")) and scope["method"] in ("GET", "HEAD"):
            return  # the page itself may be linked to from anywhere
        _check_origin(headers)
        if self._settings.token is not None and not self._is_known(scope, headers):
            raise _Refused(
                plain_error(
                    401,
                    "TokenError",
                    "This server asks for a token.",
                    expected="Authorization: Bearer TOKEN",
                    next="open the address that tunesmith web printed, with the token in it",
                )
            )

    def _check_host(self, headers: Headers) -> None:
        given = headers.getlist("host")
        name = _host_name(given[0]) if len(given) == 1 else None
        if name is None or not self._is_ours(name):
            raise _Refused(
                plain_error(
                    421,
                    "HostError",
                    "This server does not answer under that name.",
                    expected=f"localhost or {self._settings.host}",
                    found=", ".join(given)[:200] or None,
                )
            )

    def _is_ours(self, name: str) -> bool:
        host = self._settings.host.lower()
        if name in LOOPBACK_NAMES or name == host:
            return True
        # Bound everywhere, this machine has many addresses.  A name that was bent to one of them is what to refuse.
        return host in _WILDCARDS and (_is_address(name) or name == socket.gethostname().lower())

    def _is_known(self, scope: Scope, headers: Headers) -> bool:
        scheme, _, shown = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and _same(shown.strip(), self._settings.token or ""):
            return True
        if scope["method"] != "GET" or not _DOWNLOAD.fullmatch(scope["path"]):
            return False
        return _same(cookie_parser(headers.get("cookie", "")).get(_COOKIE, ""), self._download_key)

    def _cookie(self, scope: Scope) -> str | None:
        """The cookie to hand out with a reply, to who has shown the token."""
        if self._settings.token is None or not scope["path"].startswith("/api/"):
            return None
        return f"{_COOKIE}={self._download_key}; Path=/api/v1/jobs; HttpOnly; SameSite=Strict"


class _Reply:
    """Headers on a reply's way out."""

    def __init__(self, scope: Scope, send: Send, *, cookie: str | None) -> None:
        self._scope, self._send, self._cookie_text = scope, send, cookie
        self.started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self._add(MutableHeaders(scope=message), message["status"])
        await self._send(message)

    def _add(self, headers: MutableHeaders, status: int) -> None:
        headers.setdefault("content-security-policy", PAGE_POLICY)
        headers["x-content-type-options"] = "nosniff"
        headers["referrer-policy"] = "no-referrer"
        headers["cross-origin-opener-policy"] = "same-origin"
        headers["cross-origin-resource-policy"] = "same-origin"
        headers.setdefault("x-frame-options", "DENY")
        if self._scope["path"].startswith(("/api/", "/v1/")):
            headers.setdefault("cache-control", "no-store")
        if self._cookie_text is not None and status < 400:
            headers.append("set-cookie", self._cookie_text)


def _check_path(scope: Scope) -> None:
    raw = unquote_to_bytes(scope.get("raw_path") or scope["path"].encode())
    try:
        readable = "\0" not in raw.decode("utf-8")
    except UnicodeDecodeError:
        readable = False
    if not readable:
        raise _Refused(plain_error(400, "RequestError", "The address holds bytes that no address here has."))


def _check_origin(headers: Headers) -> None:
    """Refuse what a page of another site sends; a program sends neither header."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    ours = f"http://{headers.get('host', '')}".lower()
    if (origin is not None and origin.lower() != ours) or site not in (None, "same-origin", "none"):
        raise _Refused(
            plain_error(
                403,
                "OriginError",
                "This request comes from a page of another site.",
                expected=ours,
                found=(origin or site or "")[:200],
            )
        )


def _host_name(host: str) -> str | None:
    """The name in a Host header, without its port; None where it is none."""
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9._-]+))(?::\d{1,5})?", host)
    return (match[1] or match[2]).lower() if match else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _same(shown: str, expected: str) -> bool:
    return hmac.compare_digest(shown.encode("utf-8", "replace"), expected.encode())


async def _whole_body(scope: Scope, receive: Receive, *, seconds: float) -> bytes:
    too_large = plain_error(
        413, "TooLargeError", "The request is too large.", expected=f"at most {MOST_BODY_BYTES} bytes"
    )
    announced = Headers(scope=scope).get("content-length", "0")
    if not announced.isdecimal() or int(announced[:20]) > MOST_BODY_BYTES:
        await _drain(receive)
        raise _Refused(too_large)
    try:
        return await asyncio.wait_for(_collected(receive, too_large), seconds)
    except asyncio.TimeoutError as error:
        late = plain_error(408, "RequestError", f"The request did not arrive within {seconds:g} s.")
        raise _Refused(late) from error


async def _collected(receive: Receive, too_large: JsonReply) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Refused(plain_error(400, "RequestError", "The request ended before it was whole."))
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > MOST_BODY_BYTES:
            del chunks
            await _drain(receive)
            raise _Refused(too_large)
        if not message.get("more_body", False):
            return b"".join(chunks)


async def _drain(receive: Receive) -> None:
    """Throw away what comes, until nothing does, or enough has."""
    loop, size = asyncio.get_running_loop(), 0
    until = loop.time() + _DRAINED_SECONDS
    with suppress(asyncio.TimeoutError):
        while size < _DRAINED_BYTES and loop.time() < until:
            message = await asyncio.wait_for(receive(), _QUIET_SECONDS)
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return
            size += len(message.get("body", b""))


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body in one piece; after it, what the client does next."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
