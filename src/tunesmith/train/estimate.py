"""What a training will take, found without a weight: its passes are played through without numbers.

The very layers, adapters and batches that will be trained tell how many multiplications a step is, and how much memory
it holds at once.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tunesmith.train.arguments import attention_implementation, lora_config, rows_a_pass
from tunesmith.train.recipe import Recipe

if TYPE_CHECKING:
    from tunesmith.train.batches import Example, Layout

    Batch = dict[str, Any]

_SAMPLED_BATCHES = 64
_ADAPTER_BYTES = 16  # a trained number, its gradient and AdamW's two means, float32
# glibc keeps what is freed, and blocks of other sizes leave holes that nothing fits into.  Measured on the embedded
# model, 64 to 1024 tokens a row, float32 and bfloat16; as large with gradient checkpointing, which frees all the more.
_HOLES = 0.75
_ROOM = 0.5  # of what weights and optimizer leave free, for activations
_ALIKE = 1.25  # batches within this factor have the same cost a token
_UNPLAYABLE = (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError, KeyError, OSError)


@dataclass(frozen=True)
class Estimate:
    """What a training takes.

    Attributes:
        checkpointing: whether the inside of layers is computed a second time to save memory.
        flops: multiplications and additions of all its steps.
        weights_bytes: the base, in the dtype it is computed in.
        adapter_bytes: the trained weights, their gradients and the optimizer's state.
        activations_bytes: what the largest batch holds at once beside these, with the holes between.
        trained_parameters: numbers that are trained.
    """

    checkpointing: bool
    flops: int
    weights_bytes: int
    adapter_bytes: int
    activations_bytes: int
    trained_parameters: int


def estimate(
    recipe: Recipe,
    config: Any,
    examples: Sequence[Example],
    *,
    dtype: str,
    device: str,
    free_bytes: int | None,
    steps: int,
    pad_token_id: int,
) -> Estimate | None:
    """Estimate a training from its recipe, its base's configuration and its encoded rows.

    Args:
        recipe: the recipe.
        config: the base's configuration.
        examples: encoded rows.
        dtype: what the base will be computed in.
        device: ``cpu``, ``cuda`` …, that it will be computed on.
        free_bytes: memory that is free on it; None where that cannot be told.
        steps: optimizer steps.
        pad_token_id: what rows are padded with.

    Returns:
        None where the model cannot be played through: its layers look at values.
    """
    from tunesmith.train.play import play

    size = rows_a_pass(recipe, [len(row["input_ids"]) for row in examples], device=device)
    try:
        model, layout = _without_weights(recipe, config, dtype=dtype, device=device, pad_token_id=pad_token_id)
        typical, largest, mean_tokens = _batches(examples, size, seed=recipe.seed, layout=layout)
        kept = play(model, largest, dtype=dtype, checkpointed=False)
        holes = _HOLES * kept.peak_bytes if device == "cpu" and sys.platform == "linux" else 0.0
        weights, trained = _frozen_bytes(model, _share(recipe, dtype)), _trained_parameters(model)
        room = None if free_bytes is None else max(0.0, free_bytes - weights - trained * _ADAPTER_BYTES)
        checkpointing = _checkpoints(recipe, kept.peak_bytes + holes, room)
        most = play(model, largest, dtype=dtype, checkpointed=True) if checkpointing else kept
        is_like = largest["input_ids"].numel() <= _ALIKE * typical["input_ids"].numel()
        usual = most if is_like else play(model, typical, dtype=dtype, checkpointed=checkpointing)
    except _UNPLAYABLE:
        return None
    tokens = (largest if is_like else typical)["input_ids"].numel()
    passes = steps * recipe.gradient_accumulation_steps * recipe.per_device_train_batch_size // size
    return Estimate(
        checkpointing=checkpointing,
        flops=int(usual.flops / tokens * mean_tokens * passes),
        weights_bytes=int(weights),
        adapter_bytes=trained * _ADAPTER_BYTES,
        activations_bytes=int(most.peak_bytes + holes),
        trained_parameters=trained,
    )


def _checkpoints(recipe: Recipe, activations: float, room: float | None) -> bool:
    if recipe.gradient_checkpointing is not None:
        return recipe.gradient_checkpointing
    return room is not None and activations > _ROOM * room


def _share(recipe: Recipe, dtype: str) -> float:
    """What a quantized matrix takes of its bytes."""
    import torch

    bits = 8 * int(getattr(torch, dtype).itemsize)
    return (recipe.quantization_bit or bits) / bits


def _trained_parameters(model: Any) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def _without_weights(recipe: Recipe, config: Any, *, dtype: str, device: str, pad_token_id: int) -> tuple[Any, Layout]:
    """The model that will be trained, on the meta device, and how its rows will lie."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from tunesmith.train.batches import layout_of, let_rows_lie_flat

    config = copy.deepcopy(config)  # loading writes its choices into it
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=getattr(torch, dtype),
            attn_implementation=attention_implementation(recipe),
            trust_remote_code=False,
        )
        adapted = peft.get_peft_model(model, lora_config(recipe, model), autocast_adapter_dtype=True)
    layout = layout_of(model.config, pad_token_id, device=device)
    layout = replace(layout, flat=layout.flat and not recipe.neftune_noise_alpha)
    if layout.flat:
        let_rows_lie_flat(adapted)
    return adapted.train(), layout


def _frozen_bytes(model: Any, share: float) -> float:
    """Bytes of the weights that are not trained; of matrices between embeddings and head, a ``share`` only."""
    ends = {
        id(one) for end in (model.get_input_embeddings(), model.get_output_embeddings()) for one in end.parameters()
    }
    frozen = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
    sizes = (
        weight.numel() * weight.itemsize * (1 if key in ends or weight.dim() < 2 else share)
        for key, weight in frozen.items()
    )
    return float(sum(sizes))


def _batches(examples: Sequence[Example], size: int, *, seed: int, layout: Layout) -> tuple[Batch, Batch, float]:
    """A batch of middling size, the largest one, and how many tokens a batch has in the mean; of a sample."""
    from tunesmith.train.batches import collate

    rows = list(examples)
    random.Random(seed).shuffle(rows)  # noqa: S311 - a sample, not a secret
    starts = range(0, len(rows), size)[:_SAMPLED_BATCHES]
    batches = sorted(
        (collate(rows[start : start + size], layout=layout) for start in starts),
        key=lambda batch: batch["input_ids"].numel(),
    )
    longest = sorted(examples, key=lambda row: len(row["input_ids"]))[-size:]
    mean_tokens = sum(batch["input_ids"].numel() for batch in batches) / len(batches)
    return batches[len(batches) // 2], collate(longest, layout=layout), mean_tokens
