"""Level 4: the merged model loaded alone, beside the base with the live adapter."""

from tunesmith.verify.behaviour.check import ADAPTER, MERGED, Codes, check_behaviour, tolerated_share
from tunesmith.verify.behaviour.reference import Reference

__all__ = [
    "ADAPTER",
    "Codes",
    "MERGED",
    "Reference",
    "check_behaviour",
    "tolerated_share",
]
