"""The loss of a head that is not trained, without the logits of all its tokens at once.

Importing this module imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

_CHUNK = 128  # tokens whose logits are there at once
_PROBE = (3.5, -2.25, 0.125)


class _Nats(torch.autograd.Function):  # type: ignore[misc] # torch is untyped here
    """The summed loss of tokens by a linear head that is not trained, its logits made a few tokens at a time.

    The gradient of a token's loss by its logits is softmax minus one-hot, which is at hand when the logits are.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Sum the loss, and make its gradient by ``hidden``.

        Args:
            ctx: autograd's.
            hidden: [tokens, width].
            weight: [vocabulary, width].
            targets: [tokens], int64.
        """
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        for start in range(0, len(hidden), _CHUNK):
            part = slice(start, start + _CHUNK)
            logits = F.linear(hidden[part], weight).float()
            total += F.cross_entropy(logits, targets[part], reduction="sum")
            slope = torch.softmax(logits, -1, out=logits)
            slope[torch.arange(len(slope), device=slope.device), targets[part]] -= 1
            gradient[part] = slope.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Hand the gradient on."""
        (gradient,) = ctx.saved_tensors
        return gradient * slope.to(gradient.dtype), None, None


def nats_of(hidden: torch.Tensor, head: Any, targets: torch.Tensor) -> torch.Tensor:
    """The summed loss of tokens in nats, fp32 scalar, in memory that does not grow with the vocabulary times them.

    Args:
        hidden: what the head is given, [tokens, width].
        head: a linear layer that :func:`is_plain_head` has looked at.
        targets: [tokens], int64.
    """
    nats: torch.Tensor = _Nats.apply(hidden.to(head.weight.dtype), head.weight, targets)
    return nats


def summed_nats(
    model: Any,
    inputs: dict[str, Any],
    targets: torch.Tensor,
    *,
    head: Any,
    keep: Callable[[torch.Tensor], torch.Tensor],
    plain: bool,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """The summed loss of a batch's supervised tokens in nats, fp32 scalar; the head sees their positions only.

    By a hook rather than by ``logits_to_keep``: that keeps the same columns in every row, and not all models have it.
    What a model does to its logits afterwards (scaling, soft caps) still happens, where the head is not plain.

    Args:
        model: what is called; it may wrap the one that has the head.
        inputs: what it is called with.
        targets: [tokens], int64.
        head: the model's.
        keep: the supervised positions of the hidden states, [tokens, width] of [rows, longest row, width].
        plain: whether :func:`is_plain_head` said so.
        label_smoothing: the weight of a uniform distribution in the targets.
    """
    found: list[torch.Tensor] = []

    def keep_supervised(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        kept = keep(args[0])
        if plain and not label_smoothing:
            found.append(nats_of(kept, head, targets))
            kept = kept[:1].detach()  # the model wants logits of something
        return (kept.unsqueeze(0), *args[1:])

    hook = head.register_forward_pre_hook(keep_supervised)
    try:
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
    finally:
        hook.remove()
    if found:
        return found[0]
    return F.cross_entropy(logits[0].float(), targets, reduction="sum", label_smoothing=label_smoothing)


def is_plain_head(model: Any) -> bool:
    """Whether a model's logits are its head's product and nothing else, and its head is not trained.

    Some scale them, or hold them below a cap; that is asked of the model itself, whose head answers with numbers that
    are recognised or not.

    Args:
        model: with its adapter, on its device; its mode is kept.
    """
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.bias is not None or head.weight.requires_grad:
        return False
    known = torch.tensor([[_PROBE]], device=model.device, dtype=model.dtype)
    hook = head.register_forward_hook(lambda *_: known)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False).logits
    finally:
        hook.remove()
        model.train(training)
    return logits.shape == known.shape and bool((logits == known).all())
