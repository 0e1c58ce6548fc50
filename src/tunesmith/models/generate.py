"""Answers of many variants to many prompts, row beside row: one loop that chat, comparison and verification all use.

Rows of every variant that can run beside others share one batch (:mod:`tunesmith.models.rows`).  A row that has ended
leaves it, so that nobody waits for the longest answer longer than needed.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.conversations import Conversation, Message, encode, encode_prompt
from tunesmith.errors import DataError, PromptError
from tunesmith.models.compute import free_bytes
from tunesmith.models.detokenize import Detokenizer, StopTexts, decode
from tunesmith.models.engine import (
    Generation,
    GenerationSettings,
    OnGeneration,
    OnText,
    Prompt,
    Request,
    StopReason,
)
from tunesmith.models.memory import holds_all_state, keep_rows, key_value_cache, row_bytes
from tunesmith.models.quiet import quiet_logging
from tunesmith.models.rows import NotRowwiseError, Routing
from tunesmith.models.sampling import Sampler, occurrences
from tunesmith.models.variants import VariantSet, check_token_ids
from tunesmith.progress import Cancellation, Progress, ProgressCallback, no_progress

if TYPE_CHECKING:
    import torch

ROWS_AT_ONCE = 32
# Of the memory that is free, what keys and values of one batch may take should every row reach its limit.
_MEMORY_SHARE = 0.5
_WORTH_READING_ONCE = 8  # tokens


def generate(
    variants: VariantSet,
    requests: Sequence[Request],
    settings: GenerationSettings | None = None,
    *,
    on_text: OnText | None = None,
    on_done: OnGeneration | None = None,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
    rows_at_once: int = ROWS_AT_ONCE,
) -> list[Generation]:
    """Answer every request: :meth:`tunesmith.models.engine.Engine.generate` of the local engine.

    Args:
        variants: the loaded variants.
        requests: prompts, each with its variant.
        settings: how answers are drawn; None takes the defaults.
        on_text: called with the request's index and new text.
        on_done: called with the request's index and its answer, once it is whole.
        progress: called after every token with the stage ``generate``, in prompts answered.
        cancellation: read after every token.
        rows_at_once: rows of a batch, fewer where memory is short.  Greedy answers depend on it by rounding only.

    Returns:
        One generation a request, in their order.

    Raises:
        DataError: no such variant, or its tokenizer has no chat template.
        PromptError: prompts that leave no room in the context window; all are named.
        CheckpointError: a full model cannot be loaded.
    """
    with quiet_logging():
        rows = [prompt_ids(variants.tokenizer(request.variant), request.prompt) for request in requests]
    return continue_rows(
        variants,
        [request.variant for request in requests],
        rows,
        settings,
        on_text=on_text,
        on_done=on_done,
        progress=progress,
        cancellation=cancellation,
        rows_at_once=rows_at_once,
    )


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The token ids that a model is given: a conversation through the chat template, plain text as it is.

    Raises:
        DataError: the tokenizer has no chat template, or a plain text is empty.
    """
    if not isinstance(prompt, str):
        return encode_prompt(tokenizer, prompt)
    ids = list(tokenizer(prompt)["input_ids"])
    if not ids:
        raise DataError("An empty text cannot be gone on from.", next_step="give a word to begin with")
    return ids


def continue_rows(
    variants: VariantSet,
    names: Sequence[str],
    rows: Sequence[Sequence[int]],
    settings: GenerationSettings | None = None,
    *,
    on_text: OnText | None = None,
    on_done: OnGeneration | None = None,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
    rows_at_once: int = ROWS_AT_ONCE,
) -> list[Generation]:
    """Go on from token ids, whatever they are: :func:`generate` after its prompts are encoded.

    Args:
        variants: the loaded variants.
        names: which variant goes on with each row.
        rows: token ids, at least one a row.
        settings: as for :func:`generate`, like all that follow.
        on_text: as there.
        on_done: as there.
        progress: as there.
        cancellation: as there.
        rows_at_once: as there.

    Returns:
        One generation a row, in their order, of the new tokens only.

    Raises:
        DataError: there is no such variant.
        PromptError: rows that leave no room in the context window; all are named.
    """
    settings, cancellation = settings or GenerationSettings(), cancellation or Cancellation()
    job = _Job(names, rows, _limits(variants, names, rows, settings.max_new_tokens), settings, cancellation)
    job.on_text, job.on_done, job.progress = on_text, on_done, progress
    job.twins = occurrences([(name, tuple(row)) for name, row in zip(names, rows, strict=True)])
    waiting = list(range(len(rows)))
    with quiet_logging():
        while waiting and not cancellation.requested:
            company = variants.companies([names[index] for index in waiting])[0]
            members = [index for index in waiting if names[index] in company]
            try:
                _run_company(variants, job, members, rows_at_once)
            except NotRowwiseError as error:
                variants.run_in_turn(str(error))
            waiting = [index for index in waiting if index not in job.done]
    unstarted = Generation("", (), 0, None, "cancelled", 0.0, None, None)
    return [job.done.get(index, unstarted) for index in range(len(rows))]


