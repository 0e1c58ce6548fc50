"""What cannot be merged truly is refused before a byte is written, and the message names the field or the tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import tunesmith as ts
from tests.oracle import formula
from tests.oracle.bases import rewrite
from tests.oracle.kinds import ATTENTION, Kind
from tests.oracle.zoo import CONFIG, WEIGHTS, Zoo, altered, build_adapter, load, logits_of, relative
from tunesmith.errors import TunesmithError
from tunesmith.models.quiet import quiet_loading

Tensors = dict[str, torch.Tensor]
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def refuse(adapter: Path, base: Path, *, says: str, **options: Any) -> str:
    """Plan a merge that must not be, and hand back what the user is told."""
    out = adapter.parent / "out"
    before = sorted(adapter.parent.rglob("*"))
    with pytest.raises(TunesmithError) as caught:
        ts.plan_merge(adapter, out, base=str(base), **options)
    assert caught.value.exit_code == 2
    assert sorted(adapter.parent.rglob("*")) == before, "something was written"
    text = str(caught.value)
    assert says in text, text
    return text


# Fields of a plain adapter's configuration that change what it means.
FIELDS: dict[str, Any] = {
    "init_lora_weights-pissa": "pissa",
    "init_lora_weights-pissa_niter_4": "pissa_niter_4",
    "init_lora_weights-olora": "olora",
    "init_lora_weights-corda": "corda",
    "init_lora_weights-loftq": "loftq",
    "init_lora_weights-lora_ga": "lora_ga",
    "init_lora_weights-of_a_later_version": "something_new",
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 2},
    "use_qalora": True,
    "use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2},
    "kasa_config": {"beta": 1e-4},
    "monteclora_config": {"n": 8},
    "megatron_config": {"tensor_model_parallel_size": 2},
    "a_field_of_a_later_version": {"truthy": 1},
    "bias": "some",
}


@pytest.mark.parametrize("case", FIELDS)
def test_field_that_changes_the_meaning_is_refused_by_name(zoo: Zoo, tmp_path: Path, case: str) -> None:
    """The tensors look like LoRA's, and are not, or not relative to this base."""
    field = case.split("-")[0]
    adapter = altered(zoo.adapter("plain"), tmp_path / "adapter", **{field: FIELDS[case]})
    refuse(adapter, zoo.base("llama"), says=field)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_residual_adapter_merges_into_the_residual_base(zoo: Zoo, tmp_path: Path, init: str) -> None:
    """Such an initialisation leaves a changed base; with ``base_is_residual`` the formula holds for that one."""
    kind = Kind("llama", {"target_modules": ATTENTION, "init_lora_weights": init})
    live = build_adapter(zoo.base("llama"), tmp_path / "adapter", kind)
    text = refuse(tmp_path / "adapter", zoo.base("llama"), says="init_lora_weights")
    assert "residual" in text  # the way out
    residual = tmp_path / "residual"
    shutil.copytree(zoo.base("llama"), residual)
    tensors = {name.replace(".base_layer", ""): value for name, value in live.get_base_model().state_dict().items()}
    save_file({name: value for name, value in tensors.items() if "lora_" not in name}, residual / "model.safetensors")
    out = tmp_path / "out"
    ts.merge(ts.plan_merge(tmp_path / "adapter", out, base=str(residual), base_is_residual=True))
    adapter = formula.read(tmp_path / "adapter")
    formula.assert_same(formula.read(out), formula.merge(formula.read(residual), adapter, formula.Truth()))
    assert relative(logits_of(load(out, "AutoModelForCausalLM")), logits_of(live)) < 1e-5


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "loftq", "lora_ga"])
def test_residual_base_is_taken_at_the_users_word(zoo: Zoo, tmp_path: Path, init: str) -> None:
    """With ``base_is_residual`` every such adapter is plain LoRA, and no other refusal is lifted."""
    adapter = altered(zoo.adapter("plain"), tmp_path / "adapter", init_lora_weights=init)
    out = tmp_path / "out"
    ts.merge(ts.plan_merge(adapter, out, base=str(zoo.base("llama")), base_is_residual=True))
    formula.assert_same(formula.read(out), formula.read(zoo.merged("plain")))
    (tmp_path / "other").mkdir()
    both = altered(adapter, tmp_path / "other" / "adapter", use_qalora=True)
    refuse(both, zoo.base("llama"), says="use_qalora", base_is_residual=True)


