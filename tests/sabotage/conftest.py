"""One workshop a session."""

from __future__ import annotations

import pytest

from tests.sabotage.workshop import Workshop, make_workshop


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A run, its base, a sound merge and another base."""
    return make_workshop(tmp_path_factory.mktemp("workshop"))
