"""Every element against exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction
from math import inf, isfinite, nan

import numpy as np
import pytest

from tunesmith.checkpoint import Array, Float64, as_float64
from tunesmith.verify.records import TensorVerdict
from tunesmith.verify.weights.check import Tally, classify, strays
from tunesmith.verify.weights.expected import low_rank_rows
from tunesmith.verify.weights.rounding import to_dtype, with_neighbours

DTYPES = ("BF16", "F16", "F32")
PATTERN = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}
STORED = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
UNIT = {"BF16": Fraction(1, 2**8), "F16": Fraction(1, 2**11), "F32": Fraction(1, 2**24)}
NO_ERROR = np.zeros(())


def stored(patterns: Array, dtype: str) -> Array:
    """Bit patterns as the arrays that a checkpoint hands out."""
    return np.asarray(patterns, PATTERN[dtype]).view(STORED[dtype])


def neighbours(pattern: int, dtype: str) -> tuple[float, float]:
    """The next smaller and next larger value, by walking the patterns outwards from zero."""
    sign = 1 << (8 * np.dtype(PATTERN[dtype]).itemsize - 1)
    magnitude = pattern & (sign - 1)
    outward = number(magnitude + 1, dtype)
    inward = number(magnitude - 1, dtype) if magnitude else -outward
    return (inward, outward) if pattern < sign else (-outward, -inward)


def number(pattern: int, dtype: str) -> float:
    """The value of one pattern."""
    return float(as_float64(stored(np.array([pattern]), dtype), dtype)[0])


def kind(pattern: int, dtype: str, base: float, delta: float) -> str:
    """The class of one element, from the definition, in fractions; without the allowance for float32 sums."""
    value, (below, above), x = number(pattern, dtype), neighbours(pattern, dtype), Fraction(base) + Fraction(delta)
    if not isfinite(value):
        return "outside"
    distance = abs(Fraction(value) - x)
    gaps = [Fraction(end) - x for end in (below, above) if isfinite(end)]
    if all(distance <= abs(gap) for gap in gaps):
        return "exact"
    steps = [abs(Fraction(end) - Fraction(value)) for end in (below, above) if isfinite(end)]
    step = steps[-1] if x > Fraction(value) else steps[0]
    early = UNIT[dtype] * (1 + UNIT[dtype]) * abs(Fraction(delta)) if delta else Fraction(0)
    if delta and distance <= step / 2 + early:
        return "twice_rounded"
    return "faithful" if all(isfinite(end) for end in (below, above)) and below < x < above else "outside"


def sure(pattern: int, dtype: str, base: float, delta: float) -> bool:
    """Whether an element is far enough from every border for its class not to hang on float64 or float32 sums."""
    scale = abs(base) + abs(delta)
    nudges = [scale * 2.0**-22, -scale * 2.0**-22] if dtype != "F32" else [scale * 2.0**-48, -scale * 2.0**-48]
    return len({kind(pattern, dtype, base, delta + nudge if delta else 0.0) for nudge in (0.0, *nudges)}) == 1


def classes(patterns: Array, dtype: str, base: Float64, delta: Float64) -> list[str]:
    """What ``classify`` makes of each element alone."""
    kinds = []
    for pattern, before, change in zip(patterns, base, delta, strict=True):
        tally = classify(stored(np.array([pattern]), dtype), dtype, np.array([before]), np.array([change]), NO_ERROR)
        kinds.append(next(name for name in ("exact", "twice_rounded", "faithful", "outside") if getattr(tally, name)))
    return kinds


def rounded(x: Float64, dtype: str) -> Array:
    """Patterns near x, not necessarily the nearest."""
    single = x.astype(np.float32 if dtype == "BF16" else STORED[dtype])
    bits = single.view(np.uint32 if dtype == "BF16" else PATTERN[dtype]).astype(np.int64)
    return bits >> 16 if dtype == "BF16" else bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-5, 30.0])
def test_random_elements_are_classed_as_fractions_class_them(dtype: str, size: float) -> None:
    """The nearest value and those up to three steps away, for updates from far below a step to many steps."""
    rng = np.random.default_rng(0)
    base = as_float64(stored(rounded(rng.normal(size=250), dtype), dtype), dtype)
    delta = rng.normal(size=250) * np.abs(base) * size * 0.01
    patterns = rounded(base + delta, dtype) + rng.integers(-3, 4, size=250)
    seen = classes(patterns, dtype, base, delta)
    expected = [kind(int(p), dtype, b, d) for p, b, d in zip(patterns, base, delta, strict=True)]
    settled = [sure(int(p), dtype, b, d) for p, b, d in zip(patterns, base, delta, strict=True)]
    assert [pair for pair in zip(seen, expected, settled, strict=True) if pair[2] and pair[0] != pair[1]] == []
    assert sum(settled) > 150
    assert {"exact", "outside"} <= {name for name, ok in zip(seen, settled, strict=True) if ok}


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_values_near_x_are_told_apart(dtype: str) -> None:
    """Around one x: the nearest is exact, the other neighbour faithful, and the next ones on both sides outside."""
    one = {"BF16": 0x3F80, "F16": 0x3C00, "F32": 0x3F800000}[dtype]
    step = number(one + 1, dtype) - 1.0
    delta = np.full(4, 0.3 * step)
    assert classes(np.array([one - 1, one, one + 1, one + 2]), dtype, np.ones(4), delta) == [
        "outside",
        "exact",
        "faithful",
        "outside",
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tie_may_go_either_way(dtype: str) -> None:
    """Both neighbours of a midpoint are nearest; x's own error spans it."""
    one = {"BF16": 0x3F80, "F16": 0x3C00, "F32": 0x3F800000}[dtype]
    delta = np.full(2, (number(one + 1, dtype) - 1.0) / 2)
    assert classes(np.array([one, one + 1]), dtype, np.ones(2), delta) == ["exact", "exact"]


