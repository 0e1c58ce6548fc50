"""Every key of a LLaMA-Factory recipe is used, harmless or refused, and the reason is said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tunesmith.errors import RecipeError
from tunesmith.train import Recipe
from tunesmith.train.arguments import PassedOn
from tunesmith.train.keys import HARMLESS, REFUSED, SPELLINGS, explain, nearest

# Every key that LLaMA-Factory 0.9.5 takes with transformers 5.6, and its default; from the fields of its five classes
# of arguments.
THEIRS: dict[str, Any] = json.loads((Path(__file__).parent / "llamafactory_keys.json").read_text(encoding="utf-8"))
REQUIRED = {"model_name_or_path": "demo", "dataset": "data.jsonl", "output_dir": "out"}

# Where a recipe that leaves a key out means something else here: no number of the training, but what is shown of it.
OUR_DEFAULTS = {"logging_steps": 5, "eval_strategy": None, "per_device_eval_batch_size": None, "plot_loss": True}
# The same, said in another way: required here, decided later, or folded into one type.
SAME_MEANING = {
    "model_name_or_path",
    "dataset",
    "output_dir",
    "dataset_dir",
    "do_train",
    "packing",
    "lora_alpha",
    "warmup_ratio",
    "report_to",
    "optim",
    "project",
    "gradient_checkpointing",
    "train_sampling_strategy",
}


# Fields that are read through a property or a function of the recipe's own.
READ_AS = {
    "lora_target": "target_modules",
    "model_revision": "base",
    "half_precision": "dtype_note",
    "eval_steps": "evaluation_interval",
}


def uses(**values: object) -> dict[str, str]:
    """What becomes of each key."""
    return {use.key: use.use for use in explain(values, Recipe.model_fields)}


def test_every_key_of_llamafactory_is_classified_once() -> None:
    """None is unknown, and none is said to be two things."""
    places = {key: [key in where for where in (Recipe.model_fields, SPELLINGS, HARMLESS, REFUSED)] for key in THEIRS}
    assert len(places) == 346
    assert [key for key, found in places.items() if found.count(True) != 1] == []


def test_absent_key_means_what_it_means_in_llamafactory() -> None:
    """A recipe is short because its defaults are known."""
    shared = set(THEIRS) & set(Recipe.model_fields) - SAME_MEANING
    ours = {key: Recipe.model_fields[key].get_default() for key in shared}
    assert len(shared) > 60
    assert {key for key in shared if ours[key] != THEIRS[key]} == set(OUR_DEFAULTS)


def test_the_defaults_that_are_ours_are_these() -> None:
    """Each is a trap avoided, and none changes what is trained."""
    found = {key: Recipe.model_fields[key].get_default() for key in OUR_DEFAULTS}
    assert found == OUR_DEFAULTS
    assert all(value != THEIRS[key] for key, value in found.items())


def test_default_of_a_refused_key_is_harmless() -> None:
    """Only what really changes something is refused."""
    defaults = {key: THEIRS[key] for key in THEIRS if key in REFUSED}
    assert len(defaults) > 40
    assert set(uses(**defaults).values()) == {"harmless"}


def test_reasons_are_sentences_without_a_dot() -> None:
    """They stand behind a key and a colon."""
    for reason in [*HARMLESS.values(), *(reason for _, reason in REFUSED.values())]:
        assert len(reason) > 10
        assert not reason.endswith(".")


def test_no_field_is_said_to_be_used_that_nobody_reads() -> None:
    """A field that only the schema knows would be ignored in silence."""
    folder = Path(tunesmith.__file__).parent
    files = [file for room in ("train", "api", "conversations") for file in (folder / room).glob("*.py")]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files if file.name not in ("keys.py", "recipe.py"))
    read = set(re.findall(r"(?:recipe|parsed|before)\.(\w+)|(dtype_note)\(", text))
    names = {name for pair in read for name in pair}
    fields = set(Recipe.model_fields) - set(PassedOn.model_fields) - {"stage", "do_train", "finetuning_type"}
    assert {field for field in fields if READ_AS.get(field, field) not in names} == set()


def test_secrets_are_not_repeated() -> None:
    """Neither in what is written of a recipe nor in an error."""
    secrets = {key: "hf_abc" for key in THEIRS if re.search("token$|api_key|secret|webhook", key)}
    assert len(secrets) >= 7
    explained = explain(secrets, Recipe.model_fields)
    assert {use.value for use in explained} == {"***"}
    assert "hf_abc" not in str(explained)
    with pytest.raises(RecipeError) as caught:
        Recipe.of(secrets | {"lora_rnak": 1})
    assert "hf_abc" not in str(caught.value)


def test_nearest_name_is_named_and_no_wild_guess() -> None:
    """Among all keys, whatever becomes of them."""
    assert nearest("lora_rnak", Recipe.model_fields) == "lora_rank"
    assert nearest("zzz", Recipe.model_fields) is None


def test_notes_go_with_what_asks_for_something() -> None:
    """``bf16: true`` is a wish; ``bf16: false`` is nothing."""
    wish, nothing, plain = explain({"bf16": True, "fp16": False, "seed": 1}, Recipe.model_fields)
    assert (wish.use, "wish" in wish.note) == ("used", True)
    assert nothing.use == "harmless"
    assert (plain.use, plain.note) == ("used", "")


# The keys in which LLaMA-Factory's own examples differ (examples/train_lora, train_qlora and extras), and which of them
# are refused; where none is, the recipe is taken.
SFT = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "trust_remote_code": True,
    "dataset": "identity,alpaca_en_demo",
    "template": "qwen3_nothink",
    "cutoff_len": 2048,
    "max_samples": 1000,
    "overwrite_cache": True,
    "preprocessing_num_workers": 16,
    "dataloader_num_workers": 4,
    "logging_steps": 10,
    "save_steps": 500,
    "plot_loss": True,
    "overwrite_output_dir": True,
    "save_only_model": False,
    "report_to": "none",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1.0e-4,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
    "ddp_timeout": 180000000,
    "resume_from_checkpoint": None,
}
FULL = {"finetuning_type": "full"}
VISION = {"image_max_pixels": 262144, "video_max_pixels": 16384}
SEES = {"freeze_vision_tower": True, "freeze_multi_modal_projector": True, "freeze_language_model": False}
BNB = {"quantization_bit": 4, "quantization_method": "bnb"}
EXAMPLES: dict[str, tuple[dict[str, object], set[str]]] = {
    "train_lora/qwen3_lora_sft": ({}, set()),
    "train_lora/qwen3vl_lora_sft": (VISION, set()),
    "train_lora/mossvl_lora_sft": (VISION | SEES | {"packing": False, "video_fps": 1.0}, set()),
    "train_lora/qwen3_lora_sft_ds3": ({"deepspeed": "examples/deepspeed/ds_z3_config.json"}, {"deepspeed"}),
    "train_lora/qwen3_lora_sft_ray": (
        {"dataset_dir": "REMOTE:llamafactory/demo_data", "ray_num_workers": 4},
        {"dataset_dir"},
    ),
    "train_lora/qwen3_preprocess": ({"tokenized_path": "saves/qwen3-4b/dataset/sft"}, {"tokenized_path"}),
    "train_lora/qwen3_lora_dpo": ({"stage": "dpo", "pref_beta": 0.1, "pref_loss": "sigmoid"}, {"stage"}),
    "train_lora/qwen3_lora_kto": ({"stage": "kto", "pref_beta": 0.1}, {"stage"}),
    "train_lora/qwen3_lora_pretrain": ({"stage": "pt"}, {"stage"}),
    "train_lora/qwen3_lora_reward": ({"stage": "rm"}, {"stage"}),
    "train_qlora/qwen3_lora_sft_otfq": (BNB, set()),
    "train_qlora/qwen3_lora_sft_bnb_npu": (BNB | {"double_quantization": False}, set()),
    "train_qlora/llama3_lora_sft_gptq": ({"model_name_or_path": "org/model-GPTQ"}, set()),
    "extras/fsdp_qlora": ({"quantization_bit": 4}, set()),
    "extras/loraplus": ({"loraplus_lr_ratio": 16.0}, set()),
    "extras/pissa": ({"pissa_init": True, "pissa_iter": 16, "pissa_convert": True}, {"pissa_init", "pissa_convert"}),
    "extras/oft": ({"finetuning_type": "oft", "oft_block_size": 32, "oft_target": "all"}, {"finetuning_type"}),
    "extras/adam_mini": (FULL | {"use_adam_mini": True}, {"finetuning_type", "use_adam_mini"}),
    "extras/apollo": (
        FULL | {"use_apollo": True, "apollo_layerwise": True, "apollo_rank": 128},
        {"finetuning_type", "use_apollo"},
    ),
    "extras/asft": (FULL | {"use_asft_loss": True, "asft_alpha": 0.1}, {"finetuning_type", "use_asft_loss"}),
    "extras/badam": (FULL | {"use_badam": True, "badam_verbose": 2}, {"finetuning_type", "use_badam"}),
    "extras/dft": (FULL | {"use_dft_loss": True}, {"finetuning_type", "use_dft_loss"}),
    "extras/eaft": (FULL | {"use_eaft_loss": True}, {"finetuning_type", "use_eaft_loss"}),
    "extras/fp8": (
        FULL | {"fp8": True, "fp8_backend": "torchao", "fsdp": ["full_shard", "auto_wrap"], "run_name": "fp8"},
        {"finetuning_type", "fp8", "fsdp"},
    ),
    "extras/galore": (FULL | {"use_galore": True, "galore_rank": 128}, {"finetuning_type", "use_galore"}),
    "extras/llama_pro": (
        {"finetuning_type": "freeze", "freeze_trainable_layers": 8, "use_llama_pro": True},
        {"finetuning_type", "use_llama_pro"},
    ),
    "extras/mod": (
        FULL | {"mixture_of_depths": "convert", "optim": "paged_adamw_8bit", "pure_bf16": True, "bf16": False},
        {"finetuning_type", "mixture_of_depths"},
    ),
    "extras/muon": (FULL | {"use_muon": True}, {"finetuning_type", "use_muon"}),
    "extras/nlg_eval": (
        {
            "do_train": None,
            "dataset": None,
            "adapter_name_or_path": "saves/llama3-8b/lora/sft",
            "eval_dataset": "identity",
            "do_predict": True,
            "predict_with_generate": True,
        },
        {"do_train", "dataset", "adapter_name_or_path"},
    ),
    # What its page writes into training_args.yaml, zeros and false left out.
    "webui": (
        {
            "cutoff_len": 2048,
            "enable_thinking": True,
            "flash_attn": "auto",
            "include_num_input_tokens_seen": True,
            "lora_alpha": 16,
            "lora_dropout": 0.1,
            "max_grad_norm": 1.0,
            "optim": "adamw_torch",
            "packing": False,
            "double_quantization": True,
            "quantization_bit": 8,
            "quantization_method": "bnb",
            "val_size": 0.1,
            "eval_strategy": "steps",
            "eval_steps": 100,
            "per_device_eval_batch_size": 2,
        },
        set(),
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_llamafactorys_own_examples_are_taken_or_refused_for_the_right_key(name: str) -> None:
    """Nothing is refused but what is not built in, and all of it at once."""
    changes, refused = EXAMPLES[name]
    values = {key: value for key, value in (REQUIRED | SFT | changes).items() if (key, value) != ("do_train", None)}
    if refused:
        with pytest.raises(RecipeError) as caught:
            Recipe.of(values)
        assert {line.partition(":")[0] for line in caught.value.details} == refused
    else:
        assert {use.key for use in Recipe.of(values).key_uses} == set(values)
