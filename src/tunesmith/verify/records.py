"""The records of a verification."""

from __future__ import annotations

from typing import Literal

from tunesmith.record import Finding, Part, Record

LevelName = Literal["structure", "assets", "weights", "behaviour"]
Status = Literal["pass", "warn", "fail", "skipped"]
Answer = Literal["identical", "equal_within_rounding", "equal_within_quantization", "different", "not_verified"]

GOOD: tuple[Answer, ...] = ("identical", "equal_within_rounding", "equal_within_quantization")


class TensorVerdict(Part):
    """One tensor of the merged model against the recomputed one.

    Attributes:
        name: the tensor's name.
        module: the adapted module, or None for a tensor that the adapter does not touch.
        elements: how many numbers it holds.
        exact: how many of them are the correctly rounded value.
        faithful: how many more are the other of the exact value's two neighbours.
        twice_rounded: how many more are explained by a rounding of Δ before the sum.
        outside: how many none of these explains.
        not_finite: how many of those are infinite or not a number.
        unchanged: how many equal the base's.
        gain: least-squares factor between what was added and what should have been; None where Δ is 0.
        relative_error: ‖added − Δ‖ / ‖Δ‖; None where Δ is 0.
        delta_norm: ‖Δ‖ (Frobenius), the weight of this tensor among the others.
    """

    name: str
    module: str | None
    elements: int
    exact: int
    faithful: int
    twice_rounded: int
    outside: int
    unchanged: int
    not_finite: int = 0
    gain: float | None = None
    relative_error: float | None = None
    delta_norm: float = 0.0


class QuantizedTensor(Part):
    """One quantized tensor's codes against the exact numbers that they stand for.

    Attributes:
        name: the name that the weight has in an unquantized model.
        module: the adapted module, or None for a tensor that the adapter does not touch.
        scheme: how it is stored, such as ``int4:64``.
        elements: how many numbers it holds.
        nearest: how many codes are the nearest to their number.
        twice_rounded: how many more are explained by a rounding to bf16 before.
        saturated: how many more are the lowest or highest code, for a number beyond it.
        neighbour: how many more are the other of the two codes around their number.
        further: how many are none of these.
        not_finite: how many codes are not a number.
        groups: how many scales there are.
        bad_scales: how many of them are zero, infinite or not a number.
        bad_groups: how many groups of columns come out at the wrong strength.
        correlation: how much errors know of the numbers that they are errors of, a group's mean; about 1 where they
            are rounding's.
        steps: root mean square of how far codes are off, in steps; 0.29 where all are the nearest.
        clipped: the share of ‖x‖² that saturation took.
        relative_error: ‖stored − x‖ / ‖x‖; None where x is 0.
        gain: how much of the update is there: 1 + ⟨stored − x, Δ⟩ / ‖Δ‖²; None where Δ is 0.
        gain_error: its standard error.
        gain_expected: what rounding to nearest makes of 1, with these scales.
        gain_expected_error: its standard error.
        delta_norm: ‖Δ‖ (Frobenius), the weight of this tensor among the others.
    """

    name: str
    module: str | None
    scheme: str
    elements: int
    nearest: int
    twice_rounded: int
    saturated: int
    neighbour: int
    further: int
    not_finite: int = 0
    groups: int = 0
    bad_scales: int = 0
    bad_groups: int = 0
    correlation: float = 0.0
    steps: float = 0.0
    clipped: float = 0.0
    relative_error: float | None = None
    gain: float | None = None
    gain_error: float | None = None
    gain_expected: float | None = None
    gain_expected_error: float | None = None
    delta_norm: float = 0.0

    @property
    def unexplained(self) -> int:
        """How many codes rounding each number by itself does not explain."""
        return self.neighbour + self.further


class Divergence(Part):
    """Where two greedy texts part: the token that each model takes there, and what both think of the two.

    Attributes:
        adapter_choice: the adapter's choice, as text.
        merged_choice: the merged model's choice.
        adapter_probabilities: what the adapter gives to the first and to the second.
        merged_probabilities: what the merged model gives to them.
        margin: how far the first is before the second under the adapter, in nats (a difference of logits).
        noise: how far rounding alone moves such a margin at other positions.
        tie: whether ``margin`` is within ``noise``.
    """

    adapter_choice: str
    merged_choice: str
    adapter_probabilities: tuple[float, float]
    merged_probabilities: tuple[float, float]
    margin: float
    noise: float
    tie: bool


class BehaviourRow(Part):
    """One prompt, answered by the merged model alone and by the base with the live, unmerged adapter.

    Attributes:
        prompt_id: the conversation's id.
        question: its last user turn.
        tokens: positions compared.
        mean_kl: mean KL(adapter ‖ merged) over them, nats a token.
        base_kl: mean KL(adapter ‖ base) over them: what the tuning did.
        max_logit_difference: largest |Δ logit|.
        top1_agreement: share of positions with the same most likely token.
        same_text: whether the greedy texts are the same.
        first_difference: index of the first differing token; None where the texts are the same.
        adapter_text: greedy text of the adapter.
        merged_text: greedy text of the merged model.
        rounding_kl: mean KL(adapter ‖ reference), where the reference is the loaded base with the recomputed weights:
            what this merge's rounding costs; None where there was no reference.
        loading_kl: mean KL(reference ‖ merged): what the merged model's own loading costs; None likewise.
        divergence: the two candidates at the first difference; None where the texts are the same or cannot be held
            against each other.
    """

    prompt_id: str
    question: str
    tokens: int
    mean_kl: float
    base_kl: float
    max_logit_difference: float
    top1_agreement: float
    same_text: bool
    first_difference: int | None
    adapter_text: str
    merged_text: str
    rounding_kl: float | None = None
    loading_kl: float | None = None
    divergence: Divergence | None = None

    @property
    def tie(self) -> bool:
        """Whether the texts part at a tie, which either model may break either way."""
        return self.divergence is not None and self.divergence.tie


class Level(Part):
    """One level of proof.

    Attributes:
        name: ``structure``, ``assets``, ``weights`` or ``behaviour``.
        status: its outcome.
        findings: what was looked at and seen.
        seconds: wall time.
    """

    name: LevelName
    status: Status
    findings: tuple[Finding, ...]
    seconds: float


class Verdict(Record):
    """Whether what is shipped is what was tested.

    Attributes:
        run: the run's directory name.
        merged: the merged directory's name.
        checkpoint: which adapter it was held against.
        base_model: the base as it was asked for.
        answer: the verdict.
        levels: every level, also after one failed.
        causes: why, where the answer is ``different``; the likeliest first.
        tensors: every tensor of the weights level that is stored in full.
        quantized: every tensor of it that is stored as codes.
        behaviour: every prompt of the behaviour level.
        dtype: the dtype of the behaviour level's arithmetic; None where it was skipped.
        certificate: whether a certificate was written into the directory, or a warning that says why not; None where
            none was to be.
        retried_units: how many units of work ran again on a cluster, for their worker was lost or could not read.
    """

    run: str
    merged: str
    checkpoint: str
    base_model: str
    answer: Answer
    levels: tuple[Level, ...]
    causes: tuple[Finding, ...] = ()
    tensors: tuple[TensorVerdict, ...] = ()
    quantized: tuple[QuantizedTensor, ...] = ()
    behaviour: tuple[BehaviourRow, ...] = ()
    dtype: str | None = None
    certificate: Finding | None = None
    retried_units: int = 0

    @property
    def good(self) -> bool:
        """Whether the merged model is what was tested."""
        return self.answer in GOOD
