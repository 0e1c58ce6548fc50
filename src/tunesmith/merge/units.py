"""The work as a list of units: independent of each other, repeatable, and made of paths and numbers alone.

A unit is a contiguous range of one output file.  It can run in any thread, process or machine that sees the files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tunesmith.adapter import Added, Binding, Copied, LowRank, Magnitude, Replaced, Update, beside
from tunesmith.checkpoint import BaseView, Checkpoint, TensorInfo, ViewKind
from tunesmith.merge.layout import OutputFile

UNIT_BYTES = 64 << 20


@dataclass(frozen=True)
class TensorTask:
    """One tensor to compute.

    Attributes:
        info: where it goes, in which dtype and shape.
        updates: what makes it.
        source: the file of the base's tensor that it begins as; None where the adapter stores it whole.
        source_info: where that tensor lies there.
        view: how it is seen, as QLoRA training saw it; None for as it is stored.
        beside: updates of other tensors that are given the same input; rounding may take account of them.
    """

    info: TensorInfo
    updates: tuple[Update, ...]
    source: str | None = None
    source_info: TensorInfo | None = None
    view: ViewKind | None = None
    beside: tuple[LowRank, ...] = ()

    @cached_property
    def matrix(self) -> tuple[int, int]:
        """The tensor as a matrix, (rows, columns): its first dimension, or its blocks' rows, by all the others."""
        shape = self.info.shape
        if self.block_rows is not None:
            return shape[0] * shape[1], math.prod(shape[2:])
        return (shape[0], math.prod(shape[1:])) if shape else (1, 1)

    @cached_property
    def block_rows(self) -> int | None:
        """Rows of one block, where updates are of single blocks."""
        in_blocks = any(isinstance(update, LowRank) and update.block is not None for update in self.updates)
        return self.info.shape[1] if in_blocks else None

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one row of the matrix, as it is written."""
        rows = self.matrix[0]
        return self.info.size_bytes // rows if rows else 0

    @property
    def adds(self) -> bool:
        """Whether anything is added to what the tensor begins as, so that rounding can lose some of it."""
        return any(isinstance(update, LowRank | Added | Magnitude) for update in self.updates)

    @property
    def whole(self) -> bool:
        """Whether its rows depend on all of it: a norm of every column."""
        return any(isinstance(update, Magnitude) and update.per == "column" for update in self.updates)


@dataclass(frozen=True)
class Copy:
    """Bytes of another file.

    Attributes:
        source: that file.
        offset: where they begin there.
        begin: where they go.
        count: how many.
    """

    source: str
    offset: int
    begin: int
    count: int


@dataclass(frozen=True)
class Literal:
    """Bytes at the start of the file: its header."""

    data: bytes
    begin: int = 0

    @property
    def count(self) -> int:
        """How many."""
        return len(self.data)


@dataclass(frozen=True)
class Compute:
    """Rows ``start:stop`` of a tensor's matrix."""

    task: TensorTask
    start: int
    stop: int

    @property
    def begin(self) -> int:
        """Where they go."""
        return self.task.info.begin + self.start * self.task.row_bytes

    @property
    def count(self) -> int:
        """How many bytes they take."""
        return (self.stop - self.start) * self.task.row_bytes


Piece = Copy | Literal | Compute


@dataclass(frozen=True)
class Context:
    """What all units of a merge share.

    Attributes:
        base: the base's directory.
        adapters: directory and weight of every adapter.
        rounding: how to round what has a low-rank update: see :mod:`tunesmith.merge.rounders`.
        seed: of stochastic rounding.
        inputs: the directory of recorded inputs, for calibrated rounding.
        compiled: whether to use the compiled arithmetic; the bytes are the same.
        fingerprint: two units of one fingerprint read the same inputs, and may share what they know of them.
    """

    base: str
    adapters: tuple[tuple[str, float], ...]
    rounding: str = "nearest"
    seed: int = 0
    inputs: str | None = None
    compiled: bool = False
    fingerprint: str = ""


@dataclass(frozen=True)
class Unit:
    """One unit of work.

    Attributes:
        target: the file to write into; it is there, at its full size.
        begin: offset of the first byte to write.
        end: offset just past the last.
        pieces: what to write, without a gap.
        context: what all units of a merge share.
    """

    target: str
    begin: int
    end: int
    pieces: tuple[Piece, ...]
    context: Context


def pieces_of(
    files: Sequence[OutputFile], base: Checkpoint, binding: Binding, *, view: BaseView | None = None
) -> Iterator[tuple[OutputFile, list[Piece]]]:
    """All that makes each file, in the order of its bytes; what can be copied in one go is one piece.

    Args:
        files: the layout.
        base: the base model.
        binding: what the adapters make of it.
        view: how the base is seen; None for as it is stored.

    Yields:
        A file and its pieces.
    """
    updates, neighbours = binding.by_name, beside(binding)  # once: a mixture of experts has tens of thousands
    for file in files:
        yield file, _pieces_of(file, base, updates, neighbours, view=view)


