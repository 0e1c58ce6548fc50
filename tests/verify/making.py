"""A model, adapters and merges of every kind, written by hand: torch's float64 formulas, and nothing of Tunesmith's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from tunesmith.adapter import Added, Binding, Copied, LowRank, Magnitude, Replaced, Rows, Stack, Update
from tunesmith.checkpoint import Checkpoint
from tunesmith.progress import Cancellation, no_progress
from tunesmith.verify.records import TensorVerdict
from tunesmith.verify.weights.check import check_weights
from tunesmith.verify.weights.expected import Expectation

Tensors = dict[str, torch.Tensor]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_PATTERN = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}

LINEAR, TURNED, EMBEDDING, CONV = "lin.weight", "turned.weight", "embed_tokens.weight", "conv.weight"
EXPERTS, BIAS, NORM, HEAD, SCORE = "experts.gate_up", "lin.bias", "norm.weight", "lm_head.weight", "score.weight"
R, SCALING, MORE = 4, 1.5, 0.7
EXPERT_COUNT, GATE = 3, 10


def random(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers in float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def make_base(dtype: torch.dtype) -> Tensors:
    """Tensors of every shape that an adapter knows, and two that no arithmetic is for."""
    plain = {
        LINEAR: random(48, 40, seed=1, scale=0.1),
        TURNED: random(40, 48, seed=2, scale=0.1),
        EMBEDDING: random(300, 256, seed=3, scale=0.1),  # more than one tile
        CONV: random(12, 8, 3, 3, seed=4, scale=0.1),
        EXPERTS: random(EXPERT_COUNT, 2 * GATE, 16, seed=5, scale=0.1),
        BIAS: random(48, seed=6, scale=0.1),
        NORM: random(40, seed=7) + 1,
    }
    whole = {"positions": torch.arange(32).reshape(1, 32), "mask": torch.arange(64, dtype=torch.uint8)}
    return {**{name: tensor.to(dtype) for name, tensor in plain.items()}, **whole}


def round_once(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 to a dtype, to the nearest and ties to even: the best of three neighbours, by their distance."""
    near = exact.float().to(dtype)
    patterns = near.view(_PATTERN[dtype]).to(torch.int64)
    lowest = -(1 << (8 * near.element_size() - 1))
    ordered = torch.where(patterns < 0, lowest - patterns, patterns)
    best, distance = near.double(), torch.full(exact.shape, float("inf"), dtype=torch.float64)
    taken = torch.zeros_like(patterns)
    for step in (0, -1, 1):
        moved = ordered + step
        raw = torch.where(moved < 0, lowest - moved, moved)
        value = raw.to(_PATTERN[dtype]).view(dtype).double()
        gap = (value - exact).abs()
        better = (gap < distance) | ((gap == distance) & (raw % 2 == 0) & (taken % 2 != 0))
        best, distance = torch.where(better, value, best), torch.where(better, gap, distance)
        taken = torch.where(better, raw, taken)
    return best.to(dtype)


@dataclass
class Kind:
    """One kind of update.

    Attributes:
        tensors: the adapters' files, one dictionary an adapter.
        updates: the binding's updates.
        exact: what the base becomes, float64, tensor by tensor.
        shapes: of what is new or resized.
        dropped: what is gone.
    """

    tensors: list[Tensors]
    updates: list[Update]
    exact: Callable[[Tensors], Tensors]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()


def _factors(module: str, rows: int, columns: tuple[int, ...], *, seed: int, prefix: str = "lora_") -> Tensors:
    return {
        f"base_model.model.{module}.{prefix}A.weight": random(R, *columns, seed=seed, scale=0.07),
        f"base_model.model.{module}.{prefix}B.weight": random(
            rows, R, *(1 for _ in columns[1:]), seed=seed + 1, scale=0.07
        ),
    }


def _low_rank(name: str, module: str, *, adapter: int = 0, scaling: float = SCALING, **more: object) -> LowRank:
    key = f"base_model.model.{module}.lora_"
    return LowRank(
        name=name, module=module, r=R, scaling=scaling, lora_A=f"{key}A.weight", lora_B=f"{key}B.weight",
        adapter=adapter, **more,
    )  # fmt: skip


