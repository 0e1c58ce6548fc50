"""What the page costs, and how it bears many readers at once.

    python benchmarks/page_cost.py --run demo/run [--clients 50] [--aborts 1000]

The page is served by a process of its own (``tunesmith web``), one thread for arithmetic, and asked over sockets.

- First page: from the start of the process until the page, its scripts and ``/api/v1/session`` have been read; CPU
  seconds of the process until then; whether torch was loaded by then.  The bar: at most 1 s of CPU, without torch.
- Token to screen: for one streamed answer, how much later the client has the first token, and the whole answer, than
  the engine says that it had it.  The bar: 50 ms.  With ``--browser`` the same as chromium draws it.
- Many readers: CLIENTS connections read ``/``, ``/api/v1/session``, ``/api/v1/run`` and ``/api/v1/jobs`` in turn, one
  after another without a pause, each with an open event stream beside it, while merges run one after another and one
  answer streams.  The bars: no error, at most 200 ms a read at the median.  The answer's tokens a second stand beside
  those of an answer alone.
- A client that vanishes: from closing its socket in mid-answer until the model is free.  The bar: 2 s.
- ABORTS answers and event streams opened and cut at once: threads, files and memory of the server before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil

PAGES = ("/", "/api/v1/session", "/api/v1/run?path={run}", "/api/v1/jobs")
STATIC = ("index.html", "style.css", "pages.css", "core.js", "ui.js", "app.js", "vendor/preact-htm.js")
QUESTION = "How do I keep a plane iron from rusting over the winter?"
MAX_CPU_S, MAX_TOKEN_MS, MAX_READ_MS, MAX_FREE_S = 1.0, 50.0, 200.0, 2.0


@dataclass
class Served:
    """A page in a process of its own.

    Attributes:
        process: the server.
        port: where it listens.
        started: when it was started, ``time.perf_counter``.
    """

    process: psutil.Process
    port: int
    started: float

    def connection(self, timeout: float = 60) -> HTTPConnection:
        """A connection of one's own."""
        return HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def get(self, path: str) -> bytes:
        """Read an address once."""
        connection = self.connection()
        try:
            connection.request("GET", path)
            reply = connection.getresponse()
            body = reply.read()
            if reply.status != 200:
                raise RuntimeError(f"{path}: {reply.status} {body[:200]!r}")
            return body
        finally:
            connection.close()

    def json(self, path: str) -> Any:
        """Read a JSON document."""
        return json.loads(self.get(path))

    def post(self, path: str, body: object) -> Any:
        """Send a JSON document."""
        connection = self.connection()
        try:
            connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
            reply = connection.getresponse()
            answer = json.loads(reply.read())
            if reply.status >= 300:
                raise RuntimeError(f"{path}: {reply.status} {answer}")
            return answer
        finally:
            connection.close()

    @property
    def cpu_s(self) -> float:
        """CPU seconds so far."""
        times = self.process.cpu_times()
        return times.user + times.system

    @property
    def has_torch(self) -> bool:
        """Whether torch's library is loaded."""
        return any("libtorch" in one.path for one in self.process.memory_maps())


@contextmanager
def served(root: Path) -> Iterator[Served]:
    """Serve a folder until the block ends."""
    command = [sys.executable, "-m", "tunesmith", "web", "--root", str(root), "--port", "0", "--no-open"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)  # noqa: S603 - our own program
    try:
        address = (process.stdout.readline() if process.stdout else "").strip().rstrip("/")
        yield Served(psutil.Process(process.pid), int(address.rsplit(":", 1)[1]), started)
    finally:
        process.terminate()
        process.wait(timeout=30)


def first_page(server: Served) -> tuple[float, float, bool]:
    """Seconds and CPU seconds until the first page has been read, and whether torch was there."""
    server.get("/")
    for name in STATIC[1:]:
        server.get(f"/static/{name}")
    server.get("/api/v1/session")
    server.get("/api/v1/texts/en")
    return time.perf_counter() - server.started, server.cpu_s, server.has_torch


def events(reply: Any) -> Iterator[tuple[str, Any, float]]:
    """Server-sent events as they arrive: name, data, when."""
    name, data = "", ""
    for line in reply:
        text = line.decode().rstrip("\r\n")
        if text.startswith("event: "):
            name = text[7:]
        elif text.startswith("data: "):
            data = text[6:]
        elif not text and name:
            yield name, json.loads(data), time.perf_counter()
            name, data = "", ""


@dataclass
class Answer:
    """One streamed answer, as the client saw it.

    Attributes:
        first_s: from the question to the first piece of text.
        all_s: from the question to the end.
        turn: what the engine says of it.
    """

    first_s: float
    all_s: float
    turn: dict[str, Any]


def chat(run: str, *, tokens: int) -> dict[str, Any]:
    """A question for the tuned model."""
    settings = {"max_new_tokens": tokens, "greedy": True}
    messages = [{"role": "user", "content": QUESTION}]
    return {"run": run, "variant": "final", "messages": messages, "settings": settings}


