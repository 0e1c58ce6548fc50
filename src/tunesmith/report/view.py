"""What the report's template shows: records turned into lines, rows and shares, without a word of prose."""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from tunesmith.adapter.records import AdapterFacts
from tunesmith.compare import MARKS, Comparison, Marks, Reply, Score, Segment, VariantInfo, marks_of, word_diff
from tunesmith.conversations import Conversation, Message
from tunesmith.merge import Forecast, Kept, Merged, TensorFidelity
from tunesmith.record import Finding
from tunesmith.report.texts import templates
from tunesmith.report.units import figure, human_bytes, human_count, human_seconds, human_share
from tunesmith.runs import Run, RunFile
from tunesmith.verify import BehaviourRow, Level, TensorVerdict, Verdict

LEVELS = ("structure", "assets", "weights", "behaviour")
NEEDS = ("inference", "resuming", "record", "unknown")
TENSOR_CLASSES = ("exact", "faithful", "twice_rounded", "outside")

_UNLIKE_BELOW = 0.4  # share of text in common under which marking single words only confuses
_OPEN_PROMPTS = 3
_WORST_TENSORS = 8
_MOST_TENSORS = 80
_VERSION = re.compile(r"^(?:versions?[._](.+)|(.+)[._]version)$")


@dataclass(frozen=True)
class Line:
    """A text by its key, with what its placeholders stand for."""

    key: str
    params: dict[str, Any] = field(default_factory=dict)


def line(key: str, **params: Any) -> Line:
    """A :class:`Line`, written shortly."""
    return Line(key, params)


@dataclass(frozen=True)
class Headline:
    """The banner: the answer, why, what next, and the four levels."""

    answer: str
    lead: Line | Finding
    next: Line | None
    further: tuple[Finding, ...]
    tiles: tuple[tuple[str, Level | None], ...]


def headline(run: Run, merged: Merged | None, verdict: Verdict | None) -> Headline:
    """What a reader must know who reads nothing else."""
    if verdict is None:
        out = merged.plan.out if merged else None
        lead = line("verdict.missing.merged" if merged else "verdict.missing.unmerged")
        then = (
            line("hint.verdict", command=verify_command(run, out))
            if merged
            else line("hint.merged", command=command("merge", run, "--out", "DIR"))
        )
        return Headline("not_verified", lead, then, (), tuple((name, None) for name in LEVELS))
    about = {"merged": verdict.merged, "base": verdict.base_model, "checkpoint": verdict.checkpoint}
    lead_cause = verdict.answer == "different" and verdict.causes
    again = verify_command(run, merged.plan.out if merged else verdict.merged, verdict.checkpoint)
    return Headline(
        answer=verdict.answer,
        lead=verdict.causes[0] if lead_cause else Line(f"verdict.{verdict.answer}.sentence", about),
        next=line(f"verdict.{verdict.answer}.next", command=again),
        further=verdict.causes[1:],
        tiles=levels(verdict),
    )


def verify_command(run: Run, out: str | None, checkpoint: str = "final") -> str:
    """The command that verifies a merged model."""
    chosen = [] if checkpoint == "final" else ["--checkpoint", checkpoint]
    return shlex.join(["tunesmith", "verify", run.path, out or "DIR", *chosen])


def command(verb: str, run: Run, *options: str) -> str:
    """A command line about the run."""
    return shlex.join(["tunesmith", verb, run.path, *options])


def health_state(findings: Sequence[Finding]) -> str:
    """``well``, ``look`` (there is something to know of) or ``ill``: by the gravest finding."""
    gravest = {finding.severity for finding in findings}
    return "ill" if "error" in gravest else "look" if "warning" in gravest else "well"


@dataclass(frozen=True)
class ScoreRow:
    """One variant's score, and where its interval lies on the common axis, in per cent of its width."""

    score: Score
    probability: float
    low: float | None = None
    high: float | None = None
    middle: float | None = None


