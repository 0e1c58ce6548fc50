"""describe: an adapter in numbers, mergeable or not, with the base or without."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.adapter.making import Q, V, pair, write_adapter, write_base
from tests.tiny_models import TinyRun, build_adapter
from tunesmith.adapter import Adapter, AdapterFacts, delta_norm, describe
from tunesmith.adapter.facts import _cost
from tunesmith.checkpoint import Checkpoint

# ‖BA‖² is a sum of r² products of float64 sums over at most 128 terms, all exact to 2⁻⁵³ of their size.
NORM_TOLERANCE = 1e-12


def dense_norm(adapter: Adapter, index: int) -> float:
    """The oracle: form the product and take its norm."""
    adapted = adapter.adapted[index]
    a_ri, b_or = adapter.finite(adapted.lora_A), adapter.finite(adapted.lora_B)
    return float(np.linalg.norm(adapted.scaling * (b_or @ a_ri)))


def test_the_delta_norm_is_that_of_the_dense_product(tiny: TinyRun) -> None:
    """Of every module, against the product itself in float64."""
    adapter = Adapter(tiny.adapters["final"])
    for index, adapted in enumerate(adapter.adapted):
        assert delta_norm(adapter, adapted) == pytest.approx(dense_norm(adapter, index), rel=NORM_TOLERANCE)


def test_the_delta_norm_of_zero_is_zero(tmp_path: Path) -> None:
    """A run that has not started: B is all zeros."""
    tensors = pair(Q)
    tensors[f"base_model.model.{Q}.lora_B.weight"][:] = 0
    adapter = Adapter(write_adapter(tmp_path / "a", tensors))
    assert delta_norm(adapter, adapter.adapted[0]) == 0.0


def test_facts_of_a_mergeable_adapter(tmp_path: Path) -> None:
    """Everything that the configuration and the header say."""
    tensors = {**pair(Q), **pair(V, seed=1)}
    adapter = Adapter(write_adapter(tmp_path / "a", tensors))
    facts = describe(adapter)
    assert (facts.peft_type, facts.r, facts.lora_alpha, facts.scaling, facts.use_rslora) == ("LORA", 2, 8.0, 4.0, False)
    assert facts.base_model == "org/base"
    assert facts.target_modules == ("q_proj", "v_proj")
    assert [module.module for module in facts.modules] == [adapted.module for adapted in adapter.adapted]
    assert facts.parameters == sum(value.size for value in tensors.values())
    assert facts.dtype == "F32"
    assert facts.size_bytes == (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    assert facts.relative_update is None
    assert facts.refusal is None


def test_the_size_against_the_base_is_exact_where_the_sample_is_whole(tmp_path: Path) -> None:
    """Small tensors are read whole, so the ratio is that of the dense norms."""
    base = Checkpoint(write_base(tmp_path / "base", {f"{Q}.weight": (4, 6), f"{V}.weight": (4, 6)}))
    adapter = Adapter(write_adapter(tmp_path / "a", {**pair(Q), **pair(V, seed=1)}))
    facts = describe(adapter, base)
    weights = [np.linalg.norm(base.read_float64(f"{adapted.module}.weight")) for adapted in adapter.adapted]
    assert [module.base_norm for module in facts.modules] == pytest.approx(weights, rel=NORM_TOLERANCE)
    deltas = [dense_norm(adapter, index) for index in range(2)]
    assert facts.relative_update == pytest.approx(math.hypot(*deltas) / math.hypot(*weights), rel=NORM_TOLERANCE)


def test_the_sampled_norm_of_a_large_tensor_is_near(tmp_path: Path) -> None:
    """Eight blocks of rows in a thousand; five standard errors of a sample of 32,768 normal numbers' norm."""
    base = Checkpoint(write_base(tmp_path / "base", {f"{Q}.weight": (3000, 64)}))
    adapter = Adapter(write_adapter(tmp_path / "a", pair(Q, inputs=64, outputs=3000)))
    (module,) = describe(adapter, base).modules
    exact = np.linalg.norm(base.read_float64(f"{Q}.weight"))
    assert module.base_norm == pytest.approx(exact, rel=5 / math.sqrt(2 * (1 << 15)))


