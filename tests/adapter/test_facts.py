"""describe: an adapter in numbers, mergeable or not, with the base or without."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.adapter.making import Q, V, pair, write_adapter, write_base
from tests.tiny_models import TinyRun, build_adapter
from tunesmith.adapter import Adapter, AdapterFacts, delta_norm, describe
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
