"""The base's layout seen in files that are laid out otherwise: other names, fewer rows, experts fused into stacks.

A block of a stack is a contiguous range of its bytes, and so are some of a block's rows.  Whatever a tensor of the base
is within such a range is therefore a tensor with other offsets, and nothing is read to see it so.  Where a
transposition stands between the two, or where the base's tensor would have to be put together of several, there is no
such range.

Legend: E experts, I the width inside of them, H the width outside.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tunesmith.checkpoint import Array, Checkpoint, Header, TensorInfo, read_rows
from tunesmith.record import Finding, Value

Shapes = Mapping[str, tuple[int, ...] | None]
Views = dict[str, list[TensorInfo]]

# The three matrices of an expert, in the spellings that are in use: (gate, up, down).
_SPLIT = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_ONE = re.compile(r"^(?P<parent>.+)\.(?P<expert>\d+)\.(?P<leaf>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$")

# A stack's name, and which matrices of each of its experts lie in a block, one under the other: Transformers in memory,
# vLLM, and mlx-lm.
_STACKS: Mapping[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate", "up"),
    "w13_weight": ("gate", "up"),
    "gate_proj": ("gate",),
    "up_proj": ("up",),
    "down_proj": ("down",),
    "w1": ("gate",),
    "w3": ("up",),
    "w2": ("down",),
    "w2_weight": ("down",),
}
_STACK = re.compile(rf"^(?P<parent>.+)\.(experts|switch_mlp)\.(?P<leaf>{'|'.join(_STACKS)})(\.weight)?$")


class Respelled(Checkpoint):
    """A model whose tensors go by other names, or are cut otherwise, than in its files.

    Args:
        model: the model.
        views: what some of its tensors are seen as, each a range of the tensor's own bytes, by its own name.
    """

    def __init__(self, model: Checkpoint, views: Mapping[str, Sequence[TensorInfo]]) -> None:
        self.path, self.config = model.path, model.config
        self.shards = {file: _seen(header, views) for file, header in model.shards.items()}
        self._files = {name: file for file, header in self.shards.items() for name in header.tensors}
        self._infos = {name: self.shards[file].tensors[name] for name, file in self._files.items()}

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by its other name."""
        return self._infos

    def shard_of(self, name: str) -> str:
        """The file that holds a tensor."""
        return self._files[name]

    def info(self, name: str) -> TensorInfo:
        """Where a tensor lies."""
        return self._infos[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Read rows of a tensor as stored."""
        return read_rows(self.shards[self._files[name]], name, start, stop)


def _seen(header: Header, views: Mapping[str, Sequence[TensorInfo]]) -> Header:
    seen = [view for name, info in header.tensors.items() for view in views.get(name, [info])]
    return replace(header, tensors={info.name: info for info in seen})


@dataclass(frozen=True)
class _Experts:
    """The experts of one layer as the base has them, each in tensors of its own.

    Attributes:
        parent: what their names begin with, up to the expert's number.
        names: for each of gate, up and down, what it is called.
        shapes: and the shape that it should have, (I, H) or (H, I).
        count: E.
    """

    parent: str
    names: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    count: int

    def name(self, expert: int, part: str) -> str:
        """One matrix."""
        return f"{self.parent}.{expert}.{self.names[part]}.weight"


def with_experts_apart(merged: Checkpoint, expected: Shapes) -> tuple[Checkpoint, list[Finding], set[str]]:
    """See stacks of experts as the base's separate ones.

    Args:
        merged: the model.
        expected: the tensors that it should have, with their shapes.

    Returns:
        The model by the base's layout as far as bytes allow; what was seen (a layout in which the base's numbers are no
        ranges of bytes is an error that names it); and the tensors of either side that this error is about.
    """
    missing = {name: shape for name, shape in expected.items() if name not in merged.tensors and shape is not None}
    extra = [info for name, info in merged.tensors.items() if name not in expected]
    layers = {_root(parent): experts for parent, experts in _split_experts(missing).items()}
    views: Views = {}
    findings: list[Finding] = []
    aside: set[str] = set()
    for info in extra:
        match = _STACK.match(info.name)
        experts = layers.get(_root(f"{match['parent']}.experts")) if match else None
        if match is None or experts is None or len(info.shape) != 3:
            continue
        parts = _STACKS[match["leaf"]]
        rows, columns = sum(experts.shapes[part][0] for part in parts), experts.shapes[parts[0]][1]
        if info.shape == (experts.count, rows, columns):
            views[info.name] = _blocks(info, experts, parts)
        elif info.shape == (experts.count, columns, rows):
            aside |= {info.name, *(experts.name(e, part) for e in range(experts.count) for part in parts)}
            params: dict[str, Value] = {"name": info.name, "found": str(list(info.shape)), "rows": rows}
            findings = findings or [Finding(code="experts_transposed", severity="error", params=params)]
    if views:
        params = {"count": len(views), "name": next(iter(views))}
        findings.append(Finding(code="experts_fused", severity="info", params=params))
    renamed = _renamed(extra, missing)
    if renamed:
        findings.append(Finding(code="tensors_renamed", severity="info", params={"count": len(renamed)}))
    named = {view.name for seen in renamed.values() for view in seen}
    joined, pieces = _joined(
        [info for info in extra if info.name not in renamed], {n: missing[n] for n in missing if n not in named}
    )
    views |= renamed
    return (Respelled(merged, views) if views else merged), findings + joined, aside | pieces


def _split_experts(missing: Mapping[str, tuple[int, ...]]) -> dict[str, _Experts]:
    """The layers whose experts are all missing as tensors of their own."""
    found: dict[str, dict[int, dict[str, tuple[int, ...]]]] = {}
    for name, shape in missing.items():
        match = _ONE.match(name)
        if match is not None and len(shape) == 2:
            found.setdefault(match["parent"], {}).setdefault(int(match["expert"]), {})[match["leaf"]] = shape
    layers = {}
    for parent, members in found.items():
        names = next((three for three in _SPLIT if set(three) == set(members[min(members)])), None)
        alike = all(shapes == members[min(members)] for shapes in members.values())
        if names is not None and alike and set(members) == set(range(len(members))):
            shapes = members[0]
            parts = dict(zip(("gate", "up", "down"), names, strict=True))
            layers[parent] = _Experts(parent, parts, {p: shapes[leaf] for p, leaf in parts.items()}, len(members))
    return layers


def _root(parent: str) -> str:
    """A layer's experts whatever prefix goes before the layers."""
    return re.sub(r"^.*?(?=(layers|h|blocks)\.\d+\.)", "", parent)