def test_a_base_that_does_not_fit_gives_no_ratio(tmp_path: Path) -> None:
    """Facts are for looking; to refuse is the merge's part."""
    base = Checkpoint(write_base(tmp_path / "base", {"other.weight": (4, 6)}))
    facts = describe(Adapter(write_adapter(tmp_path / "a")), base)
    assert facts.relative_update is None
    assert facts.modules[0].base_norm is None


def test_the_delta_norm_of_stacked_experts_is_over_all_of_them(tmp_path: Path) -> None:
    """Rows of A in turn, columns of B interleaved; each expert's product has its own norm."""
    tensors = pair("model.layers.0.mlp.experts", r=6)
    path = write_adapter(tmp_path / "a", tensors, target_parameters=["mlp.experts.down_proj"])
    adapter = Adapter(path)
    (adapted,) = adapter.adapted
    assert (adapted.r, adapted.stacked, adapted.parameter) == (2, 3, "down_proj")
    a, b = (adapter.finite(name) for name in (adapted.lora_A, adapted.lora_B))
    norms = [np.linalg.norm(4.0 * b[:, [e, e + 3]] @ a[[2 * e, 2 * e + 1]]) for e in range(3)]
    assert delta_norm(adapter, adapted) == pytest.approx(math.hypot(*norms), rel=NORM_TOLERANCE)


@pytest.mark.parametrize(
    "config", [{"init_lora_weights": "pissa"}, {"use_qalora": True}, {"arrow_config": {"top_k": 1}}]
)
def test_an_unmergeable_adapter_is_described_with_its_refusal(tmp_path: Path, config: Any) -> None:
    """One may look at what one may not merge."""
    facts = describe(Adapter(write_adapter(tmp_path / "a", **config)))
    assert facts.refusal is not None
    assert next(iter(config)) in facts.refusal
    assert facts.parameters > 0


@pytest.mark.parametrize("config", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_richer_adapters_of_peft_are_described(tiny: TinyRun, tmp_path: Path, config: Any) -> None:
    """Real ones of the installed PEFT, with every trained number counted."""
    adapter = Adapter(build_adapter(tiny.base, tmp_path / "a", seed=4, **config))
    facts = describe(adapter, Checkpoint(tiny.base))
    assert facts.refusal is None
    assert facts.relative_update
    assert facts.parameters == sum(info.elements for info in adapter.header.tensors.values())


def test_another_method_is_described_by_its_name(tmp_path: Path) -> None:
    """Its tensors are counted, its updates are not known."""
    adapter = Adapter(write_adapter(tmp_path / "a", peft_type="IA3", r=None, lora_alpha=None))
    facts = describe(adapter)
    assert (facts.peft_type, facts.r, facts.scaling, facts.modules) == ("IA3", None, None, ())
    assert "IA3" in str(facts.refusal)
    assert facts.parameters == 20


def test_facts_travel_through_json(tiny: TinyRun, tmp_path: Path) -> None:
    """Written and read back, they are equal."""
    facts = describe(Adapter(tiny.adapters["final"]), Checkpoint(tiny.base))
    assert AdapterFacts.read(facts.write(tmp_path / "facts.json")) == facts


def test_singular_values_and_effective_rank_are_those_of_the_dense_product(tiny: TinyRun) -> None:
    """Of every module of a real adapter, scaling included."""
    adapter = Adapter(tiny.adapters["final"])
    for adapted, module in zip(adapter.adapted, describe(adapter).modules, strict=True):
        product = adapted.scaling * (adapter.finite(adapted.lora_B) @ adapter.finite(adapted.lora_A))
        values = np.linalg.svd(product, compute_uv=False)[: adapted.r]
        shares = values / values.sum()
        assert module.spectral_norm == pytest.approx(values[0], rel=1e-9)
        assert module.effective_rank == pytest.approx(math.exp(-np.sum(shares * np.log(shares))), rel=1e-6)
        assert module.moved is True


def test_a_convolution_is_described_by_its_flattened_kernel(tmp_path: Path) -> None:
    """A of (r, in, k, k), B of (out, r, 1, 1)."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3, 3, 3)), rng.standard_normal((5, 2, 1, 1))
    name = "base_model.model.features.0"
    path = write_adapter(tmp_path / "a", {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b})
    (module,) = describe(Adapter(path)).modules
    exact = np.linalg.svd(4.0 * b.reshape(5, 2) @ a.reshape(2, 27), compute_uv=False)
    assert (module.delta_norm, module.spectral_norm) == pytest.approx((np.linalg.norm(exact), exact[0]))


def test_a_convolution_with_groups_has_no_size(tmp_path: Path) -> None:
    """Its update is no product of the factors."""
    tensors = {
        "base_model.model.conv.lora_A.weight": np.ones((2, 3, 1), np.float32),
        "base_model.model.conv.lora_B.weight": np.ones((6, 1, 1), np.float32),
    }
    facts = describe(Adapter(write_adapter(tmp_path / "a", tensors)))
    assert (facts.modules[0].delta_norm, facts.modules[0].moved, facts.modules[0].finite) == (None, None, True)
    assert "groups" in str(facts.refusal)


def test_an_embedding_has_the_singular_values_of_its_update(tmp_path: Path) -> None:
    """A of (r, vocabulary), B of (hidden, r); the transpose changes no singular value."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 9)), rng.standard_normal((4, 2))
    name = "base_model.model.model.embed_tokens"
    path = write_adapter(tmp_path / "a", {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b})
    (module,) = describe(Adapter(path)).modules
    assert module.spectral_norm == pytest.approx(np.linalg.norm(4.0 * (b @ a).T, 2))


def test_a_stack_has_a_norm_and_no_rank(tmp_path: Path) -> None:
    """Every matrix of it has a rank of its own."""
    tensors = pair("model.layers.0.mlp.experts", r=6)
    (module,) = describe(
        Adapter(write_adapter(tmp_path / "a", tensors, target_parameters=["mlp.experts.down_proj"]))
    ).modules
    assert module.delta_norm
    assert (module.spectral_norm, module.effective_rank, module.moved) == (None, None, True)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["A", "B"])
