"""Templates by name: the texts that LLaMA-Factory's own templates make, and ends that generation stops at."""

from __future__ import annotations

import copy
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import build_tokenizer, chat
from tunesmith.conversations import (
    Conversation,
    Message,
    chat_template_of,
    encode,
    encode_prompt,
    named_template,
    template_names,
)
from tunesmith.errors import DataError

GOLDEN = json.loads((Path(__file__).parent / "templates_golden.json").read_text(encoding="utf-8"))
# LLaMA-Factory appends the end-of-sequence token to the last answer of these, behind an end that models stop at.
SECOND_END = ("bailing_v2", "dots_ocr", "gemma2")
BEGIN, END = "<s>", "</s>"
TEXT_END, TURN_END = "<|endoftext|>", "<|im_end|>"
SPECIAL = re.compile(r"<[|｜/]?[^<>\s]{1,40}>|\[e~\[|\[/?[A-Z_]{3,}\]")


@cache
def tokenizer_of_all() -> PreTrainedTokenizerFast:
    """Every byte is a token, and so is what any of the formats writes as one."""
    tokens = sorted({token for text in GOLDEN["texts"] for token in SPECIAL.findall(text)} | {BEGIN, END})
    tokens = [token for token in tokens if "think" not in token]
    vocabulary = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=BEGIN, eos_token=END)
    fast.add_special_tokens({"additional_special_tokens": [one for one in tokens if one not in (BEGIN, END)]})
    return fast


def conversation(case: str, words: list[str]) -> tuple[Message, ...]:
    """What the golden texts were made of."""
    opened, closed = words or ("", "")
    if case == "one":
        return chat("q1", "a1")
    if case == "system":
        return (Message(role="system", content="s1"), *chat("q1", "a1", "q2", "a2"))
    if case == "thought":
        return chat("q1", f"{opened}t1{closed}a1", "q2", f"{opened}t2{closed}a2")
    return chat("q1", "a1", "q2", f"{opened}t2{closed}a2")


CASES = [(name, case) for name, golden in GOLDEN["names"].items() for case in golden if case != "words"]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_named_template_makes_llama_factorys_texts(name: str, case: str) -> None:
    """Its prompt is what is answered, its answer what is learned; with a system text, several turns and thoughts."""
    golden, tokenizer = GOLDEN["names"][name], tokenizer_of_all()
    prompt, answer = (GOLDEN["texts"][index] for index in golden[case])
    turns = conversation(case, golden.get("words", []))
    template = chat_template_of(name, tokenizer, thinking=case != "no_thinking")

    def rendered(part: tuple[Message, ...], *, asks: bool) -> Any:
        shown = [turn.model_dump() for turn in part]
        options = {"chat_template": template, "tokenize": False, "add_generation_prompt": asks}
        return tokenizer.apply_chat_template(shown, **options)

    assert rendered(turns[:-1], asks=True) == prompt
    assert rendered(turns, asks=False) == prompt + (answer.removesuffix(END) if name in SECOND_END else answer)


def test_every_name_has_golden_texts() -> None:
    """And the other way round; ``empty`` is none, as it ends answers with nothing."""
    assert list(template_names()) == sorted(GOLDEN["names"])
    assert len(template_names()) == 120


@pytest.mark.parametrize("name", sorted(GOLDEN["names"]))
def test_what_counts_is_the_answer_with_an_end_that_generation_stops_at(name: str) -> None:
    """Decoded from the labels; the tokenizer's end token is then the one that was learned."""
    tokenizer = with_template(None, like=tokenizer_of_all())
    chosen = named_template(tokenizer, name)
    chosen.fit(tokenizer)
    encoded = encode(tokenizer, Conversation(id="row", messages=chat("q1", "a1")))
    counted = [index for index, counts in zip(encoded.input_ids, encoded.supervised, strict=True) if counts]
    prompt, answer = (GOLDEN["texts"][index] for index in GOLDEN["names"][name]["one"])
    end = answer.removesuffix(END) if name in SECOND_END else answer
    assert tokenizer.decode(counted) == end.rstrip("\n")
    assert counted[-1] == tokenizer.eos_token_id
    assert encode_prompt(tokenizer, chat("q1")) == encoded.input_ids[: encoded.supervised.index(True)]
    assert tokenizer.decode(encode_prompt(tokenizer, chat("q1"))) == prompt


