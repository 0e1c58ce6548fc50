"""What a training will do, told before it begins: its rows, its length, its memory and its time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.progress import Cancellation, ProgressCallback, no_progress
from tunesmith.record import Finding, Part, Record
from tunesmith.train.arguments import rows_a_pass
from tunesmith.train.estimate import Estimate, estimate
from tunesmith.train.keys import KeyUse
from tunesmith.train.prepare import Prepared, load_config, prepare
from tunesmith.train.processes import processes
from tunesmith.train.quiet import quiet_libraries
from tunesmith.train.recipe import Recipe
from tunesmith.train.rows import IGNORED

_BARS = 12
# Beside its products a step adds, norms and copies; found on small models, where that weighs most.
_OVERHEAD = 1.6
# Of one token in float32, a number of the hidden state, a vocabulary entry and a pair of attention:
# https://arxiv.org/abs/2205.05198, section 4, twice.
_LAYER_BYTES, _HEAD_BYTES, _ATTENTION_BYTES = 2 * 4 * 34, 4 * 4, 4 * 5
_PLAINLY = 0.125  # of the free memory; the weights take some of it


class TokenLengths(Part):
    """How long the rows are, in tokens, before any is cut.

    Attributes:
        shortest: of all rows.
        median: half of the rows are no longer.
        p95: 95 % of the rows are no longer.
        longest: of all rows.
        edges: the histogram's bounds, one more than it has bars; a bar ends before its right one.
        counts: rows in each bar.
    """

    shortest: int
    median: int
    p95: int
    longest: int
    edges: tuple[int, ...]
    counts: tuple[int, ...]


class Piece(Part):
    """A stretch of the first example.

    Attributes:
        text: as the tokens decode, special ones included.
        supervised: whether it counts in the loss.
    """

    text: str
    supervised: bool


class MemoryPlan(Part):
    """What a training takes of the memory of its device, in bytes.

    Attributes:
        weights_bytes: the base.
        adapter_bytes: the trained weights, their gradients and the optimizer's state.
        activations_bytes: what the largest batch keeps for the backward pass, as it will be trained.
        total_bytes: the three together.
        free_bytes: what is free now; None where that cannot be told.
    """

    weights_bytes: int
    adapter_bytes: int
    activations_bytes: int
    total_bytes: int
    free_bytes: int | None


class TrainingPlan(Record):
    """What a training will do.

    Attributes:
        base_model: the base, as the recipe names it.
        output_dir: the run directory that will be made.
        device: what it is computed on.
        dtype: what the base is computed in.
        dtype_note: why, where the recipe wishes for something else; else None.
        keys: every key of the recipe and what becomes of it.
        findings: what was found in the rows, and decided of their template.
        train_rows: rows that are trained on.
        held_out_rows: rows that are kept from training.
        lengths: how long the training rows are.
        cutoff_len: the most tokens of a row.
        cut_rows: rows that lose their end.
        packs: rows that the training rows are packed into; None where they are not.
        tokens: tokens of the training rows.
        supervised_tokens: those of them that count in the loss.
        epochs: passes over the rows.
        steps: optimizer steps.
        rows_a_step: rows of one optimizer step, over all processes.
        rows_a_batch: those of them that one process takes between two accumulations.
        accumulated: batches that each process accumulates a step.
        processes: how many train together; memory is that of one of them.
        trained_parameters: numbers that are trained; None where the model cannot be played through.
        gradient_checkpointing: whether each forward pass is made a second time to save memory.
        memory: None where the model cannot be played through.
        seconds: about how long it takes; None where that cannot be told.
        example: the first row as it is trained on.
    """

    base_model: str
    output_dir: str
    device: str
    dtype: str
    dtype_note: str | None
    keys: tuple[KeyUse, ...]
    findings: tuple[Finding, ...]
    train_rows: int
    held_out_rows: int
    lengths: TokenLengths
    cutoff_len: int
    cut_rows: int
    packs: int | None
    tokens: int
    supervised_tokens: int
    epochs: float
    steps: int
    rows_a_step: int
    rows_a_batch: int
    accumulated: int
    processes: int
    trained_parameters: int | None
    gradient_checkpointing: bool
    memory: MemoryPlan | None
    seconds: float | None
    example: tuple[Piece, ...]


@dataclass(frozen=True)
class Machine:
    """What training runs on.

    Attributes:
        dtype: what the base is computed in.
        device: ``cpu``, ``cuda`` ….
        free_bytes: memory that is free on the device; None where that cannot be told.
    """

    dtype: str
    device: str
    free_bytes: int | None = None


def plan_training(
    recipe: Recipe,
    base_dir: Path,
    machine: Machine,
    *,
    flops_per_s: float | None = None,
    dtype_note: str | None = None,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> TrainingPlan:
    """Tell what a training will do; no weight is read, and nothing is written.

    Args:
        recipe: the recipe, its ``dtype`` decided.
        base_dir: the base model's directory.
        machine: what it will run on.
        flops_per_s: multiplications and additions that it does a second; None where that is not known.
        dtype_note: why the dtype is another than the recipe wishes for.
        progress: told of the rows.
        cancellation: read between rows.

    Raises:
        DataError: rows that cannot be trained on.
        RecipeError: a recipe that does not fit its rows or its model.
        BaseModelError: the base's tokenizer cannot be loaded.
    """
    with quiet_libraries():
        prepared = prepare(recipe, base_dir, progress=progress, cancellation=cancellation)
        examples = prepared.train.examples
        steps, epochs = steps_of(recipe, len(examples))
        found = _estimate(recipe, prepared, load_config(base_dir), machine, steps=steps)
    checkpointing = bool(recipe.gradient_checkpointing) if found is None else found.checkpointing
    return TrainingPlan(
        base_model=recipe.model_name_or_path,
        output_dir=str(recipe.output_dir),
        device=machine.device,
        dtype=machine.dtype,
        dtype_note=dtype_note,
        keys=recipe.key_uses,
        findings=prepared.findings,
        train_rows=len(prepared.train.lengths) - prepared.train.dropped_rows.count,
        held_out_rows=len(prepared.rows.held_out),
        lengths=lengths_of(prepared.train.lengths),
        cutoff_len=recipe.cutoff_len,
        cut_rows=prepared.train.cut_rows.count,
        packs=len(examples) if recipe.packing else None,
        tokens=sum(len(example["input_ids"]) for example in examples),
        supervised_tokens=prepared.train.supervised_tokens,
        epochs=epochs,
        steps=steps,
        rows_a_step=rows_a_step(recipe),
        rows_a_batch=recipe.per_device_train_batch_size,
        accumulated=recipe.gradient_accumulation_steps,
        processes=processes(),
        trained_parameters=None if found is None else found.trained_parameters,
        gradient_checkpointing=checkpointing,
        memory=None if found is None else _memory(found, machine),
        seconds=None if found is None else _seconds(found, flops_per_s),
        example=shown_example(prepared.tokenizer, examples[0]),
    )


def _estimate(recipe: Recipe, prepared: Prepared, config: Any, machine: Machine, *, steps: int) -> Estimate | None:
    pad = prepared.tokenizer.pad_token_id or 0
    return estimate(
        recipe,
        config,
        prepared.train.examples,
        dtype=machine.dtype,
        device=machine.device,
        free_bytes=machine.free_bytes,
        steps=steps,
        pad_token_id=pad,
    )


def _memory(found: Estimate, machine: Machine) -> MemoryPlan:
    return MemoryPlan(
        weights_bytes=found.weights_bytes,
        adapter_bytes=found.adapter_bytes,
        activations_bytes=found.activations_bytes,
        total_bytes=found.weights_bytes + found.adapter_bytes + found.activations_bytes,
        free_bytes=machine.free_bytes,
    )


def _seconds(found: Estimate, flops_per_s: float | None) -> float | None:
    return None if flops_per_s is None else found.flops * _OVERHEAD / flops_per_s / processes()


def rows_a_step(recipe: Recipe) -> int:
    """Rows of one optimizer step, over all processes: the effective batch."""
    return recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps * processes()


def steps_of(recipe: Recipe, rows: int) -> tuple[int, float]:
    """Optimizer steps, and the passes over the rows that these are; as the Trainer counts them."""
    batches = rows / (recipe.per_device_train_batch_size * processes())
    whole = math.floor(batches) if recipe.dataloader_drop_last else math.ceil(batches)
    a_pass = max(1, math.ceil(whole / recipe.gradient_accumulation_steps))
    if recipe.max_steps and recipe.max_steps > 0:
        return recipe.max_steps, recipe.max_steps / a_pass
    return math.ceil(recipe.num_train_epochs * a_pass), recipe.num_train_epochs


def needs_checkpointing(recipe: Recipe, prepared: Prepared, config: Any, machine: Machine) -> bool:
    """Whether activations are too many to be kept: they would take more than half of what the weights leave free.

    Args:
        recipe: the recipe; where it says, that is done.
        prepared: the rows.
        config: the base's configuration.
        machine: what is trained on.
    """
    if recipe.gradient_checkpointing is not None or machine.free_bytes is None:
        return bool(recipe.gradient_checkpointing)
    lengths = [len(example["input_ids"]) for example in prepared.train.examples]
    tokens = max(lengths) * rows_a_pass(recipe, lengths, device=machine.device)
    if _bytes_at_most(config, tokens, max(lengths)) < _PLAINLY * machine.free_bytes:
        return False  # it need not be played through
    found = _estimate(recipe, prepared, config, machine, steps=1)
    return found is not None and found.checkpointing


def _bytes_at_most(config: Any, tokens: int, longest: int) -> float:
    """What the layers and the head keep of a batch, and rather more; the attention of models that keep its weights."""
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", 1)
    attention = _ATTENTION_BYTES * longest * getattr(text, "num_attention_heads", 1)
    return float(tokens * (layers * (_LAYER_BYTES * text.hidden_size + attention) + _HEAD_BYTES * text.vocab_size))


def lengths_of(lengths: Sequence[int]) -> TokenLengths:
    """Describe lengths in tokens."""
    ordered = sorted(lengths)
    width = max(1, math.ceil((ordered[-1] + 1 - ordered[0]) / _BARS))
    edges = [ordered[0] + width * bar for bar in range(math.ceil((ordered[-1] + 1 - ordered[0]) / width) + 1)]
    counts = [0] * (len(edges) - 1)
    for length in ordered:
        counts[(length - ordered[0]) // width] += 1
    return TokenLengths(
        shortest=ordered[0],
        median=ordered[(len(ordered) - 1) // 2],
        p95=ordered[math.ceil(0.95 * len(ordered)) - 1],
        longest=ordered[-1],
        edges=tuple(edges),
        counts=tuple(counts),
    )


def shown_example(tokenizer: Any, example: dict[str, list[int]]) -> tuple[Piece, ...]:
    """An encoded row in stretches of text that count in the loss or do not."""
    pieces: list[Piece] = []
    ids, labels, start = example["input_ids"], example["labels"], 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or (labels[end] == IGNORED) != (labels[start] == IGNORED):
            pieces.append(Piece(text=tokenizer.decode(ids[start:end]), supervised=labels[start] != IGNORED))
            start = end
    return tuple(pieces)
