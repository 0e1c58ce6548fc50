"""A run directory, opened: names, headers and logs are read; weights and pickles are not."""

from __future__ import annotations

import os
import re
import shlex
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from tunesmith.checkpoint import (
    NOT_LOADED,
    NOT_LOADED_NEXT,
    Sought,
    full_precision_sibling,
    hub_snapshot,
    is_file,
    is_hub_id,
    storage_path,
    stored_path,
)
from tunesmith.errors import RunError
from tunesmith.progress import ProgressCallback, no_progress
from tunesmith.record import Finding, Value
from tunesmith.runs.files import list_files
from tunesmith.runs.health import health
from tunesmith.runs.logs import SWIFT_LOG, TRAINER_LOG, TRAINER_STATE, as_number, merge_logs, read_log
from tunesmith.runs.pickles import scan_run
from tunesmith.runs.reading import Documents
from tunesmith.runs.records import LogRow, Run, RunCheckpoint
from tunesmith.runs.remote import open_stored
from tunesmith.runs.settings import read_settings
from tunesmith.runs.tokenizer import holds_tokenizer
from tunesmith.runs.tools import ADAPTER_CONFIG, FACTORY_PRINTED, MANIFEST, wrote

HELD_OUT = "held_out.jsonl"
FINAL = "final"
_HELD_OUT_FILES = (HELD_OUT, "val_dataset.jsonl")  # ours, ms-swift's

_WEIGHTS = ("adapter_model.safetensors", "adapters.safetensors")
_PICKLED_WEIGHTS = "adapter_model.bin"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_LOOKED_INTO = 256  # of the folders of one that is no run itself
_LISTED = 12
_OPTIMIZER = "optimizer.pt"
_MOST_METRICS = 1000
_MOST_STEPS = 10**9
_MESSAGE_CHARACTERS = 200
_ERROR_LINE = re.compile(r"^([\w.]*(?:Error|Exception|Interrupt|Exit)\b.*)$", re.MULTILINE)
_HUB_ADAPTER = Sought(
    noun="adapter",
    entry=ADAPTER_CONFIG,
    weights=("adapter_model.safetensors",),
    small=("*.json", "*.jsonl", "*.jinja", "*.model", "*.txt", "*.yaml", "README.md", "LICENSE*"),
    elsewhere="give",
    error=RunError,
)


def open_run(path: str | os.PathLike[str], *, stored: bool = False, progress: ProgressCallback = no_progress) -> Run:
    """Open a run directory, one of its checkpoints, a bare adapter directory, or an adapter of the hub.

    A directory that holds no adapter, but one run (as ms-swift's output does), stands for that run.

    Args:
        path: the directory; an adapter's address, such as ``s3://bucket/adapter``; or a hub id, ``org/name`` or
            ``org/name@revision``, where there is no directory of that name.
        stored: whether it may lie in a storage, of which only headers and rows are ever read.
        progress: told of what is fetched.

    Returns:
        The run.

    Raises:
        RunError: the directory is absent, is a file, or holds no adapter, or several runs; or the hub has no such
            adapter.
    """
    if (address := stored_path(path)) is not None:
        if not stored:
            raise RunError(NOT_LOADED, where=address, next_step=NOT_LOADED_NEXT)
        return open_stored(address)
    root = _located(path, progress)
    within = _run_within(root)
    run = _read(within or root)
    if within is None:
        return run
    inside = Finding(code="run_inside", severity="info", params={"folder": within.name})
    return run.model_copy(update={"findings": (inside, *run.findings)})


def _located(path: str | os.PathLike[str], progress: ProgressCallback) -> Path:
    root = storage_path(path).expanduser()
    try:
        if root.is_dir():
            return root.resolve()
        there = root.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise RunError("The run directory's name is not one.", where=repr(os.fspath(path)), found=error) from error
    if not there and is_hub_id(os.fspath(path)):
        return hub_snapshot(os.fspath(path), _HUB_ADAPTER, fetch=True, progress=progress).absolute()
    raise RunError(
        "The run directory is a file." if there else "The run directory is not there.",
        where=root,
        expected="the output directory of a LoRA fine-tune",
    )


def _read(root: Path) -> Run:
    documents = Documents(root)
    folders = _checkpoint_folders(root)
    state_file = _state_file(documents, folders)
    state = documents.json(state_file, history=True)
    log, log_findings = _log(documents, state, state_file)
    checkpoints = _checkpoints(root, folders, state, log)
    if not checkpoints:
        raise _no_adapter(root)
    config = documents.json(_relative(root, Path(checkpoints[-1].path) / ADAPTER_CONFIG), follow=True)
    settings, disagreements = read_settings(documents, config, state, state_file=state_file)
    writer, mark = wrote(documents, config, state, state_file=state_file, trained=bool(folders))
    base = _text(config.get("base_model_name_or_path") or config.get("model")) or None
    files, listing = list_files(root)
    metrics = _metrics(documents)
    findings = [
        *documents.findings,
        *log_findings,
        *health(log, {one.name: one.value for one in settings}, _steps(state.get("max_steps"))),
        *_completeness(root, checkpoints, state, base),
        *_crash(documents),
        *disagreements,
        *listing,
        *scan_run(root, files),
    ]
    return Run(
        path=str(root),
        kind=_kind(root, checkpoints, log),
        writer=writer,
        writer_mark=mark,
        base_model=base,
        base_sha256=_text(documents.json(MANIFEST).get("base_sha256")),
        files=files,
        checkpoints=checkpoints,
        log=log,
        settings=settings,
        metrics=metrics,
        held_out=next(filter(documents.has, _HELD_OUT_FILES), None),
        findings=tuple(findings),
    )


