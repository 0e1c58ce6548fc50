"""Variants that a server holds: the same records from anything that speaks OpenAI's protocol.

vLLM with ``--lora-modules``, SGLang, llama.cpp and the like.  What a server can and does is measured by a few short
questions; what it cannot give is left out and said.  Several servers that hold the same models share the work.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any
from urllib.parse import urlsplit

from tunesmith.errors import Cancelled, DataError, MissingExtraError
from tunesmith.models.endpoint.alike import held_alike, said_of_all
from tunesmith.models.endpoint.answers import sampling
from tunesmith.models.endpoint.fleet import Fleet, Row
from tunesmith.models.endpoint.likelihoods import encoded
from tunesmith.models.endpoint.on_ray import fleet_on
from tunesmith.models.endpoint.probe import Probed, ProbeRow
from tunesmith.models.endpoint.refusals import Contact, Refusal, raise_all
from tunesmith.models.engine import (
    Capabilities,
    Engine,
    Generation,
    GenerationSettings,
    OnGeneration,
    OnScore,
    OnText,
    Request,
    RowScore,
    ScoredRow,
)
from tunesmith.progress import Cancellation, Progress, ProgressCallback, no_progress
from tunesmith.record import Finding

__all__ = ["PARALLEL", "Endpoint"]

PARALLEL = 8
_NOTHING = Generation("", (), 0, None, "cancelled", 0.0, None, None)


class Endpoint(Engine):
    """Variants behind an OpenAI-compatible server, or behind several that hold the same models.

    It is asked about itself when it is first used.  All of a call's requests and callbacks run in the thread that calls
    (in a notebook, in one beside it).  Where an answer's times are told, its own request is its batch.  What a server
    takes out of an answer as thinking is put back between ``<think>`` and ``</think>``, where models write it.

    Several servers are asked by who is free.  What one fails goes to another, and one that goes away is asked nothing
    more, which :attr:`capabilities` says.  ``on_text`` is then given an answer's whole text at its end.

    Args:
        url: the base address; for most servers it ends in ``/v1``.  Several addresses for several servers.
        models: the server's model id of every variant, or just ids, which then name the variants too.
        api_key: the server's key; None takes ``OPENAI_API_KEY`` from the environment, where that is set.
        timeout_s: how long the server may say nothing, queueing included.
        parallel: how many requests are in flight at once, at each server.
        tokenizer_dir: tokenizer and chat template of the models, with which rows are rendered to be scored.  Without it
            nothing is scored; for generating, the server renders with a template of its own.
        executor: whose workers ask, of a Ray cluster; None for this process, which can keep hundreds of requests in
            flight.

    Raises:
        DataError: the address is none, no model is named, or the executor is not of a Ray cluster.
        MissingExtraError: the package ``openai`` is not installed.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        models: Mapping[str, str] | Iterable[str],
        api_key: str | None = None,
        timeout_s: float = 600.0,
        parallel: int = PARALLEL,
        tokenizer_dir: str | os.PathLike[str] | None = None,
        executor: Executor | None = None,
    ) -> None:
        try:
            import openai  # noqa: F401 - to say at once that it is lacking
        except ImportError as error:
            raise MissingExtraError("Asking a server", "endpoint", "openai") from error
        self._models = dict(models) if isinstance(models, Mapping) else {name: name for name in models}
        key = api_key or os.environ.get("OPENAI_API_KEY") or None
        urls = [url] if isinstance(url, str) else url
        contacts = {contact.where: contact for contact in (Contact(one, key, timeout_s) for one in urls)}
        for contact in contacts.values():
            _check_address(contact)
        self._places = tuple(contacts)
        self._where = ", ".join(contacts)
        if not self._models or not contacts:
            raise DataError("No model of the server is named.", where=self._where)
        make = Fleet if executor is None else fleet_on(executor)
        self._fleet = make(tuple(contacts.values()), parallel=max(1, parallel))
        self._tokenizer_dir = tokenizer_dir
        self._tokenizer: Any = None
        self._alike: tuple[Finding, ...] = ()
        self._held = False
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Endpoint({self._where!r}, models={self._models!r})"

    @property
    def names(self) -> tuple[str, ...]:
        """The variants that can be asked."""
        return tuple(self._models)

    @property
    def capabilities(self) -> Capabilities:
        """What the server can and does, as measured once; of several what all of them can.

        Raises:
            DataError: a server does not list a model, those that it lists are named; or holds another by its name.
            TunesmithError: the server cannot be reached, wants another key, or does not speak the protocol.
        """
        probed = self._ask_once(Cancellation())
        places = list(zip(self._places, probed, strict=True))
        lost = [
            Finding(
                code="endpoint_server_lost",
                severity="warning",
                params={"where": where, "found": refused.error.found or refused.error.what},
            )
            for where, refused in self._fleet.lost.items()
        ]
        return Capabilities(
            kind="endpoint",
            where=self._where,
            servers=self._places if len(places) > 1 else (),
            scores=_all_score(probed),
            findings=(*lost, *self._alike, *(said_of_all(places) if len(places) > 1 else probed[0].findings)),
        )

    def identity(self, variant: str) -> str | None:
        """None: a server does not tell what its answers depend on.

        Raises:
            DataError: there is no such variant.
        """
        self._model(variant)
        return None

    def generate(
        self,
        requests: Sequence[Request],
        settings: GenerationSettings | None = None,
        *,
        on_text: OnText | None = None,
        on_done: OnGeneration | None = None,
        progress: ProgressCallback = no_progress,
        cancellation: Cancellation | None = None,
    ) -> list[Generation]:
        """Answer every request, several at once.

        Where some fail, the others are answered first and handed to ``on_done``; then one error names those that
        failed.  After a failure that all would share, such as a server that went away, no more are begun.

        Args:
            requests: prompts, each with its variant.
            settings: how answers are drawn; None takes the defaults.
            on_text: called with the request's index and the text that has come since the last call.
            on_done: called with the request's index and its answer, once it is whole.  Not for cancelled ones.
            progress: called with the stage ``generate``, in prompts answered.
            cancellation: on request every connection is closed; what came until then is returned, as ``cancelled``.

        Returns:
            One generation a request, in their order.

        Raises:
            DataError: no such variant, or a setting or kind of prompt that the server does not take.
            PromptError: prompts that leave no room in the context window; all are named.
            TunesmithError: the server cannot be reached, failed, or broke answers off; they are not done.
        """
        settings, stop = settings or GenerationSettings(), cancellation or Cancellation()
        for variant in {request.variant for request in requests}:
            self._model(variant)
        try:
            probed = self._ask_once(stop)
        except Cancelled:
            return [_NOTHING for _ in requests]
        for where, one in zip(self._places, probed, strict=True):
            _check_kinds(requests, settings, one, where)
        done = _Counter("generate", len(requests), "prompts", progress)

        def ended(index: int, generation: Generation) -> None:
            if on_done is not None:
                on_done(index, generation)
            done.add(requests[index].variant)

        told = self._fleet.generations(
            self._models, requests, settings, on_text=on_text, on_end=ended, cancellation=stop
        )
        if not stop.requested:
            _raise(told.refused, len(requests), lambda i: f"prompt {i} ({requests[i].variant})", len(told.answers))
        return [told.answers.get(index, _NOTHING) for index in range(len(requests))]

    def score(
        self,
        names: Sequence[str],
        rows: Sequence[ScoredRow],
        *,
        reference: str | None = None,
        on_done: OnScore | None = None,
        progress: ProgressCallback = no_progress,
        cancellation: Cancellation | None = None,
    ) -> dict[str, list[RowScore]]:
        """Tell how likely every variant finds the answers of every row, where the server tells it.

        Args:
            names: the variants.
            rows: conversations with an answer, or texts.
            reference: one of ``names``; a server does not tell whole distributions, so ``kl`` stays None.
            on_done: called with the variant's name, the row's index and its score.
            progress: called with the stage ``score``, in rows of all variants.
            cancellation: on request every connection is closed.

        Returns:
            By variant, one score a row, in their order.

        Raises:
            DataError: no such variant, a row without an answer, no chat template, or the server cannot score.
            PromptError: rows that are longer than the context window; all are named.
            TunesmithError: the server cannot be reached, or failed.
            Cancelled: somebody asked to stop.
        """
        stop = cancellation or Cancellation()
        for name in (*names, *([reference] if reference else [])):
            self._model(name)
        if not _all_score(self._ask_once(stop)):
            raise DataError(
                "The server does not tell how likely given tokens are.",
                where=self._where,
                next_step="name the tokenizer's directory" if self._tokenizer_dir is None else "score without a server",
            )
        ready = [self._ready(row) for row in rows]
        pairs = [(name, row) for name in names for row in ready]
        done = _Counter("score", len(pairs), "rows", progress)

        def ended(place: int, score: RowScore) -> None:
            name, index = names[place // len(rows)], place % len(rows)
            if on_done is not None:
                on_done(name, index, score)
            done.add(name)

        told = self._fleet.scores(self._models, pairs, on_end=ended, cancellation=stop)
        stop.check()
        _raise(told.refused, len(pairs), lambda i: f"{pairs[i][1].id} ({pairs[i][0]})", len(told.answers))
        scores = [told.answers[place] for place in range(len(pairs))]
        return {name: scores[at * len(rows) : (at + 1) * len(rows)] for at, name in enumerate(names)}

    def _model(self, variant: str) -> str:
        if variant not in self._models:
            raise DataError(
                "There is no such variant at this server.",
                where=self._where,
                expected=", ".join(self._models),
                found=variant,
            )
        return self._models[variant]

    def _ask_once(self, cancellation: Cancellation) -> Sequence[Probed]:
        with self._lock:
            if not self._fleet.probed:
                self._load_tokenizer()
                row = None if self._tokenizer is None else ProbeRow.of(self._tokenizer)
                self._fleet.probe(list(self._models.values()), row, cancellation)
            if len(self._places) > 1 and not self._held:
                self._alike = held_alike(self._models, list(zip(self._places, self._fleet.probed, strict=True)))
                self._held = True
            return self._fleet.probed

    def _ready(self, row: ScoredRow) -> Row:
        ids = encoded(self._tokenizer, row)
        return Row(row.id, ids, self._tokenizer.decode(ids.input_ids, skip_special_tokens=False))

    def _load_tokenizer(self) -> None:
        if self._tokenizer_dir is None or self._tokenizer is not None:
            return
        from transformers import AutoTokenizer

        from tunesmith.models.quiet import quiet_loading

        try:
            with quiet_loading():
                self._tokenizer = AutoTokenizer.from_pretrained(self._tokenizer_dir, local_files_only=True)
        except (OSError, ValueError) as error:
            raise DataError("The tokenizer cannot be loaded.", where=self._tokenizer_dir, found=error) from error


def _check_kinds(requests: Sequence[Request], settings: GenerationSettings, probed: Probed, where: str) -> None:
    """Refuse what a server does not take, before anything is asked."""
    sampling(settings, probed.habits)
    kinds = {isinstance(request.prompt, str) for request in requests}
    if True in kinds and not probed.habits.plain:
        raise DataError(
            "The server takes no plain text, only conversations.", where=where, next_step="ask with conversations"
        )
    if False in kinds and not probed.habits.chat:
        raise DataError(
            "The server takes no conversations, only plain text.",
            where=where,
            next_step="ask with plain text, or give the server's model a template",
        )


def _all_score(probed: Sequence[Probed]) -> bool:
    return all(one.habits.scoring is not None for one in probed)


def _raise(refused: Mapping[int, Refusal], total: int, about: Callable[[int], str], whole: int) -> None:
    raise_all([(about(i), refused[i]) for i in sorted(refused)], undone=total - whole, total=total)


class _Counter:
    """Progress in finished requests."""

    def __init__(self, stage: str, total: int, unit: str, progress: Callable[[Progress], None]) -> None:
        self._stage, self._total, self._unit, self._progress = stage, total, unit, progress
        self._done = 0

    def add(self, detail: str) -> None:
        self._done += 1
        self._progress(Progress(self._stage, self._done, self._total, self._unit, detail))


def _check_address(contact: Contact) -> None:
    try:
        parts = urlsplit(contact.url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good:
        raise DataError(
            "A server's address is not an address.", expected="http://host:port/v1", found=contact.shown(contact.url)
        )
