"""Where output goes: data to stdout, everything else to stderr; colour and bars on a terminal only."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.errors import TunesmithError
    from tunesmith.progress import Progress, ProgressCallback
    from tunesmith.record import Record


def console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr; rich honours NO_COLOR and writes plain text where there is no terminal."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, emoji=False, soft_wrap=not sys.stdout.isatty())


def print_json(record: Record) -> None:
    """Print a record as the one JSON document of this call."""
    sys.stdout.write(record.to_json())


def show_error(error: TunesmithError, *, as_json: bool) -> None:
    """Tell the user what is wrong, where, and what to do next."""
    if as_json:
        sys.stdout.write(json.dumps({"schema_version": 1, **error.as_dict()}, indent=2, ensure_ascii=False) + "\n")
    from rich.text import Text

    message = Text("Error: ", style="bold red")
    message.append(clean(str(error)), style="default")
    console(stderr=True).print(message, soft_wrap=True)


def clean(text: str) -> str:
    """Text from outside, without the control characters that could move a terminal's cursor or change its state."""
    return "".join(character if character in "\n\t" or character.isprintable() else "\ufffd" for character in text)


def human_bytes(size: float) -> str:
    """A size in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


@contextmanager
def progress_bar() -> Iterator[ProgressCallback]:
    """Show progress on stderr: a bar on a terminal, one line a stage elsewhere."""
    screen = console(stderr=True)
    if not screen.is_terminal:
        yield _lines(screen)
        return
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[detail]}"),
    )
    with Bars(*columns, console=screen, transient=True) as bars:
        tasks: dict[str, object] = {}

        def show(event: Progress) -> None:
            if event.stage not in tasks:
                tasks[event.stage] = bars.add_task(event.stage, total=event.total, detail="")
            task = tasks[event.stage]
            bars.update(task, completed=event.done, total=event.total, detail=clean(event.detail)[:40])  # type: ignore[arg-type]

        yield show


def _lines(screen: Console) -> ProgressCallback:
    seen: set[str] = set()

    def show(event: Progress) -> None:
        if event.stage not in seen:
            seen.add(event.stage)
            screen.print(f"{event.stage} ...", style="dim", markup=False)

    return show
