"""Prompts × variants: what each answered, how the answers differ, and what held-out rows say."""

from tunesmith.compare.diff import Segment, similarity, word_diff
from tunesmith.compare.markdown import to_markdown
from tunesmith.compare.records import Comparison, Reply, Score, VariantInfo
from tunesmith.compare.run import compare, mean_interval, summarize

__all__ = [
    "Comparison",
    "Reply",
    "Score",
    "Segment",
    "VariantInfo",
    "compare",
    "mean_interval",
    "similarity",
    "summarize",
    "to_markdown",
    "word_diff",
]