def training_log(path: str | os.PathLike[str]) -> tuple[LogRow, ...]:
    """What a training has logged so far; it need not have saved an adapter yet.

    Args:
        path: its directory.

    Raises:
        RunError: the directory is absent, or is a file.
    """
    documents = Documents(_located(path, no_progress))
    return _log(documents, {}, TRAINER_STATE)[0]


def as_run(run: Run | str | os.PathLike[str], *, stored: bool = False, progress: ProgressCallback = no_progress) -> Run:
    """The run itself, or the one in that directory, or of that name on the hub."""
    return run if isinstance(run, Run) else open_run(run, stored=stored, progress=progress)


def checkpoint_of(run: Run, name: str | int) -> RunCheckpoint:
    """One of a run's adapters.

    Args:
        run: the run.
        name: ``final``, ``checkpoint-N`` or ``N``.

    Raises:
        RunError: the run has no such adapter; those that it has are listed.
    """
    wanted = str(name)
    wanted = f"checkpoint-{wanted}" if wanted.isdecimal() else wanted
    for checkpoint in run.checkpoints:
        if checkpoint.name == wanted:
            return checkpoint
    raise RunError(
        f"The run has no {wanted}.",
        where=run.path,
        expected=", ".join(checkpoint.name for checkpoint in run.checkpoints),
        found=wanted,
        next_step=f"pass --checkpoint {run.checkpoints[-1].name.removeprefix('checkpoint-')}",
    )


