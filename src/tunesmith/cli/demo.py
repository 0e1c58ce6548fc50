"""``tunesmith demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import tunesmith as ts
from tunesmith.cli.options import JsonOption
from tunesmith.cli.output import clean, console, print_json, progress_bar

if TYPE_CHECKING:
    from rich.console import Console


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The directory to make.")] = Path("tunesmith-demo"),
    force: Annotated[bool, typer.Option("--force", help="Run again where a demo was before.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Tune a small embedded model and go all the way to a proven merge and a report. Takes minutes, needs no GPU.

    Example: tunesmith demo --out my-demo
    """
    screen = console(stderr=True)
    with progress_bar() as progress:
        result = ts.demo(
            out,
            force=force,
            progress=progress,
            on_step=lambda step: screen.print(f"{step.seconds:6.1f} s  $ {step.command}", markup=False),
        )
    if as_json:
        print_json(result)
        return
    _render(console(), result)
    raise typer.Exit(0 if result.verdict.good else 3)


def _render(screen: Console, result: ts.DemoResult) -> None:
    comparison = result.comparison
    prompt = comparison.prompts[0]
    screen.print(f"\nQuestion: {prompt.question}", markup=False)
    for variant in comparison.variants:
        reply = comparison.reply(prompt.id, variant.name)
        screen.print(f"\n[bold]{variant.name}[/]")
        screen.print(clean(reply.text), markup=False)
    screen.print()
    for score in comparison.scores:
        change = f" ({score.difference:+.3f} against the base)" if score.difference is not None else ""
        screen.print(f"{score.variant}: held-out loss {score.loss:.3f}{change}", markup=False)
    screen.print(f"{ts.text(f'verdict.{result.verdict.answer}')}: {ts.verdict_sentence(result.verdict)}", markup=False)
    screen.print(f"\nReport: {result.report}", markup=False)
