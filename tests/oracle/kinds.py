"""Every kind of adapter that PEFT makes, on the bases of the zoo, and what each means, told by hand."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.oracle.bases import new_qwen2_vl, old_llava, resize
from tests.oracle.formula import Truth

ATTENTION = ["q_proj", "v_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SEQUENCE = "AutoModelForSequenceClassification"
TOKENS = "AutoModelForTokenClassification"
VISION = "AutoModelForImageTextToText"


@dataclass(frozen=True)
class Kind:
    """One kind of adapter.

    Attributes:
        base: which base of the zoo.
        lora: arguments of ``LoraConfig``.
        auto: the Auto class that the tuned model, and the merged one, is loaded with.
        prepare: what the user did to the model before PEFT saw it.
        loading: arguments of ``from_pretrained``.
        dtype: of the adapter's file, and of its numbers.
        grid: what all numbers of the adapter's file are multiples of.
        rename: other names for the file's tensors, as other versions of PEFT or Transformers gave them.
        leftover: the start of the names of the base's tensors that the tuned model has no use for.
        truth: what its adapter means, told to the formula by hand; None where only the live model is asked.
    """

    base: str
    lora: dict[str, Any]
    auto: str = "AutoModelForCausalLM"
    prepare: Callable[[Any], None] | None = None
    loading: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    grid: float | None = None
    rename: Callable[[str], str] | None = None
    leftover: str | None = None
    truth: Truth | None = field(default_factory=Truth)


_UNTIED = Truth(tied="unties", config={"tie_word_embeddings": False})
_TIED = Truth(tied="stays", config={"tie_word_embeddings": True})
_MIXTRAL = {"disk": lambda module: module.replace(".mlp.", ".block_sparse_moe."), "family": "mixtral"}
_BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
_CONV1D = ("c_attn", "c_proj", "c_fc")


def _by_end(otherwise: float, **scalings: float) -> Callable[[str], float]:
    """A scaling by the module's last name."""
    return lambda module: scalings.get(module.rsplit(".", 1)[-1], otherwise)


def _patterned(module: str) -> float:
    """What the patterns of ``patterns`` mean, worked out by hand: alpha and r of every module."""
    alpha, r = 6.0, 4
    if module.endswith("q_proj"):
        alpha, r = 1, 2
    elif module.endswith("v_proj"):
        alpha = 9
    elif module.endswith("layers.1.self_attn.k_proj"):
        r = 3
    elif module == "model.layers.0.mlp.up_proj":
        r = 5
    return alpha / r


def _qwen2_vl_disk(module: str) -> str:
    return module.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def _llava_disk(module: str) -> str:
    if module == "lm_head":
        return "language_model.lm_head"
    return module.replace("model.language_model.", "language_model.model.").removeprefix("model.")


def _gemma3_vl_disk(module: str) -> str:
    if module == "lm_head":
        return "language_model.lm_head"
    return module.replace("model.language_model.", "language_model.model.").removeprefix("model.")


