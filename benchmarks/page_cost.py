"""What the page costs, and how it bears many readers at once.

    python benchmarks/page_cost.py --run demo/run [--clients 50] [--pause 1] [--aborts 1000] [--browser]

The page is served by a process of its own (``tunesmith web``), one thread for arithmetic, and asked over sockets.

- First page: from the start of the process until the page, its scripts and ``/api/v1/session`` have been read; CPU
  seconds of the process until then; whether torch was loaded by then.  The bar: at most 1 s of CPU, without torch.
- Token to socket, and with ``--browser`` to chromium's screen: how much later the client has a piece of text, or draws
  it, than the engine said it; the page is then served in this process.  The bar: 50 ms.
- Many readers: CLIENTS connections read ``/``, ``/api/v1/session``, ``/api/v1/run`` and ``/api/v1/jobs``, wait PAUSE
  seconds, and read again; each has an event stream open beside it, merges run one after another, one answer streams.
  The page itself asks every 2 to 8 seconds.  The bars: no error, at most 200 ms a read at the median.  The answer's
  tokens a second stand beside those of an answer alone, and of an answer beside the merges alone.
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
from collections.abc import Iterator, Sequence
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


def chat(run: str, *, tokens: int) -> dict[str, Any]:
    """A question for the tuned model."""
    settings = {"max_new_tokens": tokens, "greedy": True}
    messages = [{"role": "user", "content": QUESTION}]
    return {"run": run, "variant": "final", "messages": messages, "settings": settings}


def answered(server: Served, run: str, *, tokens: int) -> dict[str, Any]:
    """Ask, and read the stream to its end: what the engine says of its answer."""
    connection = server.connection(timeout=600)
    try:
        body = json.dumps(chat(run, tokens=tokens))
        connection.request("POST", "/api/v1/chat", body, {"content-type": "application/json"})
        told = {name: data for name, data, _ in events(connection.getresponse())}
    finally:
        connection.close()
    if "done" not in told:
        raise RuntimeError(f"the answer failed: {told.get('error')}")
    return dict(told["done"])


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


def read_pages(server: Served, run: str, until: threading.Event, seen: Readers, pause: float) -> None:
    """One reader: page after page over one connection."""
    connection = server.connection()
    try:
        while not until.is_set():
            until.wait(pause)
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


def read_events(server: Served, jobs: Sequence[str], until: threading.Event, seen: Readers) -> None:
    """One reader of events: of each merge, while it runs, to its end."""
    last = ""
    while not until.wait(0.05):
        if jobs[-1] == last:
            continue
        last = jobs[-1]
        connection = server.connection(timeout=120)
        try:
            connection.request("GET", f"/api/v1/jobs/{last}/events?after=0")
            for _ in events(connection.getresponse()):
                if until.is_set():
                    return
            seen.streams += 1
        except OSError as error:
            seen.errors.append(repr(error))
            return
        finally:
            connection.close()


def merge_again(server: Served, run: str, until: threading.Event, jobs: list[str], seen: Readers) -> None:
    """Merges, one after another, each into a new folder."""
    while not until.is_set():
        params = {"run": run, "out": f"merged-{time.monotonic_ns()}"}
        job = server.post("/api/v1/jobs", {"kind": "merge", "params": params})["job"]["id"]
        jobs.append(job)
        while (state := server.json(f"/api/v1/jobs/{job}")["job"])["state"] in ("queued", "running"):
            time.sleep(0.2)
        if state["state"] != "done":
            seen.errors.append(f"merge: {state['error']}")
            return


def under_load(
    server: Served, run: str, *, clients: int, tokens: int, pause: float
) -> tuple[Readers, dict[str, Any], int]:
    """Readers, an answer and merges at once, until the answer has ended."""
    seen, until, jobs = Readers(), threading.Event(), list[str]()
    merging = threading.Thread(target=merge_again, args=(server, run, until, jobs, seen))
    merging.start()
    while not jobs:
        time.sleep(0.01)
    readers = [threading.Thread(target=read_pages, args=(server, run, until, seen, pause)) for _ in range(clients)]
    readers += [threading.Thread(target=read_events, args=(server, jobs, until, seen)) for _ in range(clients)]
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


@contextmanager
def served_here(root: Path, told: list[tuple[float, int]]) -> Iterator[Served]:
    """Serve a folder in a thread, and note when the engine said each piece of text: unix time, characters so far."""
    from tunesmith.web import Settings, create_app
    from tunesmith.web.app import PageServer, bind
    from tunesmith.web.live import Flow

    say = Flow.say

    def noted(self: Any, name: str, data: Any) -> None:
        if name == "text":
            told.append((time.time(), (told[-1][1] if told else 0) + len(data["text"])))
        say(self, name, data)

    settings = Settings(root=root, port=0)
    bound = bind(settings)
    settings = settings.model_copy(update={"port": bound.getsockname()[1]})
    server = PageServer(create_app(settings), settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    Flow.say = noted  # type: ignore[method-assign]
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield Served(psutil.Process(), settings.port, time.perf_counter())
    finally:
        Flow.say = say  # type: ignore[method-assign]
        server.should_exit = True
        thread.join()


def late_ms(told: Sequence[tuple[float, int]], seen: Sequence[tuple[float, int]]) -> list[float]:
    """By how many milliseconds each piece was later where it was seen than where it was said."""
    late = []
    for when, characters in seen:
        said = next((at for at, so_far in told if so_far >= characters), None)
        if said is not None:
            late.append(1e3 * (when - said))
    return late


def to_socket(server: Served, run: str, told: list[tuple[float, int]], tokens: int) -> list[float]:
    """Milliseconds from the engine to a client's socket, of every piece of one answer."""
    told.clear()
    seen: list[tuple[float, int]] = []
    connection = server.connection(timeout=600)
    body = json.dumps(chat(run, tokens=tokens))
    connection.request("POST", "/api/v1/chat", body, {"content-type": "application/json"})
    for name, data, _ in events(connection.getresponse()):
        if name == "text":
            seen.append((time.time(), (seen[-1][1] if seen else 0) + len(data["text"])))
    connection.close()
    return late_ms(told, seen)