LINEAR = {"target_modules": ["q_proj", "v_proj"]}
VIRTUAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "IA3": ("IA3Config", {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "LOHA": ("LoHaConfig", LINEAR),
    "LOKR": ("LoKrConfig", LINEAR),
    "OFT": ("OFTConfig", {**LINEAR, "oft_block_size": 4}),
    "BOFT": ("BOFTConfig", {**LINEAR, "boft_block_size": 4}),
    "VERA": ("VeraConfig", {**LINEAR, "r": 4}),
    "ADALORA": ("AdaLoraConfig", {**LINEAR, "total_step": 10}),
    "FOURIERFT": ("FourierFTConfig", {**LINEAR, "n_frequency": 8}),
    "LN_TUNING": ("LNTuningConfig", {"target_modules": ["norm"]}),
    "TRAINABLE_TOKENS": ("TrainableTokensConfig", {"token_indices": [1, 2], "target_modules": ["embed_tokens"]}),
    "PROMPT_TUNING": ("PromptTuningConfig", VIRTUAL),
    "PREFIX_TUNING": ("PrefixTuningConfig", VIRTUAL),
    "P_TUNING": ("PromptEncoderConfig", {**VIRTUAL, "encoder_hidden_size": 8}),
    "HRA": ("HRAConfig", {**LINEAR, "r": 4}),
    "MISS": ("MissConfig", {**LINEAR, "r": 4}),
    "RANDLORA": ("RandLoraConfig", {**LINEAR, "r": 4}),
}


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_are_refused_by_name(zoo: Zoo, tmp_path: Path, method: str) -> None:
    """What PEFT itself saves for them; none of it is LoRA, whatever its tensors are called."""
    cls, settings = METHODS[method]
    model = load(zoo.base("llama"), "AutoModelForCausalLM")
    with quiet_loading():
        peft.get_peft_model(model, getattr(peft, cls)(**settings)).save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["peft_type"] == method
    refuse(tmp_path / "adapter", zoo.base("llama"), says=method)


def rename(old: str, new: str) -> Callable[[Tensors], Tensors]:
    """A change of one part of every name."""
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def put(name: str, tensor: torch.Tensor) -> Callable[[Tensors], Tensors]:
    """One more tensor, or another under the name."""
    return lambda tensors: {**tensors, name: tensor}


def without(*names: str) -> Callable[[Tensors], Tensors]:
    """Fewer tensors."""
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


# What a damaged, foreign or contradictory file holds, and which tensor or module the message must name.
TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "module that the base lacks": (rename("layers.1.", "layers.7."), "model.layers.7"),
    "other prefix": (rename("base_model.model.model.", "base_model.model.decoder."), "nearest: model.layers"),
    "stray tensor": (put("base_model.model.model.layers.0.something", torch.ones(3)), "layers.0.something"),
    "stray weight": (put("base_model.model.vision.weight", torch.ones(3, 3)), "vision.weight"),
    "Megatron's fused layer": (rename("self_attn.q_proj", "self_attention.linear_qkv"), "linear_qkv"),
    "A without B": (without(f"{Q_PROJ}.lora_B.weight"), "layers.0.self_attn.q_proj"),
    "B without A": (without(f"{Q_PROJ}.lora_A.weight"), "layers.0.self_attn.q_proj"),
    "the same factor twice": (put(f"{Q_PROJ}.lora_A.default.weight", torch.ones(4, 32)), "q_proj.lora_A.default"),
    "other rank": (put(f"{Q_PROJ}.lora_A.weight", torch.ones(3, 32)), "q_proj"),
    "other input": (put(f"{Q_PROJ}.lora_A.weight", torch.ones(4, 30)), "layers.0.self_attn.q_proj"),
    "other output": (put(f"{Q_PROJ}.lora_B.weight", torch.ones(30, 4)), "layers.0.self_attn.q_proj"),
    "integers": (put(f"{Q_PROJ}.lora_B.weight", torch.ones(32, 4, dtype=torch.int32)), "q_proj"),
    "float8": (put(f"{Q_PROJ}.lora_B.weight", torch.ones(32, 4).to(torch.float8_e4m3fn)), "q_proj"),
    "magnitude without use_dora": (put(f"{Q_PROJ}.lora_magnitude_vector", torch.ones(32)), "q_proj"),
    "KaSA's diagonal": (put(f"{Q_PROJ}.lora_diag", torch.ones(4)), "lora_diag"),
    "AdaLoRA's values": (put(f"{Q_PROJ}.lora_E", torch.ones(4, 1)), "lora_E"),
    "token rows that no field names": (
        put("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", torch.ones(2, 32)),
        "trainable_token_indices",
    ),
    "a bias of lora_B where the layer has none": (put(f"{Q_PROJ}.lora_B.bias", torch.ones(32)), "lora_B.bias"),
    "a norm of another width": (put("base_model.model.model.norm.weight", torch.ones(16)), "model.norm.weight"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensor_without_a_place_is_refused_by_name(zoo: Zoo, tmp_path: Path, case: str) -> None:
    """Every tensor is used once, or the merge does not begin."""
    change, says = TENSORS[case]
    refuse(altered(zoo.adapter("plain"), tmp_path / "adapter", tensors=change), zoo.base("llama"), says=says)


def test_both_halves_of_a_fit_are_named_with_all_that_lack_one(zoo: Zoo, tmp_path: Path) -> None:
    """A model of another size: the message counts the misfits, and says what to do."""
    text = refuse(altered(zoo.adapter("plain"), tmp_path / "adapter"), zoo.base("gemma2"), says="self_attn.q_proj")
    assert "--base" in text


CONTRADICTIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "r that no tensor has": ("plain", {"r": 8}, "r = 8"),
    "use_dora without magnitudes": ("plain", {"use_dora": True}, "magnitude"),
    "indices that are too many": ("tokens", {"trainable_token_indices": [1, 2, 3, 4]}, "trainable_tokens_delta"),
    "indices past the end": ("tokens", {"trainable_token_indices": [1, 2, 48]}, "trainable_token_indices"),
    "one index twice": ("tokens", {"trainable_token_indices": [1, 2, 2]}, "trainable_token_indices"),
    "alpha that is no number": ("plain", {"lora_alpha": "sixteen"}, "lora_alpha"),
    "pattern that is no pattern": ("plain", {"alpha_pattern": {"q_proj(": 2}}, "alpha_pattern"),
    "layers that the base lacks": ("replicated", {"layer_replication": [[0, 2], [1, 3]]}, "layer"),
    "target_parameters of another module": ("mixtral-down", {"target_parameters": ["mlp.experts.wrong"]}, "wrong"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_configuration_that_contradicts_the_tensors_is_refused(zoo: Zoo, tmp_path: Path, case: str) -> None:
    """One of the two is from somewhere else, and nothing says which."""
    kind, changes, says = CONTRADICTIONS[case]
    refuse(altered(zoo.adapter(kind), tmp_path / "adapter", **changes), zoo.base_of(kind), says=says)


def test_lora_bias_on_layers_without_one_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    """The merged model's class has no tensor to put it in."""
    build_adapter(
        zoo.base("llama"), tmp_path / "adapter", Kind("llama", {"target_modules": ATTENTION, "lora_bias": True})
    )
    refuse(tmp_path / "adapter", zoo.base("llama"), says="bias")


def test_invocation_tokens_as_peft_saves_them_are_refused(zoo: Zoo, tmp_path: Path) -> None:
    """An activated LoRA acts after its tokens only."""
    settings = {"target_modules": ATTENTION, "alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"}
    build_adapter(zoo.base("llama"), tmp_path / "adapter", Kind("llama", settings))
    refuse(tmp_path / "adapter", zoo.base("llama"), says="alora_invocation_tokens")


def test_whole_experts_that_the_disk_splits_are_not_added_beside_them(zoo: Zoo, tmp_path: Path) -> None:
    """``modules_to_save=["experts"]`` stores the fused stack, under a name that the base's files do not have."""
    settings = {"target_modules": ATTENTION, "modules_to_save": ["experts"]}
    build_adapter(zoo.base("mixtral"), tmp_path / "adapter", Kind("mixtral", settings))
    refuse(tmp_path / "adapter", zoo.base("mixtral"), says="experts")


@pytest.mark.parametrize("kind", ["embedding-tying", "head-tying"])
def test_tied_sides_that_differ_are_refused(zoo: Zoo, tmp_path: Path, kind: str) -> None:
    """``ensure_weight_tying`` promises one change for both sides; a file that holds two breaks the promise."""
    name = "base_model.model.lm_head.lora_A.weight"
    adapter = altered(zoo.adapter(kind), tmp_path / "adapter", tensors=put(name, torch.ones(4, 32)))
    refuse(adapter, zoo.base_of(kind), says="ensure_weight_tying")


# What PEFT trains, and what no merge of ours would be sure to mean.
UNSURE: dict[str, tuple[dict[str, Any], str]] = {
    # A norm a row in the head, and a norm a column in the embedding: no one tensor is both.
    "DoRA on a tie": (
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "use_dora": True},
        "ensure_weight_tying",
    ),
    "token rows beside the tied head": (
        {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [3, 7]},
        "token rows",
    ),
}


@pytest.mark.parametrize("case", UNSURE)
def test_two_meanings_of_one_tied_tensor_are_refused(zoo: Zoo, tmp_path: Path, case: str) -> None:
    """Head and embedding would have to follow each other, and to differ."""
    settings, says = UNSURE[case]
    build_adapter(zoo.base("llama-tied"), tmp_path / "adapter", Kind("llama-tied", settings))
    refuse(tmp_path / "adapter", zoo.base("llama-tied"), says=says)


@pytest.mark.parametrize(
    ("base", "targets", "auto"),
    [
        ("bert", ["query", "word_embeddings"], "AutoModelForPreTraining"),
        ("gpt-neox-tied", ["query_key_value", "embed_in"], "AutoModelForCausalLM"),
        ("gpt-neox-tied", ["query_key_value", "embed_out"], "AutoModelForCausalLM"),
        ("t5", ["q", "lm_head"], "AutoModelForSeq2SeqLM"),
    ],
)
def test_untying_writes_the_head_that_the_class_has_or_is_refused(
    zoo: Zoo, tmp_path: Path, base: str, targets: list[str], auto: str
) -> None:
    """A tied head that the files do not hold is not called ``lm_head`` everywhere; a loader makes up what it lacks."""
    live = build_adapter(zoo.base(base), tmp_path / "adapter", Kind(base, {"target_modules": targets}, auto=auto))
    out = tmp_path / "out"
    try:
        ts.merge(ts.plan_merge(tmp_path / "adapter", out, base=str(zoo.base(base))))
    except TunesmithError:
        assert not out.exists()
    else:
        assert relative(logits_of(load(out, auto)), logits_of(live)) < 1e-5


def test_new_tensor_that_no_task_explains_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    """A trained ``score`` without ``task_type``: the merged configuration could not say whose it is."""
    kind = Kind(
        "llama",
        {"target_modules": ATTENTION, "modules_to_save": ["score"]},
        auto="AutoModelForSequenceClassification",
        loading={"num_labels": 3},
    )
    build_adapter(zoo.base("llama"), tmp_path / "adapter", kind)
    assert "task_type" in refuse(tmp_path / "adapter", zoo.base("llama"), says="score.weight")


def test_pickled_weights_are_refused_with_the_way_to_convert_them(zoo: Zoo, tmp_path: Path) -> None:
    """A pickle runs code when it is read."""
    adapter = altered(zoo.adapter("plain"), tmp_path / "adapter")
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()
    assert "safe_serialization" in refuse(adapter, zoo.base("llama"), says="pickle")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["plain", "embedding", "saved-head", "tokens", "dora", "lora-bias"])
def test_numbers_that_are_not_finite_are_refused_and_leave_nothing(
    zoo: Zoo, tmp_path: Path, kind: str, value: float
) -> None:
    """A diverged training; the tensor is named, whichever part of the adapter it is in."""

    def spoil(tensors: Tensors) -> Tensors:
        last = {"plain": "lora_B.weight", "embedding": "lora_embedding_B", "saved-head": "lm_head.weight"}
        part = {**last, "tokens": "tokens_delta", "dora": "magnitude_vector", "lora-bias": "lora_B.bias"}[kind]
        name = next(name for name in tensors if name.endswith(part))
        tensors[name].view(-1)[-1] = value
        return tensors

    adapter = altered(zoo.adapter(kind), tmp_path / "adapter", tensors=spoil)
    with pytest.raises(TunesmithError, match=r"NaN|infinity|finite"):
        ts.merge(ts.plan_merge(adapter, tmp_path / "out", base=str(zoo.base_of(kind))))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["fp8", "bitsandbytes", "gptq", "awq", "mxfp4", "compressed-tensors"])
def test_quantized_base_is_refused_with_the_way_out(zoo: Zoo, tmp_path: Path, method: str) -> None:
    """A merge into it would quantize every weight again."""
    shutil.copytree(zoo.base("llama"), tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": method}}))
    adapter = altered(zoo.adapter("plain"), tmp_path / "adapter")
    assert "full-precision" in refuse(adapter, tmp_path / "base", says="quantization_config")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
def test_base_that_stores_a_target_in_a_quantized_form_is_refused(zoo: Zoo, tmp_path: Path, dtype: torch.dtype) -> None:
    """The configuration may keep silent about it; the file's own dtype does not."""
    shutil.copytree(zoo.base("llama"), tmp_path / "base")
    rewrite(tmp_path / "base" / "model.safetensors", str, dtype=dtype)
    adapter = altered(zoo.adapter("plain"), tmp_path / "adapter")
    text = refuse(adapter, tmp_path / "base", says="self_attn.q_proj")
    assert "full-precision" in text
