"""Going on with a run that was stopped: from which checkpoint, and whether it is the same training at all."""

from __future__ import annotations

import json
from pathlib import Path

from tunesmith.errors import RecipeError, TunesmithError
from tunesmith.train.manifest import MANIFEST_NAME, Manifest
from tunesmith.train.processes import processes
from tunesmith.train.recipe import Recipe, read_recipe
from tunesmith.train.run_dir import ADAPTER_WEIGHTS, ARGUMENTS, TRAINER_STATE, is_whole, whole_checkpoints

_OPTIMIZERS = ("optimizer.pt", "optimizer.bin")  # the latter of a sharded training
# What may be otherwise when a training goes on: where and how often something is written, and how long it goes on.
_FREE = frozenset(
    {
        "model_name_or_path",  # its weights are held against those that the run began with
        "output_dir",
        "overwrite_output_dir",
        "resume_from_checkpoint",
        "num_train_epochs",
        "max_steps",
        "logging_steps",
        "save_steps",
        "save_strategy",
        "save_total_limit",
        "eval_steps",
        "eval_strategy",
        "per_device_eval_batch_size",
        "early_stopping_steps",
        "dataloader_num_workers",
        "plot_loss",
        "report_to",
        "run_name",
        "stop_on_divergence",
        "dtype",
        "half_precision",
    }
)


def checkpoint_to_resume(recipe: Recipe) -> Path | None:
    """The checkpoint from which the recipe wants to go on; None where it wants to begin anew.

    Raises:
        RecipeError: there is none, it cannot be gone on from, or the run was made by another recipe (every key that
            differs is named).
    """
    wanted = recipe.resume_from_checkpoint
    if not wanted:
        return None
    if wanted is True:
        found = whole_checkpoints(recipe.output_dir)
        if not found:
            raise RecipeError(
                "There is no whole checkpoint to go on from.",
                where=recipe.output_dir,
                next_step="train without resuming; overwrite_output_dir=true replaces what is there",
            )
        checkpoint = found[-1]
    else:
        checkpoint = Path(wanted).absolute()
        if not is_whole(checkpoint):
            raise RecipeError(
                "This is no whole checkpoint.",
                where=checkpoint,
                expected=f"a checkpoint-N directory with {ADAPTER_WEIGHTS} and {TRAINER_STATE}",
            )
    if not any((checkpoint / name).is_file() for name in _OPTIMIZERS):
        raise RecipeError(
            "This checkpoint holds the adapter only, and no state of the optimizer to go on from.",
            where=checkpoint,
            next_step="train anew, with save_only_model=false",
        )
    _refuse_another_recipe(recipe, checkpoint.parent)
    return checkpoint


def goes_on_in_place(recipe: Recipe, checkpoint: Path | None) -> bool:
    """Whether a run goes on in its own directory, so that nothing of it makes way."""
    return checkpoint is not None and checkpoint.parent.resolve() == recipe.output_dir.resolve()


def refuse_done(checkpoint: Path, steps: int) -> None:
    """Refuse to go on with a run that has come to its end.

    Args:
        checkpoint: where the training goes on from.
        steps: optimizer steps that the recipe asks for.

    Raises:
        RecipeError: they have been done.
    """
    done = int(json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))["global_step"])
    if done >= steps:
        raise RecipeError(
            "There is nothing left to train: all steps have been done.",
            where=checkpoint,
            expected=f"fewer than {steps} steps",
            found=f"{done} steps",
            next_step="to train longer, raise max_steps or num_train_epochs",
        )


def refuse_other_processes(checkpoint: Path) -> None:
    """Refuse to go on with more or fewer processes: a step would have other rows, and random numbers would be lacking.

    Args:
        checkpoint: where the training goes on from.

    Raises:
        RecipeError: it was written by another number of processes than there are now.
    """
    # Each has its own; one alone writes "rng_state.pth".
    states = len(list(checkpoint.glob("rng_state_*.pth"))) or len(list(checkpoint.glob("rng_state.pth")))
    if states not in (0, processes()):
        raise RecipeError(
            "The run was begun with another number of processes, so it cannot go on with this one.",
            where=checkpoint,
            expected=states,
            found=processes(),
            next_step=f"go on with {states} of them (torchrun --nproc_per_node {states}), or train into another "
            "output_dir",
        )


def refuse_other_data(checkpoint: Path, now: Manifest) -> None:
    """Refuse to go on with another base or other rows than the run began with.

    Args:
        checkpoint: where the training goes on from.
        now: the base and the files of rows, as they are now.

    Raises:
        RecipeError: one of them is not what it was.
    """
    try:
        before = Manifest.read(checkpoint.parent / MANIFEST_NAME)
    except TunesmithError:
        return  # a run of another tool, or one whose manifest is lost: nothing to hold against
    changed = [] if before.base_sha256 == now.base_sha256 else [f"the base {before.base_model}"]
    known = {(file.name, file.sha256) for file in (*before.dataset, *before.eval_dataset)}
    changed += [file.name for file in (*now.dataset, *now.eval_dataset) if (file.name, file.sha256) not in known]
    if changed:
        raise RecipeError(
            "What the run was trained on has changed since, so it cannot go on as it began.",
            where=checkpoint,
            details=changed,
            next_step="bring back what was there, or train anew into another output_dir",
        )


def _refuse_another_recipe(recipe: Recipe, run_dir: Path) -> None:
    file = run_dir / ARGUMENTS
    if not file.is_file():
        return
    before = read_recipe(file).model_dump(mode="json")
    now = recipe.model_dump(mode="json")
    other = [
        f"{key}: {before[key]} then, {now[key]} now"
        for key in now
        if key not in _FREE and key in before and before[key] != now[key]
    ]
    if other:
        raise RecipeError(
            "The run was begun with another recipe, so it cannot go on with this one.",
            where=file,
            details=other,
            next_step="give the same values, or train into another output_dir",
        )
