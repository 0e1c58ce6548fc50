"""Long work: one job at a time in one thread, each with numbered events that can be told again."""

from __future__ import annotations

import asyncio
import math
import os
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, nullcontext, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.types import Send

import tunesmith as ts
from tunesmith.web import downloads
from tunesmith.web.answers import (
    JsonReply,
    NotThereError,
    StillRunningError,
    mendable,
    misfit_of,
    to_json,
    unexpected,
)
from tunesmith.web.live import Busy, Holder, ModelSlot
from tunesmith.web.places import Places
from tunesmith.web.verbs import VERBS
from tunesmith.web.work import Desk, Work

if TYPE_CHECKING:
    from tunesmith.web.settings import Settings

KEPT_JOBS = 50
MOST_QUEUED = 20
HEARTBEAT_SECONDS = 10.0
_NICENESS = 10
_NICEST = 19
_PROGRESS_SECONDS = 0.1
_RATE_SECONDS = 8.0
_MOST_LINES = 500
_MOST_CHARACTERS = 2000
State = Literal["queued", "running", "done", "failed", "cancelled"]
EventKind = Literal["state", "progress", "log", "result"]
ENDED: tuple[State, ...] = ("done", "failed", "cancelled")


@dataclass(frozen=True)
class Event:
    """One thing that happened to a job.

    Attributes:
        number: from 1 on, each above the one before it.
        kind: what happened.
        data: JSON; of a ``result`` the record itself.
    """

    number: int
    kind: EventKind
    data: Any


class Rate:
    """How fast a stage goes, smoothed over some seconds."""

    def __init__(self) -> None:
        self._stage: str | None = None
        self._at = self._done = self._rate = self._weight = 0.0

    def told(self, step: ts.Progress, now: float) -> float | None:
        """Units a second; None where that is not known yet.

        Args:
            step: how far the stage is.
            now: a clock's seconds.
        """
        if step.stage != self._stage or step.done < self._done:
            self._stage, self._at, self._done, self._rate, self._weight = step.stage, now, step.done, 0.0, 0.0
            return None
        passed = now - self._at
        if passed > 0.05 and step.done > self._done:
            share = 1 - math.exp(-passed / _RATE_SECONDS)
            self._rate += share * ((step.done - self._done) / passed - self._rate)
            self._weight += share * (1 - self._weight)
            self._at, self._done = now, step.done
        return self._rate / self._weight if self._weight else None


