"""parse_keys: every spelling that PEFT and others write, and which part of which module it is."""

from __future__ import annotations

import pytest

from tunesmith.adapter.keys import Key, parse_keys

Q = "model.layers.0.self_attn.q_proj"
EXPERTS = "model.layers.0.mlp.experts"
EMBED = "model.embed_tokens"

SPELLINGS = {
    f"{Q}.lora_A.weight": ("lora_A", Q, 0, ""),
    f"{Q}.lora_B.default.weight": ("lora_B", Q, 0, ""),
    f"{Q}.lora_B.bias": ("lora_B_bias", Q, 0, ""),
    f"{Q}.lora_B.default.bias": ("lora_B_bias", Q, 0, ""),
    f"{Q}.lora_magnitude_vector": ("magnitude", Q, 0, ""),
    f"{Q}.lora_magnitude_vector.default": ("magnitude", Q, 0, ""),
    f"{Q}.lora_magnitude_vector.weight": ("magnitude", Q, 0, ""),
    f"{Q}.lora_magnitude_vector.default.weight": ("magnitude", Q, 0, ""),
    f"{EMBED}.lora_embedding_A": ("lora_embedding_A", EMBED, 0, ""),
    f"{EMBED}.lora_embedding_B.default": ("lora_embedding_B", EMBED, 0, ""),
    f"{EMBED}.token_adapter.trainable_tokens_delta": ("tokens", EMBED, 0, ""),
    f"{EMBED}.token_adapter.trainable_tokens_delta.default": ("tokens", EMBED, 0, ""),
    f"{EMBED}.token_adapter.base_layer.weight": ("base", EMBED, 0, "weight"),
    f"{EMBED}.base_layer.weight": ("base", EMBED, 0, "weight"),
    f"{EMBED}.original_module.weight": ("base", EMBED, 0, "weight"),
    f"{EMBED}.modules_to_save.weight": ("saved", EMBED, 0, "weight"),
    "classifier.modules_to_save.default.dense.bias": ("saved", "classifier", 0, "dense.bias"),
    "score.weight": ("plain", "score", 0, "weight"),
    f"{Q}.bias": ("plain", Q, 0, "bias"),
    f"{EXPERTS}.lora_A.weight": ("lora_A", EXPERTS, 0, ""),
    f"{EXPERTS}.base_layer.lora_A.weight": ("lora_A", EXPERTS, 1, ""),
    f"{EXPERTS}.base_layer.base_layer.lora_B.weight": ("lora_B", EXPERTS, 2, ""),
    "attn.base_layer.out_proj.lora_A.weight": ("lora_A", "attn.out_proj", 0, ""),
    f"{Q}.lora_velora_embed": ("training", Q, 0, ""),
}


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_told(name: str, prefix: str) -> None:
    """With PEFT's prefix and without."""
    keys, strange = parse_keys([prefix + name], where="x")
    assert strange == []
    part, module, depth, leaf = SPELLINGS[name]
    assert keys == [Key(tensor=prefix + name, part=part, module=module, depth=depth, leaf=leaf)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    ["weight", "", f"{Q}.lora_C.weight", f"{Q}.lora_A", f"{Q}.lora_E.default", ".lora_A.weight", "lora_A.weight"],
)
def test_what_is_none_of_lora_is_named(name: str) -> None:
    """Never skipped: it comes back as it is."""
    assert parse_keys([name], where="x") == ([], [name])
