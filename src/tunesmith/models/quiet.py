"""Keep Transformers' and PEFT's chatter off the user's terminal; what matters of it we check and raise ourselves."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_logging() -> Iterator[None]:
    """Silence log lines below errors, and Transformers' progress bars; restore all afterwards.

    PEFT imports bitsandbytes where that is installed, which tells of every kernel that it does not find.
    """
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    kernels = logging.getLogger("bitsandbytes")
    kernel_level = kernels.level
    kernels.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        kernels.setLevel(kernel_level)
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence Python warnings as well: loading warns of what :mod:`tunesmith.models.variants` checks by itself."""
    with quiet_logging(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
