"""What people do on each page, from the first click to what it brings."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.chromium import NEEDS_CHROMIUM
from tests.runs import making
from tests.tiny_models import build_adapter, build_base, edit_json
from tests.web.conftest import Page as Served
from tests.web.conftest import wait_for

from .conftest import Visit
from .parrot import build_parrot

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = NEEDS_CHROMIUM

AN_HOUR = 3600
LONG = 20_000  # tokens: more than anyone waits for
MANY = 80  # steps: more than are done while one looks
WORDS = ["Oil", " the", " chain", ",", " wipe", " it", " off", " and", " ride", " on", " slowly", "."]
LAST_REPLY = "[...document.querySelectorAll('[data-testid=chat-reply]')].at(-1).innerText"
RECIPE = """# What the form must not lose
model_name_or_path: base
dataset: rows.jsonl
output_dir: out/{name}
dtype: float32
max_steps: {steps}
lora_rank: 4
per_device_train_batch_size: 2
logging_steps: 1
"""


@pytest.fixture(scope="module")
def site(site: Served) -> Served:
    """The tiny run, with time to go away in, and beside it one whose answers are known."""
    edit_json(site.root / "base" / "config.json", max_position_embeddings=LONG)
    known = build_parrot(site.root / "known", WORDS, instead=(5, " them"))
    making.state(known, making.history(2.0, 1.5, 1.2), global_step=30)
    return site


def drawing(page: Page) -> str:
    """The loss chart as it is drawn."""
    return str(page.get_by_test_id("loss-chart").locator("svg").first.evaluate("svg => svg.outerHTML"))


def until_drawn_anew(page: Page, before: str) -> str:
    """Wait for another drawing of the loss."""
    page.wait_for_function(
        """before => { const now = document.querySelector('[data-testid=loss-chart] svg')?.outerHTML;
            return now && now !== before; }""",
        arg=before,
    )
    return drawing(page)


def ask(page: Page, question: str = "2") -> None:
    """Ask and do not wait."""
    page.get_by_test_id("chat-input").fill(question)
    page.keyboard.press("Control+Enter")


def shown_text(page: Page, testid: str = "chat-reply") -> str:
    """The text of the last such element."""
    return page.get_by_test_id(testid).last.inner_text()


# --- Open ------------------------------------------------------------------------------------------------------------


def test_run_is_found_by_walking_through_folders(visit: Visit, site: Served) -> None:
    """Down, up again, and into the run; the path is then where it would have been typed."""
    page = visit("#/open")
    page.get_by_test_id("run-path").fill("")
    page.get_by_role("button", name="Browse").first.click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("button", name="known").click()
    dialog.get_by_role("button", name="Folder above").click()
    dialog.get_by_role("button", name=re.compile("^run ?run$|^run Run$")).click()
    dialog.wait_for(state="detached")
    path = page.get_by_test_id("run-path")
    wait_for(path.input_value)  # it is drawn a moment after the dialog has gone
    assert Path(site.root, path.input_value()) == site.root / "run"
    page.get_by_test_id("run-open").click()
    page.get_by_test_id("overview-summary").wait_for()
    assert "run=" in page.url


def test_runs_under_the_root_are_listed_and_open(visit: Visit) -> None:
    """With base, steps and last loss; one click opens."""
    page = visit("#/open")
    row = page.get_by_test_id("run-table").get_by_role("row").filter(has_text="known/run")
    assert re.search(r"base\b.*\b30\b.*\b1\.200\b", row.inner_text(), re.DOTALL)
    row.get_by_role("link").click()
    page.get_by_test_id("overview-summary").wait_for()
    assert page.get_by_role("heading", level=1).inner_text() == "run"


# --- Overview --------------------------------------------------------------------------------------------------------


def test_loss_is_smoothed_scaled_and_marked_as_asked(visit: Visit) -> None:
    """Each control draws the chart anew, and back again."""
    page = visit("#/overview?run=run&base=base")
    page.get_by_test_id("loss-chart").locator("svg").wait_for()
    before = drawing(page)
    usual = page.get_by_test_id("loss-smoothing").input_value()
    page.get_by_test_id("loss-smoothing").fill("0.95")
    smooth = until_drawn_anew(page, before)
    page.get_by_test_id("loss-smoothing").fill(usual)
    assert until_drawn_anew(page, smooth) == before
    for name in ("Logarithmic", "checkpoint"):
        toggle = page.get_by_role("switch", name=re.compile(name, re.IGNORECASE))
        was = toggle.is_checked()
        toggle.set_checked(not was, force=True)
        changed = until_drawn_anew(page, before)
        toggle.set_checked(was, force=True)
        assert until_drawn_anew(page, changed) == before
    page.get_by_test_id("loss-rate").set_checked(True, force=True)
    page.get_by_test_id("rate-chart").locator("svg").wait_for()


def test_checkpoint_leads_to_its_pages(visit: Visit) -> None:
    """The address names the checkpoint, and each page is about it."""
    page = visit("#/overview?run=run&base=base")
    for act, name, chosen in (
        ("Chat", "chat", "[data-testid=chat-variant] option[value=checkpoint-10]:checked"),
        ("Compare", "compare", "[data-testid=compare-variants] input[value=checkpoint-10]:checked"),
        ("Export", "merge", "[data-testid=merge-checkpoint] option[value=checkpoint-10]:checked"),
    ):
        row = page.get_by_test_id("checkpoint-table").get_by_role("row").filter(has_text="checkpoint-10")
        row.get_by_role("link", name=re.compile(act)).click()
        page.wait_for_url(re.compile(f"#/{name}.*variant=checkpoint-10"))
        page.locator(chosen).wait_for(state="attached")
        page.go_back()


def test_clean_up_asks_first_and_then_deletes(visit: Visit, site: Served) -> None:
    """What goes is listed; "cancel" and Esc delete nothing."""
    run = making.adapter(site.root / "old")
    state = making.adapter(run / "checkpoint-10") / "optimizer.pt"
    making.adapter(run / "checkpoint-20")
    for step in (10, 20):
        making.state(run / f"checkpoint-{step}", making.history(2.0), global_step=step)
    making.state(run, making.history(2.0, 1.5), best_model_checkpoint=f"{run}/checkpoint-20")
    state.write_bytes(b"x" * 1000)
    for path in run.rglob("*.*"):
        os.utime(path, (time.time() - AN_HOUR,) * 2)
    page = visit("#/overview?run=old")
    page.get_by_test_id("cleanup-start").click()
    assert "checkpoint-10/optimizer.pt" in page.get_by_role("dialog").inner_text()
    page.get_by_test_id("dialog-cancel").click()
    page.get_by_test_id("cleanup-start").click()
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="detached")
    assert state.exists()
    page.get_by_test_id("cleanup-start").click()
    page.get_by_test_id("dialog-confirm").click()
    page.get_by_test_id("cleanup").locator(".job-done").wait_for()
    assert not state.exists()
    assert (run / "adapter_model.safetensors").exists()


# --- Train -----------------------------------------------------------------------------------------------------------


def test_form_and_yaml_write_each_other(visit: Visit) -> None:
    """Whichever is edited; what is typed outlives a reload."""
    page = visit("#/train")
    yaml, rank = page.get_by_test_id("recipe-yaml"), page.get_by_test_id("recipe-lora_rank")
    yaml.fill(RECIPE.format(name="both", steps=2))
    page.wait_for_function("() => document.querySelector('[data-testid=recipe-lora_rank]').value === '4'")
    rank.fill("6")
    page.wait_for_function("() => /^lora_rank: 6$/m.test(document.querySelector('[data-testid=recipe-yaml]').value)")
    assert "max_steps: 2" in yaml.input_value()
    page.get_by_test_id("recipe-learning_rate").press_sequentially("0.0005")
    page.wait_for_function(
        "() => /^learning_rate: 0.0005$/m.test(document.querySelector('[data-testid=recipe-yaml]').value)"
    )
    page.reload()
    page.wait_for_function("() => document.querySelector('[data-testid=recipe-lora_rank]')?.value === '6'")


def test_mistake_in_a_recipe_is_told_and_nothing_starts(visit: Visit) -> None:
    """What cannot be read, and what cannot be meant."""
    page = visit("#/train")
    page.get_by_test_id("recipe-yaml").fill("lora_rank: [1\n")
    page.get_by_test_id("error").wait_for()
    assert page.get_by_test_id("train-start").is_disabled()
    page.get_by_test_id("recipe-yaml").fill(RECIPE.format(name="wrong", steps=2).replace("rank: 4", "rank: -4"))
    page.get_by_test_id("recipe-problems").wait_for()
    assert "lora_rank" in page.get_by_test_id("recipe-problems").inner_text()
    assert page.get_by_test_id("train-start").is_disabled()
    page.get_by_test_id("recipe-yaml").fill(RECIPE.format(name="right", steps=2))
    page.wait_for_function("() => !document.querySelector('[data-testid=train-start]').disabled")


def test_estimate_and_rows_are_shown_before_anything_starts(visit: Visit, site: Served) -> None:
    """Figures of the plan, and of each row what is learnt."""
    page = visit("#/train")
    page.get_by_test_id("recipe-yaml").fill(RECIPE.format(name="planned", steps=2))
    page.wait_for_function("() => document.querySelector('[data-testid=recipe-max_steps]')?.value === '2'")
    page.get_by_test_id("plan-start").click()
    page.get_by_test_id("preview-start").click()
    marked = page.get_by_test_id("preview-text").locator("mark")
    marked.first.wait_for()
    assert "one" in "".join(marked.all_inner_texts())
    assert "Say one." in page.get_by_test_id("preview-text").inner_text()
    assert "Say" not in "".join(marked.all_inner_texts())
    page.get_by_test_id("preview-next").click()
    page.get_by_text("Say two.").wait_for()
    tiles = page.get_by_test_id("plan-tiles")
    tiles.wait_for()
    assert re.search(r"\b2\b", tiles.inner_text())
    page.get_by_test_id("length-chart").locator("svg").wait_for()
    assert not (site.root / "out" / "planned").exists()


def test_training_outlives_a_reload_is_stopped_and_resumed(visit: Visit, site: Served) -> None:
    """Stopping saves, and going on goes on from there to the end."""
    page = visit("#/train")
    page.get_by_test_id("recipe-yaml").fill(RECIPE.format(name="tuned", steps=MANY))
    page.wait_for_function("() => document.querySelector('[data-testid=recipe-max_steps]')?.value === '80'")
    page.get_by_test_id("train-start").click()
    page.get_by_test_id("train-job").wait_for()
    page.reload()
    page.get_by_test_id("job").wait_for()
    wait_for((site.root / "out" / "tuned" / "trainer_log.jsonl").exists, seconds=20)
    page.get_by_test_id("train-stop").click()
    page.get_by_test_id("train-resume").wait_for()
    saved = sorted((site.root / "out" / "tuned").glob("checkpoint-*"))
    assert saved
    assert 0 < int(saved[-1].name.split("-")[1]) < MANY
    page.get_by_test_id("train-resume").click()
    page.get_by_test_id("train-done").wait_for()
    page.get_by_test_id("loss-chart").locator("svg").wait_for()
    page.get_by_test_id("job").wait_for(state="detached")
    page.get_by_test_id("train-done").get_by_role("link").first.click()
    page.get_by_test_id("checkpoint-table").wait_for()
    assert saved[-1].name in page.get_by_test_id("checkpoint-table").inner_text()
    rows = (site.root / "out" / "tuned" / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(row)["current_steps"] for row in rows]
    assert steps[-1] == MANY
    assert sorted(set(steps)) == list(range(1, MANY + 1))


def test_training_stopped_before_its_first_step_offers_nothing_to_go_on_from(visit: Visit, site: Served) -> None:
    """It says that nothing was saved."""
    page = visit("#/train")
    page.get_by_test_id("recipe-yaml").fill(RECIPE.format(name="early", steps=2))
    with site.app.state.live.slot.hold("chat"):  # so the training waits
        page.get_by_test_id("train-start").click()
        page.get_by_test_id("train-stop").click()
        page.get_by_text("nothing was saved").wait_for()
    assert page.get_by_test_id("train-resume").count() == 0
    assert not (site.root / "out" / "early").exists()


# --- Chat ------------------------------------------------------------------------------------------------------------


def test_esc_stops_an_answer_and_frees_the_model(visit: Visit, site: Served) -> None:
    """It grows while it is written; stopped, it says so, and the next one may ask."""
    page = visit("#/chat?run=run&base=base&variant=base")
    page.get_by_test_id("set-max_new_tokens").fill("8000")
    page.get_by_test_id("set-greedy").set_checked(True, force=True)  # so it never comes to an end by itself
    ask(page)
    page.wait_for_function(f"() => {LAST_REPLY}.length > 20")
    early = len(shown_text(page))
    page.wait_for_function(f"early => {LAST_REPLY}.length > early + 20", arg=early)
    assert site.app.state.live.slot.holder is not None
    page.keyboard.press("Escape")
    page.get_by_test_id("stop-reason").wait_for()
    assert page.get_by_test_id("stop-reason").get_attribute("data-reason") == "cancelled"
    wait_for(lambda: site.app.state.live.slot.holder is None, seconds=2)
    page.get_by_test_id("set-max_new_tokens").fill("8")
    ask(page, "3")
    page.get_by_test_id("stop-reason").nth(1).wait_for()
    assert page.get_by_test_id("stop-reason").nth(1).get_attribute("data-reason") in ("length", "eos")


def test_conversation_outlives_reload_and_language_and_is_begun_again_only_when_asked(visit: Visit) -> None:
    """Also an answer that is being written when the language changes."""
    page = visit("#/chat?run=known/run&base=known/base&variant=final")
    ask(page, "My chain squeaks.")
    page.get_by_test_id("stop-reason").wait_for()
    said = "".join(WORDS).replace(" it", " them")
    assert shown_text(page).strip() == said
    page.reload()
    page.get_by_test_id("chat-reply").wait_for()
    page.get_by_test_id("lang").click()
    page.wait_for_function("() => document.documentElement.lang === 'zh-CN'")
    assert shown_text(page).strip() == said
    page.get_by_test_id("chat-variant").select_option("base")
    page.get_by_test_id("chat-again").click()
    page.wait_for_function(f"said => {LAST_REPLY}.trim() === said", arg="".join(WORDS))
    assert page.get_by_test_id("chat-reply").count() == 1
    ask(page, "And then?")
    page.get_by_test_id("stop-reason").nth(1).wait_for()
    assert page.locator(".turn-user").count() == 2


def test_change_of_language_does_not_end_an_answer(visit: Visit) -> None:
    """What is being written goes on."""
    page = visit("#/chat?run=run&base=base&variant=base")
    page.get_by_test_id("set-max_new_tokens").fill("8000")
    page.get_by_test_id("set-greedy").set_checked(True, force=True)  # so it never comes to an end by itself
    ask(page)
    page.wait_for_function(f"() => {LAST_REPLY}.length > 20")
    page.get_by_test_id("lang").click()
    page.wait_for_function("() => document.documentElement.lang === 'zh-CN'")
    page.wait_for_function(f"early => {LAST_REPLY}.length > early", arg=len(shown_text(page)))
    page.get_by_test_id("chat-stop").click()
    page.get_by_test_id("chat-send").wait_for()


# --- Compare ---------------------------------------------------------------------------------------------------------


def test_cut_answers_are_marked_and_asked_for_again_twice_as_long(visit: Visit) -> None:
    """Nothing is made of the difference of halves; of whole answers the differing words are marked."""
    page = visit("#/compare?run=known/run&base=known/base")
    page.locator("summary").first.click()
    page.get_by_test_id("set-max_new_tokens").fill("8")
    page.get_by_test_id("compare-input").fill("My chain squeaks.")
    page.keyboard.press("Control+Enter")
    cells = page.get_by_test_id("compare-cell")
    cells.locator("[data-reason=length]").nth(1).wait_for()
    page.get_by_test_id("compare-twice").first.click()
    cells.locator("[data-reason=eos]").nth(1).wait_for()
    page.locator("[data-testid=compare-cell] ins").wait_for()
    assert [cells.locator("del").all_inner_texts(), cells.locator("ins").all_inner_texts()] == [["it"], ["them"]]
    texts = cells.locator(".cell-text").all_inner_texts()
    assert [one.strip() for one in texts] == ["".join(WORDS), "".join(WORDS).replace(" it", " them")]


def test_two_answers_grow_side_by_side(visit: Visit, site: Served) -> None:
    """Together, not one after the other; Esc stops both."""
    page = visit("#/compare?run=run&base=base")
    page.locator("summary").first.click()
    page.get_by_test_id("set-max_new_tokens").fill("8000")
    page.get_by_test_id("compare-input").fill("2")
    page.get_by_test_id("compare-run").click()
    page.wait_for_function(
        """() => { const cells = [...document.querySelectorAll('[data-testid=compare-cell] .cell-text')];
           return cells.length === 2 && cells.every((one) => one.innerText.length > 20); }"""
    )
    page.keyboard.press("Escape")
    page.get_by_test_id("compare-run").wait_for()
    assert page.locator("[data-testid=compare-cell] [data-reason=cancelled]").count() == 2
    wait_for(lambda: site.app.state.live.slot.holder is None, seconds=2)


def test_evaluation_is_shown_as_the_report_shows_it(visit: Visit) -> None:
    """Of the run's variants on a file of rows; it outlives a reload, and can be had as a file."""
    page = visit("#/compare?run=run&base=base&tab=effect")
    page.get_by_test_id("evaluate-data").fill("rows.jsonl")
    page.get_by_test_id("evaluate-general").uncheck(force=True)
    page.get_by_test_id("evaluate-start").click()
    page.get_by_test_id("evaluate-done").wait_for()
    page.reload()
    page.get_by_test_id("evaluate-done").wait_for()
    frame = page.frame_locator("[data-testid=evaluate-frame]")
    frame.locator("h1, h2").first.wait_for()
    assert "final" in frame.locator("body").inner_text()
    with page.expect_download() as download:
        page.get_by_test_id("evaluate-md").click()
    assert "final" in download.value.path().read_text(encoding="utf-8")
    assert "tunesmith evaluate run" in page.get_by_text("tunesmith evaluate").inner_text()


