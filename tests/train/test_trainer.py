"""The trainer: the loss is the plain mean over the answers' tokens, however it is computed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tunesmith.conversations import Conversation, named_template
from tunesmith.errors import RecipeError
from tunesmith.train import Recipe, fit
from tunesmith.train.prepare import Prepared, load_tokenizer
from tunesmith.train.quiet import quiet_libraries
from tunesmith.train.rows import IGNORED, encode_rows, read_rows

from .conftest import CPU, RecipeMaker

# The trainer sums in float32 what the oracle sums in float64; 7 digits, a few lost over some hundred terms.
REL_FLOAT32 = 2e-5


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Where a trainer may write."""
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def build(base_dir: Path, recipe: Recipe, *, rows: list[Conversation] | None = None, held_out: int = 0) -> Any:
    """A trainer over the recipe's rows, the last ``held_out`` of them for evaluation."""
    with quiet_libraries():
        tokenizer = load_tokenizer(base_dir)
        read = read_rows(recipe)
        chosen = read.train if rows is None else rows
        parts = chosen[: len(chosen) - held_out], chosen[len(chosen) - held_out :]
        train, evaluation = (encode_rows(tokenizer, part, recipe=recipe) for part in parts)
        prepared = Prepared(read, tokenizer, named_template(tokenizer, None), train, evaluation)
        base = fit._Base(base_dir, "tiny", "ab" * 32, CPU, None)
        recipe = recipe.model_copy(update={"dtype": "float32"})
        return fit.build_trainer(recipe, prepared, model=fit.load_model(recipe, base), machine=CPU)


def rows_in(batch: dict[str, Any]) -> list[tuple[Any, Any]]:
    """The rows of a batch as each would be alone: token ids and labels, however they lie."""
    import torch

    ids, labels = batch["input_ids"], batch["labels"]
    if "row_bounds" not in batch:
        lengths = batch["attention_mask"].sum(1).tolist()
        return [(ids[row, :length], labels[row, :length]) for row, length in enumerate(lengths)]
    shared, *ends = batch["row_bounds"].tolist()
    starts = [shared, *ends[:-1]]
    return [
        (torch.cat((ids[0, :shared], ids[0, start:end])), torch.cat((labels[0, :shared], labels[0, start:end])))
        for start, end in zip(starts, ends, strict=True)
    ]


def stirred(trainer: Any) -> Any:
    """Give the adapter a non-zero ``lora_B``, so that it counts."""
    import torch

    generator = torch.Generator().manual_seed(1)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.1
    return trainer


