"""``tunesmith gguf``: written and proved in one command, or an older file checked; what it prints and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("gguf", reason="needs gguf (the extra gguf)")

import tunesmith as ts
from tests.export.gguf.test_gguf_writing import COPIES, script
from tests.verify.gguf.drafts import build_model, draft_of
from tunesmith.cli.app import app

STATIC = ["--level", "structure", "--level", "assets", "--level", "weights"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return build_model(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


def test_a_file_is_written_and_proved(tmp_path: Path, model: Path) -> None:
    """One command, exit 0, the verdict and what to type next."""
    path = script(tmp_path / "llama.cpp", COPIES)
    draft_of(model, "llama").write(path.parent / "ready.gguf")
    words = ["gguf", str(model), "--out", str(tmp_path / "model.gguf"), "--converter", str(path), *STATIC]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    assert "Identical" in found.output
    assert "llama-cli -m" in found.output


def test_a_wrong_file_is_exit_3(tmp_path: Path, model: Path) -> None:
    """With its reason, in words and in JSON."""
    draft = draft_of(model, "llama")
    draft.fields["llama.rope.freq_base"] = 500000.0
    wrong = draft.write(tmp_path / "wrong.gguf")
    found = CliRunner().invoke(app, ["gguf", str(model), "--check", str(wrong), *STATIC])
    assert found.exit_code == 3
    assert "rope.freq_base" in found.output
    found = CliRunner().invoke(app, ["gguf", str(model), "--check", str(wrong), *STATIC, "--json"])
    assert found.exit_code == 3
    outcome = ts.GgufOutcome.model_validate_json(found.stdout)
    assert outcome.export is None
    assert outcome.verdict is not None
    assert outcome.verdict.answer == "different"


def test_no_verify_only_writes(tmp_path: Path, model: Path) -> None:
    """The record alone."""
    path = script(tmp_path / "llama.cpp", COPIES)
    draft_of(model, "llama").write(path.parent / "ready.gguf")
    words = [
        "gguf",
        str(model),
        "--out",
        str(tmp_path / "model.gguf"),
        "--converter",
        str(path),
        "--no-verify",
        "--json",
    ]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    assert told["verdict"] is None
    assert told["export"]["type"] == "bf16"


def test_either_out_or_check(model: Path) -> None:
    """Neither and both are an error that names the two."""
    for words in ([], ["--out", "a.gguf", "--check", "b.gguf"]):
        found = CliRunner().invoke(app, ["gguf", str(model), *words])
        assert isinstance(found.exception, ts.TunesmithError)


def test_a_modelfile_is_written_beside(tmp_path: Path, model: Path) -> None:
    """For Ollama: it names the file, and the commands are told."""
    path = script(tmp_path / "llama.cpp", COPIES)
    draft_of(model, "llama").write(path.parent / "ready.gguf")
    out = tmp_path / "model.gguf"
    words = ["gguf", str(model), "--out", str(out), "--converter", str(path), "--no-verify", "--ollama"]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    assert "FROM ./model.gguf" in (tmp_path / "Modelfile").read_text(encoding="utf-8")
    assert "ollama create" in found.output


def test_verify_takes_a_gguf_file_too(tmp_path: Path, model: Path) -> None:
    """The model's directory and the file: exit 0, or 3 where it is another; as a line, as JSON, and as a file."""
    right = draft_of(model, "llama").write(tmp_path / "right.gguf")
    found = CliRunner().invoke(app, ["verify", str(model), str(right), *STATIC])
    assert found.exit_code == 0, found.output
    assert "Identical" in found.output
    draft = draft_of(model, "llama")
    draft.fields["llama.rope.freq_base"] = 500000.0
    wrong = draft.write(tmp_path / "wrong.gguf")
    words = ["verify", str(model), str(wrong), *STATIC]
    found = CliRunner().invoke(app, [*words, "--json", "--out", str(tmp_path / "verdict.json")])
    assert found.exit_code == 3
    verdict = ts.GgufVerdict.model_validate_json(found.stdout)
    assert verdict.answer == "different"
    assert ts.GgufVerdict.model_validate_json((tmp_path / "verdict.json").read_text("utf-8")) == verdict
    found = CliRunner().invoke(app, [*words, "--quiet"])
    assert found.exit_code == 3
    assert len(found.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--level", "colour"], "no such level"),
        (["--sample"], "no meaning for a GGUF file"),
        (["--dtype", "auto"], "no meaning for a GGUF file"),
    ],
)
def test_what_has_no_meaning_for_a_gguf_file_is_said(tmp_path: Path, model: Path, words: list[str], what: str) -> None:
    """Levels and options of other proofs are errors, not passed over."""
    file = draft_of(model, "llama").write(tmp_path / "model.gguf")
    found = CliRunner().invoke(app, ["verify", str(model), str(file), *words])
    assert isinstance(found.exception, ts.TunesmithError)
    assert what in found.exception.what


def test_a_gguf_file_alone_and_its_option_elsewhere_are_errors(tmp_path: Path, model: Path) -> None:
    """It is held against something; and only it has a base in GGUF."""
    file = draft_of(model, "llama").write(tmp_path / "model.gguf")
    found = CliRunner().invoke(app, ["verify", str(file)])
    assert isinstance(found.exception, ts.TunesmithError)
    assert "DIR FILE.gguf" in str(found.exception.expected)
    found = CliRunner().invoke(app, ["verify", str(model), str(model), "--base-gguf", str(file)])
    assert isinstance(found.exception, ts.TunesmithError)
    assert "GGUF file only" in found.exception.what


@pytest.mark.parametrize("lang", ts.LANGUAGES)
def test_every_finding_has_a_text(lang: str) -> None:
    """Whatever the rooms of GGUF state can be read in both languages."""
    import re

    import tunesmith

    folder = Path(tunesmith.__file__).parent
    sources = [*(folder / "verify" / "gguf").glob("*.py"), *(folder / "api").glob("gguf.py")]
    codes = {code for file in sources for code in re.findall(r'"(gguf_\w+)"', file.read_text("utf-8"))}
    causes = {f"gguf_cause_{one}" for one in ("not_permuted", "norm_without_one", "norm_with_one", "not_finite")}
    assert len(codes) > 40
    there = ts.templates(lang)
    assert [code for code in sorted(codes | causes | {"gguf_cause_of_another"}) if f"finding.{code}" not in there] == []
