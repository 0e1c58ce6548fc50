"""Addresses of executors, as the command line takes them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from urllib.parse import urlsplit

from tunesmith.errors import TunesmithError

LOCAL = "local"
_FORMS = "local, processes, processes:N, ray, ray://HOST:PORT, dask or dask://HOST:PORT"


@contextmanager
def executor_of(address: str | None = LOCAL) -> Iterator[Executor | None]:
    """What runs the units of work of ``merge``, ``verify`` and ``quantize``, for as long as the context lasts.

    - ``local``: threads of the verb's own, one a core.
    - ``processes``, ``processes:N``: N processes of this machine; without N, one a core.
    - ``ray``: the Ray cluster of ``RAY_ADDRESS`` or of this machine; where there is none, one is started on this
      machine.  ``ray://HOST:PORT``: a cluster's Ray Client server.
    - ``dask``: the Dask cluster of ``DASK_SCHEDULER_ADDRESS``; where there is none, workers on this machine.
      ``dask://HOST:PORT``: a scheduler.

    Every machine of a cluster must see the models at the same paths, and have this version of Tunesmith.  A unit whose
    worker is lost, or that cannot read or write, runs again, three times in all.

    Args:
        address: one of these; None is ``local``.

    Yields:
        The executor; None for ``local``.

    Raises:
        TunesmithError: it is no such address, or nobody answers there.
        MissingExtraError: the cluster's package is not installed.
    """
    scheme, slashes, _ = (address or LOCAL).partition("://")
    name, colon, count = scheme.partition(":")
    if slashes and scheme in ("ray", "dask"):
        host, port = _place(address or "")
        with _on_cluster(scheme, host, port) as cluster:
            yield cluster
    elif address in ("ray", "dask"):
        with _on_cluster(address, None, None) as cluster:
            yield cluster
    elif name == "processes" and not slashes and (not colon or _is_count(count)):
        from tunesmith.executors.processes import processes

        with processes(int(count) if colon else None) as pool:
            yield pool
    elif address in (None, LOCAL):
        yield None
    else:
        raise _no_such(address or "")


@contextmanager
def _on_cluster(kind: str, host: str | None, port: int | None) -> Iterator[Executor]:
    if kind == "ray":
        from tunesmith.executors.on_ray import on_ray

        with on_ray(None if host is None else f"ray://{host}:{port}") as executor:
            yield executor
        return
    from tunesmith.executors.on_dask import on_dask

    with on_dask(None if host is None else f"dask://{host}:{port}") as dask:
        yield dask


def _place(address: str) -> tuple[str, int]:
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or port is None or parts.path or parts.query:
        raise _no_such(address)
    return f"[{host}]" if ":" in host else host, port


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) > 0


def _no_such(address: str) -> TunesmithError:
    return TunesmithError("There is no such executor.", expected=_FORMS, found=address or "nothing")
