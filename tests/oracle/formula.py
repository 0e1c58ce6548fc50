"""The float64 closed form of a merge, written as plainly as can be, from the adapter's file and the base's alone.

It reads nothing of ``tunesmith.adapter``.  What a reader of an adapter must find out, such as a module's scaling or
whether a tied head stays tied, is told to it by hand, one :class:`Truth` a kind.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.merge.exact import FORMATS, TORCH, raw_bytes

Tensors = dict[str, Tensor]
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings")


def same(name: str) -> str:
    """A module whose name in memory is its name on disk."""
    return name


@dataclass(frozen=True)
class Truth:
    """What is so of one kind of adapter, said by hand.

    Attributes:
        scaling: of a module, by its name in memory.
        inner_scaling: of the inner parameter of experts, where it is not the outer one's.
        disk: a module's name on disk, by its name in memory.
        conv1d: ends of the names of the modules that are stored as (in, out).
        tied: what becomes of a head that was tied to the embedding; None where none was, or nothing touches either.
        head: what the head of a tied base is called on disk, where it has to be written.
        tokens: which rows the trained tokens are, by the module's last name.
        experts: which parameter ``experts.lora_A`` is of, and which ``experts.base_layer.lora_A`` is of.
        family: how the disk keeps the experts.
        layers: which old layer every new one began as, where layers are replicated.
        config: what ``config.json`` must say of the result, by dotted key.
    """

    scaling: Callable[[str], float] = lambda _: 6 / 4
    inner_scaling: float | None = None
    disk: Callable[[str], str] = same
    conv1d: tuple[str, ...] = ()
    tied: Literal["stays", "unties"] | None = None
    head: str = "lm_head.weight"
    tokens: dict[str, list[int]] | None = None
    experts: tuple[str, str | None] | None = None
    family: Literal["mixtral", "qwen", "gpt-oss"] | None = None
    layers: list[int] | None = None
    config: dict[str, object] | None = None


def read(directory: Path) -> Tensors:
    """Every tensor under a directory, as stored."""
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 to a binary format, ties to even, in one step: the nearest multiple of the last place's unit."""
    if dtype == torch.float64:
        return values
    name = next(name for name, torch_dtype in TORCH.items() if torch_dtype == dtype)
    digits, least, greatest = FORMATS[name]
    numbers = values.double().numpy()
    _, exponent = np.frexp(numbers)  # numbers = m · 2**exponent with 1/2 <= |m| < 1
    unit = np.ldexp(1.0, np.maximum(exponent, least + 1) - digits)
    nearest = np.rint(numbers / unit) * unit  # both steps are exact, for the unit is a power of two
    if not (np.abs(nearest) < 2.0 ** (greatest + 1)).all():
        raise OverflowError(name)
    return torch.from_numpy(nearest).to(dtype)


def low_rank(b: Tensor, a: Tensor) -> Tensor:
    """B·A as a matrix, or as a convolution's kernel when A is one."""
    a, b = a.double(), b.double()
    return torch.einsum("or,r...->o...", b.reshape(b.shape[:2]), a)


def dora(v: Tensor, magnitude: Tensor, *, dim: int) -> Tensor:
    """DoRA's W' = m / ‖V‖ · V, the norm taken over all but one dimension."""
    others = [axis for axis in range(v.ndim) if axis != dim]
    shape = [-1 if axis == dim else 1 for axis in range(v.ndim)]
    return magnitude.double().reshape(shape) / (v * v).sum(dim=others, keepdim=True).sqrt() * v


def expert(b: Tensor, a: Tensor, *, number: int, experts: int) -> Tensor:
    """One expert's B·A, of factors that PEFT laid side by side: A by blocks of rows, B by every n-th column."""
    r = a.shape[0] // experts
    return b.double()[:, number::experts] @ a.double()[number * r : (number + 1) * r]


