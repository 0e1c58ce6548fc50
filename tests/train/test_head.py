"""The loss by a head that is not trained: a few tokens' logits at a time, and the same loss and gradient."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch

from tunesmith.train.head import is_plain_head, nats_of

from .test_batches import tiny


@pytest.mark.parametrize("tokens", [1, 128, 300])
def test_loss_and_gradient_are_those_of_a_float64_computation(tokens: int) -> None:
    """Of fewer tokens than are done at once, of just as many, and of more."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 24, generator=generator, requires_grad=True)
    head = torch.nn.Linear(24, 97, bias=False)
    targets = torch.randint(0, 97, (tokens,), generator=generator)
    nats = nats_of(hidden, head, targets)
    (nats * 0.5).backward()
    exact = hidden.detach().double().requires_grad_()
    expected = -torch.log_softmax(exact @ head.weight.detach().double().T, -1)[torch.arange(tokens), targets].sum()
    (expected * 0.5).backward()
    assert nats.item() == pytest.approx(expected.item(), rel=1e-6)
    assert hidden.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def frozen(name: str, **changes: Any) -> Any:
    """A random model of one layer, its weights frozen."""
    return tiny(name, **{"num_hidden_layers": 1, **changes}).requires_grad_(False)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt_neox"])
def test_plain_heads_are_recognised(name: str) -> None:
    """Their logits are the head's product; the model is left in the mode that it was in."""
    model = frozen(name).train()
    assert is_plain_head(model)
    assert model.training


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
    ],
)
def test_heads_whose_logits_are_changed_afterwards_are_recognised(name: str, changes: dict[str, Any]) -> None:
    """A soft cap, and two scales: their loss is another function, so all of it is computed."""
    assert not is_plain_head(frozen(name, **changes))


def test_head_that_is_trained_is_not_taken_apart() -> None:
    """Its own gradient is wanted then."""
    model = frozen("llama")
    model.get_output_embeddings().weight.requires_grad_(True)
    assert not is_plain_head(model)