def to_screen(server: Served, run: str, told: list[tuple[float, int]], tokens: int) -> list[float]:
    """Milliseconds from the engine to the frame in which chromium draws it, of every frame of one answer."""
    from playwright.sync_api import sync_playwright

    watch = """() => {
        window.seen = [];
        let drawn = 0;
        const look = () => {
            const replies = document.querySelectorAll('[data-testid=chat-reply]');
            const length = replies.length ? replies[replies.length - 1].textContent.length : 0;
            if (length > drawn) { drawn = length; window.seen.push([Date.now() / 1000, length]); }
            requestAnimationFrame(look);
        };
        requestAnimationFrame(look);
    }"""
    told.clear()
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--no-first-run"]
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=arguments)
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.port}/#/chat?run={run}&variant=final")
        page.get_by_label("Longest answer, in tokens").fill(str(tokens))
        page.get_by_test_id("chat-input").fill(QUESTION)
        page.evaluate(watch)
        page.get_by_test_id("chat-send").click()
        page.get_by_test_id("stop-reason").wait_for(timeout=300_000)
        seen = page.evaluate("window.seen")
        browser.close()
    return late_ms(told, seen)


def streaming(root: Path, run: str, options: argparse.Namespace) -> None:
    """From the engine's word to the client's."""
    told: list[tuple[float, int]] = []
    with served_here(root, told) as server:
        answered(server, run, tokens=2)  # loads the model
        late = to_socket(server, run, told, options.tokens)
        verdict(f"token to socket, median of {len(late)}", statistics.median(late), MAX_TOKEN_MS, "ms")
        if options.browser:
            late = to_screen(server, run, told, options.tokens)
            verdict(f"token to screen, median of {len(late)} frames", statistics.median(late), MAX_TOKEN_MS, "ms")
            print(f"| … 95th percentile | {statistics.quantiles(late, n=20)[18]:.0f} ms | | |")


def measure(root: Path, run: str, options: argparse.Namespace) -> None:
    """Everything, against one server."""
    with served(root) as server:
        wall, cpu, torch = first_page(server)
        print("| | measured | bar | |\n| --- | ---: | ---: | --- |")
        verdict("first page, CPU", cpu, MAX_CPU_S, "s")
        print(f"| first page, wall; torch loaded: {'yes' if torch else 'no'} | {wall:.2f} s | | |")
        answered(server, run, tokens=2)  # loads the model
        alone = [answered(server, run, tokens=options.tokens) for _ in range(3)]
        load = {"tokens": options.tokens, "pause": options.pause}
        _, beside_merges, _ = under_load(server, run, clients=0, **load)
        seen, answer, merges = under_load(server, run, clients=options.clients, **load)
        many = f"{len(seen.reads_s):,} reads by {options.clients} readers beside {merges} merges"
        verdict(f"median of {many}", 1e3 * statistics.median(seen.reads_s), MAX_READ_MS, "ms")
        print(f"| … 99th percentile | {1e3 * statistics.quantiles(seen.reads_s, n=100)[98]:.0f} ms | | |")
        verdict("… errors", len(seen.errors), 0, "")
        alone_speed = statistics.median(one["tokens_per_s"] for one in alone)
        for name, turn in (("beside merges", beside_merges), ("beside merges and readers", answer)):
            share = turn["tokens_per_s"] / alone_speed
            print(f"| tokens/s {name} | {turn['tokens_per_s']:.1f} of {alone_speed:.1f} ({share:.0%}) | | |")
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
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between a reader's rounds")
    parser.add_argument("--tokens", type=int, default=128, help="of the answers that are timed")
    parser.add_argument("--aborts", type=int, default=1000)
    parser.add_argument("--browser", action="store_true", help="also time chromium's screen")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tunesmith-page-") as folder:
        shutil.copytree(options.run, Path(folder) / "run")
        measure(Path(folder), "run", options)
        streaming(Path(folder), "run", options)


if __name__ == "__main__":
    main()
