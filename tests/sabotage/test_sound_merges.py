"""No sound merge is accused, whoever made it and however it was saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from tests.oracle.zoo import Zoo
from tests.sabotage.workshop import (
    Workshop,
    check,
    deltas,
    flip_bit,
    make_adapter,
    make_base,
    peft_merge,
    remerge,
    rewrite,
    tunesmith_merge,
)
from tests.tiny_models import edit_json
from tunesmith.runs import open_run
from tunesmith.verify import Verdict, verify

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
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


def split(out: Path, parts: int, *, indexed: bool = True, metadata: dict[str, str] | None = None) -> None:
    """Spread the one file over several by name, as other tools cut it; with one part, ``00001-of-00001``."""
    tensors = load_file(out / WEIGHTS)
    (out / WEIGHTS).unlink()
    names = sorted(tensors)
    files = {f"model-{part + 1:05}-of-{parts:05}.safetensors": names[part::parts] for part in range(parts)}
    for file, members in files.items():
        save_file({name: tensors[name] for name in members}, out / file, metadata or {"format": "pt"})
    if indexed:
        weight_map = {name: file for file, members in files.items() for name in members}
        total = sum(tensor.nbytes for tensor in tensors.values())
        (out / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def saved_again(out: Path) -> None:
    """The tokenizer's files as a tool writes that loads and saves it."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    for file in out.glob("*token*"):
        file.unlink()
    tokenizer.save_pretrained(out)


def by_mergekit(out: Path) -> None:
    """One shard with an index, the tied head written out, its own recipe beside, the configuration saved anew."""
    rewrite(out, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING].clone()}))
    split(out, 1)
    saved_again(out)
    (out / "mergekit_config.yml").write_text("merge_method: linear\n")
    (out / "README.md").write_text("---\ntags: [mergekit]\n---\n")
    AutoConfig.from_pretrained(out).save_pretrained(out)
    edit_json(out / "config.json", torch_dtype="bfloat16", use_cache=True, transformers_version="4.51.3")


def by_mlx_lm(out: Path) -> None:
    """Metadata of its own, an index beside the single file, keys in another order, no name of the base."""
    tensors = load_file(out / WEIGHTS)
    save_file(tensors, out / WEIGHTS, {"format": "mlx"})
    index = {
        "metadata": {"total_size": 1, "total_parameters": 1},
        "weight_map": dict.fromkeys(sorted(tensors), WEIGHTS),
    }
    (out / INDEX).write_text(json.dumps(index))
    saved_again(out)
    config = json.loads((out / "config.json").read_text())
    config.pop("_name_or_path", None)
    (out / "config.json").write_text(json.dumps(dict(sorted(config.items())), indent=4))


def by_llama_factory(out: Path) -> None:
    """Its export: shards, a Modelfile for Ollama, left padding, the cache switched on."""
    split(out, 2)
    saved_again(out)
    (out / "Modelfile").write_text("FROM .\n")
    edit_json(out / "tokenizer_config.json", padding_side="left", split_special_tokens=False)
    edit_json(out / "config.json", use_cache=True, torch_dtype="bfloat16", transformers_version="4.52.4")


def by_unsloth(out: Path) -> None:
    """Fields of its own, a token to pad with, and the settings of every added token beside the tokenizer."""
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    keys = ("content", "lstrip", "rstrip", "normalized", "single_word", "special")
    stated = {str(token["id"]): {key: token[key] for key in keys} for token in tokenizer["added_tokens"]}
    edit_json(out / "tokenizer_config.json", added_tokens_decoder=stated, padding_side="left", model_max_length=256)
    edit_json(out / "config.json", unsloth_fixed=True, unsloth_version="2026.2.1", pad_token_id=1, use_cache=False)
    edit_json(out / "config.json", _name_or_path="unsloth/tiny")


def by_ms_swift(out: Path) -> None:
    """Small shards, its arguments beside, the tokenizer's own ends written over the base's."""
    split(out, 3)
    (out / "args.json").write_text("{}")
    edit_json(out / "config.json", pad_token_id=0, keys_to_ignore_at_inference=["past_key_values"])
    edit_json(out / "generation_config.json", pad_token_id=0, transformers_version="4.51.0", max_length=20)


TOOLS = {tool.__name__[3:]: tool for tool in (by_mergekit, by_mlx_lm, by_llama_factory, by_unsloth, by_ms_swift)}


@pytest.mark.parametrize("by", ["tunesmith", "peft"])
@pytest.mark.parametrize("tool", TOOLS)
def test_the_directory_that_a_tool_writes_is_sound(tool: str, by: str, shop: Workshop, tmp_path: Path) -> None:
    """Its own cut, names, notes and spellings change nothing, whoever did the arithmetic."""
    out = tmp_path / "merged"
    if by == "peft":
        peft_merge(shop.run, shop.base, out, dtype=torch.bfloat16)
    else:
        shutil.copytree(shop.merged, out)
    TOOLS[tool](out)
    verdict = check(shop.run, out, shop.base)
    assert accusations(verdict) == []
    warnings = [f.code for level in verdict.levels for f in level.findings if f.severity == "warning"]
    assert [code for code in warnings if code != "tokenizer_respelled"] == []


