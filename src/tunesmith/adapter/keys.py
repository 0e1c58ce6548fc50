"""The names of an adapter's tensors: which module, and which part of it.

Source: ``get_peft_model_state_dict`` of PEFT 0.18 to 0.21, and the spellings of raw state dicts (``.default.``, no
``base_model.model.``) that other tools save.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from tunesmith.errors import AdapterError

KeyPart = Literal[
    "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_B_bias", "magnitude", "tokens",
    "base", "saved", "plain", "training",
]  # fmt: skip

_PREFIX = re.compile(r"(base_model\.model\.)?(?P<rest>.+)")
_NAMED = r"(?:\.(?P<adapter>[^.]+))?"

# In order: the first that matches the whole name is what it is.
_PATTERNS: tuple[tuple[KeyPart, re.Pattern[str]], ...] = (
    ("lora_A", re.compile(rf"(?P<module>.+)\.lora_A{_NAMED}\.weight")),
    ("lora_B", re.compile(rf"(?P<module>.+)\.lora_B{_NAMED}\.weight")),
    ("lora_B_bias", re.compile(rf"(?P<module>.+)\.lora_B{_NAMED}\.bias")),
    ("lora_embedding_A", re.compile(rf"(?P<module>.+)\.lora_embedding_A{_NAMED}")),
    ("lora_embedding_B", re.compile(rf"(?P<module>.+)\.lora_embedding_B{_NAMED}")),
    (
        "magnitude",
        re.compile(r"(?P<module>.+)\.lora_magnitude_vector(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?"),
    ),
    ("tokens", re.compile(rf"(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_delta{_NAMED}")),
    ("training", re.compile(rf"(?P<module>.+)\.lora_velora_embed{_NAMED}")),
    ("saved", re.compile(r"(?P<module>.+?)\.modules_to_save(?:\.default)?\.(?P<leaf>.+)")),
    ("base", re.compile(r"(?P<module>.+?)\.(?:token_adapter\.)?(?:base_layer|original_module)\.(?P<leaf>.+)")),
    ("plain", re.compile(r"(?P<module>(?!.*\.?(?:lora_|trainable_tokens_)).+)\.(?P<leaf>[^.]+)")),
)


@dataclass(frozen=True)
class Key:
    """What one adapter tensor is.

    Attributes:
        tensor: its name in the file.
        part: ``base`` is the module's own tensor under a wrapper, ``saved`` a trained copy, ``plain`` either;
            ``training`` is what only training needs.
        module: the module, without the prefix and without wrappers.
        depth: how many wrappers lie outside: PEFT nests one in another where several parameters of one module are
            adapted.
        leaf: for ``base``, ``saved`` and ``plain``: what follows the module's name, such as ``weight``.
    """

    tensor: str
    part: KeyPart
    module: str
    depth: int = 0
    leaf: str = ""

    @property
    def target(self) -> str:
        """The name, in the model, of a tensor that is stored whole."""
        return f"{self.module}.{self.leaf}"


def parse_keys(tensors: Iterable[str], *, where: object) -> tuple[list[Key], list[str]]:
    """Say what every tensor of an adapter's file is.

    Args:
        tensors: their names.
        where: the file, for errors.

    Returns:
        The keys, and the names that are none of PEFT's LoRA.

    Raises:
        AdapterError: the file holds tensors of several adapters.
    """
    keys, strange, adapters = [], [], set()
    for name in tensors:
        rest = _PREFIX.fullmatch(name)
        match, part = _first(rest["rest"] if rest else name)
        if match is None or part is None:
            strange.append(name)
            continue
        found = match.groupdict()
        if found.get("adapter"):
            adapters.add(found["adapter"])
        module, depth = _unwrapped(found["module"])
        keys.append(Key(tensor=name, part=part, module=module, depth=depth, leaf=found.get("leaf") or ""))
    if len(adapters) > 1:
        raise AdapterError(
            "The file holds the tensors of several adapters.",
            where=where,
            found=", ".join(sorted(adapters)[:6]),
            next_step="save the adapter that is meant with save_pretrained",
        )
    return keys, strange


def _first(name: str) -> tuple[re.Match[str] | None, KeyPart | None]:
    for part, pattern in _PATTERNS:
        match = pattern.fullmatch(name)
        if match:
            return match, part
    return None, None


def _unwrapped(module: str) -> tuple[str, int]:
    """A module's own name, and how many ``base_layer`` it ends in."""
    parts = module.split(".")
    depth = 0
    while len(parts) > 1 and parts[-1] == "base_layer":
        parts.pop()
        depth += 1
    return ".".join(part for part in parts if part not in ("base_layer", "token_adapter")), depth
