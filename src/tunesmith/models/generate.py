"""Answers of one variant to many prompts: one generator that chat, comparison and the server all use."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tunesmith.conversations import Conversation, Message, encode, encode_prompt
from tunesmith.errors import DataError, PromptError
from tunesmith.models.detokenize import Detokenizer, decode
from tunesmith.models.quiet import quiet_logging
from tunesmith.models.variants import VariantSet, check_token_ids, context_window
from tunesmith.progress import Cancellation, Progress, ProgressCallback, no_progress
from tunesmith.record import Part

if TYPE_CHECKING:
    import torch

StopReason = Literal["eos", "length", "cancelled"]
OnText = Callable[[int, str], None]


class GenerationSettings(Part):
    """How answers are drawn.  Nothing is inherited from the model's own ``generation_config`` but its eos tokens.

    Attributes:
        max_new_tokens: the most tokens of an answer; fewer where the context window leaves less room.
        greedy: always take the most likely token; temperature, top_p and top_k are ignored then.
        temperature: divides the logits; 0 is greedy too.
        top_p: draw from the fewest tokens that hold this probability.
        top_k: draw from this many most likely tokens; 0 draws from all.
        repetition_penalty: divides the logits of tokens that occurred; 1 does nothing.
        seed: of the random numbers; the same seed and batches give the same text.
    """

    max_new_tokens: int = Field(default=1024, ge=1)
    greedy: bool = False
    temperature: float = Field(default=0.7, ge=0)
    top_p: float = Field(default=0.9, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    repetition_penalty: float = Field(default=1.0, gt=0)
    seed: int = Field(default=0, ge=0)

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random."""
        return not self.greedy and self.temperature > 0


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: without special tokens.
        token_ids: what was generated, the end-of-turn token included.
        stop_reason: ``eos`` (it ended by itself), ``length`` (cut by the limit or the window) or ``cancelled``.
        seconds: from the start of its batch to its last token.
        time_to_first_token_s: from the start of its batch to its first token; None where there is none.
        tokens_per_s: tokens a second after the first one; None below two tokens.
    """

    text: str
    token_ids: tuple[int, ...]
    stop_reason: StopReason
    seconds: float
    time_to_first_token_s: float | None
    tokens_per_s: float | None


def generate(
    variants: VariantSet,
    name: str,
    prompts: Sequence[Sequence[Message]],
    settings: GenerationSettings | None = None,
    *,
    on_text: OnText | None = None,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
    batch_size: int = 8,
) -> list[Generation]:
    """Let one variant answer every prompt.

    Args:
        variants: the loaded variants.
        name: which of them answers.
        prompts: conversations that end where the answer is to begin.
        settings: how answers are drawn; None takes the defaults.
        on_text: called with the prompt's index and the text that has become whole since the last call; the pieces of
            one prompt joined are its answer's text.
        progress: called after every token with the stage ``generate``, in prompts answered.
        cancellation: read after every token; what was generated until then is returned, as ``cancelled``.
        batch_size: prompts that run at once.  Greedy answers depend on it by rounding only.

    Returns:
        One generation a prompt, in their order.

    Raises:
        DataError: no such variant, or its tokenizer has no chat template.
        PromptError: prompts that leave no room in the context window; all are named.
    """
    with variants.active(name) as (_, tokenizer), quiet_logging():
        rows = [encode_prompt(tokenizer, prompt) for prompt in prompts]
        return continue_rows(
            variants,
            name,
            rows,
            settings,
            on_text=on_text,
            progress=progress,
            cancellation=cancellation,
            batch_size=batch_size,
        )


def continue_rows(
    variants: VariantSet,
    name: str,
    rows: Sequence[Sequence[int]],
    settings: GenerationSettings | None = None,
    *,
    on_text: OnText | None = None,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
    batch_size: int = 8,
) -> list[Generation]:
    """Let one variant go on from token ids, whatever they are: :func:`generate` after its prompts are encoded.

    Args:
        variants: the loaded variants.
        name: which of them goes on.
        rows: token ids, at least one a row.
        settings: as for :func:`generate`, like all that follow.
        on_text: as there.
        progress: as there.
        cancellation: as there.
        batch_size: as there.

    Returns:
        One generation a row, in their order, of the new tokens only.

    Raises:
        DataError: there is no such variant.
        PromptError: rows that leave no room in the context window; all are named.
    """
    settings = settings or GenerationSettings()
    cancellation = cancellation or Cancellation()
    done: dict[int, Generation] = {}

    def on_token(tokens: int) -> None:
        progress(Progress("generate", len(done), len(rows), "prompts", f"{name}: {tokens} tokens"))

    with variants.active(name) as (model, tokenizer), quiet_logging():
        check_token_ids(model, rows)
        eos_ids = _eos_ids(model, tokenizer)
        limits = _limits(rows, context_window(model), settings.max_new_tokens)
        for batch in _batches(limits, batch_size):
            if cancellation.requested:
                break
            limit = limits[batch[0]]
            stream = _Stream(tokenizer, eos_ids, batch, limit, on_text=on_text, on_token=on_token)
            _run(model, tokenizer, [rows[i] for i in batch], settings, stream, cancellation)
            done.update(stream.generations(cancelled=cancellation.requested))
            progress(Progress("generate", len(done), len(rows), "prompts", name))
    unstarted = Generation("", (), "cancelled", 0.0, None, None)
    return [done.get(index, unstarted) for index in range(len(rows))]


def _limits(rows: Sequence[Sequence[int]], window: int | None, max_new_tokens: int) -> list[int]:
    if window is None:
        return [max_new_tokens] * len(rows)
    too_long = [f"prompt {i}: {len(row)} tokens" for i, row in enumerate(rows) if len(row) >= window]
    if too_long:
        raise PromptError(
            "A prompt leaves no room for an answer in the model's context window.",
            expected=f"fewer than {window} tokens",
            details=too_long,
            next_step="shorten the prompt, or start a new conversation",
        )
    return [min(max_new_tokens, window - len(row)) for row in rows]


def _batches(limits: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indexes in batches of one limit each, so that no row runs past its window while another still may."""
    by_limit: dict[int, list[int]] = {}
    for index, limit in enumerate(limits):
        by_limit.setdefault(limit, []).append(index)
    return [
        indexes[start : start + batch_size]
        for indexes in by_limit.values()
        for start in range(0, len(indexes), batch_size)
    ]


