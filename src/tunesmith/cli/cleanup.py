"""``tunesmith inspect --cleanup``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

import tunesmith as ts
from tunesmith.cli.output import command, console, human_bytes, print_json

if TYPE_CHECKING:
    from tunesmith.cli.screen import Screen


def cleanup(run: Path, *, apply: bool, yes: bool, as_json: bool) -> None:
    """List the files of a run that could go; delete them where that is asked for and confirmed.

    Raises:
        Exit: with 2, where a file that was to go is still there, or nobody said yes.
    """
    plan = ts.plan_cleanup(ts.open_run(run))
    if not apply:
        if as_json:
            print_json(plan)
        else:
            _show(console(), plan, run)
        return
    if not as_json:
        _show(console(stderr=True), plan, run, hint=False)
    if plan.files and not (yes or _confirmed(plan)):
        console(stderr=True).say("Nothing was deleted.")
        raise typer.Exit(2)
    cleaned = ts.apply_cleanup(plan)
    if as_json:
        print_json(cleaned)
    else:
        _show_done(console(), cleaned)
    if cleaned.errors:
        raise typer.Exit(2)


def _confirmed(plan: ts.Cleanup) -> bool:
    if not sys.stdin.isatty():
        raise ts.TunesmithError(
            "Deleting needs your yes, and there is no terminal to ask at.", next_step="add --yes to the command"
        )
    question = f"Delete {len(plan.files)} files ({human_bytes(plan.frees_bytes)})? This cannot be undone."
    return typer.confirm(question, err=True)


def _show(screen: Screen, plan: ts.Cleanup, run: Path, *, hint: bool = True) -> None:
    from rich.table import Table

    from tunesmith.cli.screen import clean

    if not plan.files:
        screen.say(ts.text("cleanup.nothing"))
    table = Table(box=None, padding=(0, 2), show_header=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    for file in plan.files:
        table.add_row(clean(file.path), human_bytes(file.size_bytes), ts.text(f"cleanup.reason.{file.reason}"))
    if table.rows:
        screen.print(table)
        screen.say(f"\n{ts.text('cleanup.summary', count=len(plan.files), size=plan.frees_bytes)}", style="bold")
    for kept in plan.kept:
        why = ts.text(f"cleanup.kept.{kept.reason}", **kept.model_dump())
        screen.say(f"  stays: {why}", style="dim")
    if plan.files and hint:
        screen.say(f"\nNothing was deleted. To delete them: {command('inspect', run, '--cleanup', '--apply')}")


def _show_done(screen: Screen, cleaned: ts.Cleaned) -> None:
    screen.say(ts.text("cleanup.done", count=len(cleaned.removed), size=cleaned.freed_bytes))
    for failed in cleaned.errors:
        detail = f" ({failed.detail})" if failed.detail else ""
        screen.say(f"  not deleted: {failed.path}: {ts.text(f'cleanup.failed.{failed.reason}')}{detail}")
