"""Did the tuning help, by how much, and what did it break: held-out rows, general tasks, and rows of training.

A checkpoint is chosen on one half of the held-out rows and reported on the other: the best of several equal ones
otherwise looks better than it is, by what luck it had in the rows that chose it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tunesmith.compare.evaluation_records import Evaluation, Figure, Measure, Section, Unit
from tunesmith.compare.faults import Faults, faults_of
from tunesmith.compare.general import LANGUAGES, general_instructions, general_texts
from tunesmith.compare.intervals import Estimate, independent_means, independent_proportions, ratio_estimate, verdict
from tunesmith.compare.metrics import (
    METRICS,
    Metric,
    Numbers,
    Scorer,
    difference,
    estimate,
    normalized,
    scorer_metric,
)
from tunesmith.compare.records import Reply, VariantInfo
from tunesmith.compare.run import reply_all
from tunesmith.compare.selection import Selection, select
from tunesmith.conversations import Conversation
from tunesmith.errors import DataError
from tunesmith.models import BASE, Engine, GenerationSettings, RowScore
from tunesmith.progress import Cancellation, ProgressCallback, no_progress
from tunesmith.record import Finding, Value, gravest_first

_FEWEST_HALVED = 8  # rows; of fewer, a half says nothing
_TRAINING_ROWS = 20
_LARGEST_EXPONENT = 700.0  # of what a float64 holds
_FAULTS = tuple(Faults.model_fields)


@dataclass
class _Work:
    """What an evaluation is made with, and what it has found so far."""

    engine: Engine
    names: list[str]
    settings: GenerationSettings
    seed: int
    progress: ProgressCallback
    cancellation: Cancellation
    measures: list[Measure] = field(default_factory=list)
    prompts: list[Conversation] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)

    @property
    def comparisons(self) -> int:
        """How many variants are held against the base."""
        return max(1, sum(name != BASE for name in self.names))

    def score(self, rows: Sequence[Conversation]) -> dict[str, list[RowScore]]:
        """Likelihoods of rows under all variants."""
        return self.engine.score(self.names, rows, progress=self.progress, cancellation=self.cancellation)

    def ask(self, prompts: Sequence[Conversation]) -> dict[str, list[Reply]]:
        """Replies of all variants, kept for the reader as well."""
        replies = reply_all(
            self.engine,
            self.names,
            prompts,
            self.settings,
            progress=self.progress,
            cancellation=self.cancellation,
        )
        self.prompts += prompts
        self.replies += replies
        return {name: [reply for reply in replies if reply.variant == name] for name in self.names}

    def add(
        self,
        section: Section,
        name: str,
        values: Mapping[str, Estimate],
        differences: Mapping[str, Estimate],
        *,
        unit: Unit,
        better: bool | None,
        rows: int,
        about: str = "",
    ) -> None:
        """Keep one measure."""
        figures = [
            Figure(
                variant=variant,
                value=value,
                difference=differences.get(variant),
                verdict=verdict(differences[variant], better) if variant in differences else None,
            )
            for variant, value in values.items()
        ]
        self.measures.append(
            Measure(
                section=section,
                name=name,
                about=about,
                unit=unit,
                higher_is_better=better,
                rows=rows,
                figures=tuple(figures),
            )
        )


def evaluate(
    engine: Engine,
    infos: Sequence[VariantInfo],
    rows: Sequence[Conversation],
    *,
    run_name: str,
    rows_from: str,
    choose: bool,
    training_rows: Sequence[Conversation] = (),
    general: bool = True,
    scorers: Mapping[str, Scorer] | None = None,
    answers: int,
    tasks: int,
    settings: GenerationSettings,
    seed: int = 0,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> Evaluation:
    """Measure what a tuning did.

    Args:
        engine: who answers for the variants.
        infos: the base, and what is held against it.
        rows: held-out rows with answers; may be empty.
        run_name: the run directory's name.
        rows_from: ``held_out``, ``given`` or ``none``.
        choose: choose the best of several checkpoints on one half of the rows, and report base, the chosen and the last
            one on the other half; else all variants are reported, a choice among them being made likewise.
        training_rows: rows that were trained on, of which a sample is asked; none leaves memorisation out.
        general: measure general texts and instructions.
        scorers: further judges of replies, by name.
        answers: to how many of the reported rows replies are written.
        tasks: to how many general instructions of each language replies are written.
        settings: how replies are drawn.
        seed: of halves and samples.
        progress: called with the stages ``score`` and ``generate``.
        cancellation: read after every token and before every batch of rows.

    Raises:
        DataError: nothing to evaluate, an unknown variant, or a scorer that failed.
        PromptError: rows that do not fit the context window.
        Cancelled: somebody asked to stop.
    """
    names = [info.name for info in infos]
    _check(engine, names, rows, general=general)
    work = _Work(engine, names, settings, seed, progress, cancellation or Cancellation())
    candidates = [name for name in names if name != BASE]
    reported, selection, chosen_on = list(rows), None, 0
    scores: dict[str, list[RowScore]] = {}
    if rows and engine.capabilities.scores:
        scores = work.score(rows)
        if len(candidates) > 1 and len(rows) >= _FEWEST_HALVED:
            first, reported = _halves(rows, seed)
            selection, chosen_on = select(_of_rows(scores, rows, first)), len(first)
            if choose:
                work.names = _worth_reporting(names, selection)
            scores = _of_rows(scores, rows, reported)
    scores = {name: scores[name] for name in work.names if name in scores}
    _effect(work, scores, reported[:answers], scorers or {})
    if general:
        _damage(work, tasks)
    if training_rows and rows:
        _memorisation(work, scores, reported, list(training_rows))
    draft = Evaluation.model_validate(
        {
            "run": run_name,
            "variants": [info for info in infos if info.name in work.names],
            "candidates": candidates if selection else (),
            "chosen": selection.recommended if selection else None,
            "chosen_by": selection.verdict if selection else None,
            "chosen_on_rows": chosen_on,
            "rows": len(reported),
            "rows_from": rows_from,
            "answered": len(reported[:answers]),
            "measures": work.measures,
            "prompts": work.prompts,
            "replies": work.replies,
            "comparisons": work.comparisons,
            "differences": sum(one.difference is not None for measure in work.measures for one in measure.figures),
            "seed": seed,
            "settings": settings,
            "engine": engine.capabilities,
        }
    )
    return draft.model_copy(update={"findings": gravest_first(_findings(draft))})


def _check(engine: Engine, names: Sequence[str], rows: Sequence[Conversation], *, general: bool) -> None:
    unknown = [name for name in names if name not in engine.names]
    if unknown or not names:
        raise DataError("There is no such variant.", expected=", ".join(engine.names), found=", ".join(unknown))
    if not rows and not general:
        raise DataError(
            "There is nothing to evaluate on.",
            expected="held-out rows with answers, or the general texts",
            next_step="pass --data FILE, or leave --no-general out",
        )


def _halves(rows: Sequence[Conversation], seed: int) -> tuple[list[Conversation], list[Conversation]]:
    """Two halves at random: which row lies in which depends on its text and the seed, not on where it stands."""
    order = sorted(
        range(len(rows)), key=lambda i: hashlib.sha256(f"{seed}\n{rows[i].model_dump_json()}".encode()).digest()
    )
    first = set(order[: len(rows) // 2])
    return (
        [row for i, row in enumerate(rows) if i in first],
        [row for i, row in enumerate(rows) if i not in first],
    )


def _of_rows(
    scores: Mapping[str, Sequence[RowScore]], rows: Sequence[Conversation], kept: Sequence[Conversation]
) -> dict[str, list[RowScore]]:
    wanted = {id(row) for row in kept}
    places = [i for i, row in enumerate(rows) if id(row) in wanted]
    return {name: [scored[i] for i in places] for name, scored in scores.items()}


def _worth_reporting(names: Sequence[str], selection: Selection) -> list[str]:
    """The base, what was chosen, and the last one, which is what people take unasked."""
    wanted = {BASE, selection.recommended or selection.best, selection.last}
    return [name for name in names if name in wanted]


def _effect(
    work: _Work,
    scores: Mapping[str, Sequence[RowScore]],
    asked: Sequence[Conversation],
    scorers: Mapping[str, Scorer],
) -> None:
    """What held-out rows say: likelihoods, and replies beside the answers that were expected."""
    if scores:
        _likelihoods(work, scores)
    if not asked:
        return
    expected = [row.answer for row in asked]
    replies = work.ask(asked)
    texts = {name: [reply.text for reply in each] for name, each in replies.items()}
    questions, ids = [row.question for row in asked], [row.id for row in asked]
    own = [scorer_metric(name, scorer, prompts=questions, row_names=ids) for name, scorer in scorers.items()]
    for metric in (*METRICS.values(), *own):
        _add_metric(work, "effect", metric, {name: metric.rows(said, expected) for name, said in texts.items()})


def _likelihoods(work: _Work, scores: Mapping[str, Sequence[RowScore]]) -> None:
    rows = len(next(iter(scores.values())))
    losses, changes = _estimates(work, scores, lambda row: row.nll)
    work.add("effect", "loss", losses, changes, unit="nats", better=False, rows=rows)
    work.add(
        "effect",
        "perplexity",
        {name: _each(loss, _exponential) for name, loss in losses.items()},
        {name: _each(change, lambda x: _exponential(x) - 1) for name, change in changes.items()},
        unit="perplexity",
        better=False,
        rows=rows,
    )
    if all(row.correct is not None for scored in scores.values() for row in scored):
        hits, more = _estimates(work, scores, lambda row: float(row.correct or 0))
        work.add("effect", "token_accuracy", hits, more, unit="share", better=True, rows=rows)


def _estimates(
    work: _Work, scores: Mapping[str, Sequence[RowScore]], of: Callable[[RowScore], float]
) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    """A sum a row, over tokens: every variant's, and its difference to the base where both tokenize alike."""
    base = scores.get(BASE)
    values, differences = {}, {}
    for name, rows in scores.items():
        tokens = [row.tokens for row in rows]
        values[name] = ratio_estimate([of(row) for row in rows], tokens)
        if base is not None and name != BASE and _same_tokens(rows, base):
            changes = [of(row) - of(other) for row, other in zip(rows, base, strict=True)]
            differences[name] = ratio_estimate(changes, tokens, comparisons=work.comparisons)
    return values, differences