def answered(server: Served, run: str, *, tokens: int) -> Answer:
    """Ask, and read the stream to its end."""
    connection = server.connection(timeout=600)
    try:
        started = time.perf_counter()
        connection.request(
            "POST", "/api/v1/chat", json.dumps(chat(run, tokens=tokens)), {"content-type": "application/json"}
        )
        first = None
        for name, data, when in events(connection.getresponse()):
            if name == "text" and first is None:
                first = when - started
            if name == "error":
                raise RuntimeError(f"the answer failed: {data}")
            if name == "done":
                return Answer(first or 0.0, when - started, data)
    finally:
        connection.close()
    raise RuntimeError("the stream ended without an answer")


@dataclass
class Readers:
    """Many readers at once.

    Attributes:
        reads_s: how long each read took.
        errors: what went wrong.
        streams: event streams that were read to their end.
    """

    reads_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    streams: int = 0


def read_pages(server: Served, run: str, until: threading.Event, seen: Readers) -> None:
    """One reader: page after page over one connection."""
    connection = server.connection()
    try:
        while not until.is_set():
            for path in PAGES:
                started = time.perf_counter()
                connection.request("GET", path.format(run=run))
                reply = connection.getresponse()
                reply.read()
                seen.reads_s.append(time.perf_counter() - started)
                if reply.status != 200:
                    seen.errors.append(f"{path}: {reply.status}")
    except OSError as error:
        seen.errors.append(repr(error))
    finally:
        connection.close()


def read_events(server: Served, job: str, until: threading.Event, seen: Readers) -> None:
    """One reader of a job's events, from its beginning, again and again."""
    while not until.is_set():
        connection = server.connection(timeout=120)
        try:
            connection.request("GET", f"/api/v1/jobs/{job}/events?after=0")
            for _ in events(connection.getresponse()):
                if until.is_set():
                    return
            seen.streams += 1
            time.sleep(0.2)
        except OSError as error:
            seen.errors.append(repr(error))
            return
        finally:
            connection.close()


def merge_again(server: Served, run: str, until: threading.Event, jobs: list[str], seen: Readers) -> None:
    """Merges, one after another, each into a new folder."""
    number = 0
    while not until.is_set():
        params = {"run": run, "out": f"merged-{number}"}
        job = server.post("/api/v1/jobs", {"kind": "merge", "params": params})["job"]["id"]
        jobs.append(job)
        while (state := server.json(f"/api/v1/jobs/{job}")["job"])["state"] in ("queued", "running"):
            time.sleep(0.2)
        if state["state"] != "done":
            seen.errors.append(f"merge: {state['error']}")
            return
        number += 1


def under_load(server: Served, run: str, *, clients: int, tokens: int) -> tuple[Readers, Answer, int]:
    """Readers, an answer and merges at once, until the answer has ended."""
    seen, until, jobs = Readers(), threading.Event(), list[str]()
    merging = threading.Thread(target=merge_again, args=(server, run, until, jobs, seen))
    merging.start()
    while not jobs:
        time.sleep(0.01)
    readers = [threading.Thread(target=read_pages, args=(server, run, until, seen)) for _ in range(clients)]
    readers += [threading.Thread(target=read_events, args=(server, jobs[0], until, seen)) for _ in range(clients)]
    for one in readers:
        one.start()
    try:
        answer = answered(server, run, tokens=tokens)
    finally:
        until.set()
        for one in (*readers, merging):
            one.join()
    return seen, answer, len(jobs)


def vanish(server: Served, run: str) -> float:
    """Seconds from closing a socket in mid-answer until the model is free."""
    connection = server.connection(timeout=600)
    connection.request("POST", "/api/v1/chat", json.dumps(chat(run, tokens=2000)), {"content-type": "application/json"})
    for name, _, _ in events(connection.getresponse()):
        if name == "text":
            break
    if server.json("/api/v1/session")["holder"] is None:
        raise RuntimeError("the answer had ended before its client vanished")
    cut(connection)
    started = time.perf_counter()
    while server.json("/api/v1/session")["holder"] is not None:
        time.sleep(0.005)
    return time.perf_counter() - started


def cut(connection: HTTPConnection) -> None:
    """Close a socket as a program that has died."""
    if connection.sock is not None:
        with suppress(OSError):
            connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()


def held(server: Served) -> tuple[int, int, float]:
    """Threads, open files with sockets, and MB of the server."""
    process = server.process
    return process.num_threads(), process.num_fds(), process.memory_info().rss / 1e6


def abort(server: Served, run: str, job: str, times: int) -> None:
    """Open answers and event streams, and cut each at once."""
    for number in range(times):
        connection = server.connection()
        if number % 2:
            connection.request("GET", f"/api/v1/jobs/{job}/events?after=0")
        else:
            body = json.dumps(chat(run, tokens=200))
            connection.request("POST", "/api/v1/chat", body, {"content-type": "application/json"})
        if number % 3 == 0:  # a third waits for the answer's head
            with suppress(OSError):
                connection.getresponse()
        cut(connection)


