"""The records of a merge: what will be done, and what was."""

from __future__ import annotations

from pathlib import Path

from tunesmith.adapter import Binding
from tunesmith.checkpoint import storage_path
from tunesmith.record import Finding, Part, Record


class Ingredient(Part):
    """One adapter that goes into a merge.

    Attributes:
        run: absolute run directory.
        checkpoint: which of its adapters.
        adapter: absolute directory of that adapter.
        weight: what its update is multiplied by.
    """

    run: str
    checkpoint: str
    adapter: str
    weight: float = 1.0


class ShardPlan(Part):
    """One file of weights to write.

    Attributes:
        filename: its name in the merged model.
        size_bytes: its size.
        tensors: how many tensors it holds.
        changed: those of them that are computed rather than copied, in the file's order.
        layout_of: the base's file whose header it repeats, byte for byte; None where it has a header of its own.
        header_sha256: hash of its header, the length before it included.
    """

    filename: str
    size_bytes: int
    tensors: int
    changed: tuple[str, ...]
    layout_of: str | None = None
    header_sha256: str = ""


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
        adapters: what is merged in; their updates are summed.
        base_model: the base as it was asked for.
        base: absolute directory of the base, or its address in a storage.
        base_view: how the base is seen, as QLoRA training saw it; None for as it is stored.
        base_is_residual: whether the base is what an initialisation such as PiSSA's left of it.
        out: absolute directory to be made, or its address in a storage.
        dtype: what the changed tensors are stored in, such as ``BF16``.
        convert_to: the dtype that every floating-point tensor is stored in, such as ``F32``; None for the base's own.
        rounding: how those with a low-rank update are rounded: ``nearest``, ``stochastic``, ``faithful``,
            ``calibrated`` or ``calibrated-free``.
        rounded: how many tensors are rounded in each way.
        seed: of what is drawn by chance: stochastic rounding, the calibration text.
        calibration: the user's file of rows for calibrated rounding; None for text that the tuned model writes.
        shard_bytes: the size that no file of more than one tensor exceeds; None for the base's own files.
        binding: what the adapters make of the base.
        shards: weights to write.
        index: the new index's text; None where the model has none.
        assets: files to copy.
        read_bytes: all of the base and of the adapters that will be read.
        write_bytes: all that will be written.
        free_bytes: what the target's disk has free; None where that is not known.
        memory_bytes: the largest working memory of one unit of work, estimated.
        seconds: how long it takes on two cores and a disk that keeps up, estimated.
        force: whether a non-empty ``out`` is replaced.
        warnings: what the user should know first.
    """

    adapters: tuple[Ingredient, ...]
    base_model: str
    base: str
    base_view: str | None = None
    base_is_residual: bool = False
    out: str
    dtype: str
    convert_to: str | None = None
    rounding: str
    rounded: dict[str, int] = {}
    seed: int = 0
    calibration: str | None = None
    shard_bytes: int | None = None
    binding: Binding
    shards: tuple[ShardPlan, ...]
    index: str | None = None
    assets: tuple[Asset, ...]
    read_bytes: int = 0
    write_bytes: int
    free_bytes: int | None = None
    memory_bytes: int
    seconds: float = 0.0
    force: bool = False
    warnings: tuple[Finding, ...] = ()

    @property
    def run(self) -> str:
        """The first adapter's run."""
        return self.adapters[0].run

    @property
    def checkpoint(self) -> str:
        """Which of that run's adapters."""
        return self.adapters[0].checkpoint

    @property
    def changed(self) -> int:
        """How many tensors are computed rather than copied."""
        return sum(len(shard.changed) for shard in self.shards)

    @property
    def tensors(self) -> int:
        """How many tensors the merged model has."""
        return sum(shard.tensors for shard in self.shards)


class Kept(Part):
    """What rounding kept of an update.

    Δ is what the exact result adds to what a tensor began as; realised is what the stored one adds to it.

    Attributes:
        share_unchanged: share of the numbers that rounding left as they were.
        relative_error: ‖realised − Δ‖ / ‖Δ‖.
        gain: ⟨realised, Δ⟩ / ⟨Δ, Δ⟩; 1 is a whole update.
        error_inside: ‖(realised − Δ)·U‖ / ‖Δ‖, U being an orthonormal basis of the update's row space, where Δ acts;
            None where that was not measured.
    """

    share_unchanged: float
    relative_error: float
    gain: float
    error_inside: float | None = None


class Forecast(Part):
    """What rounding would keep of an update, from a few rows of a few tensors.

    Attributes:
        dtype: what they are stored in.
        rounding: how a merge would round them.
        tensors: how many were looked at.
        elements: how many numbers of them.
        kept: what that rounding would keep.
        nearest: what rounding to nearest would keep.
    """

    dtype: str
    rounding: str
    tensors: int
    elements: int
    kept: Kept
    nearest: Kept


class TensorFidelity(Kept):
    """What rounding kept of one tensor's update.

    Attributes:
        name: the tensor's name.
        elements: how many numbers it holds.
        delta_norm: ‖Δ‖ (Frobenius), the weight of this tensor among the others.
        rounding: how it was rounded.
        share_beyond: share of the numbers that are neither of the two that bracket the exact value.
        nearest: what rounding to nearest would have kept; None where that is how it was rounded.
    """

    name: str
    elements: int
    delta_norm: float = 0.0
    rounding: str = "nearest"
    share_beyond: float = 0.0
    nearest: Kept | None = None


class Receipt(Part):
    """One file of weights that was written.

    Attributes:
        filename: the file.
        size_bytes: its size.
        sha256: its hash, hexadecimal; None where it was not asked for.
        tensors: what rounding kept of each update in it; tensors that nothing is added to are left out.
    """

    filename: str
    size_bytes: int
    sha256: str | None
    tensors: tuple[TensorFidelity, ...]


class Merged(Record):
    """A finished merge.

    Attributes:
        plan: what was asked.
        receipts: what was written, one a file of weights.
        base_sha256: hashes of the base's files of weights, hexadecimal, by name; empty where they were not asked for.
        seconds: wall time.
        kept: what rounding kept, over all updated tensors.
        nearest: what rounding to nearest would have kept of them.
        resumed_bytes: how much an earlier, interrupted merge had written and was found good.
        retried_units: how many units of work ran again on a cluster, for their worker was lost or could not read or
            write.
        findings: what the user should know of the result.
    """

    plan: MergePlan
    receipts: tuple[Receipt, ...]
    base_sha256: dict[str, str] = {}
    seconds: float
    kept: Kept
    nearest: Kept
    resumed_bytes: int = 0
    retried_units: int = 0
    findings: tuple[Finding, ...] = ()

    @property
    def path(self) -> Path:
        """The merged model's directory."""
        return storage_path(self.plan.out)
