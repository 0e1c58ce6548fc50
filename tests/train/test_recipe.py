"""The recipe: every mistake is named, once, with what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.errors import RecipeError
from tunesmith.train import Recipe, read_recipe

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
        Recipe.of({"dataset": "x", "output_dir": "y", "lora_rank": "many", "seeed": 1, "template": "qwen"})
    assert [line.partition(":")[0] for line in caught.value.details] == [
        "template",
        "model_name_or_path",
        "lora_rank",
        "seeed",
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


def test_paths_are_relative_to_where_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the recipe's folder in the file, to the working directory in an override."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    recipe = read_recipe(Path("../recipes") / written(tmp_path / "recipes").name, ["output_dir=mine"])
    assert recipe.dataset.resolve() == tmp_path / "recipes" / "data.jsonl"
    assert recipe.output_dir == tmp_path / "work" / "mine"


def test_llamafactory_keys_are_accepted_with_the_one_value_that_is_built() -> None:
    """A LLaMA-Factory recipe for supervised LoRA can be read."""
    assert Recipe.of(REQUIRED | {"stage": "sft", "do_train": True, "finetuning_type": "lora"}).stage == "sft"


@pytest.mark.parametrize(("key", "value"), [("stage", "dpo"), ("do_train", False), ("finetuning_type", "full")])
def test_llamafactory_keys_with_other_values_are_refused_with_the_reason(key: str, value: object) -> None:
    """What is not built is not quietly replaced by what is."""
    (line,) = problems(**{key: value})
    assert line.startswith(f"{key}: only supervised LoRA fine-tuning")


def test_bf16_is_a_dtype() -> None:
    """LLaMA-Factory's switch is honoured, and false is nothing."""
    assert Recipe.of(REQUIRED | {"bf16": True, "fp16": False}).dtype == "bfloat16"


def test_half_precisions_that_contradict_are_refused() -> None:
    """Two dtypes are no dtype."""
    assert problems(bf16=True, fp16=True) == ("fp16: true contradicts dtype bfloat16",)
    assert problems(bf16="maybe") == ("bf16: expected true or false (found 'maybe')",)


def test_two_sources_of_held_out_rows_are_refused() -> None:
    """As in LLaMA-Factory."""
    assert problems(eval_dataset="e.jsonl", val_size=0.1) == (
        "eval_dataset and val_size both name held-out rows; leave one out",
    )
