"""What a recipe means to TRL, PEFT and bitsandbytes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tunesmith.errors import RecipeError
from tunesmith.train import Recipe
from tunesmith.train.arguments import (
    PassedOn,
    attention_implementation,
    complete_schedule,
    lora_config,
    loraplus_optimizer,
    quantization_config,
    rows_a_pass,
    training_arguments,
)

REQUIRED = {"model_name_or_path": "demo", "dataset": "data.jsonl", "output_dir": "out"}

# A value for each key that is passed on, none of them its default.
PASSED: dict[str, Any] = {
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "learning_rate": 2e-4,
    "num_train_epochs": 1.5,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr": 1e-6},
    "optim": "adafactor",
    "optim_args": "relative_step=false",
    "weight_decay": 0.01,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 0.5,
    "seed": 7,
    "data_seed": 8,
    "full_determinism": True,
    "torch_empty_cache_steps": 5,
    "average_tokens_across_devices": False,
    "logging_strategy": "epoch",
    "logging_first_step": True,
    "save_total_limit": 2,
    "save_only_model": True,
    "eval_delay": 4,
    "eval_on_start": True,
    "ignore_data_skip": True,
    "dataloader_drop_last": True,
    "dataloader_num_workers": 1,
    "dataloader_persistent_workers": True,
    "dataloader_prefetch_factor": 3,
    "ddp_timeout": 60,
    "ddp_bucket_cap_mb": 5,
    "ddp_broadcast_buffers": True,
    "ddp_static_graph": True,
    "ddp_find_unused_parameters": True,
    "run_name": "first",
    "project": "mine",
    "trackio_space_id": "me/space",
    "trackio_bucket_id": "me/bucket",
    "trackio_static_space_id": "me/static",
}
# Those that depend on the device and the processes, and are tested by themselves.
BY_PLACE = {"tf32", "dataloader_pin_memory", "ddp_backend"}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The libraries warn of each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def recipe(**values: object) -> Recipe:
    """The required keys and these."""
    return Recipe.of(REQUIRED | {"dtype": "float32"} | values)


def arguments(*, evaluates: bool = False, device: str = "cpu", flat: bool = False, **values: object) -> Any:
    """The training arguments of a recipe."""
    return training_arguments(recipe(**values), device=device, evaluates=evaluates, flat=flat)


@pytest.fixture(scope="module")
def model() -> Any:
    """A random llama of two layers, its head a weight of its own."""
    return tiny(tie_word_embeddings=False)


def tiny(**config: Any) -> Any:
    """A random llama of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape, **config))


def test_every_key_that_is_passed_on_arrives() -> None:
    """With its own name and value."""
    assert PASSED.keys() | BY_PLACE == PassedOn.model_fields.keys()
    made = arguments(evaluates=True, val_size=0.5, **PASSED)
    assert {key: getattr(made, key) for key in PASSED} == PASSED
    assert all(getattr(Recipe.of(REQUIRED), key) != value for key, value in PASSED.items())


def test_recipe_of_llamafactory_means_what_it_means_there(tmp_path: Path) -> None:
    """The fields that its own parser sets for these keys, as it printed them."""
    made = arguments(
        evaluates=True,
        output_dir=str(tmp_path),
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        warmup_ratio=0.1,
        logging_steps=10,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        val_size=0.1,
        eval_strategy="steps",
        eval_steps=500,
        per_device_eval_batch_size=1,
        neftune_noise_alpha=5,
        label_smoothing_factor=0.1,
        load_best_model_at_end=True,
        ddp_timeout=180000000,
    )
    theirs = {
        "output_dir": str(tmp_path),
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "lr_scheduler_kwargs": None,
        "warmup_steps": 0.1,
        "num_train_epochs": 3.0,
        "max_steps": -1,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "logging_steps": 10,
        "eval_strategy": "steps",
        "eval_steps": 500,
        "save_strategy": "steps",
        "save_steps": 500,
        "save_total_limit": None,
        "load_best_model_at_end": True,
        "greater_is_better": False,
        "neftune_noise_alpha": 5,
        "label_smoothing_factor": 0.1,
        "seed": 42,
        "data_seed": None,
        "ddp_timeout": 180000000,
        "report_to": [],
        "bf16": False,
        "fp16": False,
    }
    assert {key: getattr(made, key) for key in theirs} == theirs


