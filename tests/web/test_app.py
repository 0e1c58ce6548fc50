"""Tests of the application as a whole: its addresses, its errors, its start and its end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fastapi import APIRouter
from typer.main import get_command

import tunesmith as ts
from tests.web.conftest import Page, raw, served
from tunesmith.cli import web
from tunesmith.cli.app import app as command_line
from tunesmith.web import Settings
from tunesmith.web.answers import to_json
from tunesmith.web.app import STATIC, bind

JSON = {"content-type": "application/json"}


def test_the_page_is_one_file_and_its_parts_are_static(page: Page) -> None:
    """With the right types, whatever the system's table says; a browser that has a file is told so."""
    index = page.get("/")
    assert index.status == 200
    assert index.headers["content-type"].startswith("text/html")
    script = page.get("/static/core.js")
    assert script.headers["content-type"].startswith("text/javascript")
    assert page.get("/static/style.css").headers["content-type"].startswith("text/css")
    assert page.get("/static/core.js", **{"If-None-Match": script.headers["etag"]}).status == 304
    assert page.ask("HEAD", "/").status == 200


def test_the_page_names_no_other_origin() -> None:
    """What it loads lies beside it, and nothing in it is inline, which its policy would refuse."""
    index = (STATIC / "index.html").read_text(encoding="utf-8")
    loaded = re.findall(r"(?:src|href)=\"([^\"]+)\"", index)
    assert loaded
    assert all(one.startswith(("/static/", "data:", "#")) for one in loaded), loaded
    assert not re.search(r"<style|style=|<script>|\son[a-z]+=", index)


@pytest.mark.parametrize(
    "path", ["/docs", "/redoc", "/openapi.json", "/api/v1", "/api/v1/", "/api/v2/session", "/x.html"]
)
def test_there_is_nothing_else(page: Page, path: str) -> None:
    """FastAPI's own pages load scripts from elsewhere, and are off; what is not there is told in our shape."""
    answer = page.get(path)
    assert answer.status == 404
    assert answer.error["error"] == "NotThereError"


def test_the_api_describes_itself(page: Page) -> None:
    """Every address that the page calls is in the document."""
    paths = page.get("/api/v1/openapi.json").json["paths"]
    assert {
        "/api/v1/session", "/api/v1/folders", "/api/v1/runs", "/api/v1/run", "/api/v1/texts/{lang}",
        "/api/v1/recipe/read", "/api/v1/recipe/write", "/api/v1/recipe/keys", "/api/v1/data/preview", "/api/v1/jobs",
        "/api/v1/jobs/{job_id}", "/api/v1/jobs/{job_id}/events", "/api/v1/jobs/{job_id}/cancel",
        "/api/v1/jobs/{job_id}/download", "/api/v1/chat", "/api/v1/chat/compare", "/v1/models",
        "/v1/chat/completions", "/v1/completions",
    } <= set(paths)  # fmt: skip


