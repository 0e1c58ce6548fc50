"""From a plan to a merged model: the only delta arithmetic that ships."""

from tunesmith.merge.fidelity import forecast
from tunesmith.merge.plan import plan_merge
from tunesmith.merge.records import (
    Asset,
    Forecast,
    Ingredient,
    Kept,
    Merged,
    MergePlan,
    Receipt,
    ShardPlan,
    TensorFidelity,
)
from tunesmith.merge.rounders import CALIBRATED, ROUNDINGS
from tunesmith.merge.write import merge

__all__ = [
    "CALIBRATED",
    "ROUNDINGS",
    "Asset",
    "Forecast",
    "Ingredient",
    "Kept",
    "MergePlan",
    "Merged",
    "Receipt",
    "ShardPlan",
    "TensorFidelity",
    "forecast",
    "merge",
    "plan_merge",
]