def test_many_questions_are_filtered_and_voted_on_blindly(visit: Visit) -> None:
    """Names come with the tally, once the last pair is judged."""
    page = visit("#/compare?run=known/run&base=known/base&tab=many")
    page.get_by_test_id("batch-source").select_option("typed")
    page.get_by_test_id("batch-text").fill("One?\nTwo?\n")
    page.get_by_test_id("batch-run").click()
    page.locator(".exchange").nth(1).wait_for()
    assert re.search(r"\b2\b", page.locator("[data-filter=different]").inner_text())
    page.locator("[data-filter=different]").click()
    assert page.locator(".exchange").count() == 2
    page.locator(".exchange .more").first.click()
    page.locator(".exchange ins").first.wait_for()
    page.get_by_test_id("tab-vote").click()
    booth = page.get_by_test_id("votes")
    booth.locator(".cell").nth(1).wait_for()
    for key in ("1", "2"):
        assert not re.search(r"\b(base|final|run)\b", booth.inner_text())
        assert page.get_by_test_id("vote-tally").count() == 0
        asked = booth.locator(".asked").inner_text()
        page.keyboard.press(key)
        page.wait_for_function(
            "asked => document.querySelector('[data-testid=votes] .asked')?.innerText !== asked", arg=asked
        )
    page.get_by_test_id("vote-tally").wait_for()
    tally = page.get_by_test_id("vote-tally").inner_text()
    assert re.search(r"\bfinal\b", tally)
    won, lost = re.findall(r"(\d) (?:won|lost)", tally)  # which side each stood on is drawn
    assert int(won) + int(lost) == 2


