"""S3's API on the loopback, by moto, with a door in front that counts bytes and can fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Environ = dict[str, Any]
Fault = Callable[[int, Environ], str | None]


@dataclass
class Door:
    """What passes before the server.

    Attributes:
        app: the server's own application.
        fault: how a read of an object fails, by how many there were before: ``503``, ``short`` (the connection ends
            in the middle), ``shifted`` (another range of the same length), or None for not at all.
        read_bytes: of the bodies of all reads of objects.
        calls: method and path of every request.
    """

    app: Any
    fault: Fault = lambda _count, _environ: None
    read_bytes: int = 0
    reads: int = 0
    calls: list[tuple[str, str]] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        """One request."""
        is_read = environ["REQUEST_METHOD"] == "GET" and "HTTP_RANGE" in environ
        with self.lock:
            self.calls.append((environ["REQUEST_METHOD"], environ["PATH_INFO"] + "?" + environ.get("QUERY_STRING", "")))
            fault = self.fault(self.reads, environ) if is_read else None
            self.reads += is_read
        if fault == "503":
            start_response("503 Service Unavailable", [("Content-Length", "0")])
            return [b""]
        if fault == "shifted":
            start, stop = map(int, environ["HTTP_RANGE"].removeprefix("bytes=").split("-"))
            environ["HTTP_RANGE"] = f"bytes={start - 1}-{stop - 1}"
        body = b"".join(self.app(environ, start_response))
        if is_read:
            with self.lock:
                self.read_bytes += len(body)
        return [body[: len(body) // 2]] if fault == "short" else [body]


@contextmanager
def s3_server() -> Iterator[tuple[str, Door]]:
    """Run it; yields its address and its door."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *_: Any, **__: Any) -> None:
            pass

    door = Door(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, door, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", door
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
