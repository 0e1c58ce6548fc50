"""``tunesmith checkpoints``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import tunesmith as ts
from tunesmith.cli.options import BaseOption, DtypeOption, FreshOption, JsonOption, RecordsOption, RunArgument
from tunesmith.cli.output import command, console, print_json, progress_bar, stoppable

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from tunesmith.cli.screen import Screen
    from tunesmith.compare import Estimate

_STYLES = {"ok": "green", "info": "cyan", "warning": "yellow", "error": "red"}
_NONE = "·"
_CURVE_LINES = 6
_CURVE_COLUMNS = 56


def checkpoints(
    run: RunArgument,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="Rows with answers to score. Default: the run's held-out rows."),
    ] = None,
    base: BaseOption = None,
    only: Annotated[
        str | None,
        typer.Option("--only", metavar="A,B,...", help="Which checkpoints: checkpoint-N, N or final. Default: all."),
    ] = None,
    answers: Annotated[
        int, typer.Option(min=0, help="To how many rows the best ones answer, to compare lengths; 0 for none.")
    ] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Limit of every answer, in tokens.")] = 256,
    dtype: DtypeOption = "auto",
    records: RecordsOption = None,
    fresh: FreshOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score the base and every checkpoint on held-out rows, and say which one to take, and why.

    Ctrl-C stops; what is done is kept, and the same command goes on from there.

    Example: tunesmith checkpoints out/security --data held-out.jsonl
    """
    with progress_bar() as progress, stoppable() as cancellation:
        choice = ts.checkpoints(
            run,
            data,
            base=base,
            only=[name.strip() for name in only.split(",") if name.strip()] if only else None,
            answers=answers,
            max_new_tokens=max_new_tokens,
            dtype=dtype,
            records=records,
            fresh=fresh,
            progress=progress,
            cancellation=cancellation,
        )
    if as_json:
        print_json(choice)
        return
    screen = console()
    screen.print(_table(choice))
    screen.say()
    _curve(screen, choice)
    _reason(screen, choice)
    about = ts.text(f"choice.rows.{choice.rows_from}", rows=choice.rows, tokens=choice.tokens, dtype=choice.dtype)
    screen.say(f"{about}. {ts.text('choice.note')}" if choice.rows else about, style="dim")
    screen.say(ts.text("choice.note_distance"), style="dim")
    _next(screen, run, choice)


def _table(choice: ts.CheckpointChoice) -> Table:
    """The candidates; a column that would be empty is left out."""
    from rich.table import Table
    from rich.text import Text

    from tunesmith.cli.screen import clean

    columns = {
        "held-out loss": [_estimate(one.loss, signed=False) for one in choice.candidates],
        "to best": ["best" if one.name == choice.best else _estimate(one.to_best) for one in choice.candidates],
        "to base": [_estimate(one.to_base) for one in choice.candidates],
        "logged": [_NONE if one.logged_loss is None else f"{one.logged_loss:.3f}" for one in choice.candidates],
        "to last": [_NONE if one.to_last is None else f"{one.to_last:.2f}" for one in choice.candidates],
        "answers": [_NONE if one.answer_tokens is None else f"{one.answer_tokens:.0f}" for one in choice.candidates],
    }
    if choice.rows:
        del columns["logged"]
    shown = {title: cells for title, cells in columns.items() if set(cells) - {_NONE}}
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("checkpoint", no_wrap=True)
    for title in shown:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    for place, one in enumerate(choice.candidates):
        style = "bold green" if one.name == choice.recommended else "dim" if one.same_as else ""
        cells = [_NONE if one.same_as else column[place] for column in shown.values()]
        table.add_row(*(Text(cell) for cell in (clean(one.name), *cells)), _mark(choice, one), style=style)
    return table


def _estimate(estimate: Estimate | None, *, signed: bool = True) -> str:
    if estimate is None:
        return _NONE
    value = f"{estimate.value:{'+' if signed else ''}.3f}"
    return value if estimate.half is None else f"{value} ± {estimate.half:.3f}"


def _mark(choice: ts.CheckpointChoice, candidate: ts.Candidate) -> Text:
    from rich.text import Text

    from tunesmith.cli.screen import clean

    if candidate.same_as:
        return Text(f"= {clean(candidate.same_as)}")
    if candidate.name == choice.recommended:
        return Text("◀ take this")
    return Text("within noise" if candidate.like_best else "")


def _curve(screen: Screen, choice: ts.CheckpointChoice) -> None:
    """Held-out loss by step, in a few lines of text; two points at least, or there is nothing to see."""
    from rich.text import Text

    points = [(one.step, loss, one.name) for one in choice.candidates if (loss := _loss(one)) and one.step is not None]
    steps, losses = [step for step, _, _ in points], [loss for _, loss, _ in points]
    if len(set(steps)) < 2:
        return
    low, high, first, last = min(losses), max(losses), min(steps), max(steps)
    grid = [[" "] * (_CURVE_COLUMNS + 1) for _ in range(_CURVE_LINES)]
    for step, loss, name in points:
        row = round((high - loss) / ((high - low) or 1) * (_CURVE_LINES - 1))
        column = round((step - first) / (last - first) * _CURVE_COLUMNS)
        grid[row][column] = "◆" if name == choice.recommended else "•"
    labels = [f"{high:.3f}", *[""] * (_CURVE_LINES - 2), f"{low:.3f}"]
    screen.say("held-out loss by step" if choice.rows else "held-out loss by step, as logged", style="bold")
    for label, cells in zip(labels, grid, strict=True):
        line = Text(f"{label:>8} {'┤' if label else '│'} ", style="dim")
        for cell in cells:
            line.append(cell, style="bold green" if cell == "◆" else "not dim")
        screen.print(line)
    width = _CURVE_COLUMNS + 1 - len(str(first))
    screen.print(Text(f"{'':>8} └ {first}{last:>{width}}", style="dim"))
    screen.say()


def _loss(candidate: ts.Candidate) -> float | None:
    """What is drawn of a candidate: its scored loss, else the logged one, if that is a number; copies once."""
    loss = candidate.logged_loss if candidate.loss is None else candidate.loss.value
    return None if candidate.same_as or loss is None or not math.isfinite(loss) else loss


def _reason(screen: Screen, choice: ts.CheckpointChoice) -> None:
    """The recommendation, and what else is to be known."""
    screen.say(ts.finding_text(choice.reason), style=f"bold {_STYLES[choice.reason.severity]}")
    for finding in choice.findings:
        screen.say(ts.finding_text(finding), style="" if finding.severity == "ok" else _STYLES[finding.severity])
    screen.say()


def _next(screen: Screen, run: Path, choice: ts.CheckpointChoice) -> None:
    words: Sequence[object] = ("checkpoints", run, "--data", "FILE")
    if choice.rows and choice.recommended:
        shown = [name for name in ("base", choice.recommended, choice.last) if name]
        words = ("compare", run, "--variants", ",".join(dict.fromkeys(shown)))
    screen.say(f"Next: {command(*words)}", style="dim")
