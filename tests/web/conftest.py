"""The page over a real server in a thread, with a root that holds a tiny run, its base and a merged model."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import TinyRun
from tunesmith.web import Settings, create_app
from tunesmith.web.app import PageServer, bind


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        status: the HTTP status.
        body: its bytes.
        headers: its headers, in lower case.
    """

    status: int
    body: bytes
    headers: Mapping[str, str]

    @property
    def json(self) -> Any:
        """The body as strict JSON."""

        def refuse(word: str) -> None:
            raise AssertionError(f"{word} is no JSON")

        return json.loads(self.body, parse_constant=refuse)

    @property
    def error(self) -> Any:
        """The error that it tells."""
        return self.json["error"]


@dataclass
class Page:
    """A client of a served page.

    Attributes:
        settings: what is served.
        app: the application.
        headers: sent with every request.
    """

    settings: Settings
    app: Any
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """The folder that it serves."""
        return self.settings.root

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Send a request as it is."""
        connection = HTTPConnection("127.0.0.1", self.settings.port, timeout=60)
        try:
            connection.request(method, path, body=body, headers={**self.headers, **(headers or {})})
            reply = connection.getresponse()
            return Answer(reply.status, reply.read(), {key.lower(): value for key, value in reply.getheaders()})
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        """Read an address."""
        return self.ask("GET", path, headers={key.replace("_", "-"): value for key, value in headers.items()})

    def post(self, path: str, body: object = None) -> Answer:
        """Send a JSON document."""
        return self.ask("POST", path, json.dumps(body).encode(), {"content-type": "application/json"})

    def start(self, kind: str, **params: object) -> str:
        """Begin a job and return its id."""
        answer = self.post("/api/v1/jobs", {"kind": kind, "params": params})
        assert answer.status == 202, answer.body
        return str(answer.json["job"]["id"])

    def job(self, job_id: str, *, seconds: float = 120) -> Any:
        """Wait until a job has ended."""
        wait_for(lambda: self.app.state.jobs.get(job_id).ended, seconds=seconds)
        return self.get(f"/api/v1/jobs/{job_id}").json["job"]

    def done(self, kind: str, **params: object) -> Any:
        """Do a job and return it; it must not fail."""
        job = self.job(self.start(kind, **params))
        assert job["state"] == "done", job["error"]
        return job

    def events(self, job_id: str, after: int = 0, **headers: str) -> list[tuple[int, str, Any]]:
        """All events of a job that has ended."""
        text = self.get(f"/api/v1/jobs/{job_id}/events?after={after}", **headers).body.decode()
        return list(read_events(text))


def read_events(text: str) -> Iterator[tuple[int, str, Any]]:
    """Server-sent events: number, name, data."""
    for block in text.split("\n\n"):
        lines = dict(line.partition(": ")[::2] for line in block.splitlines())
        if "data" in lines:
            yield int(lines["id"]), lines["event"], json.loads(lines["data"])


def wait_for(is_so: Callable[[], object], *, seconds: float = 60) -> None:
    """Wait until something is so; fail where it does not come to be."""
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until, "it did not come to be"
        time.sleep(0.01)


@contextmanager
def served(settings: Settings, **state: object) -> Iterator[Page]:
    """Serve a page at a free port until the block ends.

    Args:
        settings: what is served; its port does not matter.
        state: what of the application's state is replaced.
    """
    bound = bind(settings.model_copy(update={"port": 0}))
    settings = settings.model_copy(update={"port": bound.getsockname()[1]})
    app = create_app(settings)
    for name, value in state.items():
        setattr(app.state, name, value)
    app.state.warming = True  # nobody measures this machine here
    server = PageServer(app, settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield Page(settings, app)
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        bound.close()
        assert not thread.is_alive(), "the server did not end"


@contextmanager
def raw(page: Page) -> Iterator[socket.socket]:
    """A bare connection to a page."""
    with socket.create_connection(("127.0.0.1", page.settings.port), timeout=10) as connection:
        yield connection


def make_root(folder: Path, tiny: TinyRun) -> Path:
    """A root with a run of two checkpoints, its base, and a model that was merged from it."""
    root = folder / "root"
    shutil.copytree(tiny.adapters["final"], root / "run")
    shutil.copytree(tiny.adapters["checkpoint-10"], root / "run" / "checkpoint-10")
    shutil.copytree(tiny.base, root / "base")
    shutil.copytree(tiny.merged, root / "run-merged")
    (root / "prompts.txt").write_text("One?\nTwo?\n", encoding="utf-8")
    rows = [{"instruction": f"Say {word}.", "output": word} for word in ("one", "two", "three", "four", "five")]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "TUNESMITH_HOME", str(tmp_path_factory.mktemp("web-home")))
        yield


@pytest.fixture(scope="session")
def page(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A served page, shared by all tests that leave it as it is."""
    root = make_root(tmp_path_factory.mktemp("web"), tiny)
    with served(Settings(root=root, run=str(root / "run"), base=str(root / "base"), dtype="fp32")) as one:
        yield one


@pytest.fixture
def own_root(tiny: TinyRun, tmp_path: Path) -> Path:
    """A root that a test may change."""
    return make_root(tmp_path, tiny)
