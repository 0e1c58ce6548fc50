"""A run directory, opened: names, headers and logs are read; weights and pickles are not."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Literal

import yaml

from tunesmith.errors import RunError
from tunesmith.record import Finding, Value
from tunesmith.runs.files import list_files
from tunesmith.runs.logs import TRAINER_LOG, TRAINER_STATE, as_number, health, merge_logs, read_jsonl, read_log
from tunesmith.runs.records import LogRow, Run, RunCheckpoint
from tunesmith.runs.tokenizer import holds_tokenizer

MANIFEST = "tunesmith_run.json"
HELD_OUT = "held_out.jsonl"
FINAL = "final"

_CONFIG = "adapter_config.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_STATE_SETTINGS = ("max_steps", "num_train_epochs", "train_batch_size")


def open_run(path: str | os.PathLike[str]) -> Run:
    """Open a run directory, one of its checkpoints, or a bare adapter directory.

    Args:
        path: the directory.

    Returns:
        The run.

    Raises:
        RunError: the directory is absent, is a file, or holds no adapter.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise RunError(
            "The run directory is a file." if root.exists() else "The run directory is not there.",
            where=root,
            expected="the output directory of a LoRA fine-tune",
        )
    root = root.resolve()
    findings: list[Finding] = []
    state = _state(root, findings)
    log_rows, damaged = read_jsonl(root / TRAINER_LOG) if (root / TRAINER_LOG).is_file() else ([], [])
    history = state.get("log_history")
    log = merge_logs(
        read_log([row for row in history if isinstance(row, dict)] if isinstance(history, list) else [], TRAINER_STATE),
        read_log(log_rows, TRAINER_LOG),
    )
    checkpoints = _checkpoints(root, state, log)
    if not checkpoints:
        raise _no_adapter(root)
    manifest = _json(root / MANIFEST, findings)
    config = _json(Path(checkpoints[-1].path) / _CONFIG, findings)
    base = config.get("base_model_name_or_path")
    files = list_files(root)
    findings += [*damaged, *health(log), *_completeness(root, checkpoints, state)]
    return Run(
        path=str(root),
        kind=_kind(root, checkpoints),
        writer=_writer(root),
        base_model=base if isinstance(base, str) and base else None,
        base_sha256=_text(manifest.get("base_sha256")),
        files=files,
        checkpoints=checkpoints,
        log=log,
        hyperparameters=_hyperparameters(root, state, manifest, findings),
        metrics=_metrics(root, findings),
        held_out=HELD_OUT if (root / HELD_OUT).is_file() else None,
        findings=tuple(findings),
    )


def as_run(run: Run | str | os.PathLike[str]) -> Run:
    """The run itself, or the one in that directory."""
    return run if isinstance(run, Run) else open_run(run)


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


def _kind(root: Path, checkpoints: tuple[RunCheckpoint, ...]) -> Literal["run", "checkpoint", "adapter"]:
    if _CHECKPOINT.fullmatch(root.name):
        return "checkpoint"
    logged = (root / TRAINER_LOG).exists() or (root / TRAINER_STATE).exists()
    return "run" if logged or any(checkpoint.name != FINAL for checkpoint in checkpoints) else "adapter"


def _writer(root: Path) -> Literal["tunesmith", "llamafactory", "trainer", "peft"]:
    if (root / MANIFEST).exists():
        return "tunesmith"
    if (root / TRAINER_LOG).exists():
        return "llamafactory"
    trained = (root / TRAINER_STATE).exists() or (root / "training_args.bin").exists()
    return "trainer" if trained or any(_checkpoint_folders(root)) else "peft"


def _checkpoint_folders(root: Path) -> list[tuple[int, Path]]:
    matches = ((_CHECKPOINT.fullmatch(child.name), child) for child in root.iterdir() if child.is_dir())
    return sorted((int(match[1]), child) for match, child in matches if match and (child / _CONFIG).is_file())