def oracle_nats(trainer: Any, base_dir: Path, batch: dict[str, Any]) -> tuple[float, int]:
    """Float64, one row at a time, unpadded, every delta added into its weight by hand: summed nats, and tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    with quiet_libraries():
        model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float64)
    adapter = {name: weight.detach().double() for name, weight in trainer.model.named_parameters() if "lora_" in name}
    weights = dict(model.named_parameters())
    for name in [name for name in adapter if "lora_A" in name]:
        delta = adapter[name.replace("lora_A", "lora_B")] @ adapter[name] * (16 / 8)
        weights[name.removeprefix("base_model.model.").replace("lora_A.default.", "")].data += delta
    nats, tokens = 0.0, 0
    for ids, labels in rows_in(batch):
        with torch.no_grad():
            log_p = torch.log_softmax(model(ids[None]).logits[0], dim=-1)
        for place in range(1, len(ids)):
            if labels[place] != IGNORED:
                nats -= float(log_p[place - 1, labels[place]])
                tokens += 1
    return nats, tokens


def test_batches_supervise_exactly_the_answers(base_dir: Path, recipe_for: RecipeMaker, run_dir: Path) -> None:
    """What the collator feeds the model: each answer with its end-of-turn token, never a prompt token or padding."""
    recipe = recipe_for(output_dir=str(run_dir))
    trainer = build(base_dir, recipe)
    tokenizer = trainer.processing_class
    seen = []
    for batch in trainer.get_train_dataloader():
        for ids, labels in rows_in(batch):
            counted = labels != IGNORED
            assert (labels[counted] == ids[counted]).all()
            seen.append(tokenizer.decode(labels[counted]))
    answers = [
        "".join(f"{turn.content}<|im_end|>" for turn in row.messages if turn.role == "assistant")
        for row in read_rows(recipe).train
    ]
    assert sorted(seen) == sorted(answers)


def test_padded_batches_group_rows_of_like_length(base_dir: Path, recipe_for: RecipeMaker, run_dir: Path) -> None:
    """Padding is work for nothing; a model that takes no flat rows gets little of it."""
    recipe = recipe_for(output_dir=str(run_dir), flash_attn="disabled")
    trainer = build(base_dir, recipe, rows=read_rows(recipe).train * 10)
    grouped = sum(int((batch["attention_mask"] == 0).sum()) for batch in trainer.get_train_dataloader())
    trainer.args.train_sampling_strategy = "random"
    shuffled = sum(int((batch["attention_mask"] == 0).sum()) for batch in trainer.get_train_dataloader())
    assert grouped < 0.5 * shuffled


@pytest.mark.parametrize("attention", ["auto", "disabled"])
def test_first_loss_equals_a_float64_computation(
    base_dir: Path, recipe_for: RecipeMaker, run_dir: Path, attention: str
) -> None:
    """Independent of the collator, of flat rows and padded ones, PEFT's forward and the shortened output head."""
    trainer = stirred(build(base_dir, recipe_for(output_dir=str(run_dir), flash_attn=attention)))
    batch = next(iter(trainer.get_train_dataloader()))
    assert ("row_bounds" in batch) == (attention == "auto")
    nats, tokens = oracle_nats(trainer, base_dir, batch)
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(nats / tokens, rel=REL_FLOAT32)


def test_gradients_equal_those_of_the_plain_loss(base_dir: Path, recipe_for: RecipeMaker, run_dir: Path) -> None:
    """Showing the head only the supervised positions changes no gradient."""
    trainer = stirred(build(base_dir, recipe_for(output_dir=str(run_dir))))
    batch = next(iter(trainer.get_train_dataloader()))
    gradients = []
    rows = rows_in(batch)
    tokens = sum(int((labels != IGNORED).sum()) for _, labels in rows)

    def plain() -> Any:
        counts = [int((labels != IGNORED).sum()) for _, labels in rows]
        losses = [trainer.model(ids[None], labels=labels[None]).loss for ids, labels in rows]
        return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / tokens

    for loss_of in (lambda: trainer.compute_loss(trainer.model, batch), plain):
        trainer.model.zero_grad()
        loss_of().backward()
        gradients.append([weight.grad.double() for weight in trainer.model.parameters() if weight.requires_grad])
        trainer.model.double()  # what it is held against is exact
    for ours, exact in zip(*gradients, strict=True):
        # Of the whole, as an element near zero is a difference of terms as large as the others.
        assert (ours - exact).norm() <= REL_FLOAT32 * exact.norm(), (ours - exact).norm() / exact.norm()


def test_only_the_adapter_is_trained_and_in_float32(base_dir: Path, recipe_for: RecipeMaker, run_dir: Path) -> None:
    """The base's weights are frozen, the head's included."""
    trainable = {
        name: str(weight.dtype)
        for name, weight in build(base_dir, recipe_for(output_dir=str(run_dir))).model.named_parameters()
        if weight.requires_grad
    }
    assert all("lora_" in name and "lm_head" not in name for name in trainable)
    assert set(trainable.values()) == {"torch.float32"}


def test_accumulated_batches_have_the_loss_of_the_big_batch(
    base_dir: Path, recipe_for: RecipeMaker, tmp_path: Path
) -> None:
    """Tokens weigh the same whichever pass they are in; a mean of means would not do that."""
    rows = read_rows(recipe_for()).train[:4]
    logged = []
    for size, accumulated in ((4, 1), (1, 4)):
        recipe = recipe_for(
            output_dir=str(tmp_path / f"run-{size}"),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            max_steps=1,
        )
        trainer = build(base_dir, recipe, rows=rows)
        with quiet_libraries():
            trainer.train()
        logged.append(trainer.state.log_history[0])
    assert logged[0]["loss"] == pytest.approx(logged[1]["loss"], rel=REL_FLOAT32)
    assert logged[0]["grad_norm"] == pytest.approx(logged[1]["grad_norm"], rel=1e-4)