POSTS = ["/api/v1/jobs", "/api/v1/recipe/read", "/api/v1/recipe/write", "/api/v1/data/preview"]
BODIES = [
    b"", b"{", b"null", b"[]", b"3", b'"x"', b"\xff\xfe", b"\0", b"[" * 200_000, b'{"a":' * 100_000,
    b'{"text": "\\ud800", "values": {"\\udc00": "\\ud800"}, "kind": "\\ud800", "recipe_text": "\\ud800"}',
    b'{"text": NaN, "values": {"a": NaN, "b": Infinity}, "kind": NaN, "recipe_text": Infinity}',
    b'{"text": 1e999, "values": 1e999, "kind": 1e999, "recipe_text": 1e999}',
    b'{"values": {"a": 1' + b"0" * 4000 + b'}, "row": 1' + b"0" * 4000 + b"}",
    b'{"values": {"a": 1' + b"0" * 9000 + b"}}",
    b'{"values": {"a": ' + b"[" * 500 + b"]" * 500 + b"}}",
    b'{"text": {"a": 1}, "values": "x", "kind": ["demo"], "recipe_text": 4}',
    b'{"kind": "demo", "params": null}', b'{"kind": "demo", "params": {"a\\u0000": 1}}',
    b'{"kind": "merge", "params": {"run": "\\u0000", "out": "\\ud800"}}',
    b'{"kind": "cleanup", "params": {"run": "\\u202e\\u2066run"}}',
    b'{"kind": "compare", "params": {"run": "run", "max_prompts": 1e400}}',
    b'{"kind": "compare", "params": {"run": "run", "settings": {"temperature": NaN}}}',
    b'{"kind": "train", "params": {"recipe_text": "a: 1", "overrides": ["=", "\\u0000=x", "a"]}}',
    b'{"recipe_text": "a: &a [*a]"}', b'{"recipe_text": "dataset: [1, null, {a: b}]\\noutput_dir: [x]"}',
    b'{"recipe_text": "model_name_or_path: \\"\\\\0\\""}', b'{"recipe_text": "output_dir: ' + b"x" * 5000 + b'"}',
    '{"recipe_text": "dataset: ‮data"}'.encode(), b'{"values": {"a": "' + b"x" * 70_000 + b'"}}',
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
@pytest.mark.parametrize("path", POSTS)
def test_no_body_is_more_than_a_mistake_of_its_sender(page: Page, path: str, body: bytes) -> None:
    """Malformed, endless, deep, of the wrong type, no Unicode: a 4xx in our shape, never a 5xx."""
    answer = page.ask("POST", path, body, JSON)
    assert answer.status < 500, answer.body[:300]
    if answer.status >= 400:
        assert {"error", "what", "where", "expected", "found", "details", "next"} <= set(answer.error)
        assert "Traceback" not in answer.body.decode()
    else:
        assert answer.json is not None


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_a_form_of_another_site_cannot_pass_for_json(page: Page, kind: str | None) -> None:
    """What a form can send without asking first is no JSON here."""
    answer = page.ask("POST", "/api/v1/recipe/write", b'{"values": {}}', {"content-type": kind} if kind else {})
    assert answer.status == 422


@pytest.mark.parametrize(
    "query", ["after=-1", "after=x", "after=99999999999999999999999", "after=1e3", "after=%00", "after="]
)
def test_no_query_is_more_than_a_mistake(page: Page, query: str) -> None:
    """Of an address with a number in it."""
    assert page.get(f"/api/v1/jobs/x/events?{query}").status in (404, 422)


@pytest.mark.parametrize("event", ["-1", "x", "１", "9" * 30, "1 1"])
def test_no_last_event_id_is_more_than_a_mistake(page: Page, event: str) -> None:
    """A header that a browser keeps may be anything by now."""
    assert page.ask(
        "GET", "/api/v1/jobs/x/events", None, {"Last-Event-ID": event.encode().decode("latin-1")}
    ).status in (404, 422)


@pytest.mark.parametrize("method", ["PUT", "PATCH", "OPTIONS", "TRACE", "CONNECT", "FOO", "get"])
def test_other_methods_are_refused(page: Page, method: str) -> None:
    """In our shape where the server understands them at all."""
    with raw(page) as connection:
        connection.sendall(f"{method} /api/v1/jobs HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        status = int(connection.recv(4096).split(b" ")[1])
    assert status in (400, 404, 405)


@pytest.mark.parametrize(
    ("value", "document"),
    [
        (float("nan"), '"NaN"'),
        ([float("inf"), -float("inf")], '["Infinity","-Infinity"]'),
        ({"a": "\ud800"}, '{"a": "?"}'),
        ({"\udcff": float("nan"), "b": float("inf"), "c": True}, '{"?": "NaN", "b": "Infinity", "c": true}'),
        (ts.Finding(code="x\udcff", severity="ok"), '{"code": "x?", "severity": "ok", "params": {}}'),
        (10**4000, None),
        (Path("/a\udcff"), '"/a?"'),
        ((1, None, {2}), "[1,null,[2]]"),
    ],
)
def test_every_answer_is_strict_json(value: object, document: str | None) -> None:
    """Numbers that JSON lacks are strings, and names that are no UTF-8 are shown with question marks."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    written = json.loads(to_json(value).decode("utf-8"), parse_constant=refuse)
    assert document is None or written == json.loads(document)


def test_an_unexpected_error_in_a_handler_is_told_by_its_reference(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Through the whole application, over the wire."""
    router = APIRouter()

    @router.get("/api/v1/broken")
    def broken() -> None:
        raise LookupError("a secret")

    with served(Settings(root=tmp_path)) as page:
        page.app.include_router(router)
        answer = page.get("/api/v1/broken")
    assert answer.status == 500
    assert answer.error["error"] == "InternalError"
    assert b"secret" not in answer.body
    told = capfd.readouterr().err
    assert told.count("LookupError: a secret") == 1
    assert answer.error["where"] in told


def test_a_file_that_cannot_be_written_is_no_bug(tmp_path: Path) -> None:
    """A folder that is gone, or a disk that is full, is told as what it is."""
    router = APIRouter()

    @router.get("/api/v1/gone")
    def gone() -> None:
        (tmp_path / "none" / "file").read_bytes()

    @router.get("/api/v1/bug")
    def bug() -> None:
        raise OSError("nobody knows")

    with served(Settings(root=tmp_path)) as page:
        page.app.include_router(router)
        answer = page.get("/api/v1/gone")
        assert answer.status == 400
        assert answer.error["where"] == str(tmp_path / "none" / "file")
        assert page.get("/api/v1/bug").status == 500


def test_a_port_that_is_taken_is_told_or_passed_over(tmp_path: Path) -> None:
    """Told where it was asked for, passed over where it was not."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = Settings(root=tmp_path, port=taken.getsockname()[1])
        with pytest.raises(ts.TunesmithError, match="port"):
            bind(settings)
        with bind(settings, tries=50) as bound:
            assert settings.port < bound.getsockname()[1] <= settings.port + 50


def test_a_run_is_named_from_the_working_directory_or_from_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The former goes before; what is neither is a name, as of the hub."""
    (tmp_path / "root" / "run").mkdir(parents=True)
    assert Settings(root=tmp_path / "root", run="run").run == str(tmp_path / "root" / "run")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    assert Settings(root=tmp_path / "root", run="run").run == str(tmp_path / "run")
    assert Settings(root=tmp_path, run="org/name", base="demo").run == "org/name"


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    """``tunesmith web`` as a process of its own."""
    processes: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tunesmith", "web", "--root", str(tmp_path), "--json", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TUNESMITH_HOME": str(tmp_path / "home"), "PYTHONWARNINGS": "error"},
            cwd=tmp_path,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_the_command_serves_before_torch_and_ends_with_ctrl_c(started: Any) -> None:
    """The address on standard output; the first page without torch and within a second of CPU; exit code 130."""
    process = started("--port", "0")
    told = json.loads(process.stdout.readline())
    with urllib.request.urlopen(told["url"]) as reply:  # noqa: S310 - our own address
        assert reply.status == 200
    one = psutil.Process(process.pid)
    spent = one.cpu_times()
    assert not any("libtorch" in file.path for file in one.memory_maps())
    assert spent.user + spent.system < 2.5  # on a busy machine; a benchmark says what it is on an idle one
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out, err.strip()) == ("", "Stopped.")


