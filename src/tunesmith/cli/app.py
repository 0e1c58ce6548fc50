"""The program: its verbs, its exit codes, and what happens to an error.

Exit codes: 0 done and good, 1 our bug (with a traceback), 2 the user can mend it, 3 it ran and the answer is *no*,
130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Annotated, NoReturn

import typer

from tunesmith.cli import chat, compare, demo, doctor, inspect, merge, report, train, verify

app = typer.Typer(
    name="tunesmith",
    help="Use, prove and ship a LoRA fine-tune.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo.demo)
app.command()(train.train)
app.command()(inspect.inspect)
app.command()(chat.chat)
app.command()(compare.compare)
app.command()(merge.merge)
app.command()(verify.verify)
app.command()(report.report)
app.command()(doctor.doctor)


def _version(asked: bool) -> None:
    if asked:
        import tunesmith

        typer.echo(f"tunesmith {tunesmith.__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Use, prove and ship a LoRA fine-tune.

    RUN is the output directory of a fine-tune (LLaMA-Factory, PEFT, TRL, ...), one of its checkpoint-N directories, or
    a bare adapter directory. Start with: tunesmith demo
    """


def main() -> NoReturn:
    """Run the program and exit with its code."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress is ours to show, on stderr, once
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except KeyboardInterrupt:
        _stopped()
    except BrokenPipeError:
        # Whoever read our output has gone; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        from tunesmith.errors import Cancelled, TunesmithError

        if isinstance(error, Cancelled):
            _stopped()
        if not isinstance(error, TunesmithError):
            raise
        from tunesmith.cli.output import show_error

        show_error(error, as_json="--json" in sys.argv)
        sys.exit(error.exit_code)
    sys.exit(0)


def _terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _stopped() -> NoReturn:
    print("Stopped.", file=sys.stderr)  # noqa: T201 - the one line that needs no console
    sys.exit(130)
