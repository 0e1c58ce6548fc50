"""Adapters of every kind that PEFT knows: its own merges are not accused where they are right, and are where not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.oracle.zoo import KINDS, Zoo, load
from tests.tiny_models import edit_json
from tunesmith.models.quiet import quiet_loading
from tunesmith.runs import open_run
from tunesmith.verify import Verdict, verify

WEIGHTS = "model.safetensors"
Tensors = dict[str, torch.Tensor]
BF16, FP32 = torch.bfloat16, torch.float32

# Kinds that PEFT merges rightly, each with the dtype that its base is stored in and the one that it is merged in.
SOUND = {
    "rslora": (BF16, FP32),
    "patterns": (FP32, BF16),
    "bias-all": (BF16, BF16),
    "lora-bias": (FP32, FP32),
    "saved-norms": (FP32, BF16),
    "saved-both-tied": (BF16, BF16),
    "embedding": (FP32, BF16),
    "embedding-head": (BF16, BF16),
    "tokens": (BF16, BF16),
    "tokens-tied": (FP32, BF16),
    "resized-tied": (BF16, BF16),
    "resized-embedding": (BF16, FP32),
    "dora": (BF16, BF16),
    "dora-rslora": (FP32, FP32),
    "dora-embedding": (FP32, BF16),
    "dora-gpt2": (FP32, FP32),
    "gpt2-mixed": (BF16, BF16),
    "gpt2-bare-dora": (FP32, BF16),
    "mixtral-both": (BF16, BF16),
    "mixtral-half-both": (FP32, BF16),
    "qwen3-moe-both": (BF16, BF16),
    "gpt-oss-both": (FP32, BF16),
    "qwen2-vl-new": (BF16, BF16),
    "llava-old": (FP32, BF16),
    "classifier": (BF16, BF16),
    "gpt2-classifier": (FP32, BF16),
    "bert-classifier": (BF16, BF16),
    "dora-conv2d": (FP32, BF16),
}

# Kinds that PEFT writes as one tensor where the adapter makes two, or updates twice where it means once.
UNSOUND = {
    "embedding-tied": "cause_tied_head",
    "head-tied": "cause_tied_head",
    "embedding-head-tied": "cause_tied_head",
    "tokens-unlike-tied": "cause_tied_head",
    "dora-head-tied": "cause_tied_head",
    "qwen2-vl-head-tied": "cause_tied_head",
    "embedding-tying": "cause_merged_twice",
}


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Bases and adapters, each made when it is first asked for."""
    return Zoo(tmp_path_factory.mktemp("zoo"))


def check(zoo: Zoo, kind: str, out: Path, dtype: torch.dtype) -> Verdict:
    """The verdict on a merge of a kind, on the levels that need no tokenizer."""
    base = zoo.base(KINDS[kind].base, dtype)
    return verify(open_run(zoo.adapter(kind)), out, base_dir=base, base_model="base", levels=("assets", "weights"))


def accusations(verdict: Verdict) -> list[object]:
    """Everything that says the merge is wrong."""
    wrong = [finding for level in verdict.levels for finding in level.findings if finding.severity == "error"]
    return [*wrong, *verdict.causes, *([] if verdict.good else [verdict.answer])]


def peft_merge(zoo: Zoo, kind: str, out: Path, *, stored_in: torch.dtype, merged_in: torch.dtype, safe: bool) -> Path:
    """What ``merge_and_unload`` makes of it."""
    spec = KINDS[kind]
    adapter, base = zoo.adapter(kind), zoo.base(spec.base, stored_in)
    with quiet_loading():
        model = load(base, spec.auto, dtype=merged_in, **spec.loading)
        if spec.prepare:
            spec.prepare(model)
        PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=safe).save_pretrained(out)
    return out


@pytest.mark.parametrize("kind", SOUND)
def test_a_peft_merge_of_a_kind_that_it_gets_right_is_sound(kind: str, zoo: Zoo, tmp_path: Path) -> None:
    """Whatever was added, replaced or scaled, in the dtypes that people use; and no element is only faithful."""
    stored_in, merged_in = SOUND[kind]
    out = peft_merge(
        zoo, kind, tmp_path / "out", stored_in=stored_in, merged_in=merged_in, safe=stored_in == merged_in == BF16
    )
    verdict = check(zoo, kind, out, stored_in)
    assert accusations(verdict) == []
    assert sum(tensor.faithful + tensor.outside for tensor in verdict.tensors) == 0
    assert any(tensor.module for tensor in verdict.tensors)


@pytest.mark.parametrize("kind", UNSOUND)
def test_a_peft_merge_of_a_kind_that_it_gets_wrong_is_told_by_its_cause(kind: str, zoo: Zoo, tmp_path: Path) -> None:
    """The merge is not what was tested: head and embedding share what only one of them should have."""
    out = peft_merge(zoo, kind, tmp_path / "out", stored_in=FP32, merged_in=FP32, safe=False)
    verdict = check(zoo, kind, out, FP32)
    assert verdict.answer == "different"
    assert verdict.causes[0].code == UNSOUND[kind], verdict.causes
    assert [cause.code for cause in verdict.causes].count(UNSOUND[kind]) == 1  # by several levels, and said once


def exact_merge(zoo: Zoo, kind: str, out: Path) -> Path:
    """Our own merge of a float32 base, to be spoilt."""
    return Path(shutil.copytree(zoo.merged(kind, FP32), out))


def rewrite(out: Path, change: Callable[[Tensors], object]) -> None:
    """Change the tensors, and write them to one file, however many they came in."""
    files = sorted(out.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    change(tensors)
    for file in (*files, *out.glob("*.index.json")):
        file.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / WEIGHTS, {"format": "pt"})


