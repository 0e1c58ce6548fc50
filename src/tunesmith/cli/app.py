"""The program: its verbs, its exit codes, and what happens to an error.

Exit codes: 0 done and good, 1 our bug (with a traceback), 2 the user can mend it, 3 it ran and the answer is *no*,
130 interrupted.  Where the reader of a pipe has gone it is 141, as for any program.
"""

from __future__ import annotations

import errno
import gc
import io
import os
import signal
import sys
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from tunesmith.cli import (
    chat,
    checkpoints,
    compare,
    demo,
    doctor,
    drift,
    evaluate,
    gguf,
    inspect,
    merge,
    push,
    quantize,
    report,
    serve_command,
    train,
    verify,
    web,
)

# What a user can mend, wherever it strikes; any other OSError that escapes is our bug.
_OUTSIDE = {
    errno.ENOSPC: "There is no space left to write to.",
    errno.EDQUOT: "There is no space left to write to.",
    errno.EFBIG: "A file may not grow as large as it must.",
    errno.EACCES: "A file may not be read or written.",
    errno.EPERM: "A file may not be read or written.",
    errno.EROFS: "The file system is read-only.",
}
# As the shell reports it of any program whose reader has ended; 0 would make ``verify ... | head -1`` a good answer.
_READER_GONE = 141
# What is imported stays: looking through it for rubbish again and again makes a short command longer.
_NEW_OBJECTS = 100_000


class _Interrupted(Exception):  # noqa: N818 - stopping on request is no error
    """Ctrl-C or SIGTERM, in a form that Typer does not answer in its own way."""


class _ReaderGone(Exception):  # noqa: N818 - nobody reads on, which is no error
    """Standard output was a pipe, and its reader has ended."""


class _Program(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            try:
                return super().invoke(ctx)
            finally:
                sys.stdout.flush()
        except KeyboardInterrupt as error:
            raise _Interrupted from error
        except BrokenPipeError as error:
            raise _ReaderGone from error


app = typer.Typer(
    name="tunesmith",
    cls=_Program,
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
app.command()(evaluate.evaluate)
app.command()(checkpoints.checkpoints)
app.command()(merge.merge)
app.command()(verify.verify)
app.command()(gguf.gguf)
app.command()(drift.drift)
app.command()(quantize.quantize)
app.command()(push.push)
app.command()(report.report)
app.command("serve-command")(serve_command.serve_command)
app.command()(web.web)
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
    gc.set_threshold(_NEW_OBJECTS)
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress is ours to show, on stderr, once
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows another
    try:
        app()
    except (KeyboardInterrupt, _Interrupted):
        _stopped()
    except (BrokenPipeError, _ReaderGone):
        _drop_output()
        sys.exit(_READER_GONE)
    except SystemExit:
        _end_undisturbed()
        raise
    except Exception as error:  # noqa: BLE001 - what is not the user's to mend is raised again
        _fail(error)
    sys.exit(0)


def _fail(error: Exception) -> NoReturn:
    """Show an error that the user can mend; let any other one escape with its traceback."""
    from tunesmith.errors import Cancelled, TunesmithError

    if isinstance(error, Cancelled):
        _stopped(str(error))
    if isinstance(error, OSError) and error.errno in _OUTSIDE:
        error = TunesmithError(_OUTSIDE[error.errno], where=error.filename, found=error.strerror)
    if not isinstance(error, TunesmithError):
        raise error
    from tunesmith.cli.output import show_error

    _end_undisturbed()
    show_error(error, as_json="--json" in sys.argv)
    _drop_output()
    sys.exit(error.exit_code)


def _drop_output() -> None:
    """Throw away what standard output could not take, lest Python tries again on its way out."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _end_undisturbed() -> None:
    """End with one's own exit code, though a launcher of several processes ends all of them when one has ended."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _stopped(kept: str = "") -> NoReturn:
    _end_undisturbed()
    print(f"Stopped. {kept}".rstrip(), file=sys.stderr)  # noqa: T201 - the one line that needs no console
    sys.exit(130)
