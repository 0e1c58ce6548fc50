"""Silence for the libraries that train: their bars, notices and warnings are no business of the user's."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LIBRARIES = ("transformers", "trl", "peft", "accelerate", "datasets", "torch", "huggingface_hub", "bitsandbytes")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hush the training libraries, errors apart, and leave their settings as they were found.

    Their loggers and bars belong to the process, and so does ``warnings``: while this is open, other threads are
    hushed as well.
    """
    levels = {name: logging.getLogger(name).level for name in _LIBRARIES}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _LIBRARIES:
            logging.getLogger(name).setLevel(logging.ERROR)
        import datasets
        from transformers.utils import logging as transformers_logging

        bars = datasets.are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            if not bars[0]:
                datasets.enable_progress_bars()
            if bars[1]:
                transformers_logging.enable_progress_bar()
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
