"""Where an adapter's names are in a base's files.

An adapter is named after the model in memory; the files may spell the same tensor otherwise: a tower's prefix has
moved between releases of transformers, GPT-2's files have none, and a mixture of experts is split on disk.
"""

from __future__ import annotations

import difflib
from collections.abc import Container, Iterator
from functools import cached_property
from typing import Any

from tunesmith.checkpoint import Checkpoint, Header, same_values

# Prefixes of a language model's own tensors, alone or as the tower of a larger model.
_TOWERS = (
    "model.language_model.", "language_model.model.", "language_model.", "model.text_model.", "text_model.",
    "thinker.model.", "model.", "transformer.", "",
)  # fmt: skip

# Modules that have two names: in memory, and on disk.
_RENAMED = ((".mlp.", ".block_sparse_moe."), ("vision_tower.", "vision_tower.vision_model."))

_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "embedding", "embeddings")
_HEADS = ("lm_head", "embed_out", "output")

_LAYER_DIGITS = 6


class Places:
    """The names of one base, and how they are found.

    Args:
        base: the base model.
    """

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self.tensors = base.tensors
        self.ambiguous: dict[str, list[str]] = {}

    def find(self, name: str) -> str | None:
        """The base's tensor of that name, in whatever spelling; None where it has none.

        Names that fit several tensors are kept in ``ambiguous``.
        """
        if name in self.tensors:
            return name
        return self._only(name, self._spelled(name, self.tensors))

    def find_module(self, module: str) -> str | None:
        """The base's module of that name, which has tensors below it; None where it has none."""
        if module in self._modules:
            return module
        return self._only(module, self._spelled(module, self._modules))

    def _spelled(self, name: str, known: Container[str]) -> list[str]:
        # A bare model's files lack the prefix that a model with a head puts before it, or the other way round.
        others = [name.partition(".")[2], *(f"{root}.{name}" for root in self._roots)]
        return [spelled for spelled in dict.fromkeys([*_spellings(name), *others]) if spelled in known]

    def _only(self, name: str, found: list[str]) -> str | None:
        if len(found) > 1:
            self.ambiguous[name] = found
        return found[0] if len(found) == 1 else None

    def written_as(self, name: str) -> str:
        """How a tensor that the base lacks is named in files that are spelled as the base's are."""
        if _leaf_module(name) in _HEADS and self.embedding and self.embedding.startswith("language_model.model."):
            return "language_model." + name.removeprefix("model.").removeprefix("language_model.")
        return name

    def is_vocabulary(self, name: str) -> bool:
        """Whether a tensor is the language model's embedding or its head, in the base's spelling."""
        return name in (self.embedding, self.head) or (name.endswith(".weight") and _leaf_module(name) in _HEADS)

    def nearest(self, name: str) -> str:
        """`` (nearest: …)`` with the most similar name of the base, or nothing."""
        near = difflib.get_close_matches(name, self.tensors, n=1, cutoff=0.5)
        return f" (nearest: {near[0]})" if near else ""

    @cached_property
    def _roots(self) -> set[str]:
        return {name.partition(".")[0] for name in self.tensors}

    @cached_property
    def _modules(self) -> set[str]:
        modules: set[str] = set()
        for name in self.tensors:
            parts = name.split(".")
            modules.update(".".join(parts[:end]) for end in range(1, len(parts)))
        return modules

    @cached_property
    def embedding(self) -> str | None:
        """The language model's input embedding."""
        found = [
            name
            for name, info in self.tensors.items()
            if name.endswith(".weight") and _leaf_module(name) in _EMBEDDINGS and len(info.shape) == 2
            if "vision" not in name and "visual" not in name
        ]
        return min(found, key=lambda name: name.count(".")) if found else None

    @cached_property
    def head(self) -> str | None:
        """The output head, where the files hold one."""
        found = [name for name in self.tensors if name.endswith(".weight") and _leaf_module(name) in _HEADS]
        return min(found, key=lambda name: name.count(".")) if found else None

    @cached_property
    def says_tied(self) -> bool | None:
        """What the configuration says of ``tie_word_embeddings``; None where it is silent."""
        for section in (self.base.config, self.base.config.get("text_config")):
            if isinstance(section, dict) and isinstance(section.get("tie_word_embeddings"), bool):
                return bool(section["tie_word_embeddings"])
        return None

    @cached_property
    def tied(self) -> bool:
        """Whether the head is the embedding's own tensor.

        The configuration says so, and no head of other numbers lies in the files: transformers 5 then takes that one.
        Where the configuration is silent (the classes' defaults differ), the files alone say it.
        """
        if self.embedding is None or self.says_tied is False:
            return False
        return self.head is None or self.same_as(self.head, self._shard(self.embedding), self.embedding)

    @cached_property
    def architecture(self) -> str:
        """The base's class, such as ``LlamaForCausalLM``; empty where the configuration names none."""
        names = self.base.config.get("architectures")
        return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""

    def _shard(self, name: str) -> Header:
        return self.base.shards[self.base.shard_of(name)]

    def same_as(self, name: str, other: Header, tensor: str) -> bool:
        """Whether a tensor of the base holds the same numbers as one of another file."""
        return same_values(self._shard(name), name, other, tensor)

    def section(self) -> str:
        """Where ``config.json`` keeps the language model's own settings: ``""`` or ``"text_config."``."""
        inner = self.base.config.get("text_config")
        return "text_config." if isinstance(inner, dict) and "vocab_size" in inner else ""

    def setting(self, key: str) -> Any:
        """A setting of the language model, from the section that has it."""
        inner = self.base.config.get("text_config")
        if isinstance(inner, dict) and key in inner:
            return inner[key]
        return self.base.config.get(key)


def is_embedding(module: str) -> bool:
    """Whether a module is an input embedding, by its name."""
    return module.rpartition(".")[2] in _EMBEDDINGS


def is_head(module: str) -> bool:
    """Whether a module is an output head, by its name."""
    return module.rpartition(".")[2] in _HEADS


def layer_of(name: str) -> tuple[str, int, str] | None:
    """What comes before the number of a tensor's layer, that number, and what comes after it."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if (
            part.isdecimal()
            and len(part) <= _LAYER_DIGITS
            and place
            and parts[place - 1] in ("layers", "h", "layer", "blocks", "block")
        ):
            return ".".join(parts[:place]) + ".", int(part), "." + ".".join(parts[place + 1 :])
    return None


def _leaf_module(name: str) -> str:
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 else ""


def _spellings(name: str) -> Iterator[str]:
    for prefix in _TOWERS:
        if not name.startswith(prefix):
            continue
        rest = name[len(prefix) :]
        for other in _TOWERS:
            yield from _renamed(other + rest)


def _renamed(name: str) -> Iterator[str]:
    yield name
    for memory, disk in _RENAMED:
        if disk in name:
            yield name.replace(disk, memory, 1)
        elif memory in name:
            yield name.replace(memory, disk, 1)