@dataclass
class _Job:
    """What is to be generated, and what is done of it."""

    names: Sequence[str]
    rows: Sequence[Sequence[int]]
    limits: Sequence[int]
    settings: GenerationSettings
    cancellation: Cancellation
    on_text: OnText | None = None
    on_done: OnGeneration | None = None
    progress: ProgressCallback = no_progress
    twins: Sequence[int] = ()

    def __post_init__(self) -> None:
        self.done: dict[int, Generation] = {}
        self._told = [0] * len(self.rows)

    def sayer(self, index: int) -> Callable[[str], None] | None:
        """What tells of an answer's new text, but for what was told before its batch had to begin again."""
        on_text, told, heard = self.on_text, self._told, 0
        if on_text is None:
            return None

        def say(piece: str) -> None:
            nonlocal heard
            new = piece[max(0, told[index] - heard) :]
            heard += len(piece)
            if new:
                told[index] = heard
                on_text(index, new)

        return say

    def finish(self, index: int, generation: Generation) -> None:
        """Take one answer."""
        self.done[index] = generation
        if self.on_done is not None and generation.stop_reason != "cancelled":
            self.on_done(index, generation)

    def tell(self, detail: str) -> None:
        """Say how far it is."""
        self.progress(Progress("generate", len(self.done), len(self.rows), "prompts", detail))


def _run_company(variants: VariantSet, job: _Job, members: Sequence[int], rows_at_once: int) -> None:
    """All rows of variants that run beside each other, batch by batch."""
    order = {name: place for place, name in enumerate(variants.names)}
    with variants.running([job.names[index] for index in members]) as (model, tokenizer, _):
        check_token_ids(model, [job.rows[index] for index in members])
        eos_ids = _eos_ids(model, tokenizer)
        batches = list(_batches(model, job, members, rows_at_once))
    for batch in batches:
        if job.cancellation.requested:
            return
        batch = sorted(batch, key=lambda index: (order[job.names[index]], index))
        names = [job.names[index] for index in batch]
        started = time.perf_counter()
        beginning = _read_beginning(variants, names, [job.rows[index] for index in batch])
        with variants.running(names) as (model, tokenizer, routing):
            _Batch(model, tokenizer, eos_ids, routing, job, batch).run(beginning, started)
        job.tell(job.names[batch[-1]])


@dataclass
class _Beginning:
    """The tokens that all rows of a batch begin with, such as a system prompt, read once for every variant.

    Attributes:
        tokens: how many they are.
        cache: keys and values of them, for every row; None where nothing was read.
    """

    tokens: int = 0
    cache: Any = None


def _read_beginning(variants: VariantSet, names: Sequence[str], rows: Sequence[Sequence[int]]) -> _Beginning:
    """Read what all rows begin with, if several rows of one variant do, and the model can go on from there."""
    import torch

    distinct = list(dict.fromkeys(names))
    first = rows[0]
    shared = min(len(row) for row in rows) - 1  # a row's last token is read with the row, for its logits
    for row in rows:
        shared = next((place for place in range(shared) if row[place] != first[place]), shared)
    if len(distinct) == len(names) or shared < _WORTH_READING_ONCE:
        return _Beginning()
    with variants.running(distinct) as (model, _, _):
        if not _can_share(model):
            return _Beginning()
        cache = key_value_cache(model)
        ids = torch.tensor([list(first[:shared])] * len(distinct), device=model.device)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        keep_rows(cache, torch.tensor([distinct.index(name) for name in names], device=model.device))
    return _Beginning(shared, cache)


def _can_share(model: Any) -> bool:
    """Whether rows may go on from a beginning with padding after it: a sliding window would count the padding."""
    wanted = {"past_key_values", "position_ids", "logits_to_keep"}
    sliding = getattr(model.config.get_text_config(), "sliding_window", None)
    return _can_pad(model) and wanted <= _arguments(model) and holds_all_state(model) and not sliding


