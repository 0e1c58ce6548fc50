"""``tunesmith train``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import tunesmith as ts
from tunesmith.cli.options import JsonOption
from tunesmith.cli.output import aside, command, console, human_bytes, print_json, progress_bar, stoppable

if TYPE_CHECKING:
    from tunesmith.cli.screen import Screen

_BAR = "█"
_BAR_COLUMNS = 36
_STYLES = {"ok": "green", "info": "cyan", "warning": "yellow", "error": "red"}
_LONGEST_EXAMPLE = 4000  # characters


def train(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A YAML file with LLaMA-Factory's keys, or a run made from one.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys that replace the recipe's.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint, after Ctrl-C, a crash or a full disk.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Tell what will happen: rows, lengths, steps, memory, time, the first example."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Tune a LoRA adapter and write its run directory.

    Recipes of LLaMA-Factory run unchanged; every key is used, harmless (and said), or refused. Ctrl-C writes a
    checkpoint first and says how to go on.

    Example: tunesmith train recipe.yaml learning_rate=2e-4 output_dir=out/try2
    """
    if dry_run and resume:
        raise ts.TunesmithError(
            "--dry-run tells of a training from its first step, and so --resume would change nothing.",
            next_step="leave one of them out",
        )
    if dry_run:
        with progress_bar() as progress, stoppable() as cancellation:
            plan = ts.plan_training(recipe, overrides or (), progress=progress, cancellation=cancellation)
        if not _is_first():
            return
        if as_json:
            print_json(plan)
        else:
            _show_plan(console(), plan, [str(recipe), *(overrides or ())])
        return
    with progress_bar() as progress, stoppable() as cancellation:
        run = ts.train(recipe, overrides or (), resume=resume, told=aside, progress=progress, cancellation=cancellation)
    if not _is_first():
        return
    if as_json:
        print_json(run)
        return
    _show_run(console(), run)


def _is_first() -> bool:
    """Whether this is the process that speaks, of several that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def _show_run(screen: Screen, run: ts.Run) -> None:
    last = run.checkpoints[-1]
    screen.say(f"Run directory: {run.path}")
    if last.loss is not None:
        held_out = f", held-out loss {last.eval_loss:.3f}" if last.eval_loss is not None else ""
        screen.say(f"{last.step} steps, training loss {last.loss:.3f}{held_out}")
    screen.say(f"Next: {command('inspect', run.path)}", style="dim")


def _show_plan(screen: Screen, plan: ts.TrainingPlan, words: list[str]) -> None:
    screen.say(f"{plan.base_model}, {plan.dtype} on {plan.device} → {plan.output_dir}", style="bold")
    if plan.dtype_note:
        screen.say(plan.dtype_note, style="yellow")
    _show_rows(screen, plan)
    _show_cost(screen, plan)
    _show_keys(screen, plan)
    _show_example(screen, plan)
    screen.say()
    screen.say(f"Begin: {command('train', *words)}", style="dim")


def _show_rows(screen: Screen, plan: ts.TrainingPlan) -> None:
    lengths = plan.lengths
    screen.say()
    screen.say(f"Rows: {plan.train_rows} to train on, {plan.held_out_rows} held out")
    for finding in plan.findings:
        screen.say(f"• {ts.finding_text(finding, 'en')}", style=_STYLES[finding.severity], indent=2)
    screen.say(
        f"Tokens a row: {lengths.shortest} to {lengths.longest}, half of them up to {lengths.median}, "
        f"95 % up to {lengths.p95}; cutoff_len {plan.cutoff_len} cuts {plan.cut_rows} "
        f"({plan.cut_rows / max(1, sum(lengths.counts)):.1%})"
    )
    most, width = max(lengths.counts), len(str(lengths.edges[-1]))
    for left, right, count in zip(lengths.edges, lengths.edges[1:], lengths.counts, strict=False):
        bar = _BAR * max(round(_BAR_COLUMNS * count / most), 1 if count else 0)
        screen.say(f"{left:>{width}}–{right - 1:<{width}} {bar} {count}", indent=2)
    share = plan.supervised_tokens / max(1, plan.tokens)
    screen.say(f"Supervised: {plan.supervised_tokens:,} of {plan.tokens:,} tokens ({share:.0%})")


def _show_cost(screen: Screen, plan: ts.TrainingPlan) -> None:
    if plan.packs is not None:
        screen.say(f"Packed into {_counted(plan.packs, 'row')} of up to {plan.cutoff_len} tokens")
    passes = "1 pass" if plan.epochs == 1 else f"{plan.epochs:.3g} passes"
    shares = f" ({plan.processes} processes × {plan.rows_a_batch} × {plan.accumulated} accumulated)"
    screen.say(
        f"Steps: {plan.steps:,} of {_counted(plan.rows_a_step, 'row')}{shares if plan.processes > 1 else ''}, "
        f"{passes} over the rows"
    )
    if plan.memory is None:
        screen.say("Memory and time: not known before it runs; this architecture's layers look at values")
        return
    memory = plan.memory
    free = f", of {human_bytes(memory.free_bytes)} free" if memory.free_bytes is not None else ""
    each = " for each process" if plan.processes > 1 else ""
    screen.say(
        f"Memory{each}: about {human_bytes(memory.total_bytes)}{free} (weights {human_bytes(memory.weights_bytes)}, "
        f"adapter and optimizer {human_bytes(memory.adapter_bytes)}, "
        f"activations {human_bytes(memory.activations_bytes)}"
        f"{', gradient checkpointing saves some' if plan.gradient_checkpointing else ''}); "
        f"{plan.trained_parameters:,} numbers are trained"
    )
    if memory.free_bytes is not None and memory.total_bytes > memory.free_bytes:
        screen.say("This will not fit: take fewer rows a step, a lower cutoff_len, or a smaller base.", style="red")
    screen.say(f"Time: {_duration(plan.seconds)}")


def _show_keys(screen: Screen, plan: ts.TrainingPlan) -> None:
    used = [use for use in plan.keys if use.use == "used"]
    harmless = [use for use in plan.keys if use.use == "harmless"]
    screen.say()
    screen.say(f"Keys that are used: {', '.join(use.key for use in used)}")
    for use in used:
        if use.note:
            screen.say(f"{use.key}: {use.value}  {use.note}", style="dim", indent=2)
    if harmless:
        screen.say("Keys that change nothing here:")
    for use in harmless:
        screen.say(f"{use.key}: {use.value}  {use.note}", style="dim", indent=2)


def _show_example(screen: Screen, plan: ts.TrainingPlan) -> None:
    from rich.text import Text

    from tunesmith.cli.screen import clean

    screen.say()
    screen.say("The first row; what counts in the loss is marked:")
    # Where there are no colours, as in a pipe, the marks are letters.
    has_colours = screen.color_system is not None and not screen.no_color
    marked = Text()
    for piece in plan.example:
        text = clean(piece.text) if has_colours or not piece.supervised else f"⟦{clean(piece.text)}⟧"
        marked.append(text, style="black on green" if piece.supervised else "dim")
    marked.rstrip()
    marked.truncate(_LONGEST_EXAMPLE, overflow="ellipsis")
    screen.print(marked)


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "not known: this device's speed has not been measured"
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
