"""The base as a quantized training saw it: bitsandbytes' own numbers, and the tensors that it really replaces."""

from __future__ import annotations

import importlib.util
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from tests.tiny_models import TinyRun, build_adapter, build_base, peft_alone
from tunesmith.checkpoint import Array, BaseView, Checkpoint
from tunesmith.checkpoint.views import NF4_CODE, VIEW_KINDS, double_quantized
from tunesmith.errors import CheckpointError
from tunesmith.models.quiet import quiet_loading

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)

NAME = "model.layers.0.self_attn.q_proj.weight"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Whole blocks, blocks across rows, a last block that is not full, one row, one column, more than one tile.
SHAPES = [(128, 64), (7, 96), (33, 31), (1, 5), (64, 1), (3, 64), (257, 100), (300, 512)]


def checkpoint_of(directory: Path, weight: torch.Tensor, **config: Any) -> Checkpoint:
    """A model directory with one Linear layer."""
    save_file({NAME: weight.contiguous()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return Checkpoint(directory)


def weight_of(shape: tuple[int, int], dtype: str, *, seed: int = 0) -> torch.Tensor:
    """Numbers of a model's size, with blocks of zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.05 * torch.randn(shape, generator=generator)
    if shape[0] > 100:
        weight[2:6] = 0
    return weight.to(DTYPES[dtype])


def golden_weight() -> torch.Tensor:
    """The bf16 numbers that bitsandbytes made the golden vectors from; the second block of 64 is zeros."""
    bits = (np.arange(280, dtype=np.uint64) * np.uint64(2654435761)) >> np.uint64(9)
    weight = ((bits.astype(np.uint32) % np.uint32(2001)).astype(np.float32) - 1000) / np.float32(8192)
    weight[64:128] = 0
    return torch.tensor(weight.reshape(7, 40)).bfloat16()


# Made by bitsandbytes 0.50.2: the bf16 patterns of dequantize_4bit, in its generic arithmetic for the absmax of
# nf4-double, and the int8 of int8_vectorwise_quant.
GOLDEN_NF4 = (
    "fabdb53db53d8d3d5c3df63ca13c0000b9bc0ebd83bd83bdaebdfabdfa3db53db53d8d3d293df63c1f3c36bcb9bc45bd83bdaebdaebdfabd"
    "fa3db53d8d3d5c3d293da13c000036bc0ebd45bd83bdaebdaebdfabdfa3db53d8d3d5c3df63ca13c0000b9bc0ebd45bd83bdaebdfabdfa3d"
    "b53db53d8d3d293df63c1f3c36bcb9bc00000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "0000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "0000000000000000000000000000000000000000000000000000000000000000293da13c000036bc0ebd45bd83bdaebdfabdfa3db53db53d"
    "8d3d5c3df63c1f3c0000b9bc0ebd83bdaebdaebdfabdfa3db53db53d8d3d293df63c1f3c36bcb9bc45bd83bdaebdaebdfabdfa3db53d8d3d"
    "5c3d293da13c000036bc0ebd45bd83bdaebdfabdfa3db53db53d8d3d5c3df63ca13c0000b9bc0ebd83bd83bdaebdfabdf83db33db33d8c3d"
    "283df43c1e3c35bcb7bc44bd82bdadbdadbdf8bdf83db33d8c3d5b3d283da03c000035bc0dbd44bd82bdadbdf8bdf8bdf83db33d8c3d5b3d"
    "f43ca03c0000b7bc0dbd44bd82bdadbdf8bdf83db33db33d8c3d283df43c1e3c35bcb7bc44bd82bdadbdadbdf8bdf83db33d8c3d5b3d283d"
    "a03c1e3c35bc0dbd42bd81bdabbdf6bdf6bdf63db23d8a3d593d263d9e3c0000b6bc0cbd42bd81bdabbdf6bdf63db23db23d8a3d593df23c"
)
GOLDEN_NF4_DOUBLE = (
    "fbbdb53db53d8d3d5d3df73ca13c0000b9bc0fbd84bd84bdafbdfbbdfb3db53db53d8d3d2a3df73c203c37bcb9bc46bd84bdafbdafbdfbbd"
    "fb3db53d8d3d5d3d2a3da13c000037bc0fbd46bd84bdafbdafbdfbbdfb3db53d8d3d5d3df73ca13c0000b9bc0fbd46bd84bdafbdfbbdfb3d"
    "b53db53d8d3d2a3df73c203c37bcb9bc00000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "0000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "00000000000000000000000000000000000000000000000000000000000000002a3da13c000037bc0fbd46bd84bdafbdfbbdfb3db53db53d"
    "8d3d5d3df73c203c0000b9bc0fbd84bdafbdafbdfbbdfb3db53db53d8d3d2a3df73c203c37bcb9bc46bd84bdafbdafbdfbbdfb3db53d8d3d"
    "5d3d2a3da13c000037bc0fbd46bd84bdafbdfbbdfb3db53db53d8d3d5d3df73ca13c0000b9bc0fbd84bd84bdafbdfbbdf83db33db33d8c3d"
    "283df43c1e3c35bcb7bc44bd82bdadbdadbdf8bdf83db33d8c3d5b3d283da03c000035bc0dbd44bd82bdadbdf8bdf8bdf83db33d8c3d5b3d"
    "f43ca03c0000b7bc0dbd44bd82bdadbdf8bdf83db33db33d8c3d283df43c1e3c35bcb7bc44bd82bdadbdadbdf8bdf83db33d8c3d5b3d283d"
    "a03c1e3c35bc0dbd42bd81bdabbdf5bdf5bdf53db13d8a3d583d263d9e3c0000b5bc0cbd42bd81bdabbdf5bdf53db13db13d8a3d583df13c"
)
GOLDEN_INT8 = (
    "816d5a47352210fdebd8c6b3a08e796754422f1d0af7e5d2c0ad9a8874614e3c291704f2dfcdbaa894816f5c49372411feecd9c6b4a18e7c"
    "695644311e0bf9e6000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "00000000000000000000000000000000271401eedbc9b6a3907f6c594634210efbe9d6c3b09d8b796653412e1b08f6e3d1beac998672604d"
    "3a281503f0ddcbb8a6937f6c594734220ffdead8c5b3a08d796754412f1c0af7e4d1bfac9a8774614f3c291704f1deccb9a693816f5c4936"
    "2411feebd9c6b3a18e7b685643311e0bf8e5d3c0ad9a877764513e2b1805f2e0cdbaa79481715e4b382512ffeddac7b4a18e7e6b5845321f"
)
GOLDEN_INT8_ABSMAX = [0.1220703125, 0.12109375, 0.0, 0.12060546875, 0.1220703125, 0.12109375, 0.1201171875]


def bf16_of(pattern: str) -> np.ndarray:
    """Hexadecimal bf16 patterns as float64."""
    patterns = np.frombuffer(bytes.fromhex(pattern), "<u2").astype(np.uint32) << 16
    return patterns.view(np.float32).astype(np.float64).reshape(7, 40)


@pytest.mark.parametrize(("kind", "golden"), [("nf4", GOLDEN_NF4), ("nf4-double", GOLDEN_NF4_DOUBLE)])
def test_nf4_gives_the_numbers_that_bitsandbytes_gave(tmp_path: Path, kind: Any, golden: str) -> None:
    """Where bitsandbytes is not installed, its numbers still hold the view."""
    view = BaseView(kind).rows(checkpoint_of(tmp_path, golden_weight()), NAME)
    assert np.array_equal(view, bf16_of(golden))


def test_int8_gives_the_numbers_that_bitsandbytes_gave(tmp_path: Path) -> None:
    """Likewise; the product is float32, as int8_vectorwise_dequant has it."""
    view = BaseView("int8").rows(checkpoint_of(tmp_path, golden_weight()), NAME)
    steps = np.frombuffer(bytes.fromhex(GOLDEN_INT8), np.int8).astype(np.float32).reshape(7, 40)
    absmax = np.array(GOLDEN_INT8_ABSMAX, np.float32)[:, None]
    assert np.array_equal(view, (steps * absmax * np.float32(1 / 127)).astype(np.float64))


def dequantized_4bit(weight: torch.Tensor, absmax: torch.Tensor | None = None) -> np.ndarray:
    """What ``dequantize_4bit`` makes of ``quantize_4bit``, in float64; with another absmax where one is given.

    As one row: its AVX-512 kernel takes wrong absmax where a row is a multiple of 16 but not of 64, which neither its
    generic code nor CUDA does; and an odd row goes through torch.compile.
    """
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight, quant_type="nf4")
    state.absmax = state.absmax if absmax is None else absmax
    state.shape = (1, weight.numel() + weight.numel() % 2)
    flat = functional.dequantize_4bit(packed, state).reshape(-1)[: weight.numel()]
    return flat.reshape(weight.shape).double().numpy()


def double_absmax(weight: torch.Tensor, offset: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The absmax before and after double quantization, by bitsandbytes' generic search.

    Its processor kernel for float32 looks codes up in a table of 65,536 steps; numbers of a dtype that the kernel
    does not know go through the search that CUDA does too.
    """
    from bitsandbytes import functional

    absmax = functional.quantize_4bit(weight, quant_type="nf4")[1].absmax
    offset = absmax.mean() if offset is None else offset
    code = functional.create_dynamic_map()
    codes, largest = torch.ops.bitsandbytes.quantize_blockwise.default((absmax - offset).double(), code, 256)
    return absmax, functional.dequantize_blockwise(codes, absmax=largest, code=code, blocksize=256) + offset


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_is_bitsandbytes_to_the_bit(tmp_path: Path, dtype: str, shape: tuple[int, int]) -> None:
    """Every dtype, full and broken blocks, blocks of zeros."""
    weight = weight_of(shape, dtype)
    view = BaseView("nf4").rows(checkpoint_of(tmp_path, weight), NAME)
    assert np.array_equal(view, dequantized_4bit(weight))


def thresholds_under_a_glass() -> np.ndarray:
    """Blocks of fp32 numbers that fall on the thresholds or next to them, each block with an absmax of its own."""
    thresholds = (NF4_CODE[:-1] + NF4_CODE[1:]) / np.float32(2)
    absmax = np.linspace(0.5, 1, 400, dtype=np.float32)[::-1, None]  # the first is 1: its numbers lie on the thresholds
    at = (absmax * np.tile(thresholds, 4)).view(np.int32)
    return np.concatenate(
        (absmax, absmax, absmax, absmax, (at + np.repeat(np.int32([-1, 0, 1, 2]), 15)).view(np.float32)), axis=1
    )


@needs_bitsandbytes
def test_a_number_on_a_threshold_takes_bitsandbytes_code(tmp_path: Path) -> None:
    """The lower code, and by the product with a rounded reciprocal: a quotient would cross some thresholds here."""
    blocks = thresholds_under_a_glass()
    view = BaseView("nf4").rows(checkpoint_of(tmp_path, torch.tensor(blocks)), NAME)
    assert np.array_equal(view, dequantized_4bit(torch.tensor(blocks)))
    thresholds = (NF4_CODE[:-1] + NF4_CODE[1:]) / np.float32(2)
    quotients = np.searchsorted(thresholds, blocks / blocks[:, :1])
    assert not np.array_equal(view, (NF4_CODE[quotients] * blocks[:, :1]).astype(np.float64))


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_bitsandbytes_to_the_bit(tmp_path: Path, dtype: str, shape: tuple[int, int]) -> None:
    """Rows of zeros and numbers halfway between two steps among them."""
    from bitsandbytes import functional

    weight = weight_of(shape, dtype)
    steps, absmax, _ = functional.int8_vectorwise_quant(weight.half())
    expected = functional.int8_vectorwise_dequant(steps, absmax).double().numpy()
    assert np.array_equal(BaseView("int8").rows(checkpoint_of(tmp_path, weight), NAME), expected)


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (700, 1024)])
def test_double_quantization_is_bitsandbytes_to_the_bit(tmp_path: Path, dtype: str, shape: tuple[int, int]) -> None:
    """With the same mean the absmax is the same, and with the same absmax the view.

    torch sums the mean in float32 in an order of its own; rounded once, it may differ in the last bit.
    """
    weight = weight_of(shape, dtype)
    absmax, scales = double_absmax(weight)
    offset = absmax.mean()
    assert np.array_equal(double_quantized(absmax.numpy(), offset=offset.numpy()), scales.numpy())
    exact = absmax.double().mean().float()
    assert abs(exact - offset) <= 4 * np.spacing(offset.numpy())
    view = BaseView("nf4-double").rows(checkpoint_of(tmp_path, weight), NAME)
    assert np.array_equal(view, dequantized_4bit(weight, double_absmax(weight, exact)[1]))