def _pieces_of(
    file: OutputFile,
    base: Checkpoint,
    updates: Mapping[str, tuple[Update, ...]],
    neighbours: Mapping[str, tuple[LowRank, ...]],
    *,
    view: BaseView | None,
) -> list[Piece]:
    pieces: list[Piece] = []
    if file.layout_of is None:
        pieces.append(Literal(file.header))
    else:
        pieces.append(Copy(str(base.shards[file.layout_of].path), 0, 0, len(file.header)))
    for info in file.tensors:
        piece = piece_of(info, base, updates.get(info.name, ()), neighbours.get(info.name, ()), view=view)
        last = pieces[-1]
        if isinstance(piece, Copy) and isinstance(last, Copy) and _continues(last, piece):
            pieces[-1] = Copy(last.source, last.offset, last.begin, last.count + piece.count)
        elif piece.count:
            pieces.append(piece)
    return pieces


def piece_of(
    info: TensorInfo,
    base: Checkpoint,
    updates: tuple[Update, ...],
    neighbours: tuple[LowRank, ...],
    *,
    view: BaseView | None,
) -> Copy | Compute:
    """What makes one tensor's bytes.

    Args:
        info: where it goes, in which dtype and shape.
        base: the base model.
        updates: what makes it.
        neighbours: updates of the tensors that are given the same input.
        view: how the base is seen; None for as it is stored.
    """
    task = task_of(info, base, updates, neighbours, view=view)
    source, path = task.source_info, task.source
    same = source is not None and source.dtype == info.dtype and not task.view
    if source is not None and path and same and all(isinstance(update, Copied) for update in updates):
        return Copy(path, source.begin, info.begin, info.size_bytes)
    return Compute(task, 0, task.matrix[0])


def task_of(
    info: TensorInfo,
    base: Checkpoint,
    updates: tuple[Update, ...],
    neighbours: tuple[LowRank, ...],
    *,
    view: BaseView | None,
) -> TensorTask:
    """What makes one tensor, whether or not that is more than a copy; arguments as for :func:`piece_of`."""
    if any(isinstance(update, Replaced) for update in updates):
        return TensorTask(info, updates)
    origin = next((update.source for update in updates if isinstance(update, Copied)), info.name)
    source, path = base.info(origin), str(base.shards[base.shard_of(origin)].path)
    viewed = view.kind if view is not None and view.applies_to(base, origin) else None
    return TensorTask(info, updates, path, source, viewed, neighbours)


def _continues(last: Copy, piece: Copy) -> bool:
    return last.source == piece.source and last.offset + last.count == piece.offset


def cut(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, ...]]:
    """Cut a file's pieces into units of about ``UNIT_BYTES``; a tensor's rows part only where they may."""
    unit: list[Piece] = []
    room = UNIT_BYTES
    for piece in pieces:
        rest: Piece | None = piece
        while rest is not None:
            first, rest = _part(rest, room, may_grow=not unit)
            if first is not None:
                unit.append(first)
                room -= first.count
            if rest is not None or room <= 0:
                yield tuple(unit)
                unit, room = [], UNIT_BYTES
    if unit:
        yield tuple(unit)


def _part(piece: Piece, room: int, *, may_grow: bool) -> tuple[Piece | None, Piece | None]:
    """What of a piece fits, and the rest; ``may_grow`` where the unit is empty, so that something must go in."""
    if piece.count <= room:
        return piece, None
    if isinstance(piece, Copy) and room > 0:
        rest = Copy(piece.source, piece.offset + room, piece.begin + room, piece.count - room)
        return Copy(piece.source, piece.offset, piece.begin, room), rest
    if isinstance(piece, Compute) and not piece.task.whole:
        rows = max(room // piece.task.row_bytes, int(may_grow))
        stop = min(piece.start + rows, piece.stop)
        head = Compute(piece.task, piece.start, stop) if stop > piece.start else None
        return head, Compute(piece.task, stop, piece.stop) if stop < piece.stop else None
    return (piece, None) if may_grow else (None, piece)


def in_parts(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """A file's pieces, none larger than what a unit holds where that may be."""
    return (piece for unit in cut(pieces) for piece in unit)


def units_of(
    files: Sequence[OutputFile],
    base: Checkpoint,
    binding: Binding,
    *,
    stage: Path,
    context: Context,
    view: BaseView | None = None,
    whole: bool = False,
) -> list[Unit]:
    """Every unit of a merge, file by file, in the order of their bytes.

    Args:
        files: the layout.
        base: the base model.
        binding: what the adapters make of it.
        stage: the directory to write into.
        context: what all units share.
        view: how the base is seen; None for as it is stored.
        whole: whether a file is one unit, as a storage's is written in order.
    """
    units = []
    for file, all_pieces in pieces_of(files, base, binding, view=view):
        for pieces in [tuple(in_parts(all_pieces))] if whole else cut(all_pieces):
            begin, last = pieces[0].begin, pieces[-1]
            units.append(
                Unit(
                    target=str(stage / file.filename),
                    begin=begin,
                    end=last.begin + last.count,
                    pieces=pieces,
                    context=context,
                )
            )
    return units
