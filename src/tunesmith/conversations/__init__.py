"""Conversations: the rows of every data-set format in use, and their one way through a chat template.

Training, scoring, comparing and verifying all read rows and render prompts here, so that what was trained on, what
is compared and what is verified are the same token ids.
"""

from tunesmith.conversations.encode import Encoded, encode, encode_all, encode_prompt, encode_text
from tunesmith.conversations.files import built_in_prompts, read_conversations
from tunesmith.conversations.records import Conversation, Message, Text, with_system
from tunesmith.conversations.registry import DATASET_INFO, REASONS, Dataset, Reason, read_dataset
from tunesmith.conversations.templates import NamedTemplate, chat_template_of, named_template, template_names

__all__ = [
    "DATASET_INFO",
    "REASONS",
    "Conversation",
    "Dataset",
    "Encoded",
    "Message",
    "NamedTemplate",
    "Reason",
    "Text",
    "built_in_prompts",
    "chat_template_of",
    "encode",
    "encode_all",
    "encode_prompt",
    "encode_text",
    "named_template",
    "read_conversations",
    "read_dataset",
    "template_names",
    "with_system",
]
