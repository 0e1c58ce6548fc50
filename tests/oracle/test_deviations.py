"""Where PEFT 0.21 itself deviates from what its adapters mean, pinned by name; ours is the formula.

(Experts' rslora is in ``test_experts``, fused attention in ``test_modules``.)  When one of these fails after an update
of PEFT, PEFT has mended it, and the test can go.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith as ts
from tests.oracle import formula
from tests.oracle.kinds import ATTENTION, KINDS, LINEAR, Kind
from tests.oracle.zoo import Zoo, altered, build_adapter, load, logits_of, relative
from tests.tiny_models import peft_alone
from tunesmith.errors import TunesmithError
from tunesmith.models.quiet import quiet_loading

AUTO = "AutoModelForCausalLM"


def peft_merged(base: Path, adapter: Path, *, dtype: torch.dtype = torch.float32, safe: bool = False) -> Any:
    """What PEFT's own merge makes of an adapter, on a base loaded anew."""
    with quiet_loading():
        return peft_alone(load(base, AUTO, dtype=dtype), adapter).merge_and_unload(safe_merge=safe)


@pytest.mark.parametrize("kind", ["embedding-tying", "head-tying"])
def test_ensure_weight_tying_is_merged_once_where_peft_merges_it_twice(zoo: Zoo, kind: str) -> None:
    """Both sides of a tie hold the same change of the one tensor: W + Δ, not W + 2Δ."""
    name = "model.embed_tokens.weight"
    start = formula.read(zoo.base_of(kind))[name].double()
    delta = formula.read(zoo.merged(kind))[name].double() - start
    theirs = peft_merged(zoo.base_of(kind), zoo.adapter(kind)).get_input_embeddings().weight.double() - start
    torch.testing.assert_close(theirs, 2 * delta, rtol=1e-4, atol=1e-5)


def test_tied_head_is_untied_where_peft_changes_the_embedding_too(zoo: Zoo) -> None:
    """LoRA on a tied ``lm_head``: PEFT adds it to the shared tensor and leaves ``tie_word_embeddings`` true."""
    ours, base = formula.read(zoo.merged("head-tied")), formula.read(zoo.base_of("head-tied"))
    name = "model.embed_tokens.weight"
    assert torch.equal(ours[name], base[name])
    assert not torch.equal(ours["lm_head.weight"], base[name])
    theirs = peft_merged(zoo.base_of("head-tied"), zoo.adapter("head-tied"))
    assert theirs.config.tie_word_embeddings
    torch.testing.assert_close(theirs.get_input_embeddings().weight, ours["lm_head.weight"], rtol=1e-4, atol=1e-5)
    assert relative(logits_of(theirs), logits_of(zoo.live("head-tied"))) > 1e-2


def test_replicated_layers_are_written_apart_where_peft_sums_their_updates(zoo: Zoo) -> None:
    """Layers 1 and 2 share one weight in PEFT's memory, so that its merge adds both their updates to it."""
    live = logits_of(zoo.live("replicated"))
    theirs = peft_merged(zoo.base_of("replicated"), zoo.adapter("replicated"))
    ours = formula.read(zoo.merged("replicated"))
    start = formula.read(zoo.base_of("replicated"))["model.layers.1.self_attn.q_proj.weight"].double()
    deltas = [ours[f"model.layers.{layer}.self_attn.q_proj.weight"].double() - start for layer in (1, 2)]
    both = theirs.model.layers[1].self_attn.q_proj.weight.double() - start
    torch.testing.assert_close(both, sum(deltas), rtol=1e-4, atol=1e-5)
    assert relative(logits_of(theirs), live) > 1e-2


@pytest.mark.parametrize("safe", [False, True])
def test_bf16_is_rounded_once_where_peft_rounds_the_update_first(zoo: Zoo, safe: bool) -> None:
    """``safe_merge=True`` rounds Δ to bf16, adds, and rounds again; PEFT's default rounds once, but from float32."""
    base = zoo.base("llama", torch.bfloat16)
    ours = formula.read(zoo.merged("plain", torch.bfloat16))
    theirs = peft_merged(base, zoo.adapter("plain"), dtype=torch.bfloat16, safe=safe).state_dict()
    touched = [name for name in ours if name.split(".")[-2] in LINEAR]
    unlike = sum(int((ours[name] != theirs[name]).sum()) for name in touched)
    total = sum(ours[name].numel() for name in touched)
    if safe:
        assert 0.001 < unlike / total < 0.5
    else:
        assert unlike <= total // 10_000  # a float32 sum that lands on a tie of bf16


def test_overlapping_patterns_mean_what_a_reload_makes_of_them_and_are_warned_of(zoo: Zoo, tmp_path: Path) -> None:
    """PEFT saves patterns sorted by name and takes the first that fits, so a reload may differ from the training."""
    patterns = {"self_attn.q_proj": 12, "q_proj": 3}  # trained with 12; sorted, q_proj comes first
    kind = Kind("llama", {"target_modules": ATTENTION, "alpha_pattern": patterns})
    trained = logits_of(build_adapter(zoo.base("llama"), tmp_path / "adapter", kind))
    plan = ts.plan_merge(tmp_path / "adapter", tmp_path / "out", base=str(zoo.base("llama")))
    assert "overlapping_patterns" in {finding.code for finding in plan.warnings}
    ts.merge(plan)
    ours = logits_of(load(tmp_path / "out", AUTO))
    reloaded = logits_of(peft_alone(load(zoo.base("llama"), AUTO), tmp_path / "adapter"))
    assert relative(ours, reloaded) < 1e-5
    assert relative(ours, trained) > 1e-2


def test_overlapping_rank_patterns_are_told_apart_by_the_tensors(zoo: Zoo, tmp_path: Path) -> None:
    """The file's ranks are those of the training; where the sorted patterns say another, the two are at odds."""
    patterns = {"self_attn.q_proj": 2, "q_proj": 3}
    kind = Kind("llama", {"target_modules": ATTENTION, "rank_pattern": patterns})
    build_adapter(zoo.base("llama"), tmp_path / "adapter", kind)
    with pytest.raises(TunesmithError, match="rank"):
        ts.plan_merge(tmp_path / "adapter", tmp_path / "out", base=str(zoo.base("llama")))


@pytest.mark.parametrize("flag", [True, False])
def test_layer_type_decides_the_orientation_and_not_the_flag(zoo: Zoo, tmp_path: Path, flag: bool) -> None:
    """A mixed adapter of GPT-2 saves ``fan_in_fan_out: false`` (or true) for Conv1D and linear layers alike."""
    adapter = altered(zoo.adapter("gpt2-mixed"), tmp_path / "adapter", fan_in_fan_out=flag)
    ts.merge(ts.plan_merge(adapter, tmp_path / "out", base=str(zoo.base_of("gpt2-mixed"))))
    expected = formula.merge(formula.read(zoo.base_of("gpt2-mixed")), formula.read(adapter), KINDS["gpt2-mixed"].truth)
    formula.assert_same(formula.read(tmp_path / "out"), expected)
