"""``tunesmith inspect``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

import tunesmith as ts
from tunesmith.cli.options import BaseOption, JsonOption, RunArgument
from tunesmith.cli.output import command, console, human_bytes, print_json

if TYPE_CHECKING:
    from tunesmith.cli.screen import Screen

_BARS = "▁▂▃▄▅▆▇█"
_MARKS = {"ok": "ok", "info": "note", "warning": "warning", "error": "problem"}


def inspect(
    run: RunArgument,
    base: BaseOption = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", metavar="NAME", help="Which adapter to describe. Default: the last.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a fine-tune left behind: files, adapter, training, checkpoints, health.

    Example: tunesmith inspect out/security
    """
    inspection = ts.inspect(run, base=base, checkpoint=checkpoint)
    if as_json:
        print_json(inspection)
        return
    screen = console()
    _facts(screen, inspection)
    _log(screen, inspection.run)
    _checkpoints(screen, inspection.run)
    _files(screen, inspection.run)
    _findings(screen, inspection)


def _facts(screen: Screen, inspection: ts.Inspection) -> None:
    from rich.table import Table

    from tunesmith.cli.screen import clean

    run, adapter = inspection.run, inspection.adapter
    at_hand = "at hand" if inspection.base else "not at hand"
    rows = [
        ("run", f"{run.name}  (written by {run.writer})"),
        ("base model", f"{run.base_model or 'not recorded'}  ({at_hand})"),
        (
            "adapter",
            f"{inspection.checkpoint}: {adapter.peft_type}, {adapter.dtype}, {human_bytes(adapter.size_bytes)}",
        ),
    ]
    if adapter.r is not None and adapter.scaling is not None:
        kind = "alpha / sqrt(r)" if adapter.use_rslora else "alpha / r"
        rows.append(
            ("rank", f"r = {adapter.r}, alpha = {adapter.lora_alpha:g}, scaling = {adapter.scaling:g} ({kind})")
        )
    rows.append(("modules", f"{len(adapter.modules)}: {', '.join(adapter.target_modules)}"))
    rows.append(("parameters", f"{adapter.parameters:,}"))
    if adapter.relative_update is not None:
        rows.append(("size of update", f"about {adapter.relative_update:.2%} of the base weights (Frobenius norm)"))
    if inspection.forecast is not None:
        rows.append(("merge", _forecast(inspection.forecast)))
    if adapter.refusal:
        rows.append(("not mergeable", adapter.refusal))
    for key in ("learning_rate", "num_train_epochs", "max_steps", "seed", "compute_dtype"):
        if key in run.hyperparameters:
            rows.append((key, str(run.hyperparameters[key])))
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(label, clean(value))
    screen.print(table)


def _forecast(forecast: ts.Forecast) -> str:
    seen = f"(foretold from {forecast.elements:,} numbers of {forecast.tensors} tensors)"
    nearest = f"rounding to nearest would keep about {forecast.nearest.gain:.1%} of the update"
    if forecast.rounding == "nearest":
        return f"into {forecast.dtype}: {nearest} {seen}"
    return f"into {forecast.dtype}: {forecast.rounding} rounding keeps about {forecast.kept.gain:.1%}; {nearest} {seen}"


def _log(screen: Screen, run: ts.Run) -> None:
    from rich.text import Text

    for label, values in (
        ("training loss", [row.loss for row in run.log if row.loss is not None]),
        ("held-out loss", [row.eval_loss for row in run.log if row.eval_loss is not None]),
    ):
        finite = [value for value in values if math.isfinite(value)]
        if finite:
            line = Text(f"\n{label}", style="bold")
            screen.print(line.append(f"  {_spark(finite)}  {finite[0]:.3f} -> {finite[-1]:.3f}", style="not bold"))


def _spark(values: list[float], width: int = 60) -> str:
    step = max(1, math.ceil(len(values) / width))
    means = [sum(values[i : i + step]) / len(values[i : i + step]) for i in range(0, len(values), step)]
    low, high = min(means), max(means)
    return "".join(_BARS[round((value - low) / ((high - low) or 1) * (len(_BARS) - 1))] for value in means)


def _checkpoints(screen: Screen, run: ts.Run) -> None:
    from rich.table import Table

    from tunesmith.cli.screen import clean

    table = Table(title="Checkpoints", title_justify="left", title_style="bold", box=None, padding=(0, 2))
    for column in ("name", "step", "training loss", "held-out loss", ""):
        table.add_column(column, justify="left" if column in ("name", "") else "right")
    for checkpoint in run.checkpoints:
        table.add_row(
            clean(checkpoint.name),
            "-" if checkpoint.step is None else str(checkpoint.step),
            "-" if checkpoint.loss is None else f"{checkpoint.loss:.3f}",
            "-" if checkpoint.eval_loss is None else f"{checkpoint.eval_loss:.3f}",
            "best (recorded)" if checkpoint.is_best else "",
        )
    screen.say()
    screen.print(table)


def _files(screen: Screen, run: ts.Run) -> None:
    from rich.table import Table
    from rich.text import Text

    from tunesmith.cli.screen import clean

    table = Table.grid(padding=(0, 2))
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim", ratio=1)
    for needed in ("inference", "resuming", "record", "unknown"):
        files = [file for file in run.files if file.needed_for == needed and not _in_checkpoint(file.path)]
        if files:
            table.add_row(Text(f"\nFiles {ts.text(f'needed.{needed}')}", style="bold"))
        for file in files:
            what = ts.text(f"file.{file.kind}").partition(". ")[0].removesuffix(".")
            table.add_row(f"  {clean(file.path)}", human_bytes(file.size_bytes), what)
    screen.print(table)
    inside = [file for file in run.files if _in_checkpoint(file.path)]
    screen.say()
    if inside:
        size = sum(file.size_bytes for file in inside)
        resuming = sum(file.size_bytes for file in inside if file.needed_for == "resuming")
        screen.say(
            f"{len(inside)} more files in checkpoint-N directories: {human_bytes(size)}, "
            f"of which {human_bytes(resuming)} only to resume training"
        )
    screen.say(f"{human_bytes(sum(file.size_bytes for file in run.files))} in all")


def _in_checkpoint(path: str) -> bool:
    return path.startswith("checkpoint-") and "/" in path


def _findings(screen: Screen, inspection: ts.Inspection) -> None:
    screen.say()
    if not inspection.run.findings:
        screen.say("Nothing looks unhealthy.")
    for finding in inspection.run.findings:
        screen.say(f"{_MARKS[finding.severity]}: {ts.finding_text(finding)}")
    if not inspection.adapter.refusal:
        screen.say(f"Next: {command('compare', inspection.run.path)}", style="dim")
