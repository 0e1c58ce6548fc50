"""The bounds of every block type against llama.cpp's own quantizer, and against numbers that it would not have written.

``ggml_quantize_chunk``, which llama-quantize calls for every tensor, is one of the symbols of xllamacpp's library.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("gguf", reason="needs gguf (the extra gguf)")
pytest.importorskip("xllamacpp", reason="needs xllamacpp (the extra gguf)")

import gguf
import xllamacpp

from tests.verify.gguf.drafts import build_model, draft_of
from tests.verify.gguf.test_gguf_proof import told
from tunesmith.verify.gguf import verify_gguf
from tunesmith.verify.gguf.bounds import known, outside

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.float64]
KINDS = (
    "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS",
)  # fmt: skip
WEIGHABLE = tuple(kind for kind in KINDS if kind not in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"))
STEP_AT = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}  # where a block's float16 step is; first in all others
ROWS, COLUMNS = 256, 512


@pytest.fixture(scope="module")
def library() -> Any:
    """llama.cpp's, as xllamacpp has it."""
    path = next(Path(xllamacpp.__file__).parent.glob("*.so"), None)
    if path is None:
        pytest.skip("no library whose symbols can be called")
    found = ctypes.CDLL(str(path))
    if not hasattr(found, "ggml_quantize_chunk"):
        pytest.skip("its symbols are hidden")
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    place, number = ctypes.c_void_p, ctypes.c_int64
    found.ggml_quantize_chunk.argtypes = [ctypes.c_int, place, place, number, number, number, place]
    return found


def quantized(library: Any, exact: Numbers, kind: str, *, importance: float = 0.0) -> Bytes:
    """Rows by llama.cpp, with an importance matrix as wide as asked."""
    of = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[of]
    x = np.ascontiguousarray(exact, dtype=np.float32)
    out = np.zeros((x.shape[0], x.shape[1] // block * size), dtype=np.uint8)
    weights = np.exp(np.random.default_rng(3).normal(size=x.shape[1]) * importance).astype(np.float32)
    place = weights.ctypes.data if importance else None
    written = library.ggml_quantize_chunk(int(of), x.ctypes.data, out.ctypes.data, 0, x.shape[0], x.shape[1], place)
    assert written == out.nbytes
    return out


def unexplained(raw: Bytes, exact: Numbers, kind: str, *, weighted: bool = False) -> npt.NDArray[np.bool_]:
    """Which numbers the bounds do not explain."""
    values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]).astype(np.float64)
    bad = outside(kind, raw, values, exact, weighted=weighted)
    assert bad is not None
    return np.asarray(bad, dtype=bool)


