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
    update = adapter.updates[index]
    a_ri, b_or = adapter.factors(update)
    return float(np.linalg.norm(update.scaling * (b_or @ a_ri)))


def test_the_delta_norm_is_that_of_the_dense_product(tiny: TinyRun) -> None:
    """Of every module, against the product itself in float64."""
    adapter = Adapter(tiny.adapters["final"])
    for index, update in enumerate(adapter.updates):
        assert delta_norm(adapter, update) == pytest.approx(dense_norm(adapter, index), rel=NORM_TOLERANCE)


def test_the_delta_norm_of_zero_is_zero(tmp_path: Path) -> None:
    """A run that has not started: B is all zeros."""
    tensors = pair(Q)
    tensors[f"base_model.model.{Q}.lora_B.weight"][:] = 0
    adapter = Adapter(write_adapter(tmp_path / "a", tensors))
    assert delta_norm(adapter, adapter.updates[0]) == 0.0


def test_facts_of_a_mergeable_adapter(tmp_path: Path) -> None:
    """Everything that the configuration and the header say."""
    tensors = {**pair(Q), **pair(V, seed=1)}
    adapter = Adapter(write_adapter(tmp_path / "a", tensors))
    facts = describe(adapter)
    assert (facts.peft_type, facts.r, facts.lora_alpha, facts.scaling, facts.use_rslora) == ("LORA", 2, 8.0, 4.0, False)
    assert facts.base_model == "org/base"
    assert facts.target_modules == ("q_proj", "v_proj")
    assert [module.module for module in facts.modules] == [update.module for update in adapter.updates]
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
    weights = [np.linalg.norm(base.read_float64(update.name)) for update in adapter.updates]
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


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"init_lora_weights": "pissa"},
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_unmergeable_adapter_is_described_with_its_refusal(tiny: TinyRun, tmp_path: Path, config: Any) -> None:
    """Real ones of the installed PEFT: one may look at what one may not merge."""
    adapter = Adapter(build_adapter(tiny.base, tmp_path / "a", seed=4, **config))
    facts = describe(adapter, Checkpoint(tiny.base))
    assert facts.refusal is not None
    assert all(line in facts.refusal for line in adapter.refusals)
    assert facts.parameters > 0


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
