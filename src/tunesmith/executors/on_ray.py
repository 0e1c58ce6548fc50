"""Ray: tasks of one core each, spread over the nodes; Ray itself runs none of them again."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from tunesmith.errors import MissingExtraError
from tunesmith.executors.cluster import Call, ClusterExecutor, WorkerLostError, call_here, own_version
from tunesmith.executors.reach import cannot_join, require_listener

_QUIET: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "logging_level": logging.ERROR}
_STORE_BYTES = 100 << 20  # units hand on paths and receipts
_LOST = (
    "LocalRayletDiedError",
    "NodeDiedError",
    "ObjectLostError",
    "OutOfMemoryError",  # Ray ended the worker, for its node had no more memory
    "OwnerDiedError",
    "TaskCancelledError",  # and not by us
    "WorkerCrashedError",
)

# The client server forks a process for every client, and what gRPC does at forks ends some of them, or the server.
_CLIENT_DIED = "start the cluster's head again, with GRPC_ENABLE_FORK_SUPPORT=0 in its environment"


@contextmanager
def on_ray(address: str | None) -> Iterator[RayExecutor]:
    """An executor on a Ray cluster.

    Args:
        address: of its Ray Client server, ``ray://HOST:PORT``; None for the cluster that this process has joined, that
            ``RAY_ADDRESS`` names or that runs on this machine, or else for one that is started here and ended again.

    Raises:
        MissingExtraError: ``ray`` is not installed.
        TunesmithError: nobody answers, or other versions.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MissingExtraError("Running on Ray", "ray", "ray") from error
    joined = not (ray.is_initialized() and address is None)
    if joined:
        with quietly(), _handlers_kept():
            _join(ray, address or os.environ.get("RAY_ADDRESS"))
    executor = RayExecutor()
    try:
        with _notes_to_stderr():
            yield executor
    finally:
        try:
            executor.shutdown(cancel_futures=True)
        finally:
            if joined:
                with quietly():
                    ray.shutdown()


def _join(ray: Any, address: str | None) -> None:
    if address is not None and address not in ("auto", "local"):
        parts = urlsplit(address if "://" in address else f"gcs://{address}")
        require_listener(address, parts.hostname or "", parts.port or 0)
    try:
        if address != "local":
            try:
                ray.init(address=address or "auto", **_QUIET)
                return
            except ConnectionError:
                if address is not None:
                    raise
        ray.init(
            address="local",
            num_cpus=os.cpu_count(),
            include_dashboard=False,
            object_store_memory=_STORE_BYTES,
            **_QUIET,
        )
    except BaseException as error:
        ray.shutdown()  # what was started of it
        if isinstance(error, ConnectionAbortedError):
            raise cannot_join(address or "ray", error, next_step=_CLIENT_DIED) from error
        if isinstance(error, Exception):  # Ray raises what it likes: of versions, of tokens, of connections
            raise cannot_join(address or "ray", error) from error
        raise


@contextmanager
def quietly() -> Iterator[None]:
    """Without Ray's notes of what it starts and ends, Ray Data's among them."""
    loggers = [logging.getLogger(name) for name in ("ray", "ray.data")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _notes_to_stderr() -> Iterator[None]:
    """Ray's note that a node is lost goes to stdout, where data goes, and no setting of Ray's says otherwise."""
    from ray._private import worker

    plain = getattr(worker, "print_to_stdstream", None)
    if plain is None:
        yield
        return

    def to_stderr(data: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        plain({**data, "is_err": True}, *args, **kwargs)

    worker.print_to_stdstream = to_stderr
    try:
        yield
    finally:
        worker.print_to_stdstream = plain


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Ray's handler of SIGTERM would end the process before our work has cleaned up."""
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


class RayExecutor(ClusterExecutor):
    """Runs calls on the Ray cluster that this process has joined."""

    def __init__(self) -> None:
        super().__init__()
        import ray

        self._ray = ray
        self._version = own_version()
        self._remote = ray.remote(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")(call_here)

    @property
    def slots(self) -> int:
        """The processors that Ray hands out."""
        return int(self._ray.cluster_resources().get("CPU", 1))

    def _start(self, call: Call, ended: Callable[[], None]) -> _RayTask:
        # Inline, and not from Ray's store: to other nodes a driver that has just joined is a dead owner for a while.
        reference = self._remote.remote(self._version, call.work, call.args, call.kwargs)
        return _RayTask(self._ray, reference, ended)


class _RayTask:
    def __init__(self, ray: Any, reference: Any, ended: Callable[[], None]) -> None:
        self._ray, self._reference = ray, reference
        self._done = reference.future()
        self._done.add_done_callback(lambda _: ended())

    def result(self) -> Any:
        errors = self._ray.exceptions
        lost = tuple(getattr(errors, name) for name in _LOST if hasattr(errors, name))
        try:
            return self._done.result()
        except errors.RayTaskError as error:
            if isinstance(error.cause, lost):  # what it was given went with somebody else
                raise WorkerLostError(_first_line(error.cause)) from error
            own = error.cause if isinstance(error.cause, BaseException) else BrokenExecutor(str(error))
            raise own from error
        except lost as error:
            raise WorkerLostError(_first_line(error)) from error
        except errors.RayError as error:
            raise BrokenExecutor(str(error)) from error

    def stop(self) -> None:
        self._ray.cancel(self._reference, force=False)

    def join(self) -> None:
        """A cancelled task's reference is not ready before the task has ended."""


def _first_line(error: BaseException) -> str:
    """What of Ray's words is for people: behind it come pages on where its logs are."""
    return str(error).strip().partition("\n")[0]
