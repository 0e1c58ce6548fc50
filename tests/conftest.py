"""What several rooms' tests share: offline libraries, a cache of their own, and one tiny run made once a session."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.chromium import ARGUMENTS, CHROMIUM
from tests.tiny_models import TinyRun, build_run
from tunesmith.models import VariantSet

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A base, two adapters and a merged model on disk."""
    return build_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def variants(tiny: TinyRun) -> VariantSet:
    """All of them loaded, in float32."""
    return VariantSet.load(tiny.base, adapters=tiny.adapters, full={"merged": tiny.merged}, tokenizer_dir=tiny.base)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The system's chromium; no longer than a module's tests, for it holds an event loop."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (the dev extra)")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield started
        started.close()
