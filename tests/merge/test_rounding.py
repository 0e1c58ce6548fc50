"""The solver against textbooks: dense factorisations, exhaustive search, exact rationals."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.merge.exact import rounded
from tunesmith.checkpoint import Float64, as_float64
from tunesmith.merge.rounding import (
    BLOCK,
    Bfloat16Grid,
    DenseHessian,
    Feedback,
    Grid,
    Hessian,
    Indices,
    LowRankHessian,
    Stochastic,
    round_once,
    round_to_grid,
    row_space,
    unit_upper_factor,
)

BF16 = Bfloat16Grid()


class Integers:
    """The whole numbers, as quantized formats have them: the grid is a parameter."""

    def at(self, columns: Indices) -> Grid:  # noqa: ARG002 - the same everywhere
        """As the protocol says."""
        return self

    def row(self, place: int) -> Grid:  # noqa: ARG002 - the same everywhere
        """As the protocol says."""
        return self

    def bracket(self, values: Float64) -> tuple[Float64, Float64, Float64]:
        """As the protocol says; ties go up."""
        below, above = np.floor(values), np.ceil(values)
        return below, above, np.nextafter((below + above) / 2, -np.inf)

    def nearest(self, values: Float64) -> Float64:
        """As the protocol says."""
        return np.floor(values + 0.5)


def problem(seed: int, rows: int, columns: int, width: int, *, weight: float = 10.0) -> tuple[Float64, Float64]:
    """Exact values beside bf16 numbers, as a merge has them, and U of some width."""
    rng = np.random.default_rng(seed)
    w_TI = as_float64(round_once(rng.standard_normal((rows, columns)), "BF16"), "BF16")
    a_RI = rng.standard_normal((width, columns))
    delta_TI = rng.standard_normal((rows, width)) @ a_RI * 10 ** rng.uniform(-4, -1)
    return w_TI + delta_TI, row_space(a_RI) * (weight * columns / width) ** 0.5


def dense(u_IM: Float64) -> Float64:
    """I + U·Uᵀ."""
    return np.eye(len(u_IM)) + u_IM @ u_IM.T


def cost(q_TI: Float64, t_TI: Float64, h_II: Float64) -> Float64:
    """e·H·eᵀ of every row."""
    e_TI = q_TI - t_TI
    return np.asarray(np.einsum("ti,ij,tj->t", e_TI, h_II, e_TI))


def textbook(t_TI: Float64, h_II: Float64, *, clamp: bool, revisited: int = 0) -> Float64:
    """Successive rounding, one number at a time: the rest of the row is best, did it not have to be rounded.

    Then coordinate descent over the last columns.
    """
    q_TI = np.zeros_like(t_TI)
    columns = t_TI.shape[1]
    for t_I, q_I in zip(t_TI, q_TI, strict=True):
        e_I = np.zeros(columns)
        for j in range(columns):
            aim = t_I[j] - (np.linalg.solve(h_II[j:, j:], h_II[j:, :j] @ e_I[:j])[0] if j else 0.0)
            q_I[j] = one(t_I[j], aim, clamp=clamp)
            e_I[j] = q_I[j] - t_I[j]
        for j in range(columns - revisited, columns):
            aim = t_I[j] - (h_II[j] @ e_I - h_II[j, j] * e_I[j]) / h_II[j, j]
            q_I[j] = one(t_I[j], aim, clamp=clamp)
            e_I[j] = q_I[j] - t_I[j]
    return q_TI


def one(exact: float, aim: float, *, clamp: bool) -> float:
    """The nearer of the two neighbours of the exact number to where it is aimed, or the nearest number to that."""
    if not clamp:
        return float(as_float64(round_once(np.array([aim]), "BF16"), "BF16")[0])
    below, above, threshold = (float(part[0]) for part in BF16.bracket(np.array([exact])))
    return above if aim > threshold else below


sizes = st.tuples(
    st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 2 * BLOCK + 9), st.integers(1, 6), st.booleans()
)


@settings(max_examples=60, deadline=None)
@given(sizes)
def test_both_forms_decide_as_the_textbook_to_the_last_number(size: tuple[int, int, int, int, bool]) -> None:
    """O(I·M) numbers a row, in blocks, give what a dense solve for every single number gives."""
    seed, rows, columns, width, clamp = size
    t_TI, u_IM = problem(seed, rows, columns, min(width, columns))
    expected = textbook(t_TI, dense(u_IM), clamp=clamp)
    assert np.array_equal(round_to_grid(t_TI, LowRankHessian(u_IM), BF16, clamp=clamp), expected)
    assert np.array_equal(round_to_grid(t_TI, DenseHessian(dense(u_IM), revisited=0), BF16, clamp=clamp), expected)


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(1, 3))
def test_the_second_walk_is_coordinate_descent(size: tuple[int, int, int, int, bool], count: int) -> None:
    """Over the last columns, in whole blocks, all other errors being known."""
    seed, rows, columns, width, clamp = size
    t_TI, u_IM = problem(seed, rows, columns, min(width, columns))
    low, full = LowRankHessian(u_IM, revisited=count * BLOCK), DenseHessian(dense(u_IM))
    assert min(columns, count * BLOCK) <= low.revisited < (count + 1) * BLOCK
    assert (columns - low.revisited) % BLOCK == 0
    expected = textbook(t_TI, dense(u_IM), clamp=clamp, revisited=low.revisited)
    assert np.array_equal(round_to_grid(t_TI, low, BF16, clamp=clamp), expected)
    everything = textbook(t_TI, dense(u_IM), clamp=clamp, revisited=columns)
    assert np.array_equal(round_to_grid(t_TI, full, BF16, clamp=clamp), everything)


@pytest.mark.parametrize("clamp", [True, False])
def test_the_second_walk_never_costs(clamp: bool) -> None:
    """Each step of it takes the best of what it may, and what was there before is one of those."""
    for seed in range(20):
        t_TI, u_IM = problem(seed, 6, 100, 4)
        once, twice = (
            round_to_grid(t_TI, LowRankHessian(u_IM, revisited=revisited), BF16, clamp=clamp) for revisited in (0, 100)
        )
        first, second = cost(once, t_TI, dense(u_IM)), cost(twice, t_TI, dense(u_IM))
        assert (second <= first * (1 + 1e-9)).all()
        assert second.sum() < first.sum()


def test_beside_exhaustive_search_on_eight_columns() -> None:
    """Never better than the best of 256, near it on the whole, and within Babai's bound where nothing is clamped.

    The bound: the aim is missed by at most half a step, so e·H·eᵀ ≤ ¼·Σ D_jj·step_j² (Babai 1986, theorem 3.1).
    """
    excess, nearest = [], []
    for seed in range(40):
        t_TI, u_IM = problem(seed, 4, 8, 2)
        h_II = dense(u_IM)
        _, d_I = unit_upper_factor(h_II)
        below_TI, above_TI, _ = BF16.bracket(t_TI)
        chosen = round_to_grid(t_TI, LowRankHessian(u_IM, revisited=8), BF16)
        free = round_to_grid(t_TI, LowRankHessian(u_IM), Integers(), clamp=False)
        choices = [np.where(pick, above_TI, below_TI) for pick in itertools.product((False, True), repeat=8)]
        best = np.min([cost(choice, t_TI, h_II) for choice in choices], axis=0)
        ours = cost(chosen, t_TI, h_II)
        assert (ours >= best * (1 - 1e-9)).all()
        assert (cost(free, t_TI, h_II) <= d_I.sum() / 4 + 1e-9).all()
        excess.append(ours.sum() / best.sum())
        nearest.append(cost(BF16.nearest(t_TI), t_TI, h_II).sum() / best.sum())
    assert np.median(excess) < 1.5
    assert np.median(nearest) > 2 * np.median(excess)


def test_a_diagonal_hessian_rounds_to_nearest() -> None:
    """Where no column can make up for another, the nearest number is best."""
    t_TI, _ = problem(3, 50, 70, 3)
    diagonal = np.diag(np.random.default_rng(0).uniform(0.5, 2, 70))
    for hessian in (LowRankHessian(np.zeros((70, 0))), LowRankHessian(np.zeros((70, 2))), DenseHessian(diagonal)):
        assert np.array_equal(round_to_grid(t_TI, hessian, BF16), as_float64(round_once(t_TI, "BF16"), "BF16"))


@pytest.mark.parametrize("form", ["low rank", "dense"])
def test_an_order_is_the_same_problem_with_its_columns_moved(form: str) -> None:
    """The columns are given back where they were."""
    t_TI, u_IM = problem(5, 7, 75, 3)
    order = np.random.default_rng(1).permutation(75)

    def solve(t_TI: Float64, u_IM: Float64, order: npt.NDArray[np.intp] | None) -> Float64:
        ordered: Hessian = LowRankHessian(u_IM, order=order, revisited=32)
        if form == "dense":
            ordered = DenseHessian(dense(u_IM), order=order)
        return round_to_grid(t_TI, ordered, BF16)

    assert np.array_equal(solve(t_TI, u_IM, order)[:, order], solve(t_TI[:, order], u_IM[order], None))


def test_rows_do_not_know_of_each_other() -> None:
    """However a tensor is cut into tiles, its rows come out the same."""
    t_TI, u_IM = problem(8, 40, 90, 4)
    feedback = Feedback(LowRankHessian(u_IM, revisited=64), basis_IM=None)
    whole = feedback.round(t_TI, 0)
    for height in (1, 7, 39):
        parts = [feedback.round(t_TI[start : start + height], start) for start in range(0, 40, height)]
        assert np.array_equal(np.concatenate(parts), whole)


def test_what_is_on_the_grid_stays_and_the_rest_goes_to_a_neighbour() -> None:
    """Also beside zero, among subnormal numbers, and at the largest."""
    t_TI, u_IM = problem(9, 30, 64, 4)
    t_TI[0] = as_float64(round_once(t_TI[0], "BF16"), "BF16")
    t_TI[1, :8] = [0.0, -0.0, 1e-40, -1e-40, 2.0**-133 / 3, 3.3895e38, -3.3895e38, 1.0]
    q_TI = round_to_grid(t_TI, LowRankHessian(u_IM, revisited=64), BF16)
    below_TI, above_TI, _ = BF16.bracket(t_TI)
    assert ((q_TI == below_TI) | (q_TI == above_TI)).all()
    assert np.array_equal(q_TI[0], t_TI[0])
    assert not np.array_equal(q_TI, BF16.nearest(t_TI)), "nothing was fed back"


def test_feedback_ends_what_rounding_to_nearest_loses() -> None:
    """The error within A's row space, and the part of the update that does not arrive."""
    rng = np.random.default_rng(2)
    w_TI = as_float64(round_once(rng.standard_normal((64, 512)) * 0.02, "BF16"), "BF16")
    a_RI = rng.standard_normal((8, 512))
    delta_TI = rng.standard_normal((64, 8)) @ a_RI * 3e-6
    basis_IM = row_space(a_RI)
    hessian = LowRankHessian(basis_IM * (10 * 512 / 8) ** 0.5, revisited=256)
    lost, inside = {}, {}
    for name, q_TI in (
        ("nearest", BF16.nearest(w_TI + delta_TI)),
        ("faithful", round_to_grid(w_TI + delta_TI, hessian, BF16)),
    ):
        e_TI = q_TI - w_TI - delta_TI
        lost[name] = -(e_TI * delta_TI).sum() / (delta_TI**2).sum()
        inside[name] = np.linalg.norm(e_TI @ basis_IM) / np.linalg.norm(delta_TI)
    assert lost["nearest"] > 0.4
    assert abs(lost["faithful"]) < 0.02
    assert inside["faithful"] < inside["nearest"] / 10


