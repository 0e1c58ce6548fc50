"""``tunesmith inspect``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import tunesmith as ts
from tunesmith.cli.options import BaseOption, JsonOption, RunArgument
from tunesmith.cli.output import command, console, human_bytes, print_json, progress_bar

if TYPE_CHECKING:
    from rich.table import Table

    from tunesmith.cli.screen import Screen

_BARS = "▁▂▃▄▅▆▇█"
_MARKS = {
    "ok": ("ok", "green"),
    "info": ("note", "cyan"),
    "warning": ("warning", "yellow"),
    "error": ("problem", "red"),
}
_PURPOSES = ("inference", "resuming", "record", "unknown")
_SHOWN_CHECKPOINTS = 12
_SETTINGS = (
    "learning_rate", "lr_scheduler_type", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "total_train_batch_size", "processes", "dataset", "template", "cutoff_len",
    "max_length", "seed", "compute_dtype", "iters",
)  # fmt: skip


def inspect(
    run: RunArgument,
    base: BaseOption = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", metavar="NAME", help="Which adapter to describe. Default: the last.")
    ] = None,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Measure every module of a large adapter, and hash the base's weights.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write all of it as one HTML file.")
    ] = None,
    cleanup: Annotated[
        bool, typer.Option("--cleanup", help="Only list the files that could be deleted, and what that frees.")
    ] = False,
    apply: Annotated[
        bool, typer.Option("--apply", help="With --cleanup: delete them, after you have said yes.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --apply: do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a fine-tune left behind: files, adapter, training, checkpoints, health.

    Nothing is unpickled, and nothing is changed without --apply.  With --cleanup it says which files serve nothing but
    resuming.

    Example: tunesmith inspect out/security
    """
    if cleanup or apply:
        from tunesmith.cli.cleanup import cleanup as list_or_delete

        list_or_delete(run, apply=apply, yes=yes, as_json=as_json)
        return
    with progress_bar() as progress:
        inspection = ts.inspect(run, base=base, checkpoint=checkpoint, thorough=thorough, progress=progress)
    if html is not None:
        ts.write_inspection(inspection, html)
    if as_json:
        print_json(inspection)
        return
    screen = console()
    _facts(screen, inspection)
    _log(screen, inspection.run)
    if inspection.adapter:
        _modules(screen, inspection.adapter)
    _checkpoints(screen, inspection.run)
    _files(screen, inspection.run)
    _health(screen, inspection, html)


def _facts(screen: Screen, inspection: ts.Inspection) -> None:
    run = inspection.run
    mark = f", as {run.writer_mark} tells" if run.writer_mark else ""
    rows = [
        ("run", f"{run.name}  ({ts.text(f'kind.{run.kind}')}, written by {ts.text(f'writer.{run.writer}')}{mark})"),
        ("base model", f"{run.base_model or 'not recorded'}  ({_base_state(inspection)})"),
        *(_adapter_rows(inspection.adapter, inspection.checkpoint) if inspection.adapter else []),
    ]
    if inspection.forecast is not None:
        rows.append(("merge", _forecast(inspection.forecast)))
    if inspection.adapter and inspection.adapter.refusal:
        rows.append(("not mergeable", inspection.adapter.refusal))
    settings = {setting.name: setting for setting in run.settings}
    shown = [f"{name} = {settings[name].value}" for name in _SETTINGS if name in settings]
    if shown:
        rows.append(("training", ", ".join(shown)))
    speeds = [row.tokens_per_s for row in run.log if row.tokens_per_s]
    if speeds:
        rows.append(("speed", f"{speeds[-1]:,.0f} tokens/s"))  # the mean since the start, as LLaMA-Factory logs it
    _print_pairs(screen, rows)


def _base_state(inspection: ts.Inspection) -> str:
    state = "at hand" if inspection.base else "not at hand"
    if inspection.base_sha256:
        return f"{state}, weights' sha256 {inspection.base_sha256[:12]}"
    recorded = inspection.run.base_sha256
    unchecked = inspection.base and recorded
    return f"{state}, recorded sha256 {recorded[:12]}, --thorough compares" if unchecked and recorded else state


