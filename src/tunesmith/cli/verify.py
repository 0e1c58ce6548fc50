"""``tunesmith verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import tunesmith as ts
from tunesmith.cli.options import (
    AdaptersOption,
    BaseIsResidualOption,
    BaseOption,
    BaseViewOption,
    CheckpointOption,
    JsonOption,
    RunArgument,
    weighted_run,
)
from tunesmith.cli.output import console, print_json, progress_bar

if TYPE_CHECKING:
    from tunesmith.cli.screen import Screen

_EXIT_CODES = {"identical": 0, "equal_within_rounding": 0, "different": 3, "not_verified": 2}
_STYLES = {"identical": "bold green", "equal_within_rounding": "bold green", "different": "bold red"}
_STATUS = {"pass": "pass", "warn": "warn", "fail": "FAIL", "skipped": "skipped"}


def verify(
    run: RunArgument,
    merged: Annotated[Path, typer.Argument(metavar="DIR", help="The merged model, by whatever tool.")],
    base: BaseOption = None,
    checkpoint: CheckpointOption = "final",
    adapters: AdaptersOption = None,
    base_is_residual: BaseIsResidualOption = False,
    base_view: BaseViewOption = None,
    level: Annotated[
        list[str] | None,
        typer.Option(
            "--level",
            metavar="LEVEL",
            help="structure, assets, weights or behaviour; repeat for several. Default: all.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="Prompts for the behaviour level.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option("--dtype", metavar="DTYPE", help="Dtype of the behaviour level: fp32, or auto (measured)."),
    ] = "fp32",
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.json", help="Also write the verdict.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Prove that a merged model is its base plus the adapter, or say why it is not (exit 3).

    A merge of several adapters is proved with the same RUN:WEIGHT and --adapter that it was made with.

    Example: tunesmith verify out/security out/security-merged
    """
    if out is not None:
        ts.output_file(out, suffixes=(".json",))
    run, weight = weighted_run(run)
    with progress_bar() as progress:
        verdict = ts.verify(
            run,
            merged,
            base=base,
            checkpoint=checkpoint,
            adapters=[weighted_run(adapter) for adapter in adapters or ()],
            weight=weight,
            base_is_residual=base_is_residual,
            base_view=base_view,
            prompts=prompts,
            dtype=dtype,
            progress=progress,
            levels=level,
        )
    if out is not None:
        verdict.write(out)
    if as_json:
        print_json(verdict)
    else:
        _render(console(), verdict)
    raise typer.Exit(_EXIT_CODES[verdict.answer])


def _render(screen: Screen, verdict: ts.Verdict) -> None:
    from rich.text import Text

    from tunesmith.cli.screen import clean

    banner = Text(ts.text(f"verdict.{verdict.answer}"), style=_STYLES.get(verdict.answer, "bold yellow"))
    banner.append(clean(f"  {verdict.merged} against {verdict.checkpoint} of {verdict.run}"), style="default")
    screen.print(banner)
    screen.say(ts.verdict_sentence(verdict))
    for level in verdict.levels:
        heading = Text(level.name, style="bold").append(f"  {_STATUS[level.status]}", style="not bold")
        screen.print(Text("\n") + heading.append(f"  {level.seconds:.1f} s", style="not bold dim"))
        for finding in level.findings:
            screen.say(ts.finding_text(finding), indent=2)
