"""Addresses on the command line: ``file://`` is the disk, and what only a merge takes is refused by all others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Cli, tree
from tests.tiny_models import TinyRun

FILE = "file://"


def test_file_addresses_are_paths(cli: Cli, run_dir: Path, tiny: TinyRun, tmp_path: Path) -> None:
    """For the run, its base, further adapters and the target: the bytes are those of plain paths."""
    run, base = f"{FILE}{run_dir}", f"{FILE}{tiny.base}"
    done = cli("merge", run_dir, "--base", tiny.base, "--adapter", f"{run_dir}:0.5", "--out", tmp_path / "plain")
    assert done.code == 0, done.err
    for typed in (f"{FILE}{tmp_path}/addressed", f"file:{tmp_path}/collapsed"):
        done = cli("merge", run, "--base", base, "--adapter", f"{run}:0.5", "--out", typed)
        assert done.code == 0, done.err
    names = ("addressed", "collapsed")
    assert [tree(tmp_path / name) for name in names] == [tree(tmp_path / "plain")] * 2
    levels = [word for level in ("structure", "assets", "weights") for word in ("--level", level)]
    words = ["--adapter", f"{run}:0.5", "--base", base, *levels]
    done = cli("verify", run, f"{FILE}{tmp_path}/addressed", *words, cwd=tmp_path)
    assert done.code == 0, done.err
    assert cli("inspect", run, "--base", base).out == cli("inspect", run_dir, "--base", tiny.base).out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["addressed", "collapsed", "plain"]


@pytest.mark.parametrize(
    "words",
    [
        ["quantize", "RUN", "--base", "BASE", "--scheme", "int8", "--out", "s3://b/x"],
        ["merge", "RUN", "--base", "BASE", "--out", "OUT", "--record", "s3://b/x.json"],
        ["verify", "RUN", "MERGED", "--base", "BASE", "--out", "hf://b/x/y.json"],
        ["report", "RUN", "--out", "s3://b/x.html"],
        ["compare", "RUN", "--base", "BASE", "--out", "gs://b/x.json"],
        ["compare", "RUN", "--base", "BASE", "--records", "s3://b/x"],
        ["evaluate", "RUN", "--base", "BASE", "--data", "ROWS", "--out", "s3://b/x.json"],
        ["drift", "RUN", "MERGED", "--base", "BASE", "--out", "s3://b/x.json"],
        ["gguf", "MERGED", "--out", "s3://b/x.gguf"],
        ["serve-command", "RUN", "--engine", "ollama", "--out", "s3://b/x"],
        ["demo", "--out", "s3://b/x"],
        ["train", "RECIPE", "output_dir=s3://b/x", "--dry-run"],
    ],
    ids=lambda words: f"{words[0]} {words[-2]}",
)
def test_what_goes_to_a_disk_makes_no_folder_of_a_scheme(
    cli: Cli, run_dir: Path, tiny: TinyRun, tmp_path: Path, words: list[str]
) -> None:
    """``s3://b/x`` would else be the folder ``s3:`` here, and its owner would look for it elsewhere."""
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n' * 8)
    (tmp_path / "recipe.yaml").write_text(f"model_name_or_path: {tiny.base}\ndataset: rows.jsonl\noutput_dir: out\n")
    places = {"RUN": run_dir, "BASE": tiny.base, "MERGED": tiny.merged, "OUT": tmp_path / "out"}
    places |= {"ROWS": tmp_path / "rows.jsonl", "RECIPE": tmp_path / "recipe.yaml"}
    before = tree(tmp_path)
    done = cli(*(places.get(word, word) for word in words), cwd=tmp_path)
    assert (done.code, done.out) == (2, "")
    assert "Only a merge writes to a storage." in done.err
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "words",
    [
        ["merge", "RUN", "--base", "BASE", "--out", "az://b/x"],
        ["merge", "RUN", "--base", "az://b/x", "--out", "OUT"],
        ["merge", "az://b/x", "--base", "BASE", "--out", "OUT"],
        ["verify", "RUN", "az://b/x", "--base", "BASE"],
        ["verify", "az://b/x"],
        ["inspect", "RUN", "--base", "az://b/x"],
    ],
    ids=" ".join,
)
def test_a_storage_that_is_not_known_is_said(
    cli: Cli, run_dir: Path, tiny: TinyRun, tmp_path: Path, words: list[str]
) -> None:
    """With those that are."""
    places = {"RUN": run_dir, "BASE": tiny.base, "OUT": tmp_path / "out"}
    done = cli(*(places.get(word, word) for word in words), cwd=tmp_path)
    assert (done.code, done.out) == (2, "")
    assert "There is no such storage." in done.err
    assert "az://" in done.err
    assert "s3://, gs:// or hf://" in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_certificate_in_a_storage_is_not_looked_for_on_the_disk(cli: Cli, tmp_path: Path) -> None:
    """It says what proves the model there."""
    done = cli("verify", "s3://b/x", cwd=tmp_path)
    assert (done.code, done.out) == (2, "")
    assert "s3://b/x" in done.err
    assert "tunesmith verify RUN ADDRESS" in done.err