@dataclass(frozen=True)
class Effect:
    """Whether the tuning worked: ``yes``, ``worse``, ``unclear`` or ``alone``."""

    answer: str
    sentence: Line
    rows: tuple[ScoreRow, ...]
    zero: float | None


def effect(comparison: Comparison) -> Effect | None:
    """Judge the last compared variant by its paired difference to the base; None without scores."""
    if not comparison.scores:
        return None
    judged = [score for score in comparison.scores if score.difference is not None]
    score = judged[-1] if judged else comparison.scores[-1]
    bases = {variant.name for variant in comparison.variants if variant.kind == "base"}
    base = next((each for each in comparison.scores if each.variant in bases and each is not score), None)
    answer = _judgement(score) if base else "alone"
    params: dict[str, Any] = {"rows": score.rows, "variant": score.variant, "after": math.exp(-score.loss)}
    if base:
        params |= {"before": math.exp(-base.loss), "better": score.better_rows or 0}
    ends = [end for each in judged for end in (each.difference_low, each.difference_high) if end is not None]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    margin = (high - low or 1.0) * 0.08

    def place(value: float | None) -> float | None:
        return None if value is None or not ends else 100 * (value - low + margin) / (high - low + 2 * margin)

    rows = tuple(
        ScoreRow(
            each, math.exp(-each.loss), place(each.difference_low), place(each.difference_high), place(each.difference)
        )
        for each in comparison.scores
    )
    return Effect(answer, Line(f"effect.{answer}.sentence", params), rows, place(0.0))


def _judgement(score: Score) -> str:
    if score.difference_high is not None and score.difference_high < 0:
        return "yes"
    if score.difference_low is not None and score.difference_low > 0:
        return "worse"
    return "unclear"


@dataclass(frozen=True)
class Column:
    """One variant's reply, in marked pieces: (kind, text), kind ``same`` or ``mark``; None where it gave none.

    ``tags`` are keys of texts: what is to be seen at this reply.
    """

    variant: VariantInfo
    reply: Reply | None
    pieces: tuple[tuple[str, str], ...]
    role: str = ""
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exchange:
    """One question with every variant's reply; ``marks`` are those of :data:`MARKS` that one of its replies bears."""

    conversation: Conversation
    system: str | None
    earlier: tuple[Message, ...]
    columns: tuple[Column, ...]
    note: Line | None = None
    marks: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, conversation: Conversation, columns: Sequence[Column], note: Line | None = None, marks: Sequence[str] = ()
    ) -> Exchange:
        """The exchange of a conversation, whose system prompt and earlier turns stand apart from its question."""
        turns = list(conversation.prompt)
        return cls(
            conversation=conversation,
            system=next((turn.content for turn in turns if turn.role == "system"), None),
            earlier=tuple(turn for turn in turns[:-1] if turn.role != "system"),
            columns=tuple(columns),
            note=note,
            marks=tuple(marks),
        )


def exchanges(comparison: Comparison) -> tuple[list[Exchange], list[Exchange]]:
    """Every question: those shown at once, and those behind a fold."""
    replies = {(reply.prompt_id, reply.variant): reply for reply in comparison.replies}
    whole_prompts = [
        prompt.id
        for prompt in comparison.prompts
        if all((prompt.id, variant.name) in replies for variant in comparison.variants)
    ]
    marks = marks_of(comparison.of_prompts(whole_prompts))
    shown = [_exchange(comparison, prompt, replies, marks) for prompt in comparison.prompts]
    return shown[:_OPEN_PROMPTS], shown[_OPEN_PROMPTS:]


def mark_counts(exchanges: Iterable[Exchange]) -> list[tuple[str, int]]:
    """How many questions bear each mark; marks that none bears are left out."""
    counts = Counter(mark for exchange in exchanges for mark in exchange.marks)
    return [(mark, counts[mark]) for mark in MARKS if counts[mark]]


