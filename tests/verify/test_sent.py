"""What goes to a worker with each of a proof's parts: paths and hashes, however many tensors there are."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest

from tests.tiny_models import TinyRun
from tunesmith.adapter import Stack
from tunesmith.checkpoint import Checkpoint, view_of
from tunesmith.errors import CheckpointError
from tunesmith.verify.weights import Expectation
from tunesmith.verify.weights.check import parts_of, tally_part


def sent(thing: object) -> bytes:
    """As to a worker."""
    return pickle.dumps(thing)


@pytest.fixture
def copied(tiny: TinyRun, tmp_path: Path) -> tuple[Path, Path]:
    """The base and the adapter, to be changed."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(tiny.base, base)
    shutil.copytree(tiny.adapters["final"], adapter)
    return base, adapter


def expected(base: Path, adapter: Path, view: str | None = None) -> Expectation:
    """What a merge of the two should hold."""
    model, stack = Checkpoint(base), Stack([(adapter, 0.5)])
    return Expectation(model, stack, stack.bind(model), view=view_of(view))


@pytest.mark.parametrize("view", [None, "nf4"])
def test_a_worker_expects_the_same(copied: tuple[Path, Path], tiny: TinyRun, view: str | None) -> None:
    """Part by part; and what is sent is short, and opened once."""
    ours, merged = expected(*copied, view), Checkpoint(tiny.merged)
    text = sent((merged, ours))
    assert len(text) < 2000
    (model, theirs), (again, same) = pickle.loads(text), pickle.loads(text)  # noqa: S301 - our own
    assert model is again
    assert theirs is same
    assert theirs.names == ours.names
    for name in ours.names:
        for part in parts_of(ours, name, sample=False):
            assert tally_part(model, theirs, part) == tally_part(merged, ours, part)


def test_a_worker_that_finds_other_files_says_so(copied: tuple[Path, Path], tiny: TinyRun) -> None:
    """Such as a machine with another folder at the same path."""
    base, adapter = copied
    text = sent(expected(base, adapter))
    config = (adapter / "adapter_config.json").read_text()
    (adapter / "adapter_config.json").write_text(config.replace('"lora_alpha": 8', '"lora_alpha": 24'))
    assert (adapter / "adapter_config.json").read_text() != config
    with pytest.raises(CheckpointError, match="another adapter there"):
        pickle.loads(text)  # noqa: S301 - our own
    elsewhere = base.parent / "elsewhere"
    shutil.copytree(tiny.merged, elsewhere)
    weights = (elsewhere / "model.safetensors").read_bytes()
    text = sent(Checkpoint(elsewhere))
    (elsewhere / "model.safetensors").write_bytes(weights.replace(b"layers.0.", b"layers.7.", 1))
    with pytest.raises(CheckpointError, match="another model there"):
        pickle.loads(text)  # noqa: S301 - our own


def test_an_adapter_that_was_trained_again_is_opened_again(copied: tuple[Path, Path], tiny: TinyRun) -> None:
    """A worker that lives on holds nothing of the one that lay there before."""
    base, adapter = copied
    before = pickle.loads(sent(expected(base, adapter)))  # noqa: S301 - our own
    shutil.copytree(tiny.adapters["checkpoint-10"], adapter, dirs_exist_ok=True)
    ours = expected(base, adapter)
    theirs = pickle.loads(sent(ours))  # noqa: S301 - our own
    assert theirs.stack is not before.stack
    changed = [name for name in ours.names if ours.updates.get(name)]
    assert changed == [name for name in theirs.names if theirs.updates.get(name)]
    for name in changed:
        assert (theirs.tensor(name).tile(0, 2).delta == ours.tensor(name).tile(0, 2).delta).all()