def test_ctrl_c_ends_work_that_does_not_stop(tmp_path: Path) -> None:
    """A thread that computes on does not hold the program up, nor abort it: exit code 130 all the same."""
    code = (
        "import sys, threading, time\n"
        "from tunesmith.web import verbs, jobs\n"
        "from tunesmith.web.verbs import CleanupParams\n"
        "from tunesmith.web.work import Verb, Work\n"
        "verbs.VERBS = jobs.VERBS = {'cleanup': Verb(CleanupParams, lambda *_: Work('x', lambda _: time.sleep(60),"
        " needs_model=False))}\n"
        "from tunesmith.web import app\n"
        "app._STOPPING_SECONDS = 0.2\n"
        f"sys.argv = ['tunesmith', 'web', '--json', '--port', '0', '--root', {str(tmp_path)!r}]\n"
        "from tunesmith.cli import main\n"
        "main()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        url = json.loads(process.stdout.readline())["url"]
        body = json.dumps({"kind": "cleanup", "params": {"run": "x"}}).encode()
        asked = urllib.request.Request(f"{url}api/v1/jobs", body, JSON)  # noqa: S310 - our own address
        urllib.request.urlopen(asked).close()  # noqa: S310
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (130, "Stopped.\n")


def test_beyond_this_machine_the_command_prints_a_token(started: Any) -> None:
    """It is in the part of the address that a browser keeps to itself, and opens the API."""
    process = started("--port", "0", "--host", "0.0.0.0")  # noqa: S104 - for a second
    told = json.loads(process.stdout.readline())
    assert told["url"].endswith(f"#token={told['token']}")
    port = told["url"].split(":")[2].split("/")[0]
    address = f"http://127.0.0.1:{port}/api/v1/jobs"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(address)
    asked = urllib.request.Request(address, headers={"Authorization": f"Bearer {told['token']}"})
    with urllib.request.urlopen(asked) as reply:  # noqa: S310
        assert reply.status == 200
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("arguments", "what"),
    [(["nothing"], "run is not there"), (["--token", ""], "token"), (["--root", "nothing"], "root is not a folder")],
)
def test_what_is_not_there_is_told_before_anything_is_served(started: Any, arguments: list[str], what: str) -> None:
    """With exit code 2, as everywhere."""
    process = started(*arguments)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert what in err
    assert what in json.loads(out)["what"]


def test_the_help_names_the_port_that_is_taken_first() -> None:
    """It is the settings' own, which lives once."""
    port = next(one for one in get_command(command_line).commands["web"].params if one.name == "port")  # type: ignore[attr-defined]
    assert f"Default: {Settings.model_fields['port'].default}," in port.help


def test_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's libraries are an extra."""
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ts.MissingExtraError) as missing:
        web.web()
    assert missing.value.next_step == 'pip install "tunesmith[web]"'
