"""Products of rows: whichever way is quickest, they are the same product; what was measured is kept."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.tiny_models import TinyRun, chat
from tunesmith.models import GenerationSettings, Request, VariantSet, generate, products
from tunesmith.models.compute import machine_name
from tunesmith.models.products import Products, products_of, quickest

WAYS = sorted({way for tried in products._TRIED["float32"].values() for way in tried})


def times(best: str, dtype: str = "float32") -> products.Times:
    """A measurement in which one way is the quickest wherever it was tried."""
    return {
        rows: {"plain": 1.0, **{way: 0.1 if way == best else 2.0 for way in tried}}
        for rows, tried in products._TRIED[dtype].items()
    }


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have one way be the quickest on this machine."""
    monkeypatch.setattr(products, "_SMALL_BYTES", 0)

    def use(best: str) -> None:
        monkeypatch.setattr(products, "_times", lambda kind: times(best, kind.partition(" ")[0]))

    return use


@pytest.mark.parametrize("way", ["plain", *WAYS])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (0,), (1, 1), (1, 7), (3, 1), (2, 8), (5, 9), (9, 11)])
def test_every_way_is_the_layers_own_product(measured: Any, way: str, bias: bool, shape: tuple[int, ...]) -> None:
    """Up to rounding, in any number of dimensions, for no row at all (of an expert), and free to be written to."""
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias).requires_grad_(False)
    x = torch.randn(*shape, 24)
    measured(way)
    product = Products(layer).of(layer)
    assert (product is None) == (way == "plain")
    if product is not None:
        found = product(x)
        torch.testing.assert_close(found, layer(x), rtol=1e-5, atol=1e-5)
        found.add_(1)
        torch.testing.assert_close(product(x), layer(x), rtol=1e-5, atol=1e-5)


def test_a_packed_bfloat16_layer_is_the_layers_own_product(measured: Any) -> None:
    """To bfloat16's rounding."""
    torch.manual_seed(0)
    layer = nn.Linear(24, 40).to(torch.bfloat16).requires_grad_(False)
    measured("packed")
    product = Products(layer).of(layer)
    assert product is not None
    x = torch.randn(5, 2, 24).to(torch.bfloat16)
    torch.testing.assert_close(product(x), layer(x), rtol=2e-2, atol=2e-2)


def test_a_weight_that_was_written_since_is_packed_again(measured: Any) -> None:
    """Verification writes recomputed weights into a loaded base; a copy of the old ones would answer for them."""
    layer = nn.Linear(24, 40).requires_grad_(False)
    measured("packed")
    products_of_layer = Products(layer)
    product = products_of_layer.of(layer)
    assert product is not None
    x = torch.randn(4, 24)
    product(x)
    layer.weight[3, 3] += 1
    torch.testing.assert_close(product(x), layer(x), rtol=1e-5, atol=1e-5)
    layer.weight.data.copy_(torch.randn(40, 24))
    products_of_layer.forget_changed()  # as at the beginning of every batch
    torch.testing.assert_close(product(x), layer(x), rtol=1e-5, atol=1e-5)
    layer.weight.data = torch.randn(40, 24)
    torch.testing.assert_close(product(x), layer(x), rtol=1e-5, atol=1e-5)


def test_nothing_is_packed_where_copies_are_no_small_matter(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large model stays in memory once."""
    measured("packed")
    layer = nn.Linear(24, 40)
    assert Products(layer).of(layer) is not None

    class Little:
        available = 8000

    monkeypatch.setattr(psutil, "virtual_memory", Little)
    assert Products(layer).of(layer) is None


def test_copies_go_with_their_model() -> None:
    """A merged model that made room for another takes its packed weights along."""
    model = nn.Sequential(nn.Linear(4, 4))
    assert products_of(model) is products_of(model)
    before = len(products._of_models)
    del model
    gc.collect()
    assert len(products._of_models) == before - 1


def test_only_plain_layers_of_the_cpu_are_multiplied_so(measured: Any) -> None:
    """What is anything else keeps its own forward."""

    class Quantized(nn.Linear):
        pass

    measured("packed")
    model = nn.Sequential()
    assert Products(model).of(nn.Linear(4, 4)) is not None
    for other in (Conv1D(4, 4), nn.Embedding(4, 4), Quantized(4, 4), nn.Linear(4, 4).to(torch.float16)):
        assert Products(model).of(other) is None


def test_a_way_must_win_and_packing_may_be_left_out(measured: Any) -> None:
    """A few per cent are noise."""
    measured("packed")
    assert set(list(quickest("float32 tall", packed=True).values())[1:]) == {"packed"}
    assert set(quickest("float32 tall", packed=False).values()) == {"plain"}


def test_a_measurement_is_kept_and_a_broken_one_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is in the file, there is a way for every number of rows."""
    taken: list[str] = []

    def measure(dtype: str, *_: int) -> products.Times:
        taken.append(dtype)
        return times("turned", dtype)

    monkeypatch.setattr("tunesmith.checkpoint.cache_dir", lambda: tmp_path)
    monkeypatch.setattr(products, "_measure", measure)
    file = tmp_path / "products.json"
    nonsense = {"machines": {machine_name(): {"float32 tall": {"1": {"plain": 1.0}}}}}
    for text in (None, "{", "[]", '{"machines": {"x": 1}}', json.dumps(nonsense)):
        if text is not None:
            file.write_text(text)
        for again in (False, True):
            taken.clear()
            products._times.cache_clear()
            found = [quickest(f"float32 {shape}", packed=True) for shape in ("tall", "wide")]
            assert [ways[2] for ways in found] == ["turned", "turned"]
            assert bool(taken) != again
    quickest("bfloat16 tall", packed=True)
    assert len(json.loads(file.read_text())["machines"][machine_name()]) == 4, "what was there is kept"
    assert {path.name for path in tmp_path.iterdir()} == {"products.json"}
    products._times.cache_clear()


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_of_variants_says_the_same_in_every_way(measured: Any, way: str, tiny: TinyRun) -> None:
    """Adapters on top of each product, prompts of several lengths, rows that leave."""
    requests = [Request(name, chat("x" * n)) for n in (1, 9, 4) for name in ("base", "final", "checkpoint-10")]
    settings = GenerationSettings(greedy=True, max_new_tokens=6)
    found = []
    for each in ("plain", way):
        measured(each)
        loaded = VariantSet.load(tiny.base, adapters=tiny.adapters, tokenizer_dir=tiny.base)
        found.append([one.token_ids for one in generate(loaded, requests, settings)])
    assert found[0] == found[1]


def test_small_weights_keep_their_own_product() -> None:
    """They stay in the processor's cache; nothing is measured for them."""
    layer = nn.Linear(64, 64)
    assert Products(layer).of(layer) is None


def test_this_machines_own_measurement_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way that was tried has a time."""
    monkeypatch.setattr(products, "_SEEN_BYTES", 1 << 14)
    found = products._measure("float32", 32, 16)
    assert {rows: set(each) for rows, each in found.items()} == {
        rows: {"plain", *tried} for rows, tried in products._TRIED["float32"].items()
    }
    assert all(seconds > 0 for each in found.values() for seconds in each.values())
