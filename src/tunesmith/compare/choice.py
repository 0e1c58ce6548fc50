"""Which of a run's checkpoints to take: base and every one of them scored on held-out rows, one in memory at a time."""

from __future__ import annotations

import filecmp
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from tunesmith.adapter import Adapter, distance
from tunesmith.compare.intervals import CONFIDENCE, Estimate
from tunesmith.compare.run import part_of
from tunesmith.compare.selection import Selection, select
from tunesmith.conversations import Conversation
from tunesmith.errors import AdapterError, CheckpointError
from tunesmith.models import BASE, Engine, Generation, GenerationSettings, Request, RowScore, VariantSet
from tunesmith.progress import Cancellation, Progress, ProgressCallback, no_progress
from tunesmith.record import Finding, Part, Record, Value, gravest_first
from tunesmith.runs import Run, RunCheckpoint, training_file, training_rows

RowsFrom = Literal["held_out", "given", "none"]

_TAIL_BYTES = 1 << 12
_LENGTHS_DIFFER = 0.1  # a share below which nobody would notice


class Candidate(Part):
    """The base, or one checkpoint.

    Attributes:
        name: ``base``, ``checkpoint-N`` or ``final``.
        step: optimizer steps done; None for the base, and where that is not recorded.
        path: the adapter's directory; None for the base.
        same_as: the earlier checkpoint whose very bytes these are; the figures are that one's.
        loss: held-out loss, mean nats an answer token over all rows, with its own 95 % interval.
        to_best: how much its loss is above that of the best checkpoint, row by row; None for the best.
        to_base: how much its loss is above the base's, row by row; None for the base.
        like_best: whether it cannot be told apart from the best beyond noise; None where that was not asked.
        logged_loss: the held-out loss that the trainer logged at its step.
        trainers_best: whether the trainer recorded it as the best.
        to_previous: ‖Δ − Δ_previous‖ / ‖Δ‖: the share of its update that is new since the checkpoint before.
        to_last: ‖Δ − Δ_last‖ / ‖Δ_last‖: how far its update is from the last checkpoint's.
        answer_tokens: mean length of its greedy answers to the first rows, in tokens; None where it was not asked.
        answers_cut: how many of these were cut at the limit.
    """

    name: str
    step: int | None = None
    path: str | None = None
    same_as: str | None = None
    loss: Estimate | None = None
    to_best: Estimate | None = None
    to_base: Estimate | None = None
    like_best: bool | None = None
    logged_loss: float | None = None
    trainers_best: bool = False
    to_previous: float | None = None
    to_last: float | None = None
    answer_tokens: float | None = None
    answers_cut: int | None = None


class CheckpointChoice(Record):
    """Which checkpoint to take, and why.

    Attributes:
        run: the run's directory name.
        candidates: the base, where rows were scored, then the checkpoints in order of step, ``final`` last.
        recommended: the checkpoint to take; None where nothing is known.
        reason: why.
        best: the checkpoint of the lowest loss; None where no rows were scored.
        last: the last checkpoint.
        trainers_best: the checkpoint that the trainer recorded as the best; None where it recorded none.
        findings: what else is to be known, the gravest first: answers' lengths, what the trainer thought, what was left
            out.
        rows_from: where the rows come from: kept from training by the run itself, given by the user, or there are none.
        rows: scored rows.
        tokens: answer tokens in them.
        comparisons: the number of differences whose intervals hold together with 95 % (Bonferroni).
        confidence: of all intervals.
        answered: to how many rows the candidates that matter wrote an answer.
        max_new_tokens: the limit of these.
        dtype: of the arithmetic, such as ``float32``; None where nothing was computed.
    """

    run: str
    candidates: tuple[Candidate, ...]
    recommended: str | None
    reason: Finding
    best: str | None = None
    last: str | None = None
    trainers_best: str | None = None
    findings: tuple[Finding, ...] = ()
    rows_from: RowsFrom = "none"
    rows: int = 0
    tokens: int = 0
    comparisons: int = 1
    confidence: float = CONFIDENCE
    answered: int = 0
    max_new_tokens: int | None = None
    dtype: str | None = None

    def candidate(self, name: str) -> Candidate:
        """The candidate of that name.

        Raises:
            KeyError: there is none.
        """
        for candidate in self.candidates:
            if candidate.name == name:
                return candidate
        raise KeyError(name)


@dataclass(frozen=True)
class SavedAdapters:
    """A run's checkpoints whose adapters can be read, in order.

    Attributes:
        candidates: what is known of them without scoring.
        findings: those that were left out, and why.
    """

    candidates: tuple[Candidate, ...]
    findings: tuple[Finding, ...]

    @property
    def different(self) -> tuple[Candidate, ...]:
        """Those that are no copy of an earlier one."""
        return tuple(candidate for candidate in self.candidates if candidate.same_as is None)


