"""The whole story in a browser: tune, look, talk with and without the adapter, merge, prove."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.chromium import NEEDS_CHROMIUM
from tests.web.conftest import served
from tunesmith.web import Settings

from .conftest import Visit

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [*NEEDS_CHROMIUM, pytest.mark.slow]

RECIPE = """model_name_or_path: demo
dataset: rows.jsonl
eval_dataset: held_out.jsonl
output_dir: tuned
max_steps: 3
save_steps: 3
logging_steps: 1
per_device_train_batch_size: 2
learning_rate: 1.0e-3
cutoff_len: 160
"""
QUESTION = "My bicycle chain squeaks in the rain. What do I do?"
A_MINUTE, MINUTES = 60_000, 300_000


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A page over a folder that holds rows, and no run yet; its address."""
    root = tmp_path / "root"
    root.mkdir()
    with resources.as_file(resources.files("tunesmith") / "demo") as demo:
        for name, source, rows in (("rows", "workshop_train", 12), ("held_out", "workshop_held_out", 2)):
            lines = (demo / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
            (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(root)
    with served(Settings(root=root)) as page:
        yield f"http://127.0.0.1:{page.settings.port}"


def ask(page: Page, variant: str) -> str:
    """Ask one variant, see the answer grow and end, and return it."""
    page.get_by_test_id("chat-variant").select_option(variant)
    before = page.get_by_test_id("stop-reason").count()
    page.get_by_test_id("chat-input").fill(QUESTION)
    page.keyboard.press("Control+Enter")
    reply = page.get_by_test_id("chat-reply").last
    page.wait_for_function(
        "count => document.querySelectorAll('[data-testid=stop-reason]').length > count", arg=before, timeout=MINUTES
    )
    return reply.inner_text()


def test_story_from_a_fine_tune_to_a_proven_merge(visit: Visit, workshop: str) -> None:
    """What a person does who never opens a terminal."""
    page = visit("#/train", origin=workshop)
    page.get_by_test_id("recipe-yaml").fill(RECIPE)
    page.get_by_test_id("train-start").click()
    page.get_by_test_id("train-done").wait_for(timeout=MINUTES)

    page.goto(f"{workshop}/#/overview?run=tuned")
    files = page.get_by_test_id("file-table")
    files.wait_for()
    assert "adapter_model.safetensors" in files.inner_text()
    assert "checkpoint-3" in page.get_by_test_id("checkpoint-table").inner_text()
    page.get_by_test_id("loss-chart").first.wait_for()

    page.get_by_test_id("nav-chat").click()
    page.get_by_label("Longest answer, in tokens").fill("16")
    assert ask(page, "final").strip()
    assert page.get_by_test_id("stop-reason").last.inner_text() == "cut at the limit"
    assert ask(page, "base").strip()

    page.get_by_test_id("nav-compare").click()
    page.get_by_test_id("compare-input").fill(QUESTION)
    page.get_by_test_id("compare-run").click()
    page.wait_for_function(
        "() => { const cells = [...document.querySelectorAll('[data-testid=compare-cell]')];"
        " return cells.length === 2 && cells.every((one) => one.innerText.length > 40); }",
        timeout=MINUTES,
    )

    page.get_by_test_id("nav-merge").click()
    page.get_by_test_id("merge-out").fill("merged")
    page.get_by_test_id("merge-start").click()
    page.get_by_test_id("merge-done").wait_for(timeout=MINUTES)

    page.get_by_test_id("verify-now").click()
    page.get_by_test_id("verify-start").click()
    verdict = page.get_by_test_id("verify-verdict")
    verdict.wait_for(timeout=MINUTES)
    assert verdict.get_attribute("data-answer") in ("equal", "equal_within_rounding")
    certificate = json.loads(next((Path.cwd() / "merged").glob("*certificate*.json")).read_text(encoding="utf-8"))
    assert certificate
