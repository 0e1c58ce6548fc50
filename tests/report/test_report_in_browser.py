"""The report in a browser: quiet, bilingual, and no wider than its screen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.chromium import CJK, NEEDS_CHROMIUM, OVERFLOW, OWN_TEXT
from tunesmith.report import write_report
from tunesmith.verify import Verdict

from .conftest import Parts, evaluation_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

OPEN_ALL = "document.querySelectorAll('details').forEach((each) => { each.open = true; })"

pytestmark = NEEDS_CHROMIUM


@pytest.fixture
def report(parts: Parts, bad_verdict: Verdict, tmp_path: Path) -> Path:
    """A complete report of a failed verification: every kind of row is in it."""
    evaluation = evaluation_of(("checkpoint-100", "final"))
    return write_report(tmp_path / "report.html", **{**parts, "verdict": bad_verdict}, evaluation=evaluation)


def open_page(browser: Browser, url: str, *, width: int = 1280, locale: str = "en-US", scripts: bool = True) -> Page:
    """A page that fails the test on any request that would leave, and on any complaint of the console."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, locale=locale, java_script_enabled=scripts, offline=True
    )
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: request.url.startswith("file:") or complaints.append(request.url))
    page.goto(url)
    page.wait_for_load_state("load")
    assert complaints == []
    return page


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("lang", ["en", "zh"])
def test_no_language_makes_the_page_wider_than_the_screen(
    browser: Browser, report: Path, lang: str, width: int
) -> None:
    """A phone scrolls down only; wide tables and charts scroll within themselves, folds open or not."""
    page = open_page(browser, f"{report.as_uri()}?lang={lang}", width=width)
    assert page.evaluate(OVERFLOW) <= 0
    page.evaluate(OPEN_ALL)
    assert page.evaluate(OVERFLOW) <= 0


def test_english_mode_shows_no_chinese_of_ours(browser: Browser, report: Path) -> None:
    """Only what a model or a user wrote may be in another language."""
    page = open_page(browser, f"{report.as_uri()}?lang=en")
    page.evaluate(OPEN_ALL)
    own = page.evaluate(OWN_TEXT)
    assert "Different" in own
    assert CJK.findall(own) == []


def test_chinese_mode_shows_the_chinese_and_hides_the_english(browser: Browser, report: Path) -> None:
    """Both languages are in the file, and one at a time on the screen."""
    page = open_page(browser, f"{report.as_uri()}?lang=zh")
    own = page.evaluate(OWN_TEXT)
    assert "不一致" in own
    assert "Different" not in own
    assert page.evaluate("document.documentElement.lang") == "zh-Hans"


def test_the_browsers_language_is_followed_and_the_switch_overrules_it(browser: Browser, report: Path) -> None:
    """A Chinese browser opens it in Chinese; a press on EN turns it, and is remembered."""
    page = open_page(browser, report.as_uri(), locale="zh-CN")
    assert page.get_attribute("html", "data-lang") == "zh"
    page.click("[data-switch=lang] [data-value=en]")
    assert page.get_attribute("html", "data-lang") == "en"
    assert page.get_attribute("[data-switch=lang] [data-value=en]", "aria-pressed") == "true"
    page.reload()
    assert page.get_attribute("html", "data-lang") == "en"


def test_the_theme_switch_turns_the_page_dark_and_back(browser: Browser, report: Path) -> None:
    """The choice overrules the system's."""
    page = open_page(browser, f"{report.as_uri()}?lang=en")
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.click("[data-switch=theme] [data-value=dark]")
    assert page.evaluate(ground) != light
    page.click("[data-switch=theme] [data-value=auto]")
    assert page.evaluate(ground) == light


def test_a_filter_shows_the_questions_that_bear_a_mark_and_all_shows_all(browser: Browser, report: Path) -> None:
    """Also those behind the fold, which closes again; a filter that finds none there hides the fold."""
    page = open_page(browser, f"{report.as_uri()}?lang=en")
    shown = page.locator("#outputs article:visible")
    at_first = shown.count()
    page.click("[data-filter=truncated]")
    assert shown.count() == 1
    assert "row-2" in shown.inner_text()
    assert not page.locator("#outputs details.fold").is_visible()
    page.click("[data-filter=different]")
    assert shown.count() == 4
    assert page.get_attribute("[data-filter=different]", "aria-pressed") == "true"
    page.click("[data-filter='']")
    assert shown.count() == at_first == 3
    assert page.locator("#outputs details.fold").is_visible()


def test_without_scripts_the_report_is_english_and_complete(browser: Browser, report: Path) -> None:
    """Some mail clients and archives run none."""
    page = open_page(browser, report.as_uri(), locale="zh-CN", scripts=False)
    assert page.locator("#verdict h2 [lang=en]").is_visible()
    assert not page.locator("#verdict h2 [lang=zh-Hans]").is_visible()
    assert not page.locator(".switches").is_visible()
    assert not page.locator(".filters").is_visible()
    assert page.locator("#outputs article:visible").count() == 3


def test_paper_shows_the_folded_parts_and_no_switches(browser: Browser, report: Path) -> None:
    """Who prints it wants all of it."""
    page = open_page(browser, f"{report.as_uri()}?lang=en")
    assert not page.locator(".files").first.is_visible()
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator(".files").first.is_visible()
    assert not page.locator(".switches").is_visible()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.emulate_media(media="screen")
    assert not page.locator(".files").first.is_visible()
