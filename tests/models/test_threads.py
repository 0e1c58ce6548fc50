"""Rows are what they are alone, in however many pieces the machine cuts its products."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_models import row
from tunesmith.models import GenerationSettings, Request, VariantSet, generate, score

# float32 logits of size 10, 64 features, 2 layers; nats of a token.
NATS_PER_TOKEN = 1e-5

# Long enough that every product and every sum over the vocabulary is shared out.
ROWS = [row(i, f"question {i} " * 3, "a long answer " * (8 + 5 * i)) for i in range(4)]
GREEDY = GenerationSettings(greedy=True, max_new_tokens=24)


@pytest.mark.usefixtures("two_threads")
def test_a_batch_in_two_threads_is_every_row_in_one(variants: VariantSet) -> None:
    """Likelihoods of every token, and the tokens that are written."""
    names = ["base", "final", "checkpoint-10"]
    requests = [Request(name, item.messages[:1]) for name in names for item in ROWS]
    assert torch.get_num_threads() == 2
    together = score(variants, names, ROWS)
    written = generate(variants, requests, GREEDY)
    torch.set_num_threads(1)
    for name in names:
        for item, found in zip(ROWS, together[name], strict=True):
            (alone,) = score(variants, [name], [item])[name]
            assert found.log_probs == pytest.approx(alone.log_probs, rel=0, abs=NATS_PER_TOKEN)
    for request, reply in zip(requests, written, strict=True):
        (alone_reply,) = generate(variants, [request], GREEDY)
        assert reply.token_ids == alone_reply.token_ids
