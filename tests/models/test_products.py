"""Products of few rows: whichever way is quickest, they are the same product; what was measured is kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tunesmith.models.compute import machine_name
from tunesmith.models.products import product_of, quickest

MODULE: Any = sys.modules["tunesmith.models.products"]


@pytest.mark.parametrize("way", MODULE._WAYS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (0,), (1, 1), (1, 7), (3, 1), (2, 8), (5, 9)])
def test_every_way_is_the_layers_own_product(way: str, bias: bool, shape: tuple[int, ...]) -> None:
    """Up to rounding, in any number of dimensions, for no row at all (of an expert), and free to be written to."""
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias).requires_grad_(False)
    x = torch.randn(*shape, 24)
    found = MODULE._multiply(x, layer.weight, layer.bias, way)
    torch.testing.assert_close(found, layer(x), rtol=1e-5, atol=1e-5)
    found.add_(1)
    torch.testing.assert_close(MODULE._multiply(x, layer.weight, layer.bias, way), layer(x), rtol=1e-5, atol=1e-5)


def test_only_plain_float32_layers_of_the_cpu_are_multiplied_so() -> None:
    """What is anything else keeps its own forward."""

    class Quantized(nn.Linear):
        pass

    assert product_of(nn.Linear(4, 4)) is not None
    for other in (Conv1D(4, 4), nn.Embedding(4, 4), Quantized(4, 4), nn.Linear(4, 4).to(torch.bfloat16)):
        assert product_of(other) is None


def test_a_measurement_is_kept_and_a_broken_one_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is in the file, there is a way for every number of rows."""
    measured: list[int] = []
    ways = dict.fromkeys(MODULE._TRIED, "turned")

    def measure(*_: int) -> dict[int, str]:
        measured.append(1)
        return ways

    monkeypatch.setattr("tunesmith.checkpoint.cache_dir", lambda: tmp_path)
    monkeypatch.setattr(MODULE, "_measure", measure)
    file = tmp_path / "products.json"
    nonsense = {"machines": {machine_name(): {"tall": {"1": "nonsense"}}}}
    for text in (None, "{", "[]", '{"machines": {"x": 1}}', json.dumps(nonsense)):
        if text is not None:
            file.write_text(text)
        for again in (False, True):
            measured.clear()
            quickest.cache_clear()
            assert quickest("tall") == quickest("wide") == ways
            assert bool(measured) != again
    assert {path.name for path in tmp_path.iterdir()} == {"products.json"}
    quickest.cache_clear()
