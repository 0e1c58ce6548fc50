"""The records of a comparison."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from tunesmith.conversations import Conversation
from tunesmith.models import Capabilities, Generation, GenerationSettings, RowScore
from tunesmith.record import Part, Record

VariantKind = Literal["base", "adapter", "full", "endpoint"]


class VariantInfo(Part):
    """One compared variant.

    Attributes:
        name: ``base``, ``final``, ``checkpoint-N``, ``merged``, or as it was named.
        kind: what its weights are; a server does not tell.
        path: the adapter's or the model's directory, or the server's name of it.
    """

    name: str
    kind: VariantKind
    path: str


class Reply(Part):
    """What one variant answered to one prompt.

    Attributes:
        prompt_id: the conversation's id.
        variant: the variant's name.
        text: the answer, without special tokens.
        tokens: generated tokens, the end-of-turn token included.
        token_ids: these; empty where an endpoint does not tell.
        prompt_tokens: tokens of the prompt; None where an endpoint does not tell.
        stop_reason: ``eos`` (it ended by itself), ``length`` (cut by the limit), ``stop`` (a stop text) or
            ``cancelled``.
        seconds: from the start of its batch to its last token.
        time_to_first_token_s: from the start of its batch to its first token; None where there is none.
        tokens_per_s: after the first token, beside the rows that ran with it; None below two tokens.
    """

    prompt_id: str
    variant: str
    text: str
    tokens: int
    token_ids: tuple[int, ...] = ()
    prompt_tokens: int | None = None
    stop_reason: Literal["eos", "length", "stop", "cancelled"]
    seconds: float = 0.0
    time_to_first_token_s: float | None = None
    tokens_per_s: float | None = None

    @classmethod
    def of(cls, prompt: Conversation, variant: str, generation: Generation) -> Reply:
        """The reply that a generation is."""
        return cls(
            prompt_id=prompt.id,
            variant=variant,
            text=generation.text,
            tokens=generation.tokens,
            token_ids=generation.token_ids,
            prompt_tokens=generation.prompt_tokens,
            stop_reason=generation.stop_reason,
            seconds=generation.seconds,
            time_to_first_token_s=generation.time_to_first_token_s,
            tokens_per_s=generation.tokens_per_s,
        )


class Score(Part):
    """How likely one variant finds the held-out answers.

    Attributes:
        variant: the variant's name.
        rows: held-out rows scored.
        tokens: answer tokens in them.
        loss: mean nats an answer token, over all tokens.
        difference: its loss minus the base's on the same rows, nats a token; None for the base itself, where the base
            was not compared, or where the two tokenize a row differently.
        difference_low: lower end of its 95 % confidence interval, rows being what was drawn; None below two rows.
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


class RowLoss(Part):
    """How likely one variant finds the answers of one row.

    Attributes:
        row_id: the conversation's id.
        variant: the variant's name.
        nll: minus the log-likelihood of its answer tokens, nats.
        tokens: how many they are.
        correct: how many of them were its most likely token; None where an endpoint does not tell.
    """

    row_id: str
    variant: str
    nll: float
    tokens: int
    correct: int | None = None

    @classmethod
    def of(cls, variant: str, score: RowScore) -> RowLoss:
        """The row's loss that a score is."""
        return cls(row_id=score.id, variant=variant, nll=score.nll, tokens=score.tokens, correct=score.correct)


class Comparison(Record):
    """Variants × prompts.

    Attributes:
        run: the run's directory name.
        variants: in the order that was asked for.
        prompts: the conversations, with the expected answer where there is one.
        replies: one for every prompt and variant.
        scores: one a variant, where rows with answers were at hand; else empty.
        row_losses: what they are made of, row by row.
        settings: how replies were drawn.
        engine: who answered.
    """

    run: str
    variants: tuple[VariantInfo, ...]
    prompts: tuple[Conversation, ...]
    replies: tuple[Reply, ...]
    scores: tuple[Score, ...] = ()
    row_losses: tuple[RowLoss, ...] = ()
    settings: GenerationSettings
    engine: Capabilities

    def reply(self, prompt_id: str, variant: str) -> Reply:
        """The reply of one variant to one prompt.

        Raises:
            KeyError: there is none.
        """
        for reply in self.replies:
            if (reply.prompt_id, reply.variant) == (prompt_id, variant):
                return reply
        raise KeyError((prompt_id, variant))

    def of_prompts(self, prompt_ids: Iterable[str]) -> Comparison:
        """The same comparison with these prompts only; scores are of all rows still."""
        kept = set(prompt_ids)
        return self.model_copy(
            update={
                "prompts": tuple(prompt for prompt in self.prompts if prompt.id in kept),
                "replies": tuple(reply for reply in self.replies if reply.prompt_id in kept),
            }
        )
