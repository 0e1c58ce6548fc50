"""A real server over a tiny run, in a thread of the test's own process, and the streams that it sends."""

from __future__ import annotations

import json
import shutil
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from fastapi import FastAPI

import tunesmith as ts
from tests.tiny_models import TinyRun, edit_json
from tests.web.conftest import served
from tunesmith.web import Settings
from tunesmith.web.live import Live

PLAIN = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # loading certificates for every request would take longest
LONG = 20_000  # tokens: some tens of seconds of answering


@dataclass(frozen=True)
class Served:
    """A server that runs.

    Attributes:
        url: its address.
        app: the application.
        root: the folder that it serves.
    """

    url: str
    app: FastAPI
    root: Path

    @property
    def live(self) -> Live:
        """Its engine and its slot."""
        live: Live = self.app.state.live
        return live

    def post(self, path: str, body: dict[str, Any]) -> httpx2.Response:
        """Ask, and read the whole answer."""
        headers = {"content-type": "application/json"}
        return httpx2.post(
            self.url + path, content=json.dumps(body).encode(), headers=headers, timeout=60, verify=PLAIN
        )

    @contextmanager
    def stream(self, path: str, body: dict[str, Any]) -> Iterator[Iterator[tuple[str, Any]]]:
        """Ask, and read event by event; the connection is closed with the block."""
        with httpx2.stream("POST", self.url + path, json=body, timeout=60, verify=PLAIN) as response:
            assert response.status_code == 200, response.read()
            yield _events(response.iter_lines())

    def events(self, path: str, body: dict[str, Any]) -> list[tuple[str, Any]]:
        """Ask, and read all events."""
        with self.stream(path, body) as events:
            return list(events)


def _events(lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    event = ""
    for line in lines:
        if line.startswith("event: "):
            event = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield event, json.loads(line.removeprefix("data: "))


@contextmanager
def serve(root: Path, **settings: Any) -> Iterator[Served]:
    """Serve a folder at a free port of this machine until the block ends."""
    with served(Settings(root=root, dtype="fp32", **settings)) as page:
        yield Served(f"http://127.0.0.1:{page.settings.port}", page.app, root)


def until(what: str, happened: Callable[[], bool], *, seconds: float = 60.0) -> None:
    """Wait until something has happened, and fail where it has not in time."""
    limit = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < limit, f"not within {seconds:g} s: {what}"
        time.sleep(0.005)


def tiny_root(tiny: TinyRun, root: Path) -> Path:
    """A folder with a run of two adapters, their base, and the model that one of them was merged into.

    The base takes long answers, so that there is time to go away.
    """
    base = shutil.copytree(tiny.base, root / "base")
    edit_json(base / "config.json", max_position_embeddings=LONG)
    run = Path(shutil.copytree(tiny.adapters["final"], root / "out" / "run"))
    shutil.copytree(tiny.adapters["checkpoint-10"], run / "checkpoint-10")
    for adapter in (run, run / "checkpoint-10"):
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    shutil.copytree(tiny.merged, root / "out" / "run-merged")
    return root


def engine_of(served: Served) -> ts.Engine:
    """The variants of a served tiny run, without the server."""
    run = served.root / "out" / "run"
    return ts.load_engine(run, ["base", "final", "10", str(run.parent / "run-merged")], dtype="fp32")[0]


def said(engine: ts.Engine, variant: str, prompt: Any, **settings: Any) -> ts.Generation:
    """What an engine answers."""
    return engine.generate([ts.Request(variant, prompt)], ts.GenerationSettings(**settings))[0]