def neighbours(values: Tensor) -> tuple[Tensor, Tensor]:
    """The largest bf16 number that is not above each value, and the smallest that is not below it, as float64."""
    nearest = round_once(values, torch.bfloat16)
    down, up = (torch.nextafter(nearest, torch.full_like(nearest, end)).double() for end in (-torch.inf, torch.inf))
    nearest = nearest.double()
    return torch.where(nearest > values, down, nearest), torch.where(nearest < values, up, nearest)


def merge(base: Tensors, adapter: Tensors, truth: Truth) -> dict[str, Tensor]:
    """All tensors of the merged model.

    Args:
        base: as stored.
        adapter: as stored.
        truth: what is so of this kind.

    Returns:
        Each in the dtype of the base, rounded once where it changes and as stored where it does not.
    """
    dtype = next(tensor.dtype for tensor in base.values() if tensor.is_floating_point())
    base, out = exact(base, adapter, truth)
    return {
        name: base[name] if name in base and torch.equal(base[name].double(), tensor) else round_once(tensor, dtype)
        for name, tensor in out.items()
    }


def exact(base: Tensors, adapter: Tensors, truth: Truth) -> tuple[Tensors, dict[str, Tensor]]:
    """The base as it begins, its layers written out; and all tensors of the merged model in float64, not rounded."""
    base = base if truth.layers is None else replicate(base, truth.layers)
    parts: dict[str, Tensors] = {}
    for name, tensor in adapter.items():
        module, part = split(name)
        parts.setdefault(module, {})[part] = tensor
    before = {name: tensor.double() for name, tensor in base.items()}
    out = dict(before)
    if truth.tied:
        begin_tied(out, parts, truth)
    for module, tensors in parts.items():
        if module.endswith(".experts"):
            stacked(out, module, tensors, truth)
        elif not (truth.tied == "stays" and module == "lm_head"):
            apply(out, module, tensors, truth)
    if truth.config and "architectures" in truth.config:
        out.pop("lm_head.weight", None)  # a classifier has another head
    return base, out


def begin_tied(out: dict[str, Tensor], parts: dict[str, Tensors], truth: Truth) -> None:
    """What a tied embedding and its head are before the adapter: one tensor, the adapter's own where that grew."""
    name = next(name for name in out if name.endswith(tuple(f"{end}.weight" for end in EMBEDDINGS)))
    out[name] = next(iter(wrapped(parts)), out[name])
    if truth.tied == "unties":
        out[truth.head] = out[name].clone()


def wrapped(parts: dict[str, Tensors]) -> list[Tensor]:
    """The embedding or the head as it is under a wrapper, where the adapter's file holds it."""
    marks = ("base_layer.weight", "token_adapter.base_layer.weight", "original_module.weight")
    ends = (*EMBEDDINGS, "lm_head")
    return [p[mark].double() for module, p in parts.items() if module.endswith(ends) for mark in marks if mark in p]


def split(name: str) -> tuple[str, str]:
    """The module and the rest of a tensor's name; the rest begins with ``inner.`` under another wrapper's."""
    name = name.removeprefix("base_model.model.").replace(".default", "").replace("vector.weight", "vector")
    wrapper = re.search(
        r"\.(lora_|token_adapter\.|base_layer\.(weight|bias)$|modules_to_save\.|original_module\.)", name
    )
    at = wrapper.start() if wrapper else name.rindex(".")
    module, part = name[:at], name[at + 1 :]
    if module.endswith(".base_layer"):
        return module.removesuffix(".base_layer"), f"inner.{part}"
    return module, part


