"""Oracles of the merge's arithmetic: exact rationals, and the float64 formula written out as plainly as can be."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

# Binary formats of IEEE 754-2019, 3.3: digits of the significand, least exponent of a normal number, greatest.
FORMATS = {"BF16": (8, -126, 127), "F16": (11, -14, 15), "F32": (24, -126, 127)}
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def rounded(value: Fraction, dtype: str) -> Fraction | float:
    """The nearest number of a format, ties to even, by exact arithmetic; infinity where it overflows.  No sign of 0."""
    digits, least, greatest = FORMATS[dtype]
    if value == 0:
        return Fraction(0)
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent  # now 2**exponent <= size < 2**(exponent + 1)
    step = Fraction(2) ** (max(exponent, least) - digits + 1)
    nearest = round(size / step) * step  # Python rounds a Fraction to the nearest integer, ties to even
    if nearest >= Fraction(2) ** (greatest + 1):
        return math.inf if value > 0 else -math.inf
    return nearest if value > 0 else -nearest


def number(stored: npt.NDArray[np.generic], dtype: str) -> list[float]:
    """Stored numbers as floats, by torch's own exact widening."""
    raw = torch.from_numpy(np.ascontiguousarray(stored).view({2: np.int16, 4: np.int32}[stored.dtype.itemsize]).copy())
    return [float(value) for value in raw.view(TORCH[dtype]).double().reshape(-1).tolist()]


def round_tensor(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Round float64 to a format once, element by element, the sign of zero included.

    As :func:`rounded`, but by whole numbers of the last place's unit, which is quicker; a test compares the two.
    """
    digits, least, greatest = FORMATS[dtype]
    flat = []
    for value in values.reshape(-1).tolist():
        nearest = math.inf
        if abs(value) < 2.0 ** (greatest + 1):
            step = max(math.frexp(value)[1] - 1, least) - digits + 1
            nearest = math.ldexp(round(math.ldexp(value, -step)), step)  # exact, but for Python's round: ties to even
        flat.append(math.copysign(nearest if abs(nearest) < 2.0 ** (greatest + 1) else math.inf, value))
    return torch.tensor(flat, dtype=torch.float64).to(TORCH[dtype]).reshape(values.shape)


def load_model(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model directory."""
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """A tensor's own bytes."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