# --- Merge, verify, report -------------------------------------------------------------------------------------------


def merged(page: Page, out: str) -> None:
    """Merge the open run and wait until it is done."""
    page.get_by_test_id("merge-out").fill(out)
    page.get_by_test_id("merge-start").click()
    page.get_by_test_id("merge-done").wait_for()


def test_merge_is_proven_and_a_changed_file_is_found(visit: Visit, site: Served) -> None:
    """Merge, verify at once, change one weight, verify again."""
    page = visit("#/merge?run=run&base=base")
    merged(page, "out/merged")
    page.get_by_test_id("verify-now").click()
    page.get_by_test_id("verify-start").click()
    verdict = page.get_by_test_id("verify-verdict")
    verdict.wait_for()
    assert verdict.get_attribute("data-answer") in ("identical", "equal_within_rounding")
    assert page.locator(".tile").count() == 4
    assert page.locator(".tile-fail").count() == 0
    weights = site.root / "out" / "merged" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1000:] = bytes(1000)
    weights.write_bytes(content)
    page.get_by_test_id("verify-start").click()
    page.locator("[data-testid=verify-verdict][data-answer=different]").wait_for()
    assert page.locator(".tile-fail").count() >= 1


def test_cancelled_merge_leaves_nothing(visit: Visit, site: Served) -> None:
    """Neither the directory nor a part of it, and the page says so."""
    build_base(site.root / "large", hidden_size=512, intermediate_size=8192)
    build_adapter(site.root / "large", site.root / "large-run", seed=3)
    page = visit("#/merge?run=large-run&base=large")
    page.get_by_test_id("merge-out").fill("out/cancelled")
    page.get_by_test_id("merge-start").click()
    page.get_by_test_id("merge-cancel").click()
    page.get_by_test_id("merge-cancelled").wait_for()
    assert [path.name for path in site.root.rglob("*cancelled*")] == []
    assert page.get_by_test_id("merge-start").is_visible()


def test_report_is_made_shown_and_downloaded(visit: Visit, tmp_path: Path) -> None:
    """In a frame of its own, and as a file to send on."""
    page = visit("#/report?run=known/run&base=known/base")
    page.get_by_test_id("report-start").click()
    page.get_by_test_id("report-done").wait_for()
    frame = page.frame_locator("[data-testid=report-frame]")
    frame.locator("h1").wait_for()
    for testid, begins in (("report-html", "<!doctype html>"), ("report-json", "{")):
        with page.expect_download() as started:
            page.get_by_test_id(testid).click()
        started.value.save_as(tmp_path / testid)
        assert (tmp_path / testid).read_text(encoding="utf-8").lower().startswith(begins)