KINDS: dict[str, Kind] = {
    "plain": Kind("llama", {"target_modules": LINEAR}),
    "qwen2": Kind("qwen2", {"target_modules": LINEAR}),
    "qwen3": Kind("qwen3", {"target_modules": LINEAR}),
    "gemma2": Kind("gemma2", {"target_modules": LINEAR}),
    "gemma3": Kind("gemma3", {"target_modules": LINEAR}),
    "rslora": Kind("llama", {"target_modules": LINEAR, "use_rslora": True}, truth=Truth(scaling=lambda _: 6 / 2)),
    "rank-1": Kind("llama", {"target_modules": LINEAR, "r": 1, "lora_alpha": 1}, truth=Truth(scaling=lambda _: 1.0)),
    "patterns": Kind(
        "llama",
        {
            "target_modules": LINEAR,
            "rank_pattern": {"q_proj": 2, "layers.1.self_attn.k_proj": 3, "^model.layers.0.mlp.up_proj": 5},
            "alpha_pattern": {"v_proj": 9, "q_proj": 1},
        },
        truth=Truth(scaling=_patterned),
    ),
    "patterns-rslora": Kind(
        "llama",
        {"target_modules": LINEAR, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 9}},
        truth=Truth(scaling=_by_end(6 / 2, q_proj=6 / math.sqrt(2), v_proj=9 / 2)),
    ),
    "layers-to-transform": Kind("llama", {"target_modules": LINEAR, "layers_to_transform": [1]}),
    "exclude-modules": Kind("llama", {"target_modules": "all-linear", "exclude_modules": ["v_proj"]}),
    "bias-all": Kind("qwen2", {"target_modules": ATTENTION, "bias": "all"}),
    "bias-lora-only": Kind("llama-biased", {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"}),
    "lora-bias": Kind("llama-biased", {"target_modules": LINEAR, "lora_bias": True}),
    "saved-head": Kind("llama", {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
    "saved-embedding": Kind("llama", {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]}),
    "saved-norms": Kind("llama", {"target_modules": ATTENTION, "modules_to_save": ["input_layernorm", "norm"]}),
    "saved-both-tied": Kind(
        "llama-tied", {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]}, truth=_UNTIED
    ),
    "saved-embedding-tied": Kind(
        "llama-tied", {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]}, truth=_UNTIED
    ),
    "saved-head-tied": Kind("llama-tied", {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}, truth=_UNTIED),
    "saved-embedding-tying": Kind(
        "llama-tied",
        {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        truth=_TIED,
    ),
    "embedding": Kind("llama", {"target_modules": [*ATTENTION, "embed_tokens"]}),
    "embedding-head": Kind("llama", {"target_modules": [*ATTENTION, "embed_tokens", "lm_head"]}),
    "head": Kind("llama", {"target_modules": [*ATTENTION, "lm_head"]}),
    "embedding-tied": Kind("llama-tied", {"target_modules": [*ATTENTION, "embed_tokens"]}, truth=_UNTIED),
    "head-tied": Kind("llama-tied", {"target_modules": [*ATTENTION, "lm_head"]}, truth=_UNTIED),
    "embedding-head-tied": Kind(
        "llama-tied", {"target_modules": [*ATTENTION, "embed_tokens", "lm_head"]}, truth=_UNTIED
    ),
    "embedding-tying": Kind(
        "llama-tied", {"target_modules": [*ATTENTION, "embed_tokens"], "ensure_weight_tying": True}, truth=_TIED
    ),
    "head-tying": Kind(
        "llama-tied", {"target_modules": [*ATTENTION, "lm_head"], "ensure_weight_tying": True}, truth=_TIED
    ),
    "tokens": Kind(
        "llama",
        {"target_modules": ATTENTION, "trainable_token_indices": [3, 7, 45]},
        truth=Truth(tokens={"embed_tokens": [3, 7, 45]}),
    ),
    "tokens-dict": Kind(
        "llama",
        {"target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [2, 5]}},
        truth=Truth(tokens={"embed_tokens": [1, 2], "lm_head": [2, 5]}),
    ),
    "tokens-tied": Kind(
        "llama-tied",
        {"target_modules": ATTENTION, "trainable_token_indices": [3, 7, 45]},
        truth=Truth(tied="stays", tokens={"embed_tokens": [3, 7, 45]}, config={"tie_word_embeddings": True}),
    ),
    "tokens-tying": Kind(
        "llama-tied",
        {"target_modules": ATTENTION, "trainable_token_indices": [3, 7, 45], "ensure_weight_tying": True},
        truth=Truth(tied="stays", tokens={"embed_tokens": [3, 7, 45]}, config={"tie_word_embeddings": True}),
    ),
    "tokens-dict-tied": Kind(
        "llama-tied",
        {"target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [3, 7]}},
        truth=Truth(tied="stays", tokens={"embed_tokens": [3, 7]}, config={"tie_word_embeddings": True}),
    ),
    "tokens-both-tied": Kind(
        "llama-tied",
        {"target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [3, 7]}},
        truth=Truth(tied="stays", tokens={"embed_tokens": [3, 7]}, config={"tie_word_embeddings": True}),
    ),
    "tokens-unlike-tied": Kind(
        "llama-tied",
        {"target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [2, 5]}},
        truth=Truth(
            tied="unties", tokens={"embed_tokens": [3, 7], "lm_head": [2, 5]}, config={"tie_word_embeddings": False}
        ),
    ),
    "resized": Kind("llama", {"target_modules": ATTENTION}, prepare=resize, truth=Truth(config={"vocab_size": 51})),
    "resized-tied": Kind(
        "llama-tied",
        {"target_modules": ATTENTION},
        prepare=resize,
        truth=Truth(tied="stays", config={"vocab_size": 51, "tie_word_embeddings": True}),
    ),
    "resized-embedding": Kind(
        "llama",
        {"target_modules": [*ATTENTION, "embed_tokens", "lm_head"]},
        prepare=resize,
        truth=Truth(config={"vocab_size": 51}),
    ),
    "resized-embedding-tied": Kind(
        "llama-tied",
        {"target_modules": [*ATTENTION, "embed_tokens"]},
        prepare=resize,
        truth=Truth(tied="unties", config={"vocab_size": 51, "tie_word_embeddings": False}),
    ),
    "resized-tokens": Kind(
        "llama",
        {"target_modules": ATTENTION, "trainable_token_indices": [48, 49, 50]},
        prepare=resize,
        truth=Truth(tokens={"embed_tokens": [48, 49, 50]}, config={"vocab_size": 51}),
    ),
    "resized-tokens-tied": Kind(
        "llama-tied",
        {"target_modules": ATTENTION, "trainable_token_indices": [48, 49, 50]},
        prepare=resize,
        truth=Truth(
            tied="stays", tokens={"embed_tokens": [48, 49, 50]}, config={"vocab_size": 51, "tie_word_embeddings": True}
        ),
    ),
    "resized-saved": Kind(
        "llama",
        {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]},
        prepare=resize,
        truth=Truth(config={"vocab_size": 51}),
    ),
    "dora": Kind("llama", {"target_modules": LINEAR, "use_dora": True}),
    "dora-rslora": Kind(
        "qwen2", {"target_modules": LINEAR, "use_dora": True, "use_rslora": True}, truth=Truth(scaling=lambda _: 6 / 2)
    ),
    "dora-embedding": Kind("llama", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "dora-gpt2": Kind(
        "gpt2",
        {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "fan_in_fan_out": True},
        truth=Truth(conv1d=_CONV1D),
    ),
    "gpt2": Kind(
        "gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}, truth=Truth(conv1d=_CONV1D)
    ),
    "gpt2-mixed": Kind("gpt2-untied", {"target_modules": ["c_attn", "c_proj", "lm_head"]}, truth=Truth(conv1d=_CONV1D)),
    "gpt2-embedding": Kind("gpt2-untied", {"target_modules": ["c_attn", "wte", "wpe"]}, truth=Truth(conv1d=_CONV1D)),
    "mixtral-both": Kind(
        "mixtral",
        {"target_modules": ATTENTION, "target_parameters": _BOTH},
        truth=Truth(experts=("down_proj", "gate_up_proj"), **_MIXTRAL),
    ),
    "mixtral-swapped": Kind(
        "mixtral",
        {"target_modules": [], "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]},
        truth=Truth(experts=("down_proj", "gate_up_proj"), **_MIXTRAL),
    ),
    "mixtral-gate-up": Kind(
        "mixtral",
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
        truth=Truth(experts=("gate_up_proj", None), **_MIXTRAL),
    ),
    "mixtral-down": Kind(
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
        truth=Truth(experts=("down_proj", None), **_MIXTRAL),
    ),
    "mixtral-square-both": Kind(
        "mixtral-square",
        {"target_modules": ATTENTION, "target_parameters": _BOTH},
        truth=Truth(experts=("down_proj", "gate_up_proj"), **_MIXTRAL),
    ),
    "mixtral-square-down": Kind(
        "mixtral-square",
        {"target_modules": ATTENTION, "target_parameters": ["mlp.experts.down_proj"]},
        truth=Truth(experts=("down_proj", None), **_MIXTRAL),
    ),
    "mixtral-half-gate-up": Kind(
        "mixtral-half",
        {"target_modules": ATTENTION, "target_parameters": ["mlp.experts.gate_up_proj"]},
        truth=Truth(experts=("gate_up_proj", None), **_MIXTRAL),
    ),
    "mixtral-half-both": Kind(
        "mixtral-half",
        {"target_modules": ATTENTION, "target_parameters": _BOTH},
        truth=Truth(experts=("down_proj", "gate_up_proj"), **_MIXTRAL),
    ),
    "mixtral-rslora": Kind(
        "mixtral",
        {
            "target_modules": ATTENTION,
            "target_parameters": _BOTH,
            "use_rslora": True,
        },
        truth=Truth(scaling=lambda _: 6 / 2, experts=("down_proj", "gate_up_proj"), **_MIXTRAL),
    ),
    # Names of transformers 4, which PEFT turns into target_parameters, with gate and up in one pair of twice the rank.
    "mixtral-old-names": Kind(
        "mixtral",
        {"target_modules": ["w1", "w2", "w3", "q_proj"]},
        truth=Truth(experts=("down_proj", "gate_up_proj"), **_MIXTRAL),
    ),
    "mixtral-old-names-rslora": Kind(
        "mixtral",
        {"target_modules": ["w1", "w2", "w3", "q_proj"], "use_rslora": True},
        truth=Truth(
            scaling=lambda _: 6 / 2,
            inner_scaling=2 * 6 / math.sqrt(2 * 4),
            experts=("down_proj", "gate_up_proj"),
            **_MIXTRAL,
        ),
    ),
    "granite-moe": Kind(
        "granite-moe",
        {"target_modules": ATTENTION, "target_parameters": ["input_linear.weight", "output_linear.weight"]},
        truth=None,
    ),
    "llama4": Kind(
        "llama4",
        {
            "target_modules": ATTENTION,
            "target_parameters": ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"],
        },
        truth=None,
    ),
    "mixtral-router": Kind(
        "mixtral", {"target_modules": ATTENTION, "target_parameters": ["mlp.gate.weight"]}, truth=Truth(**_MIXTRAL)
    ),
    "qwen3-moe-both": Kind(
        "qwen3-moe",
        {"target_modules": ATTENTION, "target_parameters": _BOTH},
        truth=Truth(experts=("down_proj", "gate_up_proj"), family="qwen"),
    ),
    "qwen3-moe-attention": Kind("qwen3-moe", {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    "gpt-oss-both": Kind(
        "gpt-oss",
        {"target_modules": ATTENTION, "target_parameters": _BOTH},
        truth=Truth(experts=("down_proj", "gate_up_proj"), family="gpt-oss"),
    ),
    "gpt-oss-down": Kind(
        "gpt-oss",
        {"target_modules": ATTENTION, "target_parameters": ["mlp.experts.down_proj"]},
        truth=Truth(experts=("down_proj", None), family="gpt-oss"),
    ),
    "gpt-oss-square-down": Kind(
        "gpt-oss-square",
        {"target_modules": ATTENTION, "target_parameters": ["mlp.experts.down_proj"]},
        truth=Truth(experts=("down_proj", None), family="gpt-oss"),
    ),
    "gpt-oss-square-both": Kind(
        "gpt-oss-square",
        {"target_modules": ATTENTION, "target_parameters": _BOTH},
        truth=Truth(experts=("down_proj", "gate_up_proj"), family="gpt-oss"),
    ),
    "qwen2-vl": Kind(
        "qwen2-vl",
        {"target_modules": r".*language_model.*\.(q_proj|v_proj|up_proj)"},
        auto=VISION,
        truth=Truth(disk=_qwen2_vl_disk),
    ),
    "qwen2-vl-all": Kind("qwen2-vl", {"target_modules": "all-linear"}, auto=VISION, truth=Truth(disk=_qwen2_vl_disk)),
    "qwen2-vl-head": Kind(
        "qwen2-vl",
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
        auto=VISION,
        truth=Truth(disk=_qwen2_vl_disk),
    ),
    "llava": Kind(
        "llava", {"target_modules": ["q_proj", "v_proj", "linear_1"]}, auto=VISION, truth=Truth(disk=_llava_disk)
    ),
    "classifier": Kind(
        "llama",
        {"target_modules": ATTENTION, "task_type": "SEQ_CLS"},
        auto=SEQUENCE,
        loading={"num_labels": 5},
        truth=Truth(config={"architectures": ["LlamaForSequenceClassification"], "num_labels": 5}),
    ),
    "classifier-tied": Kind(
        "llama-tied",
        {"target_modules": ATTENTION, "task_type": "SEQ_CLS"},
        auto=SEQUENCE,
        loading={"num_labels": 3},
        truth=Truth(config={"architectures": ["LlamaForSequenceClassification"], "num_labels": 3}),
    ),
    "token-classifier": Kind(
        "qwen2",
        {"target_modules": ATTENTION, "task_type": "TOKEN_CLS"},
        auto=TOKENS,
        loading={"num_labels": 4},
        truth=Truth(config={"architectures": ["Qwen2ForTokenClassification"], "num_labels": 4}),
    ),
    "replicated": Kind(
        "llama",
        {"target_modules": ATTENTION, "layer_replication": [[0, 2], [1, 2]]},
        truth=Truth(layers=[0, 1, 1], config={"num_hidden_layers": 3}),
    ),
    "conv2d": Kind("resnet", {"target_modules": ["convolution"]}, auto="AutoModelForImageClassification"),
    "dora-conv2d": Kind(
        "resnet", {"target_modules": ["convolution"], "use_dora": True}, auto="AutoModelForImageClassification"
    ),
    "classifier-again": Kind(
        "llama-classifier",
        {"target_modules": ATTENTION, "task_type": "SEQ_CLS"},
        auto=SEQUENCE,
        truth=Truth(config={"architectures": ["LlamaForSequenceClassification"], "num_labels": 3}),
    ),
    "gpt2-bare": Kind(
        "gpt2-bare",
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
        truth=Truth(conv1d=_CONV1D, disk=lambda module: module.removeprefix("transformer.")),
    ),
    "gpt2-bare-dora": Kind(
        "gpt2-bare",
        {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "fan_in_fan_out": True},
        truth=Truth(conv1d=_CONV1D, disk=lambda module: module.removeprefix("transformer.")),
    ),
    "qwen2-vl-new": Kind("qwen2-vl-new", {"target_modules": "all-linear"}, auto=VISION),
    "qwen2-vl-old-adapter": Kind(
        "qwen2-vl",
        {"target_modules": "all-linear"},
        auto=VISION,
        rename=lambda name: _qwen2_vl_disk(name),
    ),
    "qwen2-vl-old-adapter-new-base": Kind(
        "qwen2-vl-new",
        {"target_modules": "all-linear"},
        auto=VISION,
        rename=lambda name: _qwen2_vl_disk(name),
        truth=Truth(disk=lambda module: new_qwen2_vl(module)),
    ),
    "llava-old": Kind(
        "llava-old",
        {"target_modules": ["q_proj", "v_proj", "linear_1"]},
        auto=VISION,
        truth=Truth(disk=lambda module: old_llava(_llava_disk(module))),
    ),
    "llava-old-adapter": Kind(
        "llava",
        {"target_modules": r".*language_model.*(q_proj|v_proj)"},
        auto=VISION,
        rename=lambda name: name.replace("model.model.language_model.", "model.language_model.model."),
    ),
    "keys-with-adapter-name": Kind(
        "llama",
        {"target_modules": [*LINEAR, "embed_tokens"]},
        rename=lambda name: re.sub(r"(lora_(embedding_)?[AB])", r"\1.default", name),
    ),
    "keys-without-prefix": Kind(
        "llama", {"target_modules": LINEAR}, rename=lambda name: name.removeprefix("base_model.model.")
    ),
    "keys-of-saved-modules": Kind(
        "llama",
        {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm"]},
        rename=lambda name: re.sub(r"(lm_head|norm)\.weight", r"\1.modules_to_save.default.weight", name),
    ),
    "keys-of-dora": Kind(
        "llama",
        {"target_modules": LINEAR, "use_dora": True},
        rename=lambda name: name.replace("magnitude_vector", "magnitude_vector.default.weight"),
    ),
    "keys-of-dora-without-name": Kind(
        "llama",
        {"target_modules": LINEAR, "use_dora": True},
        rename=lambda name: name.replace("magnitude_vector", "magnitude_vector.weight"),
    ),
    "adapter-bf16": Kind("llama", {"target_modules": LINEAR, "modules_to_save": ["lm_head"]}, dtype=torch.bfloat16),
    "adapter-fp16": Kind("llama", {"target_modules": LINEAR, "bias": "none"}, dtype=torch.float16),
    # Sums that lie between two numbers of bf16, of which the even one is right.
    "ties": Kind(
        "llama", {"target_modules": LINEAR, "lora_alpha": 4}, grid=2.0**-6, truth=Truth(scaling=lambda _: 1.0)
    ),
    "tokens-unsorted": Kind(
        "llama",
        {"target_modules": ATTENTION, "trainable_token_indices": [45, 3, 7]},
        truth=Truth(tokens={"embed_tokens": [45, 3, 7]}),
    ),
    "saved-container": Kind("llama", {"target_modules": ATTENTION, "modules_to_save": ["mlp"]}),
    "saved-router": Kind(
        "mixtral", {"target_modules": ATTENTION, "modules_to_save": ["gate"]}, truth=Truth(**_MIXTRAL)
    ),
    "mixtral-patterns": Kind(
        "mixtral",
        {
            "target_modules": ATTENTION,
            "target_parameters": _BOTH,
            "rank_pattern": {"gate_up_proj": 2},
            "alpha_pattern": {"q_proj": 9},
        },
        truth=Truth(
            scaling=lambda module: 9 / 4 if "q_proj" in module else 6 / 4,
            inner_scaling=6 / 2,
            experts=("down_proj", "gate_up_proj"),
            **_MIXTRAL,
        ),
    ),
    "gpt2-head-tied": Kind(
        "gpt2-bare",
        {"target_modules": ["c_attn", "lm_head"]},
        truth=Truth(
            conv1d=_CONV1D,
            disk=lambda module: module.removeprefix("transformer."),
            tied="unties",
            config={"tie_word_embeddings": False},
        ),
    ),
    "gpt2-resized": Kind(
        "gpt2-bare",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True},
        prepare=resize,
        truth=Truth(
            conv1d=_CONV1D,
            disk=lambda module: module.removeprefix("transformer."),
            tied="stays",
            config={"tie_word_embeddings": True, "vocab_size": 51},
        ),
    ),
    "gpt2-bias-all": Kind(
        "gpt2-bare",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"},
        truth=Truth(conv1d=_CONV1D, disk=lambda module: module.removeprefix("transformer.")),
    ),
    "gpt2-lora-bias": Kind(
        "gpt2",
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "lora_bias": True},
        truth=Truth(conv1d=_CONV1D),
    ),
    "gpt2-classifier": Kind(
        "gpt2-bare",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "SEQ_CLS"},
        auto=SEQUENCE,
        loading={"num_labels": 3},
        truth=Truth(
            conv1d=_CONV1D,
            disk=lambda module: module.removeprefix("transformer."),
            config={"architectures": ["GPT2ForSequenceClassification"], "num_labels": 3},
        ),
    ),
    "dora-head-tied": Kind("llama-tied", {"target_modules": ["q_proj", "lm_head"], "use_dora": True}, truth=_UNTIED),
    "dora-embedding-tied": Kind(
        "llama-tied", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}, truth=_UNTIED
    ),
    "replicated-more": Kind(
        "llama",
        {"target_modules": LINEAR, "layer_replication": [[1, 2], [0, 2], [0, 1]]},
        truth=Truth(layers=[1, 0, 1, 0], config={"num_hidden_layers": 4}),
    ),
    "replicated-fewer": Kind(
        "qwen2",
        {"target_modules": LINEAR, "layer_replication": [[1, 2]]},
        truth=Truth(layers=[1], config={"num_hidden_layers": 1}),
    ),
    "replicated-tied": Kind(
        "llama-tied",
        {"target_modules": [*LINEAR, "embed_tokens"], "layer_replication": [[0, 2], [1, 2]]},
        truth=Truth(layers=[0, 1, 1], tied="unties", config={"num_hidden_layers": 3, "tie_word_embeddings": False}),
    ),
    "gemma3-embedding": Kind("gemma3", {"target_modules": [*ATTENTION, "embed_tokens"]}, truth=_UNTIED),
    "gemma3-tokens": Kind(
        "gemma3",
        {"target_modules": ATTENTION, "trainable_token_indices": [3, 7]},
        truth=Truth(tied="stays", tokens={"embed_tokens": [3, 7]}, config={"tie_word_embeddings": True}),
    ),
    "gemma3-vl": Kind(
        "gemma3-vl",
        {"target_modules": ["q_proj", "v_proj", "down_proj"]},
        auto=VISION,
        truth=Truth(disk=_gemma3_vl_disk),
    ),
    "qwen2-vl-embedding-tied": Kind(
        "qwen2-vl-tied",
        {"target_modules": ["q_proj", "embed_tokens"]},
        auto=VISION,
        truth=Truth(disk=_qwen2_vl_disk, tied="unties", config={"tie_word_embeddings": False}),
    ),
    "qwen2-vl-head-tied": Kind(
        "qwen2-vl-tied",
        {"target_modules": ["q_proj", "lm_head"]},
        auto=VISION,
        truth=Truth(disk=_qwen2_vl_disk, tied="unties", config={"tie_word_embeddings": False}),
    ),
    "qwen2-vl-resized": Kind(
        "qwen2-vl",
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        auto=VISION,
        prepare=resize,
        truth=Truth(disk=_qwen2_vl_disk, config={"text_config.vocab_size": 51}),
    ),
    "qwen2-vl-patches": Kind(
        "qwen2-vl", {"target_modules": ["q_proj", "patch_embed.proj"]}, auto=VISION, truth=Truth(disk=_qwen2_vl_disk)
    ),
    "llava-head": Kind(
        "llava", {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}, auto=VISION, truth=Truth(disk=_llava_disk)
    ),
    "t5": Kind(
        "t5", {"target_modules": ["q", "v", "wi", "wo"], "task_type": "SEQ_2_SEQ_LM"}, auto="AutoModelForSeq2SeqLM"
    ),
    "bert-classifier": Kind(
        "bert",
        {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
        auto=SEQUENCE,
        loading={"num_labels": 3},
        leftover="cls.",
        truth=Truth(config={"architectures": ["BertForSequenceClassification"], "num_labels": 3}),
    ),
    "bert": Kind("bert", {"target_modules": ["query", "value", "dense"]}, auto="AutoModelForPreTraining"),
    "saved-embedding-and-head-tied": Kind(
        "llama-tied", {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}, truth=_UNTIED
    ),
    "embedding-and-saved-head-tied": Kind(
        "llama-tied", {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}, truth=_UNTIED
    ),
    "resized-head-tied": Kind(
        "llama-tied",
        {"target_modules": ["q_proj", "lm_head"]},
        prepare=resize,
        truth=Truth(tied="unties", config={"vocab_size": 51, "tie_word_embeddings": False}),
    ),
    "resized-saved-tied": Kind(
        "llama-tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        prepare=resize,
        truth=Truth(tied="unties", config={"vocab_size": 51, "tie_word_embeddings": False}),
    ),
    "resized-tying": Kind(
        "llama-tied",
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        prepare=resize,
        truth=Truth(tied="stays", config={"vocab_size": 51, "tie_word_embeddings": True}),
    ),
    "resized-saved-tying": Kind(
        "llama-tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        prepare=resize,
        truth=Truth(tied="stays", config={"vocab_size": 51, "tie_word_embeddings": True}),
    ),
    "resized-smaller": Kind(
        "llama",
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        prepare=lambda model: resize(model, 44),
        truth=Truth(config={"vocab_size": 44}),
    ),
    "replicated-saved": Kind(
        "llama",
        {
            "target_modules": ATTENTION,
            "modules_to_save": ["input_layernorm"],
            "layer_replication": [[0, 2], [0, 2]],
        },
        truth=Truth(layers=[0, 1, 0, 1], config={"num_hidden_layers": 4}),
    ),
    "replicated-biases": Kind(
        "llama-biased",
        {"target_modules": ATTENTION, "bias": "all", "layer_replication": [[0, 2], [1, 2]]},
        truth=Truth(layers=[0, 1, 1], config={"num_hidden_layers": 3}),
    ),
    "replicated-dora": Kind(
        "llama",
        {"target_modules": ATTENTION, "use_dora": True, "layer_replication": [[0, 2], [1, 2]]},
        truth=Truth(layers=[0, 1, 1], config={"num_hidden_layers": 3}),
    ),
    "parameter-of-a-layer": Kind(
        "llama", {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight", "embed_tokens.weight"]}
    ),
    "tokens-and-saved-head": Kind(
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7], "modules_to_save": ["lm_head"]},
        truth=Truth(tokens={"embed_tokens": [3, 7]}),
    ),
    "opt": Kind("opt", {"target_modules": ["q_proj", "fc1", "out_proj"], "bias": "all"}),
    "gpt-neox": Kind("gpt-neox", {"target_modules": ["query_key_value", "dense_4h_to_h", "embed_in", "embed_out"]}),
    "bloom": Kind(
        "bloom-bare",
        {"target_modules": ["query_key_value", "word_embeddings"]},
        truth=Truth(
            disk=lambda module: module.removeprefix("transformer."),
            tied="unties",
            config={"tie_word_embeddings": False},
        ),
    ),
    "phi3": Kind("phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "down_proj"], "use_dora": True}),
    "qwen2-moe": Kind(
        "qwen2-moe",
        {"target_modules": ["q_proj", "gate_proj", "down_proj"], "target_parameters": _BOTH},
        truth=Truth(experts=("down_proj", "gate_up_proj"), family="qwen"),
    ),
    "gemma3-classifier": Kind(
        "gemma3",
        {"target_modules": ATTENTION, "task_type": "SEQ_CLS"},
        auto=SEQUENCE,
        loading={"num_labels": 3},
        truth=Truth(config={"architectures": ["Gemma3TextForSequenceClassification"], "num_labels": 3}),
    ),
    "gemma3-vl-head-tied": Kind(
        "gemma3-vl",
        {"target_modules": ["q_proj", "lm_head"]},
        auto=VISION,
        truth=Truth(
            disk=_gemma3_vl_disk,
            tied="unties",
            head="language_model.lm_head.weight",
            config={"tie_word_embeddings": False},
        ),
    ),
    "gpt-oss-router": Kind(
        "gpt-oss",
        {"target_modules": ATTENTION, "target_parameters": ["mlp.router.weight"], "modules_to_save": ["norm"]},
    ),
}
