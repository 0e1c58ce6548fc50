"""Many requests in flight at once, one way to stop them all, and an eye on servers that fall silent.

One event loop runs in one thread.  A task that is cancelled closes its connection, whatever it waits for, so a server
stops at once; a thread that waits for bytes could not be woken that way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from tunesmith.errors import Cancelled
from tunesmith.models.endpoint.refusals import RETRIES, Contact, Refusal, refusal, silent, transport_errors
from tunesmith.progress import Cancellation

GLANCE_S = 0.02  # how often the wish to stop is read while nothing arrives
_CONNECT_S = 10.0

ResultT = TypeVar("ResultT")


class CallbackError(Exception):
    """What a caller's own function raised, so that it is not taken for the server's doing."""


def hand_out(callback: Callable[[ResultT], object], value: ResultT) -> None:
    """Call a caller's function.

    Raises:
        CallbackError: from what the function raised.
    """
    try:
        callback(value)
    except Exception as error:
        raise CallbackError from error


class Call:
    """One request in flight.

    Args:
        contact: the server.
        model: the model's id there.

    Attributes:
        touched: when something last came of it, seconds on the monotonic clock.
        refused: why it failed; None where it did not.
        done: whether all of it has come.
    """

    sent: tuple[str, ...] = ()

    def __init__(self, contact: Contact, model: str) -> None:
        self.contact, self.model = contact, model
        self.touched = 0.0
        self.refused: Refusal | None = None
        self.done = False
        self._late = False

    async def run(self, client: Any) -> None:
        """Ask, and take what comes.  What fails is kept in ``refused``; what a caller's function raises is raised."""
        import openai

        theirs: tuple[type[Exception], ...] = (openai.OpenAIError, ValueError, TypeError, RecursionError)
        self.touched, self.refused, self.done = time.monotonic(), None, False
        try:
            await self.ask(client)
        except asyncio.CancelledError:  # our own doing: somebody asked to stop, or the server fell silent
            if self._late:
                self.refuse(silent(self.contact))
        except CallbackError as error:
            raise error.__cause__ or error from None
        except (*theirs, *transport_errors()) as error:
            self.refuse(refusal(error, self.contact, model=self.model, sent=self.sent))

    async def ask(self, client: Any) -> None:
        """Send the request and read its answer."""
        raise NotImplementedError

    def refuse(self, refused: Refusal) -> None:
        """Take note of a failure; an answer that is whole stays so, however its connection ends."""
        if not self.done:
            self.refused = refused

    def too_late(self) -> bool:
        """Whether the server has been silent for longer than it may."""
        self._late = self._late or time.monotonic() - self.touched > self.contact.timeout_s
        return self._late


async def unless_cancelled(work: Coroutine[Any, Any, ResultT], cancellation: Cancellation) -> ResultT:
    """Wait for work, or for the wish to stop.

    Raises:
        Cancelled: that came first.
    """
    task = asyncio.create_task(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=GLANCE_S)
            if cancellation.requested:
                raise Cancelled
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def run(contacts: Sequence[Contact], work: Callable[[list[Any]], Coroutine[Any, Any, ResultT]]) -> ResultT:
    """Do asynchronous work with clients of its own; every connection and thread is gone afterwards.

    Args:
        contacts: the servers.
        work: is given a client of each.
    """

    async def main() -> ResultT:
        async with AsyncExitStack() as stack:
            return await work([await stack.enter_async_context(_client(contact)) for contact in contacts])

    if not _in_a_loop():
        return asyncio.run(main())
    with ThreadPoolExecutor(1) as beside:  # a notebook's loop runs in this thread already
        return beside.submit(lambda: asyncio.run(main())).result()


def _client(contact: Contact) -> Any:
    import openai

    return openai.AsyncOpenAI(
        base_url=contact.url,
        api_key=contact.api_key or "none",  # the library insists on one; servers that need none ignore it
        timeout=openai.Timeout(contact.timeout_s, connect=min(_CONNECT_S, contact.timeout_s)),
        max_retries=RETRIES,
    )


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
