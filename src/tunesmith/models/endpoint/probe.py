"""What a server can do and does, found out by asking it for a few short answers.

Servers that know no setting of a name often take and ignore it.  So what is taken is asked first, and of what is taken
the effect is looked for: drawing from one token only must give the same text whatever the seed.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.conversations import Conversation, Encoded, Message, Text
from tunesmith.errors import DataError
from tunesmith.models.endpoint.answers import EXTRAS, PENALTIES, Answer, Habits, Scoring, StopHabit, field
from tunesmith.models.endpoint.flight import Call
from tunesmith.models.endpoint.likelihoods import Likelihood, encoded
from tunesmith.models.endpoint.refusals import Contact, Refusal, nobody_there, refusal
from tunesmith.models.engine import GenerationSettings, Prompt
from tunesmith.record import Finding

_QUESTION = "yes, yes, yes, yes, yes, yes, yes, yes,"
_NO_MODEL = "tunesmith-asks-for-a-model-that-is-not-there"
_TOKENS = 8
_HOT = 1.8  # some servers take no temperature above 2
_STRONGEST_PENALTY = 2.0
_SCORED = "The cat sat on the mat, and the dog lay beside it."


@dataclass(frozen=True)
class Said:
    """What a model says to the probe's question, by which it is told from other models.

    Attributes:
        text: its greedy answer; None where there is none.
        prompt_tokens: how many tokens the question has; None where the server does not tell.
        log_probs: the likelihood of the probe's row, in nats a token; None where that cannot be had.
    """

    text: str | None
    prompt_tokens: int | None
    log_probs: tuple[float, ...] | None


@dataclass(frozen=True)
class Probed:
    """What was found out.

    Attributes:
        habits: what requests must be like.
        findings: what a person must know.
        said: what each model says, by its id; empty for a server that is alone.
    """

    habits: Habits
    findings: tuple[Finding, ...]
    said: Mapping[str, Said]


@dataclass(frozen=True)
class ProbeRow:
    """A short row whose likelihood is asked for.

    Attributes:
        encoded: its token ids, and which of them count.
        text: the same as text.
        pieces: the text of every token, to hold a server's tokens against them.
    """

    encoded: Encoded
    text: str
    pieces: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> ProbeRow:
        """The row in a tokenizer's tokens.

        A conversation where there can be one: llama-cpp-python leaves its first special token out.
        """
        turns = (Message(role="user", content=_SCORED), Message(role="assistant", content=_SCORED))
        talk = getattr(tokenizer, "chat_template", None) is not None
        row = encoded(tokenizer, Conversation(id="probe", messages=turns) if talk else Text(id="probe", text=_SCORED))
        ids = row.input_ids
        pieces = tuple(tokenizer.decode([token], skip_special_tokens=False) for token in ids)
        return cls(row, tokenizer.decode(ids, skip_special_tokens=False), pieces)


class Probe:
    """Asks one server about one of its models.

    Args:
        client: an asynchronous ``openai`` client.
        contact: the server.
        models: the ids of all models that will be asked; the first is probed.
        parallel: how many requests the server is sent at once.
        row: what is scored; None where likelihoods are not wanted.
        fleet: whether there are other servers, with which what the models say is to be compared.
    """

    def __init__(
        self,
        client: Any,
        contact: Contact,
        *,
        models: Sequence[str],
        parallel: int,
        row: ProbeRow | None,
        fleet: bool = False,
    ) -> None:
        self._client, self._contact, self._models, self._row, self._fleet = client, contact, models, row, fleet
        self._gate, self._alone = asyncio.Semaphore(parallel), parallel == 1
        self._findings: list[Finding] = []
        self._habits = Habits(usage=False)
        self._prompt: Prompt = (Message(role="user", content=_QUESTION),)

    async def probe(self) -> Probed:
        """Find everything out.

        Raises:
            TunesmithError: the server cannot be reached, has no such model, or does not speak the protocol.
        """
        await self._list()
        await self._interfaces()
        await self._extras()
        await self._stop_habit()
        await self._effects()
        await self._scoring()
        await self._mixing()
        said = {model: await self._said(model) for model in dict.fromkeys(self._models)} if self._fleet else {}
        return Probed(self._habits, tuple(self._findings), said)

    async def _said(self, model: str) -> Said:
        """What a model says, asked alone."""
        answer = self._answer(model=model)
        await self._all([answer])
        told = await self._likelihoods([model], self._habits.scoring) if self._habits.scoring else []
        return Said(
            text=answer.text if answer.refused is None else None,
            prompt_tokens=answer.usage[1] if answer.refused is None and answer.usage else None,
            log_probs=told[0].score("").log_probs if told and told[0].done else None,
        )

    def _say(self, finding: Finding) -> None:
        self._findings.append(finding)

    async def _list(self) -> None:
        """Whether the server lists the models; one that answers to any name would else be compared with itself."""
        listed = _Listing(self._contact, self._models[0])
        await self._all([listed])
        if listed.refused is not None:
            if not listed.absent:
                raise listed.refused.error
            if not await self._tells_apart(self._models):
                self._say(Finding(code="endpoint_models_unlisted", severity="warning"))
            return
        await self._children(listed)
        lacking = [name for name in self._models if name not in listed.ids and name not in listed.children.values()]
        # Transformers' server lists the hub's cache, not the directory that it was started with.
        if lacking and not await self._tells_apart(lacking):
            raise DataError(
                "The server does not list a model.",
                where=self._contact.where,
                expected=", ".join(lacking),
                found=self._contact.shown(", ".join(listed.ids)) or "no model",
            )

    async def _children(self, listed: _Listing) -> None:
        """Refuse an adapter's bare name where a server that answers to any name wants ``base:adapter``, as SGLang does.

        By the bare name it answers as the base, and the base would be compared with itself.
        """
        bare = [name for name in self._models if name in listed.children]
        if bare and len(set(self._models)) > 1 and not await self._tells_apart(bare):
            raise DataError(
                "The server answers to any name, so an adapter must be named with its base.",
                where=self._contact.where,
                expected=", ".join(listed.children[name] for name in bare),
                found=self._contact.shown(", ".join(bare)),
                next_step=f"pass --model {bare[0]}={listed.children[bare[0]]}",
            )

    async def _tells_apart(self, names: Sequence[str]) -> bool:
        """Whether the server answers to these names, and not to any other."""
        asked = {
            name: [self._answer(model=name), self._answer(model=name, prompt=_QUESTION)] for name in {*names, _NO_MODEL}
        }
        await self._all([call for calls in asked.values() for call in calls])
        answers = {name for name, calls in asked.items() if any(call.refused is None for call in calls)}
        return answers == set(names)

    async def _interfaces(self) -> None:
        """Which of the two ways to ask there are, and whether token counts can be had."""
        chat, plain = self._answer(), self._answer(prompt=_QUESTION)
        await self._all([chat, plain])
        if chat.refused is not None and plain.refused is not None:
            raise chat.refused.error
        self._habits = replace(self._habits, chat=chat.refused is None, plain=plain.refused is None)
        if chat.refused is not None:
            self._prompt = _QUESTION
            self._say(Finding(code="endpoint_no_chat", severity="warning", params=self._found(chat.refused)))
        else:
            self._say(Finding(code="endpoint_template", severity="info"))
        if plain.refused is not None:
            self._say(Finding(code="endpoint_no_completions", severity="info", params=self._found(plain.refused)))
        counted = self._answer(habits=replace(self._habits, usage=True))
        await self._all([counted])
        if counted.refused is None and counted.usage is not None:
            self._habits = replace(self._habits, usage=True)
        elif (plain if chat.refused else chat).usage is None:
            self._say(Finding(code="endpoint_tokens_counted", severity="warning"))

    async def _extras(self) -> None:
        """Which settings beyond OpenAI's are refused."""
        neutral = {"top_k": 1_000_000, "min_p": 0.0, **dict.fromkeys(PENALTIES, 1.0)}
        asked = {name: self._answer(extra={name: neutral[name]}) for name in EXTRAS}
        await self._all(asked.values())
        taken = frozenset(name for name, answer in asked.items() if answer.refused is None)
        self._habits = replace(self._habits, extras=taken)
        lost = [name for name in ("top_k", "min_p") if name not in taken]
        lost += [] if taken.intersection(PENALTIES) else ["repetition_penalty"]
        for name in lost:
            self._say(Finding(code="endpoint_setting_refused", severity="warning", params={"setting": name}))

    async def _effects(self) -> None:
        """Whether sampling, seeds and settings do anything."""
        wild = GenerationSettings(temperature=_HOT, top_p=1.0, seed=1, max_new_tokens=_TOKENS)
        other = {"seed": 2}
        tried = {
            "first": wild,
            "again": wild,
            "other": wild.model_copy(update=other),
            "top_k": wild.model_copy(update={"top_k": 1}),
            "top_k other": wild.model_copy(update={"top_k": 1} | other),
            "min_p": wild.model_copy(update={"min_p": 1.0}),
            "min_p other": wild.model_copy(update={"min_p": 1.0} | other),
            "greedy": GenerationSettings(greedy=True, max_new_tokens=_TOKENS),
            "penalized": GenerationSettings(greedy=True, max_new_tokens=_TOKENS, repetition_penalty=_STRONGEST_PENALTY),
        }
        wanted = {"top_k": {"top_k"}, "min_p": {"min_p"}, "penalized": set(PENALTIES)}
        asked = {
            name: self._answer(settings=settings)
            for name, settings in tried.items()
            if not (need := wanted.get(name.split()[0])) or need & self._habits.extras
        }
        await self._all(asked.values())
        said = {name: answer.text for name, answer in asked.items() if answer.refused is None}
        self._judge(said)

    def _judge(self, said: dict[str, str]) -> None:
        random = len({said.get("first"), said.get("again"), said.get("other")}) > 1
        if not random:
            self._say(Finding(code="endpoint_sampling_ignored", severity="warning"))
        elif said.get("first") != said.get("again") or said.get("first") == said.get("other"):
            self._say(Finding(code="endpoint_seed_ignored", severity="warning"))
        for name in ("top_k", "min_p"):
            if name in said and not random:
                self._say(Finding(code="endpoint_setting_untold", severity="info", params={"setting": name}))
            elif name in said and said[name] != said.get(f"{name} other"):
                self._say(Finding(code="endpoint_setting_ignored", severity="warning", params={"setting": name}))
        if "penalized" in said and said["penalized"] == said.get("greedy"):
            params = {"setting": "repetition_penalty"}
            self._say(Finding(code="endpoint_setting_ignored", severity="warning", params=params))

    async def _stop_habit(self) -> None:
        """How it can be known that a stop text ended an answer."""
        whole = self._answer()
        await self._all([whole])
        text = whole.text
        stop = text[len(text) // 2 : len(text) // 2 + 1]
        if not stop:
            return
        settings = GenerationSettings(greedy=True, max_new_tokens=_TOKENS)
        ended = self._answer(settings=settings, extra={"stop": [stop]})
        await self._all([ended])
        habit: StopHabit = "hidden"
        if ended.refused is None and ended.told_stop:
            habit = "told"
        elif ended.refused is None and text.startswith(ended.text) and stop in ended.text and ended.text != text:
            habit = "included"
        self._habits = replace(self._habits, stops=habit)
        if habit == "hidden":
            self._say(Finding(code="endpoint_stop_hidden", severity="info"))

    async def _scoring(self) -> None:
        """Whether the likelihood of given tokens can be had."""
        if self._row is None:
            self._say(Finding(code="endpoint_no_tokenizer", severity="info"))
            return
        forms: tuple[Scoring, ...] = ("echo", "prompt_logprobs", "echo text")
        for form in forms if self._habits.plain else ():
            # One after another: a server that lacks a form may do more at once than it can bear.
            if (await self._likelihoods([self._models[0]], form, pieces=self._row.pieces))[0].done:
                self._habits = replace(self._habits, scoring=form)
                self._say(Finding(code="endpoint_no_kl", severity="info"))
                return
        self._say(Finding(code="endpoint_no_scores", severity="warning"))

    async def _likelihoods(
        self, models: Sequence[str], form: Scoring, *, pieces: Sequence[str] | None = None
    ) -> list[Likelihood]:
        """The likelihood of one row, from every model at once."""
        row = self._row
        if row is None:
            return []
        calls = [
            Likelihood(self._contact, model, row=row.encoded, text=row.text, scoring=form, pieces=pieces)
            for model in models
        ]
        await self._all(calls)
        return calls

    async def _mixing(self) -> None:
        """Whether models that are asked at once answer as each does alone.

        On CPUs vLLM gives the base, beside adapters, the last adapter's update (vllm-project/vllm, pull requests 48421
        and 49656): every figure of the base is then another model's, and nothing says so.
        """
        models = list(dict.fromkeys(self._models))
        if len(models) < 2 or self._alone:
            return
        alone = {model: (await self._told([model]))[0] for model in models}
        # Servers begin the first of several at once, alone; so that each is among others, each comes twice.
        order = [*models[1:], *models, models[0]]
        beside = zip(order, await self._told(order), strict=True)
        if any(_is_another(said, alone[model], [alone[o] for o in models if o != model]) for model, said in beside):
            self._habits = replace(self._habits, apart=True)
            self._say(Finding(code="endpoint_mixes_models", severity="warning"))

    async def _told(self, models: Sequence[str]) -> list[tuple[float, ...] | str | None]:
        """What models say to the same question, asked at once: likelihoods, or greedy text where there are none."""
        if self._habits.scoring is not None:
            calls = await self._likelihoods(models, self._habits.scoring)
            return [call.score("").log_probs if call.done else None for call in calls]
        answers = [self._answer(model=model) for model in models]
        await self._all(answers)
        return [answer.text if answer.refused is None else None for answer in answers]

    def _answer(
        self,
        *,
        model: str | None = None,
        prompt: Prompt | None = None,
        settings: GenerationSettings | None = None,
        habits: Habits | None = None,
        extra: dict[str, Any] | None = None,
    ) -> Answer:
        settings = settings or GenerationSettings(greedy=True, max_new_tokens=_TOKENS)
        prompt = self._prompt if prompt is None else prompt
        return Answer(
            self._contact,
            model or self._models[0],
            prompt=prompt,
            settings=settings,
            habits=habits or self._habits,
            extra=extra,
        )

    async def _all(self, calls: Iterable[Call]) -> None:
        """Ask; what is refused with the key, or because nobody answers, ends the probe.

        llama-cpp-python breaks an answer off when the next request comes.  So what failed beside others is asked again
        alone, and a server that answers then is asked for one thing at a time from there on.
        """

        async def one(call: Call) -> None:
            async with self._gate:
                await call.run(self._client)

        calls = list(calls)
        await asyncio.gather(*(one(call) for call in calls))
        broken = [call for call in calls if call.refused is not None and not isinstance(call.refused.error, DataError)]
        if broken and not self._alone and not any(call.refused and call.refused.final for call in broken):
            for call in broken:
                await call.run(self._client)
                if call.refused is None and not self._alone:
                    self._gate, self._alone = asyncio.Semaphore(1), True
                    self._habits = replace(self._habits, alone=True)
                    self._say(Finding(code="endpoint_one_at_a_time", severity="warning"))
        for call in calls:
            if call.refused is not None and call.refused.final and not isinstance(call.refused.error, DataError):
                raise call.refused.error

    def _found(self, refused: Refusal) -> dict[str, str]:
        return {"found": refused.error.found or refused.error.what}


def _is_another(
    beside: tuple[float, ...] | str | None,
    alone: tuple[float, ...] | str | None,
    others: Sequence[tuple[float, ...] | str | None],
) -> bool:
    """Whether what a model says beside others is what another one says alone, and not what it says itself."""
    if beside is None or alone is None:
        return False
    return any(other is not None and _distance(beside, other) < _distance(beside, alone) for other in others)


def _distance(one: tuple[float, ...] | str, other: tuple[float, ...] | str) -> float:
    if isinstance(one, str) or isinstance(other, str):
        return float(one != other)
    return math.fsum(abs(a - b) for a, b in zip(one, other, strict=True))


class _Listing(Call):
    """The models that a server lists.

    Attributes:
        ids: their ids.
        children: of models that are listed below another one, as adapters are: how they are named with it.
        absent: whether the server has no list at all.
    """

    def __init__(self, contact: Contact, model: str) -> None:
        super().__init__(contact, model)
        self.ids: tuple[str, ...] = ()
        self.children: dict[str, str] = {}
        self.absent = False

    async def ask(self, client: Any) -> None:
        """Ask for the list; nobody at the address is said at once, without asking again."""
        import openai

        failed: openai.APIStatusError | None = None
        try:
            try:
                page = await client.with_options(max_retries=0).models.list()
            except (openai.RateLimitError, openai.InternalServerError) as error:
                failed = error
                page = await client.models.list()
                failed = None
            except openai.APIConnectionError as error:
                if nobody_there(error):
                    raise
                page = await client.models.list()
        except openai.APIStatusError as error:
            failed = error
        except openai.APIConnectionError:
            if failed is None:
                raise
            # It answered before: a server that fails hangs up now and then, just when it is asked again.
        if failed is not None:
            # Transformers' server fails here where there is no hub's cache, and answers all the same.
            self.absent = failed.status_code in (404, 405, 500, 501)
            self.refuse(refusal(failed, self.contact, model=self.model))
            return
        models = field(page, "data")
        if not isinstance(models, list):
            raise ValueError("no list of models")
        self.ids = tuple(name for model in models if isinstance(name := field(model, "id"), str))
        for model in models:
            name, parent = field(model, "id"), field(model, "parent")
            if isinstance(name, str) and isinstance(parent, str) and parent in self.ids:
                self.children[name] = f"{parent}:{name}"