def _same_tokens(rows: Sequence[RowScore], others: Sequence[RowScore]) -> bool:
    """Whether two variants tokenize alike; nats a token of different tokens cannot be compared."""
    return [row.tokens for row in rows] == [row.tokens for row in others]


def _exponential(x: float) -> float:
    return math.exp(x) if x < _LARGEST_EXPONENT else math.inf


def _each(estimate: Estimate, of: Callable[[float], float]) -> Estimate:
    """An estimate on another scale, by a function that grows with its argument."""
    low, high = (None if end is None else of(end) for end in (estimate.low, estimate.high))
    return Estimate(value=of(estimate.value), low=low, high=high)


def _add_metric(
    work: _Work, section: Section, metric: Metric, numbers: Mapping[str, Numbers], *, about: str = ""
) -> None:
    base = numbers.get(BASE)
    work.add(
        section,
        metric.name,
        {name: estimate(metric, one) for name, one in numbers.items()},
        {
            name: difference(metric, one, base_numbers=base, comparisons=work.comparisons)
            for name, one in numbers.items()
            if base is not None and name != BASE
        },
        unit=metric.unit,
        better=metric.higher_is_better,
        rows=len(next(iter(numbers.values()))),
        about=about,
    )


def _add_rate(
    work: _Work, section: Section, name: str, flags: Mapping[str, Sequence[bool]], *, better: bool | None
) -> None:
    """The share of rows that something is true of."""
    metric = replace(METRICS["exact_match"], name=name, higher_is_better=better)
    numbers = {variant: np.array([[float(flag), 1.0] for flag in each]) for variant, each in flags.items()}
    _add_metric(work, section, metric, numbers)


