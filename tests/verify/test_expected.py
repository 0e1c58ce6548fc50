"""What verify recomputes: its error bounds against sixty digits, and that tiles change nothing."""

from __future__ import annotations

import json
from decimal import Decimal, localcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.verify.making import EMBEDDING, EXPERTS, KINDS, LINEAR, TURNED, Bench, Kind, random
from tunesmith.adapter import Binding, LowRank, Magnitude, Stack
from tunesmith.checkpoint import Checkpoint, Float64
from tunesmith.errors import UnsupportedAdapterError
from tunesmith.verify.weights import expected as room
from tunesmith.verify.weights.expected import Expectation, Tile

DIGITS = 60


def bench_of(kind: str, root: Path, dtype: torch.dtype = torch.float32) -> Bench:
    """A kind on a base."""
    return Bench(root, KINDS[kind](), dtype)


def exact_dora(
    base: torch.Tensor, a: torch.Tensor, b: torch.Tensor, m: torch.Tensor, scaling: float
) -> list[list[Decimal]]:
    """The rows of m/‖V‖ · V in decimals."""
    rows = []
    for row in range(base.shape[0]):
        v = []
        for column in range(base.shape[1]):
            terms = [Decimal(b[row, k].item()) * Decimal(a[k, column].item()) for k in range(a.shape[0])]
            v.append(Decimal(base[row, column].item()) + Decimal(scaling) * sum(terms))
        norm = sum(value * value for value in v).sqrt()
        rows.append([Decimal(m[row].item()) * value / norm for value in v])
    return rows


@pytest.mark.parametrize("cancelling", [False, True])
@pytest.mark.parametrize("per", ["row", "column"])
def test_the_bound_of_a_trained_magnitude_holds_against_sixty_digits(
    per: str, cancelling: bool, tmp_path: Path
) -> None:
    """Every element is as near to the exact one as is said, and the bound is not so wide that it says nothing."""
    base, a, b = random(6, 9, seed=1), random(3, 9, seed=2), random(6, 3, seed=3)
    m = random(6, seed=4).abs() + 0.1
    if cancelling:  # V is far smaller than what it is the sum of
        base = -(1.5 * b.double() @ a.double()).float()
    turned = per == "column"
    (tmp_path / "base").mkdir()
    (tmp_path / "adapter").mkdir()
    save_file({"x.weight": (base.T if turned else base).contiguous()}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    key = "base_model.model.x.lora_"
    factors = {f"{key}A.weight": a, f"{key}B.weight": b, f"{key}magnitude_vector": m}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 4.5, "use_dora": True}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    low_rank = LowRank(
        name="x.weight",
        module="x",
        r=3,
        scaling=1.5,
        lora_A=f"{key}A.weight",
        lora_B=f"{key}B.weight",
        transposed=turned,
    )
    magnitude = Magnitude(name="x.weight", module="x", tensor=f"{key}magnitude_vector", per=per)
    stack = Stack([(tmp_path / "adapter", 1.0)])
    whole = Expectation(Checkpoint(tmp_path / "base"), stack, Binding(updates=(low_rank, magnitude)))
    tile = whole.tensor("x.weight").tile(0, 9 if turned else 6)
    x, bound = (
        tile.start + tile.delta,
        np.broadcast_to(tile.bound, tile.start.shape) + 2.0**-52 * np.abs(tile.start + tile.delta),
    )
    with localcontext() as context:
        context.prec = DIGITS
        exact = exact_dora(base, a, b, m, 1.5)
        for row in range(6):
            for column in range(9):
                place = (column, row) if turned else (row, column)
                assert abs(Decimal(x[place].item()) - exact[row][column]) <= Decimal(bound[place].item())
    if not cancelling:
        assert (bound < 1e-13 * np.abs(x).max()).all()


def whole_tensor(bench: Bench, name: str) -> Tile:
    """All rows of a tensor, tile by tile."""
    expected = bench.expectation.tensor(name)
    tiles = [expected.tile(*rows) for rows in expected.tiles()]
    parts = [np.broadcast_to(tile.bound, tile.start.shape) for tile in tiles]
    return Tile(
        np.concatenate([tile.start for tile in tiles]),
        np.concatenate([tile.delta for tile in tiles]),
        np.concatenate(parts),
        all(tile.summed for tile in tiles),
    )