def _eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the model's, the tokenizer's, and what the chat template ends an answer with.

    The template's is what the answer's loss was trained to end with, also where the base model's own end is another.
    """
    from jinja2 import TemplateError

    found: set[int] = set()
    for ids in (model.generation_config.eos_token_id, model.config.get_text_config().eos_token_id):
        found.update(ids if isinstance(ids, list) else [ids] if ids is not None else [])
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    turns = (Message(role="user", content="a"), Message(role="assistant", content="b"))
    try:
        encoded = encode(tokenizer, Conversation(id="end of turn", messages=turns))
    except (DataError, TemplateError):  # a template that answers cannot be told apart in still generates
        return sorted(found)
    last = [token for token, answer in zip(encoded.input_ids, encoded.supervised, strict=True) if answer][-1]
    if last in {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}:
        found.add(last)
    return sorted(found)


def _run(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Sequence[int]],
    settings: GenerationSettings,
    stream: _Stream,
    cancellation: Cancellation,
) -> None:
    import torch
    from transformers import StoppingCriteriaList

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stream.eos_ids[0] if stream.eos_ids else 0
    width = max(len(row) for row in rows)
    input_ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    config = _config(settings, stream.limit, pad, stream.eos_ids)
    inherited, model.generation_config = model.generation_config, config
    try:
        with _seeded(settings.seed + stream.indexes[0], model.device) if settings.samples else nullcontext():
            stream.start()
            model.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
                streamer=stream,
                stopping_criteria=StoppingCriteriaList([_cancelled_by(cancellation)]),
            )
    finally:
        model.generation_config = inherited


def _config(settings: GenerationSettings, limit: int, pad: int, eos_ids: list[int]) -> Any:
    from transformers import GenerationConfig

    # An option that is None is filled in from elsewhere (top_k becomes 50), so each is given.
    drawing = (
        {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
        if settings.samples
        else {"do_sample": False}
    )
    return GenerationConfig(
        max_new_tokens=limit,
        repetition_penalty=settings.repetition_penalty,
        pad_token_id=pad,
        eos_token_id=eos_ids or None,
        use_cache=True,
        **drawing,
    )


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from ``seed`` inside, and the process's own untouched outside."""
    import torch

    with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _cancelled_by(cancellation: Cancellation) -> Callable[..., torch.Tensor]:
    import torch

    def stop(input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:  # noqa: ARG001 - Transformers' signature
        return torch.full((input_ids.shape[0],), cancellation.requested, dtype=torch.bool, device=input_ids.device)

    return stop


class _Stream:
    """What Transformers pushes tokens to: collects each row up to its own eos, and hands its text on.

    Args:
        tokenizer: the variant's.
        eos_ids: tokens that end a row.
        indexes: the prompts' indexes, one a row.
        limit: the most tokens of a row.
        on_text: called with a prompt's index and new text.
        on_token: called after every step with the number of tokens of all rows.
    """

    def __init__(
        self,
        tokenizer: Any,
        eos_ids: list[int],
        indexes: Sequence[int],
        limit: int,
        *,
        on_text: OnText | None,
        on_token: Callable[[int], None],
    ) -> None:
        self.eos_ids = eos_ids
        self.indexes = indexes
        self.limit = limit
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._on_token = on_token
        self._tokens: list[list[int]] = [[] for _ in indexes]
        self._times: list[list[float]] = [[] for _ in indexes]
        self._text = [Detokenizer(tokenizer) for _ in indexes]
        self._prompt_seen = False
        self._started = 0.0

    def start(self) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """Take the prompts (rows, tokens), which come first, or one new token of every row (rows,)."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        now = time.perf_counter() - self._started
        for row, token in enumerate(value.tolist()):
            if self._ended(row):
                continue
            self._tokens[row].append(token)
            self._times[row].append(now)
            piece = self._text[row].add(token)
            if self._ended(row) or len(self._tokens[row]) == self.limit:
                piece += self._text[row].finish()
            self._say(row, piece)
        self._on_token(sum(len(tokens) for tokens in self._tokens))

    def end(self) -> None:
        """Hand on what was held back, where a row stopped before its end."""
        for row, text in enumerate(self._text):
            self._say(row, text.finish())

    def generations(self, *, cancelled: bool) -> dict[int, Generation]:
        """The finished answers by prompt index."""
        return {index: self._generation(row, cancelled) for row, index in enumerate(self.indexes)}

    def _generation(self, row: int, cancelled: bool) -> Generation:
        tokens, times = self._tokens[row], self._times[row]
        reason: StopReason = "length"
        if self._ended(row):
            reason = "eos"
        elif cancelled and len(tokens) < self.limit:
            reason = "cancelled"
        span = times[-1] - times[0] if times else 0.0
        return Generation(
            text=decode(self._tokenizer, tokens),
            token_ids=tuple(tokens),
            stop_reason=reason,
            seconds=times[-1] if times else 0.0,
            time_to_first_token_s=times[0] if times else None,
            tokens_per_s=(len(times) - 1) / span if span > 0 else None,
        )

    def _ended(self, row: int) -> bool:
        return bool(self._tokens[row]) and self._tokens[row][-1] in self.eos_ids

    def _say(self, row: int, piece: str) -> None:
        if piece and self._on_text is not None:
            self._on_text(self.indexes[row], piece)
