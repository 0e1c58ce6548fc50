"""The reader of compressed-tensors, held against the package that writes the format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils.helpers import calculate_qparams
from safetensors.torch import save_file

from tunesmith.checkpoint import Checkpoint, QuantizedWeight, quantization_of
from tunesmith.checkpoint.quantized import unpacked
from tunesmith.errors import CheckpointError

ROWS, COLUMNS = 6, 96


def group(bits: int = 4, size: int | None = 32, **more: Any) -> dict[str, Any]:
    """One group of layers, as a configuration has it."""
    strategy = {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
    return {"targets": ["Linear"], "weights": {"num_bits": bits, "type": "int", "symmetric": True, **strategy}, **more}


def config(*groups: dict[str, Any], form: str = "pack-quantized", **more: Any) -> dict[str, Any]:
    """A configuration with that section."""
    named = {f"group_{number}": one for number, one in enumerate(groups)}
    section = {"quant_method": "compressed-tensors", "format": form, "config_groups": named, **more}
    return {"quantization_config": section}


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 7, 32, 33, 100])
def test_codes_are_unpacked_as_the_package_packs_them(bits: int, columns: int) -> None:
    """Also where a code straddles two words, and where a row ends within one."""
    half = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(columns)
    codes = torch.randint(-half, half, (5, columns), generator=generator, dtype=torch.int8)
    words = pack_to_int32(codes, bits)
    assert torch.equal(unpack_from_int32(words, bits, codes.shape), codes)
    assert np.array_equal(unpacked(words.numpy(), bits, columns), codes.numpy())


@pytest.mark.parametrize(
    ("form", "weights"),
    [
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
        ("pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 16}),
        ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    ],
)
def test_a_layer_reads_as_the_package_decompresses_it(form: str, weights: dict[str, Any], tmp_path: Path) -> None:
    """Every number of it, by rows, in float64; and the tensors are those that are expected."""
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    args = scheme.weights
    assert args is not None
    x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    size = args.group_size or COLUMNS
    grouped = x.unflatten(1, (-1, size)) if args.strategy != "tensor" else x.reshape(1, 1, -1)
    scale = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)[0].bfloat16()
    scale = scale.reshape(1) if args.strategy == "tensor" else scale
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = {**compressor.compress({"weight": x, "weight_scale": scale.double()}, scheme), "weight_scale": scale}
    save_file({f"a.b.{name}": tensor.contiguous() for name, tensor in stored.items()}, tmp_path / "model.safetensors")
    document = QuantizationConfig(config_groups={"group_0": scheme}, format=form, ignore=["lm_head"])
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": json.loads(document.model_dump_json())}))
    checkpoint = Checkpoint(tmp_path)
    quantization = quantization_of(checkpoint.config)
    assert quantization is not None
    ours = quantization.scheme_of("a.b")
    assert ours is not None
    assert set(ours.tensors("a.b", ROWS, COLUMNS)) == {f"a.b.{name}" for name in stored}
    layer = QuantizedWeight(checkpoint, "a.b", ours)
    theirs = compressor.decompress({**stored, "weight_scale": scale.double()}, scheme)["weight"].numpy()
    assert (layer.rows, layer.columns) == (ROWS, COLUMNS)
    assert np.array_equal(layer.float64(0, ROWS), theirs)
    assert np.array_equal(layer.float64(2, 5), theirs[2:5])


def test_the_eight_bit_floats_are_torchs() -> None:
    """All 256 of them."""
    from tunesmith.checkpoint.quantized import _E4M3

    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    assert np.array_equal(_E4M3, theirs, equal_nan=True)


def test_the_first_group_that_names_a_layer_is_its_own_and_ignored_ones_have_none() -> None:
    """By name, by expression, and by class."""
    attention = {**group(8, None), "targets": ["re:.*attn.*"]}
    found = quantization_of(config(attention, group(), ignore=["lm_head", "re:.*router$"]))
    assert found is not None
    names = {name: scheme and scheme.name for name in ("x.attn.q", "x.mlp.up", "lm_head", "x.router", "x.router.a")
             for scheme in [found.scheme_of(name)]}  # fmt: skip
    assert names == {
        "x.attn.q": "int8", "x.mlp.up": "int4:32", "lm_head": None, "x.router": None, "x.router.a": "int4:32",
    }  # fmt: skip
    assert found.scheme_of("x.conv", kind="Conv1d") is None


def test_a_model_that_is_not_quantized_has_no_quantization() -> None:
    """Nor is that an error."""
    assert quantization_of({"model_type": "llama"}) is None


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quant_method: gptq"),
        ({"quantization_config": "int4"}, "quant_method: str"),
        (config(), "no group"),
        (config(group(9)), "num_bits: 9"),
        (config(group(size=32) | {"weights": {"num_bits": 4, "symmetric": False, "group_size": 32}}), "symmetric"),
        (config(group(), form="nvfp4-pack-quantized"), "format: nvfp4-pack-quantized"),
        (config(group() | {"targets": ["re:("]}), "targets"),
        (config(group(), ignore="lm_head"), "ignore"),
        (config(group() | {"weights": None}), "weights: not quantized"),
        (config(group(8, None, format="float-quantized")), "type: int"),
    ],
)
def test_a_quantization_that_is_not_known_is_refused_with_what_it_says(section: dict[str, Any], said: str) -> None:
    """Nothing is guessed."""
    with pytest.raises(CheckpointError) as caught:
        quantization_of(section, where="config.json")
    assert any(said in detail for detail in caught.value.details)


def test_a_layer_that_is_stored_otherwise_is_refused_with_every_misfit(tmp_path: Path) -> None:
    """Names, shapes and dtypes at once."""
    tensors = {
        "a.weight_packed": torch.zeros(4, 8, dtype=torch.int32),
        "a.weight_scale": torch.zeros(4, 3, dtype=torch.int32),
        "a.weight_shape": torch.tensor([4, 64]),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config(group())))
    quantization = quantization_of(config(group()))
    assert quantization is not None
    scheme = quantization.scheme_of("a")
    assert scheme is not None
    with pytest.raises(CheckpointError) as caught:
        QuantizedWeight(Checkpoint(tmp_path), "a", scheme)
    assert list(caught.value.details) == ["a.weight_scale: [4, 3] instead of [4, 2]"]
