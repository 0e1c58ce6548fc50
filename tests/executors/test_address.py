"""Addresses: what they open, and what is said where nobody is."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tunesmith as ts
from tests.executors.conftest import free_port
from tests.executors.work import Model, slow, until
from tunesmith.cli.app import app
from tunesmith.cli.output import say_retried
from tunesmith.executors import workers_of
from tunesmith.executors.on_dask import DaskExecutor


@pytest.mark.parametrize("address", [None, "local"])
def test_local_is_the_verbs_own_threads(address: str | None) -> None:
    """None, which every verb takes for a pool of threads."""
    with ts.executor_of(address) as executor, workers_of(executor) as workers:
        assert executor is None
        assert (workers.own, workers.slots) == (True, os.cpu_count())


def test_processes_are_as_many_as_asked_for() -> None:
    """Without a number, one a core."""
    for address, count in (("processes", os.cpu_count()), ("processes:3", 3)):
        with ts.executor_of(address) as pool:
            assert isinstance(pool, ProcessPoolExecutor)
            assert pool._max_workers == count  # type: ignore[attr-defined]


def test_slots_are_the_clusters(dask_threads: DaskExecutor) -> None:
    """As many as it has threads, whatever this machine has; what is under way is bounded by them."""
    with workers_of(dask_threads) as workers:
        assert (workers.own, workers.slots) == (False, 3)


@pytest.mark.parametrize(
    "address",
    ["", "cluster", "local:2", "processes:", "processes:0", "processes:-1", "processes:two", "processes://host:1"]
    + [f"{kind}{rest}" for kind in ("ray", "dask") for rest in (":4", "://", "://host", "://host:port", "://h:1/x")],
)
def test_no_such_address(address: str) -> None:
    """What is no address is refused, and what would be one is said."""
    with pytest.raises(ts.TunesmithError, match="no such executor") as caught, ts.executor_of(address):
        pass
    assert caught.value.expected is not None
    assert "ray://HOST:PORT" in caught.value.expected


@pytest.mark.parametrize("kind", ["ray", "dask"])
def test_nobody_listens(kind: str) -> None:
    """Said within seconds, where the libraries would try for a minute."""
    pytest.importorskip({"ray": "ray", "dask": "distributed"}[kind])
    address, started = f"{kind}://127.0.0.1:{free_port()}", time.monotonic()
    with pytest.raises(ts.TunesmithError, match="cannot be joined") as caught, ts.executor_of(address):
        pass
    assert caught.value.where == address
    assert time.monotonic() - started < 5


def test_a_client_server_that_broke_is_said_how_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    """By chance gRPC breaks it, when Ray forks: here it does so surely."""
    ray = pytest.importorskip("ray")

    def broken(**_: object) -> None:
        raise ConnectionAbortedError("Initialization failure from server:\n")

    monkeypatch.setattr(ray, "init", broken)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"ray://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ts.TunesmithError, match="cannot be joined") as caught, ts.executor_of(address):
            pass
    assert "GRPC_ENABLE_FORK_SUPPORT=0" in str(caught.value.next_step)


@pytest.mark.parametrize(("kind", "package"), [("ray", "ray"), ("dask", "distributed")])
def test_a_missing_package_is_named(kind: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the extra that brings it."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ts.MissingExtraError, match=package) as caught, ts.executor_of(f"{kind}://127.0.0.1:1"):
        pass
    assert caught.value.next_step == f'pip install "tunesmith[{kind}]"'


def test_the_command_line_says_so_and_ends_with_2(models: dict[str, Model], tmp_path: Path) -> None:
    """A document on stdout, and nothing is made."""
    words = ["merge", models["llama"].run, "--base", models["llama"].base, "--out", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith", *map(str, words), "--executor", "cluster", "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert json.loads(done.stdout)["what"] == "There is no such executor."
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("units", "said"), [(0, ""), (1, "1 unit of work ran again"), (1200, "1,200 units of work")])
def test_what_ran_again_is_said_on_stderr(units: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Where anything did."""
    say_retried(units)
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert bool(err) == bool(units)


@pytest.mark.parametrize(
    "words", [["quantize", "run", "--compare", "int8"], ["verify", "directory"], ["verify", "run", "model.gguf"]]
)
def test_where_it_has_no_meaning_it_is_refused(words: list[str]) -> None:
    """What runs on this machine whatever was asked says so."""
    done = CliRunner().invoke(app, [*words, "--executor", "processes"])
    assert done.exit_code != 0
    assert "--executor" in done.output or "--executor" in str(getattr(done.exception, "where", ""))


def test_processes_end_with_their_parent_and_not_by_its_interrupt(tmp_path: Path) -> None:
    """Ctrl-C reaches the whole group: the parent decides; and a parent that is killed leaves nobody."""
    program = (
        "import sys, tunesmith as ts\nfrom pathlib import Path\nfrom tests.executors.work import slow\n"
        "if __name__ == '__main__':\n"
        "    with ts.executor_of('processes:1') as pool:\n"
        "        pool.submit(slow, Path(sys.argv[1]), 60).result()\n"
    )
    file = tmp_path / "program.py"
    file.write_text(program)
    seen = tmp_path / "seen"
    seen.mkdir()
    parent = subprocess.Popen(
        [sys.executable, str(file), str(seen)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])},
    )
    try:
        until(lambda: list(seen.iterdir()))
        worker = int(next(seen.iterdir()).name.split("-")[1])
        os.kill(worker, signal.SIGINT)
        time.sleep(0.8)
        os.kill(worker, 0)
        assert not list(seen.glob("ended-*"))
    finally:
        parent.kill()
        parent.wait()
    until(lambda: not Path(f"/proc/{worker}").exists() or "Z" in Path(f"/proc/{worker}/stat").read_text().split()[2])
    assert slow.__module__ == "tests.executors.work"
