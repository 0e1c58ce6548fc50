"""Every key that a LLaMA-Factory recipe may hold and :class:`tunesmith.train.recipe.Recipe` has no field for.

A key of a recipe is *used*, *harmless* or *refused*.  The fields of ``Recipe`` and the spellings in ``SPELLINGS`` are
used; here are the others, each with the reason.  What is in none of the three is unknown and refused.

Source: the argument classes of LLaMA-Factory 0.9.5, ``TrainingArguments`` of transformers 5.6 among them, and the
names that transformers 4 had besides.
"""

from __future__ import annotations

import difflib
from collections.abc import Container, Iterable, Mapping
from typing import Literal

from tunesmith.record import Part

Use = Literal["used", "harmless", "refused"]

# Used: a key that, where it is true, is another word for a field's value.
SPELLINGS: dict[str, tuple[str, object]] = {
    "bf16": ("half_precision", "bfloat16"),
    "pure_bf16": ("half_precision", "bfloat16"),
    "fp16": ("half_precision", "float16"),
    "neat_packing": ("packing", True),
    "disable_shuffling": ("train_sampling_strategy", "sequential"),
    "group_by_length": ("train_sampling_strategy", "group_by_length"),
    "disable_gradient_checkpointing": ("gradient_checkpointing", False),
    "activation_checkpointing": ("gradient_checkpointing", True),
    "no_cuda": ("use_cpu", True),
}

# Reason: keys, with spaces between.
_HARMLESS = {
    "code that comes with a model or a data set is never run": "trust_remote_code",
    "a model is looked for where the hub keeps its own (HF_HUB_CACHE)": "cache_dir",
    "neither used nor written down; the hub's own login is (hf auth login, or HF_TOKEN)": "hf_hub_token hub_token"
    " push_to_hub_token",
    "models come from a directory or the Hugging Face hub": "ms_hub_token om_hub_token",
    "the base's own tokenizer class is used": "use_fast_tokenizer",
    "the weights are loaded tensor by tensor": "low_cpu_mem_usage offload_folder",
    "it changes how fast a step is, not what is computed": "use_unsloth use_unsloth_gc use_reentrant_gc"
    " enable_liger_kernel use_liger_kernel liger_kernel_config use_v1_kernels torch_compile torch_compile_backend"
    " torch_compile_mode torchdynamo gradient_checkpointing_kwargs activation_checkpointing_kwargs jit_mode_eval"
    " use_ipex",
    "norms and the loss are computed in float32 anyway": "upcast_layernorm upcast_lmhead_output",
    "it belongs to generating; compare, evaluate and chat have settings of their own": "infer_backend infer_dtype"
    " use_kv_cache use_cache do_sample temperature top_p top_k num_beams max_length max_new_tokens repetition_penalty"
    " length_penalty skip_special_tokens eval_num_beams sortish_sampler predict_with_generate do_predict"
    " generation_max_length generation_num_beams generation_config vllm_maxlen vllm_gpu_util vllm_enforce_eager"
    " vllm_max_lora_rank vllm_config sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config"
    " sglang_lora_backend",
    "exporting is a verb of its own: tunesmith merge": "export_dir export_size export_device export_quantization_bit"
    " export_quantization_dataset export_quantization_nsamples export_quantization_maxlen export_legacy_format"
    " export_hub_model_id",
    "only texts are trained on": "media_dir image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches"
    " video_max_pixels video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate"
    " freeze_vision_tower freeze_multi_modal_projector freeze_language_model",
    "rows are encoded at every start, in seconds; nothing of them is cached": "overwrite_cache"
    " preprocessing_batch_size preprocessing_num_workers data_shared_file_system buffer_size",
    "it belongs to another stage or another method of tuning": "freeze_trainable_layers freeze_trainable_modules"
    " freeze_extra_modules oft_rank oft_block_size oft_target module_dropout pref_beta pref_ftx pref_bco_weight"
    " pref_loss dpo_label_smoothing kto_chosen_weight kto_rejected_weight simpo_gamma ppo_buffer_size ppo_epochs"
    " ppo_score_norm ppo_target ppo_whiten_rewards ref_model ref_model_adapters ref_model_quantization_bit"
    " reward_model reward_model_adapters reward_model_quantization_bit reward_model_type ld_alpha",
    "it belongs to a switch that is off": "adapter_folder create_new_adapter init_special_tokens pissa_iter"
    " asft_alpha eaft_alpha galore_target galore_rank galore_update_interval galore_scale galore_proj_type"
    " galore_layerwise apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type"
    " apollo_scale_type apollo_layerwise apollo_scale_front badam_mode badam_start_block badam_switch_mode"
    " badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose hyper_parallel_args fp8_backend"
    " fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap kt_weight_path kt_expert_checkpoint_path"
    " kt_use_lora_experts kt_lora_expert_num kt_lora_expert_intermediate_size swanlab_project swanlab_workspace"
    " swanlab_run_name swanlab_mode swanlab_api_key swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret"
    " hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision push_to_hub_model_id"
    " push_to_hub_organization",
    "processes are those of accelerate launch or torchrun; Ray is not used": "ray_num_workers ray_init_kwargs"
    " master_addr master_port local_rank ray_scope",
    "nothing is profiled": "enable_torch_profiler profiler_output_dir profiler_wait_steps profiler_warmup_steps"
    " profiler_active_steps profiler_repeat profiler_record_shapes profiler_profile_memory profiler_with_stack"
    " profile_modules skip_memory_metrics debug",
    "what is said while it trains is Tunesmith's own": "log_level log_level_replica log_on_each_node disable_tqdm"
    " print_param_status",
    "a loss that is not finite stops the run": "logging_nan_inf_filter",
    "tokens are counted anyway": "include_num_input_tokens_seen include_effective_tokens_per_second"
    " include_tokens_per_second",
    "TensorBoard's files lie in the run's own folder 'runs'": "logging_dir",
    "held-out rows are evaluated at the end anyway": "do_eval",
    "held-out rows are measured by their loss; tunesmith evaluate measures more": "compute_accuracy"
    " prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics"
    " include_inputs_for_metrics batch_eval_metrics",
    "held-out rows are computed in training's own dtype": "bf16_full_eval fp16_full_eval",
    "autocast is PyTorch's own": "fp16_backend fp16_opt_level half_precision_backend",
    "a checkpoint is written whole or not at all, as safetensors": "save_on_each_node save_safetensors"
    " enable_jit_checkpoint",
    "the batches are put together by Tunesmith, which knows their columns": "remove_unused_columns label_names"
    " length_column_name past_index",
    "what was counted before is taken from the checkpoint's own state": "restore_callback_states_from_checkpoint",
    "the device is the one that doctor shows": "use_mps_device tpu_num_cores tpu_metrics_debug mp_parameters",
}

