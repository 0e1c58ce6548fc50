"""``tunesmith checkpoints``: the table, the reason under it, and one document with ``--json``."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tunesmith as ts
from tests.cli.conftest import Cli, tree
from tests.tiny_models import TinyRun
from tunesmith.cli.app import app
from tunesmith.cli.checkpoints import _curve, _table
from tunesmith.cli.screen import Screen
from tunesmith.compare import Estimate


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rows with answers, and one without."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"instruction": f"Question {i}?", "output": f"Answer {i}."} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"instruction": "And?"}]))
    return path


@pytest.fixture
def three(tiny: TinyRun, tmp_path: Path) -> Path:
    """A run with two checkpoints, the second of which is also the final adapter."""
    root = tmp_path / "run"
    shutil.copytree(tiny.adapters["final"], root)
    shutil.copytree(tiny.adapters["checkpoint-10"], root / "checkpoint-10")
    shutil.copytree(tiny.adapters["final"], root / "checkpoint-20")
    return root


def here(*arguments: object) -> str:
    """The standard output of a command run in this process."""
    done = CliRunner().invoke(app, ["checkpoints", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return str(done.stdout)


def test_json_is_the_librarys_record_and_nothing_else(cli: Cli, three: Path, rows: Path) -> None:
    """Progress goes to stderr; nothing is written beside the run."""
    before = tree(three)
    done = cli("checkpoints", three, "--data", rows, "--dtype", "fp32", "--answers", 2, "--max-new-tokens", 4, "--json")
    assert done.code == 0, done.err
    choice = ts.CheckpointChoice.model_validate_json(done.out)
    assert choice == ts.checkpoints(three, rows, dtype="fp32", answers=2, max_new_tokens=4)
    assert [one.name for one in choice.candidates] == ["base", "checkpoint-10", "checkpoint-20", "final"]
    assert (choice.rows, choice.rows_from, choice.dtype) == (4, "given", "float32")
    assert all(f"{stage} ..." in done.err for stage in ("distances", "load", "score"))
    assert tree(three) == before


def test_table_names_every_candidate_and_the_reason_stands_under_it(three: Path, rows: Path) -> None:
    """In a pipe every candidate is one line, with its figures and what it is a copy of."""
    shown = here(three, "--data", rows, "--dtype", "fp32", "--answers", 0)
    choice = ts.checkpoints(three, rows, dtype="fp32", answers=0)
    lines = {line.split()[0]: line for line in shown.splitlines() if line.strip()}
    for one in choice.candidates:
        assert one.loss is not None
        assert (f"{one.loss.value:.3f} ± {one.loss.half:.3f}" in lines[one.name]) == (one.same_as is None)
    assert "= checkpoint-20" in lines["final"]
    assert "take this" in lines[choice.recommended or ""]
    assert shown.index("take this") < shown.index(ts.finding_text(choice.reason))
    assert "answers" not in shown.splitlines()[0]
    assert f"Next: tunesmith compare {three} --variants base,{choice.recommended}" in shown


def test_only_some_are_scored_where_that_is_asked(three: Path, rows: Path) -> None:
    """By name or by number; one that is not there is an error that lists those that are."""
    choice = ts.checkpoints(three, rows, dtype="fp32", answers=0, only=["10", "final"])
    assert [one.name for one in choice.candidates] == ["base", "checkpoint-10", "final"]
    assert choice.candidate("final").same_as is None
    shown = here(three, "--data", rows, "--dtype", "fp32", "--answers", 0, "--only", "checkpoint-10, final")
    assert "checkpoint-20" not in shown
    done = CliRunner().invoke(app, ["checkpoints", str(three), "--only", "checkpoint-11"])
    assert "checkpoint-20" in str(done.exception)


def test_without_rows_it_shows_what_the_trainer_logged(cli: Cli, three: Path) -> None:
    """No model is loaded; the figures' origin is said, and what to type next."""
    state = {
        "global_step": 20,
        "best_model_checkpoint": "checkpoint-10",
        "log_history": [{"step": 10, "eval_loss": 1.25}, {"step": 20, "eval_loss": 1.5}],
    }
    (three / "trainer_state.json").write_text(json.dumps(state))
    done = cli("checkpoints", three, "--base", "no-such-base")
    assert done.code == 0, done.err
    assert re.search(r"checkpoint-10 +1\.250 +\d\.\d\d +◀ take this", done.out)
    assert "held-out loss by step, as logged" in done.out
    assert "nothing is known of their uncertainty" in done.out
    assert f"Next: tunesmith checkpoints {three} --data FILE" in done.out
    assert "load ..." not in done.err


