"""Train an adapter, and leave a run directory that tells the whole story."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import BaseModelError, Cancelled, MissingExtraError
from tunesmith.models import avoid_cudnn_attention
from tunesmith.progress import Cancellation, Progress, ProgressCallback, no_progress
from tunesmith.record import Finding
from tunesmith.train.arguments import (
    attention_implementation,
    lora_config,
    loraplus_optimizer,
    quantization_config,
    rows_a_pass,
    training_arguments,
)
from tunesmith.train.keys import AS_ANYWAY
from tunesmith.train.manifest import MANIFEST_NAME, Manifest, unplaced
from tunesmith.train.plan import Machine, needs_checkpointing, rows_a_step, steps_of
from tunesmith.train.prepare import Prepared, prepare
from tunesmith.train.processes import ALONE, Peers, is_main_process, processes
from tunesmith.train.quiet import quiet_libraries
from tunesmith.train.recipe import Recipe
from tunesmith.train.resume import (
    checkpoint_to_resume,
    goes_on_in_place,
    refuse_done,
    refuse_other_data,
    refuse_other_processes,
)
from tunesmith.train.rows import IGNORED, write_held_out
from tunesmith.train.run_dir import claim, clear, drop_unfinished, publish, write_recipe, writing
from tunesmith.train.strategy import refuse_other_strategy, save_whole_adapters

if TYPE_CHECKING:
    from tunesmith.train.journal import Journal
    from tunesmith.train.trainer import SupervisedTrainer

_PROBE_LENGTHS = (64, 24, 48)  # tokens
_EXTRA_PACKAGES = ("trl", "datasets")
_VERSIONED = ("tunesmith", "torch", "transformers", "peft", "trl")


def check_installed() -> None:
    """Refuse to begin where the libraries that train are not there.

    Raises:
        MissingExtraError: trl or datasets is not installed.
    """
    for package in _EXTRA_PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError("train", "train", package)


def train(
    recipe: Recipe,
    *,
    base_dir: Path,
    base_name: str,
    base_sha256: str,
    machine: Machine,
    dtype_note: str | None = None,
    peers: Peers = ALONE,
    told: Callable[[Finding | str], None] = lambda _: None,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> Path:
    """Fine-tune a LoRA adapter on the answers of a data set.

    The base is read in ``machine.dtype`` and stays as it is; the adapter is trained in float32.  The loss is the mean
    over the answers' tokens.  One seed gives one adapter, byte for byte, on one machine.

    Args:
        recipe: what to do.
        base_dir: the base model's directory; its ``model_name_or_path`` is not looked at.
        base_name: the base as the user named it, for ``adapter_config.json``.
        base_sha256: hash of the base's weights, for the manifest.
        machine: number format, device and free memory.
        dtype_note: why that number format is another than the recipe wishes for; for the log.
        peers: the processes that train together.
        told: told, before training begins, what is done otherwise than it may seem.
        progress: told of every optimizer step.
        cancellation: read between steps.

    Returns:
        The run directory.

    Raises:
        Cancelled: that was asked for, or Ctrl-C was pressed; checkpoints and logs stay, and it says how to go on.
        DataError: rows that cannot be trained on.
        RecipeError: a recipe that does not fit the model or its rows, or under which the loss diverged.
        OutputError: ``output_dir`` may not, or can no longer, be written.
        BaseModelError: the base cannot be loaded.
        MissingExtraError: trl or datasets is not installed.
    """
    check_installed()
    # Of several processes only the first writes; it may have begun before another looks.
    resumed = checkpoint_to_resume(recipe)
    goes_on = goes_on_in_place(recipe, resumed)
    run_dir = claim(recipe, base_dir, goes_on=goes_on) if is_main_process() else recipe.output_dir.resolve()
    recipe = recipe.model_copy(update={"dtype": machine.dtype, "output_dir": run_dir})
    base = _Base(base_dir, base_name, base_sha256, machine, dtype_note)
    try:
        with quiet_libraries():
            _train(recipe, base, peers, resumed=resumed, told=told, progress=progress, cancellation=cancellation)
    except KeyboardInterrupt as interrupt:
        raise Cancelled from interrupt
    return run_dir


@dataclass(frozen=True)
class _Base:
    """The base model: where it is, what it is called, what it is, and what it is computed on."""

    directory: Path
    name: str
    sha256: str
    machine: Machine
    dtype_note: str | None


def _train(
    recipe: Recipe,
    base: _Base,
    peers: Peers,
    *,
    resumed: Path | None,
    told: Callable[[Finding | str], None],
    progress: ProgressCallback,
    cancellation: Cancellation | None,
) -> None:
    started, run_dir = time.monotonic(), recipe.output_dir
    main = is_main_process()
    if not main:
        progress = no_progress
    progress(Progress("read", 0, None, "rows"))
    prepared = prepare(recipe, base.directory, progress=progress, cancellation=cancellation)
    draft = _manifest(recipe, prepared, base)
    if resumed is not None:
        refuse_other_data(resumed, draft)
        refuse_other_processes(resumed)
        refuse_done(resumed, draft.steps)
    for said in _worth_saying(recipe, prepared, base.dtype_note) if main else ():
        told(said)
    save_whole_adapters()
    peers.agree("prepared")  # what comes next lets torch wait for all of them
    # What the libraries do not take is told before a long load.
    evaluates = bool(prepared.rows.held_out)
    training_arguments(recipe, device=base.machine.device, evaluates=evaluates, world_size=processes())
    progress(Progress("load", 0, None, "weights", base.name))
    from tunesmith.train.journal import Journal

    journal = Journal(
        run_dir,
        writes=main,
        stop_on_divergence=recipe.stop_on_divergence,
        progress=progress,
        cancellation=cancellation,
    )
    trainer = build_trainer(recipe, prepared, model=load_model(recipe, base), machine=base.machine, callbacks=[journal])
    refuse_other_strategy(trainer.accelerator, dtype=base.machine.dtype)
    peers.agree("built")
    # Everything that can be refused has been by now; only then does an earlier run make way.
    try:
        with writing(run_dir):
            if main:
                _begin(recipe, prepared, draft, goes_on=goes_on_in_place(recipe, resumed))
                _note_beginning(journal, draft, prepared, base.dtype_note, resumed)
            peers.agree("made")
            _run(trainer, run_dir, journal, resumed)
            if main:
                manifest = draft.model_copy(update={"wall_s": round(time.monotonic() - started, 3)})
                manifest.write(run_dir / MANIFEST_NAME)
                journal.note(f"done in {manifest.wall_s:.0f} s")
            peers.agree("done")
    except BaseException as error:
        if main:
            drop_unfinished(run_dir)
            with suppress(OSError):
                journal.note(f"stopped: {peers.why(error)}")
        raise


def _worth_saying(recipe: Recipe, prepared: Prepared, dtype_note: str | None) -> Iterator[Finding | str]:
    """Keys that change nothing, the number format, and what was found in the rows."""
    for use in recipe.key_uses:
        if use.use == "harmless" and use.note != AS_ANYWAY:
            yield f"{use.key}: {use.value} changes nothing here; {use.note}"
    if dtype_note:
        yield dtype_note
    yield from prepared.findings


def _begin(recipe: Recipe, prepared: Prepared, draft: Manifest, *, goes_on: bool) -> None:
    """Make the run directory, or make one ready that is gone on with; the manifest is there from the start."""
    run_dir = recipe.output_dir
    if goes_on:
        drop_unfinished(run_dir)
    else:
        clear(run_dir)
    write_recipe(recipe, run_dir)
    draft.write(run_dir / MANIFEST_NAME)
    if prepared.rows.held_out:
        write_held_out(prepared.rows.held_out, run_dir / "held_out.jsonl")


def load_model(recipe: Recipe, base: _Base) -> Any:
    """The base's weights in the compute dtype; code in its directory is never run.

    Raises:
        BaseModelError: it cannot be loaded.
        RecipeError: it cannot be quantized as the recipe asks.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            base.directory,
            dtype=getattr(torch, base.machine.dtype),
            attn_implementation=attention_implementation(recipe),
            quantization_config=quantization_config(recipe),
            trust_remote_code=False,
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BaseModelError("The base model cannot be loaded.", where=base.directory, found=error) from error
    avoid_cudnn_attention(base.machine.device)
    # PEFT's model card names the base by this, and would otherwise tell where it lay.
    model.config._name_or_path = model.name_or_path = base.name
    return model


