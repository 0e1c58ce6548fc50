"""The records of a comparison."""

from __future__ import annotations

from typing import Literal

from tunesmith.conversations import Conversation
from tunesmith.record import Part, Record


class VariantInfo(Part):
    """One compared variant.

    Attributes:
        name: ``base``, ``final``, ``checkpoint-N`` or ``merged``.
        kind: what its weights are.
        path: the adapter's or the model's directory.
    """

    name: str
    kind: Literal["base", "adapter", "full"]
    path: str


class Reply(Part):
    """What one variant answered to one prompt.

    Attributes:
        prompt_id: the conversation's id.
        variant: the variant's name.
        text: the answer, without special tokens.
        tokens: generated tokens, the end-of-turn token included.
        stop_reason: ``eos`` (it ended by itself), ``length`` (cut by the limit) or ``cancelled``.
    """

    prompt_id: str
    variant: str
    text: str
    tokens: int
    stop_reason: Literal["eos", "length", "cancelled"]


class Score(Part):
    """How likely one variant finds the held-out answers.

    Attributes:
        variant: the variant's name.
        rows: held-out rows scored.
        tokens: answer tokens in them.
        loss: mean nats an answer token, over all tokens.
        difference: mean over rows of (loss of the row − loss of the base on the same row), nats a token; None for
            the base itself, where the base was not compared, or where the two tokenize a row differently.
        difference_low: lower end of its 95 % confidence interval (paired t); None below two rows.
        difference_high: upper end.
        better_rows: rows on which it is better than the base.
    """

    variant: str
    rows: int
    tokens: int
    loss: float
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    better_rows: int | None = None


class Comparison(Record):
    """Variants × prompts.

    Attributes:
        run: the run's directory name.
        variants: in the order that was asked for.
        prompts: the conversations, with the expected answer where there is one.
        replies: one for every prompt and variant.
        scores: one a variant, where rows with answers were at hand; else empty.
        max_new_tokens: the limit of every reply.
        greedy: whether the most likely token was always taken.
        dtype: the dtype of the arithmetic, such as ``float32``.
    """

    run: str
    variants: tuple[VariantInfo, ...]
    prompts: tuple[Conversation, ...]
    replies: tuple[Reply, ...]
    scores: tuple[Score, ...] = ()
    max_new_tokens: int
    greedy: bool
    dtype: str

    def reply(self, prompt_id: str, variant: str) -> Reply:
        """The reply of one variant to one prompt.

        Raises:
            KeyError: there is none.
        """
        for reply in self.replies:
            if (reply.prompt_id, reply.variant) == (prompt_id, variant):
                return reply
        raise KeyError((prompt_id, variant))
