"""Base models and adapters of random numbers in the shapes of real ones, written without loading anything.

Weights are normal with a deviation of 0.02, in bf16; the adapter (rank 16, float32, on every linear layer of a block)
changes them by about 0.3 % of their norm, as a fine-tune does.
"""

from __future__ import annotations

import json
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

RANK = 16
_POOL = 1 << 24  # random numbers to draw from; a tensor is a run of them, from an offset of its own


@dataclass(frozen=True)
class Shape:
    """The dimensions of a Qwen2 model.

    Attributes:
        hidden: width of the residual stream.
        inner: width of the feed-forward layer.
        layers: blocks.
        heads: query heads.
        kv_heads: key and value heads.
        vocabulary: rows of the embedding.
        tied: whether the head is the embedding.
        shards: files to write.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    shards: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of a block: (out, in)."""
        head = self.hidden // self.heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.kv_heads * head, self.hidden),
            "self_attn.v_proj": (self.kv_heads * head, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model."""
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found[f"{prefix}{norm}.weight"] = (self.hidden,)
            for name, shape in self.linears.items():
                found[f"{prefix}{name}.weight"] = shape
                if name[-6:] in ("q_proj", "k_proj", "v_proj"):
                    found[f"{prefix}{name}.bias"] = shape[:1]
        found["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            found["lm_head.weight"] = (self.vocabulary, self.hidden)
        return found


SIZES = {
    "135m": Shape(576, 1536, 30, 9, 3, 49152, tied=True, shards=1),  # SmolLM2-135M
    "0.5b": Shape(896, 4864, 24, 14, 2, 151936, tied=True, shards=1),  # Qwen2.5-0.5B
    "1.5b": Shape(1536, 8960, 28, 12, 2, 151936, tied=True, shards=1),  # Qwen2.5-1.5B
    "1.5b-1": Shape(1536, 8960, 1, 12, 2, 151936, tied=True, shards=1),  # one layer of it
    "1.5b-3": Shape(1536, 8960, 3, 12, 2, 151936, tied=True, shards=1),
    "1.5b-6": Shape(1536, 8960, 6, 12, 2, 151936, tied=True, shards=1),
    "7b": Shape(3584, 18944, 28, 28, 4, 152064, tied=False, shards=4),  # Qwen2.5-7B
    "70b": Shape(8192, 28672, 80, 64, 8, 128256, tied=False, shards=30),  # Llama-3.1-70B
}


def write_base(directory: Path, size: str, *, hollow: bool = False) -> Path:
    """Write a base model, unless it is there; a hollow one has holes for weights, which are read as zeros."""
    if (directory / "config.json").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    shape = SIZES[size]
    pool = (np.random.default_rng(0).standard_normal(_POOL, dtype=np.float32) * 0.02).view(np.uint32)
    bits = (pool >> 16).astype(np.uint16)
    tensors = shape.tensors()
    shards = _split(tensors, shape.shards)
    weight_map = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        _write_shard(directory / file, {name: tensors[name] for name in names}, None if hollow else bits)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = sum(2 * int(np.prod(shape)) for shape in tensors.values())
        index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index_file))
    (directory / "config.json").write_text(json.dumps(_config(shape), indent=2))
    return directory


def write_adapter(directory: Path, size: str, base: Path, *, r: int = RANK, hollow: bool = False) -> Path:
    """Write an adapter on every linear layer, unless it is there; a hollow one has holes for factors, in bf16."""
    if (directory / "adapter_config.json").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    shape, weights = SIZES[size], directory / "adapter_model.safetensors"
    if hollow:
        _write_shard(weights, _factors(shape, r), None)
    else:
        save_file(_random_factors(shape, r), weights)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": r,
        "lora_alpha": 2 * r,
        "target_modules": sorted({name.rpartition(".")[2] for name in shape.linears}),
        "bias": "none",
        "init_lora_weights": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return directory


def _factors(shape: Shape, r: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for layer in range(shape.layers):
        for name, (rows, columns) in shape.linears.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            found[f"{module}.lora_A.weight"], found[f"{module}.lora_B.weight"] = (r, columns), (rows, r)
    return found


def _random_factors(shape: Shape, r: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    tensors = {name: rng.standard_normal(form, dtype=np.float32) for name, form in _factors(shape, r).items()}
    # 2·B·A, with this deviation of B, has 0.3 % of the weights' 0.02.
    deviation = np.float32(0.003 * 0.02 / 2 / r**0.5)
    return {name: one * deviation if "lora_B" in name else one for name, one in tensors.items()}


def _split(tensors: dict[str, tuple[int, ...]], shards: int) -> list[list[str]]:
    total, groups, passed = sum(int(np.prod(shape)) for shape in tensors.values()), [[] for _ in range(shards)], 0
    for name, shape in tensors.items():
        groups[min(shards - 1, passed * shards // total)].append(name)
        passed += int(np.prod(shape))
    return [group for group in groups if group]


def _write_shard(path: Path, tensors: dict[str, tuple[int, ...]], bits: np.ndarray | None) -> None:
    entries, position = {}, 0
    for name, shape in tensors.items():
        size = 2 * int(np.prod(shape))
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        if bits is None:
            file.truncate(file.tell() + position)
            return
        for number, shape in enumerate(tensors.values()):
            left, start = int(np.prod(shape)), number * 7919 * 64 % _POOL
            while left:
                run = bits[start : start + left]
                file.write(memoryview(run))
                left, start = left - run.size, 0


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "torch_dtype": "bfloat16",
    }


if __name__ == "__main__":
    size, base, adapter = sys.argv[1:]
    write_adapter(Path(adapter), size, write_base(Path(base), size))
