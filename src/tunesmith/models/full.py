"""Complete models beside the base, loaded when they are first needed, as many as a memory budget holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import CheckpointError
from tunesmith.models.compute import free_bytes
from tunesmith.models.loading import load_model, load_tokenizer
from tunesmith.models.quantized import elements_of
from tunesmith.models.quiet import quiet_loading

# Of the memory that is free when the first one is loaded; the rest is for activations, and for others.
_SHARE = 0.5


@dataclass(frozen=True)
class _Loaded:
    model: Any
    tokenizer: Any
    size_bytes: int


class FullModels:
    """Models with weights of their own, the least lately used of which makes room for another.

    The one that is asked for is loaded whatever the budget says: it is the others that go.

    Args:
        budget_bytes: what their weights may take together; None for half of the memory that is free.
        quantization: quantize each while it is loaded: see :func:`tunesmith.models.on_load.on_load_arguments`.
    """

    def __init__(self, budget_bytes: int | None = None, *, quantization: str | None = None) -> None:
        self._budget_bytes = budget_bytes
        self._quantization = quantization
        self._loaded: dict[str, _Loaded] = {}

    @property
    def budget_bytes(self) -> int:
        """What they may take together, in bytes."""
        if self._budget_bytes is None:
            self._budget_bytes = int(_SHARE * free_bytes())
        return self._budget_bytes

    @property
    def size_bytes(self) -> int:
        """What those in memory take now, in bytes."""
        return sum(one.size_bytes for one in self._loaded.values())

    def get(self, path: str | Path, *, dtype: str, device: str) -> tuple[Any, Any]:
        """A model and its tokenizer, loaded if they are not there.

        Args:
            path: the model's directory.
            dtype: to load it in.
            device: to load it to.

        Raises:
            CheckpointError: it cannot be loaded.
        """
        key, needed = str(path), _weights_bytes(Path(path), dtype)
        if key in self._loaded:
            self._loaded[key] = found = self._loaded.pop(key)  # the last is the latest used
            return found.model, found.tokenizer
        while self._loaded and self.size_bytes + needed > self.budget_bytes:
            del self._loaded[next(iter(self._loaded))]
        with quiet_loading():
            model = load_model(
                Path(path), dtype=dtype, device=device, error=CheckpointError, quantization=self._quantization
            )
            tokenizer = load_tokenizer(Path(path))
        size = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
        self._loaded[key] = _Loaded(model, tokenizer, size)
        return model, tokenizer


def _weights_bytes(path: Path, dtype: str) -> int:
    """About what a directory's weights will take in memory: their elements by their headers, in ``dtype``."""
    from tunesmith.checkpoint import Checkpoint

    itemsize = 4 if dtype == "float32" else 2
    try:
        return itemsize * elements_of(Checkpoint(path))
    except CheckpointError:
        return 0  # loading it tells what is wrong
