"""Requests as a Ray Data job: the same records, nothing asked twice, and what becomes of workers and of the key."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaForCausalLM

import tunesmith as ts
from tests.openai_server import Server, serve
from tests.tiny_models import TinyRun, build_tokenizer, chat, peft_alone, row
from tunesmith.errors import PromptError, TunesmithError
from tunesmith.models import Endpoint, RememberingEngine
from tunesmith.models.endpoint import on_ray
from tunesmith.models.engine import Generation, GenerationSettings, Request

pytestmark = pytest.mark.cluster

SHORT = GenerationSettings(greedy=True, max_new_tokens=4)
MODELS = {"base": "tiny", "final": "tuned"}
ROWS = [row(i, f"question {i}", f"the answer {i * i}") for i in range(6)]
REQUESTS = [Request(name, chat(f"question {i}")) for i in range(40) for name in MODELS]
KEY = "sesame-of-the-test"


@pytest.fixture(scope="module")
def servers(tiny: TinyRun) -> Iterator[list[Server]]:
    """Two servers of the base and the tuned model."""
    base, other = (LlamaForCausalLM.from_pretrained(tiny.base, dtype=torch.float32).eval() for _ in range(2))
    models = {"tiny": base, "tuned": peft_alone(other, tiny.adapters["final"]).eval()}
    with ExitStack() as stack:
        yield [stack.enter_context(serve(models, build_tokenizer())) for _ in range(2)]


@pytest.fixture(autouse=True)
def _manners(servers: list[Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(on_ray, "_ROUNDS_A_BATCH", 1)  # several batches of few rows
    monkeypatch.setattr(on_ray, "_IN_FLIGHT_A_WORKER", 4)
    for server in servers:
        server.behave()


@pytest.fixture(scope="module")
def executor() -> Iterator[Any]:
    """A Ray of two processors on this machine, started once."""
    ray = pytest.importorskip("ray", reason="needs ray (the ray extra)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "local")
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("RAY_enable_export_api_write", "1")  # what a dashboard's collector reads, arguments of jobs too
        patch.setattr(os, "cpu_count", lambda: 2)
        with ts.executor_of("ray") as started:
            yield started
    assert not ray.is_initialized()


def engine(servers: list[Server], executor: Any, **options: Any) -> Endpoint:
    """Both servers, asked by workers."""
    urls = [server.url for server in servers]
    made = Endpoint(urls, **{"models": MODELS, "parallel": 4, "executor": executor, **options})
    assert made.capabilities.servers == tuple(urls)
    for server in servers:
        server.behave()
    return made


def asked(servers: list[Server]) -> int:
    """How many prompts they were given."""
    return sum(server.asked for server in servers)


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def session() -> Path:
    """Where the cluster keeps its logs."""
    import ray

    return Path(ray._private.worker._global_node.get_session_dir_path())


def workers() -> list[psutil.Process]:
    """The processes of Ray Data's workers."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "MapWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_comparison_is_the_same_as_without_ray_and_is_gone_on_with(
    servers: list[Server], executor: Any, tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replies, scores and records; the second time, without Ray and with one server only, nothing is asked.

    The key reaches the workers, and is in no log of the cluster, nor in what Ray Data exports of a job's arguments.
    """
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for server in servers:
        server.behave(key=KEY)
    run = tiny.adapters["final"]
    how: dict[str, Any] = {"models": [f"{name}={model}" for name, model in MODELS.items()], "settings": SHORT}
    how |= {"prompts": ROWS, "data": ROWS}
    urls = [server.url for server in servers]
    plain = ts.compare(run, endpoint=urls[0], **how)
    kept = ts.compare(run, endpoint=urls, executor=executor, records=tmp_path, parallel=4, **how)
    assert [(one.variant, one.prompt_id, one.text) for one in kept.replies] == [
        (one.variant, one.prompt_id, one.text) for one in plain.replies
    ]
    assert kept.scores == plain.scores
    assert kept.row_losses == plain.row_losses
    files = [file for file in session().rglob("*") if file.is_file()]
    assert [file for file in files if "DATASET_METADATA" in file.name]
    assert not [file for file in files if KEY.encode() in file.read_bytes()]
    for server in servers:
        server.behave()
    again = ts.compare(run, endpoint=urls[1], records=tmp_path, **how)
    assert (again.replies, again.scores) == (kept.replies, kept.scores)
    assert asked(servers) > 10  # of its probe
    assert not [body for server in servers for _, body in server.seen if "question" in json.dumps(body)]


def test_a_worker_that_is_killed_costs_time_only(servers: list[Server], executor: Any, tmp_path: Path) -> None:
    """In the middle of the job: every row is told and kept once, in the thread that asked."""
    made = engine(servers, executor)
    expected = [one.text for one in Endpoint(servers[0].url, models=MODELS).generate(REQUESTS, SHORT)]
    for server in servers:
        server.behave(pause_s=0.02)
    done: list[int] = []
    killed: list[int] = []

    def told(index: int, _: Generation) -> None:
        done.append(index)
        assert threading.current_thread() is threading.main_thread()
        if not killed:
            (victim, *_) = workers()
            killed.append(victim.pid)
            victim.kill()

    kept = RememberingEngine(made, tmp_path, named=True)
    assert [one.text for one in kept.generate(REQUESTS, SHORT, on_done=told)] == expected
    assert killed
    assert sorted(done) == list(range(len(REQUESTS)))
    assert kept.written == len(REQUESTS)


def test_a_cancellation_reaches_the_workers(servers: list[Server], executor: Any) -> None:
    """Every connection is closed soon, and what was answered is told."""
    made, stop = engine(servers, executor), ts.Cancellation()
    for server in servers:
        server.behave(pause_s=0.3)
    done: list[int] = []

    def cancel() -> None:
        until(lambda: asked(servers) > 4)
        stop.cancel()

    threading.Thread(target=cancel).start()
    settings = GenerationSettings(greedy=True, max_new_tokens=30)
    answers = made.generate(REQUESTS, settings, on_done=lambda index, _: done.append(index), cancellation=stop)
    assert sum(answer.stop_reason == "cancelled" for answer in answers) == len(REQUESTS) - len(done) > 60
    until(lambda: sum(server.active for server in servers) == 0, 5)
    assert asked(servers) < 30


def test_what_fails_is_said_as_without_ray_and_the_rest_is_answered(servers: list[Server], executor: Any) -> None:
    """Rows over the window are named; a server that goes is said; where both are gone, that is the error."""
    made = engine(servers, executor, parallel=2)
    done: list[int] = []
    servers[0].behave(key="another")
    requests = [Request("base", "x" * 700), *REQUESTS[:6]]
    with pytest.raises(PromptError) as caught:
        made.generate(requests, SHORT, on_done=lambda index, _: done.append(index))
    assert "1 of 7 requests have no answer" in str(caught.value)
    assert "prompt 0 (base)" in str(caught.value)
    assert sorted(done) == list(range(1, 7))
    (lost,) = [one for one in made.capabilities.findings if one.code == "endpoint_server_lost"]
    assert lost.params["where"] == servers[0].url
    servers[1].behave(key="another")
    with pytest.raises(TunesmithError, match="wants another key"):
        made.generate(REQUESTS, SHORT)


def test_stdout_is_one_document(servers: list[Server], executor: Any, tiny: TinyRun, tmp_path: Path) -> None:
    """The command line, in a process of its own, on the cluster that is there."""
    import ray

    assert executor.slots == 2
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    words = ["compare", tiny.adapters["final"], "--prompts", prompts, "--max-new-tokens", 2, "--json"]
    words += [word for server in servers for word in ("--endpoint", server.url)]
    words += ["--model", "base=tiny", "--model", "final=tuned", "--executor", "ray", "--records", tmp_path / "kept"]
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert len(document["replies"]) == 4
    assert document["engine"]["servers"] == [server.url for server in servers]
    assert "ray" not in done.stderr.lower(), done.stderr