@needs_bitsandbytes
def test_the_processors_table_is_all_that_differs_from_cuda_in_double_quantization() -> None:
    """The docstring's claim about bitsandbytes' own two ways: with the table in the search's place, they agree."""
    from bitsandbytes import functional

    weight = weight_of((700, 1024), "BF16")
    absmax, _ = double_absmax(weight)
    offset = absmax.mean()
    by_kernel, state = functional.quantize_blockwise(absmax - offset, blocksize=256)
    by_search, _ = torch.ops.bitsandbytes.quantize_blockwise.default((absmax - offset).double(), state.code, 256)
    assert 0 < int((by_kernel != by_search).sum()) < 0.05 * len(absmax)
    code = state.code.numpy()
    grid = (np.arange(65536, dtype=np.float32) / np.float32(65535)) * 2 - 1
    table = np.searchsorted((code[:-1] + code[1:]) / 2, grid)
    blocks = np.zeros(-(-len(absmax) // 256) * 256, np.float32)
    blocks[: len(absmax)] = (absmax - offset).numpy()
    normed = blocks.reshape(-1, 256) * (np.float32(1) / np.abs(blocks.reshape(-1, 256)).max(axis=1, keepdims=True))
    step = ((normed + 1) * np.float32(0.5 * 65535) + np.float32(0.5)).astype(np.int64)
    differing = table[step].reshape(-1)[: len(absmax)] != by_kernel.numpy()
    assert int(differing.sum()) <= 2  # grid numbers on a threshold


def test_a_bf16_base_has_one_nf4_view_whatever_the_reciprocal() -> None:
    """CUDA's fast reciprocal may be two ulps off.  No quotient of two bf16 numbers lies that near a threshold.

    All significands and all exponents at which a quotient can reach the thresholds: the smallest is 0.0398.
    """
    thresholds = (NF4_CODE[:-1] + NF4_CODE[1:]) / np.float32(2)
    absmax = np.arange(128, 256).astype(np.float32)
    exact = np.float32(1) / absmax
    for exponent, ulps in itertools.product(range(7), (-2, -1, 1, 2)):
        values = absmax[:, None] * np.float32(2.0**-exponent)
        near = (exact.view(np.int32) + ulps).view(np.float32)
        for sign in (np.float32(1), np.float32(-1)):
            codes, others = (np.searchsorted(thresholds, sign * values * inverse) for inverse in (exact, near))
            assert np.array_equal(codes[values <= absmax], others[values <= absmax])


@pytest.mark.parametrize("kind", VIEW_KINDS)
@pytest.mark.parametrize("columns", [1, 31, 64, 96, 130])
def test_any_cut_into_tiles_gives_the_same_numbers(tmp_path: Path, kind: Any, columns: int) -> None:
    """A block of 64 may lie across the rows of two tiles."""
    base = checkpoint_of(tmp_path, weight_of((131, columns), "BF16"))
    whole = BaseView(kind).rows(base, NAME)
    assert whole.shape == (131, columns)
    for height in (1, 7, 64, 130):
        tiles = [BaseView(kind).rows(base, NAME, start, start + height) for start in range(0, 131, height)]
        assert np.array_equal(np.concatenate(tiles), whole)
    assert BaseView(kind).rows(base, NAME, 131).shape == (0, columns)


class CountingCheckpoint(Checkpoint):
    """A checkpoint that counts the rows that are read of it."""

    rows_read = 0

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Read as ever."""
        rows = super().read(name, start, stop)
        self.rows_read += len(rows)
        return rows


def test_double_quantization_reads_a_tensor_once_more_however_it_is_cut(tmp_path: Path) -> None:
    """The mean needs all of a tensor; without a memory, a merge in tiles would read it all for every tile."""
    checkpoint_of(tmp_path, weight_of((512, 64), "BF16"))
    base = CountingCheckpoint(tmp_path)
    for start in range(0, 512, 8):
        BaseView("nf4-double").rows(base, NAME, start, start + 8)
    assert base.rows_read == 2 * 512


def test_workers_on_many_tensors_see_what_one_sees(tmp_path: Path) -> None:
    """More tensors than are remembered, from several threads at once."""
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(20)]
    weights = {name: weight_of((96, 96), "BF16", seed=seed) for seed, name in enumerate(names)}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    view = BaseView("nf4-double")
    alone = {name: view.rows(Checkpoint(tmp_path), name) for name in names}
    shared = Checkpoint(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda name: view.rows(shared, name), names * 5))
    assert all(np.array_equal(rows, alone[name]) for rows, name in zip(together, names * 5, strict=True))


@pytest.mark.parametrize("kind", VIEW_KINDS)
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("training", DTYPES)
def test_the_training_dtype_is_the_one_that_the_base_was_loaded_in(
    tmp_path: Path, kind: Any, stored: str, training: str
) -> None:
    """A base in fp32 that was trained in bf16 was rounded before it was quantized."""
    weight = weight_of((40, 96), stored)
    for name in ("stored", "loaded"):
        (tmp_path / name).mkdir()
    view = BaseView(kind, dtype=training).rows(checkpoint_of(tmp_path / "stored", weight), NAME)
    loaded = checkpoint_of(tmp_path / "loaded", weight.to(DTYPES[training]))
    assert np.array_equal(view, BaseView(kind).rows(loaded, NAME))


def test_nf4_keeps_16_numbers_a_block_on_the_training_grid(tmp_path: Path) -> None:
    """The closed form, slowly: the nearest code in float64, times absmax, rounded to float32 and then to bf16."""
    weight = weight_of((24, 64), "BF16")
    view = BaseView("nf4").rows(checkpoint_of(tmp_path, weight), NAME)
    for row, seen in zip(weight.double().numpy(), view, strict=True):
        absmax = np.abs(row).max()
        nearest = NF4_CODE[np.abs(row[:, None] / absmax - NF4_CODE.astype(np.float64)).argmin(axis=1)]
        assert np.array_equal(torch.tensor(nearest * np.float32(absmax)).bfloat16().double().numpy(), seen)


def test_fp16_subnormals_and_signed_zeros_are_read_exactly(tmp_path: Path) -> None:
    """fp16 is decoded by hand: here is every finite pattern of it."""
    patterns = np.arange(65536, dtype=np.uint16)
    finite = patterns[(patterns & 0x7C00) != 0x7C00].view(np.float16).reshape(-1, 2)
    rows = np.concatenate((finite, np.full_like(finite, 0)), axis=1)
    view = BaseView("int8").rows(checkpoint_of(tmp_path, torch.tensor(rows)), NAME)
    single = rows.astype(np.float32)
    absmax = np.abs(single).max(axis=1, keepdims=True)
    steps = np.rint(single * (np.float32(127) * (np.float32(1) / np.where(absmax == 0, np.float32(1), absmax))))
    assert np.array_equal(view, (steps * absmax * np.float32(1 / 127)).astype(np.float64))


@pytest.mark.parametrize("kind", VIEW_KINDS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_refused(tmp_path: Path, kind: Any, wrong: float, dtype: str) -> None:
    """A NaN would take the lowest code and become a number."""
    weight = weight_of((7, 96), dtype)
    weight[3, 5] = wrong
    with pytest.raises(CheckpointError, match="cannot be quantized") as caught:
        BaseView(kind).rows(checkpoint_of(tmp_path, weight), NAME)
    assert caught.value.where == NAME


@pytest.mark.parametrize(("kind", "dtype"), [("int8", None), ("nf4", "F16"), ("nf4-double", "F16")])
def test_numbers_too_large_for_fp16_are_refused(tmp_path: Path, kind: Any, dtype: str | None) -> None:
    """LLM.int8() works in fp16; so does a training that loads the base in it."""
    weight = weight_of((7, 96), "BF16")
    weight[3, 5] = 1e5
    with pytest.raises(CheckpointError, match="too large"):
        BaseView(kind, dtype=dtype).rows(checkpoint_of(tmp_path, weight), NAME)


SMALL = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "depth": 1, "num_attention_heads": 2,
    "num_heads": 2, "image_size": 28, "patch_size": 14, "embed_dim": 32, "out_hidden_size": 64, "projection_dim": 64,
    "vision_use_head": False,
}  # fmt: skip


def text_model(kind: str, **changes: Any) -> nn.Module:
    """A random text model of an architecture."""
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, "bos_token_id": None, **changes}))


def vision_model(kind: str, **changes: Any) -> nn.Module:
    """A random vision-language model of an architecture."""
    parts = AutoConfig.for_model(kind)
    config = AutoConfig.for_model(
        kind,
        text_config={**SMALL, "bos_token_id": None, "model_type": parts.text_config.model_type},
        vision_config={**VISION, **changes, "model_type": parts.vision_config.model_type},
    )
    return AutoModelForImageTextToText.from_config(config)


def saved(model: nn.Module, directory: Path) -> Checkpoint:
    """The model on disk, every tensor of it unlike every other."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(directory)
    return Checkpoint(directory)


def replaced_by_bitsandbytes(model: nn.Module, base: Checkpoint) -> set[str]:
    """The tensors on disk whose layers Transformers would replace, found by its own functions and by their bytes."""
    kept = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or [])]
    weights = {
        module.weight.detach().numpy().tobytes()
        for name, module in model.named_modules()
        if type(module) is nn.Linear and should_convert_module(name, kept)
    }
    return {
        name
        for shard in base.shards
        for name, tensor in load_file(base.path / shard).items()
        if tensor.contiguous().numpy().tobytes() in weights
    }


