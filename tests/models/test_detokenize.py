"""Detokenizer: pieces that are whole, and that joined are the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordPiece
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import build_tokenizer
from tunesmith.models.detokenize import Detokenizer, decode

BYTES = build_tokenizer()


def metaspace() -> PreTrainedTokenizerFast:
    """SentencePiece's way: a space is a mark on the word after it, and unknown characters are bytes."""
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}}
    for piece in ("▁", "▁a", "a", "▁b", "bc", "。", "猫"):
        vocabulary[piece] = len(vocabulary)
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")  # noqa: S106


def wordpiece() -> PreTrainedTokenizerFast:
    """BERT's way: a space before every word that is no continuation."""
    vocabulary = {word: index for index, word in enumerate(["[UNK]", "un", "##able", "##s", "猫", "."])}
    tokenizer = Tokenizer(WordPiece(vocab=vocabulary, unk_token="[UNK]"))  # noqa: S106
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")  # noqa: S106


TOKENIZERS = {"bytes": BYTES, "metaspace": metaspace(), "wordpiece": wordpiece()}


def pieces(tokenizer: PreTrainedTokenizerFast, token_ids: list[int]) -> list[str]:
    """What is handed out token by token, and at the end."""
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.add(token) for token in token_ids), detokenizer.finish()]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_pieces_joined_are_the_text_whatever_the_tokens(name: str, data: st.DataObject) -> None:
    """Also for token sequences that are no valid text, as a random model makes them."""
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=40))
    assert "".join(pieces(tokenizer, ids)) == decode(tokenizer, ids)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
@settings(max_examples=200, deadline=None)
def test_no_piece_of_valid_text_holds_half_a_character(text: str) -> None:
    """With one token a byte, every character beyond ASCII is split."""
    if "\ufffd" in text:
        return
    ids = BYTES(text, add_special_tokens=False)["input_ids"]
    said = pieces(BYTES, ids)
    assert not any("\ufffd" in piece for piece in said)
    assert "".join(said) == decode(BYTES, ids)


def test_a_character_is_handed_out_with_its_last_byte() -> None:
    """Not earlier and not later."""
    ids = BYTES("a猫b", add_special_tokens=False)["input_ids"]
    assert pieces(BYTES, ids) == ["a", "", "", "猫", "b", ""]


def test_half_a_character_at_the_end_comes_out_at_the_end() -> None:
    """As the replacement character, which is what the whole text has."""
    ids = BYTES("a猫", add_special_tokens=False)["input_ids"][:-1]
    assert pieces(BYTES, ids) == ["a", "", "", "\ufffd"]
