"""The manifest: what a run was made from, so that another can check it or make it again."""

from __future__ import annotations

from pathlib import Path

from tunesmith.record import Part, Record

MANIFEST_NAME = "tunesmith_run.json"


class DataFile(Part):
    """A file that rows were read from.

    Attributes:
        name: the file's own name, without its folder.
        sha256: of its bytes.
        rows: how many it holds.
    """

    name: str
    sha256: str
    rows: int


class Manifest(Record):
    """Where a run came from.  It names no absolute path and no person.

    Attributes:
        base_model: the base as the user named it; the last part where that was an absolute path.
        base_sha256: hash of the base's weights.
        dataset: the training file.
        eval_dataset: the held-out file; None where rows were split off ``dataset``, or none were held out.
        train_rows: rows trained on.
        held_out_rows: rows kept from training, which ``held_out.jsonl`` holds.
        chat_template_sha256: of the template's UTF-8 text.
        supervised_tokens: tokens of the training rows that count in the loss.
        rows_cut: rows longer than ``cutoff_len``, whose end is lost; held-out ones included.
        rows_dropped: rows of which no answer was left after that; held-out ones included.
        seed: the run's.
        compute_dtype: what the base was computed in.
        device: what it was computed on.
        versions: of Python and the packages that did the work.
        wall_s: seconds from the first row read to the last file written.
    """

    base_model: str
    base_sha256: str
    dataset: DataFile
    eval_dataset: DataFile | None = None
    train_rows: int
    held_out_rows: int
    chat_template_sha256: str
    supervised_tokens: int
    rows_cut: int
    rows_dropped: int
    seed: int
    compute_dtype: str
    device: str
    versions: dict[str, str]
    wall_s: float


def unplaced(name: str) -> str:
    """``name`` without the folders that would tell whose machine it came from."""
    return Path(name).name if Path(name).is_absolute() else name
