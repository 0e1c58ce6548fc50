"""What each tensor of a GGUF file was in the model: llama.cpp's names, and what a converter does to the numbers.

Names come from the official package's ``TensorNameMap``.  What is done to the numbers is known family by family:

- Llama and its kin keep the two halves of a head's rotary dimensions apart, llama.cpp's kernels for them want them
  interleaved: rows of ``q_proj`` and ``k_proj`` are permuted within each head.
- Gemma multiplies by 1 + w where others multiply by w: 1 is added to every norm.
- Experts that a model stores one by one are stacked.

An architecture that is not listed here is one whose conversion this version cannot prove.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.checkpoint import Checkpoint, Float64

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_MIXTRAL = re.compile(r"^model\.(layers\.\d+)\.block_sparse_moe\.experts\.(w\d)$")
_LEFT_OUT = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
OUTPUT, TOKENS = "output.weight", "token_embd.weight"
# Made of the configuration, not of a tensor.
COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True)
class Family:
    """What a converter does to the models of an architecture.

    Attributes:
        gguf: llama.cpp's name of it.
        permuted: rows of the query and key projections are interleaved head by head.
        norm_plus_one: 1 is added to norms.
        head_left_out: a head is never written, whatever the model stores.
    """

    gguf: str
    permuted: bool = False
    norm_plus_one: bool = False
    head_left_out: bool = False


_LLAMA = Family("llama", permuted=True)
FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "MixtralForCausalLM": _LLAMA,
    "GraniteForCausalLM": Family("granite", permuted=True),
    "SmolLM3ForCausalLM": Family("smollm3", permuted=True),
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen2MoeForCausalLM": Family("qwen2moe"),
    "Qwen3ForCausalLM": Family("qwen3"),
    "Qwen3MoeForCausalLM": Family("qwen3moe"),
    "Phi3ForCausalLM": Family("phi3"),
    "GemmaForCausalLM": Family("gemma", norm_plus_one=True, head_left_out=True),
    "Gemma2ForCausalLM": Family("gemma2", norm_plus_one=True, head_left_out=True),
    "Gemma3ForCausalLM": Family("gemma3", norm_plus_one=True),
    "Olmo2ForCausalLM": Family("olmo2"),
}


@dataclass(frozen=True)
class Source:
    """Where the numbers of one GGUF tensor come from.

    Attributes:
        names: the model's tensor, or those that are stacked, in their order.
        heads: rows are interleaved within each of so many heads; None for as they are.
        plus_one: 1 is added.
        stacked: the file has a further, first dimension, of as many as there are names.
    """

    names: tuple[str, ...]
    heads: int | None = None
    plus_one: bool = False
    stacked: bool = False

    def shape(self, model: Checkpoint) -> tuple[int, ...]:
        """The shape that the file must have."""
        shape = model.info(self.names[0]).shape
        return (len(self.names), *shape) if self.stacked else shape

    def tiles(self, model: Checkpoint, elements: int) -> Iterator[tuple[int | None, int, int]]:
        """Which (block, first row, row to stop before) to look at in turn, about ``elements`` numbers each."""
        shape = model.info(self.names[0]).shape
        rows = shape[0] if len(shape) > 1 else 1
        columns = max(1, model.info(self.names[0]).elements // max(1, rows))
        step = max(1, elements // columns)
        if self.heads:
            head = max(1, rows // self.heads)
            step = -(-step // head) * head  # whole heads, within which rows change places
        for block in range(len(self.names)) if self.stacked else (None,):
            for start in range(0, rows, step):
                yield block, start, min(rows, start + step)

    def exact(self, model: Checkpoint, block: int | None, start: int, stop: int) -> Float64:
        """The exact numbers that some of the file's rows stand for.

        Args:
            model: the model.
            block: which matrix of a stack.
            start: first row.
            stop: row to stop before; both of whole heads where rows are interleaved.

        Returns:
            Shape ``(stop - start, columns)``; a vector is one row.
        """
        name = self.names[block or 0]
        if len(model.info(name).shape) > 1:
            rows = model.read_float64(name, start, stop)
            rows = rows.reshape(rows.shape[0], -1)
        else:
            rows = model.read_float64(name).reshape(1, -1)
        if self.heads:
            rows = interleaved(rows, self.heads, model.info(name).shape[0])
        return rows + 1 if self.plus_one else rows


def interleaved(rows: Float64, heads: int, of_rows: int) -> Float64:
    """Rows of whole heads (or a bias as one row), with the two halves of each head's dimensions interleaved."""
    half = of_rows // heads // 2
    shape = rows.shape
    turned = rows.reshape(-1, 2, half, shape[1]) if shape[0] > 1 else rows.reshape(-1, 2, half, 1)
    return turned.swapaxes(1, 2).reshape(shape)


def family_of(config: Mapping[str, Any]) -> Family | None:
    """What is known of a model's architecture; None where that is nothing."""
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    return FAMILIES.get(name) if isinstance(name, str) else None


def sources_of(model: Checkpoint, family: Family) -> tuple[dict[str, Source], list[str]]:
    """The GGUF tensors that a model must become, by name, and the model's tensors that have no place.

    Args:
        model: the model.
        family: its family.
    """
    stacks: dict[str, dict[int, str]] = {}
    found: dict[str, str] = {}
    lost: list[str] = []
    places = _Names(family, int(model.config.get("num_hidden_layers") or 0))
    for name in model.tensors:
        if name.endswith(_LEFT_OUT) or (name == _HEAD and family.head_left_out):
            continue
        expert = _EXPERT.search(name)
        target = places.of(_EXPERT.sub(".experts.", name))
        if target is None:
            lost.append(name)
        elif expert:
            stacks.setdefault(target, {})[int(expert.group(1))] = name
        else:
            found[target] = name
    sources = {target: _source(model, family, target, name) for target, name in found.items()}
    sources |= {
        target: Source(tuple(each for _, each in sorted(parts.items())), stacked=True)
        for target, parts in stacks.items()
    }
    return sources, lost


def _source(model: Checkpoint, family: Family, target: str, name: str) -> Source:
    heads = None
    if family.permuted and (found := re.search(r"\.attn_([qk])\.(weight|bias)$", target)):
        count = int(model.config.get("num_attention_heads") or 1)
        kept = model.config.get("num_key_value_heads")
        heads = count if found.group(1) == "q" or not kept else int(kept)
    return Source((name,), heads=heads, plus_one=family.norm_plus_one and name.endswith("norm.weight"))


class _Names:
    """The official package's table of names for one architecture."""

    def __init__(self, family: Family, layers: int) -> None:
        import gguf

        architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.gguf)
        self._map = gguf.get_tensor_name_map(architecture, layers)

    def of(self, name: str) -> str | None:
        suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), "")
        stem = name.removesuffix(suffix)
        if mixtral := _MIXTRAL.match(stem):
            stem = f"{mixtral.group(1)}.feed_forward.experts.{mixtral.group(2)}"
        found = self._map.get_name(stem)
        return None if found is None else f"{found}{suffix}"


def tied(config: Mapping[str, Any], model: Checkpoint) -> bool:
    """Whether the head is the embedding: so declared, or left out with nothing in its place."""
    return bool(config.get("tie_word_embeddings", False)) or _HEAD not in model.tensors


def embedding_name(model: Checkpoint) -> str | None:
    """The embedding's name in the model."""
    return next((name for name in (_EMBEDDING, "embed_tokens.weight") if name in model.tensors), None)
