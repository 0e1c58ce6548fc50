"""What an adapter means: its configuration and tensors as typed updates on base tensors, by name.

All of PEFT's semantics (scaling, patterns, names) live here; what is not understood is refused, never skipped.
"""

from tunesmith.adapter.config import PLAIN_INITS
from tunesmith.adapter.facts import delta_norm, describe
from tunesmith.adapter.inputs import beside
from tunesmith.adapter.load import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter
from tunesmith.adapter.records import (
    AdapterFacts,
    Added,
    Binding,
    Copied,
    LowRank,
    Magnitude,
    ModuleFacts,
    Replaced,
    Rows,
    Update,
)
from tunesmith.adapter.stack import Stack

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "Adapter",
    "AdapterFacts",
    "Added",
    "Binding",
    "Copied",
    "LowRank",
    "Magnitude",
    "ModuleFacts",
    "PLAIN_INITS",
    "Replaced",
    "Rows",
    "Stack",
    "Update",
    "beside",
    "delta_norm",
    "describe",
]
