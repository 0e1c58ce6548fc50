"""Keys and values of running rows, in room that grows ahead of them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_STATE_IN_MODULES = ("recurrent_gemma",)
_ROOM = 64  # positions; then a half more than there are


def key_value_cache(model: Any) -> Any:
    """An empty cache for a model's layers, of Transformers' kinds; plain ones do not copy what they hold at each token.

    Args:
        model: a ``PreTrainedModel``.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    result = DynamicCache(config=model.config)
    result.layers = [_growing()() if type(layer) is DynamicLayer else layer for layer in result.layers]
    return result


def holds_all_state(model: Any) -> bool:
    """Whether a cache holds all that a model remembers; some keep a state in their own modules, with all rows in it.

    Args:
        model: a ``PreTrainedModel``.
    """
    return model.config.model_type not in _STATE_IN_MODULES


def keep_rows(cache: Any, rows: torch.Tensor) -> None:
    """Forget the other rows of a cache.

    Args:
        cache: as :func:`key_value_cache` made it, in use.
        rows: int64, which to keep, in their new order.
    """
    from transformers import cache_utils

    recurrent = getattr(cache_utils, "LinearAttentionCacheLayerMixin", ())  # transformers 5.0 has no such layers yet
    for layer in cache.layers:
        # Recurrent states cannot be selected by the method of that name, or are forgotten by it.
        (layer.reorder_cache if isinstance(layer, recurrent) else layer.batch_select_indices)(rows)


def row_bytes(model: Any, positions: int) -> int:
    """About what one row's keys and values take at most, in bytes.

    Args:
        model: a ``PreTrainedModel``.
        positions: tokens of prompt and answer.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
    layers = getattr(config, "num_hidden_layers", 1)
    return int(2 * layers * kv_heads * width * positions * model.dtype.itemsize)


@cache
def _growing() -> type[Any]:
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):  # type: ignore[misc]  # Transformers is not typed
        """Keys and values (rows, heads, positions, width) as views of buffers with room for more."""

        keys: Any
        values: Any
        _key_room: Any = None
        _value_room: Any = None

        def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            before = self.get_seq_length()
            after = before + key_states.shape[-2]
            if self._key_room is None or self._key_room.shape[-2] < after:
                room = after + max(_ROOM, after // 2)
                self._key_room = _moved(self.keys, key_states, before, room)
                self._value_room = _moved(self.values, value_states, before, room)
            self._key_room[..., before:after, :] = key_states
            self._value_room[..., before:after, :] = value_states
            self.keys, self.values = self._key_room[..., :after, :], self._value_room[..., :after, :]
            return self.keys, self.values

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            length = self.get_seq_length()
            if length > 0:
                self._key_room, self._value_room = self._key_room[indices], self._value_room[indices]
                self.keys, self.values = self._key_room[..., :length, :], self._value_room[..., :length, :]

    return GrowingLayer


def _moved(old: torch.Tensor, like: torch.Tensor, length: int, room: int) -> torch.Tensor:
    result = like.new_empty((*like.shape[:-2], room, like.shape[-1]))
    if length:
        result[..., :length, :] = old
    return result
