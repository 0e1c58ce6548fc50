"""Token ids: the answer's are found under any template, and what is trained on is what the model will be shown."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import build_tokenizer, chat, row
from tunesmith.conversations import Encoded, Text, encode, encode_all, encode_prompt, encode_text
from tunesmith.errors import DataError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token."""
    return build_tokenizer()


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@given(texts=st.lists(TEXT, min_size=2, max_size=5))
@settings(max_examples=100, deadline=None)
def test_the_answers_tokens_and_no_others_are_supervised(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    """Under the tiny template: each answer with its end-of-turn token, without the line break behind it."""
    encoded = encode(tokenizer, row(0, *texts))
    pieces, current = [], []
    for index, supervised in zip(encoded.input_ids, encoded.supervised, strict=True):
        if supervised:
            current.append(index)
        elif current:
            pieces.append(tokenizer.decode(current))
            current = []
    if current:
        pieces.append(tokenizer.decode(current))
    assert pieces == [f"{text}<|im_end|>" for text in texts[1::2]]
    if len(texts) % 2 == 0:
        rendered = tokenizer.apply_chat_template(
            [message.model_dump() for message in chat(*texts)], tokenize=False, add_generation_prompt=False
        )
        assert tokenizer.decode(encoded.input_ids) == rendered


def test_a_prompt_is_what_the_answer_was_trained_after(tokenizer: PreTrainedTokenizerFast) -> None:
    """The ids before the first supervised token, exactly: training, comparing and serving see one prompt."""
    encoded = encode(tokenizer, row(0, "question", "answer"))
    start = encoded.supervised.index(True)
    assert encode_prompt(tokenizer, chat("question")) == encoded.input_ids[:start]


def with_template(template: str | None) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with another template."""
    other = build_tokenizer()
    other.chat_template = template
    return other


def test_a_template_without_special_tokens_supervises_the_whole_answer() -> None:
    """There is no end-of-turn token to stop at."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    encoded = encode(with_template(template), row(0, "q", "yes"))
    wanted = [index for index, kept in zip(encoded.input_ids, encoded.supervised, strict=True) if kept]
    assert with_template(template).decode(wanted) == "yes\n"


def test_an_answer_without_an_end_counts_whole_though_it_holds_a_special_token() -> None:
    """What comes after a thought that is closed by a special token is the answer, not what follows its end."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    encoded = encode(with_template(template), row(0, "q", "thought<|endoftext|>answer"))
    wanted = [index for index, kept in zip(encoded.input_ids, encoded.supervised, strict=True) if kept]
    assert with_template(template).decode(wanted) == "thought<|endoftext|>answer"


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    """Such as one that drops the reasoning of all answers but the last."""
    template = "{% for m in messages %}{{ m.content if loop.last else '…' }}|{% endfor %}"
    with pytest.raises(DataError, match="rewrites earlier turns"):
        encode(with_template(template), row(0, "q", "a", "q2", "a2"))


def test_a_tokenizer_without_a_template_is_refused_with_advice() -> None:
    """For prompts and rows alike."""
    with pytest.raises(DataError, match="no chat template") as caught:
        encode_prompt(with_template(None), chat("q"))
    assert "chat_template.jinja" in str(caught.value.next_step)


def test_a_row_without_an_answer_cannot_be_encoded(tokenizer: PreTrainedTokenizerFast) -> None:
    """Named by its id."""
    with pytest.raises(DataError, match="without an answer") as caught:
        encode(tokenizer, row(8, "only a question"))
    assert caught.value.where == "row-8"


def test_a_template_whose_generation_prompt_is_not_how_answers_begin_is_refused() -> None:
    """Such as one that opens the model's thinking there: the answer would be cut at the wrong place."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: <think>{% endif %}"
    with pytest.raises(DataError, match="answers cannot be told"):
        encode(with_template(template), row(0, "question", "a long enough answer"))


@given(text=TEXT)
@settings(max_examples=100, deadline=None)
def test_all_of_a_text_but_its_first_token_is_supervised(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    """Nothing comes before the first, so nothing predicts it; the ids are the text and no template's."""
    if len(text.encode()) < 2:
        text += "ab"
    encoded = encode_text(tokenizer, Text(id="t", text=text))
    assert tokenizer.decode(encoded.input_ids) == text
    assert encoded.supervised == [False] + [True] * (len(encoded.input_ids) - 1)


def test_a_text_begins_with_the_tokenizers_own_special_token() -> None:
    """As in pretraining; then the first token of the text itself is predicted, and the special one is not."""
    other = build_tokenizer()
    start = other.convert_tokens_to_ids("<|im_start|>")
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    encoded = encode_text(other, Text(id="t", text="ab"))
    assert encoded.input_ids[0] == start
    assert other.decode(encoded.input_ids[1:]) == "ab"
    assert encoded.supervised == [False, True, True]


@pytest.mark.parametrize("text", ["", "a"])
def test_a_text_with_nothing_to_score_is_refused_by_its_name(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    """A mean over no token is no number."""
    with pytest.raises(DataError, match="fewer than two tokens") as caught:
        encode_text(tokenizer, Text(id="zh-07", text=text))
    assert caught.value.where == "zh-07"


def supervised_text(tokenizer: PreTrainedTokenizerFast, encoded: Any) -> str:
    """What counts in the loss, as text."""
    return str(tokenizer.decode([i for i, counts in zip(encoded.input_ids, encoded.supervised, strict=True) if counts]))


def test_many_rows_are_encoded_as_each_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    """Over the bound of a batch, in order."""
    rows = [row(number, f"question {number}" * (number % 5 + 1), "yes " * (number % 7 + 1)) for number in range(300)]
    assert list(encode_all(tokenizer, rows)) == [encode(tokenizer, one) for one in rows]


def test_prompts_count_where_that_is_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    """Every token of the row."""
    encoded = encode(tokenizer, row(0, "q", "a", "q2", "a2"), train_on_prompt=True)
    assert all(encoded.supervised)
    assert encoded.input_ids == encode(tokenizer, row(0, "q", "a", "q2", "a2")).input_ids


def test_history_is_masked_where_that_is_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    """The last answer alone counts; the ids are the same."""
    masked = encode(tokenizer, row(0, "q", "a", "q2", "a2"), mask_history=True)
    assert supervised_text(tokenizer, masked) == "a2<|im_end|>"
    assert masked.input_ids == encode(tokenizer, row(0, "q", "a", "q2", "a2")).input_ids
    assert masked.passed_over == 0


THOUGHTLESS_HISTORY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% elif m.role == 'assistant' and '</think>' not in m.content %}<think></think>{{ m.content }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_under_a_template_that_rewrites_history_the_last_answer_alone_is_trained_on() -> None:
    """Such as Qwen3's: no earlier answer was given in the context that its own would have had; they are counted."""
    other = with_template(THOUGHTLESS_HISTORY)
    talk = row(0, "q", "<think>x</think>a", "q2", "b", "q3", "<think>y</think>c")
    encoded = encode(other, talk)
    assert supervised_text(other, encoded) == "<think>y</think>c<|im_end|>"
    assert encoded.passed_over == 2
    start = encoded.supervised.index(True)
    assert encoded.input_ids[:start] == encode_prompt(other, talk.prompt)
    assert encode(other, row(0, "q", "a")).passed_over == 0
    assert supervised_text(other, encode(other, row(0, "q", "a"))) == "<think></think>a<|im_end|>"


def test_a_template_that_refuses_a_row_is_named_with_the_row() -> None:
    """Gemma's refuses a system text, and two users' turns in a row."""
    other = with_template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="refuses this conversation") as caught:
        encode(other, row(7, "q", "a"))
    assert (caught.value.where, caught.value.found) == ("row-7", "roles must alternate")


def test_decoding_the_labels_notices_what_it_should(tokenizer: PreTrainedTokenizerFast) -> None:
    """Labels shifted by one, prompt tokens that count, a missing end token: none of them decodes to the answers."""
    talk, wanted = row(0, "question", "answer"), "answer<|im_end|>"
    true = encode(tokenizer, talk)
    assert supervised_text(tokenizer, true) == wanted
    for shifted in ([*true.supervised[1:], False], [False, *true.supervised[:-1]]):
        assert supervised_text(tokenizer, Encoded(true.input_ids, shifted)) != wanted
    assert supervised_text(tokenizer, encode(tokenizer, talk, train_on_prompt=True)) != wanted
    endless = with_template(tokenizer.chat_template.replace("{{ m.content }}<|im_end|>", "{{ m.content }}"))
    assert supervised_text(endless, encode(endless, talk)) != wanted
