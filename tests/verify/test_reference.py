"""The reference: the loaded base with the recomputed weights, which is the merged model if that was loaded rightly."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.oracle.zoo import KINDS, Zoo, load, logits_of
from tests.sabotage.workshop import Workshop, check, make_workshop, rewrite
from tests.tiny_models import edit_json
from tunesmith.adapter import Stack
from tunesmith.checkpoint import Checkpoint
from tunesmith.merge import merge, plan_merge
from tunesmith.models.quiet import quiet_loading
from tunesmith.progress import Cancellation, no_progress
from tunesmith.record import Finding
from tunesmith.runs import open_run
from tunesmith.verify import LEVELS, verify
from tunesmith.verify.behaviour.reference import Reference
from tunesmith.verify.structure.check import check_structure
from tunesmith.verify.weights.check import check_weights
from tunesmith.verify.weights.expected import Expectation

BF16 = torch.bfloat16

# Kinds whose tensors are parameters of the loaded model, one to one: wrapped, prefixed, tied, untied, added or fused
# on disk as they are in memory.
ONE_TO_ONE = (
    "rslora",
    "saved-norms",
    "lora-bias",
    "tokens-tied",
    "dora",
    "embedding-tied",
    "head-tied",
    "embedding-head-tied",
    "dora-head-tied",
    "gpt2-bare-dora",
    "gpt2-mixed",
    "gpt-oss-both",
    "qwen2-vl-new",
)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Bases and adapters, each made when it is first asked for."""
    return Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A tiny run, its base and a sound merge."""
    return make_workshop(tmp_path_factory.mktemp("reference"))


def live(zoo: Zoo, kind: str) -> PeftModel:
    """The bf16 base in float32 arithmetic, with the live adapter on it."""
    spec = KINDS[kind]
    model = load(zoo.base(spec.base, BF16), spec.auto, **spec.loading)
    if spec.prepare:
        spec.prepare(model)
    with quiet_loading():
        return PeftModel.from_pretrained(model, zoo.adapter(kind)).eval()


def reference_of(adapter: Path, base_dir: Path, merged_dir: Path) -> Reference:
    """The reference of a merged directory, by way of the levels before it."""
    base, stack = Checkpoint(base_dir), Stack([(adapter, 1.0)])
    binding = stack.bind(base)
    expectation = Expectation(base, stack, binding)
    merged, _ = check_structure(merged_dir, base, binding)
    assert merged is not None
    verdicts = check_weights(merged, expectation, progress=no_progress, cancellation=Cancellation())
    return Reference(merged, expectation, verdicts)


@pytest.mark.parametrize("kind", ONE_TO_ONE)
def test_the_base_with_the_reference_is_the_merged_model_to_the_bit(kind: str, zoo: Zoo) -> None:
    """The same numbers and the same sums, though one was loaded by the base's config and the other by its own."""
    merged = zoo.merged(kind, BF16, rounding="faithful")
    reference = reference_of(zoo.adapter(kind), zoo.base(KINDS[kind].base, BF16), merged)
    peft = live(zoo, kind)
    with peft.disable_adapter(), torch.no_grad():
        before = logits_of(peft.base_model.model)
        assert reference.write_into(peft.base_model.model)
        after = logits_of(peft.base_model.model)
    assert reference.sound
    assert torch.equal(after, logits_of(load(merged, KINDS[kind].auto)))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("kind", ["mixtral-both", "qwen2-vl"])
def test_names_that_are_no_parameters_of_the_loaded_model_are_told(kind: str, zoo: Zoo) -> None:
    """Experts that are fused on loading, and towers that change their names: nothing is guessed."""
    merged = zoo.merged(kind, BF16, rounding="faithful")
    reference = reference_of(zoo.adapter(kind), zoo.base(KINDS[kind].base, BF16), merged)
    peft = live(zoo, kind)
    with peft.disable_adapter():
        assert not reference.write_into(peft.base_model.model)


@pytest.mark.parametrize("change", [lambda weight: weight.T, lambda weight: 2 * weight], ids=["turned", "scaled"])
def test_a_parameter_that_is_not_the_files_tensor_as_it_is_stored_is_told(
    change: Callable[[torch.Tensor], torch.Tensor], zoo: Zoo
) -> None:
    """A loader that rearranges the base would rearrange the merged weights too; we cannot know how."""
    merged = zoo.merged("rslora", BF16, rounding="faithful")
    reference = reference_of(zoo.adapter("rslora"), zoo.base(KINDS["rslora"].base, BF16), merged)
    peft = live(zoo, "rslora")
    projection = peft.base_model.model.model.layers[0].self_attn.q_proj
    projection.base_layer.weight.data = change(projection.base_layer.weight.data).contiguous()
    with peft.disable_adapter():
        assert not reference.write_into(peft.base_model.model)


