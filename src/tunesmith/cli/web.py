"""``tunesmith web``."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import tunesmith as ts
from tunesmith.cli.options import BaseOption, DtypeOption, JsonOption
from tunesmith.cli.output import console

if TYPE_CHECKING:
    from tunesmith.web import Settings

_PORT = 7860
_THREADS = "tunesmith-"


def web(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="The run to open: a directory, or a hub id (org/name).")
    ] = None,
    root: Annotated[
        Path, typer.Option("--root", metavar="DIR", help="The folder that the page may read and write in.")
    ] = Path(),
    base: BaseOption = None,
    host: Annotated[
        str,
        typer.Option("--host", metavar="ADDRESS", help="The address to bind; beyond this machine it asks for a token."),
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(
            "--port", min=0, max=65535, help=f"The port; 0 for any free one. Default: {_PORT}, or the next free one."
        ),
    ] = None,
    open_browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Whether to open the page in a browser.")
    ] = False,
    token: Annotated[
        str | None, typer.Option("--token", metavar="TEXT", help="What a client must show. Default: made where needed.")
    ] = None,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Serve the page: open, train, chat, compare, merge, verify and report in a browser.

    Ctrl-C ends it, and the work that it does.

    Example: tunesmith web out/security --base models/llama
    """
    if not root.is_dir():
        raise ts.TunesmithError("The root is not a folder that is there.", where=root, next_step="pass another --root")
    if token == "":
        raise ts.TunesmithError("An empty token protects nothing.", next_step="leave --token out, and one is made")
    serve, settings_of = _served()
    asked = {"root": root, "run": run, "base": base, "host": host, "token": token, "dtype": dtype}
    settings = settings_of(**asked, **({} if port is None else {"port": port}))
    if run is not None and "/" not in run and not Path(settings.run).exists():
        raise ts.TunesmithError(
            "The run is not there.", where=run, expected="a directory, or a hub id such as org/name"
        )

    def told(bound: Settings) -> None:
        _show(bound, as_json=as_json)
        if open_browser:
            import webbrowser

            webbrowser.open(bound.url)

    try:
        serve(settings, tries=1 if port is not None else 100, told=told)
    finally:
        _leave()


def _show(settings: Settings, *, as_json: bool) -> None:
    if as_json:
        document = {"schema_version": 1, "url": settings.url, "root": str(settings.root), "token": settings.token}
        sys.stdout.write(json.dumps(document) + "\n")
        sys.stdout.flush()
        return
    console().say(settings.url)
    sys.stdout.flush()
    console(stderr=True).say("Ctrl-C ends it.", style="dim")


def _leave() -> None:
    """End at once where a thread still computes: PyTorch's own threads would abort an ordinary ending."""
    if any(thread.name.startswith(_THREADS) for thread in threading.enumerate()):
        sys.stderr.write("Stopped.\n")
        sys.stderr.flush()
        os._exit(130)


def _served() -> tuple[Any, Any]:
    """The page's server and its settings, where the extra is installed."""
    try:
        import fastapi  # noqa: F401 - asked for, so that only its absence is told as such
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ts.MissingExtraError("web", "web", error.name or "fastapi") from error
    from tunesmith.web import Settings, serve

    return serve, Settings
