"""OpenAI's protocol over the variants of the opened run: another program changes one word to have base or tuned model.

What a parameter means is done, or the request is refused; none is ignored.  Three are ours, as other servers have them:
``top_k``, ``min_p`` and ``repetition_penalty``; and ``return_token_ids``, which adds ``token_ids`` and
``prompt_token_ids`` to every choice.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from starlette.exceptions import HTTPException

import tunesmith as ts
from tunesmith.web.answers import JsonReply, to_json, unexpected
from tunesmith.web.chat import EXTENSIONS, is_text, settings_of, variant_of
from tunesmith.web.live import Busy, EventStream, Flow, InternalError, Live, Opened, watching
from tunesmith.web.runs import merged_models

_MOST_ROWS = 64
_KNOWN_S = 5.0
_MOST_TOP = 20
_COMPLETION_TOKENS = 16  # OpenAI's own default, which its clients reckon with
# What OpenAI has and we have not, with the values that ask for nothing; so does null, everywhere.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "web_search_options": (),
}
_NAMES_SOMEBODY = frozenset({"user", "safety_identifier", "prompt_cache_key"})  # they change no answer

Token = Annotated[int, Field(ge=0, le=2**31 - 1, strict=True)]
_SOME = Field(min_length=1)
Tokens = Annotated[tuple[Token, ...], _SOME]


class RefusedError(ts.TunesmithError):
    """A request that is refused in OpenAI's words.

    Args:
        message: one sentence.
        status: of the reply.
        code: OpenAI's name of the reason.
        param: the parameter that it is about.
    """

    def __init__(self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


class _Route(APIRoute):
    """Says everything that goes wrong as OpenAI says it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except RequestValidationError as error:
                return _refusal(_misfit(error))
            except ts.TunesmithError as error:
                return _refusal(error)
            except HTTPException as error:
                return _refusal(RefusedError(str(error.detail), status=error.status_code))
            except Exception as error:  # noqa: BLE001 - whatever it was, the client reads OpenAI's shape only
                told = unexpected(error)
                return _refusal(InternalError(str(told["what"]), where=told["where"]))

        return handle


router = APIRouter(prefix="/v1", route_class=_Route)


class _Lenient(BaseModel):
    """A body without what asks for nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if name in cls.model_fields or not _is_neutral(name, value)}


class TextPart(_Lenient):
    """A piece of a turn; there are no others here than text."""

    type: Literal["text"]
    text: str

    _text = field_validator("text")(is_text)


class ChatMessage(_Lenient):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | tuple[TextPart, ...]

    _content = field_validator("content")(lambda value: is_text(value) if isinstance(value, str) else value)

    def message(self) -> ts.Message:
        """The turn as the library has it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return ts.Message(role="system" if self.role == "developer" else self.role, content=text)


class StreamOptions(_Lenient):
    """What a stream holds besides."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Generating(_Lenient):
    model: str
    n: int | None = Field(default=None, ge=1, le=_MOST_ROWS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | Annotated[tuple[str, ...], Field(max_length=4)] | None = None
    seed: int | None = Field(default=None, ge=0, le=2**63 - 1)
    temperature: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    return_token_ids: bool | None = None

    def settings(self, limit: int | None) -> ts.GenerationSettings:
        """How answers are drawn: the library's defaults where nothing is said, but for the seed, which is any then."""
        given: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p, "max_new_tokens": limit}
        given |= {name: getattr(self, name) for name in EXTENSIONS}
        if self.top_k == -1:  # other servers' word for all
            given["top_k"] = 0
        given["seed"] = secrets.randbelow(2**31) if self.seed is None else self.seed
        given["stop"] = (self.stop,) if isinstance(self.stop, str) else self.stop
        return settings_of({name: value for name, value in given.items() if value is not None})


class ChatBody(_Generating):
    """The body of a chat completion."""

    messages: Annotated[tuple[ChatMessage, ...], _SOME]
    max_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=_MOST_TOP)

    @model_validator(mode="after")
    def _top_of_something(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs = true")
        return self


class CompletionBody(_Generating):
    """The body of a plain completion."""

    prompt: str | Tokens | Annotated[tuple[str, ...], _SOME] | Annotated[tuple[Tokens, ...], _SOME]
    max_tokens: int | None = Field(default=None, ge=0, le=2**31 - 1)
    logprobs: int | None = Field(default=None, ge=0, le=_MOST_TOP)
    echo: bool | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens = 0 needs echo = true: there is nothing to return else")
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of other than n is not supported")
        if len(self.prompts) * (self.n or 1) > _MOST_ROWS:
            raise ValueError(f"more than {_MOST_ROWS} answers in one request")
        for text in self.prompts:
            if isinstance(text, str):
                is_text(text)
        return self

    @property
    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        """All prompts, each text or token ids."""
        prompt: Any = self.prompt
        return (prompt,) if isinstance(prompt, str) or isinstance(prompt[0], int) else tuple(prompt)


@dataclass(frozen=True)
class _Asked:
    """A request, whichever of the two it came by."""

    chat: bool
    model: str
    variant: str
    prompts: Sequence[tuple[ts.Message, ...] | str | tuple[int, ...]]
    settings: ts.GenerationSettings
    generates: bool
    n: int
    echo: bool
    logprobs: int | None  # how many of the likeliest; None for no log-probabilities at all
    token_ids: bool
    stream: bool
    usage_at_end: bool
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))


