"""A proof that shares the arithmetic it proves would prove its own mistakes."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.sabotage.workshop import Workshop, check, make_workshop, tunesmith_merge
from tunesmith.checkpoint import Array, Float64
from tunesmith.merge import exact, tiles
from tunesmith.verify import records

VERIFY = Path(records.__file__).parent


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A tiny run and its base."""
    return make_workshop(tmp_path_factory.mktemp("independence"))


def imported(source: str) -> set[str]:
    """Every module that a source names in an import, at any depth of it."""
    nodes = list(ast.walk(ast.parse(source)))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    pairs = [
        (node.module or "", alias.name) for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    return plain | {module for module, _ in pairs} | {f"{module}.{name}" for module, name in pairs}


def test_no_module_of_verify_names_merge() -> None:
    """Neither at the top of a file nor inside a function."""
    sources = {path.relative_to(VERIFY): imported(path.read_text("utf-8")) for path in VERIFY.rglob("*.py")}
    assert len(sources) > 15
    assert {
        name for name, modules in sources.items() if any("tunesmith.merge" in module for module in modules)
    } == set()


def test_importing_verify_does_not_bring_merge_in() -> None:
    """Not by way of another room either."""
    script = "import sys, tunesmith.verify; print([name for name in sys.modules if name.startswith('tunesmith.merge')])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_wrong_scaling_in_merge_is_noticed(shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake that a shared helper would hide."""
    right = exact._delta

    def wrong(*args: Any, **kwargs: Any) -> Float64:
        return right(*args, **kwargs) / 2

    monkeypatch.setattr(exact, "_delta", wrong)
    verdict = check(shop.run, tunesmith_merge(shop.run, shop.base, tmp_path / "merged"), shop.base)
    assert verdict.answer == "different"
    assert verdict.causes[0].code == "cause_scaling_ignored"
    assert verdict.causes[0].params["factor"] == 0.5


def test_a_wrong_rounding_in_merge_is_noticed(shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Truncated where rounding was promised: every element is a neighbour, and none may call itself identical."""
    right = tiles.round_once

    def truncate(values: Float64, dtype: str) -> Array:
        assert dtype == "BF16"
        return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)

    monkeypatch.setattr(tiles, "round_once", truncate)
    verdict = check(shop.run, tunesmith_merge(shop.run, shop.base, tmp_path / "merged"), shop.base)
    assert right is not tiles.round_once
    assert verdict.answer == "equal_within_rounding"
    assert sum(tensor.faithful for tensor in verdict.tensors) > 1000
