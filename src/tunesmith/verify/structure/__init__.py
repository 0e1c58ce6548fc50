"""Level 1: the merged directory as a loader sees it."""

from tunesmith.verify.structure.check import check_structure, embeddings_of, is_copy, is_head, unties
from tunesmith.verify.structure.dequantized import Dequantized
from tunesmith.verify.structure.directory import quantized_as

__all__ = [
    "Dequantized",
    "check_structure",
    "embeddings_of",
    "is_copy",
    "is_head",
    "quantized_as",
    "unties",
]
