"""Dask: its own client, with our rule of what runs again.

What differs from Ray: Dask runs a call again itself where its worker is lost, up to ``allowed-failures`` of the
scheduler's configuration (3), and does not say so, so that it is not counted.  A call that has begun cannot be
interrupted; a cancelled one that is under way ends by itself, and is waited for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tunesmith.errors import MissingExtraError
from tunesmith.executors.cluster import Call, ClusterExecutor, call_here, own_version
from tunesmith.executors.reach import CONNECT_SECONDS, cannot_join, require_listener

if TYPE_CHECKING:
    from distributed import Client
    from distributed import Future as DaskFuture

_LOOK_EVERY_S = 0.05


@contextmanager
def on_dask(address: str | None) -> Iterator[DaskExecutor]:
    """An executor on a Dask cluster.

    Args:
        address: the scheduler's, ``dask://HOST:PORT``; None for the one that Dask's configuration names
            (``DASK_SCHEDULER_ADDRESS``), or for workers on this machine, one a core.

    Raises:
        MissingExtraError: ``distributed`` is not installed.
        TunesmithError: nobody answers.
    """
    try:
        import dask
        from distributed import Client, LocalCluster
    except ModuleNotFoundError as error:
        raise MissingExtraError("Running on Dask", "dask", "distributed") from error
    if address is not None:
        parts = urlsplit(address)
        require_listener(address, parts.hostname or "", parts.port or 0)
        address = address.replace("dask://", "tcp://")
    address = address or dask.config.get("scheduler-address", None)
    local = None
    if address is None:
        # Its workers would tell with a traceback that the scheduler has ended.
        quiet = {"silence_logs": logging.CRITICAL, "dashboard_address": "127.0.0.1:0"}
        local = LocalCluster(threads_per_worker=1, processes=True, **quiet)
    try:
        client = Client(local or address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise cannot_join(str(address or "dask"), error) from error
    executor = DaskExecutor(client)
    try:
        yield executor
    finally:
        try:
            executor.shutdown(cancel_futures=True)
        finally:
            client.close()
            if local is not None:
                local.close()


class DaskExecutor(ClusterExecutor):
    """Runs calls on a Dask cluster.

    Args:
        client: connected to it.
    """

    def __init__(self, client: Client) -> None:
        super().__init__()
        self._client = client

    @property
    def slots(self) -> int:
        """The threads of all workers."""
        return sum(self._client.nthreads().values())

    def _start(self, call: Call, ended: Callable[[], None]) -> _DaskCall:
        # Not pure: of equal calls Dask would run one.
        future = self._client.submit(call_here, own_version(), call.work, call.args, call.kwargs, pure=False)
        future.add_done_callback(lambda _: ended())
        return _DaskCall(self._client, future)


class _DaskCall:
    def __init__(self, client: Client, future: DaskFuture) -> None:
        self._client, self._future = client, future

    def result(self) -> Any:
        from distributed.scheduler import KilledWorker

        try:
            return self._future.result()
        except (KilledWorker, CancelledError) as error:  # Dask has run it again, or the scheduler is gone
            raise BrokenExecutor(str(error)) from error

    def stop(self) -> None:
        self._client.cancel([self._future])

    def join(self) -> None:
        """Dask forgets a cancelled call at once; its worker goes on to the end."""
        while any(self._client.run(_is_running, self._future.key, on_error="ignore").values()):
            time.sleep(_LOOK_EVERY_S)


def _is_running(key: str, dask_worker: Any) -> bool:
    """On a worker: whether a call is under way, cancelled or not."""
    return any(task.key == key for task in dask_worker.state.executing)
