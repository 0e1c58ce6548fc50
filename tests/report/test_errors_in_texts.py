"""What errors say has a text, by which the page says it in the reader's language.

A sentence's key is ``what.`` and the sentence itself; what is filled in is a placeholder of any name.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path

from tunesmith.report import templates, texts

PLACEHOLDER = re.compile(r"\{\w*\}")
# Calls that make an error beside its class: what they say is their last text, too.
MAKERS = {"error", "misfit_of", "plain_error", "refuse_keys"}
LACKING = " needs the package {}, which is not installed."


@cache
def nodes() -> tuple[ast.AST, ...]:
    """Every class, call and text of every module."""
    folder = Path(texts.__file__).parents[2]
    trees = [ast.parse(path.read_text("utf-8")) for path in sorted(folder.rglob("*.py"))]
    wanted = (ast.ClassDef, ast.Call, ast.Constant, ast.JoinedStr)
    return tuple(node for tree in trees for node in ast.walk(tree) if isinstance(node, wanted))


def name_of(expression: ast.expr) -> str | None:
    """The last name of a dotted one."""
    if isinstance(expression, ast.Attribute):
        return expression.attr
    return expression.id if isinstance(expression, ast.Name) else None


def error_classes() -> set[str]:
    """The names of all errors that a user can mend."""
    known: set[str] = set()
    more = {"TunesmithError"}
    classes = [node for node in nodes() if isinstance(node, ast.ClassDef)]
    while more:
        known |= more
        more = {one.name for one in classes if any(name_of(base) in known for base in one.bases)} - known
    return known


def sayings(expression: ast.expr) -> list[str]:
    """The texts that an expression may come to, with ``{}`` for what is not known; none where it is no text."""
    if isinstance(expression, ast.Constant):
        return [expression.value] if isinstance(expression.value, str) else []
    if isinstance(expression, ast.IfExp):
        return sayings(expression.body) + sayings(expression.orelse)
    if isinstance(expression, ast.FormattedValue):
        value = expression.value
        sides = [value.body, value.orelse] if isinstance(value, ast.IfExp) else [value]
        return [said for side in sides for said in sayings(side) or ["{}"]]
    if isinstance(expression, ast.JoinedStr):
        return ["".join(parts) for parts in product(*map(sayings, expression.values))]
    return []


def said_by_errors() -> Iterator[str]:
    """The sentences that are written where an error is made."""
    makers = error_classes() | MAKERS
    for call in nodes():
        if isinstance(call, ast.Call) and name_of(call.func) in makers:
            said = next(filter(None, map(sayings, reversed(call.args))), [])
            if name_of(call.func) == "MissingExtraError":
                said = [verb + LACKING for verb in sayings(call.args[0])]
            # A sentence of placeholders alone is one that is made elsewhere.
            yield from (one for one in said if re.search(r"[a-z]{2}", one.replace("{}", "")))


def keys() -> set[str]:
    """The sentences that have a text, with ``{}`` for each placeholder."""
    whole = [key.removeprefix("what.") for key in templates("en") if key.startswith("what.")]
    shapes = {PLACEHOLDER.sub("{}", key) for key in whole}
    assert len(shapes) == len(whole)
    return shapes


def test_every_sentence_of_an_error_has_a_text() -> None:
    """A new error without a translation would be English on a Chinese page."""
    said = set(said_by_errors())
    assert len(said) > 250
    assert sorted(said - keys()) == []


def test_every_such_text_is_of_a_sentence_in_the_source() -> None:
    """A sentence that was reworded takes its old translation along."""
    written = {one for node in nodes() if isinstance(node, (ast.Constant, ast.JoinedStr)) for one in sayings(node)}
    assert sorted(keys() - written - set(said_by_errors())) == []


def test_the_english_text_is_the_sentence_itself() -> None:
    """The page in English says what the command line says."""
    english = templates("en")
    assert [key for key in english if key.startswith("what.") and english[key] != key.removeprefix("what.")] == []
