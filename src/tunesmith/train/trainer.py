"""TRL's trainer with the loss over the supervised tokens only, and with nothing computed that nobody reads.

Importing this module imports torch, transformers and trl.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from trl import SFTTrainer

from tunesmith.errors import RecipeError
from tunesmith.train.rows import IGNORED
from tunesmith.train.run_dir import ADAPTER_WEIGHTS


def collate(examples: Sequence[dict[str, list[int]]], *, pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad a batch on the right.

    Args:
        examples: rows with ``input_ids`` and ``labels``.
        pad_token_id: what to pad ids with; it is attended to by nothing.

    Returns:
        ``input_ids``, ``labels`` and ``attention_mask``, int64, [rows, longest row].
    """
    longest = max(len(example["input_ids"]) for example in examples)

    def padded(key: str, filler: int) -> torch.Tensor:
        return torch.tensor([[*example[key], *[filler] * (longest - len(example[key]))] for example in examples])

    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    return {
        "input_ids": padded("input_ids", pad_token_id),
        "labels": padded("labels", IGNORED),
        "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
    }


class SupervisedTrainer(SFTTrainer):  # type: ignore[misc] # trl has no types
    """SFTTrainer with its loss, its evaluation mean and its silence replaced.

    TRL's own loss projects every position onto the vocabulary and then computes entropy and accuracy as well.  Here
    the output head sees the supervised positions only.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # The tokens of a whole accumulated batch are counted for every architecture, as compute_loss divides by them.
        self.model_accepts_loss_kwargs = True
        # PEFT would ask the hub whether the vocabulary was resized; it was not.
        self.model.save_pretrained = partial(self.model.save_pretrained, save_embedding_layers=False)
        self._eval_nats, self._eval_tokens = 0.0, 0

    def _send_telemetry(self) -> None:
        """Nothing is reported to anybody."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """PEFT writes the card beside each adapter; TRL's would advertise."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the adapter; its weights, which safetensors makes private, get the mode that other files have."""
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        shutil.copymode(folder / "adapter_config.json", folder / ADAPTER_WEIGHTS)

    def _nats(self, model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        """The summed loss of a batch in nats, fp32 scalar, and the number of tokens that it sums over."""
        targets = inputs["labels"][:, 1:]
        counts = targets != IGNORED

        def keep_supervised(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return (args[0][:, :-1][counts].unsqueeze(0), *args[1:])

        # A hook rather than `logits_to_keep`: that keeps the same columns in every row, and not all models have it.
        # What a model does to its logits afterwards (scaling, soft caps) still happens.
        hook = self.model.get_output_embeddings().register_forward_pre_hook(keep_supervised)
        try:
            logits = model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            ).logits
        finally:
            hook.remove()
        nats = F.cross_entropy(logits[0].float(), targets[counts], reduction="sum")
        return nats, int(counts.sum())

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Mean nats a supervised token of the accumulated batch (of this batch where its count is not given)."""
        nats, tokens = self._nats(model, inputs)
        loss = nats / (tokens if num_items_in_batch is None else num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward pass.

        Raises:
            RecipeError: the loss is not finite.
        """
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise diverged(self.state.global_step + 1, self.args.learning_rate, float(loss))
        return loss

    def prediction_step(self, model: Any, inputs: dict[str, torch.Tensor], *_: Any, **__: Any) -> Any:
        """The mean loss of one held-out batch, without logits."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            nats, tokens = self._nats(model, inputs)
        self._eval_nats += float(nats)
        self._eval_tokens += tokens
        return nats / tokens, None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The held-out loss, as the mean over tokens; Trainer's own is a mean over batches of unequal weight."""
        self._eval_nats, self._eval_tokens = 0.0, 0
        output = super().evaluation_loop(*args, **kwargs)
        output.metrics["eval_loss"] = self._eval_nats / self._eval_tokens
        return output


def diverged(step: int, learning_rate: float, found: float) -> RecipeError:
    """The error for training that left the finite numbers."""
    return RecipeError(
        "Training diverged: the loss is no longer a finite number.",
        where=f"step {step}",
        expected="a finite loss",
        found=found,
        next_step=f"train with learning_rate={learning_rate / 10:g}, or with dtype=float32 if it was not",
    )