def _product(tensors: Tensors, module: str) -> torch.Tensor:
    key = f"base_model.model.{module}.lora_"
    a, b = tensors[f"{key}A.weight"].double(), tensors[f"{key}B.weight"].double()
    return b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1)


def plain() -> Kind:
    """W + s·B·A."""
    tensors = _factors("lin", 48, (40,), seed=10)
    exact = lambda base: {LINEAR: base[LINEAR].double() + SCALING * _product(tensors, "lin")}  # noqa: E731
    return Kind([tensors], [_low_rank(LINEAR, "lin")], exact)


def transposed() -> Kind:
    """A layer that is stored the other way round."""
    tensors = _factors("turned", 48, (40,), seed=12)
    exact = lambda base: {TURNED: base[TURNED].double() + SCALING * _product(tensors, "turned").T}  # noqa: E731
    return Kind([tensors], [_low_rank(TURNED, "turned", transposed=True)], exact)


def convolution() -> Kind:
    """A kernel of 3 × 3."""
    tensors = _factors("conv", 12, (8, 3, 3), seed=14)

    def exact(base: Tensors) -> Tensors:
        return {CONV: base[CONV].double() + SCALING * _product(tensors, "conv").reshape(12, 8, 3, 3)}

    return Kind([tensors], [_low_rank(CONV, "conv")], exact)


def two_adapters() -> Kind:
    """Two updates of one tensor, with weights."""
    first, second = _factors("lin", 48, (40,), seed=10), _factors("lin", 48, (40,), seed=16)

    def exact(base: Tensors) -> Tensors:
        both = SCALING * _product(first, "lin") + MORE * _product(second, "lin")
        return {LINEAR: base[LINEAR].double() + both}

    updates: list[Update] = [_low_rank(LINEAR, "lin"), _low_rank(LINEAR, "lin", adapter=1, scaling=MORE)]
    return Kind([first, second], updates, exact)


def experts() -> Kind:
    """Fused experts: A's rows lie expert by expert, B's columns are interleaved."""
    tensors = {
        "base_model.model.experts.lora_A.weight": random(EXPERT_COUNT * R, 16, seed=18, scale=0.07),
        "base_model.model.experts.lora_B.weight": random(2 * GATE, R * EXPERT_COUNT, seed=19, scale=0.07),
    }
    a, b = (tensors[f"base_model.model.experts.lora_{side}.weight"].double() for side in "AB")

    def exact(base: Tensors) -> Tensors:
        parts = [b[:, e::EXPERT_COUNT] @ a[e * R : (e + 1) * R] for e in range(EXPERT_COUNT)]
        return {EXPERTS: base[EXPERTS].double() + SCALING * torch.stack(parts)}

    cuts = [
        {"block": e, "A_rows": (e * R, (e + 1) * R, 1), "B_columns": (e, R * EXPERT_COUNT, EXPERT_COUNT)}
        for e in range(EXPERT_COUNT)
    ]
    return Kind([tensors], [_low_rank(EXPERTS, "experts", **cut) for cut in cuts], exact)


def one_expert() -> Kind:
    """An update of the second of three."""
    tensors = _factors("experts", 2 * GATE, (16,), seed=20)

    def exact(base: Tensors) -> Tensors:
        result = base[EXPERTS].double().clone()
        result[1] += SCALING * _product(tensors, "experts")
        return {EXPERTS: result}

    return Kind([tensors], [_low_rank(EXPERTS, "experts", block=1)], exact)


def dora(name: str = LINEAR, module: str = "lin") -> Kind:
    """The trained magnitude m / ‖V‖ · V, of every output feature."""
    rows, columns = {LINEAR: (48, (40,)), TURNED: (48, (40,)), CONV: (12, (8, 3, 3))}[name]
    turned = name == TURNED
    tensors = _factors(module, rows, columns, seed=22)
    key = f"base_model.model.{module}.lora_magnitude_vector"
    tensors[key] = random(rows, seed=24).abs() + 0.5

    def exact(base: Tensors) -> Tensors:
        delta = SCALING * _product(tensors, module)
        v = base[name].double().reshape(base[name].shape[0], -1) + (delta.T if turned else delta)
        scaled = tensors[key].double() / v.norm(dim=0 if turned else 1)
        return {name: (v * (scaled if turned else scaled[:, None])).reshape(base[name].shape)}

    magnitude = Magnitude(name=name, module=module, tensor=key, per="column" if turned else "row")
    return Kind([tensors], [_low_rank(name, module, transposed=turned), magnitude], exact)


