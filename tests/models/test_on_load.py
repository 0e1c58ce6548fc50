"""Models quantized while they are loaded, by bitsandbytes itself, and the adapters beside them untouched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tunesmith as ts
from tests.tiny_models import TinyRun, chat
from tunesmith.checkpoint import Checkpoint, view_of
from tunesmith.errors import BaseModelError, DataError, MissingExtraError
from tunesmith.models import GenerationSettings, Request, VariantSet, generate, on_load
from tunesmith.models.loading import load_model

IDS = torch.tensor([[5, 9, 30, 77, 120, 8]])
# On a processor bitsandbytes multiplies 4-bit weights in bfloat16; LLM.int8() rounds inputs to 8 bits as well.
TOLERANCE = {"nf4": 0.03, "int8": 0.1}


def load(tiny: TinyRun, quantization: str | None) -> VariantSet:
    """The base and two adapters."""
    return VariantSet.load(
        tiny.base,
        adapters=tiny.adapters,
        full={"merged": tiny.merged},
        tokenizer_dir=tiny.base,
        quantization=quantization,
    )


def logits(variants: VariantSet, name: str) -> torch.Tensor:
    """Of a few tokens."""
    with variants.active(name) as (model, _):
        return model(IDS).logits.float()  # type: ignore[no-any-return]


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    return float((one - other).abs().max() / other.abs().max())


def rounded_to_int8(weight_OI: torch.Tensor) -> torch.Tensor:
    """Rows of 8-bit integers, by their largest number."""
    scale_O1 = weight_OI.abs().amax(1, keepdim=True) / 127
    return torch.round(weight_OI / scale_O1) * scale_O1


@pytest.mark.parametrize("quantization", list(TOLERANCE))
def test_a_variant_answers_as_the_quantized_base_with_the_whole_adapter(quantization: str, tiny: TinyRun) -> None:
    """Against float32 models that the rounded weights were put into by hand; heads and norms stay as they are."""
    loaded, plain = load(tiny, quantization), load(tiny, None)
    before = {name: logits(plain, name) for name in ("base", "final", "checkpoint-10")}
    checkpoint, view = Checkpoint(tiny.base), view_of("nf4")
    assert view is not None
    with plain.active("base") as (model, _), torch.no_grad():
        for name, parameter in model.named_parameters():
            stored = name.replace("base_model.model.", "").replace(".base_layer", "")
            if "_proj.weight" in stored and "lora" not in stored:
                seen = torch.from_numpy(view.rows(checkpoint, stored)).float()
                parameter.copy_(seen if quantization == "nf4" else rounded_to_int8(parameter))
    for name, unquantized in before.items():
        got, wanted = logits(loaded, name), logits(plain, name)
        assert far(got, wanted) < TOLERANCE[quantization], name
        assert far(got, unquantized) > (2 * TOLERANCE["nf4"] if quantization == "nf4" else 1e-3), name
    assert far(before["final"], before["base"]) > 5 * TOLERANCE[quantization]
    assert 1e-3 < far(logits(loaded, "merged"), logits(plain, "merged")) < 0.5  # it is quantized too


@pytest.mark.parametrize("quantization", list(TOLERANCE))
def test_rows_of_several_variants_are_generated_side_by_side(quantization: str, tiny: TinyRun) -> None:
    """Greedy text in one batch is what each gives alone."""
    variants, settings = load(tiny, quantization), GenerationSettings(max_new_tokens=6, greedy=True)
    requests = [Request(name, chat("hello")) for name in ("base", "final", "checkpoint-10")]
    together = [one.token_ids for one in generate(variants, requests, settings)]
    alone = [generate(variants, [request], settings)[0].token_ids for request in requests]
    assert together == alone
    assert len({tuple(ids) for ids in alone}) > 1


def test_packed_weights_take_less_room(tiny: TinyRun) -> None:
    """Four bits a number and a float32 scale for 64 of them."""
    packed = load_model(tiny.base, dtype="float32", device="cpu", error=BaseModelError, quantization="nf4")
    weight: Any = packed.model.layers[0].mlp.up_proj.weight
    assert (weight.dtype, weight.numel()) == (torch.uint8, 64 * 128 // 2)
    assert packed.lm_head.weight.dtype == torch.float32


def test_what_cannot_be_is_refused(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown name, a package that is not there, and a server, which loads its models itself."""
    with pytest.raises(DataError, match="no such quantization") as refused:
        load(tiny, "int3")
    assert refused.value.expected == "nf4 or fp4 or int8"
    with pytest.raises(DataError, match="a server loads its models") as refused:
        ts.load_engine(tiny.adapters["final"], endpoint="http://127.0.0.1:9/v1", models=["x"], quantization="nf4")
    assert refused.value.next_step == "leave --quantization out"
    monkeypatch.setitem(on_load.QUANTIZATIONS, "nf4", "no_such_package")
    with pytest.raises(MissingExtraError, match="no_such_package"):
        load(tiny, "nf4")
