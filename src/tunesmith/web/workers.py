"""Processes of their own for a job's arithmetic, so that an answer that streams need not wait for the interpreter."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager

_WORTH_BYTES = 64 << 20


@contextmanager
def worker_processes(work_bytes: int) -> Iterator[Executor | None]:
    """One worker a core, for as long as one job lasts; they inherit the niceness of the thread that asks.

    Args:
        work_bytes: how much there is to do.

    Yields:
        The executor; None where the work would be over before the processes are up.
    """
    if work_bytes < _WORTH_BYTES:
        yield None
        return
    pool = ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"), initializer=_end_with_parent)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """See to it that a worker does not outlive a server that was killed: it would wait for work for ever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
