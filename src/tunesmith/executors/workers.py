"""Who does a verb's units of work, how many of them are worth having under way, and how many ran again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from tunesmith.executors.cluster import ClusterExecutor


@dataclass(frozen=True)
class Workers:
    """What runs units of work.

    Attributes:
        pool: the executor.
        own: whether it is a pool of threads of ours, which can be told of progress and of the wish to stop.
    """

    pool: Executor
    own: bool

    @property
    def slots(self) -> int:
        """How many units it runs at once: what its cluster says, which may grow or shrink; else one a core."""
        if isinstance(self.pool, ClusterExecutor):
            return max(1, self.pool.slots)
        return os.cpu_count() or 1


@contextmanager
def workers_of(executor: Executor | None) -> Iterator[Workers]:
    """The caller's executor, or a pool of threads, one a core, where none is given."""
    if executor is not None:
        yield Workers(executor, own=False)
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield Workers(pool, own=True)


def retried_by(executor: Executor | None) -> int:
    """How many units an executor has run again up to now."""
    return executor.retried if isinstance(executor, ClusterExecutor) else 0
