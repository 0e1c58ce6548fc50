"""Prompts × variants: what each answered, how the answers differ, what held-out rows say, which checkpoint to take."""

from tunesmith.compare.choice import (
    Candidate,
    CheckpointChoice,
    choose_checkpoint,
    choose_from_record,
    saved_adapters,
)
from tunesmith.compare.diff import Segment, similarity, word_diff
from tunesmith.compare.drift import DriftTexts, Measured, check_same_tokens, drift_of, drift_texts, measure_drift
from tunesmith.compare.drift_records import Departure, Drift, DriftModel, DriftRow
from tunesmith.compare.evaluation import evaluate
from tunesmith.compare.evaluation_records import Evaluation, Figure, Measure
from tunesmith.compare.general import built_in_set
from tunesmith.compare.intervals import Estimate
from tunesmith.compare.markdown import to_markdown
from tunesmith.compare.marks import MARKS, Marks, filtered, marks_of
from tunesmith.compare.metrics import load_scorer
from tunesmith.compare.records import Comparison, Reply, RowLoss, Score, VariantInfo
from tunesmith.compare.run import compare, summarize
from tunesmith.compare.table import to_csv
from tunesmith.compare.votes import BlindVote, VoteFile, Voting

__all__ = [
    "MARKS",
    "BlindVote",
    "Candidate",
    "CheckpointChoice",
    "Comparison",
    "Departure",
    "Drift",
    "DriftModel",
    "DriftRow",
    "DriftTexts",
    "Estimate",
    "Evaluation",
    "Figure",
    "Marks",
    "Measure",
    "Measured",
    "Reply",
    "RowLoss",
    "Score",
    "Segment",
    "VariantInfo",
    "VoteFile",
    "Voting",
    "built_in_set",
    "check_same_tokens",
    "choose_checkpoint",
    "choose_from_record",
    "compare",
    "drift_of",
    "drift_texts",
    "evaluate",
    "filtered",
    "load_scorer",
    "marks_of",
    "measure_drift",
    "saved_adapters",
    "similarity",
    "summarize",
    "to_csv",
    "to_markdown",
    "word_diff",
]
