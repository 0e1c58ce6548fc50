"""``inspect``: a run, its adapter and its base, described without torch."""

from __future__ import annotations

from pathlib import Path

from tunesmith.adapter import Adapter, AdapterFacts, Stack, describe, misfit
from tunesmith.api.places import StrPath, output_file, writing
from tunesmith.checkpoint import Checkpoint, locate_base, weights_files, weights_sha256
from tunesmith.errors import AdapterError, BaseModelError, CheckpointError
from tunesmith.merge import Forecast, forecast
from tunesmith.progress import Cancellation, ProgressCallback, SharedProgress, no_progress
from tunesmith.record import Finding, Record, Value, gravest_first
from tunesmith.runs import Run, as_run, checkpoint_of


class Inspection(Record):
    """A run, its adapter and the base they belong to.

    Attributes:
        run: the run directory.
        adapter: the inspected adapter; None where it cannot be read.
        checkpoint: which of the run's adapters that is.
        base: the base's directory; None where it is not at hand.
        base_sha256: the hash of its weights, as a run records it; None where it was not asked for.
        forecast: what rounding would keep of the update in a merge; None without the base, or where nothing that can
            be merged was sampled.
        findings: what looks wrong with the adapter or with its base; the run's own are in the run.
    """

    run: Run
    adapter: AdapterFacts | None
    checkpoint: str
    base: str | None = None
    base_sha256: str | None = None
    forecast: Forecast | None = None
    findings: tuple[Finding, ...] = ()

    @property
    def health(self) -> tuple[Finding, ...]:
        """All findings: of the run, of the adapter, and of what they have to do with the base; the gravest first."""
        own = self.adapter.findings if self.adapter else ()
        return gravest_first((*self.run.findings, *own, *self.findings))


def inspect(
    run: Run | StrPath,
    *,
    base: str | None = None,
    checkpoint: str | int | None = None,
    thorough: bool = False,
    progress: ProgressCallback = no_progress,
) -> Inspection:
    """Describe a run and one of its adapters, from headers, logs and the adapter's own factors.

    Args:
        run: a run, its directory, or a hub id.
        base: the base model; None for the one that the adapter names, where that is at hand.
        checkpoint: which adapter; None for the last.
        thorough: measure every module of a large adapter, not a sample of them, and hash the base's weights, to hold
            them against what the run recorded.
        progress: told of bytes hashed.

    Raises:
        RunError: not a run.
        BaseModelError: ``base`` was given and is not there.
    """
    run = as_run(run, progress=progress)
    chosen = run.checkpoints[-1] if checkpoint is None else checkpoint_of(run, checkpoint)
    findings: list[Finding] = []
    model = _base_at_hand(run, base)
    adapter = facts = digest = None
    try:
        adapter = Adapter(chosen.path)
        facts = describe(adapter, model, **({"budget_bytes": None} if thorough else {}))
    except (AdapterError, CheckpointError) as error:
        params: dict[str, Value] = {"checkpoint": chosen.name, "what": error.what, "where": error.where}
        params |= {"expected": error.expected, "found": error.found}
        findings.append(Finding(code="adapter_unreadable", severity="error", params=params))
    if adapter and model:
        findings += misfit(adapter, model)
    if model and thorough:
        digest = _hashed(model, progress)
        if run.base_sha256:
            same = digest == run.base_sha256
            code, severity = ("base_same", "ok") if same else ("base_changed", "error")
            findings.append(Finding.model_validate({"code": code, "severity": severity}))
    return Inspection(
        run=run,
        adapter=facts,
        checkpoint=chosen.name,
        base=str(model.path.resolve()) if model else None,
        base_sha256=digest,
        forecast=_forecast(chosen.path, model) if model and adapter else None,
        findings=tuple(findings),
    )


def write_inspection(inspection: Inspection, out: StrPath) -> Path:
    """Write an inspection as one self-contained HTML file, in both languages.

    Args:
        inspection: what :func:`inspect` returned.
        out: the HTML file; its name ends in ``.html``.

    Raises:
        OutputError: ``out`` cannot be written.
    """
    from tunesmith.report import write_report

    target = output_file(out, suffixes=(".html",))
    with writing(target):
        write_report(
            target,
            run=inspection.run,
            adapter=inspection.adapter,
            forecast=inspection.forecast,
            health=inspection.health,
        )
    return target


def _base_at_hand(run: Run, base: str | None) -> Checkpoint | None:
    """The base that is asked for, or the one that the run names, where it need not be fetched."""
    name = base or run.base_model
    try:
        return Checkpoint(locate_base(name, relative_to=Path(run.path).parent, fetch=False)) if name else None
    except (BaseModelError, CheckpointError):
        if base is not None:
            raise
        return None


def _hashed(base: Checkpoint, progress: ProgressCallback) -> str:
    total = sum(file.stat().st_size for file in weights_files(base.path))
    hashed = SharedProgress("hash base model", total, "bytes", progress=progress, cancellation=Cancellation())
    return weights_sha256(base.path, tick=hashed.advance)


def _forecast(adapter: str, base: Checkpoint) -> Forecast | None:
    try:
        stack = Stack([(adapter, 1.0)])
        return forecast(base, stack, stack.bind(base))
    except AdapterError:  # what cannot be merged is told elsewhere
        return None
