"""Adapters on parameters that are no layer's weight: mixtures of experts, above all (PEFT's ``target_parameters``).

PEFT adapts a stack of E matrices with one A of (r·E, in) and one B of (out, r·E).  Expert e has the rows e·r … e·r+r−1
of A, and *every E-th* column of B, from e on (``ParamWrapper.get_delta_weight``).  Several adapted parameters of one
module are wrappers in each other; the parameter that the module registers first lies innermost.

transformers 5 fuses experts in memory and splits them when it saves, so that the disk may hold either form; gate lies
before up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.adapter.config import listed
from tunesmith.adapter.records import Span
from tunesmith.checkpoint import TensorInfo

# As the modules of transformers register them: what leads into an expert before what leads out of it.
_REGISTERED = (
    "gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "w13_weight", "w1", "w3", "fc1",
    "down_proj", "down_proj_bias", "w2_weight", "w2", "fc2",
)  # fmt: skip
_SPLIT = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))

# Their experts are stored as (E, in, out), which PEFT reads from the module's ``is_transposed``.
_STORED_IN_OUT = {"gpt_oss", "aria", "openai_privacy_filter"}


@dataclass(frozen=True)
class Piece:
    """A base tensor that holds (a part of) one matrix of a stack.

    Attributes:
        name: the base's tensor.
        block: index of the matrix in a fused tensor; None where the tensor is one matrix.
        rows: first and last row, of the matrix in memory, that it holds; None for all.
    """

    name: str
    block: int | None = None
    rows: Span | None = None


@dataclass(frozen=True)
class Stacked:
    """A parameter as the model in memory has it.

    Attributes:
        shape: (E, X, Y).
        pieces: for every expert, where its matrix is on disk.
    """

    shape: tuple[int, int, int]
    pieces: tuple[tuple[Piece, ...], ...]


def registered_order(parameter: str) -> int:
    """Where a module registers a parameter, among its others."""
    return _REGISTERED.index(parameter) if parameter in _REGISTERED else len(_REGISTERED)


def targeted_parameters(config: Mapping[str, Any], module: str) -> list[str]:
    """The parameters of a module that ``target_parameters`` names, innermost first."""
    names = {
        target.rpartition(".")[2]
        for target in listed(config, "target_parameters")
        if _names(target, module, target.rpartition(".")[2])
    }
    return sorted(names, key=registered_order)


def _names(target: str, module: str, parameter: str) -> bool:
    full = f"{module}.{parameter}"
    return full == target or full.endswith(f".{target}")


def stacked_parameters(tensors: Mapping[str, TensorInfo], module: str) -> dict[str, Stacked]:
    """The stacks of a module, by the names that they have in memory, whichever way they lie on disk.

    Args:
        tensors: the base's.
        module: the module as the base spells it, such as ``model.layers.0.mlp.experts``.
    """
    prefix = f"{module}."
    own = {name[len(prefix) :]: info for name, info in tensors.items() if name.startswith(prefix)}
    found = {}
    for leaf, info in own.items():
        if "." not in leaf and len(info.shape) == 3:
            experts = range(info.shape[0])
            pieces = tuple((Piece(info.name, block=e),) for e in experts)
            found[leaf] = Stacked((info.shape[0], info.shape[1], info.shape[2]), pieces)
        elif "." not in leaf and len(info.shape) == 2:
            found[leaf] = Stacked((1, info.shape[0], info.shape[1]), ((Piece(info.name),),))
    for gate, up, down in _SPLIT:
        found.update(_from_split(own, gate, up, down))
    return found


def _from_split(own: Mapping[str, TensorInfo], gate: str, up: str, down: str) -> dict[str, Stacked]:
    """``gate_up_proj`` and ``down_proj``, of experts that lie in tensors of their own."""
    numbers = {int(match[1]) for leaf in own if (match := re.fullmatch(rf"(\d+)\.{down}\.weight", leaf))}
    if not numbers or numbers != set(range(len(numbers))):
        return {}
    experts = [[own.get(f"{e}.{leaf}.weight") for leaf in (gate, up, down)] for e in range(len(numbers))]
    if any(info is None or len(info.shape) != 2 for three in experts for info in three):
        return {}
    known = [[info for info in three if info is not None] for three in experts]
    if len({tuple(info.shape for info in three) for three in known}) != 1:
        return {}
    (inner, width), (second, _), (outer, depth) = (info.shape for info in known[0])
    gate_up = tuple(
        (Piece(three[0].name, rows=(0, inner, 1)), Piece(three[1].name, rows=(inner, inner + second, 1)))
        for three in known
    )
    return {
        "gate_up_proj": Stacked((len(known), inner + second, width), gate_up),
        "down_proj": Stacked((len(known), outer, depth), tuple((Piece(three[2].name),) for three in known)),
    }


def orientations(a_shape: Sequence[int], b_shape: Sequence[int], stack: Stacked) -> set[bool]:
    """Whether B·A can be a matrix of the stack as it is (False) or transposed (True); both where it is square."""
    _, x, y = stack.shape
    inner, outer = a_shape[1], b_shape[0]
    return ({False} if (outer, inner) == (x, y) else set()) | ({True} if (outer, inner) == (y, x) else set())


def transposed_by_version(model_type: object, peft_version: object) -> bool | None:
    """Which way PEFT of that version adapts square matrices; None where that is not known.

    0.18 takes every parameter for (E, in, out); 0.19.0 swaps those that are so; 0.19.1 and later swap the others.
    """
    numbers = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", peft_version) if isinstance(peft_version, str) else None
    stored_in_out = model_type in _STORED_IN_OUT
    if numbers is None:
        return None
    version = tuple(int(number or 0) for number in numbers.groups())
    if version < (0, 19, 0):
        return True
    return not stored_in_out if version < (0, 19, 1) else stored_in_out