def settled(server: Served) -> tuple[int, int, float]:
    """What is held once nothing runs any more."""
    while server.json("/api/v1/session")["holder"] is not None:
        time.sleep(0.1)
    time.sleep(3)
    return held(server)


def verdict(name: str, value: float, bar: float, unit: str) -> None:
    """One line of the table."""
    print(f"| {name} | {value:,.3g} {unit} | ≤ {bar:g} {unit} | {'met' if value <= bar else 'NOT met'} |", flush=True)


def in_browser(server: Served, run: str) -> list[float]:
    """Milliseconds by which the first token is later on chromium's screen than in the engine, of three answers."""
    from playwright.sync_api import sync_playwright

    watch = """() => {
        const send = document.querySelector('[data-testid=chat-send]');
        window.seen = new Promise((resolve) => {
            send.addEventListener('click', () => { const from = performance.now();
                new MutationObserver((_, self) => {
                    const replies = document.querySelectorAll('[data-testid=chat-reply]');
                    const last = replies[replies.length - 1];
                    if (last && last.textContent.trim()) { self.disconnect();
                        requestAnimationFrame(() => resolve(performance.now() - from)); }
                }).observe(document.body, {subtree: true, childList: true, characterData: true});
            }, {once: true});
        });
    }"""
    late = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu", "--no-first-run"]
        )
        for _ in range(3):
            page = browser.new_page()
            page.goto(f"http://127.0.0.1:{server.port}/#/chat?run={run}&variant=final")
            page.get_by_test_id("chat-input").fill(QUESTION)
            page.evaluate(watch)
            with page.expect_response("**/api/v1/chat") as response:
                page.get_by_test_id("chat-send").click()
            seen_ms = page.evaluate("window.seen")
            page.get_by_test_id("chat-stop").click()
            text = response.value.text()
            done = next(block for block in text.split("\n\n") if "event: done" in block)
            turn = json.loads(done.split("data: ", 1)[1])
            late.append(seen_ms - 1e3 * turn["time_to_first_token_s"])
            page.close()
        browser.close()
    return late


def measure(root: Path, run: str, options: argparse.Namespace) -> None:
    """Everything, against one server."""
    with served(root) as server:
        wall, cpu, torch = first_page(server)
        print("| | measured | bar | |\n| --- | ---: | ---: | --- |")
        verdict("first page, CPU", cpu, MAX_CPU_S, "s")
        print(f"| first page, wall; torch loaded: {'yes' if torch else 'no'} | {wall:.2f} s | | |")
        answered(server, run, tokens=2)  # loads the model
        alone = [answered(server, run, tokens=options.tokens) for _ in range(3)]
        first = statistics.median(1e3 * (one.first_s - one.turn["time_to_first_token_s"]) for one in alone)
        whole = statistics.median(1e3 * (one.all_s - one.turn["seconds"]) for one in alone)
        verdict("first token, over the engine's time", first, MAX_TOKEN_MS, "ms")
        verdict("whole answer, over the engine's time", whole, MAX_TOKEN_MS, "ms")
        if options.browser:
            verdict("first token on the screen", statistics.median(in_browser(server, run)), MAX_TOKEN_MS, "ms")
        seen, answer, merges = under_load(server, run, clients=options.clients, tokens=options.tokens)
        verdict(
            f"median of {len(seen.reads_s):,} reads by {options.clients} readers beside {merges} merges",
            1e3 * statistics.median(seen.reads_s),
            MAX_READ_MS,
            "ms",
        )
        worst = statistics.quantiles(seen.reads_s, n=100)[98]
        print(f"| … 99th percentile | {1e3 * worst:.0f} ms | | |")
        verdict("… errors", len(seen.errors), 0, "")
        speed = statistics.median(one.turn["tokens_per_s"] for one in alone)
        share = answer.turn["tokens_per_s"] / speed
        print(
            f"| … tokens/s of the answer beside | {answer.turn['tokens_per_s']:.1f} of {speed:.1f} ({share:.0%}) | | |"
        )
        verdict(
            "model free after a client vanished, worst of 5",
            max(vanish(server, run) for _ in range(5)),
            MAX_FREE_S,
            "s",
        )
        job = server.json("/api/v1/jobs")["jobs"][0]["id"]
        abort(server, run, job, 50)  # what is made once
        before = settled(server)
        abort(server, run, job, options.aborts)
        after = settled(server)
        for name, was, now in zip(("threads", "files", "MB"), before, after, strict=True):
            print(f"| {options.aborts:,} opened and cut: {name} | {was:,.0f} → {now:,.0f} | | |")
        for error in sorted(set(seen.errors))[:5]:
            print(f"error: {error}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run of the embedded model, such as the demo's")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=128, help="of the answers that are timed")
    parser.add_argument("--aborts", type=int, default=1000)
    parser.add_argument("--browser", action="store_true", help="also time chromium's screen")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tunesmith-page-") as folder:
        shutil.copytree(options.run, Path(folder) / "run")
        measure(Path(folder), "run", options)


if __name__ == "__main__":
    main()