@router.get("/models")
def list_models(request: Request) -> Response:
    """The variants of the opened run."""
    return JsonReply({"object": "list", "data": [_model(name) for name in _variants(request)]})


@router.get("/models/{model:path}")
def get_model(request: Request, model: str) -> Response:
    """One of them."""
    _variant(request, model)
    return JsonReply(_model(model))


@router.post("/chat/completions")
async def chat_completions(request: Request, body: ChatBody) -> Response:
    """Answer a conversation."""
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    turns = tuple(message.message() for message in body.messages)
    top = (body.top_logprobs or 0) if body.logprobs else None
    return await _complete(request, body, [turns], limit=limit, chat=True, logprobs=top)


@router.post("/completions")
async def completions(request: Request, body: CompletionBody) -> Response:
    """Go on from text or token ids."""
    limit = _COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    return await _complete(
        request, body, body.prompts, limit=limit, chat=False, logprobs=body.logprobs, echo=bool(body.echo)
    )


async def _complete(
    request: Request,
    body: _Generating,
    prompts: Sequence[tuple[ts.Message, ...] | str | tuple[int, ...]],
    *,
    limit: int | None,
    chat: bool,
    logprobs: int | None,
    echo: bool = False,
) -> Response:
    opened, variant = await run_in_threadpool(_variant, request, body.model)
    asked = _Asked(
        chat=chat,
        model=body.model,
        variant=variant,
        prompts=prompts,
        settings=body.settings(limit or None),
        generates=limit != 0,
        n=body.n or 1,
        echo=echo,
        logprobs=logprobs,
        token_ids=bool(body.return_token_ids),
        stream=bool(body.stream),
        usage_at_end=bool(body.stream_options and body.stream_options.include_usage),
    )
    live: Live = request.app.state.live
    flow = live.start("v1", lambda flow: _Completion(live, opened, asked, flow).run())
    return await _reply(request, flow, asked)


async def _reply(request: Request, flow: Flow, asked: _Asked) -> Response:
    """The whole answer, or a stream once it has begun, so that what is refused has a status of its own."""
    try:
        async with watching(request.receive, flow):
            first = await flow.next()
        if first is None:
            raise RefusedError("The request was given up.", status=499)
        if first[0] == "error":
            raise first[1]
    except BaseException:
        flow.close()
        raise
    if asked.stream:
        return EventStream(flow, _streamed, before=first, last=b"data: [DONE]\n\n")
    return JsonReply(first[1])


