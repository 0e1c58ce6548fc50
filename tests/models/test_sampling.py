"""The sampler draws from what Transformers' own processors leave, as often as they say, and each row by itself."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.tiny_models import chat
from tunesmith.models import GenerationSettings, Request, VariantSet, generate
from tunesmith.models.sampling import Sampler, occurrences

SIZE = 2000  # more than the sampler looks at first


def logits_of(seed: int, spread: float) -> torch.Tensor:
    """Logits (1, vocabulary), all of them different."""
    return torch.randn(1, SIZE, generator=torch.Generator().manual_seed(seed)) * spread


def transformers_probabilities(logits: torch.Tensor, prompt: list[int], settings: GenerationSettings) -> torch.Tensor:
    """The oracle: what Transformers' generation would draw from, in the order in which it applies these."""
    processors: list[Any] = [RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)]
    processors.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k:
        processors.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        processors.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p:
        processors.append(MinPLogitsWarper(settings.min_p))
    scores = LogitsProcessorList(processors)(torch.tensor([prompt]), logits.double().clone())
    result: torch.Tensor = scores.softmax(-1)[0]
    return result


def sampler_probabilities(logits: torch.Tensor, prompt: list[int], settings: GenerationSettings) -> torch.Tensor:
    """What the sampler would draw from."""
    sampler, logits = Sampler(settings, [prompt], [0]), logits.clone()
    for row, seen in enumerate(sampler._seen):
        sampler._penalize(logits[row], seen)
    tokens, p = sampler._candidates(logits[0] / settings.temperature)
    result = torch.zeros(SIZE, dtype=torch.float64)
    result[torch.from_numpy(tokens)] = torch.from_numpy(p / p.sum())
    return result


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 50),
    spread=st.sampled_from((0.05, 1.0, 5.0)),
    temperature=st.sampled_from((0.1, 0.7, 1.0, 3.0)),
    top_p=st.sampled_from((0.001, 0.3, 0.9, 0.999, 1.0)),
    top_k=st.sampled_from((0, 1, 40, 700, SIZE, 10 * SIZE)),
    min_p=st.sampled_from((0.0, 0.05, 0.5, 1.0)),
    repetition_penalty=st.sampled_from((1.0, 0.8, 1.5)),
    prompt=st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=20),
)
def test_the_tokens_that_may_be_drawn_are_transformers_own(
    seed: int, spread: float, prompt: list[int], **given_settings: Any
) -> None:
    """All settings together: the same set of tokens, with the same probabilities."""
    logits, given_settings = logits_of(seed, spread), GenerationSettings(**given_settings)
    expected = transformers_probabilities(logits, prompt, given_settings)
    found = sampler_probabilities(logits, prompt, given_settings)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-12)
    assert torch.equal(found > 0, expected > 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 1.0, "top_p": 1.0},
        {"temperature": 0.7},
        {"temperature": 2.0, "top_k": 6},
        {"temperature": 1.0, "min_p": 0.1, "repetition_penalty": 1.5},
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(changes: dict[str, Any]) -> None:
    """A chi-square test of 5,000 draws, of rows with numbers of their own."""
    count, prompt = 5_000, [3, 5]
    given_settings = GenerationSettings(seed=4, **changes)
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(1)) * 2
    expected = transformers_probabilities(logits, prompt, given_settings).numpy()
    drawn = Sampler(given_settings, [prompt] * count, range(count)).draw(logits.repeat(count, 1))
    found = np.bincount(drawn, minlength=30)
    assert not found[expected == 0].any()
    often = expected * count >= 5
    found_often, expected_often = found[often], expected[often] * count
    rest = count - found_often.sum(), count - expected_often.sum()
    if rest[1] >= 5:
        found_often, expected_often = np.append(found_often, rest[0]), np.append(expected_often, rest[1])
    assert len(found_often) >= 3
    expected_often *= found_often.sum() / expected_often.sum()
    assert stats.chisquare(found_often, expected_often).pvalue > 1e-3


def test_one_rows_draws_are_independent_of_each_other() -> None:
    """Token after token of one row: pairs are as likely as their product."""
    count, p = 5_000, torch.tensor([[0.5, 0.3, 0.2]])
    sampler = Sampler(GenerationSettings(temperature=1.0, top_p=1.0), [[1]], [0])
    drawn = list(itertools.chain.from_iterable(sampler.draw(p.log()) for _ in range(count)))
    pairs = np.bincount(np.array(drawn[:-1:2]) * 3 + np.array(drawn[1::2]), minlength=9)
    expected = np.outer(p[0], p[0]).ravel() * pairs.sum()
    assert stats.chisquare(pairs, expected * pairs.sum() / expected.sum()).pvalue > 1e-3


