"""From a recipe to a run directory: LoRA supervised fine-tuning, and everything a reader of the run will ask for."""

from __future__ import annotations

from tunesmith.train.fit import check_installed, train
from tunesmith.train.manifest import DataFile, Manifest
from tunesmith.train.recipe import Recipe, read_recipe

__all__ = ["DataFile", "Manifest", "Recipe", "check_installed", "read_recipe", "train"]
