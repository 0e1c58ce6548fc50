"""A served page, and windows on it that nothing leaves and that complain of nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.tiny_models import TinyRun
from tests.web.conftest import Page as Served
from tests.web.conftest import make_root, served
from tunesmith.web import Settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

Visit = Callable[..., "Page"]
LOCALES = {"en": "en-US", "zh": "zh-CN"}


def log_of(run: Path) -> None:
    """Give a bare adapter the log of a training."""
    rows = [
        {"current_steps": step, "total_steps": 20, "loss": 3.0 - step / 10, "lr": 1e-4, "epoch": step / 10}
        for step in range(1, 21)
    ]
    rows += [{"current_steps": step, "total_steps": 20, "eval_loss": 3.1 - step / 12} for step in (10, 20)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "trainer_log.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def site(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The page of a tiny run."""
    folder = tmp_path_factory.mktemp("site")
    root = make_root(folder, tiny)
    log_of(root / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_HOME", str(folder / "home"))
        with served(Settings(root=root, run=str(root / "run"), base=str(root / "base"), dtype="fp32")) as one:
            yield one


@pytest.fixture
def visit(browser: Browser, site: Served) -> Iterator[Visit]:
    """Opens a page in a window of its own; afterwards nothing must have left the site or been complained of."""
    origin = f"http://127.0.0.1:{site.settings.port}"
    complaints: list[str] = []
    contexts = []

    def said(message: Any) -> None:
        refused = message.text.startswith("Failed to load resource: the server responded with a status of 4")
        if message.type in ("error", "warning") and not refused:  # of a refusal the page itself tells
            complaints.append(message.text)

    def open_page(
        address: str, *, lang: str = "en", width: int = 1280, theme: Any = "light", origin: str = origin
    ) -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, locale=LOCALES[lang], color_scheme=theme
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", said)
        page.on("pageerror", lambda error: complaints.append(str(error)))

        def stays(request: Any) -> None:
            if not re.match(rf"({re.escape(origin)}/|data:|blob:{re.escape(origin)}/)", request.url):
                complaints.append(f"left for {request.url}")

        page.on("request", stays)
        page.goto(f"{origin}/{address}")
        return page

    yield open_page
    for context in contexts:
        with suppress(Exception):  # the window may be gone with the site
            context.close()
    assert complaints == []
