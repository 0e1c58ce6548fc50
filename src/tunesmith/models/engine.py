"""The seam between what is asked of variants and who answers: requests in, generations and scores out.

Two engines exist: :class:`~tunesmith.models.local.LocalEngine`, which runs all variants of one base in one batch, and
:class:`~tunesmith.models.endpoint.Endpoint`, any server that speaks OpenAI's protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import Field

from tunesmith.conversations import Conversation, Message, Text
from tunesmith.progress import Cancellation, ProgressCallback, no_progress
from tunesmith.record import Finding, Part

StopReason = Literal["eos", "length", "stop", "cancelled"]
Prompt = tuple[Message, ...] | str
ScoredRow = Conversation | Text
OnText = Callable[[int, str], None]
OnGeneration = Callable[[int, "Generation"], None]
OnScore = Callable[[str, int, "RowScore"], None]


class GenerationSettings(Part):
    """How answers are drawn.  Nothing is inherited from the model's own ``generation_config`` but its eos tokens.

    Attributes:
        max_new_tokens: the most tokens of an answer; fewer where the context window leaves less room.
        greedy: always take the most likely token; temperature, top_p, top_k and min_p are ignored then.
        temperature: divides the logits; 0 is greedy too.
        top_p: draw from the fewest tokens that hold this probability.
        top_k: draw from this many most likely tokens; 0 draws from all.
        min_p: draw from tokens at least so likely, as a share of the most likely one's probability; 0 draws from all.
        repetition_penalty: divides positive logits of tokens that occurred in prompt or answer, and multiplies negative
            ones; 1 does nothing.
        stop: texts that end an answer; they are not part of it.
        seed: of the random numbers.  A row's numbers depend on this seed and on its prompt alone, so the same seed
            gives the same text, whichever other rows and variants run beside it.
    """

    max_new_tokens: int = Field(default=1024, ge=1)
    greedy: bool = False
    temperature: float = Field(default=0.7, ge=0)
    top_p: float = Field(default=0.9, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0)
    stop: tuple[str, ...] = ()
    seed: int = Field(default=0, ge=0)

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random."""
        return not self.greedy and self.temperature > 0


@dataclass(frozen=True)
class Request:
    """One prompt for one variant.

    Attributes:
        variant: who is to answer.
        prompt: turns of a conversation, which the run's chat template renders, or plain text, which is gone on from as
            it is.
    """

    variant: str
    prompt: Prompt


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: without special tokens, and without the stop text that ended it.
        token_ids: what was generated, the end-of-turn token included; empty where an engine does not tell.
        tokens: how many tokens were generated.
        prompt_tokens: how many tokens the prompt has; None where an engine does not tell.
        stop_reason: ``eos`` (it ended by itself), ``length`` (cut by the limit or the window), ``stop`` (one of the
            stop texts) or ``cancelled``.
        seconds: from the start of its batch to its last token.
        time_to_first_token_s: from the start of its batch to its first token; None where there is none.
        tokens_per_s: tokens a second after the first one; None below two tokens.
    """

    text: str
    token_ids: tuple[int, ...]
    tokens: int
    prompt_tokens: int | None
    stop_reason: StopReason
    seconds: float
    time_to_first_token_s: float | None
    tokens_per_s: float | None


@dataclass(frozen=True)
class RowScore:
    """How likely the supervised tokens of one row are: a conversation's answers, or all of a text but its first token.

    Attributes:
        id: the row's id.
        log_probs: the log-likelihood of every such token, in nats, in order; an end-of-turn token counts.
        correct: how many of them were the most likely token; None where an engine does not tell.
        kl: mean over them of KL(reference ‖ this variant), nats; None where no reference was asked for.
    """

    id: str
    log_probs: tuple[float, ...]
    correct: int | None = None
    kl: float | None = None

    @property
    def tokens(self) -> int:
        """How many tokens were scored."""
        return len(self.log_probs)

    @property
    def nll(self) -> float:
        """Minus the log-likelihood of all of them, in nats."""
        return -sum(self.log_probs)

    @property
    def loss(self) -> float:
        """Mean nats a token."""
        return self.nll / self.tokens


class Capabilities(Part):
    """What an engine is and can do, as measured.

    Attributes:
        kind: ``local``, or a server's ``endpoint``.
        where: the device, or the server's address; of several servers all of them.
        servers: the addresses of several servers that share the work; empty for one, and for a device.
        dtype: of weights and activations, such as ``float32``; None where an endpoint does not tell.
        scores: whether it can tell the likelihood of given tokens.
        findings: what it cannot do, or does in a way that is to be known of.
    """

    kind: Literal["local", "endpoint"]
    where: str
    servers: tuple[str, ...] = ()
    dtype: str | None = None
    scores: bool = True
    findings: tuple[Finding, ...] = ()


class Engine(Protocol):
    """Who generates and scores."""

    @property
    def names(self) -> tuple[str, ...]:
        """The variants that can be asked."""

    @property
    def capabilities(self) -> Capabilities:
        """What it can do."""

    def identity(self, variant: str) -> str | None:
        """A hash of all that a variant's answers depend on beside the request; None where that cannot be known.

        Raises:
            DataError: there is no such variant.
        """

    def generate(
        self,
        requests: Sequence[Request],
        settings: GenerationSettings | None = None,
        *,
        on_text: OnText | None = None,
        on_done: OnGeneration | None = None,
        progress: ProgressCallback = no_progress,
        cancellation: Cancellation | None = None,
    ) -> list[Generation]:
        """Answer every request.

        Args:
            requests: prompts, each with its variant; rows of any variants may run side by side.
            settings: how answers are drawn; None takes the defaults.
            on_text: called with the request's index and the text that has become whole since the last call; the pieces
                of one request joined are its answer's text.
            on_done: called with the request's index and its answer, once it is whole.  Not for cancelled ones.
            progress: called with the stage ``generate``, in prompts answered.
            cancellation: read after every token; what was generated until then is returned, as ``cancelled``.

        Returns:
            One generation a request, in their order.

        Raises:
            DataError: no such variant, or no chat template.
            PromptError: prompts that leave no room in the context window; all are named.
        """

    def score(
        self,
        names: Sequence[str],
        rows: Sequence[ScoredRow],
        *,
        reference: str | None = None,
        on_done: OnScore | None = None,
        progress: ProgressCallback = no_progress,
        cancellation: Cancellation | None = None,
    ) -> dict[str, list[RowScore]]:
        """Tell how likely every variant finds the answers of every row.

        Args:
            names: the variants.
            rows: conversations with an answer, or texts.
            reference: one of ``names``, against which the others' KL divergence is measured.
            on_done: called with the variant's name, the row's index and its score.
            progress: called with the stage ``score``, in rows of all variants.
            cancellation: read between batches.

        Returns:
            By variant, one score a row, in their order.

        Raises:
            DataError: no such variant, a row without an answer, no chat template, or the engine cannot score.
            PromptError: rows that are longer than the context window; all are named.
            Cancelled: somebody asked to stop.
        """
