"""How the tiles of many tensors are shared out over threads or processes, and told of."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, wait
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from typing import TypeVar

from threadpoolctl import threadpool_limits

from tunesmith.allocator import keep_freed_memory
from tunesmith.errors import TunesmithError
from tunesmith.executors import Workers
from tunesmith.progress import SharedProgress

T = TypeVar("T")

_LOOK_EVERY_S = 0.2
_BATCH_ELEMENTS = 1 << 25  # 64 MiB in bf16, as a merge's unit
_BATCHES_A_SLOT = 4  # at least, so that all end at about the same time


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
    running: deque[tuple[list[Part], Future[list[T]]]] = deque()
    pool, own = workers.pool, workers.own
    work = partial(_all_of, job, report.advance) if own else partial(_all_of, job, None)
    batches = ([part] for part in parts) if own else batched(parts, workers.slots)
    try:
        while True:
            for batch in islice(batches, max(0, 4 * workers.slots - len(running))):
                running.append((batch, pool.submit(work, batch)))
            if not running:
                return
            batch, future = running.popleft()
            while not wait([future], timeout=_LOOK_EVERY_S).done:
                report.advance(0, batch[0].name)
            results = future.result()
            if not own:
                report.advance(sum(part.elements for part in batch), batch[-1].name)
            yield from results
    except BaseException as error:
        report.failed.cancel()
        for _, future in running:
            future.cancel()
        if isinstance(error, BrokenExecutor):
            raise TunesmithError("A worker of the executor died.", found=error) from error
        raise


def batched(parts: Sequence[Part], slots: int) -> Iterator[list[Part]]:
    """Neighbouring parts that go to a worker together, for to hand something out costs milliseconds.

    Args:
        parts: all of them.
        slots: how many workers there are; each is to have some batches.
    """
    most = min(_BATCH_ELEMENTS, sum(part.elements for part in parts) // (_BATCHES_A_SLOT * slots))
    batch: list[Part] = []
    elements = 0
    for part in parts:
        if batch and elements + part.elements > most:
            yield batch
            batch, elements = [], 0
        batch.append(part)
        elements += part.elements
    if batch:
        yield batch


def _all_of(job: Callable[..., T], told: Callable[[int, str], None] | None, parts: Sequence[Part]) -> list[T]:
    """The results of a batch."""
    return [job(part) if told is None else job(part, told) for part in parts]


def settle_in() -> None:
    """What a thread or a process does before its first tile."""
    keep_freed_memory()
    if multiprocessing.parent_process() is not None:
        _one_thread_of_blas()


@lru_cache(maxsize=1)
def _one_thread_of_blas() -> None:
    """In a worker process of a pool, for good: its siblings use the other cores.  Threads are the caller's matter."""
    threadpool_limits(1)
