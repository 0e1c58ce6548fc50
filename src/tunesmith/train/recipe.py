"""The recipe: what is to be trained on what, in LLaMA-Factory's own key names."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, ValidationInfo, field_validator

from tunesmith.checkpoint import is_hub_id, local_target
from tunesmith.errors import RecipeError
from tunesmith.train.arguments import PassedOn
from tunesmith.train.keys import HARMLESS, REFUSED, SPELLINGS, KeyUse, explain, nearest
from tunesmith.train.manifest import MANIFEST_NAME

_DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_STAGE_KEYS = ("stage", "do_train", "finetuning_type")
_PREDICTS = ("do_predict", "do_eval", "predict_with_generate")
_RUNS_OWN = "training_args.yaml"
_LORA_RANK = 8
# What YAML's constructors raise at dates and numbers that there are not.
_UNREADABLE = (ValueError, TypeError, OverflowError, AttributeError, KeyError, RecursionError)

Strategy = Literal["no", "steps", "epoch"]


def _unless_false(value: object) -> object:
    return "no" if value is False else value  # YAML reads an unquoted no as false


def _names(value: object) -> object:
    """Text with commas between, or a list, as a tuple; what is neither is left for the check to name."""
    parts = value.split(",") if isinstance(value, str) else value
    if isinstance(parts, Path):
        parts = [parts]
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str | Path) for part in parts):
        raise ValueError("expected names with commas between, or a list of them")
    names = tuple(str(part).strip() for part in parts)
    if not names or not all(names):
        raise ValueError("expected names with commas between, none of them empty")
    return names


def _one_line(value: object) -> object:
    return ",".join(_names(value))  # type: ignore[arg-type] # they are texts


def _numbers(value: object) -> object:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _from_json(value: object) -> object:
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            raise ValueError("expected a mapping, or one as JSON") from None
    return value


def _reporters(value: object) -> object:
    names = () if value in ((), []) else _names(value)
    return () if names == ("none",) else names


Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
NamesOnALine = Annotated[str, BeforeValidator(_one_line)]


class Recipe(PassedOn):
    """One LoRA fine-tune, fully specified; the defaults are LLaMA-Factory's, but for those that are marked.

    Attributes:
        model_name_or_path: the base model, as the user names it; its caller resolves it.
        model_revision: branch, tag or commit of a base on the hub.
        dataset: the training rows: names of ``dataset_info.json``, or files.
        eval_dataset: the held-out rows; None splits ``val_size`` off ``dataset``.
        dataset_dir: where ``dataset_info.json`` lies.
        val_size: below 1, the share of rows to hold out; from 1 on, their number.
        max_samples: rows taken of each data set at most.
        mix_strategy: how several data sets become one.
        interleave_probs: with which probability each of them gives the next row.
        output_dir: the run directory to make.
        overwrite_output_dir: whether a run that is already there may be replaced.
        resume_from_checkpoint: a checkpoint to go on from; true for the last one in ``output_dir``.
        template: a chat template by its name; None for the tokenizer's own.
        default_system: the system text of rows that have none.
        enable_thinking: how the template of a reasoning model writes an answer without thoughts.
        cutoff_len: tokens a row at most; what is beyond is cut.
        train_on_prompt: whether prompts count in the loss too.
        mask_history: whether only a row's last answer counts.
        packing: whether several rows are trained on as one of up to ``cutoff_len`` tokens, none seeing another.
        lora_rank: rank r of the adapter.
        lora_alpha: the adapter's scale is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``; unless
            given, twice the rank.
        lora_dropout: dropout probability on the adapter's input.
        lora_target: ``all`` linear layers but the output head, or module names with commas between.
        use_rslora: rank-stabilised scale (https://arxiv.org/abs/2312.03732).
        use_dora: also train the magnitude of every row (https://arxiv.org/abs/2402.09353).
        additional_target: modules that are trained and saved whole, with commas between.
        loraplus_lr_ratio: learning rate of B over that of A (https://arxiv.org/abs/2402.12354).
        loraplus_lr_embedding: learning rate of adapted embeddings, with ``loraplus_lr_ratio``.
        target_parameters: PEFT's; parameters that are no layer's weight, as those of experts.
        exclude_modules: PEFT's; modules that stay as they are, though ``lora_target`` names them.
        layers_to_transform: PEFT's; the layers that get an adapter.
        layers_pattern: PEFT's; the name of the list of layers.
        rank_pattern: PEFT's; another rank for modules by their names.
        alpha_pattern: PEFT's; another alpha for modules by their names.
        init_lora_weights: PEFT's; how A and B begin, among the ways that leave the base as it is.
        quantization_bit: the bits of a base quantized by bitsandbytes; None leaves it as it is.
        quantization_type: the 4-bit number format.
        double_quantization: whether the 4-bit format's own scales are quantized too.
        dtype: what the base is computed in; ``auto`` leaves it to the machine.
        half_precision: what ``bf16``, ``fp16`` or ``pure_bf16`` wish for; ``auto`` follows it where it is fastest.
        flash_attn: how attention is computed, where that is installed.
        gradient_checkpointing: whether activations are computed twice to save memory; None is by need.
        use_cpu: whether a GPU is left alone.
        train_sampling_strategy: the order of rows; None is by length where that saves padding, else at random.
        per_device_eval_batch_size: rows a forward pass of an evaluation; None is a multiple of training's (ours).
        max_steps: optimizer steps; above 0 it overrules ``num_train_epochs``.
        warmup_steps: steps over which the learning rate rises to its peak; below 1 their share.
        warmup_ratio: the same as a share.
        logging_steps: optimizer steps a log row, or their share (ours: 5, not 500, or short runs would have no curve).
        save_strategy: when a checkpoint is written; the last step always has one.
        save_steps: optimizer steps a checkpoint, or their share.
        eval_strategy: when held-out rows are evaluated; None is every ``eval_steps`` where there are any (ours: not
            never).
        eval_steps: optimizer steps a held-out evaluation, or their share; None means ``save_steps``, or
            ``logging_steps`` where both ``eval_strategy`` and they are given.
        load_best_model_at_end: whether the adapter with the least held-out loss is the final one.
        early_stopping_steps: evaluations without a lower loss until training stops.
        stop_on_divergence: whether a loss that runs away stops the run (ours).
        plot_loss: whether the losses are drawn (ours: true).
        report_to: who else is told of the losses, among what is installed.
        label_smoothing_factor: the weight of a uniform distribution in the targets.
        neftune_noise_alpha: noise on the embeddings (https://arxiv.org/abs/2310.05914).
        stage: only ``sft`` exists here; accepted so that a LLaMA-Factory recipe can be read.
        do_train: only ``true``; likewise.
        finetuning_type: only ``lora``; likewise.
    """

    model_config = ConfigDict(protected_namespaces=(), allow_inf_nan=False, coerce_numbers_to_str=True)

    model_name_or_path: str = Field(min_length=1)
    model_revision: str = "main"
    dataset: Names
    eval_dataset: Names | None = None
    dataset_dir: Path = Field(default_factory=lambda: Path("data").absolute())
    val_size: float = Field(default=0.0, ge=0)
    max_samples: int | None = Field(default=None, ge=1)
    mix_strategy: Literal["concat", "interleave_under", "interleave_over", "interleave_once"] = "concat"
    interleave_probs: Annotated[tuple[float, ...] | None, BeforeValidator(_numbers)] = None
    output_dir: Path
    overwrite_output_dir: bool = False
    resume_from_checkpoint: bool | str | None = None

    template: str | None = None
    default_system: str | None = None
    enable_thinking: bool | None = True
    cutoff_len: int = Field(default=2048, ge=8)
    train_on_prompt: bool = False
    mask_history: bool = False
    packing: bool = False

    lora_rank: int = Field(default=_LORA_RANK, ge=1)
    lora_alpha: int = Field(default=2 * _LORA_RANK, ge=1)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    lora_target: NamesOnALine = "all"
    use_rslora: bool = False
    use_dora: bool = False
    additional_target: NamesOnALine | None = None
    loraplus_lr_ratio: float | None = Field(default=None, gt=0)
    loraplus_lr_embedding: float = Field(default=1e-6, ge=0)
    target_parameters: Names | None = None
    exclude_modules: Names | None = None
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: Names | None = None
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = {}
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    init_lora_weights: Literal[True, "gaussian", "orthogonal"] = True

    quantization_bit: Literal[4, 8] | None = None
    quantization_type: Literal["nf4", "fp4"] = "nf4"
    double_quantization: bool = True
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    half_precision: Literal["bfloat16", "float16"] | None = None
    flash_attn: Literal["auto", "disabled", "sdpa", "fa2", "fa3"] = "auto"
    gradient_checkpointing: bool | None = None
    use_cpu: bool = False

    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] | None = None
    per_device_eval_batch_size: int | None = Field(default=None, ge=1)
    max_steps: int = Field(default=-1, ge=-1)
    warmup_steps: int | float = Field(default=0, ge=0)
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    label_smoothing_factor: float = Field(default=0.0, ge=0, lt=1)
    neftune_noise_alpha: float | None = Field(default=None, ge=0)
    logging_steps: int | float = Field(default=5, gt=0)
    save_strategy: Annotated[Strategy | Literal["best"], BeforeValidator(_unless_false)] = "steps"
    save_steps: int | float = Field(default=500, gt=0)
    eval_strategy: Annotated[Strategy | None, BeforeValidator(_unless_false)] = None
    eval_steps: int | float | None = Field(default=None, gt=0)
    load_best_model_at_end: bool = False
    early_stopping_steps: int | None = Field(default=None, ge=1)
    stop_on_divergence: bool = True
    plot_loss: bool = True
    report_to: Annotated[tuple[str, ...], BeforeValidator(_reporters)] = ()

    stage: Literal["sft"] = "sft"
    do_train: Literal[True] = True
    finetuning_type: Literal["lora"] = "lora"

    _key_uses: tuple[KeyUse, ...] = PrivateAttr(default=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_flag_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would read `lora_rank: true` as 1.
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and {annotation, *get_args(annotation)} & {int, float}:
            raise ValueError("expected a number")
        return value

    @field_validator("lr_scheduler_kwargs", mode="before")
    @classmethod
    def _mapping(cls, value: Any) -> Any:
        return _from_json(value)

    @field_validator("layers_to_transform", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, int) else _numbers(value)

    @field_validator("warmup_steps", "logging_steps", "save_steps", "eval_steps")
    @classmethod
    def _share_of_steps_or_number(cls, value: float | None) -> float | None:
        if value is not None and value >= 1 and value != int(value):
            raise ValueError("expected a share below 1 or a whole number of steps")
        return value if value is None or value < 1 else int(value)

    @field_validator("val_size")
    @classmethod
    def _share_or_number(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError("expected a share below 1 or a whole number of rows")
        return value

    @field_validator("dataset_dir", "output_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return _straight(_at_home(value))

    @field_validator("dataset_dir", mode="before")
    @classmethod
    def _on_this_disk(cls, value: Any) -> Any:
        if isinstance(value, str) and (value == "ONLINE" or value.startswith("REMOTE:")):
            raise ValueError("expected a folder of this machine; download the data set into one")
        return value

    @property
    def target_modules(self) -> list[str] | None:
        """The module names of ``lora_target``, or None for all of them."""
        return None if self.lora_target == "all" else self.lora_target.split(",")

    @property
    def base(self) -> str:
        """The base as :func:`tunesmith.checkpoint.locate_base` takes it: with its revision, where one is given."""
        name = self.model_name_or_path
        if self.model_revision == "main" or "@" in name or not is_hub_id(name) or Path(name).is_dir():
            return name
        return f"{name}@{self.model_revision}"

    @property
    def disable_gradient_checkpointing(self) -> bool:
        """Whether activations are kept, however many they are."""
        return self.gradient_checkpointing is False

    @property
    def evaluation_interval(self) -> int | float:
        """Optimizer steps from one held-out evaluation to the next, or their share; where it is done by steps."""
        if self.eval_steps is not None:
            return self.eval_steps
        # As the Trainer has it; logging steps that nobody chose would evaluate far too often.
        follows_log = self.eval_strategy == "steps" and "logging_steps" in self.model_fields_set
        return self.logging_steps if follows_log else self.save_steps

    @property
    def key_uses(self) -> tuple[KeyUse, ...]:
        """Every key that was given, and what became of it."""
        return self._key_uses

    @classmethod
    def of(cls, values: Mapping[str, object], *, where: object = None) -> Recipe:
        """Check a mapping of keys.

        Args:
            values: the recipe's keys; None stands for a key's default.
            where: what the error should name as its place.

        Raises:
            RecipeError: unknown, missing, refused or wrong keys; every one of them is named.
        """
        return _checked(values, {}, where)

    def written(self, run_dir: Path) -> dict[str, object]:
        """The values as they are written into a run's own ``training_args.yaml``: its paths relative to the run.

        Args:
            run_dir: where the file will lie.

        Returns:
            JSON's types only; keys whose value is None are left out.
        """
        values = {key: value for key, value in self.model_dump(mode="json").items() if value is not None}
        values["eval_steps"] = self.evaluation_interval  # which keys were given cannot be seen in the file
        for key in ("dataset", "eval_dataset"):
            if key in values:
                values[key] = [_relative(name, run_dir) for name in values[key]]
        paths = ["dataset_dir", "output_dir", "resume_from_checkpoint"]
        if Path(self.model_name_or_path).is_dir():  # else it is a name
            paths.append("model_name_or_path")
        for key in paths:
            if isinstance(values.get(key), str):
                values[key] = _relative(Path(str(values[key])).absolute(), run_dir)
        return values


def read_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from YAML.

    Relative paths are relative to the working directory, as in LLaMA-Factory; a file or folder to read that is not
    there is looked for in the recipe's own folder as well.  In a run's own ``training_args.yaml`` they are relative to
    the run.

    Args:
        path: the YAML file.
        overrides: ``key=value``, each value read as YAML; they win over the file.

    Raises:
        RecipeError: the file is absent or no YAML mapping, or keys are unknown, missing, refused or wrong.
    """
    source = Path(path)
    values = _read_mapping(source)
    own = source.name == _RUNS_OWN and (source.parent / MANIFEST_NAME).is_file()
    home = source.parent.absolute()
    places = _placed({"dataset_dir": "data"} | values, [home] if own else [Path.cwd(), home])
    given = read_overrides(overrides)
    places = {key: place for key, place in places.items() if key not in given} | _placed(given, [Path.cwd(), home])
    return _checked(values | given, places, source)


def dtype_note(recipe: Recipe, dtype: str, *, gemm_ms: Mapping[str, float]) -> str | None:
    """Say that a recipe's ``bf16: true`` or ``fp16: true`` is not followed, and why.

    Args:
        recipe: the recipe.
        dtype: what the base is computed in.
        gemm_ms: milliseconds of one product and its gradient by dtype, as measured; empty where nothing was.

    Returns:
        A sentence; None where the recipe gets what it wishes for, or insists by ``dtype``.
    """
    wish = recipe.half_precision
    if recipe.dtype != "auto" or wish is None or wish == dtype:
        return None
    times = ", ".join(f"{gemm_ms[name]:.3g} ms in {name}" for name in (dtype, wish) if name in gemm_ms)
    key = next(key for key, (_, meant) in SPELLINGS.items() if meant == wish)
    return (
        f"{key}: true is not followed: this machine computes {dtype} faster"
        + (f" (a product and its gradient take {times})" if times else "")
        + f"; dtype: {wish} insists."
    )


def _checked(values: Mapping[str, object], places: Mapping[str, object], where: object) -> Recipe:
    """A recipe of values as they were written, ``places`` standing for its paths."""
    written = {str(key): value for key, value in values.items()}
    uses = explain(written, Recipe.model_fields)
    problems = [f"{use.key}: {use.note}{_meant(use)}" for use in uses if use.use == "refused"]
    if "do_train" not in written and any(written.get(key) for key in _PREDICTS):
        problems.append("do_train: this recipe evaluates and trains nothing; that is tunesmith evaluate's")
    taken = {use.key for use in uses if use.use == "used" or use.key in SPELLINGS}
    given = {key: value for key, value in {**written, **places}.items() if key in taken or key in places}
    # Everywhere else null is LLaMA-Factory's word for a default.
    given = {key: value for key, value in given.items() if value is not None or key == "enable_thinking"}
    problems += _fold_spellings(given)
    try:
        recipe = Recipe.model_validate(given)
    except ValidationError as error:
        problems += [_sentence(problem) for problem in error.errors()]
    else:
        problems += _contradictions(recipe)
    if problems:
        raise RecipeError(
            f"The recipe has {len(problems)} problem{'s' if len(problems) > 1 else ''}.", where=where, details=problems
        )
    recipe._key_uses = uses
    return recipe


def _fold_spellings(given: dict[str, object]) -> list[str]:
    """Turn keys that say the same in another word into those that are fields, in place; the problems with that."""
    problems = []
    said_by: dict[str, str] = {}
    if isinstance(asked := given.get("dtype"), str):
        given["dtype"] = _DTYPE_ALIASES.get(asked, asked)
    for key, (field, meant) in SPELLINGS.items():
        value = given.pop(key, False)
        if not isinstance(value, bool):
            problems.append(f"{key}: expected true or false (found {value!r})")
        elif value and field == "packing":
            given[field] = True  # on where either of LLaMA-Factory's words for it says so
        elif value and given.setdefault(field, meant) != meant:
            problems.append(f"{key}: true contradicts {said_by.get(field, f'{field} {given[field]}')}")
        elif value:
            said_by[field] = f"{key}: true"
    if not given.get("lora_alpha") and not isinstance(given.get("lora_alpha"), bool):
        given["lora_alpha"] = 2 * _rank(given.get("lora_rank", _LORA_RANK))
    return problems


def _rank(value: object) -> int:
    try:
        return max(1, int(str(value)))
    except ValueError:
        return 1  # the check of lora_rank will say so


def _contradictions(recipe: Recipe) -> list[str]:
    """What two keys that are right by themselves make wrong together."""
    problems = []
    if recipe.eval_dataset is not None and recipe.val_size:
        problems.append("eval_dataset and val_size both name held-out rows; leave one out")
    if recipe.warmup_ratio and recipe.warmup_steps:
        problems.append("warmup_ratio and warmup_steps are both given; leave one out")
    if recipe.mask_history and recipe.train_on_prompt:
        problems.append("mask_history and train_on_prompt contradict each other; leave one out")
    if recipe.interleave_probs is not None:
        if recipe.mix_strategy == "concat":
            problems.append("interleave_probs: only an interleaving mix_strategy draws rows")
        elif len(recipe.interleave_probs) != len(recipe.dataset):
            problems.append(
                f"interleave_probs: expected one for each data set (found {len(recipe.interleave_probs)} "
                f"for {len(recipe.dataset)})"
            )
    return problems + _without_held_out(recipe) + _at_other_steps(recipe)


def _without_held_out(recipe: Recipe) -> list[str]:
    if recipe.eval_dataset is not None or recipe.val_size:
        return []
    asked = {
        "eval_strategy": recipe.eval_strategy not in (None, "no"),
        "eval_on_start": recipe.eval_on_start,
        "early_stopping_steps": recipe.early_stopping_steps is not None,
        "load_best_model_at_end": recipe.load_best_model_at_end,
        "lr_scheduler_type": recipe.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"),
        "save_strategy": recipe.save_strategy == "best",
    }
    return [f"{key}: there are no held-out rows; set val_size or eval_dataset" for key, is_so in asked.items() if is_so]


def _at_other_steps(recipe: Recipe) -> list[str]:
    """Whether the best checkpoint can be the one that is loaded: it must have been saved when it was evaluated."""
    evaluated = recipe.eval_strategy or "steps"
    if recipe.early_stopping_steps is not None and evaluated == "no":
        return ["early_stopping_steps: it needs evaluations; set eval_strategy: steps"]
    if not recipe.load_best_model_at_end or recipe.save_strategy == "best":
        return []
    if evaluated != recipe.save_strategy:
        return [f"load_best_model_at_end: save_strategy must be as eval_strategy is, {evaluated}"]
    every, saved = recipe.evaluation_interval, recipe.save_steps
    if evaluated == "steps" and (min(every, saved) < 1 <= max(every, saved) or _remainder(saved, every)):
        return [f"load_best_model_at_end: save_steps ({saved}) must be a multiple of eval_steps ({every})"]
    return []


def _remainder(whole: float, part: float) -> bool:
    return abs(whole / part - round(whole / part)) > 1e-6  # shares, as 0.3 and 0.1, are not exact


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


def read_overrides(overrides: Sequence[str]) -> dict[str, object]:
    """Keys and values of ``key=value`` pairs, each value read as YAML.

    Raises:
        RecipeError: some are no such pairs; all of these are named.
    """
    given, problems = {}, []
    for override in overrides:
        key, separator, text = override.partition("=")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, *_UNREADABLE):
            separator = ""
        if not separator or not key.strip():
            problems.append(f"{override!r} is not key=value")
            continue
        given[key.strip()] = value
    if problems:
        raise RecipeError("An override cannot be read.", expected="key=value", details=problems)
    return given


def _placed(values: Mapping[str, object], folders: Sequence[Path]) -> dict[str, object]:
    """The paths among the values, absolute: where they are found first, or else in the first folder."""
    placed: dict[str, object] = {}
    for key in ("dataset", "eval_dataset"):
        if isinstance(values.get(key), str | list):
            placed[key] = _data_files(values[key], folders)
    for key in ("dataset_dir", "resume_from_checkpoint", "output_dir"):
        value = values.get(key)
        if isinstance(value, str) and value and value != "ONLINE" and not value.startswith("REMOTE:"):
            if key == "output_dir":
                value = str(local_target(value))
            there = _found(value, folders if key != "output_dir" else folders[:1])
            placed[key] = str(there or _straight(folders[0] / _at_home(value)))
    return placed


def _data_files(value: object, folders: Sequence[Path]) -> object:
    """Names of data sets, those of them that are files of this disk by their absolute paths."""
    if isinstance(value, str) and "," in value and _found(value, folders) is None:
        value = [part.strip() for part in value.split(",")]
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return value
    files = {name: _found(name, folders) for name in names}
    # A folder is named only by dataset_info.json, whose names are no paths.
    return [str(file) if (file := files[name]) is not None and file.is_file() else name for name in names]


def _found(name: str, folders: Sequence[Path]) -> Path | None:
    if not name:
        return None
    candidates = (folder / _at_home(name) for folder in folders)
    return next((_straight(path) for path in candidates if os.path.exists(path)), None)  # noqa: PTH110 - bad names too


def _at_home(path: str | Path) -> Path:
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path's own raises where there is no such user


def _straight(path: Path) -> Path:
    """The path absolute and without "..", so that one place has one name; not where a link makes that another place."""
    straight = Path(os.path.normpath(path.absolute()))
    try:
        is_same = not path.exists() or straight.samefile(path)
    except OSError:
        is_same = False
    return straight if is_same else path.absolute()


def _relative(name: object, run_dir: Path) -> str:
    return os.path.relpath(str(name), run_dir) if Path(str(name)).is_absolute() else str(name)


def _meant(use: KeyUse) -> str:
    """Which key an unknown one was probably meant to be."""
    if use.note != "unknown key":
        return ""
    near = nearest(use.key, (*Recipe.model_fields, *SPELLINGS, *HARMLESS, *REFUSED))
    return f"; did you mean {near}?" if near else ""


def _sentence(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"][:1])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{key}: missing"
    if key in _STAGE_KEYS:
        message = "only supervised LoRA fine-tuning (stage: sft, do_train: true, finetuning_type: lora) is built in"
    return f"{key}: {message} (found {problem['input']!r})"
