"""What the page says of the machine: known once torch is loaded, which waits until the page is up."""

from __future__ import annotations

import threading
from collections.abc import Callable

import tunesmith as ts


class Machine:
    """The compute device and dtype, found out once, in the background.

    Args:
        dtype: as it was asked for.
        first: done before torch is loaded, which takes longest.
    """

    def __init__(self, dtype: str = "auto", *, first: Callable[[], object] = lambda: None) -> None:
        self._dtype, self._first = dtype, first
        self._lock = threading.Lock()
        self._found: dict[str, object] | None = None

    def warm_in(self, seconds: float) -> None:
        """Warm up after a while, in a thread; whoever asks for it first has it done.

        Args:
            seconds: how long to wait, so that a page that is loading goes before.
        """
        timer = threading.Timer(seconds, self.warm)
        timer.daemon = True
        timer.name = "tunesmith-warm"
        timer.start()

    @property
    def found(self) -> dict[str, object] | None:
        """Device, dtype and why; None until that is known."""
        return self._found

    def warm(self) -> None:
        """Load torch and measure, or remember, which dtype is quickest; what goes wrong is said where it is used."""
        with self._lock:
            if self._found is not None:
                return
            self._first()
            try:
                compute = ts.compute_dtype(self._dtype)
            except Exception as error:  # noqa: BLE001 - the page works without it, and the first verb that needs it says so
                self._found = {"device": None, "dtype": None, "reason": f"{type(error).__name__}: {error}"}
            else:
                self._found = {"device": compute.device, "dtype": compute.dtype, "reason": compute.reason}