def test_greedy_takes_the_first_of_equal_logits_whoever_runs_beside() -> None:
    """A tie is no accident of the batch."""
    logits = torch.zeros(3, 10)
    logits[0, [4, 7]] = 1.0
    logits[1, [2, 9]] = 1.0
    sampler = Sampler(GenerationSettings(greedy=True), [[1], [1], [2]], [0, 1, 0])
    assert sampler.draw(logits.clone()) == [4, 2, 0]
    sampler.keep([1])
    assert sampler.draw(logits[1:2].clone()) == [2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_go_on_keep_their_numbers_and_what_they_have_seen(temperature: float) -> None:
    """As if those that left had never been there."""
    given_settings = GenerationSettings(temperature=temperature, repetition_penalty=1.8)
    prompts, seeds = [[1], [2, 3], [4], [5, 6]], [0, 0, 0, 0]
    logits = torch.randn(6, 4, 12, generator=torch.Generator().manual_seed(0))
    alone = []
    for row in range(4):
        sampler = Sampler(given_settings, [prompts[row]], [0])
        alone.append([sampler.draw(step[row : row + 1].clone())[0] for step in logits])
    sampler, going, found = Sampler(given_settings, prompts, seeds), [0, 1, 2, 3], {row: [] for row in range(4)}
    for step, logit in enumerate(logits):
        for row, token in zip(going, sampler.draw(logit[going].clone()), strict=True):
            found[row].append(token)
        if step in (1, 3):
            leaves = going.index(0 if step == 1 else 2)
            sampler.keep([place for place in range(len(going)) if place != leaves])
            del going[leaves]
    assert found == {0: alone[0][:2], 1: alone[1], 2: alone[2][:4], 3: alone[3]}


def test_logits_that_are_no_numbers_draw_some_token() -> None:
    """A training that diverged answers nonsense, and stops nobody."""
    for bad in (float("nan"), float("inf"), -float("inf")):
        for given_settings in (
            GenerationSettings(),
            GenerationSettings(top_k=5, min_p=0.1),
            GenerationSettings(greedy=True),
        ):
            (token,) = Sampler(given_settings, [[1]], [0]).draw(torch.full((1, 30), bad))
            assert 0 <= token < 30


def test_rows_of_the_same_prompt_and_variant_are_told_apart() -> None:
    """And only those: what another variant answers does not count."""
    rows = [("a", (1, 2)), ("b", (1, 2)), ("a", (1, 2)), ("a", (1,)), ("a", (1, 2))]
    assert occurrences(rows) == [0, 0, 1, 0, 2]


def test_the_same_seed_gives_the_same_text_whoever_runs_beside(variants: VariantSet) -> None:
    """Alone, among others, in another order, in another size of batch."""
    given_settings = GenerationSettings(max_new_tokens=16, temperature=1.2, repetition_penalty=1.1)
    prompts = [chat("hi"), chat("a longer question"), chat("猫?")]
    alone = {
        (name, place): generate(variants, [Request(name, prompt)], given_settings)[0].token_ids
        for name in variants.names
        for place, prompt in enumerate(prompts)
    }
    for keys, rows_at_once in (
        (list(alone), 32),
        (list(reversed(alone)), 4),
        ([("final", 1), ("base", 0), ("checkpoint-10", 0), ("final", 2)], 2),
    ):
        requests = [Request(name, prompts[place]) for name, place in keys]
        found = generate(variants, requests, given_settings, rows_at_once=rows_at_once)
        assert [item.token_ids for item in found] == [alone[key] for key in keys]
    again = generate(variants, [Request("final", prompts[0])] * 4, given_settings)
    assert again[0].token_ids == alone["final", 0]
    assert len({item.token_ids for item in again}) == 4, "rows of one prompt are draws, not copies"
    other = given_settings.model_copy(update={"seed": 1})
    assert generate(variants, [Request("final", prompts[0])], other)[0].token_ids != alone["final", 0]


@pytest.mark.parametrize("penalty", [0.7, 1.6])
def test_the_penalty_is_of_prompt_and_answer(penalty: float) -> None:
    """Token after token, as Transformers' processor would have it of all that was said until then."""
    sampler = Sampler(GenerationSettings(greedy=True, repetition_penalty=penalty), [[1, 2], [3]], [0, 0])
    said, unpenalized = [[1, 2], [3]], 0
    for step in range(12):
        logits = torch.randn(2, 8, generator=torch.Generator().manual_seed(step)) * 0.5
        processor = RepetitionPenaltyLogitsProcessor(penalty)
        expected = [
            int(processor(torch.tensor([ids]), logits[row : row + 1].clone()).argmax()) for row, ids in enumerate(said)
        ]
        of_prompt = [
            int(processor(torch.tensor([ids]), logits[row : row + 1].clone()).argmax())
            for row, ids in enumerate([[1, 2], [3]])
        ]
        assert sampler.draw(logits.clone()) == expected
        unpenalized += expected != of_prompt
        for ids, token in zip(said, expected, strict=True):
            ids.append(token)
    assert unpenalized, "the answer's own tokens made no difference, so nothing was tested"
