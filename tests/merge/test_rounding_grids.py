"""Grids of codes times scales, and the solver on them, against tables and loops that are as plain as can be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tunesmith.checkpoint import Float64
from tunesmith.merge.rounding import (
    Codes,
    DenseHessian,
    Float8Codes,
    IntegerCodes,
    LowRankHessian,
    ScaledGrid,
    round_to_grid,
    unit_upper_factor,
)

KINDS: dict[str, Codes] = {"int4": IntegerCodes(4), "int8": IntegerCodes(8), "fp8": Float8Codes()}


def table_of(kind: str) -> Float64:
    """Every code, ascending."""
    if kind == "fp8":
        patterns = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn).double().numpy()
        return np.unique(patterns[np.isfinite(patterns)])
    bits = int(kind[3:])
    return np.arange(-(2.0 ** (bits - 1)), 2.0 ** (bits - 1))


def values_for(table: Float64) -> Float64:
    """Codes, what lies halfway between two, and what lies anywhere, beyond the outermost too."""
    rng = np.random.default_rng(0)
    middles = (table[1:] + table[:-1]) / 2
    return np.concatenate([table, middles, rng.uniform(table[0] * 1.2, table[-1] * 1.2, 500), rng.normal(size=500)])


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_the_nearest_of_a_table(kind: str) -> None:
    """Every value gets the code that is nearest, the even one on a tie, the outermost beyond it."""
    table = table_of(kind)
    values = values_for(table)
    distances = np.abs(values[:, None] - table[None])
    found = KINDS[kind].nearest(values)
    assert np.isin(found, table).all()
    assert np.array_equal(np.abs(found - values), distances.min(axis=1))
    if kind != "fp8":
        ties = np.isclose(values % 1, 0.5) & (np.abs(values) < table[-1])
        assert ties.sum() > 10
        assert (found[ties] % 2 == 0).all()
    else:
        inside = np.clip(values, -448, 448)
        expected = torch.from_numpy(inside.astype(np.float32)).to(torch.float8_e4m3fn).double().numpy()
        exact = inside.astype(np.float32) == inside
        assert np.array_equal(found[exact], expected[exact])


@pytest.mark.parametrize("kind", KINDS)
def test_a_bracket_holds_its_value_between_two_neighbours(kind: str) -> None:
    """The largest code not above and the smallest not below; the threshold parts them as the nearest does."""
    table = table_of(kind)
    values = values_for(table)
    below, above, threshold = KINDS[kind].bracket(values)
    inside = np.clip(values, table[0], table[-1])
    assert np.array_equal(below, [table[table <= value].max() for value in inside])
    assert np.array_equal(above, [table[table >= value].min() for value in inside])
    assert np.array_equal(np.where(values > threshold, above, below), KINDS[kind].nearest(values))


def test_a_scaled_grid_knows_each_columns_scale_in_any_order() -> None:
    """Columns of one group share a scale; ``at`` takes them in the order that the solver walks them."""
    rng = np.random.default_rng(1)
    scale_TG = rng.uniform(0.5, 2.0, (5, 3))
    values_TI = rng.normal(size=(5, 12)) * 3
    plain = np.empty_like(values_TI)
    for row, column in itertools.product(range(5), range(12)):
        scale = scale_TG[row, column // 4]
        plain[row, column] = np.clip(np.rint(values_TI[row, column] / scale), -8, 7) * scale
    order = rng.permutation(12)
    grid = ScaledGrid(scale_TG, IntegerCodes(4), group_size=4).at(order)
    assert np.array_equal(grid.nearest(values_TI.T[order]), plain.T[order])
    for place in range(12):
        assert np.array_equal(grid.row(place).nearest(values_TI.T[order[place]]), plain.T[order[place]])


@pytest.mark.parametrize("clamp", [True, False], ids=["clamped", "free"])
@pytest.mark.parametrize("group", [None, 4], ids=["a-row", "groups"])
def test_the_solver_is_successive_rounding_on_this_grid(group: int | None, clamp: bool) -> None:
    """Column by column in the Hessian's order, each aimed against the errors before it, with its own scale."""
    rng = np.random.default_rng(2)
    rows, columns = 6, 40
    t_TI = rng.normal(size=(rows, columns))
    x_NI = rng.normal(size=(30, columns)) @ rng.normal(size=(columns, columns))
    h_II = x_NI.T @ x_NI / 30 + 0.1 * np.eye(columns)
    scale_TG = rng.uniform(0.1, 0.4, (rows, 1 if group is None else columns // group))
    order = rng.permutation(columns)
    grid = ScaledGrid(scale_TG, IntegerCodes(4), group_size=group)
    found_TI = round_to_grid(t_TI, DenseHessian(h_II, order=order, revisited=0), grid, clamp=clamp)

    n_II, _ = unit_upper_factor(h_II[np.ix_(order, order)])
    for row in range(rows):
        errors = np.zeros(columns)
        for place, column in enumerate(order):
            scale = scale_TG[row, 0 if group is None else column // group]
            aim = (t_TI[row, column] - errors[:place] @ n_II[:place, place]) / scale
            exact = np.clip(t_TI[row, column] / scale, -8, 7)
            code = np.clip(np.rint(aim), -8, 7)
            code = np.clip(code, np.floor(exact), np.ceil(exact)) if clamp else code
            assert found_TI[row, column] == code * scale
            errors[place] = code * scale - t_TI[row, column]


def test_feedback_lowers_what_the_hessian_weighs_on_a_coarse_grid() -> None:
    """Against rounding to nearest, for both forms of the Hessian."""
    rng = np.random.default_rng(3)
    t_TI, u_IM = rng.normal(size=(20, 64)), rng.normal(size=(64, 6)) * 2
    scale_TG = np.abs(t_TI).reshape(20, 2, 32).max(axis=2) / 7.5
    grid = ScaledGrid(scale_TG, IntegerCodes(4), group_size=32)
    h_II = np.eye(64) + u_IM @ u_IM.T
    nearest_TI = grid.at(np.arange(64)).nearest(t_TI.T).T

    def cost(q_TI: Float64) -> float:
        return float(np.einsum("ti,ij,tj->", q_TI - t_TI, h_II, q_TI - t_TI))

    for hessian in (LowRankHessian(u_IM), DenseHessian(h_II)):
        found_TI = round_to_grid(t_TI, hessian, grid, clamp=False)
        assert cost(found_TI) < 0.5 * cost(nearest_TI)
