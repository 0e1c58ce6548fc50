"""Bases whose files are not as plain as a fresh ``save_pretrained`` leaves them, and adapters that hold more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tunesmith as ts
from tests.merge.exact import round_tensor
from tests.oracle import formula
from tests.oracle.bases import rewrite
from tests.oracle.kinds import ATTENTION, KINDS, LINEAR, Kind
from tests.oracle.zoo import Zoo, build_adapter, load, logits_of, relative
from tunesmith.errors import TunesmithError
from tunesmith.models.quiet import quiet_loading

AUTO = "AutoModelForCausalLM"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def with_head(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied base whose file holds the head as well, as many on the hub do."""
    directory = tmp_path_factory.mktemp("with-head") / "base"
    shutil.copytree(zoo.base("llama-tied"), directory)
    tensors = load_file(directory / "model.safetensors")
    save_file({**tensors, HEAD: tensors[EMBEDDING].clone()}, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


TIED = [kind for kind, made in KINDS.items() if made.base == "llama-tied" and made.auto == AUTO]


@pytest.mark.parametrize("kind", TIED)
def test_a_head_that_a_tied_base_holds_never_goes_stale(zoo: Zoo, with_head: Path, tmp_path: Path, kind: str) -> None:
    """A loader may take such a head at its word: it is what the model means, or it is not there."""
    out = tmp_path / "out"
    ts.merge(ts.plan_merge(zoo.adapter(kind), out, base=str(with_head)))
    expected = formula.read(zoo.merged(kind))
    found = formula.read(out)
    head = found.pop(HEAD, None)
    if HEAD in expected:
        assert head is not None
        assert torch.equal(head, expected.pop(HEAD))
    elif head is not None:
        assert torch.equal(head, expected[EMBEDDING])
    formula.assert_same(found, expected)
    assert relative(logits_of(load(out, AUTO)), logits_of(zoo.live(kind))) < 1e-5


def test_a_model_without_head_binds_to_a_file_with_one(zoo: Zoo, tmp_path: Path) -> None:
    """An embedding model is trained through ``AutoModel``: its modules lack the file's ``model.``."""
    base, adapter, out = zoo.base("llama"), tmp_path / "adapter", tmp_path / "out"
    kind = Kind("llama", {"target_modules": LINEAR, "task_type": "FEATURE_EXTRACTION"}, auto="AutoModel")
    live = build_adapter(base, adapter, kind)
    assert "base_model.model.layers.0.self_attn.q_proj.lora_A.weight" in formula.read(adapter)
    ts.merge(ts.plan_merge(adapter, out, base=str(base)))
    truth = formula.Truth(disk=lambda module: f"model.{module}")
    formula.assert_same(formula.read(out), formula.merge(formula.read(base), formula.read(adapter), truth))
    ids = torch.arange(1, 13).reshape(1, -1)
    with torch.no_grad():
        ours = load(out, "AutoModel")(input_ids=ids).last_hidden_state.double()
        assert relative(ours, live(input_ids=ids).last_hidden_state.double()) < 1e-5


@pytest.mark.parametrize(("auto", "tower"), [("CLIPVisionModel", "vision_model"), ("CLIPTextModel", "text_model")])
def test_an_adapter_of_one_tower_never_lands_in_the_other(zoo: Zoo, tmp_path: Path, auto: str, tower: str) -> None:
    """Both towers have layers of the same names and shapes, and the adapter's names do not say which tower is meant."""
    base, adapter, out = zoo.base("clip"), tmp_path / "adapter", tmp_path / "out"
    build_adapter(base, adapter, Kind("clip", {"target_modules": ["q_proj", "fc1"]}, auto=auto))
    assert not any(tower in name for name in formula.read(adapter))
    try:
        ts.merge(ts.plan_merge(adapter, out, base=str(base)))
    except TunesmithError:
        assert not out.exists()
    else:
        before, after = formula.read(base), formula.read(out)
        assert {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])} == {tower}


@pytest.mark.parametrize("base", ["llama", "llama-tied"])
def test_embeddings_that_were_saved_untouched_change_nothing(zoo: Zoo, tmp_path: Path, base: str) -> None:
    """``save_embedding_layers=True`` puts the base's own embedding and head into the adapter's file."""
    adapter = tmp_path / "adapter"
    live = build_adapter(zoo.base(base), adapter, Kind(base, {"target_modules": ATTENTION}))
    with quiet_loading():
        live.save_pretrained(adapter, save_embedding_layers=True)
    assert f"base_model.model.{EMBEDDING}" in formula.read(adapter)
    plan = ts.plan_merge(adapter, tmp_path / "out", base=str(zoo.base(base)))
    assert not plan.binding.config
    ts.merge(plan)
    before, after = formula.read(zoo.base(base)), formula.read(tmp_path / "out")
    assert before.keys() == after.keys()
    assert {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])} == set(ATTENTION)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["plain", "dora", "embedding-head", "mixtral-both"])
