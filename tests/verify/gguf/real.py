"""Tiny models of many families, converted by llama.cpp's own script: once, in one process, for all that ask.

Two tokenizers: SmolLM2's, which is the embedded model's and one whose way of cutting text the script knows, and a
sentence-piece model of a few hundred pieces, which has no such way.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from tests.tiny_models import TEMPLATE
from tunesmith.checkpoint import locate_base
from tunesmith.export.gguf.converter import MODEL_SCRIPT, find_converter, safe_view

# As SmolLM2's own tokenizer has it; the embedded one was read from a GGUF file, which keeps but a name of it.
OWN_CUT = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
_CORPUS = (
    "The capital of France is known for its rivers, its bridges and its bread. Name three colours: red, green, blue.",
    "def add(first, second):\n    return first + second  # write a function that adds two numbers",
    "机器学习是让计算机从数据中学习规律的方法。请用一句话解释什么是机器学习。",
    "Die Straße ist naß, und über allen Gipfeln ist Ruh. 12345 67890",
)
_PIECES = 384
_UNKNOWN, _BOS, _EOS = "<unk>", "<s>", "</s>"
_END = "<|endoftext|>"  # llama.cpp looks for it in whatever is called Phi-3
# Converts a list of (model, out, type) as the script's own command line does, with its imports done once.
_MANY = """
import json, runpy, sys
script, pairs = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, str(__import__("pathlib").Path(script).parent))
for model, out, kind in pairs:
    sys.argv = [script, model, "--outfile", out, "--outtype", kind]
    runpy.run_path(script, run_name="__main__")
"""


@dataclass(frozen=True)
class Recipe:
    """How a tiny model of a family is made.

    Attributes:
        config: transformers' class of configuration.
        pieces: its tokenizer is the sentence-piece one.
        own: what differs of its configuration.
        prefixed: a blank is put before a text, with ``pieces``.
    """

    config: str
    pieces: bool = False
    own: dict[str, Any] = field(default_factory=dict)
    prefixed: bool = True


_GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip
_LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8,
    "long_factor": [1.0 + at / 4 for at in range(8)],
    "original_max_position_embeddings": 4096, "factor": 2.0,
}  # fmt: skip
FAMILIES: dict[str, Recipe] = {
    "llama": Recipe("LlamaConfig", own={"attention_bias": True}),
    "llama-pieces": Recipe("LlamaConfig", pieces=True, own={"tie_word_embeddings": False}),
    "llama-rope-llama3": Recipe("LlamaConfig", pieces=True, own={"rope_parameters": _LLAMA3}),
    "llama-rope-linear": Recipe(
        "LlamaConfig",
        pieces=True,
        own={"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "llama-rope-yarn": Recipe(
        "LlamaConfig",
        pieces=True,
        own={
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "mistral": Recipe("MistralConfig", pieces=True, own={"sliding_window": None, "tie_word_embeddings": False}),
    "mixtral": Recipe(
        "MixtralConfig",
        pieces=True,
        own={"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False, "sliding_window": None},
    ),
    "qwen2": Recipe("Qwen2Config", pieces=True),
    "qwen2-moe": Recipe(
        "Qwen2MoeConfig",
        own={
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3": Recipe("Qwen3Config", pieces=True, own={"head_dim": 32}),
    "qwen3-moe": Recipe(
        "Qwen3MoeConfig",
        own={
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "head_dim": 32,
            "norm_topk_prob": True,
            "tie_word_embeddings": False,
        },
    ),
    "smollm3": Recipe("SmolLM3Config", pieces=True, own={"num_hidden_layers": 4, "pad_token_id": 2}),
    "phi3": Recipe(
        "Phi3Config", pieces=True, own={"tie_word_embeddings": False, "sliding_window": None, "pad_token_id": 2}
    ),
    "phi3-long": Recipe(
        "Phi3Config",
        pieces=True,
        own={
            "tie_word_embeddings": False,
            "sliding_window": 512,
            "pad_token_id": 2,
            "rope_parameters": _LONG,
            "max_position_embeddings": 8192,
            "original_max_position_embeddings": 4096,
        },
    ),
    "gemma": Recipe("GemmaConfig", pieces=True, own={"head_dim": 16}, prefixed=False),
    "gemma2": Recipe("Gemma2Config", pieces=True, own={**_GEMMA, "sliding_window": 256}, prefixed=False),
    "gemma3": Recipe("Gemma3TextConfig", pieces=True, own={**_GEMMA, "sliding_window": 256}, prefixed=False),
    "olmo2": Recipe("Olmo2Config", own={"tie_word_embeddings": False}),
    "granite": Recipe(
        "GraniteConfig",
        pieces=True,
        own={
            "embedding_multiplier": 4.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.25,
            "logits_scaling": 2.0,
        },
    ),
}


def build(folder: Path, family: str) -> Path:
    """Write a tiny random bf16 model of a family, with a real tokenizer."""
    recipe = FAMILIES[family]
    folder.mkdir(parents=True)
    size = _pieces(folder, prefixed=recipe.prefixed) if recipe.pieces else _smollm(folder)
    torch.manual_seed(7)
    settings = {
        "vocab_size": size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": True,
        "initializer_range": 0.15,
        **recipe.own,
    }
    model = AutoModelForCausalLM.from_config(getattr(transformers, recipe.config)(**settings), dtype=torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(folder)
    return folder


def convert(pairs: Sequence[tuple[Path, Path, str]]) -> None:
    """Convert (model, out, type) by llama.cpp's script, seen as the product shows them to it."""
    from contextlib import ExitStack

    script = find_converter(None).script(MODEL_SCRIPT)
    with ExitStack() as stack:
        asked = [
            (str(stack.enter_context(safe_view(model, name=model.name))), str(out), kind) for model, out, kind in pairs
        ]
        done = subprocess.run(
            [sys.executable, "-c", _MANY, str(script), json.dumps(asked)], capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr[-2000:]


def _smollm(folder: Path) -> int:
    source = locate_base("demo")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["pre_tokenizer"] = OWN_CUT
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    return 49152


def _pieces(folder: Path, *, prefixed: bool) -> int:
    """A sentence-piece model as Llama 2 has one, and the same as ``tokenizer.json``."""
    import sentencepiece as spm
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    written = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(_CORPUS * 20), model_writer=written, vocab_size=_PIECES, model_type="bpe",
        byte_fallback=True, character_coverage=0.99, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=prefixed, split_digits=True, control_symbols=[_END], minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    model = spm.SentencePieceProcessor(model_proto=written.getvalue())
    pieces = [model.id_to_piece(number) for number in range(model.vocab_size())]
    ranks = {piece: number for number, piece in enumerate(pieces)}
    merges = [
        (ranks[piece], (piece[:cut], piece[cut:]))
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in ranks and piece[cut:] in ranks and not model.is_byte(ranks[piece]) and ranks[piece] > 2
    ]
    bpe = BPE(
        vocab=ranks, merges=[pair for _, pair in sorted(merges)], byte_fallback=True, unk_token=_UNKNOWN, fuse_unk=True
    )
    tokenizer = Tokenizer(bpe)
    blank: list[Any] = [normalizers.Prepend("▁")] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*blank, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=_UNKNOWN, bos_token=_BOS, eos_token=_EOS, pad_token=_EOS
    )
    fast.add_special_tokens({"additional_special_tokens": [_END]})
    fast.chat_template = "{{ bos_token }}" + TEMPLATE
    fast.save_pretrained(folder)
    _begin_with_bos(folder)
    return _PIECES


def _begin_with_bos(folder: Path) -> None:
    """A text begins with ``<s>``, as in all families with such a tokenizer."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
