"""``tunesmith merge``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import tunesmith as ts
from tunesmith.cli.options import BaseOption, CheckpointOption, JsonOption, RunArgument
from tunesmith.cli.output import clean, console, human_bytes, print_json, progress_bar

if TYPE_CHECKING:
    from rich.console import Console


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
        screen.print("Nothing was written (--dry-run).")
        return
    screen.print(
        f"Merged in {merged.seconds:.1f} s. Rounding to {plan.dtype} left {merged.share_unchanged:.0%} of the adapted "
        f"weights as they were and kept {merged.gain:.1%} of the update.",
        markup=False,
    )
    screen.print(f"Next: tunesmith verify {run} {out}", style="dim", markup=False)


def _plan(screen: Console, plan: ts.MergePlan) -> None:
    changed = sum(len(shard.updates) for shard in plan.shards)
    tensors = sum(shard.tensors for shard in plan.shards)
    screen.print(f"{plan.checkpoint} of {clean(plan.run)}", markup=False)
    screen.print(f"into {clean(plan.base_model)} -> {clean(plan.out)}", markup=False)
    screen.print(
        f"{changed} of {tensors} tensors change, {len(plan.shards)} shard(s), {human_bytes(plan.write_bytes)} to write"
    )
    for finding in plan.warnings:
        screen.print(f"warning: {clean(ts.finding_text(finding))}", markup=False)