class _Completion:
    """One request's work, in the generating thread.

    Args:
        live: who has the engine.
        opened: the run.
        asked: the request.
        flow: what is told: the whole answer, or chunks.
    """

    def __init__(self, live: Live, opened: Opened, asked: _Asked, flow: Flow) -> None:
        self._live, self._opened, self._asked, self._flow = live, opened, asked, flow
        self._begun: set[int] = set()

    def run(self) -> None:
        """Load what is lacking, answer, and tell it."""
        asked = self._asked
        self._engine, infos = self._live.engine(self._opened, [asked.variant], self._loading)
        self._flow.cancellation.check()
        self._name = infos[asked.variant].name
        prompts = [self._ids(prompt) for prompt in asked.prompts]
        self._rows = [ids for ids in prompts for _ in range(asked.n)]
        at_once = asked.stream and asked.logprobs is None
        replies: Sequence[ts.Generation | None] = [None] * len(self._rows)
        if asked.generates:
            replies = ts.continue_tokens(
                self._engine,
                [(self._name, ids) for ids in self._rows],
                asked.settings,
                on_text=self._say if at_once else None,
                cancellation=self._flow.cancellation,
            )
            self._flow.cancellation.check()
        choices = [self._choice(index, reply) for index, reply in enumerate(replies)]
        usage = _usage(prompts, replies)
        if asked.stream:
            self._stream(choices, usage, told=at_once)
        else:
            self._flow.say("whole", {**self._head(chunk=False), "choices": choices, "usage": usage})

    def _loading(self, step: ts.Progress) -> None:
        if step.stage != "load":
            self._flow.cancellation.check()

    def _ids(self, prompt: tuple[ts.Message, ...] | str | tuple[int, ...]) -> tuple[int, ...]:
        if isinstance(prompt, tuple) and isinstance(prompt[0], int):
            return prompt
        return ts.rendered_prompt(self._engine, self._name, prompt).token_ids

    def _choice(self, index: int, reply: ts.Generation | None) -> dict[str, Any]:
        """A choice of the answer as it is whole."""
        asked, ids = self._asked, self._rows[index]
        text = (self._echoed(index) if asked.echo else "") + (reply.text if reply else "")
        choice: dict[str, Any] = {"index": index, "finish_reason": _finish(reply), "logprobs": None}
        choice |= {"message": {"role": "assistant", "content": text, "refusal": None}} if asked.chat else {"text": text}
        if asked.logprobs is not None:
            tokens = (*ids, *(reply.token_ids if reply else ()))
            start = 0 if asked.echo else len(ids)
            told = ts.token_chances(self._engine, self._name, tokens, start=start, top=asked.logprobs)
            choice["logprobs"] = _chat_logprobs(told) if asked.chat else _plain_logprobs(told, asked.logprobs)
        if asked.token_ids:
            choice |= {"token_ids": reply.token_ids if reply else (), "prompt_token_ids": ids}
        return choice

    def _echoed(self, index: int) -> str:
        prompt = self._asked.prompts[index // self._asked.n]
        if isinstance(prompt, str):
            return prompt
        return b"".join(ts.token_texts(self._engine, self._name, self._rows[index])).decode(errors="replace")

    def _say(self, index: int, text: str) -> None:
        """Send a piece of an answer at once."""
        if index not in self._begun:
            self._begin(index)
        self._chunk({"index": index, **self._piece(text), "finish_reason": None, "logprobs": None})

    def _begin(self, index: int) -> None:
        self._begun.add(index)
        if self._asked.chat:
            delta = {"role": "assistant", "content": "", "refusal": None}
            self._chunk({"index": index, "delta": delta, "finish_reason": None, "logprobs": None})
        elif self._asked.echo:
            text = self._echoed(index)
            self._chunk({"index": index, "text": text, "finish_reason": None, "logprobs": None})

    def _stream(self, choices: Sequence[dict[str, Any]], usage: dict[str, int], *, told: bool) -> None:
        """Send what was not sent before: all that log-probabilities had to wait for, how answers ended, the usage."""
        for choice in choices:
            index = choice["index"]
            if told and index not in self._begun:
                self._begin(index)
            if not told:
                whole = choice["message"]["content"] if self._asked.chat else choice["text"]
                extra = {"role": "assistant"} if self._asked.chat else {}
                piece = self._piece(whole, **extra)
                self._chunk({"index": index, **piece, "finish_reason": None, "logprobs": choice["logprobs"]})
            last: dict[str, Any] = {"index": index, "finish_reason": choice["finish_reason"], "logprobs": None}
            last |= dict[str, Any](delta={}) if self._asked.chat else {"text": ""}
            self._chunk(last | {name: choice[name] for name in ("token_ids", "prompt_token_ids") if name in choice})
        if self._asked.usage_at_end:
            self._flow.say("chunk", {**self._head(chunk=True), "choices": [], "usage": usage})

    def _piece(self, text: str, **more: str) -> dict[str, Any]:
        return {"delta": {**more, "content": text}} if self._asked.chat else {"text": text}

    def _chunk(self, choice: dict[str, Any]) -> None:
        usage = {"usage": None} if self._asked.usage_at_end else {}
        self._flow.say("chunk", {**self._head(chunk=True), "choices": [choice], **usage})

    def _head(self, *, chunk: bool) -> dict[str, Any]:
        asked = self._asked
        prefix, kind = ("chatcmpl", "chat.completion") if asked.chat else ("cmpl", "text_completion")
        kind += ".chunk" if chunk and asked.chat else ""
        return {"id": f"{prefix}-{asked.id}", "object": kind, "created": asked.created, "model": asked.model}


def _usage(prompts: Sequence[Sequence[int]], replies: Sequence[ts.Generation | None]) -> dict[str, int]:
    prompt, answer = sum(map(len, prompts)), sum(reply.tokens for reply in replies if reply)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _finish(reply: ts.Generation | None) -> str:
    return "length" if reply is None or reply.stop_reason == "length" else "stop"


def _chat_logprobs(told: Sequence[ts.TokenChance]) -> dict[str, Any]:
    def one(chance: ts.TokenChance) -> dict[str, Any]:
        text = chance.text.decode(errors="replace")
        return {"token": text, "logprob": chance.log_prob, "bytes": list(chance.text)}

    content = [one(chance) | {"top_logprobs": [one(best) for best in chance.likeliest]} for chance in told]
    return {"content": content, "refusal": None}


def _plain_logprobs(told: Sequence[ts.TokenChance], top: int) -> dict[str, Any]:
    texts = [_token_name(chance.text) for chance in told]
    ends = accumulate((len(chance.text.decode(errors="replace")) for chance in told), initial=0)

    def likeliest(chance: ts.TokenChance) -> dict[str, float | None] | None:
        if chance.log_prob is None or not top:
            return None
        # The token itself is always among them, as OpenAI has it.
        return {_token_name(one.text): one.log_prob for one in (*chance.likeliest, chance)}

    return {
        "tokens": texts,
        "token_logprobs": [chance.log_prob for chance in told],
        "top_logprobs": [likeliest(chance) for chance in told] if top else None,
        "text_offset": list(ends)[:-1],
    }


def _token_name(text: bytes) -> str:
    """A token's text; of a part of a character its bytes, as OpenAI writes them."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)


def _streamed(event: str, data: Any) -> bytes:
    document = _error(data)[1] if event == "error" else data
    return b"data: " + to_json(document) + b"\n\n"


def _variants(request: Request, *, fresh: bool = True) -> dict[str, str]:
    """The opened run's variants: their names here, and what the engine is asked for.

    Args:
        request: the request.
        fresh: look again, though the same was asked a moment ago.
    """
    opened, state = _opened(request), request.app.state
    if opened is None:
        return {}
    known = getattr(state, "v1_variants", None)
    if not fresh and known is not None and known[0] == opened and time.monotonic() - known[1] < _KNOWN_S:
        return dict(known[2])
    run = ts.open_run(opened.run)
    own = [checkpoint.name for checkpoint in reversed(run.checkpoints)]
    merged = [model["path"] for model in merged_models(state.places, run)]
    found = {name: variant_of(state.places, name) for name in ("base", *own, *merged)}
    state.v1_variants = opened, time.monotonic(), found
    return found


def _variant(request: Request, model: str) -> tuple[Opened, str]:
    """The opened run, and which of its variants a model's name is.

    Raises:
        RefusedError: there is none of that name; those that there are, are named.
    """
    opened, variants = _opened(request), _variants(request, fresh=False)
    if model not in variants:
        variants = _variants(request)
    if opened is None or model not in variants:
        there = f"it is one of: {', '.join(variants)}" if variants else "no run is opened"
        raise RefusedError(
            f"The model {model[:100]!r} does not exist; {there}.", status=404, code="model_not_found", param="model"
        )
    return opened, variants[model]


def _opened(request: Request) -> Opened | None:
    """The run that was last asked about, else the one that the server was started with."""
    state = request.app.state
    opened: Opened | None = state.live.opened
    if opened is None and state.settings.run is not None:
        return Opened.of(state.places, state.settings.run, state.settings.base)
    return opened


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "tunesmith"}


def _is_neutral(name: str, value: object) -> bool:
    if value is None or name in _NAMES_SOMEBODY:
        return True
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in _NEUTRAL.get(name, ()))


def _misfit(error: RequestValidationError) -> RefusedError:
    """The first thing that does not fit."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    param = ".".join(place) or None
    if first["type"] == "extra_forbidden":
        name = place[-1]
        return RefusedError(f"The parameter {param!r} is not supported here.", code="unsupported_parameter", param=name)
    if first["type"] == "json_invalid":
        return RefusedError("The body is not JSON.", code="invalid_json")
    return RefusedError(f"{param or 'body'}: {first['msg']}", code="invalid_value", param=param)


def _refusal(error: ts.TunesmithError) -> Response:
    status, document = _error(error)
    return Response(json.dumps(document), status_code=status, media_type="application/json")


def _error(error: ts.TunesmithError) -> tuple[int, dict[str, Any]]:
    """The status and the document of an error, in OpenAI's shape."""
    status, code, param = 400, None, None
    if isinstance(error, RefusedError):
        status, code, param = error.status, error.code, error.param
    elif isinstance(error, Busy):
        status, code = 503, "model_busy"
    elif isinstance(error, InternalError):
        status, code = 500, "internal_error"
    elif type(error).__name__ == "PromptError":
        code = "context_length_exceeded"
    kind = "invalid_request_error" if status < 500 else "server_error"
    return status, {"error": {"message": str(error), "type": kind, "param": param, "code": code}}
