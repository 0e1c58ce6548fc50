"""How likely variants find given answers: teacher forcing, one forward pass a batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.conversations import Conversation, Encoded, encode, encode_text
from tunesmith.errors import DataError, PromptError
from tunesmith.models.engine import OnScore, RowScore, ScoredRow
from tunesmith.models.quiet import quiet_logging
from tunesmith.models.variants import VariantSet, check_token_ids
from tunesmith.progress import Cancellation, Progress, ProgressCallback, no_progress

if TYPE_CHECKING:
    import torch

# What the logits of one batch may take in float32; a single row may take more.
_LOGITS_BUDGET_BYTES = 512 * 2**20
_POSITIONS_AT_ONCE = 128
_POSITIONS_IN_FLOAT64 = 32
ROWS_AT_ONCE = 4
_ROWS_NAMED = 10


def score(
    variants: VariantSet,
    names: Sequence[str],
    rows: Sequence[ScoredRow],
    *,
    reference: str | None = None,
    on_done: OnScore | None = None,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
    rows_at_once: int = ROWS_AT_ONCE,
) -> dict[str, list[RowScore]]:
    """Score every row under every variant: :meth:`tunesmith.models.engine.Engine.score` of the local engine.

    The logits are in the variants' dtype, their log-softmax in float32 and the sums in float64.  Rows are padded on the
    right, where causal attention does not look, so a row's score depends on the batch size by rounding only.

    Args:
        variants: the loaded variants.
        names: which of them.
        rows: conversations with an answer, or texts.
        reference: one of ``names``, against which the others' KL divergence is measured.  Variants with weights of
            their own are loaded one at a time, and the reference is computed again beside each.
        on_done: called with the variant's name, the row's index and its score.
        progress: called after every batch with the stage ``score``, in rows of all variants.
        cancellation: read before every batch.
        rows_at_once: the most rows that run at once; fewer where their logits would take more than 512 MiB.

    Returns:
        By variant, one score a row, in their order.

    Raises:
        DataError: no such variant, a row without an answer, no chat template, or a reference that is not scored.
        PromptError: rows that are longer than the context window; all are named.
        CheckpointError: a full model cannot be loaded.
        Cancelled: somebody asked to stop.
    """
    if reference is not None and reference not in names:
        raise DataError("The reference is not among the scored variants.", expected=", ".join(names), found=reference)
    job = _Job(variants, rows, reference, cancellation or Cancellation())
    job.on_done, job.progress, job.rows_at_once = on_done, progress, rows_at_once
    job.total = len(dict.fromkeys(names)) * len(rows)
    waiting = list(dict.fromkeys(names))
    with quiet_logging():
        for name in waiting:
            job.encode(name)
        while waiting:
            company = variants.companies(waiting)[0]
            job.run(company)
            waiting = [name for name in waiting if name not in company]
    return {name: [job.scores[name][index] for index in range(len(rows))] for name in names}


def token_logits(variants: VariantSet, name: str, input_ids: Sequence[int], keep: int | slice) -> torch.Tensor:
    """The logits of one sequence, alone in its batch and without padding, an adapter's by PEFT's own forward.

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
        window = variants.context_window(name)
        if window is not None and len(input_ids) > window:
            raise PromptError(
                "The sequence is longer than the model's context window.", expected=window, found=len(input_ids)
            )
        batch = torch.tensor([list(input_ids)], device=model.device)
        return _logits(model, batch, list(positions))[0].float()


@dataclass(frozen=True)
class RowDrift:
    """How far a variant's predictions are from the reference's at the supervised tokens of one row.

    Attributes:
        id: the row's id.
        reference_nll: minus the log-likelihood of these tokens under the reference, in nats.
        nll: the same under the variant.
        kl: of every token KL(reference ‖ variant), nats, over the whole vocabulary.
        agreed: at how many of them both have the same first choice.
    """

    id: str
    reference_nll: float
    nll: float
    kl: tuple[float, ...]
    agreed: int

    @property
    def tokens(self) -> int:
        """How many tokens were compared."""
        return len(self.kl)


