"""What several rooms' tests share: offline libraries, a cache of their own, and one tiny run made once a session."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest

from tests.tiny_models import TinyRun, build_run
from tunesmith.models import VariantSet


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A base, two adapters and a merged model on disk."""
    return build_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def variants(tiny: TinyRun) -> VariantSet:
    """All of them loaded, in float32."""
    return VariantSet.load(tiny.base, adapters=tiny.adapters, full={"merged": tiny.merged}, tokenizer_dir=tiny.base)
