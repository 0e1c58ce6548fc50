"""Several adapters in one pass: the weighted sum, once rounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

import tunesmith as ts
from tests.oracle import formula
from tests.oracle.formula import Truth, low_rank, read, round_once
from tests.oracle.kinds import LINEAR, Kind
from tests.oracle.zoo import Zoo, build_adapter, load, logits_of, relative
from tunesmith.errors import TunesmithError
from tunesmith.models.quiet import quiet_loading

AUTO = "AutoModelForCausalLM"
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "fewer": ("llama", {"r": 2, "target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "head": ("llama", {"target_modules": ["v_proj", "lm_head"]}),
    "embedding-tied": ("llama-tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]}),
    "saved-head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "dora": ("llama", {"target_modules": ["q_proj"], "use_dora": True}),
    "plain-tied": ("llama-tied", {"target_modules": LINEAR}),
    "mlp": ("llama", {"target_modules": ["up_proj"]}),
    "mlp-dora": ("llama", {"target_modules": ["up_proj"], "use_dora": True}),
}


@pytest.fixture(scope="module")
def others(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Further adapters, with other numbers than the zoo's."""
    root = tmp_path_factory.mktemp("others")
    for seed, (name, (base, settings)) in enumerate(OTHERS.items()):
        build_adapter(zoo.base(base), root / name, Kind(base, settings), seed=100 + seed)
    return {name: root / name for name in OTHERS}


def merged(first: Path, out: Path, *, base: Path, adapters: list[tuple[Path, float]], weight: float = 1.0) -> Path:
    """One pass over several adapters, rounded to nearest."""
    ts.merge(ts.plan_merge(first, out, base=str(base), adapters=adapters, weight=weight, rounding="nearest"))
    return out


def live_sum(base: Path, adapters: dict[str, tuple[Path, float]]) -> PeftModel:
    """PEFT with all adapters at once, each scaled by its weight, unmerged."""
    names = list(adapters)
    with quiet_loading():
        peft = PeftModel.from_pretrained(load(base, AUTO), adapters[names[0]][0], adapter_name=names[0])
        for name in names[1:]:
            peft.load_adapter(adapters[name][0], adapter_name=name)
        peft.base_model.set_adapter(names)
        for module in peft.modules():
            for name, (_, weight) in adapters.items():
                if isinstance(module, LoraLayer) and name in module.scaling:
                    module.scaling[name] *= weight
    return peft.eval()


@pytest.mark.parametrize("weight", [0.7, -0.25, 1.0])
def test_two_adapters_are_summed_with_their_weights_and_rounded_once(
    zoo: Zoo, others: dict[str, Path], tmp_path: Path, weight: float
) -> None:
    """W' = W + Δ₁ + w·Δ₂ in float64: the closed form's bytes in bf16, and PEFT's logits with both adapters active."""
    first, second = zoo.adapter("plain"), others["fewer"]
    out = merged(first, tmp_path / "bf16", base=zoo.base("llama", torch.bfloat16), adapters=[(second, weight)])
    expected = {name: tensor.double() for name, tensor in read(zoo.base("llama", torch.bfloat16)).items()}
    for adapter, scaling in ((read(first), 6 / 4), (read(second), weight * 6 / 2**0.5)):
        for name, a in adapter.items():
            if name.endswith("lora_A.weight"):
                target = name.removeprefix("base_model.model.").replace("lora_A.", "")
                expected[target] = expected[target] + scaling * low_rank(adapter[name.replace("_A.", "_B.")], a)
    formula.assert_same(read(out), {name: round_once(value, torch.bfloat16) for name, value in expected.items()})
    out = merged(first, tmp_path / "fp32", base=zoo.base("llama"), adapters=[(second, weight)])
    live = live_sum(zoo.base("llama"), {"first": (first, 1.0), "second": (second, weight)})
    assert relative(logits_of(load(out, AUTO)), logits_of(live)) < 1e-5


def test_sum_is_the_concatenation_and_not_what_peft_calls_linear(
    zoo: Zoo, others: dict[str, Path], tmp_path: Path
) -> None:
    """``add_weighted_adapter``: ``cat`` is the sum; ``linear`` sums the factors, whose product has cross terms."""
    first, second = zoo.adapter("plain"), others["mlp"]
    out = merged(first, tmp_path / "out", base=zoo.base("llama"), adapters=[(second, 0.7)], weight=0.5)
    ours = logits_of(load(out, AUTO))
    for combination, same in (("cat", True), ("linear", False)):
        peft = live_sum(zoo.base("llama"), {"first": (first, 1.0), "second": (second, 1.0)})
        with quiet_loading():
            peft.base_model.set_adapter("first")
            peft.add_weighted_adapter(["first", "second"], [0.5, 0.7], "both", combination_type=combination)
            peft.set_adapter("both")
        assert (relative(ours, logits_of(peft.eval())) < 1e-5) is same, combination


