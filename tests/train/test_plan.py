"""What is told before a training begins is what then happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tunesmith as ts
from tunesmith.train import Machine
from tunesmith.train.plan import lengths_of, needs_checkpointing, plan_training, steps_of
from tunesmith.train.prepare import load_config, prepare

from .conftest import CPU, RecipeMaker, Trained
from .test_trainer import build


@pytest.mark.parametrize("batch", [1, 4, 7])
@pytest.mark.parametrize(("accumulated", "epochs"), [(1, 1.0), (3, 2.0), (2, 1.5)])
def test_steps_are_counted_as_the_trainer_counts_them(
    base_dir: Path, recipe_for: RecipeMaker, tmp_path: Path, batch: int, accumulated: int, epochs: float
) -> None:
    """Also where the last batch of a pass is not full, and a batch is several passes of few rows."""
    recipe = recipe_for(
        output_dir=str(tmp_path), max_steps=-1, num_train_epochs=epochs, per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulated,
    )  # fmt: skip
    trainer = build(base_dir, recipe)
    counted = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    assert steps_of(recipe, len(trainer.train_dataset))[0] == counted[-1]


def test_histogram_holds_every_row_once() -> None:
    """Bars are as wide as each other, and none ends before the longest row."""
    lengths = [5, 5, 6, 30, 31, 129]
    told = lengths_of(lengths)
    assert sum(told.counts) == len(lengths)
    assert (told.shortest, told.median, told.p95, told.longest) == (5, 6, 129, 129)
    widths = {right - left for left, right in zip(told.edges, told.edges[1:], strict=False)}
    assert len(widths) == 1
    for left, right, count in zip(told.edges, told.edges[1:], told.counts, strict=False):
        assert count == sum(left <= length < right for length in lengths)
    assert lengths_of([7]).counts == (1,)


def test_plan_is_what_happens_and_writes_nothing(base_dir: Path, recipe_for: RecipeMaker, tmp_path: Path) -> None:
    """Rows, steps, tokens and the first example, its answers marked and nothing else."""
    recipe = recipe_for(val_size=4, max_steps=-1, num_train_epochs=2, preprocessing_num_workers=16)
    before = sorted(tmp_path.rglob("*"))
    plan = plan_training(recipe, base_dir, Machine("float32", "cpu", 8 << 30), flops_per_s=1e9)
    assert sorted(tmp_path.rglob("*")) == before
    prepared = prepare(recipe, base_dir)
    assert (plan.train_rows, plan.held_out_rows) == (len(prepared.rows.train), len(prepared.rows.held_out))
    assert plan.supervised_tokens == prepared.train.supervised_tokens
    assert plan.tokens == sum(prepared.train.lengths)
    answers = [turn.content for turn in prepared.rows.train[0].messages if turn.role == "assistant"]
    assert [piece.text for piece in plan.example if piece.supervised] == [f"{answer}<|im_end|>" for answer in answers]
    assert {use.key: use.use for use in plan.keys}["preprocessing_num_workers"] == "harmless"
    assert plan.memory is not None
    assert plan.memory.total_bytes > plan.memory.weights_bytes > 0
    assert plan.seconds is not None
    assert type(plan).model_validate_json(plan.to_json()) == plan


def test_gradient_checkpointing_is_by_need_unless_the_recipe_says(base_dir: Path, recipe_for: RecipeMaker) -> None:
    """Much memory needs none; little does; and the recipe's word counts for more."""
    config = load_config(base_dir)

    def needed(free_bytes: int | None, **changes: Any) -> bool:
        recipe = recipe_for(**changes)
        return needs_checkpointing(recipe, prepare(recipe, base_dir), config, Machine("float32", "cpu", free_bytes))

    assert not needed(8 << 30)
    assert needed(2 << 20)
    assert not needed(None)
    assert not needed(2 << 20, disable_gradient_checkpointing=True)
    assert needed(8 << 30, gradient_checkpointing=True)


def test_estimated_memory_grows_with_the_rows_and_shrinks_by_checkpointing(
    base_dir: Path, recipe_for: RecipeMaker
) -> None:
    """In the order of what a float32 number of the hidden state is kept for."""
    found = {}
    for name, changes in {
        "few": {"per_device_train_batch_size": 1, "packing": True, "cutoff_len": 64},
        "many": {"per_device_train_batch_size": 1, "packing": True, "cutoff_len": 512},
        "again": {"per_device_train_batch_size": 1, "packing": True, "cutoff_len": 512, "gradient_checkpointing": True},
    }.items():
        plan = plan_training(recipe_for(**changes), base_dir, CPU, flops_per_s=None)
        assert plan.memory is not None
        found[name] = plan.memory.activations_bytes
        assert plan.seconds is None
    assert found["few"] < found["again"] < found["many"]


def test_a_finished_run_is_a_recipe(base_dir: Path, trained: Trained) -> None:
    """Its own file of settings is read, with the rows that it names, and says the same."""
    plan = ts.plan_training(trained.run_dir, [f"model_name_or_path={base_dir}"])
    assert (plan.steps, plan.train_rows + plan.held_out_rows, plan.cutoff_len) == (7, 24, 64)
