"""Train an adapter, and leave a run directory that tells the whole story."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tunesmith.errors import BaseModelError, Cancelled, MissingExtraError, RecipeError
from tunesmith.progress import Cancellation, Progress, ProgressCallback, no_progress
from tunesmith.train.manifest import MANIFEST_NAME, Manifest, unplaced
from tunesmith.train.quiet import quiet_libraries
from tunesmith.train.recipe import Recipe
from tunesmith.train.rows import Examples, Rows, encode_rows, read_rows, write_held_out
from tunesmith.train.run_dir import claim, clear, drop_unfinished_checkpoints, publish, write_recipe, writing

if TYPE_CHECKING:
    from tunesmith.train.journal import Journal
    from tunesmith.train.trainer import SupervisedTrainer

_EXTRA_PACKAGES = ("trl", "datasets")
_VERSIONED = ("tunesmith", "torch", "transformers", "peft", "trl")
_EVAL_BATCH_FACTOR = 4  # no activations are kept for a backward pass


class Compute(Protocol):
    """What the base is computed in, and on; :class:`tunesmith.models.ComputeDtype` is one."""

    @property
    def dtype(self) -> str:
        """``float32``, ``bfloat16`` or ``float16``."""

    @property
    def device(self) -> str:
        """``cpu``, ``cuda`` …."""


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
    compute: Compute,
    base_sha256: str,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> Path:
    """Fine-tune a LoRA adapter on the answers of a data set.

    The base is read in ``compute.dtype`` and stays as it is; the adapter is trained in float32.  The loss is the mean
    over the answers' tokens.  One seed gives one adapter, byte for byte, on one machine.

    Args:
        recipe: what to do.
        base_dir: the base model's directory; its ``model_name_or_path`` is not looked at.
        base_name: the base as the user named it, for ``adapter_config.json``.
        compute: number format and device.
        base_sha256: hash of the base's weights, for the manifest.
        progress: told of every optimizer step.
        cancellation: read between steps.

    Returns:
        The run directory.

    Raises:
        Cancelled: that was asked for, or Ctrl-C was pressed; finished checkpoints and logs stay.
        DataError: rows that cannot be trained on.
        RecipeError: a recipe that does not fit the model or its rows, or under which the loss diverged.
        OutputError: ``output_dir`` may not, or can no longer, be written.
        BaseModelError: the base cannot be loaded.
        MissingExtraError: trl or datasets is not installed.
    """
    check_installed()
    run_dir = claim(recipe, base_dir)
    resolved = {"dtype": compute.dtype, "eval_steps": recipe.eval_steps or recipe.save_steps, "output_dir": run_dir}
    base = _Base(base_dir, base_name, base_sha256, compute)
    try:
        with quiet_libraries():
            _train(recipe.model_copy(update=resolved), base, progress=progress, cancellation=cancellation)
    except KeyboardInterrupt as interrupt:
        raise Cancelled from interrupt
    return run_dir


@dataclass(frozen=True)
class _Base:
    """The base model: where it is, what it is called, what it is, and what it is computed in."""

    directory: Path
    name: str
    sha256: str
    compute: Compute


def _train(recipe: Recipe, base: _Base, *, progress: ProgressCallback, cancellation: Cancellation | None) -> None:
    started, run_dir = time.monotonic(), recipe.output_dir
    progress(Progress("train", 0, None, "steps", "reading"))
    rows = read_rows(recipe)
    tokenizer = load_tokenizer(base.directory)
    encode = partial(encode_rows, tokenizer, cutoff_len=recipe.cutoff_len, cancellation=cancellation)
    examples, held_out = encode(rows.train), encode(rows.held_out)
    from tunesmith.train.journal import Journal

    journal = Journal(run_dir, progress=progress, cancellation=cancellation)
    trainer = build_trainer(
        recipe,
        model=load_model(base.directory, base_name=base.name, compute=base.compute),
        tokenizer=tokenizer,
        train=examples,
        held_out=held_out,
        device=base.compute.device,
        callbacks=[journal],
    )
    draft = _manifest(recipe, rows, examples, held_out, base=base, chat_template=tokenizer.chat_template)
    # Everything that can be refused has been by now; only then does an earlier run make way.
    try:
        with writing(run_dir):
            clear(run_dir)
            write_recipe(recipe, run_dir)
            if rows.held_out:
                write_held_out(rows.held_out, run_dir / "held_out.jsonl")
            _note_beginning(journal, draft, held_out)
            _run(trainer, run_dir)
            manifest = draft.model_copy(update={"wall_s": round(time.monotonic() - started, 3)})
            manifest.write(run_dir / MANIFEST_NAME)
            journal.note(f"done in {manifest.wall_s:.0f} s")
    except BaseException as error:
        drop_unfinished_checkpoints(run_dir)
        with suppress(OSError):
            journal.note(f"stopped: {str(error) or type(error).__name__}")
        raise


def load_tokenizer(base_dir: Path) -> Any:
    """The base's tokenizer, from its directory only."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base_dir, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError("The base model's tokenizer cannot be loaded.", where=base_dir, found=error) from error


