"""``tunesmith evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import tunesmith as ts
from tunesmith.cli.options import (
    AskingExecutorOption,
    BaseOption,
    DtypeOption,
    EndpointsOption,
    FreshOption,
    JsonOption,
    ModelsOption,
    ParallelOption,
    RecordsOption,
    RunArgument,
    SeedOption,
)
from tunesmith.cli.output import command, console, print_json, progress_bar, stoppable

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from tunesmith.cli.screen import Screen
    from tunesmith.compare.evaluation_records import Section

_FORMATS = (".json", ".md", ".html")
_BASE = "base"
_NONE = "·"
_SECTIONS: tuple[Section, ...] = ("effect", "damage", "memorisation")
_EFFECT = tuple(f"evaluation_{name}" for name in ("helped", "hurt", "no_difference", "effect_unknown"))
_STYLES = {"ok": "green", "info": "cyan", "warning": "yellow", "error": "red"}
_VERDICTS = {
    "better": ("▲", "bold green"),
    "worse": ("▼", "bold red"),
    "different": ("◆", "cyan"),
    "no_difference": ("≈", "dim"),
    "unknown": ("?", "dim"),
}
_LONGEST_NAME = 20  # columns that a variant's name may take from the figures on a terminal
_ONE_LINE_FROM = 112  # columns of a terminal; on a narrower one an interval stands below its difference


def evaluate(
    run: RunArgument,
    variants: Annotated[
        str | None,
        typer.Option(
            "--variants",
            metavar="A,B,...",
            help="base, final, checkpoint-N, or the directory of another adapter or of a merged model (NAME=DIR). "
            "Default: base and every checkpoint, of which the best one and the last one are reported.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="Rows with answers to measure. Default: the run's held-out rows."),
    ] = None,
    base: BaseOption = None,
    training: Annotated[
        Path | None,
        typer.Option(
            "--training", metavar="FILE", help="The rows that were trained on. Default: those that the run names."
        ),
    ] = None,
    scorers: Annotated[
        list[str] | None,
        typer.Option(
            "--scorer",
            metavar="MODULE:FUNCTION",
            help="A further judge, function(prompt, reply, expected) -> float, more is better. Repeat for several.",
        ),
    ] = None,
    answers: Annotated[int, typer.Option(min=0, help="To how many rows replies are written; 0 for none.")] = 50,
    tasks: Annotated[
        int, typer.Option(min=0, help="To how many general tasks of each language replies are written; 20 at most.")
    ] = 8,
    general: Annotated[
        bool, typer.Option("--general/--no-general", help="Whether to measure general texts and tasks too.")
    ] = True,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Limit of every reply, in tokens.")] = 256,
    seed: SeedOption = 0,
    dtype: DtypeOption = "auto",
    endpoint: EndpointsOption = None,
    models: ModelsOption = None,
    parallel: ParallelOption = 8,
    executor: AskingExecutorOption = None,
    records: RecordsOption = None,
    fresh: FreshOption = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Also write it: .json, .md or .html by the name.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what a fine-tune did: did it help, what did it break, what did it learn by heart.

    Every difference to the base is taken row by row and has a 95 % interval. Ctrl-C stops; what is done is kept, and
    the same command goes on from there.

    Example: tunesmith evaluate out/security --out evaluation.html
    """
    if out is not None:
        out = ts.output_file(out, suffixes=_FORMATS)
    with progress_bar() as progress, stoppable() as cancellation, ts.executor_of(executor) as pool:
        evaluation = ts.evaluate(
            run,
            [name.strip() for name in variants.split(",") if name.strip()] if variants else None,
            data,
            base=base,
            training=training,
            scorers=scorers or (),
            answers=answers,
            tasks=tasks,
            general=general,
            max_new_tokens=max_new_tokens,
            seed=seed,
            dtype=dtype,
            endpoint=endpoint,
            models=models or (),
            parallel=parallel,
            executor=pool,
            records=records,
            fresh=fresh,
            progress=progress,
            cancellation=cancellation,
        )
    if out is not None:
        ts.write_evaluation(evaluation, run, out)
    if as_json:
        print_json(evaluation)
        return
    show_evaluation(console(), evaluation)
    _next(console(), evaluation, run=run, base=base)
    if out is not None:
        console().say(f"Written: {out}", style="dim")


def show_evaluation(screen: Screen, evaluation: ts.Evaluation) -> None:
    """Print the answer in sentences, a table a section, and what is to be known of the figures."""
    answers = [finding for finding in evaluation.findings if finding.code.startswith("evaluation_")]
    for finding in sorted(answers, key=lambda finding: finding.code not in _EFFECT):
        told = f"{ts.text(f'severity.{finding.severity}')}: {ts.finding_text(finding)}"
        screen.say(told, style=f"{'bold ' if finding.code in _EFFECT else ''}{_STYLES[finding.severity]}")
    screen.say()
    for section in _SECTIONS:
        measures = evaluation.of_section(section)
        if measures:
            screen.say(ts.text(f"evaluation.section.{section}"), style="bold")
            screen.print(_table(screen, evaluation, measures))
            screen.say()
    _notes(screen, evaluation)


