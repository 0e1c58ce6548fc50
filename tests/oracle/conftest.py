"""One zoo a session: every base and adapter is made once, and every merge is made once."""

from __future__ import annotations

import pytest

from tests.oracle.zoo import Zoo


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """The zoo, in a directory of its own."""
    return Zoo(tmp_path_factory.mktemp("zoo"))