@pytest.mark.parametrize("elements", [1, 100, 1 << 20])
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_of_any_height_recompute_the_same(
    kind: str, elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the bound that is stated; norms of columns too, which are those of all tiles."""
    bench = bench_of(kind, tmp_path)
    usual = {name: whole_tensor(bench, name) for name in bench.binding.by_name}
    monkeypatch.setattr(room, "_TILE_ELEMENTS", elements * 64)
    for name, tile in usual.items():
        other = whole_tensor(bench, name)
        assert (other.start == tile.start).all()
        gap = np.abs((other.start + other.delta) - (tile.start + tile.delta))
        assert (gap <= tile.bound + other.bound + 2.0**-51 * np.abs(tile.start + tile.delta)).all()


def test_tiles_do_not_cross_the_border_of_an_expert(tmp_path: Path) -> None:
    """Every tile lies in one matrix of the stack."""
    expected = bench_of("experts", tmp_path).expectation.tensor(EXPERTS)
    assert list(expected.tiles()) == [(0, 20), (20, 40), (40, 60)]


def test_an_expert_that_no_update_names_keeps_its_bytes(tmp_path: Path) -> None:
    """Nothing acts on the first and the third of three."""
    expected = bench_of("one-expert", tmp_path).expectation.tensor(EXPERTS)
    assert [expected.kept(*rows) is not None for rows in expected.tiles()] == [True, False, True]


def test_rows_that_are_put_in_act_on_their_own_tiles_only(tmp_path: Path) -> None:
    """The tiles of an embedding without a trained row keep their bytes."""
    bench = bench_of("token-rows", tmp_path)
    expected = bench.expectation.tensor(EMBEDDING)
    kept = {rows: expected.kept(*rows) is None for rows in expected.tiles()}
    assert kept == {(0, 256): True, (256, 300): True}
    assert expected.kept(8, 256) is not None


def test_two_magnitudes_for_one_tensor_have_no_meaning(tmp_path: Path) -> None:
    """They are refused rather than one of them chosen."""
    bench = bench_of("dora", tmp_path)
    low_rank, magnitude = bench.binding.updates
    with pytest.raises(UnsupportedAdapterError):
        bench.expectation.tensor(LINEAR, [low_rank, magnitude, magnitude])


class Halved:
    """A view in which one tensor is half of what is stored."""

    def applies_to(self, _: Checkpoint, name: str) -> bool:
        """Of the linear layer alone."""
        return name == LINEAR

    def rows(self, checkpoint: Checkpoint, name: str, start: int, stop: int) -> Float64:
        """Half."""
        return checkpoint.read_float64(name, start, stop) / 2


@pytest.mark.parametrize("kind", ["plain", "dora", "transposed"])
def test_a_view_of_the_base_is_what_tensors_begin_as(kind: str, tmp_path: Path) -> None:
    """Adapted or not; a tensor that the view leaves alone begins as it is stored."""
    made = KINDS[kind]()
    bench = Bench(tmp_path, made, torch.float32)
    seen = Expectation(bench.expectation.base, bench.expectation.stack, bench.binding, view=Halved())
    halved = {**bench.base, LINEAR: bench.base[LINEAR] / 2}
    wanted = {LINEAR: halved[LINEAR].double(), TURNED: halved[TURNED].double()} | made.exact(halved)
    for name, exact in wanted.items():
        if name in (LINEAR, TURNED):
            expected = seen.tensor(name)
            tile = expected.tile(0, expected.rows)
            assert tile.start + tile.delta == pytest.approx(exact.numpy(), rel=1e-13, abs=1e-15)
            assert (expected.kept(0, 4) is None) == (name == LINEAR or name in bench.binding.by_name)


def test_kinds_are_what_their_binding_says() -> None:
    """Each kind of update is there, so that no test of all kinds passes by missing one."""
    kinds: list[Kind] = [make() for make in KINDS.values()]
    assert {update.kind for kind in kinds for update in kind.updates} == {
        "low_rank", "copied", "replaced", "rows", "added", "magnitude"
    }  # fmt: skip
