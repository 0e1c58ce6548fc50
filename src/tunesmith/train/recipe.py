"""The recipe: what is to be trained on what, in LLaMA-Factory's own key names."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from tunesmith.errors import RecipeError
from tunesmith.record import Part

_PATH_KEYS = ("dataset", "eval_dataset", "output_dir")
_HALF_PRECISION = {"bf16": "bfloat16", "fp16": "float16"}
_DTYPE_ALIASES = {"fp32": "float32", **_HALF_PRECISION}
_REFUSED = {
    "template": "the tokenizer's own chat template is used; leave this key out",
    "dataset_dir": "there is no data-set registry; give the file's path as 'dataset'",
    "trust_remote_code": "code that comes with a model is never run",
    "quantization_bit": "training on a quantized base is not supported",
    "resume_from_checkpoint": "resuming is not supported; train into a new output_dir",
    "packing": "rows are not packed; they are grouped by length instead",
}

Scheduler = Literal[
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
]


class Recipe(Part):
    """One LoRA fine-tune, fully specified.

    Attributes:
        model_name_or_path: the base model, as the user names it; its caller resolves it.
        dataset: the training rows, in any format that :func:`tunesmith.conversations.read_conversations` reads.
        eval_dataset: the held-out rows; None splits ``val_size`` off ``dataset``.
        val_size: below 1, the share of rows to hold out; from 1 on, their number.
        output_dir: the run directory to make.
        overwrite_output_dir: whether a run that is already there may be replaced.
        cutoff_len: tokens a row at most; what is beyond is cut.
        lora_rank: rank r of the adapter.
        lora_alpha: the adapter's scale is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``.
        lora_dropout: dropout probability on the adapter's input.
        lora_target: ``all`` linear layers but the output head, or module names with commas between.
        use_rslora: rank-stabilised scale (https://arxiv.org/abs/2312.03732).
        use_dora: also train the magnitude of every row (https://arxiv.org/abs/2402.09353).
        per_device_train_batch_size: rows a forward pass.
        gradient_accumulation_steps: forward passes an optimizer step.
        learning_rate: the peak.
        num_train_epochs: passes over the rows.
        max_steps: optimizer steps; above 0 it overrules ``num_train_epochs``.
        lr_scheduler_type: how the learning rate changes after the warm-up.
        warmup_ratio: the share of steps over which the learning rate rises to its peak.
        weight_decay: AdamW's.
        max_grad_norm: gradients are clipped to this norm; 0 leaves them alone.
        logging_steps: optimizer steps a log row.
        save_steps: optimizer steps a checkpoint; the last step always has one.
        eval_steps: optimizer steps a held-out evaluation; None means ``save_steps``.
        seed: of the split, the adapter's first values, the order of rows and dropout.
        dtype: what the base is computed in; ``auto`` leaves it to the machine.
        stage: only ``sft`` exists here; accepted so that a LLaMA-Factory recipe can be read.
        do_train: only ``true``; likewise.
        finetuning_type: only ``lora``; likewise.
    """

    model_config = ConfigDict(protected_namespaces=(), allow_inf_nan=False)

    model_name_or_path: str = Field(min_length=1)
    dataset: Path
    eval_dataset: Path | None = None
    val_size: float = Field(default=0.0, ge=0)
    output_dir: Path
    overwrite_output_dir: bool = False
    cutoff_len: int = Field(default=2048, ge=8)

    lora_rank: int = Field(default=8, ge=1)
    lora_alpha: int = Field(default=16, ge=1)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    lora_target: str = "all"
    use_rslora: bool = False
    use_dora: bool = False

    per_device_train_batch_size: int = Field(default=4, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    num_train_epochs: float = Field(default=3.0, gt=0)
    max_steps: int = Field(default=-1, ge=-1)
    lr_scheduler_type: Scheduler = "cosine"
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0)

    logging_steps: int = Field(default=5, ge=1)
    save_steps: int = Field(default=500, ge=1)
    eval_steps: int | None = Field(default=None, ge=1)
    seed: int = Field(default=42, ge=0, lt=2**32)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    stage: Literal["sft"] = "sft"
    do_train: Literal[True] = True
    finetuning_type: Literal["lora"] = "lora"

    @field_validator("*", mode="before")
    @classmethod
    def _no_flag_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would read `lora_rank: true` as 1.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in (int, float, int | None):
            raise ValueError("expected a number")
        return value

    @field_validator("lora_target", mode="before")
    @classmethod
    def _one_line(cls, value: Any) -> Any:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list) or not all(isinstance(part, str) and part.strip() for part in parts):
            raise ValueError("expected 'all' or module names with commas between")
        return ",".join(part.strip() for part in parts)

    @field_validator("val_size")
    @classmethod
    def _share_or_number(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError("expected a share below 1 or a whole number of rows")
        return value

    @model_validator(mode="after")
    def _one_source_of_held_out_rows(self) -> Recipe:
        if self.eval_dataset is not None and self.val_size:
            raise ValueError("eval_dataset and val_size both name held-out rows; leave one out")
        return self

    @property
    def target_modules(self) -> list[str] | None:
        """The module names of ``lora_target``, or None for all of them."""
        return None if self.lora_target == "all" else self.lora_target.split(",")

    @classmethod
    def of(cls, values: Mapping[str, object], *, where: object = None) -> Recipe:
        """Check a mapping of keys.

        Args:
            values: the recipe's keys; None stands for a key's default.
            where: what the error should name as its place.

        Raises:
            RecipeError: unknown, missing or wrong keys; every one of them is named.
        """
        given = {str(key): value for key, value in values.items() if value is not None}
        problems = _take_half_precision(given)
        problems += [f"{key}: {_REFUSED[key]}" for key in [key for key in given if key in _REFUSED] if given.pop(key)]
        try:
            recipe = cls.model_validate(given)
        except ValidationError as error:
            problems += [_sentence(problem) for problem in error.errors()]
        if problems:
            raise RecipeError(
                f"The recipe has {len(problems)} problem{'s' if len(problems) > 1 else ''}.",
                where=where,
                details=problems,
            )
        return recipe


def read_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from YAML.

    ``dataset``, ``eval_dataset`` and ``output_dir`` are relative to where they are written: to the recipe's folder
    in the file, to the working directory in an override.

    Args:
        path: the YAML file.
        overrides: ``key=value``, each value read as YAML; they win over the file.

    Raises:
        RecipeError: the file is absent or no YAML mapping, or keys are unknown, missing or wrong.
    """
    source = Path(path)
    values = _rooted(_read_mapping(source), source.parent)
    problems = []
    for override in overrides:
        key, separator, text = override.partition("=")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            separator = ""
        if not separator or not key.strip():
            problems.append(f"{override!r} is not key=value")
            continue
        values |= _rooted({key.strip(): value}, Path())
    if problems:
        raise RecipeError("An override cannot be read.", expected="key=value", details=problems)
    return Recipe.of(values, where=source)


def _read_mapping(source: Path) -> dict[str, object]:
    try:
        document = yaml.safe_load(source.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RecipeError("The recipe cannot be read.", where=source, found=error.strerror or error) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError("The recipe is not valid YAML.", where=source, found=error) from error
    if not isinstance(document, dict):
        raise RecipeError(
            "A recipe is a mapping of keys.", where=source, expected="key: value lines", found=type(document).__name__
        )
    return {str(key): value for key, value in document.items()}


def _rooted(values: dict[str, object], folder: Path) -> dict[str, object]:
    """Values with their paths made absolute; what is no path is left for the check to name."""
    absolute = {
        key: (folder / Path(value).expanduser()).absolute()
        for key, value in values.items()
        if key in _PATH_KEYS and isinstance(value, str) and value
    }
    return values | absolute


def _take_half_precision(given: dict[str, object]) -> list[str]:
    """Turn ``bf16: true`` and ``fp16: true`` into a ``dtype``, in place; the problems with that."""
    problems = []
    asked = given.get("dtype")
    if isinstance(asked, str):
        given["dtype"] = _DTYPE_ALIASES.get(asked, asked)
    for key, dtype in _HALF_PRECISION.items():
        value = given.pop(key, False)
        if not isinstance(value, bool):
            problems.append(f"{key}: expected true or false (found {value!r})")
        elif value and given.setdefault("dtype", dtype) != dtype:
            problems.append(f"{key}: true contradicts dtype {given['dtype']}")
    return problems


def _sentence(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, Recipe.model_fields, n=1)
        return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    if problem["type"] == "missing":
        return f"{key}: missing"
    if not key:
        return str(message)
    if key in ("stage", "do_train", "finetuning_type"):
        message = "only supervised LoRA fine-tuning (stage: sft, do_train: true, finetuning_type: lora) is built in"
    return f"{key}: {message} (found {problem['input']!r})"
