"""What ends a training early, and what is left of it: a loss that blows up, nothing that learns, no progress."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.errors import RecipeError
from tunesmith.train import Recipe, fit, train
from tunesmith.train.resume import whole_checkpoints

from .conftest import CPU, RecipeMaker
from .test_trainer import REL_FLOAT32

Fit = Callable[..., Path]


@pytest.fixture
def fit_recipe(base_dir: Path) -> Fit:
    """Trains a recipe on the tiny base."""

    def run(recipe: Recipe, **options: Any) -> Path:
        return train(recipe, base_dir=base_dir, base_name="tiny", base_sha256="ab" * 32, machine=CPU, **options)

    return run


def log_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of ``trainer_log.jsonl``."""
    return [json.loads(line) for line in (run_dir / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def steep(monkeypatch: pytest.MonkeyPatch) -> None:
    """A learning rate that is right for 25 steps, and then ten thousand times as high."""
    from torch.optim.lr_scheduler import LambdaLR

    from tunesmith.train.trainer import SupervisedTrainer

    def create_scheduler(trainer: Any, num_training_steps: int, optimizer: Any = None) -> Any:
        trainer.lr_scheduler = LambdaLR(
            optimizer or trainer.optimizer, lambda step: 1.0 if step < min(25, num_training_steps) else 1e4
        )
        return trainer.lr_scheduler

    monkeypatch.setattr(SupervisedTrainer, "create_scheduler", create_scheduler)


STEEP = {"learning_rate": 2e-2, "max_steps": 100, "save_steps": 10, "per_device_train_batch_size": 24}


@pytest.mark.usefixtures("steep")
def test_loss_that_blows_up_stops_with_a_finding(fit_recipe: Fit, recipe_for: RecipeMaker, tmp_path: Path) -> None:
    """Long before the last step; the checkpoints from before are there, and it is said since when."""
    with pytest.raises(RecipeError, match="blown up") as caught:
        fit_recipe(recipe_for(**STEEP))
    done = log_rows(tmp_path / "run")[-1]["current_steps"]
    assert 25 < done < 60
    since = int(str(caught.value.where).removeprefix("step "))
    assert 20 < since <= done
    assert whole_checkpoints(tmp_path / "run")
    assert "learning_rate" in str(caught.value.next_step)
    assert "blown up" in (tmp_path / "run" / "running_log.txt").read_text(encoding="utf-8")


@pytest.mark.usefixtures("steep")
def test_loss_may_rise_where_that_is_meant(fit_recipe: Fit, recipe_for: RecipeMaker) -> None:
    """The same training, told to go on."""
    recipe = recipe_for(**{**STEEP, "max_steps": 40, "stop_on_divergence": False})
    assert (fit_recipe(recipe) / "adapter_model.safetensors").is_file()


def test_sound_training_is_not_stopped(fit_recipe: Fit, recipe_for: RecipeMaker) -> None:
    """A loss that falls, noisily, for a hundred steps."""
    recipe = recipe_for(max_steps=100, save_steps=200, per_device_train_batch_size=1)
    assert log_rows(fit_recipe(recipe))[-1]["current_steps"] == 100


@pytest.mark.parametrize("frozen", ["weights", "graph"])
def test_adapter_that_gets_no_gradient_is_noticed(
    fit_recipe: Fit, recipe_for: RecipeMaker, monkeypatch: pytest.MonkeyPatch, frozen: str
) -> None:
    """At the first step, and not when it has been trained for nothing."""
    import torch

    build = fit.build_trainer

    def broken(*args: Any, **options: Any) -> Any:
        trainer = build(*args, **options)
        adapter = [weight for weight in trainer.model.parameters() if weight.requires_grad]
        for weight in adapter:
            if frozen == "weights":
                weight.register_hook(torch.zeros_like)
            else:
                weight.requires_grad_(False)
        if frozen == "graph":  # something to train that is not the adapter, so that the loss has a gradient at all
            trainer.model.get_input_embeddings().weight.requires_grad_(True)
            trainer.model.get_input_embeddings().weight.register_hook(torch.zeros_like)
        return trainer

    monkeypatch.setattr(fit, "build_trainer", broken)
    with pytest.raises(RecipeError, match="Nothing learns") as caught:
        fit_recipe(recipe_for())
    assert caught.value.where == "step 1"


def test_early_stopping_keeps_the_best(fit_recipe: Fit, recipe_for: RecipeMaker) -> None:
    """Evaluations without a lower loss end it; the adapter at the root is the best one."""
    from tunesmith.checkpoint import sha256_of

    recipe = recipe_for(
        val_size=4, max_steps=60, save_steps=2, eval_steps=2, learning_rate=3e-1, warmup_ratio=0,
        stop_on_divergence=False, early_stopping_steps=2, load_best_model_at_end=True, eval_strategy="steps",
        lr_scheduler_type="constant",
    )  # fmt: skip
    run_dir = fit_recipe(recipe)
    losses = {row["current_steps"]: row["eval_loss"] for row in log_rows(run_dir) if "eval_loss" in row}
    best = min(losses, key=lambda step: losses[step])
    assert max(losses) == best + 4 < 60
    adapter = "adapter_model.safetensors"
    assert sha256_of(run_dir / adapter) == sha256_of(run_dir / f"checkpoint-{best}" / adapter)


@pytest.mark.parametrize("packing", [False, True])
def test_packed_rows_are_fewer_steps_over_the_same_rows(
    fit_recipe: Fit, recipe_for: RecipeMaker, packing: bool
) -> None:
    """Each of the rows once a pass, several to an example."""
    recipe = recipe_for(
        max_steps=-1, num_train_epochs=1, packing=packing, cutoff_len=128, per_device_train_batch_size=1
    )
    rows = log_rows(fit_recipe(recipe))
    assert (rows[-1]["current_steps"] < 15) == packing
    if not packing:
        assert rows[-1]["current_steps"] == 24


@pytest.mark.slow  # test_processes.py has the same by torchrun
def test_two_processes_train_as_one_with_twice_the_batch(
    fit_recipe: Fit, base_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    """Under ``accelerate launch``, on two CPU processes: the same losses, and one of them writes."""
    values = {
        "model_name_or_path": str(base_dir), "dataset": str(data_file), "val_size": 5, "max_steps": 4, "save_steps": 2,
        "logging_steps": 1, "learning_rate": 1e-3, "dtype": "float32", "use_cpu": True,
    }  # fmt: skip
    # Its word for several processes on one machine; on which device is the recipe's to say.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m"]
    recipe = tmp_path / "two.yaml"
    changes = {"output_dir": str(tmp_path / "two"), "per_device_train_batch_size": 2}
    recipe.write_text(json.dumps(values | changes), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, *launch, "tunesmith", "train", str(recipe)],
        env={**os.environ, "TUNESMITH_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Run directory:") == 1
    alone = fit_recipe(Recipe.of(values | {"output_dir": str(tmp_path / "one"), "per_device_train_batch_size": 4}))
    two, one = log_rows(tmp_path / "two"), log_rows(alone)
    assert [row["current_steps"] for row in two] == [row["current_steps"] for row in one]
    for ours, whole in zip(two, one, strict=True):
        for kind in {"loss", "eval_loss"} & whole.keys():
            assert ours[kind] == pytest.approx(whole[kind], rel=REL_FLOAT32)
