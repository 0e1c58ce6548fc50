"""``tunesmith merge``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import tunesmith as ts
from tunesmith.cli.options import BaseOption, CheckpointOption, JsonOption, RunArgument
from tunesmith.cli.output import command, console, human_bytes, print_json, progress_bar

if TYPE_CHECKING:
    from tunesmith.cli.screen import Screen


def merge(
    run: RunArgument,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The directory to make.")],
    base: BaseOption = None,
    checkpoint: CheckpointOption = "final",
    force: Annotated[bool, typer.Option("--force", help="Replace --out where it is not empty.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    record: Annotated[
        Path | None, typer.Option("--record", metavar="FILE.json", help="Also write the merge's record.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Merge an adapter into its base: summed in float64, rounded once, whole or not at all.

    Example: tunesmith merge out/security --out out/security-merged
    """
    if record is not None:
        ts.output_file(record, suffixes=(".json",))
    with progress_bar() as progress:
        plan = ts.plan_merge(run, out, base=base, checkpoint=checkpoint, force=force, progress=progress)
        merged = None if dry_run else ts.merge(plan, progress=progress)
    if merged is not None and record is not None:
        merged.write(record)
    if as_json:
        print_json(merged or plan)
        return
    screen = console()
    _plan(screen, plan)
    if merged is None:
        screen.say("Nothing was written (--dry-run).")
        return
    screen.say(
        f"Merged in {merged.seconds:.1f} s. Rounding to {plan.dtype} left {merged.share_unchanged:.0%} of the adapted "
        f"weights as they were and kept {merged.gain:.1%} of the update."
    )
    same = [*(("--base", base) if base else ()), *(("--checkpoint", checkpoint) if checkpoint != "final" else ())]
    screen.say(f"Next: {command('verify', run, out, *same)}", style="dim")


def _plan(screen: Screen, plan: ts.MergePlan) -> None:
    changed = sum(len(shard.updates) for shard in plan.shards)
    tensors = sum(shard.tensors for shard in plan.shards)
    shards = "1 shard" if len(plan.shards) == 1 else f"{len(plan.shards)} shards"
    screen.say(f"{plan.checkpoint} of {plan.run}")
    screen.say(f"into {plan.base_model} -> {plan.out}")
    screen.say(f"{changed} of {tensors} tensors change, {shards}, {human_bytes(plan.write_bytes)} to write")
    for finding in plan.warnings:
        screen.say(f"warning: {ts.finding_text(finding)}")
