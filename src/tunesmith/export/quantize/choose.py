"""Which tensors are quantized: the weights of Linear layers that are known to be such, and no others.

A loader quantizes every Linear layer that ``ignore`` does not name.  So what is not known to be one is named there,
which does no harm where it is none.

What stays as it is:

- the output head, also where it is tied to the embeddings, and the embeddings: few numbers, and the most harm;
- experts: a loader that computes them side by side holds them in one tensor, which is no Linear layer, and whether one
  reads quantized experts depends on the loader;
- routers and gates, which choose the experts;
- vision and audio towers and what joins them to the text model;
- what is not known by its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tunesmith.checkpoint import FLOAT_DTYPES, Checkpoint, QuantizedScheme, TensorInfo, is_linear_weight
from tunesmith.errors import CheckpointError, OutputError
from tunesmith.export.quantize.schemes import GROUP_SIZES
from tunesmith.record import Finding, Value

_HEAD = "lm_head"
_EXPERT = re.compile(r"(^|\.)(experts?|block_sparse_moe|shared_experts?)(\.|$)")
_TOWER = re.compile(r"(^|\.)(vision|visual|audio|image|speech)[a-z_]*\.|(^|\.)(multi_modal_projector|mm_projector)\.")
_TOWER_PATTERN = r"re:.*(^|\.)((vision|visual|audio|image|speech)[a-z_]*|multi_modal_projector|mm_projector)\..*"
_EXPERT_PATTERN = r"re:.*(^|\.)(experts?|block_sparse_moe|shared_experts?)\..*"


@dataclass(frozen=True)
class Choice:
    """What is quantized and what is not.

    Attributes:
        quantized: names of the tensors that are, in their order.
        ignore: the Linear layers, or what may be one, that are not; names, and expressions after ``re:``.
        findings: what of it the user should know.
    """

    quantized: tuple[str, ...]
    ignore: tuple[str, ...]
    findings: tuple[Finding, ...]


def choose(model: Checkpoint, tensors: Mapping[str, TensorInfo], scheme: QuantizedScheme) -> Choice:
    """Choose the tensors to quantize.

    Args:
        model: the base, whose configuration and names tell.
        tensors: dtype and shape of every tensor of the merged model.
        scheme: how they are to be stored.

    Raises:
        CheckpointError: the model is quantized already, is an encoder with a decoder, or none of its tensors is known
            to be a Linear layer's.
        OutputError: a group is no divisor of some tensor's columns; those that are, are named.
    """
    _check_form(model)
    matrices = [name for name, info in tensors.items() if len(info.shape) >= 2 and name.endswith(".weight")]
    quantized, kept = [], []
    experts, towers, unknown = 0, 0, []
    for name in matrices:
        linear = name in model.tensors and is_linear_weight(model, name)
        known = linear is True and len(tensors[name].shape) == 2 and tensors[name].dtype in FLOAT_DTYPES
        if _EXPERT.search(name):
            experts += 1
        elif _TOWER.search(name):
            towers += 1
        elif known:
            quantized.append(name)
        else:
            kept.append(name.removesuffix(".weight"))
            unknown += [name] if linear is None else []
    experts += sum(1 for name, info in tensors.items() if len(info.shape) == 3 and _EXPERT.search(name))
    if not quantized:
        raise CheckpointError(
            "None of the model's tensors is known to be the weight of a Linear layer, so there is nothing to quantize.",
            where=model.path,
            details=unknown[:10],
        )
    _check_groups(quantized, tensors, scheme)
    patterns = [_EXPERT_PATTERN] * bool(experts) + [_TOWER_PATTERN] * bool(towers)
    ignore = tuple(dict.fromkeys([_HEAD, *kept, *patterns]))
    return Choice(tuple(quantized), ignore, tuple(_findings(experts, towers, unknown)))


def _check_form(model: Checkpoint) -> None:
    section = model.config.get("quantization_config")
    if section:
        raise CheckpointError(
            "The model is quantized already; to quantize it again would round every weight twice.",
            where=model.path / "config.json",
            found=section.get("quant_method") if isinstance(section, dict) else section,
            next_step="give the full-precision model, or the run with --base naming it",
        )
    if model.config.get("is_encoder_decoder"):
        raise CheckpointError(
            "An encoder with a decoder cannot be quantized here: which of its layers bear it is not known.",
            where=model.path / "config.json",
            found=model.config.get("model_type"),
        )


def _check_groups(names: Iterable[str], tensors: Mapping[str, TensorInfo], scheme: QuantizedScheme) -> None:
    size = scheme.group_size
    if size is None:
        return
    columns = {name: tensors[name].shape[1] for name in names}
    wrong = [f"{name}: {count} columns" for name, count in columns.items() if count % size]
    if wrong:
        fitting = [other for other in GROUP_SIZES if not any(count % other for count in columns.values())]
        raise OutputError(
            "The groups do not divide the columns of some tensors.",
            where=f"--scheme int{scheme.bits}:{size}",
            expected=" or ".join([*(f"int{scheme.bits}:{other}" for other in fitting), "int8"]),
            found=f"{len(wrong)} tensors",
            details=wrong[:5],
            next_step=f"pass --scheme {f'int{scheme.bits}:{fitting[0]}' if fitting else 'int8'}",
        )


def _findings(experts: int, towers: int, unknown: Sequence[str]) -> Iterable[Finding]:
    if experts:
        yield Finding(code="quantize_experts_kept", severity="warning", params={"tensors": experts})
    if towers:
        yield Finding(code="quantize_towers_kept", severity="info", params={"tensors": towers})
    if unknown:
        params: dict[str, Value] = {"tensors": len(unknown), "first": unknown[0]}
        yield Finding(code="quantize_unknown_kept", severity="warning", params=params)
