"""Everything that a training knows before a weight is loaded: its rows, its template, its encoded examples."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith.conversations import NamedTemplate, named_template
from tunesmith.errors import BaseModelError
from tunesmith.progress import Cancellation, ProgressCallback, no_progress
from tunesmith.record import Finding
from tunesmith.train.manifest import DataHealth
from tunesmith.train.recipe import Recipe
from tunesmith.train.rows import Examples, Rows, encode_rows, read_rows


@dataclass(frozen=True)
class Prepared:
    """What is trained on.

    Attributes:
        rows: the conversations.
        tokenizer: the base's, with the template and the end token that are trained with.
        template: which template that is.
        train: encoded training rows.
        held_out: encoded held-out rows.
    """

    rows: Rows
    tokenizer: Any
    template: NamedTemplate
    train: Examples
    held_out: Examples

    @property
    def health(self) -> DataHealth:
        """What was found in the rows."""
        return self.rows.health.with_encoded(self.train, self.held_out)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What is worth a sentence."""
        return (*self.health.findings, *self.template.findings)


def prepare(
    recipe: Recipe,
    base_dir: Path,
    *,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> Prepared:
    """Read and encode a recipe's rows with its base's tokenizer.

    Args:
        recipe: what to train on, and how.
        base_dir: the base model's directory.
        progress: told every few hundred rows.
        cancellation: read between rows.

    Raises:
        DataError: rows that cannot be trained on, or a template that is unknown.
        RecipeError: a recipe that does not fit its rows.
        BaseModelError: the base's tokenizer cannot be loaded.
        Cancelled: that was asked for.
    """
    rows = read_rows(recipe)
    tokenizer = load_tokenizer(base_dir)
    template = template_of(recipe, tokenizer, base_dir)
    train, held_out = (
        encode_rows(tokenizer, part, recipe=recipe, progress=progress, cancellation=cancellation)
        for part in (rows.train, rows.held_out)
    )
    if recipe.packing:
        train = replace(train, examples=_packed(train.examples, recipe.cutoff_len))
    return Prepared(rows, tokenizer, template, train, held_out)


def template_of(recipe: Recipe, tokenizer: Any, base_dir: Path) -> NamedTemplate:
    """The template that a recipe trains with; the tokenizer is given it.

    Args:
        recipe: which template.
        tokenizer: the base's.
        base_dir: the base model's directory.

    Raises:
        DataError: there is no such template.
    """
    template = named_template(
        tokenizer,
        recipe.template,
        default_system=recipe.default_system,
        thinking=recipe.enable_thinking,
        stop_ids=_stop_ids(base_dir),
    )
    template.fit(tokenizer)
    return template


def load_tokenizer(base_dir: Path) -> Any:
    """The base's tokenizer, from its directory only.

    Raises:
        BaseModelError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base_dir, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError("The base model's tokenizer cannot be loaded.", where=base_dir, found=error) from error


def load_config(base_dir: Path) -> Any:
    """The base's configuration, from its directory only.

    Raises:
        BaseModelError: it cannot be loaded.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(base_dir, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError("The base model's configuration cannot be read.", where=base_dir, found=error) from error


def _packed(examples: list[dict[str, list[int]]], most: int) -> list[dict[str, list[int]]]:
    """Rows laid together into as few as hold ``most`` tokens each; ``seq_lengths`` tells where they were."""
    import datasets
    import trl

    packed: list[dict[str, list[int]]] = trl.pack_dataset(datasets.Dataset.from_list(examples), most, "bfd").to_list()
    return packed


def _stop_ids(base_dir: Path) -> tuple[int, ...]:
    """The tokens that generation stops at, as the base lists them; none where it lists none."""
    try:
        listed = json.loads((base_dir / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        return ()
    return tuple(one for one in (listed if isinstance(listed, list) else [listed]) if isinstance(one, int))
