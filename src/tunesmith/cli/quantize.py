"""``tunesmith quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import tunesmith as ts
from tunesmith.cli.options import (
    BaseOption,
    BaseViewOption,
    CertificateOption,
    CheckpointOption,
    ExecutorOption,
    JsonOption,
    SeedOption,
)
from tunesmith.cli.output import command, console, human_bytes, print_json, progress_bar, say_retried, stoppable

if TYPE_CHECKING:
    from tunesmith.cli.screen import Screen


def quantize(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="A run, whose base and adapter are rounded once; or a whole model."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The directory to make. Not with --compare.")
    ] = None,
    scheme: Annotated[
        str,
        typer.Option(
            "--scheme",
            metavar="SCHEME",
            help="int8, int4 (a scale for 128 columns), int4:64, int4:32, w8a8 (activations too) or fp8.",
        ),
    ] = "int4",
    base: BaseOption = None,
    checkpoint: CheckpointOption = "final",
    rounding: Annotated[
        str,
        typer.Option(
            "--rounding",
            metavar="ROUNDING",
            help="auto, nearest, faithful (no data) or calibrated. Default: faithful.",
        ),
    ] = "auto",
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="Rows for calibrated rounding. Default: text that the model writes itself.",
        ),
    ] = None,
    seed: SeedOption = 0,
    shard_size: Annotated[
        str | None,
        typer.Option(
            "--shard-size", metavar="SIZE", help="Split the weights into files of at most this, such as 5GB or 500MB."
        ),
    ] = None,
    base_view: BaseViewOption = None,
    compare: Annotated[
        str | None,
        typer.Option(
            "--compare",
            metavar="SCHEMES",
            help="Make these schemes one after the other, such as int8,int4:64, print what each keeps of the "
            "fine-tune, and leave no model.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="Rows to compare on. Default: the run's held-out rows."),
    ] = None,
    max_rows: Annotated[
        int, typer.Option("--max-rows", min=2, help="The most rows, and the most general texts, to compare on.")
    ] = 200,
    force: Annotated[bool, typer.Option("--force", help="Replace --out where it is not empty.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    certificate: CertificateOption = True,
    executor: ExecutorOption = None,
    as_json: JsonOption = False,
) -> None:
    """Quantize a fine-tune to a directory that transformers, vLLM and SGLang load: base and adapter in one rounding.

    Example: tunesmith quantize out/security --out out/security-int4 --scheme int4:64
    """
    if compare is not None:
        if out is not None or dry_run:
            raise typer.BadParameter("--compare writes no model: leave --out and --dry-run out.")
        if executor is not None:
            raise typer.BadParameter("--compare runs on this machine: leave --executor out.")
        if base_view is not None:
            raise typer.BadParameter(
                "--compare measures against the adapter on the base as it is stored: leave --base-view out."
            )
        with progress_bar() as progress, stoppable() as cancellation:
            drift = ts.compare_schemes(
                source,
                [word.strip() for word in compare.split(",") if word.strip()],
                base=base,
                checkpoint=checkpoint,
                roundings=(rounding,),
                calibration=calibration,
                data=data,
                max_rows=max_rows,
                seed=seed,
                progress=progress,
                cancellation=cancellation,
            )
        _drift(drift, as_json=as_json)
        return
    if out is None:
        raise typer.BadParameter("Name the directory to make with --out, or schemes with --compare.")
    with progress_bar() as progress, stoppable() as cancellation:
        plan = ts.plan_quantization(
            source,
            out,
            scheme=scheme,
            base=base,
            checkpoint=checkpoint,
            rounding=rounding,
            calibration=calibration,
            seed=seed,
            shard_size=shard_size,
            base_view=base_view,
            force=force,
            progress=progress,
        )
        done = None
        if not dry_run:
            with ts.executor_of(executor) as pool:
                done = ts.quantize(
                    plan, executor=pool, certificate=certificate, progress=progress, cancellation=cancellation
                )
            say_retried(done.retried_units)
    if as_json:
        print_json(done or plan)
        return
    screen = console()
    _plan(screen, plan)
    if done is None:
        _cost(screen, plan)
        screen.say("Nothing was written (--dry-run).")
        return
    _result(screen, done)
    if plan.adapters:
        same = [
            *(("--base", base) if base else ()),
            *(("--checkpoint", checkpoint) if checkpoint != "final" else ()),
        ]
        seen = ("--base-view", base_view) if base_view else ()
        screen.say(f"Next: {command('verify', source, out, *same, *seen)}", style="dim")
        screen.say(f"      {command('drift', source, out, *same)}", style="dim")
    screen.say(f"      vllm serve {out}", style="dim")


def _drift(drift: ts.Drift, *, as_json: bool) -> None:
    from tunesmith.cli.drift import print_drift

    if as_json:
        print_json(drift)
    else:
        print_drift(console(), drift)


def _plan(screen: Screen, plan: ts.QuantizationPlan) -> None:
    for one in plan.adapters:
        screen.say(f"{one.checkpoint} of {one.run}")
    screen.say(f"{'into ' if plan.adapters else ''}{plan.base_model} -> {plan.out}")
    screen.say(
        f"{plan.scheme}, {plan.rounding}: {len(plan.quantized)} of {plan.tensors} tensors, "
        f"{human_bytes(plan.read_bytes)} become {human_bytes(plan.write_bytes)}"
    )
    for finding in plan.warnings:
        screen.say(f"{'note' if finding.severity == 'info' else finding.severity}: {ts.finding_text(finding)}")


def _cost(screen: Screen, plan: ts.QuantizationPlan) -> None:
    free = human_bytes(plan.free_bytes) if plan.free_bytes is not None else "unknown"
    screen.say(f"kept as they are: {', '.join(plan.ignore)}")
    screen.say(f"disk: {human_bytes(plan.write_bytes)} needed, {free} free")
    screen.say(f"memory: about {human_bytes(plan.memory_bytes)} for each tensor at work")
    screen.say(f"time: about {plan.seconds:.0f} s on two cores, where the disk keeps up")
    if plan.rounding == "calibrated":
        screen.say("before that, the live model is loaded in float32, and its text and inputs take minutes and disk")


def _result(screen: Screen, done: ts.Quantized) -> None:
    rounded = ", ".join(f"{name} for {count}" for name, count in sorted(done.rounded.items()))
    screen.say(
        f"Quantized in {done.seconds:.1f} s to {human_bytes(done.size_bytes)}. Weights are off by "
        f"{done.relative_error:.1%} of their size; rounding: {rounded}."
    )
    for finding in done.findings:
        screen.say(f"{'note' if finding.severity == 'info' else finding.severity}: {ts.finding_text(finding)}")
