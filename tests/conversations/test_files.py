"""Files of rows: every format is read, every bad row is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_models import row
from tunesmith.conversations import Conversation, Message, built_in_prompts, read_conversations, with_system
from tunesmith.errors import DataError


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
    ({"instruction": "", "input": "", "output": "a"}, [("user", ""), A]),
    ({"instruction": "q", "output": "a", "history": [["q0", "a0"]]}, [("user", "q0"), ("assistant", "a0"), U, A]),
    ({"instruction": "q", "output": "a", "history": [], "system": "s"}, [S, U, A]),
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
    {"instruction": "q", "history": "before"},
    {"instruction": "q", "history": [["q0"]]},
    {"instruction": "q", "history": [["q0", 3]]},
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
        ("a.csv", b"instruction,output", "no rows"),
        ("a.csv", b'instruction\n"open', "not valid CSV"),
        ("a.json", b'"x"\n{"a', "not valid JSON"),
        ("a.parquet", b"PAR1", "as Parquet"),
        ("a.arrow", b"ARROW1", "as Arrow"),
        ("a.tsv", b"x", "not known by its name"),
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


ALPACA = [
    {"instruction": "q", "input": 'more, "quoted"', "output": "a\nb"},
    {"instruction": "q2", "input": None, "output": "NA"},
]
ALPACA_TURNS = [[("user", 'q\nmore, "quoted"'), ("assistant", "a\nb")], [("user", "q2"), ("assistant", "NA")]]


def test_a_json_file_may_hold_a_row_a_line(tmp_path: Path) -> None:
    """Many files of that name do."""
    (tmp_path / "a.json").write_text("".join(json.dumps(one) + "\n" for one in ALPACA))
    assert [turns(found) for found in read_conversations(tmp_path / "a.json")] == ALPACA_TURNS


def test_csv_is_read_as_text_whatever_it_looks_like(tmp_path: Path) -> None:
    """A data-frame library would take ``NA`` for nothing, and an answer of digits for a number."""
    (tmp_path / "a.csv").write_text('instruction,input,output\nq,"more, ""quoted""","a\nb"\nq2,,NA\nq3,,42\n')
    found = [turns(one) for one in read_conversations(tmp_path / "a.csv")]
    assert found == [*ALPACA_TURNS, [("user", "q3"), ("assistant", "42")]]


@pytest.mark.parametrize("kind", ["parquet", "arrow stream", "arrow file"])
def test_tables_are_read_like_json(tmp_path: Path, kind: str) -> None:
    """Parquet, and both forms of Arrow."""
    table, file = pyarrow.Table.from_pylist(ALPACA), tmp_path / f"a.{kind.split()[0]}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        begin = pyarrow.ipc.new_stream if kind == "arrow stream" else pyarrow.ipc.new_file
        with pyarrow.OSFile(str(file), "wb") as sink, begin(sink, table.schema) as writer:
            writer.write_table(table)
    assert [turns(found) for found in read_conversations(file)] == ALPACA_TURNS


def test_a_system_text_is_added_where_there_is_none() -> None:
    """A row's own is left alone; an empty one counts as none, as in LLaMA-Factory."""
    bare, own, empty = row(0, "q", "a"), row(1, "q", "a"), row(2, "q", "a")
    own = own.model_copy(update={"messages": (Message(role="system", content="mine"), *own.messages)})
    empty = empty.model_copy(update={"messages": (Message(role="system", content=""), *empty.messages)})
    assert [turns(with_system(one, "s"))[0] for one in (bare, own, empty)] == [S, ("system", "mine"), S]
    assert [len(with_system(one, "s").messages) for one in (bare, own, empty)] == [3, 3, 3]
