"""The manifest: it can be read back, and tells nothing of whose machine it came from."""

from __future__ import annotations

from tunesmith.checkpoint import sha256_of
from tunesmith.train import Manifest
from tunesmith.train.manifest import MANIFEST_NAME, unplaced

from .conftest import TEMPLATE, Trained


def test_absolute_base_paths_lose_their_folders() -> None:
    """A hub id and a relative path stay as they were typed."""
    assert unplaced("/home/ann/models/tiny") == "tiny"
    assert unplaced("org/tiny") == "org/tiny"


def test_manifest_records_what_the_run_was_made_from(trained: Trained, data_file: object) -> None:
    """Everything that is needed to make it again, or to see that it was not made from this."""
    import hashlib
    from pathlib import Path

    manifest = Manifest.read(trained.run_dir / MANIFEST_NAME)
    assert isinstance(data_file, Path)
    assert (manifest.base_model, manifest.base_sha256) == ("org/tiny", "ab" * 32)
    assert [(file.name, file.rows) for file in manifest.dataset] == [("rules.jsonl", 24)]
    assert manifest.dataset[0].sha256 == sha256_of(data_file)
    assert (manifest.health.read, manifest.health.duplicates.count, manifest.steps) == (24, 1, 7)
    assert manifest.train_rows + manifest.held_out_rows == 24
    assert manifest.chat_template_sha256 == hashlib.sha256(TEMPLATE.encode()).hexdigest()
    assert manifest.supervised_tokens > 24
    assert (manifest.seed, manifest.compute_dtype, manifest.device) == (42, "float32", "cpu")
    assert set(manifest.versions) == {"python", "tunesmith", "torch", "transformers", "peft", "trl"}
    assert manifest.wall_s is not None
    assert manifest.wall_s > 0


def test_manifest_names_no_absolute_path(trained: Trained) -> None:
    """A run can be published without its author's folders."""
    text = (trained.run_dir / MANIFEST_NAME).read_text(encoding="utf-8")
    assert str(trained.run_dir.parent) not in text
    assert '"/' not in text
