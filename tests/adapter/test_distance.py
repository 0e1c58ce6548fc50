"""distance: how far two adapters are apart, without forming either."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.adapter.making import PREFIX, Arrays, Q, V, pair, write_adapter
from tests.tiny_models import TinyRun
from tunesmith.adapter import Adapter, AdapterDistance, distance

TOLERANCE = 1e-9


def dense(tensors: Arrays, module: str, scaling: float) -> npt.NDArray[np.float64]:
    """The oracle: the update itself, in float64."""
    a, b = (tensors[f"{PREFIX}{module}.lora_{side}.weight"].astype(np.float64) for side in "AB")
    return scaling * (b @ a)


def of(tmp_path: Path, one: Arrays, other: Arrays, **config: Any) -> AdapterDistance:
    """The distance of two adapters that are written first; ``config`` is of the second alone."""
    return distance(
        Adapter(write_adapter(tmp_path / "one", one)), Adapter(write_adapter(tmp_path / "other", other, **config))
    )


def expected(ours: list[npt.NDArray[np.float64]], theirs: list[npt.NDArray[np.float64]]) -> tuple[float, float]:
    """Relative distance and cosine of the dense updates."""
    first, second = np.concatenate([x.ravel() for x in ours]), np.concatenate([x.ravel() for x in theirs])
    cosine = float(first @ second) / float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(np.linalg.norm(first - second) / np.linalg.norm(second)), cosine


def test_distance_and_cosine_are_those_of_the_dense_updates(tmp_path: Path) -> None:
    """Over two modules as one vector; the scalings differ."""
    one, other = {**pair(Q), **pair(V, seed=1)}, {**pair(Q, seed=2), **pair(V, seed=3)}
    found = of(tmp_path, one, other, lora_alpha=2)
    wanted = expected([dense(one, m, 4.0) for m in (Q, V)], [dense(other, m, 1.0) for m in (Q, V)])
    assert (found.relative, found.cosine) == pytest.approx(wanted, rel=TOLERANCE)
    assert not found.equal


def test_adapters_of_unlike_rank_can_be_compared(tmp_path: Path) -> None:
    """The update has the same shape, whatever its rank."""
    one, other = pair(Q, r=2), pair(Q, r=3, seed=1)
    found = of(tmp_path, one, other, r=3, lora_alpha=12)
    wanted = expected([dense(one, Q, 4.0)], [dense(other, Q, 4.0)])
    assert (found.relative, found.cosine) == pytest.approx(wanted, rel=TOLERANCE)


def test_a_difference_of_a_ten_millionth_keeps_its_digits(tmp_path: Path) -> None:
    """A difference of squared norms would be nothing but rounding there: 1e-14 of a number, from which it subtracts."""
    one = {name: value.astype(np.float64) for name, value in pair(Q).items()}
    other = {name: value * (1 + 1e-7 * (name.endswith("lora_B.weight"))) for name, value in one.items()}
    other[f"{PREFIX}{Q}.lora_A.weight"] = one[f"{PREFIX}{Q}.lora_A.weight"] + 1e-7
    found = of(tmp_path, one, other)
    assert found.relative == pytest.approx(expected([dense(one, Q, 4.0)], [dense(other, Q, 4.0)])[0], rel=1e-6)
    assert 0 < found.relative < 1e-6


def test_one_update_in_two_bases_is_no_distance(tmp_path: Path) -> None:
    """B·A = (B·M)·(Mᵀ·A): the terms cancel, and Gram matrices alone would leave 1e-8."""
    one: Arrays = {}
    other: Arrays = {}
    for layer in range(8):
        name = f"model.layers.{layer}.self_attn.q_proj"
        factors = pair(name, r=4, inputs=60, outputs=50, seed=layer)
        one |= {key: value.astype(np.float64) for key, value in factors.items()}
        turn = np.linalg.qr(np.random.default_rng(layer).standard_normal((4, 4)))[0]
        a, b = (f"{PREFIX}{name}.lora_{side}.weight" for side in "AB")
        other |= {a: turn.T @ one[a], b: one[b] @ turn}
    paths = [write_adapter(tmp_path / name, tensors, r=4) for name, tensors in (("one", one), ("other", other))]
    found = distance(*(Adapter(path) for path in paths))
    assert found.relative is not None
    assert found.relative < 1e-14


def test_the_same_bytes_are_no_distance_at_all(tmp_path: Path) -> None:
    """Exactly zero, also where the numbers are none."""
    tensors = pair(Q)
    tensors[f"{PREFIX}{Q}.lora_B.weight"][0, 0] = np.nan
    path = write_adapter(tmp_path / "a", tensors)
    shutil.copytree(path, tmp_path / "b")
    found = distance(Adapter(path), Adapter(tmp_path / "b"))
    assert found == AdapterDistance(relative=0.0, cosine=1.0, equal=True)


def test_the_same_tensors_under_another_alpha_are_apart(tmp_path: Path) -> None:
    """The bytes are equal, the update is not."""
    found = of(tmp_path, pair(Q), pair(Q), lora_alpha=16)
    assert found.relative == pytest.approx(0.5)
    assert found.cosine == pytest.approx(1.0)
    assert not found.equal


def test_modules_of_one_side_count_and_are_named(tmp_path: Path) -> None:
    """What the other lacks is zero there."""
    one, other = pair(Q), {**pair(Q), **pair(V, seed=1)}
    found = of(tmp_path, one, other)
    q, v = dense(one, Q, 4.0), dense(other, V, 4.0)
    assert (found.relative, found.cosine) == pytest.approx(expected([q, 0 * v], [q, v]), rel=TOLERANCE)
    assert (found.only_in_one, found.only_in_other) == ((), (V,))


def test_a_module_of_another_shape_is_named_on_both_sides(tmp_path: Path) -> None:
    """Nothing can be subtracted there."""
    found = of(tmp_path, {**pair(Q), **pair(V)}, {**pair(Q), **pair(V, outputs=5)})
    assert (found.only_in_one, found.only_in_other) == ((V,), (V,))
    assert found.relative is not None
    assert found.relative > 0.5


def test_whole_tensors_are_compared_directly(tmp_path: Path) -> None:
    """A saved module, longer than what is read at once; the low-rank part is the same."""
    rng = np.random.default_rng(0)
    head = rng.standard_normal((3000, 700)).astype(np.float32)
    moved = (head * np.float32(1.01)).astype(np.float32)
    name = f"{PREFIX}lm_head.weight"
    found = of(tmp_path, {**pair(Q), name: moved}, {**pair(Q), name: head})
    wanted = np.linalg.norm(moved.astype(np.float64) - head) / np.linalg.norm(head.astype(np.float64))
    assert (found.relative, found.whole) == (0.0, pytest.approx(float(wanted), rel=TOLERANCE))


def test_stacks_are_compared_matrix_by_matrix(tmp_path: Path) -> None:
    """Experts: rows of A in turn, every E-th column of B."""
    module = "model.layers.0.mlp.experts"
    one, other = pair(module, r=6), pair(module, r=6, seed=1)
    settings = {"target_parameters": ["mlp.experts.down_proj"]}
    paths = [write_adapter(tmp_path / name, t, **settings) for name, t in (("one", one), ("other", other))]
    found = distance(*(Adapter(path) for path in paths))
    a, b = (f"{PREFIX}{module}.lora_{side}.weight" for side in "AB")
    updates = [
        [4.0 * t[b][:, e::3].astype(np.float64) @ t[a][2 * e : 2 * e + 2].astype(np.float64) for e in range(3)]
        for t in (one, other)
    ]
    assert (found.relative, found.cosine) == pytest.approx(expected(*updates), rel=TOLERANCE)


def test_numbers_that_are_none_give_no_distance(tmp_path: Path) -> None:
    """A checkpoint after the training broke down is listed beside the others."""
    broken = pair(Q, seed=1)
    broken[f"{PREFIX}{Q}.lora_A.weight"][0, 0] = np.inf
    found = of(tmp_path, pair(Q), broken)
    assert (found.relative, found.cosine) == (None, None)


def test_an_adapter_that_does_nothing_is_no_measure(tmp_path: Path) -> None:
    """Relative to zero there is no distance; the other way round it is one whole."""
    nothing = pair(Q)
    nothing[f"{PREFIX}{Q}.lora_B.weight"][:] = 0
    assert of(tmp_path, pair(Q), nothing).relative is None
    assert of(tmp_path, nothing, pair(Q)) == AdapterDistance(relative=1.0, cosine=None)


def test_real_adapters_are_as_far_apart_as_their_dense_updates(tiny: TinyRun) -> None:
    """Two of PEFT's on one base, of which one adapts more modules than the other."""
    one, other = (Adapter(path) for path in tiny.adapters.values())
    ours, theirs = (
        {x.module: x.scaling * (y.finite(x.lora_B) @ y.finite(x.lora_A)) for x in y.adapted} for y in (one, other)
    )
    modules = sorted(ours.keys() | theirs.keys())
    found = distance(one, other)
    first, second = (
        [mine[m] if m in mine else 0 * others[m] for m in modules] for mine, others in ((ours, theirs), (theirs, ours))
    )
    assert (found.relative, found.cosine) == pytest.approx(expected(first, second), rel=TOLERANCE)
    assert set(found.only_in_one) == ours.keys() - theirs.keys()
    assert set(found.only_in_other) == theirs.keys() - ours.keys()
