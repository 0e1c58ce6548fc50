"""Where a run's tokenizer is: it must come whole from one place, and from the run wherever the run has one."""

from __future__ import annotations

from pathlib import Path

from tunesmith.checkpoint import is_file, storage_path
from tunesmith.runs.records import Run, RunCheckpoint

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip

_CORE = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def tokenizer_dir(run: Run, checkpoint: RunCheckpoint, base: Path) -> Path | None:
    """The directory whose tokenizer belongs to an adapter: its own, else the run's, else the base's.

    Added tokens and the chat template are part of a fine-tune, so files of two places are never mixed.

    Returns:
        The directory, or None where none of the three holds a tokenizer.
    """
    places = (storage_path(checkpoint.path), storage_path(run.path), base)
    return next(filter(holds_tokenizer, places), None)


def holds_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's vocabulary, by its files' names."""
    return any(is_file(folder / name) for name in _CORE)