def _notes(screen: Screen, evaluation: ts.Evaluation) -> None:
    """What is to be known of the figures: the rows, the intervals, chance, and who answered."""
    told = ts.text(
        f"evaluation.rows.{evaluation.rows_from}",
        rows=evaluation.rows,
        answered=evaluation.answered,
        limit=evaluation.settings.max_new_tokens,
        where=evaluation.engine.dtype or evaluation.engine.where,
    )
    screen.say(told, style="dim")
    if evaluation.differences:
        several = "several" if evaluation.comparisons > 1 else "one"
        told = ts.text(f"evaluation.note.intervals.{several}", variants=evaluation.comparisons)
        screen.say(f"{told} {ts.text('evaluation.note.chance', differences=evaluation.differences)}", style="dim")
    for finding in evaluation.findings:
        if not finding.code.startswith("evaluation_"):
            screen.say(f"{ts.text(f'severity.{finding.severity}')}: {ts.finding_text(finding)}", style="dim")


def _table(screen: Screen, evaluation: ts.Evaluation, measures: tuple[ts.Measure, ...]) -> Table:
    """A line for every measure and variant but the base, which stands beside each."""
    from rich.table import Table
    from rich.text import Text

    from tunesmith.cli.screen import clean

    names = {variant.name for variant in evaluation.variants}
    several, beside = len(names - {_BASE}) > 1, _BASE in names and len(names) > 1
    narrow = screen.is_terminal and screen.width < _ONE_LINE_FROM
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    heads = ["measure", *(["variant"] if several else []), *(["base"] if beside else []), "value"]
    heads += ["difference"] if narrow else ["difference", "interval", "verdict"]
    for head in [*heads, "rows"]:
        left = head in ("measure", "variant", "verdict") or (narrow and head == "difference")
        named = clean(_only(names)) if head == "value" and not several else _head(head)
        table.add_column(
            Text(named),
            justify="left" if left else "right",
            no_wrap=head != "measure",
            overflow="ellipsis",
            max_width=_LONGEST_NAME if screen.is_terminal and head in ("variant", "value") else None,
        )
    for measure in measures:
        base = measure.figure(_BASE)
        figures = [figure for figure in measure.figures if figure.variant != _BASE] or list(measure.figures)
        for figure in figures:
            cells = _cells(measure, base if beside else None, figure, narrow=narrow)
            table.add_row(*(cells[head] for head in heads), Text(f"{measure.rows:,}"))
    return table


def _only(names: set[str]) -> str:
    """The one variant that is not the base, or the base alone."""
    return next(iter(names - {_BASE}), _BASE)


def _head(name: str) -> str:
    return "95 % interval" if name == "interval" else ts.text(f"evaluation.column.{name}")


def _cells(measure: ts.Measure, base: ts.Figure | None, figure: ts.Figure, *, narrow: bool) -> dict[str, Text]:
    """One line of a table, by column."""
    from rich.text import Text

    from tunesmith.cli.screen import clean

    unit, change = f"unit.{measure.unit}", figure.difference
    interval = _interval(unit, figure)
    mark, style = _VERDICTS[figure.verdict] if figure.verdict else ("", "")
    verdict = Text(f"{mark} {ts.text(f'evaluation.{figure.verdict}')}" if figure.verdict else _NONE, style=style)
    difference = Text(ts.text(f"{unit}.change", value=change.value) if change else _NONE)
    if narrow:
        difference = Text.assemble(difference, "  ", verdict) if change else difference
        if interval != _NONE:
            difference = Text.assemble(difference, "\n", (f"({interval})", "dim"))
    return {
        "measure": Text(clean(_name(measure))),
        "variant": Text(clean(figure.variant)),
        "base": Text(ts.text(f"{unit}.value", value=base.value.value) if base else _NONE),
        "value": Text(ts.text(f"{unit}.value", value=figure.value.value)),
        "difference": difference,
        "interval": Text(interval),
        "verdict": verdict,
    }


def _interval(unit: str, figure: ts.Figure) -> str:
    """The interval of the difference, or that of the value where no difference is taken."""
    estimate, form = (figure.difference, "interval") if figure.difference else (figure.value, "range")
    if estimate.low is None or estimate.high is None:
        return _NONE
    return ts.text(f"{unit}.{form}", low=estimate.low, high=estimate.high)


def _name(measure: ts.Measure) -> str:
    if measure.unit == "score":  # a scorer's, which has a name of its own
        return measure.name
    name = ts.text(f"measure.{measure.name}")
    return ts.text("measure.of", name=name, about=ts.text(f"measure.of.{measure.about}")) if measure.about else name


def _next(screen: Screen, evaluation: ts.Evaluation, *, run: Path, base: str | None) -> None:
    codes = {finding.code for finding in evaluation.findings}
    more = ["--base", base] if base else []
    shown = evaluation.chosen or next((info.name for info in evaluation.variants if info.name != _BASE), None)
    words: list[object] = ["compare", run, "--variants", f"{_BASE},{shown}", *more]
    if "evaluation_hurt" in codes:
        words = ["checkpoints", run, *more]
    elif shown is None or {"evaluation_no_difference", "evaluation_effect_unknown"} & codes:
        words = ["evaluate", run, "--data", "FILE", *more]
    screen.say(f"Next: {command(*words)}", style="dim")
