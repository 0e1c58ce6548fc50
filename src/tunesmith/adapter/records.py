"""The records that describe an adapter."""

from __future__ import annotations

from tunesmith.record import Part, Record


class LowRank(Part):
    """One base tensor that the adapter changes: W' = W + scaling·B·A (LoRA, arXiv:2106.09685, section 4.1).

    Attributes:
        name: the base tensor's name.
        module: the adapted module's name.
        r: the rank.
        scaling: what multiplies B·A.
        lora_A: name of A in the adapter's file, shape (r, in).
        lora_B: name of B, shape (out, r).
    """

    name: str
    module: str
    r: int
    scaling: float
    lora_A: str
    lora_B: str


class ModuleFacts(Part):
    """One adapted module.

    Attributes:
        module: its name in the base, such as ``model.layers.0.self_attn.q_proj``.
        r: its rank.
        scaling: what multiplies B·A.
        delta_norm: Frobenius norm of scaling·B·A.
        base_norm: Frobenius norm of the base weight, estimated from a sample of it; None without the base.
    """

    module: str
    r: int
    scaling: float
    delta_norm: float
    base_norm: float | None = None


class AdapterFacts(Record):
    """What one adapter is.

    Attributes:
        path: absolute directory.
        base_model: the base that its configuration names.
        peft_type: the method, ``LORA`` for all that can be merged.
        r: the configured rank.
        lora_alpha: the configured alpha.
        scaling: alpha / r, or alpha / √r with ``use_rslora``.
        use_rslora: which of the two.
        target_modules: the last part of every adapted module's name, sorted.
        modules: one entry an adapted module, in the file's order.
        parameters: trained numbers.
        dtype: of the stored tensors, such as ``F32``.
        size_bytes: of the weights file.
        relative_update: ‖Δ‖ / ‖W‖ over all adapted modules; None without the base.
        refusal: why it cannot be merged; None where it can.
    """

    path: str
    base_model: str | None
    peft_type: str
    r: int | None
    lora_alpha: float | None
    scaling: float | None
    use_rslora: bool
    target_modules: tuple[str, ...]
    modules: tuple[ModuleFacts, ...]
    parameters: int
    dtype: str
    size_bytes: int
    relative_update: float | None = None
    refusal: str | None = None
