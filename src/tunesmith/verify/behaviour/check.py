"""Level 4: the merged model loaded alone, against the base with the live, unmerged adapter.

This level shows a person that the two answer alike.  It cannot prove it: a merge that misses a whole module can differ
less than one that is only rounded to bf16.  The weights level proves; this one would notice what weights cannot show,
such as a loader that reads the directory differently.

What rounding may cost is measured, not guessed: the base that was loaded for the adapter is given the weights that the
weights level recomputed (:mod:`tunesmith.verify.behaviour.reference`).  With δ the largest difference of a logit that
arithmetic alone makes:

- KL(reference ‖ merged) ≤ δ²/2, by Hoeffding's lemma: two models of the same weights differ by arithmetic alone;
- KL(adapter ‖ merged) ≤ (√KL(adapter ‖ reference) + δ/√2)², by that and Pinsker's inequality, position by position,
  and for means by the Cauchy-Schwarz inequality.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.conversations import Conversation, encode_prompt
from tunesmith.models import BASE, Generation, GenerationSettings, Request, VariantSet, generate, token_logits
from tunesmith.progress import Cancellation, Progress, ProgressCallback
from tunesmith.record import Finding, Value
from tunesmith.verify.records import BehaviourRow, Divergence, TensorVerdict

if TYPE_CHECKING:
    import torch

    from tunesmith.verify.behaviour.reference import Reference

ADAPTER = "adapter"
MERGED = "merged"
MAX_PROMPTS = 8
MAX_NEW_TOKENS = 48

# Of KL(adapter ‖ base), the tuning's own effect: what float32 arithmetic may seem to lose, and what deserves a word.
_ARITHMETIC_SHARE = 1e-3
_NOTABLE_SHARE = 0.1
_UNMEASURED_SHARE = 0.5

# The most that quantized activations may cost, nats a token: what a sound 8-bit scheme costs is a small part of it, and
# a loader that reads other weights costs several times as much.
_ACTIVATIONS = 0.5

# The same sums in another order differ by what a sequence of another length shows, and by this many roundings of the
# largest logit where that shows nothing; a model that was loaded by itself may be off by so many times as much.
_ROUNDINGS = 8
_REACH = 4
_NAMED_PROMPTS = 3

# Whether the merged model is quantized, and then whether its activations are, too, while it computes.
Codes = Literal["none", "weights", "activations"]


def tolerated_share(tensors: Sequence[TensorVerdict]) -> float:
    """The share of KL(adapter ‖ base) that KL(adapter ‖ merged) may reach, where there is no reference.

    KL is quadratic in a small change of the weights.  A rounding error of relative size e = ‖realised − Δ‖ / ‖Δ‖, no
    better aligned with what moves the output than Δ itself, so costs a share of at most about e²; twice its size, and
    so four times the share, is allowed.  Without measured weights a half is; where something is wrong, a tenth.
    """
    moved = [(tensor, tensor.delta_norm**2) for tensor in tensors if tensor.relative_error is not None]
    total = sum(weight for _, weight in moved)
    if not total:
        return _UNMEASURED_SHARE
    if any(tensor.outside for tensor in tensors):
        return _NOTABLE_SHARE
    squared = sum((tensor.relative_error or 0.0) ** 2 * weight for tensor, weight in moved) / total
    return max(4 * squared, _ARITHMETIC_SHARE)


@dataclass
class _Exchange:
    """One prompt's two answers, and what was measured along the adapter's.

    Attributes:
        prompt: the conversation.
        ids: its tokens and those of the adapter's answer.
        adapter: the adapter's answer.
        merged: the merged model's.
        same_prompt: whether both were given the same tokens.
        measures: fields of its row.
        shifts: by variant, how far it is from the adapter in the margin of the adapter's first choice over its
            second, nats, position by position.
        candidates: at the first difference, texts of the two tokens, the probabilities of both variants, and the
            adapter's margin.
        logits: the adapter's, (positions, vocabulary), until the reference was held against them.
    """

    prompt: Conversation
    ids: list[int]
    adapter: Generation
    merged: Generation
    same_prompt: bool
    measures: dict[str, Any] = field(default_factory=dict)
    shifts: dict[str, list[float]] = field(default_factory=dict)
    candidates: dict[str, Any] | None = None
    logits: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many positions are compared."""
        return len(self.adapter.token_ids)

    @property
    def kept(self) -> slice:
        """The positions whose logits choose the answer's tokens: each is before its token."""
        return slice(len(self.ids) - self.tokens - 1, len(self.ids) - 1)

    @property
    def first_difference(self) -> int | None:
        """Index of the first differing token; None where the answers are the same."""
        ours, theirs = self.adapter.token_ids, self.merged.token_ids
        if ours == theirs:
            return None
        pairs = enumerate(zip(ours, theirs, strict=False))
        return next((place for place, pair in pairs if pair[0] != pair[1]), min(len(ours), len(theirs)))

    @property
    def parting(self) -> int | None:
        """The first difference, where both chose a token there after the same tokens; else None."""
        place = self.first_difference
        ended = place is not None and place >= min(self.tokens, len(self.merged.token_ids))
        return place if self.same_prompt and not ended else None


