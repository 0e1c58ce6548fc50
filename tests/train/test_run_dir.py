"""The run directory as a place: nothing of the user's is lost in it."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from tunesmith.errors import DataError, OutputError
from tunesmith.train.run_dir import claim, clear, drop_unfinished, publish, writing

from .conftest import RecipeMaker, Trained


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A directory that stands for a base model."""
    folder = tmp_path / "models" / "base"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder


def test_non_empty_output_dir_is_refused_unless_overwriting(
    recipe_for: RecipeMaker, base: Path, tmp_path: Path
) -> None:
    """An earlier run is never mixed with, or lost to, a new one by accident."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="not empty"):
        claim(recipe_for(), base)
    assert claim(recipe_for(overwrite_output_dir=True), base) == tmp_path / "run"


@pytest.mark.parametrize("place", ["models", "models/base"])
def test_output_dir_that_is_or_holds_the_base_is_always_refused(
    recipe_for: RecipeMaker, base: Path, tmp_path: Path, place: str
) -> None:
    """Overwriting would delete the model itself."""
    with pytest.raises(OutputError, match="base model"):
        claim(recipe_for(output_dir=str(tmp_path / place), overwrite_output_dir=True), base)


def test_output_dir_that_is_a_file_is_refused(recipe_for: RecipeMaker, base: Path, tmp_path: Path) -> None:
    """Likewise one below a file."""
    (tmp_path / "run").write_text("", encoding="utf-8")
    with pytest.raises(OutputError):
        claim(recipe_for(), base)
    with pytest.raises(OutputError):
        claim(recipe_for(output_dir=str(tmp_path / "run" / "below")), base)


def test_clearing_removes_a_run_and_nothing_else(tmp_path: Path) -> None:
    """Files that no run writes stay."""
    (tmp_path / "checkpoint-3").mkdir()
    for name in ("checkpoint-3/trainer_state.json", "adapter_model.safetensors", "trainer_log.jsonl", "notes.txt"):
        (tmp_path / name).write_text("", encoding="utf-8")
    clear(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("damage", ["no state", "half a state", "half an adapter", "no adapter"])
def test_checkpoints_that_were_cut_short_are_dropped(tmp_path: Path, trained: Trained, damage: str) -> None:
    """The state is written last: without it the rest may be half there; what is whole stays."""
    for name in ("checkpoint-3", "checkpoint-6"):
        shutil.copytree(trained.run_dir / name, tmp_path / name)
    (tmp_path / ".final-x").mkdir()
    file = tmp_path / "checkpoint-6" / ("trainer_state.json" if "state" in damage else "adapter_model.safetensors")
    content = file.read_bytes()
    file.unlink()
    if "half" in damage:
        file.write_bytes(content[: len(content) // 2])
    drop_unfinished(tmp_path)
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint-3"]


def test_publishing_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """A final adapter is whole or absent."""

    def save(folder: str) -> None:
        (Path(folder) / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        publish(tmp_path, save)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "disk is full"),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), "disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be written"),
    ],
)
def test_failed_writes_become_output_errors(tmp_path: Path, error: Exception, what: str) -> None:
    """Whichever library was writing."""
    with pytest.raises(OutputError, match=what), writing(tmp_path):
        raise error


@pytest.mark.parametrize("error", [DataError("no"), RuntimeError("shape mismatch")])
def test_other_errors_pass_through(tmp_path: Path, error: Exception) -> None:
    """A bug stays a bug, and an error of ours stays what it was."""
    with pytest.raises(type(error), match=str(error)), writing(tmp_path):
        raise error