def test_nothing_is_evaluated_where_nothing_is_held_out() -> None:
    """All held-out rows may turn out to be trained on too; the recipe still trains."""
    asked = {"val_size": 0.5, "eval_strategy": "steps", "load_best_model_at_end": True, "eval_on_start": True}
    made = arguments(evaluates=False, **asked)
    assert (made.eval_strategy, made.load_best_model_at_end, made.eval_on_start) == ("no", False, False)
    assert arguments(evaluates=True, **asked).load_best_model_at_end


def test_evaluations_are_made_where_rows_are_held_out() -> None:
    """Unless the recipe says no; in batches that need no backward pass."""
    made = arguments(evaluates=True, val_size=2, save_steps=30)
    assert (made.eval_strategy, made.eval_steps, made.per_device_eval_batch_size) == ("steps", 30, 32)
    assert arguments(evaluates=True, val_size=2, eval_strategy="no").eval_strategy == "no"
    assert arguments(evaluates=True, val_size=2, eval_strategy="epoch").eval_strategy == "epoch"


def test_order_of_rows_saves_padding_where_there_is_any() -> None:
    """The recipe's word is above that."""
    assert arguments().train_sampling_strategy == "group_by_length"
    assert arguments(flat=True).train_sampling_strategy == "random"
    assert arguments(flat=True, disable_shuffling=True).train_sampling_strategy == "sequential"


@pytest.mark.parametrize(
    ("values", "offered", "expected"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"gradient_checkpointing": True}, False, True),
        ({"disable_gradient_checkpointing": True}, True, False),
    ],
)
def test_gradient_checkpointing_is_by_need_unless_said(
    values: dict[str, object], offered: bool, expected: bool
) -> None:
    """No warning comes of its having two names."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        made = training_arguments(recipe(**values), device="cpu", evaluates=False, gradient_checkpointing=offered)
    assert made.gradient_checkpointing is expected


def test_half_precision_follows_the_decided_dtype() -> None:
    """And what is a GPU's is left out on a CPU."""
    made = arguments(dtype="bfloat16", tf32=True)
    assert (made.bf16, made.fp16, made.use_cpu, made.tf32, made.dataloader_pin_memory) == (
        True,
        False,
        True,
        None,
        False,
    )
    assert not arguments(bf16=True).bf16


def test_processes_look_for_no_unused_parameters() -> None:
    """Every adapted layer is used; looking for others would cost each step."""
    made = training_arguments(recipe(), device="cpu", evaluates=False, world_size=2)
    assert made.ddp_find_unused_parameters is False
    assert arguments().ddp_find_unused_parameters is None


def test_one_process_waits_for_no_other() -> None:
    """A recipe for several trains in one too."""
    assert arguments(ddp_backend="gloo").ddp_backend is None


def test_reporter_that_is_not_installed_is_refused_with_the_command() -> None:
    """Before anything is computed."""
    with pytest.raises(RecipeError) as caught:
        arguments(report_to="wandb,no_such_reporter")
    assert "no_such_reporter" in str(caught.value.found)
    assert "pip install" in str(caught.value.next_step)


@pytest.mark.parametrize("values", [{"optim": "adamw"}, {"optim": "grokadamw"}, {"dataloader_prefetch_factor": 2}])
def test_what_the_trainer_does_not_take_is_the_users_to_mend(values: dict[str, object]) -> None:
    """An optimizer that there is not, one whose package there is not, and what does not go together."""
    with pytest.raises(RecipeError, match="Trainer does not take"):
        arguments(**values)


