"""``tunesmith train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import tunesmith as ts
from tunesmith.cli.options import JsonOption
from tunesmith.cli.output import command, console, print_json, progress_bar


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="A recipe with LLaMA-Factory's keys.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys that replace the recipe's.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Tune a LoRA adapter and write its run directory.

    Example: tunesmith train recipe.yaml learning_rate=2e-4 output_dir=out/try2
    """
    with progress_bar() as progress:
        run = ts.train(recipe, overrides or (), progress=progress)
    if as_json:
        print_json(run)
        return
    screen = console()
    last = run.checkpoints[-1]
    screen.say(f"Run directory: {run.path}")
    if last.loss is not None:
        held_out = f", held-out loss {last.eval_loss:.3f}" if last.eval_loss is not None else ""
        screen.say(f"{last.step} steps, training loss {last.loss:.3f}{held_out}")
    screen.say(f"Next: {command('inspect', run.path)}", style="dim")
