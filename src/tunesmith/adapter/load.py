"""An adapter directory: its configuration, and what each of its tensors is, before any base is known."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tunesmith.adapter.config import Scaling, refusals, residual_init
from tunesmith.adapter.experts import targeted_parameters
from tunesmith.adapter.keys import Key, parse_keys
from tunesmith.adapter.mlx import (
    MLX_REFUSAL,
    MLX_WEIGHTS,
    MlxScaling,
    View,
    as_peft_config,
    as_peft_tensors,
    is_mlx,
    mlx_keys,
)
from tunesmith.adapter.records import Span
from tunesmith.checkpoint import (
    FLOAT_DTYPES,
    Array,
    Float64,
    as_float64,
    is_file,
    read_header,
    read_json_object,
    read_rows,
    read_together,
    storage_path,
    stored_path,
)
from tunesmith.errors import AdapterError, UnsupportedAdapterError
from tunesmith.record import Finding

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_B_bias", "magnitude")
# Tensors of LoRA's relatives, and of tools that rename.
_OTHER_TENSORS = (
    ("lora_diag", "KaSA's diagonal"),
    ("lora_E", "AdaLoRA's singular values"),
    ("monteclora", "MonteCLoRA's sampler"),
    ("lora_router", "a router between adapters"),
)
_KEPT_FAR_BYTES = 512 << 20  # of an adapter in a storage, so that no unit of work asks for a factor again
_TOGETHER_BYTES = 2 << 20  # of an adapter in a storage, neighbours that are asked for at once
_KEPT_TENSORS = 4  # the experts of one layer share two, and two layers may be in work at once


@dataclass(frozen=True)
class Adapted:
    """One pair of factors.

    Attributes:
        module: the adapted module, as the adapter names it.
        depth: how many wrappers lie outside this one, where several parameters of a module are adapted.
        parameter: which parameter of the module ``target_parameters`` means; None for the weight of a layer.
        embedding: whether A is stored as (r, vocabulary) and B as (hidden, r).
        lora_A: name of A in the file.
        lora_B: name of B.
        bias: name of lora_B's bias; None where it has none.
        magnitude: name of DoRA's magnitude; None where it has none.
        r: the rank; of one matrix, where the pair adapts a stack of them.
        stacked: how many matrices the pair adapts.
        scaling: what multiplies B·A.
    """

    module: str
    depth: int
    parameter: str | None
    embedding: bool
    lora_A: str
    lora_B: str
    bias: str | None
    magnitude: str | None
    r: int
    stacked: int
    scaling: float


class Adapter:
    """One adapter directory, opened.  Tensors are read when asked for.

    Args:
        path: a directory with ``adapter_config.json`` and ``adapter_model.safetensors``, or with mlx-lm's
            ``adapters.safetensors``.

    Attributes:
        path: the directory.
        format: whose files these are.
        config: the parsed configuration; mlx-lm's in PEFT's words.
        header: the weights file's header; mlx-lm's factors in PEFT's shapes.
        adapted: one an adapted weight, in the file's order.
        whole: tensors that are stored whole (saved modules, biases, token rows), in the file's order.
        refusals: why it cannot be merged truly; empty where nothing speaks against it yet.
        findings: what the user should know about it.

    Raises:
        AdapterError: a file is missing, damaged or a pickle, or the tensors contradict the configuration.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = storage_path(path)
        if not is_file(self.path / ADAPTER_CONFIG):
            raise AdapterError("This directory holds no adapter.", where=self.path, expected=ADAPTER_CONFIG)
        config = read_json_object(self.path / ADAPTER_CONFIG)
        self.format: Literal["peft", "mlx-lm"] = "mlx-lm" if is_mlx(self.path, ADAPTER_WEIGHTS) else "peft"
        self.findings: list[Finding] = []
        self._far = stored_path(self.path) is not None
        self.adapted: tuple[Adapted, ...] = ()
        self.whole: tuple[Key, ...] = ()
        self._kept: OrderedDict[str, Array] = OrderedDict()
        self._kept_bytes = 0
        self._keeping = threading.Lock()
        self._asking = tuple(threading.Lock() for _ in range(16))  # so that no two threads ask for the same
        if self.format == "mlx-lm":
            self._open_mlx(config)
        else:
            self._open_peft(config)

    def __reduce__(self) -> tuple[type[Adapter], tuple[Path]]:
        """In another process it is opened again."""
        return type(self), (self.path,)

    @property
    def base_model(self) -> str | None:
        """The base that the configuration names."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @property
    def residual(self) -> str | None:
        """The initialisation that made the adapter relative to a *changed* base; None where none did."""
        return residual_init(self.config)

    def require_mergeable(self, *, base_is_residual: bool = False) -> None:
        """Refuse an adapter that this version would not merge truly.

        Args:
            base_is_residual: whether the base is what an initialisation such as PiSSA's left of it.

        Raises:
            UnsupportedAdapterError: with every reason.
        """
        reasons = list(self.refusals)
        if self.residual and not base_is_residual:
            reasons.append(
                f"{self.residual}: the update is relative to a base that was changed when training began; merge into "
                "that changed base and pass --base-is-residual, or convert the adapter with "
                "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
            )
        if reasons:
            raise UnsupportedAdapterError(
                "This adapter holds what this version cannot merge truly, so it is refused rather than merged in part.",
                where=self.path,
                details=reasons,
            )

    def stored(self, tensor: str) -> Array:
        """One tensor of the file, whole, as stored; a factor of another format's, in PEFT's shape."""
        return self._all_stored((tensor,))[tensor]

    def _all_stored(self, tensors: Sequence[str]) -> dict[str, Array]:
        """The same of neighbours in the file, read at once."""
        found = zip(tensors, read_together(self._stored, tensors), strict=True)
        return {name: self._views[name](one) if name in self._views else one for name, one in found}

    def finite(self, tensor: str, rows: Span | None = None, columns: Span | None = None) -> Float64:
        """One tensor, or a part of it, exactly, as a matrix: its first dimension by all the others.

        Args:
            tensor: its name.
            rows: which of its rows; None for all.
            columns: which of its columns; None for all.

        Raises:
            AdapterError: it holds NaN or infinity.
        """
        # Of an expert's, the others want the rest of the same tensor soon.
        if self._far or (columns is not None and columns[2] != 1):
            stored = self._kept_whole(tensor)[_slice(rows)]
        elif rows is not None and rows[2] == 1 and tensor not in self._views:
            stored = read_rows(self.header, tensor, rows[0], rows[1])
        else:
            stored = self.stored(tensor)[_slice(rows)]
        matrix = stored.reshape(stored.shape[0], -1)[:, _slice(columns)]
        values = as_float64(matrix, self.header.tensors[tensor].dtype)
        if not np.isfinite(values).all():
            raise AdapterError(
                "The adapter holds NaN or infinity.",
                where=f"{self.header.path}: {tensor}",
                next_step="choose a checkpoint from before the training diverged",
            )
        return values

    def _kept_whole(self, tensor: str) -> Array:
        """A tensor that is needed again: of a storage's, any; else one that every expert needs some columns of."""
        group = self._neighbours.get(tensor, (tensor,)) if self._far else (tensor,)
        with self._asking[hash(group) % len(self._asking)]:
            kept = self._kept.get(tensor)
            if kept is None:
                found = self._all_stored(group)
                kept = found[tensor]
                self._keep(found)
        return kept

    @cached_property
    def _neighbours(self) -> dict[str, tuple[str, ...]]:
        """By tensor, those beside it in the file, and itself, that are asked for together."""
        groups: list[list[str]] = []
        room = 0
        for name, info in sorted(self._stored.tensors.items(), key=lambda item: item[1].begin):
            if info.dtype not in FLOAT_DTYPES:
                continue
            room -= info.size_bytes
            if room < 0 or not groups:
                groups.append([])
                room = _TOGETHER_BYTES - info.size_bytes
            groups[-1].append(name)
        return {name: tuple(group) for group in groups for name in group}

    def _keep(self, found: dict[str, Array]) -> None:
        with self._keeping:
            for name, one in found.items():
                before = self._kept.pop(name, None)
                self._kept[name] = one
                self._kept_bytes += one.nbytes - (before.nbytes if before is not None else 0)
            while self._keeps_too_much():
                _, gone = self._kept.popitem(last=False)
                self._kept_bytes -= gone.nbytes

    def _keeps_too_much(self) -> bool:
        if self._far:
            return len(self._kept) > 1 and self._kept_bytes > _KEPT_FAR_BYTES
        return len(self._kept) > _KEPT_TENSORS

    def _open_peft(self, config: dict[str, Any]) -> None:
        weights = self.path / ADAPTER_WEIGHTS
        if not is_file(weights):
            raise self._no_weights()
        self.config = config
        self.header = self._stored = read_header(weights)
        self._views: dict[str, View] = {}
        self.refusals = refusals(config)
        if config.get("peft_type") == "LORA":
            keys, strange = parse_keys(self.header.tensors, where=self.header.path)
            self.refusals += [f"{name}: {_strange(name)}" for name in strange]
            self._read_tensors(keys, Scaling(config))

    def _open_mlx(self, config: dict[str, Any]) -> None:
        self.config = as_peft_config(config)
        self._stored = read_header(self.path / MLX_WEIGHTS)
        self.header, self._views = as_peft_tensors(self._stored)
        self.refusals = [MLX_REFUSAL]
        keys = mlx_keys(self.header)
        if self.config["peft_type"] == "LORA":
            self._read_tensors(keys, MlxScaling(config))
        else:
            self.whole = tuple(keys)

    def _read_tensors(self, keys: Sequence[Key], scaling: Scaling | MlxScaling) -> None:
        self.whole = tuple(key for key in keys if key.part not in (*_FACTORS, "training"))
        pairs: dict[tuple[str, int], dict[str, str]] = {}
        for key in keys:
            if key.part in _FACTORS:
                pair = pairs.setdefault((key.module, key.depth), {})
                if key.part in pair:
                    raise AdapterError(
                        "Two tensors are the same factor of one module.",
                        where=self.header.path,
                        details=[pair[key.part], key.tensor],
                    )
                pair[key.part] = key.tensor
        self._check_pairs(pairs)
        self.adapted = tuple(
            self._adapted(module, depth, pair, scaling, self._parameter(module, depth, pairs))
            for (module, depth), pair in pairs.items()
        )
        self.findings += scaling.overlapping

    def _check_pairs(self, pairs: dict[tuple[str, int], dict[str, str]]) -> None:
        halves = [module for (module, _), pair in pairs.items() if not _is_pair(pair)]
        if halves:
            raise AdapterError("Modules lack one of lora_A and lora_B.", where=self.header.path, details=halves[:10])
        if not pairs and not self.whole and not self.refusals:
            raise AdapterError("The adapter holds no tensors.", where=self.header.path)
        dora = bool(self.config.get("use_dora"))
        wrong = [module for (module, _), pair in pairs.items() if ("magnitude" in pair) != dora]
        if wrong:
            raise AdapterError(
                "The configuration and the tensors disagree about DoRA.",
                where=self.header.path,
                expected=f"use_dora = {dora}: {'a' if dora else 'no'} lora_magnitude_vector for every module",
                details=wrong[:10],
            )

    def _parameter(self, module: str, depth: int, pairs: dict[tuple[str, int], dict[str, str]]) -> str | None:
        """Which parameter of the module a pair adapts: the innermost wrapper is the first that is registered."""
        parameters = targeted_parameters(self.config, module)
        if not parameters:  # as of most adapters, of which a mixture's have tens of thousands of modules
            return None
        depths = sorted((other for name, other in pairs if name == module), reverse=True)
        if len(parameters) == len(depths):
            return parameters[depths.index(depth)]
        return None

    def _adapted(
        self, module: str, depth: int, pair: dict[str, str], scaling: Scaling | MlxScaling, parameter: str | None
    ) -> Adapted:
        embedding = "lora_embedding_A" in pair
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        lora_a, lora_b = pair[names[0]], pair[names[1]]
        a, b = self.header.tensors[lora_a], self.header.tensors[lora_b]
        if len(a.shape) < 2 or len(a.shape) != len(b.shape) or 0 in (*a.shape, *b.shape):
            raise self._misshapen(module, a.shape, b.shape)
        if a.shape[0] != b.shape[1]:
            # A grouped convolution's B covers a group's share of A.
            grouped = len(a.shape) > 2 and a.shape[0] % b.shape[1] == 0
            if not grouped:
                raise self._misshapen(module, a.shape, b.shape)
            self.refusals.append(f"{module}: a convolution with groups, whose update is no product of the factors")
        if a.dtype not in FLOAT_DTYPES or b.dtype not in FLOAT_DTYPES:
            raise AdapterError(
                "A factor is stored in a dtype that cannot be computed with here.",
                where=f"{self.header.path}: {module}",
                expected=", ".join(FLOAT_DTYPES),
                found=f"A of {a.dtype} and B of {b.dtype}",
            )
        named = f"{module}.{parameter}" if parameter else module
        r = scaling.rank(named)
        stacks = len(a.shape) == 2 and not embedding
        stacks = stacks and (bool(self.config.get("target_parameters")) or len(self._stored.tensors[lora_a].shape) == 3)
        if a.shape[0] != r and (not stacks or a.shape[0] % r):
            raise AdapterError(
                "The configuration's rank is not the tensors'.",
                where=f"{self.path}: {module}",
                expected=f"r = {r} (adapter_config.json)",
                found=f"r = {a.shape[0]} (rows of lora_A)",
                next_step="use the adapter_config.json that was saved with these tensors",
            )
        return Adapted(
            module=module,
            depth=depth,
            parameter=parameter,
            embedding=embedding,
            lora_A=lora_a,
            lora_B=lora_b,
            bias=pair.get("lora_B_bias"),
            magnitude=pair.get("magnitude"),
            r=r,
            stacked=a.shape[0] // r,
            scaling=scaling.scaling(named, r),
        )

    def _misshapen(self, module: str, a: tuple[int, ...], b: tuple[int, ...]) -> AdapterError:
        return AdapterError(
            "lora_A and lora_B do not fit each other.",
            where=f"{self.header.path}: {module}",
            expected="A of (r, in) and B of (out, r)",
            found=f"A of {list(a)} and B of {list(b)}",
        )

    def _no_weights(self) -> AdapterError:
        pickle = self.path / "adapter_model.bin"
        if is_file(pickle):
            return AdapterError(
                "The adapter's weights are a pickle, which can run code when it is read; Tunesmith never reads one.",
                where=pickle,
                expected=ADAPTER_WEIGHTS,
                next_step="load it where you trust it and save it again with safe_serialization=True",
            )
        return AdapterError("The adapter's weights are missing.", where=self.path, expected=ADAPTER_WEIGHTS)


def _is_pair(pair: dict[str, str]) -> bool:
    linear = {"lora_A", "lora_B"} <= pair.keys()
    return linear != ({"lora_embedding_A", "lora_embedding_B"} <= pair.keys()) and (
        linear or not pair.keys() & {"lora_A", "lora_B", "lora_B_bias"}
    )


def _strange(name: str) -> str:
    known = next((meaning for mark, meaning in _OTHER_TENSORS if mark in name), None)
    return known or "a tensor that this version does not know"


def _slice(span: Span | None) -> slice:
    return slice(None) if span is None else slice(*span)
