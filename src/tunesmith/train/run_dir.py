"""The run directory as a place: who may write it, what a run owns in it, and what a full disk means."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from tunesmith.checkpoint import read_header
from tunesmith.errors import OutputError, TunesmithError
from tunesmith.train.manifest import MANIFEST_NAME
from tunesmith.train.recipe import Recipe

ADAPTER_WEIGHTS = "adapter_model.safetensors"
TRAINER_STATE = "trainer_state.json"
ARGUMENTS = "training_args.yaml"
_STAGE = ".final-"
_OWNED = (
    ADAPTER_WEIGHTS,
    "adapter_config.json",
    "README.md",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "trainer_log.jsonl",
    TRAINER_STATE,
    ARGUMENTS,
    "training_args.bin",
    "running_log.txt",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    "generation_config.json",
    "held_out.jsonl",
    "training_loss.png",
    "training_eval_loss.png",
    MANIFEST_NAME,
)


def claim(recipe: Recipe, base_dir: Path, *, goes_on: bool = False) -> Path:
    """Make sure that the recipe's ``output_dir`` may be written; nothing is written yet.

    Args:
        recipe: says where.
        base_dir: what is never written.
        goes_on: whether a run that is there goes on.

    Returns:
        Its absolute path.

    Raises:
        OutputError: it is a file, is or holds the base model, cannot be made, or is not empty and the recipe does
            not allow for that.
    """
    target, base = recipe.output_dir.resolve(), base_dir.resolve()
    if target == base or target in base.parents:
        raise OutputError(
            "The output directory is, or holds, the base model, which is never written.",
            where=target,
            next_step="choose another output_dir",
        )
    if target.exists() and not target.is_dir():
        raise OutputError("The output directory is a file.", where=target, next_step="choose another output_dir")
    if target.is_dir() and any(target.iterdir()) and not (recipe.overwrite_output_dir or goes_on):
        begun = (
            " a run that was begun there goes on with resume_from_checkpoint=true;"
            if _holds_checkpoints(target)
            else ""
        )
        raise OutputError(
            "The output directory is not empty.",
            where=target,
            expected="a new or empty directory",
            next_step=f"choose another output_dir;{begun} overwrite_output_dir=true replaces the run in it",
        )
    standing = next(folder for folder in (target, *target.parents) if folder.exists())
    if not standing.is_dir() or not os.access(standing, os.W_OK):
        raise OutputError("The output directory cannot be written.", where=standing)
    return target


def clear(run_dir: Path) -> None:
    """Make the directory, and remove what an earlier run left in it; files of other kinds stay."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in _OWNED:
        (run_dir / name).unlink(missing_ok=True)
    for checkpoint in (*run_dir.glob("checkpoint-*"), *run_dir.glob(f"{_STAGE}*")):
        shutil.rmtree(checkpoint)


def drop_unfinished(run_dir: Path) -> None:
    """Remove what a run that was cut short left half-written: checkpoints, and the last files on their way."""
    whole = set(whole_checkpoints(run_dir))
    for folder in (*run_dir.glob("checkpoint-*"), *run_dir.glob(f"{_STAGE}*")):
        if folder not in whole:
            shutil.rmtree(folder, ignore_errors=True)


def whole_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run that were written to their end, the earliest first.

    The trainer writes its state last, so one without it, or with half of it, was cut short.
    """
    steps = {}
    for folder in run_dir.glob("checkpoint-*"):
        number = folder.name.rpartition("-")[2]
        if number.isdecimal() and is_whole(folder):
            steps[int(number)] = folder
    return [steps[step] for step in sorted(steps)]


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint's adapter and its trainer's state can be read."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
        read_header(checkpoint / ADAPTER_WEIGHTS)
    except (OSError, ValueError, TunesmithError):
        return False
    return isinstance(state, dict) and isinstance(state.get("global_step"), int)


def _holds_checkpoints(folder: Path) -> bool:
    return any(folder.glob("checkpoint-*"))


def publish(run_dir: Path, save: Callable[[str], None]) -> None:
    """Let ``save`` fill a folder, and move its files into ``run_dir``, the adapter's weights last."""
    with tempfile.TemporaryDirectory(prefix=_STAGE, dir=run_dir) as stage:
        save(stage)
        for file in sorted(Path(stage).iterdir(), key=lambda file: file.name == ADAPTER_WEIGHTS):
            file.replace(run_dir / file.name)


def write_recipe(recipe: Recipe, run_dir: Path) -> None:
    """Write the recipe as ``training_args.yaml``, its paths relative to the run, so that it can be read from there."""
    text = yaml.safe_dump(recipe.written(run_dir), sort_keys=False, allow_unicode=True)
    (run_dir / ARGUMENTS).write_text(text, encoding="utf-8")


@contextmanager
def writing(run_dir: Path) -> Iterator[None]:
    """Turn a failed write, in whatever library, into an :class:`OutputError`."""
    try:
        yield
    except Exception as error:
        # safetensors and torch wrap the system's error in their own types, and keep only its text.
        full = "No space left" in str(error) or "PytorchStreamWriter failed" in str(error)
        full = full or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT))
        if full:
            raise OutputError(
                "The disk is full; the checkpoints that were finished are kept.",
                where=run_dir,
                found=error,
                next_step="free some space, or choose an output_dir on another disk",
            ) from error
        if isinstance(error, OSError):
            raise OutputError("The run directory cannot be written.", where=run_dir, found=error) from error
        raise
