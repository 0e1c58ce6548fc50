"""What a variant makes of token ids as they are: how it goes on from them, and how likely it finds each of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from tunesmith.errors import DataError
from tunesmith.models import (
    Engine,
    Generation,
    GenerationSettings,
    LocalEngine,
    continue_rows,
    token_logits,
)
from tunesmith.models.engine import OnGeneration, OnText
from tunesmith.progress import Cancellation

_POSITIONS_AT_ONCE = 128
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's


@dataclass(frozen=True)
class TokenChance:
    """One token at one place.

    Attributes:
        token_id: its id.
        text: its bytes, which may be a part of a character only; of a special token, its name.
        log_prob: its log-likelihood after all tokens before it, in nats; None at the first place of all.
        likeliest: the most likely tokens at this place, the likeliest first; as many as were asked for.
    """

    token_id: int
    text: bytes
    log_prob: float | None
    likeliest: tuple[TokenChance, ...] = ()


def token_chances(
    engine: Engine, variant: str, token_ids: Sequence[int], *, start: int = 0, top: int = 0
) -> list[TokenChance]:
    """How likely a variant finds given tokens, by one forward pass over them.

    The logits are those of :meth:`tunesmith.Engine.score`, before any temperature, penalty or cut.

    Args:
        engine: a local one.
        variant: the variant's name.
        token_ids: the whole sequence.
        start: the place of the first token that is told of; those before it are read only.
        top: how many of the most likely tokens are told with each.

    Returns:
        One a token from ``start`` on, in order.

    Raises:
        DataError: no such variant, no tokens, or a server, which takes no token ids from us.
        CheckpointError: ids that the model has no embedding for.
        PromptError: more tokens than the context window holds.
    """
    local = _local(engine)
    if not token_ids or min(token_ids) < 0:
        raise DataError("There are no such tokens.", expected="token ids", found=list(token_ids)[:10])
    text_of = _texts(local.variants.tokenizer(variant))
    first = max(start, 1)
    result = [TokenChance(token_ids[0], text_of(token_ids[0]), None)] if start < 1 else []
    if first < len(token_ids):
        logits = token_logits(local.variants, variant, token_ids, slice(first - 1, len(token_ids) - 1))
        for begin in range(0, len(logits), _POSITIONS_AT_ONCE):
            part = logits[begin : begin + _POSITIONS_AT_ONCE]
            chosen = token_ids[first + begin : first + begin + len(part)]
            result += _chances(part, chosen, top, text_of)
    return result


def token_texts(engine: Engine, variant: str, token_ids: Sequence[int]) -> list[bytes]:
    """The bytes of single tokens, each of which may be a part of a character only; of special tokens their names.

    Args:
        engine: a local one.
        variant: the variant's name.
        token_ids: any of its tokenizer's or its model's.

    Raises:
        DataError: no such variant, or a server, whose tokens are not known here.
    """
    return list(map(_texts(_local(engine).variants.tokenizer(variant)), token_ids))


def continue_tokens(
    engine: Engine,
    rows: Sequence[tuple[str, Sequence[int]]],
    settings: GenerationSettings | None = None,
    *,
    on_text: OnText | None = None,
    on_done: OnGeneration | None = None,
    cancellation: Cancellation | None = None,
) -> list[Generation]:
    """Go on from token ids: :meth:`tunesmith.Engine.generate` of prompts that are tokens already.

    Args:
        engine: a local one.
        rows: a variant and the token ids that it goes on from, for every row.  Rows that are the same draw each with
            random numbers of their own, the first one with those that it would draw with alone.
        settings: how answers are drawn; None takes the defaults.
        on_text: called with the row's index and new text.
        on_done: called with the row's index and its answer, once it is whole.
        cancellation: read after every token.

    Returns:
        One generation a row, of the new tokens only.

    Raises:
        DataError: no such variant, a row without tokens, or a server, which takes no token ids from us.
        PromptError: rows that leave no room in the context window; all are named.
    """
    local = _local(engine)
    if any(not ids or min(ids) < 0 for _, ids in rows):
        raise DataError("A prompt without tokens cannot be gone on from.", next_step="give a word to begin with")
    return continue_rows(
        local.variants,
        [name for name, _ in rows],
        [list(ids) for _, ids in rows],
        settings,
        on_text=on_text,
        on_done=on_done,
        cancellation=cancellation,
    )


def _local(engine: Engine) -> LocalEngine:
    if not isinstance(engine, LocalEngine):
        raise DataError("A server takes no token ids from here.", where=engine.capabilities.where)
    return engine


def _chances(logits: Any, token_ids: Sequence[int], top: int, text_of: Callable[[int], bytes]) -> list[TokenChance]:
    """Log-softmax of float32 logits (places, vocabulary), at the tokens and at the likeliest ones."""
    import torch

    log_probs = logits.log_softmax(-1)
    own = log_probs.gather(1, torch.tensor(list(token_ids), device=logits.device)[:, None])[:, 0].tolist()
    values, ids = log_probs.topk(min(top, logits.shape[-1]))
    return [
        TokenChance(token, text_of(token), log_prob, tuple(map(TokenChance, best, map(text_of, best), chances)))
        for token, log_prob, best, chances in zip(token_ids, own, ids.tolist(), values.tolist(), strict=True)
    ]


def _texts(tokenizer: Any) -> Callable[[int], bytes]:
    """What tells the bytes of single tokens, which ``decode`` cannot where they are parts of characters."""
    added = tokenizer.added_tokens_decoder
    backend = getattr(tokenizer, "backend_tokenizer", None)
    byte_level = backend is not None and backend.decoder is not None and b"ByteLevel" in backend.decoder.__getstate__()

    def text_of(token_id: int) -> bytes:
        if token_id in added:
            return str(added[token_id]).encode()
        token = tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # models have more embeddings than their tokenizers have tokens
            return f"<token {token_id}>".encode()
        if byte_level:
            return bytes(_byte_of_letter()[letter] for letter in token if letter in _byte_of_letter())
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return str(token).replace("▁", " ").encode()

    return text_of


@cache
def _byte_of_letter() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for.

    Source: ``bytes_to_unicode`` of GPT-2's ``encoder.py``:
    printable bytes are themselves, the others follow from U+0100.
    """
    itself = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in itself]
    return {chr(byte): byte for byte in itself} | {chr(256 + place): byte for place, byte in enumerate(others)}
