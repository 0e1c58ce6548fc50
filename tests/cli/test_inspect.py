"""``tunesmith inspect`` as a person meets it: the page, the HTML file, and what may be deleted."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

import tunesmith as ts
from tests.cli.conftest import Cli, tree
from tests.cli.test_output import terminal

CORPUS = Path(__file__).parents[1] / "runs" / "corpus"


def aged(root: Path) -> Path:
    """A run that nobody has written to for hours."""
    then = time.time() - 7200
    for path in root.rglob("*"):
        os.utime(path, (then, then), follow_symlinks=False)
    return root


@pytest.fixture
def factory_run(tmp_path: Path) -> Path:
    """A real run of LLaMA-Factory's: three checkpoints with their optimizers, the last of them the best."""
    return aged(Path(shutil.copytree(CORPUS / "llamafactory-cli", tmp_path / "run")))


def test_the_page_tells_who_wrote_it_how_it_went_and_what_is_there(cli: Cli, factory_run: Path) -> None:
    """Everything that a person asks at first, and the next command."""
    done = cli("inspect", factory_run)
    assert (done.code, done.err) == (0, "")
    for part in (
        "written by LLaMA-Factory, as trainer_log.jsonl tells",
        "training loss",
        "held-out loss",
        "q_proj",
        "effective rank",
        "checkpoint-12",
        "best, says the trainer",
        "to resume training",
        "--cleanup lists what could be deleted",
        f"Next: tunesmith checkpoints {factory_run}",
    ):
        assert part in done.out


def test_an_adapter_that_cannot_be_read_is_a_finding(cli: Cli, factory_run: Path) -> None:
    """The rest of the run is shown all the same, and nothing is refused."""
    (factory_run / "adapter_model.safetensors").write_bytes(b"broken")
    done = cli("inspect", factory_run)
    assert done.code == 0, done.err
    assert "problem" in done.out
    assert "cannot be read" in done.out
    assert "training loss" in done.out
    record = ts.Inspection.model_validate_json(cli("inspect", factory_run, "--json").out)
    assert record.adapter is None
    assert record.health[0].code == "adapter_unreadable"


def test_a_base_that_the_adapter_does_not_fit_is_named_with_its_shapes(
    cli: Cli, own_base: Path, factory_run: Path
) -> None:
    """Before a merge is tried."""
    done = cli("inspect", factory_run, "--base", own_base)
    assert done.code == 0, done.err
    record = ts.Inspection.model_validate_json(cli("inspect", factory_run, "--base", own_base, "--json").out)
    assert "base_does_not_fit" in [finding.code for finding in record.health]


def test_thorough_hashes_the_base_and_holds_it_against_the_record(cli: Cli, own_run: Path) -> None:
    """The right base is said to be right, and another one is an error."""
    digest = json.loads(cli("inspect", own_run, "--thorough", "--json").out)["base_sha256"]
    assert len(digest) == 64
    for recorded, code in ((digest, "base_same"), ("ab" * 32, "base_changed")):
        (own_run / "tunesmith_run.json").write_text(json.dumps({"base_sha256": recorded}))
        record = ts.Inspection.model_validate_json(cli("inspect", own_run, "--thorough", "--json").out)
        assert code in [finding.code for finding in record.health]
        assert cli("inspect", own_run, "--thorough").code == 0


def test_html_is_one_file_in_both_languages(cli: Cli, factory_run: Path, tmp_path: Path) -> None:
    """With the health as its headline, every file explained, and nothing of merging that has not been."""
    done = cli("inspect", factory_run, "--html", tmp_path / "run.html")
    assert done.code == 0, done.err
    assert f"Written: {tmp_path / 'run.html'}" in done.out
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    for key in ("health.question", "section.adapter", "section.files", "file.optimizer", "file.training_args_bin"):
        for lang in ("en", "zh"):
            assert ts.text(key, lang).replace("'", "&#39;") in page
    assert 'id="merge"' not in page
    assert 'id="effect"' not in page


def test_html_that_cannot_be_written_is_refused(cli: Cli, factory_run: Path, tmp_path: Path) -> None:
    """A wrong name, and a folder that is not there."""
    for target in (tmp_path / "run.txt", tmp_path / "nowhere" / "run.html"):
        done = cli("inspect", factory_run, "--html", target)
        assert (done.code, done.out) == (2, "")
        assert "where:" in done.err


def test_cleanup_lists_and_deletes_nothing(cli: Cli, factory_run: Path) -> None:
    """What could go, what that frees, what stays and why, and how to do it."""
    before = tree(factory_run)
    done = cli("inspect", factory_run, "--cleanup")
    assert done.code == 0, done.err
    assert "checkpoint-4/optimizer.pt" in done.out
    assert "checkpoint-12/optimizer.pt" not in done.out
    assert "recorded as the best" in done.out
    assert "Nothing was deleted" in done.out
    assert f"tunesmith inspect {factory_run} --cleanup --apply" in done.out
    assert tree(factory_run) == before
    record = ts.Cleanup.model_validate_json(cli("inspect", factory_run, "--cleanup", "--json").out)
    assert record.frees_bytes == sum(file.size_bytes for file in record.files) > 0


def test_deleting_asks_first(cli: Cli, factory_run: Path) -> None:
    """Without a terminal to ask at it is refused; a no deletes nothing; a yes deletes what was listed and no more."""
    before = tree(factory_run)
    refused = cli("inspect", factory_run, "--cleanup", "--apply")
    assert refused.code == 2
    assert "--yes" in refused.err
    for answer, code in (("n", 2), ("y", 0)):
        assert tree(factory_run) == before
        with terminal(cli, "inspect", factory_run, "--cleanup", "--apply") as shown:
            shown.read_until("undone")
            shown.type(f"{answer}\n")
            shown.read_until("")
            assert shown.process.wait() == code
    gone = before.keys() - tree(factory_run).keys()
    assert gone
    assert not [path for path in gone if path.startswith("checkpoint-12/")]
    assert not [path for path in gone if "adapter" in path or "tokenizer" in path or path.endswith(".json")]
    assert [point.name for point in ts.open_run(factory_run).checkpoints][-1] == "final"


def test_yes_deletes_without_asking_and_says_what_it_freed(cli: Cli, factory_run: Path) -> None:
    """For scripts; a second time there is nothing left to do."""
    planned = ts.Cleanup.model_validate_json(cli("inspect", factory_run, "--cleanup", "--json").out)
    record = ts.Cleaned.model_validate_json(cli("inspect", factory_run, "--cleanup", "--apply", "--yes", "--json").out)
    assert set(record.removed) == {file.path for file in planned.files}
    assert record.freed_bytes == planned.frees_bytes
    again = cli("inspect", factory_run, "--cleanup")
    assert ts.text("cleanup.nothing") in again.out


def test_a_run_that_may_still_be_training_is_left_alone(cli: Cli, factory_run: Path) -> None:
    """Its log was written just now."""
    (factory_run / "trainer_log.jsonl").touch()
    before = tree(factory_run)
    done = cli("inspect", factory_run, "--cleanup", "--apply", "--yes")
    assert done.code == 2
    assert "trainer_log.jsonl" in done.err
    assert tree(factory_run) == before