def saved_adapters(
    checkpoints: Sequence[RunCheckpoint],
    *,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> SavedAdapters:
    """Look at a run's adapters: which are copies of others, and how far their updates are from each other.

    Args:
        checkpoints: at least one, in order of step.
        progress: called with the stage ``distances``, in checkpoints.
        cancellation: read before every checkpoint.

    Raises:
        AdapterError: none of them can be read.
        CheckpointError: nor that, because of its weights' file.
        Cancelled: somebody asked to stop.
    """
    cancellation = cancellation or Cancellation()
    adapters, findings = _readable(checkpoints)
    last = next(reversed(adapters.values()))
    copies, before = _Copies(), None
    candidates = []
    for done, checkpoint in enumerate((one for one in checkpoints if one.name in adapters), 1):
        cancellation.check()
        adapter = adapters[checkpoint.name]
        candidates.append(
            Candidate(
                name=checkpoint.name,
                step=checkpoint.step,
                path=checkpoint.path,
                same_as=copies.original(checkpoint.name, adapter),
                logged_loss=checkpoint.eval_loss,
                trainers_best=checkpoint.is_best,
                to_previous=_distance(before, adapter) if before else None,
                to_last=_distance(adapter, last),
            )
        )
        before = adapter
        progress(Progress("distances", done, len(adapters), "checkpoints", checkpoint.name))
    return SavedAdapters(tuple(candidates), tuple(findings))


def _readable(checkpoints: Sequence[RunCheckpoint]) -> tuple[dict[str, Adapter], list[Finding]]:
    """The adapters that can be read, by name, and a finding for each that cannot, as long as any can."""
    adapters: dict[str, Adapter] = {}
    findings: list[Finding] = []
    for checkpoint in checkpoints:
        try:
            adapters[checkpoint.name] = Adapter(checkpoint.path)
        except (AdapterError, CheckpointError) as error:
            if checkpoint is checkpoints[-1] and not adapters:
                raise
            params: dict[str, Value] = {"name": checkpoint.name, "reason": error.what}
            findings.append(Finding(code="choice_unreadable", severity="warning", params=params))
    return adapters, findings


def choose_checkpoint(
    engine: Engine,
    variants: VariantSet,
    saved: SavedAdapters,
    rows: Sequence[Conversation],
    *,
    run: Run,
    rows_from: RowsFrom,
    answers: int,
    max_new_tokens: int,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> CheckpointChoice:
    """Score the base and every different checkpoint, and name the one to take.

    Args:
        engine: who answers and scores for the variants.
        variants: the base; the adapters come and go, one at a time.
        saved: the run's checkpoints.
        rows: at least one, all with answers; training should not have seen them, and a finding says what is known of
            that.
        run: the run that the checkpoints are of.
        rows_from: whose rows these are.
        answers: to how many of the rows the recommended, the best and the last checkpoint write an answer; 0 for none.
        max_new_tokens: the limit of these answers.
        progress: called with the stages ``score`` and ``generate``, in rows and prompts of all candidates.
        cancellation: read before every batch of rows and after every token.

    Raises:
        AdapterError: an adapter does not fit the base.
        DataError: no chat template.
        PromptError: rows that are longer than the context window.
        Cancelled: somebody asked to stop.
    """
    cancellation = cancellation or Cancellation()
    scores = _scores(engine, variants, saved, rows, progress=progress, cancellation=cancellation)
    selection = select(scores)
    named = dict.fromkeys(filter(None, (selection.recommended, selection.best, selection.last)))
    settings = GenerationSettings(greedy=True, max_new_tokens=max_new_tokens)
    asked = rows[:answers] if selection.recommended else []
    lengths = _answers(engine, variants, saved, named, asked, settings, progress=progress, cancellation=cancellation)
    candidates = _with_figures(saved, selection, lengths)
    draft = CheckpointChoice(
        run=run.name,
        candidates=candidates,
        recommended=selection.recommended,
        reason=_reason(selection, candidates, len(rows)),
        best=selection.best,
        last=selection.last,
        trainers_best=_trainers_best(candidates),
        rows_from=rows_from,
        rows=len(rows),
        tokens=sum(row.tokens for row in scores[BASE]),
        comparisons=selection.comparisons,
        answered=len(asked),
        max_new_tokens=max_new_tokens if asked else None,
        dtype=variants.dtype,
    )
    seen = [_seen_in_training(run, rows)] if rows_from == "given" else []
    return draft.model_copy(update={"findings": gravest_first((*seen, *saved.findings, *_remarks(draft)))})


def choose_from_record(saved: SavedAdapters, *, run: Run) -> CheckpointChoice:
    """Name a checkpoint from what the trainer recorded alone: no row is scored, and no uncertainty is known.

    Args:
        saved: the run's checkpoints.
        run: the run that they are of.
    """
    recommended, reason = _recorded(saved)
    return CheckpointChoice(
        run=run.name,
        candidates=saved.candidates,
        recommended=recommended,
        reason=reason,
        last=saved.different[-1].name,
        trainers_best=_trainers_best(saved.candidates),
        findings=gravest_first(saved.findings),
    )


def _recorded(saved: SavedAdapters) -> tuple[str | None, Finding]:
    """The checkpoint that the run's own record speaks for, and how."""
    if len(saved.different) == 1:
        name = saved.different[0].name
        return name, Finding(code="choice_sole", severity="info", params={"name": name})
    marked = next((one for one in saved.candidates if one.trainers_best), None)
    if marked is not None:
        return marked.name, Finding(code="choice_marked", severity="info", params={"name": marked.name})
    logged = [one for one in saved.candidates if one.logged_loss is not None and math.isfinite(one.logged_loss)]
    if not logged:
        params: dict[str, Value] = {"count": len(saved.different)}
        return None, Finding(code="choice_unknown", severity="warning", params=params)
    lowest = min(logged, key=lambda one: one.logged_loss or 0.0)
    params = {"name": lowest.name, "loss": lowest.logged_loss}
    return lowest.name, Finding(code="choice_recorded", severity="info", params=params)


class _Copies:
    """Recognises adapters that are the bytes of an earlier one, as the last checkpoint's and the final one's are."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, bytes], list[tuple[str, Adapter]]] = {}

    def original(self, name: str, adapter: Adapter) -> str | None:
        """The name of the first adapter with these bytes and this configuration; None where this one is it."""
        path = adapter.header.path
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            # Checkpoints of one run have one size and one header; whatever was trained on differs at the end.
            alike = self._seen.setdefault((size, file.read()), [])
        for earlier, other in alike:
            if other.config == adapter.config and filecmp.cmp(other.header.path, path, shallow=False):
                return earlier
        alike.append((name, adapter))
        return None


def _distance(one: Adapter, other: Adapter) -> float | None:
    try:
        return distance(one, other).relative
    except AdapterError:  # what has no update that can be told is not near or far
        return None


@contextmanager
def _active(variants: VariantSet, saved: SavedAdapters, name: str) -> Iterator[None]:
    """Have one candidate among the variants."""
    if name == BASE:
        yield
        return
    path = next(one.path for one in saved.candidates if one.name == name)
    with variants.attached(name, str(path)):
        yield


def _scores(
    engine: Engine,
    variants: VariantSet,
    saved: SavedAdapters,
    rows: Sequence[Conversation],
    *,
    progress: ProgressCallback,
    cancellation: Cancellation,
) -> dict[str, list[RowScore]]:
    names = [BASE, *(one.name for one in saved.different)]
    scores: dict[str, list[RowScore]] = {}
    for place, name in enumerate(names):
        cancellation.check()
        with _active(variants, saved, name):
            told = part_of(progress, place, len(names))
            scores |= engine.score([name], rows, progress=told, cancellation=cancellation)
    return scores


def _answers(
    engine: Engine,
    variants: VariantSet,
    saved: SavedAdapters,
    names: Iterable[str],
    rows: Sequence[Conversation],
    settings: GenerationSettings,
    *,
    progress: ProgressCallback,
    cancellation: Cancellation,
) -> dict[str, list[Generation]]:
    """What the candidates that matter answer to some rows; nothing where there are none."""
    names = list(names) if rows else []
    answers = {}
    for place, name in enumerate(names):
        with _active(variants, saved, name):
            answers[name] = engine.generate(
                [Request(name, row.prompt) for row in rows],
                settings,
                progress=part_of(progress, place, len(names)),
                cancellation=cancellation,
            )
        cancellation.check()
    return answers


def _seen_in_training(run: Run, rows: Sequence[Conversation]) -> Finding:
    """Whether training saw these rows, as far as the run can tell."""
    file, learned = training_file(run), training_rows(run)
    if file is None or learned is None:
        return Finding(code="choice_rows_unchecked", severity="info")
    trained_on = {row.messages for row in learned}
    seen = sum(row.messages in trained_on for row in rows)
    if not seen:
        return Finding(code="choice_rows_unseen", severity="ok", params={"file": file.name})
    params: dict[str, Value] = {"count": seen, "rows": len(rows), "file": file.name}
    return Finding(code="choice_rows_trained_on", severity="warning", params=params)


def _with_figures(
    saved: SavedAdapters, selection: Selection, lengths: Mapping[str, Sequence[Generation]]
) -> tuple[Candidate, ...]:
    """The candidates with what was measured; a copy has its original's figures."""
    result = []
    for candidate in (Candidate(name=BASE), *saved.candidates):
        name = candidate.same_as or candidate.name
        answers = lengths.get(name)
        in_running = None if name == BASE or selection.recommended is None else name in selection.alike
        figures = {
            "loss": selection.losses[name],
            "to_best": selection.to_best.get(name),
            "to_base": selection.to_base.get(name),
            "like_best": in_running,
            "answer_tokens": sum(len(one.token_ids) for one in answers) / len(answers) if answers else None,
            "answers_cut": sum(one.stop_reason == "length" for one in answers) if answers else None,
        }
        result.append(candidate.model_copy(update=figures))
    return tuple(result)


def _reason(selection: Selection, candidates: Sequence[Candidate], rows: int) -> Finding:
    """Why a checkpoint is recommended, with every figure that the sentence needs."""
    by_name = {candidate.name: candidate for candidate in candidates}
    params: dict[str, Value] = {"rows": rows, "count": len(selection.losses) - 1}
    for role, name in (
        ("", selection.recommended),
        ("best_", selection.best),
        ("last_", selection.last),
        ("base_", BASE),
        ("next_", _nearest(selection)),
    ):
        found = by_name.get(name or "")
        if found is None or found.loss is None:
            continue
        params |= {f"{role}name": found.name, f"{role}loss": found.loss.value, f"{role}half": found.loss.half}
        for what, difference in (("above", found.to_best), ("over_base", found.to_base)):
            if difference is not None:
                params |= {
                    f"{role}{what}": difference.value,
                    f"{role}{what}_low": difference.low,
                    f"{role}{what}_high": difference.high,
                }
    serious = {"base_better": "error", "base_alike": "warning", "too_few_rows": "warning", "not_finite": "error"}
    severity = serious.get(selection.verdict, "ok")
    return Finding.model_validate({"code": f"choice_{selection.verdict}", "severity": severity, "params": params})


def _nearest(selection: Selection) -> str | None:
    """The checkpoint that comes closest to the best."""
    others = {name: far.value for name, far in selection.to_best.items() if name != BASE}
    return min(others, key=lambda name: others[name]) if others else None


def _trainers_best(candidates: Sequence[Candidate]) -> str | None:
    return next((candidate.name for candidate in candidates if candidate.trainers_best), None)


def _remarks(choice: CheckpointChoice) -> list[Finding]:
    """What is to be known beside the reason."""
    remarks = []
    diverged = [one.name for one in choice.candidates if one.loss and not math.isfinite(one.loss.value)]
    if diverged and choice.recommended:
        params: dict[str, Value] = {"count": len(diverged), "names": ", ".join(diverged[:4])}
        remarks.append(Finding(code="choice_diverged", severity="warning", params=params))
    if choice.recommended is None:
        return remarks
    ours = choice.candidate(choice.recommended)
    last = choice.candidate(choice.last or choice.recommended)
    if ours.answer_tokens and last.answer_tokens and ours is not last:
        change = last.answer_tokens / ours.answer_tokens - 1
        if abs(change) >= _LENGTHS_DIFFER:
            remarks.append(_length_remark(ours, last, change, choice.answered))
    theirs = next((one for one in choice.candidates if one.trainers_best), None)
    if theirs is not None:
        remarks.append(_trainer_remark(ours, theirs))
    return remarks


def _length_remark(ours: Candidate, last: Candidate, change: float, answered: int) -> Finding:
    params: dict[str, Value] = {
        "name": ours.name,
        "last": last.name,
        "share": abs(change),
        "tokens": ours.answer_tokens,
        "last_tokens": last.answer_tokens,
        "rows": answered,
        "cut": (ours.answers_cut or 0) + (last.answers_cut or 0),
    }
    code = "choice_last_longer" if change > 0 else "choice_last_shorter"
    return Finding(code=code, severity="info", params=params)


def _trainer_remark(ours: Candidate, theirs: Candidate) -> Finding:
    """Whether the trainer's own best is ours, and if not, why."""
    params: dict[str, Value] = {"name": ours.name, "trainer": theirs.name, "logged": theirs.logged_loss}
    if ours.name in (theirs.name, theirs.same_as):
        return Finding(code="choice_trainer_agrees", severity="ok", params=params)
    if theirs.to_best is not None:
        params |= {"above": theirs.to_best.value, "low": theirs.to_best.low, "high": theirs.to_best.high}
    if theirs.like_best:
        return Finding(code="choice_trainer_within_noise", severity="info", params=params)
    return Finding(code="choice_trainer_worse", severity="info", params=params)
