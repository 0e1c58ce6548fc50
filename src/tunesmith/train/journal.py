"""What is written down while training runs: the log rows, the readable log, and the progress that people see.

Importing this module imports transformers.
"""

from __future__ import annotations

import json
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tunesmith.allocator import give_memory_back
from tunesmith.progress import Cancellation, Progress, ProgressCallback


class Journal(TrainerCallback):  # type: ignore[misc] # transformers has no types here
    """Follows a training: writes its logs, reports its progress, and stops it on request.

    Args:
        run_dir: where the logs are.
        progress: told of every step.
        cancellation: read between steps.
    """

    def __init__(self, run_dir: Path, *, progress: ProgressCallback, cancellation: Cancellation | None) -> None:
        self._log_path = run_dir / "trainer_log.jsonl"
        self._text_path = run_dir / "running_log.txt"
        self._progress = progress
        self._cancellation = cancellation
        self._started = time.monotonic()
        self._loss: float | None = None

    def note(self, line: str) -> None:
        """Append a line to the readable log."""
        with self._text_path.open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now().astimezone().isoformat(sep=' ', timespec='seconds')}  {line}\n")

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Start the clock."""
        self._started = time.monotonic()
        self._report(state)

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Report the step, and stop there if that was asked for."""
        self._report(state)
        # Batches of other lengths leave holes that nothing fits into; a run's memory would grow with its steps.
        give_memory_back(collect=False)
        self._stop_if_asked()

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        """Stop within an accumulated step if that was asked for."""
        self._stop_if_asked()

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        """Stop within an evaluation if that was asked for."""
        self._stop_if_asked()

    def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Append a log row with LLaMA-Factory's keys; what was not measured is left out."""
        logs = logs or {}
        elapsed = time.monotonic() - self._started
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
            "remaining_time": str(timedelta(seconds=int(elapsed / step * (total - step)) if step else 0)),
        }
        with self._log_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({key: value for key, value in row.items() if value is not None}) + "\n")
        self._loss = logs.get("loss", self._loss)
        measured = {key: logs[key] for key in ("loss", "eval_loss", "grad_norm", "learning_rate") if key in logs}
        if measured:
            self.note(f"step {step}/{total}  " + "  ".join(f"{key} {value:.4g}" for key, value in measured.items()))

    def on_save(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Note the checkpoint."""
        self.note(f"saved checkpoint-{state.global_step}")

    def _report(self, state: Any) -> None:
        detail = "" if self._loss is None else f"loss {self._loss:.3g}"
        self._progress(Progress("train", state.global_step, state.max_steps, "steps", detail))

    def _stop_if_asked(self) -> None:
        if self._cancellation is not None:
            self._cancellation.check()
