"""Who has the model, which engine is loaded, and how what its thread says reaches a client.

One model is at work at a time: a job, or one generation after another.  Generations run in one thread of their own,
because PyTorch keeps a pool of threads for every thread that computes.
"""

from __future__ import annotations

import asyncio
import gc
import os
import queue
import re
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

import tunesmith as ts
from tunesmith.web.answers import NotThereError, error_body, to_json, unexpected

if TYPE_CHECKING:
    from tunesmith.web.places import Places
    from tunesmith.web.settings import Settings

_NOTICED_S = 0.1  # how soon one who waits sees that it need not any more
_HEARTBEAT_S = 10.0
_GOODBYE_S = 2.0
_MOST_WAITING = 64
_MOST_VARIANTS = 8
_KEPT_VARIANTS = 3  # of those that were there, when all must be loaded anew
_OWN_NAME = re.compile(r"base|final|checkpoint-\d+")
_OWN_FILES = (".safetensors", ".bin", ".json")


@dataclass(frozen=True)
class Holder:
    """Who has the model.

    Attributes:
        kind: ``chat``, ``v1``, or a job's kind.
        job: the job's id; None where it is a generation.
        since_s: unix time since when.
    """

    kind: str
    job: str | None = None
    since_s: float = 0.0


class Busy(ts.TunesmithError):
    """Somebody else has the model.

    Args:
        holder: who.
        what: one sentence that says what cannot be done for it.
    """

    def __init__(self, holder: Holder, what: str = "The model is in use.") -> None:
        found = f"{holder.kind} {holder.job}" if holder.job else holder.kind
        super().__init__(what, found=found, next_step="wait until that has ended, or cancel it")
        self.holder = holder


class InternalError(ts.TunesmithError):
    """A mistake of ours, told by a reference; its traceback is in the server's own output."""

    @classmethod
    def of(cls, error: BaseException) -> InternalError:
        """Write an error that nobody foresaw to standard error, and return what a client may know of it."""
        told = unexpected(error)
        return cls(str(told["what"]), where=told["where"], next_step=str(told["next"]))


class ModelSlot:
    """The right to use the model: one holder, the others in the order in which they came.

    Args:
        before_job: called in a job's thread once the job has the slot, before its work.
    """

    def __init__(self, before_job: Callable[[], None] | None = None) -> None:
        self._before_job = before_job
        self._changed = threading.Condition()
        self._line: deque[Ticket] = deque()  # the first one has the slot

    @property
    def holder(self) -> Holder | None:
        """Who has the model now; None where nobody has."""
        with self._changed:
            return self._line[0].holder if self._line else None

    @contextmanager
    def hold(
        self,
        kind: str,
        job: str | None = None,
        *,
        wait: bool = True,
        behind_jobs: bool = True,
        cancellation: ts.Cancellation | None = None,
    ) -> Iterator[Holder]:
        """Have the model for as long as the block runs.

        Args:
            kind: what for.
            job: the job's id; None where it is a generation.
            wait: whether to wait for whoever has it.
            behind_jobs: whether to wait for jobs too, which may take hours.
            cancellation: read while waiting.

        Raises:
            Busy: it may not be waited.
            Cancelled: somebody asked to stop.
        """
        ticket = self.line_up(kind, job, wait=wait, behind_jobs=behind_jobs)
        try:
            yield ticket.wait(cancellation)
        finally:
            ticket.leave()

    def line_up(self, kind: str, job: str | None = None, *, wait: bool = True, behind_jobs: bool = True) -> Ticket:
        """Take a place in the line, which must be left again: see :meth:`hold`.

        Raises:
            Busy: it may not be waited, or too many wait.
        """
        ticket = Ticket(self, Holder(kind, job))
        with self._changed:
            holders = [one.holder for one in self._line]
            jobs = [holder for holder in holders if holder.job is not None]
            if holders and not wait:
                raise Busy(holders[0])
            if jobs and not behind_jobs:
                raise Busy(jobs[0], "A job has the model." if jobs[0] is holders[0] else "A job waits for the model.")
            if job is None and len(holders) >= _MOST_WAITING:
                raise Busy(holders[0], "Too many wait for the model.")
            self._line.append(ticket)
            self._tell()
        return ticket

    def _tell(self) -> None:
        """Let the first of the line know; the lock is held."""
        if self._line and not self._line[0].holder.since_s:
            first = self._line[0]
            first.holder = Holder(first.holder.kind, first.holder.job, time.time())
        self._changed.notify_all()


