"""Token ids of conversations and texts, and which of them count in the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

from tunesmith.conversations.records import Conversation, Message, Text
from tunesmith.errors import DataError

_ROWS_A_BATCH = 256
_NAME_ONE = "name the format that the model was trained with, such as template: chatml"


@dataclass(frozen=True)
class Encoded:
    """Token ids of a conversation or a text.

    Attributes:
        input_ids: all token ids, in order.
        supervised: for each of them, whether it counts in the loss: in a conversation, whether it belongs to an answer.
        passed_over: earlier answers that do not count, because the template shows them otherwise once they are history.
    """

    input_ids: list[int]
    supervised: list[bool]
    passed_over: int = 0


def encode_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """The token ids that a model is given to answer ``messages``: the chat template with its generation prompt.

    Raises:
        DataError: the tokenizer has no chat template, or it refuses these turns.
    """
    from jinja2 import TemplateError

    try:
        return _ids(tokenizer, render(tokenizer, messages, add_generation_prompt=True))
    except TemplateError as error:
        raise DataError(
            "The chat template refuses these turns.",
            where=", ".join(turn.role for turn in messages),
            found=error,
            next_step="leave the system text out where the template knows none, and let user and assistant take turns",
        ) from error


def encode(
    tokenizer: Any, conversation: Conversation, *, train_on_prompt: bool = False, mask_history: bool = False
) -> Encoded:
    """Encode a conversation with its answers marked, whatever the template.

    Every assistant turn is found by rendering the turns before it with a generation prompt: what the template adds
    after that is the answer, its end-of-turn token included.  An answer counts only where its context is what the model
    will be shown when it has to give that answer.  Templates that rewrite history (Qwen3's, which takes the thoughts
    out of it) leave that true of the last answer alone; the earlier ones are then context, and counted.

    Args:
        tokenizer: with a chat template.
        conversation: a row that holds an answer.
        train_on_prompt: count every token, the prompt's too.
        mask_history: count the last answer alone.

    Raises:
        DataError: no chat template, no answer in the row, or a template under which answers cannot be told.
    """
    (encoded,) = encode_all(tokenizer, [conversation], train_on_prompt=train_on_prompt, mask_history=mask_history)
    return encoded


def encode_all(
    tokenizer: Any,
    conversations: Iterable[Conversation],
    *,
    train_on_prompt: bool = False,
    mask_history: bool = False,
) -> Iterator[Encoded]:
    """Encode many conversations, each as :func:`encode` does; a fast tokenizer takes hundreds in one call.

    Raises:
        DataError: as :func:`encode`, and it names the row.
    """

    @lru_cache(maxsize=1024)
    def is_blank(ids: tuple[int, ...]) -> bool:
        return not tokenizer.decode(list(ids)).strip()

    rows = iter(conversations)
    while batch := list(islice(rows, _ROWS_A_BATCH)):
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        rendered = [_shown(tokenizer, row, mask_history=mask_history) for row in batch]
        texts = [text for row in rendered for piece in row.pieces for text in piece]
        tokenized = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
        for row in rendered:
            ids, answers = _joined(row, tokenized, special, is_blank)
            yield Encoded(ids, [True] * len(ids) if train_on_prompt else answers, row.passed_over)


@dataclass(frozen=True)
class _Rendered:
    """A row as text: each answer that counts with all that stands before it and after the last one."""

    pieces: list[tuple[str, str]]
    passed_over: int


def _shown(tokenizer: Any, conversation: Conversation, *, mask_history: bool) -> _Rendered:
    from jinja2 import TemplateError

    try:
        return _render_row(tokenizer, conversation, mask_history=mask_history)
    except TemplateError as error:
        raise DataError(
            "The chat template refuses this conversation.", where=conversation.id, found=error, next_step=_NAME_ONE
        ) from error


def _render_row(tokenizer: Any, conversation: Conversation, *, mask_history: bool) -> _Rendered:
    messages = conversation.messages
    answers = [index for index, turn in enumerate(messages) if turn.role == "assistant"]
    if not answers:
        raise DataError("A row without an answer cannot be trained on or scored.", where=conversation.id)
    text = render(tokenizer, messages, add_generation_prompt=False)
    pieces, done, passed_over = [], 0, 0
    for index in answers[-1:] if mask_history else answers:
        start = render(tokenizer, messages[:index], add_generation_prompt=True)
        whole = index + 1 == len(messages)
        end = text if whole else render(tokenizer, messages[: index + 1], add_generation_prompt=False)
        if text.startswith(start) and text.startswith(end) and len(end) > len(start):
            pieces.append((text[done : len(start)], text[len(start) : len(end)]))
            done = len(end)
        elif index == answers[-1]:
            raise DataError(
                "The chat template rewrites earlier turns, so answers cannot be told from prompts.",
                where=conversation.id,
                next_step=_NAME_ONE,
            )
        else:
            passed_over += 1
    return _Rendered(pieces, passed_over)


def _joined(
    row: _Rendered,
    tokenized: Iterator[Sequence[int]],
    special: set[int],
    is_blank: Callable[[tuple[int, ...]], bool],
) -> tuple[list[int], list[bool]]:
    """A row's token ids, and for each of them whether it belongs to an answer."""
    ids: list[int] = []
    answers: list[bool] = []
    for _ in row.pieces:
        context, answer = next(tokenized), next(tokenized)
        length = max((place + 1 for place, index in enumerate(answer) if index in special), default=len(answer))
        # Some templates put a line break after the end-of-turn token; generation never reaches it.
        if length < len(answer) and not is_blank(tuple(answer[length:])):
            length = len(answer)
        ids += [*context, *answer]
        answers += [False] * len(context) + [True] * length + [False] * (len(answer) - length)
    return ids, answers


def encode_text(tokenizer: Any, text: Text) -> Encoded:
    """Encode plain text as a model was pretrained on it: no chat template, the tokenizer's own special tokens.

    Every token counts but the first, before which there is nothing to predict it from.

    Raises:
        DataError: there are not two tokens, so that there is nothing to score.
    """
    ids = list(tokenizer(text.text, add_special_tokens=True)["input_ids"])
    if len(ids) < 2:
        raise DataError(
            "A text of fewer than two tokens cannot be scored.", where=text.id, expected="2 or more", found=len(ids)
        )
    return Encoded(ids, [False] + [True] * (len(ids) - 1))


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    chat_template: str | None = None,
) -> str:
    """The text that a chat template makes of turns.

    Args:
        tokenizer: its special tokens, and its own template.
        messages: the turns.
        add_generation_prompt: end where the model's answer begins.
        chat_template: another template than the tokenizer's own.

    Raises:
        DataError: there is no template.
        jinja2.TemplateError: it refuses these turns.
    """
    if chat_template is None and getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            "This tokenizer has no chat template, so a conversation cannot be rendered.",
            where=getattr(tokenizer, "name_or_path", None),
            next_step="put the template that the model was trained with into chat_template.jinja beside the tokenizer, "
            "or name it in the recipe: template: chatml",
        )
    turns = [{"role": turn.role, "content": turn.content} for turn in messages]
    return str(
        tokenizer.apply_chat_template(
            turns, chat_template=chat_template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    )


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
