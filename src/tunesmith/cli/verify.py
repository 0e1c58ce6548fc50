"""``tunesmith verify``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

import tunesmith as ts
from tunesmith.cli.gguf import BaseGgufOption, verify_file
from tunesmith.cli.options import (
    AdaptersOption,
    BaseIsResidualOption,
    BaseOption,
    BaseViewOption,
    CertificateOption,
    CheckpointOption,
    ExecutorOption,
    JsonOption,
    weighted_run,
)
from tunesmith.cli.output import command, console, human_bytes, print_json, progress_bar, say_retried

if TYPE_CHECKING:
    from rich.text import Text

    from tunesmith.cli.screen import Screen
    from tunesmith.progress import ProgressCallback

_GOOD = ("identical", "equal_within_rounding", "equal_within_quantization")
_EXIT_CODES = {**dict.fromkeys(_GOOD, 0), "different": 3, "not_verified": 2}
_STYLES = {**dict.fromkeys(_GOOD, "bold green"), "different": "bold red"}
_STATUS = {"pass": "pass", "warn": "warn", "fail": "FAIL", "skipped": "skipped"}
_STATUS_STYLES = {"pass": "not bold green", "warn": "not bold yellow", "fail": "bold red", "skipped": "not bold dim"}
_MARKS = {"ok": ("✓", "green"), "info": ("·", "dim"), "warning": ("!", "bold yellow"), "error": ("✗", "bold red")}
_PLAIN_MARKS = {"✓": "+", "·": "-", "✗": "x"}
_SHOWN_LINES = 3
_GGUF = ".gguf"


def verify(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN",
            help="A run directory, one of its checkpoint-N directories, or an adapter directory. Without it DIR is "
            "held against its own certificate.",
            show_default=False,
        ),
    ] = None,
    merged: Annotated[
        Path | None,
        typer.Argument(
            metavar="DIR",
            help="The merged or quantized model, by whatever tool; or FILE.gguf, with the model's directory as RUN.",
            show_default=False,
        ),
    ] = None,
    merged_dir: Annotated[
        Path | None,
        typer.Option("--merged", metavar="DIR", help="The merged model by name; the first --adapter may then be RUN."),
    ] = None,
    base: BaseOption = None,
    checkpoint: CheckpointOption = "final",
    adapters: AdaptersOption = None,
    base_is_residual: BaseIsResidualOption = False,
    base_view: BaseViewOption = None,
    level: Annotated[
        list[str] | None,
        typer.Option(
            "--level",
            metavar="LEVEL",
            help="structure, assets, weights or behaviour; repeat for several. Default: all.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="Prompts for the behaviour level.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option("--dtype", metavar="DTYPE", help="Dtype of the behaviour level: fp32, or auto (measured)."),
    ] = "fp32",
    sample: Annotated[
        bool, typer.Option("--sample", help="Look at some rows of each tensor only: quick, and never a proof.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.json", help="Also write the verdict.")] = None,
    certificate: CertificateOption = True,
    executor: ExecutorOption = None,
    base_gguf: BaseGgufOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the verdict's line alone.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Prove that a merged model is its base plus the adapter, or say why it is not (exit 3).

    A merge of several adapters is proved with the same RUN:WEIGHT and --adapter that it was made with. RUN and DIR may
    be named instead: --adapter RUN --merged DIR.

    A GGUF file is held against the model's directory it was made from; an adapter's against its run.

    DIR alone is hashed, and held against the certificate in it: is it still what was verified? That takes neither RUN
    nor the base.

    RUN, DIR and --base may be addresses (s3://, gs://, hf://), of which structure, small files and weights are proved.

    Example: tunesmith verify out/security out/security-merged
    """
    if out is not None:
        out = ts.output_file(out, suffixes=(".json",))
    named = _names(run, merged, merged_dir, adapters or ())
    if named.merged.suffix == _GGUF:
        other = {
            "--adapter": bool(adapters),
            "--base-is-residual": base_is_residual,
            "--base-view": base_view is not None,
            "--prompts": prompts is not None,
            "--dtype": dtype != "fp32",
            "--sample": sample,
            "--executor": executor is not None,
        }
        _refuse_for_gguf(named, [name for name, given in other.items() if given])
        verify_file(
            named.run or Path(),
            named.merged,
            base=base,
            checkpoint=checkpoint,
            base_gguf=base_gguf,
            levels=level,
            out=out,
            quiet=quiet,
            as_json=as_json,
        )
    if base_gguf is not None:
        raise ts.TunesmithError(
            "These options have a meaning for a GGUF file only.", where="--base-gguf", expected="RUN FILE.gguf"
        )
    if named.run is None:
        proof = {
            "--base": base is not None,
            "--checkpoint": checkpoint != "final",
            "--base-is-residual": base_is_residual,
            "--base-view": base_view is not None,
            "--level": bool(level),
            "--sample": sample,
            "--prompts": prompts is not None,
            "--executor": executor is not None,
        }
        _recheck(named.merged, [name for name, given in proof.items() if given], out=out, quiet=quiet, as_json=as_json)
    with _progress(quiet=quiet) as progress, ts.executor_of(executor) as pool:
        verdict = ts.verify(
            named.run,
            named.merged,
            base=base,
            checkpoint=checkpoint,
            adapters=named.adapters,
            weight=named.weight,
            base_is_residual=base_is_residual,
            base_view=base_view,
            prompts=prompts,
            dtype=dtype,
            sample=sample,
            certificate=certificate,
            executor=pool,
            progress=progress,
            levels=level,
        )
    say_retried(verdict.retried_units)
    if out is not None:
        verdict.write(out)
    if as_json:
        print_json(verdict)
    elif quiet:
        _banner(console(), verdict.answer, f"{verdict.merged} against {verdict.checkpoint} of {verdict.run}")
    else:
        screen = console()
        _render(screen, verdict)
        if verdict.certificate is not None:
            screen.say()
            _point(screen, *_MARKS[verdict.certificate.severity], ts.finding_text(verdict.certificate))
    raise typer.Exit(_EXIT_CODES[verdict.answer])


