"""A GGUF file, read by the official ``gguf`` package: its fields as plain values, its tensors mapped from the disk.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.checkpoint import Array, Float64
from tunesmith.errors import CheckpointError, MissingExtraError

if TYPE_CHECKING:
    from gguf import GGUFReader

_MAGIC = b"GGUF"


class GgufFile:
    """The fields and tensors of one GGUF file; nothing of a tensor is read before it is asked for.

    Args:
        path: the file.

    Attributes:
        path: the file.
        tensors: every tensor of the official reader by name.

    Raises:
        CheckpointError: it is not there, or is no GGUF file that can be read to its end.
        MissingExtraError: the package ``gguf`` is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        _require_gguf(self.path)
        try:
            reader = _quick_reader()
        except ImportError as error:
            raise MissingExtraError("Reading a GGUF file", "gguf", "gguf") from error
        try:
            self._reader = reader(self.path)
        except Exception as error:  # the reader trusts what lengths say, and fails in as many ways
            raise CheckpointError(
                "The GGUF file cannot be read to its end.", where=self.path, found=str(error) or type(error).__name__
            ) from error
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    @property
    def architecture(self) -> str:
        """``general.architecture``; empty where the file does not say."""
        return str(self.get("general.architecture") or "")

    def get(self, key: str) -> Any:
        """A field's value (text, number or list of them); None where it is absent."""
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    def of_architecture(self, key: str) -> Any:
        """A field of the architecture's own, such as ``rope.freq_base``; None where it is absent."""
        return self.get(f"{self.architecture}.{key}")

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape as a model has it: the slowest dimension first."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape.tolist()))

    def type(self, name: str) -> str:
        """How a tensor is stored, such as ``BF16`` or ``Q4_K``."""
        return str(self.tensors[name].tensor_type.name)

    def raw(self, name: str, block: int | None, start: int, stop: int) -> Array:
        """Stored rows: numbers of F32 and F16, bytes of any other type.

        Args:
            name: the tensor.
            block: which matrix of a stack of them; None for a tensor that is a matrix or a vector.
            start: first row.
            stop: row to stop before.

        Returns:
            Shape ``(stop - start, numbers or bytes of a row)``; a vector is one row.
        """
        data = self.tensors[name].data
        matrix = data if block is None else data[block]
        rows: Array = np.asarray(matrix.reshape(1, -1) if matrix.ndim == 1 else matrix[start:stop])
        return rows

    def values(self, name: str, raw: Array) -> Float64:
        """Stored rows as the numbers they mean.

        Raises:
            NotImplementedError: the package cannot read the type.
        """
        from gguf.quants import dequantize

        return np.asarray(dequantize(raw, self.tensors[name].tensor_type), dtype=np.float64)


def _require_gguf(path: Path) -> None:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError("The GGUF file is not a regular file.", where=path)
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(
            "The GGUF file is not there or cannot be read.", where=path, found=error.strerror
        ) from error
    if magic != _MAGIC:
        raise CheckpointError("This is not a GGUF file.", where=path, expected="GGUF", found=repr(magic))


def _quick_reader() -> type[GGUFReader]:
    """The official reader, which slices a ``memmap`` for every token; slicing a plain array takes a third of that."""
    from gguf import GGUFReader

    class Quick(GGUFReader):  # type: ignore[misc]
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    return Quick
