"""A Ray cluster that loses a node, that is interrupted, and that is spoken to from the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import tunesmith as ts
from tests.executors.conftest import NODE
from tests.executors.work import Model, SlowRay, hashes, planned, until
from tunesmith.errors import OutputError
from tunesmith.progress import Cancellation

pytestmark = pytest.mark.cluster


@pytest.fixture
def joined(ray_nodes: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is the cluster's driver, by hand."""
    import ray

    monkeypatch.setenv("RAY_ADDRESS", ray_nodes.address)
    with ts.executor_of("ray"):
        yield
    assert not ray.is_initialized()


def processes_of(node: Any) -> list[psutil.Process]:
    """A node's raylet and all that it started."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [raylet, *raylet.children(recursive=True)]


@pytest.mark.usefixtures("joined")
def test_a_node_that_is_lost_costs_a_merge_nothing_but_time(
    ray_nodes: Any,
    models: dict[str, Model],
    expected: dict[str, dict[str, Any]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Killed with its workers in the middle of it: the same bytes, and how many units ran again is in the record."""
    node = ray_nodes.add_node(**NODE)
    executor = SlowRay()
    plan, found = planned(models["experts"], tmp_path / "out"), []
    until(lambda: executor.slots == 3)
    written = threading.Event()

    def told(event: ts.Progress) -> None:
        if event.stage == "merge" and event.done:
            written.set()

    merge = threading.Thread(
        target=lambda: found.append(ts.merge(plan, executor=executor, certificate=False, progress=told))
    )
    merge.start()
    assert written.wait(60)
    until(lambda: any("slowly" in one.name() or "call_here" in one.name() for one in processes_of(node)))
    for process in processes_of(node):
        process.kill()
    merge.join(120)
    executor.shutdown()
    ray_nodes.remove_node(node, allow_graceful=False)
    (merged,) = found
    assert merged.retried_units > 0
    assert hashes(merged.path) == expected["experts"]["merged"]
    assert capfd.readouterr().out == ""


@pytest.mark.usefixtures("joined")
@pytest.mark.parametrize("how", ["flag", "interrupt"])
def test_a_merge_that_is_cancelled_leaves_nothing_and_nobody(
    models: dict[str, Model], tmp_path: Path, how: str
) -> None:
    """The flag is read while units are under way, and they have ended before their directory goes; so on Ctrl-C."""
    executor, cancellation = SlowRay(), Cancellation()
    plan = planned(models["experts"], tmp_path / "out")
    stop = cancellation.cancel if how == "flag" else lambda: os.kill(os.getpid(), signal.SIGINT)
    threading.Timer(1.5, stop).start()
    with pytest.raises(ts.Cancelled if how == "flag" else KeyboardInterrupt):
        ts.merge(plan, executor=executor, certificate=False, cancellation=cancellation)
    assert list(tmp_path.iterdir()) == []
    assert not executor._open
    executor.shutdown()


@pytest.mark.usefixtures("joined")
def test_a_base_that_cannot_be_read_is_tried_three_times(models: dict[str, Model], tmp_path: Path) -> None:
    """The error says what the system says."""
    with ts.executor_of("ray") as executor:
        plan = planned(models["experts"], tmp_path / "out")
        moved = tmp_path / "moved"
        cancel = threading.Event()

        def told(event: ts.Progress) -> None:
            if event.stage == "merge" and event.detail == "making ready" and not cancel.is_set():
                cancel.set()
                models["experts"].base.rename(moved)

        try:
            with pytest.raises(OutputError, match="cannot be"):
                ts.merge(plan, executor=executor, certificate=False, progress=told)
        finally:
            moved.rename(models["experts"].base)
        assert executor is not None
        assert executor.retried >= 2  # type: ignore[attr-defined]


def test_handlers_of_signals_stay_ours(ray_nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own of SIGTERM ends the process."""
    monkeypatch.setenv("RAY_ADDRESS", ray_nodes.address)
    before = signal.signal(signal.SIGTERM, ours := lambda *_: None)
    try:
        with ts.executor_of("ray"):
            assert signal.getsignal(signal.SIGTERM) is ours
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


def command(model: Model, out: Path) -> list[str]:
    """A merge on Ray."""
    words = ["merge", model.run, "--base", model.base, "--out", out, "--executor", "ray", "--json"]
    return [sys.executable, "-m", "tunesmith", *map(str, words)]


def test_stdout_is_one_document(ray_nodes: Any, models: dict[str, Model], tmp_path: Path) -> None:
    """Whatever Ray has to say."""
    done = subprocess.run(
        command(models["llama"], tmp_path / "out"),
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
        env={**os.environ, "RAY_ADDRESS": ray_nodes.address},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["retried_units"] == 0
    assert "ray" not in done.stderr.lower()
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("wait_s", [0.5, 1.5])
def test_a_cluster_that_is_interrupted_as_it_starts_is_ended(
    models: dict[str, Model], tmp_path: Path, wait_s: float
) -> None:
    """Ctrl-C leaves neither files nor processes."""
    process = subprocess.Popen(
        command(models["llama"], tmp_path / "new" / "out"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_ADDRESS": "local"},
        start_new_session=True,
    )
    try:
        mine = psutil.Process(process.pid)
        until(lambda: [one for one in mine.children(recursive=True) if "raylet" in one.name()])
        started = mine.children(recursive=True)
        time.sleep(wait_s)
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert not (tmp_path / "new").exists()
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive
