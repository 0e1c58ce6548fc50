"""Run directories in the shapes that the tools leave them, without training."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

EMPTY_PICKLE = pickle.dumps({})


def adapter(directory: Path, *, tokenizer: bool = True, **config: Any) -> Path:
    """An adapter's files; runs never opens the weights, so they need not be sound."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "base_model_name_or_path": "org/base", **config}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    (directory / "adapter_model.safetensors").write_bytes(b"never opened")
    if tokenizer:
        (directory / "tokenizer.json").write_text("{}")
    return directory


def state(directory: Path, history: list[dict[str, Any]], **fields: Any) -> None:
    """``trainer_state.json`` as the HF Trainer writes it, NaN and all."""
    document = {"global_step": 30, "max_steps": 30, "num_train_epochs": 3, "log_history": history, **fields}
    (directory / "trainer_state.json").write_text(json.dumps(document, indent=2))


def history(*losses: float, every: int = 10, **more: Any) -> list[dict[str, Any]]:
    """The Trainer's rows for these losses."""
    return [
        {
            "step": every * (index + 1),
            "epoch": index + 1.0,
            "loss": loss,
            "learning_rate": 1e-4,
            "grad_norm": 1.5,
            **more,
        }
        for index, loss in enumerate(losses)
    ]


def evaluations(*losses: float, every: int = 10) -> list[dict[str, Any]]:
    """The Trainer's rows for these held-out losses."""
    return [
        {"step": every * (index + 1), "epoch": index + 1.0, "eval_loss": loss, "eval_runtime": 0.5}
        for index, loss in enumerate(losses)
    ]


def jsonl(file: Path, rows: list[Any]) -> None:
    """A JSON-lines file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def factory_row(step: int, **fields: Any) -> dict[str, Any]:
    """A row of LLaMA-Factory's log."""
    return {"current_steps": step, "total_steps": 30, "epoch": step / 10, "percentage": 0.0, **fields}


def llama_factory(root: Path) -> Path:
    """A finished LLaMA-Factory run: root adapter, two checkpoints, both logs, results and pictures."""
    adapter(root)
    for step in (10, 20):
        state(adapter(root / f"checkpoint-{step}"), history(*(2.0, 1.5)[: step // 10]), global_step=step)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            (root / f"checkpoint-{step}" / name).write_bytes(EMPTY_PICKLE)
    state(root, history(2.0, 1.5, 1.2) + evaluations(1.9, 1.6, 1.4), best_model_checkpoint=f"{root}/checkpoint-20")
    jsonl(root / "trainer_log.jsonl", [factory_row(s, loss=x, lr=1e-4) for s, x in ((10, 2.0), (20, 1.5), (30, 1.2))])
    (root / "training_args.yaml").write_text("learning_rate: 1.0e-4\nlora_rank: 8\nlora_target: all\ndo_train: true\n")
    (root / "all_results.json").write_text(json.dumps({"train_loss": 1.56, "eval_loss": 1.4, "epoch": 3.0}))
    (root / "training_loss.png").write_bytes(b"x")
    (root / "training_args.bin").write_bytes(EMPTY_PICKLE)
    return root
