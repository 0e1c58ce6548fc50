"""The rows that a run was trained on and those that it kept from training, where they are still at hand."""

from __future__ import annotations

from pathlib import Path

from tunesmith.conversations import Conversation, read_conversations
from tunesmith.errors import DataError
from tunesmith.runs.records import Run

_LARGEST_FILE_BYTES = 64 << 20


def held_out_rows(run: Run) -> list[Conversation]:
    """The rows that a run keeps from its training; none where it keeps none.

    Raises:
        DataError: its file cannot be read.
    """
    return read_conversations(Path(run.path) / run.held_out) if run.held_out else []


def training_file(run: Run) -> Path | None:
    """The file that a run says it was trained on, where that is one, is there, and is not very large."""
    dataset = run.hyperparameters.get("dataset")
    try:
        file = Path(run.path, dataset) if isinstance(dataset, str) else None
        found = file is not None and file.is_file() and file.stat().st_size <= _LARGEST_FILE_BYTES
    except (OSError, ValueError):
        return None
    return file if found else None


def training_rows(run: Run) -> list[Conversation] | None:
    """The rows that a run was trained on; None where they cannot be had."""
    file = training_file(run)
    try:
        return None if file is None else read_conversations(file)
    except (DataError, OSError, ValueError):
        return None
