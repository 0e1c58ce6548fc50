"""What runs again, what does not, and when a cancelled call counts as ended: on Dask in threads, and on Ray."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Future, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tunesmith as ts
from tests.executors.work import flaky, hashes, lost, slow, told, until, wrong
from tunesmith.errors import CheckpointError
from tunesmith.executors import ClusterExecutor, WorkerLostError, cluster, retried_by
from tunesmith.executors.on_dask import DaskExecutor
from tunesmith.executors.on_ray import _RayTask


@pytest.fixture(params=["dask", pytest.param("ray", marks=pytest.mark.cluster)])
def executor(request: pytest.FixtureRequest) -> Iterator[ClusterExecutor]:
    """An executor of every kind."""
    if request.param == "dask":
        yield request.getfixturevalue("dask_threads")
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", request.getfixturevalue("ray_nodes").address)
        with ts.executor_of("ray") as ray:
            yield ray


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_what_cannot_be_read_runs_again(executor: ClusterExecutor, tmp_path: Path, failures: int) -> None:
    """Three times in all, and it is counted."""
    before = retried_by(executor)
    assert executor.submit(flaky, tmp_path, failures).result(timeout=60) == failures + 1
    assert retried_by(executor) - before == failures


def test_what_never_can_be_read_raises_its_own_error(executor: ClusterExecutor, tmp_path: Path) -> None:
    """Of its own type, with all that it says."""
    before = retried_by(executor)
    with pytest.raises(PermissionError, match="not now") as caught:
        executor.submit(flaky, tmp_path, 9).result(timeout=60)
    assert type(caught.value) is PermissionError
    assert caught.value.filename == str(tmp_path)
    assert retried_by(executor) - before == 2
    assert len(hashes(tmp_path)) == 3


def test_another_error_is_final_at_once(executor: ClusterExecutor, tmp_path: Path) -> None:
    """A wrong tensor is as wrong elsewhere."""
    with pytest.raises(CheckpointError) as caught:
        executor.submit(wrong, tmp_path).result(timeout=60)
    assert type(caught.value) is CheckpointError
    assert (caught.value.where, caught.value.found) == (str(tmp_path), "NaN")
    assert len(hashes(tmp_path)) == 1


def test_cancelled_ones_have_ended_when_they_are_waited_for(executor: ClusterExecutor, tmp_path: Path) -> None:
    """Whoever deletes the directory next meets nobody there; those that had not begun never do."""
    seconds = 1 if isinstance(executor, DaskExecutor) else 30  # what Dask has begun goes on
    futures = [executor.submit(slow, tmp_path, seconds) for _ in range(6)]
    until(lambda: list(tmp_path.glob("begun-*")))
    started = time.monotonic()
    assert all(future.cancel() for future in futures)
    done, left = wait(futures, timeout=20)
    assert not left
    assert len(done) == 6
    assert time.monotonic() - started < 15
    begun, ended = len(list(tmp_path.glob("begun-*"))), len(list(tmp_path.glob("ended-*")))
    time.sleep(0.5)
    assert 1 <= begun == ended == len(list(tmp_path.glob("ended-*")))
    assert len(list(tmp_path.glob("begun-*"))) == begun <= 3


def test_another_version_of_tunesmith_is_refused(executor: ClusterExecutor, tmp_path: Path) -> None:
    """It might compute other bytes."""
    with pytest.raises(ts.TunesmithError, match="another version"):
        cluster.call_here("0.0.0", told, (tmp_path,), {})
    assert not hashes(tmp_path)
    assert executor.submit(told, tmp_path).result(timeout=60) == 1


def test_what_cannot_be_pickled_leaves_the_executor_usable(executor: ClusterExecutor, tmp_path: Path) -> None:
    """The error is the caller's at once, or the future's."""
    import threading

    with pytest.raises(Exception, match=r"pickle|serialize"):
        executor.submit(told, threading.Lock()).result(timeout=60)  # type: ignore[arg-type]
    assert executor.submit(told, tmp_path).result(timeout=60) == 1


def test_shut_down_it_takes_no_more(dask_threads: DaskExecutor, tmp_path: Path) -> None:
    """What was under way has ended, and its thread too."""
    mine = DaskExecutor(dask_threads._client)
    future = mine.submit(slow, tmp_path, 0.5)
    mine.shutdown()
    assert future.done()
    with pytest.raises(RuntimeError, match="after shutdown"):
        mine.submit(told, tmp_path)
    until(lambda: not mine._collector.is_alive())
    idle = DaskExecutor(dask_threads._client)
    idle.shutdown()
    until(lambda: not idle._collector.is_alive())


@pytest.mark.cluster
@pytest.mark.parametrize("losses", [1, 2])
def test_a_call_whose_worker_dies_runs_again(ray_executor: Any, tmp_path: Path, losses: int) -> None:
    """On Ray by us, counted."""
    before = ray_executor.retried
    assert ray_executor.submit(lost, tmp_path, losses).result(timeout=60) == losses + 1
    assert ray_executor.retried - before == losses


@pytest.mark.cluster
def test_a_call_that_takes_every_worker_along_breaks_off(ray_executor: Any, tmp_path: Path) -> None:
    """After three tries, as a broken executor, which every verb knows."""
    with pytest.raises(BrokenExecutor):
        ray_executor.submit(lost, tmp_path, 9).result(timeout=60)
    assert len(hashes(tmp_path)) == 3


@pytest.fixture
def ray_executor(ray_nodes: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Ray's."""
    monkeypatch.setenv("RAY_ADDRESS", ray_nodes.address)
    with ts.executor_of("ray") as executor:
        yield executor


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_ray_loses_is_lost_wherever_it_says_so(wrapped: bool) -> None:
    """Of the task itself, or as the error of one that could not be given its arguments."""
    ray = pytest.importorskip("ray", reason="needs ray (the ray extra)")
    gone = ray.exceptions.WorkerCrashedError()
    error = ray.exceptions.RayTaskError("call_here", "a traceback", gone) if wrapped else gone
    done: Future[None] = Future()
    done.set_exception(error)
    task = _RayTask(ray, SimpleNamespace(future=lambda: done), lambda: None)
    with pytest.raises(WorkerLostError) as caught:
        task.result()
    assert str(caught.value) == str(gone).strip().partition("\n")[0]