@dataclass(frozen=True)
class _Limits:
    """What is no fault.

    Attributes:
        kl: the most that KL(adapter ‖ merged) may be.
        margin: how far rounding moves the margin between two candidates, nats.
        rounding: KL(adapter ‖ reference), with the reference.
        loading: KL(reference ‖ merged), likewise.
        arithmetic: the most that this may be.
        sound: whether the merged model's files hold the reference's weights.
        codes: how the model is quantized.
    """

    kl: float
    margin: float
    rounding: float | None = None
    loading: float = 0.0
    arithmetic: float = 0.0
    sound: bool = True
    codes: Codes = "none"


def check_behaviour(
    variants: VariantSet,
    prompts: Sequence[Conversation],
    *,
    tolerated_share: float,
    reference: Reference | None = None,
    codes: Codes = "none",
    progress: ProgressCallback,
    cancellation: Cancellation,
) -> tuple[tuple[BehaviourRow, ...], list[Finding]]:
    """Let both answer every prompt greedily, and compare their logits along the adapter's answer.

    Args:
        variants: a set with ``base``, the live ``adapter`` and the full model ``merged``.  With a reference, its
            ``base`` and ``adapter`` are of no more use afterwards.
        prompts: at most ``MAX_PROMPTS`` of them are used.
        tolerated_share: the share of KL(adapter ‖ base) that KL(adapter ‖ merged) may reach without a reference.
        reference: the weights that were recomputed; None where they were not.
        codes: whether ``merged`` is quantized.
        progress: told of prompts compared.
        cancellation: read between prompts and tokens.

    Returns:
        One row a prompt, and findings on all of them.
    """
    exchanges = _answer(variants, prompts[:MAX_PROMPTS], progress=progress, cancellation=cancellation)
    for index, exchange in enumerate(exchanges):
        cancellation.check()
        progress(Progress("verify behaviour", index, len(exchanges), "prompts"))
        logits = _compare(variants, exchange)
        exchange.logits = None if reference is None else logits
    limits = None
    if reference is not None:
        limits = _measure_limits(variants, exchanges, reference, cancellation=cancellation)
    limits = replace(limits or _estimate_limits(exchanges, tolerated_share), codes=codes)
    progress(Progress("verify behaviour", len(exchanges), len(exchanges), "prompts"))
    rows = tuple(_row(exchange, limits) for exchange in exchanges)
    return rows, _judge(rows, limits, same_ids=all(exchange.same_prompt for exchange in exchanges))


def _answer(
    variants: VariantSet, prompts: Sequence[Conversation], *, progress: ProgressCallback, cancellation: Cancellation
) -> list[_Exchange]:
    """Both variants' greedy answers."""
    settings = GenerationSettings(greedy=True, max_new_tokens=MAX_NEW_TOKENS)
    turns = [prompt.prompt for prompt in prompts]
    answers, ids = {}, {}
    for name in (ADAPTER, MERGED):
        requests = [Request(name, turn) for turn in turns]
        answers[name] = generate(variants, requests, settings, progress=progress, cancellation=cancellation)
        cancellation.check()
        with variants.active(name) as (_, tokenizer):
            ids[name] = [encode_prompt(tokenizer, turn) for turn in turns]
    return [
        _Exchange(
            prompt=prompt,
            ids=[*ids[ADAPTER][index], *answers[ADAPTER][index].token_ids],
            adapter=answers[ADAPTER][index],
            merged=answers[MERGED][index],
            same_prompt=ids[ADAPTER][index] == ids[MERGED][index],
        )
        for index, prompt in enumerate(prompts)
    ]


def _compare(variants: VariantSet, exchange: _Exchange) -> torch.Tensor:
    """Measure the variants along the adapter's answer, and give back the adapter's logits there."""
    names = (ADAPTER, MERGED, BASE)
    adapter, merged, base = (token_logits(variants, name, exchange.ids, exchange.kept) for name in names)
    exchange.measures = {
        "tokens": exchange.tokens,
        "mean_kl": _mean_kl(adapter, merged),
        "base_kl": _mean_kl(adapter, base),
        "max_logit_difference": float((adapter - merged).abs().max()),
        "top1_agreement": float((adapter.argmax(-1) == merged.argmax(-1)).double().mean()),
    }
    exchange.shifts = {MERGED: _shifts(adapter, merged), BASE: _shifts(adapter, base)}
    if exchange.parting is not None:
        exchange.candidates = _candidates(variants, exchange, exchange.parting, {ADAPTER: adapter, MERGED: merged})
    return adapter


