"""The compiled arithmetic against the plain one: the same bytes, and whatever is rare handed back."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.merge.conftest import Bench
from tests.merge.handmade import carry_out, file_bytes, numbers, write_model, write_tensors
from tests.merge.test_kinds import everything, low
from tunesmith.adapter import Binding
from tunesmith.checkpoint import as_float64, weights_sha256
from tunesmith.merge import kernel, merge, plan_merge, units, work, write
from tunesmith.merge.rounders import calibrated, faithful
from tunesmith.merge.rounding import Feedback, LowRankHessian, Stochastic, row_space
from tunesmith.merge.tiles import TileSums, settle_tile

pytest.importorskip("numba", reason="the extra 'fast' is not installed")


@pytest.fixture(scope="module", autouse=True)
def _feedback_however_large_the_update() -> Iterator[None]:
    """These updates are large against the grid; a merge would round them to nearest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "ENOUGH", math.inf)
        yield


def both(stored: np.ndarray, delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same rows by the compiled and the plain way; the sums that both tell must agree."""
    merged = np.empty_like(stored)
    sums = kernel.settle_bf16(stored, delta, merged)
    plain, expected = settle_tile(as_float64(stored, "BF16"), delta, "BF16", kept_TI=stored)
    assert sums is not None
    assert (sums.elements, sums.unchanged, sums.overflowed) == (expected.elements, expected.unchanged, 0)
    for name in ("delta_delta", "realised_delta", "error_error"):
        assert getattr(sums, name) == pytest.approx(getattr(expected, name), rel=1e-9)
    return merged, plain


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e-1, 10.0])
def test_a_million_sums_are_rounded_to_the_same_bytes(scale: float) -> None:
    """Updates from far below the grid to far above the weights."""
    rng = np.random.default_rng(1)
    stored = (rng.standard_normal((1000, 1000)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    merged, plain = both(stored, rng.standard_normal((1000, 1000)) * scale)
    assert np.array_equal(merged, plain)


def test_every_ordinary_number_of_the_format_is_rounded_to_the_same_bytes() -> None:
    """All bf16 patterns with an update of no, a quarter, exactly half, and just over half a step, in both signs."""
    patterns = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    size = np.abs(as_float64(patterns, "BF16"))
    ordinary = (size == 0) | ((size >= 2.0**-110) & (size < 2.0**127))
    stored = np.ascontiguousarray(patterns[ordinary]).reshape(1, -1)
    w = as_float64(stored, "BF16")
    step = np.exp2(np.floor(np.log2(np.maximum(np.abs(w), 2.0**-110)))) * 2.0**-7
    for share in (0.0, 0.25, 0.5, 0.5 + 2**-30, -0.5, -0.75, 1.5):
        merged, plain = both(stored, np.where(w == 0, 0.0, step * share))
        assert np.array_equal(merged, plain), share


def test_nothing_added_keeps_the_sign_of_zero() -> None:
    """−0.0 + 0.0 is 0.0."""
    merged, _ = both(np.array([[0x8000, 0x0000, 0x3F80]], np.uint16), np.array([[0.0, -0.0, 0.0]]))
    assert merged.tolist() == [[0x8000, 0x0000, 0x3F80]]


@pytest.mark.parametrize(
    ("pattern", "delta"),
    [(0x7F80, 0.0), (0xFFC0, 0.0), (0x3F80, 1e39), (0x7F7F, 3e36), (0x0001, 0.0), (0x0000, 1e-40), (0, np.nan)],
)
def test_what_is_rare_is_handed_back(pattern: int, delta: float) -> None:
    """Infinity, NaN, overflow, subnormal results: the plain way refuses or rounds them."""
    stored = np.full((4, 9), 0x3F80, np.uint16)
    deltas = np.zeros((4, 9))
    stored[2, 5], deltas[2, 5] = pattern, delta
    assert kernel.settle_bf16(stored, deltas, np.empty_like(stored)) is None


def bf16(values: np.ndarray) -> np.ndarray:
    """Numbers cut to bf16's digits, as patterns."""
    return np.ascontiguousarray((values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16))


def panel(stored: np.ndarray, b: np.ndarray, a: np.ndarray, rounder: Feedback) -> tuple[np.ndarray, TileSums | None]:
    """Rows with feedback by the compiled way."""
    merged = np.empty_like(stored)
    return merged, kernel.settle_panel(stored, b, np.ascontiguousarray(a.T), rounder, merged)


def assert_same_sums(sums: TileSums, expected: TileSums) -> None:
    """They agree but for the order of summing; what nearest would have lost inside is summed in float32.

    A sum of fewer than 2^9 terms is off by less than 2^9·2^-24 = 3e-5 of them, and its square by twice that; a term of
    1e-41, beside float32's least number of 1.4e-45, by 7e-5.
    """
    ours, theirs = asdict(sums), asdict(expected)
    inside = pytest.approx(theirs.pop("nearest_inside"), rel=1e-4, abs=1e-7 * expected.delta_delta)
    assert ours.pop("nearest_inside") == inside
    assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12 * expected.delta_delta)


