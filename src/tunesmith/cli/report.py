"""``tunesmith report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import tunesmith as ts
from tunesmith.cli.options import BaseOption, CheckpointOption, DtypeOption, JsonOption, RunArgument
from tunesmith.cli.output import console, print_json, progress_bar


def report(
    run: RunArgument,
    merged: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="The merged model.")] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE.html", help="The report.")] = Path("report.html"),
    base: BaseOption = None,
    checkpoint: CheckpointOption = "final",
    choice: Annotated[
        Path | None, typer.Option("--choice", metavar="FILE.json", help="What checkpoints --json printed.")
    ] = None,
    comparison: Annotated[
        Path | None,
        typer.Option("--comparison", metavar="FILE.json", help="What compare --out wrote. Default: compare now."),
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option("--evaluation", metavar="FILE.json", help="What evaluate --out wrote.")
    ] = None,
    drift: Annotated[Path | None, typer.Option("--drift", metavar="FILE.json", help="What drift --out wrote.")] = None,
    verdict: Annotated[
        Path | None,
        typer.Option("--verdict", metavar="FILE.json", help="What verify --out wrote. Default: verify now, given DIR."),
    ] = None,
    merge_record: Annotated[
        Path | None, typer.Option("--merge-record", metavar="FILE.json", help="What merge --record wrote.")
    ] = None,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Write one self-contained HTML report: verdict, effect, run, merge, proof; Chinese and English in one file.

    Example: tunesmith report out/security out/security-merged --out report.html
    """
    with progress_bar() as progress:
        result = ts.report(
            run,
            out,
            merged=merged,
            base=base,
            checkpoint=checkpoint,
            choice=choice,
            comparison=comparison,
            evaluation=evaluation,
            drift=drift,
            verdict=verdict,
            merge_record=merge_record,
            dtype=dtype,
            progress=progress,
        )
    if as_json:
        print_json(result)
    else:
        console().say(f"Report: {result.path}")
