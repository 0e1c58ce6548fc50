"""Variants: each is the model that its name says, whatever was active before."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from tests.tiny_models import TinyRun, build_adapter, build_base, build_tokenizer, edit_json, peft_alone
from tunesmith.errors import (
    AdapterError,
    AdapterMismatchError,
    BaseModelError,
    CheckpointError,
    DataError,
    TunesmithError,
    UnsupportedAdapterError,
)
from tunesmith.models import VariantSet
from tunesmith.progress import Progress

IDS = torch.tensor([[1, 20, 30, 40, 50, 60, 70, 2]])


def logits(model: Any) -> torch.Tensor:
    """Logits (8, vocabulary) of fixed ids."""
    with torch.no_grad():
        return model(input_ids=IDS).logits[0]


def active_logits(variants: VariantSet, name: str) -> torch.Tensor:
    """Logits of fixed ids under a variant."""
    with variants.active(name) as (model, _):
        return logits(model)


def alone(tiny: TinyRun, adapter: Path | None) -> torch.Tensor:
    """The oracle: logits of the base, or of one adapter by plain PEFT, loaded with nothing beside it."""
    model = LlamaForCausalLM.from_pretrained(tiny.base, dtype=torch.float32)
    return logits(model if adapter is None else peft_alone(model, adapter))


def load(tiny: TinyRun, **changes: Any) -> VariantSet:
    """Load the tiny base with what a test changes."""
    return VariantSet.load(**{"base_dir": tiny.base, "adapters": {}, "tokenizer_dir": tiny.base, **changes})


def test_every_adapter_equals_plain_peft_loaded_alone(tiny: TinyRun, variants: VariantSet) -> None:
    """Two adapters with different targets do not see each other."""
    for name, path in tiny.adapters.items():
        assert torch.equal(active_logits(variants, name), alone(tiny, path)), name


def test_base_beside_adapters_equals_the_untouched_base_exactly(tiny: TinyRun, variants: VariantSet) -> None:
    """Also right after an adapter was active."""
    active_logits(variants, "final")
    assert torch.equal(active_logits(variants, "base"), alone(tiny, None))


def test_variants_are_really_different(variants: VariantSet) -> None:
    """Otherwise the tests above prove nothing."""
    base, final, other = (active_logits(variants, name) for name in ("base", "final", "checkpoint-10"))
    assert (base - final).abs().max() > 0.1
    assert (final - other).abs().max() > 0.1


def test_a_full_model_is_loaded_with_its_own_weights(variants: VariantSet) -> None:
    """The merged model answers as the live adapter does, up to float32 rounding."""
    torch.testing.assert_close(
        active_logits(variants, "merged"), active_logits(variants, "final"), rtol=1e-4, atol=1e-3
    )


def test_a_full_model_is_loaded_with_its_own_tokenizer(tiny: TinyRun, tmp_path: Path) -> None:
    """A merged directory may ship another chat template, and that is the one it is to be tested with."""
    merged = shutil.copytree(tiny.merged, tmp_path / "merged")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "other"
    tokenizer.save_pretrained(merged)
    variants = load(tiny, full={"merged": merged})
    with variants.active("merged") as (_, tokenizer), variants.active("base") as (_, base_tokenizer):
        assert tokenizer.chat_template == "other"
        assert base_tokenizer.chat_template != "other"


def test_full_models_stay_within_the_budget_and_the_least_lately_used_goes(tiny: TinyRun, tmp_path: Path) -> None:
    """Two fit: the third takes the place of the one that was used before the other."""
    paths = {name: shutil.copytree(tiny.merged, tmp_path / name) for name in ("one", "two", "three")}
    size = sum(tensor.nbytes for tensor in load_file(tiny.merged / "model.safetensors").values())
    variants = load(tiny, full=paths, memory_budget_bytes=2 * size)
    assert variants.full_bytes == (0, 2 * size)
    models = {}
    for name in ("one", "two", "one", "three"):
        with variants.active(name) as (model, _):
            assert models.setdefault(name, model) is model, name
    assert variants.full_bytes == (2 * size, 2 * size)
    with variants.active("one") as (model, _):
        assert model is models["one"]
    with variants.active("two") as (model, _):
        assert model is not models["two"]


def test_a_full_model_over_the_budget_is_loaded_alone(tiny: TinyRun, tmp_path: Path) -> None:
    """What is asked for is given: the others go, and the one before it too."""
    variants = load(
        tiny, full={"one": tiny.merged, "two": shutil.copytree(tiny.merged, tmp_path / "two")}, memory_budget_bytes=1
    )
    with variants.active("one") as (one, _):
        pass
    with variants.active("one") as (again, _):
        assert again is one
    with variants.active("two") as (two, _):
        assert two is not one
    with variants.active("one") as (reloaded, _):
        assert reloaded is not one


def test_an_exception_leaves_the_variant_that_was_active_before(tiny: TinyRun, variants: VariantSet) -> None:
    """Nested, in both directions."""
    with variants.active("final") as (model, _):
        for inner in ("base", "checkpoint-10", "merged"):
            with pytest.raises(ZeroDivisionError), variants.active(inner):
                raise ZeroDivisionError
            assert torch.equal(logits(model), alone(tiny, tiny.adapters["final"])), inner
    with variants.active("base") as (model, _):
        with pytest.raises(ZeroDivisionError), variants.active("final"):
            raise ZeroDivisionError
        assert torch.equal(logits(model), alone(tiny, None))


def test_an_unknown_variant_is_refused_and_the_known_ones_named(variants: VariantSet) -> None:
    """The message is enough to choose another."""
    with pytest.raises(DataError, match="base, final, checkpoint-10, merged"), variants.active("nope"):
        pass


def test_everything_stays_frozen_and_in_eval_mode(variants: VariantSet) -> None:
    """PEFT would let the active adapter train."""
    for name in variants.names:
        with variants.active(name) as (model, _):
            assert not model.training
            assert not any(weight.requires_grad for weight in model.parameters()), name
            assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_another_thread_waits_for_the_active_variant(tiny: TinyRun, variants: VariantSet) -> None:
    """A server's threads cannot switch the variant under each other's feet."""
    entered = threading.Event()
    result: list[torch.Tensor] = []

    def other() -> None:
        with variants.active("base") as (model, _):
            entered.set()
            result.append(logits(model))

    with variants.active("final") as (model, _):
        thread = threading.Thread(target=other)
        thread.start()
        assert not entered.wait(0.2)
        assert torch.equal(logits(model), alone(tiny, tiny.adapters["final"]))
    thread.join()
    assert torch.equal(result[0], alone(tiny, None))


def test_modules_to_save_belong_to_their_adapter_alone(tiny: TinyRun, tmp_path: Path) -> None:
    """An adapter with its own head, one without, and the base, all correct beside each other in both orders."""
    head = build_adapter(tiny.base, tmp_path / "head", seed=3, modules_to_save=["lm_head"])
    plain = tiny.adapters["final"]
    for adapters in ({"head": head, "plain": plain}, {"plain": plain, "head": head}):
        variants = load(tiny, adapters=adapters)
        for name in (*adapters, *reversed(adapters)):
            assert torch.equal(active_logits(variants, name), alone(tiny, adapters[name])), name
            assert torch.equal(active_logits(variants, "base"), alone(tiny, None)), name


@pytest.mark.parametrize("config", [{"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 7}}])
def test_lora_kinds_equal_plain_peft(tiny: TinyRun, tmp_path: Path, config: dict[str, Any]) -> None:
    """The config's semantics are PEFT's own."""
    adapter = build_adapter(tiny.base, tmp_path / "adapter", seed=4, **config)
    variants = load(tiny, adapters={"a": adapter})
    assert torch.equal(active_logits(variants, "a"), alone(tiny, adapter))
    assert torch.equal(active_logits(variants, "base"), alone(tiny, None))


def test_float32_adapter_weights_keep_every_bit_on_a_bfloat16_base(tiny: TinyRun) -> None:
    """The adapter's own dtype does not lose precision to the base's."""
    variants = load(tiny, adapters={"final": tiny.adapters["final"]}, dtype="bf16")
    assert variants.dtype == "bfloat16"
    saved = load_file(tiny.adapters["final"] / "adapter_model.safetensors")
    with variants.active("final") as (model, _):
        loaded = {name: weight for name, weight in model.named_parameters() if "lora_" in name}
        assert {weight.dtype for name, weight in model.named_parameters() if "lora_" not in name} == {torch.bfloat16}
    assert len(loaded) == len(saved)
    for name, weight in loaded.items():
        assert torch.equal(weight, saved["base_model.model." + name.replace(".variant0", "")]), name


def test_two_variants_of_one_name_are_refused(tiny: TinyRun) -> None:
    """``base`` counts too."""
    with pytest.raises(DataError, match="same name"):
        load(tiny, adapters={"base": tiny.adapters["final"]})
    with pytest.raises(DataError, match="same name"):
        load(tiny, adapters={"final": tiny.adapters["final"]}, full={"final": tiny.merged})


def test_a_missing_base_weight_is_an_error_and_never_random(tiny: TinyRun, tmp_path: Path) -> None:
    """Transformers would initialise it at random and say so in a log line."""
    base = shutil.copytree(tiny.base, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    weights["stray.weight"] = torch.zeros(2)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseModelError) as caught:
        load(tiny, base_dir=base)
    assert "missing: model.layers.1.mlp.up_proj.weight" in str(caught.value)
    assert "not part of the model: stray.weight" in str(caught.value)


def test_a_base_weight_of_another_shape_is_named_with_both_shapes(tiny: TinyRun, tmp_path: Path) -> None:
    """Expected against found."""
    base = shutil.copytree(tiny.base, tmp_path / "base")
    edit_json(base / "config.json", intermediate_size=96)
    with pytest.raises(BaseModelError, match=r"\(96, 64\).*\(128, 64\)"):
        load(tiny, base_dir=base)


def test_a_base_with_untied_head_missing_is_refused(tiny: TinyRun, tmp_path: Path) -> None:
    """The config says that the head is its own tensor, and the file has none."""
    base = shutil.copytree(tiny.base, tmp_path / "base")
    edit_json(base / "config.json", tie_word_embeddings=False)
    with pytest.raises(BaseModelError, match="lm_head"):
        load(tiny, base_dir=base)


def test_a_truncated_weights_file_is_a_tunesmith_error(tiny: TinyRun, tmp_path: Path) -> None:
    """Safetensors' own exception does not escape."""
    merged = shutil.copytree(tiny.merged, tmp_path / "merged")
    file = merged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    variants = load(tiny, full={"merged": merged})
    with pytest.raises(CheckpointError, match="cannot be loaded"), variants.active("merged"):
        pass


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "tokenizer.json", "config.json"])
def test_broken_files_are_tunesmith_errors_that_name_the_directory(tiny: TinyRun, tmp_path: Path, file: str) -> None:
    """The libraries raise bare exceptions for some of them."""
    base = shutil.copytree(tiny.base, tmp_path / "base")
    adapter = shutil.copytree(tiny.adapters["final"], tmp_path / "adapter")
    broken = next(path / file for path in (base, adapter) if (path / file).exists())
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(TunesmithError, match=str(broken.parent)):
        load(tiny, base_dir=base, adapters={"a": adapter}, tokenizer_dir=base)


