"""Requests as a Ray Data job: workers of a cluster ask the servers, and what they are told streams back to here.

The process that asks for the job has the callbacks, the records and the errors, as if it had asked by itself.  An actor
of the cluster starts the job, since Ray Data does not run behind ``ray://``.  Workers are given prompts and token ids,
and need neither the models' files nor a tokenizer.

Addresses and key travel as an object of Ray's store, since Ray Data shows a job's arguments on its dashboard and in its
export files, with the fields of records.
"""

from __future__ import annotations

import importlib.util
import math
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Any, Literal

from tunesmith.errors import MissingExtraError, TunesmithError
from tunesmith.executors.cluster import own_version
from tunesmith.executors.on_ray import RayExecutor, quietly
from tunesmith.models.endpoint.fleet import AnswerT, Fleet, Row, Told
from tunesmith.models.endpoint.probe import Probed, ProbeRow
from tunesmith.models.endpoint.refusals import Contact, Refusal
from tunesmith.models.engine import Generation, GenerationSettings, OnText, Request, RowScore
from tunesmith.progress import Cancellation

_ROWS_A_JOB = 20_000  # what Ray's store and this process hold at once
_IN_FLIGHT_A_WORKER = 32  # an answer that streams costs a processor some milliseconds
_ROUNDS_A_BATCH = 8  # the last answers of a batch leave the servers idle; what a lost worker was told is asked again
_GLANCE_S = 0.05
_LOOK_EVERY_S = 0.3
_CALLS_AT_ONCE = 8
_END_S = 30.0


def fleet_on(executor: Executor) -> Callable[..., Fleet]:
    """What makes the fleet that an executor's workers ask.

    Raises:
        TunesmithError: it is not of a Ray cluster.
        MissingExtraError: what Ray Data needs is not installed.
    """
    if not isinstance(executor, RayExecutor):
        raise TunesmithError(
            "Requests to servers are sent from this process or from a Ray cluster.",
            expected="ray, ray://HOST:PORT, or no executor",
            found=type(executor).__name__,
            next_step="leave --executor out: one process keeps hundreds of requests in flight",
        )
    lacking = [package for package in ("pandas", "pyarrow") if importlib.util.find_spec(package) is None]
    if lacking:
        raise MissingExtraError("Running on Ray", "ray", lacking[0])

    def make(contacts: Sequence[Contact], *, parallel: int) -> Fleet:
        return FleetOnRay(contacts, parallel=parallel, executor=executor)

    return make


@dataclass(frozen=True)
class _Job:
    """What all workers of a job must know; it travels as one object of Ray's store.

    Attributes:
        version: of Tunesmith, which must be the worker's too.
        contacts: the servers.
        parallel: how many requests one worker keeps in flight at each server.
        probed: what was found out about each server.
        models: the model's id of every variant.
        settings: how answers are drawn; None where rows are scored.
        relay: the actor that says whether to stop.
    """

    version: str
    contacts: tuple[Contact, ...]
    parallel: int
    probed: tuple[Probed, ...]
    models: Mapping[str, str]
    settings: GenerationSettings | None
    relay: Any = None


