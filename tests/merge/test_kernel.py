"""The compiled arithmetic against the plain one: the same bytes, and whatever is rare handed back."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from tests.merge.conftest import Bench
from tests.merge.handmade import carry_out, file_bytes
from tests.merge.test_kinds import everything
from tunesmith.checkpoint import as_float64, weights_sha256
from tunesmith.merge import kernel, merge, plan_merge, units, work, write
from tunesmith.merge.tiles import settle_tile

pytest.importorskip("numba", reason="the extra 'fast' is not installed")


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


@pytest.mark.parametrize("tile", [64, 1 << 16])
def test_units_write_the_same_bytes_compiled_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    """Every kind of update, most of which only the plain way knows."""
    monkeypatch.setattr(work, "TILE_ELEMENTS", tile)
    base, adapters, binding = everything(tmp_path)
    seen = []
    real = work.settle_bf16
    monkeypatch.setattr(work, "settle_bf16", lambda *args: seen.append(1) or real(*args))
    carry_out(base, adapters, binding, tmp_path / "plain")
    assert not seen
    carry_out(base, adapters, binding, tmp_path / "fast", compiled=True)
    assert seen
    assert file_bytes(tmp_path / "plain") == file_bytes(tmp_path / "fast")


def test_a_large_merge_is_compiled_and_a_small_one_is_not(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To load the compiler takes longer than a small merge; the bytes are the same."""
    monkeypatch.setattr(units, "UNIT_BYTES", 40_000)
    seen = []
    real = work.settle_bf16
    monkeypatch.setattr(work, "settle_bf16", lambda *args: seen.append(1) or real(*args))
    base = str(bench.bases["BF16", "single"])
    small = merge(plan_merge(bench.runs["plain"], tmp_path / "small", base=base))
    assert not seen
    monkeypatch.setattr(write, "COMPILE_FROM_BYTES", 1)
    large = merge(plan_merge(bench.runs["plain"], tmp_path / "large", base=base))
    assert seen
    assert weights_sha256(small.path) == weights_sha256(large.path)


def test_without_the_compiler_a_large_merge_is_done_the_plain_way(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extra is optional."""
    monkeypatch.setattr(write, "COMPILE_FROM_BYTES", 1)
    monkeypatch.setattr(write, "available", lambda: False)
    monkeypatch.setattr(work, "settle_bf16", lambda *_: pytest.fail("was compiled"))
    merge(plan_merge(bench.runs["plain"], tmp_path / "out", base=str(bench.bases["BF16", "single"])))


def test_a_compiler_that_does_not_fit_is_done_without(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numba refuses to load beside a NumPy that is newer than itself."""
    base = str(bench.bases["BF16", "single"])
    expected = merge(plan_merge(bench.runs["plain"], tmp_path / "a", base=base))
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr(write, "COMPILE_FROM_BYTES", 1)
    monkeypatch.setattr(write, "available", lambda: True)
    kernel._compiled.cache_clear()
    try:
        found = merge(plan_merge(bench.runs["plain"], tmp_path / "b", base=base))
    finally:
        kernel._compiled.cache_clear()
    assert found.receipts == expected.receipts
