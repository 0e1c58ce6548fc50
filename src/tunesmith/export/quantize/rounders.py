"""Which rounding a quantized tensor gets, and what decides it: the weights of columns for its scales, and the Hessian.

- ``nearest``: the largest absolute value decides a scale, codes are to nearest.
- ``faithful``: without data.  At 4 bits scales of either sign, which reach further:
  :func:`tunesmith.export.quantize.scales.scales_of`.  At 8 bits what ``nearest`` does, for nothing without data was
  found nearer: feedback within the update's row space, as a merge's faithful rounding has it, came to a KL of 0.0020
  in place of 0.0018, with a search for scales and without one.
- ``calibrated``: of the layers whose inputs X were recorded, scales are searched for by the weights that X gives the
  columns, codes feed back by H = XᵀX/N + (m/100)·1, m being the mean of its diagonal (https://arxiv.org/abs/2210.17323),
  and take any code, not only the two that bracket the exact value.

Legend: I input features, M columns of U, N tokens, T rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tunesmith.checkpoint import Float64, QuantizedScheme
from tunesmith.merge import (
    ExactRows,
    Hessian,
    hessian_of_inputs,
    recorded_inputs,
    row_space,
)

ROUNDINGS = ("nearest", "faithful", "calibrated")
CALIBRATED = "calibrated"
DAMPING = 1e-2
FINE_BITS = 8


@dataclass(frozen=True)
class Rule:
    """How one tensor is rounded.

    Attributes:
        name: ``nearest``, ``faithful`` or ``calibrated``.
        weights_I: what scales are searched by; None for not at all.
        signed: whether scales may be negative.
        hessian: what codes feed back by; None for codes to nearest.
        basis_IM: an orthonormal basis of the update's row space; None where there is no update.
    """

    name: str
    weights_I: Float64 | None = None
    signed: bool = False
    hessian: Hessian | None = None
    basis_IM: Float64 | None = None


def rule_of(
    rounding: str, rows: ExactRows, scheme: QuantizedScheme, *, inputs: str | None = None, module: str = ""
) -> Rule:
    """How a tensor is rounded.

    Args:
        rounding: what was asked for, one of ``ROUNDINGS``.
        rows: the tensor.
        scheme: how it is stored.
        inputs: the folder of recorded inputs, for calibrated rounding.
        module: the tensor's layer, as that folder names it.
    """
    columns, a_RI = rows.shape[1], rows.a_RI
    basis_IM = None if a_RI is None else row_space(a_RI)
    inputs_NI = recorded_inputs(inputs, module) if rounding == CALIBRATED and inputs is not None else None
    coarse = scheme.bits < FINE_BITS and not scheme.is_float
    if inputs_NI is not None and inputs_NI.shape[1] == columns:
        squares_I = np.einsum("ni,ni->i", inputs_NI, inputs_NI) / len(inputs_NI)
        weights_I = squares_I + DAMPING * max(float(squares_I.mean()), np.finfo(np.float64).tiny)
        hessian = hessian_of_inputs(inputs_NI, np.ones(columns), damping=DAMPING)
        return Rule("calibrated", weights_I, coarse, hessian, basis_IM)
    if coarse and rounding != "nearest":
        return Rule("faithful", signed=True, basis_IM=basis_IM)
    return Rule("nearest", basis_IM=basis_IM)
