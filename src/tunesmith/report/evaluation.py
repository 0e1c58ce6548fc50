"""An evaluation as people read it: the lines of its tables, its answer in a word, and Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from tunesmith.compare import Estimate, Evaluation, Figure, Measure, Reply
from tunesmith.compare.evaluation_records import Section
from tunesmith.compare.faults import Faults, faults_of
from tunesmith.compare.general import LANGUAGES as GENERAL
from tunesmith.compare.general import general_instructions
from tunesmith.compare.markdown import escaped
from tunesmith.compare.metrics import normalized
from tunesmith.conversations import Conversation
from tunesmith.models import BASE
from tunesmith.record import Finding
from tunesmith.report.escaping import visible
from tunesmith.report.texts import finding_text, text
from tunesmith.report.view import Column, Exchange, Line, line, whole

Answer = Literal["helped", "mixed", "hurt", "no_difference", "unknown"]

SECTIONS: tuple[Section, ...] = get_args(Section)

MARKS = {"better": "▲", "worse": "▼", "different": "◆", "no_difference": "≈", "unknown": "?"}

_MOST_SHOWN = 24  # replies of a kind on the page; the record holds all
_FAULTS = tuple(Faults.model_fields)
_EFFECT = tuple(f"evaluation_{name}" for name in ("helped", "hurt", "no_difference", "effect_unknown"))
_CODE = re.compile(r"(`[^`]+`)")


@dataclass(frozen=True)
class MeasureRow:
    """One line of a table: a measure of one variant, beside the base's.

    Attributes:
        measure: what was measured.
        base: the base's figure; None where it was not measured, or is the line's own.
        figure: the variant's.
        first: whether it is the measure's first line.
    """

    measure: Measure
    base: Figure | None
    figure: Figure
    first: bool

    @property
    def interval(self) -> Estimate | None:
        """Whose interval is shown: that of the difference, or of the value where no difference was taken.

        None where the interval is not known.
        """
        shown = self.figure.difference or self.figure.value
        return None if shown.low is None or shown.high is None else shown


def measure_rows(evaluation: Evaluation, section: Section) -> list[MeasureRow]:
    """The lines of one section's table: one for every measure and variant but the base, which stands beside each."""
    rows = []
    for measure in evaluation.of_section(section):
        base = measure.figure(BASE)
        others = [figure for figure in measure.figures if figure.variant != BASE]
        lines = [(base, figure) for figure in others] or [(None, figure) for figure in measure.figures]
        rows += [MeasureRow(measure, beside, figure, place == 0) for place, (beside, figure) in enumerate(lines)]
    return rows


def measure_name(measure: Measure, lang: str = "en") -> str:
    """What a measure is called; a scorer by its own name."""
    if measure.unit == "score":
        return measure.name
    name = text(f"measure.{measure.name}", lang)
    return (
        text("measure.of", lang, name=name, about=text(f"measure.of.{measure.about}", lang)) if measure.about else name
    )


def measure_about(measure: Measure, lang: str = "en") -> str:
    """What a measure means, and which direction is good."""
    return text("measure.scorer.about" if measure.unit == "score" else f"measure.{measure.name}.about", lang)


def shown(measure: Measure, form: str, lang: str = "en", **figures: float | None) -> str:
    """Figures of a measure with the digits and the unit that it is read in.

    Args:
        measure: whose unit it is.
        form: ``value``, ``change`` (a difference, with its sign), or, of ``low`` and ``high``, ``interval`` (of a
            difference) and ``range`` (of a value).
        lang: language of the unit.
        figures: ``value``, or ``low`` and ``high``.
    """
    return text(f"unit.{measure.unit}.{form}", lang, **figures)


def shown_interval(row: MeasureRow, lang: str = "en") -> str:
    """The interval of a line; a dash where none is known."""
    found = row.interval
    if found is None:
        return "–"
    form = "interval" if row.figure.difference else "range"
    return shown(row.measure, form, lang, low=found.low, high=found.high)


