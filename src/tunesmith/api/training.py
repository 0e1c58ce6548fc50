"""``train``: a recipe to a run directory, the pictures of its losses, and what it will be before it begins."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.allocator import keep_few_kernels
from tunesmith.api.engines import compute_dtype
from tunesmith.api.places import StrPath
from tunesmith.checkpoint import locate_base, weights_sha256
from tunesmith.progress import Cancellation, ProgressCallback, no_progress
from tunesmith.report import eval_loss_png, finding_text, loss_png
from tunesmith.runs import Run, open_run

if TYPE_CHECKING:
    from tunesmith.train import Machine, Peers, Recipe, RecipeKey, RecipeText, RowPreview, TrainingPlan

_PICTURES = (("training_loss.png", loss_png), ("training_eval_loss.png", eval_loss_png))


def train(
    recipe: StrPath,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    told: Callable[[str], None] = lambda _: None,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> Run:
    """Tune a LoRA adapter as a recipe says.

    Under ``torchrun`` or ``accelerate launch`` several processes train together: the first of them writes, and an error
    is raised by one of them; in the others it is :class:`SystemExit` with its exit code.

    Args:
        recipe: a YAML file, or a run that was made from one.
        overrides: ``key=value`` pairs that replace keys of it.
        resume: go on from the last checkpoint in its ``output_dir``, as ``resume_from_checkpoint=true`` does.
        told: told, before it begins, what changes nothing, what is left out, and what is done otherwise than asked.
        progress: told of steps.
        cancellation: read between steps; a checkpoint is written before it ends.

    Returns:
        The run.

    Raises:
        RecipeError: unknown, wrong or missing keys, or a training that diverged.
        DataError: a data set that cannot be trained on.
        OutputError: a run directory that may not be written.
        MissingExtraError: the extra ``train`` is not installed.
        Cancelled: that was asked for; it says how to go on.
    """
    from tunesmith.train import check_installed, is_main_process, refuse_unbuilt_launch, together
    from tunesmith.train import train as fit

    keep_few_kernels()
    progress = progress if is_main_process() else no_progress
    with together() as peers:
        check_installed()
        refuse_unbuilt_launch()
        parsed, base = _read(recipe, overrides, resume=resume, progress=progress)
        machine, note = _agreed(peers, *_machine(parsed))
        run_dir = fit(
            _at(parsed, base),
            base_dir=base,
            base_name=parsed.model_name_or_path,
            base_sha256=weights_sha256(base),
            machine=machine,
            dtype_note=note,
            peers=peers,
            told=lambda what: told(what if isinstance(what, str) else finding_text(what)),
            progress=progress,
            cancellation=cancellation,
        )
        run = open_run(run_dir)
        for filename, draw in _PICTURES if parsed.plot_loss and is_main_process() else ():
            picture = draw(run)
            if picture is not None:
                (run_dir / filename).write_bytes(picture)
        return open_run(run_dir)


def plan_training(
    recipe: StrPath,
    overrides: Sequence[str] = (),
    *,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> TrainingPlan:
    """Tell what ``train`` will do with a recipe: rows, length, memory, time; nothing is written.

    Args:
        recipe: a YAML file, or a run that was made from one.
        overrides: ``key=value`` pairs that replace keys of it.
        progress: told of the rows.
        cancellation: read between rows.

    Raises:
        RecipeError: unknown, wrong or missing keys.
        DataError: a data set that cannot be trained on.
        MissingExtraError: the extra ``train`` is not installed.
    """
    from tunesmith.models import flops_per_s
    from tunesmith.train import check_installed, is_main_process, refuse_unbuilt_launch, together
    from tunesmith.train import plan_training as plan

    progress = progress if is_main_process() else no_progress
    with together() as peers:
        check_installed()
        refuse_unbuilt_launch()
        parsed, base = _read(recipe, overrides, resume=False, progress=progress)
        machine, note = _agreed(peers, *_machine(parsed))
        planned = plan(
            parsed,
            base,
            machine,
            flops_per_s=flops_per_s(machine.dtype, machine.device),
            dtype_note=note,
            progress=progress,
            cancellation=cancellation,
        )
        peers.agree("planned")
        return planned


def read_recipe(text: str, overrides: Sequence[str] = ()) -> RecipeText:
    """Read a recipe's text: its values, what becomes of each key, and what is wrong with it.

    Nothing that it names is looked for, so that a recipe can be read while it is being written.

    Args:
        text: YAML, a mapping.
        overrides: ``key=value`` pairs that replace keys of it.

    Raises:
        RecipeError: it is no YAML mapping of plain values, or an override is not ``key=value``.
    """
    from tunesmith.train import read_recipe_text

    return read_recipe_text(text, overrides)


def write_recipe(values: Mapping[str, Any]) -> str:
    """A recipe's values as YAML, in their order; the comments of a text that they were read from are not there.

    Raises:
        RecipeError: a value that YAML has no plain form for.
    """
    from tunesmith.train import write_recipe_text

    return write_recipe_text(values)


def recipe_keys() -> tuple[RecipeKey, ...]:
    """Every key that a recipe's values are taken from, with its type, default, choices and bounds."""
    from tunesmith.train import recipe_keys as keys

    return keys()