def build_trainer(
    recipe: Recipe,
    prepared: Prepared,
    *,
    model: Any,
    machine: Machine,
    callbacks: Sequence[Any] = (),
) -> SupervisedTrainer:
    """Put an adapter on ``model`` and a trainer around it.

    Args:
        recipe: the recipe, its ``dtype`` decided.
        prepared: rows and tokenizer.
        model: the base.
        machine: what is trained on.
        callbacks: the Trainer's.

    Raises:
        RecipeError: ``lora_target`` names modules that the model has not.
    """
    import datasets
    import peft
    import transformers

    from tunesmith.train.batches import collate, computes_flat_rows, layout_of
    from tunesmith.train.shares import shared_out
    from tunesmith.train.trainer import SupervisedTrainer

    transformers.set_seed(recipe.seed)
    keeps_too_much = needs_checkpointing(recipe, prepared, model.config, machine)
    if recipe.quantization_bit:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    adapted = peft.get_peft_model(model, lora_config(recipe, model), autocast_adapter_dtype=True)
    _settle(adapted.peft_config["default"], model.config._name_or_path)
    train, held_out, tokenizer = prepared.train.examples, prepared.held_out.examples, prepared.tokenizer
    layout = layout_of(model.config, tokenizer.pad_token_id or 0, device=machine.device)
    # NEFTune's noise is scaled by a row's length, which a flat batch does not have.
    flat = not recipe.neftune_noise_alpha and computes_flat_rows(adapted, _probes(train), layout)
    layout = replace(layout, flat=flat)
    arguments = training_arguments(
        recipe,
        device=machine.device,
        evaluates=bool(held_out),
        world_size=processes(),
        flat=layout.flat,
        gradient_checkpointing=keeps_too_much,
        rows_a_pass=rows_a_pass(recipe, [len(row["input_ids"]) for row in train], device=machine.device),
    )
    shared = train
    if not recipe.dataloader_drop_last:
        shared = shared_out(train, rows_a_pass=arguments.per_device_train_batch_size, processes=processes())
    trainer = SupervisedTrainer(
        rows=len(train),
        model=adapted,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(shared),
        eval_dataset=datasets.Dataset.from_list(held_out) if held_out else None,
        data_collator=partial(collate, layout=layout),
        processing_class=tokenizer,
        optimizers=(loraplus_optimizer(recipe, adapted, arguments), None),
        callbacks=[*callbacks, *_early_stopping(recipe, evaluates=bool(held_out))],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    if prepared.template.ends_otherwise:
        _stop_there_too(adapted.generation_config, tokenizer.eos_token_id)
        trainer.saves_generation_config = True
    return trainer


def _stop_there_too(generation_config: Any, token_id: int) -> None:
    """Let generation stop at a further token: the one that the tuned model ends its answers with."""
    listed = generation_config.eos_token_id
    before = listed if isinstance(listed, list) else [] if listed is None else [listed]
    generation_config.eos_token_id = list(dict.fromkeys([token_id, *before]))


def _early_stopping(recipe: Recipe, *, evaluates: bool) -> list[Any]:
    import transformers

    patience = recipe.early_stopping_steps if evaluates else None
    return [] if patience is None else [transformers.EarlyStoppingCallback(early_stopping_patience=patience)]


def _settle(config: Any, base_name: str) -> None:
    """What is written of the adapter's configuration, the same from run to run."""
    config.base_model_name_or_path = base_name
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # a set's order changes


def _probes(examples: Sequence[dict[str, list[int]]]) -> list[dict[str, list[int]]]:
    """The beginnings of three rows, the second half of each supervised; whether they are computed apart shows there."""
    probes = []
    for example, length in zip(examples, _PROBE_LENGTHS, strict=False):
        ids = example["input_ids"][:length]
        unseen = len(ids) // 2
        probes.append({"input_ids": ids, "labels": [IGNORED] * unseen + ids[unseen:]})
    return probes


def _run(trainer: SupervisedTrainer, run_dir: Path, journal: Journal, resumed: Path | None) -> None:
    """Train to the end, and write what is known then; the adapter last.

    Raises:
        Cancelled: that was asked for; what has been trained is in a checkpoint.
    """
    try:
        result = trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    except Cancelled:  # within an evaluation, so at a step's end
        trainer._save_checkpoint(trainer.model, trial=None)
        journal.stopped = True
    if journal.stopped:
        raise Cancelled(
            f"checkpoint-{trainer.state.global_step} holds what was learned. Go on: tunesmith train {run_dir} --resume"
        )
    _refuse_broken_adapter(trainer)
    trainer.save_metrics("train", result.metrics)
    if trainer.eval_dataset is not None:
        trainer.save_metrics("eval", _last_evaluation(trainer))
    if trainer.state.best_model_checkpoint is not None:
        # By name, so that the run can be moved.
        trainer.state.best_model_checkpoint = Path(trainer.state.best_model_checkpoint).name
    trainer.save_state()
    if is_main_process():
        publish(run_dir, trainer.save_model)
    else:  # of a sharded model every process gives its part, and the first one writes
        trainer.save_model(str(run_dir))


def _refuse_broken_adapter(trainer: SupervisedTrainer) -> None:
    import torch

    from tunesmith.train.trainer import diverged

    if not all(torch.isfinite(weight).all() for weight in trainer.model.parameters() if weight.requires_grad):
        raise diverged(trainer.state.global_step, trainer.args.learning_rate, float("nan"))


def _last_evaluation(trainer: SupervisedTrainer) -> dict[str, float]:
    for row in reversed(trainer.state.log_history):
        if "eval_loss" in row and row["step"] == trainer.state.global_step:
            return {key: value for key, value in row.items() if key != "step"}
    return dict(trainer.evaluate())


def _note_beginning(
    journal: Journal, manifest: Manifest, prepared: Prepared, dtype_note: str | None, resumed: Path | None
) -> None:
    if resumed is not None:
        journal.note(f"goes on from {resumed.name}")
    journal.note(f"base {manifest.base_model}, {manifest.compute_dtype} on {manifest.device}, seed {manifest.seed}")
    if dtype_note:
        journal.note(dtype_note)
    journal.note(
        f"{manifest.train_rows} rows to train on ({manifest.supervised_tokens} supervised tokens), "
        f"{manifest.held_out_rows} held out"
    )
    if manifest.processes > 1:
        journal.note(f"{manifest.processes} processes, {manifest.total_train_batch_size} rows a step")
    for finding in prepared.findings:
        journal.note(f"{finding.code}: " + ", ".join(f"{key} {value}" for key, value in finding.params.items()))


def _manifest(recipe: Recipe, prepared: Prepared, base: _Base) -> Manifest:
    rows, train = prepared.rows, prepared.train
    return Manifest(
        base_model=unplaced(base.name),
        base_sha256=base.sha256,
        dataset=rows.dataset,
        eval_dataset=rows.eval_dataset,
        health=prepared.health,
        train_rows=len(rows.train) - train.dropped_rows.count,
        held_out_rows=len(rows.held_out),
        template=prepared.template.name,
        chat_template_sha256=hashlib.sha256(prepared.tokenizer.chat_template.encode()).hexdigest(),
        supervised_tokens=train.supervised_tokens,
        steps=steps_of(recipe, len(train.examples))[0],
        processes=processes(),
        total_train_batch_size=rows_a_step(recipe),
        seed=recipe.seed,
        compute_dtype=base.machine.dtype,
        device=base.machine.device,
        versions={"python": platform.python_version(), **{name: metadata.version(name) for name in _VERSIONED}},
        wall_s=None,
    )
