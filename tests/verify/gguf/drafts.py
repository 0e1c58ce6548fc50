"""GGUF files written by hand: a second, obvious converter for tiny models, whose every step can be done wrong.

Names are spelled out and rows interleaved one by one, so that nothing is shared with what is tested.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from tests.tiny_models import SPECIAL, TEMPLATE

Array = npt.NDArray[np.float32]

CONFIGS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "gemma": (GemmaConfig, {"head_dim": 16}),
    "phi3": (Phi3Config, {"tie_word_embeddings": False, "sliding_window": None, "pad_token_id": 0}),
}
_LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.qkv_proj": "attn_qkv", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
HEADS, KEPT, LAYERS = 4, 2, 2


def build_model(folder: Path, family: str, *, seed: int = 0, **config: Any) -> Path:
    """Write a tiny random bf16 model of a family, with a tokenizer that cuts text as SmolLM's does."""
    torch.manual_seed(seed)
    tokenizer = _tokenizer()
    kind, own = CONFIGS[family]
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEPT,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
        "initializer_range": 0.15,
        **own,
        **config,
    }
    model = AutoModelForCausalLM.from_config(kind(**settings), dtype=torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass
class Draft:
    """What a file will hold; change anything before :meth:`write`.

    Attributes:
        architecture: llama.cpp's name.
        fields: every field by key, but for the architecture.
        tensors: numbers by the file's names.
        kinds: how each is stored.
    """

    architecture: str
    fields: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Array] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path, *, own: Callable[[Any], Any] | None = None, kind: str = "BF16") -> Path:
        """Write the file; matrices by ``own``, where it is given, as ``kind``."""
        writer = gguf.GGUFWriter(None, self.architecture)
        for key, value in self.fields.items():
            _add(writer, key, value)
        for name, values in self.tensors.items():
            if own is not None and values.ndim > 1:
                writer.add_tensor(name, own(values), raw_dtype=gguf.GGMLQuantizationType[kind])
                continue
            of = gguf.GGMLQuantizationType[self.kinds[name]]
            with np.errstate(over="ignore"):  # what is too large becomes infinite, as in the field
                stored = gguf.quants.quantize(np.ascontiguousarray(values), of)
            writer.add_tensor(name, stored, raw_dtype=of)
        writer.write_header_to_file(path=path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def draft_of(folder: Path, family: str, *, kind: str = "BF16") -> Draft:
    """The right file of a model: matrices in ``kind``, vectors in F32."""
    config = json.loads((folder / "config.json").read_text())
    draft = Draft(family, fields=_fields(folder, family, config))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        stem, _, suffix = name.rpartition(".")
        target = _target(stem)
        values = weight.numpy().copy()
        if family == "llama" and target.endswith(("attn_q", "attn_k")):
            values = interleave(values, HEADS if target.endswith("q") else KEPT)
        if family == "gemma" and stem.endswith("norm"):
            values = values + np.float32(1)
        draft.tensors[f"{target}.{suffix}"] = values
        draft.kinds[f"{target}.{suffix}"] = kind if values.ndim > 1 else "F32"
    return draft


def interleave(values: Array, heads: int) -> Array:
    """Row 2i of a head is its old row i, row 2i + 1 the one half a head further."""
    out = np.empty_like(values)
    size = values.shape[0] // heads
    for head in range(heads):
        for place in range(size // 2):
            out[head * size + 2 * place] = values[head * size + place]
            out[head * size + 2 * place + 1] = values[head * size + size // 2 + place]
    return out


def _target(stem: str) -> str:
    if stem in _TOP:
        return _TOP[stem]
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{_LAYER[rest]}"


def _fields(folder: Path, family: str, config: dict[str, Any]) -> dict[str, Any]:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    vocabulary |= {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    special = {token["id"] for token in tokenizer["added_tokens"]}
    head_dim = config.get("head_dim") or config["hidden_size"] // HEADS
    own = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": HEADS,
        "attention.head_count_kv": KEPT,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        "rope.dimension_count": head_dim,
    }
    if family == "phi3":
        own |= {"attention.sliding_window": 0, "rope.scaling.original_context_length": 4096}
    return {
        **{f"{family}.{key}": value for key, value in own.items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [vocabulary[number] for number in sorted(vocabulary)],
        "tokenizer.ggml.token_type": [3 if number in special else 1 for number in sorted(vocabulary)],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in tokenizer["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("1", "2"), ("t", "h"), ("th", "e"), ("Ġ", "the")]
    tokens = [*SPECIAL, *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[2], pad_token=SPECIAL[0], bos_token=None
    )
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[1:2]})
    fast.chat_template = TEMPLATE
    return fast
