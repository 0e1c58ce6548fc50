"""A fake hub, a client that asks it alone, and a merged model with its certificate."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

import tunesmith as ts
from tests.export.push.fake_hub import TOKEN, FakeHub
from tests.tiny_models import TinyRun


@pytest.fixture(autouse=True)
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub's client: online, logged in, with a cache of the test's own, and without its long waits."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_XET_CACHE", str(tmp_path / "xet"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda _: None, time=time.time))


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that a push would have waited before it asked again."""
    found: list[float] = []
    monkeypatch.setattr("tunesmith.export.push.hub._Report.pause", lambda _, seconds: found.append(seconds))
    return found


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    """A hub without xet storage: large files come by LFS."""
    served = FakeHub()
    yield served
    served.close()


@pytest.fixture(scope="session")
def certified(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged model that was verified, so that its certificate says so."""
    out = tmp_path_factory.mktemp("push") / "merged"
    run, base = tiny.adapters["final"], str(tiny.base)
    ts.merge(ts.plan_merge(run, out, base=base))
    verdict = ts.verify(run, out, base=base, levels=("structure", "assets", "weights"))
    assert verdict.certificate is not None
    return out


@pytest.fixture
def merged(certified: Path, tmp_path: Path) -> Path:
    """A copy of it to do anything with."""
    return Path(shutil.copytree(certified, tmp_path / "merged"))


@pytest.fixture
def tiny_adapter(tiny: TinyRun, tmp_path: Path) -> Path:
    """A copy of an adapter to do anything with."""
    return Path(shutil.copytree(tiny.adapters["final"], tmp_path / "adapter"))
