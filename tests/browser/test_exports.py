"""What people do to hand a fine-tune on: quantize it, see what that cost, and look at what a push would send."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.chromium import CJK, NEEDS_CHROMIUM
from tests.web.conftest import Page as Served

from .conftest import Visit

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = NEEDS_CHROMIUM

PAGE = "#/merge?run=run&base=base"
TABS = ("merge", "quantize", "drift", "gguf", "push")
WIDER = "document.documentElement.scrollWidth > document.documentElement.clientWidth"


def shown(page: Page, testid: str) -> str:
    """The text of an element, once it is there."""
    element = page.get_by_test_id(testid)
    element.wait_for()
    return element.inner_text()


def test_a_model_is_quantized_and_what_it_lost_is_shown(visit: Visit, site: Served) -> None:
    """The look comes before the start; the done card leads to the drift, whose table fits a phone."""
    page = visit(f"{PAGE}&tab=quantize")
    page.get_by_test_id("quantize-scheme").select_option("int4:32")
    page.get_by_text("tunesmith quantize run --out run-int4-32 --base base --scheme int4:32").wait_for()
    assert not (site.root / "run-int4-32").exists()
    page.get_by_test_id("quantize-start").click()
    assert "int4:32" in shown(page, "quantize-done")
    assert (site.root / "run-int4-32" / "model.safetensors").is_file()
    page.get_by_test_id("to-drift").click()
    page.get_by_test_id("drift-models").get_by_text("run-int4-32 · quantized int4:32").wait_for()
    page.get_by_test_id("drift-data").fill("rows.jsonl")
    page.get_by_test_id("drift-rows").fill("2")
    page.get_by_test_id("drift-start").click()
    table = shown(page, "drift-table")
    assert re.search(r"run-int4-32\s+int4:32 · faithful", table)
    assert page.get_by_test_id("drift-table").locator("tbody tr").count() == 2
    assert len(shown(page, "drift-advice")) > 20
    page.get_by_test_id("drift-chart").locator("svg").first.wait_for()
    page.set_viewport_size({"width": 390, "height": 844})
    assert not page.evaluate(WIDER)
    page.get_by_test_id("lang").click()
    page.locator("html[lang=zh-CN]").wait_for()
    assert CJK.search(shown(page, "drift-table"))


def test_a_view_of_the_base_goes_into_the_command_and_into_its_proof(visit: Visit, site: Served) -> None:
    """The page's own proof is of the stored base, so the done card has the line to type in its place."""
    page = visit(f"{PAGE}&tab=quantize")
    page.get_by_test_id("quantize-out").fill("run-seen")
    page.get_by_test_id("quantize-view").select_option("nf4-double")
    page.get_by_text(
        "tunesmith quantize run --out run-seen --base base --scheme int8 --base-view nf4-double"
    ).wait_for()
    page.get_by_test_id("quantize-start").click()
    shown(page, "quantize-done")
    page.get_by_text("tunesmith verify run run-seen --base base --base-view nf4-double").wait_for()
    assert '"view": "nf4-double"' in (site.root / "run-seen" / "tunesmith-certificate.json").read_text("utf-8")
    assert page.get_by_test_id("verify-now").count() == 0
    assert page.get_by_test_id("to-push").is_visible()


def test_nothing_is_sent_before_it_was_shown_and_asked_for(visit: Visit, site: Served) -> None:
    """What nobody verified is refused in a sentence; files and card are shown; a changed card is looked at again."""
    page = visit(f"{PAGE}&tab=push")
    page.get_by_test_id("push-directory").fill("run-merged")
    assert page.get_by_test_id("push-look").is_disabled()
    page.get_by_test_id("push-repo").fill("me/tuned")
    page.get_by_test_id("push-look").click()
    assert "Nobody has verified this directory" in shown(page, "error")
    page.get_by_text("Card and other settings").click()
    page.get_by_test_id("push-unverified").set_checked(True, force=True)
    page.get_by_test_id("push-look").click()
    assert "model.safetensors" in shown(page, "push-files")
    assert "Nobody has verified what goes up" in shown(page, "push-findings")
    card = page.get_by_test_id("push-card")
    assert "library_name: transformers" in card.input_value()
    page.get_by_test_id("push-start").click()
    dialog = page.get_by_role("dialog")
    assert re.search(r"\d+ files .* me/tuned on Hugging Face, private", dialog.inner_text())
    page.get_by_test_id("dialog-cancel").click()
    assert page.get_by_test_id("push-start").is_enabled()
    card.fill(card.input_value() + "\nBy hand.\n")
    assert page.get_by_test_id("push-start").is_disabled()
    page.get_by_test_id("push-look").click()
    page.get_by_text("--card card.md").wait_for()
    page.locator("[data-testid=push-start]:enabled").wait_for()
    assert card.input_value().endswith("By hand.\n")
    assert [job.params.dry_run for job in site.app.state.jobs.newest_first() if job.kind == "push"] == [True] * 3


def test_figures_of_this_session_can_go_on_the_card(visit: Visit, site: Served) -> None:
    """A drift is offered where it has the directory in it, and is on the card only if it is chosen."""
    page = visit(f"{PAGE}&tab=push")
    page.get_by_test_id("push-directory").fill("run-merged")
    page.get_by_text("Card and other settings").click()
    assert page.get_by_test_id("push-drift").count() == 0
    measured = {"run": "run", "base": "base", "data": "rows.jsonl", "max_rows": 2}
    site.done("drift", **measured, directories=["run-merged"])
    choice = page.get_by_test_id("push-drift")
    choice.wait_for()
    assert choice.input_value() == ""
    page.get_by_test_id("push-directory").fill("run")
    choice.wait_for(state="detached")
    page.get_by_test_id("push-directory").fill("run-merged")
    choice.select_option(index=1)
    page.get_by_test_id("push-repo").fill("me/tuned")
    page.get_by_test_id("push-unverified").set_checked(True, force=True)
    page.get_by_test_id("push-look").click()
    page.get_by_test_id("push-card").wait_for()
    assert "| run-merged |" in page.get_by_test_id("push-card").input_value()
    page.get_by_text(re.compile(r"tunesmith push run-merged me/tuned .*--drift drift-\w+\.json")).wait_for()


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_every_tab_has_its_words_and_fits_a_phone(visit: Visit, lang: str) -> None:
    """No key is shown in the place of its text, nothing is wider than the screen, and arrow keys move between tabs."""
    page = visit(PAGE, lang=lang, width=390)
    for place, name in enumerate(TABS):
        tab = page.get_by_test_id(f"export-tab-{name}")
        if place:
            page.keyboard.press("ArrowRight")
        else:
            tab.focus()
        page.locator(f"[data-testid=export-tab-{name}][aria-selected=true]").wait_for()
        panel = page.get_by_role("tabpanel")
        panel.locator("select, input").first.wait_for()
        assert not re.search(r"\b(page|merge|drift|push)\.[a-z]+\.", page.locator("main").inner_text())
        assert bool(CJK.search(panel.inner_text())) is (lang == "zh")
        assert not page.evaluate(WIDER), name
