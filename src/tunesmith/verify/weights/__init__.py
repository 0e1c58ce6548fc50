"""Level 3: every element of every tensor, recomputed in float64."""

from tunesmith.verify.weights.check import FEW_ELEMENTS, Tally, check_weights, classify, matrix_of, strays, tally_rows
from tunesmith.verify.weights.expected import Expectation, Expected, Matrix, StartView, Tile
from tunesmith.verify.weights.rounding import UNIT_ROUNDOFF, to_dtype, with_neighbours

__all__ = [
    "Expectation",
    "Expected",
    "FEW_ELEMENTS",
    "Matrix",
    "StartView",
    "Tally",
    "Tile",
    "UNIT_ROUNDOFF",
    "check_weights",
    "classify",
    "matrix_of",
    "strays",
    "tally_rows",
    "to_dtype",
    "with_neighbours",
]
