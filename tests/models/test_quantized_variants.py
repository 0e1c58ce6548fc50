"""Quantized directories as variants: the numbers that their codes stand for, beside everything else that is live."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from tests.sabotage.quantized_workshop import quantize
from tests.sabotage.workshop import Workshop, make_adapter, make_base
from tunesmith.checkpoint import Checkpoint, QuantizedWeight, quantization_of
from tunesmith.conversations import Message
from tunesmith.errors import CheckpointError, MissingExtraError
from tunesmith.models import GenerationSettings, Request, VariantSet, generate, products, quantized
from tunesmith.models.loading import load_model
from tunesmith.models.quantized import elements_of

IDS = torch.tensor([[5, 9, 30, 77, 120, 8]])


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A base and an adapter; nothing is merged."""
    root = tmp_path_factory.mktemp("variants")
    base = make_base(root / "base")
    run = make_adapter(base, root / "run", seed=1)
    return Workshop(base, run, base, base, base)


@pytest.fixture(scope="module", params=["int4", "int8", "w8a8", "fp8"])
def directory(request: pytest.FixtureRequest, shop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized model of every scheme."""
    return quantize(shop, shop.run, tmp_path_factory.mktemp("quantized") / "out", request.param)


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    """Every weight by the base's names, a quantized one as code · scale."""
    checkpoint = Checkpoint(directory)
    quantization = quantization_of(checkpoint.config)
    assert quantization is not None
    found = {}
    for name in checkpoint.tensors:
        module, _, leaf = name.rpartition(".")
        if leaf == "weight_scale":
            scheme = quantization.scheme_of(module)
            assert scheme is not None
            layer = QuantizedWeight(checkpoint, module, scheme)
            found[f"{module}.weight"] = torch.from_numpy(layer.float64(0, layer.rows))
        elif checkpoint.info(name).dtype == "BF16":
            found.setdefault(name, torch.from_numpy(checkpoint.read_float64(name)))
    return found


def logits(model: Any) -> torch.Tensor:
    """Of a few tokens."""
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


def activations_of(directory: Path) -> bool:
    """Whether the scheme quantizes activations as well."""
    return directory.joinpath("config.json").read_text().find('"input_activations": {') > 0


def test_a_loaded_model_holds_exactly_the_numbers_of_its_codes(
    directory: Path, shop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    """In float32, as plain layers; it answers as the base does with these weights in it; and nothing is printed."""
    model = load_model(directory, dtype="float32", device="cpu", error=CheckpointError)
    assert capsys.readouterr().err == ""
    wanted = weights_of(directory)
    held = dict(model.named_parameters())
    assert {name for name in held if name.endswith("_proj.weight")} == {n for n in wanted if n.endswith("_proj.weight")}
    assert all(torch.equal(held[name].double(), weight) for name, weight in wanted.items())
    plain = LlamaForCausalLM.from_pretrained(shop.base, dtype=torch.float32)
    plain.load_state_dict({name: weight.float() for name, weight in wanted.items()}, strict=False)
    exact = torch.allclose(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    assert exact is not activations_of(directory)
    assert (logits(model) - logits(plain)).abs().max() < 0.5


def test_a_quantized_variant_answers_beside_the_others(directory: Path, shop: Workshop) -> None:
    """In the same call as base and adapter, and as when it is asked alone."""
    variants = VariantSet.load(
        shop.base, adapters={"final": shop.run}, full={"small": directory}, tokenizer_dir=shop.base
    )
    turn = [Message(role="user", content="what is rounded?")]
    settings = GenerationSettings(greedy=True, max_new_tokens=6)
    together = generate(variants, [Request(name, turn) for name in ("base", "final", "small")], settings)
    alone = generate(variants, [Request("small", turn)], settings)
    assert together[2].token_ids == alone[0].token_ids


def test_quantized_activations_stay_so_where_products_are_replaced(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quicker product knows nothing of them, so that such a layer keeps its own."""
    directory = quantize(shop, shop.run, tmp_path / "out", "w8a8")
    variants = VariantSet.load(shop.base, adapters={}, full={"small": directory}, tokenizer_dir=shop.base)
    monkeypatch.setattr(products, "_SMALL_BYTES", 0)
    monkeypatch.setattr(products, "quickest", lambda *_, **__: {1: "packed", 2: "packed"})
    with variants.active("small") as (model, _):
        wanted = logits(model)
    with variants.running(["small"]) as (model, _, _):
        # The head is a plain layer and may be replaced; that an activation is not rounded shows in the second digit.
        assert torch.allclose(logits(model), wanted, rtol=0, atol=1e-4)


def test_memory_is_counted_in_what_codes_become(directory: Path, shop: Workshop) -> None:
    """A packed word holds several numbers."""
    plain, count = Checkpoint(shop.base), elements_of(Checkpoint(directory))
    numbers = sum(info.elements for info in plain.tensors.values())
    assert numbers <= count < 1.05 * numbers


def test_a_model_whose_codes_are_missing_is_refused_by_name(shop: Workshop, tmp_path: Path) -> None:
    """Not filled with random numbers."""
    directory = quantize(shop, shop.run, tmp_path / "out", "int4", ignore=())
    with pytest.raises(CheckpointError, match=r"do not fit|cannot be loaded"):
        load_model(directory, dtype="float32", device="cpu", error=CheckpointError)


def test_a_missing_package_is_named_with_its_extra(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a model that is not quantized needs none."""
    directory = tmp_path / "model"
    shutil.copytree(shop.base, directory)
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda _: None)
    load_model(directory, dtype="float32", device="cpu", error=CheckpointError)
    document = json.loads((directory / "config.json").read_text())
    document["quantization_config"] = {"quant_method": "compressed-tensors"}
    (directory / "config.json").write_text(json.dumps(document))
    with pytest.raises(MissingExtraError, match="compressed_tensors") as caught:
        load_model(directory, dtype="float32", device="cpu", error=CheckpointError)
    assert "tunesmith[quantize]" in str(caught.value.next_step)
    assert load_file(directory / "model.safetensors")