def load_model(base_dir: Path, *, base_name: str, compute: Compute) -> Any:
    """The base's weights in the compute dtype; code in its directory is never run."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            base_dir, dtype=getattr(torch, compute.dtype), trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError("The base model cannot be loaded.", where=base_dir, found=error) from error
    # PEFT's model card names the base by this, and would otherwise tell where it lay.
    model.config._name_or_path = model.name_or_path = base_name
    return model


def build_trainer(
    recipe: Recipe,
    *,
    model: Any,
    tokenizer: Any,
    train: Examples,
    held_out: Examples,
    device: str,
    callbacks: Sequence[Any] = (),
) -> SupervisedTrainer:
    """Put an adapter on ``model`` and a trainer around it.

    Raises:
        RecipeError: ``lora_target`` names modules that the model has not.
    """
    import datasets
    import transformers

    from tunesmith.train.trainer import SupervisedTrainer, collate

    transformers.set_seed(recipe.seed)
    adapted = _with_adapter(model, recipe)
    arguments = _arguments(recipe, device=device, evaluates=bool(held_out.examples))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    trainer = SupervisedTrainer(
        model=adapted,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(train.examples),
        eval_dataset=datasets.Dataset.from_list(held_out.examples) if held_out.examples else None,
        data_collator=partial(collate, pad_token_id=pad),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _with_adapter(model: Any, recipe: Recipe) -> Any:
    import peft
    import torch

    head = model.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    unknown = sorted(set(recipe.target_modules or ()) - linear)
    if unknown:
        raise RecipeError(
            "lora_target names modules that are not linear layers of this model, or its output head.",
            where="lora_target",
            expected=f"all, or some of {', '.join(sorted(linear))}",
            found=", ".join(unknown),
        )
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=recipe.target_modules or "all-linear",
        use_rslora=recipe.use_rslora,
        use_dora=recipe.use_dora,
    )
    adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=True)
    config = adapted.peft_config["default"]
    config.base_model_name_or_path = model.config._name_or_path
    config.target_modules = sorted(config.target_modules)  # PEFT keeps a set, whose order changes from run to run
    return adapted


def _arguments(recipe: Recipe, *, device: str, evaluates: bool) -> Any:
    import trl

    arguments = trl.SFTConfig(
        output_dir=str(recipe.output_dir),
        per_device_train_batch_size=recipe.per_device_train_batch_size,
        per_device_eval_batch_size=recipe.per_device_train_batch_size * _EVAL_BATCH_FACTOR,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        num_train_epochs=recipe.num_train_epochs,
        max_steps=recipe.max_steps or -1,
        lr_scheduler_type=recipe.lr_scheduler_type,
        warmup_steps=recipe.warmup_ratio,  # below 1 it is a share of the steps
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        logging_steps=recipe.logging_steps,
        save_strategy="steps",
        save_steps=recipe.save_steps,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=recipe.eval_steps,
        metric_for_best_model="eval_loss" if evaluates else None,
        greater_is_better=False,
        seed=recipe.seed,
        bf16=recipe.dtype == "bfloat16",
        fp16=recipe.dtype == "float16" and device != "cpu",
        use_cpu=device == "cpu",
        dataloader_pin_memory=device.startswith("cuda"),
        train_sampling_strategy="group_by_length",
        gradient_checkpointing=False,
        logging_nan_inf_filter=False,
        prediction_loss_only=True,
        remove_unused_columns=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process, one GPU: TRL refuses nn.DataParallel
    return arguments


def _run(trainer: SupervisedTrainer, run_dir: Path) -> None:
    """Train to the end, and write what is known then; the adapter last."""
    result = trainer.train()
    _refuse_broken_adapter(trainer)
    trainer.save_metrics("train", result.metrics)
    if trainer.eval_dataset is not None:
        trainer.save_metrics("eval", _last_evaluation(trainer))
    if trainer.state.best_model_checkpoint is not None:
        # By name, so that the run can be moved.
        trainer.state.best_model_checkpoint = Path(trainer.state.best_model_checkpoint).name
    trainer.save_state()
    publish(run_dir, trainer.save_model)


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


def _note_beginning(journal: Journal, manifest: Manifest, held_out: Examples) -> None:
    journal.note(f"base {manifest.base_model}, {manifest.compute_dtype} on {manifest.device}, seed {manifest.seed}")
    journal.note(
        f"{manifest.train_rows} rows to train on ({manifest.supervised_tokens} supervised tokens), "
        f"{len(held_out.examples)} held out; {manifest.rows_cut} cut, {manifest.rows_dropped} dropped"
    )


def _manifest(
    recipe: Recipe, rows: Rows, examples: Examples, held_out: Examples, *, base: _Base, chat_template: str
) -> Manifest:
    return Manifest(
        base_model=unplaced(base.name),
        base_sha256=base.sha256,
        dataset=rows.dataset,
        eval_dataset=rows.eval_dataset,
        train_rows=len(examples.examples),
        held_out_rows=len(rows.held_out),
        chat_template_sha256=hashlib.sha256(chat_template.encode()).hexdigest(),
        supervised_tokens=examples.supervised_tokens,
        rows_cut=examples.cut + held_out.cut,
        rows_dropped=examples.dropped + held_out.dropped,
        seed=recipe.seed,
        compute_dtype=base.compute.dtype,
        device=base.compute.device,
        versions={"python": platform.python_version(), **{name: metadata.version(name) for name in _VERSIONED}},
        wall_s=0.0,
    )
