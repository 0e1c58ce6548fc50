"""What several rooms' tests share: offline libraries, a cache of their own, and one tiny run made once a session."""

from __future__ import annotations

import gc
import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # they share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # and what tests start would inherit that

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.chromium import ARGUMENTS, CHROMIUM

# What takes seconds to import is imported by the fixtures: the process that only hands out tests needs none of it.
if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.tiny_models import TinyRun
    from tunesmith.models import VariantSet

MOST_WORKERS = 4  # each has the libraries and fixtures of its own, up to 2 GB


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """A worker for each core; where there is only one core, none beside this process."""
    cores = os.cpu_count() or 1
    return min(cores, MOST_WORKERS) if cores > 1 else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With ``--dist loadgroup`` one worker has the clusters, which would find each other, and another the browser."""
    for item in items:
        for name in ("cluster", "browser"):
            if item.get_closest_marker(name) is not None:
                item.add_marker(pytest.mark.xdist_group(name))


def pytest_collection() -> None:
    """Libraries and tests are a million objects that stay: the collector would walk them 20 times for nothing."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Then it may work again."""
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _walked_once() -> None:
    """What is there before a module's tests stays: the walks that our code and Trainer ask for leave it out."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A base, two adapters and a merged model on disk."""
    from tests.tiny_models import build_run

    return build_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def variants(tiny: TinyRun) -> VariantSet:
    """All of them loaded, in float32."""
    from tunesmith.models import VariantSet

    return VariantSet.load(tiny.base, adapters=tiny.adapters, full={"merged": tiny.merged}, tokenizer_dir=tiny.base)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Products and sums cut in two, as on a person's machine: a worker of the suite computes with one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The system's chromium; no longer than a module's tests, for it holds an event loop."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (the dev extra)")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield started
        started.close()