def test_key_that_an_older_transformers_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than a traceback from its constructor; the order of rows has an older name."""
    import dataclasses

    import trl

    from tunesmith.train import arguments as ours

    lacked = {"trackio_bucket_id", "train_sampling_strategy"}
    fields = [field for field in dataclasses.fields(trl.SFTConfig) if field.name not in lacked]
    older = SimpleNamespace(fields=lambda _: [*fields, SimpleNamespace(name="group_by_length")])
    monkeypatch.setattr(ours, "dataclasses", older)
    with pytest.raises(RecipeError) as caught:
        arguments(trackio_bucket_id="me/bucket")
    assert caught.value.where == "trackio_bucket_id"
    with pytest.raises(RecipeError) as caught:
        arguments(train_sampling_strategy="sequential")
    assert caught.value.where == "train_sampling_strategy"
    with pytest.raises(RecipeError, match="group_by_length"):  # passed on to an SFTConfig that has it no more
        arguments()


def test_schedule_of_three_stages_is_completed() -> None:
    """A third of what the warm-up leaves is stable, as in LLaMA-Factory; what is given stays."""
    made = arguments(lr_scheduler_type="warmup_stable_decay", warmup_steps=10)
    complete_schedule(made, 100)
    assert made.lr_scheduler_kwargs == {"num_stable_steps": 30, "num_decay_steps": 60}
    made = arguments(lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 5})
    complete_schedule(made, 100)
    assert made.lr_scheduler_kwargs == {"num_stable_steps": 33, "num_decay_steps": 5}
    made = arguments(lr_scheduler_type="cosine")
    complete_schedule(made, 100)
    assert made.lr_scheduler_kwargs is None


def test_loraplus_trains_b_faster() -> None:
    """By the ratio; every trained weight is in one group."""
    import peft

    chosen = recipe(loraplus_lr_ratio=16, learning_rate=1e-3, weight_decay=0.1, adam_beta2=0.95)
    model = peft.get_peft_model(tiny(), lora_config(chosen, tiny()))
    made = training_arguments(chosen, device="cpu", evaluates=False)
    optimizer = loraplus_optimizer(chosen, model, made)
    assert optimizer is not None
    names = {id(weight): name for name, weight in model.named_parameters()}
    rates = {
        names[id(weight)]: (group["lr"], group["weight_decay"], group["betas"])
        for group in optimizer.param_groups
        for weight in group["params"]
    }
    assert len(rates) == sum(weight.requires_grad for weight in model.parameters())
    assert {value for name, value in rates.items() if "lora_A" in name} == {(1e-3, 0.1, (0.9, 0.95))}
    assert {value for name, value in rates.items() if "lora_B" in name} == {(16e-3, 0.1, (0.9, 0.95))}
    assert loraplus_optimizer(recipe(), model, made) is None


def adapted(model: Any, **values: object) -> set[str]:
    """The modules that get an adapter; the model is not changed."""
    import copy

    import peft

    made = peft.get_peft_model(copy.deepcopy(model), lora_config(recipe(**values), model))
    return set(made.base_model.targeted_module_names)


LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_all_is_every_linear_layer_but_the_head(model: Any) -> None:
    """What LLaMA-Factory's own search finds in this model."""
    assert {name.rpartition(".")[2] for name in adapted(model)} == LLAMA


