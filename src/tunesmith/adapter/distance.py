"""How far one adapter is from another: ``distance``, of updates that are never formed.

Near-equal adapters are the rule (two checkpoints of one run), and ‖Δ₁‖² − 2⟨Δ₁,Δ₂⟩ + ‖Δ₂‖² would lose all digits there.
Of equal ranks the difference is B₁A₁ − B₂A₂ = (B₁ − B₂)A₁ + B₂(A₁ − A₂), each B times its scaling, whose terms are as
small as the difference itself.  Where the terms cancel all the same (one update in two bases), or the ranks differ, the
triangular factors of [B₁ −B₂] and [A₁; A₂]ᵀ give it to the last digits.
"""

from __future__ import annotations

import filecmp
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from tunesmith.adapter.factors import has_product, inner_product, matrices
from tunesmith.adapter.load import Adapted, Adapter
from tunesmith.adapter.records import AdapterDistance
from tunesmith.checkpoint import FLOAT_DTYPES, Float64
from tunesmith.errors import AdapterError

_CANCELLED = 1e-8
"""A squared norm below this share of its terms has lost half of float64's digits."""

_READ_ELEMENTS = 1 << 20


def distance(one: Adapter, other: Adapter) -> AdapterDistance:
    """How far one adapter is from another.

    Args:
        one: an adapter, such as an earlier checkpoint's.
        other: what it is measured by, such as the last one's.

    Returns:
        The distance; of equal files 0, without any arithmetic.
    """
    if _equal(one, other):
        return AdapterDistance(relative=0.0, cosine=1.0, whole=0.0 if _whole(one) else None, equal=True)
    updates = _Updates(one, other)
    try:
        relative, cosine = updates.relative_and_cosine()
    except AdapterError:  # NaN or infinity
        relative, cosine = None, None
    ours, theirs = _whole(one), _whole(other)
    both = [name for name in ours if name in theirs and _shape(one, ours[name]) == _shape(other, theirs[name])]
    try:
        whole = _whole_distance((one, [ours[name] for name in both]), (other, [theirs[name] for name in both]))
    except AdapterError:
        whole = None
    return AdapterDistance(
        relative=relative,
        cosine=cosine,
        whole=whole,
        only_in_one=(*updates.only(updates.ours), *(name for name in ours if name not in both)),
        only_in_other=(*updates.only(updates.theirs), *(name for name in theirs if name not in both)),
    )


_Key = tuple[str, int, str | None, bool]


@dataclass
class _Updates:
    """The low-rank updates of two adapters, pair by pair."""

    one: Adapter
    other: Adapter
    ours: dict[_Key, Adapted] = field(init=False)
    theirs: dict[_Key, Adapted] = field(init=False)
    shared: list[_Key] = field(init=False)

    def __post_init__(self) -> None:
        self.ours, self.theirs = _pairs(self.one), _pairs(self.other)
        self.shared = [key for key in self.ours if key in self.theirs and self._fit(key)]

    def only(self, pairs: dict[_Key, Adapted]) -> list[str]:
        """The modules of those that the other side lacks."""
        return [key[0] for key in pairs if key not in self.shared]

    def relative_and_cosine(self) -> tuple[float | None, float | None]:
        """‖Δ₁ − Δ₂‖ / ‖Δ₂‖, and the cosine between the two.

        Raises:
            AdapterError: a factor holds NaN or infinity.
        """
        gaps, ones, others, inners = [], [], [], []
        for key in self.shared:
            ours, theirs = self.ours[key], self.theirs[key]
            for (a1, b1), (a2, b2) in zip(matrices(self.one, ours), matrices(self.other, theirs), strict=True):
                b1, b2 = ours.scaling * b1, theirs.scaling * b2
                gaps.append(_gap_squared(a1, b1, a2, b2))
                ones.append(inner_product(a1, b1, a1, b1))
                others.append(inner_product(a2, b2, a2, b2))
                inners.append(inner_product(a1, b1, a2, b2))
        alone = list(self._alone(self.one, self.ours)), list(self._alone(self.other, self.theirs))
        one, other = math.fsum([*ones, *alone[0]]), math.fsum([*others, *alone[1]])
        gap = math.fsum([*gaps, *alone[0], *alone[1]])
        relative = math.sqrt(gap / other) if other > 0 else None
        cosine = math.fsum(inners) / math.sqrt(one) / math.sqrt(other) if one > 0 and other > 0 else None
        return relative, None if cosine is None else max(-1.0, min(1.0, cosine))

    def _alone(self, adapter: Adapter, pairs: dict[_Key, Adapted]) -> Iterator[float]:
        for key, adapted in pairs.items():
            if key not in self.shared:
                for a, b in matrices(adapter, adapted):
                    yield adapted.scaling**2 * inner_product(a, b, a, b)

    def _fit(self, key: _Key) -> bool:
        ours, theirs = self.ours[key], self.theirs[key]
        inputs = [_shape(adapter, pair.lora_A)[1:] for adapter, pair in ((self.one, ours), (self.other, theirs))]
        outputs = [_shape(adapter, pair.lora_B)[:1] for adapter, pair in ((self.one, ours), (self.other, theirs))]
        return inputs[0] == inputs[1] and outputs[0] == outputs[1] and ours.stacked == theirs.stacked


