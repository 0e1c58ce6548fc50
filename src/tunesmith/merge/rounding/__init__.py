"""From exact numbers to numbers that can be stored."""

from tunesmith.merge.rounding.grid import (
    Bfloat16Grid,
    Codes,
    Float8Codes,
    Grid,
    IntegerCodes,
    ScaledGrid,
    round_once,
)
from tunesmith.merge.rounding.hessian import (
    BLOCK,
    DenseHessian,
    Hessian,
    Indices,
    LowRankHessian,
    Walk,
    blocks,
    row_space,
    unit_upper_factor,
)
from tunesmith.merge.rounding.rounder import Feedback, Rounder, Stochastic
from tunesmith.merge.rounding.solve import round_to_grid

__all__ = [
    "BLOCK",
    "Bfloat16Grid",
    "Codes",
    "DenseHessian",
    "Feedback",
    "Float8Codes",
    "Grid",
    "Hessian",
    "Indices",
    "IntegerCodes",
    "LowRankHessian",
    "Rounder",
    "ScaledGrid",
    "Stochastic",
    "Walk",
    "blocks",
    "round_once",
    "round_to_grid",
    "row_space",
    "unit_upper_factor",
]