def _adapter_rows(adapter: ts.AdapterFacts, checkpoint: str) -> list[tuple[str, str]]:
    size = f"{adapter.parameters:,} numbers, {adapter.dtype}, {human_bytes(adapter.size_bytes)}"
    whose = "" if adapter.format == "peft" else f" ({adapter.format})"
    rows = [("adapter", f"{checkpoint}: {adapter.peft_type}{whose}, {size}")]
    if adapter.r is not None and adapter.scaling is not None:
        kind = "alpha / sqrt(r)" if adapter.use_rslora else "alpha / r"
        alpha = "" if adapter.lora_alpha is None else f", alpha = {adapter.lora_alpha:g}"
        how = f" ({kind})" if alpha else ""
        rows.append(("rank", f"r = {adapter.r}{alpha}, scaling = {adapter.scaling:g}{how}"))
    if adapter.relative_update is not None:
        rows.append(("size of update", f"about {adapter.relative_update:.2%} of the base weights (Frobenius norm)"))
    return rows


def _forecast(forecast: ts.Forecast) -> str:
    seen = f"(foretold from {forecast.elements:,} numbers of {forecast.tensors} tensors)"
    nearest = f"rounding to nearest would keep about {forecast.nearest.gain:.1%} of the update"
    if forecast.rounding == "nearest":
        return f"into {forecast.dtype}: {nearest} {seen}"
    return f"into {forecast.dtype}: {forecast.rounding} rounding keeps about {forecast.kept.gain:.1%}; {nearest} {seen}"


def _log(screen: Screen, run: ts.Run) -> None:
    series = (
        ("training loss", [(row.step, row.loss) for row in run.log if row.loss is not None]),
        ("held-out loss", [(row.step, row.eval_loss) for row in run.log if row.eval_loss is not None]),
    )
    table = _table()
    for label, points in series:
        finite = [(step, loss) for step, loss in points if math.isfinite(loss)]
        if finite:
            (first, before), (last, after) = finite[0], finite[-1]
            span = f"{before:.3f} -> {after:.3f}  (step {first:,} to {last:,})"
            table.add_row(label, _spark([loss for _, loss in finite]), span)
    if table.rows:
        screen.say("\nLoss", style="bold")
        screen.print(table)


def _spark(values: Sequence[float], width: int = 48) -> str:
    step = max(1, math.ceil(len(values) / width))
    means = [sum(values[i : i + step]) / len(values[i : i + step]) for i in range(0, len(values), step)]
    low, high = min(means), max(means)
    return "".join(_BARS[round((value - low) / ((high - low) or 1) * (len(_BARS) - 1))] for value in means)


def _modules(screen: Screen, adapter: ts.AdapterFacts) -> None:
    """How far each kind of module moved, layer by layer, and how many directions it uses."""
    from tunesmith.cli.screen import clean

    kinds = adapter.by_kind()
    relative = any(kind.relative for kind in kinds)
    size = ">|update| / |W|" if relative else ">|update|"
    table = _table("kind", ">modules", size, "by layer, first to last", ">effective rank")
    for kind in kinds:
        spread = kind.relative if relative else kind.delta_norm
        table.add_row(
            clean(kind.name),
            str(len(kind.modules)),
            "-" if spread is None else f"{spread[1]:.2%}" if relative else f"{spread[1]:.3g}",
            _strip(kind, adapter, relative=relative),
            "-" if kind.effective_rank is None else f"{kind.effective_rank:.1f} of {kind.r}",
        )
    if kinds:
        screen.say(f"\nAdapter: {len(adapter.modules)} modules", style="bold")
        screen.print(table)
        if adapter.measured < len(adapter.modules):
            screen.say(f"  {adapter.measured} modules measured; --thorough measures all of them.", style="dim")


def _strip(kind: ts.KindFacts, adapter: ts.AdapterFacts, *, relative: bool, width: int = 40) -> str:
    """One bar a module, on one scale for the whole adapter; a dot where it was not measured."""

    def sizes(modules: Sequence[ts.ModuleFacts]) -> list[float | None]:
        return [module.relative_update if relative else module.delta_norm for module in modules]

    highest = max((size for size in sizes(adapter.modules) if size is not None), default=0.0) or 1.0
    step = max(1, math.ceil(len(kind.modules) / width))
    parts = [kind.modules[start : start + step] for start in range(0, len(kind.modules), step)]
    groups = [[size for size in sizes(part) if size is not None] for part in parts]
    return "".join(
        _BARS[min(len(_BARS) - 1, int(max(group) / highest * len(_BARS)))] if group else "·" for group in groups
    )


