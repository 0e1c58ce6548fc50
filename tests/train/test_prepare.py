"""What is known of a training before a weight is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tunesmith.errors import BaseModelError, Cancelled, DataError
from tunesmith.progress import Cancellation
from tunesmith.train.prepare import load_config, load_tokenizer, prepare
from tunesmith.train.rows import IGNORED

from .conftest import RecipeMaker


def test_packed_rows_are_the_rows(base_dir: Path, recipe_for: RecipeMaker) -> None:
    """Fewer and fuller; taken apart where their lengths say, they are the same rows, labels included."""
    apart = prepare(recipe_for(), base_dir).train.examples
    recipe = recipe_for(packing=True, cutoff_len=160)
    packed = prepare(recipe, base_dir).train
    assert len(packed.examples) < len(apart)
    assert max(len(pack["input_ids"]) for pack in packed.examples) <= 160
    found = []
    for pack in packed.examples:
        start = 0
        for length in pack["seq_lengths"]:
            found.append(tuple(tuple(pack[key][start : start + length]) for key in ("input_ids", "labels")))
            start += length
        assert start == len(pack["input_ids"])
    assert sorted(found) == sorted((tuple(row["input_ids"]), tuple(row["labels"])) for row in apart)


def test_held_out_rows_are_encoded_alike_and_apart(base_dir: Path, recipe_for: RecipeMaker) -> None:
    """Both parts have answers that count, and no row is in both."""
    prepared = prepare(recipe_for(val_size=6), base_dir)
    assert (len(prepared.train.examples), len(prepared.held_out.examples)) == (18, 6)
    for example in (*prepared.train.examples, *prepared.held_out.examples):
        assert any(label != IGNORED for label in example["labels"])
    train, held_out = (
        {tuple(row["input_ids"]) for row in part.examples} for part in (prepared.train, prepared.held_out)
    )
    assert train.isdisjoint(held_out)


def test_stop_tokens_are_those_that_the_base_lists(base_dir: Path, recipe_for: RecipeMaker, tmp_path: Path) -> None:
    """A file that says nothing of them, or is broken, is as none."""
    base = Path(shutil.copytree(base_dir, tmp_path / "base"))
    whole = prepare(recipe_for(), base)
    for content in ("{", "[]", json.dumps({"eos_token_id": "x"})):
        (base / "generation_config.json").write_text(content)
        assert prepare(recipe_for(), base).train.examples == whole.train.examples


def test_template_that_is_unknown_is_refused_with_the_nearest(base_dir: Path, recipe_for: RecipeMaker) -> None:
    """Before any row is encoded."""
    with pytest.raises(DataError, match="qwen33") as caught:
        prepare(recipe_for(template="qwen33"), base_dir)
    assert "did you mean qwen3?" in str(caught.value)


def test_base_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """An empty folder has no tokenizer and no configuration, and nothing is asked of the hub."""
    for load in (load_tokenizer, load_config):
        with pytest.raises(BaseModelError, match="base model") as caught:
            load(tmp_path)
        assert str(tmp_path) in str(caught.value)


def test_preparing_can_be_stopped(base_dir: Path, recipe_for: RecipeMaker) -> None:
    """It is read between rows."""
    cancellation = Cancellation()
    cancellation.cancel()
    with pytest.raises(Cancelled):
        prepare(recipe_for(), base_dir, cancellation=cancellation)
