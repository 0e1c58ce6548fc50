"""The demo's data, directory and commands; `make demo` runs the whole story, which takes minutes."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import tunesmith as ts
from tunesmith.demo import DemoStep
from tunesmith.demo.story import _FILES, _prepare, _Story
from tunesmith.errors import OutputError


def test_data_is_ours_and_split(tmp_path: Path) -> None:
    """350 questions, each with an answer; none is both trained on and held out."""
    root = _prepare(tmp_path / "demo", force=False)
    train, held_out = (ts.read_conversations(root / f"workshop_{name}.jsonl") for name in ("train", "held_out"))
    assert len(train) + len(held_out) == 350
    assert all(row.answer for row in [*train, *held_out])
    assert not {row.question for row in train} & {row.question for row in held_out}


def test_earlier_demo_is_replaced_on_request_only(tmp_path: Path) -> None:
    """And only what a demo made is removed."""
    root = _prepare(tmp_path / "demo", force=False)
    (root / "run").mkdir()
    (root / "run" / "old").write_text("x")
    with pytest.raises(OutputError, match="run here before") as caught:
        _prepare(root, force=False)
    assert "--force" in str(caught.value)
    _prepare(root, force=True)
    assert sorted(path.name for path in root.iterdir()) == sorted(_FILES)


def test_strangers_are_never_removed(tmp_path: Path) -> None:
    """Not even with force, and not through a link."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("x")
    root = _prepare(tmp_path / "demo", force=False)
    (root / "run").symlink_to(tmp_path / "thesis")
    _prepare(root, force=True)
    assert (tmp_path / "thesis" / "chapter").read_text() == "x"
    (root / "notes").write_text("x")
    with pytest.raises(OutputError, match="holds other files"):
        _prepare(root, force=True)
    with pytest.raises(OutputError, match="is a file"):
        _prepare(root / "notes", force=True)


def test_shown_commands_can_be_pasted(tmp_path: Path) -> None:
    """A directory with a space in its name is in quotes."""
    steps: list[DemoStep] = []
    story = _Story(tmp_path / "my demo", steps.append)
    with story.step("merge", "@run --out @merged"):
        pass
    assert shlex.split(steps[0].command) == [
        "tunesmith",
        "merge",
        str(tmp_path / "my demo" / "run"),
        "--out",
        str(tmp_path / "my demo" / "merged"),
    ]


def test_shown_commands_are_understood_by_the_program() -> None:
    """Every verb that the story shows exists, and takes the options that it shows."""
    from typer.main import get_command

    from tunesmith.cli.app import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    source = Path(str(ts.demo.__code__.co_filename)).read_text(encoding="utf-8")
    shown = source.split("story.step(")[1:]
    assert len(shown) == 6
    for part in shown:
        verb = part.split('"')[1]
        options = {word for word in part.partition("):\n")[0].replace('"', " ").split() if word.startswith("--")}
        known = {option for parameter in commands[verb].params for option in parameter.opts}
        assert options <= known, verb


def test_demo_that_made_nothing_is_begun_again_without_force(tmp_path: Path) -> None:
    """A first try that lacked a package leaves the recipe and the data, which cost nobody anything."""
    root = _prepare(tmp_path / "demo", force=False)
    assert _prepare(tmp_path / "demo", force=False) == root
