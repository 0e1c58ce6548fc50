"""What a training takes is foretold by playing it through; what is played is what then happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, Gemma2Config, GPT2Config, LlamaConfig, MixtralConfig

from tunesmith.train.batches import Example, collate, layout_of
from tunesmith.train.estimate import _HOLES, Estimate, _without_weights, estimate
from tunesmith.train.play import _layers, play
from tunesmith.train.prepare import prepare
from tunesmith.train.quiet import quiet_libraries

from .conftest import RecipeMaker
from .test_trainer import build

SIZES = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "gemma2": lambda: Gemma2Config(**SIZES | {"num_hidden_layers": 13}, head_dim=8, sliding_window=8),
    "gpt2": lambda: GPT2Config(vocab_size=200, n_embd=32, n_layer=7, n_head=4, **ENDS),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4),
}


def rows(*lengths: int) -> list[Example]:
    """Encoded rows, the second half of each supervised."""
    return [
        {"input_ids": list(range(5, 5 + length)), "labels": [-100] * (length // 2) + [7] * (length - length // 2)}
        for length in lengths
    ]


def estimated(recipe: Any, config: Any, examples: list[Example], **changes: Any) -> Estimate | None:
    """An estimate of one step in float32 on a CPU."""
    machine = {"dtype": "float32", "device": "cpu", "free_bytes": None, "steps": 1, "pad_token_id": 0}
    with quiet_libraries():
        return estimate(recipe, config, examples, **(machine | changes))


@pytest.mark.parametrize(
    ("name", "checkpointed"),
    [("llama", False), ("llama", True), ("gemma2", False), ("gpt2", False), ("mixtral", True)],
)
def test_one_layer_of_each_kind_tells_of_all(recipe_for: RecipeMaker, name: str, checkpointed: bool) -> None:
    """Products and memory are those of the whole model, of fewer layers; and the model has all of them afterwards."""
    recipe = recipe_for(lora_target="q_proj,v_proj" if name in ("gemma2", "mixtral") else "all")
    with quiet_libraries():
        model, layout = _without_weights(recipe, CONFIGS[name](), dtype="float32", device="cpu", pad_token_id=0)
        batch = collate(rows(40, 25, 12), layout=layout)
        before = [(key, weight.shape, weight.device) for key, weight in model.named_parameters()]
        calls: list[int] = []
        for layer in _layers(model):
            layer.register_forward_pre_hook(lambda *_: calls.append(1))
        whole = play(model, batch, dtype="float32", checkpointed=checkpointed, whole=True)
        every = len(calls)
        short = play(model, batch, dtype="float32", checkpointed=checkpointed)
    assert short == whole
    assert whole.flops > 0
    assert 0 < len(calls) - every < every
    assert [(key, weight.shape, weight.device) for key, weight in model.named_parameters()] == before


def test_layers_that_differ_are_played_apart(recipe_for: RecipeMaker) -> None:
    """Without an adapter below, no gradient goes there."""
    recipe = recipe_for(lora_target="q_proj,v_proj", layers_to_transform=[4, 5, 6, 7, 8, 9])
    with quiet_libraries():
        config = LlamaConfig(**SIZES | {"num_hidden_layers": 12})
        model, layout = _without_weights(recipe, config, dtype="float32", device="cpu", pad_token_id=0)
        batch = collate(rows(40, 25), layout=layout)
        whole = play(model, batch, dtype="float32", checkpointed=False, whole=True)
        assert play(model, batch, dtype="float32", checkpointed=False) == whole


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
def test_played_pass_is_a_real_one(base_dir: Path, recipe_for: RecipeMaker, checkpointed: bool) -> None:
    """Torch's own counter of products, and its profiler's record of memory, of the trainer's step on real weights."""
    # Torch counts the products of attention where it is written out only.
    recipe = recipe_for(flash_attn="disabled", gradient_checkpointing=checkpointed, per_device_train_batch_size=4)
    with quiet_libraries():
        trainer = build(base_dir, recipe)
        layout = layout_of(trainer.model.config, 0, device="cpu")
        assert not layout.flat
        batch = collate(prepare(recipe, base_dir).train.examples[:4], layout=layout)
        config = AutoConfig.from_pretrained(base_dir)
        model, _ = _without_weights(recipe, config, dtype="float32", device="cpu", pad_token_id=0)
        played = play(model, batch, dtype="float32", checkpointed=checkpointed)
        if checkpointed:
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
            trainer.model.enable_input_require_grads()
        trainer.model.train()
        with FlopCounterMode(display=False) as counter:
            trainer.compute_loss(trainer.model, batch).backward()
        peak = real_peak(lambda: trainer.compute_loss(trainer.model, batch).backward())
    assert played.flops == counter.get_total_flops()
    assert 0.9 < played.peak_bytes / peak < 1.1