class Job:
    """One piece of work, its state, and everything that happened to it.

    Args:
        kind: which verb.
        params: as they were asked for.
        work: what is to be done.

    Attributes:
        id: its name in addresses.
        record: what the work returned; None before that.
        cancellation: the wish to stop.
    """

    def __init__(self, kind: str, params: BaseModel, work: Work) -> None:
        self.id = secrets.token_hex(6)
        self.kind, self.params, self.work = kind, params, work
        self.state: State = "queued"
        self.record: Any = None
        self.cancellation = ts.Cancellation()
        self._lock = threading.Lock()
        self._times: dict[str, float | None] = {"created_s": time.time(), "started_s": None, "ended_s": None}
        self._error: dict[str, object] | None = None
        self._lines: deque[str] = deque(maxlen=_MOST_LINES)
        self._events: deque[Event] = deque(maxlen=2 * _MOST_LINES)
        self._count = 0
        self._listeners: set[Callable[[], None]] = set()
        self._progress: dict[str, object] | None = None
        self._rate, self._told_at = Rate(), 0.0
        self._add("state", self._seen())

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in ENDED

    def view(self, *, with_result: bool = True) -> dict[str, object]:
        """The job as a client sees it."""
        with self._lock:
            return self._seen() | ({"result": self._result()} if with_result else {})

    def progress(self, step: ts.Progress) -> None:
        """Say how far the work is; about ten times a second it is passed on."""
        now = time.monotonic()
        with self._lock:
            rate = self._rate.told(step, now)
            left = None if step.total is None or not rate else max(0.0, step.total - step.done) / rate
            is_new = self._progress is None or self._progress["stage"] != step.stage
            self._progress = {**asdict(step), "detail": _cut(step.detail), "rate": rate, "eta_s": left}
            if not (is_new or step.done == step.total or now - self._told_at >= _PROGRESS_SECONDS):
                return
            self._told_at = now
            # Of one stage only the last is kept: what came before it says nothing more.
            last = self._events[-1]
            if last.kind == "progress" and not is_new:
                self._events.pop()
            self._add("progress", dict(self._progress))
        self._wake()

    def log(self, line: str) -> None:
        """Say a line to the user."""
        with self._lock:
            self._lines.append(_cut(line))
            self._add("log", {"line": _cut(line)})
        self._wake()

    def begin(self) -> None:
        """The work begins."""
        self._become("running")

    def end(self, state: State, *, record: Any = None, error: dict[str, object] | None = None) -> None:
        """The work has ended.

        Args:
            state: how.
            record: what it returned.
            error: why it failed.
        """
        with self._lock:
            self.record, self._error = record, error
            if record is not None:
                self._add("result", None)
        self._become(state)

    def cancel(self) -> None:
        """Ask the work to stop; a second time nothing more happens."""
        if self.ended or self.cancellation.requested:
            return
        self.cancellation.cancel()
        with self._lock:
            self._add("state", self._seen())
        self._wake()

    def events_after(self, number: int) -> tuple[list[Event], bool]:
        """What happened after an event, and whether nothing will follow that."""
        with self._lock:
            found = [event for event in self._events if event.number > number]
            return found, self.ended

    def result(self) -> Any:
        """The work's result, as JSON has it."""
        with self._lock:
            return self._result()

    def listen(self, wake: Callable[[], None]) -> None:
        """Have a function called, from any thread, when there are events; it must not wait."""
        with self._lock:
            self._listeners.add(wake)

    def unlisten(self, wake: Callable[[], None]) -> None:
        """Have it called no more."""
        with self._lock:
            self._listeners.discard(wake)

    def wake(self) -> None:
        """Call the listeners, though nothing happened."""
        self._wake()

    def _become(self, state: State) -> None:
        with self._lock:
            self.state = state
            self._times["started_s" if state == "running" else "ended_s"] = time.time()
            self._add("state", self._seen())
        self._wake()

    def _add(self, kind: EventKind, data: Any) -> None:
        self._count += 1
        self._events.append(Event(self._count, kind, data))

    def _wake(self) -> None:
        with self._lock:
            listeners = tuple(self._listeners)
        for wake in listeners:
            wake()

    def _result(self) -> Any:
        return None if self.record is None else self.work.result(self.record)

    def _seen(self) -> dict[str, object]:
        return {
            "id": self.id,
            "kind": self.kind,
            "params": self.params.model_dump(exclude_none=True),
            "state": self.state,
            "command": self.work.command,
            **self._times,
            "progress": self._progress,
            "log": list(self._lines),
            "error": self._error,
            "cancelling": self.cancellation.requested and not self.ended,
            "stop_saves": self.work.stop_saves,
        }


