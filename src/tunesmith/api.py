"""The verbs: each composes the rooms below it, and holds no arithmetic of its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path

from tunesmith.adapter import Adapter, AdapterFacts, LowRank, Stack, describe, misfit
from tunesmith.allocator import give_memory_back
from tunesmith.checkpoint import (
    Checkpoint,
    cache_dir,
    hash_files,
    listing_sha256,
    locate_base,
    sha256_of,
    view_of,
    weights_files,
    weights_sha256,
    write_error,
)
from tunesmith.compare import (
    CheckpointChoice,
    Comparison,
    VariantInfo,
    choose_checkpoint,
    choose_from_record,
    saved_adapters,
    to_markdown,
)
from tunesmith.compare import compare as compare_variants
from tunesmith.conversations import Conversation, built_in_prompts, read_conversations
from tunesmith.errors import AdapterError, BaseModelError, CheckpointError, DataError, OutputError
from tunesmith.merge import CALIBRATED, Forecast, Merged, MergePlan, forecast
from tunesmith.merge import merge as merge_weights
from tunesmith.models import (
    BASE,
    ComputeDtype,
    GenerationSettings,
    VariantSet,
    dtype_name,
    encode_calibration_rows,
    record_inputs,
    write_calibration_text,
)
from tunesmith.models import compute_dtype as measure_compute_dtype
from tunesmith.progress import Cancellation, ProgressCallback, SharedProgress, no_progress
from tunesmith.record import Finding, Record, Value
from tunesmith.report import eval_loss_png, finding_text, loss_png, text
from tunesmith.report import write_report as write_html
from tunesmith.runs import FINAL, Run, RunCheckpoint, as_run, checkpoint_of, open_run, tokenizer_dir
from tunesmith.verify import (
    LEVELS,
    CertifiedMerge,
    Digest,
    Numerics,
    Origin,
    Recheck,
    Verdict,
    tool_versions,
    write_certificate,
)
from tunesmith.verify import recheck as recheck_directory
from tunesmith.verify import verify as verify_merged

StrPath = str | os.PathLike[str]
Prompts = StrPath | Sequence[Conversation]

MERGED = "merged"
SHOWN_PROMPTS = 8

_GRAVEST = ("error", "warning", "info", "ok")


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
        return tuple(sorted((*self.run.findings, *own, *self.findings), key=lambda one: _GRAVEST.index(one.severity)))


class ChatTurn(Record):
    """One question and its answer.

    Attributes:
        variant: who answered.
        question: the last user turn.
        text: the answer, without special tokens.
        tokens: generated tokens, the end-of-turn token included.
        stop_reason: ``eos``, ``length`` or ``cancelled``.
        seconds: from the question to the last token.
        tokens_per_s: after the first token; None below two tokens.
    """

    variant: str
    question: str
    text: str
    tokens: int
    stop_reason: str
    seconds: float
    tokens_per_s: float | None


def base_of(
    run: Run,
    checkpoint: RunCheckpoint,
    base: str | None,
    *,
    fetch: bool = True,
    progress: ProgressCallback = no_progress,
) -> tuple[str, Path]:
    """The base of a run: its name as asked for or as the adapter names it, and its directory.

    Raises:
        BaseModelError: none is named, or it cannot be found.
    """
    name = base or Adapter(checkpoint.path).base_model
    if name is None:
        raise BaseModelError(
            "The adapter names no base model.",
            where=checkpoint.path,
            next_step="pass --base with the model that was tuned",
        )
    return name, locate_base(name, relative_to=Path(run.path).parent, fetch=fetch, progress=progress)


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
            code = "base_is_recorded" if same else "base_is_another"
            params = {"recorded": run.base_sha256[:12], "found": digest[:12]}
            findings.append(Finding(code=code, severity="ok" if same else "error", params=params))
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
    target = output_file(out, suffixes=(".html",))
    with _writing(target):
        write_html(target, run=inspection.run, adapter=inspection.adapter, health=inspection.health)
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
    files = {file.name: file for file in weights_files(base.path)}
    total = sum(file.stat().st_size for file in files.values())
    hashed = SharedProgress("hash base model", total, "bytes", progress=progress, cancellation=Cancellation())
    return listing_sha256(hash_files(files, tick=hashed.advance))


def _forecast(adapter: str, base: Checkpoint) -> Forecast | None:
    try:
        stack = Stack([(adapter, 1.0)])
        return forecast(base, stack, stack.bind(base))
    except AdapterError:  # what cannot be merged is told elsewhere
        return None


def train(
    recipe: StrPath,
    overrides: Sequence[str] = (),
    *,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> Run:
    """Tune a LoRA adapter as a recipe says.

    Args:
        recipe: a YAML file.
        overrides: ``key=value`` pairs that replace keys of it.
        progress: told of steps.
        cancellation: read between steps.

    Returns:
        The run.

    Raises:
        RecipeError: unknown, wrong or missing keys.
        DataError: a data set that cannot be trained on.
        MissingExtraError: the extra ``train`` is not installed.
    """
    from tunesmith.train import check_installed, read_recipe
    from tunesmith.train import train as fit

    check_installed()
    parsed = read_recipe(recipe, overrides)
    name = parsed.model_name_or_path
    base = locate_base(name, relative_to=Path(recipe).parent, progress=progress)
    run_dir = fit(
        parsed,
        base_dir=base,
        base_name=name,
        compute=compute_dtype(parsed.dtype),
        base_sha256=weights_sha256(base),
        progress=progress,
        cancellation=cancellation,
    )
    for filename, draw in (("training_loss.png", loss_png), ("training_eval_loss.png", eval_loss_png)):
        picture = draw(open_run(run_dir))
        if picture is not None:
            (run_dir / filename).write_bytes(picture)
    return open_run(run_dir)


def compute_dtype(requested: str = "auto") -> ComputeDtype:
    """The dtype that this machine computes in: measured once, kept in the user's cache.

    Args:
        requested: ``auto``, or a dtype that is taken as it is.
    """
    return measure_compute_dtype(requested, cache_dir=cache_dir())


def load_variants(
    run: Run | StrPath,
    names: Sequence[str] = (FINAL,),
    *,
    base: str | None = None,
    dtype: str = "auto",
    progress: ProgressCallback = no_progress,
) -> tuple[VariantSet, list[VariantInfo]]:
    """Load variants of one base, its weights once.

    Args:
        run: a run, or its directory.
        names: ``base``, ``final``, ``checkpoint-N`` or ``N``, or the directory of a merged model.
        base: the base model; None for the one that the adapter names.
        dtype: of the arithmetic; ``auto`` is measured.
        progress: told of what is loaded.

    Returns:
        The loaded variants, and what each of ``names`` is, in the order of ``names``.

    Raises:
        DataError: no name is given.
        RunError: the run has no such adapter.
        BaseModelError: the base cannot be found.
    """
    run = as_run(run)
    if not names:
        raise DataError("No variant is named.", expected="base, final, checkpoint-N, or a merged model's directory")
    infos: list[VariantInfo] = []
    base_name, base_dir = base_of(run, run.checkpoints[-1], base, progress=progress)
    for name in names:
        if name == BASE:
            infos.append(VariantInfo(name=BASE, kind="base", path=str(base_dir)))
        elif (Path(name) / "config.json").is_file():
            infos.append(VariantInfo(name=Path(name).resolve().name, kind="full", path=name))
        else:
            chosen = checkpoint_of(run, name)
            infos.append(VariantInfo(name=chosen.name, kind="adapter", path=chosen.path))
    own = next((info for info in reversed(infos) if info.kind == "adapter"), None)
    tokens = tokenizer_dir(run, checkpoint_of(run, own.name) if own else run.checkpoints[-1], base_dir)
    if tokens is None:
        raise BaseModelError("Neither the run nor the base holds a tokenizer.", where=run.path, found=base_name)
    compute = compute_dtype(dtype)
    variants = VariantSet.load(
        base_dir,
        adapters={info.name: info.path for info in infos if info.kind == "adapter"},
        full={info.name: info.path for info in infos if info.kind == "full"},
        tokenizer_dir=tokens,
        dtype=compute.dtype,
        device=compute.device,
        progress=progress,
    )
    return variants, infos


def compare(
    run: Run | StrPath,
    variants: Sequence[str] = (BASE, FINAL),
    prompts: Prompts | None = None,
    *,
    data: Prompts | None = None,
    base: str | None = None,
    greedy: bool = True,
    max_new_tokens: int = 1024,
    max_prompts: int = SHOWN_PROMPTS,
    dtype: str = "auto",
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> Comparison:
    """Let variants answer the same prompts, and score them on rows whose answers are known.

    Args:
        run: a run, or its directory.
        variants: as for :func:`load_variants`.
        prompts: a file of prompts, or conversations, all of which are answered; None for the first ``max_prompts``
            rows of ``data``.
        data: a file of rows, or conversations; those with an answer are scored.  None for the run's own held-out rows.
        base: the base model; None for the one that the adapter names.
        greedy: take the most likely token always; else sample.
        max_new_tokens: limit of every reply.
        max_prompts: how many rows of ``data`` are answered where no ``prompts`` are given.
        dtype: of the arithmetic; ``auto`` is measured.
        progress: told of the work's parts.
        cancellation: read between tokens and batches.

    Raises:
        DataError: a file cannot be read.
        RunError: the run has no such variant.
    """
    run = as_run(run)
    rows = _rows(data) if data is not None else held_out_rows(run)
    asked = _rows(prompts) if prompts is not None else (rows or built_in_prompts())[:max_prompts]
    loaded, infos = load_variants(run, variants, base=base, dtype=dtype, progress=progress)
    return compare_variants(
        loaded,
        infos,
        asked,
        run_name=run.name,
        settings=GenerationSettings(greedy=greedy, max_new_tokens=max_new_tokens),
        scored_rows=[row for row in (rows or asked) if row.answer is not None],
        progress=progress,
        cancellation=cancellation,
    )


def checkpoints(
    run: Run | StrPath,
    data: Prompts | None = None,
    *,
    base: str | None = None,
    only: Sequence[str] | None = None,
    answers: int = 4,
    max_new_tokens: int = 256,
    dtype: str = "auto",
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> CheckpointChoice:
    """Score the base and every checkpoint on held-out rows, and name the one to take, with its reason.

    The base is in memory once, and one adapter at a time beside it.

    Args:
        run: a run, or its directory.
        data: a file of rows, or conversations; those with an answer are scored.  None for the run's own held-out rows;
            where it keeps none, nothing is scored, and the answer is what the trainer recorded.
        base: the base model; None for the one that the adapter names.
        only: which checkpoints: ``checkpoint-N``, ``N`` or ``final``; None for all.
        answers: to how many of the rows the recommended, the best and the last one write a greedy answer, whose lengths
            are compared; 0 for none.
        max_new_tokens: limit of these answers.
        dtype: of the arithmetic; ``auto`` is measured.
        progress: told of the work's parts.
        cancellation: read between tokens and batches.

    Raises:
        DataError: the file cannot be read, or none of its rows has an answer.
        RunError: the run has no such checkpoint.
        BaseModelError: the base cannot be found.
        AdapterError: no adapter can be read, or one does not fit the base.
    """
    run = as_run(run)
    asked = {checkpoint_of(run, name).name for name in only} if only else None
    kept = [one for one in run.checkpoints if asked is None or one.name in asked]
    rows = [row for row in (_rows(data) if data is not None else held_out_rows(run)) if row.answer is not None]
    if data is not None and not rows:
        raise DataError(
            "None of the rows has an answer that could be scored.",
            where=data if isinstance(data, str | os.PathLike) else None,
            expected="rows with an instruction and an output, or conversations that end with the assistant's turn",
        )
    saved = saved_adapters(kept, progress=progress, cancellation=cancellation)
    if not rows:
        return choose_from_record(saved, run=run)
    names = {candidate.name for candidate in saved.candidates}
    readable = run.model_copy(update={"checkpoints": tuple(one for one in kept if one.name in names)})
    variants, _ = load_variants(readable, [BASE], base=base, dtype=dtype, progress=progress)
    return choose_checkpoint(
        variants,
        saved,
        rows,
        run=run,
        rows_from="held_out" if data is None else "given",
        answers=answers,
        max_new_tokens=max_new_tokens,
        progress=progress,
        cancellation=cancellation,
    )


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
        executor: what runs the units of work; None for a pool of threads, one a core.
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
    run, adapter = as_run(plan.run), plan.adapters[0].adapter
    tokens = tokenizer_dir(run, checkpoint_of(run, plan.checkpoint), Path(plan.base))
    if tokens is None:
        raise BaseModelError("Neither the run nor the base holds a tokenizer.", where=run.path, found=plan.base)
    rows = read_conversations(plan.calibration) if plan.calibration is not None else None
    compute = compute_dtype("fp32")
    variants = VariantSet.load(
        plan.base,
        adapters={FINAL: adapter},
        tokenizer_dir=tokens,
        dtype=compute.dtype,
        device=compute.device,
        progress=progress,
    )
    if rows is None:
        sequences = write_calibration_text(
            variants, FINAL, seed=plan.seed, progress=progress, cancellation=cancellation
        )
    else:
        sequences = encode_calibration_rows(variants, FINAL, rows)
    modules = {update.module: None for update in plan.binding.updates if isinstance(update, LowRank)}
    folder = Path(plan.out).with_name(f".{Path(plan.out).name}.inputs")
    shutil.rmtree(folder, ignore_errors=True)  # a killed merge may have left it
    try:
        record_inputs(variants, FINAL, sequences, list(modules), folder, progress=progress, cancellation=cancellation)
        del variants
        give_memory_back()  # the rounding needs it
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def verify(
    run: Run | StrPath,
    merged: Merged | StrPath,
    *,
    base: str | None = None,
    checkpoint: str | int = FINAL,
    adapters: Sequence[tuple[Run | StrPath, float]] = (),
    weight: float = 1.0,
    base_is_residual: bool = False,
    base_view: str | None = None,
    levels: Sequence[str] | None = None,
    prompts: Prompts | None = None,
    dtype: str = "fp32",
    sample: bool = False,
    certificate: bool = True,
    executor: Executor | None = None,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> Verdict:
    """Prove that a merged model is its base plus its adapter, or its adapters, or say why it is not.

    Args:
        run: a run, or its directory.
        merged: the merged model's directory, by whatever tool, or what :func:`merge` returned.
        base: the base model; None for the one that the adapter names.
        checkpoint: ``final``, ``checkpoint-N`` or ``N``; of ``run``.
        adapters: further runs, each with its weight, whose final adapters were summed with the first.
        weight: what the first adapter's update was multiplied by.
        base_is_residual: the base is what an initialisation such as PiSSA's left of it.
        base_view: the merge started from the base as QLoRA training saw it: ``nf4``, ``nf4-double`` or ``int8``; None
            for as it is stored.
        levels: of ``structure``, ``assets``, ``weights``, ``behaviour``; None for all.
        prompts: for the behaviour level; None for the run's held-out rows, or a built-in set.
        dtype: of the behaviour level's arithmetic.  The measured dtype of the other verbs is not the default here:
            in bf16 the arithmetic's own noise is larger than the rounding that is looked for.
        sample: only look at the first, the last and another tile of each tensor.  The answer is then ``different`` or
            ``not_verified``: what was not looked at may be anything.
        certificate: write ``tunesmith-certificate.json`` into the merged directory where the answer is identical or
            equal within rounding, in the place of one that is there.  For any other answer nothing in it is touched.
        executor: what recomputes the parts of the weights; None for a pool of threads, one a core.
        progress: told of the work's parts.
        cancellation: read between tiles, prompts and tokens.

    Returns:
        The verdict; a wrong merge is an answer, not an exception.

    Raises:
        TunesmithError: the run, its adapter or the base cannot be read, or the merged directory is not there.
    """
    run = as_run(run)
    levels = levels or LEVELS
    unknown = [level for level in levels if level not in LEVELS]
    if unknown:
        raise DataError("There is no such level.", expected=", ".join(LEVELS), found=", ".join(unknown))
    target = merged.path if isinstance(merged, Merged) else Path(merged)
    if not target.is_dir():
        raise CheckpointError(
            "The merged model is a file." if target.exists() else "The merged model is not there.",
            where=target,
            expected="the directory that a merge wrote",
        )
    base_name, base_dir = base_of(run, checkpoint_of(run, checkpoint), base, progress=progress)
    rows = _rows(prompts) if prompts is not None else held_out_rows(run)
    # Only the behaviour level computes; the others need no torch, which takes seconds to load.
    compute = compute_dtype(dtype) if "behaviour" in levels else None
    if compute is None and dtype != "auto":
        dtype_name(dtype)
    return verify_merged(
        run,
        target,
        base_dir=base_dir,
        base_model=base_name,
        checkpoint=checkpoint,
        weight=weight,
        adapters=[(checkpoint_of(as_run(other), FINAL).path, share) for other, share in adapters],
        base_is_residual=base_is_residual,
        base_view=view_of(base_view),
        sample=sample,
        certificate=certificate,
        executor=executor,
        levels=levels,
        prompts=rows,
        **({"dtype": compute.dtype, "device": compute.device} if compute else {}),
        progress=progress,
        cancellation=cancellation,
    )


def recheck(
    directory: StrPath, *, progress: ProgressCallback = no_progress, cancellation: Cancellation | None = None
) -> Recheck:
    """Say whether a directory is still what its certificate says was verified: by hashes, without base and run.

    Args:
        directory: a merged model with ``tunesmith-certificate.json``.
        progress: told of bytes hashed.
        cancellation: read between chunks.

    Returns:
        The certificate's verdict where every file is as it was; ``different``, with the files' names, where one has
        changed, is missing, or came to be read by a loader; ``not_verified`` where the certificate holds no verdict.

    Raises:
        CheckpointError: the directory is not there, has no certificate or none of ours, or a file cannot be read.
    """
    return recheck_directory(Path(directory), progress=progress, cancellation=cancellation)


class Report(Record):
    """A written report and the records in it.

    Attributes:
        path: the HTML file.
        run: the run.
        adapter: the described adapter; None where it cannot be read.
        choice: which checkpoint to take, where that was asked.
        comparison: variants side by side.
        merged: the merge, where its record was at hand.
        verdict: the verification, where there is a merged model.
    """

    path: str
    run: Run
    adapter: AdapterFacts | None
    choice: CheckpointChoice | None = None
    comparison: Comparison
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
        merged=merged if isinstance(merged, Merged) else None,
        verdict=verdict,
    )
    with _writing(target):
        write_html(
            target,
            run=run,
            adapter=result.adapter,
            health=inspection.health,
            choice=choice,
            comparison=comparison,
            merged=result.merged,
            verdict=verdict,
        )
    return result


def write_comparison(comparison: Comparison, run: Run | StrPath, out: StrPath) -> Path:
    """Write a comparison as its name says: ``.json``, ``.md`` or ``.html``.

    Raises:
        OutputError: another name, or a place that cannot be written.
    """
    target = output_file(out, suffixes=(".json", ".md", ".html"))
    with _writing(target) as beside:
        if target.suffix == ".json":
            comparison.write(target)
        elif target.suffix == ".md":
            beside.write_text(to_markdown(comparison), encoding="utf-8")
            beside.replace(target)
        else:
            write_html(target, run=as_run(run), adapter=None, comparison=comparison, merged=None, verdict=None)
    return target


@contextmanager
def _writing(target: Path) -> Iterator[Path]:
    """Name the file to write beside ``target``; a failed write leaves none of it and is the user's to mend."""
    beside = target.with_name(f".{target.name}.partial")
    try:
        yield beside
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise write_error(error, target) from error
        raise


