"""What a person can get wrong: one clear message, exit 2, nothing left behind and no input touched."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest

import tunesmith as ts
from tests.cli.conftest import Cli, Result, tree
from tests.tiny_models import TinyRun, build_base, edit_json
from tunesmith.cli.chat import _questions


def refused(done: Result, *words: str) -> None:
    """Assert one message that holds all the words, no data, no traceback, exit 2."""
    assert done.code == 2, done.out + done.err
    assert done.out == ""
    assert done.err.count("Error: ") == 1
    assert "Traceback" not in done.err
    missing = [word for word in words if word not in done.err]
    assert not missing, f"{missing} not in: {done.err}"


def truncate(path: Path, by: int = 100) -> None:
    """Cut the end off a file."""
    path.write_bytes(path.read_bytes()[:-by])


def test_run_that_is_not_there(cli: Cli, tmp_path: Path) -> None:
    """The path is named, and what was expected there."""
    refused(cli("inspect", tmp_path / "nope", fresh=True), "not there", str(tmp_path / "nope"), "expected:")


def test_run_that_is_a_file(cli: Cli, tmp_path: Path) -> None:
    """A file in place of a directory is called one."""
    (tmp_path / "run").write_text("x")
    refused(cli("merge", tmp_path / "run", "--out", tmp_path / "out"), "is a file")
    assert list(tree(tmp_path)) == ["run"]


def test_directory_that_holds_no_adapter(cli: Cli, tiny: TinyRun, tmp_path: Path) -> None:
    """A base model in place of a run."""
    refused(cli("inspect", tiny.base), "where:")
    refused(cli("inspect", tmp_path), "where:")


def test_json_error_is_one_document(cli: Cli, tmp_path: Path) -> None:
    """With --json the error is data too: what, where, expected, found, next."""
    done = cli("inspect", tmp_path / "nope", "--json")
    document = json.loads(done.out)
    assert done.code == 2
    assert document["schema_version"] == 1
    assert document["error"] == "RunError"
    assert document["where"] == str(tmp_path / "nope")


@pytest.mark.parametrize("verb", ["merge", "verify"])
def test_base_of_another_shape(cli: Cli, run_dir: Path, tiny: TinyRun, tmp_path: Path, verb: str) -> None:
    """All mismatches are listed with both shapes, before anything is written."""
    other = tmp_path / "other"
    build_base(other, hidden_size=32)
    before = tree(tmp_path)
    arguments = {"merge": ["--out", tmp_path / "out"], "verify": [tiny.merged]}[verb]
    done = cli(verb, run_dir, *arguments, "--base", other)
    refused(done, "q_proj", "64", "32")
    assert tree(tmp_path) == before


def test_base_that_is_not_there(cli: Cli, run_dir: Path, tmp_path: Path) -> None:
    """Neither a directory nor a hub id in the cache."""
    refused(cli("merge", run_dir, "--out", tmp_path / "out", "--base", "no/such-model"), "no/such-model", "next:")
    refused(cli("merge", run_dir, "--out", tmp_path / "out", "--base", "/no/such/dir"), "/no/such/dir", "next:")
    assert tree(tmp_path) == {}


def test_truncated_adapter(cli: Cli, own_run: Path, tmp_path: Path) -> None:
    """Nothing is merged of it, and inspect shows the rest of the run and what is wrong with it."""
    truncate(own_run / "adapter_model.safetensors")
    before = tree(tmp_path)
    refused(cli("merge", own_run, "--out", tmp_path / "out"), "adapter_model.safetensors")
    assert tree(tmp_path) == before
    shown = cli("inspect", own_run)
    assert shown.code == 0
    assert "cannot be read" in shown.out
    assert str(own_run / "adapter_model.safetensors") in shown.out


def test_truncated_base(cli: Cli, run_dir: Path, own_base: Path, tmp_path: Path) -> None:
    """The base's file is named, and nothing is written."""
    truncate(own_base / "model.safetensors")
    before = tree(tmp_path)
    refused(cli("merge", run_dir, "--out", tmp_path / "out", "--base", own_base), "model.safetensors")
    assert tree(tmp_path) == before


