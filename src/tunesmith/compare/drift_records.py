"""The record of a drift: how far exports of a fine-tune are from its live adapter, and what of its effect they keep."""

from __future__ import annotations

from typing import Literal

from tunesmith.compare.intervals import CONFIDENCE, Estimate
from tunesmith.models import BASE
from tunesmith.record import Finding, Part, Record

KEPT_AT_LEAST = 0.9
KL_AT_MOST = 0.05


class DriftModel(Part):
    """A model that is held against the live adapter, as it lies on the disk.

    Attributes:
        name: unique in its table.
        kind: ``base``, which is the yardstick, or ``export``: a merged or quantized model.
        path: its directory.
        scheme: how its weights are stored: ``bf16``, ``int8``, ``int4:64`` …
        rounding: how they were rounded, where that is known.
        size_bytes: its weights' files.
        made_seconds: what making it took, where that was done for the table.
    """

    name: str
    kind: Literal["base", "export"] = "export"
    path: str
    scheme: str
    rounding: str | None = None
    size_bytes: int
    made_seconds: float | None = None


class Departure(Part):
    """How far a model's predictions are from the live adapter's on one set of texts.

    Attributes:
        kl: mean of KL(adapter ‖ model) over all tokens, nats.
        p99: the figure that 99 of 100 tokens' KL do not exceed, nats.
        top1: share of tokens at which both have the same first choice, 0 to 1.
    """

    kl: Estimate
    p99: Estimate
    top1: Estimate


class DriftRow(Part):
    """One line of the table.

    Attributes:
        model: what was measured.
        size_ratio: its size over that of a bf16 model of the base's tensors.
        in_domain: on the answers of held-out rows; None where there are no rows.
        general: on the general texts that ship with the package, in English, Chinese and code.
        loss: mean nats a token of these answers; None where there are no rows.
        kept: the share of the fine-tune's gain on these answers that the model keeps, 1 for all of it: (loss of the
            base − loss of the model) / (loss of the base − loss of the adapter).  None where there are no rows, or the
            gain itself cannot be told from 0.
        close: whether it is within the record's limits, which the base is never asked.
        seconds: what measuring it took.
    """

    model: DriftModel
    size_ratio: float
    in_domain: Departure | None = None
    general: Departure | None = None
    loss: Estimate | None = None
    kept: Estimate | None = None
    close: bool = False
    seconds: float

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model.name


class Drift(Record):
    """What quantization, or any export, did to a fine-tune.

    Attributes:
        run: the run's directory name.
        base_model: the base, as it was asked for or as the adapter names it.
        checkpoint: which of the run's adapters is live.
        dtype: of the arithmetic.
        rows: the base first, as the yardstick, then every model in the order that was asked for.
        rows_from: whose rows with answers these are: ``held_out`` (kept by the run), ``given``, or ``none``.
        in_domain_rows: how many of them were scored.
        in_domain_tokens: tokens of their answers.
        general_rows: how many general texts were scored.
        general_tokens: their tokens.
        gain: loss of the base − loss of the adapter on the answers, nats a token; None where there are no rows.
        adapter_loss: loss of the live adapter there.
        recommended: the smallest model that is close to the adapter; None where none is.
        kept_at_least: the lower end of a close model's ``kept`` is at least this.
        kl_at_most: the upper end of its KL on general texts is at most this, nats a token; where ``kept`` is not known,
            that of its KL in domain too.
        findings: the answer in sentences, the gravest first.
        comparisons: the number of models that the confidence of each interval is shared among (Bonferroni).
        confidence: of all intervals.
        seed: of the drawing of rows.
    """

    run: str
    base_model: str
    checkpoint: str
    dtype: str
    rows: tuple[DriftRow, ...]
    rows_from: Literal["held_out", "given", "none"]
    in_domain_rows: int
    in_domain_tokens: int
    general_rows: int
    general_tokens: int
    gain: Estimate | None = None
    adapter_loss: Estimate | None = None
    recommended: str | None = None
    kept_at_least: float = KEPT_AT_LEAST
    kl_at_most: float = KL_AT_MOST
    findings: tuple[Finding, ...] = ()
    comparisons: int = 1
    confidence: float = CONFIDENCE
    seed: int = 0

    def row(self, name: str) -> DriftRow | None:
        """The line of one model; None where there is none."""
        return next((row for row in self.rows if row.name == name), None)

    @property
    def base(self) -> DriftRow:
        """The yardstick: how far the base is from the adapter."""
        return next(row for row in self.rows if row.model.kind == BASE)

    @property
    def exports(self) -> tuple[DriftRow, ...]:
        """All lines but the base's."""
        return tuple(row for row in self.rows if row.model.kind != BASE)
