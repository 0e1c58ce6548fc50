"""Talking to variants, one or several side by side, and voting blindly on what they answered."""

from __future__ import annotations

import json
import shlex
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import combinations
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

import tunesmith as ts
from tunesmith.web.answers import JsonReply, NotThereError, RequestError, misfit_of
from tunesmith.web.live import EventStream, Flow, Live, Opened, server_sent

if TYPE_CHECKING:
    from tunesmith.web.places import Places

router = APIRouter(prefix="/api/v1")

_MOST_VOTINGS = 16


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def is_text(value: str) -> str:
    """Refuse halves of characters, which JSON can hold and no tokenizer takes."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError("this is not Unicode text") from error
    return value


class Turn(_Body):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str

    _content = field_validator("content")(is_text)


class Asked(_Body):
    """What every request for an answer has: the run, the turns so far, how answers are drawn."""

    run: str
    base: str | None = None
    messages: tuple[Turn, ...] = Field(min_length=1)
    settings: dict[str, Any] = {}

    @property
    def question(self) -> str:
        """The last user turn."""
        return next((turn.content for turn in reversed(self.messages) if turn.role == "user"), "")


class ChatRequest(Asked):
    """One question for one variant."""

    variant: str = "final"
    plain: bool = False
    show_prompt: bool = False


class CompareRequest(Asked):
    """One question for several variants."""

    variants: tuple[str, ...] = Field(min_length=2, max_length=4)


class VotingRequest(_Body):
    """Which comparison is voted on, and where votes are kept."""

    job: str
    path: str | None = None


class VoteRequest(_Body):
    """What was chosen; ``pair`` says at which pair, so that nothing is voted on twice by a hasty hand."""

    job: str
    choice: Literal["left", "right", "tie", "skip", "undo"]
    pair: str | None = None


@router.post("/chat")
async def chat(request: Request, asked: ChatRequest) -> Response:
    """Stream one variant's answer: ``loading``, ``prompt``, ``text``, ``done``, or ``error``."""
    live: Live = request.app.state.live
    opened = open_for(request, asked.run, asked.base)
    variant = variant_of(request.app.state.places, asked.variant)
    settings = settings_of(asked.settings)
    reproduced = _reproduced(request, asked, variant, settings)
    flow = live.start("chat", lambda flow: _answer(live, opened, variant, asked, settings, flow, reproduced))
    return EventStream(flow, server_sent)


@router.post("/chat/compare")
async def compare(request: Request, asked: CompareRequest) -> Response:
    """Stream several variants' answers from one batch: ``loading``, ``text``, ``reply``, ``done``, or ``error``."""
    live: Live = request.app.state.live
    opened = open_for(request, asked.run, asked.base)
    variants = {name: variant_of(request.app.state.places, name) for name in asked.variants}
    if len(set(variants.values())) < len(asked.variants):
        raise ts.TunesmithError("A variant is compared with itself.", found=", ".join(asked.variants))
    settings = settings_of(asked.settings)
    flow = live.start("chat", lambda flow: _answer_all(live, opened, variants, asked, settings, flow))
    return EventStream(flow, server_sent)


@router.post("/unload")
def unload(request: Request) -> Response:
    """Let go of the loaded engine."""
    request.app.state.live.unload()
    return JsonReply({"loaded": None})


@router.post("/votes/open")
def open_votes(request: Request, asked: VotingRequest, reveal: Annotated[bool, Query()] = False) -> Response:
    """Begin to vote on a comparison, or go on: the pair to be judged, without names."""
    voting = _votings(request).open(request, asked.job, asked.path)
    return JsonReply(_shown(voting, reveal=reveal))


@router.post("/votes/cast")
def cast_vote(request: Request, asked: VoteRequest, reveal: Annotated[bool, Query()] = False) -> Response:
    """Vote on the pair that is shown, or take the last vote back; then the next pair."""
    votings = _votings(request)
    voting = votings.open(request, asked.job, None)
    with votings.lock:
        _cast(voting, asked)
    return JsonReply(_shown(voting, reveal=reveal))


def open_for(request: Request, run: str, base: str | None) -> Opened:
    """The run and base of a request, confined to the root; they are the last opened from here on.

    Raises:
        TunesmithError: one of them lies outside, or is not there.
    """
    places: Places = request.app.state.places
    opened = Opened.of(places, run, base)
    request.app.state.live.opened = opened
    return opened


def variant_of(places: Places, name: str) -> str:
    """A variant by the one name that the engine is asked for it: ``10`` is ``checkpoint-10``, ``none`` is the base.

    Raises:
        TunesmithError: it is a directory that lies outside, or is not there.
    """
    if name == "none":
        return "base"
    found = places.variant(name)
    return f"checkpoint-{int(found)}" if found.isdecimal() else found


