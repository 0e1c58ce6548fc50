"""A recipe from the page: the places it names are made absolute and held to the root before anything reads it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tunesmith as ts
from tunesmith.web.answers import RequestError
from tunesmith.web.places import Places

LONGEST = 64 * 1024
"""Characters of a recipe at most."""

_DEFAULT_NAME = "recipe.yaml"
_OWN_FILE = "training_args.yaml"
_DATA_KEYS = ("dataset", "eval_dataset")
_FOLDER_KEYS = ("dataset_dir", "output_dir", "resume_from_checkpoint")
_DEFAULT_DATA_FOLDER = "data"


@dataclass(frozen=True)
class Located:
    """A recipe whose places are known.

    Attributes:
        source: the recipe's text, or the run that was made from it.
        target: where the text is, or would be, kept; None where it is not to be kept.
        shown: what it is called in a command.
        overrides: what replaces keys of it: the user's, and every place as an absolute path.
        root: where a text that is not kept lies for a while.
    """

    source: str | Path
    target: Path | None
    shown: str
    overrides: tuple[str, ...]
    root: Path

    def check_free(self) -> None:
        """Refuse to write over another recipe.

        Raises:
            TunesmithError: there is one, with another text.
        """
        if self.target is None or not self.target.exists() or not isinstance(self.source, str):
            return
        if self.target.read_text(encoding="utf-8", errors="replace") != self.source:
            raise ts.TunesmithError(
                "Another recipe lies there.", where=self.target, next_step="choose another name, or replace it"
            )

    @contextmanager
    def file(self, *, keep: bool = False) -> Iterator[Path]:
        """The recipe as a path that the library reads.

        Args:
            keep: whether it is written to ``target``, where there is one; else it is removed afterwards.
        """
        if isinstance(self.source, Path):
            yield self.source
            return
        if keep and self.target is not None:
            self.target.write_text(self.source, encoding="utf-8")
            yield self.target
            return
        number, name = tempfile.mkstemp(prefix=".tunesmith-recipe-", suffix=".yaml", dir=self.root)
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(self.source)
        try:
            yield Path(name)
        finally:
            with suppress(OSError):
                Path(name).unlink()


def located(
    text: str | None, run: str | None, overrides: Sequence[str], places: Places, *, name: str | None = None
) -> Located:
    """Find the places that a recipe names.

    Args:
        text: the recipe; or
        run: a run that was made from one.
        overrides: what replaces keys of it.
        places: what may be used.
        name: where the text is to be kept.

    Raises:
        RequestError: neither or both are given.
        RecipeError: it cannot be read.
        TunesmithError: it names a place that is not to be used.
    """
    if (text is None) == (run is None):
        raise RequestError("A training begins with a recipe or with a run.", where="recipe_text, run")
    target = None if name is None or text is None else _yaml(places, name)
    if run is not None:
        folder = Path(places.run(run))
        values, home, shown = ts.read_recipe(_text_of(folder)).values, folder, places.shown(folder)
    else:
        shown = _DEFAULT_NAME if target is None else places.shown(target)
        values, home = ts.read_recipe(text or "").values, places.root
    given = ts.read_recipe("{}", overrides).values
    held = {**_held(values, places, home), **_held(given, places, places.root)}
    if "dataset_dir" not in held and run is None:
        held["dataset_dir"] = str(places.root / _DEFAULT_DATA_FOLDER)
    theirs = [override for override in overrides if override.partition("=")[0].strip() not in held]
    ours = [f"{key}={json.dumps(value)}" for key, value in held.items()]
    return Located(home if text is None else text, target, shown, (*theirs, *ours), places.root)


def _held(values: Mapping[str, Any], places: Places, home: Path) -> dict[str, Any]:
    """The places among a recipe's values, absolute; what has another type than a place's is left for its reader."""
    held: dict[str, Any] = {}
    for key in _DATA_KEYS:
        if isinstance(values.get(key), str | list):
            held[key] = _data(values[key], places, home)
    for key in _FOLDER_KEYS:
        if isinstance(value := values.get(key), str) and value:
            held[key] = _place(value, places, home)
    base = values.get("model_name_or_path")
    if isinstance(base, str) and base:
        is_here = (home / base).is_dir()
        held["model_name_or_path"] = str(places.resolve(str(home / base))) if is_here else places.base(base)
    return held


def _data(value: str | list[Any], places: Places, home: Path) -> Any:
    names = value if isinstance(value, list) else [value] if (home / value).exists() else value.split(",")
    return [_data_set(name.strip(), places, home) if isinstance(name, str) else name for name in names]


def _data_set(name: str, places: Places, home: Path) -> str:
    """A data set: a file within, or a name that is looked up in ``dataset_info.json``."""
    is_path = "/" in name or os.sep in name or name.startswith(("~", "."))
    if name and (is_path or (home / name).is_file() or Path(name).exists()):
        return _place(name, places, home)
    return name


def _place(path: str, places: Places, home: Path) -> str:
    """A path that is relative to a folder, absolute; one that begins with ``~`` is refused as everywhere here."""
    return str(places.resolve(path if path.startswith("~") else str(home / path), must_exist=False))


def _yaml(places: Places, name: str) -> Path:
    target = places.resolve(name, must_exist=False)
    if (
        target.suffix not in (".yaml", ".yml")
        or not target.parent.is_dir()
        or target.name == _OWN_FILE
        or target.is_dir()
    ):
        raise ts.TunesmithError(
            "A recipe cannot be kept there.", where=name, expected="a name that ends in .yaml, in a folder that exists"
        )
    return target


def _text_of(run: Path) -> str:
    try:
        with (run / _OWN_FILE).open(encoding="utf-8", errors="replace") as file:
            return file.read(LONGEST)
    except OSError as error:
        raise ts.TunesmithError(
            "This run keeps no recipe.", where=run, expected=_OWN_FILE, found=error.strerror
        ) from error