def test_an_adapter_of_no_numbers_is_described_and_told_of(tmp_path: Path, side: str, broken: float) -> None:
    """A run that diverged is what one wants to look at most; the sound modules keep their figures."""
    tensors = {**pair(Q), **pair(V, seed=1)}
    tensors[f"base_model.model.{Q}.lora_{side}.weight"][1, 1] = broken
    base = Checkpoint(write_base(tmp_path / "base", {f"{Q}.weight": (4, 6), f"{V}.weight": (4, 6)}))
    facts = describe(Adapter(write_adapter(tmp_path / "a", tensors)), base)
    q, v = (next(module for module in facts.modules if module.module == name) for name in (Q, V))
    assert (q.finite, q.delta_norm, q.effective_rank, q.moved) == (False, None, None, None)
    assert v.delta_norm
    assert v.effective_rank
    (finding,) = (finding for finding in facts.findings if finding.code == "adapter_not_finite")
    assert (finding.severity, finding.params["count"], finding.params["names"]) == ("error", 1, Q)
    assert AdapterFacts.read(facts.write(tmp_path / "facts.json")) == facts


def test_a_base_of_no_numbers_or_of_another_form_gives_no_ratio(tmp_path: Path) -> None:
    """NaN in the base, and 4-bit weights, are no error of the adapter's."""
    adapter = Adapter(write_adapter(tmp_path / "a"))
    broken = write_base(tmp_path / "broken", {f"{Q}.weight": (4, 6)})
    save_file({f"{Q}.weight": np.full((4, 6), np.nan, np.float32)}, broken / "model.safetensors")
    packed = write_base(tmp_path / "packed", {f"{Q}.weight": (12, 1)}, dtype=np.uint8)
    for base in (broken, packed):
        facts = describe(adapter, Checkpoint(base))
        assert (facts.modules[0].base_norm, facts.relative_update) == (None, None)


