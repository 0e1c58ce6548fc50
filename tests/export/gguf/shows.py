"""A chat template that is asked for texts, without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tests.conversations.test_templates import tokenizer_of_all
from tunesmith.conversations import Message
from tunesmith.export.gguf.ollama import chat_shower


def shown(template: str) -> Callable[[Sequence[Message], bool], str]:
    """It, with ``<s>`` and ``</s>`` as the tokenizer's tokens."""
    return chat_shower(tokenizer_of_all(), template)
