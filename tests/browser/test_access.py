"""Everyone can use it: names, headings, focus, contrast, small screens, and dialogs that give the focus back."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from tests.chromium import NEEDS_CHROMIUM, OVERFLOW
from tests.runs import making
from tests.web.conftest import Page as Served

from .conftest import Visit
from .parrot import build_parrot

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = NEEDS_CHROMIUM

WORDS = ["Oil", " the", " chain", ".", " Then", " ride", " on", ",", " slowly"]
RUN = "run=known/run&base=known/base"
# What of each page must be there before it is judged.
READY = {
    "open": "run-table",
    "overview": "file-table",
    "train": "recipe-form",
    "chat": "chat-input",
    "compare": "compare-input",
    "merge": "merge-start",
    "verify": "verify-start",
    "report": "report-start",
}
ROLES = "button|link|textbox|combobox|checkbox|switch|slider|tab|spinbutton|searchbox|progressbar|region|dialog|iframe"
NAMELESS = re.compile(rf'^\s*- (?:{ROLES})(?! ")\b.*', re.MULTILINE)

# What can be reached by Tab; a disabled one, or one in what is folded or hidden, cannot.
STOPS = """() => [...document.querySelectorAll(
    'a[href], button, input, select, textarea, summary, iframe, [tabindex="0"]')].filter((one) =>
  one.tabIndex >= 0 && !one.disabled && one.checkVisibility({ visibilityProperty: true }) && !one.seen)
  .map((one) => `${one.tagName} ${one.dataset.testid ?? one.innerText ?? ''}`)"""
HERE = """() => { const at = document.activeElement; const again = at.seen; at.seen = true;
  const out = at === document.body || (again && at.matches('.skip'));
  return out ? 'out' : again ? `again ${at.outerHTML.slice(0, 200)}` : 'on'; }"""
POINTED = """() => [...document.querySelectorAll('main *, header *, nav *, dialog *')].filter((one) =>
  getComputedStyle(one).cursor === 'pointer' && one.checkVisibility()
  && !one.closest('a[href], button, label, summary, select, input, [data-testid$=chart], [data-testid$=heatmap], svg'))
  .map((one) => one.outerHTML.slice(0, 120))"""
FOCUSABLE = """() => [...document.querySelectorAll('[tabindex="0"], [role=button], [role=link], [role=checkbox]')]
  .filter((one) => !one.matches('button, a[href], input, summary, pre, [role=region][aria-label], .scroll'))
  .map((one) => one.outerHTML.slice(0, 120))"""
HEADINGS = """() => [...document.querySelectorAll('h1, h2, h3, h4, h5, h6')].filter((one) => one.checkVisibility())
  .map((one) => [Number(one.tagName[1]), one.innerText])"""

# WCAG 2.2, 1.4.3: the text's colour over all that lies behind it, each colour drawn to learn its parts.
CONTRAST = """() => {
  const canvas = Object.assign(document.createElement('canvas'), { width: 1, height: 1 });
  const pen = canvas.getContext('2d', { willReadFrequently: true });
  const known = new Map();
  const parts = (colour) => {
    if (!known.has(colour)) {
      pen.clearRect(0, 0, 1, 1);
      pen.fillStyle = colour;
      pen.fillRect(0, 0, 1, 1);
      const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data;
      known.set(colour, [r, g, b, a / 255]);
    }
    return known.get(colour);
  };
  const over = ([r, g, b, a], [R, G, B]) => [r * a + R * (1 - a), g * a + G * (1 - a), b * a + B * (1 - a), 1];
  const ground = (one) => {
    const behind = [];
    for (let at = one; at; at = at.parentElement) {
      behind.push(parts(getComputedStyle(at).backgroundColor));
      if (behind.at(-1)[3] === 1) break;
    }
    return behind.reverse().reduce((below, above) => over(above, below), [255, 255, 255, 1]);
  };
  const faint = (one) => (one ? Number(getComputedStyle(one).opacity) * faint(one.parentElement) : 1);
  const linear = (v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const poor = [];
  let judged = 0;
  const judge = (one, look, text) => {
    const [r, g, b, a] = parts(one.ownerSVGElement ? look.fill : look.color);
    const below = ground(one.ownerSVGElement?.parentElement ?? one);
    const shown = over([r, g, b, a * faint(one) * (one.ownerSVGElement ? Number(look.fillOpacity) : 1)], below);
    const [high, low] = [light(shown), light(below)].sort((x, y) => y - x);
    const ratio = (high + 0.05) / (low + 0.05);
    const size = parseFloat(look.fontSize);
    const least = size >= 24 || (size >= 18.66 && Number(look.fontWeight) >= 700) ? 3 : 4.5;
    judged += 1;
    const name = `${one.tagName}.${one.className?.baseVal ?? one.className}`;
    if (ratio < least - 0.005) poor.push(`${ratio.toFixed(2)} < ${least}: ${name} "${text.slice(0, 40)}"`);
  };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    const one = node.parentElement;
    if (!node.data.trim() || one.closest('.unseen, script, style, :disabled, noscript, option')) continue;
    if (one.checkVisibility({ visibilityProperty: true })) judge(one, getComputedStyle(one), node.data.trim());
  }
  for (const one of document.querySelectorAll('input[type=text], textarea, select')) {
    if (one.disabled || !one.checkVisibility()) continue;
    if (one.value) judge(one, getComputedStyle(one), one.value);
    else if (one.placeholder) judge(one, getComputedStyle(one, '::placeholder'), one.placeholder);
  }
  return { poor: [...new Set(poor)], judged };
}"""
# WCAG 2.2, 2.5.8: of a box that is ticked its label counts; links within a sentence do not.
SMALL = """() => [...document.querySelectorAll('button, select, input, textarea, summary, nav a, a.button, .chip')]
  .filter((one) => one.checkVisibility({ visibilityProperty: true }) && !one.closest('.unseen, .skip'))
  .map((one) => (one.matches('[type=checkbox]') ? (one.closest('label') ?? one) : one))
  .filter((one) => Math.min(one.getBoundingClientRect().width, one.getBoundingClientRect().height) < 23.95)
  .map((one) => one.outerHTML.slice(0, 160))"""


@pytest.fixture(scope="module")
def site(site: Served) -> Served:
    """A run whose answers are known, and jobs of it that have ended."""
    known = build_parrot(site.root / "known", WORDS, instead=(2, " link"))
    making.state(known, making.history(2.0, 1.5, 1.2))
    settings = {"max_new_tokens": 8, "greedy": True}
    common = {"run": "known/run", "base": "known/base"}
    site.done("compare", **common, variants=["base", "final"], prompts_text="One?\nTwo?\n", settings=settings)
    site.done("merge", **common, checkpoint="final", out="known/merged", dtype="auto", rounding="auto")
    site.done("verify", **common, directory="known/merged")
    site.done("verify", run="run", base="base", directory="known/merged", levels=["structure", "weights"])
    return site


def opened(visit: Visit, name: str, query: str = "", **options: Any) -> Page:
    """A page of the run, once its own parts are there."""
    page = visit(f"#/{name}?{RUN}{query}", **options)
    page.get_by_test_id(READY[name]).first.wait_for()
    return page


def turned_to(page: Page, name: str, query: str = "") -> None:
    """Another page in the same window."""
    page.evaluate("address => { location.hash = address; }", f"#/{name}?{RUN}{query}")
    page.locator(f"main.page-{name}").get_by_test_id(READY[name]).first.wait_for()


def unfolded(page: Page) -> None:
    """Open all that is folded, so that it is judged as well."""
    page.evaluate("() => { for (const one of document.querySelectorAll('details')) one.open = true; }")


def job_of(site: Served, kind: str, place: int = 0) -> str:
    """The id of a job of a kind, the newest first."""
    jobs = [job for job in site.get("/api/v1/jobs").json["jobs"] if job["kind"] == kind]
    return str(jobs[place]["id"])


def states(site: Served) -> list[tuple[str, str, str]]:
    """Pages with what they hold: their name, the rest of the address, and what must be there."""
    return [
        *((name, "", READY[name]) for name in READY),
        ("compare", f"&tab=many&job={job_of(site, 'compare')}", "compare-cell"),
        ("compare", "&tab=effect", "evaluate-start"),
        ("compare", f"&tab=vote&job={job_of(site, 'compare')}", "votes"),
        ("merge", f"&job={job_of(site, 'merge')}", "merge-done"),
        ("verify", f"&job={job_of(site, 'verify', 1)}", "verify-verdict"),
        ("verify", f"&job={job_of(site, 'verify')}", "verify-verdict"),
        ("overview", "&run=nowhere", "error"),
        ("train", "&job=0123456789ab", "recipe-form"),
    ]


def each_state(visit: Visit, site: Served) -> Any:
    """Go through all of them in one window, with an answer in the chat and two compared."""
    page = opened(visit, "compare")
    page.get_by_test_id("compare-input").fill("My chain squeaks.")
    page.get_by_test_id("compare-run").click()
    page.locator("[data-testid=compare-cell] [data-reason]").nth(1).wait_for()
    turned_to(page, "chat")
    page.get_by_test_id("chat-input").fill("My chain squeaks.")
    page.get_by_test_id("chat-send").click()
    page.get_by_test_id("stop-reason").wait_for()
    for name, query, testid in states(site):
        page.evaluate("address => { location.hash = address; }", f"#/{name}?{RUN}{query}")
        page.locator(f"main.page-{name}").get_by_test_id(testid).first.wait_for()
        if name == "overview" and not query:
            page.get_by_test_id("loss-chart").locator("svg").wait_for()
        unfolded(page)
        yield page, f"{name}{query}"


def check_structure(page: Page, where: str) -> None:
    """What is acted on is native, has a name and room for a finger; headings begin with one h1, skip none."""
    assert NAMELESS.findall(page.locator("body").aria_snapshot()) == [], where
    assert page.evaluate(POINTED) == [], where
    assert page.evaluate(FOCUSABLE) == [], where
    assert page.evaluate(SMALL) == [], where
    headings = page.evaluate(HEADINGS)
    levels = [level for level, _ in headings]
    assert (levels[0], levels.count(1)) == (1, 1), where
    skipped = [pair for pair in pairwise(levels) if pair[1] - pair[0] > 1]
    assert skipped == [], headings
    assert all(text.strip() for _, text in headings), where


def too_faint(page: Page, where: str) -> set[str]:
    """Text that can be seen and does not stand out as WCAG AA asks, in either theme."""
    poor = set()
    for theme in ("dark", "light"):
        page.emulate_media(color_scheme=theme)
        page.wait_for_timeout(250 if page.locator(".chart svg").count() else 20)  # charts are drawn anew
        found = page.evaluate(CONTRAST)
        assert found["judged"] > 20
        poor |= {f"{where} {theme}: {one}" for one in found["poor"]}
    return poor


def test_every_state_of_every_page_is_told_and_stands_out(visit: Visit, site: Served) -> None:
    """Names, headings, room for a finger, and contrast in both themes, charts and placeholders too."""
    poor = set()
    for page, where in each_state(visit, site):
        check_structure(page, where)
        poor |= too_faint(page, where)
    assert sorted(poor) == []


def test_tab_reaches_everything_and_is_never_caught(visit: Visit) -> None:
    """On every page once through and out again, every stop once."""
    page = opened(visit, "report")
    for name in READY:
        turned_to(page, name)
        page.reload()  # for a page that is turned to has the focus where it begins
        page.get_by_test_id(READY[name]).first.wait_for()
        unfolded(page)
        stops = len(page.evaluate(STOPS))
        for _ in range(stops + 30):
            page.keyboard.press("Tab")
            where = page.evaluate(HERE)
            if where == "out":
                break
            assert where == "on", (name, where)
        assert where == "out", name
        assert page.evaluate(STOPS) == [], name


def test_answers_and_progress_are_told_as_they_come(visit: Visit, site: Served) -> None:
    """Live regions around replies, the stage of a job, and what it ends with."""
    page = opened(visit, "chat")
    assert page.locator("[role=log][aria-live=polite]").count() == 1
    page.get_by_test_id("chat-input").fill("2")
    page.get_by_test_id("chat-send").click()
    page.locator("[role=log][aria-live=polite] [data-testid=chat-reply]").wait_for()
    page.get_by_test_id("chat-send").wait_for()
    turned_to(page, "compare")
    page.get_by_test_id("compare-input").fill("2")
    page.get_by_test_id("compare-run").click()
    page.locator("[aria-live=polite] [data-testid=compare-cell]").nth(1).wait_for()
    page.get_by_test_id("compare-run").wait_for()
    turned_to(page, "verify", "&merged=known/merged")
    with site.app.state.live.slot.hold("chat"):  # so the job waits
        page.get_by_test_id("verify-start").click()
        progress = page.get_by_test_id("verify-progress")
        progress.locator("[role=progressbar][aria-label]").wait_for()
        assert progress.get_by_role("status").inner_text().strip()
    page.locator("[aria-live=polite] [data-testid=verify-verdict]").wait_for()


@pytest.mark.parametrize(("name", "needed"), [("chat", ("chat-input", "chat-send")), ("verify", ("verify-verdict",))])
def test_chat_and_verdict_can_be_used_on_a_phone(
    visit: Visit, site: Served, name: str, needed: tuple[str, ...]
) -> None:
    """In sight without scrolling to the side, and large enough for a finger."""
    page = visit(f"#/{name}?{RUN}" + (f"&job={job_of(site, 'verify')}" if name == "verify" else ""), width=390)
    for testid in needed:
        part = page.get_by_test_id(testid).first
        part.wait_for()
        box = part.bounding_box()
        assert box
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
        assert box["y"] + box["height"] <= 900
    assert page.evaluate(OVERFLOW) <= 0
    assert page.evaluate(SMALL) == []
    if name == "chat":
        page.get_by_test_id("chat-input").fill("My chain squeaks.")
        page.get_by_test_id("chat-send").click()
        page.get_by_test_id("stop-reason").wait_for()
        assert page.get_by_test_id("chat-input").is_visible()
        assert page.evaluate(OVERFLOW) <= 0
        page.locator(".drawer-toggle").click()
        page.get_by_test_id("set-max_new_tokens").wait_for()
        assert page.evaluate(SMALL) == []
        page.keyboard.press("Escape")
        page.get_by_test_id("set-max_new_tokens").wait_for(state="hidden")


def test_dialogs_close_by_esc_and_give_the_focus_back(visit: Visit) -> None:
    """To where they were opened from; while open, the focus stays in them."""
    page = opened(visit, "open")
    for name in ("open", "train", "merge"):
        turned_to(page, name)
        opener = page.get_by_role("button", name="Browse").first
        opener.focus()
        page.keyboard.press("Enter")
        dialog = page.get_by_role("dialog")
        dialog.get_by_role("button").first.wait_for()
        assert dialog.get_attribute("aria-labelledby")
        for _ in range(12):
            page.keyboard.press("Tab")
            assert page.evaluate(
                "() => !!document.activeElement.closest('dialog') || document.activeElement === document.body"
            )
        page.keyboard.press("Escape")
        dialog.wait_for(state="detached")
        assert opener.evaluate("one => one === document.activeElement")
