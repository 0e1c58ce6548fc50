"""From logits to the next token of every row."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.models.engine import GenerationSettings

if TYPE_CHECKING:
    import torch

_LIKELIEST = 512  # nearly always enough to hold top_p; sorting a whole vocabulary takes longer than a small model


class Sampler:
    """Draws the next token of every row, each from random numbers of its own.

    A row's numbers depend on the seed, on its prompt and on how many rows before it have the same prompt and variant.
    So variants that answer the same prompt draw with the same numbers, and differ by what they think only.

    Args:
        settings: how tokens are drawn.
        prompts: the token ids of every row's prompt.
        seeds: for every row, what tells it from others of the same prompt.
    """

    def __init__(self, settings: GenerationSettings, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> None:
        self._settings = settings
        self._numbers = [
            np.random.default_rng([settings.seed, *_digest(prompt), seed])
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        self._seen: list[set[int]] = [set(prompt) for prompt in prompts] if settings.repetition_penalty != 1 else []

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self._numbers = [self._numbers[row] for row in rows]
        if self._seen:
            self._seen = [self._seen[row] for row in rows]

    def draw(self, logits: torch.Tensor) -> list[int]:
        """Choose a token for every row.

        Args:
            logits: float32 (rows, vocabulary); changed.

        Returns:
            Token ids.
        """
        for row, seen in enumerate(self._seen):
            self._penalize(logits[row], seen)
        if not self._settings.samples:
            tokens: list[int] = logits.argmax(-1).tolist()
        else:
            tokens = [self._one(logits[row], numbers.random()) for row, numbers in enumerate(self._numbers)]
        for seen, token in zip(self._seen, tokens, strict=False):
            seen.add(token)
        return tokens

    def _penalize(self, logits: torch.Tensor, seen: set[int]) -> None:
        import torch

        index = torch.tensor(sorted(seen), device=logits.device)
        chosen, penalty = logits[index], self._settings.repetition_penalty
        logits[index] = torch.where(chosen > 0, chosen / penalty, chosen * penalty)

    def _one(self, logits: torch.Tensor, number: float) -> int:
        """Draw from one row's logits by the inverse of the distribution function, tokens in the order of their ids."""
        tokens, p = self._candidates(logits / self._settings.temperature)
        order = np.argsort(tokens)
        tokens, steps = tokens[order], np.cumsum(p[order])
        return int(tokens[min(np.searchsorted(steps, number * steps[-1], side="right"), len(tokens) - 1)])

    def _candidates(self, logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that may be drawn, and their probabilities: top_k first, of what is left top_p, then min_p."""
        settings, size = self._settings, logits.shape[-1]
        count = min(settings.top_k or size, size)
        if count == size and settings.top_p == 1:
            p = logits.double().softmax(-1).cpu().numpy()
            return _likely_enough(np.arange(size), p, settings.min_p)
        whole = float((logits if count == size else logits.topk(count).values).double().logsumexp(-1))
        for first in (min(count, _LIKELIEST), count):
            values, tokens = logits.topk(first)
            p = (values.double() - whole).exp().cpu().numpy()
            reached = np.cumsum(p)
            if reached[-1] >= settings.top_p:
                break
        keep = int(np.searchsorted(reached, settings.top_p, side="left")) + 1 if settings.top_p < 1 else first
        return _likely_enough(tokens[:keep].cpu().numpy(), p[:keep], settings.min_p)


def _likely_enough(tokens: np.ndarray, p: np.ndarray, min_p: float) -> tuple[np.ndarray, np.ndarray]:
    kept = ~(p < min_p * p.max())  # all of them, where a training that diverged left no numbers
    return tokens[kept], p[kept]


def occurrences(rows: Sequence[tuple[str, tuple[int, ...]]]) -> list[int]:
    """For every row, how many before it have the same variant and prompt."""
    seen: Counter[tuple[str, tuple[int, ...]]] = Counter()
    result = []
    for row in rows:
        result.append(seen[row])
        seen[row] += 1
    return result


def _digest(prompt: Sequence[int]) -> list[int]:
    digest = hashlib.sha256(np.asarray(prompt, dtype=np.int64).tobytes()).digest()
    return [int.from_bytes(digest[start : start + 4], "little") for start in range(0, 16, 4)]