@dataclass(frozen=True)
class _Named:
    """What is to be verified; without a run, the directory alone."""

    run: Path | None
    weight: float
    merged: Path
    adapters: list[tuple[Path, float]]


def _refuse_for_gguf(named: _Named, options: Sequence[str]) -> None:
    """What has no meaning for a GGUF file, and a file without what it is held against."""
    if named.run is None:
        raise ts.TunesmithError(
            "It takes a run and a merged model.",
            expected="DIR FILE.gguf, the model's directory first; for an adapter the run",
            next_step=command("verify", "DIR", named.merged),
        )
    if options:
        raise ts.TunesmithError("These options have no meaning for a GGUF file.", where=", ".join(options))


def _names(run: Path | None, merged: Path | None, merged_dir: Path | None, adapters: Sequence[str]) -> _Named:
    """Which of the names is the run's, and which the merged model's."""
    further = [weighted_run(adapter) for adapter in adapters]
    if merged_dir is None and merged is None and run is not None and not further:
        return _Named(None, 1.0, run, [])
    if merged is not None and merged_dir is not None:
        raise ts.TunesmithError("The merged model is named twice.", found=f"{merged} and --merged {merged_dir}")
    target = merged or merged_dir
    if run is None and further:
        first, weight = further.pop(0)
    elif run is not None:
        first, weight = weighted_run(run)
    else:
        first = None
    if target is None or first is None:
        raise ts.TunesmithError(
            "It takes a run and a merged model.",
            expected="RUN DIR, or --adapter RUN --merged DIR, or a DIR with a certificate alone",
            next_step=command("verify", "RUN" if first is None else first, target or run or "DIR"),
        )
    return _Named(first, weight, target, further)


@contextmanager
def _progress(*, quiet: bool) -> Iterator[ProgressCallback]:
    if quiet:
        yield lambda _: None
        return
    with progress_bar() as progress:
        yield progress


def _recheck(directory: Path, proof: Sequence[str], *, out: Path | None, quiet: bool, as_json: bool) -> NoReturn:
    """Hold a directory against its certificate, and end."""
    if proof:
        raise ts.TunesmithError(
            "A directory's certificate is asked without further options.",
            where=", ".join(proof),
            expected="a run to hold it against",
            next_step=command("verify", "RUN", directory, *proof[:1], "..."),
        )
    with _progress(quiet=quiet) as progress:
        found = ts.recheck(directory, progress=progress)
    if out is not None:
        found.write(out)
    if as_json:
        print_json(found)
    else:
        screen = console()
        _banner(screen, found.answer, f"{found.directory} against its certificate")
        if not quiet:
            _render_recheck(screen, found, directory)
    raise typer.Exit(_EXIT_CODES[found.answer])


def _render_recheck(screen: Screen, found: ts.Recheck, directory: Path) -> None:
    counted = f"{found.files} files, {human_bytes(found.size_bytes)}"
    made_of = " plus ".join([found.base_model, *(f"{one.checkpoint} of {one.run}" for one in found.adapters)])
    if found.answer == "different":
        screen.say("This is not what the certificate speaks of.")
    elif found.certified is None:
        screen.say(f"All files are those that were merged of {made_of} ({counted}). Nobody has verified them yet.")
        run = found.adapters[0].run if found.adapters else "RUN"
        screen.say(f"Next: {command('verify', 'RUN', directory)}, where RUN is the directory of {run}", style="dim")
    else:
        screen.say(f"All files are those that were verified to be {made_of} ({counted}).")
    for what, names in (("changed", found.changed), ("missing", found.missing), ("added", found.added)):
        for name in names:
            screen.say(f"{what}: {name}", indent=2)
    if found.beside:
        screen.say(f"Not in the certificate, and read by no loader: {', '.join(found.beside)}")