def test_adapter_config_that_is_no_json(cli: Cli, own_run: Path, tmp_path: Path) -> None:
    """The file is named."""
    (own_run / "adapter_config.json").write_text('{"r": 8,')
    refused(cli("merge", own_run, "--out", tmp_path / "out"), "adapter_config.json")
    shown = cli("inspect", own_run)
    assert shown.code == 0
    assert "`adapter_config.json` breaks off" in shown.out


@pytest.mark.parametrize(
    ("change", "word"),
    [({"peft_type": "IA3"}, "IA3"), ({"use_qalora": True}, "QALoRA"), ({"init_lora_weights": "pissa"}, "pissa")],
    ids=["ia3", "qalora", "pissa"],
)
def test_adapter_that_cannot_be_merged_truly(
    cli: Cli, own_run: Path, tmp_path: Path, change: dict[str, object], word: str
) -> None:
    """Refused with the reason rather than merged in part; inspect still shows it, with the same reason."""
    edit_json(own_run / "adapter_config.json", **change)
    before = tree(tmp_path)
    refused(cli("merge", own_run, "--out", tmp_path / "out"), word)
    shown = cli("inspect", own_run)
    assert shown.code == 0, shown.err
    assert "not mergeable" in shown.out
    assert "Next:" not in shown.out
    assert tree(tmp_path) == before


def test_out_that_would_cost_something(cli: Cli, own_run: Path, own_base: Path, tmp_path: Path) -> None:
    """Not empty, a file, inside the run, the base itself, or above both."""
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").write_text("x")
    before = tree(tmp_path)
    merge = ("merge", own_run, "--base", own_base, "--out")
    refused(cli(*merge, full), "not empty", "--force")
    refused(cli(*merge, full / "precious"), "is a file")
    refused(cli(*merge, own_run / "merged"), "overlaps the run")
    refused(cli(*merge, own_base, "--force"), "overlaps the base model")
    refused(cli(*merge, tmp_path, "--force"), "overlaps")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("verb", ["inspect", "merge", "chat"])
def test_unknown_checkpoint(cli: Cli, run_dir: Path, tmp_path: Path, verb: str) -> None:
    """Those that are there are named."""
    more = {"merge": ["--out", tmp_path / "out"], "chat": ["--prompt", "x"]}.get(verb, [])
    refused(cli(verb, run_dir, "--checkpoint", "999", *more), "999", "checkpoint-10")


def test_unknown_variant(cli: Cli, run_dir: Path) -> None:
    """Found before any model is loaded."""
    done = cli("compare", run_dir, "--variants", "base,nope")
    refused(done, "nope", "checkpoint-10")
    assert "load" not in done.err
    refused(cli("compare", run_dir, "--variants", " , "), "variant")