def dora_embedding() -> Kind:
    """A magnitude of every hidden dimension, which takes a pass over several tiles first."""
    tensors = _factors("embed_tokens", 256, (300,), seed=26)
    key = "base_model.model.embed_tokens.lora_magnitude_vector"
    tensors[key] = random(256, seed=28).abs() + 0.5

    def exact(base: Tensors) -> Tensors:
        v = base[EMBEDDING].double() + SCALING * _product(tensors, "embed_tokens").T
        return {EMBEDDING: v * (tensors[key].double() / v.norm(dim=0))}

    magnitude = Magnitude(name=EMBEDDING, module="embed_tokens", tensor=key, per="column")
    return Kind([tensors], [_low_rank(EMBEDDING, "embed_tokens", transposed=True), magnitude], exact)


def bias() -> Kind:
    """A bias on lora_B: b + s·b′."""
    tensors = {**_factors("lin", 48, (40,), seed=10), "base_model.model.lin.lora_B.bias": random(48, seed=30)}

    def exact(base: Tensors) -> Tensors:
        added = SCALING * tensors["base_model.model.lin.lora_B.bias"].double()
        return {
            LINEAR: base[LINEAR].double() + SCALING * _product(tensors, "lin"),
            BIAS: base[BIAS].double() + added,
        }

    added = Added(name=BIAS, module="lin", tensor="base_model.model.lin.lora_B.bias", scaling=SCALING)
    return Kind([tensors], [_low_rank(LINEAR, "lin"), added], exact)


def saved() -> Kind:
    """A norm that was trained whole, and a head that the base does not have."""
    tensors = {
        "base_model.model.norm.weight": random(40, seed=32) + 1,
        "base_model.model.score.weight": random(3, 40, seed=33),
    }
    updates: list[Update] = [
        Replaced(name=NORM, module="norm", tensor="base_model.model.norm.weight"),
        Replaced(name=SCORE, module="score", tensor="base_model.model.score.weight"),
    ]
    norm, score = (tensor.double() for tensor in tensors.values())
    return Kind([tensors], updates, lambda _: {NORM: norm, SCORE: score}, {SCORE: (3, 40)})


def token_rows() -> Kind:
    """Rows in two tiles of the embedding."""
    key = "base_model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    tensors, indices = {key: random(3, 256, seed=34)}, (299, 0, 7)

    def exact(base: Tensors) -> Tensors:
        result = base[EMBEDDING].double().clone()
        result[list(indices)] = tensors[key].double()
        return {EMBEDDING: result}

    return Kind([tensors], [Rows(name=EMBEDDING, module="embed_tokens", tensor=key, indices=indices)], exact)


def resized() -> Kind:
    """A longer embedding, with a low-rank update and trained rows on top."""
    key = "base_model.model.embed_tokens.base_layer.weight"
    rows = "base_model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    tensors = {
        **_factors("embed_tokens", 256, (304,), seed=36),
        key: random(304, 256, seed=38, scale=0.1),
        rows: random(2, 256, seed=39),
    }

    def exact(_: Tensors) -> Tensors:
        start = tensors[key].double().clone()
        start[[301, 302]] = tensors[rows].double()
        return {EMBEDDING: start + SCALING * _product(tensors, "embed_tokens").T}

    updates: list[Update] = [
        _low_rank(EMBEDDING, "embed_tokens", transposed=True),
        Rows(name=EMBEDDING, module="embed_tokens", tensor=rows, indices=(301, 302)),
        Replaced(name=EMBEDDING, module="embed_tokens", tensor=key),
    ]
    return Kind([tensors], updates, exact, {EMBEDDING: (304, 256)})


