"""``tunesmith quantize``: its plan, its result, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tunesmith as ts
from tests.tiny_models import TinyRun
from tunesmith.cli.app import app


def run(*words: object) -> Any:
    """The command in this process."""
    return CliRunner().invoke(app, ["quantize", *map(str, words)])


def test_a_dry_run_says_all_and_writes_nothing(tiny: TinyRun, tmp_path: Path) -> None:
    """What stays, what it takes, and no file."""
    done = run(
        tiny.adapters["final"], "--base", tiny.base, "--out", tmp_path / "out", "--scheme", "int4:64", "--dry-run"
    )
    assert done.exit_code == 0, done.output
    assert "14 of 20 tensors" in done.stdout
    assert "kept as they are: lm_head, model.embed_tokens" in done.stdout
    assert "Nothing was written" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_json_is_the_librarys_record(tiny: TinyRun, tmp_path: Path) -> None:
    """Of the plan, and of what was done."""
    words = (tiny.adapters["final"], "--base", tiny.base, "--out", tmp_path / "out", "--scheme", "int8", "--json")
    plan = ts.QuantizationPlan.model_validate_json(run(*words, "--dry-run").stdout)
    done = ts.Quantized.model_validate_json(run(*words).stdout)
    assert done.plan.model_copy(update={"free_bytes": None}) == plan.model_copy(update={"free_bytes": None})
    assert done.size_bytes == (done.path / "model.safetensors").stat().st_size
    assert done.plan.write_bytes >= done.size_bytes


def test_it_says_what_was_done_and_what_to_type_next(tiny: TinyRun, tmp_path: Path) -> None:
    """The same base goes into the next command."""
    done = run(tiny.adapters["final"], "--base", tiny.base, "--out", tmp_path / "out", "--scheme", "int8")
    assert done.exit_code == 0, done.output
    text = " ".join(done.stdout.split())
    assert "Quantized in" in text
    assert f"tunesmith verify {tiny.adapters['final']} {tmp_path / 'out'} --base {tiny.base}" in text
    assert f"vllm serve {tmp_path / 'out'}" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Name the directory to make"),
        (["--compare", "int8", "--out", "x"], "writes no model"),
        (["--compare", "int8", "--dry-run"], "writes no model"),
    ],
)
def test_what_to_make_must_be_said(tiny: TinyRun, words: list[str], message: str) -> None:
    """A directory, or schemes to compare; exit 2."""
    done = run(tiny.adapters["final"], *words)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def test_schemes_are_compared_and_nothing_is_left(tiny: TinyRun, tmp_path: Path) -> None:
    """Each is a row of the drift's record."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"say {n}", "output": f"it is {n}"}) + "\n" for n in range(4)))
    before = sorted(path.name for path in tmp_path.iterdir())
    done = run(
        *(tiny.adapters["final"], "--base", tiny.base, "--compare", "int8,int4:32", "--rounding", "nearest"),
        *("--data", rows, "--max-rows", 3, "--json"),
    )
    assert done.exit_code == 0, done.output
    drift = ts.Drift.model_validate_json(done.stdout)
    assert [row.model.scheme for row in drift.rows][1:] == ["int8", "int4:32"]
    assert sorted(path.name for path in tmp_path.iterdir()) == before
