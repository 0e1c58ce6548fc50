"""Find out all that a merge will do, and every reason not to, before a byte is written."""

from __future__ import annotations

import os
from fnmatch import fnmatch
from pathlib import Path

from tunesmith.adapter import Adapter, LowRank
from tunesmith.checkpoint import (
    INDEX_FILE,
    Checkpoint,
    check_free_space,
    check_out_dir,
    locate_base,
)
from tunesmith.errors import BaseModelError
from tunesmith.merge.records import Asset, MergePlan, ShardPlan
from tunesmith.progress import ProgressCallback, no_progress
from tunesmith.record import Finding
from tunesmith.runs import FINAL, TOKENIZER_FILES, Run, RunCheckpoint, as_run, checkpoint_of, tokenizer_dir

TILE_ELEMENTS = 1 << 16

_BASE_FILES = ("generation_config.json", "LICENSE*", "NOTICE*", "*.py", "*preprocessor_config.json", INDEX_FILE)


def plan_merge(
    run: Run | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | None = None,
    checkpoint: str | int = FINAL,
    force: bool = False,
    progress: ProgressCallback = no_progress,
) -> MergePlan:
    """Plan to merge one of a run's adapters into its base.

    Args:
        run: the run, or its directory.
        out: the directory to make.
        base: the base model; None for the one that the adapter names.
        checkpoint: ``final``, ``checkpoint-N`` or ``N``.
        force: replace ``out`` where it is not empty.
        progress: told of the embedded model's preparation, where that is the base.

    Returns:
        The plan; nothing is written.

    Raises:
        TunesmithError: any reason not to merge, all mismatches of a kind in one.
    """
    run = as_run(run)
    chosen = checkpoint_of(run, checkpoint)
    adapter = Adapter(chosen.path)
    adapter.require_mergeable()
    base_name = base or adapter.base_model
    if base_name is None:
        raise BaseModelError("The adapter names no base model.", where=chosen.path, next_step="pass --base")
    base_dir = locate_base(base_name, relative_to=Path(run.path).parent, progress=progress)
    target = Path(out).expanduser()
    check_out_dir(target, force=force, inputs={"base model": base_dir, "run": Path(run.path)})
    model = Checkpoint(base_dir)
    updates = {update.name: update for update in adapter.bind(model)}
    assets, warnings = _assets(run, chosen, model)
    write_bytes = sum(header.file_bytes for header in model.shards.values())
    write_bytes += sum(Path(asset.source).stat().st_size for asset in assets)
    check_free_space(target, write_bytes)
    return MergePlan(
        run=run.path,
        checkpoint=chosen.name,
        adapter=chosen.path,
        base_model=base_name,
        base=str(base_dir.resolve()),
        out=str(target.resolve()),
        dtype=", ".join(sorted({model.info(name).dtype for name in updates})),
        rounding="nearest",
        shards=shards_of(model, updates),
        assets=assets,
        write_bytes=write_bytes,
        memory_bytes=_memory(model, adapter, updates),
        force=force,
        warnings=(*adapter.findings, *warnings),
    )


def shards_of(model: Checkpoint, updates: dict[str, LowRank]) -> tuple[ShardPlan, ...]:
    """The weights to write, file by file as the base has them."""
    return tuple(
        ShardPlan(
            filename=filename,
            size_bytes=header.file_bytes,
            tensors=len(header.tensors),
            updates=tuple(updates[name] for name in header.tensors if name in updates),
        )
        for filename, header in model.shards.items()
    )


def _assets(run: Run, checkpoint: RunCheckpoint, model: Checkpoint) -> tuple[tuple[Asset, ...], list[Finding]]:
    """Small files: the tokenizer whole from one place (the run, where it has one), the rest from the base."""
    warnings = []
    holder = tokenizer_dir(run, checkpoint, model.path)
    if holder is None:
        warnings.append(Finding(code="no_tokenizer_anywhere", severity="warning"))
    elif holder == model.path:
        warnings.append(Finding(code="tokenizer_from_base", severity="warning"))
    assets = [
        Asset(filename=name, source=str(holder / name), origin="base" if holder == model.path else "run")
        for name in TOKENIZER_FILES
        if holder and (holder / name).is_file()
    ]
    own_generation = Path(checkpoint.path) / "generation_config.json"
    if own_generation.is_file():
        assets.append(Asset(filename=own_generation.name, source=str(own_generation), origin="run"))
    taken = {asset.filename for asset in assets}
    assets += [
        Asset(filename=file.name, source=str(file), origin="base")
        for file in sorted(model.path.iterdir())
        if file.is_file() and file.name not in taken and any(fnmatch(file.name, pattern) for pattern in _BASE_FILES)
        if model.indexed or file.name != INDEX_FILE
    ]
    return tuple(assets), warnings


def _memory(model: Checkpoint, adapter: Adapter, updates: dict[str, LowRank]) -> int:
    """The largest unit's working set: the factors of one update in float64, and some tiles."""
    factors = [
        8 * (adapter.header.tensors[update.lora_A].elements + adapter.header.tensors[update.lora_B].elements)
        for update in updates.values()
    ]
    widest = max((model.info(name).shape[-1] for name in updates), default=0)
    return max(factors, default=0) + 12 * 8 * max(TILE_ELEMENTS, widest)
