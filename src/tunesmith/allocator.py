"""What the C allocator and oneDNN keep, and when they let go of it, where that costs memory or time."""

from __future__ import annotations

import ctypes
import gc
import os
import sys

_KERNELS = 64


def keep_freed_memory() -> None:
    """Let the allocator keep what tile arithmetic frees, instead of handing every temporary back to the kernel.

    glibc raises its threshold for returning memory to the size of the largest block that was ever freed, up to 32 MiB
    (mallopt(3), M_MMAP_THRESHOLD).  Without this, faulting the same pages in again can take most of a merge's
    time on a virtual machine.
    """
    import numpy as np

    np.empty(31 << 20, np.uint8)


def give_memory_back(*, collect: bool = True) -> None:
    """Hand freed memory back to the kernel, as glibc does not by itself while anything above it is in use.

    Args:
        collect: collect garbage first; a trainer or a model holds itself in cycles.
    """
    if collect:
        gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own; other C libraries have none
        if trim is not None:
            trim(0)


def keep_few_kernels() -> None:
    """Let oneDNN keep the machine code of few products, unless the user says how many.

    It compiles one for every number of tokens that a batch has, and keeps 1,024 of them, in more memory than it takes
    time to compile one again.  It asks once, at its first product.

    Source: https://uxlfoundation.github.io/oneDNN/dev_guide_primitive_cache.html
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_KERNELS))