def answer_of(evaluation: Evaluation) -> Answer:
    """The whole evaluation in a word; ``mixed`` is: it helped, and something else became worse."""
    codes = {finding.code.removeprefix("evaluation_") for finding in evaluation.findings}
    if "hurt" in codes:
        return "hurt"
    if "helped" in codes:
        broke = any(code in ("forgot", "memorised") or code.startswith("more_") for code in codes)
        return "mixed" if broke else "helped"
    return "no_difference" if "no_difference" in codes else "unknown"


def told_first(evaluation: Evaluation) -> list[Finding]:
    """The findings, the gravest first, but before all of them whether it helped, which is what was asked."""
    return sorted(evaluation.findings, key=lambda finding: finding.code not in _EFFECT)


def notes(evaluation: Evaluation) -> list[Line]:
    """What is to be known beside the figures: the rows, the arithmetic, the intervals, and chance."""
    found = [
        line(
            f"evaluation.rows.{evaluation.rows_from}",
            rows=evaluation.rows,
            answered=evaluation.answered,
            limit=evaluation.settings.max_new_tokens,
            where=evaluation.engine.dtype or evaluation.engine.where,
        )
    ]
    if evaluation.differences:
        several = "several" if evaluation.comparisons > 1 else "one"
        found.append(line(f"evaluation.note.intervals.{several}", variants=evaluation.comparisons))
        found.append(line("evaluation.note.chance", differences=evaluation.differences))
    return found


@dataclass(frozen=True)
class Shown:
    """Replies to be looked at: how many there are, and the prompts of those that are shown."""

    count: int
    exchanges: tuple[Exchange, ...]
    hidden: int


@dataclass(frozen=True)
class EvaluationView:
    """What the page shows of an evaluation.

    Attributes:
        answer: the whole of it in a word.
        only: the one variant that is shown beside the base; None where there are several.
        findings: the answer in sentences.
        sections: every section that has lines, with them.
        notes: what is to be known beside the figures.
        faulty: general tasks to which a fine-tuned variant gave a reply with a fault, the gravest first.
        memorised: rows of training whose answer a variant gave word for word.
    """

    answer: Answer
    only: str | None
    findings: tuple[Finding, ...]
    sections: tuple[tuple[Section, tuple[MeasureRow, ...]], ...]
    notes: tuple[Line, ...]
    faulty: Shown
    memorised: Shown


def evaluation_view(evaluation: Evaluation) -> EvaluationView:
    """Turn an evaluation into what the page's template shows."""
    lines = ((section, tuple(measure_rows(evaluation, section))) for section in SECTIONS)
    return EvaluationView(
        answer=answer_of(evaluation),
        only=only_variant(evaluation),
        findings=tuple(told_first(evaluation)),
        sections=tuple((section, rows) for section, rows in lines if rows),
        notes=tuple(notes(evaluation)),
        faulty=_faulty(evaluation),
        memorised=_memorised(evaluation),
    )


def _faulty(evaluation: Evaluation) -> Shown:
    general = {task.id for language in GENERAL for task in general_instructions(language)}
    prompts = [prompt for prompt in evaluation.prompts[evaluation.answered :] if prompt.id in general]

    def tags(prompt: Conversation, reply: Reply) -> tuple[str, ...]:
        found = faults_of(prompt.question, reply.text, reply.stop_reason)
        return tuple(f"fault.{name}" for name in _FAULTS if getattr(found, name))

    return _shown(evaluation, prompts, tags)


def _memorised(evaluation: Evaluation) -> Shown:
    prompts = [prompt for prompt in evaluation.prompts[evaluation.answered :] if prompt.id.startswith("trained-")]

    def tags(prompt: Conversation, reply: Reply) -> tuple[str, ...]:
        same = prompt.answer and normalized(reply.text) == normalized(prompt.answer)
        return ("evaluation.memorised.tag",) if same else ()

    return _shown(evaluation, prompts, tags)