def real_peak(work: Any) -> int:
    """Bytes that torch held at once at most during some work, beyond those that it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = record.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted((one for one in events if one.name() == "[memory]"), key=lambda one: one.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_weights_and_adapter_are_counted(base_dir: Path, recipe_for: RecipeMaker) -> None:
    """In the dtype of the base; four bits of what is quantized, and not of embeddings; 16 bytes of a trained number."""
    recipe = recipe_for()
    config = AutoConfig.from_pretrained(base_dir)
    trainer = build(base_dir, recipe)
    trained = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    frozen = {id(weight): weight for weight in trainer.model.parameters() if not weight.requires_grad}
    found = estimated(recipe, config, rows(20, 30))
    half = estimated(recipe, config, rows(20, 30), dtype="bfloat16")
    quantized = estimated(recipe_for(quantization_bit=4), config, rows(20, 30))
    assert found is not None
    assert half is not None
    assert quantized is not None
    assert found.trained_parameters == trained
    assert found.adapter_bytes == 16 * trained
    assert found.weights_bytes == sum(4 * weight.numel() for weight in frozen.values())
    assert half.weights_bytes == found.weights_bytes // 2
    embeddings = trainer.model.get_input_embeddings().weight
    matrices = sum(weight.numel() for weight in frozen.values() if weight.dim() > 1 and weight is not embeddings)
    assert quantized.weights_bytes == found.weights_bytes - matrices * 7 // 2


def test_time_and_memory_go_with_steps_passes_and_the_largest_batch(recipe_for: RecipeMaker) -> None:
    """Accumulated batches cost time, not memory; one long row costs memory, and hardly time among many."""
    config = LlamaConfig(**SIZES | {"num_hidden_layers": 2})
    recipe = recipe_for(per_device_train_batch_size=2)
    once = estimated(recipe, config, rows(*[24] * 16))
    summed = estimated(
        recipe_for(per_device_train_batch_size=2, gradient_accumulation_steps=3), config, rows(*[24] * 16), steps=2
    )
    uneven = estimated(recipe, config, rows(*[24] * 15, 192))
    assert once is not None
    assert summed is not None
    assert uneven is not None
    assert summed.flops == pytest.approx(6 * once.flops, rel=1e-6)
    assert summed.activations_bytes == once.activations_bytes
    assert uneven.activations_bytes > 3 * once.activations_bytes
    assert uneven.flops < 2 * once.flops


def test_rows_that_are_accumulated_within_a_batch_are_counted(recipe_for: RecipeMaker) -> None:
    """A batch of long rows is several passes: as many products, and the memory of one."""
    config = LlamaConfig(**SIZES | {"num_hidden_layers": 2})
    one, four = (estimated(recipe_for(per_device_train_batch_size=size), config, rows(*[256] * 4)) for size in (1, 4))
    assert one is not None
    assert four is not None
    assert four.flops == pytest.approx(4 * one.flops, rel=1e-6)
    assert four.activations_bytes == one.activations_bytes


def test_gradients_are_counted_with_the_adapter_alone(recipe_for: RecipeMaker) -> None:
    """Not a second time with what a pass holds."""
    found = estimated(recipe_for(lora_rank=512), LlamaConfig(**SIZES | {"num_hidden_layers": 3}), rows(4))
    assert found is not None
    assert found.activations_bytes < 4 * found.trained_parameters


def test_holes_between_blocks_are_the_c_allocators(recipe_for: RecipeMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Glibc leaves them on a CPU; a GPU's allocator has none to speak of."""
    monkeypatch.setattr("sys.platform", "linux")
    config, recipe = CONFIGS["llama"](), recipe_for(per_device_train_batch_size=1, flash_attn="disabled")
    on_cpu = estimated(recipe, config, rows(64))
    elsewhere = estimated(recipe, config, rows(64), device="cuda")
    assert on_cpu is not None
    assert elsewhere is not None
    assert on_cpu.activations_bytes == pytest.approx((1 + _HOLES) * elsewhere.activations_bytes, rel=1e-6)


def test_a_model_whose_layers_look_at_values_is_not_estimated(
    recipe_for: RecipeMaker, capfd: pytest.CaptureFixture[str]
) -> None:
    """There is no number rather than a wrong one, and torch's complaint is not the user's."""
    config = CONFIGS["mixtral"]()
    config._experts_implementation = "eager"  # each expert asks which tokens are its own
    assert estimated(recipe_for(lora_target="q_proj"), config, rows(16, 12)) is None
    assert "".join(capfd.readouterr()) == ""


def test_gradient_checkpointing_changes_no_number(base_dir: Path, recipe_for: RecipeMaker, tmp_path: Path) -> None:
    """Losses of a run with it are those of one without, to the last bit."""
    losses = []
    for checkpointed in (False, True):
        folder = tmp_path / str(checkpointed)
        folder.mkdir()
        with quiet_libraries():
            trainer = build(
                base_dir, recipe_for(gradient_checkpointing=checkpointed, max_steps=3, output_dir=str(folder))
            )
            assert trainer.args.gradient_checkpointing is checkpointed
            trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]


def test_playing_leaves_nothing_on(recipe_for: RecipeMaker) -> None:
    """What is computed afterwards has numbers."""
    estimated(recipe_for(gradient_checkpointing=True), CONFIGS["llama"](), rows(16, 12))
    assert float(torch.ones(2).sum()) == 2.0
