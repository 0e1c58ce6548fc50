"""Silence ends where it should."""

from __future__ import annotations

import logging
import warnings

import pytest

from tunesmith.train.quiet import quiet_libraries


def test_settings_are_as_they_were_afterwards() -> None:
    """Levels, bars and warning filters, even after an error."""
    import datasets
    from transformers.utils import logging as transformers_logging

    def settings() -> tuple[object, ...]:
        return (
            logging.getLogger("trl").level,
            logging.getLogger("transformers").level,
            datasets.are_progress_bars_disabled(),
            transformers_logging.is_progress_bar_enabled(),
            list(warnings.filters),
        )

    before = settings()
    with quiet_libraries():
        assert settings() != before
    assert settings() == before
    with pytest.raises(ValueError, match="x"), quiet_libraries():
        raise ValueError("x")
    assert settings() == before


def test_errors_are_still_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Only what is less than an error is hushed."""
    with quiet_libraries():
        logging.getLogger("trl.trainer").warning("hushed")
        logging.getLogger("trl.trainer").error("heard")
    assert [record.message for record in caplog.records] == ["heard"]
