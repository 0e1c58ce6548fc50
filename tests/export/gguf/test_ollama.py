"""Modelfiles: what stands in them, what Ollama makes of it, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.export.gguf.chat_families import BEYOND, FAMILIES
from tests.export.gguf.modelfiles import read_modelfile
from tests.tiny_models import TEMPLATE, TinyRun, build_tokenizer, chat
from tunesmith.conversations import encode_prompt
from tunesmith.errors import CheckpointError, DataError
from tunesmith.export.gguf.go_chat import probe_conversations
from tunesmith.export.gguf.go_template import collate, parse
from tunesmith.export.gguf.ollama import Modelfile, modelfile_of, try_ollama
from tunesmith.record import Finding
from tunesmith.report import LANGUAGES, finding_text

BEGIN = "<|begin|>"


def model(folder: Path, template: str | None = TEMPLATE, *, adds: bool | None = None, **files: Any) -> Path:
    """What a Modelfile is written from; ``adds``: a beginning token, and whether it comes by itself."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    if adds is not None:
        tokenizer.add_special_tokens({"bos_token": BEGIN})
    if adds:
        pair = (BEGIN, tokenizer.convert_tokens_to_ids(BEGIN))
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[pair])
    tokenizer.save_pretrained(folder)
    contents = {"config": {"max_position_embeddings": 512}, **files}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def commands(made: Modelfile) -> dict[str, list[str]]:
    """Values by command, as Ollama reads them."""
    read: dict[str, list[str]] = {}
    for name, value in read_modelfile(made.text):
        read.setdefault(name, []).append(value)
    return read


def codes(made: Modelfile) -> set[str]:
    """The findings' codes."""
    return {finding.code for finding in made.findings}


def test_a_modelfile_of_a_merged_model_says_all_that_ollama_needs(tiny: TinyRun) -> None:
    """The file, the template, where answers end, and the model's window."""
    made = modelfile_of(tiny.merged, "tiny.gguf")
    assert commands(made) == {
        "model": ["./tiny.gguf"],
        "template": [made.template],
        "stop": ["<|im_end|>"],
        "num_ctx": ["512"],
    }
    assert made.commands == ("ollama create tiny -f Modelfile", "ollama run tiny")
    assert codes(made) == {"ollama_template_equal"}
    assert Modelfile.model_validate_json(made.to_json()) == made


@pytest.mark.parametrize("family", ["llama2", "gemma3"])
@pytest.mark.parametrize("adds", [True, False])
def test_llama_cpp_gets_the_token_ids_that_the_model_was_trained_on(family: str, adds: bool, tmp_path: Path) -> None:
    """One beginning token, whether llama.cpp adds it or the template writes it; every other id equal, too."""
    made = modelfile_of(model(tmp_path, FAMILIES[family], adds=adds), "m.gguf")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    read = parse(commands(made)["template"][0])
    for turns in list(probe_conversations())[:300:7]:
        merged = collate(turns)[1]
        if merged[-1].role != "user":
            continue
        try:
            wanted = encode_prompt(tokenizer, merged)
        except DataError:  # the chat template refuses these turns
            continue
        ids = tokenizer(read.render(turns))["input_ids"]
        assert ids == wanted
        assert ids[0] == tokenizer.bos_token_id
    assert "ollama_extra_bos" not in codes(made)


def test_the_gguf_files_word_on_the_beginning_token_counts(tmp_path: Path) -> None:
    """Where the file says otherwise than the tokenizer, the template follows the file."""
    folder = model(tmp_path, FAMILIES["llama3"], adds=True)
    assert BEGIN not in modelfile_of(folder, "m.gguf").template
    assert BEGIN in modelfile_of(folder, "m.gguf", adds_bos=False).template


def test_a_beginning_token_too_many_is_told(tmp_path: Path) -> None:
    """No template can take away what llama.cpp adds."""
    made = modelfile_of(model(tmp_path, adds=True), "m.gguf")
    assert "ollama_extra_bos" in codes(made)


