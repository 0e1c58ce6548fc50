"""The records of a verification."""

from __future__ import annotations

from typing import Literal

from tunesmith.record import Finding, Part, Record

LevelName = Literal["structure", "assets", "weights", "behaviour"]
Status = Literal["pass", "warn", "fail", "skipped"]
Answer = Literal["identical", "equal_within_rounding", "different", "not_verified"]


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
        tensors: every tensor of the weights level.
        behaviour: every prompt of the behaviour level.
        dtype: the dtype of the behaviour level's arithmetic; None where it was skipped.
        certificate: whether a certificate was written into the directory, or a warning that says why not; None where
            none was to be.
    """

    run: str
    merged: str
    checkpoint: str
    base_model: str
    answer: Answer
    levels: tuple[Level, ...]
    causes: tuple[Finding, ...] = ()
    tensors: tuple[TensorVerdict, ...] = ()
    behaviour: tuple[BehaviourRow, ...] = ()
    dtype: str | None = None
    certificate: Finding | None = None

    @property
    def good(self) -> bool:
        """Whether the merged model is what was tested."""
        return self.answer in ("identical", "equal_within_rounding")