def without_magnitude(zoo: Zoo, kind: str) -> Callable[[Tensors], None]:
    """W + s·B·A where the norms should be the trained ones."""
    base = load_file(zoo.base_of(kind) / WEIGHTS)
    factors = load_file(zoo.adapter(kind) / "adapter_model.safetensors")

    def change(tensors: Tensors) -> None:
        for key in [key for key in factors if key.endswith("lora_A.weight")]:
            name = key.removeprefix("base_model.model.").replace("lora_A.", "")
            b = factors[key.replace("lora_A", "lora_B")].double()
            tensors[name] = (base[name].double() + 6 / 4 * b @ factors[key].double()).float()

    return change


def base_for(zoo: Zoo, kind: str, *names: str) -> Callable[[Tensors], None]:
    """The base's own tensors where the adapter's should be."""
    base = load_file(zoo.base_of(kind) / WEIGHTS)
    return lambda tensors: tensors.update({name: base[name] for name in names})


EMBEDDING, NORM, BIAS = "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"

Spoil = Callable[[Zoo, Path], object]
MUTANTS: dict[str, tuple[str, str, Spoil]] = {
    "magnitude-ignored": (
        "dora",
        "cause_magnitude_ignored",
        lambda zoo, out: rewrite(out, without_magnitude(zoo, "dora")),
    ),
    "token-rows-left-out": (
        "tokens",
        "cause_rows_missing",
        lambda zoo, out: rewrite(out, base_for(zoo, "tokens", EMBEDDING)),
    ),
    "saved-norm-left-out": (
        "saved-norms",
        "cause_partly_applied",
        lambda zoo, out: rewrite(out, base_for(zoo, "saved-norms", NORM)),
    ),
    "bias-of-lora-b-left-out": (
        "lora-bias",
        "cause_partly_applied",
        lambda zoo, out: rewrite(out, base_for(zoo, "lora-bias", BIAS)),
    ),
    "head-written-as-the-embedding": (
        "head-tied",
        "cause_tied_head",
        lambda _, out: rewrite(out, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING].clone()})),
    ),
    "head-written-but-declared-tied": (
        "head-tied",
        "cause_tied_head",
        lambda _, out: edit_json(out / "config.json", tie_word_embeddings=True),
    ),
    "vocabulary-size-not-mended": (
        "resized",
        "cause_config",
        lambda _, out: edit_json(out / "config.json", vocab_size=48),
    ),
    "labels-not-mended": (
        "classifier",
        "cause_config",
        lambda _, out: edit_json(out / "config.json", id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}),
    ),
    "class-not-mended": (
        "classifier",
        "cause_config",
        lambda _, out: edit_json(out / "config.json", architectures=["LlamaForCausalLM"]),
    ),
    "layers-not-counted": (
        "replicated",
        "cause_config",
        lambda _, out: edit_json(out / "config.json", num_hidden_layers=2),
    ),
    "new-tokens-cut-off": (
        "resized",
        "cause_vocabulary_short",
        lambda _, out: rewrite(out, lambda tensors: tensors.update({EMBEDDING: tensors[EMBEDDING][:48]})),
    ),
    "vocabulary-padded": (
        "resized",
        "cause_vocabulary_padded",
        lambda _, out: rewrite(
            out, lambda tensors: tensors.update({EMBEDDING: torch.cat([tensors[EMBEDDING], torch.zeros(13, 32)])})
        ),
    ),
    "gate-and-up-of-an-expert-swapped": (
        "mixtral-both",
        "cause_misplaced",
        lambda _, out: rewrite(out, swap("model.layers.0.block_sparse_moe.experts.1.w1.weight", "w1", "w3")),
    ),
    "experts-swapped": (
        "mixtral-both",
        "cause_misplaced",
        lambda _, out: rewrite(
            out, swap("model.layers.0.block_sparse_moe.experts.1.w2.weight", "experts.1", "experts.2")
        ),
    ),
    "a-layer-repeated-that-should-not-be": (
        "replicated",
        "cause_misplaced",
        lambda _, out: rewrite(out, repeat("layers.0.", "layers.2.")),
    ),
}


def repeat(part: str, other: str) -> Callable[[Tensors], None]:
    """Copies of some tensors in others' places."""
    return lambda tensors: tensors.update(
        {name.replace(part, other): tensor.clone() for name, tensor in tensors.items() if part in name}
    )


def swap(name: str, part: str, other: str) -> Callable[[Tensors], None]:
    """Two tensors, each under the other's name."""
    twin = name.replace(part, other)
    return lambda tensors: tensors.update({name: tensors[twin], twin: tensors[name]})


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_spoilt_merge_of_a_kind_is_told_by_its_cause(mutant: str, zoo: Zoo, tmp_path: Path) -> None:
    """What people's tools do with what they do not know."""
    kind, cause, spoil = MUTANTS[mutant]
    out = exact_merge(zoo, kind, tmp_path / "out")
    assert check(zoo, kind, out, FP32).answer == "identical"
    spoil(zoo, out)
    verdict = check(zoo, kind, out, FP32)
    assert verdict.answer == "different"
    assert verdict.causes[0].code == cause, verdict.causes
    assert [found.code for found in verdict.causes].count(cause) == 1


def test_the_share_that_rounding_left_unchanged_is_of_what_was_added(zoo: Zoo) -> None:
    """Three new rows of an embedding are not rounded away, and the others are not said to be."""
    verdict = check(zoo, "tokens", zoo.merged("tokens", FP32), FP32)
    (finding,) = (f for level in verdict.levels for f in level.findings if f.code == "weights_unchanged_share")
    assert finding.params["tensors"] == 4
    assert {tensor.name for tensor in verdict.tensors if tensor.module} > {EMBEDDING}
    assert float(finding.params["share_unchanged"] or 0) < 0.01
