"""The records that describe an adapter, and what it makes of the base's tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from statistics import median
from typing import Annotated, Literal

from pydantic import Field

from tunesmith.record import Finding, Part, Record, Value

READING_ORDER = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj",
)  # fmt: skip
"""Attention before feed-forward, in the order in which they compute; other modules come after them."""

_NUMBERS = re.compile(r"(?<=\.)\d+(?=\.)")

Span = tuple[int, int, int]
"""First index, index to stop before, step: a ``slice`` that travels as JSON."""


class LowRank(Part):
    """A low-rank update: W' = W + scaling·B·A (LoRA, arXiv:2106.09685, section 4.1).

    W is the tensor as a matrix: its first dimension by all the others; with ``block``, one matrix of a stack of them.
    Updates of one tensor, or of one block, add up.

    Attributes:
        name: the tensor that changes.
        module: the adapted module's name, as the adapter has it.
        r: the rank.
        scaling: what multiplies B·A, the adapter's own weight in a stack included.
        lora_A: name of A in the adapter's file, stored as (r, in, …).
        lora_B: name of B, stored as (out, r, …).
        adapter: which adapter of the stack.
        transposed: whether W is stored as (in, out), so that (B·A)ᵀ is added.
        block: index along the first of W's three dimensions; None for a tensor that is one matrix.
        A_rows: the rows of A that are meant (one expert's); None for all.
        A_columns: its columns.
        B_rows: the rows of B (one of two projections that share it).
        B_columns: its columns.
    """

    kind: Literal["low_rank"] = "low_rank"
    name: str
    module: str
    r: int
    scaling: float
    lora_A: str
    lora_B: str
    adapter: int = 0
    transposed: bool = False
    block: int | None = None
    A_rows: Span | None = None
    A_columns: Span | None = None
    B_rows: Span | None = None
    B_columns: Span | None = None


class Copied(Part):
    """A tensor that begins as a copy of another of the base's: a head that was tied, a replicated layer.

    Attributes:
        name: the tensor; the base may or may not have one of that name.
        source: the base's tensor.
    """

    kind: Literal["copied"] = "copied"
    name: str
    source: str


class Replaced(Part):
    """A tensor that the adapter stores whole: ``modules_to_save``, a trained bias, a resized embedding.

    Attributes:
        name: the tensor; the base may have none, or one of another shape.
        module: the module that it belongs to.
        tensor: its name in the adapter's file.
        adapter: which adapter of the stack.
    """

    kind: Literal["replaced"] = "replaced"
    name: str
    module: str
    tensor: str
    adapter: int = 0


class Rows(Part):
    """Rows of a tensor that the adapter stores whole: ``trainable_token_indices``.

    Attributes:
        name: the tensor.
        module: the module that it belongs to.
        tensor: name of the new rows in the adapter's file, shape (len(indices), columns).
        indices: which rows they replace.
        adapter: which adapter of the stack.
    """

    kind: Literal["rows"] = "rows"
    name: str
    module: str
    tensor: str
    indices: tuple[int, ...]
    adapter: int = 0


class Added(Part):
    """A tensor of the adapter that is added as it is: b' = b + scaling·x (``lora_bias``).

    Attributes:
        name: the tensor.
        module: the module that it belongs to.
        tensor: name of x in the adapter's file, of the tensor's own shape.
        scaling: what multiplies it.
        adapter: which adapter of the stack.
    """

    kind: Literal["added"] = "added"
    name: str
    module: str
    tensor: str
    scaling: float
    adapter: int = 0


class Magnitude(Part):
    """DoRA (arXiv:2402.09353, eq. 5): after all that is added, W' = m / ‖V‖ · V, with V = W + scaling·B·A.

    Attributes:
        name: the tensor.
        module: the module that it belongs to.
        tensor: name of m in the adapter's file; read as a vector.
        per: whether ‖V‖ is taken of every ``row`` of the stored matrix (linear, convolution) or of every ``column``
            (Conv1D and embeddings, which are stored the other way round).
        adapter: which adapter of the stack.
    """

    kind: Literal["magnitude"] = "magnitude"
    name: str
    module: str
    tensor: str
    per: Literal["row", "column"]
    adapter: int = 0


Update = Annotated[LowRank | Copied | Replaced | Rows | Added | Magnitude, Field(discriminator="kind")]


class Binding(Part):
    """What a stack of adapters makes of one base: every change, by tensor, with nothing left over.

    The updates of one tensor apply in this order, whatever their order here: it begins as the base's tensor of its
    name, or as ``Copied`` or ``Replaced`` says; ``Rows`` are put in; every ``LowRank`` and ``Added`` is added;
    ``Magnitude`` comes last.  It is rounded once, at the end.

    Attributes:
        updates: all of them.
        shapes: the shape, after the merge, of every tensor that is new or changes its shape.
        dropped: tensors of the base that the tuned model does not have.
        config: changes to ``config.json``, by dotted key, such as ``text_config.vocab_size``.
        findings: what the user should know.
    """

    updates: tuple[Update, ...]
    shapes: dict[str, tuple[int, ...]] = {}
    dropped: tuple[str, ...] = ()
    config: dict[str, Value | dict[str, Value] | tuple[Value, ...]] = {}
    findings: tuple[Finding, ...] = ()

    @property
    def by_name(self) -> dict[str, tuple[Update, ...]]:
        """The updates of every tensor that changes, in the order of the adapter's file."""
        table: dict[str, list[Update]] = {}
        for update in self.updates:
            table.setdefault(update.name, []).append(update)
        return {name: tuple(updates) for name, updates in table.items()}


class ModuleFacts(Part):
    """One adapted module.

    What was not measured, and what is not defined, is None.

    Attributes:
        module: its name in the base, such as ``model.layers.0.self_attn.q_proj``.
        r: its rank; of one matrix, where it is a stack of them.
        scaling: what multiplies B·A.
        delta_norm: ‖Δ‖ = ‖scaling·B·A‖ (Frobenius); of a stack, over all its matrices.  Of DoRA, of what is added
            before the magnitude.
        base_norm: Frobenius norm of the base weight, estimated from a sample of it; None without the base.
        spectral_norm: the largest singular value of scaling·B·A; None for a stack of matrices.
        effective_rank: exp(−Σ pᵢ ln pᵢ) with pᵢ = σᵢ / Σσ, of the singular values σ of B·A; from 1 to r.  None where
            the update is zero, and for a stack of matrices.  Source: O. Roy and M. Vetterli, "The effective rank: a
            measure of effective dimensionality", EUSIPCO 2007, definition 1.
        moved: whether training changed it: ‖Δ‖ is over a millionth of the median module's.  None where the factors do
            not tell: they did not begin at B·A = 0 (PiSSA and its like), or a magnitude may have moved alone (DoRA).
        finite: whether its factors hold numbers only; None where they were not read.
    """

    module: str
    r: int
    scaling: float
    delta_norm: float | None
    base_norm: float | None = None
    spectral_norm: float | None = None
    effective_rank: float | None = None
    moved: bool | None = None
    finite: bool | None = None

    @property
    def relative_update(self) -> float | None:
        """‖Δ‖ / ‖W‖; None where either is not known."""
        return self.delta_norm / self.base_norm if self.delta_norm is not None and self.base_norm else None


class KindFacts(Part):
    """The modules of one kind.

    Attributes:
        name: the last part of their names, such as ``q_proj``.
        modules: from the first layer to the last.
    """

    name: str
    modules: tuple[ModuleFacts, ...]

    @property
    def r(self) -> int:
        """The largest rank among them."""
        return max(module.r for module in self.modules)

    @property
    def relative(self) -> tuple[float, float, float] | None:
        """The least, the median and the largest ‖Δ‖ / ‖W‖; None without the base."""
        return _spread(module.relative_update for module in self.modules)

    @property
    def delta_norm(self) -> tuple[float, float, float] | None:
        """The least, the median and the largest ‖Δ‖; None where none was measured."""
        return _spread(module.delta_norm for module in self.modules)

    @property
    def effective_rank(self) -> float | None:
        """The median; None where none was measured."""
        spread = _spread(module.effective_rank for module in self.modules)
        return spread[1] if spread else None

    @property
    def unmoved(self) -> int:
        """How many never moved."""
        return sum(module.moved is False for module in self.modules)


def _spread(values: Iterable[float | None]) -> tuple[float, float, float] | None:
    known = sorted(value for value in values if value is not None)
    return (known[0], median(known), known[-1]) if known else None


class AdapterFacts(Record):
    """What one adapter is.

    Attributes:
        path: absolute directory.
        format: whose files these are: PEFT's, or mlx-lm's.
        base_model: the base that its configuration names.
        peft_type: the method, ``LORA`` for all that can be merged.
        r: the configured rank.
        lora_alpha: the configured alpha.
        scaling: alpha / r, or alpha / √r with ``use_rslora``.
        use_rslora: which of the two.
        target_modules: the last part of every adapted module's name, sorted.
        modules: one entry an adapted module, in the file's order.
        measured: how many of them were read; the others' figures are None.
        parameters: trained numbers.
        dtype: of the stored tensors, such as ``F32``.
        size_bytes: of the weights file.
        relative_update: ‖Δ‖ / ‖W‖ over all adapted modules, those that were not measured taken to be as the others of
            their kind; None without the base.
        effective_rank: the median of the modules'.
        refusal: why it cannot be merged; None where it can.
        findings: what looks wrong or out of proportion.
    """

    path: str
    format: Literal["peft", "mlx-lm"] = "peft"
    base_model: str | None
    peft_type: str
    r: int | None
    lora_alpha: float | None
    scaling: float | None
    use_rslora: bool
    target_modules: tuple[str, ...]
    modules: tuple[ModuleFacts, ...]
    measured: int = 0
    parameters: int
    dtype: str
    size_bytes: int
    relative_update: float | None = None
    effective_rank: float | None = None
    refusal: str | None = None
    findings: tuple[Finding, ...] = ()

    def by_kind(self) -> tuple[KindFacts, ...]:
        """The modules by the last part of their names, in reading order."""
        kinds: dict[str, list[ModuleFacts]] = {}
        for module in sorted(self.modules, key=lambda one: [int(part) for part in _NUMBERS.findall(one.module)]):
            kinds.setdefault(module.module.rpartition(".")[2], []).append(module)
        known = [name for name in READING_ORDER if name in kinds]
        return tuple(KindFacts(name=name, modules=tuple(kinds[name])) for name in dict.fromkeys([*known, *kinds]))


class AdapterDistance(Part):
    """How far one adapter is from another of the same base.

    Δ is scaling·B·A of every adapted module, all of them together as one vector; a module that only one of the two
    adapts is zero in the other.

    Attributes:
        relative: ‖Δ₁ − Δ₂‖ / ‖Δ₂‖; 0 for equal files.  None where Δ₂ is zero or either holds NaN or infinity.
        cosine: of the angle between Δ₁ and Δ₂; None where one of them is zero or not finite.
        whole: ‖T₁ − T₂‖ / ‖T₂‖ over the tensors that both store whole (saved modules, biases, magnitudes, token rows);
            None where there are none of the same shape, or they are zero or not finite.
        only_in_one: modules and whole tensors that the second lacks, or has in another shape.
        only_in_other: those that the first lacks.
        equal: whether the two are the same bytes under the same configuration.
    """

    relative: float | None
    cosine: float | None
    whole: float | None = None
    only_in_one: tuple[str, ...] = ()
    only_in_other: tuple[str, ...] = ()
    equal: bool = False