def test_what_no_rounding_explains_is_taken_as_the_nearest(shop: Workshop, tmp_path: Path) -> None:
    """One number is spoilt: the reference holds the right one there, and the stored ones elsewhere."""
    name = "model.layers.0.self_attn.q_proj.weight"
    out = Path(shutil.copytree(shop.merged, tmp_path / "merged"))
    rewrite(out, lambda tensors: tensors[name].view(-1).__setitem__(7, 5.0))
    reference = reference_of(shop.run, shop.base, out)
    model = load(shop.base, "AutoModelForCausalLM")
    assert reference.write_into(model)
    assert not reference.sound
    found = model.get_parameter(name).data
    stored = load_file(out / "model.safetensors")[name].float()
    nearest = load_file(shop.nearest / "model.safetensors")[name].float()
    assert found.view(-1)[7] == nearest.view(-1)[7]
    stored.view(-1)[7] = found.view(-1)[7]
    assert torch.equal(found, stored)


def test_a_cast_of_the_whole_model_is_in_the_reference(shop: Workshop, tmp_path: Path) -> None:
    """Also in the tensors that the adapter leaves alone: a base in float32, merged into bf16."""
    norm, base = "model.norm.weight", Path(shutil.copytree(shop.base, tmp_path / "base"))
    rewrite(base, lambda tensors: tensors.update({name: each.float() * 1.001 for name, each in tensors.items()}))
    out = tmp_path / "merged"
    merge(plan_merge(shop.run, out, base=str(base), dtype="bf16"))
    model = load(base, "AutoModelForCausalLM")
    before = model.get_parameter(norm).data.clone()
    assert reference_of(shop.run, base, out).write_into(model)
    after = model.get_parameter(norm).data
    assert after.dtype == torch.float32
    assert torch.equal(after, before.bfloat16().float())
    assert not torch.equal(after, before)


def behaviour(shop: Workshop, out: Path) -> dict[str, Finding]:
    """The behaviour level's findings after the weights level, by code."""
    verdict = check(shop.run, out, shop.base, levels=LEVELS)
    return {finding.code: finding for finding in verdict.levels[-1].findings}


@pytest.mark.parametrize("merge", ["merged", "nearest"])
def test_the_limit_of_a_sound_merge_is_what_its_own_rounding_costs(merge: str, shop: Workshop) -> None:
    """Other for a faithful merge than for one to the nearest, and with hardly any room above it."""
    found = behaviour(shop, getattr(shop, merge))
    stored, judged = found["behaviour_as_stored"], found["behaviour_rounding_loss"]  # so small an update loses much
    assert stored.params["loading"] == 0
    assert judged.params["mean_kl"] == pytest.approx(stored.params["rounding"], rel=1e-6)
    assert 1 <= float(str(judged.params["limit"])) / float(str(judged.params["mean_kl"])) < 1.05


def test_a_config_that_moves_less_than_rounding_does_is_still_seen(shop: Workshop, tmp_path: Path) -> None:
    """The weights are proven and the predictions are near; yet it is not the model that they make."""
    out = Path(shutil.copytree(shop.merged, tmp_path / "merged"))
    edit_json(out / "config.json", rms_norm_eps=2e-6)
    found = behaviour(shop, out)
    read = found["behaviour_read_otherwise"]
    assert read.severity == "error"
    assert float(str(read.params["loading"])) < float(str(read.params["rounding"])) / 1000


def test_wrong_numbers_that_move_the_predictions_are_told_from_a_wrong_reading(shop: Workshop, tmp_path: Path) -> None:
    """The files themselves are wrong here, and are said to be."""
    out = Path(shutil.copytree(shop.merged, tmp_path / "merged"))
    rewrite(out, lambda tensors: tensors["model.norm.weight"][:16].neg_())
    found = behaviour(shop, out)
    assert found["behaviour_beyond_rounding"].severity == found["behaviour_far"].severity == "error"
    assert "behaviour_read_otherwise" not in found
    # The noise is the reference's: a merge that departs a lot makes no ties of its own departures.
    assert found["behaviour_flips"].severity == "warning"


@pytest.mark.parametrize("asked", [{"levels": ("behaviour",)}, {"sample": True}], ids=["behaviour-alone", "sample"])
def test_without_all_of_the_weights_the_limit_is_an_estimate(asked: dict[str, Any], shop: Workshop) -> None:
    """And is said to be: what was not recomputed could be anything, so it is no reference."""
    verdict = verify(open_run(shop.run), shop.merged, base_dir=shop.base, base_model="base", **asked)
    codes = {finding.code: finding.severity for finding in verdict.levels[-1].findings}
    assert codes["behaviour_limit_estimated"] == "info"
    assert all(row.rounding_kl is None and row.loading_kl is None for row in verdict.behaviour)


def test_a_rounding_that_turns_an_answer_turns_it_at_a_tie(shop: Workshop) -> None:
    """All that parts a sound merge's answers from the adapter's is rounding."""
    for out in (shop.merged, shop.nearest):
        verdict = check(shop.run, out, shop.base, levels=LEVELS)
        rows: tuple[Any, ...] = verdict.behaviour
        assert all(row.same_text or row.tie for row in rows)
        assert "behaviour_flips" not in {finding.code for finding in verdict.levels[-1].findings}
