"""From exact numbers to numbers that can be stored."""

from tunesmith.merge.rounding.grid import Bfloat16Grid, Grid, round_once
from tunesmith.merge.rounding.hessian import (
    BLOCK,
    DenseHessian,
    Hessian,
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
    "DenseHessian",
    "Feedback",
    "Grid",
    "Hessian",
    "LowRankHessian",
    "Rounder",
    "Stochastic",
    "Walk",
    "blocks",
    "round_once",
    "round_to_grid",
    "row_space",
    "unit_upper_factor",
]
