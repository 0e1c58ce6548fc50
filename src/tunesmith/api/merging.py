"""``merge``: a plan carried out, calibrated where it asks for that, and certified."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.adapter import LowRank
from tunesmith.allocator import give_memory_back
from tunesmith.api.engines import compute_dtype
from tunesmith.checkpoint import sha256_of
from tunesmith.conversations import read_conversations
from tunesmith.errors import BaseModelError
from tunesmith.merge import CALIBRATED, Merged, MergePlan
from tunesmith.merge import merge as merge_weights
from tunesmith.models import BASE, VariantSet, encode_calibration_rows, record_inputs, write_calibration_text
from tunesmith.progress import Cancellation, ProgressCallback, no_progress
from tunesmith.record import Finding
from tunesmith.runs import FINAL, as_run, checkpoint_of, tokenizer_dir
from tunesmith.verify import CertifiedMerge, Digest, Numerics, Origin, tool_versions, write_certificate

_BROAD: dict[str, Any] = {"sequences": 24, "bare": 32, "tokens": 128, "temperature": 1.0}


def merge(
    plan: MergePlan,
    *,
    executor: Executor | None = None,
    certificate: bool = True,
    sha256: bool = False,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> Merged:
    """Carry out a plan of ``plan_merge``.  The target appears whole at the end, or not at all.

    Calibrated rounding first has the live, tuned model write text, or read the user's rows, in float32, and keeps what
    its adapted modules are given beside the target until the merge has ended.

    Args:
        plan: what will be done.
        executor: what runs the units of work, as :func:`executor_of` gives it; None for a pool of threads, one a core.
        certificate: also write ``tunesmith-certificate.json`` into the new directory: what it was made of and how, with
            the SHA-256 of every file, and no verdict yet.  Where it cannot be written, a finding says so.
        sha256: hash the weights that are read and written also without a certificate.
        progress: told of the work's parts.
        cancellation: read between tiles and tokens.

    Returns:
        What was written, and what rounding kept of the update.

    Raises:
        Cancelled: stopped on request; nothing is left behind.
        TunesmithError: as :func:`tunesmith.merge.merge`; and for calibrated rounding, the model cannot be loaded, or
            there is nothing to calibrate on.
    """
    with recorded_inputs(plan, progress=progress, cancellation=cancellation) as inputs:
        merged = merge_weights(
            plan,
            executor=executor,
            inputs=inputs,
            sha256=sha256 or certificate,
            progress=progress,
            cancellation=cancellation,
        )
    if not certificate:
        return merged
    finding = _certify_merge(merged)
    return merged if finding.severity == "ok" else merged.model_copy(update={"findings": (*merged.findings, finding)})


def _certify_merge(merged: Merged) -> Finding:
    """Write the certificate of a merge that nobody has verified yet."""
    plan, base = merged.plan, Path(merged.plan.base)
    written = {merged.path / receipt.filename: receipt.sha256 for receipt in merged.receipts if receipt.sha256}
    read = {base / name: digest for name, digest in merged.base_sha256.items()}
    rows = Path(plan.calibration) if plan.calibration is not None else None
    origin = Origin(
        base_model=plan.base_model,
        base_dir=base,
        adapters=tuple((Path(one.run).name, one.checkpoint, Path(one.adapter), one.weight) for one in plan.adapters),
        view=plan.base_view,
        is_residual=plan.base_is_residual,
    )
    how = CertifiedMerge(
        dtype=plan.dtype,
        convert_to=plan.convert_to,
        rounding=plan.rounding,
        rounded=plan.rounded,
        seed=plan.seed,
        calibration=Digest(sha256=sha256_of(rows)) if rows is not None and rows.is_file() else None,
        shard_bytes=plan.shard_bytes,
        kept=Numerics(**merged.kept.model_dump()),
        nearest=Numerics(**merged.nearest.model_dump()),
        tools=tool_versions(),
    )
    return write_certificate(merged.path, origin, merge=how, hashes=written | read)


@contextmanager
def recorded_inputs(
    plan: MergePlan, *, progress: ProgressCallback = no_progress, cancellation: Cancellation | None = None
) -> Iterator[Path | None]:
    """What the modules with a low-rank update are given in the live, tuned model, in a folder that goes afterwards.

    Args:
        plan: a plan of calibrated rounding; it says on which text.
        progress: told of what is loaded, written and read.
        cancellation: read between tokens and batches.

    Yields:
        The folder, beside the plan's target; None where the plan's rounding does not ask for it.

    Raises:
        TunesmithError: the model cannot be loaded, or there is nothing to calibrate on.
    """
    if plan.rounding not in CALIBRATED:
        yield None
        return
    modules = {update.module: None for update in plan.binding.updates if isinstance(update, LowRank)}
    live = LiveModel(plan.base, plan.run, plan.checkpoint, plan.adapters[0].adapter)
    with inputs_of(
        live,
        list(modules),
        Path(plan.out),
        rows=plan.calibration,
        seed=plan.seed,
        progress=progress,
        cancellation=cancellation,
    ) as folder:
        yield folder


@dataclass(frozen=True)
class LiveModel:
    """A model to record inputs in.

    Attributes:
        base: directory of the base, or of a model that comes alone.
        run: the adapter's run; None for a model that comes alone.
        checkpoint: which of the run's adapters.
        adapter: the adapter's directory; None for a model that comes alone.
    """

    base: str
    run: str | None = None
    checkpoint: str = FINAL
    adapter: str | None = None

    @property
    def variant(self) -> str:
        """What the model is called among the variants."""
        return FINAL if self.adapter is not None else BASE

    def load(self, progress: ProgressCallback) -> VariantSet:
        """Load it, in float32.

        Raises:
            BaseModelError: there is no tokenizer.
            TunesmithError: it cannot be loaded.
        """
        tokens = Path(self.base)
        if self.run is not None:
            run = as_run(self.run)
            found = tokenizer_dir(run, checkpoint_of(run, self.checkpoint), tokens)
            if found is None:
                raise BaseModelError("Neither the run nor the base holds a tokenizer.", where=run.path, found=self.base)
            tokens = found
        compute = compute_dtype("fp32")
        return VariantSet.load(
            self.base,
            adapters={} if self.adapter is None else {FINAL: self.adapter},
            tokenizer_dir=tokens,
            dtype=compute.dtype,
            device=compute.device,
            progress=progress,
        )


@contextmanager
def inputs_of(
    live: LiveModel,
    modules: Sequence[str],
    out: Path,
    *,
    rows: str | None,
    seed: int,
    broad: bool = False,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> Iterator[Path]:
    """What some modules are given in a live model, in a folder that goes afterwards.

    Args:
        live: the model.
        modules: the modules, as the live model names them.
        out: the folder is made beside this.
        rows: the user's file of rows to read; None for text that the model writes itself.
        seed: of that text.
        broad: let the text be of all that the model knows, not of its conversations alone: for a rounding that moves
            every weight far.
        progress: told of what is loaded, written and read.
        cancellation: read between tokens and batches.

    Yields:
        The folder.

    Raises:
        TunesmithError: the model cannot be loaded, or there is nothing to calibrate on.
    """
    given = read_conversations(rows) if rows is not None else None
    variants = live.load(progress)
    name = live.variant
    if given is None:
        sequences = write_calibration_text(
            variants, name, seed=seed, **(_BROAD if broad else {}), progress=progress, cancellation=cancellation
        )
    else:
        sequences = encode_calibration_rows(variants, name, given)
    folder = out.with_name(f".{out.name}.inputs")
    shutil.rmtree(folder, ignore_errors=True)  # a killed work may have left it
    try:
        record_inputs(variants, name, sequences, modules, folder, progress=progress, cancellation=cancellation)
        del variants
        give_memory_back()  # the rounding needs it
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
