"""A drift as people read it: the cells of its table, its notes, and Markdown: of its own, and for a model card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tunesmith.compare import Departure, Drift, DriftRow, Estimate
from tunesmith.compare.markdown import escaped
from tunesmith.models import BASE
from tunesmith.report.escaping import visible
from tunesmith.report.evaluation import sentence_markdown
from tunesmith.report.texts import text
from tunesmith.report.units import human_bytes
from tunesmith.report.view import Line, line

COLUMNS = ("model", "scheme", "size", "of_bf16", "kept", "kl_in", "kl_out", "p99", "top1")
CARD_COLUMNS = ("model", "scheme", "size", "kept", "kl_in", "kl_out", "top1")

_NONE = "–"
_OF_ANSWERS = ("kept", "kl_in")


@dataclass(frozen=True)
class Cell:
    """A figure and its interval, each as a line of text; None where there is none."""

    value: Line | None = None
    interval: Line | None = None


@dataclass(frozen=True)
class DriftLine:
    """One line of the table.

    Attributes:
        row: whose.
        tag: key of what is to be seen at once: recommended, close, or the yardstick; empty for nothing.
        kl_in: KL on the answers.
        kl_out: KL on general texts.
        top1: how often the first choices agree, on the answers, or on general texts where there are none.
        kept: the share of the effect that is kept.
        sets: of every set of texts: its key, KL, p99 and top-1 agreement.
    """

    row: DriftRow
    tag: str
    kl_in: Cell
    kl_out: Cell
    top1: Cell
    kept: Cell
    sets: tuple[tuple[str, Cell, Cell, Cell], ...]


def drift_lines(drift: Drift) -> list[DriftLine]:
    """The table's lines, the base first."""
    return [_line(drift, row) for row in drift.rows]


def drift_notes(drift: Drift) -> list[Line]:
    """What is to be known of the figures."""
    return [
        line(
            f"drift.note.rows.{drift.rows_from}",
            rows=drift.in_domain_rows,
            tokens=drift.in_domain_tokens,
            texts=drift.general_rows,
            general=drift.general_tokens,
            dtype=drift.dtype,
        ),
        line("drift.note.figures"),
        line(f"drift.note.intervals.{'several' if drift.comparisons > 1 else 'one'}", models=drift.comparisons),
        line("drift.note.rule", kept=drift.kept_at_least, kl=drift.kl_at_most),
    ]


def drift_markdown(drift: Drift) -> str:
    """Write a drift as GitHub-flavoured Markdown, in English: for a model card.

    Names come from outside; they are shown and never obeyed.

    Args:
        drift: the record.

    Returns:
        The document, with one final newline.
    """
    parts = [
        f"# {_escaped(drift.run)}: {text('section.drift')}",
        "\n".join(f"- {sentence_markdown(one)}" for one in drift.findings),
        drift_table(drift_lines(drift)),
        *(_escaped(text(note.key, **note.params)) for note in drift_notes(drift)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def drift_table(lines: Sequence[DriftLine], lang: str = "en", *, columns: Sequence[str] = COLUMNS) -> str:
    """Lines of a drift as a Markdown table; names in it have no meaning there.

    Args:
        lines: which.
        lang: language of heads, tags and units.
        columns: which of :data:`COLUMNS`, in this order.
    """
    table = [
        [_escaped(text(f"drift.column.{name}", lang)) for name in columns],
        ["---" if name in ("model", "scheme") else "---:" for name in columns],
        *([_escaped(cells[name]) for name in columns] for cells in (_cells(one, lang) for one in lines)),
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def drift_for_card(drift: Drift, rows: Sequence[DriftRow], lang: str = "en") -> tuple[str, str]:
    """What a model card says of a drift: some models beside the yardstick, without the advice among all of them.

    Args:
        drift: the record.
        rows: those of its rows that are the card's model.
        lang: language of the words.

    Returns:
        A Markdown table, in which what stands for the answers is left out where there are none; and a sentence on what
        its figures rest on.
    """
    lines = [_line(drift, drift.base), *(replace(_line(drift, row), tag="") for row in rows)]
    columns = [name for name in CARD_COLUMNS if drift.in_domain_rows or name not in _OF_ANSWERS]
    note = text(
        f"card.drift.note.{drift.rows_from}",
        lang,
        rows=drift.in_domain_rows,
        tokens=drift.in_domain_tokens,
        texts=drift.general_rows,
        general=drift.general_tokens,
        dtype=drift.dtype,
        confidence=drift.confidence,
    )
    return drift_table(lines, lang, columns=columns), note


def _line(drift: Drift, row: DriftRow) -> DriftLine:
    departures = [
        (name, departure)
        for name, departure in (("in_domain", row.in_domain), ("general", row.general))
        if departure is not None
    ]
    tag = "yardstick" if row.model.kind == BASE else "recommended" if row.name == drift.recommended else "close"
    first: Departure | None = row.in_domain or row.general
    return DriftLine(
        row=row,
        tag=f"drift.tag.{tag}" if tag != "close" or row.close else "",
        kl_in=_cell("nats", row.in_domain.kl if row.in_domain else None),
        kl_out=_cell("nats", row.general.kl if row.general else None),
        top1=_cell("share", first.top1 if first else None),
        kept=_cell("share", row.kept),
        sets=tuple(
            (f"drift.texts.{name}", _cell("nats", one.kl), _cell("nats", one.p99), _cell("share", one.top1))
            for name, one in departures
        ),
    )


def _cell(unit: str, estimate: Estimate | None) -> Cell:
    if estimate is None:
        return Cell()
    known = estimate.low is not None and estimate.high is not None
    interval = line(f"unit.{unit}.range", low=estimate.low, high=estimate.high) if known else None
    return Cell(line(f"unit.{unit}.value", value=estimate.value), interval)


def _cells(one: DriftLine, lang: str) -> dict[str, str]:
    """The words of every column; the tail is of the answers, or of general texts where there are none."""
    tag = f" ({text(one.tag, lang)})" if one.tag else ""
    tail = one.sets[0][2] if one.sets else Cell()
    figures = {"kept": one.kept, "kl_in": one.kl_in, "kl_out": one.kl_out, "p99": tail, "top1": one.top1}
    return {
        "model": f"{one.row.name}{tag}",
        "scheme": " ".join(filter(None, (one.row.model.scheme, one.row.model.rounding))),
        "size": human_bytes(one.row.model.size_bytes),
        "of_bf16": text("unit.share.value", lang, value=one.row.size_ratio),
        **{name: _plain(cell, lang) for name, cell in figures.items()},
    }


def _plain(cell: Cell, lang: str) -> str:
    if cell.value is None:
        return _NONE
    value = text(cell.value.key, lang, **cell.value.params)
    interval = "" if cell.interval is None else text(cell.interval.key, lang, **cell.interval.params)
    return f"{value} ({interval})" if interval else value


def _escaped(words: str) -> str:
    return escaped(visible(words))