def test_all_finds_the_layers_of_gpt2() -> None:
    """Which are no torch.nn.Linear; LLaMA-Factory 0.9.5 finds none."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"vocab_size": 16, "n_embd": 8, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    gpt2 = GPT2LMHeadModel(GPT2Config(**shape))
    assert {name.rpartition(".")[2] for name in adapted(gpt2)} == {"c_attn", "c_proj", "c_fc"}


def test_all_leaves_routers_and_experts_alone() -> None:
    """As LLaMA-Factory 0.9.5 does with transformers 5, where these are no linear layers."""
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    mixtral = MixtralForCausalLM(MixtralConfig(vocab_size=16, num_key_value_heads=2, num_local_experts=2, **shape))
    assert {name.rpartition(".")[2] for name in adapted(mixtral)} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_targets_may_be_ends_of_names(model: Any) -> None:
    """As PEFT matches them; layers and modules can be left out again."""
    whole = "model.layers.1.self_attn.q_proj"
    assert adapted(model, lora_target=whole) == {whole}
    assert len(adapted(model, lora_target="self_attn.q_proj,mlp.up_proj")) == 4
    assert adapted(model, lora_target="q_proj", layers_to_transform=1) == {whole}
    assert adapted(model, lora_target="q_proj,k_proj", exclude_modules="k_proj", layers_to_transform="1") == {whole}
    assert adapted(model, lora_target="lm_head,embed_tokens") == {"lm_head", "model.embed_tokens"}


def test_peft_settings_arrive(model: Any) -> None:
    """By their own names, and LLaMA-Factory's by PEFT's."""
    config = lora_config(
        recipe(
            lora_rank=4,
            lora_alpha=12,
            lora_dropout=0.1,
            use_rslora=True,
            use_dora=True,
            additional_target="embed_tokens,norm",
            rank_pattern={"q_proj": 2},
            alpha_pattern={"q_proj": 6},
            init_lora_weights="gaussian",
            model_revision="v2",
        ),
        model,
    )
    expected = {
        "r": 4,
        "lora_alpha": 12,
        "lora_dropout": 0.1,
        "use_rslora": True,
        "use_dora": True,
        "modules_to_save": ["embed_tokens", "norm"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"q_proj": 6},
        "init_lora_weights": "gaussian",
        "revision": "v2",
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    assert {key: getattr(config, key) for key in expected} == expected


def test_unknown_targets_are_all_named_with_the_nearest(model: Any) -> None:
    """And what there is."""
    with pytest.raises(RecipeError) as caught:
        lora_config(recipe(lora_target="q_prjo,v_proj,query"), model)
    assert caught.value.found == "q_prjo, query"
    assert caught.value.details[0] == "q_prjo: did you mean q_proj?"
    assert "gate_proj" in str(caught.value.expected)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_one_end_of_a_shared_weight_is_refused(target: str) -> None:
    """An adapter on it would change one of two modules that are one weight."""
    with pytest.raises(RecipeError, match="share their weight"):
        lora_config(recipe(lora_target=target), tiny(tie_word_embeddings=True))


def test_other_names_that_the_model_lacks_are_all_named(model: Any) -> None:
    """PEFT would pass over them."""
    wrong = {"additional_target": "embed_token", "exclude_modules": "norms", "target_parameters": "experts.up"}
    with pytest.raises(RecipeError) as caught:
        lora_config(recipe(lora_dropout=0.1, **wrong), model)
    assert [line.partition(":")[0] for line in caught.value.details] == [*wrong, "target_parameters"]
    assert "did you mean embed_tokens?" in caught.value.details[0]


def test_parameters_of_experts_can_be_adapted() -> None:
    """PEFT's ``target_parameters``."""
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    mixtral = MixtralForCausalLM(MixtralConfig(vocab_size=16, num_key_value_heads=2, num_local_experts=2, **shape))
    config = lora_config(recipe(target_parameters="experts.down_proj"), mixtral)
    assert config.target_parameters == ["experts.down_proj"]


def test_quantization_is_as_asked() -> None:
    """In four bits with the recipe's format, in eight, or not at all."""
    assert quantization_config(recipe()) is None
    four = quantization_config(recipe(quantization_bit=4, quantization_type="fp4", double_quantization=False))
    assert four is not None
    assert (four.load_in_4bit, four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == (True, "fp4", False)
    assert str(four.bnb_4bit_compute_dtype) == "torch.float32"
    eight = quantization_config(recipe(quantization_bit=8))
    assert eight is not None
    assert (eight.load_in_8bit, eight.load_in_4bit) == (True, False)


def test_quantization_without_its_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that installs it."""
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(RecipeError, match="not installed") as caught:
        quantization_config(recipe(quantization_bit=4))
    assert "pip install bitsandbytes" in str(caught.value.next_step)


def test_attention_is_as_asked_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise transformers chooses, as in LLaMA-Factory."""
    import transformers.utils

    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: False)
    assert [attention_implementation(recipe(flash_attn=name)) for name in ("auto", "disabled", "sdpa", "fa2")] == [
        None,
        "eager",
        "sdpa",
        None,
    ]
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    assert attention_implementation(recipe(flash_attn="fa2")) == "flash_attention_2"


@pytest.mark.parametrize(
    ("batch", "length", "device", "rows"),
    [
        (4, 139, "cpu", 2), (4, 20, "cpu", 4), (8, 300, "cpu", 1), (6, 100, "cpu", 3), (7, 100, "cpu", 7),
        (4, 139, "cuda", 4),
    ],
)  # fmt: skip
def test_few_rows_a_pass_where_they_keep_the_device_busy(batch: int, length: int, device: str, rows: int) -> None:
    """A divisor of the batch, so that steps, rows and their order stay as they were asked for."""
    recipe = Recipe.of(
        {
            "model_name_or_path": "tiny", "dataset": "rows.json", "output_dir": "out",
            "per_device_train_batch_size": batch, "gradient_accumulation_steps": 3,
        }
    )  # fmt: skip
    assert rows_a_pass(recipe, [length - 1, length + 1], device=device) == rows
    arguments = training_arguments(recipe, device="cpu", evaluates=False, rows_a_pass=rows)
    assert arguments.per_device_train_batch_size == rows
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 3 * batch
    assert arguments.per_device_eval_batch_size == 4 * batch