def test_rows_without_answers_are_refused(cli: Cli, three: Path, tmp_path: Path) -> None:
    """Before anything is loaded."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Who are you?\n")
    done = cli("checkpoints", three, "--data", prompts)
    assert (done.code, done.out) == (2, "")
    assert "None of the rows has an answer" in done.err
    assert "load ..." not in done.err


def test_the_runs_own_held_out_rows_are_the_default(three: Path, rows: Path) -> None:
    """And they are known to be unseen, so nothing is said of that."""
    shutil.copy(rows, three / "held_out.jsonl")
    choice = ts.checkpoints(three, dtype="fp32", answers=0)
    assert (choice.rows_from, choice.rows) == ("held_out", 4)
    assert not [one for one in choice.findings if one.code.startswith("choice_rows")]


def drawn(capsys: pytest.CaptureFixture[str], choice: ts.CheckpointChoice) -> list[str]:
    """The curve's lines."""
    capsys.readouterr()
    _curve(Screen(), choice)
    return capsys.readouterr().out.splitlines()


def made(*losses: float | None, recommended: str = "checkpoint-20") -> ts.CheckpointChoice:
    """A choice from logged losses, every ten steps."""
    candidates = [
        ts.Candidate(name=f"checkpoint-{10 * i}", step=10 * i, logged_loss=loss) for i, loss in enumerate(losses, 1)
    ]
    return ts.CheckpointChoice(
        run="run",
        candidates=tuple(candidates),
        recommended=recommended,
        reason=ts.Finding(code="choice_recorded", severity="info", params={"name": recommended, "loss": 1.0}),
    )


def test_curve_has_the_highest_loss_on_top_and_steps_from_left_to_right(capsys: pytest.CaptureFixture[str]) -> None:
    """The recommended one has a mark of its own."""
    lines = drawn(capsys, made(2.0, 1.0, 1.5))
    assert (lines[1].split()[0], lines[-3].split()[0]) == ("2.000", "1.000")
    columns = [next(line.index(mark) for line in part if mark in line) for part, mark in
               ((lines[1:2], "•"), (lines[-3:-2], "◆"), (lines[2:-3], "•"))]  # fmt: skip
    assert columns == sorted(columns)
    assert "as logged" in lines[0]


@pytest.mark.parametrize("losses", [(), (1.0,), (1.0, None), (float("nan"), 1.0), (float("inf"), float("nan"))])
def test_curve_of_less_than_two_points_is_left_out(
    capsys: pytest.CaptureFixture[str], losses: tuple[float | None, ...]
) -> None:
    """A loss that is no number is no point."""
    assert drawn(capsys, made(*losses)) == []


def test_equal_losses_are_a_flat_curve(capsys: pytest.CaptureFixture[str]) -> None:
    """And no division by zero."""
    assert sum("•" in line or "◆" in line for line in drawn(capsys, made(1.0, 1.0, 1.0))) == 1


def test_table_fits_a_terminal_of_a_hundred_columns() -> None:
    """With every column filled and four-digit steps."""
    figure = Estimate(value=-9.345, low=-10.0, high=-8.69)
    one = ts.Candidate(
        name="checkpoint-1200",
        step=1200,
        loss=figure,
        to_best=figure,
        to_base=figure,
        to_last=0.55,
        answer_tokens=231.0,
    )
    copy = ts.Candidate(name="final", same_as="checkpoint-1200")
    choice = made().model_copy(update={"candidates": (one, copy), "rows": 40, "recommended": one.name})
    screen = Screen()
    screen.width = 200
    with screen.capture() as capture:
        screen.print(_table(choice))
    assert max(len(line.rstrip()) for line in capture.get().splitlines()) <= 100


def test_names_from_the_run_cannot_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    """A hostile name is shown, not obeyed."""
    evil = ts.Candidate(name="checkpoint-\x1b[2J", step=1, logged_loss=1.0, same_as="\x1b[H")
    choice = made(recommended="\x1b[2J").model_copy(update={"candidates": (evil,)})
    screen = Screen()
    screen.print(_table(choice))
    assert "\x1b" not in capsys.readouterr().out
