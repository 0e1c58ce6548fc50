"""Every page, in both languages, on a desk and on a phone."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.chromium import CJK, NEEDS_CHROMIUM, OVERFLOW, OWN_TEXT
from tests.web.conftest import Page as Served

from .conftest import Visit

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = NEEDS_CHROMIUM

PAGES = ("open", "overview", "train", "chat", "compare", "merge", "verify", "report")
# What of each page must be there before anything is done on it.
PRESENT = {
    "open": ("run-path", "base-path", "run-open"),
    "overview": ("file-table", "loss-chart", "checkpoint-table"),
    "train": ("recipe-form", "recipe-yaml"),
    "chat": ("chat-variant", "chat-input", "chat-send"),
    "compare": ("compare-variants", "compare-input", "compare-run"),
    "merge": ("merge-out", "merge-start"),
    "verify": ("verify-start",),
    "report": ("report-start",),
}


def opened(visit: Visit, name: str, **options: object) -> Page:
    """A page of the run, once its own parts are there."""
    page = visit(f"#/{name}?run=run&base=base", **options)
    for testid in PRESENT[name]:
        page.get_by_test_id(testid).first.wait_for()
    return page


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("lang", ["en", "zh"])
def test_page_speaks_one_language_and_fits_desk_and_phone(visit: Visit, name: str, lang: str) -> None:
    """One first heading, all parts, no word of the other language, nothing wider than the screen."""
    page = opened(visit, name, lang=lang)
    assert page.locator("h1").count() == 1
    assert page.get_attribute("html", "lang") == {"en": "en", "zh": "zh-CN"}[lang]
    assert bool(CJK.search(page.locator("h1").inner_text())) == (lang == "zh") or name == "overview"
    if lang == "en":
        assert CJK.findall(page.evaluate(OWN_TEXT)) == []
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate(OVERFLOW) <= 0
    assert page.get_by_test_id("nav-merge").is_visible()


def test_every_page_is_reached_by_its_link(visit: Visit) -> None:
    """The address says where one is, and the run goes along."""
    page = opened(visit, "open")
    for name in PAGES:
        page.get_by_test_id(f"nav-{name}").click()
        page.get_by_test_id(PRESENT[name][0]).first.wait_for()
        assert re.search(rf"#/{name}\b.*run=run", page.url)
        assert page.get_by_test_id(f"nav-{name}").get_attribute("aria-current") == "page"


def test_language_and_theme_are_switched_and_remembered(visit: Visit) -> None:
    """Neither asks the server for the page again."""
    page = opened(visit, "overview")
    heading = page.locator("h2").first.inner_text()
    page.get_by_test_id("lang").click()
    page.wait_for_function("() => document.documentElement.lang === 'zh-CN'")
    assert page.locator("h2").first.inner_text() != heading
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    for _ in range(3):
        if page.evaluate("document.documentElement.dataset.theme") == "dark":
            break
        page.get_by_test_id("theme").click()
    assert page.evaluate(ground) != light
    page.reload()
    page.get_by_test_id("file-table").wait_for()
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_keyboard_alone_reaches_and_shows_where_it_is(visit: Visit) -> None:
    """Every stop of the Tab key is something to act on, and bears an outline that can be seen."""
    page = opened(visit, "merge")
    seen = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        found = page.evaluate(
            """() => { const at = document.activeElement, look = getComputedStyle(at);
               return [at.tagName, at.dataset.testid ?? '', look.outlineStyle, parseFloat(look.outlineWidth),
                       look.boxShadow]; }"""
        )
        tag, testid, style, width, shadow = found
        if tag == "BODY":
            break
        seen.add(testid)
        assert (style != "none" and width >= 1) or shadow != "none", found
    assert {"nav-merge", "lang", "theme", "merge-out", "merge-start"} <= seen


def test_wrong_place_is_told_where_it_was_typed(visit: Visit, site: Served) -> None:
    """What, where and what next; nothing is opened."""
    page = opened(visit, "open")
    page.get_by_test_id("run-path").fill("../../etc")
    page.get_by_test_id("run-open").click()
    said = page.get_by_test_id("error").first
    said.wait_for()
    assert str(site.root) in said.inner_text() or "--root" in said.inner_text()
