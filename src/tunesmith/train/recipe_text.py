"""A recipe while it is being written: its values, its keys and what is wrong so far; nothing it names is looked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tunesmith.errors import RecipeError
from tunesmith.record import Part, Record, Value
from tunesmith.train.keys import KeyUse, explain
from tunesmith.train.recipe import Recipe, read_overrides

_MOST_VALUES = 5000
_MOST_DEPTH = 16
Kind = Literal["bool", "int", "float", "text", "list", "mapping"]
# The first that fits: a number may be written whole, and what takes a list takes one line too.
_TYPES: tuple[tuple[type, Kind], ...] = (
    (float, "float"),
    (tuple, "list"),
    (list, "list"),
    (dict, "mapping"),
    (bool, "bool"),
    (int, "int"),
)


class RecipeText(Record):
    """A recipe's text, read.

    Attributes:
        values: its keys and their values, in JSON's types, in the text's order.
        keys: every key and what becomes of it.
        problems: what is wrong with it, a line each; empty where it can be trained.
    """

    values: dict[str, Any]
    keys: tuple[KeyUse, ...]
    problems: tuple[str, ...]


class RecipeKey(Part):
    """A key that a recipe may have.

    Attributes:
        key: its name.
        type: what its value is; ``list`` and ``mapping`` may be written as one line too.
        required: whether it must be there.
        default: what it is where it is not given; None also where that depends on other keys.
        choices: the values that it can have; empty where there are too many to name.
        minimum: the least number.
        maximum: the largest number.
    """

    key: str
    type: Kind
    required: bool
    default: Value = None
    choices: tuple[Value, ...] = ()
    minimum: float | None = None
    maximum: float | None = None


def read_recipe_text(text: str, overrides: Sequence[str] = ()) -> RecipeText:
    """Read a recipe's text and check it, as far as that can be done without looking at the disk.

    Args:
        text: YAML.
        overrides: ``key=value``, each value read as YAML; they win over the text.

    Raises:
        RecipeError: no YAML mapping of plain values, or an override is not ``key=value``.
    """
    document = _parsed(text)
    if not isinstance(document, dict):
        raise RecipeError("A recipe is a mapping of keys.", expected="key: value lines", found=type(document).__name__)
    document |= read_overrides(overrides)
    budget = [_MOST_VALUES]
    values = {str(key): _plain(value, budget) for key, value in document.items()}
    try:
        Recipe.of(values)
    except RecipeError as error:
        problems = error.details or (error.what,)
    else:
        problems = ()
    return RecipeText(values=values, keys=explain(values, Recipe.model_fields), problems=problems)


def write_recipe_text(values: Mapping[str, Any]) -> str:
    """A recipe's values as YAML, in their order.

    Raises:
        RecipeError: a value that has no plain form.
    """
    budget = [_MOST_VALUES]
    plain = {str(key): _plain(value, budget) for key, value in values.items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100) if plain else ""


def recipe_keys() -> tuple[RecipeKey, ...]:
    """Every field of a recipe, as a form needs it."""
    return tuple(_key(name, field) for name, field in Recipe.model_fields.items())


def _parsed(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except Exception as error:  # what its constructors meet in hostile dates and numbers is of many kinds
        raise RecipeError("The recipe is not valid YAML.", found=error) from error


def _plain(value: Any, budget: list[int], depth: int = 0) -> Any:
    """A value in JSON's types; YAML's references can make a small text endless, so what is looked at is counted."""
    budget[0] -= 1
    if budget[0] < 0 or depth > _MOST_DEPTH:
        raise RecipeError("The recipe is too large.", expected=f"at most {_MOST_VALUES} values, {_MOST_DEPTH} deep")
    if isinstance(value, dict):
        return {_plain_text(str(key)): _plain(one, budget, depth + 1) for key, one in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(one, budget, depth + 1) for one in value]
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63:
        raise RecipeError("The recipe has a number that is too large.")
    if value is None or isinstance(value, bool | int | float):
        return value
    return _plain_text(value if isinstance(value, str) else str(value))


def _plain_text(value: str) -> str:
    if any(0xD800 <= ord(character) < 0xE000 for character in value):
        raise RecipeError("The recipe has a text that is not Unicode.", found=ascii(value)[:100])
    return value


def _key(name: str, field: FieldInfo) -> RecipeKey:
    types, choices = _alternatives(field.annotation)
    default = None if field.default is PydanticUndefined else field.default
    bounds = [bound for one in (field, *_annotated(field.annotation)) for bound in getattr(one, "metadata", ())]
    return RecipeKey(
        key=name,
        type=next((kind for known, kind in _TYPES if known in types), "text"),
        required=field.is_required(),
        default=default if isinstance(default, bool | int | float | str) else None,
        choices=tuple(choices),
        minimum=next((value for one in bounds if (value := _number(one, "ge", "gt")) is not None), None),
        maximum=next((value for one in bounds if (value := _number(one, "le", "lt")) is not None), None),
    )


def _alternatives(annotation: Any) -> tuple[set[type], list[Any]]:
    """The types that an annotation allows, and its literal values."""
    origin = get_origin(annotation)
    if origin is Literal:
        values = list(get_args(annotation))
        return {type(value) for value in values}, values
    if isinstance(annotation, type) and origin is None:
        return ({bool} if annotation is bool else {annotation}), []
    if origin in (tuple, list, dict):
        return {origin}, []
    types: set[type] = set()
    choices: list[Any] = []
    for one in get_args(annotation):
        found, values = _alternatives(one)
        types |= found
        choices += values
    return types, choices


def _annotated(annotation: Any) -> list[Any]:
    return [one for one in get_args(annotation) if hasattr(one, "metadata")]


def _number(bound: Any, *names: str) -> float | None:
    """The number of a bound, where it is one of those that are asked for."""
    return next((float(getattr(bound, name)) for name in names if getattr(bound, name, None) is not None), None)
