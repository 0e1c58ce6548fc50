"""Level 4: the merged model loaded alone, against the base with the live, unmerged adapter.

This level shows a person that the two answer alike.  It cannot prove it: a merge that misses a whole module can differ
less than one that is only rounded to bf16.  The weights level proves; this one would notice what weights cannot show,
such as a loader that reads the directory differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tunesmith.conversations import Conversation, encode_prompt
from tunesmith.models import BASE, GenerationSettings, VariantSet, generate, token_logits
from tunesmith.progress import Cancellation, Progress, ProgressCallback
from tunesmith.record import Finding
from tunesmith.verify.records import BehaviourRow, TensorVerdict

if TYPE_CHECKING:
    import torch

ADAPTER = "adapter"
MERGED = "merged"
MAX_PROMPTS = 8
MAX_NEW_TOKENS = 48

# Of KL(adapter ‖ base), the tuning's own effect: what float32 arithmetic may seem to lose, and what deserves a word.
_ARITHMETIC_SHARE = 1e-3
_NOTABLE_SHARE = 0.1
_UNMEASURED_SHARE = 0.5


def tolerated_share(tensors: Sequence[TensorVerdict]) -> float:
    """The share of KL(adapter ‖ base) that KL(adapter ‖ merged) may reach, from the weights that were measured.

    KL is quadratic in a small change of the weights.  A rounding error of relative size e = ‖realised − Δ‖ / ‖Δ‖, no
    better aligned with what moves the output than Δ itself, so costs a share of at most about e²; twice its size, and
    so four times the share, is allowed.  Without measured weights a tenth is.
    """
    moved = [(tensor, tensor.delta_norm**2) for tensor in tensors if tensor.relative_error is not None]
    total = sum(weight for _, weight in moved)
    if not total:
        return _UNMEASURED_SHARE
    if any(tensor.outside for tensor in tensors):
        return _NOTABLE_SHARE
    squared = sum((tensor.relative_error or 0.0) ** 2 * weight for tensor, weight in moved) / total
    return max(4 * squared, _ARITHMETIC_SHARE)


def check_behaviour(
    variants: VariantSet,
    prompts: Sequence[Conversation],
    *,
    tolerated_share: float,
    progress: ProgressCallback,
    cancellation: Cancellation,
) -> tuple[tuple[BehaviourRow, ...], list[Finding]]:
    """Let both answer every prompt greedily, and compare their logits along the adapter's answer.

    Args:
        variants: a set with ``base``, the live ``adapter`` and the full model ``merged``.
        prompts: at most ``MAX_PROMPTS`` of them are used.
        tolerated_share: the share of KL(adapter ‖ base) that KL(adapter ‖ merged) may reach.
        progress: told of prompts compared.
        cancellation: read between prompts and tokens.

    Returns:
        One row a prompt, and findings on all of them.
    """
    prompts = prompts[:MAX_PROMPTS]
    settings = GenerationSettings(greedy=True, max_new_tokens=MAX_NEW_TOKENS)
    turns = [prompt.prompt for prompt in prompts]
    answers = {
        name: generate(variants, name, turns, settings, progress=progress, cancellation=cancellation)
        for name in (ADAPTER, MERGED)
    }
    cancellation.check()
    prompt_ids = {}
    for name in (ADAPTER, MERGED):
        with variants.active(name) as (_, tokenizer):
            prompt_ids[name] = [encode_prompt(tokenizer, turn) for turn in turns]
    rows = []
    for index, prompt in enumerate(prompts):
        cancellation.check()
        progress(Progress("verify behaviour", index, len(prompts), "prompts"))
        ours, theirs = answers[ADAPTER][index], answers[MERGED][index]
        measures = _compare(variants, [*prompt_ids[ADAPTER][index], *ours.token_ids], len(ours.token_ids))
        rows.append(
            BehaviourRow(
                prompt_id=prompt.id,
                question=prompt.question,
                same_text=ours.token_ids == theirs.token_ids,
                first_difference=_first_difference(ours.token_ids, theirs.token_ids),
                adapter_text=ours.text,
                merged_text=theirs.text,
                **measures,
            )
        )
    progress(Progress("verify behaviour", len(prompts), len(prompts), "prompts"))
    return tuple(rows), _judge(rows, tolerated_share, same_ids=prompt_ids[ADAPTER] == prompt_ids[MERGED])


def _compare(variants: VariantSet, ids: list[int], answer_tokens: int) -> dict[str, Any]:
    # The logits that choose an answer's token are those of the position before it.
    keep = slice(len(ids) - answer_tokens - 1, len(ids) - 1)
    adapter, merged, base = (token_logits(variants, name, ids, keep) for name in (ADAPTER, MERGED, BASE))
    return {
        "tokens": answer_tokens,
        "mean_kl": _mean_kl(adapter, merged),
        "base_kl": _mean_kl(adapter, base),
        "max_logit_difference": float((adapter - merged).abs().max()),
        "top1_agreement": float((adapter.argmax(-1) == merged.argmax(-1)).double().mean()),
    }


def _mean_kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean over positions of KL(reference ‖ other), nats; both (positions, vocabulary) logits."""
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean().clamp(min=0))


def _first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    if tuple(ours) == tuple(theirs):
        return None
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((place for place, pair in pairs if pair[0] != pair[1]), min(len(ours), len(theirs)))


def _judge(rows: Sequence[BehaviourRow], tolerated: float, *, same_ids: bool) -> list[Finding]:
    tokens = sum(row.tokens for row in rows) or 1
    mean_kl = sum(row.mean_kl * row.tokens for row in rows) / tokens
    base_kl = sum(row.base_kl * row.tokens for row in rows) / tokens
    agreement = sum(row.top1_agreement * row.tokens for row in rows) / tokens
    same = sum(row.same_text for row in rows)
    share = mean_kl / base_kl if base_kl else 0.0
    close = share <= tolerated
    params = {"mean_kl": mean_kl, "base_kl": base_kl, "share": share, "tolerated": tolerated}
    findings = [
        Finding(code="behaviour_close", severity="ok", params=params)
        if close and share <= _NOTABLE_SHARE
        else Finding(code="behaviour_rounding_loss", severity="warning", params=params)
        if close
        else Finding(code="behaviour_far", severity="error", params=params),
        Finding(
            code="behaviour_texts",
            severity="ok" if same == len(rows) else "info",
            params={"same": same, "total": len(rows), "agreement": agreement},
        ),
    ]
    if not same_ids:
        findings.append(Finding(code="behaviour_prompt_ids_differ", severity="error"))
    return findings
