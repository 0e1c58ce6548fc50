"""What a training will take, found without a weight: its passes are played through without numbers.

The very layers, adapters and batches that will be trained tell how many multiplications a step is, and how much memory
it holds at once.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.train.arguments import attention_implementation, lora_config
from tunesmith.train.recipe import Recipe

if TYPE_CHECKING:
    from tunesmith.train.batches import Example

_SAMPLED_BATCHES = 64
_ADAPTER_BYTES = 16  # a trained number, its gradient and AdamW's two means, float32
_UNPLAYABLE = (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError, KeyError, OSError)


@dataclass(frozen=True)
class Estimate:
    """What a training takes.

    Attributes:
        flops: multiplications and additions of all its steps, without gradient checkpointing.
        checkpointed_flops: the same with it.
        weights_bytes: the base, in the dtype it is computed in.
        adapter_bytes: the trained weights, their gradients and the optimizer's state.
        activations_bytes: what the largest batch holds at once beside these, without gradient checkpointing.
        checkpointed_bytes: the same with it.
        trained_parameters: numbers that are trained.
    """

    flops: int
    checkpointed_flops: int
    weights_bytes: int
    adapter_bytes: int
    activations_bytes: int
    checkpointed_bytes: int
    trained_parameters: int


def estimate(
    recipe: Recipe, config: Any, examples: Sequence[Example], *, dtype: str, device: str, steps: int, pad_token_id: int
) -> Estimate | None:
    """Estimate a training from its recipe, its base's configuration and its encoded rows.

    Args:
        recipe: the recipe.
        config: the base's configuration.
        examples: encoded rows.
        dtype: what the base will be computed in.
        device: ``cpu``, ``cuda`` …, that it will be computed on.
        steps: optimizer steps.
        pad_token_id: what rows are padded with.

    Returns:
        None where the model cannot be played through: its layers look at values.
    """
    import torch

    from tunesmith.train.batches import collate, layout_of, let_rows_lie_flat
    from tunesmith.train.play import play

    try:
        model = _without_weights(recipe, config, dtype)
        layout = layout_of(model.config, pad_token_id, device=device)
        if layout.flat and not recipe.neftune_noise_alpha:
            let_rows_lie_flat(model)
        batches = _sample(recipe, examples, lambda rows: collate(rows, layout=layout))
        sizes = [batch["input_ids"].numel() for batch in batches]
        typical = batches[sizes.index(sorted(sizes)[len(sizes) // 2])]
        largest = collate(_longest(recipe, examples), layout=layout)
        usual = play(model, typical, dtype=dtype, checkpointed=False)
        most, recomputed = (play(model, largest, dtype=dtype, checkpointed=twice) for twice in (False, True))
    except _UNPLAYABLE:
        return None
    per_step = usual.flops / typical["input_ids"].numel() * sum(sizes) / len(sizes) * recipe.gradient_accumulation_steps
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    itemsize = getattr(torch, dtype).itemsize
    share = (recipe.quantization_bit or 8 * itemsize) / (8 * itemsize)  # of a linear layer's bytes that are held
    return Estimate(
        flops=int(per_step * steps),
        checkpointed_flops=int(per_step * steps * recomputed.flops / most.flops),
        weights_bytes=int(_frozen_bytes(model, share)),
        adapter_bytes=trained * _ADAPTER_BYTES,
        activations_bytes=int(most.peak_bytes),
        checkpointed_bytes=int(recomputed.peak_bytes),
        trained_parameters=trained,
    )


def _without_weights(recipe: Recipe, config: Any, dtype: str) -> Any:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)  # loading writes its choices into it
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=getattr(torch, dtype),
            attn_implementation=attention_implementation(recipe),
            trust_remote_code=False,
        )
        adapted = peft.get_peft_model(model, lora_config(recipe, model), autocast_adapter_dtype=True)
    return adapted.train()


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


def _sample(recipe: Recipe, examples: Sequence[Example], lay: Callable[[Sequence[Example]], Any]) -> list[Any]:
    rows, size = list(examples), recipe.per_device_train_batch_size
    random.Random(recipe.seed).shuffle(rows)  # noqa: S311 - a sample, not a secret
    starts = range(0, len(rows), size)[:_SAMPLED_BATCHES]
    return [lay(rows[start : start + size]) for start in starts]


def _longest(recipe: Recipe, examples: Sequence[Example]) -> list[Example]:
    return sorted(examples, key=lambda row: len(row["input_ids"]))[-recipe.per_device_train_batch_size :]