@pytest.mark.parametrize("name", ["a b.gguf", ' "q".gguf', "~x.gguf", "#x.gguf", "模型.gguf", "-f.gguf", "a.gguf "])
def test_odd_file_names_come_through(name: str, tmp_path: Path) -> None:
    """As one path beside the Modelfile."""
    made = modelfile_of(model(tmp_path), name)
    assert commands(made)["model"] == [f"./{name}"]
    assert made.name[0].isalnum()


@pytest.mark.parametrize("name", ["", "a/b.gguf", "a\\b.gguf", "a\nb.gguf", "a\u3000b.gguf", "a\x00.gguf"])
def test_names_that_a_modelfile_loses_are_refused(name: str, tmp_path: Path) -> None:
    """Its reader drops what is not printed, and ends a value at a line break."""
    with pytest.raises(DataError, match="file name"):
        modelfile_of(model(tmp_path), name)


def test_an_adapter_stands_on_its_base(tmp_path: Path) -> None:
    """FROM the base model, ADAPTER the file."""
    made = modelfile_of(model(tmp_path), "my lora.gguf", base="llama3.2")
    read = commands(made)
    assert (read["model"], read["adapter"]) == (["llama3.2"], ["./my lora.gguf"])
    with pytest.raises(DataError, match="base model"):
        modelfile_of(tmp_path, "a.gguf", base="a\nSYSTEM x")


def test_settings_for_sampling_are_carried(tmp_path: Path) -> None:
    """Those that the model's author recommends, and no more; all end tokens but the one that the GGUF file names."""
    settings = {"temperature": 0.6, "top_k": 20, "top_p": None, "repetition_penalty": 1.05, "min_p": "x"}
    folder = model(tmp_path, generation_config={**settings, "eos_token_id": [0, 1, 2]})
    read = commands(modelfile_of(folder, "m.gguf"))
    assert (read["temperature"], read["top_k"], read["repeat_penalty"]) == (["0.6"], ["20"], ["1.05"])
    assert not {"top_p", "min_p"} & read.keys()
    assert read["stop"] == ["<|im_end|>", "<|im_start|>"]


def test_the_context_is_capped_and_said(tmp_path: Path) -> None:
    """Memory for it is taken at once; a nested config is read, too, and an unknown window is left to Ollama."""
    made = modelfile_of(model(tmp_path, config={"text_config": {"max_position_embeddings": 131072}}), "m.gguf")
    assert made.context_length == 8192
    assert "ollama_context_capped" in codes(made)
    assert modelfile_of(tmp_path, "m.gguf", most_context=200_000).context_length == 131072
    unknown = modelfile_of(model(tmp_path, config={}), "m.gguf")
    assert "num_ctx" not in commands(unknown)


def test_an_answer_that_ends_with_text_stops_at_that_text(tmp_path: Path) -> None:
    """A format without a token of its own for it."""
    template = (
        "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}{{ '### A:' }}"
    )
    assert modelfile_of(model(tmp_path, template), "m.gguf").stops == ("### user:",)


def test_a_licence_is_carried_or_said_to_be_missing(tmp_path: Path) -> None:
    """Whole, with its quotes and line breaks; what a Modelfile cannot hold is left out."""
    folder = model(tmp_path)
    text = 'Licence "as is".\n\n\tNo warranty.\n'
    (folder / "LICENSE").write_text(text, encoding="utf-8")
    assert commands(modelfile_of(folder, "m.gguf"))["license"] == [text]
    for unfit in ('a """ b', "x" * 70_000):
        (folder / "LICENSE").write_text(unfit, encoding="utf-8")
        made = modelfile_of(folder, "m.gguf")
        assert "license" not in commands(made)
        assert "ollama_license_left_out" in codes(made)


