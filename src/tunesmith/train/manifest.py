"""The manifest: what a run was made from, so that another can check it or make it again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.record import Finding, Part, Record, Value

if TYPE_CHECKING:
    from tunesmith.train.rows import Examples

MANIFEST_NAME = "tunesmith_run.json"
_NAMED = 10  # rows that are named of those that are counted


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


class Counted(Part):
    """Some rows.

    Attributes:
        count: how many.
        ids: the first ten of them.
    """

    count: int = 0
    ids: tuple[str, ...] = ()

    @classmethod
    def of(cls, ids: Iterable[str]) -> Counted:
        """Count rows."""
        listed = tuple(ids)
        return cls(count=len(listed), ids=listed[:_NAMED])

    def __add__(self, other: Counted) -> Counted:
        """Both."""
        return Counted(count=self.count + other.count, ids=(self.ids + other.ids)[:_NAMED])


class DataHealth(Part):
    """What was found in the rows of a training, held-out ones included where nothing else is said.

    Attributes:
        read: rows that were read.
        no_answer: left out, as there is no answer, or an empty one.
        wrong_order: left out, as their roles do not take turns.
        tools: left out, as they call tools.
        media: left out, as they hold images, videos or audios.
        duplicates: training rows that are the same as an earlier one; they are trained on.
        trained_on: left out of the held-out rows, as they are trained on.
        cut: lose their end to ``cutoff_len``.
        dropped: left out, as no answer was left after that.
        passed_over: have earlier answers that do not count, as the template shows them otherwise once they are history.
        notes: what was passed over in the descriptions of the data sets, and what follows from the counts.
    """

    read: int = 0
    no_answer: Counted = Counted()
    wrong_order: Counted = Counted()
    tools: Counted = Counted()
    media: Counted = Counted()
    duplicates: Counted = Counted()
    trained_on: Counted = Counted()
    cut: Counted = Counted()
    dropped: Counted = Counted()
    passed_over: Counted = Counted()
    notes: tuple[Finding, ...] = ()

    def with_encoded(self, *parts: Examples) -> DataHealth:
        """The same with what encoding the rows found."""
        found = {
            "cut": sum((part.cut_rows for part in parts), self.cut),
            "dropped": sum((part.dropped_rows for part in parts), self.dropped),
            "passed_over": sum((part.passed_over for part in parts), self.passed_over),
        }
        return self.model_copy(update=found)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What is worth a sentence: a finding for every count that is not zero, and the notes."""
        counted = (
            Finding(code="rows_no_answer", severity="warning", params=_params(self.no_answer, self.read)),
            Finding(code="rows_wrong_order", severity="warning", params=_params(self.wrong_order, self.read)),
            Finding(code="rows_tools", severity="warning", params=_params(self.tools, self.read)),
            Finding(code="rows_media", severity="warning", params=_params(self.media, self.read)),
            Finding(code="rows_duplicate", severity="info", params=_params(self.duplicates, self.read)),
            Finding(code="rows_trained_on", severity="warning", params=_params(self.trained_on, self.read)),
            Finding(code="rows_cut", severity="warning", params=_params(self.cut, self.read)),
            Finding(code="rows_dropped", severity="warning", params=_params(self.dropped, self.read)),
            Finding(code="rows_passed_over", severity="info", params=_params(self.passed_over, self.read)),
        )
        return (*(finding for finding in counted if finding.params["count"]), *self.notes)


def _params(rows: Counted, read: int) -> dict[str, Value]:
    more = ", …" if rows.count > len(rows.ids) else ""
    return {"count": rows.count, "rows": read, "listed": ", ".join(rows.ids) + more}


class Manifest(Record):
    """Where a run came from.  It names no absolute path and no person.

    Attributes:
        base_model: the base as the user named it; the last part where that was an absolute path.
        base_sha256: hash of the base's weights.
        dataset: what the training rows were read from.
        eval_dataset: what the held-out rows were read from; empty where they come from ``dataset``.
        health: what was found in the rows, and left out.
        train_rows: rows trained on.
        held_out_rows: rows kept from training, which ``held_out.jsonl`` holds.
        template: the chat template's name in the recipe; None where it is the tokenizer's own.
        chat_template_sha256: of the template's UTF-8 text.
        supervised_tokens: tokens of the training rows that count in the loss.
        steps: optimizer steps that were planned.
        processes: how many trained together.
        total_train_batch_size: rows of one optimizer step, over all processes and accumulations; None in a manifest of
            an earlier version.
        seed: the run's.
        compute_dtype: what the base was computed in.
        device: what it was computed on.
        versions: of Python and the packages that did the work.
        wall_s: seconds from the first row read to the last file written; None until then.
    """

    base_model: str
    base_sha256: str
    dataset: tuple[DataFile, ...]
    eval_dataset: tuple[DataFile, ...] = ()
    health: DataHealth
    train_rows: int
    held_out_rows: int
    template: str | None = None
    chat_template_sha256: str
    supervised_tokens: int
    steps: int
    processes: int = 1
    total_train_batch_size: int | None = None
    seed: int
    compute_dtype: str
    device: str
    versions: dict[str, str]
    wall_s: float | None


def unplaced(name: str) -> str:
    """``name`` without the folders that would tell whose machine it came from."""
    return Path(name).name if Path(name).is_absolute() else name
