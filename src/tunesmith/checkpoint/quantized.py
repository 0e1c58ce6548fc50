"""Models in the compressed-tensors format: what ``quantization_config`` says, which tensors that makes, their numbers.

A quantized Linear layer ``X`` of O rows and I columns is stored as

- ``pack-quantized`` (integers): ``X.weight_packed`` (I32, O × ⌈I·bits/32⌉), ``X.weight_scale``, ``X.weight_shape`` (the
  two numbers O and I).  Codes are shifted by 2^(bits−1) to be no negative ones; element i of a row begins at bit
  i·bits of the row, which may straddle two words;
- ``int-quantized``: ``X.weight`` (I8) and ``X.weight_scale``;
- ``float-quantized``: ``X.weight`` (F8_E4M3) and ``X.weight_scale``.

A scale holds for a row (O × 1), for a group of columns of a row (O × I/group), or for the whole tensor (1).  A weight
is code · scale.  A loader that computes in a narrow dtype rounds that product to it; in float32 it is exact.

Source: https://github.com/vllm-project/compressed-tensors, compressors/pack_quantized and compressors/naive_quantized.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tunesmith.checkpoint.directory import Checkpoint
from tunesmith.checkpoint.header import open_regular
from tunesmith.checkpoint.tensors import FLOAT_DTYPES, Array, Float64
from tunesmith.errors import CheckpointError

QUANTIZED_METHOD = "compressed-tensors"
PACKED, INTEGERS, FLOATS = "pack-quantized", "int-quantized", "float-quantized"

Strategy = Literal["tensor", "channel", "group"]

_FORMATS = (PACKED, INTEGERS, FLOATS)
_STRATEGIES: tuple[Strategy, ...] = ("tensor", "channel", "group")
_WORD = 32
_FP8_MAX = 448.0


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that a quantized layer is stored in: its dtype (None for any floating-point one) and its shape."""

    dtype: str | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class QuantizedScheme:
    """How the weights of some layers are stored.

    Attributes:
        format: ``pack-quantized``, ``int-quantized`` or ``float-quantized``.
        bits: of a code.
        strategy: what one scale holds for: the ``tensor``, a row (``channel``), or a ``group`` of a row's columns.
        group_size: columns of a group; None for the other strategies.
        activations: bits of the activations, which are quantized while the model computes; None for not at all.
        targets: which modules: a class's name such as ``Linear``, a module's name, or ``re:`` and an expression.
    """

    format: str
    bits: int
    strategy: Strategy
    group_size: int | None = None
    activations: int | None = None
    targets: tuple[str, ...] = ("Linear",)

    @property
    def is_float(self) -> bool:
        """Whether codes are 8-bit floating-point numbers (E4M3) instead of integers."""
        return self.format == FLOATS

    @property
    def lowest(self) -> float:
        """The lowest code."""
        return -_FP8_MAX if self.is_float else -float(1 << (self.bits - 1))

    @property
    def highest(self) -> float:
        """The highest code."""
        return _FP8_MAX if self.is_float else float((1 << (self.bits - 1)) - 1)

    @property
    def name(self) -> str:
        """A short name for people, such as ``int4:64`` or ``w8a8``."""
        if self.is_float:
            return "fp8" if self.activations else "fp8-weights"
        if self.activations:
            return f"w{self.bits}a{self.activations}"
        return f"int{self.bits}" + (f":{self.group_size}" if self.group_size else "")

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """The shape of the scales of a weight; a group that does not divide the columns has a last, smaller one."""
        if self.strategy == "tensor":
            return (1,)
        return (rows, 1 if self.group_size is None else -(-columns // self.group_size))

    def tensors(self, module: str, rows: int, columns: int) -> dict[str, StoredTensor]:
        """The tensors that a layer's weight is stored in.

        Args:
            module: the layer's name.
            rows: output features O.
            columns: input features I.

        Returns:
            By name; the scales' dtype is the model's own.
        """
        scale = {f"{module}.weight_scale": StoredTensor(None, self.scale_shape(rows, columns))}
        if self.format == PACKED:
            words = -(-columns * self.bits // _WORD)
            return {
                f"{module}.weight_packed": StoredTensor("I32", (rows, words)),
                **scale,
                f"{module}.weight_shape": StoredTensor("I64", (2,)),
            }
        return {f"{module}.weight": StoredTensor("F8_E4M3" if self.is_float else "I8", (rows, columns)), **scale}

    def dequantized(self, codes_TI: Array, scales_TG: Float64) -> Float64:
        """The products code · scale, exact in float64.

        Args:
            codes_TI: codes of T rows, numbers of any dtype.
            scales_TG: their scales; ``(1,)`` for one scale of the tensor.

        Returns:
            float64, T × I.
        """
        return codes_TI.astype(np.float64) * self.spread(scales_TG, codes_TI.shape[1])

    def spread(self, scales_TG: Float64, columns: int) -> Float64:
        """The scale of every column, T × I (or T × 1, or 1 × 1, where all columns have the same)."""
        if self.group_size is None:
            return scales_TG.reshape(-1, 1)
        return np.repeat(scales_TG, self.group_size, axis=1)[:, :columns]


@dataclass(frozen=True)
class Quantization:
    """A model's ``quantization_config``.

    Attributes:
        schemes: each group of layers; the first that matches a layer is its own.
        ignore: layers that are stored as they were, as ``targets`` are named.
    """

    schemes: tuple[QuantizedScheme, ...]
    ignore: tuple[str, ...] = ()

    def scheme_of(self, module: str, kind: str = "Linear") -> QuantizedScheme | None:
        """How a layer's weight is stored; None for as it was.

        Args:
            module: the layer's name.
            kind: its class's name.
        """
        if any(_matches(pattern, module, kind) for pattern in self.ignore):
            return None
        return next((s for s in self.schemes if any(_matches(target, module, kind) for target in s.targets)), None)


def _matches(pattern: str, module: str, kind: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return pattern in (module, kind)


def quantization_of(config: Mapping[str, Any], *, where: object = None) -> Quantization | None:
    """What a model's ``config.json`` says of a compressed-tensors quantization.

    Args:
        config: the whole configuration.
        where: what an error names as its place.

    Returns:
        None where the model is not quantized at all.

    Raises:
        CheckpointError: it is quantized by another method, or in a way that is not known here; every reason is named.
    """
    section = config.get("quantization_config")
    if section is None:
        return None
    if not isinstance(section, dict) or section.get("quant_method") != QUANTIZED_METHOD:
        found = section.get("quant_method") if isinstance(section, dict) else type(section).__name__
        raise _unknown(where, [f"quant_method: {found}"])
    groups, ignore = section.get("config_groups"), section.get("ignore") or []
    problems, schemes = [], []
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise _unknown(where, ["config_groups: no group of layers"])
    if not _all_patterns(ignore):
        problems.append(f"ignore: {str(ignore)[:100]}")
    for name, group in groups.items():
        scheme, wrong = _scheme(group, section)
        problems += [f"{name}.{what}" for what in wrong]
        schemes += [scheme] if scheme is not None else []
    if problems:
        raise _unknown(where, problems)
    return Quantization(tuple(schemes), tuple(ignore))


def _scheme(group: Mapping[str, Any], section: Mapping[str, Any]) -> tuple[QuantizedScheme | None, list[str]]:
    """One group of layers, or what of it is not known."""
    form, weights = group.get("format") or section.get("format"), group.get("weights")
    if not isinstance(weights, dict):
        return None, ["weights: not quantized"]
    inputs, targets = group.get("input_activations"), group.get("targets")
    bits, kind, size = weights.get("num_bits"), weights.get("type", "int"), weights.get("group_size")
    said = weights.get("strategy") or ("group" if isinstance(size, int) and size > 0 else "channel")
    strategy = next((known for known in _STRATEGIES if known == said), None)
    checks = {
        f"format: {form}": form in _FORMATS,
        f"weights.num_bits: {bits}": isinstance(bits, int) and 2 <= bits <= 8 and (form == PACKED or bits == 8),
        f"weights.type: {kind}": kind == ("float" if form == FLOATS else "int"),
        f"weights.symmetric: {weights.get('symmetric')}": weights.get("symmetric", True) is True,
        f"weights.dynamic: {weights.get('dynamic')}": not weights.get("dynamic", False),
        f"weights.strategy: {said}": strategy is not None,
        f"weights.group_size: {size}": strategy != "group" or (isinstance(size, int) and size > 0),
        f"weights.actorder: {weights.get('actorder')}": weights.get("actorder") not in ("group", "dynamic"),
        f"targets: {str(targets)[:100]}": bool(targets) and _all_patterns(targets),
        f"input_activations: {str(inputs)[:100]}": inputs is None
        or (isinstance(inputs, dict) and isinstance(inputs.get("num_bits"), int)),
    }
    wrong = [what for what, good in checks.items() if not good]
    if wrong or strategy is None or not isinstance(targets, list) or not isinstance(bits, int):
        return None, wrong
    scheme = QuantizedScheme(
        format=str(form),
        bits=bits,
        strategy=strategy,
        group_size=size if strategy == "group" else None,
        activations=inputs["num_bits"] if isinstance(inputs, dict) else None,
        targets=tuple(targets),
    )
    return scheme, []


def _all_patterns(patterns: object) -> bool:
    """Whether this is a list of names and of expressions that compile."""
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        return False
    try:
        for pattern in patterns:
            re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
    except re.error:
        return False
    return True


def _unknown(where: object, details: list[str]) -> CheckpointError:
    return CheckpointError(
        "The model is quantized in a way that is not known here.",
        where=where,
        expected=f"{QUANTIZED_METHOD}: {', '.join(_FORMATS)}, symmetric, a scale for the tensor, a row or a group",
        details=details[:10],
    )


class QuantizedWeight:
    """The weight of one quantized layer, read by rows.

    Args:
        checkpoint: the model.
        module: the layer's name.
        scheme: how it is stored.

    Attributes:
        rows: output features O.
        columns: input features I.
        weight: the name that the tensor has in an unquantized model.

    Raises:
        CheckpointError: tensors are missing, or are of another dtype or shape than the scheme says; all are named.
    """

    def __init__(self, checkpoint: Checkpoint, module: str, scheme: QuantizedScheme) -> None:
        self.checkpoint, self.module, self.scheme = checkpoint, module, scheme
        self.weight = f"{module}.weight"
        self._codes = f"{module}.weight_packed" if scheme.format == PACKED else self.weight
        self.rows, self.columns = self._shape()
        problems = misfits(checkpoint, scheme.tensors(module, self.rows, self.columns))
        if problems:
            raise _misfit(checkpoint, module, problems)

    def _shape(self) -> tuple[int, int]:
        found = self.checkpoint.tensors.get(self._codes)
        if found is None or len(found.shape) != 2:
            raise _misfit(self.checkpoint, self.module, [f"{self._codes}: missing, or no matrix"])
        if self.scheme.format != PACKED:
            return found.shape[0], found.shape[1]
        name = f"{self.module}.weight_shape"
        # Old releases of the format wrote the two numbers as I32.
        said = self._read(name, "<i8") if name in self.checkpoint.tensors and self._is_pair(name) else np.zeros(0)
        if said.shape != (2,) or said.min() < 0:
            raise _misfit(self.checkpoint, self.module, [f"{name}: not the two sizes of a matrix"])
        return int(said[0]), int(said[1])

    def _is_pair(self, name: str) -> bool:
        info = self.checkpoint.info(name)
        return info.dtype == "I64" and info.shape == (2,)

    def codes(self, start: int, stop: int) -> Array:
        """The codes of rows ``start:stop``, T × I: int8, or float64 where they are floating-point numbers."""
        if self.scheme.format == PACKED:
            return unpacked(self._read(self._codes, "<i4", start, stop), self.scheme.bits, self.columns)
        if self.scheme.is_float:
            return _E4M3[self._read(self._codes, "u1", start, stop)]
        return self._read(self._codes, "i1", start, stop)

    def scales(self, start: int, stop: int) -> Float64:
        """The scales of rows ``start:stop``, T × groups, exact; ``(1,)`` where the tensor has one."""
        name = f"{self.module}.weight_scale"
        rows = (0, 1) if self.scheme.strategy == "tensor" else (start, stop)
        return self.checkpoint.read_float64(name, *rows)

    def float64(self, start: int, stop: int) -> Float64:
        """The weights of rows ``start:stop``, T × I, exact."""
        return self.scheme.dequantized(self.codes(start, stop), self.scales(start, stop))

    def _read(self, name: str, dtype: str, start: int = 0, stop: int | None = None) -> Array:
        info = self.checkpoint.info(name)
        rows = info.shape[0]
        stop = rows if stop is None else min(stop, rows)
        row_bytes = info.size_bytes // max(1, rows)
        path = self.checkpoint.shards[self.checkpoint.shard_of(name)].path
        with open_regular(path) as file:
            file.seek(info.begin + start * row_bytes)
            data = file.read((stop - start) * row_bytes)
        if len(data) != (stop - start) * row_bytes:
            raise CheckpointError("The file became shorter while it was read.", where=path)
        return np.frombuffer(data, dtype).reshape(stop - start, *info.shape[1:])


def misfits(checkpoint: Checkpoint, wanted: Mapping[str, StoredTensor]) -> list[str]:
    """What of some tensors is missing, or of another dtype or shape, a line each."""
    problems = []
    for name, one in wanted.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            problems.append(f"{name}: missing")
        elif info.shape != one.shape:
            problems.append(f"{name}: {list(info.shape)} instead of {list(one.shape)}")
        elif info.dtype not in ((one.dtype,) if one.dtype else FLOAT_DTYPES):
            problems.append(f"{name}: {info.dtype} instead of {one.dtype or 'a floating-point dtype'}")
    return problems


def _misfit(checkpoint: Checkpoint, module: str, details: list[str]) -> CheckpointError:
    return CheckpointError(
        "A quantized layer is not stored as its configuration says.",
        where=checkpoint.path,
        found=module,
        details=details,
    )


def unpacked(words_TW: Array, bits: int, columns: int) -> Array:
    """The codes in rows of 32-bit words, least significant bits first.

    Args:
        words_TW: int32 or uint32, T × ⌈columns·bits/32⌉.
        bits: of a code, 1 to 8.
        columns: codes of a row.

    Returns:
        int8, T × columns, of −2^(bits−1) to 2^(bits−1) − 1.
    """
    octets = np.ascontiguousarray(words_TW).astype("<u4", copy=False).view(np.uint8)
    if bits == 8:
        plain: Array = octets[:, :columns]
    elif bits == 4:
        plain = np.stack((octets & 0xF, octets >> 4), axis=-1).reshape(len(octets), -1)[:, :columns]
    else:
        begin = np.arange(columns) * bits
        wide = np.pad(octets, ((0, 0), (0, 1))).astype(np.uint16)
        both = wide[:, begin // 8] | (wide[:, begin // 8 + 1] << 8)
        plain = (both >> (begin % 8).astype(np.uint16)) & ((1 << bits) - 1)
    return (plain.astype(np.int16) - (1 << (bits - 1))).astype(np.int8)


def _decoded_e4m3() -> Float64:
    """Every number of E4M3: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity, and NaN for all ones."""
    pattern = np.arange(256)
    exponent, mantissa = (pattern >> 3) & 0xF, pattern & 7
    value = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    value = np.where((exponent == 15) & (mantissa == 7), math.nan, value)
    return np.where(pattern >= 128, -value, value)


_E4M3 = _decoded_e4m3()
