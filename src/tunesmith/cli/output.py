"""Where output goes: data to stdout, everything else to stderr; colour and bars on a terminal only."""

from __future__ import annotations

import io
import json
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

import tunesmith as ts

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from tunesmith.cli.screen import Screen
    from tunesmith.progress import ProgressCallback
    from tunesmith.record import Record


_COLLAPSED = re.compile(r"^(s3|gs|gcs|hf):/(?=[^/])")  # a path that was made of an address has lost a slash

_shown: list[Screen] = []  # the screens on which bars are, the innermost last


def console(*, stderr: bool = False) -> Screen:
    """A screen on stdout or stderr."""
    from tunesmith.cli.screen import Screen

    return Screen(stderr=stderr)


def print_json(record: Record, *, indent: int | None = 2) -> None:
    """Print a record as a JSON document, in UTF-8 whatever the terminal speaks.

    Args:
        record: the record.
        indent: None puts it on one line.

    Raises:
        TunesmithError: it names a file whose name is not UTF-8.
    """
    _write_json(record.to_json(indent=indent))


def show_error(error: ts.TunesmithError, *, as_json: bool) -> None:
    """Tell the user what is wrong, where, and what to do next."""
    from rich.text import Text

    from tunesmith.cli.screen import clean

    message = Text("Error: ", style="bold red").append(clean(str(error)), style="default")
    console(stderr=True).print(message, soft_wrap=True)
    if as_json:
        with suppress(OSError):  # standard output may be what failed
            _write_json(json.dumps({"schema_version": 1, **error.as_dict()}, indent=2) + "\n")


def command(*words: object) -> str:
    """A command to type next, with what the shell would take apart in quotes."""
    return shlex.join(["tunesmith", *(_COLLAPSED.sub(r"\1://", str(word)) for word in words)])


def human_bytes(size: float) -> str:
    """A size in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def aside(text: str) -> None:
    """Say a sentence on stderr while work goes on; above the bar, where one is shown."""
    (_shown[-1] if _shown else console(stderr=True)).say(text, style="dim")


def say_retried(units: int) -> None:
    """Say on stderr what ran again on a cluster, where anything did."""
    if units:
        again = "1 unit of work" if units == 1 else f"{units:,} units of work"
        aside(f"{again} ran again: a worker was lost, or could not read or write.")


@contextmanager
def progress_bar() -> Iterator[ProgressCallback]:
    """Show progress on stderr: a bar on a terminal, one line a stage elsewhere."""
    screen = console(stderr=True)
    _shown.append(screen)
    try:
        with _progress_on(screen) as show:
            yield show
    finally:
        _shown.pop()


@contextmanager
def _progress_on(screen: Screen) -> Iterator[ProgressCallback]:
    if not screen.is_terminal:
        yield _lines(screen)
        return
    from tunesmith.cli.screen import clean

    tasks: dict[str, TaskID] = {}
    with ExitStack() as shown:
        bars: Bars | None = None

        def show(event: ts.Progress) -> None:
            nonlocal bars
            if bars is None:  # not before there is something to show
                bars = shown.enter_context(_bars(screen))
            if event.stage not in tasks:
                tasks[event.stage] = bars.add_task(event.stage, total=event.total, detail="")
            bars.update(tasks[event.stage], completed=event.done, total=event.total, detail=clean(event.detail)[:40])

        yield show


@contextmanager
def stoppable(*signals: signal.Signals) -> Iterator[ts.Cancellation]:
    """Have signals ask the work within to stop at its next step; a second one ends the program.

    Args:
        signals: which; none for Ctrl-C and SIGTERM.
    """
    cancellation = ts.Cancellation()

    def stop(_signal: int, _frame: FrameType | None) -> None:
        if cancellation.requested:
            raise KeyboardInterrupt
        cancellation.cancel()

    before = {number: signal.signal(number, stop) for number in signals or (signal.SIGINT, signal.SIGTERM)}
    try:
        yield cancellation
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bars(screen: Screen) -> Bars:
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", style="dim", markup=False),
    )
    return Bars(*columns, console=screen, transient=True)


def _lines(screen: Screen) -> ProgressCallback:
    seen: set[str] = set()

    def show(event: ts.Progress) -> None:
        if event.stage not in seen:
            seen.add(event.stage)
            screen.say(f"{event.stage} ...")

    return show


def _write_json(document: str) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    sys.stdout.write(document)
    sys.stdout.flush()