def row_drifts(
    variants: VariantSet,
    name: str,
    rows: Sequence[ScoredRow],
    *,
    reference: str,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
    rows_at_once: int = ROWS_AT_ONCE,
) -> list[RowDrift]:
    """Hold one variant's predictions against another's, token by token, on the same tokens.

    Both models are in memory, and of both the logits of one batch, in their dtype (at most 512 MiB each, in float32,
    but for a single row that takes more): the reference is computed again beside every variant, because its
    predictions of all rows would take the vocabulary times all tokens.  Probabilities are formed and summed in float64.

    Args:
        variants: the loaded variants.
        name: which of them.
        rows: conversations with an answer, or texts.
        reference: what it is held against.
        progress: called after every batch with the stage ``drift``, in rows.
        cancellation: read before every batch.
        rows_at_once: the most rows that run at once.

    Returns:
        One a row, in their order.

    Raises:
        DataError: no such variant, a row without an answer, or a variant that reads the rows as other tokens, or
            predicts others, than the reference.
        PromptError: rows that are longer than either's context window; all are named.
        CheckpointError: a full model cannot be loaded.
        Cancelled: somebody asked to stop.
    """
    cancellation = cancellation or Cancellation()
    found: dict[int, RowDrift] = {}
    with quiet_logging():
        encoded = same_tokens(variants, name, rows, reference=reference)
        for one in (reference, name):
            _check_lengths(rows, encoded, variants.context_window(one))
        vocabulary = 0
        for one in (reference, name):
            with variants.running([one]) as (model, _, _):
                check_token_ids(model, [row.input_ids for row in encoded])
                vocabulary = max(vocabulary, model.get_output_embeddings().weight.shape[0])
        for batch in _batches(encoded, rows_at_once, vocabulary):
            cancellation.check()
            here = [encoded[index] for index in batch]
            logits = []
            for one in (reference, name):
                with variants.running([one] * len(here)) as (model, _, _):
                    logits.append(_batch_logits(model, here))
            for place, index in enumerate(batch):
                found[index] = _row_drift(rows[index].id, here[place], logits[0][place], logits[1][place], name)
            progress(Progress("drift", len(found), len(rows), "rows", name))
    return [found[index] for index in range(len(rows))]


def same_tokens(variants: VariantSet, name: str, rows: Sequence[ScoredRow], *, reference: str) -> list[Encoded]:
    """The rows' tokens, which must be the same under both tokenizers.

    Raises:
        DataError: no such variant, a row without an answer, or tokenizers or templates that differ; the rows are named.
        CheckpointError: a full model's tokenizer cannot be loaded.
    """
    ours, theirs = variants.tokenizer(reference), variants.tokenizer(name)
    encoded = [_encode(ours, row) for row in rows]
    if ours is not theirs:
        other = [row.id for row, mine in zip(rows, encoded, strict=True) if _encode(theirs, row) != mine]
        if other:
            raise DataError(
                "This model reads the rows as other tokens than the run does.",
                where=variants.variant(name).path,
                expected="the run's tokenizer and chat template",
                details=other[:_ROWS_NAMED],
                next_step="export it again from the run, or copy the run's tokenizer files and chat template into it",
            )
    return encoded


class _Job:
    """What is to be scored, and what is done of it."""

    on_done: OnScore | None = None
    progress: ProgressCallback = no_progress
    rows_at_once = ROWS_AT_ONCE
    total = 0

    def __init__(
        self, variants: VariantSet, rows: Sequence[ScoredRow], reference: str | None, cancellation: Cancellation
    ) -> None:
        self.variants, self.rows, self.reference, self.cancellation = variants, rows, reference, cancellation
        self.scores: dict[str, dict[int, RowScore]] = {}
        self._encoded: dict[int, list[Encoded]] = {}

    def encode(self, name: str) -> list[Encoded]:
        """The rows' tokens under one variant's tokenizer; rows that are too long are refused."""
        tokenizer = self.variants.tokenizer(name)
        if id(tokenizer) not in self._encoded:
            self._encoded[id(tokenizer)] = [_encode(tokenizer, row) for row in self.rows]
        _check_lengths(self.rows, self._encoded[id(tokenizer)], self.variants.context_window(name))
        return self._encoded[id(tokenizer)]

    def run(self, company: Sequence[str]) -> None:
        """All rows under variants that are in memory together, and the reference with them."""
        names = list(company)
        if self.reference is not None and self.reference not in names:
            same_tokens = self.encode(self.reference) == self.encode(names[0])
            names = [self.reference, *names] if same_tokens else names
        names.sort(key=lambda name: name != self.reference)
        encoded = self.encode(names[-1])
        for batch in self._batches(names[-1], encoded):
            self.cancellation.check()
            self._run_batch(batch, names, encoded)

    def _batches(self, name: str, encoded: Sequence[Encoded]) -> list[list[int]]:
        with self.variants.running([name]) as (model, _, _):
            check_token_ids(model, [row.input_ids for row in encoded])
            vocabulary = model.get_output_embeddings().weight.shape[0]
        return list(_batches(encoded, self.rows_at_once, vocabulary))

    def _run_batch(self, batch: Sequence[int], names: Sequence[str], encoded: Sequence[Encoded]) -> None:
        rows = [encoded[index] for index in batch]
        compared: list[torch.Tensor] | None = None
        for name in names:
            with self.variants.running([name] * len(rows)) as (model, _, _):
                logits = _batch_logits(model, rows)
            if name == self.reference and len(names) > 1:
                compared = logits
            if len(self.scores.get(name, ())) == len(self.rows):
                continue  # the reference, beside one more variant
            others = compared if name != self.reference else None
            for place, index in enumerate(batch):
                other = None if others is None else others[place]
                found = _row_score(self.rows[index].id, rows[place], logits[place], other)
                self.scores.setdefault(name, {})[index] = found
                if self.on_done is not None:
                    self.on_done(name, index, found)
            done = sum(map(len, self.scores.values()))
            self.progress(Progress("score", done, self.total, "rows", name))


