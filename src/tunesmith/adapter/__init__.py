"""What an adapter means: its configuration and tensors as typed updates on base tensors, by name.

All of PEFT's semantics (scaling, patterns, names) live here; what is not understood is refused, never skipped.
"""

from tunesmith.adapter.config import PLAIN_INITS
from tunesmith.adapter.distance import distance
from tunesmith.adapter.facts import GLANCE_BYTES, delta_norm, describe
from tunesmith.adapter.inputs import beside
from tunesmith.adapter.load import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter
from tunesmith.adapter.misfit import misfit
from tunesmith.adapter.mlx import MLX_WEIGHTS
from tunesmith.adapter.records import (
    AdapterDistance,
    AdapterFacts,
    Added,
    Binding,
    Copied,
    KindFacts,
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
    "AdapterDistance",
    "AdapterFacts",
    "Added",
    "Binding",
    "Copied",
    "GLANCE_BYTES",
    "LowRank",
    "MLX_WEIGHTS",
    "Magnitude",
    "KindFacts",
    "ModuleFacts",
    "PLAIN_INITS",
    "Replaced",
    "Rows",
    "Stack",
    "Update",
    "beside",
    "delta_norm",
    "describe",
    "distance",
    "misfit",
]