TEXT_MODELS = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "phi3", "gpt_neox", "gptj", "bloom", "opt",
    "mpt", "olmo2", "stablelm", "starcoder2", "gpt_bigcode", "glm4", "granite", "cohere2", "smollm3", "qwen3_5_text",
]  # fmt: skip
VISION_MODELS = [
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "gemma3",
    "llava",
    "paligemma",
    "internvl",
    "mistral3",
    "smolvlm",
]


@pytest.mark.parametrize("kind", [*TEXT_MODELS, *VISION_MODELS])
def test_the_view_applies_to_what_transformers_replaces(tmp_path: Path, kind: str) -> None:
    """Names on disk against the installed Transformers' own choice of layers."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"the installed Transformers has no {kind}")
    model = vision_model(kind) if kind in VISION_MODELS else text_model(kind)
    base = saved(model, tmp_path)
    expected = replaced_by_bitsandbytes(model, base)
    assert expected
    assert {name for name in base.tensors if BaseView("nf4").applies_to(base, name)} == expected


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_and_embeddings_keep_their_numbers(tmp_path: Path, tied: bool) -> None:
    """Tied or not; what the view does not apply to comes back as it is stored."""
    base = saved(text_model("llama", tie_word_embeddings=tied), tmp_path)
    kept = {name for name in base.tensors if not BaseView("nf4").applies_to(base, name)}
    assert {"model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])} <= kept
    assert not any("proj" in name for name in kept)
    for name in kept:
        assert np.array_equal(BaseView("nf4").rows(base, name, 3, 9), base.read_float64(name, 3, 9))


def test_a_classifier_keeps_its_numbers_only_as_the_last_parameter(tmp_path: Path) -> None:
    """Transformers leaves the last one out; a bias after it takes that place, in some versions."""
    config = AutoConfig.for_model("qwen2", **SMALL, num_labels=3)
    model = AutoModelForSequenceClassification.from_config(config)
    base = saved(model, tmp_path / "sequence")
    expected = replaced_by_bitsandbytes(model, base)
    assert {name for name in base.tensors if BaseView("nf4").applies_to(base, name)} == expected
    assert "score.weight" in base.tensors.keys() - expected
    biased = saved(AutoModelForTokenClassification.from_config(config), tmp_path / "token")
    with pytest.raises(CheckpointError) as caught:
        BaseView("nf4").check(biased)
    assert caught.value.details == ("score.weight",)


def test_an_attention_of_torchs_own_is_refused(tmp_path: Path) -> None:
    """Its output layer is of a class that some versions replace and others do not."""
    model = vision_model("gemma3", vision_use_head=True)
    base = saved(model, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        BaseView("nf4").check(base)
    assert [name.rpartition(".head.")[2] for name in caught.value.details] == ["attention.out_proj.weight"]


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        ("gpt2", {}, "Conv1D"),
        ("mixtral", {}, "mixture of experts"),
        ("qwen3_moe", {"num_experts": 4}, "mixture of experts"),
        ("gpt_oss", {"num_local_experts": 4}, "mixture of experts"),
        ("mamba", {}, "it is not known"),
    ],
)
def test_a_model_whose_view_depends_on_versions_is_refused(
    tmp_path: Path, kind: str, changes: dict[str, Any], why: str
) -> None:
    """Refused, with the reason and a way out, rather than guessed."""
    base = saved(text_model(kind, **changes), tmp_path)
    for ask in (
        lambda: BaseView("nf4").check(base),
        lambda: BaseView("nf4").applies_to(base, next(iter(base.tensors))),
        lambda: BaseView("int8").rows(base, next(iter(base.tensors))),
    ):
        with pytest.raises(CheckpointError, match=why) as caught:
            ask()
        assert caught.value.next_step


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "falcon"}, "Linear class of its own"),
        ({"is_encoder_decoder": True}, "encoder with a decoder"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized already"),
        ({"text_config": {"model_type": "gpt2"}}, "Conv1D"),
    ],
)
def test_a_configuration_that_forbids_the_view_is_named(tmp_path: Path, config: dict[str, Any], why: str) -> None:
    """Where names alone look harmless, ``config.json`` decides."""
    with pytest.raises(CheckpointError, match=why):
        BaseView("nf4").check(checkpoint_of(tmp_path, weight_of((64, 64), "BF16"), **config))


def test_a_matrix_of_an_unknown_name_is_refused_by_name(tmp_path: Path) -> None:
    """Nobody knows whether ``my_matrix`` is a Linear layer; a one-dimensional ``my_norm`` cannot be one."""
    tensors = {
        "model.my_matrix.weight": torch.ones(4, 4),
        "model.my_norm.weight": torch.ones(4),
        NAME: torch.ones(4, 4),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "mine"}')
    with pytest.raises(CheckpointError) as caught:
        BaseView("nf4").check(Checkpoint(tmp_path))
    assert caught.value.details == ("model.my_matrix.weight",)


def test_an_unknown_view_is_a_programmers_error() -> None:
    """The command line offers the known ones only."""
    for wrong in ({"kind": "fp4"}, {"kind": "nf4", "dtype": "F64"}):
        with pytest.raises(ValueError, match="no such view"):
            BaseView(**wrong)  # type: ignore[arg-type]


def live_model(base: Path, **settings: Any) -> nn.Module:
    """The base as Transformers loads it with bitsandbytes, computing in float32.

    In training mode, where nothing is dropped out: for inference, some processors repack 4-bit weights to compute in
    bf16.
    """
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, **settings)
    with quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=config)
    return model.train()


def search_instead_of_table(model: nn.Module, base: Checkpoint) -> None:
    """Give every layer the absmax that CUDA's search finds, where this processor's table may find its neighbour."""
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and state.nested:
            weight = torch.tensor(base.read_float64(f"{name}.weight")).float()
            from bitsandbytes import functional

            absmax = functional.quantize_4bit(weight, quant_type="nf4")[1].absmax
            state.absmax, state.state2.absmax = torch.ops.bitsandbytes.quantize_blockwise.default(
                (absmax - state.offset).double(), state.state2.code, 256
            )


def merged_by_hand(base: Path, adapter: Path, view: BaseView | None) -> nn.Module:
    """W + s·B·A in float32, module by module; W as the view shows it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    checkpoint, factors = Checkpoint(base), load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for name, parameter in model.named_parameters():
        if view is not None and view.applies_to(checkpoint, name):
            parameter.data = torch.tensor(view.rows(checkpoint, name)).float()
        a = factors.get(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight")
        if a is not None:
            b = factors[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"]
            parameter.data += config["lora_alpha"] / config["r"] * (b @ a)
    return model


def logits_of(model: nn.Module) -> torch.Tensor:
    """Logits at fixed tokens."""
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 51).reshape(2, 24)).logits


