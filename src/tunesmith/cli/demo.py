"""``tunesmith demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import tunesmith as ts
from tunesmith.cli.options import JsonOption
from tunesmith.cli.output import command, console, print_json, progress_bar

if TYPE_CHECKING:
    from tunesmith.cli.screen import Screen


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
            on_step=lambda step: screen.say(f"{step.seconds:6.1f} s  $ {step.command}"),
        )
    if as_json:
        print_json(result)
    else:
        _render(console(), result)
    raise typer.Exit(0 if result.verdict.good else 3)


def _render(screen: Screen, result: ts.DemoResult) -> None:
    comparison = result.comparison
    prompt = comparison.prompts[0]
    screen.say(f"\nQuestion: {prompt.question}")
    for variant in comparison.variants:
        screen.say(f"\n{variant.name}", style="bold")
        screen.say(comparison.reply(prompt.id, variant.name).text)
    screen.say()
    for score in comparison.scores:
        change = f" ({score.difference:+.3f} against the base)" if score.difference is not None else ""
        screen.say(f"{score.variant}: held-out loss {score.loss:.3f}{change}")
    screen.say(f"{ts.text(f'verdict.{result.verdict.answer}')}: {ts.verdict_sentence(result.verdict)}")
    screen.say(f"\nReport: {result.report}")
    screen.say(f"Next: {command('checkpoints', Path(result.path) / 'run')}", style="dim")
