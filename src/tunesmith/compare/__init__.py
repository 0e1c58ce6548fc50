"""Prompts × variants: what each answered, how the answers differ, what held-out rows say, which checkpoint to take."""

from tunesmith.compare.choice import (
    Candidate,
    CheckpointChoice,
    choose_checkpoint,
    choose_from_record,
    saved_adapters,
)
from tunesmith.compare.diff import Segment, similarity, word_diff
from tunesmith.compare.markdown import to_markdown
from tunesmith.compare.records import Comparison, Reply, Score, VariantInfo
from tunesmith.compare.run import compare, mean_interval, summarize
from tunesmith.compare.selection import Estimate

__all__ = [
    "Candidate",
    "CheckpointChoice",
    "Comparison",
    "Estimate",
    "Reply",
    "Score",
    "Segment",
    "VariantInfo",
    "choose_checkpoint",
    "choose_from_record",
    "compare",
    "mean_interval",
    "saved_adapters",
    "similarity",
    "summarize",
    "to_markdown",
    "word_diff",
]
