"""Which rounding a tensor gets, by what is done to it and what it is stored in; and the rounder, made ready.

- ``nearest``: every tensor that is stored in anything but bf16, and every one that no low-rank update acts on: what is
  only copied, replaced, put in or stored anew is one rounding away from its exact value, and no update is lost in it.
- ``stochastic``: every tensor in bf16 that something is added to.
- ``faithful``: every tensor in bf16 with a low-rank update (DoRA's magnitude and other additions included): feedback
  within the row space of all its A's, with those of the modules that are given the same input while U stays narrow,
  H = 1 + 10·(I/M)·U·Uᵀ, where 1 is the identity.  A tensor of whose update rounding to nearest keeps nearly all
  (99.5 %; 98 % under a trained magnitude) is rounded to nearest.
- ``calibrated``: of these, the ones whose inputs X were recorded: H = XᵀX/N + m·(I/M)·U·Uᵀ + (m/1000)·1, m being the
  mean of XᵀX/N's diagonal.  The row space weighs as much in all as the inputs, because a rounding that looks at inputs
  alone still loses a part of a small update.  The others are ``faithful``.

Legend: I input features, M columns of U, N tokens, R rank, T rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tunesmith.adapter import Added, LowRank, Magnitude, Update
from tunesmith.checkpoint import Float64
from tunesmith.errors import CheckpointError
from tunesmith.merge.rounding import (
    DenseHessian,
    Feedback,
    Hessian,
    LowRankHessian,
    Rounder,
    Stochastic,
    row_space,
)

ROUNDINGS = ("nearest", "stochastic", "faithful", "calibrated", "calibrated-free")
CALIBRATED = ("calibrated", "calibrated-free")
FEEDBACK_WEIGHT = 10.0
WIDEST = 24  # columns of U in faithful rounding, whose price they are; beyond, a module's own A must do
ENOUGH = 0.995  # a gain of rounding to nearest from which on feedback has nothing to win and its price to lose
LESS_IF_SCALED = 0.015  # a trained magnitude's part of the update is not in A's row space, so feedback wins less
DAMPING = 1e-3
INPUTS_INDEX = "inputs.json"


def rounding_of(rounding: str, dtype: str, updates: Sequence[Update]) -> str:
    """How one tensor is rounded.

    Args:
        rounding: what was asked for, one of ``ROUNDINGS``.
        dtype: what the tensor is stored in.
        updates: what makes it.
    """
    low_rank = any(isinstance(update, LowRank) for update in updates)
    adds = low_rank or any(isinstance(update, Added | Magnitude) for update in updates)
    fits = dtype == "BF16" and (adds if rounding == "stochastic" else low_rank)
    return rounding if fits else "nearest"


def faithful(a_RI: Float64, beside_RI: Sequence[Float64] = ()) -> Feedback:
    """Feedback within the row space of an update.

    Args:
        a_RI: the A's of all its parts, one below the other.
        beside_RI: the A's of modules that are given the same input; their row spaces are kept too.
    """
    basis_IM, u_IM = directions(a_RI, beside_RI)
    # Σ e_k·u_k tells of the error in all of U's span, which the basis lies in.
    inside_of_state = basis_IM.T @ u_IM / np.einsum("im,im->m", u_IM, u_IM)
    return Feedback(LowRankHessian(u_IM), basis_IM=basis_IM, inside_of_state=inside_of_state)


def directions(a_RI: Float64, beside_RI: Sequence[Float64] = ()) -> tuple[Float64, Float64]:
    """Where an update acts, and U of H = 1 + U·Uᵀ, by which errors there weigh more.

    Args:
        a_RI: the A's of all its parts, one below the other.
        beside_RI: as for :func:`faithful`.

    Returns:
        An orthonormal basis of the row space of A, and U.
    """
    basis_IM = row_space(a_RI)
    space_IM = row_space(a_RI, *beside_RI) if beside_RI else basis_IM
    return basis_IM, FEEDBACK_WEIGHT**0.5 * _even(space_IM)


def _even(basis_IM: Float64) -> Float64:
    """A basis scaled so that U·Uᵀ weighs a column 1 on the mean, as the identity does."""
    columns, width = basis_IM.shape
    return np.asarray((columns / max(1, width)) ** 0.5 * basis_IM)


def stochastic(seed: int, name: str, a_RI: Float64 | None) -> Rounder:
    """Chance, with the row space told of where there is one."""
    return Stochastic(seed, name, basis_IM=None if a_RI is None else row_space(a_RI))


def calibrated(
    inputs_NI: Float64, steps_I: Float64, a_RI: Float64, beside_RI: Sequence[Float64] = (), *, clamp: bool
) -> Feedback:
    """Feedback weighted by the inputs that the module is given.

    Args:
        inputs_NI: the inputs of N tokens, float64.
        steps_I: mean over the rows of step², the distance of a stored number to the next, in every column.
        a_RI: the A's of the update.
        beside_RI: as for :func:`faithful`.
        clamp: whether only the two numbers that bracket the exact one may be taken.
    """
    hessian = hessian_of_inputs(inputs_NI, steps_I, row_space(a_RI, *beside_RI))
    return Feedback(hessian, basis_IM=row_space(a_RI), clamp=clamp)


def hessian_of_inputs(
    inputs_NI: Float64, steps_I: Float64, space_IM: Float64 | None = None, *, damping: float = DAMPING
) -> Hessian:
    """H = XᵀX/N + m·(I/M)·U·Uᵀ + damping·m·1, m being the mean of XᵀX/N's diagonal.

    Args:
        inputs_NI: X, the inputs of N tokens, float64.
        steps_I: mean over the rows of step², the distance of a stored number to the next, in every column.
        space_IM: U, an orthonormal basis of where an update acts; None for none.
        damping: what is added to the diagonal, of its mean.
    """
    tokens, columns = inputs_NI.shape
    squares_I = np.einsum("ni,ni->i", inputs_NI, inputs_NI) / tokens
    mean = max(float(squares_I.mean()), np.finfo(np.float64).tiny)
    damping = damping * mean
    # The columns whose errors cost most come first, so that all the others can make up for them.
    order = np.argsort(-(squares_I + damping) * steps_I, kind="stable")
    space_IM = np.zeros((columns, 0)) if space_IM is None else mean**0.5 * _even(space_IM)
    if tokens + space_IM.shape[1] < columns:
        u_IM = np.concatenate([inputs_NI.T / tokens**0.5, space_IM], axis=1) / damping**0.5
        return LowRankHessian(u_IM, order=order, revisited=columns)
    h_II = inputs_NI.T @ inputs_NI / tokens + space_IM @ space_IM.T
    h_II[np.diag_indices(columns)] += damping
    return DenseHessian(h_II, order=order)


def recorded_inputs(folder: str, module: str) -> Float64 | None:
    """The inputs of a module, (tokens, features), float64; None where none were recorded.

    Args:
        folder: holds ``inputs.json``, whose ``modules`` names the file of every module, and those files: NumPy's
            format, float32, (tokens, features).
        module: the module, as the adapter names it.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    name = _index(folder).get(module)
    if name is None:
        return None
    try:
        return np.asarray(np.load(Path(folder, name), allow_pickle=False), np.float64)
    except (OSError, ValueError) as error:
        raise CheckpointError("The recorded inputs cannot be read.", where=Path(folder, name), found=error) from error


def _index(folder: str) -> dict[str, str]:
    path = Path(folder, INPUTS_INDEX)
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))["modules"]
        return {str(module): str(name) for module, name in modules.items()}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError("The index of the recorded inputs cannot be read.", where=path, found=error) from error
