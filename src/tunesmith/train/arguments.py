"""What a recipe says, in the words of the libraries that do it: TRL, PEFT and bitsandbytes."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Container, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tunesmith.errors import RecipeError
from tunesmith.record import Part
from tunesmith.train.keys import nearest

if TYPE_CHECKING:
    from tunesmith.train.recipe import Recipe

_EVAL_BATCH_FACTOR = 4  # no activations are kept for a backward pass
_BUSY_TOKENS = 256  # more at once make a CPU's products no faster
_ATTENTION = {
    "disabled": "eager",
    "sdpa": "sdpa",
    "fa2": "flash_attention_2",
    "fa3": "flash_attention_3",
}
# Where the package that is told of a run is not called as the Trainer calls it.
_REPORTERS = {"azure_ml": "azureml", "flyte": "flytekit", "dvclive": "dvclive", "comet": "comet_ml"}

Scheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
]


class PassedOn(Part):
    """The keys of a recipe that the Trainer takes as they are; None leaves one to it.

    Attributes:
        per_device_train_batch_size: rows a forward pass.
        gradient_accumulation_steps: forward passes an optimizer step.
        learning_rate: the peak.
        num_train_epochs: passes over the rows.
        lr_scheduler_type: how the learning rate changes after the warm-up.
        lr_scheduler_kwargs: further settings of that.
        optim: the optimizer.
        optim_args: further settings of it, ``key=value`` with commas between.
        weight_decay: the optimizer's.
        adam_beta1: decay of the gradients' mean.
        adam_beta2: decay of the squared gradients' mean.
        adam_epsilon: added to the root of the latter.
        max_grad_norm: gradients are clipped to this norm; 0 leaves them alone.
        seed: of the split, the adapter's first values, the order of rows and dropout.
        data_seed: of the order of rows; None is ``seed``.
        full_determinism: whether only kernels that are deterministic are used.
        tf32: whether a GPU may multiply in TF32.
        torch_empty_cache_steps: optimizer steps from one emptying of the GPU's cache to the next.
        average_tokens_across_devices: whether the loss is a mean over the tokens of all processes.
        logging_strategy: when a log row is written.
        logging_first_step: whether the first step has one.
        save_total_limit: checkpoints that are kept.
        save_only_model: whether a checkpoint is without the optimizer's state, and cannot be gone on from.
        eval_delay: epochs or steps before the first evaluation.
        eval_on_start: whether the held-out loss is known before the first step.
        ignore_data_skip: whether a resumed run begins its rows anew.
        dataloader_drop_last: whether a last batch that is not full is left out.
        dataloader_num_workers: processes that put batches together; 0 is training's own.
        dataloader_pin_memory: whether batches for a GPU lie in pinned memory.
        dataloader_persistent_workers: whether those processes outlive an epoch.
        dataloader_prefetch_factor: batches that each of them has ready.
        ddp_backend: how processes speak to each other.
        ddp_timeout: seconds they wait for each other.
        ddp_bucket_cap_mb: DistributedDataParallel's.
        ddp_broadcast_buffers: likewise.
        ddp_static_graph: likewise.
        ddp_find_unused_parameters: likewise; None is false, since every adapted layer is used.
        run_name: what those in ``report_to`` call the run.
        project: Trackio's project.
        trackio_space_id: Trackio's space.
        trackio_bucket_id: Trackio's bucket.
        trackio_static_space_id: Trackio's static space.
    """

    per_device_train_batch_size: int = Field(default=8, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=5e-5, gt=0)
    num_train_epochs: float = Field(default=3.0, gt=0)
    lr_scheduler_type: Scheduler = "linear"
    lr_scheduler_kwargs: dict[str, Any] | None = None
    optim: str | None = None
    optim_args: str | None = None
    weight_decay: float = Field(default=0.0, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    seed: int = Field(default=42, ge=0, lt=2**32)
    data_seed: int | None = Field(default=None, ge=0, lt=2**32)
    full_determinism: bool = False
    tf32: bool | None = None
    torch_empty_cache_steps: int | None = Field(default=None, ge=1)
    average_tokens_across_devices: bool = True
    logging_strategy: Literal["steps", "epoch", "no"] = "steps"
    logging_first_step: bool = False
    save_total_limit: int | None = Field(default=None, ge=1)
    save_only_model: bool = False
    eval_delay: float = Field(default=0, ge=0)
    eval_on_start: bool = False
    ignore_data_skip: bool = False
    dataloader_drop_last: bool = False
    dataloader_num_workers: int = Field(default=0, ge=0)
    dataloader_pin_memory: bool = True
    dataloader_persistent_workers: bool = False
    dataloader_prefetch_factor: int | None = Field(default=None, ge=1)
    ddp_backend: str | None = None
    ddp_timeout: int = Field(default=1800, ge=1)
    ddp_bucket_cap_mb: int | None = Field(default=None, ge=1)
    ddp_broadcast_buffers: bool | None = None
    ddp_static_graph: bool | None = None
    ddp_find_unused_parameters: bool | None = None
    run_name: str | None = None
    project: str | None = None
    trackio_space_id: str | None = None
    trackio_bucket_id: str | None = None
    trackio_static_space_id: str | None = None


def training_arguments(
    recipe: Recipe,
    *,
    device: str,
    evaluates: bool,
    world_size: int = 1,
    flat: bool = False,
    gradient_checkpointing: bool = False,
    rows_a_pass: int | None = None,
) -> Any:
    """The recipe as TRL's ``SFTConfig``.

    Args:
        recipe: the recipe, its ``dtype`` decided.
        device: ``cpu``, ``cuda`` … that is trained on.
        evaluates: whether there are held-out rows.
        world_size: processes that train together.
        flat: whether a batch is without padding, so that rows of unequal length may be in one at no cost.
        gradient_checkpointing: whether activations are computed twice, where the recipe leaves that open.
        rows_a_pass: rows of one forward pass, a divisor of the batch, whose other rows are accumulated; None for all.

    Raises:
        RecipeError: the libraries that are installed know a key or a value of it not, or do not take it.
    """
    import trl

    known = {field.name for field in dataclasses.fields(trl.SFTConfig)}
    order = recipe.train_sampling_strategy or ("random" if flat else "group_by_length")
    asked = recipe.gradient_checkpointing
    checkpointing = gradient_checkpointing if asked is None else asked
    values = {
        **_passed_on(recipe, device=device, world_size=world_size),
        **_passes(recipe, rows_a_pass or recipe.per_device_train_batch_size),
        **_computing(recipe, device=device),
        **_in_their_words(known, order=order, checkpointing=checkpointing),
        **_logging_and_saving(recipe, evaluates=evaluates),
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    return _built(values, known)


def rows_a_pass(recipe: Recipe, lengths: Sequence[int], *, device: str) -> int:
    """How many rows of a batch are computed at once: on a CPU, as few as keep it busy, for each costs memory.

    The loss is a mean over the tokens of the whole batch however many passes that takes, and so are its gradients.

    Args:
        recipe: the recipe.
        lengths: of the rows, in tokens.
        device: ``cpu``, ``cuda`` … that is trained on; on others than a CPU it is the whole batch.
    """
    batch = recipe.per_device_train_batch_size
    if device != "cpu" or recipe.dataloader_drop_last:  # what is dropped is a batch that is not full
        return batch
    needed = _BUSY_TOKENS * len(lengths) / max(1, sum(lengths))
    return next(rows for rows in range(1, batch + 1) if batch % rows == 0 and (rows >= needed or rows == batch))


def _passes(recipe: Recipe, rows: int) -> dict[str, Any]:
    passes = recipe.gradient_accumulation_steps * recipe.per_device_train_batch_size // rows
    return {"per_device_train_batch_size": rows, "gradient_accumulation_steps": passes}


def _built(values: dict[str, Any], known: Container[str]) -> Any:
    import transformers
    import trl

    unknown = sorted(key for key in values if key not in known)
    if unknown:
        raise RecipeError(
            "The installed transformers does not know a key of the recipe.",
            where=", ".join(unknown),
            found=f"transformers {transformers.__version__}",
            next_step="leave it out, or install a newer transformers",
        )
    try:
        arguments = trl.SFTConfig(**values)
        # Only so is it known whether the optimizer's package is there, before anything is computed.
        transformers.Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError("The Trainer does not take the recipe's values.", found=error) from error
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process, one GPU: TRL refuses nn.DataParallel
    return arguments


def _passed_on(recipe: Recipe, *, device: str, world_size: int) -> dict[str, Any]:
    values = {key: value for key in PassedOn.model_fields if (value := getattr(recipe, key)) is not None}
    on_gpu = device.startswith("cuda")
    values["dataloader_pin_memory"] = recipe.dataloader_pin_memory and on_gpu
    if not on_gpu:
        values.pop("tf32", None)
    if world_size > 1:
        values.setdefault("ddp_find_unused_parameters", False)
    else:
        values.pop("ddp_backend", None)  # with one the Trainer waits for other processes
    return values


def _computing(recipe: Recipe, *, device: str) -> dict[str, Any]:
    return {
        "max_steps": recipe.max_steps or -1,
        "warmup_steps": recipe.warmup_ratio or recipe.warmup_steps,  # below 1 it is a share of the steps
        "bf16": recipe.dtype == "bfloat16",
        "fp16": recipe.dtype == "float16" and device != "cpu",
        "use_cpu": device == "cpu",
        "label_smoothing_factor": recipe.label_smoothing_factor,
        "neftune_noise_alpha": recipe.neftune_noise_alpha or None,
    }


def _in_their_words(known: Container[str], *, order: str, checkpointing: bool) -> dict[str, Any]:
    """Two settings that transformers has renamed within its version 5."""
    values: dict[str, Any] = {"gradient_checkpointing": checkpointing}
    if "activation_checkpointing" in known:  # since 5.23, which warns of the old name where only that is given
        values["activation_checkpointing"] = checkpointing
    if "train_sampling_strategy" in known or order == "sequential":
        return values | {"train_sampling_strategy": order}
    return values | {"group_by_length": order == "group_by_length"}


def _logging_and_saving(recipe: Recipe, *, evaluates: bool) -> dict[str, Any]:
    return {
        "output_dir": str(recipe.output_dir),
        "per_device_eval_batch_size": recipe.per_device_eval_batch_size
        or recipe.per_device_train_batch_size * _EVAL_BATCH_FACTOR,
        "logging_steps": recipe.logging_steps,
        "logging_nan_inf_filter": False,
        "save_strategy": recipe.save_strategy,
        "save_steps": recipe.save_steps,
        "eval_strategy": (recipe.eval_strategy or "steps") if evaluates else "no",
        "eval_steps": recipe.evaluation_interval,
        "eval_on_start": recipe.eval_on_start and evaluates,
        "metric_for_best_model": "eval_loss" if evaluates else None,
        "greater_is_better": False,
        "load_best_model_at_end": recipe.load_best_model_at_end and evaluates,
        "prediction_loss_only": True,
        "remove_unused_columns": False,
        "report_to": _installed(recipe.report_to),
        "disable_tqdm": True,
        "log_level": "error",
        "log_level_replica": "error",
    }


def _installed(reporters: Sequence[str]) -> list[str] | str:
    """Those who are told of a run, all of them installed."""
    missing = [
        name for name in reporters if name != "all" and importlib.util.find_spec(_REPORTERS.get(name, name)) is None
    ]
    if missing:
        raise RecipeError(
            "The recipe reports to what is not installed.",
            where="report_to",
            found=", ".join(missing),
            next_step=f"pip install {' '.join(_REPORTERS.get(name, name) for name in missing)}, or report_to=none",
        )
    return list(reporters) or "none"


def complete_schedule(arguments: Any, num_training_steps: int) -> None:
    """Fill in what a schedule of three stages lacks, in place, as LLaMA-Factory does.

    After the warm-up a third of the steps keeps the peak, and over the others the learning rate falls.

    Args:
        arguments: the training arguments; only ``lr_scheduler_type: warmup_stable_decay`` is touched.
        num_training_steps: optimizer steps in all.
    """
    if arguments.lr_scheduler_type != "warmup_stable_decay":
        return
    rest = num_training_steps - arguments.get_warmup_steps(num_training_steps)
    stages = {"num_stable_steps": rest // 3, "num_decay_steps": rest - rest // 3}
    arguments.lr_scheduler_kwargs = stages | (arguments.lr_scheduler_kwargs or {})


def loraplus_optimizer(recipe: Recipe, model: Any, arguments: Any) -> Any | None:
    """The optimizer of LoRA+, which trains B faster than A; None where the recipe does not ask for it.

    Args:
        recipe: the recipe.
        model: the model with its adapter.
        arguments: what :func:`training_arguments` made of the recipe.

    Source: https://arxiv.org/abs/2402.12354
    """
    if recipe.loraplus_lr_ratio is None:
        return None
    import peft.optimizers
    import transformers

    optimizer_class, settings = transformers.Trainer.get_optimizer_cls_and_kwargs(arguments)
    return peft.optimizers.create_loraplus_optimizer(
        model,
        optimizer_class,
        **{
            **settings,
            "lr": arguments.learning_rate,
            "loraplus_lr_ratio": recipe.loraplus_lr_ratio,
            "loraplus_lr_embedding": recipe.loraplus_lr_embedding,
            "loraplus_weight_decay": arguments.weight_decay,
        },
    )


def lora_config(recipe: Recipe, model: Any) -> Any:
    """The recipe's adapter as PEFT's ``LoraConfig``, held against the model that it is for.

    Args:
        recipe: the recipe.
        model: the base model, without an adapter.

    Raises:
        RecipeError: names that are no modules or parameters of the model, or no layers that PEFT adapts; all of them
            are named.
    """
    import peft

    _refuse_unknown_targets(recipe, model)
    _refuse_unknown_names(recipe, model)
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        revision=recipe.model_revision if recipe.model_revision != "main" else None,
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=recipe.target_modules or "all-linear",
        use_rslora=recipe.use_rslora,
        use_dora=recipe.use_dora,
        modules_to_save=recipe.additional_target.split(",") if recipe.additional_target else None,
        target_parameters=_listed(recipe.target_parameters),
        exclude_modules=_listed(recipe.exclude_modules),
        layers_to_transform=_listed(recipe.layers_to_transform),
        layers_pattern=_listed(recipe.layers_pattern),
        rank_pattern=dict(recipe.rank_pattern),
        alpha_pattern=dict(recipe.alpha_pattern),
        init_lora_weights=recipe.init_lora_weights,
    )


def _listed(values: Sequence[Any] | None) -> list[Any] | None:
    return None if values is None else list(values)


def _refuse_unknown_targets(recipe: Recipe, model: Any) -> None:
    """Refuse targets that PEFT would not adapt, or only one end of a weight that two modules share."""
    layers = list(_adaptable(model))
    unknown = [target for target in recipe.target_modules or () if not _is_among(target, layers)]
    if not unknown:
        return
    ends = sorted({name.rpartition(".")[2] for name in layers})
    meant = [f"{target}: did you mean {near}?" for target in unknown if (near := nearest(target, [*ends, *layers]))]
    raise RecipeError(
        "lora_target names modules that are no layers of this model, or share their weight with another.",
        where="lora_target",
        expected=f"all, or some of {', '.join(ends)}",
        found=", ".join(unknown),
        details=meant,
    )


def _adaptable(model: Any) -> Iterator[str]:
    """The names of the layers that PEFT adapts; input and output embeddings only where they are two weights."""
    import torch
    from transformers.pytorch_utils import Conv1D

    ends = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    tied = len(ends) == 2 and ends[0].weight is ends[1].weight
    for name, module in model.named_modules():
        kinds = (torch.nn.Linear, torch.nn.Embedding, Conv1D)
        if isinstance(module, kinds) and not (tied and any(module is end for end in ends)):
            yield name


def _refuse_unknown_names(recipe: Recipe, model: Any) -> None:
    """Refuse further names that the model lacks, which PEFT would pass over, and settings that exclude each other."""
    modules = [name for name, _ in model.named_modules() if name]
    parameters = [name for name, _ in model.named_parameters()]
    asked = (
        ("additional_target", (recipe.additional_target or "").split(","), modules),
        ("exclude_modules", recipe.exclude_modules or (), modules),
        ("target_parameters", recipe.target_parameters or (), parameters),
    )
    problems = []
    for key, names, there in asked:
        for name in names:
            if name and not _is_among(name, there):
                near = nearest(name, {part for one in there for part in (one, one.rpartition(".")[2])})
                problems.append(f"{key}: the model has no {name}" + (f"; did you mean {near}?" if near else ""))
    if recipe.target_parameters and (recipe.lora_dropout or recipe.use_dora):
        problems.append("target_parameters: PEFT adapts parameters without dropout and without DoRA only")
    if problems:
        raise RecipeError("The recipe does not fit the model.", details=problems)


def _is_among(name: str, names: Sequence[str]) -> bool:
    """Whether a name is one of those, or the end of one; as PEFT matches it."""
    return any(one == name or one.endswith(f".{name}") for one in names)


def quantization_config(recipe: Recipe) -> Any | None:
    """How bitsandbytes quantizes the base; None where the recipe leaves it as it is.

    Args:
        recipe: the recipe, its ``dtype`` decided: products are computed in it.

    Raises:
        RecipeError: bitsandbytes is not installed.
    """
    if recipe.quantization_bit is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(
            "A base is quantized by bitsandbytes, which is not installed.",
            where="quantization_bit",
            next_step="pip install bitsandbytes, or leave quantization_bit out",
        )
    import torch
    import transformers

    if recipe.quantization_bit == 8:
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    dtype = torch.float32 if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=recipe.double_quantization,
        bnb_4bit_quant_type=recipe.quantization_type,
    )


def attention_implementation(recipe: Recipe) -> str | None:
    """The name that transformers gives the recipe's ``flash_attn``; None leaves the choice to it.

    A kernel that is not installed is left to it too, as in LLaMA-Factory: it changes the speed only.
    """
    import transformers.utils

    kernels = {"fa2": "is_flash_attn_2_available", "fa3": "is_flash_attn_3_available"}
    check = getattr(transformers.utils, kernels.get(recipe.flash_attn, ""), None)
    if recipe.flash_attn in kernels and not (check is not None and check()):
        return None
    return _ATTENTION.get(recipe.flash_attn)