@needs_bitsandbytes
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["nf4", "nf4-double"])
def test_the_view_plus_the_update_is_the_live_4_bit_model(tmp_path: Path, kind: Any, stored: str) -> None:
    """What the training computed, a merge computes; a merge into the base itself computes something else."""
    build_base(tmp_path / "base", hidden_size=128, intermediate_size=192).to(getattr(torch, stored)).save_pretrained(
        tmp_path / "base"
    )
    adapter = build_adapter(tmp_path / "base", tmp_path / "adapter", seed=3)
    base = Checkpoint(tmp_path / "base")
    live = live_model(base.path, load_in_4bit=True, bnb_4bit_use_double_quant=kind == "nf4-double")
    search_instead_of_table(live, base)
    expected = logits_of(peft_alone(live, adapter).train())
    scale = expected.abs().max()
    view = BaseView(kind, dtype="F32")  # what the live model was loaded in
    assert (logits_of(merged_by_hand(base.path, adapter, view)) - expected).abs().max() < 1e-4 * scale
    assert (logits_of(merged_by_hand(base.path, adapter, None)) - expected).abs().max() > 1e-2 * scale


@needs_bitsandbytes
@pytest.mark.parametrize("settings", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_every_weight_of_a_loaded_model_is_the_views(tiny: TinyRun, settings: dict[str, bool]) -> None:
    """Also those that no adapter touches, and those that are not quantized."""
    base = Checkpoint(tiny.base)
    view = BaseView("nf4" if "load_in_4bit" in settings else "int8", dtype="F32")
    loaded = live_model(tiny.base, **settings).dequantize(dtype=torch.float32).state_dict()
    for name in base.tensors:
        assert np.array_equal(view.rows(base, name), loaded[name].double().numpy()), name