def test_a_delta_that_was_rounded_first_is_known_by_it() -> None:
    """Δ rounded to bf16 crosses the midpoint that Δ itself does not."""
    base, step = 1.0, 2.0**-7
    delta = step / 2 * (1 - 2.0**-9)  # just below the midpoint; bf16 rounds it up to the midpoint
    assert classes(np.array([0x3F81]), "BF16", np.array([base]), np.array([delta])) == ["twice_rounded"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_untouched_number_has_no_neighbour_to_choose(dtype: str) -> None:
    """Where nothing is added, one step away is outside: a flipped low bit is not a way of rounding."""
    patterns = rounded(np.array([1.0, -0.37, 3e-5, 6e4]), dtype)
    base = as_float64(stored(patterns, dtype), dtype)
    for step in (-1, 1):
        assert classes(patterns + step, dtype, base, np.zeros(4)) == ["outside"] * 4
    assert classes(patterns, dtype, base, np.zeros(4)) == ["exact"] * 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("delta", [0.0, 1e-3])
def test_a_number_far_below_what_it_should_be_is_outside(delta: float, dtype: str) -> None:
    """Its neighbours are so near to it that float64 sees all three as far from x: that makes none of them right."""
    patterns = np.array([0, 1, 2, rounded(np.array([1e-7]), dtype)[0]])
    patterns = np.concatenate([patterns, patterns | 1 << (8 * np.dtype(PATTERN[dtype]).itemsize - 1)])
    for base in (0.1, -3.0):
        seen = classes(patterns, dtype, np.full(8, base), np.full(8, delta))
        assert seen == ["outside"] * 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_numbers_are_classed_like_others(dtype: str) -> None:
    """Near zero the steps are all alike, and zero's neighbours are of both signs."""
    tiny = number(1, dtype)
    sign = 1 << (8 * np.dtype(PATTERN[dtype]).itemsize - 1)
    delta = np.full(5, 0.3 * tiny)
    patterns = np.array([0, sign, 1, 2, sign | 1])
    seen = classes(patterns, dtype, np.zeros(5), delta)
    assert seen[:2] == ["exact", "exact"]
    assert seen[3:] == ["outside", "outside"]
    assert seen[2] in ("faithful", "twice_rounded")


def test_both_zeros_are_zero() -> None:
    """The sign of zero is no difference of value."""
    assert classes(np.array([0x8000, 0]), "BF16", np.array([0.0, -0.0]), np.zeros(2)) == ["exact", "exact"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [inf, -inf, nan])
def test_what_is_not_finite_is_outside(dtype: str, value: float) -> None:
    """And the sums that it would spoil say so, and can be written to JSON."""
    pattern = rounded(np.array([value]), dtype)
    tally = classify(stored(pattern, dtype), dtype, np.ones(1), np.full(1, 0.01), NO_ERROR)
    assert (tally.outside, tally.exact) == (1, 0)
    assert tally.error_error == inf
    record = tally.verdict("w", "m")
    assert TensorVerdict.model_validate_json(record.model_dump_json()) == record


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_number_is_outside_where_it_does_not_belong(dtype: str) -> None:
    """The infinite step beside it allows for nothing."""
    infinite = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}[dtype]
    assert classes(np.array([infinite - 1]), dtype, np.ones(1), np.full(1, 0.01)) == ["outside"]


