"""Whether a directory is still the one that its certificate speaks of: hashes alone, no base and no run."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from tunesmith.checkpoint import hash_files
from tunesmith.errors import CheckpointError
from tunesmith.progress import Cancellation, ProgressCallback, SharedProgress, no_progress
from tunesmith.record import Part, Record
from tunesmith.verify.certificate.statement import CERTIFICATE_FILE, Certificate, CertifiedAdapter, read_certificate
from tunesmith.verify.certificate.write import a_loader_reads, visible_files
from tunesmith.verify.records import GOOD, Answer, LevelName, Status


class RecheckedAdapter(Part):
    """An adapter that the certificate names: its run, which of that run's adapters, and its weight in the sum."""

    run: str
    checkpoint: str
    weight: float


class Recheck(Record):
    """Whether a directory is still what was verified.

    Attributes:
        directory: its last name.
        answer: the certificate's verdict, where every file is as it was; ``different`` where one is not; and
            ``not_verified`` where all are, and the certificate holds no verdict.
        certified: the certificate's verdict; None where it holds none.
        base_model: the base that the certificate names.
        revision: its commit on the hub; None where that is not known.
        adapters: the adapters that it names.
        levels: each level's status in the verdict.
        files: how many files were hashed.
        size_bytes: their size.
        changed: certified files that are others now.
        missing: certified files that are gone.
        added: files that came since, and that a loader may read.
        beside: files that came since, and that no loader reads; they are no fault.
        seconds: wall time.
    """

    directory: str
    answer: Answer
    certified: Answer | None
    base_model: str
    revision: str | None
    adapters: tuple[RecheckedAdapter, ...]
    levels: dict[LevelName, Status]
    files: int
    size_bytes: int
    changed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        """Whether it is still what was verified, and that was good."""
        return self.answer in GOOD


def recheck(
    directory: Path, *, progress: ProgressCallback = no_progress, cancellation: Cancellation | None = None
) -> Recheck:
    """Hash every file that a directory's certificate names, and look what came beside them.

    Args:
        directory: a merged model with a certificate.
        progress: told of bytes hashed.
        cancellation: read between chunks.

    Returns:
        What was found; a file that has changed is an answer, not an exception.

    Raises:
        CheckpointError: the directory is not there, has no certificate or none of ours, or a file cannot be read.
        Cancelled: stopped on request.
    """
    started = time.monotonic()
    certificate = _certificate(directory)
    try:
        there, others = visible_files(directory)
    except OSError as error:
        raise CheckpointError("A folder cannot be read.", where=directory, found=error.strerror or error) from error
    certified = certificate.hashes
    # A certified file may be hidden, where an index names it: what counts is what the certificate says.
    present = {name: directory / name for name in certified if (directory / name).is_file()}
    sizes = sum(path.stat().st_size for path in present.values())
    report = SharedProgress(
        "verify files", sizes, "bytes", progress=progress, cancellation=cancellation or Cancellation()
    )
    found = hash_files(present, tick=report.advance)
    came = [name for name in there if name not in certified]
    changed = tuple(name for name in present if found[name] != certified[name])
    missing = tuple(name for name in certified if name not in present)
    added = tuple(sorted([*filter(a_loader_reads, came), *(name for name in others if name not in certified)]))
    verdict = certificate.predicate.verdict
    good = verdict.answer if verdict is not None else "not_verified"
    return Recheck(
        directory=directory.resolve().name,
        answer="different" if changed or missing or added else good,
        certified=verdict.answer if verdict is not None else None,
        base_model=certificate.predicate.base.name,
        revision=certificate.predicate.base.revision,
        adapters=tuple(map(_adapter, certificate.predicate.adapters)),
        levels={level.name: level.status for level in verdict.levels} if verdict is not None else {},
        files=len(present),
        size_bytes=sizes,
        changed=changed,
        missing=missing,
        added=added,
        beside=tuple(name for name in came if not a_loader_reads(name)),
        seconds=time.monotonic() - started,
    )


def _certificate(directory: Path) -> Certificate:
    if not directory.is_dir():
        raise CheckpointError(
            "The model is a file." if directory.exists() else "The model is not there.",
            where=directory,
            expected=f"a directory with {CERTIFICATE_FILE}",
        )
    path = directory / CERTIFICATE_FILE
    if not path.exists():
        raise CheckpointError(
            "The directory holds no certificate, so it takes the run to verify it.",
            where=path,
            next_step=shlex.join(["tunesmith", "verify", "RUN", str(directory)]),
        )
    return read_certificate(path)


def _adapter(one: CertifiedAdapter) -> RecheckedAdapter:
    return RecheckedAdapter(run=one.run, checkpoint=one.checkpoint, weight=one.weight)
