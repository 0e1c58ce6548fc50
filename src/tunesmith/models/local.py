"""The engine of this machine: all variants of one base, their weights in memory once, row beside row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tunesmith.adapter import ADAPTER_CONFIG
from tunesmith.checkpoint import CONFIG_FILE, read_json_object, weights_sha256
from tunesmith.models.engine import (
    Capabilities,
    Generation,
    GenerationSettings,
    OnGeneration,
    OnScore,
    OnText,
    Prompt,
    Request,
    RowScore,
    ScoredRow,
)
from tunesmith.models.generate import generate, prompt_ids
from tunesmith.models.score import score
from tunesmith.models.variants import VariantSet
from tunesmith.progress import Cancellation, ProgressCallback, no_progress
from tunesmith.record import Finding


@dataclass(frozen=True)
class RenderedPrompt:
    """What a model is really given.

    Attributes:
        text: the prompt as the chat template renders it, special tokens shown.
        token_ids: its tokens.
    """

    text: str
    token_ids: tuple[int, ...]


class LocalEngine:
    """Answers and scores by the variants that are loaded here.

    Args:
        variants: the loaded variants.

    Attributes:
        variants: the same.
    """

    def __init__(self, variants: VariantSet) -> None:
        self.variants = variants
        self._hashes: dict[str, str] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The variants' names, ``base`` first."""
        return self.variants.names

    @property
    def capabilities(self) -> Capabilities:
        """Where it runs, and which variants cannot share a batch."""
        found = [
            Finding(code="engine_in_turn", severity="info", params={"name": name, "module": module})
            for name, module in self.variants.in_turn.items()
        ]
        if any(variant.kind == "full" for variant in self.variants.variants):
            found.append(
                Finding(code="engine_full_models", severity="info", params={"budget": self.variants.full_bytes[1]})
            )
        if self.variants.dtype != "float32":
            found.append(Finding(code="engine_rounds", severity="info", params={"dtype": self.variants.dtype}))
        return Capabilities(kind="local", where=self.variants.device, dtype=self.variants.dtype, findings=tuple(found))

    def identity(self, variant: str) -> str:
        """A hash of a variant's weights, of its tokenizer and template, and of the arithmetic.

        Raises:
            DataError: there is no such variant.
            CheckpointError: its files cannot be read.
        """
        found = self.variants.variant(variant)
        parts = [*self._arithmetic, self._once("tokenizer", variant, lambda: _tokenizer_hash(self._tokenizer(variant)))]
        base = self.variants.variants[0].path
        paths = [found.path] if found.kind == "full" else list(dict.fromkeys([base, found.path]))
        parts += [self._once("weights", path, partial(_directory_hash, Path(path))) for path in paths]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def render(self, variant: str, prompt: Prompt) -> RenderedPrompt:
        """What a variant would be given for a prompt.

        Raises:
            DataError: no such variant, or no chat template.
        """
        tokenizer = self._tokenizer(variant)
        ids = prompt_ids(tokenizer, prompt)
        return RenderedPrompt(tokenizer.decode(ids, skip_special_tokens=False), tuple(ids))

    def generate(
        self,
        requests: Sequence[Request],
        settings: GenerationSettings | None = None,
        *,
        on_text: OnText | None = None,
        on_done: OnGeneration | None = None,
        progress: ProgressCallback = no_progress,
        cancellation: Cancellation | None = None,
    ) -> list[Generation]:
        """Answer every request: see :meth:`tunesmith.models.engine.Engine.generate`."""
        return generate(
            self.variants,
            requests,
            settings,
            on_text=on_text,
            on_done=on_done,
            progress=progress,
            cancellation=cancellation,
        )

    def score(
        self,
        names: Sequence[str],
        rows: Sequence[ScoredRow],
        *,
        reference: str | None = None,
        on_done: OnScore | None = None,
        progress: ProgressCallback = no_progress,
        cancellation: Cancellation | None = None,
    ) -> dict[str, list[RowScore]]:
        """Score every row under every variant: see :meth:`tunesmith.models.engine.Engine.score`."""
        return score(
            self.variants,
            names,
            rows,
            reference=reference,
            on_done=on_done,
            progress=progress,
            cancellation=cancellation,
        )

    def _tokenizer(self, variant: str) -> Any:
        return self.variants.tokenizer(variant)

    def _once(self, what: str, key: str, make: Callable[[], str]) -> str:
        name = f"{what}:{key}"
        if name not in self._hashes:
            self._hashes[name] = make()
        return self._hashes[name]

    @cached_property
    def _arithmetic(self) -> list[str]:
        """What the numbers depend on beside weights: sums in another order round in another way."""
        import torch
        import transformers

        return [self.variants.dtype, self.variants.device, torch.__version__, transformers.__version__]


def _tokenizer_hash(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(
        f"{vocabulary}\n{tokenizer.chat_template}\n{tokenizer.special_tokens_map}".encode()
    ).hexdigest()


def _directory_hash(path: Path) -> str:
    """The weights of a model or an adapter, and the config that says what they mean."""
    config = next(path / name for name in (ADAPTER_CONFIG, CONFIG_FILE) if (path / name).is_file())
    meaning = json.dumps(read_json_object(config), sort_keys=True)
    return hashlib.sha256(f"{weights_sha256(path)}\n{meaning}".encode()).hexdigest()
