"""The tiny run, made once a session, and its variants, loaded once."""

from __future__ import annotations

import pytest
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