def _candidates(
    variants: VariantSet, exchange: _Exchange, place: int, logits: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """What both variants think of the two tokens that they chose at one place."""
    pair = [exchange.adapter.token_ids[place], exchange.merged.token_ids[place]]
    first, second = logits[ADAPTER][place, pair].double().tolist()
    found: dict[str, Any] = {"margin": first - second}
    for name in (ADAPTER, MERGED):
        found[f"{name}_probabilities"] = tuple(logits[name][place].double().softmax(-1)[pair].tolist())
    with variants.active(ADAPTER) as (_, tokenizer):
        found["adapter_choice"], found["merged_choice"] = (_token_text(tokenizer, token) for token in pair)
    return found


def _token_text(tokenizer: Any, token: int) -> str:
    text = str(tokenizer.decode([token], skip_special_tokens=False))
    # A part of a character has no text of its own; its name in the vocabulary still tells it from others.
    return str(tokenizer.convert_ids_to_tokens(token)) if "�" in text or not text else text


def _shifts(reference: torch.Tensor, other: torch.Tensor) -> list[float]:
    """By how much ``other`` moves the margin of the reference's first choice over its second, at every position."""
    first, second = reference.topk(2, dim=-1).indices.unbind(-1)

    def margin(logits: torch.Tensor) -> torch.Tensor:
        chosen = (logits.gather(-1, index[:, None])[:, 0].double() for index in (first, second))
        return next(chosen) - next(chosen)

    moved: list[float] = (margin(reference) - margin(other)).abs().tolist()
    return moved


def _measure_limits(
    variants: VariantSet, exchanges: Sequence[_Exchange], reference: Reference, *, cancellation: Cancellation
) -> _Limits | None:
    """Put the reference in the base's place, and measure what rounding and arithmetic cost; None where it cannot be."""
    with variants.active(BASE) as (model, _):
        if not reference.write_into(model):
            return None
    delta = 0.0
    for exchange in exchanges:
        cancellation.check()
        rounded = token_logits(variants, BASE, exchange.ids, exchange.kept)
        # The last token chooses nothing any more: without it the same logits come of sums in another order.
        again = token_logits(variants, BASE, exchange.ids[:-1], exchange.kept)
        merged = token_logits(variants, MERGED, exchange.ids, exchange.kept)
        assert exchange.logits is not None  # noqa: S101 - kept since they were measured
        exchange.measures["rounding_kl"] = _mean_kl(exchange.logits, rounded)
        exchange.measures["loading_kl"] = _mean_kl(rounded, merged)
        exchange.shifts[BASE] = _shifts(exchange.logits, rounded)
        exchange.logits = None
        roundings = _ROUNDINGS * _unit_roundoff(variants.dtype) * float(rounded.abs().max())
        delta = max(delta, float((rounded - again).abs().max()), roundings)
    rounding, loading = (_over_tokens(exchanges, key) for key in ("rounding_kl", "loading_kl"))
    arithmetic = (_REACH * delta) ** 2 / 2
    return _Limits(
        kl=(rounding**0.5 + arithmetic**0.5) ** 2,
        margin=max(_largest(exchanges, BASE), 2 * _REACH * delta),
        rounding=rounding,
        loading=loading,
        arithmetic=arithmetic,
        sound=reference.sound,
    )


def _unit_roundoff(dtype: str) -> float:
    import torch

    return float(torch.finfo(getattr(torch, dtype)).eps) / 2


def _estimate_limits(exchanges: Sequence[_Exchange], share: float) -> _Limits:
    """The limits without a reference: a share of what the tuning did, and its root for what is linear in the logits."""
    margin = min(_largest(exchanges, MERGED), share**0.5 * _largest(exchanges, BASE))
    return _Limits(kl=share * _over_tokens(exchanges, "base_kl"), margin=margin)


def _over_tokens(exchanges: Sequence[_Exchange], key: str) -> float:
    total = sum(exchange.tokens for exchange in exchanges) or 1
    mean: float = sum(exchange.measures[key] * exchange.tokens for exchange in exchanges) / total
    return mean


def _largest(exchanges: Sequence[_Exchange], name: str) -> float:
    """The largest shift of a margin anywhere but where two texts part."""
    return max(
        (
            shift
            for exchange in exchanges
            for place, shift in enumerate(exchange.shifts[name])
            if place != exchange.first_difference
        ),
        default=0.0,
    )


def _row(exchange: _Exchange, limits: _Limits) -> BehaviourRow:
    divergence = None
    if exchange.candidates is not None:
        tie = exchange.candidates["margin"] <= limits.margin
        divergence = Divergence(**exchange.candidates, noise=limits.margin, tie=tie)
    return BehaviourRow(
        prompt_id=exchange.prompt.id,
        question=exchange.prompt.question,
        same_text=exchange.first_difference is None,
        first_difference=exchange.first_difference,
        adapter_text=exchange.adapter.text,
        merged_text=exchange.merged.text,
        divergence=divergence,
        **exchange.measures,
    )


def _mean_kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean over positions of KL(reference ‖ other), nats; both (positions, vocabulary) logits."""
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean().clamp(min=0))


def _judge(rows: Sequence[BehaviourRow], limits: _Limits, *, same_ids: bool) -> list[Finding]:
    tokens = sum(row.tokens for row in rows) or 1
    mean_kl = sum(row.mean_kl * row.tokens for row in rows) / tokens
    base_kl = sum(row.base_kl * row.tokens for row in rows) / tokens
    share = mean_kl / base_kl if base_kl else 0.0
    params: dict[str, Value] = {"mean_kl": mean_kl, "base_kl": base_kl, "share": share, "limit": limits.kl}
    findings = [
        _of_quantization(params, limits)
        if limits.codes != "none"
        else Finding(code="behaviour_close", severity="ok", params=params)
        if mean_kl <= limits.kl and share <= _NOTABLE_SHARE
        else Finding(code="behaviour_rounding_loss", severity="warning", params=params)
        if mean_kl <= limits.kl
        else Finding(code="behaviour_far", severity="error", params=params),
        _of_limit(limits),
        *_of_texts(
            rows,
            agreement=sum(row.top1_agreement * row.tokens for row in rows) / tokens,
            quantized=limits.codes != "none",
        ),
    ]
    if not same_ids:
        findings.append(Finding(code="behaviour_prompt_ids_differ", severity="error"))
    return findings


def _of_quantization(params: dict[str, Value], limits: _Limits) -> Finding:
    """What quantization costs beside what the tuning did; a fault only where the weights do not explain it."""
    kl, base_kl, share = (float(str(params[key])) for key in ("mean_kl", "base_kl", "share"))
    broken = limits.rounding is not None and limits.codes == "weights" and not kl <= limits.kl
    if broken or not math.isfinite(kl):
        return Finding(code="behaviour_far", severity="error", params=params)
    if kl > base_kl:
        return Finding(code="behaviour_quantized_drowned", severity="warning", params=params)
    if share > _NOTABLE_SHARE:
        return Finding(code="behaviour_quantized_loss", severity="warning", params=params)
    return Finding(code="behaviour_quantized_close", severity="ok", params=params)


def _of_limit(limits: _Limits) -> Finding:
    """Where the limit comes from, and whether the loaded model computes what its weights say."""
    if limits.rounding is None:
        return Finding(code="behaviour_limit_estimated", severity="info", params={"limit": limits.kl})
    params: dict[str, Value] = {
        "rounding": limits.rounding,
        "loading": limits.loading,
        "arithmetic": limits.arithmetic,
    }
    if limits.codes == "activations" and limits.loading <= _ACTIVATIONS:
        return Finding(code="behaviour_activations", severity="info", params=params)
    if limits.loading <= limits.arithmetic:
        return Finding(code="behaviour_as_stored", severity="ok", params=params)
    if limits.sound:
        return Finding(code="behaviour_read_otherwise", severity="error", params=params)
    return Finding(code="behaviour_beyond_rounding", severity="error", params=params)


def _of_texts(rows: Sequence[BehaviourRow], *, agreement: float, quantized: bool) -> list[Finding]:
    """How many greedy texts are the same, part at a tie, or part otherwise; quantization leaves no ties to speak of."""
    if quantized:
        counts: dict[str, Value] = {
            "same": sum(row.same_text for row in rows),
            "total": len(rows),
            "agreement": agreement,
        }
        return [Finding(code="behaviour_quantized_texts", severity="info", params=counts)]
    flips = [row for row in rows if not row.same_text and not row.tie]
    ties = sum(row.tie for row in rows)
    params: dict[str, Value] = {
        "same": len(rows) - len(flips) - ties,
        "ties": ties,
        "total": len(rows),
        "agreement": agreement,
    }
    findings = [Finding(code="behaviour_texts", severity="info" if flips else "ok", params=params)]
    if flips:
        names = ", ".join(row.prompt_id for row in flips[:_NAMED_PROMPTS])
        more = " …" if len(flips) > _NAMED_PROMPTS else ""
        named: dict[str, Value] = {"count": len(flips), "prompts": names + more}
        findings.append(Finding(code="behaviour_flips", severity="warning", params=named))
    return findings
