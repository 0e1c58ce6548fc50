"""What a model, a run or its files say is shown as text: nothing of it runs, and nothing is fetched for it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.chromium import NEEDS_CHROMIUM
from tests.runs import making
from tests.tiny_models import edit_json
from tests.web.conftest import Page as Served
from tunesmith.report.escaping import visible

from .conftest import Visit
from .parrot import build_parrot

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = NEEDS_CHROMIUM

IMAGE = "<img src=x onerror=window.hacked=1>"
SCRIPT = "<script>window.hacked=1</script>"
OUTSIDE = "<img src='https://evil.example/x.png'><iframe src='javascript:parent.hacked=1'></iframe>"
STEERED = "\x1b[31mred\x1b[2J\u202egnp.exe\u2066"
SAID = [
    IMAGE,
    " and ",
    SCRIPT,
    OUTSIDE,
    STEERED,
    "**bold** [x](javascript:window.hacked=1)",
    "&lt;b&gt;",
    "}</style>{{7*7}}",
]
NAME = "<img src=x onerror=window.hacked=1>'\"&\u202egnp"
STATE = """() => {
  const count = (what) => document.querySelectorAll(`main ${what}`).length;
  const read = [...document.querySelectorAll('[title], [aria-label], [placeholder]')];
  return {
    hacked: window.hacked ?? null,
    added: ['img', 'script', 'iframe:not([data-testid])', 'style', 'a[href^="javascript:"]'].map(count).join(''),
    read: [document.title, ...read.flatMap((one) => [one.title, one.ariaLabel ?? '', one.placeholder ?? ''])].join(' '),
  };
}"""


@pytest.fixture(scope="module")
def site(site: Served) -> Served:
    """A model that speaks HTML, and a run whose name, files, log and settings are HTML."""
    build_parrot(site.root / "said", SAID, instead=(1, " or "))
    run = making.adapter(site.root / NAME)
    edit_json(run / "adapter_config.json", base_model_name_or_path=f"{SCRIPT}\u202e")
    for step in (10, 20):
        making.adapter(run / f"checkpoint-{step}")
    (run / f"{IMAGE}.json".replace("/", "")).write_text("{}", encoding="utf-8")
    (run / "\x1b[31m\u202e.txt").write_text("x", encoding="utf-8")
    (run / "README.md").write_text(f"---\nbase_model: {IMAGE}\n---\n{SCRIPT}", encoding="utf-8")
    rows = [{**row, SCRIPT: 1.0, "note": IMAGE} for row in making.history(2.0, 1.0, 0.5)]
    making.state(run, rows, best_model_checkpoint=f"{SCRIPT}/checkpoint-10")
    settings = {"dataset": SCRIPT, "template": IMAGE, "output_dir": STEERED, f"key{IMAGE}": 1, "learning_rate": SCRIPT}
    (run / "training_args.yaml").write_text(
        "".join(f"{json.dumps(key)}: {json.dumps(value)}\n" for key, value in settings.items()), encoding="utf-8"
    )
    (run / "all_results.json").write_text(json.dumps({SCRIPT: 1.0, "eval_loss": 1.0}), encoding="utf-8")
    return site


def unharmed(page: Page) -> str:
    """Nothing ran, no element came of a text; what the page's main part shows."""
    page.wait_for_timeout(50)  # for what an image or a frame would do
    state = page.evaluate(STATE)
    assert (state["hacked"], state["added"]) == (None, "00000")
    shown = page.locator("body").inner_text()
    assert not set(shown) & set("\x1b\u202e\u2066")
    assert not set(state["read"]) & set("\x1b\u202e\u2066")
    return shown


def said(*, other: bool = False) -> str:
    """What the model says, as it is shown."""
    return visible("".join(SAID).replace(" and ", " or ") if other else "".join(SAID))


def address(page: str, run: str = NAME, **more: str) -> str:
    """The address of a page of a run."""
    from urllib.parse import quote

    return f"#/{page}?run={quote(run)}" + "".join(f"&{key}={quote(value)}" for key, value in more.items())


def test_answer_of_html_script_and_escapes_is_text(visit: Visit) -> None:
    """Character by character, also after a reload."""
    page = visit(address("chat", "said/run", base="said/base", variant="base"))
    page.get_by_test_id("set-prompt").set_checked(True, force=True)
    page.get_by_test_id("chat-input").fill(f"{IMAGE}{SCRIPT}{STEERED}")
    page.get_by_test_id("chat-send").click()
    page.get_by_test_id("stop-reason").wait_for()
    for _ in range(2):
        assert page.get_by_test_id("chat-reply").inner_text().strip() == said().strip()
        assert visible(SCRIPT) in unharmed(page)
        page.locator("details.rendered summary").click()
        assert unharmed(page).count(visible(STEERED)) >= 3  # question, prompt, answer
        page.reload()
        page.get_by_test_id("chat-reply").wait_for()


