"""The tiny run of the models room, and its variants."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from tiny_models import TinyRun, build_run

from tunesmith.models import VariantSet


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A base, two adapters and a merged model on disk."""
    return build_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def variants(tiny: TinyRun) -> VariantSet:
    """All of them loaded, in float32."""
    return VariantSet.load(tiny.base, adapters=tiny.adapters, full={"merged": tiny.merged}, tokenizer_dir=tiny.base)
