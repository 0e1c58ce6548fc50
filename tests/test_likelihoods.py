"""Token ids in, chances and answers out: held against the engine's own score, and against the tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import tunesmith as ts
from tests.tiny_models import TinyRun, chat
from tunesmith.api.likelihoods import _texts
from tunesmith.conversations import Text
from tunesmith.errors import CheckpointError, DataError, PromptError
from tunesmith.models import Endpoint, LocalEngine, VariantSet

SHORT = ts.GenerationSettings(max_new_tokens=6, seed=2)


@pytest.fixture
def engine(variants: VariantSet) -> LocalEngine:
    """The tiny variants."""
    return LocalEngine(variants)


@pytest.mark.parametrize("name", ["base", "final", "merged"])
def test_chances_are_the_engine_s_own_score(engine: LocalEngine, name: str) -> None:
    """Of a text whose tokens are known; the likeliest are in order, and the token is among all of them."""
    text = "What is 中文?"
    (score,) = engine.score([name], [Text(id="row", text=text)])[name]
    ids = ts.rendered_prompt(engine, name, text).token_ids
    told = ts.token_chances(engine, name, ids, top=5)
    assert [one.token_id for one in told] == list(ids)
    assert told[0].log_prob is None
    assert [one.log_prob for one in told[1:]] == pytest.approx(score.log_probs, abs=1e-5)
    for one in told[1:]:
        chances = [best.log_prob for best in one.likeliest]
        assert chances == sorted(chances, reverse=True)  # type: ignore[type-var]
        assert one.log_prob <= chances[0]  # type: ignore[operator]
        assert (one.log_prob == chances[0]) == (one.token_id == one.likeliest[0].token_id)
    later = ts.token_chances(engine, name, ids, start=4, top=5)
    assert [one.token_id for one in later] == list(ids[4:])
    for one, before in zip(later, told[4:], strict=True):
        # A product of fewer rows may sum its 32-bit terms in another order; everything else is the same.
        assert (one.text, [best.token_id for best in one.likeliest]) == (
            before.text,
            [best.token_id for best in before.likeliest],
        )
        assert one.log_prob == pytest.approx(before.log_prob, abs=1e-5)
        assert [best.log_prob for best in one.likeliest] == pytest.approx(
            [best.log_prob for best in before.likeliest], abs=1e-5
        )
    assert ts.token_chances(engine, name, ids, start=len(ids)) == []


def test_going_on_from_tokens_is_going_on_from_their_text(engine: LocalEngine) -> None:
    """The same draw; rows that are the same draw each for itself, the first as it would alone."""
    ids = ts.rendered_prompt(engine, "final", chat("hello")).token_ids
    (alone,) = engine.generate([ts.Request("final", chat("hello"))], SHORT)
    first, second, other = ts.continue_tokens(engine, [("final", ids), ("final", ids), ("base", ids)], SHORT)
    assert first.token_ids == alone.token_ids
    assert len({first.token_ids, second.token_ids, other.token_ids}) == 3


def test_the_bytes_of_tokens_are_those_of_the_text(engine: LocalEngine) -> None:
    """Parts of characters too, which no decoder tells; special tokens by name, ids of no token by number."""
    text = "a 中\n\t🎈"
    ids = ts.rendered_prompt(engine, "base", text).token_ids
    assert b"".join(ts.token_texts(engine, "base", ids)) == text.encode()
    assert ts.token_texts(engine, "base", [1, 300]) == [b"<|im_start|>", b"<token 300>"]


def test_the_bytes_of_sentencepiece_s_tokens() -> None:
    """Its mark for a space, and its byte tokens."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", "▁", "▁a", "b", "<0xE4>", "<0x0A>"])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))  # noqa: S106 - no password
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")  # noqa: S106
    assert list(map(_texts(fast), range(6))) == [b"<unk>", b" ", b" a", b"b", b"\xe4", b"\n"]


@pytest.mark.parametrize("ids", [[], [-1], [5, -7]])
def test_what_are_no_tokens_is_refused(engine: LocalEngine, ids: list[int]) -> None:
    """A negative id would be another one, counted from the end."""
    with pytest.raises(DataError):
        ts.token_chances(engine, "base", ids)
    with pytest.raises(DataError):
        ts.continue_tokens(engine, [("base", ids)])


def test_tokens_that_the_model_has_not_and_too_many_are_refused(engine: LocalEngine) -> None:
    """With the engine's own words."""
    with pytest.raises(CheckpointError, match="no embedding"):
        ts.token_chances(engine, "base", [5, 10_000])
    with pytest.raises(PromptError, match="context window"):
        ts.token_chances(engine, "base", [5] * 600)


def test_a_server_takes_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would cut them otherwise than we do."""
    server = Endpoint("http://127.0.0.1:9/v1", models=["base"])
    monkeypatch.setattr(Endpoint, "capabilities", ts.Capabilities(kind="endpoint", where="there"))
    with pytest.raises(DataError, match="no token ids"):
        ts.token_chances(server, "base", [5])
    with pytest.raises(DataError, match="no token ids"):
        ts.continue_tokens(server, [("base", [5])])
    with pytest.raises(DataError, match="no token ids"):
        ts.token_texts(server, "base", [5])


def test_an_adapter_is_beside_the_others_for_a_while(tiny: TinyRun, tmp_path: Path) -> None:
    """It answers as if it had been loaded with them, and is gone afterwards; a complete model is refused."""
    run = shutil.copytree(tiny.adapters["final"], tmp_path / "run")
    shutil.copytree(tiny.adapters["checkpoint-10"], run / "checkpoint-10")
    request = ts.Request("checkpoint-10", "hello")
    expected = ts.load_engine(run, ["10"], dtype="fp32")[0].generate([request], SHORT)[0].token_ids
    engine, _ = ts.load_engine(run, ["final"], dtype="fp32")
    before = engine.generate([ts.Request("final", "hello")], SHORT)[0].token_ids
    with ts.attached_variant(engine, run, "10") as info:
        assert info.name == "checkpoint-10"
        assert engine.generate([request], SHORT)[0].token_ids == expected
    assert engine.names == ("base", "final")
    assert engine.generate([ts.Request("final", "hello")], SHORT)[0].token_ids == before
    with pytest.raises(DataError, match="Only an adapter"), ts.attached_variant(engine, run, f"m={tiny.merged}"):
        pass
