"""Carry out a plan: every tensor a unit of work, side by side; the directory appears whole or not at all."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from pathlib import Path

from threadpoolctl import threadpool_limits

from tunesmith.adapter import beside
from tunesmith.checkpoint import CONFIG_FILE, INDEX_FILE, Checkpoint, resumable_stage, view_of, write_error
from tunesmith.errors import CheckpointError, OutputError
from tunesmith.executors import Workers, workers_of
from tunesmith.export.quantize.plan import Layout, laid_out
from tunesmith.export.quantize.records import QuantizationPlan, Quantized, TensorRounded
from tunesmith.export.quantize.rounders import CALIBRATED
from tunesmith.export.quantize.schemes import quantization_section, require_package, scheme_of
from tunesmith.export.quantize.work import QuantizeUnit, UnitDone, run_any
from tunesmith.merge import (
    Context,
    OutputFile,
    Unit,
    config_of,
    config_text,
    cut,
    piece_of,
    stamps_of,
    task_of,
)
from tunesmith.progress import Cancellation, ProgressCallback, SharedProgress, no_progress
from tunesmith.record import Finding, Value

_LOOK_EVERY_S = 0.2
LARGE_ERROR = 0.25  # of ‖W'‖: beyond what any scheme of 4 bits does to weights that are weights


def quantize(
    plan: QuantizationPlan,
    *,
    executor: Executor | None = None,
    inputs: Path | None = None,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> Quantized:
    """Carry out a plan.  The target appears whole at the end, or not at all.

    Args:
        plan: what :func:`plan_quantization` found.
        executor: what runs the units of work; None for a pool of threads, one a core.
        inputs: for calibrated rounding: the directory of the recorded inputs of the quantized layers.
        progress: told of bytes written.
        cancellation: read between tiles, or between tensors where an executor was given.

    Returns:
        What was written, and what rounding did to each tensor.

    Raises:
        Cancelled: stopped on request; nothing is left behind.
        OutputError: the disk is full or cannot be written, or another process writes the same target.
        CheckpointError: a tensor is not finite; or the base or the adapter is no longer what was planned with.
        MissingExtraError: compressed-tensors is not installed.
    """
    started = time.monotonic()
    require_package()
    if plan.rounding == CALIBRATED and inputs is None:
        raise OutputError("Calibrated rounding needs the recorded inputs of the quantized layers.", where=plan.out)
    model = Checkpoint(plan.base)
    layout = _checked(plan, model)
    stamps = stamps_of(model)
    size = sum(file.size_bytes for file in layout.files)
    report = SharedProgress("quantize", size, "bytes", progress=progress, cancellation=cancellation or Cancellation())
    with resumable_stage(Path(plan.out), force=plan.force) as stage:
        try:
            _emptied(stage.new)
            units = list(_units(plan, model, layout, stage.new, inputs=inputs))
            _make_files(layout.files, stage.new)
            report.advance(sum(len(file.header) for file in layout.files), "headers")
            with threadpool_limits(1), workers_of(executor) as workers:  # threads of BLAS would fight ours
                done = _run(units, workers, report)
            if stamps_of(model) != stamps:
                raise CheckpointError("The base model changed while it was read.", where=plan.base)
            _write_small_files(plan, layout, stage.new)
            stage.publish()
        except BrokenExecutor as error:
            raise OutputError("A worker of the executor died.", where=plan.out, found=error) from error
        except OSError as error:  # nothing is gone on with, so that nothing stays
            raise write_error(error, Path(plan.out)) from error
    return _finished(plan, done, size, seconds=time.monotonic() - started)


def _checked(plan: QuantizationPlan, model: Checkpoint) -> Layout:
    """The layout, found again; it must be what the plan says."""
    adapters = [(one.adapter, one.weight) for one in plan.adapters]
    layout = laid_out(model, adapters, scheme_of(plan.scheme), shard_bytes=plan.shard_bytes)
    if (layout.binding, layout.choice.quantized, layout.choice.ignore) != (plan.binding, plan.quantized, plan.ignore):
        raise CheckpointError(
            "The base model or the adapter has changed since the quantization was planned.",
            where=plan.base,
            next_step="plan the quantization again",
        )
    return layout


def _emptied(folder: Path) -> None:
    """A killed quantization may have left something, which is not gone on with."""
    for stray in folder.iterdir():
        if stray.is_dir() and not stray.is_symlink():
            shutil.rmtree(stray)
        else:
            stray.unlink()


def _make_files(files: Sequence[OutputFile], folder: Path) -> None:
    for file in files:
        with (folder / file.filename).open("wb") as stream:
            stream.write(file.header)
            stream.truncate(file.size_bytes)


def _units(
    plan: QuantizationPlan, model: Checkpoint, layout: Layout, folder: Path, *, inputs: Path | None
) -> Iterator[QuantizeUnit | Unit]:
    scheme, view = scheme_of(plan.scheme), view_of(plan.base_view)
    context = Context(
        plan.base,
        tuple((one.adapter, one.weight) for one in plan.adapters),
        rounding="nearest" if plan.rounding == "nearest" else "faithful",
        inputs=None if inputs is None else str(inputs.resolve()),
        fingerprint=json.dumps([stamps_of(model), time.time_ns()]),
    )
    by_name, neighbours = layout.binding.by_name, beside(layout.binding)
    from_stored = {f"{name.removesuffix('.weight')}": name for name in layout.choice.quantized}
    placed = {info.name: (file, info) for file in layout.files for info in file.tensors}
    for module, name in from_stored.items():
        updates, others = by_name.get(name, ()), neighbours.get(name, ())
        task = task_of(layout.before[name], model, updates, others, view=view)
        rows, columns = layout.before[name].shape
        codes_name, scales_name, *shape_name = scheme.tensors(module, rows, columns)
        file, codes = placed.pop(codes_name)
        yield QuantizeUnit(
            target=str(folder / file.filename),
            task=task,
            scheme=scheme,
            rounding=plan.rounding,
            codes=codes,
            scales=placed.pop(scales_name)[1],
            shape=placed.pop(shape_name[0])[1] if shape_name else None,
            context=context,
        )
    for name, (file, info) in placed.items():
        piece = piece_of(info, model, by_name.get(name, ()), neighbours.get(name, ()), view=view)
        for pieces in cut([piece]) if piece.count else ():
            end = pieces[-1].begin + pieces[-1].count
            yield Unit(str(folder / file.filename), pieces[0].begin, end, pieces, context)


def _run(units: Sequence[QuantizeUnit | Unit], workers: Workers, report: SharedProgress) -> dict[str, UnitDone]:
    """Run every unit, a bounded number at once; what was done to each quantized tensor, by name."""
    pool, own = workers.pool, workers.own
    tick = report.advance if own else None
    running: dict[Future[UnitDone], QuantizeUnit | Unit] = {}
    done: dict[str, UnitDone] = {}
    todo = sorted(units, key=_bytes_of)  # the largest first, from the end
    try:
        while todo or running:
            most = 2 * workers.slots
            while todo and len(running) < most:
                unit = todo.pop()
                running[pool.submit(run_any, unit, tick) if own else pool.submit(run_any, unit)] = unit
            ended, _ = wait(running, timeout=_LOOK_EVERY_S, return_when=FIRST_COMPLETED)
            for future in ended:
                unit, result = running.pop(future), future.result()
                done[result.name] = result
                report.advance(0 if own else _bytes_of(unit), result.name)
            report.advance(0, "quantize")
    except BaseException:
        report.failed.cancel()  # so that the other units stop before their directory goes
        for future in running:
            future.cancel()
        wait(running)
        raise
    done.pop("", None)
    return done


def _bytes_of(unit: QuantizeUnit | Unit) -> int:
    return unit.end - unit.begin if isinstance(unit, Unit) else unit.size_bytes


def _write_small_files(plan: QuantizationPlan, layout: Layout, folder: Path) -> None:
    for asset in plan.assets:
        (folder / asset.filename).write_bytes(Path(asset.source).read_bytes())
    if layout.index is not None:
        (folder / INDEX_FILE).write_text(layout.index, encoding="utf-8")
    config = config_of(Path(plan.base), plan.binding)
    config["quantization_config"] = quantization_section(scheme_of(plan.scheme), plan.ignore)
    # Last, so that a directory without it was never finished.
    (folder / CONFIG_FILE).write_text(config_text(config), encoding="utf-8")


def _finished(plan: QuantizationPlan, done: dict[str, UnitDone], size: int, *, seconds: float) -> Quantized:
    tensors = tuple(_rounded(done[name]) for name in plan.quantized)
    errors = math.fsum(one.sums.error_error for one in done.values())
    exact = math.fsum(one.sums.exact_exact for one in done.values())
    findings = []
    worst = max(tensors, key=lambda tensor: tensor.relative_error)
    if worst.relative_error > LARGE_ERROR:
        params: dict[str, Value] = {"tensor": worst.name, "error": worst.relative_error, "scheme": plan.scheme}
        findings.append(Finding(code="quantize_large_error", severity="warning", params=params))
    return Quantized(
        plan=plan,
        tensors=tensors,
        rounded=dict(Counter(tensor.rounding for tensor in tensors)),
        size_bytes=size,
        seconds=seconds,
        relative_error=(errors / exact) ** 0.5 if exact else 0.0,
        findings=tuple(findings),
    )


def _rounded(done: UnitDone) -> TensorRounded:
    sums = done.sums
    delta = sums.delta_delta
    return TensorRounded(
        name=done.name,
        elements=sums.elements,
        rounding=done.rounding,
        norm=sums.exact_exact**0.5,
        relative_error=(sums.error_error / sums.exact_exact) ** 0.5 if sums.exact_exact else 0.0,
        gain=1 + sums.error_delta / delta if delta else None,
        error_inside=(sums.inside / delta) ** 0.5 if delta and done.measured_inside else None,
        share_clipped=sums.clipped / max(1, sums.elements),
    )
