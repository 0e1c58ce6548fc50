"""One answer as it streams in: what is sent for it, how pieces are read, and where it ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.errors import DataError
from tunesmith.models.detokenize import StopTexts
from tunesmith.models.endpoint.flight import Call, hand_out
from tunesmith.models.endpoint.refusals import Contact, broken_off, refusal
from tunesmith.models.engine import Generation, GenerationSettings, Prompt, StopReason

# More than any vocabulary: servers do not agree whether 0 or -1 draws from all tokens, and some refuse one of them.
_ALL_TOKENS = 1_000_000
# No token is longer, so more text than this a token is no answer to what was asked.
_CHARACTERS_A_TOKEN = 512

StopHabit = Literal["told", "included", "hidden"]
Scoring = Literal["echo", "prompt_logprobs", "echo text"]
PENALTIES = ("repetition_penalty", "repeat_penalty")  # the second is llama.cpp's name
EXTRAS = ("top_k", "min_p", *PENALTIES)


@dataclass(frozen=True)
class Habits:
    """How a server was seen to behave.

    Attributes:
        chat: it answers conversations.
        plain: it goes on from plain text.
        usage: it takes the wish to be told token counts at a stream's end.
        extras: which settings beyond OpenAI's it does not refuse.
        stops: a stop text that ended an answer is told of, is included in the text, or is hidden from us; then we look
            for it ourselves and close the connection, for only so an answer's own end can be told from it.
        alone: it breaks an answer off when the next request comes, so it is asked for one thing at a time.
        apart: asked for several models at once it gives one the answers of another, so it is asked for one model at a
            time.
        scoring: in which form it tells the likelihood of a prompt's tokens; None: in none.
    """

    chat: bool = True
    plain: bool = True
    usage: bool = True
    extras: frozenset[str] = frozenset()
    stops: StopHabit = "hidden"
    alone: bool = False
    apart: bool = False
    scoring: Scoring | None = None


def sampling(settings: GenerationSettings, habits: Habits) -> dict[str, Any]:
    """The settings as a server is sent them, neutral ones included: servers have defaults of their own.

    Raises:
        DataError: a setting that the server was seen to refuse.
    """
    wanted: dict[str, Any] = dict.fromkeys(PENALTIES, settings.repetition_penalty)
    body: dict[str, Any] = {"temperature": settings.temperature if settings.samples else 0.0}
    if settings.samples:
        body |= {"top_p": settings.top_p, "seed": settings.seed}
        wanted |= {"top_k": settings.top_k or _ALL_TOKENS, "min_p": settings.min_p}
    refused = [name for name in ("top_k", "min_p") if name not in habits.extras and name in wanted]
    lost: list[str] = [name for name in refused if getattr(settings, name)]
    if settings.repetition_penalty != 1 and not habits.extras.intersection(PENALTIES):
        lost.append("repetition_penalty")
    if lost:
        raise DataError(
            f"The server does not take the setting {', '.join(lost)}.",
            next_step="leave that setting at its default, or ask a server that has it",
        )
    return body | {name: value for name, value in wanted.items() if name in habits.extras}


class Answer(Call):
    """One prompt and its answer.

    Args:
        contact: the server.
        model: the model's id there.
        prompt: a conversation or plain text.
        settings: how the answer is drawn.
        habits: what the server was seen to do.
        on_text: given every whole piece of text.
        stopping: whether somebody asked to stop, read after every piece.
        on_end: given the answer once it is whole.
        extra: sent besides.

    Attributes:
        told_stop: whether the server says what ended an answer.
        usage: how many tokens answer and prompt have, where the server told.
    """

    def __init__(
        self,
        contact: Contact,
        model: str,
        *,
        prompt: Prompt,
        settings: GenerationSettings,
        habits: Habits,
        on_text: Callable[[str], None] | None = None,
        stopping: Callable[[], bool] = lambda: False,
        on_end: Callable[[Answer], None] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(contact, model)
        self._prompt, self._settings, self._habits = prompt, settings, habits
        self._on_text, self._stopping, self._on_end = on_text, stopping, on_end
        self._body = sampling(settings, habits) | (extra or {})
        if habits.usage:
            self._body["stream_options"] = {"include_usage": True}
        if settings.stop and habits.stops != "hidden":
            self._body["stop"] = list(settings.stop)
        self.sent = tuple(self._body)
        self._clear()

    def _clear(self) -> None:
        self._text: list[str] = []
        self._length = self._pieces = 0
        self._thinking = False
        self._stops = StopTexts(self._settings.stop)
        self._began = time.monotonic()
        self._first: float | None = None
        self._last: float | None = None
        self._reason: StopReason = "cancelled"
        self.told_stop = False
        self.usage: tuple[int, int | None] | None = None

    @property
    def text(self) -> str:
        """What has come of the answer."""
        return "".join(self._text)

    async def ask(self, client: Any) -> None:
        """Ask, and ask once more for a shorter answer where the window leaves room for that only."""
        import openai

        self._clear()
        try:
            try:
                stream = await self._open(client, self._settings.max_new_tokens)
            except openai.APIStatusError as error:
                room = refusal(error, self.contact, model=self.model).room
                if room is None or room >= self._settings.max_new_tokens:
                    raise
                stream = await self._open(client, room)
            async with stream:
                await self._read(stream)
        finally:
            self._say(self._stops.finish())
        if self.done and self._on_end is not None:
            hand_out(self._on_end, self)

    async def _open(self, client: Any, max_tokens: int) -> Any:
        body = {**self._body, "max_tokens": max_tokens}
        if isinstance(self._prompt, str):
            return await client.completions.create(model=self.model, prompt=self._prompt, stream=True, extra_body=body)
        turns = [turn.model_dump() for turn in self._prompt]
        return await client.chat.completions.create(model=self.model, messages=turns, stream=True, extra_body=body)

    async def _read(self, stream: Any) -> None:
        most = _CHARACTERS_A_TOKEN * (self._settings.max_new_tokens + 1)
        async for chunk in stream:
            self.touched = time.monotonic()
            self._count(field(chunk, "usage"))
            choices = field(chunk, "choices")
            for choice in choices[:1] if isinstance(choices, list) else []:
                self._take(choice)
            if self._length > most:
                raise ValueError(f"more text than {self._settings.max_new_tokens} tokens can hold")
            if self._stops.hit:
                self._reason = "stop"
                if not self.done and self._habits.stops != "included":
                    self.done = True
                    return
            if self._stopping() and not self.done:
                return
        if not self.done:
            self.refuse(broken_off(self.contact, f"{self._length} characters, and no reason for their end"))

    def _take(self, choice: Any) -> None:
        delta = field(choice, "delta")
        thought = next((t for key in ("reasoning_content", "reasoning") if (t := _text(field(delta, key)))), "")
        said = _text(field(choice, "text")) or _text(field(delta, "content")) or _text(field(delta, "refusal"))
        if thought or said:
            self._pieces += 1
            self._last = self.touched
            self._first = self._first or self.touched
            self._length += len(thought) + len(said)
            # Some servers take the thinking out of the text, where the model wrote it, and send it beside.
            opening = "<think>\n" if thought and not self._thinking else ""
            closing = "\n</think>\n\n" if said and self._thinking else ""
            self._thinking = bool(thought) and not said
            self._say(self._stops.add(opening + thought + closing + said))
        self._end(choice)

    def _end(self, choice: Any) -> None:
        reason = field(choice, "finish_reason")
        if reason is None:
            return
        marks = [mark for mark in ("stop_reason", "matched_stop") if _has(choice, mark)]
        self.told_stop = bool(marks)
        if reason == "length":
            self._reason = "length"
        elif reason == "stop":
            self._reason = "stop" if any(field(choice, mark) in self._settings.stop for mark in marks) else "eos"
        else:
            raise ValueError(f"an answer that ended because of {reason!r}")
        self.done = True

    def _say(self, piece: str) -> None:
        if piece:
            self._text.append(piece)
            if self._on_text is not None:
                hand_out(self._on_text, piece)

    def _count(self, usage: Any) -> None:
        tokens, prompt = field(usage, "completion_tokens"), field(usage, "prompt_tokens")
        if isinstance(tokens, int) and tokens >= 0:
            self.usage = tokens, prompt if isinstance(prompt, int) and prompt >= 0 else None

    def generation(self) -> Generation:
        """The record of it, whole or as far as it came."""
        tokens, prompt_tokens = self.usage or (self._pieces, None)
        end = self._last or self.touched or self._began
        rate = None
        if self._first is not None and tokens > 1 and end > self._first:
            rate = (tokens - 1) / (end - self._first)
        return Generation(
            text=self.text,
            token_ids=(),
            tokens=tokens,
            prompt_tokens=prompt_tokens,
            stop_reason=self._reason if self.done else "cancelled",
            seconds=max(0.0, end - self._began),
            time_to_first_token_s=None if self._first is None else self._first - self._began,
            tokens_per_s=rate,
        )


def field(thing: Any, name: str) -> Any:
    """A field of a piece, which holds whatever a server put there; None where it has none."""
    return thing.get(name) if isinstance(thing, dict) else getattr(thing, name, None)


def _has(thing: Any, name: str) -> bool:
    return name in thing if isinstance(thing, dict) else hasattr(thing, name)


def _text(value: object) -> str:
    """Text of a server, fit to be written as UTF-8: JSON can hold halves of characters."""
    if not isinstance(value, str):
        return ""
    return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