def settings_of(given: Mapping[str, Any]) -> ts.GenerationSettings:
    """How answers are drawn; what is not given has the library's default.

    Raises:
        RequestError: a setting that there is not, or a value that it cannot have.
    """
    try:
        settings = ts.GenerationSettings.model_validate(given)
        for text in settings.stop:
            is_text(text)
    except ValidationError as error:
        raise misfit_of(error, "The generation settings do not fit.") from error
    except ValueError as error:
        raise RequestError("A stop text is no Unicode text.") from error
    return settings


def differing(settings: ts.GenerationSettings) -> dict[str, Any]:
    """The settings that differ from the library's defaults."""
    return {
        name: getattr(settings, name)
        for name, info in type(settings).model_fields.items()
        if getattr(settings, name) != info.default
    }


def _turns(asked: Asked) -> tuple[ts.Message, ...]:
    return tuple(ts.Message(role=turn.role, content=turn.content) for turn in asked.messages)


def _answer(
    live: Live,
    opened: Opened,
    variant: str,
    asked: ChatRequest,
    settings: ts.GenerationSettings,
    flow: Flow,
    reproduced: Mapping[str, Any],
) -> None:
    """Load what is lacking, ask, and say everything to the flow."""
    engine, infos = live.engine(opened, [variant], flow.progress)
    flow.cancellation.check()
    name = infos[variant].name
    prompt = asked.question if asked.plain else _turns(asked)
    rendered = ts.rendered_prompt(engine, name, prompt) if asked.show_prompt else None
    if rendered is not None:
        flow.say("prompt", {"text": rendered.text, "token_ids": rendered.token_ids})
    (reply,) = engine.generate(
        [ts.Request(name, prompt)],
        settings,
        on_text=lambda _, text: flow.say("text", {"text": text}),
        cancellation=flow.cancellation,
    )
    turn = ts.ChatTurn.of(asked.variant, asked.question, reply, rendered)
    flow.say("done", {**turn.model_dump(mode="json"), **reproduced})


def _answer_all(
    live: Live,
    opened: Opened,
    variants: Mapping[str, str],
    asked: CompareRequest,
    settings: ts.GenerationSettings,
    flow: Flow,
) -> None:
    """The same for several variants in one batch, and what their answers share."""
    engine, infos = live.engine(opened, list(variants.values()), flow.progress)
    flow.cancellation.check()
    shown, turns = list(variants), _turns(asked)

    def tell(index: int, reply: ts.Generation) -> None:
        turn = ts.ChatTurn.of(shown[index], asked.question, reply)
        flow.say("reply", {"variant": shown[index], **turn.model_dump(mode="json")})

    replies = engine.generate(
        [ts.Request(infos[variants[name]].name, turns) for name in shown],
        settings,
        on_text=lambda index, text: flow.say("text", {"variant": shown[index], "text": text}),
        on_done=tell,
        cancellation=flow.cancellation,
    )
    flow.cancellation.check()
    named = [infos[variants[name]].model_copy(update={"name": name}) for name in shown]
    comparison = _compared(engine, opened, named, turns, replies, settings)
    flow.say("done", {"diffs": _diffs(comparison), "marks": _marks(comparison)})


def _compared(
    engine: ts.Engine,
    opened: Opened,
    infos: Sequence[ts.VariantInfo],
    turns: tuple[ts.Message, ...],
    replies: Sequence[ts.Generation],
    settings: ts.GenerationSettings,
) -> ts.Comparison:
    """One question's answers as the record that a comparison is."""
    prompt = ts.Conversation(id="chat", messages=turns)
    return ts.Comparison(
        run=opened.run,
        variants=tuple(infos),
        prompts=(prompt,),
        replies=tuple(ts.Reply.of(prompt, info.name, reply) for info, reply in zip(infos, replies, strict=True)),
        settings=settings,
        engine=engine.capabilities,
    )


def _diffs(comparison: ts.Comparison) -> list[dict[str, Any]]:
    texts = {reply.variant: reply.text for reply in comparison.replies}
    return [
        {
            "left": left,
            "right": right,
            "segments": [segment.model_dump() for segment in ts.word_diff(texts[left], texts[right])],
            "similarity": ts.similarity(texts[left], texts[right]),
        }
        for left, right in combinations(texts, 2)
    ]


def _marks(comparison: ts.Comparison) -> dict[str, Any]:
    return {variant: marks.model_dump() for (_, variant), marks in ts.marks_of(comparison).items()}


