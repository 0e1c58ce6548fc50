"""Processes of their own on this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager


@contextmanager
def processes(workers: int | None = None) -> Iterator[Executor]:
    """A pool of processes, which are spawned, so that no lock of a thread here is held there for ever.

    Args:
        workers: how many; None for one a core.
    """
    pool = ProcessPoolExecutor(workers or os.cpu_count(), multiprocessing.get_context("spawn"), initializer=_settle_in)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _settle_in() -> None:
    """In a worker: leave Ctrl-C to the parent, which waits for what is under way, and do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