def test_weight_of_the_only_adapter_scales_it(zoo: Zoo, tmp_path: Path) -> None:
    """Half an adapter is half its change."""
    base = zoo.base("llama", torch.bfloat16)
    out = merged(zoo.adapter("plain"), tmp_path / "out", base=base, adapters=[], weight=0.5)
    truth = Truth(scaling=lambda _: 0.5 * 6 / 4)
    formula.assert_same(read(out), formula.merge(read(base), read(zoo.adapter("plain")), truth))


def test_the_same_adapter_twice_is_its_double(zoo: Zoo, tmp_path: Path) -> None:
    """Nothing of a stack is by directory or by name."""
    first, base = zoo.adapter("plain"), zoo.base("llama")
    out = merged(first, tmp_path / "out", base=base, adapters=[(first, 1.0)])
    formula.assert_same(read(out), formula.merge(read(base), read(first), Truth(scaling=lambda _: 2 * 6 / 4)))


def test_an_adapter_that_unties_the_head_does_so_in_a_stack(zoo: Zoo, others: dict[str, Path], tmp_path: Path) -> None:
    """One of two adapters changes the embedding only, so the head begins as the embedding was."""
    base, first, second = zoo.base("llama-tied"), others["plain-tied"], others["embedding-tied"]
    out = merged(first, tmp_path / "out", base=base, adapters=[(second, 0.5)])
    live = live_sum(base, {"first": (first, 1.0), "second": (second, 0.5)})
    assert relative(logits_of(load(out, AUTO)), logits_of(live)) < 1e-5
    assert torch.equal(read(out)["lm_head.weight"], read(base)["model.embed_tokens.weight"])


@pytest.mark.parametrize("second", ["tokens", "saved-head", "dora"])
def test_what_replaces_or_rescales_takes_no_weight(
    zoo: Zoo, others: dict[str, Path], tmp_path: Path, second: str
) -> None:
    """A weighted token row, saved module or magnitude has no meaning that users agree on."""
    with pytest.raises(TunesmithError, match="weight"):
        merged(zoo.adapter("plain"), tmp_path / "out", base=zoo.base("llama"), adapters=[(others[second], 0.5)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("first", "second"), [("saved-head", "head"), ("dora", "fewer"), ("tokens", "tokens")])
def test_what_replaces_or_rescales_stands_alone_on_its_tensor(
    zoo: Zoo, others: dict[str, Path], tmp_path: Path, first: str, second: str
) -> None:
    """A sum with what is not a sum would depend on the order."""
    with pytest.raises(TunesmithError, match="sum"):
        merged(others[first], tmp_path / "out", base=zoo.base("llama"), adapters=[(others[second], 1.0)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("first", "second"), [("saved-head", "mlp"), ("tokens", "mlp"), ("tokens", "mlp-dora")])
def test_what_replaces_or_rescales_stands_beside_others(
    zoo: Zoo, others: dict[str, Path], tmp_path: Path, first: str, second: str
) -> None:
    """On tensors that are each one adapter's own, nothing is ambiguous: one after the other is both at once."""
    base = zoo.base("llama")
    out = merged(others[first], tmp_path / "out", base=base, adapters=[(others[second], 1.0)])
    truth = Truth(tokens={"embed_tokens": [3, 7]})
    step = formula.merge(read(base), read(others[first]), truth)
    formula.assert_same(read(out), formula.merge(step, read(others[second]), Truth()))


def test_adapters_of_unlike_vocabularies_are_refused(zoo: Zoo, others: dict[str, Path], tmp_path: Path) -> None:
    """One has more tokens than the other's embedding has rows."""
    with pytest.raises(TunesmithError):
        merged(
            zoo.adapter("resized-embedding"), tmp_path / "out", base=zoo.base("llama"), adapters=[(others["head"], 1)]
        )
    assert not (tmp_path / "out").exists()


def test_weight_that_is_no_number_is_refused(zoo: Zoo, others: dict[str, Path], tmp_path: Path) -> None:
    """NaN would be in every element."""
    with pytest.raises(TunesmithError, match="weight"):
        merged(zoo.adapter("plain"), tmp_path / "out", base=zoo.base("llama"), adapters=[(others["mlp"], float("nan"))])
    assert not (tmp_path / "out").exists()
