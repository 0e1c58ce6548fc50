"""What several tests of live variants share: the oracle's zoo of bases and adapters, with words for its tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.rows_alone import build_word_tokenizer
from tests.oracle.zoo import Zoo


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """The zoo of the oracle suite, in a directory of its own."""
    return Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tokenizer whose tokens are the words ``t00`` to ``t47``; ``t01`` ends an answer."""
    directory = tmp_path_factory.mktemp("words")
    build_word_tokenizer().save_pretrained(directory)
    return directory
