"""Who has the model, the one engine that is loaded, and what is left when clients vanish."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

import tunesmith as ts
from tests.tiny_models import TinyRun
from tests.web.live_server import PLAIN, Served, serve, tiny_root, until
from tunesmith.web import Settings
from tunesmith.web.live import Busy, Flow, Live, ModelSlot, Opened

ENDLESS = {
    "run": "out/run",
    "variant": "base",
    "messages": [{"role": "user", "content": "2"}],
    "settings": {"max_new_tokens": 19_000, "greedy": True},
}
SHORT = {**ENDLESS, "settings": {"max_new_tokens": 3, "greedy": True}}


@pytest.fixture(scope="module")
def served(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server over a tiny run."""
    root = tiny_root(tiny, tmp_path_factory.mktemp("live"))
    with serve(root) as served:
        yield served


@pytest.fixture
def root(tiny: TinyRun, tmp_path: Path) -> Path:
    """A folder whose files a test may change."""
    return tiny_root(tiny, tmp_path)


@pytest.fixture
def live(root: Path) -> Iterator[Live]:
    """An engine's keeper without a server."""
    live = Live(Settings(root=root, dtype="fp32"))
    yield live
    live.close()


def in_thread(work: Any) -> threading.Thread:
    """Begin work in a thread of its own."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_the_line_for_the_model_is_kept_in_its_order() -> None:
    """Who came first is next, however many wait."""
    slot, order = ModelSlot(), []
    threads = []
    with slot.hold("chat"):
        for place in range(6):

            def work(place: int = place) -> None:
                with slot.hold("merge", f"job-{place}"):
                    order.append(place)

            threads.append(in_thread(work))
            until("it waits", lambda place=place: len(slot._line) == place + 2)  # type: ignore[misc]
        assert slot.holder is not None
        assert (slot.holder.kind, slot.holder.job) == ("chat", None)
        assert abs(slot.holder.since_s - time.time()) < 5
    for thread in threads:
        thread.join(timeout=60)
    assert order == list(range(6))
    assert slot.holder is None


def test_who_may_not_wait_is_told_who_has_the_model() -> None:
    """By kind and job."""
    slot = ModelSlot()
    with slot.hold("verify", "job-1"), pytest.raises(Busy, match="in use") as caught, slot.hold("chat", wait=False):
        pass
    assert caught.value.holder.job == "job-1"
    assert "verify job-1" in str(caught.value)
    assert slot.holder is None


def test_a_generation_waits_for_generations_but_not_for_jobs() -> None:
    """Nor where a job only waits: it would be behind it."""
    slot = ModelSlot()
    first = slot.line_up("chat", behind_jobs=False)
    second = slot.line_up("v1", behind_jobs=False)
    job = slot.line_up("train", "job-2")
    with pytest.raises(Busy, match="A job waits"):
        slot.line_up("chat", behind_jobs=False)
    first.leave()
    second.leave()
    with pytest.raises(Busy, match="A job has"):
        slot.line_up("chat", behind_jobs=False)
    job.leave()
    slot.line_up("chat", behind_jobs=False).leave()


def test_a_line_of_generations_has_an_end() -> None:
    """Memory and patience are bounded."""
    slot = ModelSlot()
    tickets = []
    with pytest.raises(Busy, match="Too many"):  # noqa: PT012 - which of them is refused does not matter
        for _ in range(1000):
            tickets.append(slot.line_up("v1"))
    assert 10 < len(tickets) < 200
    slot.line_up("merge", "job-3")  # a job is not refused for it


def test_the_model_is_given_back_after_an_error_and_after_a_wait_that_was_cancelled() -> None:
    """Nobody is left holding it."""
    slot, cancellation = ModelSlot(), ts.Cancellation()
    with pytest.raises(ZeroDivisionError), slot.hold("chat"):
        _ = 1 / 0
    assert slot.holder is None
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            with slot.hold("merge", "job-4", cancellation=cancellation):
                pass
        except ts.Cancelled as error:
            caught.append(error)

    with slot.hold("chat"):
        thread = in_thread(wait)
        until("it waits", lambda: len(slot._line) == 2)
        cancellation.cancel()
        thread.join(timeout=60)
        assert caught
        assert len(slot._line) == 1
    assert slot.holder is None


def test_an_engine_is_kept_and_grows_by_what_is_lacking(live: Live, root: Path) -> None:
    """An adapter is put beside those that are there; for a complete model, everything is loaded anew."""
    steps: list[ts.Progress] = []
    opened = Opened(str(root / "out" / "run"))
    first, infos = live.engine(opened, ["final"], steps.append)
    assert infos["final"].kind == "adapter"
    loads = len(steps)
    assert live.engine(opened, ["final", "base"], steps.append)[0] is first
    assert len(steps) == loads
    engine, infos = live.engine(opened, ["checkpoint-10", f"mine={root / 'out' / 'run'}"], steps.append)
    assert engine is first
    assert live.loaded is not None
    assert live.loaded["variants"] == ["base", "final", "checkpoint-10", f"mine={root / 'out' / 'run'}"] == list(infos)
    assert set(engine.names) == {"base", "final", "checkpoint-10", "mine"}
    kept, merged = weakref.ref(first), str(root / "out" / "run-merged")
    del first, engine
    engine, infos = live.engine(opened, [merged, f"other={merged}"], steps.append)
    assert (infos[merged].name, infos[f"other={merged}"].name) == ("run-merged", "other")
    assert set(engine.names) == {"base", "final", "checkpoint-10", "mine", "run-merged", "other"}
    assert kept() is None


def test_an_adapter_that_came_later_answers_as_one_that_came_first(live: Live, root: Path) -> None:
    """And those that were there answer as before."""
    run = root / "out" / "run"
    settings = ts.GenerationSettings(greedy=True, max_new_tokens=12)
    names = ["base", "final", "checkpoint-10"]
    requests = [ts.Request(name, "hello") for name in names]
    together = ts.load_engine(run, names, dtype="fp32")[0].generate(requests, settings)
    for name in names:
        engine, _ = live.engine(Opened(str(run)), [name], lambda _: None)
    assert [one.token_ids for one in engine.generate(requests, settings)] == [one.token_ids for one in together]
    assert len({one.token_ids for one in together}) == 3


def test_many_variants_push_out_the_oldest(live: Live, root: Path) -> None:
    """Memory is bounded, whatever is clicked on."""
    opened = Opened(str(root / "out" / "run"))
    for place in range(12):
        _, infos = live.engine(opened, [f"v{place}={root / 'out' / 'run'}"], lambda _: None)
        assert "base" in infos
        assert len(infos) <= 8
    assert "v11=" + str(root / "out" / "run") in infos
    assert "v1=" + str(root / "out" / "run") not in infos


def test_what_a_run_has_not_costs_nothing_that_is_loaded(live: Live, root: Path) -> None:
    """A name that was mistyped."""
    opened = Opened(str(root / "out" / "run"))
    engine, _ = live.engine(opened, ["final"], lambda _: None)
    with pytest.raises(ts.TunesmithError, match="base, checkpoint-10, final"):
        live.engine(opened, ["checkpoint-99"], lambda _: None)
    with pytest.raises(ts.TunesmithError):
        live.engine(Opened(str(root / "nowhere")), ["final"], lambda _: None)
    assert live.engine(opened, ["final"], lambda _: None)[0] is engine


def test_an_adapter_that_was_saved_anew_is_loaded_anew(live: Live, root: Path) -> None:
    """A training may go on while its run is looked at."""
    run = root / "out" / "run"
    opened, request = Opened(str(run)), ts.Request("final", "hello")
    settings = ts.GenerationSettings(greedy=True, max_new_tokens=8)
    before = live.engine(opened, ["final"], lambda _: None)[0].generate([request], settings)[0].token_ids
    weights = run / "checkpoint-10" / "adapter_model.safetensors"
    config = json.loads((run / "checkpoint-10" / "adapter_config.json").read_text())
    (run / "adapter_model.safetensors").write_bytes(weights.read_bytes())
    (run / "adapter_config.json").write_text(json.dumps(config))
    engine, _ = live.engine(opened, ["final", "checkpoint-10"], lambda _: None)
    after, other = engine.generate([request, ts.Request("checkpoint-10", "hello")], settings)
    assert after.token_ids == other.token_ids != before


def test_a_job_finds_no_engine_in_memory(live: Live, root: Path) -> None:
    """It loads one of its own, and both would not fit."""
    kept = weakref.ref(live.engine(Opened(str(root / "out" / "run")), ["base"], lambda _: None)[0])
    with live.slot.hold("chat"):
        assert live.loaded is not None
    with live.slot.hold("compare", "job-5"):
        assert live.loaded is None
        gc.collect()
        assert kept() is None


def test_unloading_waits_for_nobody(live: Live, root: Path) -> None:
    """It is refused while the engine is in use."""
    live.engine(Opened(str(root / "out" / "run")), ["base"], lambda _: None)
    with live.slot.hold("chat"), pytest.raises(Busy):
        live.unload()
    live.unload()
    assert live.loaded is None


def test_our_own_mistake_is_a_reference_and_the_thread_goes_on(live: Live, capfd: pytest.CaptureFixture[str]) -> None:
    """The traceback is the server's to read, not the client's."""

    def fail(_: Flow) -> None:
        raise KeyError("secret")

    async def ask() -> list[Any]:
        told = [event async for event in live.start("chat", fail)]
        return [*told, *[event async for event in live.start("chat", lambda flow: flow.say("text", 1))]]

    (kind, error), said = asyncio.run(ask())
    assert kind == "error"
    assert error.as_dict()["error"] == "InternalError"
    assert "secret" not in str(error)
    printed = capfd.readouterr().err
    assert error.where in printed
    assert "KeyError: 'secret'" in printed
    assert said == ("text", 1)
    assert live.slot.holder is None


def test_the_server_s_end_ends_what_is_under_way(live: Live) -> None:
    """The one that runs and those that wait."""
    running = threading.Event()

    def endless(flow: Flow) -> None:
        running.set()
        while not flow.cancellation.requested:
            time.sleep(0.001)

    async def ask() -> None:
        flows = [live.start("chat", endless) for _ in range(3)]
        await asyncio.to_thread(running.wait, 5)
        live.close()
        for flow in flows:
            assert await asyncio.wait_for(flow.next(), 2) is None

    asyncio.run(ask())
    until("the slot is free", lambda: live.slot.holder is None, seconds=2)


def test_what_a_client_began_ends_when_it_vanishes(served: Served) -> None:
    """While text streams, and while it only waits behind another."""
    with served.stream("/api/v1/chat", ENDLESS) as events:
        assert any(kind == "text" for kind, _ in events)
        assert served.live.slot.holder is not None
        with served.stream("/api/v1/chat", ENDLESS):
            until("it waits", lambda: len(served.live.slot._line) == 2)
        until("the waiting one is gone", lambda: len(served.live.slot._line) == 1, seconds=2)
    began = time.monotonic()
    until("the slot is free", lambda: served.live.slot.holder is None, seconds=2)
    assert time.monotonic() - began < 2
    assert served.events("/api/v1/chat", SHORT)[-1][0] == "done"


def test_a_hundred_vanished_clients_leave_nothing_behind(served: Served) -> None:
    """No thread, no file, no engine of their own; some left in the middle of an answer, some before it."""
    served.events("/api/v1/chat", SHORT)
    me = psutil.Process()
    gc.collect()
    threads, files = threading.active_count(), me.num_fds()
    with httpx2.Client(verify=PLAIN) as client:
        for _ in range(50):
            with client.stream("POST", f"{served.url}/api/v1/chat", json=ENDLESS) as response:
                assert any("event: text" in line for line in response.iter_lines())
    for turn in range(50):
        vanish(served, ENDLESS, reset=bool(turn % 2))
    until("all work has ended", lambda: not served.live._flows and served.live.slot.holder is None, seconds=5)
    until("files are closed", lambda: me.num_fds() <= files, seconds=5)
    assert threading.active_count() <= threads
    assert served.events("/api/v1/chat", SHORT)[-1][0] == "done"


def vanish(served: Served, body: dict[str, Any], *, reset: bool) -> None:
    """Send a request and hang up without reading a byte, politely or not."""
    data = json.dumps(body).encode()
    host, port = served.url.removeprefix("http://").split(":")
    head = (
        f"POST /api/v1/chat HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    )
    with socket.create_connection((host, int(port))) as client:
        client.sendall(head.encode() + b"\r\n\r\n" + data)
        if reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_text_is_on_the_wire_within_fifty_milliseconds(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the engine's callback to the client's hand; nothing polls in between."""
    said: list[float] = []
    say = Flow.say

    def timed(self: Flow, event: str, data: Any) -> None:
        if event == "text":
            said.append(time.perf_counter())
        say(self, event, data)

    monkeypatch.setattr(Flow, "say", timed)
    with served.stream("/api/v1/chat", ENDLESS | {"settings": {"max_new_tokens": 60, "greedy": True}}) as events:
        heard = [time.perf_counter() for kind, _ in events if kind == "text"]
    delays = sorted(after - before for before, after in zip(said, heard, strict=True))
    assert delays[len(delays) // 2] < 0.05
