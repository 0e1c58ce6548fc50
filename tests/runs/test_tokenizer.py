"""tokenizer_dir: whole from one place, the adapter's own first."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs.making import adapter
from tunesmith.runs import open_run, tokenizer_dir


@pytest.mark.parametrize(
    ("holders", "expected"),
    [
        (("checkpoint", "root", "base"), "checkpoint"),
        (("root", "base"), "root"),
        (("base",), "base"),
        ((), None),
    ],
)
def test_the_nearest_tokenizer_is_taken(tmp_path: Path, holders: tuple[str, ...], expected: str | None) -> None:
    """The adapter's, else the run's, else the base's, else none."""
    root = adapter(tmp_path / "run", tokenizer=False)
    places = {"checkpoint": root / "checkpoint-5", "root": root, "base": tmp_path / "base"}
    adapter(places["checkpoint"], tokenizer=False)
    places["base"].mkdir()
    for name in holders:
        (places[name] / "tokenizer.json").write_text("{}")
    run = open_run(root)
    found = tokenizer_dir(run, run.checkpoints[0], places["base"])
    assert found == (places[expected].resolve() if expected else None)


def test_a_configuration_alone_is_no_tokenizer(tmp_path: Path) -> None:
    """Files of two places are never mixed, so half a tokenizer does not count."""
    root = adapter(tmp_path / "run", tokenizer=False)
    (root / "tokenizer_config.json").write_text("{}")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    run = open_run(root)
    assert tokenizer_dir(run, run.checkpoints[-1], tmp_path / "base") == tmp_path / "base"