def _blocks(info: TensorInfo, experts: _Experts, parts: Sequence[str]) -> list[TensorInfo]:
    """The matrices that lie in a stack, expert by expert."""
    row_bytes = info.size_bytes // (info.shape[0] * info.shape[1])
    views, begin = [], info.begin
    for expert in range(experts.count):
        for part in parts:
            shape = experts.shapes[part]
            end = begin + shape[0] * row_bytes
            views.append(TensorInfo(experts.name(expert, part), info.dtype, shape, begin, end))
            begin = end
    return views


def _renamed(extra: Sequence[TensorInfo], missing: Mapping[str, tuple[int, ...]]) -> Views:
    """Stacks that are the base's own but for ``.weight`` at the end, or for what they are called within the layer."""
    names = {(_root(f"{m['parent']}."), m["leaf"]): name for name in missing if (m := _STACK.match(name))}
    views: Views = {}
    for info in extra:
        match = _STACK.match(info.name)
        name = names.get((_root(f"{match['parent']}."), match["leaf"])) if match else None
        if name is not None and info.shape == missing[name]:
            views[info.name] = [replace(info, name=name)]
    return views


def _joined(extra: Sequence[TensorInfo], missing: Mapping[str, tuple[int, ...]]) -> tuple[list[Finding], set[str]]:
    """Stacks of the base that lie here in tensors of their own, or whose gate and up lie apart."""
    stacks = {name: shape for name, shape in missing.items() if _STACK.match(name) and len(shape) == 3}
    pieces = [info.name for info in extra if _ONE.match(info.name) or _STACK.match(info.name)]
    if not stacks or not pieces:
        return [], set()
    name, shape = next(iter(stacks.items()))
    params: dict[str, Value] = {"name": name, "expected": str(list(shape)), "piece": pieces[0], "count": len(pieces)}
    return [Finding(code="experts_apart", severity="error", params=params)], {*stacks, *pieces}
