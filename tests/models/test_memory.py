"""Keys and values of running rows: Transformers' own, token by token, in room that grows ahead."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from tunesmith.models.memory import keep_rows, key_value_cache, row_bytes

MODULE: Any = sys.modules["tunesmith.models.memory"]


class Model:
    """What a cache is made for."""

    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, head_dim=16)
    dtype = torch.float32


def states(rows: int, tokens: int, *, seed: int) -> torch.Tensor:
    """Keys or values (rows, heads, tokens, width)."""
    return torch.randn(rows, 2, tokens, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("room", [1, 3, 64])
def test_a_cache_holds_what_transformers_own_holds(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """A prompt, tokens one by one over the edges of the room, and rows that leave, in another order too."""
    monkeypatch.setattr(MODULE, "_ROOM", room)
    ours, theirs = key_value_cache(Model), DynamicCache(config=Model.config)
    rows = 4
    for step, tokens in enumerate([5, *[1] * 12]):
        for layer in (0, 1):
            k, v = states(rows, tokens, seed=10 * step + layer), states(rows, tokens, seed=1000 + 10 * step + layer)
            found, expected = ours.update(k, v, layer), theirs.update(k, v, layer)
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(one, other)
        assert ours.get_seq_length() == theirs.get_seq_length()
        if step in (3, 9):
            kept = torch.tensor([2, 0, 3] if step == 3 else [1])
            keep_rows(ours, kept)
            theirs.batch_select_indices(kept)
            rows = len(kept)


def test_tokens_are_written_into_room_that_is_there() -> None:
    """Copying all keys at every token would cost more than reading them."""
    cache = key_value_cache(Model)
    cache.update(states(1, 5, seed=0), states(1, 5, seed=1), 0)
    before = cache.layers[0].keys.data_ptr()
    for seed in range(40):
        cache.update(states(1, 1, seed=seed), states(1, 1, seed=seed), 0)
    assert cache.layers[0].keys.data_ptr() == before


@pytest.mark.parametrize("kind", [LinearAttentionLayer, LinearAttentionAndFullAttentionLayer])
def test_recurrent_states_of_rows_that_left_are_forgotten(kind: type[Any]) -> None:
    """Transformers 5.23 cannot select these, or forgets to."""
    cache, layer = DynamicCache(config=Model.config), kind()
    cache.layers = [layer]
    convolution, state = states(3, 4, seed=0)[:, 0], states(3, 4, seed=1)
    layer.update_conv_state(convolution)
    layer.update_recurrent_state(state)
    keys = states(3, 5, seed=2)
    if kind is LinearAttentionAndFullAttentionLayer:
        cache.update(keys, keys, 0)
    rows = torch.tensor([2, 0])
    keep_rows(cache, rows)
    assert torch.equal(layer.conv_states[0], convolution[rows])
    assert torch.equal(layer.recurrent_states[0], state[rows])
    if kind is LinearAttentionAndFullAttentionLayer:
        assert torch.equal(layer.keys, keys[rows])


def test_a_rows_bytes_are_those_of_its_keys_and_values() -> None:
    """Two tensors, two layers, two heads of 16 numbers a token, four bytes each."""
    assert row_bytes(Model, 10) == 2 * 2 * 2 * 16 * 4 * 10