@pytest.mark.parametrize("name", sorted(BEYOND))
def test_no_modelfile_rather_than_a_wrong_one(name: str, tmp_path: Path) -> None:
    """With the reason, and what to do instead."""
    with pytest.raises(CheckpointError, match="cannot show") as caught:
        modelfile_of(model(tmp_path, BEYOND[name]), "m.gguf")
    assert "llama-server --jinja" in str(caught.value.next_step)


def test_without_a_chat_template_there_is_no_modelfile(tmp_path: Path) -> None:
    """As everywhere else, that is said."""
    with pytest.raises(DataError, match="no chat template"):
        modelfile_of(model(tmp_path, None), "m.gguf")


def test_every_finding_has_its_words() -> None:
    """In all languages, with the figures that it brings."""
    known: dict[str, dict[str, str | int]] = {
        "ollama_template_equal": {"conversations": 3},
        "ollama_refuses_system": {},
        "ollama_needs_version": {"version": "0.11.1"},
        "ollama_extra_bos": {"token": "<s>"},
        "ollama_context_capped": {"length": 8192, "window": 131072},
        "ollama_no_stop": {},
        "ollama_without_tools": {},
        "ollama_license_left_out": {"name": "LICENSE"},
    }
    source = Path(modelfile_of.__code__.co_filename).read_text(encoding="utf-8")
    for code, params in known.items():
        assert f'code="{code}"' in source
        for language in LANGUAGES:
            text = finding_text(Finding(code=code, severity="info", params=params), language)
            assert all(str(value) in text.replace(",", "") for value in params.values())


FAKE = r"""#!/bin/sh
echo "$@" >> "$(dirname "$0")/asked"
case "$1" in
  create) [ -f Modelfile ] || { echo "no Modelfile" >&2; exit 1; } ;;
  show) cat "$(dirname "$0")/template"; echo ;;
esac
"""


def fake_ollama(folder: Path, monkeypatch: pytest.MonkeyPatch, template: str) -> Path:
    """A program on PATH that writes down what it is asked."""
    folder.mkdir()
    (folder / "ollama").write_text(FAKE, encoding="utf-8")
    (folder / "ollama").chmod(0o755)
    (folder / "template").write_text(template, encoding="utf-8")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder / "asked"


def test_ollama_is_tried_under_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Created, read back, removed; a template that it changed, or a Modelfile that it refuses, is said."""
    made = modelfile_of(model(tmp_path / "m"), "m.gguf")
    asked = fake_ollama(tmp_path / "bin", monkeypatch, made.template)
    refused = try_ollama(tmp_path / "m", made)
    assert refused is not None
    assert (refused.created, refused.template_equal, refused.said) == (False, None, "no Modelfile")
    (tmp_path / "m" / "Modelfile").write_text(made.text, encoding="utf-8")
    trial = try_ollama(tmp_path / "m", made)
    assert trial is not None
    assert (trial.created, trial.template_equal) == (True, True)
    _, create, show, remove = asked.read_text(encoding="utf-8").splitlines()
    name = create.split()[1]
    assert name.startswith("tunesmith-try-")
    assert (create, show, remove) == (f"create {name} -f Modelfile", f"show --template {name}", f"rm {name}")
    (tmp_path / "bin" / "template").write_text("{{ .Prompt }}", encoding="utf-8")
    changed = try_ollama(tmp_path / "m", made)
    assert changed is not None
    assert changed.template_equal is False


def test_without_ollama_nothing_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No program, no trial, no error."""
    made = modelfile_of(model(tmp_path / "m"), "m.gguf")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("ollama") is None
    assert try_ollama(tmp_path / "m", made) is None


def test_a_conversation_in_ollama_is_the_one_in_transformers(tiny: TinyRun) -> None:
    """The whole way: the Modelfile is read back, its template carried out, and the text is the chat template's."""
    read = dict(read_modelfile(modelfile_of(tiny.merged, "m.gguf").text))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny.merged)
    turns = chat("q {{ .Content }}", 'a """', "q")
    text = parse(read["template"]).render(turns)
    assert tokenizer(text)["input_ids"] == encode_prompt(tokenizer, turns)