def _damage(work: _Work, tasks: int) -> None:
    """What else has changed: general texts, how far the predictions moved on them, and faults of replies."""
    for language in LANGUAGES if work.engine.capabilities.scores else ():
        texts = general_texts(language)
        reference = BASE if BASE in work.names else None
        scores = work.engine.score(
            work.names, texts, reference=reference, progress=work.progress, cancellation=work.cancellation
        )
        losses, changes = _estimates(work, scores, lambda row: row.nll)
        work.add("damage", "general_loss", losses, changes, unit="nats", better=False, rows=len(texts), about=language)
        moved = {
            name: ratio_estimate([(row.kl or 0.0) * row.tokens for row in rows], [row.tokens for row in rows])
            for name, rows in scores.items()
            if all(row.kl is not None for row in rows)
        }
        if moved:
            work.add("damage", "general_kl", moved, {}, unit="nats", better=None, rows=len(texts), about=language)
    asked = [task for language in LANGUAGES for task in general_instructions(language)[:tasks]]
    if not asked:
        return
    replies = work.ask(asked)
    questions = {task.id: task.question for task in asked}
    faults = {
        name: [faults_of(questions[reply.prompt_id], reply.text, reply.stop_reason) for reply in each]
        for name, each in replies.items()
    }
    for fault in _FAULTS:
        flags = {name: [getattr(one, fault) for one in each] for name, each in faults.items()}
        _add_rate(work, "damage", fault, flags, better=False)


