"""The application put together, and the process that serves it."""

from __future__ import annotations

import asyncio
import mimetypes
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

import tunesmith as ts
from tunesmith.web import chat, jobs, openai, runs
from tunesmith.web.answers import JsonReply, error_reply, mendable, misfit, plain_error
from tunesmith.web.jobs import Job, Jobs
from tunesmith.web.live import Live
from tunesmith.web.machine import Machine
from tunesmith.web.places import Places
from tunesmith.web.runs import Known
from tunesmith.web.safety import Safety
from tunesmith.web.settings import Settings

STATIC = Path(__file__).parent / "static"
# A thread that decodes lets go of the interpreter at every product, and waits so long for it while another serves.
_SWITCH_SECONDS = 0.0005
_WARM_AFTER_SECONDS = 5.0  # sooner, where a page has been loaded
_GOODBYE_SECONDS = 3
_LOOK_SECONDS = 0.1
_STOPPING_SECONDS, _SAVING_SECONDS = 5, 120
# Whatever the system's own table says.
for _ending, _kind in ((".js", "text/javascript"), (".css", "text/css"), (".svg", "image/svg+xml")):
    mimetypes.add_type(_kind, _ending)


def create_app(settings: Settings) -> FastAPI:
    """The page's application: the API, ``/v1``, and the static files.

    Args:
        settings: root, run, host, token.
    """
    app = FastAPI(
        title="Tunesmith",
        version=ts.__version__,
        openapi_url="/api/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
    )
    app.state.settings = settings
    app.state.places = Places(settings.root, allowed=(settings.run, settings.base))
    app.state.live = Live(settings)
    app.state.machine = Machine(settings.dtype, first=runs.library_defaults)
    app.state.known = Known()
    app.state.warming = False
    app.state.jobs = Jobs(app.state.live.slot, app.state.places, settings)
    for part in (runs, jobs, chat, openai):
        app.include_router(part.router)
    app.add_api_route("/", _index, methods=["GET", "HEAD"], include_in_schema=False)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    app.add_exception_handler(ts.TunesmithError, _mendable)
    app.add_exception_handler(OSError, _outside)
    app.add_exception_handler(RequestValidationError, _unfit)
    app.add_exception_handler(HTTPException, _refused)
    app.add_middleware(Safety, settings=settings)
    return app


def serve(settings: Settings, *, tries: int = 1, told: Callable[[Settings], None] = lambda _: None) -> None:
    """Serve the page until it is interrupted.

    Args:
        settings: what to serve, and where; port 0 is any that is free.
        tries: how many ports to try, from the settings' own on.
        told: told of the settings as they came to be, once the socket is up.

    Raises:
        TunesmithError: no port can be bound.
    """
    bound = bind(settings, tries=tries)
    settings = settings.model_copy(update={"port": bound.getsockname()[1]})
    server = PageServer(create_app(settings), settings, told)
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        server.run(sockets=[bound])
    finally:
        bound.close()


def bind(settings: Settings, *, tries: int = 1) -> socket.socket:
    """A socket on the settings' port, or on one of the next ones.

    Args:
        settings: host and port.
        tries: how many ports to try.

    Raises:
        TunesmithError: none of them is free.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    found: OSError | None = None
    for port in range(settings.port, min(settings.port + tries, 65536)):
        bound = socket.socket(family, socket.SOCK_STREAM)
        try:
            if sys.platform != "win32":  # there it would let two servers share a port
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((settings.host, port))
        except OSError as error:
            bound.close()
            found = error
            continue
        return bound
    raise ts.TunesmithError(
        "The page's port cannot be had.",
        where=f"{settings.host}:{settings.port}",
        found=found.strerror if found else None,
        next_step="pass --port with another one, or --port 0 for any that is free",
    )


class PageServer(uvicorn.Server):
    """Says where it is once it listens, and ends streams before it waits for them.

    Args:
        app: the application.
        settings: what it serves, and where.
        told: told of the settings once the socket is up.
    """

    def __init__(self, app: FastAPI, settings: Settings, told: Callable[[Settings], None] = lambda _: None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                date_header=False,
                timeout_graceful_shutdown=_GOODBYE_SECONDS,
                h11_max_incomplete_event_size=64 * 1024,
                ws="none",
            )
        )
        self._app, self._settings, self._told = app, settings, told

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets=sockets)
        self._told(self._settings)
        self._app.state.machine.warm_in(_WARM_AFTER_SECONDS)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End all streams and jobs, then everything else."""
        self._app.state.jobs.stop()
        self._app.state.live.stop()
        await self._work_ended()
        await super().shutdown(sockets=sockets)

    async def _work_ended(self) -> None:
        """Wait for the job that runs: briefly, or until it has saved what it has; a second Ctrl-C ends that."""
        job: Job | None = self._app.state.jobs.running
        if job is None:
            return
        if job.work.stop_saves:
            sys.stderr.write("The training saves what it has. Ctrl-C again ends it at once.\n")
            sys.stderr.flush()
        until = time.monotonic() + (_SAVING_SECONDS if job.work.stop_saves else _STOPPING_SECONDS)
        while not job.ended and not self.force_exit and time.monotonic() < until:
            await asyncio.sleep(_LOOK_SECONDS)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    try:
        yield
    finally:
        app.state.jobs.close(seconds=_LOOK_SECONDS)
        app.state.live.close()


async def _index() -> Response:
    """The page, which is short: it is read where it is asked for, without a thread."""
    return Response((STATIC / "index.html").read_bytes(), media_type="text/html", headers={"cache-control": "no-cache"})


async def _mendable(_request: Request, error: Any) -> JsonReply:
    return error_reply(error)


async def _outside(_request: Request, error: Any) -> JsonReply:
    found = mendable(error)
    if found is None:
        raise error
    return error_reply(found)


async def _unfit(_request: Request, error: Any) -> JsonReply:
    return error_reply(misfit(error.errors()))


async def _refused(request: Request, error: Any) -> Response:
    names = {404: "NotThereError", 405: "RequestError"}
    return plain_error(
        error.status_code, names.get(error.status_code, "RequestError"), str(error.detail), where=request.url.path[:200]
    )