@settings(max_examples=300)
@given(st.floats(-1e39, 1e39) | st.floats(-1e-37, 1e-37) | st.floats(-4, 4))
def test_a_bracket_is_the_two_neighbours(value: float) -> None:
    """Against exact rationals: one of them is the nearest, and nothing lies between them."""
    below, above, threshold = (float(part[0]) for part in BF16.bracket(np.array([value])))
    largest = float.fromhex("0x1.fep127")
    if abs(value) >= largest:
        assert below == above == np.copysign(largest, value)
        return
    assert below <= value <= above
    nearest = rounded(Fraction(value), "BF16")
    assert nearest in (below, above)
    assert float(BF16.nearest(np.array([value]))[0]) == nearest
    assert (above if value > threshold else below) == nearest
    if below != above:
        middle = (Fraction(below) + Fraction(above)) / 2
        assert rounded(middle + Fraction(1, 10**60), "BF16") == above
        assert rounded(middle - Fraction(1, 10**60), "BF16") == below
    else:
        assert below == value


def test_stochastic_rounding_is_right_in_the_mean() -> None:
    """Up with the probability of how far up the value lies; a hundred thousand draws within five deviations."""
    share = np.linspace(0.05, 0.95, 10)
    step = 2.0**-7
    exact_TI = np.tile(1 + share * step, (100_000, 1))
    rounded_TI = Stochastic(0, "a tensor").round(exact_TI, 0)
    assert set(np.unique(rounded_TI)) == {1.0, 1 + step}
    ups = (rounded_TI > 1).mean(0)
    assert (np.abs(ups - share) < 5 * np.sqrt(share * (1 - share) / 100_000)).all()


