"""One server or several that hold the same models: who is asked what, and what becomes of a server that goes.

A request that a server fails is given to another that has not had it, so that what can be answered does not depend on
who was asked.  A server whose failure all its requests would share is asked nothing more.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from tunesmith.conversations import Encoded
from tunesmith.models.endpoint.answers import Answer
from tunesmith.models.endpoint.flight import GLANCE_S, Call, run, unless_cancelled
from tunesmith.models.endpoint.likelihoods import Likelihood
from tunesmith.models.endpoint.probe import Probe, Probed, ProbeRow
from tunesmith.models.endpoint.refusals import Contact, Refusal
from tunesmith.models.engine import Generation, GenerationSettings, OnText, Request, RowScore
from tunesmith.progress import Cancellation

AnswerT = TypeVar("AnswerT", Generation, RowScore)


@dataclass(frozen=True)
class Row:
    """A row that is to be scored.

    Attributes:
        id: its id.
        encoded: its token ids, and which of them count.
        text: the same as text, for servers that take no ids.
    """

    id: str
    encoded: Encoded
    text: str


@dataclass
class Told(Generic[AnswerT]):
    """What came of many requests, by their places.

    Attributes:
        answers: those that are whole, and of cancelled ones what came until then.
        refused: why each of the others failed; those that were not begun are in neither.
    """

    answers: dict[int, AnswerT] = field(default_factory=dict)
    refused: dict[int, Refusal] = field(default_factory=dict)


class Fleet:
    """Servers that hold the same models.

    Args:
        contacts: how each is spoken to.
        parallel: how many requests are in flight at each of them.
        probed: what was found out about each before; empty where :meth:`probe` is to find it out.

    Attributes:
        probed: what was found out about each; empty before that.
        lost: by address, why a server is asked nothing more.
    """

    def __init__(self, contacts: Sequence[Contact], *, parallel: int, probed: Sequence[Probed] = ()) -> None:
        self.contacts, self.parallel, self.probed = tuple(contacts), parallel, tuple(probed)
        self.lost: dict[str, Refusal] = {}

    def probe(self, models: Sequence[str], row: ProbeRow | None, cancellation: Cancellation) -> None:
        """Find out about every server, all at once.

        Args:
            models: the ids of all models that will be asked.
            row: what is scored to see whether likelihoods can be had; None for not to.
            cancellation: read all the time.

        Raises:
            TunesmithError: one of them cannot be reached, has no such model, or does not speak the protocol.
            Cancelled: somebody asked to stop.
        """

        async def all_of(clients: Sequence[Any]) -> list[Probed]:
            probes = [
                Probe(client, contact, models=models, parallel=self.parallel, row=row, fleet=len(self.contacts) > 1)
                for client, contact in zip(clients, self.contacts, strict=True)
            ]
            return await asyncio.gather(*(probe.probe() for probe in probes))

        self.probed = tuple(run(self.contacts, lambda clients: unless_cancelled(all_of(clients), cancellation)))

    def generations(
        self,
        models: Mapping[str, str],
        requests: Sequence[Request],
        settings: GenerationSettings,
        *,
        on_text: OnText | None,
        on_end: Callable[[int, Generation], None],
        cancellation: Cancellation,
    ) -> Told[Generation]:
        """Have every request answered.

        Args:
            models: the model's id of every variant.
            requests: prompts, each with its variant.
            settings: how answers are drawn.
            on_text: given pieces of text; of several servers' answers the whole text at its end, since an answer that
                breaks off is begun anew by another server.
            on_end: given every answer that is whole, once.
            cancellation: on request every connection is closed.
        """
        told: Told[Generation] = Told()
        piecewise = on_text if len(self.contacts) == 1 else None
        at_once = on_text if piecewise is None else None

        def ended(index: int, call: Answer) -> None:
            told.answers[index] = call.generation()
            if at_once is not None and call.text:
                at_once(index, call.text)
            on_end(index, told.answers[index])

        def ask(lane: _Lane, index: int) -> Answer:
            return Answer(
                lane.contact,
                models[requests[index].variant],
                prompt=requests[index].prompt,
                settings=settings,
                habits=lane.probed.habits,
                on_text=None if piecewise is None else lambda piece: piecewise(index, piece),
                stopping=lambda: cancellation.requested,
                on_end=lambda call: ended(index, call),
            )

        work = _Work([models[request.variant] for request in requests], ask)
        told.refused = self._fly(work, cancellation)
        if cancellation.requested:
            for index, call in work.broken.items():
                told.answers[index] = call.generation()
                if at_once is not None and call.text:
                    at_once(index, call.text)
        return told

    def scores(
        self,
        models: Mapping[str, str],
        pairs: Sequence[tuple[str, Row]],
        *,
        on_end: Callable[[int, RowScore], None],
        cancellation: Cancellation,
    ) -> Told[RowScore]:
        """Have every row scored.

        Args:
            models: the model's id of every variant.
            pairs: a variant and a row, each.
            on_end: given every score, once.
            cancellation: on request every connection is closed.
        """
        told: Told[RowScore] = Told()

        def ended(index: int, call: Likelihood) -> None:
            told.answers[index] = call.score(pairs[index][1].id)
            on_end(index, told.answers[index])

        def ask(lane: _Lane, index: int) -> Likelihood:
            name, row = pairs[index]
            scoring = lane.probed.habits.scoring
            assert scoring is not None, "all servers were seen to score"  # noqa: S101
            return Likelihood(
                lane.contact,
                models[name],
                row=row.encoded,
                text=row.text,
                scoring=scoring,
                on_end=lambda call: ended(index, call),
            )

        told.refused = self._fly(_Work([models[name] for name, _ in pairs], ask), cancellation)
        return told

    def _fly(self, work: _Work[Any], cancellation: Cancellation) -> dict[int, Refusal]:
        there = [place for place, one in enumerate(self.contacts) if one.where not in self.lost]
        there = there or list(range(len(self.contacts)))  # one may have come back

        async def share(clients: Sequence[Any]) -> None:
            lanes = [
                _Lane(self.contacts[place], self.probed[place], client, self.parallel)
                for place, client in zip(there, clients, strict=True)
            ]
            await _share(lanes, work, cancellation)
            for lane in lanes if len(self.contacts) > 1 else []:
                if lane.closed is not None:
                    self.lost[lane.contact.where] = lane.closed

        if work.models:
            run([self.contacts[place] for place in there], share)
        return work.refused


class _Lane:
    """One server while work is shared out.

    Attributes:
        closed: the refusal after which it is asked nothing more.
        running: how many requests it has.
        model: the one that it was asked last.
    """

    def __init__(self, contact: Contact, probed: Probed, client: Any, parallel: int) -> None:
        self.contact, self.probed, self.client = contact, probed, client
        self.room = 1 if probed.habits.alone else parallel
        self.closed: Refusal | None = None
        self.running = 0
        self.model: str | None = None

    @property
    def free(self) -> bool:
        """Whether it can be given something."""
        return self.closed is None and self.running < self.room


CallT = TypeVar("CallT", bound=Call)


class _Work(Generic[CallT]):
    """What is to be asked, and what became of it.

    Args:
        models: the model of every request, in their order.
        ask: makes the request of a place for a server.

    Attributes:
        refused: why a request has no answer, by its place.
        broken: requests that were ended in the middle of an answer.
    """

    def __init__(self, models: Sequence[str], ask: Callable[[_Lane, int], CallT]) -> None:
        self.models, self.ask = models, ask
        self.refused: dict[int, Refusal] = {}
        self.broken: dict[int, CallT] = {}
        self._fresh: dict[str, deque[int]] = {}
        for index, model in enumerate(models):
            self._fresh.setdefault(model, deque()).append(index)
        self._tried: dict[int, frozenset[_Lane]] = {}
        self._again: dict[frozenset[_Lane], deque[int]] = {}

    def take(self, lane: _Lane) -> int | None:
        """The next request for a server; None where there is none that it may have now."""
        # A server that mixes models up is asked for one at a time.
        only = lane.model if lane.probed.habits.apart and lane.running else None
        for tried, failed in self._again.items():
            if failed and lane not in tried and only in (None, self.models[failed[0]]):
                return failed.popleft()
        queues = [self._fresh.get(only)] if only is not None else self._fresh.values()
        heads = [queue for queue in queues if queue]
        if not heads:
            return None
        same = self._fresh.get(lane.model or "") if lane.probed.habits.apart else None
        return (same or min(heads, key=lambda queue: queue[0])).popleft()

    def settle(self, lane: _Lane, index: int, call: CallT) -> None:
        """Take note of how a request ended."""
        if call.refused is None:
            self.refused.pop(index, None)
            if not call.done:
                self.broken[index] = call
            return
        self.refused[index] = call.refused
        self.broken[index] = call
        if call.refused.final:
            lane.closed = lane.closed or call.refused
        tried = self._tried[index] = self._tried.get(index, frozenset()) | {lane}
        self._again.setdefault(tried, deque()).append(index)


async def _share(lanes: Sequence[_Lane], work: _Work[Any], cancellation: Cancellation) -> None:
    """Have everything asked, each by whoever is free; on request, those in flight end at once."""
    running: dict[asyncio.Task[None], tuple[_Lane, int, Call]] = {}
    try:
        while True:
            began = not cancellation.requested
            while began:  # one each in turn, or the first server would have all of a little
                began = False
                for lane in lanes:
                    index = work.take(lane) if lane.free else None
                    if index is None:
                        continue
                    call = work.ask(lane, index)
                    running[asyncio.create_task(call.run(lane.client))] = lane, index, call
                    lane.running, lane.model, began = lane.running + 1, call.model, True
            if not running:
                return
            finished, _ = await asyncio.wait(running, timeout=GLANCE_S, return_when=asyncio.FIRST_COMPLETED)
            for task in finished:
                lane, index, call = running.pop(task)
                lane.running -= 1
                task.result()
                work.settle(lane, index, call)
            if cancellation.requested:
                return
            for task, (_, _, call) in running.items():
                if call.too_late():
                    task.cancel()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for _, index, call in running.values():
            if not call.done:
                work.broken[index] = call
