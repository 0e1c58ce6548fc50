"""``train --dry-run``, as people and programs read it."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

import tunesmith as ts
from tests.cli.conftest import Cli, tree
from tests.tiny_models import TinyRun
from tunesmith.cli.output import console
from tunesmith.cli.train import _show_example, _show_keys, _show_rows


@pytest.fixture
def place(tiny: TinyRun, tmp_path: Path) -> Path:
    """A folder with a recipe and its rows."""
    rows = [{"instruction": f"question {number}", "output": f"answer {number}"} for number in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model_name_or_path": str(tiny.base),
        "dataset": "rows.jsonl",
        "output_dir": "out",
        "num_train_epochs": 1.0,
        "packing": False,
        "bf16": True,
        "dtype": "float32",
        "trust_remote_code": True,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    return tmp_path


def test_plan_tells_all_there_is_to_know(cli: Cli, place: Path) -> None:
    """Rows, lengths, share cut, supervised tokens, steps, memory, time, keys, and the first row; nothing is written."""
    before = tree(place)
    done = cli("train", "recipe.yaml", "--dry-run", "cutoff_len=40", cwd=place)
    assert done.code == 0, done.err
    assert tree(place) == before
    for words in (
        r"Rows: 10 to train on, 0 held out",
        r"Tokens a row: \d+ to \d+, half of them up to \d+, 95 % up to \d+; cutoff_len 40 cuts \d+",
        r"█+ \d+",
        r"Supervised: \d+ of \d+ tokens \(\d+%\)",
        r"Steps: 2 of 8 rows, 1 pass over the rows",
        r"Memory: about .* free \(weights .*, adapter and optimizer .*, activations .*\); [\d,]+ numbers are trained",
        r"Time: about",
        r"Keys that are used: model_name_or_path, dataset, .*cutoff_len",
        r"bf16: True  a wish",
        r"trust_remote_code: True  code that comes with",
        r"⟦answer 0",
    ):
        assert re.search(words, done.out), (words, done.out)
    assert done.out.endswith("Begin: tunesmith train recipe.yaml cutoff_len=40\n")


def test_plan_as_a_document(cli: Cli, place: Path) -> None:
    """It is the library's record, there and back, and its schema describes it."""
    done = cli("train", "recipe.yaml", "--dry-run", "--json", "packing=true", cwd=place)
    plan = ts.TrainingPlan.model_validate_json(done.out)
    assert json.loads(plan.to_json()) == json.loads(done.out)
    assert sum(plan.lengths.counts) == plan.train_rows == 10
    assert plan.packs is not None
    assert plan.packs < 10
    assert set(json.loads(done.out)) <= set(ts.TrainingPlan.model_json_schema()["properties"])


def test_errors_name_what_was_meant_and_end_with_2(cli: Cli, place: Path) -> None:
    """A key, a data set, a template; and what would be ignored."""
    (place / "data").mkdir()
    (place / "data" / "dataset_info.json").write_text(json.dumps({"identity": {"file_name": "rows.jsonl"}}))
    for words, meant in (
        (["learnin_rate=1"], "did you mean learning_rate?"),
        (["dataset=identty"], "did you mean identity?"),
        (["template=qwen33"], "did you mean qwen3?"),
        (["--resume"], "--resume would change nothing"),
    ):
        done = cli("train", "recipe.yaml", "--dry-run", *words, cwd=place)
        assert (done.code, done.out) == (2, ""), words
        assert meant in done.err
    assert not (place / "out").exists()


@pytest.mark.parametrize("colours", [True, False])
def test_marks_are_seen_on_terminals(place: Path, monkeypatch: pytest.MonkeyPatch, colours: bool) -> None:
    """By colour, or by letters where ``NO_COLOR`` is set; and no line is wider than the terminal."""
    monkeypatch.chdir(place)
    plan = ts.plan_training("recipe.yaml")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not colours:
        monkeypatch.setenv("NO_COLOR", "1")
    terminal, program = pty.openpty()
    with os.fdopen(program, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        _show_example(console(), plan)
        _show_rows(console(), plan)
        _show_keys(console(), plan)
    shown = b""
    with suppress(OSError):  # Linux's way of saying that the other side has closed: one read may see a part
        while chunk := os.read(terminal, 1 << 16):
            shown += chunk
    os.close(terminal)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text := shown.decode())
    assert ("\x1b[30;42manswer 0" in text) is colours
    assert ("⟦answer 0" in plain) is not colours
    assert 40 < max(len(line.rstrip()) for line in plain.splitlines()) <= 60


def test_stopping_it_ends_with_130(cli: Cli, place: Path) -> None:
    """Ctrl-C while rows are encoded; nothing is left."""
    row = json.dumps({"instruction": "question", "output": "answer " * 300}) + "\n"
    (place / "rows.jsonl").write_text(row * 4000)
    begun = cli.start("train", "recipe.yaml", "--dry-run", cwd=place)
    assert begun.stderr is not None
    assert "encode" in begun.stderr.readline()
    time.sleep(0.05)
    begun.send_signal(signal.SIGINT)
    out, _ = begun.communicate(timeout=60)
    assert (begun.returncode, out) == (130, "")
    assert not (place / "out").exists()