def _shown(
    evaluation: Evaluation,
    prompts: Sequence[Conversation],
    tags: Callable[[Conversation, Reply], tuple[str, ...]],
) -> Shown:
    """The prompts at which a variant's reply bears a tag, the base's only where there is no other variant."""
    replies = {(reply.prompt_id, reply.variant): reply for reply in evaluation.replies}
    judged = [info.name for info in evaluation.variants if info.name != BASE] or [BASE]
    count, found = 0, []
    for prompt in prompts:
        columns = []
        for info in evaluation.variants:
            reply = replies.get((prompt.id, info.name))
            seen = tags(prompt, reply) if reply else ()
            count += bool(seen) and info.name in judged
            columns.append(Column(info, reply, whole(reply.text) if reply else (), tags=seen))
        grave = {tag for column in columns if column.variant.name in judged for tag in column.tags}
        if grave:
            # Being cut is the commonest fault, and with a low limit says little.
            found.append((grave == {"fault.cut"}, Exchange.of(prompt, columns)))
    found.sort(key=lambda one: one[0])
    kept = tuple(exchange for _, exchange in found[:_MOST_SHOWN])
    return Shown(count, kept, len(found) - len(kept))


def only_variant(evaluation: Evaluation) -> str | None:
    """The one variant that is held against the base, or the base where it is alone; None where there are several."""
    names = dict.fromkeys(info.name for info in evaluation.variants)
    others = [name for name in names if name != BASE]
    return (others or [BASE])[0] if len(others) < 2 else None


def evaluation_markdown(evaluation: Evaluation) -> str:
    """Write an evaluation as GitHub-flavoured Markdown, in English: for a pull request or a model card.

    What comes from outside (names of variants, of scorers, of the run, words of a server) is shown and never obeyed.

    Args:
        evaluation: the record.

    Returns:
        The document, with one final newline: the answer in sentences, a table a section, and what the intervals are.
    """
    parts = [
        f"# {_escape(evaluation.run)}: {text('section.evaluation')}",
        f"**{text(f'evaluation.answer.{answer_of(evaluation)}')}**",
    ]
    if evaluation.findings:
        parts.append("\n".join(f"- {sentence_markdown(finding)}" for finding in told_first(evaluation)))
    for section in SECTIONS:
        rows = measure_rows(evaluation, section)
        if rows:
            parts += [f"## {text(f'evaluation.section.{section}')}", _table(rows, only=only_variant(evaluation))]
    parts += [_prose(text(note.key, **note.params)) for note in notes(evaluation)]
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[MeasureRow], *, only: str | None) -> str:
    heads = [
        "measure",
        *(["variant"] if only is None else []),
        "base",
        "value",
        "difference",
        "interval",
        "verdict",
        "rows",
    ]
    aligned = {"measure": "---", "variant": "---", "verdict": "---", "interval": ":---:"}
    lines = [
        [_escape(only if only and head == "value" else text(f"evaluation.column.{head}")) for head in heads],
        [aligned.get(head, "---:") for head in heads],
        *([_cell(row, head) for head in heads] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: MeasureRow, head: str) -> str:
    measure, figure = row.measure, row.figure
    cells = {
        "measure": lambda: measure_name(measure),
        "variant": lambda: figure.variant,
        "base": lambda: shown(measure, "value", value=row.base.value.value) if row.base else "–",
        "value": lambda: shown(measure, "value", value=figure.value.value),
        "difference": lambda: shown(measure, "change", value=figure.difference.value) if figure.difference else "–",
        "interval": lambda: shown_interval(row),
        "verdict": lambda: f"{MARKS[figure.verdict]} {text(f'evaluation.{figure.verdict}')}" if figure.verdict else "–",
        "rows": lambda: f"{measure.rows:,}",
    }
    return _escape(cells[head]())


def sentence_markdown(finding: Finding) -> str:
    """A finding's severity and sentence as Markdown, in English; names in it have no meaning there."""
    # A backtick in a name would end the code that it stands in.
    plain = {
        key: _line(value).replace("`", "'") if isinstance(value, str) else value
        for key, value in finding.params.items()
    }
    told = finding_text(finding.model_copy(update={"params": plain}))
    return f"**{text(f'severity.{finding.severity}')}**: {_prose(told)}"


def _prose(told: str) -> str:
    """A sentence of ours whose code stays code, and in which nothing else has a meaning."""
    return "".join(part if _CODE.fullmatch(part) else _escape(part, spaces=True) for part in _CODE.split(told))


def _escape(words: str, *, spaces: bool = False) -> str:
    """Text for Markdown, one line of it unless its spaces count; unseen characters are named."""
    return escaped(visible(words), one_line=not spaces)


def _line(words: str) -> str:
    return " ".join(visible(words).split())