def of_all_kinds() -> dict[str, Numbers]:
    """Numbers as models have them, and as few have."""
    rng = np.random.default_rng(11)
    shape = (ROWS, COLUMNS)
    normal = rng.normal(size=shape)
    found = {
        "normal": normal * 0.02,
        "heavy": rng.standard_t(2, size=shape) * 0.02,
        "sparse": normal * (rng.random(shape) < 0.03),
        "positive": rng.random(shape) + 0.5,
        "negative": -rng.random(shape) - 0.5,
        "tiny": normal * 1e-6,
        "uneven": normal * np.repeat(np.exp(rng.normal(size=(ROWS, COLUMNS // 16)) * 2), 16, axis=1),
        "signs": np.sign(normal) * 0.5,
        "nothing": np.zeros(shape),
    }
    return {name: values.astype(np.float32).astype(np.float64) for name, values in found.items()}


NUMBERS = of_all_kinds()


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_llama_cpp_writes_is_explained(library: Any, kind: str, numbers: str) -> None:
    """Every number of every type, of whatever numbers."""
    exact = NUMBERS[numbers]
    assert not unexplained(quantized(library, exact, kind), exact, kind).any()


@pytest.mark.parametrize("numbers", ["normal", "heavy", "sparse", "uneven"])
@pytest.mark.parametrize("kind", WEIGHABLE)
def test_an_importance_matrix_is_explained(library: Any, kind: str, numbers: str) -> None:
    """Codes are the nearest whatever it weighed; beyond the outer ones it may leave out anything."""
    exact = NUMBERS[numbers]
    for importance in (1.0, 3.0):
        raw = quantized(library, exact, kind, importance=importance)
        assert not unexplained(raw, exact, kind, weighted=True).any()


def rows_turned(raw: Bytes, _: str) -> Bytes:
    """Each row in the place of the one before."""
    return np.roll(raw, 1, axis=0)


def blocks_zeroed(raw: Bytes, _: str) -> Bytes:
    """Blocks of nothing."""
    return np.zeros_like(raw)


def steps_doubled(raw: Bytes, kind: str) -> Bytes:
    """Each block's step twice as large."""
    broken = _blocks(raw, kind)
    at = STEP_AT.get(kind, 0)
    twice = broken[:, at : at + 2].copy().view(np.float16) * np.float16(2)
    broken[:, at : at + 2] = twice.view(np.uint8)
    return broken.reshape(raw.shape)


def _blocks(raw: Bytes, kind: str) -> Bytes:
    return raw.reshape(-1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]).copy()


@pytest.mark.parametrize("breaking", [rows_turned, blocks_zeroed, steps_doubled])
@pytest.mark.parametrize("kind", KINDS)
def test_every_broken_block_is_noticed(library: Any, kind: str, breaking: Callable[[Bytes, str], Bytes]) -> None:
    """Not one block of thousands passes, with an importance matrix or without."""
    exact = NUMBERS["normal"]
    for weighted in (False, True) if kind in WEIGHABLE else (False,):
        raw = quantized(library, exact, kind, importance=float(weighted))
        bad = unexplained(breaking(raw, kind), exact, kind, weighted=weighted)
        size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
        assert bad.reshape(-1, size).any(axis=1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_that_moved_inwards_is_noticed(library: Any, kind: str) -> None:
    """The model's numbers six tenths of the way to the next level: out of reach on that side, whatever the level."""
    exact = NUMBERS["normal"]
    raw = quantized(library, exact, kind)
    values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]).astype(np.float64)
    size = 16 if kind in ("Q2_K", "Q3_K", "Q6_K") else 32
    parts = values.reshape(-1, size)
    middle = (parts.max(axis=1, keepdims=True) + parts.min(axis=1, keepdims=True)) / 2
    levels = np.sort(parts, axis=1)
    gaps = np.diff(levels, axis=1)
    widest = np.where(gaps > 1e-12, gaps, 0).max(axis=1, keepdims=True)
    moved = (parts + np.where(parts > middle, -0.6, 0.6) * widest).reshape(values.shape)
    assert unexplained(raw, moved, kind).mean() > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_too_coarse_for_its_numbers_is_noticed(library: Any, kind: str) -> None:
    """Each number lies on a level, and all are the smallest: a step that they do not warrant would hide anything."""
    raw = quantized(library, NUMBERS["normal"], kind)
    values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]).astype(np.float64)
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    blocks = values.reshape(-1, size)
    near = np.abs(blocks) <= np.abs(blocks).max(axis=1, keepdims=True) / 12
    small = np.where(near, blocks, 0).reshape(values.shape)
    bad = unexplained(raw, small, kind).reshape(blocks.shape)
    assert bad[near].mean() > 0.9


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_what_an_importance_matrix_did_to_the_first_generation_is_not_passed_over(kind: str) -> None:
    """Its codes are those of another step than the stored one, so that nothing can be said."""
    assert known(kind)
    assert not known(kind, weighted=True)
    nothing = np.zeros((1, 32))
    assert outside(kind, np.zeros((1, 24), dtype=np.uint8), nothing, nothing, weighted=True) is None


@pytest.mark.parametrize("kind", ["Q3_K", "Q4_K", "Q6_K", "IQ4_XS"])
def test_a_whole_file_of_k_types_is_proved(tmp_path: Path, library: Any, kind: str) -> None:
    """Through the proof's own reader; where an importance matrix took part the file says so, and must."""
    model = build_model(tmp_path / "model", "llama", hidden_size=256, intermediate_size=256, initializer_range=0.02)
    draft, path = draft_of(model, "llama"), tmp_path / "model.gguf"
    for importance, field, good in (
        (0.0, {}, True),
        (3.0, {"quantize.imatrix.entries_count": 14}, True),
        (3.0, {}, False),
    ):
        draft.fields.pop("quantize.imatrix.entries_count", None)
        draft.fields |= field
        draft.write(path, own=partial(quantized, library, kind=kind, importance=importance), kind=kind)
        verdict = verify_gguf(model, path, levels=("structure", "weights"))
        assert {one.type for one in verdict.tensors} == {"F32", kind}
        assert (not told(verdict)) == good
