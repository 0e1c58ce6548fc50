"""From a plan to a merged model: the only delta arithmetic that ships, and what others need to store it otherwise."""

from tunesmith.merge.exact import ExactRows
from tunesmith.merge.fidelity import forecast
from tunesmith.merge.layout import OutputFile, index_of, layout_of
from tunesmith.merge.plan import assets_of, plan_merge, quantized_training, size_in_bytes
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
from tunesmith.merge.rounders import CALIBRATED, ROUNDINGS, hessian_of_inputs, recorded_inputs
from tunesmith.merge.rounding import (
    Codes,
    Float8Codes,
    Hessian,
    IntegerCodes,
    ScaledGrid,
    round_once,
    round_to_grid,
    row_space,
)
from tunesmith.merge.units import Context, TensorTask, Unit, cut, piece_of, task_of
from tunesmith.merge.work import Tick, one_thread_of_blas, run_unit
from tunesmith.merge.write import config_of, config_text, merge, stamps_of

__all__ = [
    "CALIBRATED",
    "ROUNDINGS",
    "Asset",
    "Codes",
    "Context",
    "ExactRows",
    "Float8Codes",
    "Forecast",
    "Hessian",
    "Ingredient",
    "IntegerCodes",
    "Kept",
    "MergePlan",
    "Merged",
    "OutputFile",
    "Receipt",
    "ScaledGrid",
    "ShardPlan",
    "TensorFidelity",
    "TensorTask",
    "Tick",
    "Unit",
    "assets_of",
    "config_of",
    "config_text",
    "cut",
    "forecast",
    "hessian_of_inputs",
    "index_of",
    "layout_of",
    "merge",
    "one_thread_of_blas",
    "piece_of",
    "plan_merge",
    "quantized_training",
    "recorded_inputs",
    "round_once",
    "round_to_grid",
    "row_space",
    "run_unit",
    "size_in_bytes",
    "stamps_of",
    "task_of",
]
