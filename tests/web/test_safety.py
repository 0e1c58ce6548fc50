"""Tests of what every request passes: who asks, from where, how much, how long; and of a reply's headers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.web.conftest import Page, raw, served
from tunesmith.web import Settings
from tunesmith.web.safety import MOST_BODY_BYTES, Safety
from tunesmith.web.settings import is_loopback

TOKEN = "a-token-of-ours"  # noqa: S105 - of this test alone


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A page that asks for a token."""
    with served(Settings(root=tmp_path_factory.mktemp("guarded"), token=TOKEN)) as one:
        yield one


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "LOCALHOST", "[::1]", "localhost:1", "127.0.0.1:7860"])
def test_this_machines_own_names_are_answered(page: Page, host: str) -> None:
    """Whatever the port, which a tunnel may change."""
    assert page.get("/api/v1/jobs", Host=host).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "192.168.1.2",
        "localhost@evil.example",
        "localhost.",
        "",
        "[::2]",
        "localhost:abc",
        "127.1",
    ],
)
@pytest.mark.parametrize("path", ["/", "/api/v1/jobs", "/static/core.js"])
def test_another_name_is_refused(page: Page, host: str, path: str) -> None:
    """A name that was bent to this machine, as in DNS rebinding, gets nothing, not even the page."""
    answer = page.get(path, Host=host)
    assert answer.status == 421
    assert answer.error["error"] == "HostError"


def test_no_host_and_two_hosts_are_refused(page: Page) -> None:
    """HTTP/1.0 has none, and of two nobody knows which was meant."""
    for head in ("GET / HTTP/1.0\r\n\r\n", "GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n"):
        with raw(page) as connection:
            connection.sendall(head.encode())
            assert connection.recv(4096).split(b" ")[1] in (b"400", b"421")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "https://{host}"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://localhost"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/v1/jobs"),
        ("DELETE", "/api/v1/jobs/x"),
        ("GET", "/api/v1/jobs/x/events"),
        ("GET", "/api/v1/session"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/"),
    ],
)
def test_a_page_of_another_site_is_refused(page: Page, headers: dict[str, str], method: str, path: str) -> None:
    """Whatever it asks for; another port of this machine is another site too."""
    host = f"127.0.0.1:{page.settings.port}"
    told = {key: value.format(host=host) for key, value in headers.items()}
    answer = page.ask(method, path, b"{}" if method == "POST" else None, told)
    assert answer.status == 403
    assert answer.error["error"] == "OriginError"


def test_our_own_page_and_programs_are_answered(page: Page) -> None:
    """A browser on our page tells our origin; a program tells none."""
    ours = {"Origin": f"http://127.0.0.1:{page.settings.port}", "Sec-Fetch-Site": "same-origin"}
    for told in (ours, {"Sec-Fetch-Site": "none"}, {}):
        headers = {**told, "content-type": "application/json"}
        assert page.ask("GET", "/api/v1/jobs", None, headers).status == 200
        assert page.ask("POST", "/api/v1/recipe/write", b'{"values": {}}', headers).status == 200
    assert page.get("/", **{"Sec-Fetch-Site": "cross-site"}).status == 200  # a link from elsewhere


