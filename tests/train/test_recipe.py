"""The recipe: every mistake is named, once, with what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tunesmith.errors import RecipeError
from tunesmith.train import Recipe, read_recipe
from tunesmith.train.recipe import dtype_note

REQUIRED = {"model_name_or_path": "demo", "dataset": "data.jsonl", "output_dir": "out"}


def written(folder: Path, text: str = "") -> Path:
    """A recipe file with the required keys and ``text``."""
    path = folder / "recipe.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in REQUIRED.items()) + text, encoding="utf-8")
    return path


def problems(**values: object) -> tuple[str, ...]:
    """What is wrong with the required keys and ``values``."""
    with pytest.raises(RecipeError) as caught:
        Recipe.of(REQUIRED | values)
    return caught.value.details


def test_unknown_key_is_refused_and_the_nearest_is_named() -> None:
    """A typing slip is told apart from a key that does nothing."""
    assert problems(lora_rnak=8) == ("lora_rnak: unknown key; did you mean lora_rank?",)


def test_key_without_a_near_one_is_refused_without_a_guess() -> None:
    """No guess is better than a wild one."""
    assert problems(zzz=1) == ("zzz: unknown key",)


def test_all_problems_are_raised_at_once() -> None:
    """Nobody mends a recipe one error at a time."""
    with pytest.raises(RecipeError) as caught:
        Recipe.of({"dataset": "x", "output_dir": "y", "lora_rank": "many", "seeed": 1, "use_galore": True})
    assert [line.partition(":")[0] for line in caught.value.details] == [
        "seeed",
        "use_galore",
        "model_name_or_path",
        "lora_rank",
    ]
    assert "4 problems" in caught.value.what


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_rank", 0),
        ("lora_rank", True),
        ("lora_rank", 1.5),
        ("learning_rate", "fast"),
        ("learning_rate", float("inf")),
        ("learning_rate", -1),
        ("val_size", 1.5),
        ("val_size", -0.1),
        ("warmup_ratio", 1),
        ("lr_scheduler_type", "sawtooth"),
        ("dtype", "int8"),
        ("eval_steps", True),
        ("lora_target", "q_proj,,v_proj"),
        ("lora_target", 3),
        ("dataset", 3),
        ("dataset", ""),
        ("dataset_dir", "REMOTE:org/rows"),
        ("dataset_dir", "ONLINE"),
        ("save_steps", 2.5),
        ("per_device_train_batch_size", "two"),
        ("quantization_bit", 3),
        ("flash_attn", "fastest"),
        ("lr_scheduler_kwargs", "min_lr=0.1"),
        ("layers_to_transform", "first"),
        ("init_lora_weights", "pissa"),
        ("interleave_probs", "a"),
    ],
)
def test_wrong_value_is_refused_and_shown(key: str, value: object) -> None:
    """The message names the key and what was found."""
    (line,) = problems(**{key: value})
    assert line.startswith(f"{key}: ")
    assert f"(found {value!r})" in line


def test_float_without_a_dot_is_a_float(tmp_path: Path) -> None:
    """PyYAML reads 1e-4 as text; people write it all the same."""
    assert read_recipe(written(tmp_path, "learning_rate: 1e-4\n")).learning_rate == 1e-4


def test_defaults_hold_where_a_key_is_absent_or_empty(tmp_path: Path) -> None:
    """An empty key is an absent one."""
    recipe = read_recipe(written(tmp_path, "lora_rank:\neval_steps:\n"))
    assert (recipe.lora_rank, recipe.lora_alpha, recipe.eval_steps) == (8, 16, None)


@pytest.mark.parametrize("text", ["a: [", "- a list\n", "just text", ""])
def test_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    """Broken YAML and YAML of another shape are the user's to mend, not a traceback."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert caught.value.where == str(path)


def test_absent_file_is_refused(tmp_path: Path) -> None:
    """The path is named."""
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path / "none.yaml")


def test_yaml_that_would_run_code_is_refused(tmp_path: Path) -> None:
    """Only plain YAML is read."""
    with pytest.raises(RecipeError, match="not valid YAML"):
        read_recipe(written(tmp_path, "seed: !!python/object/apply:os.getpid []\n"))


def test_overrides_win_and_are_read_as_yaml(tmp_path: Path) -> None:
    """Numbers, truth values and text arrive as what they are."""
    recipe = read_recipe(
        written(tmp_path, "lora_rank: 4\n"),
        ["lora_rank=32", "learning_rate=2e-5", "use_rslora=true", "lora_target=q_proj, v_proj"],
    )
    assert (recipe.lora_rank, recipe.learning_rate, recipe.use_rslora) == (32, 2e-5, True)
    assert recipe.target_modules == ["q_proj", "v_proj"]


