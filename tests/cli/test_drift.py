"""``tunesmith drift``: the advice, a table from which to choose, and one document with ``--json`` or ``--out``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tunesmith as ts
from tests.cli.conftest import Cli, Result, tree
from tests.tiny_models import TinyRun


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five rows with answers."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"instruction": f"Question {i}?", "output": f"Answer {i}, and no more."} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def done(
    cli: Cli, run_dir: Path, tiny: TinyRun, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Result, Path]:
    """A drift of the merged model, as JSON on stdout and as Markdown."""
    out = tmp_path_factory.mktemp("out") / "drift.md"
    options = ("--data", rows, "--max-rows", "3", "--out", out, "--json")
    return cli("drift", run_dir, f"shipped={tiny.merged}", *options), out


def test_json_is_the_record_and_the_file_is_written_too(done: tuple[Result, Path]) -> None:
    """One document, and nothing else on stdout."""
    result, out = done
    assert result.code == 0, result.err
    found = ts.Drift.model_validate_json(result.out)
    assert [row.name for row in found.rows] == ["base", "shipped"]
    assert found.in_domain_rows == found.general_rows == 3
    assert "| shipped" in out.read_text()


def test_the_table_is_for_grep_in_a_pipe_and_names_the_next_step(
    cli: Cli, run_dir: Path, tiny: TinyRun, rows: Path
) -> None:
    """A line a model; then the proof of the one to take, or other schemes where none is close."""
    before = tree(run_dir)
    result = cli("drift", run_dir, tiny.merged, "--data", rows, "--max-rows", "3")
    assert result.code == 0, result.err
    (line,) = [line for line in result.out.splitlines() if line.lstrip("→ ").startswith("merged")]
    assert "fp32" in line
    assert "100.0%" in line
    assert "Next: tunesmith" in result.out
    assert tree(run_dir) == before


def test_bad_input_is_told_before_any_work(cli: Cli, run_dir: Path, tiny: TinyRun, tmp_path: Path) -> None:
    """An adapter among the models, and a file of an unknown kind."""
    adapter = cli("drift", run_dir, run_dir / "checkpoint-10", "--json")
    assert adapter.code == 2
    assert json.loads(adapter.out)["what"] == "Only complete models can be held against the live adapter."
    wrong = cli("drift", run_dir, tiny.merged, "--out", tmp_path / "drift.csv")
    assert wrong.code == 2
    assert ".html" in wrong.err
    assert list(tmp_path.iterdir()) == []


def test_a_report_shows_a_drift_that_was_kept(
    cli: Cli, run_dir: Path, done: tuple[Result, Path], tmp_path: Path
) -> None:
    """``--drift`` reads what ``--json`` printed; another record is refused."""
    kept = tmp_path / "drift.json"
    kept.write_text(done[0].out)
    wrong = cli("report", run_dir, "--drift", run_dir / "adapter_config.json", "--out", tmp_path / "wrong.html")
    assert wrong.code == 2
    assert "not a Drift record" in wrong.err
    ts.write_drift(ts.Drift.read(kept), run_dir, tmp_path / "report.html")
    assert "shipped" in (tmp_path / "report.html").read_text()
