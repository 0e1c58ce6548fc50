"""A push to ModelScope by its own client, against a fake of the few routes that it asks for."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import tunesmith as ts
from tunesmith.errors import MissingExtraError, OutputError

REPO = "me/tuned"
TOKEN = "ms-aSecretOfThisTest0123456789"  # noqa: S105 - of the fake alone


class FakeModelScope:
    """Repositories with files by name, storage by SHA-256; checks hashes, and fails when told to."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.store: dict[str, bytes] = {}
        self.commits = 0
        self.puts = 0
        self.asked: list[str] = []
        self.fail: tuple[str, int] | None = None
        served = self

        class Handler(_Handler):
            hub = served

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: FakeModelScope

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, data: Any, status: int = 200) -> None:
        good = status < 400
        told = {"Code": status, "Success": good, "success": good, "Data": data, "data": data}
        body = json.dumps(told | ({"Message": "the name already exists"} if status == 409 else {})).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _handle(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = f"{self.command} {unquote(urlsplit(self.path).path)}"
        self.hub.asked.append(request)
        if self.hub.fail and re.search(self.hub.fail[0], request):
            self._answer({"Message": f"no: {TOKEN}"}, self.hub.fail[1])
        elif request == "POST /api/v1/models":
            self._create(json.loads(data))
        elif request.startswith("PUT /store/"):
            self._put(request.rsplit("/", 1)[1], data)
        elif request.endswith("/info/lfs/objects/batch"):
            objects = [self._action(one["oid"]) for one in json.loads(data)["objects"]]
            self._answer({"objects": objects})
        elif match := re.fullmatch(r"POST /api/v1/repos/models/(.+/.+)/commit/master", request):
            self._commit(match[1], json.loads(data)["actions"])
        elif match := re.fullmatch(r"GET /api/v1/models/(.+/.+)/repo/files", request):
            self._files(match[1])
        elif match := re.fullmatch(r"GET /(?:openapi/v1|api/v1)/models/([^/]+/[^/]+)", request):
            there = match[1] in self.hub.repos
            self._answer(
                {"private": match[1] in self.hub.private, "id": match[1]} if there else {}, 200 if there else 404
            )
        else:
            self._answer({"Message": f"no route {request}"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['Path']}/{wanted['Name']}"
        if name in self.hub.repos:
            self._answer({}, 409)
            return
        self.hub.repos[name] = {".gitattributes": b"", "configuration.json": b"{}"}
        if wanted.get("Visibility") == 1:
            self.hub.private.add(name)
        self._answer({"Name": wanted["Name"], "Path": wanted["Path"]})

    def _action(self, oid: str) -> dict[str, Any]:
        actions = {} if oid in self.hub.store else {"upload": {"href": f"{self.hub.url}/store/{oid}"}}
        return {"oid": oid, "actions": actions}

    def _put(self, oid: str, data: bytes) -> None:
        self.hub.puts += 1
        if hashlib.sha256(data).hexdigest() != oid:
            self._answer({"Message": "another hash"}, 400)
            return
        self.hub.store[oid] = data
        self._answer({})

    def _commit(self, repo: str, actions: list[dict[str, Any]]) -> None:
        files = self.hub.repos[repo]
        for action in actions:
            if action["action"] == "delete":
                files.pop(action["path"])
            elif action["type"] == "lfs":
                files[action["path"]] = self.hub.store[action["sha256"]]
            else:
                files[action["path"]] = base64.b64decode(action["content"])
        self.hub.commits += 1
        self._answer({"oid": f"{self.hub.commits:040x}"})

    def _files(self, repo: str) -> None:
        entries = [
            {"Path": name, "Name": name, "Type": "blob", "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()}
            for name, data in self.hub.repos[repo].items()
        ]
        self._answer({"Files": entries})


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeModelScope]:
    """A fake site, and the client logged in to it."""
    pytest.importorskip("modelscope_hub", reason="needs the extra modelscope")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    served = FakeModelScope()
    yield served
    served.server.shutdown()
    served.server.server_close()


def plan_of(directory: Path, site: FakeModelScope, **how: Any) -> ts.PushPlan:
    """A plan for the fake site."""
    return ts.plan_push(directory, REPO, to="modelscope", endpoint=site.url, **how)


def test_what_lies_there_is_what_was_planned(merged: Path, site: FakeModelScope) -> None:
    """In one commit, private where asked; pushed again nothing is uploaded twice."""
    plan = plan_of(merged, site, private=True)
    pushed = ts.push(plan)
    there = {name: hashlib.sha256(data).hexdigest() for name, data in site.repos[REPO].items()}
    assert {file.name: file.sha256 for file in plan.files}.items() <= there.items()
    assert (site.commits, site.puts, pushed.commit) == (1, 1, f"{1:040x}")
    assert REPO in site.private
    assert "modelscope download --model me/tuned" in plan.card
    ts.push(plan)
    assert site.puts == 1


def test_other_files_there_are_named_or_removed(merged: Path, site: FakeModelScope) -> None:
    """What a loader would read beside these; not what the site puts into every repository."""
    site.repos[REPO] = {"configuration.json": b"{}", "vocab.json": b"{}"}
    with pytest.raises(OutputError, match="would read together") as caught:
        ts.push(plan_of(merged, site))
    assert caught.value.details == ("vocab.json",)
    assert ts.push(plan_of(merged, site, replace=True)).removed == ("vocab.json",)
    assert "vocab.json" not in site.repos[REPO]
    with pytest.raises(OutputError, match="public"):
        ts.push(plan_of(merged, site, private=True))


@pytest.mark.parametrize(
    ("match", "status", "said"),
    [("POST /api/v1/models", 401, "accept the token"), ("POST /api/v1/models", 403, "may not write")],
)
def test_a_failure_is_one_sentence_without_the_token(
    merged: Path, site: FakeModelScope, match: str, status: int, said: str
) -> None:
    """Whatever the site's answer repeats."""
    site.fail = (f"{match}$", status)
    with pytest.raises(OutputError, match=said) as caught:
        ts.push(plan_of(merged, site))
    assert TOKEN not in str(caught.value.as_dict())
    assert caught.value.__context__ is None


def test_without_its_client_the_extra_is_named(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line to install it."""
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    with pytest.raises(MissingExtraError) as caught:
        ts.push(ts.plan_push(merged, REPO, to="modelscope"))
    assert "tunesmith[modelscope]" in str(caught.value.next_step)