def test_overrides_that_cannot_be_read_are_all_named(tmp_path: Path) -> None:
    """What has no equals sign, no key or no YAML is refused."""
    with pytest.raises(RecipeError) as caught:
        read_recipe(written(tmp_path), ["lora_rank", "=3", "seed=[", "seed=1"])
    assert caught.value.details == (
        "'lora_rank' is not key=value",
        "'=3' is not key=value",
        "'seed=[' is not key=value",
    )


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The working directory and the recipe's folder, with rows in both."""
    work, recipes = tmp_path / "work", tmp_path / "recipes"
    for folder in (work, recipes):
        folder.mkdir()
        (folder / "both.jsonl").touch()
    (recipes / "data.jsonl").touch()
    monkeypatch.chdir(work)
    return work, recipes


def test_paths_are_relative_to_the_working_directory(places: tuple[Path, Path]) -> None:
    """As in LLaMA-Factory; what is only beside the recipe is found there."""
    work, recipes = places
    recipe = read_recipe(written(recipes, "eval_dataset: both.jsonl\n"), ["output_dir=mine"])
    assert recipe.eval_dataset == (str(work / "both.jsonl"),)
    assert recipe.dataset == (str(recipes / "data.jsonl"),)
    assert recipe.output_dir == work / "mine"
    (recipes / "out").mkdir()  # is no input
    assert read_recipe(written(recipes)).output_dir == work / "out"


def test_dataset_dir_is_where_it_is_found(places: tuple[Path, Path]) -> None:
    """LLaMA-Factory's own default too."""
    work, recipes = places
    assert read_recipe(written(recipes)).dataset_dir == work / "data"
    (recipes / "data").mkdir()
    assert read_recipe(written(recipes)).dataset_dir == recipes / "data"
    assert read_recipe(written(recipes), ["dataset_dir=elsewhere"]).dataset_dir == work / "elsewhere"


def test_names_of_data_sets_stay_names(places: tuple[Path, Path]) -> None:
    """A folder that is called as one is no file of rows; files may stand among names."""
    work, recipes = places
    (work / "identity").mkdir()
    recipe = read_recipe(written(recipes), ["dataset=identity, both.jsonl,alpaca_en_demo"])
    assert recipe.dataset == ("identity", str(work / "both.jsonl"), "alpaca_en_demo")
    assert read_recipe(written(recipes), ["dataset=[identity, a]"]).dataset == ("identity", "a")


def test_override_takes_the_place_of_a_path(places: tuple[Path, Path]) -> None:
    """Though it is none itself."""
    _, recipes = places
    path = written(recipes, "resume_from_checkpoint: out/checkpoint-5\n")
    assert read_recipe(path, ["resume_from_checkpoint=true"]).resume_from_checkpoint is True
    assert read_recipe(path, ["resume_from_checkpoint=null"]).resume_from_checkpoint is None


def test_home_of_nobody_is_a_name(places: tuple[Path, Path]) -> None:
    """Not a traceback."""
    work, recipes = places
    assert read_recipe(written(recipes), ["output_dir=~nobody-here/x"]).output_dir == work / "~nobody-here/x"


def test_link_on_the_way_is_followed(places: tuple[Path, Path]) -> None:
    """``link/../data.jsonl`` lies beside what the link points to, not beside the link."""
    work, recipes = places
    (recipes / "sub").mkdir()
    (work / "link").symlink_to(recipes / "sub")
    (found,) = read_recipe(written(recipes), ["dataset=link/../data.jsonl"]).dataset
    assert Path(found).is_absolute()
    assert Path(found).samefile(recipes / "data.jsonl")


