"""From a plan to a merged model: the only delta arithmetic that ships."""

from tunesmith.merge.records import Asset, Merged, MergePlan, Receipt, ShardPlan, TensorFidelity, TensorUpdate

__all__ = ["Asset", "MergePlan", "Merged", "Receipt", "ShardPlan", "TensorFidelity", "TensorUpdate"]
