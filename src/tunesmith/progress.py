"""How long work reports where it is, and how it is told to stop; one way, for the terminal and the page alike."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from tunesmith.errors import Cancelled


@dataclass(frozen=True)
class Progress:
    """One step of long work.

    Attributes:
        stage: a short stable name, such as ``"merge"`` or ``"verify weights"``.
        done: how much is done, in ``unit``.
        total: how much there is, or None where that is unknown.
        unit: what is counted: ``"bytes"``, ``"steps"``, ``"tokens"``, ``"tensors"`` …
        detail: what is being worked on, for people.
    """

    stage: str
    done: int
    total: int | None
    unit: str
    detail: str = ""


ProgressCallback = Callable[[Progress], None]


def no_progress(_: Progress) -> None:
    """Report to nobody: the default of every ``progress`` argument."""


class Cancellation:
    """A flag that any thread may set and that long work reads between its units."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        """Ask the work to stop at its next unit."""
        self._event.set()

    @property
    def requested(self) -> bool:
        """Whether somebody asked the work to stop."""
        return self._event.is_set()

    def check(self) -> None:
        """Stop here if that was asked for.

        Raises:
            Cancelled: when :meth:`cancel` has been called.
        """
        if self.requested:
            raise Cancelled


class SharedProgress:
    """Progress and the wish to stop, for many threads at once: what they report comes one after another.

    Args:
        stage: the stage's name.
        total: how much there is, in ``unit``.
        unit: what is counted.
        progress: told of every advance.
        cancellation: the caller's flag.

    Attributes:
        failed: the work's own flag, to stop the others where one has failed; the caller's is theirs to set.
    """

    def __init__(
        self, stage: str, total: int, unit: str, *, progress: ProgressCallback, cancellation: Cancellation
    ) -> None:
        self._stage, self._total, self._unit = stage, total, unit
        self._progress, self._cancellation = progress, cancellation
        self._done, self._lock = 0, threading.Lock()
        self.failed = Cancellation()

    def advance(self, count: int, detail: str = "") -> None:
        """Report that so much more is done.

        Args:
            count: how much, in the unit.
            detail: what was worked on.

        Raises:
            Cancelled: one of the two flags is set.
        """
        with self._lock:
            self._done += count
            self._progress(Progress(self._stage, self._done, self._total, self._unit, detail))
        self._cancellation.check()
        self.failed.check()
