"""Rounding with feedback: each column is aimed so as to make up for the errors of others."""

from __future__ import annotations

import numpy as np

from tunesmith.checkpoint import Float64
from tunesmith.merge.rounding.grid import Grid
from tunesmith.merge.rounding.hessian import Hessian, blocks


def round_to_grid(t_TI: Float64, hessian: Hessian, grid: Grid, *, clamp: bool = True) -> Float64:
    """Round every row t to numbers q of a grid so that (q − t)·H·(q − t)ᵀ is small.

    The exact least is out of reach (it is the closest vector problem).  This walks the columns once, each aimed so as
    to make up for the errors before it, and the last of them a second time: :mod:`tunesmith.merge.rounding.hessian`.
    Rows do not know of each other.

    Args:
        t_TI: the exact values, float64, finite.
        hessian: H.
        grid: the numbers that can be stored.
        clamp: choose between the two numbers that bracket the exact value; else any number, the nearest to where it
            is best aimed.

    Returns:
        The rounded values, (T, I), float64.
    """
    rows, columns = t_TI.shape
    t_IT = np.ascontiguousarray(t_TI.T if hessian.order is None else t_TI.T[hessian.order])
    q_IT, e_IT = np.empty((columns, rows)), np.zeros((columns, rows))
    state = hessian.begin(rows)
    order = np.arange(columns) if hessian.order is None else hessian.order
    walks = [(hessian.first, 0)] + [(hessian.again, columns - hessian.revisited)] * (hessian.revisited > 0)
    for walk, begin in walks:
        if walk is hessian.again:
            state = hessian.turn(state, e_IT)
        for start, stop in blocks(columns, begin):
            part = slice(start, stop)
            before_BT = e_IT[part].copy()
            aim_BT = t_IT[part] - walk.shift(state, start, stop, before_BT)
            q_IT[part] = _round_block(
                t_IT[part], aim_BT, e_IT[part], walk.within(start, stop), grid.at(order[part]), clamp=clamp
            )
            walk.take(state, start, stop, e_IT[part] - before_BT)
    if hessian.order is not None:
        ordered_IT, q_IT = q_IT, np.empty_like(q_IT)
        q_IT[hessian.order] = ordered_IT
    return q_IT.T


def _round_block(
    t_BT: Float64, aim_BT: Float64, e_BT: Float64, within_BB: Float64, grid: Grid, *, clamp: bool
) -> Float64:
    """Round one block, column by column, and write its errors over those that it had."""
    q_BT = np.empty_like(t_BT)
    below_BT, above_BT, threshold_BT = grid.bracket(t_BT)
    for j in range(len(t_BT)):
        aim_T = aim_BT[j] - within_BB[:, j] @ e_BT
        if clamp:
            q_BT[j] = np.where(aim_T > threshold_BT[j], above_BT[j], below_BT[j])
        else:
            q_BT[j] = grid.row(j).nearest(aim_T)
        np.subtract(q_BT[j], t_BT[j], out=e_BT[j])
    return q_BT
