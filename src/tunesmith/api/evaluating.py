"""``evaluate``: did the tuning help, by how much, what did it break, and what was learned by heart."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path

from tunesmith.api.comparing import answered_rows
from tunesmith.api.engines import kept, load_engine, remembering
from tunesmith.api.places import Prompts, StrPath, output_file, rows_of, writing
from tunesmith.compare import Evaluation, load_scorer, saved_adapters
from tunesmith.compare import evaluate as evaluate_variants
from tunesmith.models import BASE, PARALLEL, GenerationSettings
from tunesmith.progress import Cancellation, ProgressCallback, no_progress
from tunesmith.report import evaluation_markdown
from tunesmith.report import write_report as write_html
from tunesmith.runs import Run, as_run, training_rows

EVALUATION_FORMATS = (".json", ".md", ".html")


def evaluate(
    run: Run | StrPath,
    variants: Sequence[str] | None = None,
    data: Prompts | None = None,
    *,
    base: str | None = None,
    training: Prompts | None = None,
    scorers: Sequence[str] = (),
    answers: int = 50,
    tasks: int = 8,
    general: bool = True,
    max_new_tokens: int = 256,
    seed: int = 0,
    dtype: str = "auto",
    endpoint: str | Sequence[str] | None = None,
    models: Sequence[str] = (),
    parallel: int = PARALLEL,
    executor: Executor | None = None,
    records: StrPath | None = None,
    fresh: bool = False,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> Evaluation:
    """Measure what a tuning did: its effect on held-out rows, what it broke elsewhere, what it learned by heart.

    Every difference to the base is paired row by row and has a 95 % interval; "none can be told" is an answer.  What
    was answered and scored before is not computed again.

    Args:
        run: a run, or its directory.
        variants: as for :func:`load_engine`, all of which are reported; None for the base and every checkpoint, of
            which the one chosen on one half of the rows and the last one are reported on the other half.
        data: a file of rows, or conversations; those with an answer are used.  None for the run's own held-out rows.
        base: the base model; None for the one that the adapter names.
        training: the rows that were trained on; None for those that the run names, where they can be found.
        scorers: ``module:function`` of further judges: ``function(prompt, reply, expected) -> float``, more is better.
        answers: to how many of the reported rows replies are written; 0 for none.
        tasks: to how many general tasks of each language (English, Chinese, code; there are 20 of each) replies are
            written; 0 for none.
        general: whether to measure general texts and tasks at all.
        max_new_tokens: limit of every reply; the share that it cut is one of the figures.
        seed: of halves and samples.
        dtype: of the arithmetic; ``auto`` is measured.
        endpoint: as for :func:`load_engine`; variants are then the server's ``models``.
        models: as there.
        parallel: as there.
        executor: as there.
        records: as for :func:`compare`.
        fresh: as there.
        progress: told of the work's parts.
        cancellation: read between tokens and batches.

    Raises:
        DataError: a file cannot be read, a scorer cannot be had, or there is nothing to evaluate on.
        RunError: the run has no such variant.
        Cancelled: somebody asked to stop; it says what is kept.
    """
    run = as_run(run)
    judges = {spec: load_scorer(spec) for spec in scorers}
    rows = answered_rows(run, data)
    learned = rows_of(training) if training is not None else training_rows(run) or []
    named = list(variants) if variants is not None else [BASE, *_different(run)]
    loaded, infos = load_engine(
        run,
        named,
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
        return evaluate_variants(
            engine,
            infos,
            rows,
            run_name=run.name,
            rows_from="none" if not rows else "held_out" if data is None else "given",
            choose=variants is None and not endpoint,
            training_rows=[row for row in learned if row.answer is not None],
            general=general,
            scorers=judges,
            answers=answers,
            tasks=tasks,
            settings=GenerationSettings(greedy=True, max_new_tokens=max_new_tokens),
            seed=seed,
            progress=progress,
            cancellation=cancellation,
        )


def write_evaluation(evaluation: Evaluation, run: Run | StrPath, out: StrPath) -> Path:
    """Write an evaluation as its name says: ``.json``, ``.md`` or ``.html``.

    Raises:
        OutputError: another name, or a place that cannot be written.
    """
    target = output_file(out, suffixes=EVALUATION_FORMATS)
    with writing(target) as beside:
        if target.suffix == ".json":
            evaluation.write(target)
        elif target.suffix == ".html":
            write_html(target, run=as_run(run), adapter=None, evaluation=evaluation)
        else:
            beside.write_text(evaluation_markdown(evaluation), encoding="utf-8")
            beside.replace(target)
    return target


def _different(run: Run) -> list[str]:
    """Every checkpoint that can be read and is not the copy of an earlier one."""
    return [candidate.name for candidate in saved_adapters(run.checkpoints).different]
