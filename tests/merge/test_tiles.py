"""The tile arithmetic against exact rationals: one rounding, to nearest, ties to even."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.merge.exact import FORMATS, TORCH, number, round_tensor, rounded
from tunesmith.checkpoint import as_float64
from tunesmith.merge.rounding import round_once
from tunesmith.merge.tiles import TileSums, settle_tile

DTYPES = list(FORMATS)


def merge_tile(
    stored: np.ndarray, dtype: str, a: np.ndarray, b: np.ndarray, scaling: float
) -> tuple[np.ndarray, TileSums]:
    """W + scaling·B·A, from rows as they are stored."""
    return settle_tile(as_float64(stored, dtype), (scaling * b) @ a, dtype, kept_TI=stored)


def check(values: list[float], dtype: str) -> None:
    """Compare round_once with the oracle, the sign of zero included."""
    found = number(round_once(np.array(values), dtype), dtype)
    for value, got in zip(values, found, strict=True):
        expected = rounded(Fraction(value), dtype)
        assert got == float(expected), (value.hex(), got, float(expected))
        assert math.copysign(1, got) == math.copysign(1, value), value.hex()


def all_finite(dtype: str) -> np.ndarray:
    """Every finite number of a 16-bit format, in order, as float64."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(TORCH[dtype]).double().numpy()
    return np.unique(patterns[np.isfinite(patterns)])


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_any_float64_is_rounded_to_the_nearest(dtype: str, data: st.DataObject) -> None:
    """Random values of every size, those around the format's own limits, and exact ties with their neighbours."""
    digits, least, greatest = FORMATS[dtype]
    exponent = data.draw(st.integers(least - digits - 3, greatest + 1))
    grid = data.draw(st.integers(2 ** (digits - 1), 2**digits))
    nudge = data.draw(st.sampled_from([0.0, 0.25, 0.5, 0.5 - 2**-20, 0.5 + 2**-20, 0.5 - 2**-27, 0.5 + 2**-27, 0.75]))
    near = math.ldexp(grid + nudge, exponent - digits + 1)
    anything = data.draw(st.floats(allow_nan=False, allow_infinity=False))
    check([near, -near, np.nextafter(near, 0), np.nextafter(near, np.inf), anything], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_at_the_edges_are_rounded_to_the_nearest(dtype: str) -> None:
    """Zeros of both signs, the least subnormal and half of it, the least normal, the largest and just beyond."""
    digits, least, greatest = FORMATS[dtype]
    tiny, normal = math.ldexp(1, least - digits + 1), math.ldexp(1, least)
    largest = math.ldexp(2 - math.ldexp(1, 1 - digits), greatest)
    limit = math.ldexp(2 - math.ldexp(1, -digits), greatest)  # the tie between the largest and infinity: infinite
    edges = [0.0, tiny, tiny / 2, tiny / 4, 1.5 * tiny, 2.5 * tiny, normal, normal - tiny, normal - tiny / 2, largest]
    edges += [limit, 1e300, 5e-324, 2.2250738585072014e-308]
    for edge in edges:
        for value in (edge, float(np.nextafter(edge, 0)), float(np.nextafter(edge, np.inf))):
            check([value, -value], dtype)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_between_all_neighbours_of_a_format_the_nearest_is_taken(dtype: str) -> None:
    """Brute force: at, just below and just above the middle of every two neighbours."""
    grid = all_finite(dtype)
    low, high = grid[:-1], grid[1:]
    middle = (low + high) / 2  # exact: both have few digits
    below, above = np.nextafter(middle, -np.inf), np.nextafter(middle, np.inf)
    assert np.array_equal(as_float64(round_once(below, dtype), dtype), low)
    assert np.array_equal(as_float64(round_once(above, dtype), dtype), high)
    even = (
        np.arange(len(grid)) - np.searchsorted(grid, 0.0)
    ) % 2 == 0  # a pattern ends in 0 bit where its rank is even
    assert np.array_equal(as_float64(round_once(middle, dtype), dtype), np.where(even[:-1], low, high))
    assert np.array_equal(as_float64(round_once(grid, dtype), dtype), grid)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_the_quick_oracle_is_the_exact_one(dtype: str, data: st.DataObject) -> None:
    """``round_tensor`` against the rationals, for any finite number, those near a format's limits, and ties."""
    digits, least, greatest = FORMATS[dtype]
    near = st.builds(
        lambda grid, halves, exponent: math.ldexp(2 * grid + halves, exponent - digits),
        st.integers(0, 2**digits), st.integers(-1, 1), st.integers(least - 3, greatest),
    )  # fmt: skip
    value = data.draw(near | st.floats(allow_nan=False, allow_infinity=False))
    expected = rounded(Fraction(value), dtype)
    found = float(round_tensor(torch.tensor([value], dtype=torch.float64), dtype)[0])
    assert (found, math.copysign(1, found)) == (float(expected), math.copysign(1, value))


def test_rounding_twice_would_be_noticed() -> None:
    """What float64 → float32 → bf16 gets wrong, and torch with it: above a tie by less than float32 sees."""
    value = 1 + 2**-8 + 2**-40
    check([value, -value], "BF16")
    twice = torch.tensor([value], dtype=torch.float64).float().bfloat16().double().item()
    assert twice != number(round_once(np.array([value]), "BF16"), "BF16")[0]


def test_float64_stays_as_it_is_and_what_is_not_finite_stays_so() -> None:
    """NaN, both infinities; for every dtype."""
    values = np.array([1 / 3, -0.0, 5e-324])
    assert round_once(values, "F64").tobytes() == values.tobytes()
    for dtype in DTYPES:
        assert np.array_equal(
            number(round_once(np.array([np.nan, np.inf, -np.inf]), dtype), dtype),
            [np.nan, np.inf, -np.inf],
            equal_nan=True,
        )


def stored(values: list[list[float]], dtype: str) -> np.ndarray:
    """Numbers as a base file stores them."""
    tensor = torch.tensor(values, dtype=torch.float64).to(TORCH[dtype])
    return tensor.view(torch.int16).numpy().view(np.uint16) if dtype == "BF16" else tensor.numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_tile_is_the_exact_sum_rounded_once(dtype: str, data: st.DataObject) -> None:
    """W + s·B·A in exact rationals; small integers over powers of two keep float64 exact, so bits must agree."""
    rows, columns, r = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    small = st.integers(-64, 64).map(lambda n: n / 2**9)
    b = [[data.draw(small) for _ in range(r)] for _ in range(rows)]
    a = [[data.draw(small) for _ in range(columns)] for _ in range(r)]
    scaling = data.draw(st.sampled_from([1.0, 0.5, 2.0, 16.0, 0.0, -1.0]))
    weights = st.floats(-8, 8, width=16) | st.sampled_from([0.0, -0.0])
    base = stored([[data.draw(weights) for _ in range(columns)] for _ in range(rows)], dtype)
    merged, sums = merge_tile(base, dtype, np.array(a), np.array(b), scaling)
    w = number(base, dtype)
    for index, got in enumerate(number(merged, dtype)):
        row, column = divmod(index, columns)
        products = [Fraction(b[row][k]) * Fraction(a[k][column]) for k in range(r)]
        delta = Fraction(scaling) * sum(products, Fraction(0))
        assert got == float(rounded(Fraction(w[index]) + delta, dtype))
        if delta == 0:
            assert merged.reshape(-1)[index].tobytes() == base.reshape(-1)[index].tobytes()
    assert sums.elements == rows * columns
    assert sums.unchanged == sum(x.tobytes() == y.tobytes() for x, y in zip(merged.flat, base.flat, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_added_leaves_the_bases_own_bits(dtype: str) -> None:
    """−0.0 + 0.0 is 0.0: the bytes would change."""
    base = stored([[0.0, -0.0, 1.5]], dtype)
    merged, sums = merge_tile(base, dtype, np.ones((1, 3)), np.zeros((1, 1)), 1.0)
    assert merged.tobytes() == base.tobytes()
    assert (sums.unchanged, sums.delta_delta, sums.overflowed) == (3, 0.0, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sums_are_what_rounding_kept(dtype: str) -> None:
    """Against the same sums written out with torch's own widening; products of 8 terms in float64."""
    rng = np.random.default_rng(5)
    base = stored(rng.standard_normal((5, 7)).tolist(), dtype)
    a, b = rng.standard_normal((2, 7)), rng.standard_normal((5, 2)) * 1e-3
    merged, sums = merge_tile(base, dtype, a, b, 2.0)
    realised = [after - before for after, before in zip(number(merged, dtype), number(base, dtype), strict=True)]
    delta = (2.0 * np.einsum("or,ri->oi", b, a)).reshape(-1).tolist()
    assert sums.delta_delta == pytest.approx(math.fsum(d * d for d in delta), rel=1e-12)
    assert sums.realised_delta == pytest.approx(
        math.fsum(x * d for x, d in zip(realised, delta, strict=True)), rel=1e-12
    )
    assert sums.error_error == pytest.approx(
        math.fsum((x - d) ** 2 for x, d in zip(realised, delta, strict=True)), rel=1e-6 if dtype == "F32" else 1e-12
    )


@pytest.mark.parametrize(
    ("dtype", "weight", "delta"), [("F16", 65504.0, 16.0), ("BF16", 3.39e38, 1e37), ("F32", 3.4e38, 1e37)]
)
def test_what_overflows_is_counted(dtype: str, weight: float, delta: float) -> None:
    """Each format at its own limit; just below it nothing is counted."""
    base = stored([[weight, 0.0]], dtype)
    assert merge_tile(base, dtype, np.array([[delta, delta]]), np.ones((1, 1)), 1.0)[1].overflowed == 1
    assert merge_tile(base, dtype, np.array([[-delta, delta]]), np.ones((1, 1)), 1.0)[1].overflowed == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_base_that_is_not_finite_is_counted_even_where_nothing_is_added(dtype: str, bad: float) -> None:
    """So that the caller can refuse it; without a warning on the way."""
    base = stored([[bad, 1.0]], dtype)
    for factor in (0.0, 1.0):
        assert merge_tile(base, dtype, np.full((1, 2), factor), np.ones((1, 1)), 1.0)[1].overflowed == 1
