"""An adapter directory as low-rank updates on base tensors, by name."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.adapter.config import Scaling, refusals
from tunesmith.adapter.records import LowRank
from tunesmith.checkpoint import (
    FLOAT_DTYPES,
    Checkpoint,
    Float64,
    TensorInfo,
    as_float64,
    read_header,
    read_json_object,
    read_rows,
)
from tunesmith.errors import AdapterError, AdapterMismatchError, UnsupportedAdapterError
from tunesmith.record import Finding

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")

# Architectures whose linear layers are Conv1D, stored as (in, out): a square one would fit either way.
_CONV1D_MODELS = {"clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"}

_UNMERGEABLE_TENSORS = (
    ("lora_embedding_", "an adapter on an embedding"),
    ("lora_magnitude_vector", "DoRA (a trained magnitude)"),
    ("lora_B.bias", "a bias on lora_B"),
    ("lora_B.default.bias", "a bias on lora_B"),
    ("trainable_tokens", "trained token rows"),
    ("modules_to_save", "a whole module that was trained beside the adapter"),
    ("base_layer", "an adapter on an embedding or on fused parameters"),
)


class Adapter:
    """One adapter directory: its configuration, and its tensors as updates.  Tensors are read when asked for.

    Args:
        path: a directory with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Attributes:
        path: the directory.
        config: the parsed configuration.
        header: the weights file's header.
        updates: one an adapted module, in the file's order.
        refusals: why it cannot be merged truly; empty where it can.
        findings: what the user should know about it.

    Raises:
        AdapterError: a file is missing, damaged or a pickle, or the tensors contradict the configuration.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not (self.path / ADAPTER_CONFIG).is_file():
            raise AdapterError("This directory holds no adapter.", where=self.path, expected=ADAPTER_CONFIG)
        self.config: dict[str, Any] = read_json_object(self.path / ADAPTER_CONFIG)
        weights = self.path / ADAPTER_WEIGHTS
        if not weights.is_file():
            raise self._no_weights()
        self.header = read_header(weights)
        self.findings: list[Finding] = []
        self.refusals = refusals(self.config)
        self.updates: tuple[LowRank, ...] = ()
        if self.config.get("peft_type") == "LORA":
            self.updates = self._read_updates()

    @property
    def base_model(self) -> str | None:
        """The base that the configuration names."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    def require_mergeable(self) -> None:
        """Refuse an adapter that this version would not merge truly.

        Raises:
            UnsupportedAdapterError: with every reason.
        """
        if self.refusals:
            raise UnsupportedAdapterError(
                "This adapter holds what this version cannot merge truly, so it is refused rather than merged in part.",
                where=self.path,
                details=self.refusals,
            )

    def factors(self, update: LowRank) -> tuple[Float64, Float64]:
        """The factors of one update, exactly.

        Args:
            update: one of ``updates``.

        Returns:
            A of shape (r, in) and B of shape (out, r), both float64.

        Raises:
            AdapterError: a factor holds NaN or infinity.
        """
        pair = []
        for name in (update.lora_A, update.lora_B):
            factor = as_float64(read_rows(self.header, name), self.header.tensors[name].dtype)
            if not np.isfinite(factor).all():
                raise AdapterError("The adapter holds NaN or infinity.", where=f"{self.header.path}: {name}")
            pair.append(factor)
        return pair[0], pair[1]

    def bind(self, base: Checkpoint) -> tuple[LowRank, ...]:
        """Check that every update fits a tensor of the base.

        Args:
            base: the base model.

        Returns:
            The updates, each on a tensor of that name and shape.

        Raises:
            UnsupportedAdapterError: the base's own form is one that cannot be merged into.
            AdapterMismatchError: names or shapes do not fit; all that do not are listed.
        """
        self.require_mergeable()
        _check_base_form(base)
        tensors = base.tensors
        strays = [(update, problem) for update in self.updates if (problem := self._misfit(update, base, tensors))]
        if strays:
            # To look for the nearest name is slow, so that is done for the names that are shown.
            problems = [problem + _nearest(update.name, tensors) for update, problem in strays[:8]]
            raise AdapterMismatchError(
                f"The adapter does not fit this base model: {len(strays)} of {len(self.updates)} have no place.",
                where=self.path,
                expected=f"base model {self.base_model}" if self.base_model else None,
                found=f"base model {base.path}",
                details=problems + ([f"… and {len(strays) - 8} more"] if len(strays) > 8 else []),
                next_step="pass --base with the model that was tuned",
            )
        return self.updates

    def _misfit(self, update: LowRank, base: Checkpoint, tensors: dict[str, TensorInfo]) -> str | None:
        # A loader of a tied model takes the embedding for the head, even where the file holds a head.
        if update.module.endswith("lm_head") and base.config.get("tie_word_embeddings"):
            return f"{update.name}: the base's head is tied to its embedding, which cannot be merged here yet"
        if update.name not in tensors:
            return f"{update.name}: not in the base"
        info = tensors[update.name]
        shape = (self.header.tensors[update.lora_B].shape[0], self.header.tensors[update.lora_A].shape[1])
        if info.shape != shape:
            return f"{update.name}: the adapter's shape is {list(shape)}, the base's {list(info.shape)}"
        if info.dtype not in FLOAT_DTYPES:
            return f"{update.name}: the base stores it as {info.dtype}, which is a quantized form"
        return None

    def _read_updates(self) -> tuple[LowRank, ...]:
        pairs: dict[str, dict[str, str]] = {}
        for name in self.header.tensors:
            match = _FACTOR.fullmatch(name)
            reason = next((reason for mark, reason in _UNMERGEABLE_TENSORS if mark in name), None)
            if match and not reason:
                pair = pairs.setdefault(match["module"], {})
                if match["factor"] in pair:
                    raise AdapterError(
                        "Two tensors are the same factor of one module.",
                        where=self.header.path,
                        details=[pair[match["factor"]], name],
                    )
                pair[match["factor"]] = name
            else:
                self.refusals.append(f"{name}: {reason or 'a tensor that this version does not know'}")
        halves = [module for module, pair in pairs.items() if len(pair) != 2]
        if halves:
            raise AdapterError("Modules lack one of lora_A and lora_B.", where=self.header.path, details=halves[:10])
        if not pairs and not self.refusals:
            raise AdapterError("The adapter holds no tensors.", where=self.header.path)
        scaling = Scaling(self.config)
        updates = tuple(self._update(module, pair["A"], pair["B"], scaling) for module, pair in pairs.items())
        self.findings += scaling.overlapping
        return updates

    def _update(self, module: str, lora_a: str, lora_b: str, scaling: Scaling) -> LowRank:
        a, b = self.header.tensors[lora_a], self.header.tensors[lora_b]
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or a.shape[0] == 0:
            raise AdapterError(
                "lora_A and lora_B do not fit each other.",
                where=f"{self.header.path}: {module}",
                expected="A of (r, in) and B of (out, r)",
                found=f"A of {list(a.shape)} and B of {list(b.shape)}",
            )
        if a.dtype not in FLOAT_DTYPES or b.dtype not in FLOAT_DTYPES:
            raise AdapterError(
                "A factor is stored in a dtype that cannot be computed with here.",
                where=f"{self.header.path}: {module}",
                expected=", ".join(FLOAT_DTYPES),
                found=f"A of {a.dtype} and B of {b.dtype}",
            )
        r = a.shape[0]
        if r != scaling.rank(module):
            raise AdapterError(
                "The configuration's rank is not the tensors'.",
                where=f"{self.path}: {module}",
                expected=f"r = {scaling.rank(module)} (adapter_config.json)",
                found=f"r = {r} (rows of lora_A)",
            )
        return LowRank(
            name=f"{module}.weight",
            module=module,
            r=r,
            scaling=scaling.scaling(module, r),
            lora_A=lora_a,
            lora_B=lora_b,
        )

    def _no_weights(self) -> AdapterError:
        pickle = self.path / "adapter_model.bin"
        if pickle.exists():
            return AdapterError(
                "The adapter's weights are a pickle, which can run code when it is read; Tunesmith never reads one.",
                where=pickle,
                expected=ADAPTER_WEIGHTS,
                next_step="load it where you trust it and save it again with safe_serialization=True",
            )
        return AdapterError("The adapter's weights are missing.", where=self.path, expected=ADAPTER_WEIGHTS)


def _nearest(name: str, tensors: Iterable[str]) -> str:
    known = list(tensors)
    near = [] if name in known else difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (nearest: {near[0]})" if near else ""


def _check_base_form(base: Checkpoint) -> None:
    if base.config.get("quantization_config"):
        raise UnsupportedAdapterError(
            "The base model is quantized; a merge into it would round every weight again.",
            where=base.path / "config.json",
            expected="the full-precision model that it was made from",
            found="quantization_config",
            next_step="pass --base with the full-precision model",
        )
    if base.config.get("model_type") in _CONV1D_MODELS:
        raise UnsupportedAdapterError(
            "The base's linear layers are Conv1D, stored transposed, which cannot be merged here yet.",
            where=base.path / "config.json",
            found=f"model_type {base.config['model_type']}",
        )
