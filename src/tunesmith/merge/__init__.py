"""From a plan to a merged model: the only delta arithmetic that ships."""

from tunesmith.merge.plan import plan_merge
from tunesmith.merge.records import Asset, Ingredient, Merged, MergePlan, Receipt, ShardPlan, TensorFidelity
from tunesmith.merge.write import merge

__all__ = [
    "Asset",
    "Ingredient",
    "MergePlan",
    "Merged",
    "Receipt",
    "ShardPlan",
    "TensorFidelity",
    "merge",
    "plan_merge",
]