def _limits(
    variants: VariantSet, names: Sequence[str], rows: Sequence[Sequence[int]], max_new_tokens: int
) -> list[int]:
    """The most new tokens of every row; all rows without room are refused at once."""
    windows = {name: variants.context_window(name) for name in dict.fromkeys(names)}
    too_long, limits = [], []
    for index, (name, row) in enumerate(zip(names, rows, strict=True)):
        window = windows[name]
        if window is not None and len(row) >= window:
            too_long.append(f"prompt {index}: {len(row)} tokens, where {name} takes fewer than {window}")
        limits.append(max_new_tokens if window is None else min(max_new_tokens, window - len(row)))
    if too_long:
        raise PromptError(
            "A prompt leaves no room for an answer in the model's context window.",
            expected=f"fewer than {min(window for window in windows.values() if window)} tokens",
            details=too_long[:10] + ([f"… and {len(too_long) - 10} more"] if len(too_long) > 10 else []),
            next_step="shorten the prompt, or start a new conversation",
        )
    return limits


def _batches(model: Any, job: _Job, members: Sequence[int], rows_at_once: int) -> Iterator[list[int]]:
    """Rows of like length together; where padding would be seen by the model, of one length only."""
    alike_only = not _can_pad(model)
    budget = _memory_budget(model)
    batch: list[int] = []
    for index in sorted(members, key=lambda index: (len(job.rows[index]), index)):
        longest = max((len(job.rows[one]) + job.limits[one] for one in (*batch, index)), default=0)
        full = len(batch) >= rows_at_once or (len(batch) + 1) * row_bytes(model, longest) > budget
        if batch and (full or (alike_only and len(job.rows[batch[0]]) != len(job.rows[index]))):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _can_pad(model: Any) -> bool:
    """Whether a row may have padding before it: attention leaves it out, a recurrent state would not."""
    return not getattr(model, "_is_stateful", False) and "position_ids" in _arguments(model)


def _memory_budget(model: Any) -> float:
    return _MEMORY_SHARE * free_bytes(str(model.device))


def _arguments(model: Any) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
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
        return frozenset(found)
    last = [token for token, answer in zip(encoded.input_ids, encoded.supervised, strict=True) if answer][-1]
    if last in {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}:
        found.add(last)
    return frozenset(found)


class _Batch:
    """Rows that run beside each other, until the last of them has ended.

    Args:
        model: the model of all of them.
        tokenizer: theirs.
        eos_ids: tokens that end a row.
        routing: whose adapter each row has; None where the model is one variant as it is.
        job: what they are part of.
        indexes: their indexes in it.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        eos_ids: frozenset[int],
        routing: Routing | None,
        job: _Job,
        indexes: Sequence[int],
    ) -> None:
        self._model, self._routing, self._job = model, routing, job
        self._indexes = list(indexes)
        self._arguments = _arguments(model)
        self._cached = "past_key_values" in self._arguments and holds_all_state(model)
        rows = [job.rows[index] for index in indexes]
        self._sampler = Sampler(job.settings, rows, [job.twins[index] for index in indexes])
        self._answers = [
            _Answer(tokenizer, eos_ids, job.limits[index], job.settings.stop, len(job.rows[index]), job.sayer(index))
            for index in indexes
        ]
        self._tokens = 0

    def run(self, beginning: _Beginning, started: float) -> None:
        """Draw token after token for every row, and give each answer to the job as it ends.

        Args:
            beginning: what was read of the rows already.
            started: when that began, by ``time.perf_counter``.
        """
        rows = [self._job.rows[index][beginning.tokens :] for index in self._indexes]
        self._lay_out(rows, beginning.tokens, max(self._job.limits[index] for index in self._indexes))
        cache = beginning.cache
        if cache is None and self._cached:
            cache = key_value_cache(self._model)
        while self._indexes:
            tokens = self._sampler.draw(self._forward(cache))
            now = time.perf_counter() - started
            going = []
            for row, token in enumerate(tokens):
                if self._answers[row].take(token, now):
                    self._job.finish(self._indexes[row], self._answers[row].generation())
                else:
                    going.append(row)
            self._tokens += len(tokens)
            self._job.tell(f"{len(self._indexes)} rows, {self._tokens} tokens")
            if self._job.cancellation.requested:
                break
            self._go_on(tokens, going, cache)
        for row, index in enumerate(self._indexes):
            if index not in self._job.done:
                self._job.finish(index, self._answers[row].cancel())

    def _lay_out(self, rows: Sequence[Sequence[int]], before: int, limit: int) -> None:
        """Put what is left of the prompts beside each other, padded on the left; the mask has room for all answers."""
        import torch

        longest, device = max(map(len, rows)), self._model.device
        self._width = before + longest
        self._input_ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device)
        self._mask = torch.ones(len(rows), self._width + limit, dtype=torch.long, device=device)
        for place, row in enumerate(rows):
            self._mask[place, before : self._width - len(row)] = 0
        self._padded = any(len(row) < longest for row in rows)
        self._positions = (self._mask[:, : self._width].cumsum(-1) - 1).clamp(min=0)[:, before:]

    def _forward(self, cache: Any) -> torch.Tensor:
        """The logits of every row's next token, float32 (rows, vocabulary)."""
        inputs: dict[str, Any] = {"input_ids": self._input_ids, "use_cache": self._cached}
        if self._cached:
            inputs["past_key_values"] = cache
        if self._padded:
            inputs["attention_mask"] = self._mask[:, : self._width]
        if "position_ids" in self._arguments:
            inputs["position_ids"] = self._positions
        if "logits_to_keep" in self._arguments:
            inputs["logits_to_keep"] = 1
        logits: torch.Tensor = self._model(**inputs).logits[:, -1].float()
        return logits

    def _go_on(self, tokens: Sequence[int], going: Sequence[int], cache: Any) -> None:
        """Give every row that goes on its new token, and let go of the others."""
        import torch

        device = self._model.device
        if len(going) < len(self._indexes):
            kept = torch.tensor(going, dtype=torch.long, device=device)
            self._indexes = [self._indexes[row] for row in going]
            self._answers = [self._answers[row] for row in going]
            self._sampler.keep(going)
            self._mask, self._positions, self._input_ids = (
                one[kept] for one in (self._mask, self._positions, self._input_ids)
            )
            self._padded = bool((self._mask[:, : self._width] == 0).any())
            if self._routing is not None:
                self._routing.keep(going)
            if going and cache is not None:
                keep_rows(cache, kept)
        new = torch.tensor([[tokens[row]] for row in going], dtype=torch.long, device=device)
        self._width += 1
        if self._cached:
            self._input_ids, self._positions = new, self._positions[:, -1:] + 1
        elif going:
            self._input_ids = torch.cat([self._input_ids, new], dim=1)
            self._positions = torch.cat([self._positions, self._positions[:, -1:] + 1], dim=1)


