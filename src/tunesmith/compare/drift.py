"""What quantization, or any export, did to a fine-tune: every model's predictions beside the live adapter's.

The adapter stays live beside its base, so no rounding of a merge is in what it is held to.  KL takes both models'
probabilities of the whole vocabulary at the same tokens: one model at a time is in memory beside base and adapter, and
the logits of one batch of each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from tunesmith.compare.drift_records import KEPT_AT_LEAST, KL_AT_MOST, Departure, Drift, DriftModel, DriftRow
from tunesmith.compare.general import LANGUAGES, general_texts
from tunesmith.compare.intervals import (
    Estimate,
    jackknife_estimate,
    quantile_estimate,
    quotient_estimate,
    ratio_estimate,
    verdict,
)
from tunesmith.conversations import Conversation, Text
from tunesmith.errors import DataError, TunesmithError
from tunesmith.models import BASE, RowDrift, VariantSet, row_drifts, same_tokens
from tunesmith.progress import Cancellation, Progress, ProgressCallback, no_progress
from tunesmith.record import Finding, Value, gravest_first

_TAIL = 0.99


@dataclass(frozen=True)
class DriftTexts:
    """What is predicted.

    Attributes:
        in_domain: rows with answers of the kind that was trained on, and not trained on; may be empty.
        general: texts of other kinds.
    """

    in_domain: tuple[Conversation, ...]
    general: tuple[Text, ...]

    def __len__(self) -> int:
        return len(self.in_domain) + len(self.general)


@dataclass(frozen=True)
class Measured:
    """One model, row by row beside the adapter.

    Attributes:
        model: which one.
        in_domain: one a row of the texts' ``in_domain``.
        general: one a text.
        seconds: what it took, loading included.
    """

    model: DriftModel
    in_domain: tuple[RowDrift, ...]
    general: tuple[RowDrift, ...]
    seconds: float


def drift_texts(rows: Sequence[Conversation], *, max_rows: int, seed: int = 0) -> DriftTexts:
    """Choose what is predicted.

    Args:
        rows: rows with answers; of more than ``max_rows``, so many are drawn.
        max_rows: the most rows, and the most general texts, which are taken from each language in turn.
        seed: of the drawing.
    """
    drawn = sorted(np.random.default_rng(seed).permutation(len(rows))[:max_rows])
    texts = [text for each in zip(*map(general_texts, LANGUAGES), strict=True) for text in each]
    return DriftTexts(tuple(rows[i] for i in drawn), tuple(texts[:max_rows]))


def check_same_tokens(variants: VariantSet, names: Sequence[str], texts: DriftTexts, *, reference: str) -> None:
    """Refuse models whose tokens are others than the adapter's, before anything is computed.

    Raises:
        DataError: tokenizers or templates that differ; every such model is named.
    """
    problems: list[TunesmithError] = []
    for name in names:
        try:
            same_tokens(variants, name, [*texts.in_domain, *texts.general], reference=reference)
        except DataError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise DataError(
            problems[0].what,
            expected=problems[0].expected,
            details=[f"{error.where}: {', '.join(error.details)}" for error in problems],
            next_step=problems[0].next_step,
        )


def measure_drift(
    variants: VariantSet,
    model: DriftModel,
    texts: DriftTexts,
    *,
    reference: str,
    models: int = 1,
    done: int = 0,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> Measured:
    """Hold one model against the live adapter.

    Args:
        variants: base and adapter, and the model by its name.
        model: what is measured.
        texts: on what.
        reference: the adapter's name.
        models: how many are measured in all, for progress.
        done: how many of them are done.
        progress: called with the stage ``drift``, in rows of all models.
        cancellation: read before every batch.

    Raises:
        DataError: the model's tokens are not the adapter's, or a row has no answer.
        PromptError: rows that are longer than a context window; all are named.
        CheckpointError: the model cannot be loaded.
        Cancelled: somebody asked to stop.
    """
    begun = time.perf_counter()

    def rows(of: Sequence[Conversation] | Sequence[Text], before: int) -> tuple[RowDrift, ...]:
        def tell(event: Progress) -> None:
            so_far = done * len(texts) + before + event.done
            progress(Progress("drift", so_far, models * len(texts), "rows", model.name))

        found = row_drifts(variants, model.name, of, reference=reference, progress=tell, cancellation=cancellation)
        return tuple(found)

    in_domain = rows(texts.in_domain, 0) if texts.in_domain else ()
    general = rows(texts.general, len(in_domain)) if texts.general else ()
    return Measured(model, in_domain, general, time.perf_counter() - begun)


def drift_of(
    measured: Sequence[Measured],
    *,
    run_name: str,
    base_model: str,
    checkpoint: str,
    dtype: str,
    bf16_bytes: int,
    rows_from: str,
    seed: int = 0,
) -> Drift:
    """Put what was measured into figures, and name the model to take.

    Args:
        measured: the base first, then every model.
        run_name: the run directory's name.
        base_model: the base's.
        checkpoint: the live adapter's.
        dtype: of the arithmetic.
        bf16_bytes: what the base's tensors would take in bf16.
        rows_from: ``held_out``, ``given`` or ``none``.
        seed: of the drawing of rows.
    """
    base, models = measured[0], measured[1:]
    comparisons = max(1, len(models))
    rows = [_row(one, base, bf16_bytes, comparisons) for one in measured]
    tokens = [row.tokens for row in base.in_domain]
    gains = [row.nll - row.reference_nll for row in base.in_domain]
    close = [row for row in rows if row.close]
    draft = Drift.model_validate(
        {
            "run": run_name,
            "base_model": base_model,
            "checkpoint": checkpoint,
            "dtype": dtype,
            "rows": rows,
            "rows_from": rows_from,
            "in_domain_rows": len(base.in_domain),
            "in_domain_tokens": sum(tokens),
            "general_rows": len(base.general),
            "general_tokens": sum(row.tokens for row in base.general),
            "gain": ratio_estimate(gains, tokens) if tokens else None,
            "adapter_loss": ratio_estimate([row.reference_nll for row in base.in_domain], tokens) if tokens else None,
            "recommended": min(close, key=_least).name if close else None,
            "comparisons": comparisons,
            "seed": seed,
        }
    )
    return draft.model_copy(update={"findings": gravest_first(_findings(draft))})


def _row(measured: Measured, base: Measured, bf16_bytes: int, comparisons: int) -> DriftRow:
    departure = partial(_departure, comparisons=comparisons)
    in_domain, general = departure(measured.in_domain), departure(measured.general)
    kept = _kept(measured, base, comparisons)
    return DriftRow(
        model=measured.model,
        size_ratio=measured.model.size_bytes / bf16_bytes,
        in_domain=in_domain,
        general=general,
        loss=_a_token(measured.in_domain, lambda row: row.nll, comparisons) if measured.in_domain else None,
        kept=kept,
        close=measured.model.kind != BASE and _is_close(kept, in_domain, general),
        seconds=measured.seconds,
    )


def _departure(rows: Sequence[RowDrift], *, comparisons: int) -> Departure | None:
    if not rows:
        return None
    kl = _a_token(rows, lambda row: sum(row.kl), comparisons)
    # A symmetric interval of something that is skewed and never below 0 may reach below 0.
    kl = kl.model_copy(update={"low": None if kl.low is None else max(0.0, kl.low)})
    return Departure(
        kl=kl,
        p99=quantile_estimate([row.kl for row in rows], _TAIL, comparisons=comparisons),
        top1=_a_token(rows, lambda row: row.agreed, comparisons, bounds=(0.0, 1.0)),
    )


def _a_token(
    rows: Sequence[RowDrift],
    of: Callable[[RowDrift], float],
    comparisons: int,
    *,
    bounds: tuple[float, float] | None = None,
) -> Estimate:
    """A row's sum by its tokens, over all rows.

    A few rows make most of a KL, and the jackknife's interval sees such skewness.
    """
    numbers = np.array([[of(row), row.tokens] for row in rows], np.float64)
    return jackknife_estimate(_first_by_second, numbers, bounds=bounds, comparisons=comparisons)


def _first_by_second(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(sums[..., 0] / sums[..., 1])


def _kept(measured: Measured, base: Measured, comparisons: int) -> Estimate | None:
    """The share of the gain that is kept; None where there is no gain to be told, of which a share could be."""
    if measured.model.kind == BASE or not base.in_domain:
        return None
    whole = [row.nll - row.reference_nll for row in base.in_domain]
    part = [row.nll - own.nll for row, own in zip(base.in_domain, measured.in_domain, strict=True)]
    if verdict(ratio_estimate(whole, [row.tokens for row in base.in_domain]), True) != "better":
        return None
    found = quotient_estimate(part, whole, comparisons=comparisons)
    return None if found.low is None and math.isfinite(found.value) else found


def _is_close(kept: Estimate | None, in_domain: Departure | None, general: Departure | None) -> bool:
    near = [departure.kl.high for departure in (general, in_domain if kept is None else None) if departure is not None]
    keeps = kept is None or (kept.low is not None and kept.low >= KEPT_AT_LEAST)
    return bool(near) and keeps and all(high is not None and high <= KL_AT_MOST for high in near)


def _least(row: DriftRow) -> tuple[int, float]:
    """The smallest file, and of equal ones the nearest."""
    return row.model.size_bytes, _distance(row)


def _distance(row: DriftRow) -> float:
    departure = row.general or row.in_domain
    return departure.kl.value if departure is not None and math.isfinite(departure.kl.value) else math.inf


def _findings(drift: Drift) -> list[Finding]:
    limits: dict[str, Value] = {"kept": drift.kept_at_least, "kl": drift.kl_at_most}
    found = [
        Finding(code="drift_not_finite", severity="error", params={"name": row.name})
        for row in drift.exports
        if not math.isfinite(_distance(row))
    ]
    found += [
        Finding(code="drift_beyond_base", severity="error", params={"name": row.name, "kl": ours, "base": bases})
        for row in drift.exports
        for ours, bases in [(_in_domain(row), _in_domain(drift.base))]
        if ours is not None and bases is not None and ours >= bases > 0
    ]
    chosen = drift.row(drift.recommended) if drift.recommended else None
    if chosen is not None:
        about: dict[str, Value] = {
            "name": chosen.name,
            "size": chosen.model.size_bytes,
            "ratio": chosen.size_ratio,
            "about": "effect" if chosen.kept else "nearness",
        }
        found.append(Finding(code="drift_advice", severity="ok", params={**about, **limits}))
    elif drift.exports:
        nearest = min(drift.exports, key=_distance)
        about = {"name": nearest.name, "distance": _distance(nearest)}
        found.append(Finding(code="drift_none_close", severity="warning", params={**about, **limits}))
    if drift.gain is None:
        found.append(Finding(code="drift_no_rows", severity="info"))
    elif verdict(drift.gain, True) != "better":
        gain: dict[str, Value] = {
            "rows": drift.in_domain_rows,
            "value": drift.gain.value,
            "low": drift.gain.low,
            "high": drift.gain.high,
        }
        found.append(Finding(code="drift_gain_unknown", severity="warning", params=gain))
    return found


def _in_domain(row: DriftRow) -> float | None:
    return row.in_domain.kl.value if row.in_domain is not None else None
