"""``tunesmith verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import tunesmith as ts
from tunesmith.cli.options import BaseOption, CheckpointOption, JsonOption, RunArgument
from tunesmith.cli.output import clean, console, print_json, progress_bar

if TYPE_CHECKING:
    from rich.console import Console

_EXIT_CODES = {"identical": 0, "equal_within_rounding": 0, "different": 3, "not_verified": 2}
_STYLES = {"identical": "bold green", "equal_within_rounding": "bold green", "different": "bold red"}
_STATUS = {"pass": "pass", "warn": "warn", "fail": "FAIL", "skipped": "skipped"}


def verify(
    run: RunArgument,
    merged: Annotated[Path, typer.Argument(metavar="DIR", help="The merged model, by whatever tool.")],
    base: BaseOption = None,
    checkpoint: CheckpointOption = "final",
    level: Annotated[
        list[str] | None,
        typer.Option("--level", help="structure, assets, weights or behaviour; repeat for several. Default: all."),
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

    Example: tunesmith verify out/security out/security-merged
    """
    with progress_bar() as progress:
        verdict = ts.verify(
            run, merged, base=base, checkpoint=checkpoint, prompts=prompts, dtype=dtype, progress=progress, levels=level
        )
    if out is not None:
        verdict.write(out)
    if as_json:
        print_json(verdict)
    else:
        _render(console(), verdict)
    raise typer.Exit(_EXIT_CODES[verdict.answer])


def _render(screen: Console, verdict: ts.Verdict) -> None:
    from rich.text import Text

    banner = Text(ts.text(f"verdict.{verdict.answer}"), style=_STYLES.get(verdict.answer, "bold yellow"))
    banner.append(f"  {clean(verdict.merged)} against {verdict.checkpoint} of {clean(verdict.run)}", style="default")
    screen.print(banner)
    screen.print(clean(ts.verdict_sentence(verdict)), markup=False)
    for level in verdict.levels:
        screen.print(f"\n[bold]{level.name}[/]  {_STATUS[level.status]}  [dim]{level.seconds:.1f} s[/]")
        for finding in level.findings:
            screen.print(f"  {clean(ts.finding_text(finding))}", markup=False)
