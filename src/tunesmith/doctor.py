"""What this machine and installation have, and the line that installs what they lack."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import sys

from tunesmith.api.engines import compute_dtype
from tunesmith.checkpoint import cache_dir
from tunesmith.models import ComputeDtype
from tunesmith.record import Record

_CORE = ("torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "huggingface_hub", "numpy")
_EXTRAS = {
    "train": ("trl", "datasets"),
    "fast": ("numba",),
    "web": ("fastapi", "uvicorn"),
    "quantize": ("compressed_tensors",),
    "gguf": ("gguf",),
    "scale": ("fsspec",),
}


class Extra(Record):
    """One optional part.

    Attributes:
        name: as in ``pip install "tunesmith[name]"``.
        missing: its packages that are not installed.
    """

    name: str
    missing: tuple[str, ...]

    @property
    def install(self) -> str:
        """The line that installs it."""
        return f'pip install "tunesmith[{self.name}]"'


class Health(Record):
    """What :func:`doctor` found.

    Attributes:
        versions: of Python, Tunesmith and the core packages; None where one is not installed.
        platform: the operating system and processor family.
        compute: the dtype that this machine computes in, and the timings behind it.
        cores: logical processors.
        memory_bytes: all of the machine's memory.
        free_memory_bytes: what is available now.
        cache: the user's cache folder.
        free_disk_bytes: free on its file system.
        extras: the optional parts.
    """

    versions: dict[str, str | None]
    platform: str
    compute: ComputeDtype
    cores: int
    memory_bytes: int
    free_memory_bytes: int
    cache: str
    free_disk_bytes: int
    extras: tuple[Extra, ...]


def doctor(*, dtype: str = "auto") -> Health:
    """Look at this machine and installation.

    Args:
        dtype: the compute dtype to show; ``auto`` is measured.
    """
    import psutil

    memory = psutil.virtual_memory()
    cache = cache_dir()
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return Health(
        versions={
            "python": platform.python_version(),
            "tunesmith": _version("tunesmith"),
            **{name: _version(name) for name in _CORE},
        },
        platform=f"{platform.system()} {platform.machine()}, {sys.implementation.name}",
        compute=compute_dtype(dtype),
        cores=psutil.cpu_count() or 1,
        memory_bytes=memory.total,
        free_memory_bytes=memory.available,
        cache=str(cache),
        free_disk_bytes=shutil.disk_usage(existing).free,
        extras=tuple(
            Extra(name=name, missing=tuple(package for package in packages if not importlib.util.find_spec(package)))
            for name, packages in _EXTRAS.items()
        ),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
