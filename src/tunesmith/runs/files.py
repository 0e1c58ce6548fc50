"""What each file of a run directory is: by its name alone, for no file is opened to find out."""

from __future__ import annotations

import os
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from tunesmith.runs.records import RunFile

NeededFor = Literal["inference", "resuming", "record", "unknown"]

# The first pattern that fits the file's own name wins.
CATALOGUE: tuple[tuple[str, str, NeededFor], ...] = (
    ("adapter_model.safetensors", "adapter_weights", "inference"),
    ("adapter_model.bin", "adapter_pickle", "inference"),
    ("adapter_config.json", "adapter_config", "inference"),
    ("tokenizer.json", "tokenizer", "inference"),
    ("tokenizer.model", "tokenizer", "inference"),
    ("tokenizer_config.json", "tokenizer_config", "inference"),
    ("vocab.json", "tokenizer_vocab", "inference"),
    ("vocab.txt", "tokenizer_vocab", "inference"),
    ("merges.txt", "tokenizer_vocab", "inference"),
    ("chat_template.jinja", "chat_template", "inference"),
    ("chat_template.json", "chat_template", "inference"),
    ("special_tokens_map.json", "special_tokens", "inference"),
    ("added_tokens.json", "added_tokens", "inference"),
    ("generation_config.json", "generation_config", "inference"),
    ("model.safetensors.index.json", "weights_index", "inference"),
    ("model*.safetensors", "weights", "inference"),
    ("config.json", "model_config", "inference"),
    ("optimizer.pt", "optimizer", "resuming"),
    ("optimizer.bin", "optimizer", "resuming"),
    ("scheduler.pt", "scheduler", "resuming"),
    ("scaler.pt", "scaler", "resuming"),
    ("rng_state*.pth", "rng_state", "resuming"),
    ("training_args.bin", "training_args_bin", "record"),
    ("training_args.yaml", "training_args_yaml", "record"),
    ("llamaboard_config.yaml", "webui_config", "record"),
    ("running_log.txt", "running_log", "record"),
    ("trainer_log.jsonl", "trainer_log", "record"),
    ("trainer_state.json", "trainer_state", "record"),
    ("all_results.json", "results", "record"),
    ("*_results.json", "results", "record"),
    ("training_*.png", "loss_chart", "record"),
    ("generated_predictions.jsonl", "predictions", "record"),
    ("held_out.jsonl", "held_out", "record"),
    ("tunesmith_run.json", "manifest", "record"),
    ("README.md", "model_card", "record"),
)


def classify(name: str) -> tuple[str, NeededFor]:
    """The kind of a file and what it is needed for, from its name; ``("unknown", "unknown")`` where it is not known."""
    return next(
        ((kind, needed) for pattern, kind, needed in CATALOGUE if fnmatch(name, pattern)), ("unknown", "unknown")
    )


def list_files(root: Path) -> tuple[RunFile, ...]:
    """Every regular file below ``root``, by path; symbolic links to directories are not followed."""
    files = []
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            if not path.is_file():
                continue
            kind, needed = classify(name)
            files.append(
                RunFile(
                    path=_as_text(path.relative_to(root).as_posix()),
                    size_bytes=path.stat().st_size,
                    kind=kind,
                    needed_for=needed,
                )
            )
    return tuple(files)


def _as_text(path: str) -> str:
    """A name that is not UTF-8 (an archive from another system leaves such), with the marks of what it cannot say."""
    return os.fsencode(path).decode("utf-8", "replace")