def test_unknown_level_and_dtype(cli: Cli, run_dir: Path, tiny: TinyRun) -> None:
    """The known ones are listed."""
    verify = ("verify", run_dir, tiny.merged, "--level")
    refused(cli(*verify, "vibes"), "vibes", "structure, assets, weights, behaviour")
    refused(cli(*verify, "weights", "--dtype", "fp8"), "fp8", "fp32")


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "RUN", "--out", "x.docx"],
        ["compare", "RUN", "--out", "no/such/folder/x.json"],
        ["merge", "RUN", "--out", "merged", "--record", "x.txt"],
        ["verify", "RUN", "MERGED", "--out", "x.html"],
        ["report", "RUN", "--out", "x.pdf"],
        ["report", "RUN", "--comparison", "missing.json"],
        ["report", "RUN", "--verdict", "RUN/adapter_config.json"],
    ],
    ids=" ".join,
)
def test_file_that_cannot_be_written_or_read_is_found_first(
    cli: Cli, run_dir: Path, tiny: TinyRun, tmp_path: Path, arguments: list[str]
) -> None:
    """Before any work is done for it: nothing is loaded, nothing is merged."""
    words = [word.replace("RUN", str(run_dir)).replace("MERGED", str(tiny.merged)) for word in arguments]
    done = cli(*words, cwd=tmp_path)
    refused(done, "where:")
    assert "..." not in done.err
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"lora_rnak": 8}, ["lora_rnak", "lora_rank"]),
        ({"lora_rank": "many"}, ["lora_rank", "many"]),
        ({"learning_rate": -1, "max_steps": "x"}, ["learning_rate", "max_steps"]),
    ],
    ids=["unknown", "wrong type", "several"],
)
def test_recipe_with_bad_keys(
    cli: Cli, tiny: TinyRun, tmp_path: Path, keys: dict[str, object], words: list[str]
) -> None:
    """Every bad key is named, with the nearest known one; no run directory is made."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps({"model_name_or_path": str(tiny.base), "dataset": "x.jsonl", "output_dir": "out", **keys})
    )
    refused(cli("train", recipe, cwd=tmp_path), *words)
    assert list(tree(tmp_path)) == ["recipe.yaml"]


def test_recipe_that_is_missing_or_no_yaml(cli: Cli, tmp_path: Path) -> None:
    """The file is named."""
    refused(cli("train", tmp_path / "nope.yaml"), "nope.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1,\n")
    refused(cli("train", tmp_path / "bad.yaml"), "bad.yaml")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.txt", None, ["missing.txt"]),
        ("latin.txt", "Qu\xe9?".encode("latin-1"), ["UTF-8", "latin.txt"]),
        ("bad.json", b'[{"instruction": "x"', ["JSON", "bad.json"]),
        ("bad.jsonl", b'{"instruction": "x"}\nnope\n', ["JSON", "line 2"]),
        ("empty.txt", b"", ["empty.txt"]),
    ],
    ids=["missing", "not UTF-8", "bad JSON", "bad JSON line", "empty"],
)
def test_prompts_that_cannot_be_read(
    cli: Cli, run_dir: Path, tmp_path: Path, name: str, content: bytes | None, words: list[str]
) -> None:
    """File and line are named, before any model is loaded."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = cli("compare", run_dir, "--prompts", tmp_path / name)
    refused(done, *words)
    assert "load" not in done.err


def test_question_that_is_not_utf8(cli: Cli, run_dir: Path) -> None:
    """Found before any model is loaded."""
    done = cli("chat", run_dir, "--prompt", os.fsdecode(b"caf\xe9?"))
    refused(done, "UTF-8", "caf")
    assert "load" not in done.err


def test_piped_questions_that_are_not_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe of other bytes is refused where they begin; the questions before them are asked."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Fine?\ncaf\xe9?\n")))
    questions = _questions(None, "final")
    assert next(questions) == "Fine?"
    with pytest.raises(ts.TunesmithError, match="not UTF-8"):
        next(questions)


def test_demo_into_a_directory_that_holds_something_else(cli: Cli, tmp_path: Path) -> None:
    """The demo replaces only what a demo made, even with --force."""
    (tmp_path / "thesis.tex").write_text("x")
    refused(cli("demo", "--out", tmp_path, "--force"), "thesis.tex", "another --out")
    assert list(tree(tmp_path)) == ["thesis.tex"]


@pytest.mark.parametrize("arguments", [["merge", "RUN"], ["frob"], ["inspect"], ["chat", "RUN", "--top-p", "7"]])
def test_usage_that_is_wrong(cli: Cli, run_dir: Path, arguments: list[str]) -> None:
    """Typer says what is missing, on stderr, and how to get help."""
    done = cli(*(word.replace("RUN", str(run_dir)) for word in arguments))
    assert (done.code, done.out) == (2, "")
    assert "Usage: " in done.err
    assert "Traceback" not in done.err


def test_a_conversation_with_two_servers_and_an_executor_without_one(cli: Cli, tiny: TinyRun) -> None:
    """Each is refused before anything is asked or loaded."""
    run, server = tiny.adapters["final"], "http://127.0.0.1:9/v1"
    refused(
        cli("chat", run, "--endpoint", server, "--endpoint", f"{server}/2", "--model", "m"), "one server", "compare"
    )
    refused(cli("compare", run, "--executor", "processes"), "--endpoint")
    asked = ("--endpoint", server, "--model", "m", "--executor", "processes:1")
    refused(cli("evaluate", run, *asked), "Ray cluster", "one process keeps hundreds of requests in flight")
