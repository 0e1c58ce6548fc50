"""The rows that a run was trained on: found again by file or by name, and nothing fetched."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from tests.runs.making import adapter
from tunesmith.conversations import read_dataset
from tunesmith.runs import open_run, training_file, training_rows


def make_run(folder: Path, **settings: Any) -> Path:
    """A run with LLaMA-Factory's own ``training_args.yaml``, which ours has too."""
    adapter(folder)
    (folder / "training_args.yaml").write_text(yaml.safe_dump(settings))
    return folder


def registry(folder: Path) -> Path:
    """A folder with two described data sets, of two rows and of one."""
    folder.mkdir(parents=True)
    for name, count in (("one", 2), ("two", 1)):
        rows = [{"instruction": f"{name} {number}", "output": "a"} for number in range(count)]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(
        json.dumps({name: {"file_name": f"{name}.json"} for name in ("one", "two")})
    )
    return folder


def questions(run: Path) -> list[str] | None:
    """What was asked in training, where that can be told."""
    rows = training_rows(open_run(run))
    return None if rows is None else [row.question for row in rows]


def test_a_file_is_found_from_the_run(tmp_path: Path) -> None:
    """As our own runs name it."""
    data = registry(tmp_path / "data")
    run = make_run(tmp_path / "run", dataset=["../data/one.json"])
    assert questions(run) == ["one 0", "one 1"]
    file = training_file(open_run(run))
    assert file is not None
    assert file.resolve() == data / "one.json"


@pytest.mark.parametrize("dataset", ["one,two", "one, two", ["one", "two"]])
def test_names_are_found_in_the_runs_dataset_dir(tmp_path: Path, dataset: Any) -> None:
    """As a text with commas or a list; the folder is relative to our run, or absolute."""
    registry(tmp_path / "sets")
    for place, folder in (("near", "../sets"), ("far", str(tmp_path / "sets"))):
        run = make_run(tmp_path / place, dataset=dataset, dataset_dir=folder)
        assert questions(run) == ["one 0", "one 1", "two 0"]


def test_llama_factorys_dataset_dir_is_found_above_the_run(tmp_path: Path) -> None:
    """It is relative to where that was started, where ``data`` and ``saves`` lie beside each other."""
    registry(tmp_path / "data")
    run = make_run(tmp_path / "saves" / "model" / "lora" / "run", dataset="two", dataset_dir="data")
    assert questions(run) == ["two 0"]
    without = make_run(tmp_path / "saves" / "model" / "lora" / "other", dataset="two")
    assert questions(without) == ["two 0"]


def test_it_is_found_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the run was moved and its data was not."""
    registry(tmp_path / "work" / "data")
    run = make_run(tmp_path / "elsewhere" / "run", dataset="one", max_samples=1)
    assert questions(run) is None
    monkeypatch.chdir(tmp_path / "work")
    assert questions(run) == ["one 0"]


def test_one_data_set_that_is_gone_leaves_nothing_to_say(tmp_path: Path) -> None:
    """Rows that are known in part would be taken for all of them."""
    registry(tmp_path / "data")
    assert questions(make_run(tmp_path / "run", dataset="one,gone", dataset_dir="../data")) is None
    assert questions(make_run(tmp_path / "none")) is None


def test_a_run_cannot_send_its_reader_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the hub, to a pipe without an end, to a folder, to names of any kind."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = registry(tmp_path / "data")
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "train.json").write_text('[{"instruction": "q", "output": "a"}]')
    far = {"hf_hub_url": str(tmp_path / "repo")}  # what the hub's client would read
    (folder / "dataset_info.json").write_text(json.dumps({"far": far}))
    assert read_dataset("far", dataset_dir=folder).rows
    os.mkfifo(folder / "pipe.json")
    for name in ("far", "../data/pipe.json", "pipe.json", ".", "\0", "a" * 5000, ",,,", "x," * 200):
        assert questions(make_run(tmp_path / "run", dataset=name, dataset_dir="../data")) is None


def test_the_system_text_of_our_runs_is_a_part_of_their_rows(tmp_path: Path) -> None:
    """Their held-out rows are written with it, and are compared with these."""
    registry(tmp_path / "data")
    run = make_run(tmp_path / "run", dataset="two", dataset_dir="../data", default_system="Be brief.")
    theirs = training_rows(open_run(run))
    (run / "tunesmith_run.json").write_text('{"schema_version": 1}')
    ours = training_rows(open_run(run))
    assert theirs is not None
    assert ours is not None
    assert ([turn.role for turn in theirs[0].messages], [turn.role for turn in ours[0].messages]) == (
        ["user", "assistant"],
        ["system", "user", "assistant"],
    )