def _reproduced(request: Request, asked: ChatRequest, variant: str, settings: ts.GenerationSettings) -> dict[str, Any]:
    """How the same answer is had elsewhere: by the command line, and by ``/v1``.

    The command line asks one question; ``command_is_partial`` says that the conversation had more turns than it can be
    told.
    """
    shown = request.app.state.places.shown
    words = ["tunesmith", "chat", shown(asked.run), "--checkpoint", shown(variant)]
    words += ["--base", asked.base] if asked.base else []
    system = [turn.content for turn in asked.messages[:1] if turn.role == "system" and not asked.plain]
    words += [word for text in system for word in ("--system", text)]
    for name, value in differing(settings).items():
        option = "--" + name.replace("_", "-")
        words += [option] if value is True else [w for one in _several(value) for w in (option, str(one))]
    words += ["--plain"] * asked.plain + ["--show-prompt"] * asked.show_prompt + ["--prompt", asked.question]
    partial = len(asked.messages) > len(system) + 1 or asked.messages[-1].role != "user"
    return {
        "command": shlex.join(words),
        "command_is_partial": partial,
        "curl": _curl(request, asked, shown(variant), settings),
    }


def _several(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple) else (value,)


def _curl(request: Request, asked: ChatRequest, model: str, settings: ts.GenerationSettings) -> str:
    body: dict[str, Any] = {"model": model}
    if asked.plain:
        body["prompt"] = asked.question
    else:
        body["messages"] = [turn.model_dump() for turn in asked.messages]
    body |= {"max_tokens": settings.max_new_tokens, "temperature": settings.temperature if settings.samples else 0}
    if settings.samples:
        body |= {"top_p": settings.top_p, "seed": settings.seed}
    extra = {name: value for name, value in differing(settings).items() if name in EXTENSIONS}
    body |= {"stop": list(settings.stop)} if settings.stop else {}
    address = f"{request.base_url}v1/{'completions' if asked.plain else 'chat/completions'}"
    words = ["curl", address, "-H", "Content-Type: application/json"]
    key = ' -H "Authorization: Bearer $TUNESMITH_TOKEN"' if request.app.state.settings.token is not None else ""
    return shlex.join(words) + key + " -d " + shlex.quote(json.dumps(body | extra, ensure_ascii=False))


EXTENSIONS = ("top_k", "min_p", "repetition_penalty")  # of /v1, beyond OpenAI's own settings


class _Votings:
    """The votings that are under way, the last few of them; votes themselves are in their files."""

    def __init__(self) -> None:
        self.lock = Lock()
        self._open: OrderedDict[str, ts.Voting] = OrderedDict()

    def open(self, request: Request, job: str, path: str | None) -> ts.Voting:
        """The voting on a job's comparison, begun or gone on with."""
        with self.lock:
            if path is not None or job not in self._open:
                self._open[job] = self._begin(request, job, path)
            self._open.move_to_end(job)
            while len(self._open) > _MOST_VOTINGS:
                self._open.popitem(last=False)
            return self._open[job]

    def _begin(self, request: Request, job: str, path: str | None) -> ts.Voting:
        comparison = request.app.state.jobs.record_of(job)
        if not isinstance(comparison, ts.Comparison):
            raise NotThereError("This job has no comparison to vote on.", where=job)
        name = path if path is not None else f"votes-{comparison.run}.jsonl"
        return ts.Voting(comparison, request.app.state.places.resolve(name, must_exist=False))


def _votings(request: Request) -> _Votings:
    state = request.app.state
    if not hasattr(state, "votings"):
        state.votings = _Votings()
    found: _Votings = state.votings
    return found


def _cast(voting: ts.Voting, asked: VoteRequest) -> None:
    current = voting.current
    if asked.choice == "undo":
        voting.undo()
        return
    if asked.pair is not None and (current is None or current.texts != asked.pair):
        raise ts.TunesmithError("This pair was voted on already.", next_step="vote on the pair that is shown now")
    voting.choose(asked.choice)


def _shown(voting: ts.Voting, *, reveal: bool) -> dict[str, Any]:
    """The pair to be judged, how far it is, and, once all is voted on or it is asked for, what the votes say."""
    pair = voting.current
    shown = None
    if pair is not None:
        prompt, *replies = voting.shown(pair)
        left, right = ({"text": one.text, "stop_reason": one.stop_reason, "tokens": one.tokens} for one in replies)
        turns = [turn.model_dump() for turn in prompt.prompt]
        shown = {"id": pair.texts, "prompt_id": prompt.id, "prompt": turns, "left": left, "right": right}
    told = pair is None or reveal
    return {
        "pair": shown,
        "progress": {"done": voting.done, "total": len(voting.ballot.pairs)},
        "path": str(voting.file.path),
        "tally": _told(voting.result()) if told else None,
    }


def _told(result: ts.BlindVote) -> dict[str, Any]:
    tallies = [tally.model_dump(mode="json") | {"finding": tally.finding.model_dump()} for tally in result.tallies]
    return result.model_dump(mode="json") | {"tallies": tallies}