def both_panels(stored: np.ndarray, b: np.ndarray, a: np.ndarray, rounder: Feedback) -> tuple[np.ndarray, np.ndarray]:
    """The same rows with feedback by the compiled and the plain way; the sums that both tell must agree."""
    merged, sums = panel(stored, b, a, rounder)
    plain, expected = settle_tile(as_float64(stored, "BF16"), b @ a, "BF16", kept_TI=stored, rounder=rounder)
    assert sums is not None
    assert_same_sums(sums, expected)
    assert sums.unchanged == expected.unchanged
    assert sums.nearest_unchanged == expected.nearest_unchanged
    return merged, plain


SHAPES = [(1, 1, 1), (3, 31, 2), (255, 64, 1), (256, 33, 8), (257, 96, 16), (40, 500, 64), (7, 5, 9)]


@pytest.mark.parametrize("scale", [1e-4, 3e-3, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids="{0[0]}-{0[1]}-{0[2]}".format)
@pytest.mark.parametrize("others", [0, 5])
def test_feedback_rounds_to_the_same_bytes(shape: tuple[int, int, int], scale: float, others: int) -> None:
    """Rows and columns that fill no panel and no block, ranks beyond the number of columns, zeros of both signs.

    With other modules that are given the same input, or alone.
    """
    rows, columns, r = shape
    rng = np.random.default_rng(rows * columns + r)
    stored = bf16(rng.standard_normal((rows, columns)))
    a, b = rng.standard_normal((r, columns)), rng.standard_normal((rows, r)) * scale
    b[rng.random(rows) < 0.2] = 0.0  # rows that nothing is added to
    zero = rng.random(stored.shape) < 0.02
    stored[zero] = rng.choice(np.array([0x0000, 0x8000], np.uint16), int(zero.sum()))
    beside = [rng.standard_normal((others, columns))] if others else []
    merged, plain = both_panels(stored, b, a, faithful(a, beside))
    assert np.array_equal(merged, plain)


def test_the_compiled_pass_says_what_it_knows() -> None:
    """To nearest, and feedback between two neighbours, columns as they lie, each visited once."""
    rng = np.random.default_rng(0)
    a, inputs, steps = rng.standard_normal((4, 75)), rng.standard_normal((400, 75)), np.ones(75)
    known, basis = faithful(a), row_space(a)
    assert kernel.can_settle(None)
    assert kernel.can_settle(known)
    for unknown in (
        Stochastic(0, "x"),
        calibrated(inputs, steps, a, clamp=True),
        calibrated(inputs[:20], steps, a, clamp=True),
        Feedback(known.hessian, basis_IM=basis, clamp=False, inside_of_state=known.inside_of_state),
        Feedback(known.hessian, basis_IM=basis),
        Feedback(LowRankHessian(basis, revisited=32), basis_IM=basis, inside_of_state=known.inside_of_state),
        Feedback(LowRankHessian(basis, order=np.arange(75)), basis_IM=basis, inside_of_state=known.inside_of_state),
    ):
        assert not kernel.can_settle(unknown)


def test_feedback_starts_from_every_ordinary_number_of_the_format() -> None:
    """All bf16 patterns but the rare, in rows of numbers of about one size, with an update of about a step."""
    patterns = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    size = np.abs(as_float64(patterns, "BF16"))
    ordinary = patterns[(size >= 2.0**-110) & (size < 2.0**126)]
    order = np.argsort(np.abs(as_float64(ordinary, "BF16")), kind="stable")
    stored = np.ascontiguousarray(ordinary[order][: len(order) // 64 * 64].reshape(-1, 64))
    rng = np.random.default_rng(3)
    a = rng.standard_normal((3, 64))
    b = rng.standard_normal((len(stored), 3)) * np.abs(as_float64(stored, "BF16")).max(axis=1, keepdims=True) * 2.0**-8
    merged, plain = both_panels(stored, b, a, faithful(a))
    assert np.array_equal(merged, plain)


@pytest.mark.parametrize("half", [2.0**-8, -(2.0**-8)])
def test_a_tie_goes_to_the_even_pattern_with_feedback_too(half: float) -> None:
    """Half a step from every number of one size, in both signs, and nothing to make up for."""
    size = np.arange(0x3F80, 0x4000, dtype=np.uint16)
    stored, a, b = np.stack([size, size | 0x8000]), np.ones((1, len(size))), np.full((2, 1), half)
    rounder = Feedback(LowRankHessian(np.zeros((len(size), 1))), basis_IM=row_space(a), inside_of_state=np.ones((1, 1)))
    merged, _ = panel(stored, b, a, rounder)
    plain, _ = settle_tile(as_float64(stored, "BF16"), b @ a, "BF16", kept_TI=stored, rounder=rounder)
    assert np.array_equal(merged, plain)
    assert not (merged & 1)[:, 1:].any()  # the first is a power of two, below which the steps are smaller


def rare_panel(pattern: int, delta: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, Feedback]:
    """Ordinary rows but for one number, with an update of one row and column."""
    stored, a, b = np.full((4, 40), 0x3F80, np.uint16), np.zeros((1, 40)), np.zeros((4, 1))
    stored[2, 35], a[0, 35], b[2, 0] = pattern, 1.0, delta
    return stored, b, a, faithful(a)


RARE: list[tuple[int, float]] = [
    (0x7F80, 0.0), (0xFFC0, 0.0), (0x3F80, 1e39), (0x7F7F, 3e36), (0x7F7F, 0.0), (0xFF7F, 0.0), (0x0001, 0.0),
    (0x8001, 0.0), (0x0000, 1e-40), (0, -1e-45), (0, np.nan), (0x0080, -1e-41),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "delta"), RARE)
def test_what_is_rare_is_handed_back_with_feedback_too(pattern: int, delta: float) -> None:
    """Infinity, NaN, overflow, subnormal results, and the largest number, which has no outer neighbour."""
    stored, b, a, rounder = rare_panel(pattern, delta)
    assert panel(stored, b, a, rounder)[1] is None


def test_what_is_just_not_rare_is_rounded_to_the_same_bytes() -> None:
    """The least normal number and the last one that has an outer neighbour, in both signs, a little moved."""
    for pattern, delta in ((0x0080, 1e-41), (0x8080, -1e-41), (0x7F7E, 0.0), (0x7F7E, -1e35), (0xFF7E, 0.0), (0, 0.0)):
        merged, plain = both_panels(*rare_panel(pattern, delta))
        assert np.array_equal(merged, plain), hex(pattern)


def test_a_number_that_free_feedback_would_make_infinite_becomes_the_largest() -> None:
    """One column's error can only be made up for by many steps of the last."""
    stored, a = np.full((4, 40), 0x7F00, np.uint16), np.zeros((1, 40))
    stored[:, 39], a[0, 0], a[0, 39] = 0x7F7E, 64.0, 1.0
    b = np.full((4, 1), 0.4 * 2.0**120 / 64)  # 2¹²⁰ is a step
    rounder = Feedback(LowRankHessian(1e3 * row_space(a)), basis_IM=row_space(a), clamp=False)
    plain, sums = settle_tile(as_float64(stored, "BF16"), b @ a, "BF16", kept_TI=stored, rounder=rounder)
    assert plain[:, 39].tolist() == [0x7F7F] * 4
    assert np.isfinite(sums.error_error)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "faithful"])
