"""However a tensor is cut into tiles and units, and compiled (where numba is installed) or not: the same bytes.

The zoo's tensors are smaller than one tile, so the cuts are made smaller here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tunesmith as ts
from tests.oracle import formula
from tests.oracle.kinds import KINDS
from tests.oracle.zoo import Zoo
from tunesmith.adapter import LowRank
from tunesmith.merge import units, work, write

CUT = (
    "plain", "ties", "qwen3", "gpt2", "lora-bias", "bias-all", "embedding-head", "embedding-tied", "saved-head",
    "tokens", "tokens-unlike-tied", "resized-embedding", "resized-tokens-tied", "dora", "dora-embedding", "dora-gpt2",
    "dora-conv2d", "conv2d", "classifier", "replicated-more", "mixtral-both", "qwen3-moe-both", "gpt-oss-both",
    "gpt-oss-square-both",
)  # fmt: skip


WAYS = {
    "fp32": (torch.float32, "nearest"), "bf16": (torch.bfloat16, "nearest"), "faithful": (torch.bfloat16, "faithful"),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _feedback_however_large_the_update() -> Iterator[None]:
    """These updates are large against the grid; a merge would round them to nearest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "ENOUGH", math.inf)
        yield


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CUT)
def test_small_tiles_and_units_give_the_same_bytes(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, way: str
) -> None:
    """Three rows of a tile, and a tile of a unit: every offset into factors, blocks, token rows and norms is used."""
    dtype, rounding = WAYS[way]
    whole = formula.read(zoo.merged(kind, dtype, rounding=rounding))
    monkeypatch.setattr(work, "TILE_ELEMENTS", 100)
    monkeypatch.setattr(work, "FEEDBACK_TILES", 1)
    monkeypatch.setattr(work._Fast, "ELEMENTS", 250)
    monkeypatch.setattr(work._Fast, "PANEL_ROWS", 5)
    monkeypatch.setattr(units, "UNIT_BYTES", 512)
    monkeypatch.setattr(write, "COMPILE_FROM_BYTES", 0)
    base = zoo.base(KINDS[kind].base, dtype)
    ts.merge(ts.plan_merge(zoo.adapter(kind), tmp_path / "out", base=str(base), rounding=rounding))
    formula.assert_same(formula.read(tmp_path / "out"), whole)


# Float64's own noise in the sum and in DoRA's norms, by the size of the value; a step of bf16 is 2⁻⁸ of it or more.
NOISE = 2.0**-45


@pytest.mark.parametrize("kind", CUT)
def test_a_faithful_merge_takes_one_of_the_two_neighbours_of_the_closed_form(zoo: Zoo, kind: str) -> None:
    """In every kind of update; what no low-rank update acts on has the nearest's bytes."""
    found = formula.read(zoo.merged(kind, torch.bfloat16, rounding="faithful"))
    nearest = formula.read(zoo.merged(kind, torch.bfloat16))
    truth = KINDS[kind].truth
    assert truth
    base = formula.read(zoo.base(KINDS[kind].base, torch.bfloat16))
    _, expected = formula.exact(base, formula.read(zoo.adapter(kind)), truth)
    plan = ts.plan_merge(zoo.adapter(kind), zoo.root / "not-made", base=str(zoo.base(KINDS[kind].base, torch.bfloat16)))
    low_rank = {update.name for update in plan.binding.updates if isinstance(update, LowRank)}
    assert (plan.rounding, plan.rounded["faithful"]) == ("faithful", len(low_rank))
    assert found.keys() == expected.keys()
    other = 0
    for name, exact in expected.items():
        if name not in low_rank:
            assert torch.equal(found[name], nearest[name]), name
            continue
        noise = NOISE * exact.abs()
        (below, _), (_, above) = formula.neighbours(exact - noise), formula.neighbours(exact + noise)
        stored = found[name].double()
        assert bool(((stored >= below) & (stored <= above)).all()), name
        other += int((stored != nearest[name].double()).sum())
    assert other > 0
