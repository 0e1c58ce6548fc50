"""Tests of jobs: their order, their events, how they stop, and that who listens leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import tunesmith as ts
from tests.web.conftest import Page, raw, served, wait_for
from tunesmith.web import Settings, verbs
from tunesmith.web import app as app_module
from tunesmith.web import jobs as jobs_module
from tunesmith.web.jobs import KEPT_JOBS, MOST_QUEUED, Job, Jobs, Rate
from tunesmith.web.live import Busy, ModelSlot
from tunesmith.web.places import Places
from tunesmith.web.verbs import CleanupParams
from tunesmith.web.work import Verb, Work


class Workbench:
    """Jobs whose work is written by the test, through the same door as the real verbs.

    Args:
        root: the folder of the jobs.
    """

    def __init__(self, root: Path) -> None:
        self.slot = ModelSlot()
        self.jobs = Jobs(self.slot, Places(root), Settings(root=root))
        self.work: Callable[[Any], Any] = lambda _: {"made": True}
        self.needs_model = False

    def prepare(self, *_: Any) -> Work:
        """What a job will do: what the test says when it begins."""
        work = self.work
        return Work(command="tunesmith test", call=work, needs_model=self.needs_model)

    def start(self, work: Callable[[Any], Any] | None = None, *, queue: bool = True) -> Job:
        """Begin a job."""
        self.work = work or self.work
        return self.jobs.start("cleanup", {"run": "run"}, queue=queue)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workbench]:
    """Jobs of the test's own."""
    made = Workbench(tmp_path)
    monkeypatch.setattr(verbs, "VERBS", {"cleanup": Verb(CleanupParams, made.prepare)})
    monkeypatch.setattr(jobs_module, "VERBS", verbs.VERBS)
    yield made
    made.jobs.close()


def _kinds(job: Job) -> list[str]:
    return [event.kind for event in job.events_after(0)[0]]


def test_a_job_goes_from_queued_to_done_and_tells_it(bench: Workbench) -> None:
    """Its states, its log, its progress and its result, each with a number above the last."""

    def work(job: Any) -> Any:
        job.log("a line")
        job.progress(ts.Progress("write", 1, 2, "bytes", "file"))
        job.progress(ts.Progress("write", 2, 2, "bytes", "file"))
        return {"made": 7}

    job = bench.start(work)
    wait_for(lambda: job.ended)
    view: Any = job.view()
    assert view["state"] == "done"
    assert view["result"] == {"made": 7}
    assert view["log"] == ["a line"]
    assert view["progress"]["done"] == 2
    assert view["created_s"] <= view["started_s"] <= view["ended_s"] <= time.time()
    assert _kinds(job) == ["state", "state", "log", "progress", "result", "state"]
    numbers = [event.number for event in job.events_after(0)[0]]
    assert numbers == sorted(set(numbers))
    assert [event.kind for event in job.events_after(numbers[-2])[0]] == ["state"]


def test_jobs_run_one_at_a_time_in_their_order(bench: Workbench) -> None:
    """Each begins when the one before it has ended."""
    order: list[str] = []

    def work(job: Job) -> Any:
        order.append(f"begin {job.id}")
        time.sleep(0.01)
        order.append(f"end {job.id}")
        return {}

    jobs = [bench.start(work) for _ in range(4)]
    wait_for(lambda: all(job.ended for job in jobs))
    assert order == [f"{what} {job.id}" for job in jobs for what in ("begin", "end")]


def test_a_job_that_may_not_wait_is_told_who_is_at_work(bench: Workbench) -> None:
    """The same where too many wait already."""
    go = threading.Event()
    first = bench.start(lambda _: go.wait(5))
    with pytest.raises(Busy) as busy:
        bench.start(queue=False)
    assert busy.value.holder.job == first.id
    wait_for(lambda: first.state == "running")
    for _ in range(MOST_QUEUED):
        bench.start()
    with pytest.raises(Busy):
        bench.start()
    go.set()