def _banner(screen: Screen, answer: str, about: str) -> None:
    from rich.text import Text

    from tunesmith.cli.screen import clean

    banner = Text(ts.text(f"verdict.{answer}"), style=_STYLES.get(answer, "bold yellow"))
    screen.print(banner.append(clean(f"  {about}"), style="default"))


def _render(screen: Screen, verdict: ts.Verdict) -> None:
    """The verdict and why, every level with its evidence, and the causes with how to mend them."""
    from rich.text import Text

    _banner(screen, verdict.answer, f"{verdict.merged} against {verdict.checkpoint} of {verdict.run}")
    screen.print(_prose(screen, ts.verdict_sentence(verdict)))
    evidence = {"weights": _worst_tensors(verdict), "behaviour": _partings(verdict)}
    for level in verdict.levels:
        heading = Text(level.name, style="bold").append(
            f"  {_STATUS[level.status]}", style=_STATUS_STYLES[level.status]
        )
        seconds = f"  {level.seconds:.1f} s" if level.status != "skipped" or level.findings else ""
        screen.print(Text("\n") + heading.append(seconds, style="not bold dim"))
        for finding in level.findings:
            _point(screen, *_MARKS[finding.severity], ts.finding_text(finding))
        for line in evidence.get(level.name, ()):
            _point(screen, " ", "", line)
    if verdict.causes:
        screen.print(Text("\nWhy, and how to mend it", style="bold"))
        for number, cause in enumerate(verdict.causes, 1):
            _point(screen, f"{number}.", "bold", ts.finding_text(cause))


def _worst_tensors(verdict: ts.Verdict) -> list[str]:
    """The tensors with the most that nothing explains, a line each."""
    bad = sorted((tensor for tensor in verdict.tensors if tensor.outside), key=lambda tensor: -tensor.outside)
    lines = [f"`{one.name}`: {one.outside:,} of {one.elements:,} unexplained" for one in bad[:_SHOWN_LINES]]
    if verdict.quantized and not bad:
        return _coarsest_tensors(verdict)
    return lines if len(bad) <= _SHOWN_LINES else [*lines, f"... and {len(bad) - _SHOWN_LINES:,} more"]


def _coarsest_tensors(verdict: ts.Verdict) -> list[str]:
    """The quantized tensors that lost most, a line each."""
    worst = sorted(verdict.quantized, key=lambda tensor: -(tensor.relative_error or 0.0))[:_SHOWN_LINES]
    return [
        f"`{one.name}` ({one.scheme}): relative error {one.relative_error or 0.0:.1%}"
        + (f", update {one.gain:.2f} ± {one.gain_error or 0.0:.2f}" if one.gain is not None else "")
        for one in worst
    ]


def _partings(verdict: ts.Verdict) -> list[str]:
    """Where greedy texts part, a line each: both candidates, with what adapter and merged model give to them."""
    rows = sorted((row for row in verdict.behaviour if row.divergence is not None), key=lambda row: row.tie)
    lines = []
    for row in rows[:_SHOWN_LINES]:
        parted = row.divergence
        if parted is not None and row.first_difference is not None:
            ours, theirs = parted.adapter_probabilities, parted.merged_probabilities
            lines.append(
                f"{row.prompt_id}, token {row.first_difference + 1}: {parted.adapter_choice!r} or "
                f"{parted.merged_choice!r}? Adapter {ours[0]:.1%} to {ours[1]:.1%}, merged {theirs[0]:.1%} to "
                f"{theirs[1]:.1%}: {'a tie' if row.tie else 'not a tie'}"
            )
    return lines


def _point(screen: Screen, mark: str, style: str, text: str) -> None:
    """One paragraph with a mark before it; on a terminal its lines stay to the right of the mark."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    if not screen.encoding.startswith("utf"):
        mark = _PLAIN_MARKS.get(mark, mark)
    if not screen.is_terminal:
        screen.print(Text(f"  {mark} ") + _prose(screen, text))
        return
    row = Table.grid(padding=(0, 1, 0, 0))
    row.add_row(Text(mark, style=style), _prose(screen, text))
    screen.print(Padding(row, (0, 0, 0, 2)))


def _prose(screen: Screen, text: str) -> Text:
    """A text of ours; what it quotes in backquotes is shown by its looks on a terminal that has any."""
    from rich.text import Text

    from tunesmith.cli.screen import clean

    if not screen.is_terminal or screen.no_color:
        return Text(clean(text))
    pieces = clean(text).split("`")
    return Text.assemble(*((piece, "cyan" if place % 2 else "") for place, piece in enumerate(pieces)))
