"""``tunesmith push``: what is shown before anything is sent, a card to be edited, and what lies there in the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.export.push.fake_hub import TOKEN, FakeHub
from tests.export.push.test_card import drift_of
from tunesmith.cli.app import app
from tunesmith.errors import CheckpointError, DataError

REPO = "me/tuned"


def run(*arguments: object) -> Result:
    """The command in this process."""
    return CliRunner().invoke(app, ["push", *map(str, arguments)], catch_exceptions=False)


def test_a_dry_run_shows_files_and_card_and_asks_nobody(merged: Path, hub: FakeHub) -> None:
    """What goes up with sizes, what stays with the reason, warnings, the card."""
    (merged / "notes.md").write_text("x")
    done = run(merged, REPO, "--endpoint", hub.url, "--dry-run")
    shown = " ".join(done.stdout.split())
    assert done.exit_code == 0
    assert "356.0 KiB model.safetensors" in shown
    assert "stays here: notes.md (not known as a model's file)" in shown
    assert "Certificate holds: Identical" in shown
    assert "pass --base-model" in shown
    assert "library_name: transformers" in shown
    assert "Nothing was sent" in shown
    assert not hub.seen


def test_a_card_is_written_once_edited_and_sent(merged: Path, hub: FakeHub, tmp_path: Path) -> None:
    """--dry-run --card FILE writes it; a second time it is not overwritten; then it goes up as it is."""
    card = tmp_path / "card.md"
    done = run(merged, REPO, "--endpoint", hub.url, "--dry-run", "--card", card)
    assert done.exit_code == 0
    assert "library_name" in card.read_text("utf-8")
    card.write_text(card.read_text("utf-8") + "\nBy hand.\n", encoding="utf-8")
    run(merged, REPO, "--endpoint", hub.url, "--dry-run", "--card", card)
    assert "By hand." in card.read_text("utf-8")
    done = run(merged, REPO, "--endpoint", hub.url, "--card", card)
    assert "Pushed in" in done.stdout
    assert "the hashes there are those of the files here" in done.stdout
    assert hub.content(hub.files(REPO)["README.md"]) == card.read_bytes()
    assert TOKEN not in done.output


def test_the_figures_of_a_drift_go_on_the_card(merged: Path, hub: FakeHub, tmp_path: Path) -> None:
    """Of a file that ``tunesmith drift --out`` wrote; of another directory's, the command that measures this one."""
    drift_of(merged).write(tmp_path / "drift.json")
    done = run(merged, REPO, "--endpoint", hub.url, "--dry-run", "--drift", tmp_path / "drift.json")
    assert done.exit_code == 0
    assert "## What it keeps of the fine-tune" in done.stdout
    assert "97.0% (95.0% to 99.0%)" in done.stdout
    drift_of(merged, path="elsewhere").write(tmp_path / "drift.json")
    with pytest.raises(DataError) as caught:
        run(merged, REPO, "--endpoint", hub.url, "--drift", tmp_path / "drift.json", "--run", "out/run")
    assert "elsewhere" in caught.value.details
    assert caught.value.next_step == f"tunesmith drift out/run {merged} --out drift.json"
    assert not hub.seen


def test_json_is_one_document(merged: Path, hub: FakeHub) -> None:
    """The plan with --dry-run, else what lies there."""
    plan = json.loads(run(merged, REPO, "--endpoint", hub.url, "--dry-run", "--json").stdout)
    pushed = json.loads(run(merged, REPO, "--endpoint", hub.url, "--json").stdout)
    assert plan["files"][0]["name"] == "model.safetensors"
    assert pushed["commit"] == hub.repos[REPO].branches["main"]
    again = run(merged, REPO, "--endpoint", hub.url)
    assert "nothing was committed" in again.stdout


def test_what_nobody_verified_is_an_error_to_mend(merged: Path, hub: FakeHub) -> None:
    """Nothing is asked of the hub; the next step names both ways."""
    (merged / "tunesmith-certificate.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        run(merged, REPO, "--endpoint", hub.url)
    assert "tunesmith verify RUN" in str(caught.value.next_step)
    assert "--unverified" in str(caught.value.next_step)
    assert not hub.seen