def test_the_step_below_a_power_of_two_is_the_smaller_one() -> None:
    """1.0 has half the step below that it has above; an x that is nearer to the value below is not 1.0's."""
    x_below = -0.8 * 2.0**-8  # in steps of 2^-8 below 1: nearer to the neighbour
    assert classes(np.array([0x3F80]), "BF16", np.ones(1), np.array([x_below])) == ["faithful"]


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_a_cast_goes_to_the_nearest_value_and_halfway_to_the_even_one(dtype: str) -> None:
    """As every library casts: a float32 base has thousands of numbers that lie halfway."""
    patterns = np.arange(0x3800, 0x3900, dtype=np.uint16)
    line = as_float64(stored(patterns, dtype), dtype)
    middle = (line[1:] + line[:-1]) / 2
    even = np.where(patterns[1:] % 2 == 0, line[1:], line[:-1])
    for sign in (1, -1):
        assert (to_dtype(sign * middle, dtype) == sign * even).all()
        assert (to_dtype(sign * middle * (1 + 2.0**-20), dtype) == sign * line[1:]).all()
        assert (to_dtype(sign * middle * (1 - 2.0**-20), dtype) == sign * line[:-1]).all()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_neighbours_of_all_65536_patterns_are_the_values_beside_them(dtype: str) -> None:
    """Against all values of the dtype, sorted."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    value, below, above = with_neighbours(stored(patterns, dtype), dtype)
    finite = np.isfinite(value)
    line = np.unique(value[~np.isnan(value)])  # −inf … inf, with one zero
    place = np.searchsorted(line, value[finite])
    assert (below[finite] == line[place - 1]).all()
    assert (above[finite] == line[place + 1]).all()


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_neighbours_of_wider_numbers_are_numpys(dtype: str) -> None:
    """``nextafter``, at random and at the ends."""
    kind_of = {"F32": np.float32, "F64": np.float64}[dtype]
    ends = [0.0, -0.0, 1.0, np.finfo(kind_of).max, np.finfo(kind_of).tiny, np.finfo(kind_of).smallest_subnormal]
    values = np.array([*np.random.default_rng(1).normal(size=500), *ends], kind_of)
    _, below, above = with_neighbours(values, dtype)
    with np.errstate(over="ignore"):
        assert (below == np.nextafter(values, kind_of(-inf))).all()
        assert (above == np.nextafter(values, kind_of(inf))).all()


def test_the_error_bound_of_a_row_holds_against_fractions() -> None:
    """Computed s·B·A is as near to the exact one as is said, also where terms cancel."""
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(8, 5)), rng.normal(size=(3, 8))
    b[:, 1] = -b[:, 0]
    a[1] = a[0] * (1 + 2.0**-40)
    delta, bound = low_rank_rows(a, b, 0.7)
    for row in range(3):
        for column in range(5):
            terms = [Fraction(float(b[row, k])) * Fraction(float(a[k, column])) for k in range(8)]
            exact = Fraction(0.7) * sum(terms)
            assert abs(Fraction(float(delta[row, column])) - exact) <= Fraction(float(bound[row, 0]))


def test_tallies_add_up_to_the_same_whatever_the_tiles() -> None:
    """Sums over tiles of rows are the sums of the whole."""
    rng = np.random.default_rng(3)
    base, delta = as_float64(rounded(rng.normal(size=(8, 16)), "BF16").astype(np.uint16), "BF16"), None
    delta = rng.normal(size=base.shape) * 0.01
    values = (rounded(base + delta, "BF16") + rng.integers(-1, 2, size=base.shape)).astype(np.uint16)
    whole = classify(values, "BF16", base, delta, np.zeros((8, 1)))
    parts = Tally()
    for row in range(0, 8, 3):
        part = slice(row, row + 3)
        parts.add(classify(values[part], "BF16", base[part], delta[part], np.zeros((8, 1))[part]))
    assert parts.verdict("w", "m").model_dump() == pytest.approx(whole.verdict("w", "m").model_dump())
    assert whole.exact + whole.faithful + whole.twice_rounded + whole.outside == whole.elements == 128


def _verdict(name: str, elements: int, faithful: int) -> TensorVerdict:
    exact = elements - faithful
    return TensorVerdict(
        name=name,
        module="m",
        elements=elements,
        exact=exact,
        faithful=faithful,
        twice_rounded=0,
        outside=0,
        unchanged=0,
    )


@pytest.mark.parametrize(
    ("elements", "faithful", "strayed"),
    [(10**8, 1, True), (10**8, 64, True), (10**8, 65, False), (10**5, 10, True), (10**5, 11, False), (50, 1, True)],
)
def test_few_faithful_elements_are_strays_and_many_a_way_of_rounding(
    elements: int, faithful: int, strayed: bool
) -> None:
    """At most 64, and at most one in ten thousand; a single one always."""
    found = strays([_verdict("a", elements - 20, faithful), _verdict("b", 20, 0)])
    assert found == ({"a": faithful} if strayed else {})


def test_no_faithful_element_is_no_stray() -> None:
    """A merge that is rounded to nearest has none."""
    assert strays([_verdict("a", 1000, 0)]) == {}
    assert strays([]) == {}