@pytest.mark.parametrize(
    "shown",
    ["", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", TOKEN, "Bearer \xff"],
)
@pytest.mark.parametrize("path", ["/api/v1/session", "/api/v1/openapi.json", "/v1/models", "/api/v1/jobs/x/download"])
def test_a_missing_or_wrong_token_opens_nothing(guarded: Page, shown: str, path: str) -> None:
    """Everything but the static page needs it."""
    answer = guarded.ask("GET", path, None, {"Authorization": shown} if shown else {})
    assert answer.status == 401
    assert answer.error["error"] == "TokenError"
    assert TOKEN not in answer.body.decode()
    assert "set-cookie" not in answer.headers


def test_the_right_token_opens_the_api(guarded: Page) -> None:
    """As a bearer, however that word is written; the page itself is open, for it has to ask."""
    for scheme in ("Bearer", "bearer"):
        assert guarded.get("/api/v1/session", Authorization=f"{scheme} {TOKEN}").status == 200
    assert guarded.get("/static/core.js").status == 200


def test_a_downloads_cookie_opens_downloads_only(guarded: Page) -> None:
    """A frame cannot send a header; what it sends instead is not the token, and is good for nothing else."""
    cookie = guarded.get("/api/v1/jobs", Authorization=f"Bearer {TOKEN}").headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert TOKEN not in cookie
    sent = cookie.partition(";")[0]
    assert guarded.get("/api/v1/jobs/none/download", Cookie=sent).status == 404
    assert guarded.get("/api/v1/jobs/none/download", Cookie=sent + "0").status == 401
    for method, path in (("GET", "/api/v1/jobs"), ("GET", "/api/v1/jobs/none"), ("POST", "/api/v1/jobs/none/download")):
        assert guarded.ask(method, path, None, {"Cookie": sent}).status == 401


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org"])  # noqa: S104 - nothing is bound
def test_a_token_is_made_where_others_can_reach_the_page(tmp_path: Path, host: str) -> None:
    """Bound beyond this machine, there is never none; on it, only where one is given."""
    one, two = (Settings(root=tmp_path, host=host) for _ in range(2))
    assert one.token
    assert len(one.token) >= 32
    assert one.token != two.token
    assert one.url.endswith(f"#token={one.token}")
    assert one.token not in repr(one)
    assert Settings(root=tmp_path).token is None
    assert not is_loopback(host)


def test_a_body_that_is_too_large_is_refused_at_its_announcement(page: Page) -> None:
    """100 MB are not read."""
    with raw(page) as connection:
        connection.sendall(
            b"POST /api/v1/recipe/read HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100000000\r\n\r\n"
        )
        reply = b""
        while chunk := connection.recv(65536):
            reply += chunk
    assert b" 413 " in reply
    assert b"TooLargeError" in reply


def test_a_body_in_chunks_is_counted_while_it_passes(page: Page) -> None:
    """No length is announced, and it ends all the same."""
    chunk = b"x" * 65536
    sent = 0
    with raw(page) as connection:
        connection.sendall(
            b"POST /api/v1/recipe/read HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        try:
            while sent < 8 * MOST_BODY_BYTES:
                connection.sendall(b"10000\r\n" + chunk + b"\r\n")
                sent += len(chunk)
        except OSError:
            pass  # it has closed the connection
        assert sent < 7 * MOST_BODY_BYTES  # the system's own buffers hold some


def test_a_body_that_is_just_small_enough_is_read(page: Page) -> None:
    """The limit is where it is said to be: beyond it the size is told, up to it the recipe's own limit."""
    fits = b'{"text": "' + b"x" * (MOST_BODY_BYTES - 12) + b'"}'
    assert len(fits) == MOST_BODY_BYTES
    headers = {"content-type": "application/json"}
    assert page.ask("POST", "/api/v1/recipe/read", fits, headers).status == 422
    assert page.ask("POST", "/api/v1/recipe/read", fits + b" ", headers).status == 413


def _asgi(safety: Safety, messages: list[dict[str, Any]], **scope: Any) -> list[dict[str, Any]]:
    """What a middleware sends for a request whose body arrives in some pieces, and then no more."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        await asyncio.sleep(60)
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    basis = {"type": "http", "method": "POST", "path": "/api/v1/jobs", "headers": [(b"host", b"localhost")]}
    asyncio.run(safety({**basis, **scope}, receive, send))
    return sent


async def _nothing(_scope: Any, _receive: Any, _send: Any) -> None:
    raise AssertionError("the request came through")


def test_a_body_that_does_not_end_is_given_up(tmp_path: Path) -> None:
    """Drop by drop it does not hold the server's attention for longer than a while."""
    safety = Safety(_nothing, settings=Settings(root=tmp_path), body_seconds=0.1)
    begun = time.monotonic()
    sent = _asgi(safety, [{"type": "http.request", "body": b"{", "more_body": True}] * 3)
    assert time.monotonic() - begun < 2
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["error"]["error"] == "RequestError"


def test_a_client_that_leaves_before_its_body_is_whole_starts_nothing(tmp_path: Path) -> None:
    """Half a request is none."""
    safety = Safety(_nothing, settings=Settings(root=tmp_path))
    half = {"type": "http.request", "body": b"{", "more_body": True}
    assert _asgi(safety, [half, {"type": "http.disconnect"}])[0]["status"] == 400


def test_an_unexpected_error_is_told_by_its_reference_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The traceback is in the server's own output, under the same reference."""

    async def broken(_scope: Any, _receive: Any, _send: Any) -> None:
        raise ZeroDivisionError("a secret of the machine")

    sent = _asgi(Safety(broken, settings=Settings(root=tmp_path)), [{"type": "http.request", "body": b""}])
    error = json.loads(sent[1]["body"])["error"]
    assert sent[0]["status"] == 500
    assert error["error"] == "InternalError"
    assert b"secret" not in sent[1]["body"]
    told = capsys.readouterr().err
    assert f"[{error['where']}]" in told
    assert "ZeroDivisionError: a secret of the machine" in told


@pytest.mark.parametrize("path", ["/api/v1/jobs/%00", "/static/%00.js", "/%ff", "/api/v1/%c0%ae%c0%ae/x", "/%ed%a0%80"])
def test_an_address_of_odd_bytes_is_refused(page: Page, path: str) -> None:
    """NUL, and what is not UTF-8, overlong forms and surrogates included."""
    answer = page.get(path)
    assert answer.status == 400
    assert answer.error["error"] == "RequestError"


def test_every_reply_says_what_it_may_do(page: Page) -> None:
    """The policy of the page, on pages, data and errors alike; data is not kept by a browser."""
    for path in ("/", "/static/core.js", "/api/v1/session", "/api/v1/nothing", "/nothing"):
        headers = page.get(path).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-opener-policy"] == "same-origin"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "server" not in headers
        assert "access-control-allow-origin" not in headers
        if path.startswith("/api"):
            assert headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%2fapp.py",
        "/static/%2e%2e%2fapp.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/static/..\\app.py",
        "/static/vendor/../../app.py",
        "/static/",
        "/static",
        "/static/" + "x" * 3000,
    ],
)
def test_static_files_are_those_of_the_package_only(page: Page, path: str) -> None:
    """No way leads out of their folder, and folders are not listed."""
    answer = page.get(path)
    assert answer.status in (404, 405, 307)
    assert b"import" not in answer.body


def test_a_web_socket_is_refused(page: Page) -> None:
    """There is none here, so nothing may be upgraded past these checks."""
    with raw(page) as connection:
        connection.sendall(
            b"GET /api/v1/jobs HTTP/1.1\r\nHost: evil.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        assert b" 101 " not in connection.recv(4096)[:20]
