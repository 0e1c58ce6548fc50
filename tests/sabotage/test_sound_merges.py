"""No sound merge is accused, whoever made it and however it was saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.sabotage.workshop import (
    Workshop,
    check,
    deltas,
    make_adapter,
    make_base,
    peft_merge,
    remerge,
    rewrite,
    tunesmith_merge,
)
from tests.tiny_models import edit_json
from tunesmith.verify import Verdict

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def accusations(verdict: Verdict) -> list[Any]:
    """Everything that says the merge is wrong."""
    wrong = [finding for level in verdict.levels for finding in level.findings if finding.severity == "error"]
    return [*wrong, *verdict.causes, *([] if verdict.good else [verdict.answer])]


def total(verdict: Verdict, key: str) -> int:
    """One of the counts, over all tensors."""
    return sum(getattr(tensor, key) for tensor in verdict.tensors)


@pytest.mark.parametrize("layers", [2, 4], ids=["one-file", "shards"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_our_own_merge_to_nearest_is_identical_in_every_dtype_and_number_of_files(
    dtype: str, layers: int, tmp_path: Path
) -> None:
    """Rounded once, element for element."""
    base = make_base(tmp_path / "base", dtype=DTYPES[dtype], num_hidden_layers=layers)
    run = make_adapter(base, tmp_path / "run", seed=3)
    verdict = check(run, tunesmith_merge(run, base, tmp_path / "merged", rounding="nearest"), base)
    assert accusations(verdict) == []
    assert verdict.answer == "identical"
    assert (base / "model.safetensors.index.json").exists() == (layers > 2)


@pytest.mark.parametrize("rounding", ["auto", "faithful", "stochastic"])
def test_our_own_merge_to_a_neighbour_is_equal_within_rounding(rounding: str, shop: Workshop, tmp_path: Path) -> None:
    """Many elements are the other of their two neighbours, all are one of the two, and only where Δ is."""
    out = tunesmith_merge(shop.run, shop.base, tmp_path / "merged", rounding=rounding)
    verdict = check(shop.run, out, shop.base)
    assert accusations(verdict) == []
    assert verdict.answer == "equal_within_rounding"
    assert total(verdict, "outside") == total(verdict, "twice_rounded") == 0
    assert total(verdict, "faithful") > 1000
    assert set(deltas(shop.run)) == {tensor.name for tensor in verdict.tensors if tensor.faithful}


@pytest.mark.parametrize("safe", [False, True], ids=["default", "safe_merge"])
@pytest.mark.parametrize("merged_in", DTYPES)
@pytest.mark.parametrize("stored_in", DTYPES)
def test_a_peft_merge_is_sound_whatever_its_dtype_and_the_bases(
    stored_in: str, merged_in: str, safe: bool, tmp_path: Path
) -> None:
    """PEFT sums in float32 and, with ``safe_merge``, rounds twice; neither is a fault, and nothing is left faithful."""
    base = make_base(tmp_path / "base", dtype=DTYPES[stored_in])
    run = make_adapter(base, tmp_path / "run", seed=4)
    out = peft_merge(run, base, tmp_path / "merged", dtype=DTYPES[merged_in], safe=safe, max_shard_size="80KB")
    verdict = check(run, out, base)
    assert (out / "model.safetensors.index.json").exists()
    assert accusations(verdict) == []
    assert total(verdict, "outside") == total(verdict, "faithful") == 0
    assert (total(verdict, "twice_rounded") > 100) == (
        safe or merged_in == "fp32" or stored_in == "fp32" or (stored_in, merged_in) == ("fp16", "bf16")
    )


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "down_proj": 16}, "alpha_pattern": {"up_proj": 5, "q_proj": 3}},
        {"r": 1, "lora_alpha": 7},
        {"r": 64, "lora_alpha": 1, "target_modules": ["v_proj"]},
    ],
    ids=["rslora", "patterns", "r1", "r64"],
)
def test_merges_by_both_hands_are_sound_for_every_kind_of_scaling(config: dict[str, Any], tmp_path: Path) -> None:
    """The scaling is read as PEFT reads it."""
    base = make_base(tmp_path / "base")
    run = make_adapter(base, tmp_path / "run", seed=5, **config)
    ours = check(run, tunesmith_merge(run, base, tmp_path / "ours"), base)
    spans_all = config.get("r") == 64  # as many as there are columns: no error can be hidden, so each is the least
    assert (ours.answer, accusations(ours)) == ("identical" if spans_all else "equal_within_rounding", [])
    nearest = check(run, tunesmith_merge(run, base, tmp_path / "nearest", rounding="nearest"), base)
    assert nearest.answer == "identical"
    assert accusations(check(run, peft_merge(run, base, tmp_path / "peft", dtype=torch.bfloat16), base)) == []


@pytest.mark.parametrize("declared", [True, False], ids=["tied", "declared-untied"])
def test_a_tied_head_that_is_written_out_changes_nothing(declared: bool, shop: Workshop, tmp_path: Path) -> None:
    """A copy of the embedding under the head's name computes the same, whatever the configuration says of it."""
    out = shutil.copytree(shop.merged, tmp_path / "merged")
    rewrite(out, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    edit_json(out / "config.json", tie_word_embeddings=declared)
    verdict = check(shop.run, out, shop.base)
    assert accusations(verdict) == []
    assert "tied_head_written_out" in [finding.code for finding in verdict.levels[0].findings]


def test_a_stochastically_rounded_merge_is_equal_within_rounding(shop: Workshop, tmp_path: Path) -> None:
    """Many elements are the other of their two neighbours, and all are one of the two."""
    out = shutil.copytree(shop.merged, tmp_path / "merged")
    base = load_file(shop.base / "model.safetensors")
    generator = torch.Generator().manual_seed(0)

    def stochastic(name: str, delta: torch.Tensor) -> torch.Tensor:
        exact = base[name].double() + delta
        down = (exact.float().view(torch.int32) & ~0xFFFF).view(torch.float32)
        up = (exact.float().view(torch.int32) + 0xFFFF & ~0xFFFF).view(torch.float32)
        share = ((exact - down) / (up - down).double()).nan_to_num()
        take_up = torch.rand(exact.shape, generator=generator, dtype=torch.float64) < share
        return torch.where(take_up, up, down).double() - base[name].double()

    remerge(out, shop, stochastic)
    verdict = check(shop.run, out, shop.base)
    assert accusations(verdict) == []
    assert verdict.answer == "equal_within_rounding"
    assert total(verdict, "faithful") > 1000
    assert set(deltas(shop.run)) == {tensor.name for tensor in verdict.tensors if tensor.faithful}


def test_a_tokenizer_saved_by_an_older_version_is_the_same_tokenizer(shop: Workshop, tmp_path: Path) -> None:
    """Merges were once written as strings with a space between; ids and texts are what counts."""
    out = shutil.copytree(shop.merged, tmp_path / "merged")
    document = json.loads((out / "tokenizer.json").read_text())
    document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]
    document["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (out / "tokenizer.json").write_text(json.dumps(document))
    assert accusations(check(shop.run, out, shop.base)) == []


def test_a_tokenizer_saved_again_and_again_is_the_same_tokenizer(shop: Workshop, tmp_path: Path) -> None:
    """What ``save_pretrained`` adds and reorders is not a difference."""
    out = shutil.copytree(shop.merged, tmp_path / "merged")
    for _ in range(2):
        AutoTokenizer.from_pretrained(out).save_pretrained(out)
    assert accusations(check(shop.run, out, shop.base)) == []


@pytest.mark.parametrize("checkpoint", ["checkpoint-10", "checkpoint-20", "checkpoint-30"])
def test_every_checkpoint_merges_into_itself(checkpoint: str, shop: Workshop, tmp_path: Path) -> None:
    """The adapter that was asked for is the one that is held against, not the final one."""
    run = shop.run / checkpoint
    verdict = check(run, tunesmith_merge(run, shop.base, tmp_path / "merged"), shop.base)
    assert (verdict.answer, accusations(verdict)) == ("equal_within_rounding", [])
    nearest = tunesmith_merge(run, shop.base, tmp_path / "nearest", rounding="nearest")
    assert check(run, nearest, shop.base).answer == "identical"
