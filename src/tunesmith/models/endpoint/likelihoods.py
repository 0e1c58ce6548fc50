"""The likelihood of given tokens, from servers that tell the log-probabilities of a prompt's tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tunesmith.conversations import Conversation, Encoded, encode, encode_text
from tunesmith.errors import DataError
from tunesmith.models.endpoint.answers import Scoring, field
from tunesmith.models.endpoint.flight import Call, hand_out
from tunesmith.models.endpoint.refusals import Contact, Refusal
from tunesmith.models.engine import RowScore, ScoredRow

# A prompt's log-probabilities come with a generation, and no server refuses to generate one token.
_ONE_TOKEN = {"max_tokens": 1, "temperature": 0.0}


def encoded(tokenizer: Any, row: ScoredRow) -> Encoded:
    """A row's token ids, and which of them count.

    Raises:
        DataError: a row without an answer, or no chat template.
    """
    return encode(tokenizer, row) if isinstance(row, Conversation) else encode_text(tokenizer, row)


class Likelihood(Call):
    """One row's log-probabilities.

    Args:
        contact: the server.
        model: the model's id there.
        row: its token ids.
        text: the same as text, for servers that take no ids.
        scoring: in which form the server tells log-probabilities.
        pieces: the text of every token, against which the server's own are held, where it tells them; None for not to.
        on_end: called once they are there.

    Attributes:
        told: of every token its log-probability in nats, None for the first, and whether it was the most likely one,
            None where the server does not say.
    """

    def __init__(
        self,
        contact: Contact,
        model: str,
        *,
        row: Encoded,
        text: str,
        scoring: Scoring,
        pieces: Sequence[str] | None = None,
        on_end: Callable[[Likelihood], None] | None = None,
    ) -> None:
        super().__init__(contact, model)
        self._row, self._text, self._scoring, self._on_end = row, text, scoring, on_end
        self._pieces = pieces
        self.told: list[tuple[float | None, bool | None]] = []

    async def ask(self, client: Any) -> None:
        """Send the row as a prompt, and read the log-probabilities of its tokens."""
        ids = self._row.input_ids
        prompt: str | list[int] = self._text if self._scoring == "echo text" else ids
        wish = {"prompt_logprobs": 1} if self._scoring == "prompt_logprobs" else {"echo": True, "logprobs": 1}
        answer = await client.completions.create(model=self.model, prompt=prompt, extra_body={**_ONE_TOKEN, **wish})
        choices = field(answer, "choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        told = _by_id(choice, ids) if self._scoring == "prompt_logprobs" else _echoed(choice)
        length = field(field(answer, "usage"), "prompt_tokens")
        # A text that the server cuts otherwise than our tokenizer would give the numbers of other tokens.
        if len(told) not in (len(ids), len(ids) + 1) or length not in (len(ids), None):
            self.refuse(other_tokens(f"{len(told)} of a prompt of {length} tokens", len(ids), self.contact))
            return
        if self._scoring == "echo text" and length is None:
            self.refuse(other_tokens("no count of the prompt's tokens", len(ids), self.contact))
            return
        strange = _strange(field(field(choice, "logprobs"), "tokens"), ids, self._pieces)
        if strange is not None:
            self.refuse(other_tokens(strange, len(ids), self.contact))
            return
        self.told = told[: len(ids)]
        self.score("")
        self.done = True
        if self._on_end is not None:
            hand_out(self._on_end, self)

    def score(self, row_id: str) -> RowScore:
        """The row's score.

        Args:
            row_id: the row's id.

        Raises:
            ValueError: a token's log-probability is lacking.
        """
        counted = [t for t, counts in zip(self.told, self._row.supervised, strict=True) if counts]
        counted = counted if not self._row.supervised[0] else counted[1:]
        log_probs = [value for value, _ in counted if value is not None]
        if len(log_probs) < len(counted):
            raise ValueError("a token without a log-probability")
        best = [first for _, first in counted if first is not None]
        return RowScore(row_id, tuple(log_probs), sum(best) if len(best) == len(counted) else None)


def other_tokens(found: str, expected: int, contact: Contact) -> Refusal:
    """The log-probabilities are not those of the row's tokens."""
    return Refusal(
        DataError(
            "The server's log-probabilities are not of the tokens that it was asked about.",
            where=contact.where,
            expected=f"{expected} log-probabilities",
            found=found,
            next_step="check that the tokenizer is the server's model's",
        )
    )


def _strange(told: Any, ids: Sequence[int], pieces: Sequence[str] | None) -> str | None:
    """The first of a server's tokens that is another one than was sent; None where it tells none.

    Servers write a token as its text or as ``token_id:N``.  Texts of tokens that are parts of characters are written in
    as many ways as there are servers, and spaces at their ends come and go, so that neither is compared.
    """
    if pieces is None or not isinstance(told, list) or len(told) < len(ids):
        return None
    for place, (token, own, piece) in enumerate(zip(told, ids, pieces, strict=False)):
        if not isinstance(token, str) or "\ufffd" in token + piece or token.startswith("bytes:"):
            continue
        same = token == f"token_id:{own}" if token.startswith("token_id:") else _bare(token) == _bare(piece)
        if not same:
            return f"{token[:40]!r} for {piece[:40]!r} at place {place}"
    return None


def _bare(token: str) -> str:
    return token.replace("\u2581", " ").strip()


def _echoed(choice: Any) -> list[tuple[float | None, bool | None]]:
    """OpenAI's form: ``logprobs.token_logprobs``, and in ``top_logprobs`` the most likely token's."""
    logprobs = field(choice, "logprobs")
    own, best = field(logprobs, "token_logprobs"), field(logprobs, "top_logprobs")
    if not isinstance(own, list):
        raise ValueError("no log-probabilities of the prompt")
    bests: Sequence[Any] = best if isinstance(best, list) and len(best) == len(own) else [None] * len(own)
    return [(_nats(value), _is_best(_nats(value), others)) for value, others in zip(own, bests, strict=True)]


def _is_best(value: float | None, others: Any) -> bool | None:
    known = [other for other in map(_nats, others.values()) if other is not None] if isinstance(others, dict) else []
    return None if value is None or not known else value >= max(known)


def _by_id(choice: Any, ids: Sequence[int]) -> list[tuple[float | None, bool | None]]:
    """The form of vLLM: ``prompt_logprobs``, by token id, each with its rank."""
    places = field(choice, "prompt_logprobs")
    if not isinstance(places, list) or len(places) != len(ids):
        raise ValueError("no log-probabilities of the prompt")
    told: list[tuple[float | None, bool | None]] = []
    for place, token in zip(places, ids, strict=True):
        entry = field(place, str(token))
        rank = field(entry, "rank")
        told.append((_nats(field(entry, "logprob")), rank == 1 if isinstance(rank, int) else None))
    return told


def _nats(value: object) -> float | None:
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    return number if math.isfinite(number) and number <= 1e-3 else None
