"""TRL's trainer with the loss over the supervised tokens only, and with nothing computed that nobody reads.

Importing this module imports torch, transformers and trl.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from tunesmith.errors import RecipeError
from tunesmith.train.arguments import complete_schedule
from tunesmith.train.head import is_plain_head, summed_nats
from tunesmith.train.rows import IGNORED
from tunesmith.train.run_dir import ADAPTER_WEIGHTS
from tunesmith.train.shares import blank_like, order_of_rows


class SupervisedTrainer(SFTTrainer):  # type: ignore[misc] # trl has no types
    """SFTTrainer with its loss, its evaluation mean and its silence replaced.

    TRL's own loss projects every position onto the vocabulary and then computes entropy and accuracy as well.  Here
    the output head sees the supervised positions only.

    Args:
        rows: how many of the training rows are not blank; blank ones follow them.
        **kwargs: SFTTrainer's.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *, rows: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._rows = rows
        # The tokens of a whole accumulated batch are counted for every architecture, as compute_loss divides by them.
        self.model_accepts_loss_kwargs = True
        self.plain_head = is_plain_head(self.model)
        # The base's own generation_config, where the tuned model ends its answers with another token than it lists.
        self.saves_generation_config = False
        # PEFT would ask the hub whether the vocabulary was resized; it was not.
        self.model.save_pretrained = partial(self.model.save_pretrained, save_embedding_layers=False)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The recipe's schedule, with what it lacks filled in."""
        complete_schedule(self.args, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return order_of_rows(
            sampler,
            rows=self._rows,
            seed=seed,
            processes=self.args.world_size,
            epoch=lambda: int(self.state.epoch or 0),
        )

    def _send_telemetry(self) -> None:
        """Nothing is reported to anybody."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """PEFT writes the card beside each adapter; TRL's would advertise."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the adapter; its weights, which safetensors makes private, get the mode that other files have."""
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        if not self.args.should_save:  # every process is asked, and one writes
            return
        shutil.copymode(folder / "adapter_config.json", folder / ADAPTER_WEIGHTS)
        if self.saves_generation_config:
            self.model.generation_config.save_pretrained(folder)

    def _nats(self, model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        """The summed loss of a batch in nats, fp32 scalar, and the number of tokens that it sums over."""
        counts = inputs["shift_labels"] != IGNORED
        targets = inputs["shift_labels"][counts]
        nats = summed_nats(
            model,
            {key: value for key, value in inputs.items() if key not in ("labels", "shift_labels")},
            targets,
            head=self.model.get_output_embeddings(),
            keep=lambda hidden: hidden[counts],
            plain=self.plain_head,
            label_smoothing=self.args.label_smoothing_factor if model.training else 0.0,
        )
        return nats, len(targets)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Mean nats a supervised token of the accumulated batch (of this batch where its count is not given)."""
        nats, tokens = self._nats(model, inputs)
        if num_items_in_batch is None:
            loss = nats / tokens
        else:
            # Where the count is of all processes, their gradients are averaged afterwards.
            counted = self.args.world_size if self.args.average_tokens_across_devices else 1
            loss = nats / num_items_in_batch * counted
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

    def evaluation_loop(self, dataloader: Any, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> EvalLoopOutput:
        """The held-out loss as the mean over all supervised tokens; the Trainer's is a mean over unequal batches.

        Every process takes its share of the rows, each once.

        Raises:
            Cancelled: that was asked for.
        """
        model, rows = self.model, sorted(dataloader.dataset, key=lambda row: len(row["input_ids"]))
        mine = rows[self.args.process_index :: self.args.world_size]
        if len(mine) * self.args.world_size < len(rows):  # each as many, since a sharded model computes together
            mine.append(blank_like(rows[0]))
        size = self.args.per_device_eval_batch_size
        sums = torch.zeros(2, dtype=torch.float64)
        training = model.training
        model.eval()
        try:
            for start in range(0, len(mine), size):
                batch = self._prepare_inputs(self.data_collator(mine[start : start + size]))
                with torch.no_grad(), self.compute_loss_context_manager():
                    nats, tokens = self._nats(model, batch)
                sums += torch.tensor([float(nats), tokens], dtype=torch.float64)
                self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        finally:
            model.train(training)
        total, count = self.accelerator.reduce(
            sums.to(_sum_dtype(self.args.device)).to(self.args.device), "sum"
        ).tolist()
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": total / count}, len(rows))


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def diverged(step: int, learning_rate: float, found: float) -> RecipeError:
    """The error for training that left the finite numbers."""
    return RecipeError(
        "Training diverged: the loss is no longer a finite number.",
        where=f"step {step}",
        expected="a finite loss",
        found=found,
        next_step=f"train with learning_rate={learning_rate / 10:g}, or with dtype=float32 if it was not",
    )