def test_a_running_job_is_cancelled_through_its_cancellation(bench: Workbench) -> None:
    """It is seen to be stopping until it has stopped, and says what it kept."""
    seen: list[bool] = []

    def work(job: Any) -> Any:
        while True:
            try:
                job.cancellation.check()
            except ts.Cancelled:
                seen.append(bool(job.view()["cancelling"]))
                raise ts.Cancelled("3 results are kept.") from None
            time.sleep(0.005)

    job = bench.start(work)
    wait_for(lambda: job.state == "running")
    bench.jobs.cancel(job.id)
    wait_for(lambda: job.ended)
    view: Any = job.view()
    assert (view["state"], view["log"], view["cancelling"], view["result"]) == (
        "cancelled", ["3 results are kept."], False, None,
    )  # fmt: skip
    assert seen == [True]
    before = len(job.events_after(0)[0])
    bench.jobs.cancel(job.id)
    assert len(job.events_after(0)[0]) == before


def test_a_queued_job_is_cancelled_at_once_and_never_begins(bench: Workbench) -> None:
    """The one before it goes on."""
    go, begun = threading.Event(), []
    first = bench.start(lambda _: go.wait(5))
    second = bench.start(lambda job: begun.append(job))
    bench.jobs.cancel(second.id)
    assert second.state == "cancelled"
    assert not first.ended
    go.set()
    wait_for(lambda: first.ended)
    assert first.state == "done"
    assert not begun


def _raise(error: Exception) -> Any:
    raise error


def test_a_failed_job_keeps_its_error(bench: Workbench) -> None:
    """With all its parts; and the next job runs."""
    error = ts.TunesmithError("It is wrong.", where="here", expected="a", found="b", details=["c"], next_step="d")
    job, after = bench.start(lambda _: _raise(error)), bench.start(lambda _: {})
    wait_for(lambda: after.ended)
    assert job.view()["error"] == error.as_dict()
    assert (job.state, after.state) == ("failed", "done")


def test_a_full_disk_is_an_error_that_can_be_mended(bench: Workbench) -> None:
    """As for the command line."""
    job = bench.start(lambda _: _raise(OSError(errno.ENOSPC, "No space left on device", "/out/x")))
    wait_for(lambda: job.ended)
    error: Any = job.view()["error"]
    assert (error["error"], error["where"]) == ("TunesmithError", "/out/x")