def test_chance_hangs_on_seed_tensor_and_place_only() -> None:
    """The same numbers however the rows are cut; others with another seed, tensor or row."""
    exact_TI, _ = problem(4, 30, 37, 3)
    whole = Stochastic(7, "x").round(exact_TI, 0)
    cut = [Stochastic(7, "x").round(exact_TI[start : start + 11], start) for start in (0, 11, 22)]
    assert np.array_equal(np.concatenate(cut), whole)
    for other in (Stochastic(8, "x"), Stochastic(7, "y")):
        assert not np.array_equal(other.round(exact_TI, 0), whole)
    same_row = np.tile(exact_TI[:1], (30, 1))
    assert len(np.unique(Stochastic(7, "x").round(same_row, 0), axis=0)) > 1


def test_a_row_space_is_orthonormal_and_has_the_rank_of_all_its_rows() -> None:
    """Rows that are repeated, scaled, summed, or nothing at all add no direction."""
    rng = np.random.default_rng(6)
    a_RI, other_RI = rng.standard_normal((3, 20)), rng.standard_normal((2, 20))
    basis_IM = row_space(a_RI, 1e-9 * other_RI, a_RI[:1] + a_RI[1:2], np.zeros((2, 20)))
    assert basis_IM.shape == (20, 5)
    assert np.allclose(basis_IM.T @ basis_IM, np.eye(5), atol=1e-12)
    for rows in (a_RI, other_RI):
        assert np.allclose(rows @ basis_IM @ basis_IM.T, rows, atol=1e-12)
    assert row_space(np.zeros((2, 20))).shape == (20, 0)


def test_a_matrix_that_is_not_positive_definite_is_not_factored() -> None:
    """It would have no least error."""
    with pytest.raises(np.linalg.LinAlgError):
        DenseHessian(-np.eye(3))