def _checkpoints(screen: Screen, run: ts.Run) -> None:
    screen.say("\nCheckpoints", style="bold")
    table = _table("name", ">step", ">training loss", ">held-out loss", "")
    points = list(run.checkpoints)
    shown = points
    if len(points) > _SHOWN_CHECKPOINTS:
        half = _SHOWN_CHECKPOINTS // 2
        shown = [*points[:half], *(one for one in points[half:-half] if one.is_best), *points[-half:]]
    for point in shown:
        table.add_row(
            point.name,
            "-" if point.step is None else f"{point.step:,}",
            "-" if point.loss is None else f"{point.loss:.3f}",
            "-" if point.eval_loss is None else f"{point.eval_loss:.3f}",
            "best, says the trainer" if point.is_best else "",
        )
    screen.print(table)
    if len(shown) < len(points):
        screen.say(f"  … and {len(points) - len(shown)} more", style="dim")


def _files(screen: Screen, run: ts.Run) -> None:
    from rich.text import Text

    from tunesmith.cli.screen import clean

    screen.say(f"\nFiles: {len(run.files):,}, {human_bytes(sum(file.size_bytes for file in run.files))}", style="bold")
    table = _table()
    for purpose in _PURPOSES:
        files = [file for file in run.files if file.needed_for == purpose]
        if not files:
            continue
        total = human_bytes(sum(file.size_bytes for file in files))
        table.add_row(
            Text(ts.text(f"needed.{purpose}"), style="bold"), Text(total, style="bold"), f"{len(files):,} files"
        )
        for file in files:
            if "/" not in file.path:
                what = ts.text(f"file.{file.kind}").partition(". ")[0].removesuffix(".")
                table.add_row(f"  {clean(file.path)}", human_bytes(file.size_bytes), Text(what, style="dim"))
        inside = [file for file in files if "/" in file.path]
        if inside:
            size = human_bytes(sum(file.size_bytes for file in inside))
            table.add_row(f"  in {_folders(inside)}", size, Text(f"{len(inside):,} files", style="dim"))
    screen.print(table)
    if any(file.needed_for == "resuming" for file in run.files):
        screen.say(f"  {command('inspect', run.path, '--cleanup')} lists what could be deleted.", style="dim")


def _folders(files: Sequence[ts.RunFile]) -> str:
    from tunesmith.cli.screen import clean

    names = list(dict.fromkeys(file.path.partition("/")[0] for file in files))
    return f"{clean(names[0])}/" if len(names) == 1 else f"{len(names)} folders"


def _health(screen: Screen, inspection: ts.Inspection, html: Path | None) -> None:
    from rich.text import Text

    from tunesmith.cli.screen import clean

    screen.say("\nHealth", style="bold")
    if not any(finding.severity != "ok" for finding in inspection.health):
        screen.say("  Nothing looks unhealthy.", style="green")
    table = _table()
    for finding in inspection.health:
        mark, style = _MARKS[finding.severity]
        table.add_row(Text(mark, style=style), clean(ts.finding_text(finding)))
    if table.rows:
        screen.print(table)
    screen.say()
    if html is not None:
        screen.say(f"Written: {html}")
    if inspection.adapter and not inspection.adapter.refusal:
        several = len(inspection.run.checkpoints) > 1
        screen.say(f"Next: {command('checkpoints' if several else 'compare', inspection.run.path)}", style="dim")


def _print_pairs(screen: Screen, rows: Sequence[tuple[str, str]]) -> None:
    from rich.table import Table

    from tunesmith.cli.screen import clean

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(label, clean(value))
    screen.print(table)


def _table(*columns: str) -> Table:
    """A table without lines, moved to the right; with column heads where there are any, ``>`` for figures."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2), show_header=bool(columns), header_style="dim", pad_edge=True)
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    return table
