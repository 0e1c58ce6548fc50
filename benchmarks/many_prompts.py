"""What this process costs for many prompts to two servers that answer at once: answers a second, and its peak memory.

    python benchmarks/many_prompts.py [--rows 20000] [--parallel 32] [--ray]

The servers are stubs in processes of their own, so that what is measured is what asks, remembers and writes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import tunesmith as ts
from tunesmith.models import Endpoint, RememberingEngine

MODELS = ("base", "final")


class Stub(BaseHTTPRequestHandler):
    """Answers every prompt with a few words, at once."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """List the models."""
        self._send(json.dumps({"data": [{"id": name, "object": "model"} for name in MODELS]}).encode())

    def do_POST(self) -> None:
        """Answer."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = "an answer of a few words, for what it is worth"
        choice = {"index": 0, "finish_reason": "stop", "text": said, "delta": {"content": said}}
        usage = {"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}
        pieces = [json.dumps(piece) for piece in ({"choices": [choice]}, usage)]
        streamed = "".join(f"data: {piece}\n\n" for piece in [*pieces, "[DONE]"]).encode()
        self._send(streamed if body.get("stream") else json.dumps({"choices": [choice]}).encode())

    def _send(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream" if data.startswith(b"data:") else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def serve() -> None:
    """Serve until standard input ends."""
    import threading

    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_address[1]}/v1", flush=True)
    sys.stdin.read()


def peak_mib() -> float:
    """The most memory that this process has had."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def measure(urls: list[str], rows: int, parallel: int, executor: Any) -> None:
    """Ask, remember, and print."""
    engine = Endpoint(urls, models=MODELS, parallel=parallel, executor=executor)
    print(f"{len(engine.capabilities.servers)} servers, {parallel} requests in flight at each")
    before, first = peak_mib(), list[float]()
    with tempfile.TemporaryDirectory() as kept:
        remembering = RememberingEngine(engine, Path(kept), named=True)
        prompts = [(ts.Message(role="user", content=f"{place} " + "word " * 100),) for place in range(rows)]
        requests = [ts.Request(MODELS[place % 2], prompt) for place, prompt in enumerate(prompts)]
        began = time.monotonic()
        remembering.generate(requests, on_done=lambda *_: first.append(time.monotonic()) if not first else None)
        seconds = time.monotonic() - began
    print(f"{remembering.written} of {rows} rows in {seconds:.1f} s, {rows / seconds:.0f} a second", end=", ")
    print(f"the first after {first[0] - began:.1f} s")
    print(f"peak memory of this process: {before:.0f} MiB before, {peak_mib():.0f} MiB after")


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--parallel", type=int, default=32)
    parser.add_argument("--ray", action="store_true", help="as a Ray Data job on this machine")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve()
        return
    os.environ["NO_PROXY"] = "127.0.0.1"
    os.environ.pop("OPENAI_API_KEY", None)
    with ExitStack() as stack:
        words = [sys.executable, __file__, "--serve"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        stubs = [stack.enter_context(subprocess.Popen(words, **pipes)) for _ in range(2)]  # noqa: S603 - this script
        urls = [stub.stdout.readline().strip() for stub in stubs if stub.stdout]
        with ts.executor_of("ray" if given.ray else None) as executor:
            measure(urls, given.rows, given.parallel, executor)
        for stub in stubs:
            stub.terminate()


if __name__ == "__main__":
    main()
