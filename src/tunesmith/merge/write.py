"""Carry out a plan: independent units of work, each writing one shard and handing back its receipt."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.adapter import Adapter, LowRank
from tunesmith.allocator import keep_freed_memory
from tunesmith.checkpoint import (
    CONFIG_FILE,
    Checkpoint,
    Header,
    as_float64,
    copy_range,
    read_header,
    read_json_object,
    read_rows,
    sha256_of,
    staged_directory,
    write_at,
)
from tunesmith.errors import CheckpointError
from tunesmith.merge.plan import TILE_ELEMENTS, shards_of
from tunesmith.merge.records import Merged, MergePlan, Receipt, ShardPlan, TensorFidelity
from tunesmith.merge.tiles import TileSums, merge_tile
from tunesmith.progress import Cancellation, Progress, ProgressCallback, no_progress


@dataclass(frozen=True)
class ShardUnit:
    """One unit of work: paths and numbers only, so that it can run anywhere and be run again.

    Attributes:
        source: the base's shard.
        target: the file to write.
        adapter: the adapter's directory.
        updates: what changes in it.
    """

    source: str
    target: str
    adapter: str
    updates: tuple[LowRank, ...]


def merge(
    plan: MergePlan, *, progress: ProgressCallback = no_progress, cancellation: Cancellation | None = None
) -> Merged:
    """Carry out a plan.  The target appears whole at the end, or not at all.

    Args:
        plan: what :func:`plan_merge` found.
        progress: told of bytes written.
        cancellation: read between tiles.

    Returns:
        What was written, and what rounding kept of the update.

    Raises:
        Cancelled: stopped on request; nothing is left behind.
        OutputError: the disk is full or cannot be written; nothing is left behind.
        CheckpointError: a tensor is not finite, or does not stay finite in its dtype; or the base or the adapter is
            no longer what was planned with.
    """
    started = time.monotonic()
    _check_unchanged(plan)
    cancellation = cancellation or Cancellation()
    failed = Cancellation()  # our own: the caller's flag is theirs to set
    total = sum(shard.size_bytes for shard in plan.shards)
    done = 0
    lock = threading.Lock()  # shards are written side by side, and their bytes are reported one after another

    def wrote(count: int, detail: str) -> None:
        nonlocal done
        with lock:
            done += count
            progress(Progress("merge", done, total, "bytes", detail))
        cancellation.check()
        failed.check()

    with staged_directory(Path(plan.out), force=plan.force) as stage:
        units = [_unit(plan, shard, stage) for shard in plan.shards]
        with ThreadPoolExecutor(max_workers=min(len(units), os.cpu_count() or 1)) as pool:
            try:
                receipts = tuple(pool.map(lambda unit: write_shard(unit, wrote), units))
            except BaseException:
                failed.cancel()  # so that the other units stop before their directory goes
                raise
        for asset in plan.assets:
            (stage / asset.filename).write_bytes(Path(asset.source).read_bytes())
        # Last, so that a directory without it was never finished.
        (stage / CONFIG_FILE).write_text(_config(Path(plan.base)), encoding="utf-8")
    return _merged(plan, receipts, time.monotonic() - started)


def write_shard(unit: ShardUnit, wrote: Callable[[int, str], None]) -> Receipt:
    """Write one shard: the base's header and untouched tensors as they are, the others tile by tile.

    Args:
        unit: what to write.
        wrote: called with the bytes of each piece and the tensor it belongs to.

    Returns:
        The file's receipt.
    """
    keep_freed_memory()
    header = read_header(unit.source)
    adapter = Adapter(unit.adapter)
    updates = {update.name: update for update in unit.updates}
    fidelity = []
    with Path(unit.source).open("rb") as source, Path(unit.target).open("wb+") as target:
        copied = 0
        for name, info in header.tensors.items():
            if name not in updates:
                continue
            _copy(source.fileno(), target.fileno(), copied, info.begin, wrote)
            fidelity.append(_write_update(header, adapter, updates[name], target.fileno(), wrote))
            copied = info.end
        _copy(source.fileno(), target.fileno(), copied, header.file_bytes, wrote)
    path = Path(unit.target)
    return Receipt(filename=path.name, size_bytes=path.stat().st_size, sha256=sha256_of(path), tensors=tuple(fidelity))


def _check_unchanged(plan: MergePlan) -> None:
    model, adapter = Checkpoint(plan.base), Adapter(plan.adapter)
    if shards_of(model, {update.name: update for update in adapter.bind(model)}) != plan.shards:
        raise CheckpointError(
            "The base model or the adapter has changed since the merge was planned.",
            where=plan.adapter,
            found=f"base model {plan.base}",
            next_step="plan the merge again",
        )


def _unit(plan: MergePlan, shard: ShardPlan, stage: Path) -> ShardUnit:
    source = Path(plan.base, shard.filename)
    return ShardUnit(str(source), str(stage / shard.filename), plan.adapter, shard.updates)


def _copy(source: int, target: int, begin: int, end: int, wrote: Callable[[int, str], None]) -> None:
    for position in range(begin, end, 64 << 20):
        count = min(64 << 20, end - position)
        copy_range(source, target, position, count)
        wrote(count, "untouched tensors")


def _write_update(
    header: Header, adapter: Adapter, update: LowRank, target: int, wrote: Callable[[int, str], None]
) -> TensorFidelity:
    info = header.tensors[update.name]
    a_ri, b_or = adapter.factors(update)
    row_bytes = info.size_bytes // info.shape[0]
    tiles = []
    for start, stop in _row_tiles(info.shape[0], info.shape[1]):
        stored = read_rows(header, update.name, start, stop)
        merged, sums = merge_tile(stored, info.dtype, a_ri, b_or[start:stop], update.scaling)
        if sums.overflowed:
            _refuse_not_finite(header.path, update, stored, info.dtype)
        write_at(target, merged.tobytes(), info.begin + start * row_bytes)
        tiles.append(sums)
        wrote(merged.nbytes, update.name)
    return _fidelity(update.name, tiles)


def _row_tiles(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    height = max(1, TILE_ELEMENTS // max(1, columns))
    return ((start, min(start + height, rows)) for start in range(0, rows, height))


def _refuse_not_finite(path: Path, update: LowRank, stored: Any, dtype: str) -> None:
    finite = abs(as_float64(stored, dtype)) < float("inf")
    raise CheckpointError(
        f"The merged tensor would not be finite in {dtype}."
        if finite.all()
        else "The base tensor holds NaN or infinity.",
        where=f"{path}: {update.name}",
        next_step="check the training run for divergence, and the base model's files",
    )


def _fidelity(name: str, tiles: list[TileSums]) -> TensorFidelity:
    elements = sum(tile.elements for tile in tiles)
    delta = sum(tile.delta_delta for tile in tiles)
    error = sum(tile.error_error for tile in tiles)
    return TensorFidelity(
        name=name,
        elements=elements,
        share_unchanged=sum(tile.unchanged for tile in tiles) / elements,
        relative_error=(error / delta) ** 0.5 if delta else 0.0,
        gain=sum(tile.realised_delta for tile in tiles) / delta if delta else 1.0,
        delta_norm=delta**0.5,
    )


def _config(base: Path) -> str:
    """The base's configuration, with RoPE in both spellings.

    transformers 5 writes ``rope_parameters`` only; transformers 4 does not know it and would silently take the default
    ``rope_theta``.
    """
    config = read_json_object(base / CONFIG_FILE)
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        rope = section.get("rope_parameters")
        if isinstance(rope, dict) and isinstance(rope.get("rope_theta"), int | float) and "rope_theta" not in section:
            section["rope_theta"] = rope["rope_theta"]
            if "partial_rotary_factor" in rope:
                section.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
            scaled = {key: value for key, value in rope.items() if key != "rope_theta"}
            if scaled.get("rope_type", "default") != "default":
                section.setdefault("rope_scaling", scaled)
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _merged(plan: MergePlan, receipts: tuple[Receipt, ...], seconds: float) -> Merged:
    tensors = [tensor for receipt in receipts for tensor in receipt.tensors]
    elements = sum(tensor.elements for tensor in tensors)
    weight = sum(tensor.delta_norm**2 for tensor in tensors)
    return Merged(
        plan=plan,
        receipts=receipts,
        seconds=seconds,
        share_unchanged=sum(tensor.share_unchanged * tensor.elements for tensor in tensors) / max(1, elements),
        gain=sum(tensor.gain * tensor.delta_norm**2 for tensor in tensors) / weight if weight else 1.0,
    )
