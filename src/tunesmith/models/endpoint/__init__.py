"""Variants that a server holds: the same records from anything that speaks OpenAI's protocol.

vLLM with ``--lora-modules``, SGLang, llama.cpp and the like.  What a server can and does is measured by a few short
questions; what it cannot give is left out and said.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from tunesmith.errors import Cancelled, DataError, MissingExtraError
from tunesmith.models.endpoint.answers import Answer, Habits, sampling
from tunesmith.models.endpoint.flight import Call, fly, run, unless_cancelled
from tunesmith.models.endpoint.likelihoods import Likelihood, encoded
from tunesmith.models.endpoint.probe import Probe, Probed
from tunesmith.models.endpoint.refusals import Contact, raise_all
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

__all__ = ["Endpoint"]


class Endpoint(Engine):
    """Variants behind an OpenAI-compatible server.

    It is asked about itself when it is first used.  All of a call's requests and callbacks run in the thread that calls
    (in a notebook, in one beside it).  Where an answer's times are told, its own request is its batch.  What a server
    takes out of an answer as thinking is put back between ``<think>`` and ``</think>``, where models write it.

    Args:
        url: the base address; for most servers it ends in ``/v1``.
        models: the server's model id of every variant, or just ids, which then name the variants too.
        api_key: the server's key; None takes ``OPENAI_API_KEY`` from the environment, where that is set.
        timeout_s: how long the server may say nothing, queueing included.
        parallel: how many requests are in flight at once.
        tokenizer_dir: tokenizer and chat template of the models, with which rows are rendered to be scored.  Without it
            nothing is scored; for generating, the server renders with a template of its own.

    Raises:
        DataError: the address is none, or no model is named.
        MissingExtraError: the package ``openai`` is not installed.
    """

    def __init__(
        self,
        url: str,
        *,
        models: Mapping[str, str] | Iterable[str],
        api_key: str | None = None,
        timeout_s: float = 600.0,
        parallel: int = 8,
        tokenizer_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        try:
            import openai  # noqa: F401 - to say at once that it is lacking
        except ImportError as error:
            raise MissingExtraError("Asking a server", "endpoint", "openai") from error
        self._models = dict(models) if isinstance(models, Mapping) else {name: name for name in models}
        self._contact = Contact(url, api_key or os.environ.get("OPENAI_API_KEY") or None, timeout_s)
        _check_address(self._contact)
        if not self._models:
            raise DataError("No model of the server is named.", where=self._contact.where)
        self._parallel = max(1, parallel)
        self._tokenizer_dir = tokenizer_dir
        self._tokenizer: Any = None
        self._probed: Probed | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Endpoint({self._contact.where!r}, models={self._models!r})"

    @property
    def names(self) -> tuple[str, ...]:
        """The variants that can be asked."""
        return tuple(self._models)

    @property
    def capabilities(self) -> Capabilities:
        """What the server can and does, as measured once.

        Raises:
            DataError: the server does not list a model; those that it lists are named.
            TunesmithError: the server cannot be reached, wants another key, or does not speak the protocol.
        """
        probed = self._ask_once(Cancellation())
        return Capabilities(
            kind="endpoint",
            where=self._contact.where,
            scores=probed.habits.scoring is not None,
            findings=probed.findings,
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
        models = [self._model(request.variant) for request in requests]
        try:
            probed = self._ask_once(stop)
        except Cancelled:
            nothing = Generation("", (), 0, None, "cancelled", 0.0, None, None)
            return [nothing for _ in requests]
        self._check_kinds(requests, settings, probed)
        done = _Counter("generate", len(requests), "prompts", progress)

        def answer(index: int) -> Answer:
            def ended(call: Answer) -> None:
                if on_done is not None:
                    on_done(index, call.generation())
                done.add(requests[index].variant)

            return Answer(
                self._contact,
                models[index],
                prompt=requests[index].prompt,
                settings=settings,
                habits=probed.habits,
                on_text=None if on_text is None else lambda piece: on_text(index, piece),
                stopping=lambda: stop.requested,
                on_end=ended,
            )

        calls = [answer(index) for index in range(len(requests))]
        self._fly(calls, stop)
        if not stop.requested:
            self._raise([(f"prompt {i} ({requests[i].variant})", call) for i, call in enumerate(calls)])
        return [call.generation() for call in calls]

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
        models = {name: self._model(name) for name in (*names, *([reference] if reference else []))}
        scoring = self._ask_once(stop).habits.scoring
        if scoring is None:
            raise DataError(
                "The server does not tell how likely given tokens are.",
                where=self._contact.where,
                next_step="name the tokenizer's directory" if self._tokenizer_dir is None else "score without a server",
            )
        ready = [encoded(self._tokenizer, row) for row in rows]
        texts = [self._tokenizer.decode(row.input_ids, skip_special_tokens=False) for row in ready]
        done = _Counter("score", len(names) * len(rows), "rows", progress)

        def likelihood(name: str, index: int) -> Likelihood:
            def ended(call: Likelihood) -> None:
                if on_done is not None:
                    on_done(name, index, call.score(rows[index].id))
                done.add(name)

            return Likelihood(
                self._contact, models[name], row=ready[index], text=texts[index], scoring=scoring, on_end=ended
            )

        calls = {name: [likelihood(name, index) for index in range(len(rows))] for name in names}
        self._fly([call for ofname in calls.values() for call in ofname], stop)
        stop.check()
        self._raise([(f"{rows[i].id} ({name})", call) for name in names for i, call in enumerate(calls[name])])
        return {name: [call.score(rows[i].id) for i, call in enumerate(calls[name])] for name in names}

    def _model(self, variant: str) -> str:
        if variant not in self._models:
            raise DataError(
                "There is no such variant at this server.",
                where=self._contact.where,
                expected=", ".join(self._models),
                found=variant,
            )
        return self._models[variant]

    def _ask_once(self, cancellation: Cancellation) -> Probed:
        with self._lock:
            if self._probed is None:
                self._load_tokenizer()
                self._probed = run(
                    self._contact,
                    lambda client: unless_cancelled(
                        Probe(
                            client,
                            self._contact,
                            models=list(self._models.values()),
                            parallel=self._parallel,
                            tokenizer=self._tokenizer,
                        ).probe(),
                        cancellation,
                    ),
                )
            return self._probed

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

    def _check_kinds(self, requests: Sequence[Request], settings: GenerationSettings, probed: Probed) -> None:
        sampling(settings, probed.habits)
        kinds = {isinstance(request.prompt, str) for request in requests}
        if (True in kinds and not probed.habits.plain) or (False in kinds and not probed.habits.chat):
            plain = True in kinds and not probed.habits.plain
            raise DataError(
                "The server takes no plain text, only conversations."
                if plain
                else "The server takes no conversations, only plain text.",
                where=self._contact.where,
                next_step="ask with conversations"
                if plain
                else "ask with plain text, or give the server's model a template",
            )

    def _fly(self, calls: Sequence[Call], cancellation: Cancellation) -> None:
        habits = self._probed.habits if self._probed is not None else Habits()
        parallel = 1 if habits.alone else self._parallel
        groups = [calls]
        if habits.apart:
            groups = [
                [call for call in calls if call.model == model] for model in dict.fromkeys(c.model for c in calls)
            ]

        async def all_groups(client: Any) -> None:
            for group in groups:
                await fly(client, group, parallel=parallel, cancellation=cancellation)
                if cancellation.requested or any(call.refused and call.refused.final for call in group):
                    return

        if calls:
            run(self._contact, all_groups)

    def _raise(self, calls: Sequence[tuple[str, Call]]) -> None:
        failed = [(about, call.refused) for about, call in calls if call.refused is not None]
        undone = sum(not call.done for _, call in calls)
        raise_all(failed, undone=undone, total=len(calls), contact=self._contact)


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
