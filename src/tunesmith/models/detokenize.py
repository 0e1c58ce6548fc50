"""Text from tokens, as they come, up to a text that ends it.

A character may be made of several tokens, and a token may begin with half a character, so a token's text is not the
tokenizer's text of that token alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_HALF_A_CHARACTER = "\ufffd"
# SentencePiece's byte tokens: a run of them is decoded as one, so one more may change what the others meant.
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The text of an answer, without special tokens."""
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


class Detokenizer:
    """Gives the text of a growing token sequence in pieces that never hold half a character.

    The pieces joined are :func:`decode` of all tokens.  Only the tokens since the last piece but one are decoded again:
    those before serve as context, because tokenizers treat the beginning of a text in their own way.

    Args:
        tokenizer: a Transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._bytes = False
        self._context = 0  # where decoding begins
        self._said = 0  # tokens before here have been handed out

    def add(self, token_id: int) -> str:
        """Take one token; return the text that has become whole, which may be empty."""
        self._tokens.append(token_id)
        before, now = self._window()
        if self._in_bytes(token_id) or len(now) <= len(before) or now.endswith(_HALF_A_CHARACTER):
            return ""
        self._context, self._said = self._said, len(self._tokens)
        return now[len(before) :]

    def finish(self) -> str:
        """Return what was held back; half a character becomes U+FFFD, as in the whole text."""
        before, now = self._window()
        self._context = self._said = len(self._tokens)
        return now[len(before) :]

    def _in_bytes(self, token_id: int) -> bool:
        """Whether the text so far ends in a byte token; special tokens are not text."""
        if token_id not in self._special:
            self._bytes = _BYTE_TOKEN.fullmatch(self._tokenizer.convert_ids_to_tokens(token_id) or "") is not None
        return self._bytes

    def _window(self) -> tuple[str, str]:
        before = decode(self._tokenizer, self._tokens[self._context : self._said])
        return before, decode(self._tokenizer, self._tokens[self._context :])


class StopTexts:
    """Cuts a growing text at the first of some stop texts, and hands nothing out that may be the beginning of one.

    Args:
        stops: the texts; none cuts nothing.

    Attributes:
        hit: whether one was found; nothing is handed out after it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.hit = False

    def add(self, piece: str) -> str:
        """Take a piece; return what surely belongs to the answer."""
        if self.hit:
            return ""
        text = self._held + piece
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.hit, self._held = True, ""
            return text[: min(places)]
        kept = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        """Return what was held back."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """How many last characters of the text are the first of the stop text."""
        return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