class FleetOnRay(Fleet):
    """Servers that are asked by workers of a Ray cluster.

    Args:
        contacts: how each is spoken to.
        parallel: how many requests are in flight at each of them, of all workers together.
        executor: of the cluster that this process has joined.
    """

    def __init__(self, contacts: Sequence[Contact], *, parallel: int, executor: RayExecutor) -> None:
        super().__init__(contacts, parallel=parallel)
        self._executor = executor

    def probe(self, models: Sequence[str], row: ProbeRow | None, cancellation: Cancellation) -> None:
        """Have a worker find out about every server, since it may reach what this machine does not."""
        import ray

        with quietly():
            sealed = [ray.put(self.contacts)]
            future = self._executor.submit(_probe, sealed, self.parallel, list(models), row)
            try:
                while not wait([future], _GLANCE_S).done:
                    cancellation.check()
                self.probed = future.result()
            except BaseException:
                future.cancel()
                raise

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
        """Have every request answered; pieces of text are told at an answer's end."""

        def ended(index: int, generation: Generation) -> None:
            if on_text is not None and generation.text:
                on_text(index, generation.text)
            if generation.stop_reason != "cancelled":
                on_end(index, generation)

        return self._ask(models, requests, settings, ended, cancellation)

    def scores(
        self,
        models: Mapping[str, str],
        pairs: Sequence[tuple[str, Row]],
        *,
        on_end: Callable[[int, RowScore], None],
        cancellation: Cancellation,
    ) -> Told[RowScore]:
        """Have every row scored."""
        return self._ask(models, pairs, None, on_end, cancellation)

    def _ask(
        self,
        models: Mapping[str, str],
        asked: Sequence[Any],
        settings: GenerationSettings | None,
        on_end: Callable[[int, AnswerT], None],
        cancellation: Cancellation,
    ) -> Told[AnswerT]:
        """Run job after job, each of so many rows, until one finds that no more can be had."""
        told: Told[AnswerT] = Told()
        for first in range(0, len(asked), _ROWS_A_JOB):
            rows = asked[first : first + _ROWS_A_JOB]
            with quietly(), self._job(models, len(rows), settings) as job:
                for place, kind, value in job.run(rows, cancellation):
                    if kind == "lost":
                        self.lost[str(place)] = value
                    elif kind == "refused":
                        told.refused[first + int(place)] = value
                    else:
                        told.answers[first + int(place)] = value
                        on_end(first + int(place), value)
            if cancellation.requested or any(refused.final for refused in told.refused.values()):
                break
        return told

    @contextmanager
    def _job(self, models: Mapping[str, str], rows: int, settings: GenerationSettings | None) -> Iterator[_Running]:
        import ray

        # Two workers would do to such a server what two requests or two models at once do.
        one = any(probed.habits.alone or probed.habits.apart for probed in self.probed)
        wanted = math.ceil(self.parallel * len(self.contacts) / _IN_FLIGHT_A_WORKER)
        workers = 1 if one else max(1, min(wanted, self._executor.slots, self.parallel, rows))
        share = max(1, self.parallel // workers)
        batch = min(share * len(self.contacts) * _ROUNDS_A_BATCH, max(1, math.ceil(rows / workers)))
        job = _Job(own_version(), self.contacts, share, self.probed, dict(models), settings)
        relay = ray.remote(num_cpus=0, max_concurrency=_CALLS_AT_ONCE)(_Relay).remote([ray.put(job)], workers, batch)
        running = _Running(relay)
        try:
            yield running
        finally:
            running.end()
            with suppress(Exception):  # it goes with the driver anyway
                ray.kill(relay)


_Came = tuple[int | str, Literal["answer", "refused", "lost"], Any]


class _Running:
    """One Ray Data job, whose results are handed on in the thread that asks for them."""

    def __init__(self, relay: Any) -> None:
        self._relay = relay
        self._begun = self._ended = self._stopped = False

    def run(self, rows: Sequence[Any], cancellation: Cancellation) -> Iterator[_Came]:
        """What comes, as it comes, in no order."""
        import ray

        self._begun = True
        try:
            ray.get(self._relay.begin.remote([pickle.dumps(row) for row in rows]))
            while not self._ended:
                asked = self._relay.more.remote()
                while not ray.wait([asked], timeout=_GLANCE_S)[0]:
                    if cancellation.requested:
                        self._stop()
                batches, self._ended = ray.get(asked)
                for place, kind, value in (came for batch in batches for came in pickle.loads(batch)):  # noqa: S301
                    yield place, kind, value
                    if kind == "refused" and value.final:
                        self._stop()
        except ray.exceptions.RayError as error:
            raise _failed(error) from error

    def end(self) -> None:
        """Have the workers let go of what they ask, and wait until they have."""
        import ray

        if not self._begun or self._ended:
            return
        until = time.monotonic() + _END_S
        self._stop()
        with suppress(ray.exceptions.RayError):
            while not self._ended and time.monotonic() < until:
                _, self._ended = ray.get(self._relay.more.remote(), timeout=_END_S)

    def _stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            self._relay.stop.remote()


class _Relay:
    """An actor that starts the job, keeps what comes until it is asked for it, and tells workers when to stop."""

    def __init__(self, sealed: list[Any], workers: int, batch: int) -> None:
        import ray

        job: _Job = replace(ray.get(sealed[0]), relay=ray.get_runtime_context().current_actor)
        self._sealed, self._workers, self._batch = [ray.put(job)], workers, batch
        self._came: SimpleQueue[bytes | BaseException | None] = SimpleQueue()
        self._stopping = self._ended = False

    def begin(self, rows: list[bytes]) -> None:
        """Start with the job."""
        threading.Thread(target=self._feed, args=(rows,), daemon=True).start()

    def more(self) -> tuple[list[bytes], bool]:
        """What has come since the last call, after a short wait for it, and whether that is all."""
        batches: list[bytes] = []
        with suppress(Empty):
            while not self._ended:
                came = self._came.get(timeout=0 if batches else _LOOK_EVERY_S)
                if isinstance(came, BaseException):
                    raise came
                if came is None:
                    self._ended = True
                else:
                    batches.append(came)
        return batches, self._ended

    def stop(self) -> None:
        """Have the workers end what they are about."""
        self._stopping = True

    def stopping(self) -> bool:
        """Whether somebody asked for that."""
        return self._stopping

    def _feed(self, rows: list[bytes]) -> None:
        import ray.data

        try:
            items = [{"place": place, "row": row} for place, row in enumerate(rows)]
            given = ray.data.from_items(items, override_num_blocks=math.ceil(len(items) / self._batch))
            dataset = given.map_batches(
                _Worker,
                fn_constructor_args=(self._sealed,),
                batch_size=None,
                batch_format="numpy",
                compute=ray.data.ActorPoolStrategy(size=self._workers),
                num_cpus=1,
            )
            dataset.context.enable_progress_bars = False
            for batch in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
                for told in batch["told"]:
                    self._came.put(bytes(told))
        except BaseException as error:  # noqa: BLE001 - raised where somebody waits for more
            self._came.put(error)
        finally:
            self._came.put(None)


class _Worker:
    """Asks the servers, for the rows of one batch after another."""

    def __init__(self, sealed: list[Any]) -> None:
        import ray

        self._job: _Job = ray.get(sealed[0])
        job = self._job
        self._fleet = Fleet(_with_a_key(job.contacts), parallel=job.parallel, probed=job.probed)
        self._stop = Cancellation()
        threading.Thread(target=self._watch, daemon=True).start()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        """What became of every row of a batch."""
        places = [int(place) for place in batch["place"]]
        came = self._came(places, [pickle.loads(row) for row in batch["row"]])  # noqa: S301 - of the driver
        return {"told": [pickle.dumps(came)]}

    def _came(self, places: list[int], rows: list[Any]) -> list[_Came]:
        job, ours = self._job, own_version()
        if job.version != ours:
            error = TunesmithError(
                "A worker of the cluster has another version of Tunesmith.", expected=job.version, found=ours
            )
            return [(place, "refused", Refusal(error, final=True)) for place in places]
        told: Told[Any]
        if job.settings is None:
            told = self._fleet.scores(job.models, rows, on_end=_nothing, cancellation=self._stop)
        else:
            told = self._fleet.generations(
                job.models, rows, job.settings, on_text=None, on_end=_nothing, cancellation=self._stop
            )
        came: list[_Came] = [(places[at], "answer", value) for at, value in told.answers.items()]
        came += [(places[at], "refused", refused) for at, refused in told.refused.items() if at not in told.answers]
        return came + [(where, "lost", refused) for where, refused in self._fleet.lost.items()]

    def _watch(self) -> None:
        """Stop when that is asked for, or when the driver is gone."""
        import ray

        while not self._stop.requested:
            try:
                if ray.get(self._job.relay.stopping.remote(), timeout=_END_S):
                    self._stop.cancel()
            except Exception:  # noqa: BLE001 - whatever Ray says of a driver that is gone
                self._stop.cancel()
            time.sleep(_LOOK_EVERY_S)


def _nothing(_index: int, _value: object) -> None:
    """Nobody is told here; the driver tells."""


def _probe(sealed: list[Any], parallel: int, models: list[str], row: ProbeRow | None) -> tuple[Probed, ...]:
    """On a worker: what is found out about every server."""
    import ray

    fleet = Fleet(_with_a_key(ray.get(sealed[0])), parallel=parallel)
    fleet.probe(models, row, Cancellation())
    return fleet.probed


def _with_a_key(contacts: Sequence[Contact]) -> list[Contact]:
    """On a worker: contacts with its own key, where they came without one."""
    return [replace(one, api_key=one.api_key or os.environ.get("OPENAI_API_KEY") or None) for one in contacts]


def _failed(error: Exception) -> TunesmithError:
    """The error of a job that Ray gave up."""
    found = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
    return TunesmithError(
        "The Ray job failed.",
        found=found[:300],
        next_step="look at the cluster's log; the same command goes on from what is kept",
    )