def apply(out: dict[str, Tensor], module: str, parts: Tensors, truth: Truth) -> None:
    """Change one module's tensors: what it starts from, then what is added, then DoRA's magnitude."""
    s = truth.scaling(module)
    weight, bias = truth.disk(module) + ".weight", truth.disk(module) + ".bias"
    for start in ("base_layer.weight", "token_adapter.base_layer.weight", "weight", "modules_to_save.weight"):
        if start in parts:
            out[weight] = parts[start].double()
    for start in ("bias", "base_layer.bias", "modules_to_save.bias"):
        if start in parts:
            out[bias] = parts[start].double()
    if "token_adapter.trainable_tokens_delta" in parts:
        rows = (truth.tokens or {})[module.rsplit(".", 1)[-1]]
        out[weight] = out[weight].clone()
        out[weight][rows] = parts["token_adapter.trainable_tokens_delta"].double()
    dim = 0
    if "lora_A.weight" in parts:
        delta = low_rank(parts["lora_B.weight"], parts["lora_A.weight"])
        if truth.conv1d and module.endswith(truth.conv1d):
            delta, dim = delta.T, 1
        out[weight] = out[weight] + s * delta
    if "lora_embedding_A" in parts:
        out[weight] = out[weight] + s * low_rank(parts["lora_embedding_B"], parts["lora_embedding_A"]).T
        dim = 1
    if "lora_B.bias" in parts:
        out[bias] = out[bias] + s * parts["lora_B.bias"].double()
    if "lora_magnitude_vector" in parts:
        out[weight] = dora(out[weight], parts["lora_magnitude_vector"], dim=dim)


def stacked(out: dict[str, Tensor], module: str, parts: Tensors, truth: Truth) -> None:
    """Change the experts of one layer, each where the file has it."""
    assert truth.experts
    outer, inner = truth.experts
    s = truth.scaling(module)
    for parameter, prefix in ((outer, ""), (inner, "inner.")):
        if parameter is None:
            continue
        a, b = parts[f"{prefix}lora_A.weight"], parts[f"{prefix}lora_B.weight"]
        if prefix and truth.inner_scaling:
            s = truth.inner_scaling
        for number in range(4):
            add_expert(out, truth, module, parameter, number, s * expert(b, a, number=number, experts=4))


def add_expert(out: dict[str, Tensor], truth: Truth, module: str, parameter: str, number: int, delta: Tensor) -> None:
    """Add one expert's change: gpt-oss keeps a stack of (in, out); the others one matrix a projection."""
    name = truth.disk(module)
    if truth.family == "gpt-oss":
        whole = out[f"{name}.{parameter}"].clone()
        whole[number] += delta.T
        out[f"{name}.{parameter}"] = whole
        return
    names = {"mixtral": ("w1", "w3", "w2"), "qwen": ("gate_proj", "up_proj", "down_proj")}[truth.family or ""]
    gate, up, down = (f"{name}.{number}.{projection}.weight" for projection in names)
    if parameter == "down_proj":
        out[down] = out[down] + delta
    else:
        half = delta.shape[0] // 2
        out[gate], out[up] = out[gate] + delta[:half], out[up] + delta[half:]


def replicate(base: Tensors, layers: list[int]) -> Tensors:
    """The base with its layers laid out anew."""
    out = {name: tensor for name, tensor in base.items() if ".layers." not in name}
    for new, old in enumerate(layers):
        for name, tensor in base.items():
            if f".layers.{old}." in name:
                out[name.replace(f".layers.{old}.", f".layers.{new}.")] = tensor
    return out


def assert_same(found: Tensors, expected: Tensors) -> None:
    """Say every tensor that differs, and how; pass when the bytes of all are the same."""
    problems = [f"missing: {name}" for name in expected.keys() - found.keys()]
    problems += [f"too many: {name}" for name in found.keys() - expected.keys()]
    for name in sorted(expected.keys() & found.keys()):
        ours, theirs = found[name], expected[name]
        if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            problems.append(f"{name}: {ours.dtype} {list(ours.shape)}, not {theirs.dtype} {list(theirs.shape)}")
        elif raw_bytes(ours.reshape(-1)) != raw_bytes(theirs.reshape(-1)):
            gap = (ours.double() - theirs.double()).abs()
            problems.append(f"{name}: {int((gap > 0).sum())} of {gap.numel()} differ, by up to {float(gap.max()):.3g}")
    assert not problems, "\n".join(problems)