def _memorisation(
    work: _Work,
    scores: Mapping[str, Sequence[RowScore]],
    held_out: Sequence[Conversation],
    training_rows: Sequence[Conversation],
) -> None:
    """What was learned by heart: answers of training given word for word, and how much better its rows are known."""
    generator = np.random.default_rng(work.seed)
    picked = sorted(generator.permutation(len(training_rows))[:_TRAINING_ROWS])
    sample = [training_rows[i].model_copy(update={"id": f"trained-{training_rows[i].id}"}) for i in picked]
    asked = {row.id: row for row in held_out}
    trained = {name: _verbatim(replies, sample) for name, replies in work.ask(sample).items()}
    unseen = {
        name: [reply for reply in work.replies if reply.variant == name and reply.prompt_id in asked]
        for name in work.names
    }
    rows = len(sample)
    by_heart = {name: (sum(flags), len(flags)) for name, flags in trained.items()}
    others = {
        name: (sum(flags), len(flags))
        for name, each in unseen.items()
        if (flags := _verbatim(each, [asked[reply.prompt_id] for reply in each]))
    }
    _add_rate(work, "memorisation", "verbatim_trained", trained, better=None)
    more = {
        name: independent_proportions(by_heart[name], others[name], comparisons=work.comparisons) for name in others
    }
    if more:
        work.add("memorisation", "verbatim_more", more, {}, unit="share", better=None, rows=rows)
    if scores and BASE in scores and work.engine.capabilities.scores:
        _overfit(work, scores, sample)


def _overfit(work: _Work, scores: Mapping[str, Sequence[RowScore]], sample: Sequence[Conversation]) -> None:
    """By how much more the loss fell on rows of training than on unseen ones, nats a token."""
    on_trained = work.score(sample)

    def fall(of: Mapping[str, Sequence[RowScore]], name: str) -> list[float]:
        return [other.loss - row.loss for row, other in zip(of[name], of[BASE], strict=True)]

    gaps = {
        name: independent_means(fall(on_trained, name), fall(scores, name), comparisons=work.comparisons)
        for name in work.names
        if name != BASE
    }
    if gaps:
        work.add("memorisation", "overfit_gap", gaps, {}, unit="nats", better=None, rows=len(sample))