def _state(root: Path, findings: list[Finding]) -> dict[str, Any]:
    """The trainer's state: the root's, else that of the last checkpoint of a run that was broken off."""
    if (root / TRAINER_STATE).is_file():
        return _json(root / TRAINER_STATE, findings)
    folders = _checkpoint_folders(root)
    return _json(folders[-1][1] / TRAINER_STATE, findings) if folders else {}


def _checkpoints(root: Path, state: dict[str, Any], log: tuple[LogRow, ...]) -> tuple[RunCheckpoint, ...]:
    best = state.get("best_model_checkpoint")
    best_name = re.split(r"[\\/]", best.rstrip("\\/"))[-1] if isinstance(best, str) else None
    steps: list[tuple[str, int | None, Path]] = [
        (folder.name, step, folder) for step, folder in _checkpoint_folders(root)
    ]
    if (root / _CONFIG).is_file():
        last = state.get("global_step")
        steps.append((FINAL, last if isinstance(last, int) else None, root))
    return tuple(
        RunCheckpoint(
            name=name,
            step=step,
            path=str(folder),
            loss=_last(row.loss for row in log if step is not None and row.step <= step),
            eval_loss=_last(row.eval_loss for row in log if row.step == step),
            is_best=name == best_name,
        )
        for name, step, folder in steps
    )


def _last(values: Any) -> float | None:
    found: float | None = None
    for value in values:
        found = value if value is not None else found
    return found


def _completeness(root: Path, checkpoints: tuple[RunCheckpoint, ...], state: dict[str, Any]) -> list[Finding]:
    findings = []
    if checkpoints[-1].name != FINAL:
        params = {"checkpoint": checkpoints[-1].name}
        findings.append(Finding(code="run_unfinished", severity="warning", params=params))
    done, planned = state.get("global_step"), state.get("max_steps")
    if isinstance(done, int) and isinstance(planned, int) and 0 < done < planned:
        findings.append(Finding(code="steps_missing", severity="warning", params={"done": done, "planned": planned}))
    last = Path(checkpoints[-1].path)
    if not any(map(holds_tokenizer, (root, last))):
        findings.append(Finding(code="tokenizer_missing", severity="warning"))
    if not (last / "adapter_model.safetensors").is_file():
        findings.append(Finding(code="adapter_weights_missing", severity="error", params={"checkpoint": last.name}))
    return findings


def _hyperparameters(
    root: Path, state: dict[str, Any], manifest: dict[str, Any], findings: list[Finding]
) -> dict[str, Value]:
    settings: dict[str, Any] = {key: state[key] for key in _STATE_SETTINGS if key in state}
    arguments = root / "training_args.yaml"
    if arguments.is_file():
        try:
            document = yaml.safe_load(arguments.read_bytes())
            settings.update(document if isinstance(document, dict) else {})
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            findings.append(Finding(code="file_unreadable", severity="warning", params={"file": arguments.name}))
    settings.update(manifest)
    plain: dict[str, Value] = {
        str(key): value for key, value in settings.items() if isinstance(value, str | int | float | bool)
    }
    versions = manifest.get("versions")
    if isinstance(versions, dict):
        plain.update({f"version_{key}": str(value) for key, value in versions.items()})
    return plain


def _metrics(root: Path, findings: list[Finding]) -> dict[str, float]:
    document = _json(root / "all_results.json", findings)
    numbers = {key: as_number(value) for key, value in document.items()}
    return {key: number for key, number in numbers.items() if number is not None}


def _json(path: Path, findings: list[Finding]) -> dict[str, Any]:
    """A JSON object, or an empty one with a finding where it is damaged: a run is still a run without it."""
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        document = None
    if isinstance(document, dict):
        return document
    findings.append(Finding(code="file_unreadable", severity="warning", params={"file": path.name}))
    return {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _no_adapter(root: Path) -> RunError:
    full_model = (root / "config.json").is_file()
    return RunError(
        "This is a whole model, not a LoRA run." if full_model else "This directory holds no adapter.",
        where=root,
        expected=f"{_CONFIG} here, or in a checkpoint-N directory",
        found=", ".join(sorted(child.name for child in root.iterdir())[:8]) or "an empty directory",
        next_step="give the output directory that the training wrote",
    )