@pytest.mark.parametrize("tile", [64, 1 << 16])
def test_units_write_the_same_bytes_compiled_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tile: int, rounding: str
) -> None:
    """Every kind of update, most of which only the plain way knows; so it is for stochastic rounding as a whole."""
    monkeypatch.setattr(work, "TILE_ELEMENTS", tile)
    monkeypatch.setattr(work._Fast, "PANEL_ROWS", 7)
    base, adapters, binding = everything(tmp_path)
    seen = watched(monkeypatch)
    _, slow = carry_out(base, adapters, binding, tmp_path / "plain", rounding=rounding)
    assert not seen
    _, fast = carry_out(base, adapters, binding, tmp_path / "fast", rounding=rounding, compiled=True)
    assert set(seen) == {"nearest": {"settle_bf16"}, "stochastic": set(), "faithful": {"settle_panel"}}[rounding]
    assert file_bytes(tmp_path / "plain") == file_bytes(tmp_path / "fast")
    for name, sums in fast.items():
        assert_same_sums(sums, slow[name])


@pytest.mark.parametrize("rounding", ["nearest", "faithful"])
def test_a_rare_number_in_a_compiled_tensor_is_rounded_the_plain_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounding: str
) -> None:
    """Subnormal numbers in one row: its panel is done anew, and the bytes and sums are those of the plain way."""
    monkeypatch.setattr(work._Fast, "PANEL_ROWS", 8)
    monkeypatch.setattr(work._Fast, "ELEMENTS", 8 * 40)
    w, a, b = numbers(30, 40), numbers(3, 40, seed=1, dtype="F32"), numbers(30, 3, seed=2, dtype="F32", scale=1e-3)
    w[13] = 1e-39
    b[13] *= 1e-36
    base, adapter = write_model(tmp_path / "base", {"w": w}), write_tensors(tmp_path / "adapter", {"a": a, "b": b})
    binding = Binding(updates=(low("w"),))
    _, slow = carry_out(base, [adapter], binding, tmp_path / "plain", rounding=rounding)
    handed: list[bool] = []
    for name in ("settle_bf16", "settle_panel"):
        real = getattr(work, name)

        def noted(*args: Any, real: Any = real) -> Any:
            found = real(*args)
            handed.append(found is None)
            return found

        monkeypatch.setattr(work, name, noted)
    _, fast = carry_out(base, [adapter], binding, tmp_path / "fast", rounding=rounding, compiled=True)
    assert sorted(handed) == [False, False, False, True]
    assert file_bytes(tmp_path / "plain") == file_bytes(tmp_path / "fast")
    assert_same_sums(fast["w"], slow["w"])