_NO_OPTIMIZER = "this optimizer is not built in; 'optim' takes those of transformers"
_NO_LOSS = "the loss is the plain mean over the answers' tokens; no other one is built in"
_ONE_VOCABULARY = "the vocabulary stays as it is; add the tokens to the base beforehand and tune that"
_ANOTHER_MODEL = "it would train another model than the one that the adapter is for"
_NO_BACKEND = "this backend is not built in; leave it out to train through PyTorch and PEFT"
_NOT_SHARDED = "how a base is spread over processes is said in accelerate's own file (FSDP2); leave this out"

# Key: the values that ask for what is done anyway (besides null, false, 0 and empty ones), and the reason.
_REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "adapter_name_or_path": ((), "a new adapter is trained; 'resume_from_checkpoint' goes on with an earlier run"),
    "resize_vocab": ((), _ONE_VOCABULARY),
    "add_tokens": ((), _ONE_VOCABULARY),
    "add_special_tokens": ((), _ONE_VOCABULARY),
    "new_special_tokens_config": ((), _ONE_VOCABULARY),
    "split_special_tokens": ((), "special tokens in a text are read as such; leave them out of the rows"),
    "rope_scaling": ((), f"{_ANOTHER_MODEL}; set it in the base's config.json, where its other users see it too"),
    "shift_attn": ((), _ANOTHER_MODEL),
    "mixture_of_depths": ((), _ANOTHER_MODEL),
    "train_from_scratch": ((), _ANOTHER_MODEL),
    "moe_aux_loss_coef": ((), _NO_LOSS),
    "use_dft_loss": ((), _NO_LOSS),
    "use_asft_loss": ((), _NO_LOSS),
    "use_eaft_loss": ((), _NO_LOSS),
    "ignore_pad_token_for_loss": ((True,), "padding is never trained on; leave this out"),
    "quantization_method": (("bnb",), "a base is quantized by bitsandbytes only: quantization_method: bnb"),
    "quantization_device_map": ((), "the base lies on one device; leave this out"),
    "streaming": ((), "rows are read whole; 'max_samples' takes fewer of them"),
    "tokenized_path": ((), "rows are encoded at every start; leave this out, and name them as 'dataset'"),
    "tool_format": ((), "rows with tool calls are not trained on; leave this out"),
    "preserve_thinking": ((), "earlier answers are written as the template writes them; leave this out"),
    "eval_on_each_dataset": ((), "held-out rows are evaluated together; evaluate them apart with tunesmith evaluate"),
    "pissa_init": ((), "PiSSA changes the base's own weights, so the adapter would not fit it; leave this out"),
    "pissa_convert": ((), "PiSSA is not built in; leave this out"),
    "use_llama_pro": ((), "every layer named by 'lora_target' is trained; layers_to_transform chooses some"),
    "use_adam_mini": ((), _NO_OPTIMIZER),
    "use_muon": ((), _NO_OPTIMIZER),
    "use_galore": ((), _NO_OPTIMIZER),
    "use_apollo": ((), _NO_OPTIMIZER),
    "use_badam": ((), _NO_OPTIMIZER),
    "adafactor": ((), "write optim: adafactor"),
    "optim_target_modules": ((), "GaLore and APOLLO are not built in; 'lora_target' names what is trained"),
    "use_mca": ((), _NO_BACKEND),
    "use_hyper_parallel": ((), _NO_BACKEND),
    "use_kt": ((), _NO_BACKEND),
    "fp8": ((), "fp8 is not built in; leave it out, or use quantization_bit: 8"),
    "fp8_enable_fsdp_float8_all_gather": ((), "fp8 is not built in; leave it out"),
    "deepspeed": ((), _NOT_SHARDED),
    "fsdp": ((), _NOT_SHARDED),
    "parallelism_config": ((), _NOT_SHARDED),
    "accelerator_config": ((), "rows are shared out over processes in one way; leave this out"),
    "auto_find_batch_size": ((), "a batch is as large as per_device_train_batch_size says; write a size that fits"),
    "metric_for_best_model": (("loss", "eval_loss"), "checkpoints are compared by eval_loss only"),
    "greater_is_better": ((), "checkpoints are compared by eval_loss, and less is better"),
    "use_swanlab": ((), "write report_to: swanlab"),
    "push_to_hub": ((), "a run stays on this disk; upload it when it has been verified"),
}

