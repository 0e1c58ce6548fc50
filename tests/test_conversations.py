"""Conversations: every row format, every bad row named, and the answer's tokens found under any template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import build_tokenizer, chat, row
from tunesmith.conversations import (
    Conversation,
    Message,
    Text,
    built_in_prompts,
    encode,
    encode_prompt,
    encode_text,
    read_conversations,
)
from tunesmith.errors import DataError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token."""
    return build_tokenizer()


def read_rows(tmp_path: Path, *rows: Any, suffix: str = ".jsonl") -> list[Conversation]:
    """Write rows and read them back."""
    file = tmp_path / f"data{suffix}"
    text = json.dumps(rows) if suffix == ".json" else "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    file.write_bytes(text.encode())
    return read_conversations(file)


def turns(conversation: Conversation) -> list[tuple[str, str]]:
    """Roles and texts."""
    return [(message.role, message.content) for message in conversation.messages]


U, A, S = ("user", "q"), ("assistant", "a"), ("system", "s")

FORMATS: list[tuple[Any, list[tuple[str, str]]]] = [
    ({"instruction": "q", "output": "a"}, [U, A]),
    ({"instruction": "q", "input": "", "output": ""}, [U]),
    ({"instruction": "q", "input": "more", "output": "a", "system": "s"}, [S, ("user", "q\nmore"), A]),
    ({"instruction": "", "input": "q", "output": "a"}, [U, A]),
    ({"instruction": "q", "input": None, "output": None, "system": None}, [U]),
    ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]}, [S, U]),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}, [S, U, A]),
    ({"prompt": "q", "completion": "a"}, [U, A]),
    ({"prompt": "q"}, [U]),
    ({"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}, [U, A]),
    ({"prompt": [{"role": "user", "content": "q"}]}, [U]),
    ({"prompt": [{"role": "user", "content": "q"}], "completion": None}, [U]),
    ("q", [U]),
]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize(("given_row", "expected"), FORMATS)
def test_every_row_format_is_read(tmp_path: Path, given_row: Any, expected: list[tuple[str, str]], suffix: str) -> None:
    """Alpaca, messages, ShareGPT, prompt and completion, bare text."""
    (found,) = read_rows(tmp_path, given_row, suffix=suffix)
    assert turns(found) == expected
    assert found.id == "row-0"


BAD: list[Any] = [
    3,
    None,
    [],
    {},
    {"text": "q"},
    "",
    {"instruction": "", "input": ""},
    {"instruction": None},
    {"instruction": 5, "output": "a"},
    {"instruction": "q", "input": ["x"]},
    {"instruction": "q", "output": {"x": 1}},
    {"instruction": "q", "system": 7},
    {"messages": []},
    {"messages": "q"},
    {"messages": ["q"]},
    {"messages": [{"role": "tool", "content": "q"}]},
    {"messages": [{"role": ["user"], "content": "q"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]},
    {"messages": [{"content": "q"}]},
    {"conversations": [{"from": "observation", "value": "q"}]},
    {"prompt": 3},
    {"prompt": ["q"]},
    {"prompt": [{"role": "user", "content": "q"}], "completion": "a"},
    {"prompt": [{"role": "user", "content": "q"}], "completion": 3},
    {"prompt": "q", "completion": ["a"]},
]


@pytest.mark.parametrize("bad", BAD)
def test_a_row_of_no_known_format_is_named(tmp_path: Path, bad: Any) -> None:
    """By its place, with a reason on one line; the good rows around it do not hide it."""
    with pytest.raises(DataError, match="1 of 3 rows") as caught:
        read_rows(tmp_path, "good", bad, {"prompt": "good"})
    (line,) = caught.value.details
    assert line.startswith("row 1: ")
    assert "\n" not in line


def test_all_bad_rows_are_named_at_once_up_to_ten(tmp_path: Path) -> None:
    """And the rest are counted."""
    with pytest.raises(DataError, match="12 of 12") as caught:
        read_rows(tmp_path, *([{}] * 12))
    assert caught.value.details[0].startswith("row 0")
    assert caught.value.details[-1] == "… and 2 more"
    assert len(caught.value.details) == 11


KEYS = ["instruction", "input", "output", "system", "messages", "conversations", "prompt", "completion"]
KEYS += ["role", "content", "from", "value"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(KEYS),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@given(rows=st.lists(JSON, min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_any_json_is_read_or_refused(tmp_path_factory: Any, rows: list[Any]) -> None:
    """No crash whatever the rows hold."""
    try:
        found = read_rows(tmp_path_factory.getbasetemp(), *rows)
    except DataError:
        return
    assert len(found) == len(rows)
    assert all(conversation.messages for conversation in found)


def test_a_text_file_is_one_prompt_a_line(tmp_path: Path) -> None:
    """Blank lines are none; a byte order mark and Windows' line ends are no part of it."""
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeffone\r\n\r\n  \r\n二\u2028still two\n".encode())
    assert [turns(found) for found in read_conversations(file)] == [[("user", "one")], [("user", "二\u2028still two")]]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_a_jsonl_row_ends_only_at_a_line_break(tmp_path: Path, separator: str) -> None:
    """Texts from the web hold these; JSON allows the first three as they are, and escapes the others."""
    text = f"one{separator}two"
    assert [turns(found) for found in read_rows(tmp_path, {"prompt": text}, {"prompt": "x"})] == [
        [("user", text)],
        [("user", "x")],
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "no rows"),
        ("a.json", b"[]", "no rows"),
        ("a.txt", b"\n \n", "no rows"),
        ("a.json", b'{"a": 1}', "must hold a list"),
        ("a.json", b"[1,", "not valid JSON"),
        ("a.json", b"[" * 100_000, "not valid JSON"),
        ("a.jsonl", b'"x"\n\n{"a', "not valid JSON"),
        ("a.jsonl", b"\xff\xfe", "not UTF-8"),
        ("a.csv", b"x", "not known by its name"),
        ("a", b"x", "not known by its name"),
    ],
)
def test_a_file_that_holds_no_rows_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """Each for its own reason."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_conversations(tmp_path / name)


def test_damage_is_named_by_its_line(tmp_path: Path) -> None:
    """As an editor counts."""
    (tmp_path / "a.jsonl").write_text('"x"\n\n{"a')
    with pytest.raises(DataError) as caught:
        read_conversations(tmp_path / "a.jsonl")
    assert str(caught.value.where).endswith("line 3")


def test_a_missing_file_is_a_data_error(tmp_path: Path) -> None:
    """And a directory."""
    for place in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            read_conversations(place)


def test_a_conversation_knows_its_prompt_question_and_answer() -> None:
    """The last turn is the answer where it is the assistant's."""
    talk = row(3, "one", "1", "two", "2")
    assert (talk.question, talk.answer, len(talk.prompt)) == ("two", "2", 3)
    asked = row(4, "one", "1", "two")
    assert (asked.question, asked.answer, len(asked.prompt)) == ("two", None, 3)
    assert Conversation(id="x", messages=(Message(role="system", content="s"),)).question == ""


def test_built_in_prompts_are_questions_with_names_of_their_own() -> None:
    """In more than one script."""
    prompts = built_in_prompts()
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    assert all(prompt.answer is None and prompt.question for prompt in prompts)
    assert {prompt.question.isascii() for prompt in prompts} == {True, False}


def test_built_in_prompts_ask_in_english_in_chinese_and_for_code() -> None:
    """A tuning may have changed one of them alone; the first three are one of each."""
    asked = [prompt.question for prompt in built_in_prompts()]
    kinds = ["code" if "Python" in text or "SQL" in text else "en" if text.isascii() else "zh" for text in asked]
    assert sorted(kinds[:3]) == ["code", "en", "zh"]
    assert [kinds.count(kind) for kind in ("en", "zh", "code")] == [3, 3, 2]


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
