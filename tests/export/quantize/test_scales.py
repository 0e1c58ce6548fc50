"""Scales: by the package's formula, by search, and of either sign."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams

from tunesmith.checkpoint import Float64
from tunesmith.export.quantize import scheme_of
from tunesmith.export.quantize.scales import codes_of, scales_of
from tunesmith.merge import ScaledGrid

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def numbers(seed: int = 0) -> Float64:
    """Rows with tails, one of zeros, one with a lonely large number."""
    values = np.random.default_rng(seed).standard_t(4, size=(8, 128))
    values[3], values[4, 100] = 0, -40.0
    return values


def rounded(exact_TI: Float64, scale_TG: Float64, word: str) -> Float64:
    """To nearest on those scales."""
    scheme = scheme_of(word)
    grid = ScaledGrid(scale_TG, codes_of(scheme), group_size=scheme.group_size)
    return grid.at(np.arange(exact_TI.shape[1])).nearest(exact_TI.T).T


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("word", ["int8", "int4:32", "fp8"])
def test_without_weights_they_are_the_packages(word: str, dtype: str) -> None:
    """Its own formula, in float64, rounded once to what is stored; of zeros, its epsilon."""
    exact_TI, scheme = numbers(), scheme_of(word)
    groups = torch.from_numpy(exact_TI).unflatten(1, (-1, scheme.group_size or 128))
    kind = "float" if scheme.is_float else "int"
    args = QuantizationArgs(num_bits=scheme.bits, type=kind, strategy="channel", symmetric=True)
    expected, _ = calculate_qparams(groups.amin(2), groups.amax(2), args)
    stored = expected.to(DTYPES[dtype])
    found = torch.from_numpy(scales_of(exact_TI, scheme, dtype))
    zeros = groups.abs().amax(2) == 0
    assert torch.equal(found[~zeros], stored[~zeros].double())
    assert (found[zeros] == torch.finfo(DTYPES[dtype]).eps).all()


@pytest.mark.parametrize("word", ["int8", "int4:32"])
def test_a_search_never_does_worse_by_its_own_weights(word: str) -> None:
    """In any group; where a column weighs most, it is the one that is met."""
    exact_TI, scheme = numbers(), scheme_of(word)
    weights_I = np.random.default_rng(1).uniform(0, 5, 128)
    plain_TG = scales_of(exact_TI, scheme, "F32")
    found_TG = scales_of(exact_TI, scheme, "F32", weights_I=weights_I)
    shape = (8, plain_TG.shape[1], -1)
    before, after = (
        (((rounded(exact_TI, scale, word) - exact_TI) ** 2) * weights_I).reshape(shape).sum(2)
        for scale in (plain_TG, found_TG)
    )
    # The search looks at a table of reaches, which need not hold exactly 1.
    assert after.sum() < before.sum()
    assert (after <= before * 1.02 + 1e-12).all()


def test_a_scale_of_either_sign_gives_the_outermost_number_the_lowest_code() -> None:
    """So nothing is clipped by more than the scale's own rounding, and the steps are 15/16 of the plain ones."""
    exact_TI, scheme = numbers(), scheme_of("int4:32")
    scale_TG = scales_of(exact_TI, scheme, "F32", signed=True)
    plain_TG = scales_of(exact_TI, scheme, "F32")
    groups_TGK = exact_TI.reshape(8, 4, 32)
    outermost_TG = np.take_along_axis(groups_TGK, np.abs(groups_TGK).argmax(2)[:, :, None], 2)[:, :, 0]
    filled = outermost_TG != 0
    assert np.allclose((outermost_TG / scale_TG)[filled], -8)
    assert ((scale_TG < 0) == (outermost_TG > 0))[filled].all()
    assert (scale_TG < 0)[filled].any()
    assert (scale_TG > 0)[filled].any()
    assert np.allclose(np.abs(scale_TG / plain_TG)[filled], 7.5 / 8)
    assert (scale_TG[~filled] != 0).all()
    errors = [((rounded(exact_TI, scale, "int4:32") - exact_TI) ** 2).sum() for scale in (scale_TG, plain_TG)]
    assert errors[0] < 0.95 * errors[1]


def test_codes_on_negative_scales_are_the_nearest() -> None:
    """A number of either sign is met as near as the table of products lets it."""
    exact_TI = numbers()[:, :32]
    scale_TG = np.where(np.arange(8)[:, None] % 2, 0.3, -0.3)
    found = rounded(exact_TI, scale_TG, "int4:32")
    table = np.arange(-8, 8)[None, None] * scale_TG[:, :, None]
    assert np.allclose(np.abs(found - exact_TI), np.abs(table - exact_TI[:, :, None]).min(2))


def test_signed_search_finds_what_both_signs_offer() -> None:
    """A group whose outermost number is positive gets a negative scale where that is better."""
    exact_TI = np.zeros((1, 32))
    exact_TI[0, :2] = 8.0, 1.0
    scale_TG = scales_of(exact_TI, scheme_of("int4:32"), "F32", weights_I=np.ones(32), signed=True)
    assert scale_TG[0, 0] < 0
    assert np.abs(rounded(exact_TI, scale_TG, "int4:32") - exact_TI).max() < 0.2