def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the compiled functions that are called from now on."""
    seen: list[str] = []
    for name in ("settle_bf16", "settle_panel"):
        real = getattr(work, name)
        monkeypatch.setattr(work, name, lambda *args, real=real, name=name: seen.append(name) or real(*args))
    return seen


@pytest.mark.parametrize(("rounding", "function"), [("nearest", "settle_bf16"), ("auto", "settle_panel")])
def test_a_large_merge_is_compiled_and_a_small_one_is_not(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch, rounding: str, function: str
) -> None:
    """To load the compiler takes longer than a small merge; the bytes are the same."""
    monkeypatch.setattr(units, "UNIT_BYTES", 40_000)
    seen = watched(monkeypatch)
    base = str(bench.bases["BF16", "single"])
    small = merge(plan_merge(bench.runs["plain"], tmp_path / "small", base=base, rounding=rounding))
    assert not seen
    monkeypatch.setattr(write, "COMPILE_FROM_BYTES", 1)
    large = merge(plan_merge(bench.runs["plain"], tmp_path / "large", base=base, rounding=rounding))
    assert set(seen) == {function}
    assert weights_sha256(small.path) == weights_sha256(large.path)


def test_without_the_compiler_a_large_merge_is_done_the_plain_way(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extra is optional."""
    monkeypatch.setattr(write, "COMPILE_FROM_BYTES", 1)
    monkeypatch.setattr(write, "available", lambda: False)
    for name in ("settle_bf16", "settle_panel"):
        monkeypatch.setattr(work, name, lambda *_: pytest.fail("was compiled"))
    merge(plan_merge(bench.runs["plain"], tmp_path / "out", base=str(bench.bases["BF16", "single"])))


@pytest.mark.parametrize("rounding", ["nearest", "faithful"])
def test_a_compiler_that_does_not_fit_is_done_without(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch, rounding: str
) -> None:
    """Numba refuses to load beside a NumPy that is newer than itself."""
    base = str(bench.bases["BF16", "single"])
    expected = merge(plan_merge(bench.runs["plain"], tmp_path / "a", base=base, rounding=rounding))
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr(write, "COMPILE_FROM_BYTES", 1)
    monkeypatch.setattr(write, "available", lambda: True)
    kernel._compile.cache_clear()
    try:
        found = merge(plan_merge(bench.runs["plain"], tmp_path / "b", base=base, rounding=rounding))
    finally:
        kernel._compile.cache_clear()
    assert found.receipts == expected.receipts