def output_file(out: StrPath, *, suffixes: Sequence[str] = ()) -> Path:
    """Check, before any work is done for it, that a file can be written.

    Args:
        out: the file.
        suffixes: what its name may end in; empty for anything.

    Raises:
        OutputError: a wrong suffix, a directory, or a parent that is not there or cannot be written.
    """
    target = Path(out)
    if suffixes and target.suffix not in suffixes:
        raise OutputError("The file's name does not say a known format.", where=target, expected=", ".join(suffixes))
    if target.is_dir():
        raise OutputError("The file is a directory.", where=target)
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise OutputError("The file's directory is not there or cannot be written.", where=target.parent)
    return target


def verdict_sentence(verdict: Verdict, lang: str = "en") -> str:
    """The verdict in one sentence: the likeliest cause where there is one."""
    if verdict.answer == "different" and verdict.causes:
        return finding_text(verdict.causes[0], lang)
    about = {"merged": verdict.merged, "base": verdict.base_model, "checkpoint": verdict.checkpoint}
    return text(f"verdict.{verdict.answer}.sentence", lang, **about)


def held_out_rows(run: Run) -> list[Conversation]:
    """The rows that a run keeps from its training; none where it keeps none."""
    return read_conversations(Path(run.path) / run.held_out) if run.held_out else []


def _rows(prompts: Prompts) -> list[Conversation]:
    return list(prompts) if not isinstance(prompts, str | os.PathLike) else read_conversations(prompts)
