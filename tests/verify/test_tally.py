"""Codes of other tools' roundings, number by number and group by group: what is a rounding and what is damage."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tunesmith.checkpoint import QuantizedScheme
from tunesmith.export.quantize import scheme_of
from tunesmith.verify.quantized.tally import CodeTally, tally_codes

ROWS, COLUMNS = 256, 256


def bf16(values: np.ndarray) -> np.ndarray:
    """To the nearest bfloat16."""
    return np.asarray(torch.from_numpy(values).bfloat16().double().numpy())


def tallied(scheme: QuantizedScheme, codes: np.ndarray, scales: np.ndarray, x: np.ndarray) -> CodeTally:
    """Against x, without an update and exact."""
    return tally_codes(scheme, codes, scales, x, np.zeros_like(x), np.zeros(1))


def drawn(name: str) -> tuple[QuantizedScheme, np.ndarray, np.ndarray]:
    """Numbers like a model's, and the scale of every group."""
    scheme, x = scheme_of(name), np.random.default_rng(0).normal(size=(ROWS, COLUMNS))
    groups = x.reshape(ROWS, -1, scheme.group_size or COLUMNS)
    return scheme, x, bf16(np.abs(groups).max(2) / ((scheme.highest - scheme.lowest) / 2))


@pytest.mark.parametrize("name", ["int4:64", "int4:32", "int8"])
def test_a_merge_to_a_neighbour_and_a_quotient_in_bf16_are_a_rounding(name: str) -> None:
    """So llmcompressor quantizes what a faithful rounding has merged: no code of it is a stray."""
    scheme, x, scales = drawn(name)
    step = np.ldexp(1.0, np.frexp(x)[1] - 8)
    merged = np.where(np.random.default_rng(1).random(x.shape) < 0.5, np.floor(x / step), np.ceil(x / step)) * step
    codes = np.clip(np.rint(bf16(merged / scheme.spread(scales, COLUMNS))), scheme.lowest, scheme.highest)
    found = tallied(scheme, codes, scales, x)
    assert found.neighbour + found.further == 0
    assert found.twice_rounded > 0.005 * x.size
    damaged = codes.copy()
    damaged[3, 5] += 3 if damaged[3, 5] < 0 else -3
    assert tallied(scheme, damaged, scales, x).neighbour + tallied(scheme, damaged, scales, x).further == 1


def test_errors_passed_on_may_drown_a_small_group_and_a_wrong_scale_may_not() -> None:
    """Both change the group's strength; only the second does it along its numbers."""
    scheme, x, _ = drawn("int4:64")
    x[:, :64] *= 0.15
    passed_on = np.zeros_like(x)
    passed_on[:, :64] = np.random.default_rng(2).normal(size=(ROWS, 64)) * 0.3
    groups = (x + passed_on).reshape(ROWS, -1, 64)
    scales = np.abs(groups).max(2) / 7.5
    codes = np.clip(np.rint((x + passed_on) / scheme.spread(scales, COLUMNS)), -8, 7)
    stored = codes * scheme.spread(scales, COLUMNS)
    gains = (stored * x).reshape(ROWS, -1, 64).sum(2) / (x * x).reshape(ROWS, -1, 64).sum(2)
    assert np.count_nonzero((gains < 0.56) | (gains > 1.6)) > 10
    assert tallied(scheme, codes, scales, x).bad_groups == 0
    scales[7, 2] /= 2
    assert tallied(scheme, codes, scales, x).bad_groups == 1
