"""The records of a GGUF file's verification."""

from __future__ import annotations

from tunesmith.record import Part, Record
from tunesmith.verify.records import Answer, Level


class GgufTensor(Part):
    """One tensor of a GGUF file against the model's.

    Attributes:
        name: its name in the file.
        source: the model's tensor, or the first of those that are stacked in it.
        type: how it is stored, such as ``BF16`` or ``Q4_0``.
        elements: how many numbers it holds.
        exact: how many of them are the model's own numbers.
        outside: how many are further from the model's than their type's rounding explains.
        relative_error: ‖stored − model‖ / ‖model‖; None where the model's is 0.
        cause: what would explain it where something is outside: ``not_permuted``, ``norm_without_one``,
            ``norm_with_one``, ``not_finite``, or the name of another tensor that it holds; None where nothing is
            known.
    """

    name: str
    source: str
    type: str
    elements: int
    exact: int
    outside: int
    relative_error: float | None = None
    cause: str | None = None


class GgufRow(Part):
    """One prompt, answered greedily by llama.cpp; the model is given the same tokens.

    Attributes:
        prompt: the prompt as text.
        tokens: how many tokens llama.cpp wrote.
        mean_kl: mean KL(model ‖ llama.cpp) over them, nats a token, of the likeliest tokens and all others together;
            the model computes with the numbers that the file holds.
        drift_kl: the same with the model's own numbers: what quantization cost.
        top1_agreement: share of them that are the model's own choice.
        text: what llama.cpp wrote.
    """

    prompt: str
    tokens: int
    mean_kl: float
    drift_kl: float
    top1_agreement: float
    text: str


class GgufVerdict(Record):
    """Whether a GGUF file is the model it was made from.

    Attributes:
        model: the model's directory name.
        file: the file's name.
        type: its tensors' most frequent type, by numbers held.
        architecture: llama.cpp's name of the architecture; None where the file could not be read.
        answer: ``identical`` where every number is the model's own, ``equal_within_rounding`` where all are within
            their type's bound, ``different``, or ``not_verified``.
        levels: every level, also after one failed.
        tensors: every tensor of the weights level.
        behaviour: every prompt of the behaviour level.
        engine: the llama.cpp that answered; None where none did.
    """

    model: str
    file: str
    type: str
    architecture: str | None
    answer: Answer
    levels: tuple[Level, ...]
    tensors: tuple[GgufTensor, ...] = ()
    behaviour: tuple[GgufRow, ...] = ()
    engine: str | None = None

    @property
    def good(self) -> bool:
        """Whether the file is the model."""
        return self.answer in ("identical", "equal_within_rounding")