def with_template(template: str | None, *, like: PreTrainedTokenizerFast | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of its own with another template."""
    other = copy.deepcopy(like) if like is not None else build_tokenizer()
    other.chat_template = template
    return other


def test_the_tokenizers_own_template_is_kept_where_it_says_the_same() -> None:
    """It may know more than the named one, such as tools."""
    own = build_tokenizer()
    chosen = named_template(own, "chatml")
    assert (chosen.own, chosen.chat_template) == (True, own.chat_template)
    assert [finding.code for finding in chosen.findings] == ["template_end_made_eos"]


CHANGES = [
    ("{{ m.role }}\n", "{{ m.role }}: "),
    ("<|im_start|>", "<|im_start|> "),
    ("<|im_end|>\n", "<|im_end|>"),
    ("assistant\n{% endif %}", "assistant{% endif %}"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_template_that_says_something_else_is_replaced_and_said_to_be(change: tuple[str, str]) -> None:
    """What is trained with is what must be saved."""
    other = with_template(build_tokenizer().chat_template.replace(*change))
    chosen = named_template(other, "chatml")
    assert not chosen.own
    assert chosen.chat_template == chat_template_of("chatml", other)
    assert ("template_replaced", "warning") in [(finding.code, finding.severity) for finding in chosen.findings]


def test_a_system_text_of_its_own_makes_a_template_another() -> None:
    """``qwen`` begins with one where the row has none, ``chatml`` with nothing."""
    assert not named_template(build_tokenizer(), "qwen").own
    assert named_template(build_tokenizer(), "qwen", default_system="").own
    assert not named_template(build_tokenizer(), "chatml", default_system="Be brief.").own
    text = chat_template_of("chatml", build_tokenizer(), default_system='Be "brief".\n{{ 1 }}')
    shown = [turn.model_dump() for turn in chat("q")]
    rendered = build_tokenizer().apply_chat_template(shown, chat_template=text, tokenize=False)
    assert rendered.startswith('<|im_start|>system\nBe "brief".\n{{ 1 }}<|im_end|>\n')


def test_the_end_token_becomes_the_tokenizers_unless_generation_stops_there_anyway() -> None:
    """As LLaMA-Factory's ``replace_eos``; a model that ends with what nothing stops at never stops."""
    tokenizer = build_tokenizer()
    assert tokenizer.eos_token == TEXT_END
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for name in ("chatml", None):
        assert named_template(tokenizer, name).eos_token == TURN_END
        kept = named_template(tokenizer, name, stop_ids=(end,))
        assert (kept.eos_token, kept.findings) == (TEXT_END, ())
    chosen = named_template(tokenizer, "chatml")
    chosen.fit(tokenizer)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token) == (TURN_END, end, TEXT_END)


def test_a_template_whose_end_the_tokenizer_does_not_know_is_refused_with_names_that_fit() -> None:
    """It would be learned as a few ordinary characters."""
    with pytest.raises(DataError, match="never stop") as caught:
        named_template(build_tokenizer(), "llama3")
    assert "chatml" in str(caught.value.expected)
    assert "<|eot_id|>" in str(caught.value.found)


def test_a_tokenizer_without_a_template_needs_a_name_and_is_told_which_fit() -> None:
    """By the tokens that it knows."""
    with pytest.raises(DataError, match="must name one") as caught:
        named_template(with_template(None), None)
    assert "chatml" in str(caught.value.expected)
    assert "llama3" not in str(caught.value.expected)
    given = named_template(with_template(None), "chatml")
    assert [finding.code for finding in given.findings] == ["template_given", "template_end_made_eos"]


@pytest.mark.parametrize(
    ("name", "near"), [("qwen3_nothnk", "qwen3_nothink"), ("Llama3", "llama3"), ("chat_ml", "chatml")]
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, near: str) -> None:
    """A typing mistake."""
    with pytest.raises(DataError, match="no template") as caught:
        chat_template_of(name, build_tokenizer())
    assert caught.value.next_step == f"did you mean {near}?"


def test_the_empty_template_is_refused_for_what_it_is() -> None:
    """Answers would end with nothing."""
    with pytest.raises(DataError, match="never stop"):
        named_template(build_tokenizer(), "empty")


def test_an_own_template_without_an_end_is_trained_with_and_said_to_be() -> None:
    """It may be so by design; the model will not stop by itself."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    chosen = named_template(with_template(template), None)
    assert (chosen.own, chosen.eos_token) == (True, None)
    assert [finding.code for finding in chosen.findings] == ["template_without_end"]


def test_turns_that_a_named_template_cannot_show_are_refused() -> None:
    """A tool's, or a system text in the middle."""
    tokenizer = with_template(chat_template_of("chatml", build_tokenizer()))
    for role in ("tool", "system"):
        with pytest.raises(DataError, match="only a first system turn"):
            encode_prompt(tokenizer, (*chat("q", "a"), Message(role=role, content="x")))


def test_thoughts_are_for_all_rows_or_for_none() -> None:
    """Null lets every row choose its prompt, which one template cannot; an own template must then be named."""
    with pytest.raises(DataError, match="same for all rows"):
        named_template(build_tokenizer(), "qwen3", thinking=None)
    assert named_template(build_tokenizer(), "chatml", thinking=None).own
    own = with_template(build_tokenizer().chat_template + "{% if enable_thinking %}{% endif %}")
    with pytest.raises(DataError, match="recipe must name"):
        named_template(own, None, thinking=False)
    assert named_template(own, None).own


def test_an_own_template_that_shows_nothing_is_refused() -> None:
    """Unless another is named."""
    broken = with_template("{{ raise_exception('not for chats') }}")
    with pytest.raises(DataError, match="shows no conversation"):
        named_template(broken, None)
    assert not named_template(broken, "chatml").own