def preview_row(recipe: StrPath, row: int = 0, overrides: Sequence[str] = ()) -> RowPreview:
    """One training row as it is trained on: which of its tokens count in the loss.

    Args:
        recipe: a YAML file, or a run that was made from one.
        row: which, from 0.
        overrides: ``key=value`` pairs that replace keys of it.

    Raises:
        RecipeError: unknown, wrong or missing keys.
        DataError: a data set that cannot be trained on, or no such row.
        BaseModelError: the base's tokenizer cannot be loaded.
    """
    from tunesmith.train import preview_row as preview

    parsed, base = _read(recipe, overrides, resume=False, progress=no_progress)
    return preview(parsed, base, row)


def _read(
    recipe: StrPath, overrides: Sequence[str], *, resume: bool, progress: ProgressCallback
) -> tuple[Recipe, Path]:
    from tunesmith.train import ARGUMENTS, read_recipe

    source = Path(recipe) / ARGUMENTS if Path(recipe).is_dir() else Path(recipe)
    parsed = read_recipe(source, [*overrides, *(["resume_from_checkpoint=true"] if resume else [])])
    return parsed, locate_base(parsed.base, relative_to=source.parent, progress=progress)


def _at(recipe: Recipe, base: Path) -> Recipe:
    """The recipe with the place of a base that is a directory, so that the run can name it from where it lies."""
    # A base of the hub, or the embedded one, lies where the cache has it, under no such name.
    if Path(recipe.model_name_or_path).name != base.name:
        return recipe
    return recipe.model_copy(update={"model_name_or_path": str(base.absolute())})


def _machine(recipe: Recipe) -> tuple[Machine, str | None]:
    """What a recipe is trained on, and why its number format is another than it wishes for."""
    from tunesmith.models import free_bytes
    from tunesmith.train import Machine, dtype_note, local_processes

    compute = compute_dtype(recipe.dtype)
    device = "cpu" if recipe.use_cpu else compute.device
    note = dtype_note(recipe, compute.dtype, gemm_ms=compute.gemm_ms)
    free = free_bytes(device)
    if device == "cpu":  # its processes share that; GPUs have their own
        free //= local_processes()
    return Machine(dtype=compute.dtype, device=device, free_bytes=free), note


def _agreed(peers: Peers, machine: Machine, note: str | None) -> tuple[Machine, str | None]:
    """The number format that the first process measured, and the least memory of all: every one does the same."""
    told = [json.loads(one) for one in peers.agree("machine", json.dumps([machine.dtype, machine.free_bytes, note]))]
    dtype, _, note = told[0]
    return replace(machine, dtype=dtype, free_bytes=min(free for _, free, _ in told)), note
