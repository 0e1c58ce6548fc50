"""The oracle of row tests: every row by itself, by plain PEFT on a base of its own, without padding, batch or cache."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.oracle.bases import VOCABULARY
from tests.oracle.zoo import load
from tests.tiny_models import peft_alone
from tunesmith.models import Generation, GenerationSettings, VariantSet, continue_rows
from tunesmith.models.quiet import quiet_loading

MODULE: Any = sys.modules["tunesmith.models.generate"]  # the package's attribute of that name is the function

END = 1
# What is asked of every row in float32: nats a token, and logits.
NATS, LOGITS = 1e-5, 1e-4

Steps = dict[int, list[torch.Tensor]]


def build_word_tokenizer() -> PreTrainedTokenizerFast:
    """Tokens that are words, ``t00`` to ``t47``; the second ends an answer."""
    vocabulary = {f"t{index:02}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=next(iter(vocabulary))))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=f"t{END:02}", pad_token=f"t{0:02}")


class Alone:
    """Plain models by variant, each loaded with nothing beside it.

    Args:
        base: the base's directory.
        adapters: adapter directories by name.
    """

    def __init__(self, base: Path, adapters: Mapping[str, Path]) -> None:
        self._models = {"base": load(base, "AutoModelForCausalLM")}
        for name, path in adapters.items():
            with quiet_loading():
                self._models[name] = peft_alone(load(base, "AutoModelForCausalLM"), path).eval()

    @torch.no_grad()
    def logits(self, name: str, ids: Sequence[int]) -> torch.Tensor:
        """The logits (tokens, vocabulary) of one sequence under one variant."""
        result: torch.Tensor = self._models[name](input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
        return result.float()


def generate_with_logits(
    variants: VariantSet,
    names: Sequence[str],
    rows: Sequence[Sequence[int]],
    settings: GenerationSettings,
    **changes: Any,
) -> tuple[list[Generation], Steps]:
    """Generate, and keep the logits that every token of every row was taken from."""
    steps: Steps = {}
    original = MODULE._Batch._forward

    def spy(batch: Any, cache: Any) -> torch.Tensor:
        logits: torch.Tensor = original(batch, cache)
        for place, index in enumerate(batch._indexes):
            if not batch._answers[place]._tokens:
                steps[index] = []
            steps[index].append(logits[place].clone())
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE._Batch, "_forward", spy)
        return continue_rows(variants, names, rows, settings, **changes), steps


def differences(
    alone: Alone, names: Sequence[str], rows: Sequence[Sequence[int]], generations: Sequence[Generation], steps: Steps
) -> dict[int, tuple[float, float, bool]]:
    """By row, how far logits and log-likelihoods are from the row's alone, and whether the greedy tokens are its own.

    A token that is not the oracle's own is a tie where the oracle's two logits are nearer than the noise in them.
    """
    result = {}
    for index, (name, row, item) in enumerate(zip(names, rows, generations, strict=True)):
        expected = alone.logits(name, [*row, *item.token_ids[:-1]])[len(row) - 1 :]
        found = torch.stack(steps[index])
        tokens = torch.tensor(item.token_ids)[:, None]
        nats = (expected.double().log_softmax(-1) - found.double().log_softmax(-1)).gather(1, tokens)
        noise = float((expected - found).abs().max())
        gaps = expected.max(-1).values - expected.gather(1, tokens)[:, 0]
        result[index] = (noise, float(nats.abs().max()), bool((gaps <= 2 * noise).all()))
    return result


def assert_rows_alone(
    alone: Alone, names: Sequence[str], rows: Sequence[Sequence[int]], generations: Sequence[Generation], steps: Steps
) -> None:
    """Every row is what it would be alone: logits, likelihoods and greedy tokens."""
    for index, (logits, nats, greedy) in differences(alone, names, rows, generations, steps).items():
        where = f"row {index} of {names[index]}: {logits=:.2g} {nats=:.2g}"
        assert greedy, where
        assert logits <= LOGITS, where
        assert nats <= NATS, where
        assert len(steps[index]) == generations[index].tokens, where
