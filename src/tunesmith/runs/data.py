"""The rows that a run was trained on and those that it kept from training, where they are still at hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

from tunesmith.conversations import DATASET_INFO, Conversation, Dataset, read_conversations, read_dataset, with_system
from tunesmith.errors import DataError, MissingExtraError
from tunesmith.runs.records import Run

_LARGEST_FILE_BYTES = 64 << 20
_MOST_SETS = 50
_MOST_PARENTS = 6


def held_out_rows(run: Run) -> list[Conversation]:
    """The rows that a run keeps from its training; none where it keeps none.

    Raises:
        DataError: its file cannot be read.
    """
    return read_conversations(Path(run.path) / run.held_out) if run.held_out else []


def training_file(run: Run) -> Path | None:
    """The first file that a run says it was trained on, where that is one, is there, and is not very large."""
    found = _datasets(run)
    return next((file for dataset in found or () for file in dataset.files), None)


def training_rows(run: Run) -> list[Conversation] | None:
    """The rows that a run was trained on; None where they cannot be had, all of them.

    Data sets that it names are looked up in its ``dataset_dir``: from the run, from here, and, as LLaMA-Factory's is
    relative to where that was started, from the folders above the run.  Nothing is asked of a hub.
    """
    found = _datasets(run)
    if found is None:
        return None
    rows = list(chain.from_iterable(dataset.rows for dataset in found))
    system = run.hyperparameters.get("default_system")
    # Our runs write their held-out rows with that text; they are compared with these.
    if run.writer == "tunesmith" and isinstance(system, str) and system:
        return [with_system(row, system) for row in rows]
    return rows


def _datasets(run: Run) -> list[Dataset] | None:
    """All data sets that a run names; None where it names none, or one of them is not at hand."""
    named = run.hyperparameters.get("dataset")
    if not isinstance(named, str) or not named:
        return None
    names = [named] if _is_file(Path(run.path, named)) else [name.strip() for name in named.split(",")]
    limit = run.hyperparameters.get("max_samples")
    most = limit if isinstance(limit, int) and limit > 0 else None
    for folder in _folders(run) if len(names) <= _MOST_SETS else ():
        with suppress(DataError, MissingExtraError, OSError, ValueError):
            return [_read(name, run, folder, most) for name in names]
    return None


def _read(name: str, run: Run, folder: Path, most: int | None) -> Dataset:
    own = Path(run.path, name)
    return read_dataset(
        str(own) if _is_file(own) else name,
        dataset_dir=folder,
        max_samples=most,
        hub=False,
        largest_bytes=_LARGEST_FILE_BYTES,
    )


def _folders(run: Run) -> Iterator[Path]:
    """Where the run's ``dataset_dir`` may be; last the run itself, whose files need no registry."""
    given = run.hyperparameters.get("dataset_dir")
    name = given if isinstance(given, str) and given else "data"
    root = Path(run.path).absolute()
    for base in (root, Path.cwd(), *list(root.parents)[:_MOST_PARENTS]):
        if _is_file(base / name / DATASET_INFO):
            yield base / name
    yield root


def _is_file(place: Path) -> bool:
    """Whether it is a file that may be read whole."""
    try:
        return place.is_file() and place.stat().st_size <= _LARGEST_FILE_BYTES
    except (OSError, ValueError):
        return False