def _encode(tokenizer: Any, row: ScoredRow) -> Encoded:
    return encode(tokenizer, row) if isinstance(row, Conversation) else encode_text(tokenizer, row)


def _targets(row: Encoded) -> list[int]:
    """Places of the supervised tokens; the first token of all has nothing before it to be predicted from."""
    return [place for place, supervised in enumerate(row.supervised) if supervised and place > 0]


def _check_lengths(rows: Sequence[ScoredRow], encoded: Sequence[Encoded], window: int | None) -> None:
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


def _batches(encoded: Sequence[Encoded], rows_at_once: int, vocabulary: int) -> Iterator[list[int]]:
    """Row indexes in batches of similar length, so that little is padded."""
    most_positions = _LOGITS_BUDGET_BYTES // (4 * vocabulary)
    batch: list[int] = []
    wanted: set[int] = set()
    for index in sorted(range(len(encoded)), key=lambda i: len(encoded[i].input_ids)):
        wanted |= set(_targets(encoded[index]))
        if batch and (len(batch) >= rows_at_once or len(wanted) * (len(batch) + 1) > most_positions):
            yield batch
            batch, wanted = [], set(_targets(encoded[index]))
        batch.append(index)
    if batch:
        yield batch


def _batch_logits(model: Any, rows: Sequence[Encoded]) -> list[torch.Tensor]:
    """Of every row the logits (tokens, vocabulary) of its supervised tokens, in the model's dtype."""
    import torch

    width = max(len(row.input_ids) for row in rows)
    # No attention mask: no row looks to its right, and without one attention runs as it does for a row alone.
    padded = [row.input_ids + [0] * (width - len(row.input_ids)) for row in rows]
    input_ids = torch.tensor(padded, device=model.device)
    targets = [_targets(row) for row in rows]
    positions = sorted({place - 1 for places in targets for place in places})
    column = {position: index for index, position in enumerate(positions)}
    logits = _logits(model, input_ids, positions)
    return [logits[row, [column[place - 1] for place in places]] for row, places in enumerate(targets)]


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


def _row_score(row_id: str, row: Encoded, logits: torch.Tensor, reference: torch.Tensor | None) -> RowScore:
    """Score one row by its logits (tokens, vocabulary), and by the reference's of the same tokens."""
    import torch

    tokens = torch.tensor([row.input_ids[place] for place in _targets(row)], device=logits.device)
    log_probs: list[float] = []
    correct, divergence = 0, 0.0
    for start in range(0, len(tokens), _POSITIONS_AT_ONCE):
        chosen, part = logits[start : start + _POSITIONS_AT_ONCE].float(), tokens[start : start + _POSITIONS_AT_ONCE]
        log_probs += (-torch.nn.functional.cross_entropy(chosen, part, reduction="none")).tolist()
        correct += int((chosen.argmax(-1) == part).sum())
        if reference is not None:
            p = reference[start : start + _POSITIONS_AT_ONCE].float().log_softmax(-1)
            q = chosen.log_softmax(-1)
            divergence += float(torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True))
    kl = None if reference is None else max(divergence / len(tokens), 0.0)  # in this order, NaN stays NaN
    return RowScore(row_id, tuple(log_probs), correct, kl)


def _row_drift(row_id: str, row: Encoded, reference: torch.Tensor, logits: torch.Tensor, name: str) -> RowDrift:
    """Compare two models' logits (tokens, vocabulary) of one row."""
    import torch

    if reference.shape != logits.shape:
        raise DataError(
            "The model predicts another number of tokens than the run's base.",
            where=name,
            expected=reference.shape[-1],
            found=logits.shape[-1],
        )
    tokens = torch.tensor([row.input_ids[place] for place in _targets(row)], device=logits.device)
    sums, kl, agreed = [0.0, 0.0], [], 0
    for start in range(0, len(tokens), _POSITIONS_IN_FLOAT64):
        part = slice(start, start + _POSITIONS_IN_FLOAT64)
        # In float32 the terms, of both signs, would leave 1e-7 of two models that are alike.
        p, q = (one[part].double().log_softmax(-1) for one in (reference, logits))
        for place, one in enumerate((p, q)):
            sums[place] -= float(one.gather(-1, tokens[part, None]).sum())
        kl += torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).tolist()
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
    return RowDrift(row_id, sums[0], sums[1], tuple(0.0 if one < 0 else one for one in kl), agreed)