_NOTES = {
    "bf16": "a wish: the base is computed in what is fastest here; dtype: bfloat16 insists",
    "fp16": "a wish: the base is computed in what is fastest here; dtype: float16 insists",
    "pure_bf16": "a wish as bf16 is; the adapter is float32",
    "packing": "rows of one pack never see each other",
    "neat_packing": "packing; rows of one pack never see each other",
    "flash_attn": "taken where its library is installed",
}

AS_ANYWAY = "it asks for what is done anyway"
"""The note on a harmless key whose value is what happens without it."""

_SECRET = ("token", "api_key", "secret", "webhook_url", "password")
_MASK = "***"

HARMLESS = {key: reason for reason, keys in _HARMLESS.items() for key in keys.split()}
REFUSED = dict(_REFUSED)


class KeyUse(Part):
    """What becomes of one key of a recipe.

    Attributes:
        key: as it is written.
        value: as it is written; ``***`` for a secret.
        use: ``used``, ``harmless`` (accepted, and changes nothing) or ``refused``.
        note: the reason; empty where a key is used as it says.
    """

    key: str
    value: str
    use: Use
    note: str = ""


def explain(values: Mapping[str, object], fields: Container[str]) -> tuple[KeyUse, ...]:
    """Say of every key of a recipe whether it is used, harmless or refused, and why.

    Args:
        values: the recipe's keys and values, as they were read.
        fields: the names of the fields of ``Recipe``.

    Returns:
        One record a key, in the recipe's order.
    """
    return tuple(_explained(key, value, fields) for key, value in values.items())


def _explained(key: str, value: object, fields: Container[str]) -> KeyUse:
    written = shown(key, value)
    if key in SPELLINGS and value is False:
        return KeyUse(key=key, value=written, use="harmless", note=AS_ANYWAY)
    if key in fields or key in SPELLINGS:
        # A note is about what the key asks for, so it goes with a value that asks for something.
        return KeyUse(key=key, value=written, use="used", note=_NOTES.get(key, "") if value else "")
    if key in HARMLESS:
        return KeyUse(key=key, value=written, use="harmless", note=HARMLESS[key])
    if key in REFUSED:
        neutral, reason = REFUSED[key]
        if not value or value in neutral:
            return KeyUse(key=key, value=written, use="harmless", note=AS_ANYWAY)
        return KeyUse(key=key, value=written, use="refused", note=f"{reason} (found {written})")
    return KeyUse(key=key, value=written, use="refused", note="unknown key")


def nearest(name: str, among: Iterable[str]) -> str | None:
    """The name of those given that was most probably meant; None where none is near."""
    near = difflib.get_close_matches(name, list(among), n=1)
    return near[0] if near else None


def shown(key: str, value: object) -> str:
    """A value as it may be shown and written down: ``***`` in place of a secret."""
    return _MASK if value and key.lower().endswith(_SECRET) else repr(value)
