"""Adapters that act together on one base, each with a weight; most often just one."""

from __future__ import annotations

import os
from collections.abc import Sequence

from tunesmith.adapter.load import Adapter
from tunesmith.adapter.records import Added, Binding, LowRank, Magnitude, Replaced, Rows
from tunesmith.checkpoint import Array, Checkpoint, Float64, TensorInfo, read_rows

WholeTensor = Added | Magnitude | Replaced | Rows


class Stack:
    """Adapters that are summed: W' = W + Σ weight·scaling·B·A.

    Args:
        adapters: directories and weights.

    Attributes:
        adapters: the opened adapters.
        weights: the weight of each.

    Raises:
        AdapterError: one of them cannot be read.
    """

    def __init__(self, adapters: Sequence[tuple[str | os.PathLike[str], float]]) -> None:
        self.adapters = tuple(Adapter(path) for path, _ in adapters)
        self.weights = tuple(weight for _, weight in adapters)

    def bind(self, base: Checkpoint, *, base_is_residual: bool = False) -> Binding:
        """What the adapters make of a base.

        Args:
            base: the base model.
            base_is_residual: take the base as what remained of it after an initialisation that subtracts the
                adapter's start (PiSSA and its like).

        Returns:
            Every change, by tensor; every adapter tensor is in exactly one of them.

        Raises:
            UnsupportedAdapterError: something cannot be merged truly; every reason is listed.
            AdapterMismatchError: names or shapes do not fit; all that do not are listed.
        """
        return Binding(updates=self.adapters[0].bind(base))

    def factors(self, update: LowRank) -> tuple[Float64, Float64]:
        """The factors of one update as the base stores its tensor: Δ = scaling · B @ A, whatever ``transposed`` says.

        Args:
            update: one of a binding's.

        Returns:
            A of shape (r, columns) and B of shape (rows, r), float64, exact: of W as a matrix (first dimension by all
            the others), or of the one block.

        Raises:
            AdapterError: a factor holds NaN or infinity.
        """
        return self.adapters[update.adapter].factors(update)

    def info(self, update: WholeTensor) -> TensorInfo:
        """Shape and dtype of the tensor that an update stores whole."""
        return self.adapters[update.adapter].header.tensors[update.tensor]

    def rows(self, update: WholeTensor, start: int = 0, stop: int | None = None) -> Array:
        """Rows of the tensor that an update stores whole, as stored (BF16 as uint16 patterns)."""
        return read_rows(self.adapters[update.adapter].header, update.tensor, start, stop)