class _Answer:
    """One row's answer as it grows: its tokens, when they came, and its text up to a stop text.

    Args:
        tokenizer: the variant's.
        eos_ids: tokens that end it.
        limit: the most tokens.
        stop: texts that end it and are not part of it.
        prompt_tokens: of its prompt.
        say: called with new text; None for nobody.
    """

    def __init__(
        self,
        tokenizer: Any,
        eos_ids: frozenset[int],
        limit: int,
        stop: Sequence[str],
        prompt_tokens: int,
        say: Callable[[str], None] | None,
    ) -> None:
        self._tokenizer, self._eos_ids, self._limit = tokenizer, eos_ids, limit
        self._stop = StopTexts(stop)
        self._prompt_tokens = prompt_tokens
        self._say = say
        self._tokens: list[int] = []
        self._times: list[float] = []
        self._pieces = Detokenizer(tokenizer) if say is not None or stop else None
        self._text = ""  # what has been handed out, where there are pieces
        self._reason: StopReason = "cancelled"

    def take(self, token: int, now: float) -> bool:
        """Take one token at a time; return whether the answer has ended with it.

        Args:
            token: its id.
            now: seconds since the batch began.
        """
        self._tokens.append(token)
        self._times.append(now)
        ended = token in self._eos_ids
        if ended or len(self._tokens) >= self._limit:
            self._reason = "eos" if ended else "length"
        if self._pieces is not None:
            self._hand_out(self._pieces.add(token), last=self._reason != "cancelled")
        return self._reason != "cancelled"

    def cancel(self) -> Generation:
        """End it where it is, and return it."""
        self._hand_out("", last=True)
        return self.generation()

    def generation(self) -> Generation:
        """The answer so far."""
        span = self._times[-1] - self._times[0] if self._times else 0.0
        return Generation(
            text=self._text if self._pieces is not None else decode(self._tokenizer, self._tokens),
            token_ids=tuple(self._tokens),
            tokens=len(self._tokens),
            prompt_tokens=self._prompt_tokens,
            stop_reason=self._reason,
            seconds=self._times[-1] if self._times else 0.0,
            time_to_first_token_s=self._times[0] if self._times else None,
            tokens_per_s=(len(self._times) - 1) / span if span > 0 else None,
        )

    def _hand_out(self, piece: str, *, last: bool) -> None:
        """Say what is new, up to a stop text, and to what may be the beginning of one."""
        if self._pieces is None:
            return
        new = self._stop.add(piece + (self._pieces.finish() if last else ""))
        if self._stop.hit:
            self._reason = "stop"
        elif last:
            new += self._stop.finish()
        self._text += new
        if new and self._say is not None:
            self._say(new)
