"""What is written down while training runs, what people see of it, and what stops it.

Importing this module imports torch and transformers.
"""

from __future__ import annotations

import json
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tunesmith.allocator import give_memory_back
from tunesmith.errors import RecipeError
from tunesmith.progress import Cancellation, Progress, ProgressCallback
from tunesmith.runs import LogRow
from tunesmith.runs.health import health

_LOOKS_AT_HEALTH = 50  # times for as many rows as there have been, lest looking cost more than training


class Journal(TrainerCallback):  # type: ignore[misc] # transformers has no types here
    """Follows a training: writes its logs, reports its progress, and stops it on request or where it diverges.

    Only the first of several processes writes and reports.

    Args:
        run_dir: where the logs are.
        writes: whether this process is the one that writes.
        stop_on_divergence: whether a loss that has blown up ends the training.
        progress: told of every step.
        cancellation: read between steps; one process's wish stops all of them.

    Attributes:
        stopped: whether the training was ended on request.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        writes: bool = True,
        stop_on_divergence: bool = True,
        progress: ProgressCallback,
        cancellation: Cancellation | None,
    ) -> None:
        self._log_path = run_dir / "trainer_log.jsonl"
        self._text_path = run_dir / "running_log.txt"
        self._writes = writes
        self._stop_on_divergence = stop_on_divergence
        self._progress = progress
        self._cancellation = cancellation
        self._started, self._first_step = time.monotonic(), 0
        self._rows: list[LogRow] = []
        self.stopped = False

    def note(self, line: str) -> None:
        """Append a line to the readable log."""
        if not self._writes:
            return
        with self._text_path.open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now().astimezone().isoformat(sep=' ', timespec='seconds')}  {line}\n")

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Start the clock."""
        self._started, self._first_step = time.monotonic(), state.global_step
        self._report(state)

    def on_pre_optimizer_step(self, _args: Any, state: Any, _control: Any, *, model: Any, **_: Any) -> None:
        """Look at the first gradients.

        Raises:
            RecipeError: there are none, so that nothing would be learned.
        """
        if state.global_step > self._first_step:
            return
        gradients = [weight.grad for weight in model.parameters() if weight.requires_grad and weight.grad is not None]
        if not any(torch.any(gradient != 0) for gradient in gradients):
            raise RecipeError(
                "Nothing learns: no weight of the adapter has a gradient.",
                where=f"step {state.global_step + 1}",
                expected="modules that the loss depends on",
                next_step="choose other lora_target modules",
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report the step; where the training is to stop, have it logged and saved first."""
        self._report(state)
        # Batches of other lengths leave holes that nothing fits into; a run's memory would grow with its steps.
        give_memory_back(collect=False)
        if self._asked_to_stop(args.world_size) and state.global_step < state.max_steps:
            self.stopped = True
            control.should_log = control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_prediction_step(self, args: Any, _state: Any, _control: Any, **_: Any) -> None:
        """Stop within an evaluation if that was asked for; several processes wait for its end.

        Raises:
            Cancelled: that was asked for.
        """
        if self._cancellation is not None and args.world_size == 1:
            self._cancellation.check()

    def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Append a log row with LLaMA-Factory's keys; what was not measured is left out.

        Raises:
            RecipeError: the loss has blown up.
        """
        logs = logs or {}
        elapsed, done = time.monotonic() - self._started, state.global_step - self._first_step
        step, total = state.global_step, state.max_steps
        row = {
            "current_steps": step,
            "total_steps": total,
            "loss": logs.get("loss"),
            "eval_loss": logs.get("eval_loss"),
            "lr": logs.get("learning_rate"),
            "epoch": logs.get("epoch"),
            "percentage": round(step / total * 100, 2) if total else 100.0,
            "elapsed_time": str(timedelta(seconds=int(elapsed))),
            "remaining_time": str(timedelta(seconds=int(elapsed / done * (total - step)) if done else 0)),
        }
        if self._writes:
            with self._log_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({key: value for key, value in row.items() if value is not None}) + "\n")
        measured = {key: logs[key] for key in ("loss", "eval_loss", "grad_norm", "learning_rate") if key in logs}
        if measured:
            self.note(f"step {step}/{total}  " + "  ".join(f"{key} {value:.4g}" for key, value in measured.items()))
        if "loss" in logs:
            self._rows.append(LogRow(step=step, loss=logs["loss"], grad_norm=logs.get("grad_norm")))
            self._refuse_divergence()

    def on_save(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Note the checkpoint."""
        self.note(f"saved checkpoint-{state.global_step}")

    def _report(self, state: Any) -> None:
        detail = f"loss {self._rows[-1].loss:.3g}" if self._rows else ""
        if self._writes:
            self._progress(Progress("train", state.global_step, state.max_steps, "steps", detail))

    def _asked_to_stop(self, processes: int) -> bool:
        asked = self._cancellation is not None and self._cancellation.requested
        if processes == 1:
            return asked
        from accelerate.utils import gather_object

        return any(gather_object([asked]))

    def _refuse_divergence(self) -> None:
        """End a training whose loss has blown up, by the same measure that reads it afterwards."""
        if not self._stop_on_divergence or len(self._rows) % max(1, len(self._rows) // _LOOKS_AT_HEALTH):
            return
        for finding in health(self._rows, {}, None):
            if finding.code == "loss_diverged":
                params = finding.params
                raise RecipeError(
                    "Training diverged: the loss has blown up.",
                    where=f"step {params['step']}",
                    expected=f"about {params['low']:.3g}, as at step {params['low_step']}",
                    found=f"{params['last']:.3g}",
                    next_step="train with a lower learning_rate; stop_on_divergence=false lets a loss rise",
                )
