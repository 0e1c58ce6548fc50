"""Whether anybody is at an address, before a library that would ask for minutes is asked."""

from __future__ import annotations

import socket

from tunesmith.errors import TunesmithError

CONNECT_SECONDS = 5.0


_SAME = "see that it runs, and has the same versions of Python, Tunesmith and its own package as here"


def cannot_join(address: str, why: object, *, next_step: str = _SAME) -> TunesmithError:
    """The error of a cluster that is not there or takes nobody in."""
    found = str(why).strip().partition("\n")[0]
    return TunesmithError("The cluster cannot be joined.", where=address, found=found, next_step=next_step)


def require_listener(address: str, host: str, port: int) -> None:
    """See that something listens.

    Raises:
        TunesmithError: nothing does.
    """
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise cannot_join(address, error.strerror or error) from error
