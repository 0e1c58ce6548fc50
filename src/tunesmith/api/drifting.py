"""``drift`` and ``compare_schemes``: what merging and quantizing did to a fine-tune, and which scheme to take."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tunesmith.allocator import give_memory_back
from tunesmith.api.comparing import answered_rows
from tunesmith.api.engines import compute_dtype, load_variants
from tunesmith.api.places import Prompts, StrPath, base_of, output_file, writing
from tunesmith.checkpoint import Checkpoint, check_free_space, quantization_of, weights_files, write_error
from tunesmith.compare import (
    Drift,
    DriftModel,
    DriftTexts,
    Measured,
    VariantInfo,
    check_same_tokens,
    drift_of,
    drift_texts,
    measure_drift,
)
from tunesmith.errors import CheckpointError, DataError, TunesmithError
from tunesmith.models import BASE
from tunesmith.progress import Cancellation, ProgressCallback, no_progress
from tunesmith.report import drift_markdown
from tunesmith.report import write_report as write_html
from tunesmith.runs import FINAL, Run, RunCheckpoint, as_run, checkpoint_of
from tunesmith.verify import CERTIFICATE_FILE, read_certificate

DRIFT_FORMATS = (".json", ".md", ".html")
MAX_ROWS = 200

_BF16_BYTES = 2
_SHORT_DTYPES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}


def drift(
    run: Run | StrPath,
    directories: Sequence[StrPath],
    *,
    base: str | None = None,
    checkpoint: str | int = FINAL,
    data: Prompts | None = None,
    max_rows: int = MAX_ROWS,
    seed: int = 0,
    dtype: str = "fp32",
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> Drift:
    """Hold merged and quantized models against the live adapter: how far they are from it, and what they keep of it.

    The base and the live adapter are in memory, and one of the models at a time.

    Args:
        run: a run, or its directory.
        directories: complete models, as transformers loads them; ``NAME=DIR`` gives one a name of its own.
        base: the base model; None for the one that the adapter names.
        checkpoint: which adapter.
        data: a file of rows, or conversations; those with an answer are scored.  None for the run's own held-out rows;
            where it keeps none, general texts alone are.
        max_rows: the most rows, and the most general texts, that are scored.
        seed: of the drawing of rows, where there are more.
        dtype: of the arithmetic; in bf16 its own noise is larger than what int8 does.
        progress: told of the work's parts.
        cancellation: read between batches.

    Raises:
        DataError: no directory, two of one name, one that is no complete model, or that reads rows as other tokens.
        RunError: the run has no such adapter.
        BaseModelError: the base cannot be found.
        CheckpointError: a model cannot be loaded.
        PromptError: rows that are longer than a model's context window.
        Cancelled: somebody asked to stop.
    """
    job = _job(
        run,
        data,
        base=base,
        checkpoint=checkpoint,
        max_rows=max_rows,
        seed=seed,
        dtype=dtype,
        progress=progress,
        cancellation=cancellation,
    )
    places = [os.fspath(directory) for directory in directories]
    if not places:
        raise DataError("No model is named.", expected="the directory of a merged or quantized model")
    measured = job.measure(places, models=1 + len(places))
    return job.drift(measured)


def compare_schemes(
    run: Run | StrPath,
    schemes: Sequence[str],
    *,
    base: str | None = None,
    checkpoint: str | int = FINAL,
    roundings: Sequence[str] = ("auto",),
    calibration: StrPath | None = None,
    data: Prompts | None = None,
    max_rows: int = MAX_ROWS,
    seed: int = 0,
    dtype: str = "fp32",
    work_dir: StrPath | None = None,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> Drift:
    """Quantize a run by several schemes, one after the other, and hold each against the live adapter; keep none.

    Each model lies in a folder of its own until it was measured.  All plans are made before anything else, so that a
    scheme that does not fit the model costs no time.

    Args:
        run: a run, or its directory.
        schemes: as for :func:`plan_quantization`: ``int8``, ``int4:64`` …
        base: the base model; None for the one that the adapter names.
        checkpoint: which adapter.
        roundings: as there; every scheme is made by each of them.
        calibration: as there, for calibrated rounding.
        data: as for :func:`drift`.
        max_rows: as there.
        seed: of rounding, calibration, and the drawing of rows.
        dtype: of the arithmetic that models are compared in.
        work_dir: where the folder is made; None for the system's place for temporary files.
        progress: told of the work's parts.
        cancellation: read between the work's steps.

    Raises:
        DataError: no scheme, or one twice.
        OutputError: the folder cannot be made, or its disk holds too little.
        TunesmithError: as for :func:`plan_quantization`, :func:`quantize` and :func:`drift`.
        Cancelled: somebody asked to stop; the folder is gone.
    """
    from tunesmith.api.quantizing import quantize
    from tunesmith.export.quantize import plan_quantization

    job = _job(
        run,
        data,
        base=base,
        checkpoint=checkpoint,
        max_rows=max_rows,
        seed=seed,
        dtype=dtype,
        progress=progress,
        cancellation=cancellation,
    )
    wanted = [(scheme, rounding) for scheme in schemes for rounding in roundings]
    if not wanted or len(set(wanted)) < len(wanted):
        raise DataError("Schemes are named once each.", expected="one or more", found=", ".join(schemes) or "none")
    with _folder(work_dir) as folder:
        plans = [
            plan_quantization(
                job.run,
                folder / f"{place}-{scheme.replace(':', '-')}",
                scheme=scheme,
                base=base,
                checkpoint=checkpoint,
                rounding=rounding,
                calibration=calibration,
                seed=seed,
            )
            for place, (scheme, rounding) in enumerate(wanted)
        ]
        check_free_space(folder, max(plan.write_bytes for plan in plans))
        measured = job.measure([], models=1 + len(plans))
        for plan, (scheme, rounding) in zip(plans, wanted, strict=True):
            made = quantize(plan, certificate=False, progress=progress, cancellation=cancellation)
            give_memory_back()
            name = scheme if len(roundings) == 1 else f"{scheme} {rounding}"
            (found,) = job.measure([f"{name}={made.path}"], models=1 + len(plans), done=len(measured))
            about = {"path": "", "rounding": plan.rounding, "made_seconds": made.seconds}
            measured.append(replace(found, model=found.model.model_copy(update=about)))
            shutil.rmtree(made.path)
    return job.drift(measured)


def write_drift(drift: Drift, run: Run | StrPath, out: StrPath) -> Path:
    """Write a drift as its name says: ``.json``, ``.md`` or ``.html``.

    Raises:
        OutputError: another name, or a place that cannot be written.
    """
    target = output_file(out, suffixes=DRIFT_FORMATS)
    with writing(target) as beside:
        if target.suffix == ".json":
            drift.write(target)
        elif target.suffix == ".html":
            write_html(target, run=as_run(run), adapter=None, drift=drift)
        else:
            beside.write_text(drift_markdown(drift), encoding="utf-8")
            beside.replace(target)
    return target


@dataclass(frozen=True)
class _Job:
    """What models are held against, and on what."""

    run: Run
    chosen: RunCheckpoint
    base: str | None
    base_name: str
    base_weights: Checkpoint
    texts: DriftTexts
    rows_from: str
    seed: int
    dtype: str
    progress: ProgressCallback
    cancellation: Cancellation

    def measure(self, places: Sequence[str], *, models: int, done: int = 0) -> list[Measured]:
        """Measure models that lie in directories, before the first of them the base; then nothing of them is loaded.

        Args:
            places: directories, or ``NAME=DIR``.
            models: how many are measured in all.
            done: how many of them are done.
        """
        variants, infos = load_variants(
            self.run,
            [BASE, self.chosen.name, *places],
            base=self.base,
            dtype=self.dtype,
            memory_budget_bytes=0,
            progress=self.progress,
        )
        exports = infos[2:]
        _refuse_adapters(exports)
        asked = [] if done else [_model(infos[0], self.base_weights)]
        asked += [_model(info, Checkpoint(info.path)) for info in exports]
        names = [model.name for model in asked]
        check_same_tokens(variants, names, self.texts, reference=self.chosen.name)
        return [
            measure_drift(
                variants,
                model,
                self.texts,
                reference=self.chosen.name,
                models=models,
                done=done + place,
                progress=self.progress,
                cancellation=self.cancellation,
            )
            for place, model in enumerate(asked)
        ]

    def drift(self, measured: Sequence[Measured]) -> Drift:
        """The record of all that was measured, the base first."""
        elements = sum(info.elements for info in self.base_weights.tensors.values())
        return drift_of(
            measured,
            run_name=self.run.name,
            base_model=self.base_name,
            checkpoint=self.chosen.name,
            dtype=self.dtype,
            bf16_bytes=_BF16_BYTES * elements,
            rows_from=self.rows_from,
            seed=self.seed,
        )


def _job(
    run: Run | StrPath,
    data: Prompts | None,
    *,
    base: str | None,
    checkpoint: str | int,
    max_rows: int,
    seed: int,
    dtype: str,
    progress: ProgressCallback,
    cancellation: Cancellation | None,
) -> _Job:
    run = as_run(run, progress=progress)
    rows = answered_rows(run, data)
    chosen = checkpoint_of(run, checkpoint)
    base_name, base_dir = base_of(run, chosen, base, progress=progress)
    return _Job(
        run=run,
        chosen=chosen,
        base=base,
        base_name=base_name,
        base_weights=Checkpoint(base_dir),
        texts=drift_texts(rows, max_rows=max_rows, seed=seed),
        rows_from="none" if not rows else "held_out" if data is None else "given",
        seed=seed,
        dtype=compute_dtype(dtype).dtype,
        progress=progress,
        cancellation=cancellation or Cancellation(),
    )


def _refuse_adapters(infos: Sequence[VariantInfo]) -> None:
    wrong = [f"{info.name}: {info.path}" for info in infos if info.kind != "full"]
    if wrong:
        raise DataError(
            "Only complete models can be held against the live adapter.",
            expected="directories of merged or quantized models",
            details=wrong,
            next_step="merge or quantize the run first, or name a directory that is called like a checkpoint NAME=DIR",
        )


def _model(info: VariantInfo, weights: Checkpoint) -> DriftModel:
    """What is known of a model before it is loaded."""
    return DriftModel(
        name=info.name,
        kind="base" if info.kind == "base" else "export",
        path=str(Path(info.path).resolve()),
        scheme=_scheme(weights),
        rounding=_rounding(Path(info.path)),
        size_bytes=sum(path.stat().st_size for path in weights_files(weights.path)),
    )


def _scheme(weights: Checkpoint) -> str:
    """How most of its numbers are stored, as people call it."""
    section = weights.config.get("quantization_config")
    try:
        found = quantization_of(weights.config, where=weights.path)
    except CheckpointError:  # whether it can be loaded at all is not decided here
        return str(section.get("quant_method", "?")) if isinstance(section, dict) else "?"
    if found is not None:
        return " + ".join(dict.fromkeys(scheme.name for scheme in found.schemes))
    counts: Counter[str] = Counter()
    for info in weights.tensors.values():
        counts[info.dtype] += info.elements
    most = max(counts, key=lambda dtype: counts[dtype], default="?")
    return _SHORT_DTYPES.get(most, most.lower())


def _rounding(path: Path) -> str | None:
    """How its weights were rounded, as its certificate says."""
    with suppress(TunesmithError):
        said = read_certificate(path / CERTIFICATE_FILE).predicate
        how = said.quantization or said.merge
        return how.rounding if how is not None else None
    return None


@contextmanager
def _folder(work_dir: StrPath | None) -> Iterator[Path]:
    """A folder for models that are measured and gone, whatever ends the work."""
    try:
        holder = tempfile.TemporaryDirectory(prefix="tunesmith-drift-", dir=work_dir)
    except OSError as error:
        raise write_error(error, Path(work_dir or tempfile.gettempdir())) from error
    with holder as folder:
        yield Path(folder)
