"""Training from end to end: the run directory that is left, and what is left when it is stopped."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.checkpoint import sha256_of
from tunesmith.conversations import read_conversations
from tunesmith.errors import BaseModelError, Cancelled, DataError, MissingExtraError, OutputError, RecipeError
from tunesmith.progress import Cancellation, Progress
from tunesmith.train import Machine, Recipe, read_recipe, train

from .conftest import CPU, RecipeMaker, Trained

ROOT_FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "all_results.json",
    "chat_template.jinja",
    "eval_results.json",
    "held_out.jsonl",
    "running_log.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "train_results.json",
    "trainer_log.jsonl",
    "trainer_state.json",
    "training_args.bin",
    "training_args.yaml",
    "tunesmith_run.json",
}
CHECKPOINT_FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
    "training_args.bin",
}

Fit = Callable[..., Path]


@pytest.fixture
def fit(base_dir: Path) -> Fit:
    """Trains a recipe on the tiny base."""

    def run(recipe: Recipe, **options: Any) -> Path:
        return train(recipe, base_dir=base_dir, base_name="tiny", base_sha256="ab" * 32, machine=CPU, **options)

    return run


def names(folder: Path) -> set[str]:
    """What a folder holds."""
    return {path.name for path in folder.iterdir()}


def log_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of ``trainer_log.jsonl``."""
    return [json.loads(line) for line in (run_dir / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_run_directory_holds_the_whole_set(trained: Trained) -> None:
    """Everything that a reader of a run looks for, and nothing half-made."""
    assert names(trained.run_dir) == ROOT_FILES | {"checkpoint-3", "checkpoint-6", "checkpoint-7"}
    assert names(trained.run_dir / "checkpoint-3") == CHECKPOINT_FILES


def test_base_is_not_touched(trained: Trained) -> None:
    """Not a byte of its directory changes."""
    assert trained.base_before == trained.base_after


def test_log_rows_have_llamafactorys_keys(trained: Trained) -> None:
    """The loss rows, the evaluation rows and the last row, each with its own keys."""
    rows = log_rows(trained.run_dir)
    always = {"current_steps", "total_steps", "epoch", "percentage", "elapsed_time", "remaining_time"}
    assert [(row["current_steps"], sorted(row.keys() - always)) for row in rows] == [
        (2, ["loss", "lr"]),
        (3, ["eval_loss"]),
        (4, ["loss", "lr"]),
        (6, ["loss", "lr"]),
        (6, ["eval_loss"]),
        (7, ["eval_loss"]),
        (7, []),
    ]
    assert all(always <= row.keys() for row in rows)
    assert all(re.fullmatch(r"\d+:\d\d:\d\d", row[key]) for row in rows for key in ("elapsed_time", "remaining_time"))
    assert (rows[0]["total_steps"], rows[0]["percentage"], rows[-1]["percentage"]) == (7, 28.57, 100.0)


def test_training_learns(trained: Trained) -> None:
    """The held-out loss falls."""
    losses = [row["eval_loss"] for row in log_rows(trained.run_dir) if "eval_loss" in row]
    assert losses[-1] < losses[0]


def test_adapter_names_the_base_as_the_user_did(trained: Trained) -> None:
    """At the root and in every checkpoint, and nowhere the folder where it lay."""
    for folder in (trained.run_dir, *trained.run_dir.glob("checkpoint-*")):
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        assert config["base_model_name_or_path"] == "org/tiny"
        assert config["target_modules"] == sorted(config["target_modules"])
        assert "base_model: org/tiny" in (folder / "README.md").read_text(encoding="utf-8")
        for file in ("README.md", "adapter_config.json", "tokenizer_config.json"):
            assert str(trained.run_dir.parent.parent) not in (folder / file).read_text(encoding="utf-8")


def test_adapter_can_be_read_by_others(trained: Trained) -> None:
    """The safetensors library makes its files private to the user who wrote them; a server runs as another."""
    modes = {name: (trained.run_dir / name).stat().st_mode for name in ("adapter_model.safetensors", "tokenizer.json")}
    assert len(set(modes.values())) == 1


def test_final_adapter_is_that_of_the_last_step(trained: Trained) -> None:
    """The root and the last checkpoint agree; an earlier one differs."""
    final, last, earlier = (
        sha256_of(folder / "adapter_model.safetensors")
        for folder in (trained.run_dir, trained.run_dir / "checkpoint-7", trained.run_dir / "checkpoint-3")
    )
    assert final == last != earlier


def test_results_are_those_of_the_last_step(trained: Trained) -> None:
    """Metrics of training and of the last evaluation, together and apart."""
    found = {
        name: json.loads((trained.run_dir / f"{name}_results.json").read_text(encoding="utf-8"))
        for name in ("all", "train", "eval")
    }
    assert found["all"] == found["train"] | found["eval"]
    assert {"train_loss", "train_runtime", "total_flos", "epoch"} <= found["train"].keys()
    assert found["eval"]["eval_loss"] == log_rows(trained.run_dir)[-2]["eval_loss"]


def test_best_checkpoint_is_recorded_by_name(trained: Trained) -> None:
    """So that the directory can be moved."""
    state = json.loads((trained.run_dir / "trainer_state.json").read_text(encoding="utf-8"))
    losses = {row["current_steps"]: row["eval_loss"] for row in log_rows(trained.run_dir) if "eval_loss" in row}
    assert state["best_model_checkpoint"] == f"checkpoint-{min(losses, key=lambda step: losses[step])}"


def test_held_out_rows_are_kept_and_were_not_trained_on(trained: Trained, data_file: Path) -> None:
    """The run carries its own held-out rows; together with the rest they are the data set."""
    held_out = read_conversations(trained.run_dir / "held_out.jsonl")
    manifest = json.loads((trained.run_dir / "tunesmith_run.json").read_text(encoding="utf-8"))
    texts = {row.messages for row in held_out}
    rest = [row for row in read_conversations(data_file) if row.messages not in texts]
    assert len(held_out) >= 5
    assert len(rest) == manifest["train_rows"]


def test_recipe_in_the_run_can_be_read_again(trained: Trained, data_file: Path) -> None:
    """From where it lies, resolved, naming the same rows."""
    recipe = read_recipe(trained.run_dir / "training_args.yaml", ["output_dir=elsewhere"])
    assert [Path(name).resolve() for name in recipe.dataset] == [data_file]
    assert (recipe.dtype, recipe.eval_steps, recipe.max_steps, recipe.val_size) == ("float32", 3, 7, 5)


def test_readable_log_tells_the_story(trained: Trained) -> None:
    """The rows, the losses, the checkpoints and the end."""
    text = (trained.run_dir / "running_log.txt").read_text(encoding="utf-8")
    for part in ("held out", "step 2/7  loss", "step 7/7  eval_loss", "saved checkpoint-6", "done in"):
        assert part in text


@pytest.mark.usefixtures("two_threads")
def test_one_seed_gives_one_adapter(fit: Fit, recipe_for: RecipeMaker, tmp_path: Path) -> None:
    """Byte for byte, dropout and the order of rows included; another seed gives another."""
    digests = [
        sha256_of(
            fit(recipe_for(output_dir=tmp_path / name, seed=seed, lora_dropout=0.1)) / "adapter_model.safetensors"
        )
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_bfloat16_base_gets_a_float32_adapter(base_dir: Path, recipe_for: RecipeMaker) -> None:
    """Small updates would be lost in bfloat16; only the base is computed in it."""
    from safetensors import safe_open

    machine = Machine(dtype="bfloat16", device="cpu")
    run_dir = train(recipe_for(), base_dir=base_dir, base_name="tiny", base_sha256="ab" * 32, machine=machine)
    with safe_open(run_dir / "adapter_model.safetensors", framework="pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F32"}  # noqa: SIM118 - no mapping
    rows = [row["loss"] for row in log_rows(run_dir) if "loss" in row]
    assert rows[-1] < rows[0]


def test_run_without_held_out_rows_has_no_evaluation(fit: Fit, recipe_for: RecipeMaker) -> None:
    """Neither its files nor its rows in the log; epochs count where steps are not given."""
    run_dir = fit(recipe_for(max_steps=-1, num_train_epochs=1, per_device_train_batch_size=8))
    assert names(run_dir) == (ROOT_FILES - {"eval_results.json", "held_out.jsonl"}) | {"checkpoint-3"}
    assert not any("eval_loss" in row for row in log_rows(run_dir))


def test_progress_counts_every_step_with_the_loss(fit: Fit, recipe_for: RecipeMaker) -> None:
    """From nothing to the total."""
    seen: list[Progress] = []
    fit(recipe_for(max_steps=3), progress=seen.append)
    steps = [event for event in seen if event.stage == "train"]
    assert [(event.done, event.total) for event in steps] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert list(dict.fromkeys(event.stage for event in seen)) == ["read", "encode", "load", "train"]
    assert re.fullmatch(r"loss \d+(\.\d+)?", seen[-1].detail)


def test_training_says_nothing_by_itself(fit: Fit, recipe_for: RecipeMaker, capfd: pytest.CaptureFixture[str]) -> None:
    """No bar, no notice, no warning of any library."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(recipe_for(max_steps=2, val_size=2))
    assert capfd.readouterr() == ("", "")
    assert [str(warning.message) for warning in caught] == []


def stop_at(step: int, stop: Callable[[], None]) -> Callable[[Progress], None]:
    """A progress callback that stops the run at a step."""
    return lambda event: stop() if event.stage == "train" and event.done == step else None


def interrupt() -> None:
    """What Ctrl-C does."""
    raise KeyboardInterrupt


@pytest.mark.parametrize("by_signal", [False, True])
def test_stopping_keeps_finished_checkpoints_and_no_final_adapter(
    fit: Fit, recipe_for: RecipeMaker, tmp_path: Path, by_signal: bool
) -> None:
    """By the page's button and by Ctrl-C alike; the logs stay."""
    cancellation = Cancellation()
    callback = stop_at(3, interrupt if by_signal else cancellation.cancel)
    with pytest.raises(Cancelled):
        fit(recipe_for(save_steps=2), progress=callback, cancellation=cancellation)
    # Asked to stop, it saves what it has; a second Ctrl-C ends it at once.
    kept = {"checkpoint-2"} if by_signal else {"checkpoint-2", "checkpoint-3"}
    written = {"running_log.txt", "trainer_log.jsonl", "training_args.yaml", "tunesmith_run.json"}
    assert names(tmp_path / "run") == kept | written
    assert "stopped: " in (tmp_path / "run" / "running_log.txt").read_text(encoding="utf-8")


def test_full_disk_leaves_no_half_made_checkpoint(
    fit: Fit, recipe_for: RecipeMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user is told, and what is left is whole."""
    from tunesmith.train.trainer import SupervisedTrainer

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SupervisedTrainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(OutputError, match="disk is full"):
        fit(recipe_for(save_steps=2))
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert "adapter_model.safetensors" not in names(tmp_path / "run")


def test_overwriting_replaces_the_earlier_run(fit: Fit, recipe_for: RecipeMaker) -> None:
    """No checkpoint or log row of it is left."""
    fit(recipe_for(max_steps=4, save_steps=2))
    with pytest.raises(OutputError, match="not empty"):
        fit(recipe_for())
    run_dir = fit(recipe_for(max_steps=3, overwrite_output_dir=True))
    assert [folder.name for folder in run_dir.glob("checkpoint-*")] == ["checkpoint-3"]
    assert {row["total_steps"] for row in log_rows(run_dir)} == {3}


def test_recipe_that_is_refused_costs_no_earlier_run(fit: Fit, recipe_for: RecipeMaker) -> None:
    """An earlier run makes way only for one that can begin."""
    run_dir = fit(recipe_for(max_steps=1))
    with pytest.raises(RecipeError, match="lora_target"):
        fit(recipe_for(lora_target="query", overwrite_output_dir=True))
    assert (run_dir / "adapter_model.safetensors").is_file()


def test_base_that_cannot_be_loaded_is_the_users_to_mend(recipe_for: RecipeMaker, tmp_path: Path) -> None:
    """An empty directory is no model, and no run is begun for it."""
    (tmp_path / "nothing").mkdir()
    with pytest.raises(BaseModelError):
        train(recipe_for(), base_dir=tmp_path / "nothing", base_name="x", base_sha256="", machine=CPU)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("package", ["trl", "datasets"])
def test_missing_extra_is_named(
    fit: Fit, recipe_for: RecipeMaker, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    """With the command that installs it."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=f"'{package}'") as caught:
        fit(recipe_for())
    assert caught.value.next_step == 'pip install "tunesmith[train]"'


def test_importing_the_room_imports_no_training_library() -> None:
    """A recipe can be read without waiting for torch."""
    heavy = ("torch", "transformers", "trl", "peft", "datasets")
    code = f"import sys, tunesmith.train; print([name for name in {heavy} if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "[]\n"


def test_base_without_a_template_gets_the_named_one_and_stops_at_its_end(
    base_dir: Path, recipe_for: RecipeMaker, tmp_path: Path
) -> None:
    """Template, end token and where generation stops are saved with the adapter, at the root and in checkpoints."""
    plain = shutil.copytree(base_dir, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    settings = json.loads((plain / "tokenizer_config.json").read_text(encoding="utf-8"))
    (plain / "tokenizer_config.json").write_text(
        json.dumps({**settings, "eos_token": "<|im_start|>"}), encoding="utf-8"
    )
    (plain / "generation_config.json").write_text('{"eos_token_id": 0}', encoding="utf-8")
    run_dir = train(
        recipe_for(template="chatml", max_steps=2, save_steps=1), base_dir=plain, base_name="plain",
        base_sha256="ab" * 32, machine=CPU,
    )  # fmt: skip
    for folder in (run_dir, run_dir / "checkpoint-1"):
        assert "<|im_end|>" in (folder / "chat_template.jinja").read_text(encoding="utf-8")
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        assert settings["eos_token"].endswith("im_end|>")
        stops = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
        assert stops == [1, 0]  # <|im_end|>, and what the base stopped at before
    with pytest.raises(DataError, match="no chat template"):
        train(
            recipe_for(output_dir=str(tmp_path / "other")), base_dir=plain, base_name="plain", base_sha256="",
            machine=CPU,
        )  # fmt: skip


def test_template_of_the_base_itself_changes_nothing(trained: Trained) -> None:
    """No file that the base has already, and no second opinion on where to stop."""
    assert "generation_config.json" not in names(trained.run_dir)
