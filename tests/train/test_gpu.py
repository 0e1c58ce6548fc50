"""On a GPU a recipe does what it does on a CPU; ``python -m pytest -m gpu`` where there is one."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import tunesmith as ts
from tunesmith.errors import Cancelled
from tunesmith.models import VariantSet, token_logits
from tunesmith.progress import Cancellation, Progress
from tunesmith.train import Machine, Recipe, train
from tunesmith.train.plan import plan_training

from .conftest import CPU, RecipeMaker

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]
GPU = Machine("float32", "cuda")
GPU_BF16 = Machine("bfloat16", "cuda")
ADAPTER = "adapter_model.safetensors"
RELATIVE_LOSS = 1e-3  # sums in another order, over eight steps of AdamW, which divides by small numbers

Fit = Callable[..., Path]


@pytest.fixture
def fit(base_dir: Path, recipe_for: RecipeMaker, tmp_path: Path) -> Fit:
    """Trains the recipe into a directory of that name."""

    def run(name: str, machine: Machine, changes: dict[str, Any] | None = None, **options: Any) -> Path:
        recipe = recipe_for(output_dir=str(tmp_path / name), val_size=4, max_steps=8, **(changes or {}))
        told = {"base_dir": base_dir, "base_name": "tiny", "base_sha256": "ab" * 32} | options
        return train(recipe, machine=machine, **told)

    return run


def losses(run_dir: Path) -> list[float]:
    """The losses of every step."""
    rows = [json.loads(line) for line in (run_dir / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("changes", [{}, {"flash_attn": "disabled"}, {"gradient_checkpointing": True}])
def test_losses_are_those_of_a_cpu(fit: Fit, changes: dict[str, Any]) -> None:
    """In float32, but for the order of sums, once the rows come in one order."""
    changes |= {"train_sampling_strategy": "sequential"}
    on_gpu, on_cpu = losses(fit("gpu", GPU, changes)), losses(fit("cpu", CPU, changes))
    assert len(on_gpu) == 8
    assert on_gpu == pytest.approx(on_cpu, rel=RELATIVE_LOSS)


def test_base_is_bf16_and_the_adapter_float32(fit: Fit) -> None:
    """Trained weights are saved as they were trained, the loss falls, and nothing is found in the directory."""
    run_dir = fit("run", GPU_BF16, {"learning_rate": 1e-2, "num_train_epochs": 4})
    seen = losses(run_dir)
    assert seen[-1] < seen[0]
    assert {tensor.dtype for tensor in load_file(run_dir / ADAPTER).values()} == {torch.float32}
    assert [finding.code for finding in ts.open_run(run_dir).findings if finding.severity != "info"] == []


@pytest.mark.parametrize("machine", [GPU, GPU_BF16], ids=["float32", "bfloat16"])
def test_resumed_run_has_the_losses_of_the_unbroken_one(fit: Fit, machine: Machine) -> None:
    """Dropout and the order of the rows included."""
    hard = {"lora_dropout": 0.1, "save_steps": 2}
    whole = fit("whole", machine, hard)
    cancellation = Cancellation()

    def seen(event: Progress) -> None:
        if event.stage == "train" and event.done == 3:
            cancellation.cancel()

    with pytest.raises(Cancelled):
        fit("run", machine, hard, progress=seen, cancellation=cancellation)
    resumed = fit("run", machine, hard | {"resume_from_checkpoint": True})
    assert losses(resumed) == losses(whole)
    assert (resumed / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()


def test_adapter_scores_alike_on_both(fit: Fit, base_dir: Path) -> None:
    """What was trained on a GPU is the same adapter on a CPU."""
    run_dir = fit("run", GPU)
    on_gpu, on_cpu = (
        token_logits(
            VariantSet.load(base_dir, adapters={"final": run_dir}, tokenizer_dir=base_dir, device=device),
            "final",
            [1, 5, 9, 14, 30, 7, 22],
            7,
        ).cpu()
        for device in ("cuda", "cpu")
    )
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_as_foretold(base_dir: Path, recipe_for: RecipeMaker, tmp_path: Path, checkpointing: bool) -> None:
    """Of a model that is large enough for its activations to weigh; peaks of torch's allocator."""
    config = copy.deepcopy(AutoConfig.from_pretrained(base_dir))
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 1024, 4096, 8
    config.vocab_size, config.head_dim = 32000, 256
    large = tmp_path / "large"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(large)
    for file in base_dir.glob("*token*"):
        (large / file.name).write_bytes(file.read_bytes())
    (large / "chat_template.jinja").write_bytes((base_dir / "chat_template.jinja").read_bytes())
    rows = [{"instruction": f"{number} {'key ' * 120}", "output": "lock it away " * 60} for number in range(8)]
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe: Recipe = recipe_for(
        dataset=str(data), max_steps=3, gradient_checkpointing=checkpointing, per_device_train_batch_size=8
    )
    plan = plan_training(recipe, large, GPU_BF16)
    gc.collect()  # what earlier tests left would be freed while we measure
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    train(recipe, base_dir=large, base_name="large", base_sha256="ab" * 32, machine=GPU_BF16)
    peak = torch.cuda.max_memory_allocated() - before
    assert plan.memory is not None
    assert plan.memory.total_bytes == pytest.approx(peak, rel=0.2)
