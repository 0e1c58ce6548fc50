"""``compare`` and ``checkpoints``: variants side by side, and the checkpoint among them that is to be taken."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path

from tunesmith.api.engines import kept, load_engine, load_variants, remembering
from tunesmith.api.places import Prompts, StrPath, output_file, rows_of, writing
from tunesmith.compare import (
    CheckpointChoice,
    Comparison,
    choose_checkpoint,
    choose_from_record,
    saved_adapters,
    to_csv,
    to_markdown,
)
from tunesmith.compare import compare as compare_variants
from tunesmith.conversations import Conversation, built_in_prompts
from tunesmith.errors import DataError
from tunesmith.models import BASE, PARALLEL, GenerationSettings, LocalEngine
from tunesmith.progress import Cancellation, ProgressCallback, no_progress
from tunesmith.report import write_report as write_html
from tunesmith.runs import FINAL, Run, as_run, checkpoint_of, held_out_rows

SHOWN_PROMPTS = 8
COMPARISON_FORMATS = (".json", ".csv", ".md", ".html")


def compare(
    run: Run | StrPath,
    variants: Sequence[str] = (BASE, FINAL),
    prompts: Prompts | None = None,
    *,
    data: Prompts | None = None,
    base: str | None = None,
    settings: GenerationSettings | None = None,
    max_prompts: int = SHOWN_PROMPTS,
    dtype: str = "auto",
    endpoint: str | Sequence[str] | None = None,
    models: Sequence[str] = (),
    parallel: int = PARALLEL,
    executor: Executor | None = None,
    records: StrPath | None = None,
    fresh: bool = False,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> Comparison:
    """Let variants answer the same prompts, and score them on rows whose answers are known.

    What was answered and scored before is not computed again: it is kept by a hash of weights, template and settings.

    Args:
        run: a run, or its directory.
        variants: as for :func:`load_engine`.
        prompts: a file of prompts, a built-in set (``general``, ``general-en``, ``general-zh``, ``general-code``) or
            conversations, all of which are answered; None for the first ``max_prompts`` rows of ``data``.
        data: a file of rows, or conversations; those with an answer are scored.  None for the run's own held-out rows.
        base: the base model; None for the one that the adapter names.
        settings: how replies are drawn; None for greedy ones.
        max_prompts: how many rows of ``data`` are answered where no ``prompts`` are given.
        dtype: of the arithmetic; ``auto`` is measured.
        endpoint: as for :func:`load_engine`.
        models: as there.
        parallel: as there.
        executor: as there.
        records: a directory for what is kept; None for the user's cache, where a server's answers are not kept.
        fresh: compute everything again.
        progress: told of the work's parts.
        cancellation: read between tokens and batches.

    Raises:
        DataError: a file cannot be read.
        RunError: the run has no such variant.
        Cancelled: somebody asked to stop; it says what is kept.
    """
    run = as_run(run)
    rows = rows_of(data) if data is not None else held_out_rows(run)
    asked = _apart(rows_of(prompts), rows) if prompts is not None else list(rows or built_in_prompts())[:max_prompts]
    loaded, infos = load_engine(
        run,
        variants,
        base=base,
        dtype=dtype,
        endpoint=endpoint,
        models=models,
        parallel=parallel,
        executor=executor,
        progress=progress,
    )
    engine = remembering(loaded, records, fresh=fresh)
    with kept(engine):
        return compare_variants(
            engine,
            infos,
            asked,
            run_name=run.name,
            settings=settings or GenerationSettings(greedy=True),
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
    records: StrPath | None = None,
    fresh: bool = False,
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
        records: as for :func:`compare`.
        fresh: as there.
        progress: told of the work's parts.
        cancellation: read between tokens and batches.

    Raises:
        DataError: the file cannot be read, or none of its rows has an answer.
        RunError: the run has no such checkpoint.
        BaseModelError: the base cannot be found.
        AdapterError: no adapter can be read, or one does not fit the base.
        Cancelled: somebody asked to stop; it says what is kept.
    """
    run = as_run(run)
    asked = {checkpoint_of(run, name).name for name in only} if only else None
    chosen = [one for one in run.checkpoints if asked is None or one.name in asked]
    rows = answered_rows(run, data)
    saved = saved_adapters(chosen, progress=progress, cancellation=cancellation)
    if not rows:
        return choose_from_record(saved, run=run)
    names = {candidate.name for candidate in saved.candidates}
    readable = run.model_copy(update={"checkpoints": tuple(one for one in chosen if one.name in names)})
    variants, _ = load_variants(readable, [BASE], base=base, dtype=dtype, progress=progress)
    engine = remembering(LocalEngine(variants), records, fresh=fresh)
    with kept(engine):
        return choose_checkpoint(
            engine,
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


def answered_rows(run: Run, data: Prompts | None) -> list[Conversation]:
    """Rows whose answers are known: those that are given, or the run's own held-out rows.

    Raises:
        DataError: the file cannot be read, or none of its rows has an answer.
    """
    rows = [row for row in (rows_of(data) if data is not None else held_out_rows(run)) if row.answer is not None]
    if data is not None and not rows:
        raise DataError(
            "None of the rows has an answer that could be scored.",
            where=data if isinstance(data, str | os.PathLike) else None,
            expected="rows with an instruction and an output, or conversations that end with the assistant's turn",
        )
    return rows


def write_comparison(comparison: Comparison, run: Run | StrPath, out: StrPath) -> Path:
    """Write a comparison as its name says: ``.json``, ``.csv``, ``.md`` or ``.html``.

    Raises:
        OutputError: another name, or a place that cannot be written.
    """
    target = output_file(out, suffixes=COMPARISON_FORMATS)
    with writing(target) as beside:
        if target.suffix == ".json":
            comparison.write(target)
        elif target.suffix == ".html":
            write_html(target, run=as_run(run), adapter=None, comparison=comparison, merged=None, verdict=None)
        else:
            # with a byte order mark, or spreadsheets take Chinese for something else
            csv = target.suffix == ".csv"
            document, encoding = (to_csv(comparison), "utf-8-sig") if csv else (to_markdown(comparison), "utf-8")
            beside.write_text(document, encoding=encoding, newline="")
            beside.replace(target)
    return target


def _apart(prompts: list[Conversation], rows: Sequence[Conversation]) -> list[Conversation]:
    """Prompts whose ids are not those of other rows: both files count their rows from 0."""
    known = {row.id: row.messages for row in rows}
    clash = any(known.get(prompt.id, prompt.messages) != prompt.messages for prompt in prompts)
    return [
        prompt.model_copy(update={"id": f"prompt-{place}"}) if clash else prompt for place, prompt in enumerate(prompts)
    ]
