"""Several processes that a launcher started for one training: who speaks, what they agree on, and how they end.

A launcher tells its processes of each other by environment variables, and they meet at a store of torch's, which the
launcher (or the first of them) holds.  Nothing here waits in a collective, which would not notice that another process
has ended: waiting looks at the store again and again.

Importing this module does not import torch.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from tunesmith.errors import Cancelled, TunesmithError

# As accelerate looks for them: torchrun's, then those of MPI's launchers.
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
_PATIENCE_S = 1800.0  # as torch's collectives
_LOOK_S = 0.05
_TO_BE_SAID_S, _TO_LEAVE_S = 10.0, 30.0
# What gloo and NCCL say where another process is gone.
_GONE = (
    "closed by peer",
    "connection reset",
    "broken pipe",
    "remote process exited",
    "connection refused",
    "connection was likely closed",
)


def rank() -> int:
    """Which of the processes this one is, from 0."""
    return _number(_RANKS, 0)


def processes() -> int:
    """How many processes a launcher started for this training."""
    return _number(_SIZES, 1)


def local_processes() -> int:
    """How many of them are on this machine, and share its memory."""
    return _number(_LOCAL_SIZES, 1)


def is_main_process() -> bool:
    """Whether this is the only process of a training, or the first of those that a launcher started."""
    return rank() == 0


def _number(names: tuple[str, ...], otherwise: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdecimal()), otherwise)


class SaidElsewhere(SystemExit):
    """The end of a process whose training has ended in another one, which says why; it exits with the same code."""


class Peers:
    """The processes of one training, as one of them sees them; a training of one process has none.

    Args:
        store: where they meet; None for one process.
        own_rank: which of them this is.
        size: how many they are.
        holds_store: whether the others can speak to each other only as long as this process runs.
        patience_s: how long one waits for another.
    """

    def __init__(
        self,
        store: Any = None,
        *,
        own_rank: int = 0,
        size: int = 1,
        holds_store: bool = False,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        self._store = store
        self._rank, self._size, self._patience_s = own_rank, size, patience_s
        self._holds_store = holds_store

    def agree(self, stage: str, value: str = "") -> list[str]:
        """Wait until every process has come to a stage.

        Args:
            stage: its name; each is come to once.
            value: what this process tells the others.

        Returns:
            What each of them tells, by rank.

        Raises:
            SaidElsewhere: another has ended with an error, or on request.
            TunesmithError: another does not come.
        """
        if self._store is None:
            return [value]
        self._store.set(f"{stage}/{self._rank}", value)
        until = time.monotonic() + self._patience_s
        keys = [f"{stage}/{peer}" for peer in range(self._size)]
        while not self._store.check(keys):
            self._leave_if_ended()
            if time.monotonic() > until:
                missing = [str(peer) for peer, key in enumerate(keys) if not self._store.check([key])]
                raise TunesmithError(
                    "Another process of this training does not come.",
                    where=stage,
                    expected=f"{self._size} processes",
                    found=f"none of rank {', '.join(missing)}",
                    next_step="start all of them again",
                )
            time.sleep(_LOOK_S)
        return [self._store.get(key).decode() for key in keys]

    def end(self, error: BaseException) -> None:
        """Tell the others why this process ends; the first that does so is the one that speaks.

        Args:
            error: what ends it.

        Raises:
            SaidElsewhere: another has ended before, and this error follows from that or is the same.
        """
        if self._store is None or isinstance(error, SaidElsewhere):
            return
        ended = json.dumps({"rank": self._rank, "code": _exit_code(error), "text": str(error) or type(error).__name__})
        try:
            first = self._store.compare_set("ended", "", ended).decode()
        except RuntimeError:  # who holds the store is gone, and nobody is left to speak
            return
        if self._holds_store:
            atexit.register(self._see_off)
        if first == ended:
            atexit.register(self._have_said)
            return
        self._wait_until_said()
        raise SaidElsewhere(json.loads(first)["code"]) from error

    def why(self, error: BaseException) -> str:
        """The words of the error that ended the training, which ``error`` of this process may only follow from."""
        first = None
        if self._store is not None:
            with suppress(RuntimeError):
                first = json.loads(self._store.get("ended")) if self._store.check(["ended"]) else None
        return str(first["text"]) if first else str(_peer_is_gone(error) or error) or type(error).__name__

    def _leave_if_ended(self) -> None:
        if self._store.check(["ended"]):
            first = json.loads(self._store.get("ended"))
            self._wait_until_said()
            raise SaidElsewhere(first["code"])

    def _see_off(self) -> None:
        """Stay until the others have been told that it is over."""
        keys = [f"left/{peer}" for peer in range(self._size) if peer != self._rank]
        with suppress(RuntimeError):
            self._store.wait(keys, timedelta(seconds=_TO_LEAVE_S))

    def _have_said(self) -> None:
        with suppress(RuntimeError):
            self._store.set("said", "")

    def _wait_until_said(self) -> None:
        # A launcher ends all processes when one has ended, so that the first must be let finish speaking.
        with suppress(RuntimeError):
            self._store.set(f"left/{self._rank}", "")
            self._store.wait(["said"], timedelta(seconds=_TO_BE_SAID_S))


ALONE = Peers()
"""What a training of one process has."""


@contextmanager
def together() -> Iterator[Peers]:
    """Have all processes of a training within end as one: with one exit code, and with one message.

    Raises:
        SaidElsewhere: another process has ended, and says why.
    """
    peers = _met()
    try:
        peers.agree("begun")
        yield peers
    except BaseException as error:
        gone = _peer_is_gone(error)
        peers.end(gone or error)
        if gone is not None:
            raise gone from error
        raise


def _met() -> Peers:
    size = processes()
    if size == 1 or importlib.util.find_spec("torch") is None:  # what is lacking is said in a moment
        return ALONE
    os.environ.setdefault("RANK", str(rank()))  # MPI's launchers have other names for it
    import torch.distributed as dist

    # torchrun holds the store itself; where nobody does, the first process does, and torch joins it there later.
    holds = is_main_process() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(
        os.environ.get("MASTER_ADDR", "127.0.0.1"),
        _number(("MASTER_PORT",), 29500),
        size,
        is_master=holds,
        timeout=timedelta(seconds=_PATIENCE_S),
        wait_for_workers=False,
        multi_tenant=True,
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Peers(dist.PrefixStore(f"tunesmith/{attempt}", store), own_rank=rank(), size=size, holds_store=holds)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, TunesmithError | Cancelled):
        return error.exit_code
    return Cancelled.exit_code if isinstance(error, KeyboardInterrupt) else 1


def _peer_is_gone(error: BaseException) -> TunesmithError | None:
    """What an error of torch's means that says no more than that another process could not be heard."""
    text = str(error).lower()
    if processes() == 1 or not isinstance(error, RuntimeError) or not any(words in text for words in _GONE):
        return None
    return TunesmithError(
        "Another process of this training has ended without a word.",
        found=str(error).strip().splitlines()[0].partition(". ")[0],
        next_step="look at the launcher's own messages; where memory ran out, take fewer rows or processes; --resume "
        "goes on from the last checkpoint",
    )
