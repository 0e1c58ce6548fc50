"""Going on with a run that was stopped: the same losses as if it had not been, or a refusal that says why."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tunesmith as ts
from tunesmith.checkpoint import sha256_of
from tunesmith.cli.app import app
from tunesmith.errors import Cancelled, RecipeError
from tunesmith.progress import Cancellation, Progress
from tunesmith.train import Recipe, train

from .conftest import CPU, RecipeMaker, Trained

ADAPTER = "adapter_model.safetensors"
# What makes resuming hard: dropout, a shuffled order, several passes over the rows, accumulated batches.
HARD = {"lora_dropout": 0.1, "val_size": 4, "max_steps": 8, "save_steps": 2, "gradient_accumulation_steps": 2}

Fit = Callable[..., Path]


@pytest.fixture
def fit(base_dir: Path) -> Fit:
    """Trains a recipe on the tiny base."""

    def run(recipe: Recipe, **options: Any) -> Path:
        sha256 = options.pop("base_sha256", "ab" * 32)
        return train(recipe, base_dir=base_dir, base_name="tiny", base_sha256=sha256, machine=CPU, **options)

    return run


def stop_after(fit: Fit, recipe: Recipe, step: int) -> None:
    """Train, and stop after a step."""
    cancellation = Cancellation()

    def seen(event: Progress) -> None:
        if event.stage == "train" and event.done == step:
            cancellation.cancel()

    with pytest.raises(Cancelled, match=r"--resume"):
        fit(recipe, progress=seen, cancellation=cancellation)


def losses(run_dir: Path) -> dict[tuple[str, int], float]:
    """Every loss of the log, by its kind and step."""
    rows = [json.loads(line) for line in (run_dir / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {(kind, row["current_steps"]): row[kind] for row in rows for kind in ("loss", "eval_loss") if kind in row}


@pytest.mark.parametrize(("attention", "step"), [("auto", 3), ("disabled", 5)])
def test_resumed_run_is_the_unbroken_one_bit_by_bit(
    fit: Fit, recipe_for: RecipeMaker, tmp_path: Path, attention: str, step: int
) -> None:
    """Every loss and the adapter; flat rows in random order, padded ones grouped by length."""
    whole = fit(recipe_for(output_dir=str(tmp_path / "whole"), flash_attn=attention, **HARD))
    recipe = recipe_for(flash_attn=attention, **HARD)
    stop_after(fit, recipe, step)
    run_dir = fit(recipe.model_copy(update={"resume_from_checkpoint": True}))
    assert losses(run_dir) == losses(whole)
    assert sha256_of(run_dir / ADAPTER) == sha256_of(whole / ADAPTER)


def test_stopping_within_an_evaluation_keeps_the_step(fit: Fit, recipe_for: RecipeMaker) -> None:
    """The step is done, so it is saved, though the evaluation is not."""
    cancellation = Cancellation()
    from tunesmith.train.trainer import SupervisedTrainer

    before = SupervisedTrainer.evaluation_loop

    def evaluation_loop(self: Any, *args: Any, **options: Any) -> Any:
        cancellation.cancel()
        return before(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SupervisedTrainer, "evaluation_loop", evaluation_loop)
        with pytest.raises(Cancelled, match="checkpoint-2"):
            fit(recipe_for(**HARD), cancellation=cancellation)
    run_dir = fit(recipe_for(resume_from_checkpoint=True, **HARD))
    assert (run_dir / ADAPTER).is_file()


def test_killed_run_is_explained_and_goes_on(fit: Fit, recipe_for: RecipeMaker, tmp_path: Path) -> None:
    """As ``kill -9`` leaves it: a half-written checkpoint, a half-written log line, no final adapter."""
    recipe = recipe_for(**HARD)
    stop_after(fit, recipe, 4)
    run_dir = tmp_path / "run"
    shutil.copytree(run_dir / "checkpoint-4", run_dir / "checkpoint-6")
    (run_dir / "checkpoint-6" / "trainer_state.json").write_text('{"global_st', encoding="utf-8")
    with (run_dir / "trainer_log.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"current_steps": 5, "lo')
    found = ts.inspect(run_dir)
    assert {"run_unfinished", "run_resumable"} <= {finding.code for finding in found.run.findings}
    resumed = fit(recipe.model_copy(update={"resume_from_checkpoint": True}))
    assert (resumed / ADAPTER).is_file()
    assert "run_unfinished" not in {finding.code for finding in ts.inspect(resumed).run.findings}


def test_resuming_goes_on_from_a_checkpoint_that_is_named(fit: Fit, recipe_for: RecipeMaker, tmp_path: Path) -> None:
    """Into another directory, and the run that it comes from is not touched."""
    recipe = recipe_for(**HARD)
    first = fit(recipe)
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    named = str(first / "checkpoint-4")
    second = fit(recipe_for(output_dir=str(tmp_path / "second"), resume_from_checkpoint=named, **HARD))
    assert sha256_of(second / ADAPTER) == sha256_of(first / ADAPTER)
    assert before == {path: path.stat().st_mtime_ns for path in first.rglob("*")}


def test_training_longer_is_resuming_with_more_steps(fit: Fit, recipe_for: RecipeMaker) -> None:
    """How long it goes on may change, and how often something is written."""
    fit(recipe_for(**HARD))
    run_dir = fit(recipe_for(resume_from_checkpoint=True, **{**HARD, "max_steps": 10, "save_steps": 5}))
    assert (run_dir / "checkpoint-10").is_dir()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"learning_rate": 5e-4}, "learning_rate: 0.001 then, 0.0005 now"),
        ({"lora_rank": 4, "lora_alpha": 8}, "lora_rank: 8 then, 4 now"),
        ({"seed": 7}, "seed: 42 then, 7 now"),
    ],
)
def test_another_recipe_is_refused_by_its_keys(
    fit: Fit, recipe_for: RecipeMaker, changes: dict[str, object], what: str
) -> None:
    """Half of one training and half of another would be neither."""
    stop_after(fit, recipe_for(**HARD), 2)
    with pytest.raises(RecipeError, match="another recipe") as caught:
        fit(recipe_for(resume_from_checkpoint=True, **{**HARD, **changes}))
    assert what in caught.value.details


def test_other_rows_or_another_base_are_refused(
    fit: Fit, recipe_for: RecipeMaker, data_file: Path, tmp_path: Path
) -> None:
    """The rows are those that the run began with, byte for byte; so are the base's weights."""
    rows = shutil.copy(data_file, tmp_path / "rules.jsonl")
    stop_after(fit, recipe_for(dataset=str(rows), **HARD), 2)
    with pytest.raises(RecipeError, match="changed since") as caught:
        fit(recipe_for(dataset=str(rows), resume_from_checkpoint=True, **HARD), base_sha256="cd" * 32)
    assert caught.value.details == ("the base tiny",)
    with rows.open("a", encoding="utf-8") as file:
        file.write('{"instruction": "more", "output": "yes"}\n')
    with pytest.raises(RecipeError, match="changed since") as caught:
        fit(recipe_for(dataset=str(rows), resume_from_checkpoint=True, **HARD))
    assert caught.value.details == ("rules.jsonl",)


