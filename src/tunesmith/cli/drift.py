"""``tunesmith drift``, and the table that ``quantize --compare`` prints too."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import tunesmith as ts
from tunesmith.cli.options import BaseOption, CheckpointOption, DtypeOption, JsonOption, RunArgument, SeedOption
from tunesmith.cli.output import command, console, human_bytes, print_json, progress_bar, stoppable

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from tunesmith.cli.screen import Screen

_FORMATS = (".json", ".md", ".html")
_NONE = "·"
_STYLES = {"ok": "green", "info": "cyan", "warning": "yellow", "error": "red"}
_ONE_LINE_FROM = 150  # columns of a terminal; on a narrower one an interval stands below its figure


def drift(
    run: RunArgument,
    directories: Annotated[
        list[str],
        typer.Argument(metavar="DIR...", help="Merged or quantized models; NAME=DIR gives one a name of its own."),
    ],
    base: BaseOption = None,
    checkpoint: CheckpointOption = "final",
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="Rows with answers to measure. Default: the run's held-out rows."),
    ] = None,
    max_rows: Annotated[
        int, typer.Option("--max-rows", min=2, help="The most rows, and the most general texts, to measure on.")
    ] = 200,
    seed: SeedOption = 0,
    dtype: DtypeOption = "fp32",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Also write it: .json, .md or .html by the name.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what merging or quantizing did to a fine-tune: every model against the live adapter.

    KL and the share of the fine-tune's effect that is kept, with 95 % intervals, and which model to take. To compare
    schemes before a model is written: tunesmith quantize RUN --compare int8,int4:64

    Example: tunesmith drift out/security out/security-merged out/security-int4
    """
    if out is not None:
        out = ts.output_file(out, suffixes=_FORMATS)
    with progress_bar() as progress, stoppable() as cancellation:
        found = ts.drift(
            run,
            directories,
            base=base,
            checkpoint=checkpoint,
            data=data,
            max_rows=max_rows,
            seed=seed,
            dtype=dtype,
            progress=progress,
            cancellation=cancellation,
        )
    if out is not None:
        ts.write_drift(found, run, out)
    if as_json:
        print_json(found)
        return
    print_drift(console(), found)
    _next(console(), found, run=run, base=base)
    if out is not None:
        console().say(f"Written: {out}", style="dim")


def print_drift(screen: Screen, drift: ts.Drift) -> None:
    """Print a drift: the advice, the table, and what is to be known of its figures."""
    for finding in drift.findings:
        told = f"{ts.text(f'severity.{finding.severity}')}: {ts.finding_text(finding)}"
        screen.say(told, style=f"{'bold ' if finding.severity == 'ok' else ''}{_STYLES[finding.severity]}")
    screen.say()
    screen.print(_table(screen, drift))
    screen.say()
    notes = [
        ts.text(
            f"drift.note.rows.{drift.rows_from}",
            rows=drift.in_domain_rows,
            tokens=drift.in_domain_tokens,
            texts=drift.general_rows,
            general=drift.general_tokens,
            dtype=drift.dtype,
        ),
        ts.text("drift.note.figures"),
        ts.text(f"drift.note.intervals.{'several' if drift.comparisons > 1 else 'one'}", models=drift.comparisons),
        ts.text("drift.note.rule", kept=drift.kept_at_least, kl=drift.kl_at_most),
    ]
    for note in notes:
        screen.say(note, style="dim")


def _table(screen: Screen, drift: ts.Drift) -> Table:
    """A line a model, the base first; p99 and first choices on the answers, or on general texts where there are none.

    What stands for the answers is left out where there are none.
    """
    from rich.table import Table
    from rich.text import Text

    answers = drift.in_domain_rows > 0
    heads = ["model", "scheme", "size", "of_bf16", *(["kept", "kl_in"] if answers else []), "kl_out", "p99", "top1"]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for head in heads:
        table.add_column(
            Text(ts.text(f"drift.column.{head}")),
            justify="left" if head in ("model", "scheme") else "right",
            no_wrap=True,
            overflow="ellipsis",
        )
    narrow = screen.is_terminal and screen.width < _ONE_LINE_FROM
    for row in drift.rows:
        cells = _cells(row, drift, narrow=narrow)
        table.add_row(*(cells[head] for head in heads))
    return table


def _cells(row: ts.DriftRow, drift: ts.Drift, *, narrow: bool) -> dict[str, Text]:
    from rich.text import Text

    from tunesmith.cli.screen import clean

    first = row.in_domain or row.general
    taken = row.name == drift.recommended
    how = " ".join(filter(None, (row.model.scheme, row.model.rounding)))
    style = "bold green" if taken else "dim" if row.model.kind == "base" else ""
    return {
        "model": Text(clean(f"{'→ ' if taken else '  '}{row.name}"), style=style),
        "scheme": Text(clean(how)),
        "size": Text(human_bytes(row.model.size_bytes)),
        "of_bf16": Text(ts.text("unit.share.value", value=row.size_ratio)),
        "kl_in": _figure("nats", row.in_domain.kl if row.in_domain else None, narrow=narrow),
        "kl_out": _figure("nats", row.general.kl if row.general else None, narrow=narrow),
        "p99": _figure("nats", first.p99 if first else None, narrow=narrow),
        "top1": _figure("share", first.top1 if first else None, narrow=narrow),
        "kept": _figure("share", row.kept, narrow=narrow),
    }


def _figure(unit: str, estimate: ts.Estimate | None, *, narrow: bool) -> Text:
    """A figure and its interval, which stands below it on a narrow terminal."""
    from rich.text import Text

    if estimate is None:
        return Text(_NONE)
    value = Text(ts.text(f"unit.{unit}.value", value=estimate.value))
    if estimate.low is None or estimate.high is None:
        return value
    interval = ts.text(f"unit.{unit}.range", low=estimate.low, high=estimate.high)
    return Text.assemble(value, "\n" if narrow else " ", (f"({interval})", "dim"))


def _next(screen: Screen, drift: ts.Drift, *, run: Path, base: str | None) -> None:
    """The proof of the model to take; where there is none, other schemes to look at."""
    more = ["--base", base] if base else []
    row = drift.row(drift.recommended) if drift.recommended else None
    words: list[object] = ["quantize", run, "--compare", "int8,int4:64,int4:32", *more]
    if row is not None:
        words = ["verify", run, row.model.path, *more]
    screen.say(f"Next: {command(*words)}", style="dim")
