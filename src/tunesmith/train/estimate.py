"""What a training will take, found without a weight: its forward and backward pass is played through without numbers.

A model on torch's *meta* device has shapes and no values.  One pass through it tells how many multiplications a batch
is and how much is kept for the backward pass, with the very layers, adapters and batches that will be trained.
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
class Pass:
    """One forward and backward pass of a batch.

    Attributes:
        flops: multiplications and additions.
        saved_bytes: what is kept from the forward pass for the backward one.
    """

    flops: int
    saved_bytes: int


@dataclass(frozen=True)
class Estimate:
    """What a training takes.

    Attributes:
        flops: of all its steps.
        weights_bytes: the base, in the dtype it is computed in.
        adapter_bytes: the trained weights, their gradients and the optimizer's state.
        activations_bytes: what the largest batch keeps for its backward pass, without gradient checkpointing.
        checkpointed_bytes: the same with it: each layer's input, and one layer's inside.
        trained_parameters: numbers that are trained.
    """

    flops: int
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
        None where the model cannot be played through: its layers look at values, as a router of experts does.
    """
    import torch

    from tunesmith.train.batches import collate, layout_of, let_rows_lie_flat

    itemsize = getattr(torch, dtype).itemsize
    try:
        model = _without_weights(recipe, config, dtype)
        layout = layout_of(model.config, pad_token_id, device=device)
        if layout.flat:
            let_rows_lie_flat(model)
        batches = _sample(recipe, examples, lambda rows: collate(rows, layout=layout))
        sizes = [batch["input_ids"].numel() for batch in batches]
        typical = batches[sizes.index(sorted(sizes)[len(sizes) // 2])]
        largest = collate(_longest(recipe, examples), layout=layout)
        usual = play(model, typical)
        most = usual if largest["input_ids"].shape == typical["input_ids"].shape else play(model, largest)
    except _UNPLAYABLE:
        return None
    per_step = usual.flops / typical["input_ids"].numel() * sum(sizes) / len(sizes) * recipe.gradient_accumulation_steps
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    share = (recipe.quantization_bit or 8 * itemsize) / (8 * itemsize)  # of a linear layer's bytes that are held
    layers = max(1, getattr(model.config.get_text_config(), "num_hidden_layers", 1))
    hidden = largest["input_ids"].numel() * model.config.get_text_config().hidden_size
    return Estimate(
        flops=int(per_step * steps),
        weights_bytes=int(_frozen_bytes(model, share)),
        adapter_bytes=trained * _ADAPTER_BYTES,
        activations_bytes=most.saved_bytes,
        checkpointed_bytes=most.saved_bytes // layers + layers * hidden * itemsize,
        trained_parameters=trained,
    )


def play(model: Any, batch: dict[str, Any]) -> Pass:
    """Play a batch through a model on the meta device, forward and backward.

    Args:
        model: the model with its adapter.
        batch: as :func:`tunesmith.train.batches.collate` makes it.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    own = {weight.untyped_storage()._cdata for weight in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        held.append(tensor)  # a storage that is gone could lend its address to the next
        return tensor

    held: list[torch.Tensor] = []
    counts = batch["shift_labels"] != -100
    inputs = {key: value.to("meta") for key, value in batch.items() if key not in ("labels", "shift_labels")}
    # What a mask hides is computed all the same; where rows end is read, and so must be there.
    inputs |= {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device="meta")}
    inputs |= {key: batch[key] for key in ("row_bounds",) if key in batch}
    supervised = int(counts.sum())

    def keep_supervised(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0].flatten(0, 1)[:supervised].unsqueeze(0), *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(keep_supervised)
    try:
        with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
            logits = model(**inputs, use_cache=False).logits[0].float()
            targets = torch.zeros(supervised, dtype=torch.long, device="meta")
            torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    finally:
        hook.remove()
    return Pass(counter.get_total_flops(), sum(kept.values()))


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