def test_nothing_to_resume_is_said(fit: Fit, recipe_for: RecipeMaker, trained: Trained, tmp_path: Path) -> None:
    """No checkpoint, one that is none, and one without the optimizer's state."""
    with pytest.raises(RecipeError, match="no whole checkpoint"):
        fit(recipe_for(resume_from_checkpoint=True))
    with pytest.raises(RecipeError, match="no whole checkpoint"):
        fit(recipe_for(resume_from_checkpoint=str(tmp_path)))
    bare = tmp_path / "checkpoint-3"
    shutil.copytree(trained.run_dir / "checkpoint-3", bare)
    (bare / "optimizer.pt").unlink()
    with pytest.raises(RecipeError, match="the adapter only"):
        fit(recipe_for(resume_from_checkpoint=str(bare)))


def test_ctrl_c_in_a_terminal_saves_and_says_how_to_go_on(
    base_dir: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole program, by the signal itself; and ``--resume`` on the run directory finishes it."""
    recipe = tmp_path / "recipe.yaml"
    values = {"model_name_or_path": str(base_dir), "dataset": str(data_file), "output_dir": "run", "max_steps": 400}
    recipe.write_text(json.dumps(values | {"save_steps": 1000, "learning_rate": 1e-4}), encoding="utf-8")
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    log = tmp_path / "run" / "trainer_log.jsonl"
    program = [sys.executable, "-m", "tunesmith", "train", str(recipe)]
    running = subprocess.Popen(program, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not log.is_file() and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 130, said
    assert "Go on: tunesmith train" in said
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    step = int(checkpoint.name.partition("-")[2])
    done = CliRunner().invoke(app, ["train", "run", f"max_steps={step + 2}", "--resume", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["checkpoints"][-1]["step"] == step + 2


def test_run_without_a_checkpoint_is_explained(fit: Fit, recipe_for: RecipeMaker, tmp_path: Path) -> None:
    """It has no adapter to look at, and no state to go on from; what to do is said."""
    cancellation = Cancellation()

    def seen(event: Progress) -> None:
        if event.stage == "train" and event.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(Cancelled):
        fit(recipe_for(**HARD), progress=seen, cancellation=cancellation)
    with pytest.raises(ts.TunesmithError, match="before its first checkpoint") as caught:
        ts.inspect(tmp_path / "run")
    assert caught.value.next_step == f"tunesmith train {tmp_path / 'run'} overwrite_output_dir=true"


def test_finished_run_is_not_trained_on(fit: Fit, recipe_for: RecipeMaker) -> None:
    """Not a step more than was asked for; what to change is said."""
    run_dir = fit(recipe_for(**HARD))
    with pytest.raises(RecipeError, match="nothing left to train"):
        fit(recipe_for(resume_from_checkpoint=True, **HARD))
    assert (run_dir / ADAPTER).is_file()


def test_checkpoint_that_is_named_within_the_run_stays_though_it_may_be_overwritten(
    fit: Fit, recipe_for: RecipeMaker
) -> None:
    """LLaMA-Factory's examples say ``overwrite_output_dir``; that is no order to delete what is gone on from."""
    run_dir = fit(recipe_for(**HARD))
    before = sha256_of(run_dir / ADAPTER)
    named = str(run_dir / "checkpoint-2")
    again = fit(recipe_for(resume_from_checkpoint=named, overwrite_output_dir=True, **HARD))
    assert sha256_of(again / ADAPTER) == before
    assert "goes on from checkpoint-2" in (run_dir / "running_log.txt").read_text(encoding="utf-8")


def test_run_of_a_base_that_lies_beside_its_recipe_goes_on(
    base_dir: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run knows where its base is from where it lies itself."""
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "cache"))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "base").symlink_to(base_dir)
    values = {"model_name_or_path": "base", "dataset": str(data_file), "max_steps": 2, "save_steps": 1}
    (tmp_path / "sub" / "recipe.yaml").write_text(json.dumps(values), encoding="utf-8")
    run_dir = tmp_path / "sub" / "run"
    ts.train(tmp_path / "sub" / "recipe.yaml", [f"output_dir={run_dir}"])
    assert ts.inspect(run_dir).run.findings == ()
    longer = ts.train(run_dir, ["max_steps=3"], resume=True)
    assert longer.checkpoints[-1].step == 3
