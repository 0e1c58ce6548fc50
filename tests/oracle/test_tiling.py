"""However a tensor is cut into tiles and units, and compiled (where numba is installed) or not: the same bytes.

The zoo's tensors are smaller than one tile, so the cuts are made smaller here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tunesmith as ts
from tests.oracle import formula
from tests.oracle.kinds import KINDS
from tests.oracle.zoo import Zoo
from tunesmith.merge import units, work, write

CUT = (
    "plain", "ties", "qwen3", "gpt2", "lora-bias", "bias-all", "embedding-head", "embedding-tied", "saved-head",
    "tokens", "tokens-unlike-tied", "resized-embedding", "resized-tokens-tied", "dora", "dora-embedding", "dora-gpt2",
    "dora-conv2d", "conv2d", "classifier", "replicated-more", "mixtral-both", "qwen3-moe-both", "gpt-oss-both",
    "gpt-oss-square-both",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", CUT)
def test_small_tiles_and_units_give_the_same_bytes(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype
) -> None:
    """Three rows of a tile, and a tile of a unit: every offset into factors, blocks, token rows and norms is used."""
    whole = formula.read(zoo.merged(kind, dtype))
    monkeypatch.setattr(work, "TILE_ELEMENTS", 100)
    monkeypatch.setattr(work._Fast, "ELEMENTS", 250)
    monkeypatch.setattr(units, "UNIT_BYTES", 512)
    monkeypatch.setattr(write, "COMPILE_FROM_BYTES", 0)
    base = zoo.base(KINDS[kind].base, dtype)
    ts.merge(ts.plan_merge(zoo.adapter(kind), tmp_path / "out", base=str(base)))
    formula.assert_same(formula.read(tmp_path / "out"), whole)
