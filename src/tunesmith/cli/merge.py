"""``tunesmith merge``."""

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
    CertificateOption,
    CheckpointOption,
    ExecutorOption,
    JsonOption,
    RunArgument,
    weighted_run,
)
from tunesmith.cli.output import command, console, human_bytes, print_json, progress_bar, say_retried

if TYPE_CHECKING:
    from tunesmith.cli.screen import Screen


def merge(
    run: RunArgument,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The directory to make, or an address to fill.")],
    base: BaseOption = None,
    checkpoint: CheckpointOption = "final",
    adapters: AdaptersOption = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", metavar="DTYPE", help="Store as auto (each tensor as in the base), bf16, fp16 or fp32."
        ),
    ] = "auto",
    rounding: Annotated[
        str,
        typer.Option(
            "--rounding",
            metavar="ROUNDING",
            help="auto, nearest, faithful, stochastic, calibrated or calibrated-free. Default: faithful where a "
            "low-rank update is stored in bf16, else nearest.",
        ),
    ] = "auto",
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="Rows for calibrated rounding. Default: text that the tuned model writes itself.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", help="Of stochastic rounding, and of the text that the tuned model writes.")
    ] = 0,
    shard_size: Annotated[
        str | None,
        typer.Option(
            "--shard-size", metavar="SIZE", help="Split the weights into files of at most this, such as 5GB or 500MB."
        ),
    ] = None,
    base_is_residual: BaseIsResidualOption = False,
    base_view: BaseViewOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace --out where it is not empty.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    record: Annotated[
        Path | None,
        typer.Option(
            "--record",
            metavar="FILE.json",
            help="Also write the merge's record, with the SHA-256 of every file of weights.",
        ),
    ] = None,
    certificate: CertificateOption = True,
    executor: ExecutorOption = None,
    as_json: JsonOption = False,
) -> None:
    """Merge an adapter into its base: summed in float64, rounded once, whole or not at all.

    RUN:WEIGHT multiplies the update; --adapter adds further ones to the same merge. A merge that was killed or ran out
    of space goes on where it was when the same command is given again. RUN, --base and --out may be addresses: s3://,
    gs:// or hf://.

    Example: tunesmith merge out/security --out out/security-merged
    """
    if record is not None:
        record = ts.output_file(record, suffixes=(".json",))
    first, weight = weighted_run(run)
    with progress_bar() as progress:
        plan = ts.plan_merge(
            first,
            out,
            base=base,
            checkpoint=checkpoint,
            adapters=[weighted_run(adapter) for adapter in adapters or ()],
            weight=weight,
            dtype=dtype,
            rounding=rounding,
            seed=seed,
            calibration=calibration,
            shard_size=shard_size,
            base_is_residual=base_is_residual,
            base_view=base_view,
            force=force,
            progress=progress,
        )
        merged = None
        if not dry_run:
            with ts.executor_of(executor) as pool:
                merged = ts.merge(
                    plan, executor=pool, certificate=certificate, sha256=record is not None, progress=progress
                )
            say_retried(merged.retried_units)
    if merged is not None and record is not None:
        merged.write(record)
    if as_json:
        print_json(merged or plan)
        return
    screen = console()
    _plan(screen, plan)
    if merged is None:
        _cost(screen, plan)
        screen.say("Nothing was written (--dry-run).")
        return
    _result(screen, merged)
    same = [
        *(("--base", base) if base else ()),
        *(("--checkpoint", checkpoint) if checkpoint != "final" else ()),
        *(word for adapter in adapters or () for word in ("--adapter", adapter)),
        *(("--base-is-residual",) if base_is_residual else ()),
        *(("--base-view", base_view) if base_view else ()),
    ]
    screen.say(f"Next: {command('verify', run, out, *same)}", style="dim")


def _plan(screen: Screen, plan: ts.MergePlan) -> None:
    shards = "1 shard" if len(plan.shards) == 1 else f"{len(plan.shards)} shards"
    for one in plan.adapters:
        screen.say(f"{one.checkpoint} of {one.run}" + (f", times {one.weight:g}" if one.weight != 1 else ""))
    screen.say(f"into {plan.base_model} -> {plan.out}")
    screen.say(f"{plan.changed} of {plan.tensors} tensors change, {shards}, {human_bytes(plan.write_bytes)} to write")
    for finding in plan.warnings:
        screen.say(f"{'note' if finding.severity == 'info' else finding.severity}: {ts.finding_text(finding)}")


def _cost(screen: Screen, plan: ts.MergePlan) -> None:
    free = human_bytes(plan.free_bytes) if plan.free_bytes is not None else "unknown"
    rounded = ", ".join(f"{name} for {count}" for name, count in sorted(plan.rounded.items()))
    screen.say(f"rounding: {rounded or plan.rounding} of the changed tensors")
    screen.say(f"disk: {human_bytes(plan.write_bytes)} needed, {free} free")
    screen.say(f"memory: about {human_bytes(plan.memory_bytes)} for each unit of work")
    screen.say(f"time: about {plan.seconds:.0f} s on two cores, where the disk keeps up")
    if plan.rounding.startswith("calibrated"):
        screen.say("before that, the live model is loaded in float32, and its text and inputs take minutes and disk")


def _result(screen: Screen, merged: ts.Merged) -> None:
    if merged.resumed_bytes:
        screen.say(
            f"An earlier merge had written {human_bytes(merged.resumed_bytes)} of it; that was checked and kept."
        )
    plan, kept, nearest = merged.plan, merged.kept, merged.nearest
    screen.say(
        f"Merged in {merged.seconds:.1f} s. {plan.rounding.capitalize()} rounding to {plan.dtype} kept {kept.gain:.1%} "
        f"of the update and left {kept.share_unchanged:.0%} of the adapted weights as they were."
    )
    if plan.rounding != "nearest":
        screen.say(f"Rounding to nearest would have kept {nearest.gain:.1%}, and left {nearest.share_unchanged:.0%}.")
    for finding in merged.findings:
        screen.say(f"{'note' if finding.severity == 'info' else finding.severity}: {ts.finding_text(finding)}")