@pytest.mark.parametrize("tool", TOOLS)
def test_a_wrong_number_is_found_in_the_directory_of_every_tool(tool: str, shop: Workshop, tmp_path: Path) -> None:
    """Its ways hide nothing."""
    out = shutil.copytree(shop.merged, tmp_path / "merged")
    flip_bit(out, "model.layers.1.mlp.up_proj.weight", 77, 9)
    TOOLS[tool](out)
    assert [cause.code for cause in check(shop.run, out, shop.base).causes] == ["cause_one_element"]


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_names_with_another_prefix_or_none_are_sound(prefix: str, shop: Workshop, tmp_path: Path) -> None:
    """As bare models, and those of another class, are saved."""
    out = shutil.copytree(shop.merged, tmp_path / "merged")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[prefix + name.removeprefix("model.")] = tensors.pop(name)

    rewrite(out, rename)
    assert accusations(check(shop.run, out, shop.base)) == []


def test_a_base_that_holds_its_tied_head_may_lose_it(shop: Workshop, tmp_path: Path) -> None:
    """Some bases hold a copy in their files, which a loader does not write again."""
    base = Path(shutil.copytree(shop.base, tmp_path / "base"))
    rewrite(base, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING].clone()}))
    verdict = check(shop.run, shop.merged, base)
    assert accusations(verdict) == []
    assert "tied_head_left_out" in [finding.code for finding in verdict.levels[0].findings]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Mixtures of experts."""
    return Zoo(tmp_path_factory.mktemp("zoo"))


def fuse(out: Path, names: tuple[str, str, str], *, mlx: bool) -> None:
    """Write a model's experts in stacks, as Transformers holds them in memory, or as mlx-lm does."""
    gate, up, down = names

    def change(tensors: dict[str, torch.Tensor]) -> None:
        parents = {name.partition(".experts.")[0] for name in tensors if ".experts." in name}
        for parent in parents:
            own = [name for name in tensors if name.startswith(f"{parent}.experts.")]
            count = 1 + max(int(name.split(".experts.")[1].split(".")[0]) for name in own)
            parts = {part: [tensors[f"{parent}.experts.{e}.{part}.weight"] for e in range(count)] for part in names}
            for name in own:
                del tensors[name]
            if mlx:
                for part, kind in zip(names, ("gate_proj", "up_proj", "down_proj"), strict=True):
                    tensors[f"{parent}.switch_mlp.{kind}.weight"] = torch.stack(parts[part])
            else:
                both = [torch.cat(pair) for pair in zip(parts[gate], parts[up], strict=True)]
                tensors[f"{parent}.experts.gate_up_proj"] = torch.stack(both)
                tensors[f"{parent}.experts.down_proj"] = torch.stack(parts[down])

    rewrite(out, change)


EXPERTS = {"mixtral-both": ("w1", "w3", "w2"), "qwen3-moe-both": ("gate_proj", "up_proj", "down_proj")}


@pytest.mark.parametrize("mlx", [False, True], ids=["transformers", "mlx-lm"])
@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_in_stacks_are_proven_like_experts_apart(kind: str, mlx: bool, zoo: Zoo, tmp_path: Path) -> None:
    """Every number of every expert is compared, and a wrong one is found in its expert."""
    out = Path(shutil.copytree(zoo.merged(kind), tmp_path / "merged"))
    before = load_file(out / WEIGHTS)
    fuse(out, EXPERTS[kind], mlx=mlx)
    base = zoo.base_of(kind)
    verdict = verify(open_run(zoo.adapter(kind)), out, base_dir=base, base_model="base", levels=("assets", "weights"))
    assert (verdict.answer, accusations(verdict)) == ("identical", [])
    assert {tensor.name: tensor.elements for tensor in verdict.tensors} == {
        name: tensor.numel() for name, tensor in before.items()
    }
    stack = next(name for name, tensor in load_file(out / WEIGHTS).items() if tensor.dim() == 3 and "down" in name)
    rewrite(out, lambda tensors: tensors[stack][1, 2].__setitem__(3, 9.0))
    verdict = verify(open_run(zoo.adapter(kind)), out, base_dir=base, base_model="base", levels=("assets", "weights"))
    wrong = [tensor.name for tensor in verdict.tensors if tensor.outside]
    assert len(wrong) == 1
    assert wrong[0].endswith(f".experts.1.{EXPERTS[kind][2]}.weight")