def test_held_out_loss_is_the_mean_over_tokens(base_dir: Path, recipe_for: RecipeMaker, run_dir: Path) -> None:
    """Seven rows in batches of four: a mean over batches would weigh the short ones too much."""
    trainer = stirred(build(base_dir, recipe_for(output_dir=str(run_dir), per_device_train_batch_size=1), held_out=7))
    with quiet_libraries():
        metrics = trainer.evaluate()
    totals = [oracle_nats(trainer, base_dir, batch) for batch in trainer.get_eval_dataloader()]
    assert len(totals) == 2
    expected = sum(nats for nats, _ in totals) / sum(tokens for _, tokens in totals)
    assert metrics["eval_loss"] == pytest.approx(expected, rel=REL_FLOAT32)


def test_loss_that_is_not_finite_stops_with_the_step_and_the_remedy(
    base_dir: Path, recipe_for: RecipeMaker, run_dir: Path
) -> None:
    """Trainer itself would hide it and go on."""
    trainer = build(base_dir, recipe_for(output_dir=str(run_dir), learning_rate=1e30, warmup_ratio=0))
    with quiet_libraries(), pytest.raises(RecipeError) as caught:
        trainer.train()
    assert caught.value.where in ("step 2", "step 3")
    assert "learning_rate=1e+29" in str(caught.value.next_step)
    assert not math.isfinite(float(str(caught.value.found)))


def test_lora_target_names_the_modules(base_dir: Path, recipe_for: RecipeMaker, run_dir: Path) -> None:
    """A list is taken as it is; ``all`` means every linear layer but the output head."""
    modules = []
    for target in ("q_proj,down_proj", "all"):
        trainer = build(base_dir, recipe_for(output_dir=str(run_dir), lora_target=target))
        names = (name for name, weight in trainer.model.named_parameters() if weight.requires_grad)
        modules.append({name.split(".lora_")[0].rpartition(".")[2] for name in names})
    assert modules[0] == {"q_proj", "down_proj"}
    assert modules[1] == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("target", ["query,q_proj", "lm_head", "embed_tokens"])
def test_lora_target_that_the_model_lacks_is_refused(
    base_dir: Path, recipe_for: RecipeMaker, run_dir: Path, target: str
) -> None:
    """The modules that there are are named."""
    with pytest.raises(RecipeError) as caught:
        build(base_dir, recipe_for(output_dir=str(run_dir), lora_target=target))
    assert caught.value.found == target.partition(",")[0]
    assert "q_proj" in str(caught.value.expected)


def test_nothing_is_reported_home(
    base_dir: Path, recipe_for: RecipeMaker, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's trainers send telemetry; ours does not."""
    import trl.trainer.base_trainer as theirs

    def sent(*_: object, **__: object) -> None:
        raise AssertionError("telemetry was sent")

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(theirs, "send_telemetry", sent, raising=False)  # TRL 0.24 has none
    assert build(base_dir, recipe_for(output_dir=str(run_dir))).eval_dataset is None


def test_saving_asks_no_hub(
    base_dir: Path, recipe_for: RecipeMaker, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT would look the base's vocabulary up under the name that the user gave it."""
    import peft.utils.save_and_load as theirs

    def asked(*_: object, **__: object) -> bool:
        raise AssertionError("the hub was asked")

    trainer = build(base_dir, recipe_for(output_dir=str(run_dir)))
    monkeypatch.setattr(theirs, "check_file_exists_on_hf_hub", asked)
    with quiet_libraries():
        trainer.save_model(str(run_dir))
    assert (run_dir / "adapter_model.safetensors").is_file()