LAYERS = 12
KINDS = {"self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "mlp.down_proj": (8, 64)}


def many(tmp_path: Path) -> Adapter:
    """Twelve layers of three kinds, in an order that is not the layers'; every layer's update has its own size."""
    tensors = {}
    for layer in range(LAYERS):
        for kind, (outputs, inputs) in KINDS.items():
            one = pair(f"model.layers.{layer}.{kind}", inputs=inputs, outputs=outputs, seed=layer)
            tensors |= {name: value * np.float32(1 + layer) for name, value in one.items()}
    return Adapter(write_adapter(tmp_path / "many", tensors))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_a_budget_is_spent_evenly_on_layers_and_kinds(tmp_path: Path, share: float) -> None:
    """Every kind is measured, and no stretch of layers is left out; the rest is listed, without figures."""
    adapter = many(tmp_path)
    whole = describe(adapter, budget_bytes=None)
    cost = sum(_cost(adapter, adapted, sampled=False) for adapted in adapter.adapted)
    facts = describe(adapter, budget_bytes=math.ceil(share * cost))
    read = [module for module in facts.modules if module.finite is not None]
    assert facts.measured == len(read) == pytest.approx(share * len(facts.modules), abs=1.5)
    assert [m.module for m in facts.modules] == [m.module for m in whole.modules]
    assert all(m == w for m, w in zip(facts.modules, whole.modules, strict=True) if m.finite)
    assert all(m.delta_norm is m.effective_rank is m.moved is None for m in facts.modules if not m.finite)
    for kind in KINDS:
        layers = sorted(int(m.module.split(".")[2]) for m in read if m.module.endswith(kind))
        gaps = np.diff([-1, *layers, LAYERS])
        assert max(gaps) <= 2 * (LAYERS + 1) / (len(layers) + 1) + 1


def test_a_small_budget_goes_to_the_middle_layer_of_every_kind(tmp_path: Path) -> None:
    """Also of one that a single layer has; and the middle by number, not by the order of the file's names."""
    tensors = pair(f"model.layers.{LAYERS - 1}.router", inputs=8, outputs=4)
    for layer in range(LAYERS):
        for kind in ("q_proj", "k_proj"):
            tensors |= pair(f"model.layers.{layer}.self_attn.{kind}", inputs=8, outputs=4)
    adapter = Adapter(write_adapter(tmp_path / "a", tensors))
    facts = describe(adapter, budget_bytes=3 * _cost(adapter, adapter.adapted[0], sampled=False))
    middle = f"model.layers.{LAYERS // 2}.self_attn"
    assert {module.module for module in facts.modules if module.finite} == {
        f"{middle}.q_proj",
        f"{middle}.k_proj",
        f"model.layers.{LAYERS - 1}.router",
    }


def test_the_default_budget_is_no_limit_for_a_small_adapter(tmp_path: Path) -> None:
    """A glance at a small adapter sees all of it."""
    adapter = many(tmp_path)
    assert describe(adapter) == describe(adapter, budget_bytes=None)
    assert describe(adapter).measured == len(adapter.adapted)


def test_a_module_that_is_beyond_the_budget_is_left_out(tmp_path: Path) -> None:
    """A rank in the thousands takes minutes; the others are measured all the same."""
    tensors = {**pair(Q), **pair(V, r=64, inputs=512, outputs=512)}
    adapter = Adapter(write_adapter(tmp_path / "a", tensors, rank_pattern={"v_proj": 64}))
    facts = describe(adapter, budget_bytes=200_000)
    assert {m.module: m.delta_norm is not None for m in facts.modules} == {Q: True, V: False}


def test_the_ratio_of_a_few_stands_for_the_rest_of_their_kind(tmp_path: Path) -> None:
    """A kind that is measured more rarely weighs no less: all layers are alike here, and so the ratio is exact."""
    tensors, weights = {}, {}
    for layer in range(LAYERS):
        for index, (kind, (outputs, inputs)) in enumerate(KINDS.items()):
            module = f"model.layers.{layer}.{kind}"
            tensors |= pair(module, inputs=inputs, outputs=outputs, seed=index)
            weights[f"{module}.weight"] = np.full((outputs, inputs), 10.0**index, np.float32)
    base_dir = write_base(tmp_path / "base", {})
    save_file(weights, base_dir / "model.safetensors")
    adapter, base = Adapter(write_adapter(tmp_path / "a", tensors)), Checkpoint(base_dir)
    whole = describe(adapter, base, budget_bytes=None)
    few = describe(adapter, base, budget_bytes=5 * _cost(adapter, adapter.adapted[0], sampled=True))
    measured = [sum(m.finite is True for m in few.modules if m.module.endswith(kind)) for kind in KINDS]
    assert len(set(measured)) == 2  # unevenly
    assert few.relative_update == pytest.approx(whole.relative_update, rel=NORM_TOLERANCE)


@pytest.mark.parametrize("alpha", [10**400, math.nan, "16", True, None])
def test_a_configured_alpha_that_is_no_number_is_none(tmp_path: Path, alpha: Any) -> None:
    """Of a method whose alpha is not looked at otherwise."""
    assert describe(Adapter(write_adapter(tmp_path / "a", peft_type="IA3", lora_alpha=alpha))).lora_alpha is None
