"""The records of a merge: what will be done, and what was."""

from __future__ import annotations

from pathlib import Path

from tunesmith.adapter import LowRank
from tunesmith.record import Finding, Part, Record


class ShardPlan(Part):
    """One file of weights to write, laid out as the base's file of the same name.

    Attributes:
        filename: its name in the base and in the merged model.
        size_bytes: its size.
        tensors: how many tensors it holds.
        updates: those of them that change.
    """

    filename: str
    size_bytes: int
    tensors: int
    updates: tuple[LowRank, ...]


class Asset(Part):
    """One small file that travels beside the weights.

    Attributes:
        filename: its name in the merged model.
        source: the absolute path it is copied from.
        origin: ``run`` or ``base``.
    """

    filename: str
    source: str
    origin: str


class MergePlan(Record):
    """All that a merge will do, found out before a byte is written.

    Attributes:
        run: absolute run directory.
        checkpoint: which of its adapters.
        adapter: absolute directory of that adapter.
        base_model: the base as it was asked for.
        base: absolute directory of the base.
        out: absolute directory to be made.
        dtype: what the changed tensors are stored in, such as ``BF16``.
        rounding: how they are rounded: ``nearest``.
        shards: weights to write.
        assets: files to copy.
        write_bytes: all that will be written.
        memory_bytes: the largest working memory of one unit of work, estimated.
        force: whether a non-empty ``out`` is replaced.
        warnings: what the user should know first.
    """

    run: str
    checkpoint: str
    adapter: str
    base_model: str
    base: str
    out: str
    dtype: str
    rounding: str
    shards: tuple[ShardPlan, ...]
    assets: tuple[Asset, ...]
    write_bytes: int
    memory_bytes: int
    force: bool = False
    warnings: tuple[Finding, ...] = ()


class TensorFidelity(Part):
    """What rounding kept of one update.

    Attributes:
        name: the base tensor's name.
        elements: how many numbers it holds.
        share_unchanged: share of them that rounding left as they were in the base.
        relative_error: ‖realised − Δ‖ / ‖Δ‖.
        gain: ⟨realised, Δ⟩ / ⟨Δ, Δ⟩; 1 is a whole update.
        delta_norm: ‖Δ‖ (Frobenius), the weight of this tensor among the others.
    """

    name: str
    elements: int
    share_unchanged: float
    relative_error: float
    gain: float
    delta_norm: float = 0.0


class Receipt(Part):
    """What one unit of work wrote.

    Attributes:
        filename: the file.
        size_bytes: its size.
        sha256: its hash, hexadecimal.
        tensors: what rounding kept of each update in it.
    """

    filename: str
    size_bytes: int
    sha256: str
    tensors: tuple[TensorFidelity, ...]


class Merged(Record):
    """A finished merge.

    Attributes:
        plan: what was asked.
        receipts: what was written, one a shard.
        seconds: wall time.
        share_unchanged: share of all changed tensors' elements that rounding left as they were.
        gain: ⟨realised, Δ⟩ / ⟨Δ, Δ⟩ over all changed tensors.
    """

    plan: MergePlan
    receipts: tuple[Receipt, ...]
    seconds: float
    share_unchanged: float
    gain: float

    @property
    def path(self) -> Path:
        """The merged model's directory."""
        return Path(self.plan.out)
