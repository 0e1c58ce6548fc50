"""How the tiles of many tensors are shared out over threads or processes, and told of."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, wait
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TypeVar

from threadpoolctl import threadpool_limits

from tunesmith.allocator import keep_freed_memory
from tunesmith.errors import TunesmithError
from tunesmith.executors import Workers
from tunesmith.progress import SharedProgress

T = TypeVar("T")

_LOOK_EVERY_S = 0.2


@dataclass(frozen=True)
class Part:
    """Rows of one tensor, classified by themselves.

    Attributes:
        name: the tensor.
        start: the first row.
        stop: the row to stop before.
        elements: how many numbers they hold.
        compiled: whether to use the compiled arithmetic; the counts are the same.
    """

    name: str
    start: int
    stop: int
    elements: int
    compiled: bool = False


def in_order(workers: Workers, job: Callable[..., T], parts: Sequence[Part], report: SharedProgress) -> Iterator[T]:
    """The parts' results in the parts' order, so that their sums are always the same; a bounded number at once.

    Args:
        workers: what does the work.
        job: called with a part, and in threads of ours with what is to be told of elements done; picklable.
        parts: what there is to do.
        report: told of elements done.

    Raises:
        TunesmithError: a worker died.
    """
    running: deque[tuple[Part, Future[T]]] = deque()
    pool, own, todo = workers.pool, workers.own, iter(parts)
    try:
        while True:
            for part in islice(todo, max(0, 4 * workers.slots - len(running))):
                told = (report.advance,) if own else ()
                running.append((part, pool.submit(job, part, *told)))
            if not running:
                return
            part, future = running.popleft()
            while not wait([future], timeout=_LOOK_EVERY_S).done:
                report.advance(0, part.name)
            result = future.result()
            if not own:
                report.advance(part.elements, part.name)
            yield result
    except BaseException as error:
        report.failed.cancel()
        for _, future in running:
            future.cancel()
        if isinstance(error, BrokenExecutor):
            raise TunesmithError("A worker of the executor died.", found=error) from error
        raise


def settle_in() -> None:
    """What a thread or a process does before its first tile."""
    keep_freed_memory()
    if multiprocessing.parent_process() is not None:
        _one_thread_of_blas()


@lru_cache(maxsize=1)
def _one_thread_of_blas() -> None:
    """In a worker process of a pool, for good: its siblings use the other cores.  Threads are the caller's matter."""
    threadpool_limits(1)
