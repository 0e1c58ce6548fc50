"""Processes of their own for a job's arithmetic, so that an answer that streams need not wait for the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager

import tunesmith as ts

_WORTH_BYTES = 64 << 20


@contextmanager
def worker_processes(work_bytes: int) -> Iterator[Executor | None]:
    """One worker a core, for as long as one job lasts; they inherit the niceness of the thread that asks.

    Args:
        work_bytes: how much there is to do.

    Yields:
        The executor; None where the work would be over before the processes are up.
    """
    with ts.executor_of("processes" if work_bytes >= _WORTH_BYTES else "local") as executor:
        yield executor