def test_base_of_another_dtype_keeps_it(zoo: Zoo, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """The result is rounded once to whatever the base's tensor is stored in; float64 not at all."""
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(zoo.base_of(kind), base)
    rewrite(base / "model.safetensors", str, dtype=dtype)
    ts.merge(ts.plan_merge(zoo.adapter(kind), out, base=str(base)))
    found = formula.read(out)
    expected = formula.merge(formula.read(base), formula.read(zoo.adapter(kind)), KINDS[kind].truth)
    if dtype == torch.float64:
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    else:
        formula.assert_same(found, expected)


@pytest.mark.parametrize("rounding", ["nearest", "faithful"])
def test_base_of_mixed_dtypes_keeps_each(zoo: Zoo, tmp_path: Path, rounding: str) -> None:
    """Norms in float32 beside weights in bf16 are common, and stay so, trained or not."""
    base, out, adapter = tmp_path / "base", tmp_path / "out", zoo.adapter("saved-norms")
    shutil.copytree(zoo.base("llama"), base)
    mixed = {n: t if "norm" in n else t.to(torch.bfloat16) for n, t in formula.read(base).items()}
    save_file(mixed, base / "model.safetensors", metadata={"format": "pt"})
    ts.merge(ts.plan_merge(adapter, out, base=str(base), rounding=rounding))
    found, exact = formula.read(out), formula.read(zoo.merged("saved-norms"))
    low = formula.read(zoo.merged("saved-norms", torch.bfloat16, rounding=rounding))
    formula.assert_same(found, {name: exact[name] if "norm" in name else low[name] for name in found})


def test_replicated_layers_bring_their_types(zoo: Zoo, tmp_path: Path) -> None:
    """Gemma's layers are of two kinds in turn, and the configuration lists them one by one."""
    kind = Kind("gemma2", {"target_modules": ATTENTION, "layer_replication": [[0, 2], [1, 2], [0, 1]]})
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    build_adapter(zoo.base("gemma2"), adapter, kind)
    ts.merge(ts.plan_merge(adapter, out, base=str(zoo.base("gemma2"))))
    types = json.loads((zoo.base("gemma2") / "config.json").read_text())["layer_types"]
    config = json.loads((out / "config.json").read_text())
    assert len(set(types)) == 2
    assert config["layer_types"] == [types[0], types[1], types[1], types[0]]
    truth = formula.Truth(layers=[0, 1, 1, 0])
    expected = formula.merge(formula.read(zoo.base("gemma2")), formula.read(adapter), truth)
    formula.assert_same(formula.read(out), expected)
    logits_of(load(out, AUTO))


def test_rounding_of_the_oracle_is_the_exact_one() -> None:
    """``formula.round_once`` is fast; the rationals of ``tests.merge.exact`` are slow and sure."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4000, generator=generator, dtype=torch.float64) * 10.0 ** torch.randint(-12, 4, (4000,))
    ties = torch.randint(1, 512, (2000,), generator=generator).double() * 2.0 ** torch.randint(-30, 6, (2000,))
    for name, dtype in {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}.items():
        for numbers in (values, ties, -ties):
            assert torch.equal(formula.round_once(numbers, dtype), round_tensor(numbers, name)), name


UNLIKE = {
    "neither": {"target_modules": LINEAR},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("case", UNLIKE)
def test_a_head_that_differs_from_the_embedding_it_is_tied_to(zoo: Zoo, tmp_path: Path, case: str) -> None:
    """The configuration says tied and the file says not.

    transformers 4 believes the one and transformers 5 the other, so the merge is what the model that was tuned does,
    or it is refused.
    """
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(zoo.base("llama-tied"), base)
    tensors = load_file(base / "model.safetensors")
    head = tensors[EMBEDDING].flip(0).contiguous()
    save_file({**tensors, HEAD: head}, base / "model.safetensors", metadata={"format": "pt"})
    live = build_adapter(base, tmp_path / "adapter", Kind("llama-tied", UNLIKE[case]))
    try:
        ts.merge(ts.plan_merge(tmp_path / "adapter", out, base=str(base)))
    except TunesmithError:
        assert case != "neither"
        assert not out.exists()
    else:
        assert relative(logits_of(load(out, AUTO)), logits_of(live)) < 1e-5


@pytest.mark.parametrize(
    "kind", ["gpt2-head-tied", "gpt2-resized", "gemma3-embedding", "qwen2-vl-head-tied", "qwen2-vl-embedding-tied"]
)
def test_a_configuration_that_is_silent_about_the_tie(zoo: Zoo, tmp_path: Path, kind: str) -> None:
    """Older files leave out what is their class's default; a file without a head says it as well."""
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(zoo.base_of(kind), base)
    config = json.loads((base / "config.json").read_text())
    for section in (config, config.get("text_config", {})):
        section.pop("tie_word_embeddings", None)
    (base / "config.json").write_text(json.dumps(config))
    ts.merge(ts.plan_merge(zoo.adapter(kind), out, base=str(base)))
    assert relative(logits_of(load(out, KINDS[kind].auto)), logits_of(zoo.live(kind))) < 1e-5
