"""``report``: all records of a run on one page."""

from __future__ import annotations

from tunesmith.adapter import AdapterFacts
from tunesmith.api.comparing import compare
from tunesmith.api.inspecting import inspect
from tunesmith.api.places import StrPath, output_file, writing
from tunesmith.api.verifying import verify
from tunesmith.compare import CheckpointChoice, Comparison, Drift, Evaluation
from tunesmith.merge import Merged
from tunesmith.models import BASE
from tunesmith.progress import Cancellation, ProgressCallback, no_progress
from tunesmith.record import Record
from tunesmith.report import write_report as write_html
from tunesmith.runs import FINAL, Run, as_run, checkpoint_of
from tunesmith.verify import Verdict


class Report(Record):
    """A written report and the records in it.

    Attributes:
        path: the HTML file.
        run: the run.
        adapter: the described adapter; None where it cannot be read.
        choice: which checkpoint to take, where that was asked.
        comparison: variants side by side.
        evaluation: what the tuning did, where that was asked.
        drift: how far exports are from the live adapter, where that was asked.
        merged: the merge, where its record was at hand.
        verdict: the verification, where there is a merged model.
    """

    path: str
    run: Run
    adapter: AdapterFacts | None
    choice: CheckpointChoice | None = None
    comparison: Comparison
    evaluation: Evaluation | None = None
    drift: Drift | None = None
    merged: Merged | None
    verdict: Verdict | None


def report(
    run: Run | StrPath,
    out: StrPath,
    *,
    merged: Merged | StrPath | None = None,
    base: str | None = None,
    checkpoint: str | int = FINAL,
    choice: CheckpointChoice | StrPath | None = None,
    comparison: Comparison | StrPath | None = None,
    evaluation: Evaluation | StrPath | None = None,
    drift: Drift | StrPath | None = None,
    verdict: Verdict | StrPath | None = None,
    merge_record: StrPath | None = None,
    dtype: str = "auto",
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> Report:
    """Write one self-contained HTML report; what is not given is worked out now.

    Args:
        run: a run, or its directory.
        out: the HTML file; its name ends in ``.html``.
        merged: what :func:`merge` returned, or the merged model's directory; None where there is none yet.
        base: the base model; None for the one that the adapter names.
        checkpoint: which adapter it is about.
        choice: what :func:`checkpoints` returned, or a file of it; None to leave it out.
        comparison: what :func:`compare` returned, or a file of it; None to compare now.
        evaluation: what :func:`evaluate` returned, or a file of it; None to leave it out.
        drift: what :func:`drift` or :func:`compare_schemes` returned, or a file of it; None to leave it out.
        verdict: what :func:`verify` returned, or a file of it; None to verify now, where ``merged`` is given.
        merge_record: a file of what :func:`merge` returned, for the merge's own figures.
        dtype: of the comparison's arithmetic, where it is made now.
        progress: told of the work's parts.
        cancellation: read between the work's parts.

    Raises:
        DataError: a file is not the record that it should be.
        OutputError: ``out`` cannot be written.
    """
    run = as_run(run)
    target = output_file(out, suffixes=(".html",))
    chosen = checkpoint_of(run, checkpoint).name
    # All files first: a wrong one is not to be found out after minutes of work.
    if merge_record is not None:
        merged = Merged.read(merge_record)
    if choice is not None and not isinstance(choice, CheckpointChoice):
        choice = CheckpointChoice.read(choice)
    if comparison is not None and not isinstance(comparison, Comparison):
        comparison = Comparison.read(comparison)
    if evaluation is not None and not isinstance(evaluation, Evaluation):
        evaluation = Evaluation.read(evaluation)
    if drift is not None and not isinstance(drift, Drift):
        drift = Drift.read(drift)
    if verdict is not None and not isinstance(verdict, Verdict):
        verdict = Verdict.read(verdict)
    if verdict is None and merged is not None:
        verdict = verify(
            run,
            merged,
            base=base,
            checkpoint=checkpoint,
            certificate=False,
            progress=progress,
            cancellation=cancellation,
        )
    if comparison is None:
        comparison = compare(run, (BASE, chosen), base=base, dtype=dtype, progress=progress, cancellation=cancellation)
    inspection = inspect(run, base=base, checkpoint=checkpoint)
    result = Report(
        path=str(target),
        run=run,
        adapter=inspection.adapter,
        choice=choice,
        comparison=comparison,
        evaluation=evaluation,
        drift=drift,
        merged=merged if isinstance(merged, Merged) else None,
        verdict=verdict,
    )
    with writing(target):
        write_html(
            target,
            run=run,
            adapter=result.adapter,
            forecast=inspection.forecast,
            health=inspection.health,
            choice=choice,
            comparison=comparison,
            evaluation=evaluation,
            drift=drift,
            merged=result.merged,
            verdict=verdict,
        )
    return result