def _step_back() -> None:
    """Let pages and answers go before this thread's work, and before that of the threads that it will start.

    Linux keeps a niceness for every thread, which those that it starts inherit: sched(7).
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        # From where it stands: to go back up to a fixed number is forbidden where the server itself was started nice.
        os.setpriority(os.PRIO_PROCESS, thread, min(_NICEST, os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS))


class Jobs:
    """All jobs: those that wait, the one that runs, and the newest that have ended.

    Args:
        slot: the right to use the model.
        places: where requests may read and write.
        settings: the server's.
    """

    def __init__(self, slot: ModelSlot, places: Places, settings: Settings) -> None:
        self._slot, self._places, self._settings = slot, places, settings
        self._changed = threading.Condition()
        self._jobs: dict[str, Job] = {}
        self._queue: deque[Job] = deque()
        self._running: Job | None = None
        self._thread: threading.Thread | None = None
        self.stopping = False

    def start(self, kind: str, params: Mapping[str, Any], *, queue: bool = True) -> Job:
        """Begin a job, or line it up behind others.

        Args:
            kind: which verb.
            params: its parameters.
            queue: whether it may wait for other jobs.

        Raises:
            RequestError: no such kind, or parameters that do not fit.
            TunesmithError: a path that is not to be used.
            Busy: it may not wait, or too many do.
        """
        verb = VERBS[kind]
        try:
            fitting = verb.params.model_validate(params)
        except ValidationError as error:
            raise misfit_of(error, f"The parameters of {kind} do not fit.") from None
        job = Job(kind, fitting, verb.prepare(fitting, self._places, Desk(self.record_of, self._settings.dtype)))
        with self._changed:
            holder = self._busy()
            if self.stopping or (holder is not None and (not queue or len(self._queue) >= MOST_QUEUED)):
                raise Busy(holder or Holder("shutdown"), "Another job is at work.")
            self._jobs[job.id] = job
            self._queue.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="tunesmith-jobs", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return job

    def get(self, job_id: str) -> Job:
        """A job by its id.

        Raises:
            NotThereError: there is none.
        """
        job = self._jobs.get(job_id)
        if job is None:
            raise NotThereError(
                "There is no such job.", where=job_id[:100], next_step="ended jobs are forgotten after a while"
            )
        return job

    def newest_first(self) -> list[Job]:
        """All jobs that are known."""
        return list(self._jobs.values())[::-1]

    def record_of(self, job_id: str) -> Any:
        """What an ended job returned.

        Raises:
            NotThereError: there is no such job, or it has returned nothing.
        """
        record = self.get(job_id).record
        if record is None:
            raise NotThereError("This job has no result.", where=job_id)
        return record

    def cancel(self, job_id: str) -> Job:
        """Ask a job to stop; one that waits ends at once.

        Raises:
            NotThereError: there is no such job.
        """
        job = self.get(job_id)
        job.cancel()
        with self._changed:
            waits = job in self._queue
            if waits:
                self._queue.remove(job)
        if waits:
            job.end("cancelled")
        return job

    def forget(self, job_id: str) -> None:
        """Forget a job that has ended.

        Raises:
            NotThereError: there is no such job.
            StillRunningError: it has not ended.
        """
        if not self.get(job_id).ended:
            raise StillRunningError("This job has not ended.", where=job_id, next_step="cancel it first")
        self._jobs.pop(job_id, None)

    def stop(self) -> None:
        """Cancel everything and end all streams; the server is about to end."""
        self.stopping = True
        for job in self.newest_first():
            if not job.ended:
                self.cancel(job.id)
            job.wake()
        with self._changed:
            self._changed.notify_all()

    @property
    def running(self) -> Job | None:
        """The job that is at work."""
        return self._running

    def close(self, *, seconds: float = 5.0) -> None:
        """Stop, and wait for the work that runs.

        Args:
            seconds: how long at most.
        """
        self.stop()
        if self._thread is not None:
            self._thread.join(timeout=seconds)

    def _busy(self) -> Holder | None:
        first = self._running or next(iter(self._queue), None)
        return Holder(first.kind, first.id) if first else None

    def _work(self) -> None:
        _step_back()
        while True:
            with self._changed:
                while not self._queue and not self.stopping:
                    self._changed.wait()
                if self.stopping:
                    return
                job = self._running = self._queue.popleft()
            self._do(job)
            with self._changed:
                self._running = None
                self._forget_oldest()
            del job

    def _do(self, job: Job) -> None:
        held = (
            self._slot.hold(job.kind, job.id, cancellation=job.cancellation) if job.work.needs_model else nullcontext()
        )
        try:
            with held:
                job.cancellation.check()
                job.begin()
                record = job.work.call(job)
        except ts.Cancelled as stopped:
            if str(stopped):
                job.log(str(stopped))
            job.end("cancelled")
        except ts.TunesmithError as error:
            job.end("failed", error=_told(error))
        except OSError as error:
            mended = mendable(error)
            job.end("failed", error=_told(mended) if mended else unexpected(error))
        except Exception as error:  # noqa: BLE001 - whatever it is, the next job must run
            job.end("failed", error=unexpected(error))
        else:
            job.end("done", record=record)

    def _forget_oldest(self) -> None:
        ended = [job.id for job in self._jobs.values() if job.ended]
        for job_id in ended[: max(0, len(ended) - KEPT_JOBS)]:
            del self._jobs[job_id]


class EventStream(StreamingResponse):
    """Server-sent events of a job; what listens is let go of with the client, whatever it was waiting for."""

    media_type = "text/event-stream"

    async def stream_response(self, send: Send) -> None:
        """Send them."""
        async with aclosing(self.body_iterator):  # type: ignore[type-var] # it is a generator of ours
            await super().stream_response(send)


async def events_of(jobs: Jobs, job: Job, after: int = 0) -> AsyncIterator[bytes]:
    """A job's events as they are sent, from one on to the last; between them, that somebody is still there.

    Args:
        jobs: all jobs, of which it is one.
        job: the job.
        after: the number of the last event that is known.
    """
    loop, waked = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        with suppress(RuntimeError):  # the loop is closed, and its clients with it
            loop.call_soon_threadsafe(waked.set)

    job.listen(wake)
    try:
        while True:
            waked.clear()
            events, ended = job.events_after(after)
            for event in events:
                after = event.number
                data = job.result() if event.kind == "result" else event.data
                yield f"id: {event.number}\nevent: {event.kind}\ndata: ".encode() + to_json(data) + b"\n\n"
            if ended or jobs.stopping:
                return
            try:
                await asyncio.wait_for(waked.wait(), HEARTBEAT_SECONDS)
            except asyncio.TimeoutError:
                yield b": still here\n\n"
    finally:
        job.unlisten(wake)


def _told(error: ts.TunesmithError) -> dict[str, object]:
    return dict(error.as_dict())


def _cut(line: str) -> str:
    return line if len(line) <= _MOST_CHARACTERS else f"{line[:_MOST_CHARACTERS]}…"


router = APIRouter(prefix="/api/v1", tags=["jobs"])

Kind = Literal[
    "demo",
    "plan_training",
    "train",
    "checkpoints",
    "compare",
    "evaluate",
    "merge",
    "quantize",
    "drift",
    "gguf",
    "verify",
    "verify_gguf",
    "push",
    "report",
    "cleanup",
]


class StartJob(BaseModel):
    """What is to be done.

    Attributes:
        kind: which verb.
        params: its parameters, by the names of the public API.
        queue: whether it may wait for other jobs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    params: dict[str, Any] = Field(default_factory=dict)
    queue: bool = True