def untied() -> Kind:
    """A head that was the embedding's, with an update of its own; and a tensor that is gone."""
    tensors = _factors("lm_head", 300, (256,), seed=40)

    def exact(base: Tensors) -> Tensors:
        return {HEAD: base[EMBEDDING].double() + SCALING * _product(tensors, "lm_head")}

    updates: list[Update] = [Copied(name=HEAD, source=EMBEDDING), _low_rank(HEAD, "lm_head")]
    return Kind([tensors], updates, exact, {HEAD: (300, 256)}, dropped=(NORM,))


KINDS: dict[str, Callable[[], Kind]] = {
    "plain": plain,
    "transposed": transposed,
    "convolution": convolution,
    "two-adapters": two_adapters,
    "experts": experts,
    "one-expert": one_expert,
    "dora": dora,
    "dora-conv1d": lambda: dora(TURNED, "turned"),
    "dora-convolution": lambda: dora(CONV, "conv"),
    "dora-embedding": dora_embedding,
    "bias": bias,
    "saved": saved,
    "token-rows": token_rows,
    "resized": resized,
    "untied": untied,
}


class Bench:
    """One kind on one base, on disk.

    Args:
        root: an empty directory.
        kind: the kind.
        dtype: of the base, and of merges.

    Attributes:
        base: the base's tensors.
        exact: what the merged model's float tensors are, float64, those that the adapter leaves alone too.
        expectation: what verify recomputes.
    """

    def __init__(self, root: Path, kind: Kind, dtype: torch.dtype) -> None:
        self.root, self.kind, self.dtype = root, kind, dtype
        self.base = make_base(dtype)
        (root / "base").mkdir(parents=True)
        self._write(root / "base", self.base)
        for number, tensors in enumerate(kind.tensors):
            directory = root / f"adapter-{number}"
            directory.mkdir()
            save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
            config = {
                "peft_type": "LORA",
                "r": R,
                "lora_alpha": R * SCALING,
                "use_dora": any("magnitude" in name for name in tensors),
                "lora_bias": any(name.endswith("lora_B.bias") for name in tensors),
                "target_parameters": ["experts.gate_up"] if any("experts" in name for name in tensors) else None,
                "trainable_token_indices": [0] if any("trainable_tokens" in name for name in tensors) else None,
            }
            (directory / "adapter_config.json").write_text(json.dumps(config))
        stack = Stack([(root / f"adapter-{number}", 1.0) for number in range(len(kind.tensors))])
        binding = Binding(updates=tuple(kind.updates), shapes=kind.shapes, dropped=kind.dropped)
        self.binding = binding
        self.expectation = Expectation(Checkpoint(root / "base"), stack, binding)
        kept = {name: tensor for name, tensor in self.base.items() if name not in kind.dropped}
        self.exact = {name: tensor.double() for name, tensor in kept.items() if tensor.is_floating_point()}
        self.exact |= kind.exact(self.base)
        self.whole = {name: tensor for name, tensor in kept.items() if not tensor.is_floating_point()}

    def merge(self, change: Callable[[Tensors], object] = lambda _: None, *, dtype: torch.dtype | None = None) -> Path:
        """Write the merge, rounded once, with whatever ``change`` makes of its tensors."""
        tensors = {name: round_once(exact, dtype or self.dtype) for name, exact in self.exact.items()} | self.whole
        change(tensors)
        out = self.root / f"merged-{len(list(self.root.iterdir()))}"
        out.mkdir()
        self._write(out, tensors)
        return out

    def verdicts(self, out: Path) -> tuple[TensorVerdict, ...]:
        """The weights level."""
        return check_weights(Checkpoint(out), self.expectation, progress=no_progress, cancellation=Cancellation())

    def outside(self, change: Callable[[Tensors], object]) -> dict[str, int]:
        """Elements outside, by tensor, of a changed merge."""
        return {verdict.name: verdict.outside for verdict in self.verdicts(self.merge(change)) if verdict.outside}

    def _write(self, directory: Path, tensors: Tensors) -> None:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True}))


def nudge(name: str, index: int, steps: int) -> Callable[[Tensors], None]:
    """Move one element by so many values of its dtype, away from zero."""

    def change(tensors: Tensors) -> None:
        tensor = tensors[name]
        tensor.view(-1).view(_PATTERN[tensor.dtype])[index] += steps

    return change