def _gap_squared(a1: Float64, b1: Float64, a2: Float64, b2: Float64) -> float:
    """‖B₁A₁ − B₂A₂‖²."""
    (c, d), (e, f) = ((a1, b1 - b2), (a1 - a2, b2)) if a1.shape == a2.shape else ((a1, b1), (a2, -b2))
    terms = inner_product(c, d, c, d) + inner_product(e, f, e, f)
    total = terms + 2 * inner_product(c, d, e, f)
    if total >= _CANCELLED * terms:
        return max(total, 0.0)
    b_triangle, a_triangle = (_triangle(wide) for wide in (np.hstack([b1, -b2]), np.vstack([a1, a2]).T))
    return float(np.sum(np.square(b_triangle @ a_triangle.T)))


def _triangle(matrix: Float64) -> Float64:
    return np.asarray(np.linalg.qr(matrix, mode="r"), dtype=np.float64)


def _pairs(adapter: Adapter) -> dict[_Key, Adapted]:
    return {
        (adapted.module, adapted.depth, adapted.parameter, adapted.embedding): adapted
        for adapted in adapter.adapted
        if has_product(adapter, adapted)
    }


def _whole(adapter: Adapter) -> dict[str, str]:
    """Tensors that are stored whole and can be computed with, by what they are."""
    found = {
        f"{key.module}.trainable_tokens" if key.part == "tokens" else key.target: key.tensor for key in adapter.whole
    }
    for adapted in adapter.adapted:
        for part, tensor in (("lora_magnitude_vector", adapted.magnitude), ("lora_bias", adapted.bias)):
            if tensor is not None:
                found[f"{adapted.module}.{part}"] = tensor
    infos = adapter.header.tensors
    return {name: tensor for name, tensor in found.items() if infos[tensor].dtype in FLOAT_DTYPES}


def _whole_distance(one: tuple[Adapter, list[str]], other: tuple[Adapter, list[str]]) -> float | None:
    gaps, others = [], []
    for ours, theirs in zip(one[1], other[1], strict=True):
        shape = _shape(one[0], ours)
        rows = shape[0] if shape else 0
        step = max(1, _READ_ELEMENTS // max(1, math.prod(shape[1:])))
        for start in range(0, rows, step):
            span = (start, min(rows, start + step), 1)
            first, second = one[0].finite(ours, span), other[0].finite(theirs, span)
            gaps.append(float(np.sum(np.square(first - second))))
            others.append(float(np.sum(np.square(second))))
    total = math.fsum(others)
    return math.sqrt(math.fsum(gaps) / total) if total > 0 else None


def _shape(adapter: Adapter, tensor: str) -> tuple[int, ...]:
    return adapter.header.tensors[tensor].shape


def _equal(one: Adapter, other: Adapter) -> bool:
    """Whether the two are one: the same bytes, read under the same configuration."""
    if one.config != other.config or one.header.tensors != other.header.tensors:
        return False
    first, second = one.header.path, other.header.path
    return first.samefile(second) or filecmp.cmp(first, second, shallow=False)
