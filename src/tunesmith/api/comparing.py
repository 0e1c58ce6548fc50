"""Live variants of one base: loaded, compared, and the checkpoint among them that is to be taken."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tunesmith.api.places import Prompts, StrPath, base_of, held_out_rows, output_file, rows_of, writing
from tunesmith.checkpoint import cache_dir
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
from tunesmith.conversations import built_in_prompts
from tunesmith.errors import BaseModelError, DataError
from tunesmith.models import BASE, ComputeDtype, GenerationSettings, VariantSet
from tunesmith.models import compute_dtype as measure_compute_dtype
from tunesmith.progress import Cancellation, ProgressCallback, no_progress
from tunesmith.record import Record
from tunesmith.report import write_report as write_html
from tunesmith.runs import FINAL, Run, as_run, checkpoint_of, tokenizer_dir

SHOWN_PROMPTS = 8


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
    rows = rows_of(data) if data is not None else held_out_rows(run)
    asked = rows_of(prompts) if prompts is not None else (rows or built_in_prompts())[:max_prompts]
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
    rows = [row for row in (rows_of(data) if data is not None else held_out_rows(run)) if row.answer is not None]
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


def write_comparison(comparison: Comparison, run: Run | StrPath, out: StrPath) -> Path:
    """Write a comparison as its name says: ``.json``, ``.md`` or ``.html``.

    Raises:
        OutputError: another name, or a place that cannot be written.
    """
    target = output_file(out, suffixes=(".json", ".md", ".html"))
    with writing(target) as beside:
        if target.suffix == ".json":
            comparison.write(target)
        elif target.suffix == ".md":
            beside.write_text(to_markdown(comparison), encoding="utf-8")
            beside.replace(target)
        else:
            write_html(target, run=as_run(run), adapter=None, comparison=comparison, merged=None, verdict=None)
    return target