def test_our_bug_is_told_by_a_reference(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    """The traceback is in the server's output, not in the answer; the thread lives on."""
    job, after = bench.start(lambda _: _raise(KeyError("a secret"))), bench.start(lambda _: {})
    wait_for(lambda: after.ended)
    error: Any = job.view()["error"]
    assert error["error"] == "InternalError"
    assert "secret" not in json.dumps(error)
    told = capsys.readouterr().err
    assert f"[{error['where']}]" in told
    assert "KeyError: 'a secret'" in told
    assert after.state == "done"


def test_progress_is_told_about_ten_times_a_second_and_coalesces(bench: Workbench) -> None:
    """Ten thousand steps leave one event a stage, the last; a log line between keeps its place."""

    def work(job: Any) -> Any:
        for step in range(10_000):
            job.progress(ts.Progress("read", step + 1, 10_000, "rows"))
        job.log("between")
        for step in range(10_000):
            job.progress(ts.Progress("write", step + 1, 10_000, "rows"))
        return {}

    job = bench.start(work)
    wait_for(lambda: job.ended)
    events = job.events_after(0)[0]
    told: list[Any] = [event.data for event in events if event.kind == "progress"]
    assert [(one["stage"], one["done"]) for one in told if one["done"] == 10_000] == [
        ("read", 10_000), ("write", 10_000),
    ]  # fmt: skip
    assert len(told) <= 4
    assert events[-1].number < 200


def test_endless_logs_stay_bounded(bench: Workbench) -> None:
    """The newest lines are kept, and long ones are cut."""

    def work(job: Any) -> Any:
        for number in range(3000):
            job.log(f"{number} " + "x" * 5000)
        return {}

    job = bench.start(work)
    wait_for(lambda: job.ended)
    view: Any = job.view()
    assert len(view["log"]) == 500
    assert view["log"][-1].startswith("2999 ")
    assert all(len(line) < 2100 for line in view["log"])
    assert len(job.events_after(0)[0]) <= 1000


def test_the_rate_is_smoothed_and_begins_anew_with_a_stage() -> None:
    """Ten units a second are told as such, from the second report on, and follow a change over some seconds."""
    rate = Rate()
    told = [rate.told(ts.Progress("a", 10 * second, 1000, "rows"), float(second)) for second in range(10)]
    assert told[0] is None
    assert told[1:] == pytest.approx([10.0] * 9)
    faster = [rate.told(ts.Progress("a", 90 + 50 * second, 1000, "rows"), 9.0 + second) for second in range(1, 60)]
    assert faster[0] is not None
    assert 10 < faster[0] < 25
    assert faster[-1] == pytest.approx(50, rel=0.01)
    assert rate.told(ts.Progress("b", 0, None, "rows"), 70.0) is None


def test_what_is_left_is_told_in_seconds(bench: Workbench) -> None:
    """From the rate, where the whole is known."""

    def work(job: Any) -> Any:
        job.progress(ts.Progress("a", 0, 100, "rows"))
        time.sleep(0.2)
        job.progress(ts.Progress("a", 50, 100, "rows"))
        return job.view()["progress"]

    job = bench.start(work)
    wait_for(lambda: job.ended)
    assert 0.1 < job.record["eta_s"] < 1
    assert 50 < job.record["rate"] < 500


def test_only_the_newest_ended_jobs_are_kept(bench: Workbench) -> None:
    """What is forgotten is told as such, and a job that has ended can be forgotten on request."""
    jobs = []
    for _ in range(KEPT_JOBS + 5):
        jobs.append(bench.start())
        wait_for(lambda: jobs[-1].ended)
    bench.start()
    wait_for(lambda: len(bench.jobs.newest_first()) <= KEPT_JOBS)
    with pytest.raises(ts.TunesmithError, match="no such job"):
        bench.jobs.get(jobs[0].id)
    bench.jobs.forget(jobs[-1].id)
    assert jobs[-1] not in bench.jobs.newest_first()


def test_a_job_that_runs_is_not_forgotten(bench: Workbench) -> None:
    """It has to be cancelled first."""
    go = threading.Event()
    job = bench.start(lambda _: go.wait(5))
    with pytest.raises(ts.TunesmithError, match="not ended"):
        bench.jobs.forget(job.id)
    go.set()


def test_a_job_waits_for_a_generation_and_can_be_cancelled_meanwhile(bench: Workbench) -> None:
    """What needs the model holds it while it runs, and gives it back however it ends."""
    bench.needs_model = True
    holders: list[Any] = []

    def work(_: Any) -> Any:
        holders.append(bench.slot.holder)
        raise RuntimeError("it ends badly")

    with bench.slot.hold("chat"):
        job = bench.start(work)
        waiting = bench.start(work)
        time.sleep(0.05)
        assert job.state == "queued"
        bench.jobs.cancel(waiting.id)
        assert waiting.state == "cancelled"
    wait_for(lambda: job.ended)
    assert holders[0].job == job.id
    wait_for(lambda: bench.slot.holder is None)
    with bench.slot.hold("chat"):
        stopped = bench.start(work)
        time.sleep(0.05)
        bench.jobs.cancel(stopped.id)
        wait_for(lambda: stopped.ended)
        assert stopped.state == "cancelled"
    assert len(holders) == 1


def test_the_end_of_the_server_stops_jobs_and_waits_for_them(bench: Workbench) -> None:
    """Work that reads its cancellation has ended when the server has; nothing new begins."""

    def work(job: Any) -> Any:
        while not job.cancellation.requested:
            time.sleep(0.005)
        job.cancellation.check()

    running, queued = bench.start(work), bench.start(work)
    wait_for(lambda: running.state == "running")
    bench.jobs.close()
    assert (running.state, queued.state) == ("cancelled", "cancelled")
    with pytest.raises(Busy):
        bench.start()
    assert not any(thread.name == "tunesmith-jobs" and thread.is_alive() for thread in threading.enumerate())


# Over the wire.


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Page, Workbench]]:
    """A served page whose jobs are the test's own."""
    bench = Workbench(tmp_path)
    monkeypatch.setattr(verbs, "VERBS", {"cleanup": Verb(CleanupParams, bench.prepare)})
    monkeypatch.setattr(jobs_module, "VERBS", verbs.VERBS)
    with served(Settings(root=tmp_path), jobs=bench.jobs) as page:
        yield page, bench


