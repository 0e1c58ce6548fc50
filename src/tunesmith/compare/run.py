"""Let every variant answer every prompt, and score held-out rows: the comparison itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tunesmith.compare.intervals import ratio_estimate
from tunesmith.compare.records import Comparison, Reply, RowLoss, Score, VariantInfo
from tunesmith.conversations import Conversation
from tunesmith.errors import DataError
from tunesmith.models import BASE, Engine, GenerationSettings, Request, RowScore
from tunesmith.progress import Cancellation, Progress, ProgressCallback, no_progress


def compare(
    engine: Engine,
    infos: Sequence[VariantInfo],
    prompts: Sequence[Conversation],
    *,
    run_name: str,
    settings: GenerationSettings | None = None,
    scored_rows: Sequence[Conversation] = (),
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> Comparison:
    """Compare variants: their replies to prompts, and how likely they find held-out answers.

    Args:
        engine: who answers for the variants.
        infos: which of them to compare, in the order they are shown.
        prompts: what each of them answers; an expected answer is kept beside the replies, not shown to the model.
        run_name: the run directory's name.
        settings: how replies are drawn; None takes the defaults.
        scored_rows: rows with answers; none, or an engine that cannot score, means no scores.
        progress: called with the stages ``generate`` and ``score``; the total is that of all variants.
        cancellation: read after every token and before every batch of rows.

    Returns:
        The comparison; scores have a difference where ``base`` is among ``infos``.

    Raises:
        DataError: no variants, a variant or a prompt id twice, an unknown variant, or a row without an answer.
        PromptError: prompts or rows that do not fit the context window.
        Cancelled: somebody asked to stop.
    """
    settings = settings or GenerationSettings()
    cancellation = cancellation or Cancellation()
    names = [info.name for info in infos]
    _check(engine, names, prompts)
    scores: dict[str, list[RowScore]] = {}
    if scored_rows and engine.capabilities.scores:
        scores = engine.score(names, scored_rows, progress=progress, cancellation=cancellation)
    replies = reply_all(engine, names, prompts, settings, progress=progress, cancellation=cancellation)
    return Comparison(
        run=run_name,
        variants=tuple(infos),
        prompts=tuple(prompts),
        replies=tuple(replies),
        scores=tuple(summarize(name, rows, scores.get(BASE)) for name, rows in scores.items()),
        row_losses=tuple(RowLoss.of(name, row) for name, rows in scores.items() for row in rows),
        settings=settings,
        engine=engine.capabilities,
    )


def reply_all(
    engine: Engine,
    names: Sequence[str],
    prompts: Sequence[Conversation],
    settings: GenerationSettings,
    *,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation,
) -> list[Reply]:
    """Every variant's reply to every prompt, prompt by prompt.

    Args:
        engine: who answers.
        names: the variants.
        prompts: the prompts.
        settings: how replies are drawn.
        progress: called with the stage ``generate``, in replies.
        cancellation: read after every token.

    Raises:
        Cancelled: somebody asked to stop.
    """
    asked = [(prompt, name) for prompt in prompts for name in names]
    generations = engine.generate(
        [Request(name, prompt.prompt) for prompt, name in asked], settings, progress=progress, cancellation=cancellation
    )
    cancellation.check()
    return [Reply.of(prompt, name, one) for (prompt, name), one in zip(asked, generations, strict=True)]


def summarize(name: str, rows: Sequence[RowScore], base: Sequence[RowScore] | None) -> Score:
    """One variant's score, and its paired difference to the base.

    Args:
        name: the variant's name.
        rows: its row scores, at least one.
        base: the base's scores of the same rows; None where it was not scored.

    Returns:
        The score.  Without a difference for the base itself, and where the two tokenized a row differently, because
        nats per token of different tokens cannot be compared; without an interval below two rows.
    """
    tokens = [row.tokens for row in rows]
    result = Score(variant=name, rows=len(rows), tokens=sum(tokens), loss=sum(row.nll for row in rows) / sum(tokens))
    if name == BASE or base is None or tokens != [row.tokens for row in base]:
        return result
    nats = [row.nll - other.nll for row, other in zip(rows, base, strict=True)]
    difference = ratio_estimate(nats, tokens)
    return result.model_copy(
        update={
            "difference": difference.value,
            "difference_low": difference.low,
            "difference_high": difference.high,
            "better_rows": sum(nat < 0 for nat in nats),
        }
    )


def _check(engine: Engine, names: Sequence[str], prompts: Sequence[Conversation]) -> None:
    if not names:
        raise DataError("There is no variant to compare.", expected=", ".join(engine.names))
    _refuse_twice("A variant is compared with itself.", names)
    _refuse_twice("Two prompts have the same id.", [prompt.id for prompt in prompts])
    unknown = [name for name in names if name not in engine.names]
    if unknown:
        raise DataError("There is no such variant.", expected=", ".join(engine.names), found=", ".join(unknown))


def _refuse_twice(what: str, names: Sequence[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(what, found=", ".join(twice))


def part_of(progress: ProgressCallback, place: int, parts: int) -> ProgressCallback:
    """Progress of one of several equal parts as progress of the whole.

    Args:
        progress: told of the whole.
        place: which part, from 0.
        parts: how many there are.
    """

    def report(step: Progress) -> None:
        total = step.total or 0
        progress(Progress(step.stage, place * total + step.done, parts * total, step.unit, step.detail))

    return report
