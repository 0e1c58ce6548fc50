"""An executor on machines that may be lost: what runs there is ended before it counts as cancelled, or runs again."""

from __future__ import annotations

import importlib.metadata
import threading
from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

from tunesmith.errors import TunesmithError

TRIES = 3

T = TypeVar("T")


class WorkerLostError(BrokenExecutor):
    """The worker that a call ran on is gone, and nobody knows how far it came."""


class Running(Protocol):
    """One try of a call, on the cluster."""

    def result(self) -> Any:
        """What the call returned; raises what it raised, or :class:`WorkerLostError`.  It has ended."""

    def stop(self) -> None:
        """Ask it to end."""

    def join(self) -> None:
        """Wait until it has ended, where :meth:`stop` lets go of it before."""


@dataclass(eq=False)
class Call:
    """A call that was submitted.

    Attributes:
        work: the function.
        args: its arguments.
        kwargs: those by name.
        future: what the caller holds.  It stays pending, so that it can be cancelled, while the cluster is at work.
        tries: how often it was begun.
        running: the last try.
    """

    work: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    future: Future[Any] = field(default_factory=Future)
    tries: int = 0
    running: Running | None = None


class ClusterExecutor(Executor):
    """Runs calls on a cluster; those whose worker is lost, or that raise an ``OSError``, up to three times in all.

    A future that is cancelled stops its call, running or not, and :func:`concurrent.futures.wait` returns it when that
    has ended.

    Attributes:
        retried: how many calls were begun anew, counted once a time.
    """

    def __init__(self) -> None:
        self.retried = 0
        self._lock = threading.RLock()
        self._open: set[Call] = set()
        self._ended: SimpleQueue[Call | None] = SimpleQueue()
        self._closed = False
        self._collector = threading.Thread(target=self._collect, name="tunesmith-cluster", daemon=True)
        self._collector.start()

    @property
    @abstractmethod
    def slots(self) -> int:
        """How many calls the cluster runs at once, as it is now."""

    @abstractmethod
    def _start(self, call: Call, ended: Callable[[], None]) -> Running:
        """Begin a call on the cluster; ``ended`` is called once when its result can be had, from any thread."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Have the cluster call a function.

        Args:
            fn: a function that can be pickled, and called twice.
            args: its arguments, picklable.
            kwargs: those by name.

        Raises:
            RuntimeError: the executor was shut down.
        """
        call = Call(fn, args, kwargs)
        with self._lock:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            self._begin(call)
            self._open.add(call)
        call.future.add_done_callback(lambda future: self._stop(call) if future.cancelled() else None)
        return call.future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls.

        Args:
            wait: return when all calls have ended.
            cancel_futures: stop them.
        """
        with self._lock:
            self._closed = True
            left = [call.future for call in self._open]
            if not left:
                self._ended.put(None)
        if cancel_futures:
            for future in left:
                future.cancel()
        if wait:
            _wait_for(left)

    def _begin(self, call: Call) -> None:
        call.tries += 1
        call.running = self._start(call, lambda: self._ended.put(call))

    def _stop(self, call: Call) -> None:
        with self._lock:
            if call in self._open and call.running is not None:
                call.running.stop()

    def _collect(self) -> None:
        while (call := self._ended.get()) is not None:
            self._settle(call)
            with self._lock:
                if self._closed and not self._open:
                    return

    def _settle(self, call: Call) -> None:
        """Let the caller's future follow a try that has ended, or begin another."""
        value = error = None
        with self._lock:  # whoever begins it holds that until it is known here
            running = call.running
        assert running is not None, "what ended was begun"  # noqa: S101
        try:
            if call.future.cancelled():
                running.join()
            else:
                value = running.result()
        except BaseException as raised:  # noqa: BLE001 - the call's own, which is the caller's to see
            error = raised
        with self._lock:
            if isinstance(error, OSError | WorkerLostError) and call.tries < TRIES and not call.future.cancelled():
                try:
                    self._begin(call)
                except Exception as raised:  # noqa: BLE001 - the cluster is gone
                    error = raised
                else:
                    self.retried += 1
                    return
            self._open.discard(call)
        if call.future.set_running_or_notify_cancel():
            if error is not None:
                call.future.set_exception(error)
            else:
                call.future.set_result(value)


def _wait_for(futures: list[Future[Any]]) -> None:
    wait(futures)


def call_here(version: str, work: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    """Call a function on a worker, which must have this version of Tunesmith: another may compute other bytes.

    Raises:
        TunesmithError: it has another.
    """
    if version != (ours := own_version()):
        raise TunesmithError("A worker of the cluster has another version of Tunesmith.", expected=version, found=ours)
    return work(*args, **kwargs)


def own_version() -> str:
    """The version of Tunesmith that is installed here."""
    return importlib.metadata.version("tunesmith")
