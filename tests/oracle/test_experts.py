"""Mixtures of experts, under the names and in the orientations that other versions of PEFT wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tunesmith as ts
from tests.oracle import formula
from tests.oracle.zoo import Zoo, altered, load, logits_of, relative
from tests.tiny_models import peft_alone
from tunesmith.errors import TunesmithError
from tunesmith.models.quiet import quiet_loading

Tensors = dict[str, torch.Tensor]
EXPERTS = 4


def merged(adapter: Path, base: Path, out: Path) -> Path:
    """Merge, with the defaults."""
    ts.merge(ts.plan_merge(adapter, out, base=str(base)))
    return out


def as_older_peft(tensors: Tensors) -> Tensors:
    """The same change as PEFT before 0.19.1 stored it for stacks of (out, in): A over the other dimension.

    Each expert's B·A becomes (B'·A')ᵀ with B' = Aᵀ and A' = Bᵀ.
    """
    result = dict(tensors)
    for name in tensors:
        if ".experts." in name and "lora_A" in name:
            other = name.replace("lora_A", "lora_B")
            a, b = tensors[name], tensors[other]
            r = a.shape[0] // EXPERTS
            result[name] = torch.cat([b[:, e::EXPERTS].T for e in range(EXPERTS)])
            result[other] = torch.empty(a.shape[1], b.shape[1])
            for e in range(EXPERTS):
                result[other][:, e::EXPERTS] = a[e * r : (e + 1) * r].T
    return result


@pytest.mark.parametrize("kind", ["mixtral-both", "mixtral-gate-up", "mixtral-down", "qwen3-moe-both"])
@pytest.mark.parametrize("version", ["0.18.1", None])
def test_shapes_tell_which_way_an_older_peft_laid_the_factors(
    zoo: Zoo, tmp_path: Path, kind: str, version: str | None
) -> None:
    """Where only one orientation fits, it is taken, whatever version wrote it."""
    old = altered(zoo.adapter(kind), tmp_path / "old", tensors=as_older_peft, peft_version=version)
    out = merged(old, zoo.base_of(kind), tmp_path / "out")
    formula.assert_same(formula.read(out), formula.read(zoo.merged(kind)))


@pytest.mark.parametrize("version", ["0.17.1", "0.18.0"])
def test_the_version_tells_where_the_matrices_are_square(zoo: Zoo, tmp_path: Path, version: str) -> None:
    """Both orientations fit a square matrix; PEFT before 0.19 takes every stack for (in, out)."""
    old = altered(zoo.adapter("mixtral-square-down"), tmp_path / "old", tensors=as_older_peft, peft_version=version)
    out = merged(old, zoo.base_of("mixtral-square-down"), tmp_path / "out")
    formula.assert_same(formula.read(out), formula.read(zoo.merged("mixtral-square-down")))


@pytest.mark.parametrize("kind", ["mixtral-square-both", "mixtral-half-both"])
@pytest.mark.parametrize("older", [True, False])
def test_a_sibling_tells_where_the_version_is_not_known(zoo: Zoo, tmp_path: Path, kind: str, older: bool) -> None:
    """One adapter lays all its stacks the same way, so one that is not square speaks for one that is."""
    adapter = altered(zoo.adapter(kind), tmp_path / "old", tensors=as_older_peft if older else dict, peft_version=None)
    out = merged(adapter, zoo.base_of(kind), tmp_path / "out")
    formula.assert_same(formula.read(out), formula.read(zoo.merged(kind)))


@pytest.mark.parametrize("kind", ["mixtral-square-down", "mixtral-half-gate-up", "gpt-oss-square-down"])
def test_square_factors_that_nothing_explains_are_refused(zoo: Zoo, tmp_path: Path, kind: str) -> None:
    """Neither shape, nor sibling, nor version: a guess would fit and be wrong."""
    adapter = altered(zoo.adapter(kind), tmp_path / "unknown", peft_version=None)
    with pytest.raises(TunesmithError, match="experts"):
        ts.plan_merge(adapter, tmp_path / "out", base=str(zoo.base_of(kind)))
    assert not (tmp_path / "out").exists()


def per_expert(base: str, *, rslora: bool = False) -> tuple[Tensors, dict[str, object]]:
    """An adapter as transformers 4 and PEFT wrote it: every expert's projections are layers of their own."""
    names = {"mixtral": ("w1", "w3", "w2"), "qwen3-moe": ("gate_proj", "up_proj", "down_proj")}[base]
    block, width = {"mixtral": ("block_sparse_moe", 40), "qwen3-moe": ("mlp", 24)}[base]
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in range(2):
        modules = {f"{block}.experts.{e}.{name}": name for e in range(EXPERTS) for name in names}
        for module, name in {**modules, "self_attn.q_proj": "q_proj"}.items():
            inputs, outputs = (width, 32) if name == names[2] else (32, 32 if name == "q_proj" else width)
            full = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{full}.lora_A.weight"] = torch.randn(4, inputs, generator=generator) * 0.2
            tensors[f"{full}.lora_B.weight"] = torch.randn(outputs, 4, generator=generator) * 0.2
    settings: dict[str, object] = {
        "target_modules": [*names, "q_proj"],
        "target_parameters": None,
        "use_rslora": rslora,
        "peft_version": "0.17.0",
    }
    return tensors, settings


@pytest.mark.parametrize("base", ["mixtral", "qwen3-moe"])
def test_keys_of_single_experts_match_the_disk(zoo: Zoo, tmp_path: Path, base: str) -> None:
    """The names of transformers 4 are the disk's own, so every expert's projection is a plain matrix; PEFT agrees."""
    tensors, settings = per_expert(base)
    adapter = altered(zoo.adapter("plain"), tmp_path / "old", tensors=lambda _: tensors, **settings)
    out = merged(adapter, zoo.base(base), tmp_path / "out")
    expected = formula.merge(formula.read(zoo.base(base)), tensors, formula.Truth())
    formula.assert_same(formula.read(out), expected)
    live = peft_alone(load(zoo.base(base), "AutoModelForCausalLM"), adapter)
    assert relative(logits_of(load(out, "AutoModelForCausalLM")), logits_of(live)) < 1e-5


def test_rslora_on_single_experts_keeps_its_scaling_where_peft_multiplies_it_by_the_root_of_two(
    zoo: Zoo, tmp_path: Path
) -> None:
    """PEFT fuses gate and up into one adapter of twice alpha and r: 2·alpha/√(2·r), where alpha/√r was trained."""
    tensors, settings = per_expert("mixtral", rslora=True)
    adapter = altered(zoo.adapter("plain"), tmp_path / "old", tensors=lambda _: tensors, **settings)
    out = merged(adapter, zoo.base("mixtral"), tmp_path / "out")
    expected = formula.merge(formula.read(zoo.base("mixtral")), tensors, formula.Truth(scaling=lambda _: 6 / 2))
    formula.assert_same(formula.read(out), expected)
    live = peft_alone(load(zoo.base("mixtral"), "AutoModelForCausalLM"), adapter)
    with quiet_loading():
        theirs = live.merge_and_unload().model.layers[0].mlp.experts.gate_up_proj[0, :40].double()
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    start = formula.read(zoo.base("mixtral"))[name].double()
    torch.testing.assert_close(theirs - start, (expected[name].double() - start) * 2**0.5, rtol=1e-4, atol=1e-5)