def _exchange(
    comparison: Comparison,
    conversation: Conversation,
    replies: dict[tuple[str, str], Reply],
    marks: dict[tuple[str, str], Marks],
) -> Exchange:
    answers = [replies.get((conversation.id, variant.name)) for variant in comparison.variants]
    pieces = [whole(reply.text) if reply else () for reply in answers]
    first, last = answers[0], answers[-1]
    note = None
    if len(answers) > 1 and first and last:
        cut = "length" in (first.stop_reason, last.stop_reason)
        left, right, note = marked(first.text, last.text, cut=cut)
        if note is not None and note.key == "outputs.same":
            note = line("outputs.same", left=first.variant, right=last.variant)
        if cut:
            note = line("outputs.cut", twice=2 * comparison.settings.max_new_tokens)
        pieces[0], pieces[-1] = left, right
    roles = ["left"] + ["middle"] * (len(answers) - 2) + ["right"] if len(answers) > 1 else [""]
    seen = [marks.get((conversation.id, variant.name), Marks()) for variant in comparison.variants]
    columns = [
        Column(variant, reply, parts, role, tuple(f"mark.{mark}" for mark in MARKS if getattr(its, mark)))
        for variant, reply, parts, role, its in zip(comparison.variants, answers, pieces, roles, seen, strict=True)
    ]
    borne = [mark for mark in MARKS if any(getattr(its, mark) for its in seen)]
    return Exchange.of(conversation, columns, note, borne)


Pieces = tuple[tuple[str, str], ...]


def marked(left: str, right: str, *, cut: bool = False) -> tuple[Pieces, Pieces, Line | None]:
    """Both texts with what only one of them has marked, and a remark where marking says nothing.

    Where one of them was cut, nothing is marked after the last words that both have: what would have followed is not
    known.
    """
    if left == right:
        return whole(left), whole(right), line("outputs.same", left="", right="")
    segments = word_diff(left, right)
    common = sum(len(segment.text) for segment in segments if segment.kind == "same")
    if 2 * common < _UNLIKE_BELOW * (len(left) + len(right)):
        return whole(left), whole(right), line("outputs.unlike") if left and right else None
    compared = len(segments)
    while cut and compared and segments[compared - 1].kind != "same":
        compared -= 1
    return _side(segments, "left", compared), _side(segments, "right", compared), None


def _side(segments: Iterable[Segment], side: str, compared: int) -> Pieces:
    """One side's text in pieces, the space around a marked one left unmarked; marked among the first segments only."""
    pieces: list[tuple[str, str]] = []
    for place, segment in enumerate(segments):
        if segment.kind == "same" or (segment.kind == side and place >= compared):
            pieces.append(("same", segment.text))
        elif segment.kind == side:
            core = segment.text.strip()
            before, _, after = segment.text.partition(core) if core else (segment.text, "", "")
            pieces += [("same", before), ("mark", core), ("same", after)]
    return tuple(piece for piece in pieces if piece[1])


def whole(text: str) -> Pieces:
    """A text of which nothing is marked, in pieces."""
    return (("same", text),) if text else ()


@dataclass(frozen=True)
class Fact:
    """One line of facts.  The label is a text key, or given by the run (``verbatim``)."""

    label: str
    value: str | Line
    verbatim_label: bool = False
    verbatim: bool = False
    aside: Line | None = None


@dataclass(frozen=True)
class FactGroup:
    """A titled list of facts."""

    title: str
    facts: tuple[Fact, ...]


def fact_groups(run: Run, adapter: AdapterFacts | None, forecast: Forecast | None = None) -> list[FactGroup]:
    """What was trained, in groups; empty ones are left out."""
    groups = [
        FactGroup("run.model", _model_facts(run)),
        FactGroup("run.adapter", (*_adapter_facts(adapter), *_forecast_facts(forecast)) if adapter else ()),
        FactGroup("run.training", _training_facts(run)),
        FactGroup("run.versions", _version_facts(run)),
    ]
    return [group for group in groups if group.facts]


def _model_facts(run: Run) -> tuple[Fact, ...]:
    facts = [
        Fact("fact.base_model", run.base_model or "–", verbatim=True),
        Fact("fact.directory", run.path, verbatim=True),
        Fact("fact.kind", line(f"kind.{run.kind}")),
        Fact("fact.writer", line(f"writer.{run.writer}")),
    ]
    if run.base_sha256:
        facts.append(Fact("fact.base_sha256", f"{run.base_sha256[:16]}…", verbatim=True))
    return tuple(facts)


