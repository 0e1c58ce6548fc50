"""How likely a variant finds given answers: teacher forcing, one forward pass a batch."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.conversations import Conversation, Encoded, encode
from tunesmith.errors import PromptError
from tunesmith.models.quiet import quiet_logging
from tunesmith.models.variants import VariantSet, check_token_ids, context_window
from tunesmith.progress import Cancellation, Progress, ProgressCallback, no_progress

if TYPE_CHECKING:
    import torch

# What the logits of one batch may take in float32; a single row may take more.
_LOGITS_BUDGET_BYTES = 512 * 2**20
_POSITIONS_AT_ONCE = 128


@dataclass(frozen=True)
class RowScore:
    """How likely the answers of one row are.

    Attributes:
        id: the conversation's id.
        nll: minus the log-likelihood of all answer tokens, in nats.
        tokens: how many answer tokens there are, each turn's end-of-turn token included.
    """

    id: str
    nll: float
    tokens: int

    @property
    def loss(self) -> float:
        """Mean nats an answer token."""
        return self.nll / self.tokens


def score(
    variants: VariantSet,
    name: str,
    rows: Sequence[Conversation],
    *,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
    batch_size: int = 4,
) -> list[RowScore]:
    """Score the answers of every row under one variant.

    The logits are in the variants' dtype, their log-softmax in float32 and the sums in float64.  Rows are padded on the
    right, where causal attention does not look, so a row's score depends on the batch size by rounding only.

    Args:
        variants: the loaded variants.
        name: which of them.
        rows: conversations with an answer.
        progress: called after every batch with the stage ``score``, in rows.
        cancellation: read before every batch.
        batch_size: the most rows that run at once; fewer where their logits would take more than 512 MiB.

    Returns:
        One score a row, in their order.

    Raises:
        DataError: no such variant, a row without an answer, or no chat template.
        PromptError: rows that are longer than the context window; all are named.
        Cancelled: somebody asked to stop.
    """
    cancellation = cancellation or Cancellation()
    scores: dict[int, RowScore] = {}
    with variants.active(name) as (model, tokenizer), quiet_logging():
        encoded = [encode(tokenizer, row) for row in rows]
        check_token_ids(model, [row.input_ids for row in encoded])
        _check_lengths(rows, encoded, context_window(model))
        vocabulary = model.get_output_embeddings().weight.shape[0]
        for batch in _batches(encoded, batch_size, vocabulary):
            cancellation.check()
            for index, nll in zip(batch, _batch_nll(model, [encoded[i] for i in batch]), strict=True):
                scores[index] = RowScore(rows[index].id, nll, len(_targets(encoded[index])))
            progress(Progress("score", len(scores), len(rows), "rows", name))
    return [scores[index] for index in range(len(rows))]


def token_logits(variants: VariantSet, name: str, input_ids: Sequence[int], keep: int | slice) -> torch.Tensor:
    """The logits of one sequence, alone in its batch and without padding.

    Args:
        variants: the loaded variants.
        name: which of them.
        input_ids: the whole sequence.
        keep: how many of its last positions, or a slice of its positions.  The logits at a position are of the token
            after it.

    Returns:
        float32 (positions, vocabulary), on the variants' device.

    Raises:
        DataError: there is no such variant.
        PromptError: the sequence is longer than the context window.
    """
    import torch

    positions = range(len(input_ids))[keep if isinstance(keep, slice) else slice(max(0, len(input_ids) - keep), None)]
    with variants.active(name) as (model, _), quiet_logging():
        check_token_ids(model, [input_ids])
        window = context_window(model)
        if window is not None and len(input_ids) > window:
            raise PromptError(
                "The sequence is longer than the model's context window.", expected=window, found=len(input_ids)
            )
        batch = torch.tensor([list(input_ids)], device=model.device)
        return _logits(model, batch, list(positions))[0].float()


def _targets(row: Encoded) -> list[int]:
    """Places of the supervised tokens; the first token of all has nothing before it to be predicted from."""
    return [place for place, supervised in enumerate(row.supervised) if supervised and place > 0]


def _check_lengths(rows: Sequence[Conversation], encoded: Sequence[Encoded], window: int | None) -> None:
    if window is None:
        return
    too_long = [
        f"{row.id}: {len(ids.input_ids)} tokens"
        for row, ids in zip(rows, encoded, strict=True)
        if len(ids.input_ids) > window
    ]
    if too_long:
        raise PromptError(
            "A row is longer than the model's context window.", expected=f"at most {window} tokens", details=too_long
        )


def _batches(encoded: Sequence[Encoded], batch_size: int, vocabulary: int) -> list[list[int]]:
    """Row indexes in batches of similar length, so that little is padded."""
    most_positions = _LOGITS_BUDGET_BYTES // (4 * vocabulary)
    batches: list[list[int]] = []
    wanted: set[int] = set()
    for index in sorted(range(len(encoded)), key=lambda i: len(encoded[i].input_ids)):
        wanted = wanted | set(_targets(encoded[index]))
        if batches and len(batches[-1]) < batch_size and len(wanted) * (len(batches[-1]) + 1) <= most_positions:
            batches[-1].append(index)
        else:
            batches.append([index])
            wanted = set(_targets(encoded[index]))
    return batches


def _batch_nll(model: Any, rows: Sequence[Encoded]) -> list[float]:
    import torch

    width = max(len(row.input_ids) for row in rows)
    # No attention mask: no row looks to its right, and without one attention runs as it does for a row alone.
    padded = [row.input_ids + [0] * (width - len(row.input_ids)) for row in rows]
    input_ids = torch.tensor(padded, device=model.device)
    targets = [_targets(row) for row in rows]
    positions = sorted({place - 1 for places in targets for place in places})
    column = {position: index for index, position in enumerate(positions)}
    logits = _logits(model, input_ids, positions)
    return [
        _nll(logits[row], [column[place - 1] for place in places], [rows[row].input_ids[place] for place in places])
        for row, places in enumerate(targets)
    ]


def _logits(model: Any, input_ids: torch.Tensor, positions: list[int]) -> torch.Tensor:
    """Logits (rows, len(positions), vocabulary), in the model's dtype."""
    import torch

    index = torch.tensor(positions, dtype=torch.long, device=input_ids.device)
    # Models that cannot leave positions out compute all of them.
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        kept = model(input_ids=input_ids, use_cache=False, logits_to_keep=index).logits
    else:
        kept = model(input_ids=input_ids, use_cache=False).logits[:, index]
    result: torch.Tensor = kept
    return result


def _nll(logits: torch.Tensor, columns: list[int], tokens: list[int]) -> float:
    """Sum of −log p of ``tokens`` at ``columns`` of logits (columns, vocabulary), in nats."""
    import torch

    total = 0.0
    for start in range(0, len(columns), _POSITIONS_AT_ONCE):
        chosen = logits[columns[start : start + _POSITIONS_AT_ONCE]].float()
        wanted = torch.tensor(tokens[start : start + _POSITIONS_AT_ONCE], device=logits.device)
        losses = torch.nn.functional.cross_entropy(chosen, wanted, reduction="none")
        total += losses.double().sum().item() if logits.device.type != "mps" else losses.sum().item()
    return total