def test_absent_directories_and_files_are_named(tiny: TinyRun, tmp_path: Path) -> None:
    """Each with the error of its kind."""
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(BaseModelError, match=path.name):
            load(tiny, base_dir=path)
        with pytest.raises(AdapterError, match=path.name):
            load(tiny, adapters={"a": path})
        with pytest.raises(CheckpointError, match=path.name):
            load(tiny, tokenizer_dir=path)


def test_an_adapter_without_weights_or_with_a_broken_config_is_refused(tiny: TinyRun, tmp_path: Path) -> None:
    """PEFT would go and look for them on the hub."""
    adapter = shutil.copytree(tiny.adapters["final"], tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").rename(tmp_path / "weights")
    with pytest.raises(AdapterError, match="lacks a file"):
        load(tiny, adapters={"a": adapter})
    (tmp_path / "weights").rename(adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="config"):
        load(tiny, adapters={"a": adapter})


def test_an_adapter_of_another_base_is_refused(tiny: TinyRun, tmp_path: Path) -> None:
    """Shapes that do not fit, and modules that do not exist."""
    build_base(tmp_path / "wide", hidden_size=32)
    with pytest.raises(AdapterMismatchError, match=r"size mismatch|shape"):
        load(tiny, base_dir=tmp_path / "wide", adapters={"final": tiny.adapters["final"]})
    adapter = shutil.copytree(tiny.adapters["final"], tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", target_modules=["no_such_module"])
    with pytest.raises(AdapterMismatchError, match="no_such_module"):
        load(tiny, adapters={"a": adapter})


def test_missing_and_left_over_adapter_tensors_are_all_named(tiny: TinyRun, tmp_path: Path) -> None:
    """PEFT warns of the first and ignores the second, which would be half an adapter."""
    adapter = shutil.copytree(tiny.adapters["final"], tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    moved = weights.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight")
    weights["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = moved
    save_file(weights, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterMismatchError) as caught:
        load(tiny, adapters={"a": adapter})
    assert "layers.0.self_attn.q_proj.lora_A" in str(caught.value)
    assert "layers.9.self_attn.q_proj.lora_A" in str(caught.value)


def test_an_adapter_that_overwrites_base_weights_is_refused(tiny: TinyRun, tmp_path: Path) -> None:
    """Saved embeddings that are not in modules_to_save would land in the base, and it would be the base no more."""
    adapter = shutil.copytree(tiny.adapters["final"], tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    embeddings = load_file(tiny.base / "model.safetensors")["model.embed_tokens.weight"]
    weights["base_model.model.model.embed_tokens.weight"] = embeddings + 1
    save_file(weights, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedAdapterError, match="weights of the base itself"):
        load(tiny, adapters={"a": adapter})


@pytest.mark.parametrize("change", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}])
def test_an_adapter_whose_initialisation_changes_the_base_is_refused(
    tiny: TinyRun, tmp_path: Path, change: dict[str, Any]
) -> None:
    """PiSSA and OLoRA subtract their start from the base's weights on loading; they are refused before that."""
    adapter = shutil.copytree(tiny.adapters["final"], tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", **change)
    with pytest.raises(UnsupportedAdapterError, match=r"pissa|olora"):
        load(tiny, adapters={"a": adapter})


def test_an_adapter_that_repeats_the_bases_own_embedding_is_taken(tmp_path: Path) -> None:
    """PEFT saves it beside an adapted one; written again with what it holds, it is the base's still."""
    build_base(tmp_path / "base", tie_word_embeddings=False)
    adapter = build_adapter(tmp_path / "base", tmp_path / "adapter", seed=1, target_modules=["embed_tokens", "q_proj"])
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    (own,) = [key for key in weights if key.endswith("embed_tokens.base_layer.weight")]
    variants = VariantSet.load(tmp_path / "base", adapters={"a": adapter}, tokenizer_dir=tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert torch.equal(active_logits(variants, "base"), logits(model))
    assert torch.equal(active_logits(variants, "a"), logits(peft_alone(model, adapter)))
    weights[own][3, 3] += 0.5
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UnsupportedAdapterError, match="changes weights of the base"):
        VariantSet.load(tmp_path / "base", adapters={"a": adapter}, tokenizer_dir=tmp_path / "base")


def test_an_adapter_with_biases_is_refused(tmp_path: Path) -> None:
    """PEFT trains the base's own biases, so base and adapter cannot both be in memory once."""
    build_base(tmp_path / "base", attention_bias=True)
    adapter = build_adapter(tmp_path / "base", tmp_path / "adapter", seed=1, bias="lora_only")
    with pytest.raises(AdapterError, match="bias"):
        VariantSet.load(tmp_path / "base", adapters={"a": adapter}, tokenizer_dir=tmp_path / "base")


def test_other_peft_methods_are_refused(tiny: TinyRun, tmp_path: Path) -> None:
    """They are read, named, and not run."""
    adapter = shutil.copytree(tiny.adapters["final"], tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", peft_type="IA3")
    with pytest.raises(UnsupportedAdapterError, match="IA3"):
        load(tiny, adapters={"a": adapter})


def test_a_full_directory_that_also_holds_an_adapter_is_refused(tiny: TinyRun, tmp_path: Path) -> None:
    """Transformers would put the adapter on the model without a word."""
    merged = shutil.copytree(tiny.merged, tmp_path / "merged")
    for file in tiny.adapters["final"].glob("adapter_*"):
        shutil.copy(file, merged)
    variants = load(tiny, full={"merged": merged})
    with pytest.raises(CheckpointError, match="adapter"), variants.active("merged"):
        pass


def test_loading_says_nothing_and_reports_progress(tiny: TinyRun, capfd: pytest.CaptureFixture[str]) -> None:
    """No bars and no advice on stderr."""
    seen: list[Progress] = []
    variants = load(tiny, adapters=tiny.adapters, full={"merged": tiny.merged}, progress=seen.append)
    active_logits(variants, "merged")
    assert capfd.readouterr() == ("", "")
    assert [step.done for step in seen] == [0, 1, 2, 3]
    assert {(step.stage, step.total, step.unit) for step in seen} == {("load", 3, "models")}


def test_a_base_changed_behind_autograds_back_is_noticed(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sabotage: were OLoRA's initialisation let through, the base would no longer be the base, and that shows."""
    adapter = shutil.copytree(tiny.adapters["final"], tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", init_lora_weights="olora")
    monkeypatch.setattr("tunesmith.models.loading.PLAIN_INITS", ("olora",))
    with pytest.raises(UnsupportedAdapterError, match="weights of the base itself"):
        load(tiny, adapters={"a": adapter})


def live_tensors(variants: VariantSet) -> set[int]:
    """The storage of every parameter in memory, adapters included."""
    with variants.active("base") as (model, _):
        return {weight.data_ptr() for weight in model.parameters()}


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_attached_adapters_come_and_go_one_after_another(tiny: TinyRun, tmp_path: Path, config: dict[str, Any]) -> None:
    """Each is plain PEFT's while it is there, beside one that stays; then nothing of it is left in memory."""
    other = build_adapter(tiny.base, tmp_path / "other", seed=5, **config)
    for adapters in ({}, {"stays": tiny.adapters["checkpoint-10"]}):
        variants = load(tiny, adapters=adapters)
        tensors = len(live_tensors(variants))
        for path in (other, tiny.adapters["final"], other):
            with variants.attached("guest", path) as guest:
                assert variants.variants[-1] == guest
                assert torch.equal(active_logits(variants, "guest"), alone(tiny, path))
                assert len(live_tensors(variants)) > tensors
            assert variants.names == ("base", *adapters)
            assert len(live_tensors(variants)) == tensors
            assert torch.equal(active_logits(variants, "base"), alone(tiny, None))
            for name, adapter in adapters.items():
                assert torch.equal(active_logits(variants, name), alone(tiny, adapter))


def test_attached_token_rows_come_and_go(tiny: TinyRun, tmp_path: Path) -> None:
    """PEFT cannot have them beside an adapter without; alone, and after one, it can."""
    rows = build_adapter(tiny.base, tmp_path / "rows", seed=5, trainable_token_indices=[40, 41])
    variants = load(tiny)
    for path in (rows, tiny.adapters["final"], rows):
        with variants.attached("guest", path):
            assert torch.equal(active_logits(variants, "guest"), alone(tiny, path))
        assert torch.equal(active_logits(variants, "base"), alone(tiny, None))


def test_an_attached_adapter_goes_after_an_exception_too(tiny: TinyRun) -> None:
    """A cancelled work leaves the set as it was, and the name is free again."""
    variants = load(tiny)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), variants.attached("guest", tiny.adapters["final"]):
            raise ZeroDivisionError
        assert variants.names == ("base",)
        with pytest.raises(DataError, match="no such variant"), variants.active("guest"):
            pass
    assert torch.equal(active_logits(variants, "base"), alone(tiny, None))


def test_an_adapter_that_cannot_be_attached_leaves_nothing(tiny: TinyRun, tmp_path: Path) -> None:
    """Of another base, or by a name that is taken; what was there answers as before."""
    build_base(tmp_path / "wide", hidden_size=32)
    misfit = build_adapter(tmp_path / "wide", tmp_path / "misfit", seed=1)
    variants = load(tiny, adapters={"final": tiny.adapters["final"]})
    tensors = len(live_tensors(variants))
    with pytest.raises(AdapterMismatchError), variants.attached("guest", misfit):
        pass
    with pytest.raises(DataError, match="same name"), variants.attached("final", misfit):
        pass
    assert variants.names == ("base", "final")
    assert len(live_tensors(variants)) == tensors
    assert torch.equal(active_logits(variants, "final"), alone(tiny, tiny.adapters["final"]))
