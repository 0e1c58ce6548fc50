"""Mixtures of experts in the shapes of DeepSeek-V3, as sparse files: true headers, holes for numbers, no disk used.

Shapes and names: https://huggingface.co/deepseek-ai/DeepSeek-V3 (``config.json``; in bf16, without the layer that
predicts a second token).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

RANK = 16
_WIDTH = {"BF16": 2, "F32": 4}

Tensors = Mapping[str, tuple[int, ...]]
Form = Literal["modules", "parameters"]


@dataclass(frozen=True)
class Mixture:
    """The dimensions of a DeepSeek-V3 model: latent attention, experts from some layer on.

    Attributes:
        hidden: width of the residual stream.
        layers: blocks.
        dense: how many of the first blocks have no experts.
        inner: width of their feed-forward layer.
        experts: experts that are routed to, a block.
        expert_inner: width of one expert.
        heads: attention heads.
        q_rank: width of the queries' latent.
        kv_rank: width of the latent of keys and values.
        nope: width of a head's queries and keys that have no position.
        rope: width of those that have.
        value: width of a head's values.
        vocabulary: rows of the embedding, and of the head.
        shards: files to write.
    """

    hidden: int
    layers: int
    dense: int
    inner: int
    experts: int
    expert_inner: int
    heads: int
    q_rank: int
    kv_rank: int
    nope: int
    rope: int
    value: int
    vocabulary: int
    shards: int

    @property
    def attention(self) -> dict[str, tuple[int, int]]:
        """The linear layers of latent attention: (out, in)."""
        return {
            "self_attn.q_a_proj": (self.q_rank, self.hidden),
            "self_attn.q_b_proj": (self.heads * (self.nope + self.rope), self.q_rank),
            "self_attn.kv_a_proj_with_mqa": (self.kv_rank + self.rope, self.hidden),
            "self_attn.kv_b_proj": (self.heads * (self.nope + self.value), self.kv_rank),
            "self_attn.o_proj": (self.hidden, self.heads * self.value),
        }

    def feed_forward(self, layer: int) -> dict[str, tuple[int, int]]:
        """The linear layers after it, but for the router."""
        if layer < self.dense:
            return _gated("mlp", self.inner, self.hidden)
        found = _gated("mlp.shared_experts", self.expert_inner, self.hidden)
        for expert in range(self.experts):
            found |= _gated(f"mlp.experts.{expert}", self.expert_inner, self.hidden)
        return found

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model, a layer after the other."""
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found[f"{prefix}{norm}.weight"] = (self.hidden,)
            found[f"{prefix}self_attn.q_a_layernorm.weight"] = (self.q_rank,)
            found[f"{prefix}self_attn.kv_a_layernorm.weight"] = (self.kv_rank,)
            if layer >= self.dense:
                found[f"{prefix}mlp.gate.weight"] = (self.experts, self.hidden)
                found[f"{prefix}mlp.gate.e_score_correction_bias"] = (self.experts,)
            for name, shape in {**self.attention, **self.feed_forward(layer)}.items():
                found[f"{prefix}{name}.weight"] = shape
        return {**found, "model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocabulary, self.hidden)}


MIXTURES = {
    "671b": Mixture(7168, 61, 3, 18432, 256, 2048, 128, 1536, 512, 128, 64, 128, 129280, shards=163),
    "671b-6": Mixture(7168, 6, 3, 18432, 256, 2048, 128, 1536, 512, 128, 64, 128, 129280, shards=10),  # six layers
}


def _gated(module: str, inner: int, hidden: int) -> dict[str, tuple[int, int]]:
    return {
        f"{module}.gate_proj": (inner, hidden),
        f"{module}.up_proj": (inner, hidden),
        f"{module}.down_proj": (hidden, inner),
    }


def write_hollow_mixture(directory: Path, shape: Mixture) -> Path:
    """Write a mixture whose weights are holes, which are read as zeros."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = shape.tensors()
    groups = _split(tensors, shape.shards)
    weight_map = {}
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        write_hollow(directory / file, {name: tensors[name] for name in names}, "BF16")
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 2 * _elements(tensors)}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "n_routed_experts": shape.experts,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_hollow_adapter(directory: Path, shape: Mixture, base: Path, *, form: Form) -> Path:
    """Write an adapter of rank 16 on attention and on all experts, its factors holes.

    Args:
        directory: where to.
        shape: the base's.
        base: the base.
        form: ``modules``: every expert's matrices have factors of their own, as with transformers before 5;
            ``parameters``: the experts of a layer share a pair for each of two fused parameters, as since.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_hollow(directory / "adapter_model.safetensors", adapter_tensors(shape, form), "BF16")
    targets = {name.rpartition(".")[2] for name in shape.attention}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted(targets | ({"gate_proj", "up_proj", "down_proj"} if form == "modules" else set())),
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if form == "parameters" else None,
        "bias": "none",
        "peft_version": "0.19.1",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def adapter_tensors(shape: Mixture, form: Form) -> dict[str, tuple[int, ...]]:
    """Names and shapes of such an adapter's factors."""
    found: dict[str, tuple[int, ...]] = {}
    for layer in range(shape.layers):
        linears = {**shape.attention, **(shape.feed_forward(layer) if form == "modules" else {})}
        for name, (rows, columns) in linears.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            found[f"{module}.lora_A.weight"], found[f"{module}.lora_B.weight"] = (RANK, columns), (rows, RANK)
        if form == "parameters" and layer >= shape.dense:
            module, stacked = f"base_model.model.model.layers.{layer}.mlp.experts", RANK * shape.experts
            # The parameter that is registered first lies innermost: gate_up_proj before down_proj.
            for place, rows, columns in (
                (f"{module}.base_layer", 2 * shape.expert_inner, shape.hidden),
                (module, shape.hidden, shape.expert_inner),
            ):
                found[f"{place}.lora_A.weight"], found[f"{place}.lora_B.weight"] = (stacked, columns), (rows, stacked)
    return found


def write_hollow(path: Path, tensors: Tensors, dtype: str) -> None:
    """Write a safetensors file with a true header and a hole for the data."""
    entries, position = {}, 0
    for name, shape in tensors.items():
        size = _WIDTH[dtype] * int(np.prod(shape))
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(file.tell() + position)


def _split(tensors: Tensors, shards: int) -> list[list[str]]:
    total, passed = _elements(tensors), 0
    groups: list[list[str]] = [[] for _ in range(shards)]
    for name, shape in tensors.items():
        groups[min(shards - 1, passed * shards // total)].append(name)
        passed += int(np.prod(shape))
    return [group for group in groups if group]


def _elements(tensors: Tensors) -> int:
    return sum(int(np.prod(shape)) for shape in tensors.values())
