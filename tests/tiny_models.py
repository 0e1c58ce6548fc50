"""Tiny random models with everything that a real run has: tokenizer, chat template, adapters, a merged model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tunesmith.conversations import Conversation, Message
from tunesmith.models.quiet import quiet_loading

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WINDOW = 512
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class TinyRun:
    """Directories of one tiny run.

    Attributes:
        base: the base model, with a tokenizer.
        adapters: adapter directories by name, all with non-zero ``lora_B``.
        merged: ``base`` with the adapter ``final`` merged in by PEFT, float32, with a tokenizer.
    """

    base: Path
    adapters: dict[str, Path]
    merged: Path


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE without merges, so every byte is a token and every text can be told."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0], bos_token=None
    )
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    fast.chat_template = TEMPLATE
    return fast


def build_base(directory: Path, *, seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """Write a random two-layer Llama whose logits are far from flat, with its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            **{
                "vocab_size": len(tokenizer),
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": WINDOW,
                "bos_token_id": None,
                "eos_token_id": 0,
                "tie_word_embeddings": True,
                "initializer_range": 0.2,
                **config,
            }
        )
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model


def build_adapter(base: Path, directory: Path, *, seed: int, **config: Any) -> Path:
    """Write a LoRA adapter whose ``lora_B`` (and ``modules_to_save``) is random, not zero."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **config}
    with quiet_loading():
        peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                weight.normal_(std=0.2)
    with quiet_loading():
        peft.save_pretrained(directory)
    return directory


def peft_alone(model: LlamaForCausalLM, adapter: Path) -> PeftModel:
    """Plain PEFT: one adapter on a model of its own."""
    with quiet_loading():  # PEFT 0.21 reads an attribute that Transformers 5.23 deprecates
        return PeftModel.from_pretrained(model, adapter)


def build_run(root: Path) -> TinyRun:
    """Write a base, two adapters of different shapes, and the merged model of the first."""
    build_base(root / "base")
    final = build_adapter(root / "base", root / "final", seed=1)
    other = build_adapter(root / "base", root / "checkpoint-10", seed=2, r=2, target_modules=["o_proj", "v_proj"])
    model = LlamaForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
    peft_alone(model, final).merge_and_unload().save_pretrained(root / "merged")
    build_tokenizer().save_pretrained(root / "merged")
    return TinyRun(root / "base", {"final": final, "checkpoint-10": other}, root / "merged")


def chat(*texts: str) -> tuple[Message, ...]:
    """Turns that begin with the user's and alternate."""
    return tuple(Message(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(texts))


def row(index: int, *texts: str) -> Conversation:
    """A conversation with the id ``row-index``."""
    return Conversation(id=f"row-{index}", messages=chat(*texts))


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
