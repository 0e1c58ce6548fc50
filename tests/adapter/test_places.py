"""Places: an adapter's names in a base's files, whichever way those are spelled; several candidates are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.adapter.making import pair, write_adapter, write_base
from tunesmith.adapter import Stack
from tunesmith.adapter.places import Places
from tunesmith.checkpoint import Checkpoint
from tunesmith.errors import AdapterMismatchError

TEXT = "layers.0.mlp.up_proj.weight"
SPELLED = [
    ("model.layers.0.q.weight", "model.layers.0.q.weight"),
    ("model.language_model.layers.0.q.weight", "language_model.model.layers.0.q.weight"),
    ("model.language_model.layers.0.q.weight", "model.layers.0.q.weight"),
    ("model.layers.0.q.weight", "model.language_model.layers.0.q.weight"),
    ("language_model.model.layers.0.q.weight", "model.language_model.layers.0.q.weight"),
    ("transformer.h.0.attn.c_attn.weight", "h.0.attn.c_attn.weight"),
    ("h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.weight"),
    ("model.visual.blocks.0.attn.qkv.weight", "visual.blocks.0.attn.qkv.weight"),
    ("model.multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_1.weight"),
    ("model.vision_tower.encoder.q.weight", "vision_tower.vision_model.encoder.q.weight"),
    ("model.layers.0.mlp.gate.weight", "model.layers.0.block_sparse_moe.gate.weight"),
    ("model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.mlp.gate.weight"),
    ("bert.encoder.layer.0.x.weight", "encoder.layer.0.x.weight"),
    ("encoder.layer.0.x.weight", "bert.encoder.layer.0.x.weight"),
    ("lm_head.weight", "language_model.lm_head.weight"),
]


def places(tmp_path: Path, *names: str, **config: object) -> Places:
    """A base of small tensors."""
    return Places(Checkpoint(write_base(tmp_path / "base", dict.fromkeys(names, (4, 6)), **config)))


@pytest.mark.parametrize(("name", "disk"), SPELLED)
def test_a_name_is_found_however_the_files_spell_it(tmp_path: Path, name: str, disk: str) -> None:
    """Beside tensors of another layer, which it must not take."""
    assert places(tmp_path, disk, disk.replace("0", "1") + ".other").find(name) == disk


def test_the_exact_name_wins_over_every_other_spelling(tmp_path: Path) -> None:
    """A model may have both towers."""
    both = ("model.layers.0.q.weight", "model.language_model.layers.0.q.weight")
    base = places(tmp_path, *both)
    assert [base.find(name) for name in both] == list(both)


def test_a_name_that_fits_several_tensors_fits_none(tmp_path: Path) -> None:
    """Refused with the candidates, rather than guessed."""
    base = write_base(tmp_path / "base", {"language_model.model.q.weight": (4, 6), "model.text_model.q.weight": (4, 6)})
    with pytest.raises(AdapterMismatchError) as caught:
        Stack([(write_adapter(tmp_path / "a", pair("model.q")), 1)]).bind(Checkpoint(base))
    assert "language_model.model.q.weight" in caught.value.details[0]
    assert "model.text_model.q.weight" in caught.value.details[0]


@pytest.mark.parametrize(
    ("config", "head", "tied"),
    [
        ({"tie_word_embeddings": True}, None, True),
        ({"tie_word_embeddings": False}, "other", False),
        ({"tie_word_embeddings": True}, "same", True),
        ({"tie_word_embeddings": True}, "other", False),
        ({"text_config": {"tie_word_embeddings": True}}, None, True),
        ({}, None, True),
        ({}, "same", True),
        ({}, "other", False),
    ],
)
def test_a_silent_config_is_tied_where_the_files_say_so(
    tmp_path: Path, config: dict[str, object], head: str | None, *, tied: bool
) -> None:
    """The default of tie_word_embeddings differs from class to class; the files show what was saved."""
    directory = write_base(tmp_path / "base", {"x": (1,)}, **config)
    rng = np.random.default_rng(0)
    embedding, other = rng.standard_normal((2, 5, 3)).astype(np.float32)
    tensors = {"model.embed_tokens.weight": embedding}
    if head:
        tensors["lm_head.weight"] = embedding if head == "same" else other
    save_file(tensors, directory / "model.safetensors")
    assert Places(Checkpoint(directory)).tied is tied