def test_events_are_replayed_from_any_number(desk: tuple[Page, Workbench]) -> None:
    """By the address, or as a browser asks when it comes back."""
    page, _ = desk
    job_id = page.start("cleanup", run="run")
    page.job(job_id)
    events = page.events(job_id)
    assert [kind for _, kind, _ in events] == ["state", "state", "result", "state"]
    assert [one["state"] for _, kind, one in events if kind == "state"] == ["queued", "running", "done"]
    assert events[2][2] == {"made": True}
    assert page.events(job_id, events[1][0]) == events[2:]
    assert page.events(job_id, **{"Last-Event-ID": str(events[2][0])}) == events[3:]
    assert page.events(job_id, events[-1][0]) == []


def test_events_arrive_while_a_job_runs(desk: tuple[Page, Workbench]) -> None:
    """Nothing on the way collects them; the stream ends with the job."""
    page, bench = desk
    go = threading.Event()

    def work(job: Any) -> Any:
        job.log("begun")
        go.wait(5)
        return {}

    job = bench.start(work)
    with _stream(page, job.id) as connection:
        text = b""
        while b"begun" not in text:
            text += connection.recv(4096)
        assert not job.ended
        go.set()
        while chunk := connection.recv(4096):
            text += chunk
    assert b'"state":"done"' in text


def _stream(page: Page, job_id: str) -> Any:
    connection = raw(page)

    class Opened:
        def __enter__(self) -> socket.socket:
            opened = connection.__enter__()
            request = f"GET /api/v1/jobs/{job_id}/events HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            opened.sendall(request.encode())
            return opened

        def __exit__(self, *told: Any) -> None:
            connection.__exit__(*told)

    return Opened()