def test_compared_answers_and_their_difference_are_text(visit: Visit) -> None:
    """The marks are the page's own, what they mark is not."""
    page = visit(address("compare", "said/run", base="said/base"))
    page.get_by_test_id("compare-input").fill(IMAGE)
    page.get_by_test_id("compare-run").click()
    page.locator("[data-testid=compare-cell] [data-reason]").nth(1).wait_for()
    texts = page.locator("[data-testid=compare-cell] .cell-text").all_inner_texts()
    assert [one.strip() for one in texts] == [said().strip(), said(other=True).strip()]
    assert page.locator("[data-testid=compare-cell] ins").count() <= 1
    unharmed(page)


def test_report_of_such_answers_is_text_in_its_frame(visit: Visit) -> None:
    """The frame runs its own script only, and reaches nothing of the page."""
    page = visit(address("report", "said/run", base="said/base"))
    page.get_by_test_id("report-start").click()
    page.get_by_test_id("report-done").wait_for()
    frame = page.frame_locator("[data-testid=report-frame]")
    frame.locator("h1").first.wait_for()
    inner = next(one for one in page.frames if "format=html" in one.url)
    assert inner.evaluate("() => [window.hacked ?? null, document.querySelectorAll('img').length]") == [None, 0]
    unharmed(page)


def test_run_whose_every_word_is_html_is_shown_as_text(visit: Visit) -> None:
    """Its path, files, settings, metrics and base."""
    page = visit(address("overview"))
    page.get_by_test_id("file-table").wait_for()
    page.get_by_test_id("loss-chart").locator("svg").wait_for()
    for fold in page.locator("main details > summary").all():
        fold.click()
    shown = unharmed(page)
    for part in (visible(NAME), IMAGE, SCRIPT, "␛[31m⟨U+202E⟩.txt"):
        assert part in shown, part


def test_every_page_of_such_a_run_shows_it_as_text(visit: Visit) -> None:
    """Where it cannot be worked with, that is said in text as well."""
    page = visit(address("chat"))
    for name in ("chat", "compare", "train", "merge", "verify", "report"):
        page.get_by_test_id(f"nav-{name}").click()
        page.locator(f"main.page-{name} h1").wait_for()
        page.get_by_role("status").filter(has_text="Reading").wait_for(state="detached")
        assert visible(NAME) in unharmed(page)


def test_list_and_browser_of_folders_show_such_names_as_text(visit: Visit) -> None:
    """Also where they are opened from."""
    page = visit("#/open")
    page.get_by_test_id("run-table").wait_for()
    assert visible(NAME) in unharmed(page)
    page.get_by_test_id("run-path").fill("")
    page.get_by_role("button", name="Browse").first.click()
    page.get_by_role("dialog").get_by_text(visible(NAME)).click()
    page.get_by_role("dialog").wait_for(state="detached")
    page.get_by_test_id("run-open").click()
    page.get_by_test_id("overview-summary").wait_for()
    unharmed(page)


def test_address_and_refusals_of_html_are_text(visit: Visit, site: Served) -> None:
    """What was asked for comes back in an error as it was."""
    more = {"job": IMAGE, "variant": SCRIPT, "tab": SCRIPT}
    page = visit(address("overview", f"{IMAGE}{STEERED}nowhere", **more))
    for name in ("chat", "merge", "verify", "overview"):
        page.evaluate("hash => { location.hash = hash; }", address(name, f"{IMAGE}{STEERED}nowhere", **more))
        page.locator(f"main.page-{name}").get_by_test_id("error").first.wait_for()
        assert IMAGE in unharmed(page)
    assert not (site.root / "nowhere").exists()


def test_recipe_and_rows_of_html_are_text(visit: Visit, site: Served) -> None:
    """In problems, keys and the preview."""
    row = {"instruction": f"{IMAGE}{STEERED}", "output": f"{SCRIPT}{OUTSIDE}"}
    (site.root / "html.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    page = visit("#/train")
    page.get_by_test_id("recipe-yaml").fill(f'lora_rank: "{IMAGE}"\n"{SCRIPT}": 1\n')
    page.get_by_test_id("recipe-problems").or_(page.get_by_test_id("error")).first.wait_for()
    assert "hacked" in unharmed(page)
    page.get_by_test_id("recipe-yaml").fill("model_name_or_path: base\ndataset: html.jsonl\noutput_dir: out/html\n")
    page.wait_for_function("() => !document.querySelector('[data-testid=recipe-problems]')")
    page.get_by_test_id("preview-start").click()
    page.get_by_test_id("preview-text").wait_for()
    text = page.get_by_test_id("preview-text").inner_text()
    assert f"{SCRIPT}{OUTSIDE}" in text.replace("\n", "")
    unharmed(page)
