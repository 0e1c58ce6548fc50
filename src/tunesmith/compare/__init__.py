"""Prompts × variants: what each answered, how the answers differ, and what held-out rows say."""

from tunesmith.compare.records import Comparison, Reply, Score, VariantInfo

__all__ = ["Comparison", "Reply", "Score", "VariantInfo"]