def test_a_quiet_stream_says_that_it_is_still_there(
    desk: tuple[Page, Workbench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comment now and then, so that nothing on the way takes it for dead."""
    page, bench = desk
    monkeypatch.setattr(jobs_module, "HEARTBEAT_SECONDS", 0.05)
    go = threading.Event()
    job = bench.start(lambda _: go.wait(5))
    with _stream(page, job.id) as connection:
        text = b""
        while text.count(b": still here\n\n") < 2:
            text += connection.recv(4096)
    go.set()


def test_a_client_that_vanishes_is_let_go_of_within_two_seconds(desk: tuple[Page, Workbench]) -> None:
    """Though the job says nothing meanwhile."""
    page, bench = desk
    go = threading.Event()
    job = bench.start(lambda _: go.wait(10))
    with _stream(page, job.id) as connection:
        connection.recv(4096)
        wait_for(lambda: len(job._listeners) == 1)
    wait_for(lambda: not job._listeners)
    go.set()


def test_a_thousand_streams_opened_and_left_leave_nothing_behind(desk: tuple[Page, Workbench]) -> None:
    """No listener, no thread, no file; and the server answers as before."""
    page, bench = desk
    go = threading.Event()
    job = bench.start(lambda _: go.wait(30))
    page.get("/api/v1/jobs")
    process = psutil.Process()
    files, threads = process.num_fds(), threading.active_count()
    for place in range(1000):
        with _stream(page, job.id) as connection:
            if place % 10 == 0:
                connection.recv(64)
    wait_for(lambda: not job._listeners and process.num_fds() <= files + 2)
    assert threading.active_count() <= threads + 1
    assert page.get("/api/v1/jobs").status == 200
    go.set()


def test_the_server_ends_though_streams_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are ended first, and do not hold it up."""
    bench = Workbench(tmp_path)
    monkeypatch.setattr(jobs_module, "VERBS", {"cleanup": Verb(CleanupParams, bench.prepare)})

    def work(job: Any) -> Any:
        while not job.cancellation.requested:
            time.sleep(0.005)
        job.cancellation.check()

    with served(Settings(root=tmp_path), jobs=bench.jobs) as page:
        job = bench.start(work)
        stream = _stream(page, job.id)
        connection = stream.__enter__()
        connection.recv(4096)
        begun = time.monotonic()
    assert time.monotonic() - begun < 2.5
    assert job.state == "cancelled"
    stream.__exit__(None, None, None)


def test_streams_end_with_the_server_though_their_job_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that does not read its cancellation holds up neither its listeners nor the server."""
    bench = Workbench(tmp_path)
    monkeypatch.setattr(jobs_module, "VERBS", {"cleanup": Verb(CleanupParams, bench.prepare)})
    monkeypatch.setattr(app_module, "_STOPPING_SECONDS", 0.05)
    go = threading.Event()
    with served(Settings(root=tmp_path), jobs=bench.jobs) as page:
        job = bench.start(lambda _: go.wait(10))
        stream = _stream(page, job.id)
        connection = stream.__enter__()
        connection.recv(4096)
        begun = time.monotonic()
    assert time.monotonic() - begun < 2
    assert not job.ended
    go.set()
    stream.__exit__(None, None, None)
    bench.jobs.close()


def test_a_job_is_begun_listed_cancelled_and_forgotten_over_the_wire(desk: tuple[Page, Workbench]) -> None:
    """Each by its address and status."""
    page, bench = desk
    go = threading.Event()
    bench.work = lambda _: go.wait(5)
    first = page.start("cleanup", run="run")
    busy = page.post("/api/v1/jobs", {"kind": "cleanup", "params": {"run": "run"}, "queue": False})
    assert busy.status == 409
    assert busy.error["error"] == "Busy"
    assert busy.error["holder"]["job"] == first
    second = page.start("cleanup", run="run")
    listed = page.get("/api/v1/jobs").json["jobs"]
    assert [job["id"] for job in listed] == [second, first]
    assert "result" not in listed[0]
    assert page.ask("DELETE", f"/api/v1/jobs/{first}").status == 409
    assert page.post(f"/api/v1/jobs/{second}/cancel").json["job"]["state"] == "cancelled"
    assert page.ask("DELETE", f"/api/v1/jobs/{second}").status == 204
    for method, path in (("GET", ""), ("GET", "/events"), ("POST", "/cancel"), ("DELETE", ""), ("GET", "/download")):
        gone = page.ask(method, f"/api/v1/jobs/{second}{path}")
        assert gone.status == 404, (method, path)
        assert gone.error["error"] == "NotThereError"
    go.set()


@pytest.mark.skipif(sys.platform != "linux", reason="only there has a thread a niceness of its own")
def test_jobs_let_pages_and_answers_go_first(page: Page) -> None:
    """Their thread is nicer than the server's, and so is every thread that it starts."""
    page.done("merge", run="run", base="base", out="nice", dry_run=True)
    (thread,) = [one for one in threading.enumerate() if one is page.app.state.jobs._thread]
    assert thread.native_id is not None
    assert os.getpriority(os.PRIO_PROCESS, thread.native_id) > os.getpriority(os.PRIO_PROCESS, 0)
