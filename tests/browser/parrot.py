"""A model that says what it was given to say, whatever it is asked, and an adapter that changes one word of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny_models import build_tokenizer
from tunesmith.models.quiet import quiet_loading

WIDTH = 64
SURE = 40.0  # so much more likely than all else is what it says next


def build_parrot(root: Path, said: Sequence[str], *, instead: tuple[int, str]) -> Path:
    """Write ``base``, which answers with a row of pieces, and ``run``, an adapter that says one of them otherwise.

    Nothing is drawn by chance: each token of the answer has a dimension of its own, attention and MLP add nothing, and
    the head maps each to its follower.  The adapter makes the MLP add another follower after one token.

    Args:
        root: where both are written.
        said: the pieces, each a token of its own; no two alike.
        instead: the place of the piece that the adapter replaces, and by what.

    Returns:
        The run.
    """
    place, other = instead
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in (*said, other)])
    ids = [tokenizer.convert_tokens_to_ids(piece) for piece in ("Ċ", *said)]
    model = LlamaForCausalLM(_config(len(tokenizer)))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.zero_()
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        for dimension, (token, follower) in enumerate(zip(ids, [*ids[1:], 0], strict=True)):
            embedding[token, dimension] = 1.0
            head[follower, dimension] = SURE / WIDTH**0.5
        changed = tokenizer.convert_tokens_to_ids(other)
        embedding[changed, place + 1] = 1.0  # it is followed as the piece would be
        head[changed, WIDTH - 1] = SURE
        mlp = model.model.layers[-1].mlp
        mlp.gate_proj.weight[0, place] = mlp.up_proj.weight[0, place] = 1.0  # it notices the piece before
    model.generation_config.eos_token_id = 0
    model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    return _adapter(model, root)


def _config(vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=False,
    )


def _adapter(model: LlamaForCausalLM, root: Path) -> Path:
    with quiet_loading():
        peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=1, lora_alpha=1, target_modules=["down_proj"]))
        with torch.no_grad():
            for name, weight in peft.named_parameters():
                if "lora_" in name:
                    weight.zero_()
                    weight[(0, 0) if "lora_A" in name else (WIDTH - 1, 0)] = 1.0
        peft.peft_config["default"].base_model_name_or_path = str(root / "base")
        peft.save_pretrained(root / "run")
    return root / "run"
