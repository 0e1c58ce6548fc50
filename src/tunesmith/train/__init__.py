"""From a recipe to a run directory: LoRA supervised fine-tuning, and everything a reader of the run will ask for."""

from __future__ import annotations

from tunesmith.train.fit import check_installed, train
from tunesmith.train.manifest import DataFile, Manifest
from tunesmith.train.plan import Machine, TrainingPlan, plan_training
from tunesmith.train.preview import RowPreview, preview_row
from tunesmith.train.processes import Peers, SaidElsewhere, is_main_process, local_processes, together
from tunesmith.train.recipe import Recipe, dtype_note, read_recipe
from tunesmith.train.recipe_text import RecipeKey, RecipeText, read_recipe_text, recipe_keys, write_recipe_text
from tunesmith.train.run_dir import ARGUMENTS
from tunesmith.train.strategy import refuse_unbuilt_launch

__all__ = [
    "ARGUMENTS",
    "DataFile",
    "Machine",
    "Manifest",
    "Peers",
    "Recipe",
    "RecipeKey",
    "RecipeText",
    "RowPreview",
    "SaidElsewhere",
    "TrainingPlan",
    "check_installed",
    "dtype_note",
    "is_main_process",
    "local_processes",
    "plan_training",
    "preview_row",
    "read_recipe",
    "read_recipe_text",
    "recipe_keys",
    "refuse_unbuilt_launch",
    "together",
    "train",
    "write_recipe_text",
]
