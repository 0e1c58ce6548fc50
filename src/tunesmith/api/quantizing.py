"""``quantize``: a plan carried out, calibrated where it asks for that, and certified."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path

from tunesmith.adapter import LowRank
from tunesmith.api.merging import LiveModel, inputs_of
from tunesmith.checkpoint import sha256_of
from tunesmith.executors import retried_by
from tunesmith.export.quantize import CALIBRATED, QuantizationPlan, Quantized, scheme_of
from tunesmith.export.quantize import quantize as quantize_weights
from tunesmith.progress import Cancellation, ProgressCallback, no_progress
from tunesmith.record import Finding
from tunesmith.runs import FINAL
from tunesmith.verify import CertifiedQuantization, Digest, Origin, tool_versions, write_certificate


def quantize(
    plan: QuantizationPlan,
    *,
    executor: Executor | None = None,
    certificate: bool = True,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> Quantized:
    """Carry out a plan of ``plan_quantization``.  The target appears whole at the end, or not at all.

    Calibrated rounding first has the live model write text, or read the user's rows, in float32, and keeps what its
    quantized layers are given beside the target until the work has ended.

    Args:
        plan: what will be done.
        executor: what runs the units of work, as :func:`executor_of` gives it; None for a pool of threads, one a core.
        certificate: also write ``tunesmith-certificate.json`` into the new directory: what it was made of and how, with
            the SHA-256 of every file, and no verdict yet.  Where it cannot be written, a finding says so.
        progress: told of the work's parts.
        cancellation: read between tiles and tokens.

    Returns:
        What was written, and what rounding did to each tensor.

    Raises:
        Cancelled: stopped on request; nothing is left behind.
        TunesmithError: as :func:`tunesmith.export.quantize.quantize`; and for calibrated rounding, the model cannot be
            loaded, or there is nothing to calibrate on.
    """
    started, retried = time.monotonic(), retried_by(executor)
    with _recorded(plan, progress=progress, cancellation=cancellation) as inputs:
        done = quantize_weights(plan, executor=executor, inputs=inputs, progress=progress, cancellation=cancellation)
    findings = done.findings
    if certificate:
        finding = _certify(done, executor)
        findings = findings if finding.severity == "ok" else (*findings, finding)
    seconds, again = time.monotonic() - started, retried_by(executor) - retried
    return done.model_copy(update={"seconds": seconds, "findings": findings, "retried_units": again})


@contextmanager
def _recorded(
    plan: QuantizationPlan, *, progress: ProgressCallback, cancellation: Cancellation | None
) -> Iterator[Path | None]:
    """What the quantized layers are given, in a folder; None where the plan's rounding does not ask for it."""
    if plan.rounding != CALIBRATED:
        yield None
        return
    adapted = {update.name: update.module for update in plan.binding.updates if isinstance(update, LowRank)}
    modules = [adapted.get(name, name.removesuffix(".weight")) for name in plan.quantized]
    adapter = plan.adapters[0].adapter if plan.adapters else None
    live = LiveModel(plan.base, plan.run, plan.checkpoint or FINAL, adapter)
    with inputs_of(
        live,
        modules,
        Path(plan.out),
        rows=plan.calibration,
        seed=plan.seed,
        broad=True,
        progress=progress,
        cancellation=cancellation,
    ) as folder:
        yield folder


def _certify(done: Quantized, executor: Executor | None) -> Finding:
    """Write the certificate of a quantization that nobody has verified yet."""
    plan, scheme = done.plan, scheme_of(done.plan.scheme)
    rows = Path(plan.calibration) if plan.calibration is not None else None
    origin = Origin(
        base_model=plan.base_model,
        base_dir=Path(plan.base),
        adapters=tuple((Path(one.run).name, one.checkpoint, Path(one.adapter), one.weight) for one in plan.adapters),
        view=plan.base_view,
    )
    how = CertifiedQuantization(
        scheme=scheme.name,
        format=scheme.format,
        bits=scheme.bits,
        group_size=scheme.group_size,
        activations=scheme.activations,
        rounding=plan.rounding,
        modules=len(plan.quantized),
        ignore=plan.ignore,
        seed=plan.seed,
        calibration=Digest(sha256=sha256_of(rows)) if rows is not None and rows.is_file() else None,
        shard_bytes=plan.shard_bytes,
        relative_error=done.relative_error,
        tools=tool_versions(),
    )
    return write_certificate(done.path, origin, quantization=how, executor=executor)