def _run_within(root: Path) -> Path | None:
    """The one run inside a directory that holds no adapter itself: ms-swift puts a version folder between.

    Raises:
        RunError: it holds several.
    """
    if is_file(root / ADAPTER_CONFIG) or _checkpoint_folders(root) or is_file(root / "config.json"):
        return None
    runs = [
        folder
        for folder in _folders(root)
        if not folder.name.startswith(".") and (is_file(folder / ADAPTER_CONFIG) or _checkpoint_folders(folder))
    ]
    if len(runs) < 2:
        return runs[0] if runs else None
    names = sorted((folder.name for folder in runs), key=_natural)
    more = len(names) - _LISTED
    raise RunError(
        "This directory holds several runs.",
        where=root,
        expected="one of them",
        details=[*names[:_LISTED], *([f"… and {more} more"] if more > 0 else [])],
        next_step=shlex.join(["tunesmith", "inspect", str(root / names[-1])]),
    )


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _folders(root: Path) -> list[Path]:
    """Directories in a directory; links are not followed."""
    try:
        with os.scandir(root) as entries:
            found = [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return sorted(found)[:_LOOKED_INTO]


def _checkpoint_folders(root: Path) -> list[tuple[int, Path]]:
    try:
        with os.scandir(root) as entries:
            matches = [
                (match, Path(entry.path))
                for entry in entries
                if (match := _CHECKPOINT.fullmatch(entry.name)) and entry.is_dir(follow_symlinks=False)
            ]
    except OSError as error:
        raise RunError("The run directory cannot be read.", where=root, found=error.strerror or error) from error
    folders = sorted((int(match[1]), folder) for match, folder in matches if is_file(folder / ADAPTER_CONFIG))
    # One that was being written when the training was killed is no checkpoint, unless there is no other.
    return [(step, folder) for step, folder in folders if _holds_weights(folder)] or folders


def _holds_weights(folder: Path) -> bool:
    return any(is_file(folder / name) for name in (*_WEIGHTS, _PICKLED_WEIGHTS))


def _kind(
    root: Path, checkpoints: Sequence[RunCheckpoint], log: Sequence[LogRow]
) -> Literal["run", "checkpoint", "adapter"]:
    if _CHECKPOINT.fullmatch(root.name):
        return "checkpoint"
    logged = log or is_file(root / TRAINER_LOG) or is_file(root / TRAINER_STATE)
    return "run" if logged or any(checkpoint.name != FINAL for checkpoint in checkpoints) else "adapter"


def _state_file(documents: Documents, folders: Sequence[tuple[int, Path]]) -> str:
    """The trainer's state: the root's, else that of the last checkpoint of a run that was broken off."""
    if documents.has(TRAINER_STATE) or not folders:
        return TRAINER_STATE
    return f"{folders[-1][1].name}/{TRAINER_STATE}"


def _log(documents: Documents, state: Mapping[str, Any], state_file: str) -> tuple[tuple[LogRow, ...], list[Finding]]:
    history = state.get("log_history")
    rows = [row for row in history if isinstance(row, dict)] if isinstance(history, list) else []
    series = [read_log(rows, state_file)]
    series += [read_log(documents.rows(name), name) for name in (TRAINER_LOG, SWIFT_LOG)]
    return merge_logs(*series)


def _checkpoints(
    root: Path, folders: Sequence[tuple[int, Path]], state: Mapping[str, Any], log: Sequence[LogRow]
) -> tuple[RunCheckpoint, ...]:
    best = state.get("best_model_checkpoint")
    best_name = re.split(r"[\\/]", best.rstrip("\\/"))[-1] if isinstance(best, str) else None
    steps: list[tuple[str, int | None, Path]] = [(folder.name, step, folder) for step, folder in folders]
    # axolotl writes the configuration before it trains, so that alone is no adapter yet.
    if is_file(root / ADAPTER_CONFIG) and (_holds_weights(root) or not folders):
        steps.append((FINAL, _steps(state.get("global_step")), root))
    losses = [(row.step, row.loss) for row in log if row.loss is not None]
    held_out = {row.step: row.eval_loss for row in log}
    return tuple(
        RunCheckpoint(
            name=name,
            step=step,
            path=str(folder),
            loss=None if step is None else _at(losses, step),
            eval_loss=None if step is None else held_out.get(step),
            is_best=name == best_name,
        )
        for name, step, folder in steps
    )


def _steps(value: object) -> int | None:
    """A number of steps; None for what is none, such as infinity."""
    number = as_number(value)
    return int(number) if number is not None and 0 <= number < _MOST_STEPS else None


def _at(logged: Sequence[tuple[int, float]], step: int) -> float | None:
    """What was logged last at or before a step."""
    place = bisect_right(logged, step, key=lambda pair: pair[0])
    return logged[place - 1][1] if place else None


def _completeness(
    root: Path, checkpoints: Sequence[RunCheckpoint], state: Mapping[str, Any], base: str | None
) -> list[Finding]:
    findings = []
    done, planned = (_steps(state.get(key)) for key in ("global_step", "max_steps"))
    ended = done is not None and planned is not None and 0 < planned <= done
    if checkpoints[-1].name != FINAL and not ended:  # ms-swift, for one, leaves nothing at the root
        params: dict[str, Value] = {"checkpoint": checkpoints[-1].name}
        findings.append(Finding(code="run_unfinished", severity="warning", params=params))
        if is_file(root / MANIFEST) and is_file(Path(checkpoints[-1].path) / _OPTIMIZER):
            findings.append(Finding(code="run_resumable", severity="info", params={"run": str(root)}))
    part_of_run = _CHECKPOINT.fullmatch(root.name)
    if done is not None and planned is not None and 0 < done < planned and not part_of_run:
        params = {"done": done, "planned": planned}
        findings.append(Finding(code="steps_missing", severity="warning", params=params))
    last = Path(checkpoints[-1].path)
    if not any(map(holds_tokenizer, (root, last))):
        findings.append(Finding(code="tokenizer_missing", severity="info"))
    if not any(is_file(last / name) for name in _WEIGHTS):
        findings.append(Finding(code="adapter_weights_missing", severity="error", params={"checkpoint": last.name}))
    sibling = full_precision_sibling(base) if base else None
    if sibling is not None:
        params = {"base": base, "sibling": sibling}
        findings.append(Finding(code="base_is_quantized", severity="info", params=params))
    return findings


def _crash(documents: Documents) -> list[Finding]:
    """The error with which the printed log ends; none where the training went on after it."""
    _, trace, after = documents.text(FACTORY_PRINTED).rpartition("Traceback (most recent call last)")
    errors = _ERROR_LINE.findall(after) if trace else []
    if not errors or "Training completed" in after or "***** Running training" in after:
        return []
    return [
        Finding(
            code="training_crashed",
            severity="warning",
            params={"file": FACTORY_PRINTED, "message": errors[-1][:_MESSAGE_CHARACTERS]},
        )
    ]


def _metrics(documents: Documents) -> dict[str, float]:
    found = islice(documents.json("all_results.json").items(), _MOST_METRICS)
    numbers = {key: as_number(value) for key, value in found}
    return {key: number for key, number in numbers.items() if number is not None}


def _relative(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _no_adapter(root: Path) -> RunError:
    if is_file(root / MANIFEST):
        return RunError(
            "This training was stopped before its first checkpoint, so there is no adapter yet.",
            where=root,
            expected="a checkpoint-N directory",
            found="logs and settings only",
            next_step=f"tunesmith train {shlex.quote(str(root))} overwrite_output_dir=true",
        )
    full_model = is_file(root / "config.json")
    try:
        names = sorted(child.name for child in root.iterdir())[:8]
    except OSError:
        names = []
    return RunError(
        "This is a whole model, not a LoRA run." if full_model else "This directory holds no adapter.",
        where=root,
        expected=f"{ADAPTER_CONFIG} here, or in a checkpoint-N directory",
        found=", ".join(names) or "an empty directory",
        next_step="give the output directory that the training wrote",
    )