def test_recipe_of_a_run_is_relative_to_the_run(places: tuple[Path, Path]) -> None:
    """What is written into a run says the same when it is read from there, wherever one stands."""
    work, recipes = places
    run = work / "out"
    run.mkdir()
    (run / "checkpoint-5").mkdir()
    (run / "both.jsonl").touch()
    text = "resume_from_checkpoint: out/checkpoint-5\ntemplate: qwen\nbf16: true\nreport_to: none\nval_size: 0.1\n"
    recipe = read_recipe(written(recipes, text), ["dataset=identity,both.jsonl", "eval_strategy=steps"])
    values = recipe.written(run)
    assert values["dataset"] == ["identity", "../both.jsonl"]
    assert (values["output_dir"], values["resume_from_checkpoint"]) == (".", "checkpoint-5")
    assert not any(str(work) in str(value) for value in values.values())
    (run / "training_args.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    (run / "tunesmith_run.json").touch()
    again = read_recipe(run / "training_args.yaml")
    assert again.model_dump() | {"eval_steps": None} == recipe.model_dump()
    assert again.evaluation_interval == recipe.evaluation_interval == 500


def test_llamafactory_keys_are_accepted_with_the_one_value_that_is_built() -> None:
    """A LLaMA-Factory recipe for supervised LoRA can be read."""
    assert Recipe.of(REQUIRED | {"stage": "sft", "do_train": True, "finetuning_type": "lora"}).stage == "sft"


@pytest.mark.parametrize(("key", "value"), [("stage", "dpo"), ("do_train", False), ("finetuning_type", "full")])
def test_llamafactory_keys_with_other_values_are_refused_with_the_reason(key: str, value: object) -> None:
    """What is not built is not quietly replaced by what is."""
    (line,) = problems(**{key: value})
    assert line.startswith(f"{key}: only supervised LoRA fine-tuning")


@pytest.mark.parametrize("key", ["bf16", "pure_bf16"])
def test_bf16_is_a_wish(key: str) -> None:
    """It does not decide the dtype; false is nothing."""
    recipe = Recipe.of(REQUIRED | {key: True, "fp16": False})
    assert (recipe.dtype, recipe.half_precision) == ("auto", "bfloat16")
    assert Recipe.of(REQUIRED | {key: False}).half_precision is None


def test_wish_that_is_not_followed_is_said_with_what_was_measured() -> None:
    """And with the key that insists; a wish that comes true needs no words, nor does one that is overruled."""
    recipe = Recipe.of(REQUIRED | {"bf16": True})
    note = dtype_note(recipe, "float32", gemm_ms={"float32": 1.5, "bfloat16": 45.04, "float16": 9})
    assert note == (
        "bf16: true is not followed: this machine computes float32 faster (a product and its gradient take 1.5 ms in "
        "float32, 45 ms in bfloat16); dtype: bfloat16 insists."
    )
    assert "fp16: true is not followed" in str(dtype_note(Recipe.of(REQUIRED | {"fp16": True}), "bfloat16", gemm_ms={}))
    assert dtype_note(recipe, "bfloat16", gemm_ms={}) is None
    assert dtype_note(Recipe.of(REQUIRED | {"bf16": True, "dtype": "float32"}), "float32", gemm_ms={}) is None


def test_explicit_dtype_is_obeyed() -> None:
    """Our own key, under its short names too."""
    assert Recipe.of(REQUIRED | {"dtype": "bf16"}).dtype == "bfloat16"


def test_half_precisions_that_contradict_are_refused() -> None:
    """Two wishes are no wish."""
    assert problems(bf16=True, fp16=True) == ("fp16: true contradicts bf16: true",)
    assert problems(bf16="maybe") == ("bf16: expected true or false (found 'maybe')",)


def test_other_words_for_a_key_set_it() -> None:
    """What LLaMA-Factory and older transformers call otherwise."""
    recipe = Recipe.of(REQUIRED | {"neat_packing": True, "packing": False, "disable_shuffling": True, "no_cuda": True})
    assert (recipe.packing, recipe.train_sampling_strategy, recipe.use_cpu) == (True, "sequential", True)
    assert Recipe.of(REQUIRED | {"disable_gradient_checkpointing": True}).disable_gradient_checkpointing
    assert Recipe.of(REQUIRED).gradient_checkpointing is None
    assert problems(disable_gradient_checkpointing=True, gradient_checkpointing=True) == (
        "disable_gradient_checkpointing: true contradicts gradient_checkpointing True",
    )


@pytest.mark.parametrize(("given", "alpha"), [({"lora_rank": 32}, 64), ({"lora_rank": "4"}, 8), ({"lora_alpha": 5}, 5)])
def test_alpha_is_twice_the_rank_unless_given(given: dict[str, object], alpha: int) -> None:
    """As in LLaMA-Factory."""
    assert Recipe.of(REQUIRED | given).lora_alpha == alpha


def test_values_are_taken_as_yaml_and_llamafactory_give_them(tmp_path: Path) -> None:
    """An unquoted no is false in YAML; lists and lines with commas are the same; JSON is a mapping."""
    text = "eval_strategy: no\nsave_strategy: no\nlr_scheduler_kwargs: '{\"min_lr\": 1.0e-6}'\nreport_to: [wandb]\n"
    text += "adam_epsilon: 1e-6\nrun_name: 7\nadditional_target: [embed_tokens, lm_head]\nlayers_to_transform: 0,1\n"
    text += "enable_thinking:\nwarmup_steps: 0.05\nsave_steps: 20.0\n"
    recipe = read_recipe(written(tmp_path, text))
    assert (recipe.eval_strategy, recipe.save_strategy, recipe.report_to) == ("no", "no", ("wandb",))
    assert (recipe.lr_scheduler_kwargs, recipe.adam_epsilon, recipe.run_name) == ({"min_lr": 1e-6}, 1e-6, "7")
    assert (recipe.additional_target, recipe.layers_to_transform) == ("embed_tokens,lm_head", (0, 1))
    assert (recipe.enable_thinking, recipe.warmup_steps, repr(recipe.save_steps)) == (None, 0.05, "20")


def test_base_has_its_revision(tmp_path: Path) -> None:
    """A revision is the hub's; a directory has none."""
    revised = {"model_revision": "v2"}
    assert Recipe.of(REQUIRED | revised | {"model_name_or_path": "org/base"}).base == "org/base@v2"
    assert Recipe.of(REQUIRED | {"model_name_or_path": "org/base"}).base == "org/base"
    assert Recipe.of(REQUIRED | revised | {"model_name_or_path": str(tmp_path)}).base == str(tmp_path)


def test_evaluations_come_with_the_checkpoints_unless_said_otherwise() -> None:
    """The Trainer's rule, every ``logging_steps``, holds where the recipe gives both."""
    held = REQUIRED | {"val_size": 0.1, "save_steps": 50}
    steps = {"eval_strategy": "steps"}
    assert Recipe.of(held).evaluation_interval == 50
    assert Recipe.of(held | steps).evaluation_interval == 50
    assert Recipe.of(held | {"logging_steps": 10}).evaluation_interval == 50
    assert Recipe.of(held | steps | {"logging_steps": 10}).evaluation_interval == 10
    assert Recipe.of(held | steps | {"logging_steps": 10, "eval_steps": 25}).evaluation_interval == 25


@pytest.mark.parametrize(
    "values",
    [
        {"warmup_ratio": 0.1, "warmup_steps": 10},
        {"mask_history": True, "train_on_prompt": True},
        {"interleave_probs": "0.5,0.5"},
        {"interleave_probs": [0.5, 0.5], "mix_strategy": "interleave_under"},
        {"early_stopping_steps": 3},
        {"load_best_model_at_end": True},
        {"eval_strategy": "steps"},
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        {"save_strategy": "best"},
        {"val_size": 0.1, "early_stopping_steps": 3, "eval_strategy": "no"},
        {"val_size": 0.1, "load_best_model_at_end": True, "save_strategy": "epoch"},
        {"val_size": 0.1, "load_best_model_at_end": True, "save_steps": 50, "eval_steps": 20},
        {"val_size": 0.1, "load_best_model_at_end": True, "save_steps": 50, "eval_steps": 0.1},
        {"do_train": None, "do_predict": True},
    ],
)
def test_keys_that_contradict_each_other_are_refused(values: dict[str, object]) -> None:
    """Each is right by itself."""
    with pytest.raises(RecipeError) as caught:
        Recipe.of(REQUIRED | {key: value for key, value in values.items() if value is not None})
    assert len(caught.value.details) == 1


def test_best_checkpoint_can_be_loaded_where_it_was_evaluated() -> None:
    """Shares of the steps too, though 0.3 is not three times 0.1 exactly."""
    for every in ({"save_steps": 100, "eval_steps": 50}, {"save_steps": 0.3, "eval_steps": 0.1}):
        assert Recipe.of(REQUIRED | every | {"val_size": 0.1, "load_best_model_at_end": True}).load_best_model_at_end


def test_two_sources_of_held_out_rows_are_refused() -> None:
    """As in LLaMA-Factory."""
    assert problems(eval_dataset="e.jsonl", val_size=0.1) == (
        "eval_dataset and val_size both name held-out rows; leave one out",
    )


@pytest.mark.parametrize("value", ["2023-99-99", "[", "0x"])
def test_override_with_an_unreadable_value_is_named(tmp_path: Path, value: str) -> None:
    """A date that there is not is no bug of ours."""
    path = tmp_path / "recipe.yaml"
    path.write_text("model_name_or_path: demo\ndataset: rows.jsonl\noutput_dir: out\n", encoding="utf-8")
    with pytest.raises(RecipeError):
        read_recipe(path, [f"learning_rate={value}"])
