"""Tiny random models of many architectures, as Transformers saves them, and under other names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tunesmith.models.quiet import quiet_loading

VOCABULARY = 48
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
_VISION: dict[str, Any] = {
    "depth": 1,
    "embed_dim": 16,
    "hidden_size": 32,
    "num_heads": 2,
    "mlp_ratio": 2,
    "in_channels": 3,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_SPECIAL = {"image_token_id": 40, "video_token_id": 41, "vision_start_token_id": 42, "vision_end_token_id": 43}


def _small(family: str, **changes: Any) -> Any:
    return getattr(transformers, f"{family}Config")(**{**_SMALL, **changes})


def _qwen2_vl(*, tied: bool = False) -> Any:
    text = {
        **_SMALL,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    }
    return transformers.Qwen2VLConfig(text_config=text, vision_config=_VISION, tie_word_embeddings=tied, **_SPECIAL)


def _llava() -> Any:
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=8,
    )
    return transformers.LlavaConfig(
        text_config=_small("Llama"), vision_config=vision, image_token_index=40, tie_word_embeddings=False
    )


def _gemma3_vl() -> Any:
    text = {**_SMALL, "head_dim": 12, "tie_word_embeddings": True, "vocab_size": VOCABULARY}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    return transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=40,
        boi_token_index=41,
        eoi_token_index=42,
    )


# Every base by name: its class, and what makes its configuration.
BASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama": ("LlamaForCausalLM", lambda: _small("Llama")),
    "llama-tied": ("LlamaForCausalLM", lambda: _small("Llama", tie_word_embeddings=True)),
    "llama-biased": ("LlamaForCausalLM", lambda: _small("Llama", attention_bias=True, mlp_bias=True)),
    "llama-classifier": ("LlamaForSequenceClassification", lambda: _small("Llama", num_labels=3)),
    "qwen2": ("Qwen2ForCausalLM", lambda: _small("Qwen2")),
    "qwen3": ("Qwen3ForCausalLM", lambda: _small("Qwen3", head_dim=8, tie_word_embeddings=True)),
    "gemma2": ("Gemma2ForCausalLM", lambda: _small("Gemma2", head_dim=12, tie_word_embeddings=True)),
    "gemma3": ("Gemma3ForCausalLM", lambda: _small("Gemma3Text", head_dim=12, tie_word_embeddings=True)),
    "gpt2": (
        "GPT2LMHeadModel",
        lambda: transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=None,
        ),
    ),
    "gpt2-untied": (
        "GPT2LMHeadModel",
        lambda: transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=None,
            tie_word_embeddings=False,
        ),
    ),
    "mixtral": (
        "MixtralForCausalLM",
        lambda: _small("Mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    ),
    "mixtral-square": (
        "MixtralForCausalLM",
        lambda: _small("Mixtral", num_local_experts=4, num_experts_per_tok=2, intermediate_size=32),
    ),
    "mixtral-half": (  # gate and up together are as tall as the model is wide
        "MixtralForCausalLM",
        lambda: _small("Mixtral", num_local_experts=4, num_experts_per_tok=2, intermediate_size=16),
    ),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        lambda: _small(
            "Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8, norm_topk_prob=True
        ),
    ),
    "granite-moe": (
        "GraniteMoeForCausalLM",
        lambda: _small("GraniteMoe", num_local_experts=4, num_experts_per_tok=2),
    ),
    "llama4": (
        "Llama4ForCausalLM",
        lambda: _small(
            "Llama4Text", head_dim=8, num_local_experts=4, intermediate_size_mlp=40, interleave_moe_layer_step=1
        ),
    ),
    "gpt-oss": (
        "GptOssForCausalLM",
        lambda: _small(
            "GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=8, intermediate_size=40, sliding_window=16
        ),
    ),
    "gpt-oss-square": (
        "GptOssForCausalLM",
        lambda: _small(
            "GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=8, intermediate_size=32, sliding_window=16
        ),
    ),
    "qwen2-vl": ("Qwen2VLForConditionalGeneration", _qwen2_vl),
    "llava": ("LlavaForConditionalGeneration", _llava),
    "qwen2-vl-tied": ("Qwen2VLForConditionalGeneration", lambda: _qwen2_vl(tied=True)),
    "bert": (
        "BertForPreTraining",
        lambda: transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            initializer_range=0.2,
        ),
    ),
    "t5": (
        "T5ForConditionalGeneration",
        lambda: transformers.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0
        ),
    ),
    "opt": (
        "OPTForCausalLM",
        lambda: transformers.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            ffn_dim=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            init_std=0.2,
        ),
    ),
    "gpt-neox": (
        "GPTNeoXForCausalLM",
        lambda: transformers.GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            initializer_range=0.2,
        ),
    ),
    "gpt-neox-tied": (
        "GPTNeoXForCausalLM",
        lambda: transformers.GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=1,
            num_attention_heads=4,
            initializer_range=0.2,
            tie_word_embeddings=True,
        ),
    ),
    "bloom": (
        "BloomForCausalLM",
        lambda: transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    ),
    "phi3": ("Phi3ForCausalLM", lambda: _small("Phi3", pad_token_id=0)),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        lambda: _small(
            "Qwen2Moe",
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=40,
        ),
    ),
    "gemma3-vl": ("Gemma3ForConditionalGeneration", _gemma3_vl),
    "clip": (
        "CLIPModel",
        lambda: transformers.CLIPConfig(
            text_config={**_TOWER, "vocab_size": VOCABULARY, "max_position_embeddings": 64},
            vision_config={**_TOWER, "image_size": 32, "patch_size": 8},
            projection_dim=16,
        ),
    ),
    "resnet": (
        "ResNetForImageClassification",
        lambda: transformers.ResNetConfig(
            num_channels=3, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3
        ),
    ),
}


def old_llava(name: str) -> str:
    """A tensor of Llava as transformers 4 named it."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def new_qwen2_vl(name: str) -> str:
    """A tensor of Qwen2-VL as it is named in memory, by its name on disk."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.")


# The same models under the names that other versions of Transformers, or their makers, gave to the tensors.
RENAMED: dict[str, tuple[str, Callable[[str], str]]] = {
    "gpt2-bare": ("gpt2", lambda name: name.removeprefix("transformer.")),  # as the hub's own
    "bloom-bare": ("bloom", lambda name: name.removeprefix("transformer.")),
    "qwen2-vl-new": ("qwen2-vl", new_qwen2_vl),
    "llava-old": ("llava", old_llava),
}


def build_base(directory: Path, kind: str, *, dtype: torch.dtype = torch.float32, **saving: Any) -> Path:
    """Write a random model whose numbers are exact in bf16, so that it is the same model in every dtype.

    Args:
        directory: where to.
        kind: one of ``BASES``.
        dtype: of the file.
        saving: goes to ``save_pretrained``.
    """
    kind, rename = RENAMED.get(kind, (kind, None))
    cls, config = BASES[kind]
    torch.manual_seed(len(kind))
    with quiet_loading():
        model = getattr(transformers, cls)(config())
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim < 2:  # norms and biases begin as ones and zeros, which hide mistakes
                    weight.add_(torch.randn_like(weight) * 0.2)
                elif "experts" in name:
                    weight.normal_(std=0.2)
        model.to(torch.bfloat16).to(dtype).save_pretrained(directory, **({} if rename else saving))
    if rename:
        rewrite(directory / "model.safetensors", rename)
    return directory


def rewrite(file: Path, rename: Callable[[str], str], *, dtype: torch.dtype | None = None) -> None:
    """Rename a file's tensors, and maybe store them in another dtype."""
    tensors = {rename(name): tensor.to(dtype or tensor.dtype) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def resize(model: Any, size: int = VOCABULARY + 3) -> None:
    """Make room for new tokens, as one does before training with them."""
    with quiet_loading():
        model.resize_token_embeddings(size, mean_resizing=False)