@router.post("/jobs", status_code=202)
def start_job(request: Request, asked: StartJob) -> JsonReply:
    """Begin a job, or line it up behind others."""
    job = _jobs(request).start(asked.kind, asked.params, queue=asked.queue)
    return JsonReply({"job": job.view()}, status_code=202)


@router.get("/jobs")
async def list_jobs(request: Request) -> JsonReply:
    """All jobs without their results, the newest first."""
    return JsonReply({"jobs": [job.view(with_result=False) for job in _jobs(request).newest_first()]})


@router.get("/jobs/{job_id}")
def get_job(request: Request, job_id: str) -> JsonReply:
    """One job, with its result."""
    return JsonReply({"job": _jobs(request).get(job_id).view()})


@router.get("/jobs/{job_id}/events", response_class=EventStream)
async def job_events(
    request: Request,
    job_id: str,
    after: Annotated[int, Query(ge=0, le=2**53)] = 0,
    last_event_id: Annotated[str | None, Header(max_length=20)] = None,
) -> EventStream:
    """A job's events from one on, until it has ended."""
    jobs = _jobs(request)
    known = int(last_event_id) if last_event_id and last_event_id.isascii() and last_event_id.isdigit() else after
    return EventStream(events_of(jobs, jobs.get(job_id), known), headers={"x-accel-buffering": "no"})


@router.post("/jobs/{job_id}/cancel")
def cancel_job(request: Request, job_id: str) -> JsonReply:
    """Ask a job to stop; a training saves what it has."""
    return JsonReply({"job": _jobs(request).cancel(job_id).view()})


@router.delete("/jobs/{job_id}", status_code=204)
def forget_job(request: Request, job_id: str) -> Response:
    """Forget a job that has ended."""
    _jobs(request).forget(job_id)
    return Response(status_code=204)


@router.get("/jobs/{job_id}/download")
def download(request: Request, job_id: str, format: downloads.Format = "json") -> Response:  # noqa: A002 - the address's word
    """A job's result as a file."""
    jobs = _jobs(request)
    run = getattr(jobs.get(job_id).params, "run", None)
    place = None if run is None else request.app.state.places.run(run)
    return downloads.reply(job_id, jobs.record_of(job_id), format, run=place)


def _jobs(request: Request) -> Jobs:
    jobs: Jobs = request.app.state.jobs
    return jobs
