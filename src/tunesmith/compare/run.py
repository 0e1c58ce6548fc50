"""Let every variant answer every prompt, and score held-out rows: the comparison itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tunesmith.compare.records import Comparison, Reply, Score, VariantInfo
from tunesmith.conversations import Conversation
from tunesmith.errors import DataError
from tunesmith.models import BASE, GenerationSettings, RowScore, VariantSet, generate, score
from tunesmith.progress import Cancellation, Progress, ProgressCallback, no_progress

_CONFIDENCE = 0.95


def compare(
    variants: VariantSet,
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
        variants: the loaded variants.
        infos: which of them to compare, in the order they are shown.
        prompts: what each of them answers; an expected answer is kept beside the replies, not shown to the model.
        run_name: the run directory's name.
        settings: how replies are drawn; None takes the defaults.
        scored_rows: rows with answers; none means no scores.
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
    if not names:
        raise DataError("There is no variant to compare.", expected=", ".join(variants.names))
    _refuse_twice("A variant is compared with itself.", names)
    _refuse_twice("Two prompts have the same id.", [prompt.id for prompt in prompts])
    for name in names:
        variants.variant(name)
    replies = []
    if prompts:
        for place, name in enumerate(names):
            whole = part_of(progress, place, len(names))
            replies += _replies(variants, name, prompts, settings, whole, cancellation)
    scored = {}
    if scored_rows:
        for place, name in enumerate(names):
            whole = part_of(progress, place, len(names))
            scored[name] = score(variants, name, scored_rows, progress=whole, cancellation=cancellation)
    return Comparison(
        run=run_name,
        variants=tuple(infos),
        prompts=tuple(prompts),
        replies=tuple(replies),
        scores=tuple(summarize(name, rows, scored.get(BASE)) for name, rows in scored.items()),
        max_new_tokens=settings.max_new_tokens,
        greedy=not settings.samples,
        dtype=variants.dtype,
    )


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
    tokens = sum(row.tokens for row in rows)
    result = Score(variant=name, rows=len(rows), tokens=tokens, loss=sum(row.nll for row in rows) / tokens)
    if name == BASE or base is None or [row.tokens for row in rows] != [row.tokens for row in base]:
        return result
    differences = [row.loss - other.loss for row, other in zip(rows, base, strict=True)]
    low, high = mean_interval(differences)
    return result.model_copy(
        update={
            "difference": sum(differences) / len(differences),
            "difference_low": low,
            "difference_high": high,
            "better_rows": sum(difference < 0 for difference in differences),
        }
    )


def mean_interval(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """The 95 % confidence interval of a mean (Student's t).

    Args:
        values: independent observations.

    Returns:
        Its lower and upper end; None and None below two values, where nothing is known of the spread.
    """
    from math import sqrt
    from statistics import fmean, stdev

    from scipy.stats import t

    if len(values) < 2:
        return None, None
    half = float(t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1)) * stdev(values) / sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def _replies(
    variants: VariantSet,
    name: str,
    prompts: Sequence[Conversation],
    settings: GenerationSettings,
    progress: ProgressCallback,
    cancellation: Cancellation,
) -> list[Reply]:
    generations = generate(
        variants,
        name,
        [prompt.prompt for prompt in prompts],
        settings,
        progress=progress,
        cancellation=cancellation,
    )
    cancellation.check()
    return [
        Reply(
            prompt_id=prompt.id,
            variant=name,
            text=generation.text,
            tokens=len(generation.token_ids),
            stop_reason=generation.stop_reason,
        )
        for prompt, generation in zip(prompts, generations, strict=True)
    ]


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
