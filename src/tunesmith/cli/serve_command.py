"""``tunesmith serve-command``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

import tunesmith as ts
from tunesmith.cli.options import BaseOption, JsonOption, RunArgument
from tunesmith.cli.output import console, print_json

if TYPE_CHECKING:
    from tunesmith.export.serving import ServingEngine

_LEFT_OUT = 3


def serve_command(
    run: RunArgument,
    engine: Annotated[
        str, typer.Option("--engine", metavar="NAME", help="The server: vllm, sglang, llama.cpp or ollama.")
    ] = "vllm",
    base: BaseOption = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            "--checkpoint",
            metavar="NAME",
            help="Which adapters: final, checkpoint-N or N. Repeat for several. Default: all.",
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", min=1, max=65535, help="Where it is to listen. Default: the server's usual port."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Where GGUF files and merged models are to be written, for a server that needs them. Default: beside "
            "RUN.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the lines that serve a run's base and checkpoints by their names, and the one that compares them there.

    Nothing is run. What the server cannot serve as it was tuned is left out with the reason and the way around, and the
    exit code is then 3.

    Example: tunesmith serve-command out/security --engine vllm
    """
    command = ts.serve_command(
        run, engine=cast("ServingEngine", engine), base=base, checkpoints=checkpoint, port=port, out=out
    )
    if as_json:
        print_json(command)
    else:
        _show(command)
    raise typer.Exit(_LEFT_OUT if command.left_out else 0)


def _show(command: ts.ServeCommand) -> None:
    """The lines to stdout, to be copied; what is to be known of them to stderr."""
    screen, aside = console(), console(stderr=True)
    parts = [
        ("serve.before", command.preparation),
        ("serve.server", (command.serve_line,)),
        ("serve.after", command.after_lines),
        ("serve.compare", (command.compare_line,)),
    ]
    for key, lines in parts:
        if lines:
            screen.say(f"# {ts.text(key)}", style="dim")
        for line in lines:
            screen.print(_copied(line), soft_wrap=True)
    for finding in command.findings:
        told = "note" if finding.severity == "info" else finding.severity
        aside.say(f"{told}: {ts.finding_text(finding)}", style="yellow" if finding.severity == "warning" else "dim")


def _copied(line: str) -> object:
    from rich.text import Text

    from tunesmith.cli.screen import clean

    return Text(clean(line))