def _adapter_facts(adapter: AdapterFacts) -> tuple[Fact, ...]:
    scaling = "fact.scaling_rslora" if adapter.use_rslora else "fact.scaling_plain"
    facts = [
        Fact("fact.method", adapter.peft_type, verbatim=True),
        Fact("fact.r", "–" if adapter.r is None else str(adapter.r)),
        Fact("fact.alpha", "–" if adapter.lora_alpha is None else f"{adapter.lora_alpha:g}"),
        Fact("fact.scaling", line(scaling, scaling=adapter.scaling)),
        Fact(
            "fact.targets",
            ", ".join(adapter.target_modules),
            verbatim=True,
            aside=line("fact.modules", count=len(adapter.modules)),
        ),
        Fact("fact.parameters", human_count(adapter.parameters)),
        Fact("fact.dtype", adapter.dtype, verbatim=True),
        Fact("fact.size", human_bytes(adapter.size_bytes)),
    ]
    if adapter.relative_update is not None:
        facts.append(Fact("fact.relative_update", human_share(adapter.relative_update)))
    return tuple(facts)


def _forecast_facts(forecast: Forecast | None) -> tuple[Fact, ...]:
    """What a merge would keep of the update, rounded to nearest and as it is rounded unless asked otherwise."""
    if forecast is None:
        return ()
    about = {"dtype": forecast.dtype, "nearest": forecast.nearest.gain, "kept": forecast.kept.gain}
    kind = "nearest" if forecast.rounding == "nearest" else "faithful"
    return (Fact("fact.forecast", line(f"fact.forecast.{kind}", **about)),)


def _training_facts(run: Run) -> tuple[Fact, ...]:
    steps = [row.step for row in run.log] + [saved.step for saved in run.checkpoints if saved.step is not None]
    epochs = [row.epoch for row in run.log if row.epoch is not None]
    facts = [Fact("fact.steps", f"{max(steps):,}")] if steps else []
    facts += [Fact("fact.epochs", figure(max(epochs)))] if epochs else []
    known = [key for key in templates("en") if key.startswith("param.")]
    for key in known:
        value = run.hyperparameters.get(key.removeprefix("param."))
        if value is not None:
            facts.append(Fact(key, plain(value), verbatim=True))
    return tuple(facts)


def _version_facts(run: Run) -> tuple[Fact, ...]:
    matches = ((_VERSION.match(key), value) for key, value in run.hyperparameters.items())
    return tuple(
        Fact(match[1] or match[2], plain(value), verbatim_label=True, verbatim=True)
        for match, value in matches
        if match and value is not None
    )


def plain(value: object) -> str:
    """A setting's value as it would be written in a recipe."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    return "–" if value is None else str(value)


@dataclass(frozen=True)
class FileGroup:
    """The files of one folder of the run; its name is empty for the run's root."""

    folder: str
    files: tuple[RunFile, ...]

    @property
    def size_bytes(self) -> int:
        """The size of all of them."""
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True)
class FileNeed:
    """How much of the run is there for one purpose."""

    need: str
    count: int
    size_bytes: int
    share: float


def file_groups(run: Run) -> list[FileGroup]:
    """Files by folder, the root first, then in natural order; within a folder by what they are needed for."""
    folders: dict[str, list[RunFile]] = {}
    for file in run.files:
        parent = str(PurePosixPath(file.path).parent)
        folders.setdefault("" if parent == "." else parent, []).append(file)
    order = sorted(folders, key=_natural)
    return [
        FileGroup(name, tuple(sorted(folders[name], key=lambda file: (NEEDS.index(file.needed_for), file.path))))
        for name in order
    ]