def _verbatim(replies: Sequence[Reply], rows: Sequence[Conversation]) -> list[bool]:
    """Which replies are the expected answer, but for case, width and spacing."""
    return [
        normalized(reply.text) == normalized(row.answer or "") and bool(row.answer)
        for reply, row in zip(replies, rows, strict=True)
    ]


def _findings(evaluation: Evaluation) -> list[Finding]:
    """The answer in sentences: did it help, what did it break, what did it learn by heart."""
    judged = _judged(evaluation)
    found = [_helped(evaluation, judged)] if judged else []
    if judged and BASE in {variant.name for variant in evaluation.variants}:
        found += _broken(evaluation, judged)
        found += _by_heart(evaluation, judged)
    if evaluation.chosen is not None:
        params: dict[str, Value] = {
            "name": evaluation.chosen,
            "count": len(evaluation.candidates),
            "chosen_rows": evaluation.chosen_on_rows,
            "rows": evaluation.rows,
        }
        found.append(Finding(code="evaluation_chosen", severity="info", params=params))
    if not evaluation.engine.scores:
        found.append(Finding(code="evaluation_unscored", severity="info"))
    return [*found, *evaluation.engine.findings]


def _judged(evaluation: Evaluation) -> str | None:
    """The variant that the sentences are about: the chosen one, else the last that is not the base."""
    others = [variant.name for variant in evaluation.variants if variant.name != BASE]
    return evaluation.chosen if evaluation.chosen in others else (others[-1] if others else None)


def _helped(evaluation: Evaluation, name: str) -> Finding:
    loss = evaluation.measure("loss")
    figure = loss.figure(name) if loss else None
    base = loss.figure(BASE) if loss else None
    if loss is None or figure is None or figure.difference is None or base is None:
        return Finding(code="evaluation_effect_unknown", severity="info", params={"name": name})
    change = figure.difference
    params: dict[str, Value] = {
        "name": name,
        "rows": loss.rows,
        "loss": figure.value.value,
        "base_loss": base.value.value,
        "difference": change.value,
        "low": change.low,
        "high": change.high,
    }
    codes = {"better": ("helped", "ok"), "worse": ("hurt", "error"), "no_difference": ("no_difference", "warning")}
    code, severity = codes.get(figure.verdict or "", ("effect_unknown", "info"))
    return Finding.model_validate({"code": f"evaluation_{code}", "severity": severity, "params": params})


def _broken(evaluation: Evaluation, name: str) -> list[Finding]:
    """A finding for everything general that is worse than the base's beyond noise; one that nothing is, if so."""
    found, looked = [], 0
    for measure in evaluation.of_section("damage"):
        figure, base = measure.figure(name), measure.figure(BASE)
        if figure is None or base is None or figure.difference is None:
            continue
        looked += 1
        if figure.verdict == "worse":
            code = "evaluation_forgot" if measure.name == "general_loss" else f"evaluation_more_{measure.name}"
            params: dict[str, Value] = {
                "name": name,
                "about": measure.about,
                "rows": measure.rows,
                "value": figure.value.value,
                "base": base.value.value,
                "difference": figure.difference.value,
                "low": figure.difference.low,
                "high": figure.difference.high,
            }
            found.append(Finding(code=code, severity="warning", params=params))
    if looked and not found:
        found.append(Finding(code="evaluation_nothing_broken", severity="ok", params={"name": name, "count": looked}))
    return found


def _by_heart(evaluation: Evaluation, name: str) -> list[Finding]:
    measure = evaluation.measure("verbatim_more")
    trained = evaluation.measure("verbatim_trained")
    more, share = (one.figure(name) if one else None for one in (measure, trained))
    if measure is None or more is None or share is None:
        return []
    params: dict[str, Value] = {"name": name, "rows": measure.rows, "share": share.value.value}
    memorised = more.value.low is not None and more.value.low > 0
    code, severity = ("evaluation_memorised", "warning") if memorised else ("evaluation_not_memorised", "ok")
    return [Finding.model_validate({"code": code, "severity": severity, "params": params})]
