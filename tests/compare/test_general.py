"""What ships to measure damage with: every passage and task is there once, long enough, and in its own language."""

from __future__ import annotations

import ast
import json
import re
from importlib import resources

import pytest

from tunesmith.compare.faults import faults_of
from tunesmith.compare.general import LANGUAGES, built_in_set, general_instructions, general_texts
from tunesmith.conversations import Conversation, built_in_prompts
from tunesmith.errors import DataError

HAN = re.compile("[\u4e00-\u9fff]")


def han_share(text: str) -> float:
    """How much of a text's letters and characters are Chinese."""
    return len(HAN.findall(text)) / max(1, sum(map(str.isalpha, text)))


@pytest.mark.parametrize("language", LANGUAGES)
def test_there_are_texts_enough_for_an_interval_and_none_is_there_twice(language: str) -> None:
    """Intervals are of passages; a pair of equal ones would count as two."""
    texts = general_texts(language)
    assert [text.id for text in texts] == [f"{language}-{number:02d}" for number in range(1, 25)]
    assert len({text.text[:40] for text in texts}) == len(texts)


def test_texts_are_passages_of_alike_length() -> None:
    """A mean over passages is then one over tokens, nearly: 60 to 120 tokens of a tokenizer made for the language."""
    assert all(60 <= len(text.text.split()) <= 90 for text in general_texts("en"))
    assert all(100 <= len(text.text) <= 170 for text in general_texts("zh"))
    assert all(170 <= len(text.text) <= 450 for text in general_texts("code"))


def test_texts_are_in_their_language() -> None:
    """A model that lost one of them must not be seen through another."""
    assert all(han_share(text.text) == 0 for text in general_texts("en"))
    assert all(han_share(text.text) > 0.99 for text in general_texts("zh"))
    assert sum(han_share(text.text) > 0 for text in general_texts("code")) == 1  # one with Chinese names


def test_texts_are_plain_prose_without_dates_or_repetition() -> None:
    """Nothing that ages, nothing that is learned by heart within the text, no stray space."""
    for language in ("en", "zh"):
        for text in general_texts(language):
            assert not re.search(r"[0-9]|\s\s|[A-Z]{2,}|https?:", text.text), text.id
            assert text.text == text.text.strip()
            assert not faults_of("", text.text, "eos").repeats


def test_python_texts_are_programs() -> None:
    """Code that no interpreter takes would measure something else."""
    programs = [text for text in general_texts("code") if re.match(r"def |from |import |# 读", text.text)]
    assert len(programs) == 5
    for program in programs:
        ast.parse(program.text)


@pytest.mark.parametrize("language", LANGUAGES)
def test_instructions_are_tasks_with_names_of_their_own(language: str) -> None:
    """Twenty a language; the first three ask for texts, so that what is shown by default shows something."""
    tasks = general_instructions(language)
    assert [task.id for task in tasks] == [f"general-{language}-{number:02d}" for number in range(1, 21)]
    assert len({task.question for task in tasks}) == len(tasks)
    assert all(len(task.prompt) == 1 for task in tasks)
    assert all(task.answer is None for task in tasks[:2])


def test_an_expected_answer_is_the_one_form_that_the_task_allows() -> None:
    """Its task says so; some of these answers can be worked out here."""
    answered = {task.id: task for language in LANGUAGES for task in general_instructions(language) if task.answer}
    assert len(answered) >= 15
    narrow = re.compile(r"only|one word|one line|只|Convert|comprehension")
    assert [task.id for task in answered.values() if not narrow.search(task.question)] == []
    assert answered["general-en-10"].answer == f"{180 / 2.25:.0f}"
    assert answered["general-en-13"].answer == ", ".join(sorted(["pear", "apple", "plum", "cherry"]))
    assert [n for n in range(9) if 4 * n + 2 * (8 - n) == 26] == [int(answered["general-zh-10"].answer or "")]
    assert answered["general-zh-13"].answer == "、".join(map(str, sorted([17, 3, 25, 8])))
    assert answered["general-code-03"].answer == str([x * x for x in range(4)])
    assert answered["general-code-17"].answer == "abc"[::-1]
    for name in ("general-en-09", "general-zh-09"):
        assert len(json.loads(answered[name].answer or "")) == 3


def test_expected_answers_have_no_fault() -> None:
    """Else a perfect model would be said to be damaged."""
    for language in LANGUAGES:
        for task in general_instructions(language):
            if task.answer is not None:
                assert not any(dict(faults_of(task.question, task.answer, "eos")).values()), task.id


def test_a_set_has_a_name() -> None:
    """One language, or all in turn so that the first few are of each; anything else is a file's name."""
    assert built_in_set("general-zh") == general_instructions("zh")
    every = built_in_set("general")
    assert every is not None
    assert [task.id for task in every[:4]] == ["general-en-01", "general-zh-01", "general-code-01", "general-en-02"]
    assert sorted(task.id for task in every) == sorted(
        task.id for language in LANGUAGES for task in general_instructions(language)
    )
    for name in (
        "",
        "general-",
        "general-fr",
        "generally",
        "en",
        "prompts.jsonl",
        "general.jsonl",
        "general-general-en",
    ):
        assert built_in_set(name) is None


def test_an_unknown_language_is_refused_by_its_name() -> None:
    """And says which there are."""
    for read in (general_texts, general_instructions):
        with pytest.raises(DataError, match="language") as caught:
            read("fr")
        assert caught.value.found == "'fr'"
        assert caught.value.expected == "en, zh, code"


def test_the_built_in_prompts_are_the_first_of_these_without_answers() -> None:
    """One store of prompts; a run without held-out rows is shown what the general set shows."""
    every = built_in_set("general")
    assert every is not None
    assert built_in_prompts() == tuple(Conversation(id=task.id, messages=task.prompt) for task in every[:8])


def test_files_are_read_as_rows_of_the_messages_format() -> None:
    """They can be given to any other tool as they are."""
    for path in resources.files("tunesmith.compare.general").iterdir():
        if path.name.endswith(".jsonl"):
            rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            kind = "messages" if path.name.startswith("instructions") else "text"
            assert all(row.keys() == {"id", kind} for row in rows)
