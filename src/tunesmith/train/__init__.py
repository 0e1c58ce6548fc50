"""From a recipe to a run directory: LoRA supervised fine-tuning, and everything a reader of the run will ask for."""

from __future__ import annotations

from tunesmith.train.fit import check_installed, is_main_process, train
from tunesmith.train.manifest import DataFile, Manifest
from tunesmith.train.plan import Machine, TrainingPlan, plan_training
from tunesmith.train.recipe import Recipe, dtype_note, read_recipe
from tunesmith.train.run_dir import ARGUMENTS

__all__ = [
    "ARGUMENTS",
    "DataFile",
    "Machine",
    "Manifest",
    "Recipe",
    "TrainingPlan",
    "check_installed",
    "dtype_note",
    "is_main_process",
    "plan_training",
    "read_recipe",
    "train",
]
