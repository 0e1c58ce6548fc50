"""Quantized models: each code bounded against the exact number it stands for, and the update found among the noise."""

from tunesmith.verify.quantized.causes import diagnose_codes, other_checkpoint, other_start
from tunesmith.verify.quantized.check import check_codes
from tunesmith.verify.quantized.judge import certified_codes, gain_of, judge_codes
from tunesmith.verify.quantized.tally import CodeTally, tally_codes

__all__ = [
    "CodeTally",
    "certified_codes",
    "check_codes",
    "diagnose_codes",
    "gain_of",
    "judge_codes",
    "other_checkpoint",
    "other_start",
    "tally_codes",
]
