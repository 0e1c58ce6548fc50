"""Keep Transformers' and PEFT's chatter off the user's terminal; what matters of it we check and raise ourselves."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_logging() -> Iterator[None]:
    """Silence Transformers' log lines below errors and its progress bars; restore both afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence Python warnings as well: loading warns of what :mod:`tunesmith.models.variants` checks by itself."""
    with quiet_logging(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
