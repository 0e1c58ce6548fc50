"""Whether servers hold the same models: figures of several must not be figures of one that nobody shipped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tunesmith.errors import DataError
from tunesmith.models.endpoint.probe import Probed, Said
from tunesmith.record import Finding

# Mean nats a token.  Of the demo's models float32 and bfloat16 are 0.02 to 0.03 apart, the last two different
# checkpoints 0.07, the first two 0.6 (benchmarks/servers_apart.py).
_NOISE = 0.035
_ANOTHER = 0.2


def held_alike(models: Mapping[str, str], probed: Sequence[tuple[str, Probed]]) -> tuple[Finding, ...]:
    """Hold what servers say to the same question against what the first one says.

    Args:
        models: the model's id of every variant.
        probed: every server's address, and what was found out about it.

    Returns:
        Where answers or likelihoods differ by more than noise, but not so much that it must be another model.

    Raises:
        DataError: a server holds another model by the same name.
    """
    findings: list[Finding] = []
    (first, one), *others = probed
    for where, other in others:
        for variant, model in models.items():
            own, theirs = one.said[model], other.said[model]
            apart = _apart(own, theirs)
            swapped = [name for name, id_ in models.items() if id_ != model and _swapped(own, theirs, one.said[id_])]
            if swapped or (apart is not None and not apart <= _ANOTHER):
                found = f"what {swapped[0]} says" if swapped else f"likelihoods {apart:.3g} nats a token apart"
                raise DataError(
                    "Two servers hold different models by the same name.",
                    where=f"{first}, {where}",
                    expected=f"the same {model}",
                    found=found,
                    next_step="start both with the same model, or leave one out",
                )
            params = {"variant": variant, "first": first, "where": where}
            if apart is not None and apart > _NOISE:
                findings.append(
                    Finding(code="endpoint_servers_apart", severity="warning", params={**params, "nats": apart})
                )
            elif apart is None and None not in (own.text, theirs.text) and own.text != theirs.text:
                findings.append(Finding(code="endpoint_servers_differ", severity="warning", params=params))
            if None not in (own.prompt_tokens, theirs.prompt_tokens) and own.prompt_tokens != theirs.prompt_tokens:
                tokens = {"tokens": own.prompt_tokens or 0, "other_tokens": theirs.prompt_tokens or 0}
                findings.append(
                    Finding(code="endpoint_prompts_differ", severity="warning", params={**params, **tokens})
                )
    return tuple(findings)


def said_of_all(probed: Sequence[tuple[str, Probed]]) -> tuple[Finding, ...]:
    """What was found about servers, each thing once, and which of it is not so of all of them.

    Args:
        probed: every server's address, and what was found out about it.
    """
    places: dict[str, list[str]] = {}
    first: dict[str, Finding] = {}
    for where, one in probed:
        for finding in one.findings:
            key = f"{finding.code} {finding.params.get('setting', '')}".strip()
            first.setdefault(key, finding)
            places.setdefault(key, []).append(where)
    some = [f"{key}: {', '.join(wheres)}" for key, wheres in places.items() if len(wheres) < len(probed)]
    told = Finding(code="endpoint_servers_unlike", severity="info", params={"which": "; ".join(some)})
    return (*first.values(), *([told] if some else []))


def _apart(one: Said, other: Said) -> float | None:
    """How far the likelihoods of the same row are apart, in nats a token; None where there are none."""
    if one.log_probs is None or other.log_probs is None:
        return None
    pairs = list(zip(one.log_probs, other.log_probs, strict=True))
    return math.fsum(abs(a - b) for a, b in pairs) / max(1, len(pairs))


def _swapped(own: Said, theirs: Said, another: Said) -> bool:
    """Whether a server says what the first one's other model says, and not what its own says."""
    near, far = _apart(theirs, another), _apart(theirs, own)
    if near is not None and far is not None:
        return near < far and far > _NOISE
    return theirs.text is not None and own.text is not None and theirs.text == another.text != own.text
