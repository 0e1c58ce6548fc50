"""The records of a quantization: what will be done, and what was."""

from __future__ import annotations

from pathlib import Path

from tunesmith.adapter import Binding
from tunesmith.merge import Asset, Ingredient
from tunesmith.record import Finding, Part, Record


class QuantizationPlan(Record):
    """All that a quantization will do, found out before a byte is written.

    Attributes:
        adapters: what is merged in on the way, before the one rounding; none for a model that comes alone.
        base_model: the base, or the model that comes alone, as it was asked for.
        base: absolute directory of that.
        base_view: how the base is seen, as QLoRA training saw it; None for as it is stored.
        out: absolute directory to be made.
        scheme: ``int8``, ``int4:128``, ``int4:64``, ``int4:32``, ``w8a8`` or ``fp8``.
        rounding: ``nearest``, ``faithful`` or ``calibrated``.
        seed: of the calibration text.
        calibration: the user's file of rows for calibrated rounding; None for text that the model writes.
        shard_bytes: the size that no file of more than one tensor exceeds; None for the base's own files.
        binding: what the adapters make of the base.
        quantized: the tensors that are quantized.
        ignore: the layers that are stored as they were, as ``config.json`` names them.
        elements: numbers in the quantized tensors.
        tensors: tensors that the model has before it is quantized.
        assets: files to copy.
        read_bytes: weights of the model, before it is quantized.
        write_bytes: all that will be written.
        free_bytes: what the target's disk has free; None where that is not known.
        memory_bytes: the largest working memory of one unit of work, estimated.
        seconds: how long it takes on two cores and a disk that keeps up, estimated; without the calibration.
        force: whether a non-empty ``out`` is replaced.
        warnings: what the user should know first.
    """

    adapters: tuple[Ingredient, ...] = ()
    base_model: str
    base: str
    base_view: str | None = None
    out: str
    scheme: str
    rounding: str
    seed: int = 0
    calibration: str | None = None
    shard_bytes: int | None = None
    binding: Binding
    quantized: tuple[str, ...]
    ignore: tuple[str, ...]
    elements: int
    tensors: int
    assets: tuple[Asset, ...]
    read_bytes: int
    write_bytes: int
    free_bytes: int | None = None
    memory_bytes: int
    seconds: float = 0.0
    force: bool = False
    warnings: tuple[Finding, ...] = ()

    @property
    def run(self) -> str | None:
        """The adapter's run; None for a model that comes alone."""
        return self.adapters[0].run if self.adapters else None

    @property
    def checkpoint(self) -> str | None:
        """Which of that run's adapters."""
        return self.adapters[0].checkpoint if self.adapters else None


class TensorRounded(Part):
    """What quantization did to one tensor.

    Ŵ is what is stored, dequantized; W' is the exact tensor, the update included.

    Attributes:
        name: the tensor's name before it was quantized.
        elements: how many numbers it holds.
        rounding: how it was rounded: ``nearest``, ``faithful`` or ``calibrated``.
        norm: ‖W'‖ (Frobenius).
        relative_error: ‖Ŵ − W'‖ / ‖W'‖.
        gain: ⟨Ŵ − W, Δ⟩ / ⟨Δ, Δ⟩ with Δ = W' − W; 1 is a whole update.  None where nothing is added.
        error_inside: ‖(Ŵ − W')·U‖ / ‖Δ‖, U being an orthonormal basis of the update's row space; None where that was
            not measured.
        share_clipped: share of the numbers that lie beyond the outermost codes.
    """

    name: str
    elements: int
    rounding: str
    norm: float
    relative_error: float
    gain: float | None = None
    error_inside: float | None = None
    share_clipped: float = 0.0


class Quantized(Record):
    """A finished quantization.

    Attributes:
        plan: what was asked.
        tensors: the quantized ones.
        rounded: how many of them were rounded in each way.
        size_bytes: of the weights that were written.
        seconds: wall time; of calibrated rounding with the recording.
        relative_error: ‖Ŵ − W'‖ / ‖W'‖ over all quantized tensors together.
        retried_units: how many units of work ran again on a cluster, for their worker was lost or could not read or
            write.
        findings: what the user should know of the result.
    """

    plan: QuantizationPlan
    tensors: tuple[TensorRounded, ...]
    rounded: dict[str, int]
    size_bytes: int
    seconds: float
    relative_error: float
    retried_units: int = 0
    findings: tuple[Finding, ...] = ()

    @property
    def path(self) -> Path:
        """The quantized model's directory."""
        return Path(self.plan.out)