def file_needs(run: Run) -> list[FileNeed]:
    """Sizes by purpose."""
    total = sum(file.size_bytes for file in run.files) or 1
    needs = []
    for need in NEEDS:
        sizes = [file.size_bytes for file in run.files if file.needed_for == need]
        if sizes:
            needs.append(FileNeed(need, len(sizes), sum(sizes), sum(sizes) / total))
    return needs


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


@dataclass(frozen=True)
class MergeView:
    """A merge's facts and what rounding kept."""

    facts: tuple[Fact, ...]
    sentence: Line
    kept: tuple[tuple[str, Kept], ...]
    least: tuple[TensorFidelity, ...]


def merge_view(merged: Merged) -> MergeView:
    """What the merge did, and what of the update arrived."""
    plan = merged.plan
    rounding = f"merge.rounding.{plan.rounding}"
    updated, total = plan.changed, plan.tensors
    facts = (
        Fact("merge.out", plan.out, verbatim=True),
        Fact("merge.base", plan.base_model, verbatim=True),
        Fact("merge.adapter", plan.checkpoint, verbatim=True),
        Fact("merge.dtype", plan.dtype, verbatim=True),
        Fact("merge.rounding", line(rounding) if rounding in templates("en") else plan.rounding),
        Fact("merge.updated", line("merge.updated_of", count=updated, total=total)),
        Fact("merge.written", human_bytes(plan.write_bytes)),
        Fact("merge.seconds", human_seconds(merged.seconds)),
    )
    tensors = [tensor for receipt in merged.receipts for tensor in receipt.tensors]
    return MergeView(
        facts=facts,
        sentence=line("merge.sentence", dtype=plan.dtype, unchanged=merged.kept.share_unchanged, gain=merged.kept.gain),
        kept=(("merge.chosen", merged.kept), ("merge.nearest", merged.nearest)) if plan.rounding != "nearest" else (),
        least=tuple(sorted(tensors, key=lambda tensor: -tensor.relative_error)[:5]),
    )


@dataclass(frozen=True)
class TensorsView:
    """Every number of the weights level, by class, and the tensors that are furthest off."""

    tensors: int
    elements: int
    classes: tuple[tuple[str, int, float], ...]
    worst: tuple[TensorVerdict, ...]
    more: tuple[TensorVerdict, ...]
    left_out: int


def tensors_view(verdict: Verdict) -> TensorsView | None:
    """Counts over all tensors, worst tensors first; None where the weights level was not run."""
    if not verdict.tensors:
        return None
    elements = sum(tensor.elements for tensor in verdict.tensors)
    counts = [(name, sum(getattr(tensor, name) for tensor in verdict.tensors)) for name in TENSOR_CLASSES]
    order = sorted(verdict.tensors, key=_badness)
    return TensorsView(
        tensors=len(order),
        elements=elements,
        classes=tuple((name, count, count / (elements or 1)) for name, count in counts),
        worst=tuple(order[:_WORST_TENSORS]),
        more=tuple(order[_WORST_TENSORS:_MOST_TENSORS]),
        left_out=max(0, len(order) - _MOST_TENSORS),
    )


def _badness(tensor: TensorVerdict) -> tuple[float, float, str]:
    error = tensor.relative_error
    return (-tensor.outside, -(error if error is not None and math.isfinite(error) else 0.0), tensor.name)


def behaviour_rows(verdict: Verdict) -> list[BehaviourRow]:
    """Prompts: those whose texts differ first, and of them those that part at no tie."""
    return sorted(verdict.behaviour, key=lambda row: (row.same_text, row.tie, row.top1_agreement, -row.mean_kl))


def differing_texts(rows: Iterable[BehaviourRow]) -> list[tuple[BehaviourRow, Pieces, Pieces]]:
    """The greedy texts of the prompts on which they differ, marked."""
    return [(row, *marked(row.adapter_text, row.merged_text)[:2]) for row in rows if not row.same_text]


def levels(verdict: Verdict) -> tuple[tuple[str, Level | None], ...]:
    """All four levels in order; None for one that the record lacks."""
    known: dict[str, Level] = {level.name: level for level in verdict.levels}
    return tuple((name, known.get(name)) for name in LEVELS)