class Ticket:
    """A place in the line for the model.

    Attributes:
        holder: whose it is.
    """

    def __init__(self, slot: ModelSlot, holder: Holder) -> None:
        self._slot, self.holder = slot, holder
        self._taken = False

    def wait(self, cancellation: ts.Cancellation | None = None) -> Holder:
        """Wait until the model is ours.

        Raises:
            Cancelled: somebody asked to stop; the place is left with :meth:`leave` all the same.
        """
        slot = self._slot
        with slot._changed:
            while not (slot._line and slot._line[0] is self):
                if cancellation is not None:
                    cancellation.check()
                slot._changed.wait(_NOTICED_S)
            if cancellation is not None:
                cancellation.check()
            self._taken = True
        if self.holder.job is not None and slot._before_job is not None:
            slot._before_job()
        return self.holder

    def leave(self, *, if_untaken: bool = False) -> None:
        """Give the place up, and the model with it; a second time does nothing.

        Args:
            if_untaken: not where the model is ours already, and its work is still to end.
        """
        with self._slot._changed:
            if self in self._slot._line and not (if_untaken and self._taken):
                self._slot._line.remove(self)
                self._slot._tell()


class Flow:
    """What a piece of work says, from its thread to the client that asked for it.

    It is made in the event loop of that client.  Nothing waits between what is said and what the client is sent.

    Args:
        ticket: the work's place in the line.

    Attributes:
        cancellation: the wish to stop, set when the client goes away.
    """

    def __init__(self, ticket: Ticket) -> None:
        self.cancellation = ts.Cancellation()
        self._ticket = ticket
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[str, Any] | None] = asyncio.Queue()

    def say(self, event: str, data: Any) -> None:
        """Send one event; from any thread."""
        self._put((event, data))

    def progress(self, step: ts.Progress) -> None:
        """Send how far loading is.

        Raises:
            Cancelled: the client went away while a model was being fetched; a model that is being loaded is waited for.
        """
        self.say("loading", {"progress": asdict(step)})
        if step.stage != "load":
            self.cancellation.check()

    def end(self) -> None:
        """Say that nothing follows; from any thread."""
        self._put(None)

    def close(self) -> None:
        """Stop the work: nobody listens any more.  What it still says is lost."""
        self.cancellation.cancel()
        self._ticket.leave(if_untaken=True)
        self.end()

    async def next(self) -> tuple[str, Any] | None:
        """The next event and its data; None after the last.  An ``error`` event's data is the exception."""
        return await self._events.get()

    async def __aiter__(self) -> AsyncIterator[tuple[str, Any]]:
        while (event := await self.next()) is not None:
            yield event

    def _put(self, event: tuple[str, Any] | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has ended, and its clients with it
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


@asynccontextmanager
async def watching(receive: Receive, flow: Flow) -> AsyncIterator[None]:
    """Close a flow as soon as its client goes away, for as long as the block runs.

    Args:
        receive: what the client sends; its request must have been read.
        flow: what is written for it.
    """

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        flow.close()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        await asyncio.wait({watcher})


class EventStream(Response):
    """A flow as server-sent events; it is closed with the last one, or when the client goes away.

    Args:
        flow: what is sent.
        encode: makes bytes of an event and its data; none for nothing.
        before: an event that was taken from the flow already.
        last: bytes after the last event, where the flow was not closed before it.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        flow: Flow,
        encode: Callable[[str, Any], bytes],
        *,
        before: tuple[str, Any] | None = None,
        last: bytes = b"",
    ) -> None:
        # Proxies must not gather events; without a length the connection ends with the stream or is chunked.
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._flow, self._encode, self._before, self._last = flow, encode, before, last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's
        """Send all events, each when it comes, and a comment now and then where none does."""

        async def write(data: bytes, *, more: bool = True) -> None:
            if data or not more:
                await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            async with watching(receive, self._flow):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                event = self._before or await self._next(write)
                while event is not None:
                    await write(self._encode(*event))
                    event = await self._next(write)
                await write(b"" if self._flow.cancellation.requested else self._last, more=False)
        finally:
            self._flow.close()

    async def _next(self, write: Callable[[bytes], Awaitable[None]]) -> tuple[str, Any] | None:
        while True:
            try:
                return await asyncio.wait_for(self._flow.next(), _HEARTBEAT_S)
            except asyncio.TimeoutError:  # another class than TimeoutError before Python 3.11
                await write(b": waiting\n\n")


def server_sent(event: str, data: Any) -> bytes:
    """One event of our own streams: its name, and its data as JSON."""
    document = error_body(data) if isinstance(data, ts.TunesmithError) else data
    return b"event: " + event.encode() + b"\ndata: " + to_json(document) + b"\n\n"


Work = Callable[[Flow], None]


@dataclass(frozen=True)
class Opened:
    """A run and its base.

    Attributes:
        run: the run's directory, or its name on the hub.
        base: the base model as it was asked for; None for the one that the adapter names.
    """

    run: str
    base: str | None = None

    @classmethod
    def of(cls, places: Places, run: str, base: str | None) -> Opened:
        """The run and base of a request, confined to the root; one run is the same however it is written.

        Raises:
            TunesmithError: one of them lies outside, or is not there.
        """
        place = places.run(run)
        return cls(str(Path(place).resolve()) if Path(place).is_dir() else place, places.base(base))


@dataclass
class _Loaded:
    opened: Opened
    engine: ts.Engine
    capabilities: ts.Capabilities  # an engine that generates tells them only afterwards
    infos: dict[str, ts.VariantInfo] = field(default_factory=dict)  # by the names that were asked for
    stamps: dict[str, object] = field(default_factory=dict)
    attached: dict[str, AbstractContextManager[ts.VariantInfo]] = field(default_factory=dict)  # those that came later

    def add(self, name: str, info: ts.VariantInfo) -> None:
        """One more variant is there."""
        self.stamps[info.path] = _stamp(info.path)
        self.infos = {**self.infos, name: info}  # others may be reading it

    def attach(self, name: str, context: AbstractContextManager[ts.VariantInfo]) -> None:
        """Put one more adapter beside the others."""
        self.add(name, context.__enter__())
        self.attached[name] = context

    def detach(self, name: str) -> None:
        """Let go of one that came later."""
        self.infos = {other: info for other, info in self.infos.items() if other != name}
        self.attached.pop(name).__exit__(None, None, None)


class Live:
    """The engine that is loaded, and the thread that generates with it.

    Args:
        settings: the server's; of them the compute dtype, and the run that it was started with.

    Attributes:
        slot: who has the model.
        opened: the run that was last asked about; None before the first.
    """

    def __init__(self, settings: Settings) -> None:
        self.slot = ModelSlot(before_job=self._forget)
        self.opened: Opened | None = None
        self._dtype = settings.dtype
        self._loaded: _Loaded | None = None
        self._works: queue.SimpleQueue[tuple[Ticket, Flow, Work] | None] = queue.SimpleQueue()
        self._flows: set[Flow] = set()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    @property
    def loaded(self) -> dict[str, Any] | None:
        """What is in memory: run, base, variants, dtype and device; None where nothing is."""
        loaded = self._loaded
        if loaded is None:
            return None
        return {
            "run": loaded.opened.run,
            "base": loaded.opened.base,
            "variants": list(loaded.infos),
            "dtype": loaded.capabilities.dtype,
            "device": loaded.capabilities.where,
        }

    def start(self, kind: str, work: Work) -> Flow:
        """Have a generation done as soon as the model is free; call it in the client's event loop.

        Args:
            kind: what for, as others are told who wait.
            work: called in the generating thread, with the flow that it is to speak to and whose cancellation it reads.
                What it raises is the flow's last event, ``error``.

        Returns:
            The flow, which must be closed.

        Raises:
            Busy: a job has the model or waits for it, or too many wait.
        """
        ticket = self.slot.line_up(kind, behind_jobs=False)
        flow = Flow(ticket)
        with self._lock:
            self._flows.add(flow)
            self._works.put((ticket, flow, work))
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="tunesmith-live", daemon=True)
                self._thread.start()
        return flow

    def engine(
        self, opened: Opened, variants: Sequence[str], progress: Callable[[ts.Progress], None]
    ) -> tuple[ts.Engine, dict[str, ts.VariantInfo]]:
        """Have an engine that holds some variants of a run; what is lacking is loaded.  Needs the slot.

        Args:
            opened: the run and its base.
            variants: ``base``, the names of the run's adapters, or directories, each as ``Places.variant`` names it.
            progress: told of what is loaded.

        Returns:
            The engine, and what each variant is by the name that it was asked for; the engine's name of it is in there.

        Raises:
            TunesmithError: there is no such variant, or it cannot be loaded.
        """
        loaded, wanted = self._loaded, list(dict.fromkeys(["base", *variants]))
        same = loaded is not None and loaded.opened == opened and _unchanged(loaded)
        if loaded is not None and same and all(name in loaded.infos for name in wanted):
            return loaded.engine, dict(loaded.infos)
        run = ts.open_run(opened.run)
        _require(run, wanted)
        if loaded is not None and same:
            if self._attach(loaded, run, wanted, progress):
                return loaded.engine, dict(loaded.infos)
            before = [name for name in loaded.infos if name not in wanted]
            wanted = ["base", *before[-_KEPT_VARIANTS:], *wanted[1:]]
        del loaded
        self._forget()
        engine, infos = ts.load_engine(run, _labelled(wanted), base=opened.base, dtype=self._dtype, progress=progress)
        self._loaded = _Loaded(opened, engine, engine.capabilities)
        for name, info in zip(wanted, infos, strict=True):
            self._loaded.add(name, info)
        return engine, dict(self._loaded.infos)

    def unload(self) -> None:
        """Let go of the engine.

        Raises:
            Busy: it is in use.
        """
        with self.slot.hold("unload", wait=False):
            self._forget()

    def stop(self) -> None:
        """End all generations and their streams; waits for nobody."""
        with self._lock:
            flows = list(self._flows)
        for flow in flows:
            flow.close()

    def close(self) -> None:
        """Stop, and let go of the thread and the engine, after the token that is being computed."""
        self.stop()
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            self._works.put(None)
            thread.join(timeout=_GOODBYE_S)
        if thread is None or not thread.is_alive():
            self._forget()

    def _attach(
        self, loaded: _Loaded, run: ts.Run, wanted: Sequence[str], progress: Callable[[ts.Progress], None]
    ) -> bool:
        """Put what is lacking beside what is there; False where all must be loaded anew."""
        lacking = [name for name in wanted if name not in loaded.infos]
        for name in [name for name in loaded.attached if name not in wanted]:
            if len(loaded.infos) + len(lacking) > _MOST_VARIANTS:
                loaded.detach(name)
        there = len(loaded.infos)
        if there + len(lacking) > _MOST_VARIANTS:
            return False
        labels = _labelled([*loaded.infos, *lacking])[there:]
        try:
            for done, (name, label) in enumerate(zip(lacking, labels, strict=True)):
                progress(ts.Progress("load", done, len(lacking), "models", name))
                loaded.attach(name, ts.attached_variant(loaded.engine, run, label))
        except ts.TunesmithError:  # a complete model, or an adapter that cannot come after others
            return False
        return True

    def _forget(self) -> None:
        if self._loaded is not None:
            for name in list(self._loaded.attached):
                self._loaded.detach(name)
            self._loaded = None
            gc.collect()  # a model's modules point at each other
            torch = sys.modules.get("torch")
            if torch is not None and torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _run(self) -> None:
        while (item := self._works.get()) is not None:
            self._do(*item)
            del item  # not kept until the next one comes

    def _do(self, ticket: Ticket, flow: Flow, work: Work) -> None:
        try:
            ticket.wait(flow.cancellation)
            work(flow)
        except ts.Cancelled:
            pass
        except ts.TunesmithError as error:
            flow.say("error", error.with_traceback(None))
        except Exception as error:  # noqa: BLE001 - a mistake of ours must not end the thread
            flow.say("error", InternalError.of(error))
        finally:
            ticket.leave()
            with self._lock:
                self._flows.discard(flow)
            flow.end()


def _require(run: ts.Run, variants: Sequence[str]) -> None:
    """Refuse names that the run has not, before anything is let go of for them."""
    there = ["base", *(checkpoint.name for checkpoint in run.checkpoints)]
    for name in variants:
        if _OWN_NAME.fullmatch(name) and name not in there:
            raise NotThereError(
                f"The run has no {name}.", where=run.path, expected=", ".join(there), next_step="choose one of these"
            )


def _labelled(variants: Sequence[str]) -> list[str]:
    """Variants as :func:`tunesmith.load_engine` takes them: every directory gets a name that no other one has."""
    taken = {name for name in variants if _OWN_NAME.fullmatch(name)}
    result = []
    for name in variants:
        if name in taken:
            result.append(name)
            continue
        label, equals, place = ("", "", name) if Path(name).is_absolute() else name.partition("=")
        label, place = (label, place) if equals else (Path(name).name.replace("=", "-").strip() or "model", name)
        labels = (label if turn == 1 else f"{label}-{turn}" for turn in range(1, len(variants) + 2))
        label = next(one for one in labels if one not in taken)
        taken.add(label)
        result.append(f"{label}={place}")
    return result


def _unchanged(loaded: _Loaded) -> bool:
    """Whether the files are still those that were loaded; a training may go on and write them anew."""
    return all(_stamp(path) == stamp for path, stamp in loaded.stamps.items())


def _stamp(directory: str) -> object:
    try:
        with os.scandir(directory) as entries:
            found = [(one.name, one.stat()) for one in entries if one.name.endswith(_OWN_FILES)]
    except OSError:
        return None
    return sorted((name, stat.st_mtime_ns, stat.st_size, stat.st_ino) for name, stat in found)
