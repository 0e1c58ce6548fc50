"""Chat templates said in Go: which can be, that they show the same, and that no other is written."""

from __future__ import annotations

from datetime import date

import pytest

from tests.conversations.test_templates import tokenizer_of_all
from tests.export.gguf.chat_families import BEYOND, FAMILIES
from tests.export.gguf.shows import shown
from tests.tiny_models import chat
from tunesmith.conversations import Message, chat_template_of, template_names
from tunesmith.export.gguf import go_chat as guesses
from tunesmith.export.gguf.go_chat import Refused, go_chat, probe_conversations
from tunesmith.export.gguf.go_pieces import on_day
from tunesmith.export.gguf.go_template import GoTemplateError, collate, parse

BEGIN = "<s>"
SOME = template_names()[::15]


def prompt(template: str, turns: tuple[Message, ...]) -> str | None:
    """What the chat template shows before an answer, or before the rest of one; None where it refuses."""
    merged = collate(turns)[1]
    held = merged.pop().content if merged[-1].role == "assistant" else ""
    try:
        return shown(template)(merged, True) + held
    except Refused:
        return None


def differing(template: str, source: str) -> list[tuple[Message, ...]]:
    """Conversations of which the Go template shows something else, checked apart from the code under test."""
    day, read, wrong = date(2027, 9, 30), parse(source), []
    for turns in probe_conversations():
        wanted = prompt(template, turns)
        try:
            given = read.render(turns, today=day)
        except GoTemplateError:
            given = None
        if wanted is not None and given != on_day(day, wanted.removeprefix(BEGIN)):
            wrong.append(turns)
    return wrong


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_families_are_said_in_go(name: str) -> None:
    """Equal on every conversation, with the beginning token left to llama.cpp."""
    template = FAMILIES[name]
    found = go_chat(shown(template), template=template, added=BEGIN)
    assert found.source is not None
    assert found.conversations > 250
    assert differing(template, found.source) == []


@pytest.mark.parametrize("name", SOME)
def test_some_named_templates_are_said_in_go(name: str) -> None:
    """A sample of them; the slow suite has all."""
    template = chat_template_of(name, tokenizer_of_all())
    assert go_chat(shown(template), template=template, added=BEGIN).source is not None


@pytest.mark.slow
@pytest.mark.parametrize("added", [BEGIN, ""])
@pytest.mark.parametrize("thinking", [True, False])
def test_all_named_templates_are_said_in_go(thinking: bool, added: str) -> None:
    """Whoever writes the beginning token, and whether answers hold thoughts or not."""
    tokenizer, lacking = tokenizer_of_all(), []
    for name in template_names():
        template = chat_template_of(name, tokenizer, thinking=thinking)
        if go_chat(shown(template), template=template, added=added).source is None:
            lacking.append(name)
    assert lacking == []


@pytest.mark.parametrize("name", sorted(BEYOND))
def test_what_go_cannot_say_is_not_said(name: str) -> None:
    """No source, rather than one that is nearly right."""
    assert go_chat(shown(BEYOND[name]), template=BEYOND[name], added=BEGIN).source is None


def test_a_difference_is_told_with_its_conversation() -> None:
    """The nearest guess's first, so that a person sees what Ollama would have been sent."""
    template = BEYOND["leaves out"]
    found = go_chat(shown(template), template=template)
    assert found.roles == ("system", "user", "assistant", "user")
    assert found.wants is not None
    assert found.gives is not None
    assert found.gives.endswith(found.wants)


def test_a_refused_system_text_stays_refused() -> None:
    """Ollama answers with an error that says why, where the chat template raises one."""
    template = FAMILIES["gemma, gemma2"]
    found = go_chat(shown(template), template=template, added=BEGIN)
    assert found.refuses_system
    assert found.source is not None
    with pytest.raises(GoTemplateError):
        parse(found.source).render((Message(role="system", content="s"), *chat("q")))
    assert "takes no system text" in found.source


def test_todays_date_is_said_by_ollama() -> None:
    """Not the day on which the Modelfile was written."""
    template = FAMILIES["llama3.2"]
    found = go_chat(shown(template), template=template, added=BEGIN)
    assert found.dated
    assert found.source is not None
    for day, words in ((date(2026, 5, 3), "03 May 2026"), (date(2030, 12, 31), "31 Dec 2030")):
        assert f"Today Date: {words}\n" in parse(found.source).render(chat("q"), today=day)


def test_texts_that_go_or_a_modelfile_would_take_for_their_own_are_strings() -> None:
    """Braces, quotes, and characters that a Modelfile's reader drops."""
    odd = '{{ x }} """ \u3000\u200b\u2028 "'
    template = "{% for m in messages %}{{ " + repr(odd) + " + m['role'] + m['content'] }}{% endfor %}{{ 'A:' }}"
    found = go_chat(shown(template), template=template)
    assert found.source is not None
    assert '"""' not in found.source
    assert all(letter.isprintable() or letter == "\n" for letter in found.source)
    assert differing(template, found.source) == []


def test_a_wrong_guess_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: were blanks never taken away, Llama 3's template would be refused rather than written so."""
    monkeypatch.setattr(guesses, "_edits", lambda *_: ())
    template = FAMILIES["llama3"]
    found = go_chat(shown(template), template=template, added=BEGIN)
    assert found.source is None
    assert found.wants != found.gives


def test_probes_hold_what_templates_trip_over() -> None:
    """Every order of turns that Ollama may send, and each of these texts in every role."""
    conversations = list(probe_conversations())
    orders = {"".join(turn.role[0] for turn in turns) for turns in conversations}
    assert {"u", "su", "uau", "suau", "ua", "uu", "ssu", "uasu", "au", "sau"} <= orders
    for words in ("", "\u3000", "{{ .Content }}", '"""', "</think>", "  \n"):
        for role in ("system", "user", "assistant"):
            assert any(words in turn.content for turns in conversations for turn in turns if turn.role == role)
