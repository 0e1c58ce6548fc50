"""Find out all that a merge will do, and every reason not to, before a byte is written."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from tunesmith.adapter import Adapter, Binding, LowRank, Magnitude, Stack
from tunesmith.checkpoint import (
    BaseView,
    Checkpoint,
    StoragePath,
    check_free_space,
    check_out_dir,
    done_bytes,
    locate_base,
    storage_path,
    stored_path,
    view_of,
)
from tunesmith.errors import BaseModelError, OutputError
from tunesmith.merge.layout import OutputFile, index_of, layout_of
from tunesmith.merge.records import Asset, Ingredient, MergePlan, ShardPlan
from tunesmith.merge.remote import what_is_ours
from tunesmith.merge.rounders import CALIBRATED, ROUNDINGS, rounding_of
from tunesmith.merge.units import Compute, Copy, pieces_of
from tunesmith.merge.work import FEEDBACK_TILES, TILE_ELEMENTS
from tunesmith.progress import ProgressCallback, no_progress
from tunesmith.record import Finding, Value
from tunesmith.runs import FINAL, TOKENIZER_FILES, Run, RunCheckpoint, as_run, checkpoint_of, tokenizer_dir

RunLike = Run | str | os.PathLike[str]

DTYPES = {"auto": None, "bf16": "BF16", "fp16": "F16", "fp32": "F32"}

_BASE_FILES = ("generation_config.json", "LICENSE*", "NOTICE*", "*.py", "*preprocessor_config.json")
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[KMGT]?I?B)", re.IGNORECASE)
_UNITS = {"B": 0, "KB": 1, "MB": 2, "GB": 3, "TB": 4}
_QUANTIZED_SETTINGS = ("quantization_bit", "quant_bits", "load_in_4bit", "load_in_8bit")


def plan_merge(
    run: RunLike,
    out: str | os.PathLike[str],
    *,
    base: str | None = None,
    checkpoint: str | int = FINAL,
    adapters: Sequence[tuple[RunLike, float]] = (),
    weight: float = 1.0,
    dtype: str = "auto",
    rounding: str = "auto",
    seed: int = 0,
    calibration: str | os.PathLike[str] | None = None,
    shard_size: str | int | None = None,
    base_is_residual: bool = False,
    base_view: str | None = None,
    force: bool = False,
    progress: ProgressCallback = no_progress,
) -> MergePlan:
    """Plan to merge one of a run's adapters, or several runs' adapters together, into their base.

    Args:
        run: the run, or its directory.
        out: the directory to make.
        base: the base model; None for the one that the adapter names.
        checkpoint: ``final``, ``checkpoint-N`` or ``N``; of ``run``.
        adapters: further runs, each with its weight; their final adapters are summed with the first in one pass.
        weight: what the first adapter's update is multiplied by.
        dtype: ``auto`` (every tensor as in the base), or ``bf16``, ``fp16`` or ``fp32`` for all of them.
        rounding: ``auto``, or one of ``nearest``, ``stochastic``, ``faithful``, ``calibrated``, ``calibrated-free``:
            see :mod:`tunesmith.merge.rounders`.  ``auto`` is ``faithful`` where any low-rank update is stored in bf16,
            else ``nearest``.
        seed: of stochastic rounding, and of the text that calibrated rounding has the tuned model write.
        calibration: rows for calibrated rounding, in any format that prompts may have; None for text that the tuned
            model writes itself.
        shard_size: the size that no file of more than one tensor exceeds, such as ``5GB``, ``500MB`` or ``2GiB``, or
            a number of bytes; None keeps the base's own files.
        base_is_residual: take the base as what an initialisation such as PiSSA's left of it.
        base_view: see the base as QLoRA training saw it: ``nf4``, ``nf4-double`` or ``int8``; None for as it is
            stored.
        force: replace ``out`` where it is not empty.
        progress: told of the embedded model's preparation, where that is the base.

    Returns:
        The plan; nothing is written.

    Raises:
        TunesmithError: any reason not to merge, all mismatches of a kind in one.
    """
    options = _Options(
        _dtype(dtype),
        size_in_bytes(shard_size),
        base_view,
        base_is_residual,
        seed,
        calibration_file(calibration, rounding),
        force,
    )
    chosen = _chosen(run, checkpoint, weight=weight, adapters=adapters)
    first, first_checkpoint, _ = chosen[0]
    base_name = base or Adapter(first_checkpoint.path).base_model
    if base_name is None:
        raise BaseModelError("The adapter names no base model.", where=first_checkpoint.path, next_step="pass --base")
    base_dir = locate_base(base_name, relative_to=storage_path(first.path).parent, stored=True, progress=progress)
    target = storage_path(out).expanduser()
    own = what_is_ours(target) if isinstance(target, StoragePath) else ()
    runs = {f"run {one.path}" if number else "run": storage_path(one.path) for number, (one, _, _) in enumerate(chosen)}
    check_out_dir(target, force=force, inputs={"base model": base_dir, **runs}, own=own)
    return _planned(chosen, base_dir, target, base_name=base_name, options=options, asked=rounding)


@dataclass(frozen=True)
class _Options:
    """What was asked for, read."""

    convert_to: str | None
    shard_bytes: int | None
    base_view: str | None
    base_is_residual: bool
    seed: int
    calibration: str | None
    force: bool


_Chosen = Sequence[tuple[Run, RunCheckpoint, float]]


def _chosen(
    run: RunLike, checkpoint: str | int, *, weight: float, adapters: Sequence[tuple[RunLike, float]]
) -> _Chosen:
    asked = [(run, checkpoint, weight), *((other, FINAL, share) for other, share in adapters)]
    opened = [(as_run(one, stored=True), name, share) for one, name, share in asked]
    return [(one, checkpoint_of(one, name), share) for one, name, share in opened]


def _planned(
    chosen: _Chosen, base_dir: Path, target: Path, *, base_name: str, options: _Options, asked: str
) -> MergePlan:
    model, view = Checkpoint(base_dir), view_of(options.base_view)
    if view is not None:
        view.check(model)
    stack = Stack([(checkpoint.path, weight) for _, checkpoint, weight in chosen])
    binding = stack.bind(model, base_is_residual=options.base_is_residual)
    files = layout_of(model, binding, stack, convert_to=options.convert_to, shard_bytes=options.shard_bytes)
    index, shards = index_of(model, files), shards_of(files, model, binding, view=view)
    places = (base_dir, target, *(checkpoint.path for _, checkpoint, _ in chosen))
    far = next((place for place in map(stored_path, places) if place is not None), None)
    if asked in CALIBRATED and far is not None:
        raise OutputError(
            "Calibrated rounding loads the live model, which must lie on a disk.",
            where=far,
            expected="directories",
            next_step="leave --rounding out: faithful rounding needs no forward pass",
        )
    rounding, rounded, why = _rounding(asked, chosen, files, binding, options=options)
    assets, warnings = assets_of(chosen[0][0], chosen[0][1], model)
    write_bytes = sum(file.size_bytes for file in files) + len((index or "").encode())
    write_bytes += sum(storage_path(asset.source).stat().st_size for asset in assets)
    free_bytes = check_free_space(target, write_bytes - done_bytes(target))
    return MergePlan(
        adapters=tuple(
            Ingredient(run=run.path, checkpoint=checkpoint.name, adapter=checkpoint.path, weight=weight)
            for run, checkpoint, weight in chosen
        ),
        base_model=base_name,
        base=str(base_dir.resolve()),
        out=str(target.resolve()),
        **vars(options),
        dtype=_stored_dtypes(files, shards),
        rounding=rounding,
        rounded=rounded,
        binding=binding,
        shards=shards,
        index=index,
        assets=assets,
        read_bytes=_read_bytes(files, model, stack, binding, view=view),
        write_bytes=write_bytes,
        free_bytes=free_bytes,
        memory_bytes=_memory(files, binding, feedback=rounding not in ("nearest", "stochastic")),
        seconds=_seconds(files, binding, rounding),
        warnings=(
            *why,
            *binding.findings,
            *quantized_training([run for run, _, _ in chosen], options.base_view),
            *warnings,
        ),
    )


def shards_of(
    files: Sequence[OutputFile], base: Checkpoint, binding: Binding, *, view: BaseView | None = None
) -> tuple[ShardPlan, ...]:
    """A layout as the plan records it."""
    return tuple(
        ShardPlan(
            filename=file.filename,
            size_bytes=file.size_bytes,
            tensors=len(file.tensors),
            changed=tuple(piece.task.info.name for piece in pieces if isinstance(piece, Compute)),
            layout_of=file.layout_of,
            header_sha256=hashlib.sha256(file.header).hexdigest(),
        )
        for file, pieces in pieces_of(files, base, binding, view=view)
    )


def _dtype(name: str) -> str | None:
    if name not in DTYPES:
        raise OutputError("There is no such dtype to merge into.", where=name, expected=", ".join(DTYPES))
    return DTYPES[name]


def _rounding(
    asked: str, chosen: _Chosen, files: Sequence[OutputFile], binding: Binding, *, options: _Options
) -> tuple[str, dict[str, int], tuple[Finding, ...]]:
    """The rounding, how many tensors are rounded in which way, and why, where that was ours to choose."""
    if asked not in ("auto", *ROUNDINGS):
        raise OutputError("There is no such rounding.", where=asked, expected=", ".join(("auto", *ROUNDINGS)))
    if asked in CALIBRATED and (len(chosen) > 1 or chosen[0][2] != 1 or options.base_view is not None):
        raise OutputError(
            "Calibrated rounding needs the live adapter beside its base, and this merge has no such twin.",
            where=f"--rounding {asked}",
            expected="one adapter, with weight 1, on the base as it is stored",
            next_step="leave --rounding out: faithful rounding needs no forward pass",
        )
    by_name = binding.by_name
    touched = [(info.dtype, by_name[info.name]) for file in files for info in file.tensors if info.name in by_name]

    def count(rounding: str) -> dict[str, int]:
        return dict(Counter(rounding_of(rounding, dtype, updates) for dtype, updates in touched))

    chosen_rounding = asked if asked != "auto" else "faithful" if "faithful" in count("faithful") else "nearest"
    rounded = count(chosen_rounding)
    if asked not in ("auto", "nearest") and asked not in rounded:
        raise OutputError(
            "There is nothing to be rounded so.",
            where=f"--rounding {asked}",
            expected="a low-rank update that is stored in bf16",
            found=", ".join(sorted({dtype for dtype, _ in touched})) or "no changed tensor",
            next_step="leave --rounding out",
        )
    if asked != "auto":
        return asked, rounded, ()
    low_rank = any(isinstance(update, LowRank) for _, updates in touched for update in updates)
    code = "rounding_faithful" if chosen_rounding == "faithful" else "rounding_fine" if low_rank else "rounding_whole"
    params: dict[str, Value] = {"tensors": rounded.get(chosen_rounding, 0)}
    return chosen_rounding, rounded, (Finding(code=code, severity="info", params=params),)


def size_in_bytes(size: str | int | None) -> int | None:
    """A size such as ``5GB``, ``500MB`` or ``2GiB`` as a number; None for none.

    Raises:
        OutputError: it is no size.
    """
    if size is None:
        return None
    match = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if match is not None:
        unit = match["unit"].upper()
        scale = 1024 if "I" in unit else 1000
        size = int(float(match["number"]) * scale ** _UNITS[unit.replace("I", "")])
    if not isinstance(size, int) or size <= 0:
        raise OutputError("This is no size of a file.", where=size, expected="such as 5GB, 500MB or 2GiB")
    return size


def calibration_file(file: str | os.PathLike[str] | None, rounding: str) -> str | None:
    """The absolute path of the rows for calibrated rounding; None for none.

    Raises:
        OutputError: the rounding that was asked for looks at no rows.
    """
    if file is None:
        return None
    if rounding not in CALIBRATED:
        raise OutputError(
            "Only calibrated rounding looks at rows.",
            where=file,
            expected=f"--rounding {' or '.join(CALIBRATED)}",
            found=f"--rounding {rounding}",
        )
    return str(Path(file).expanduser().resolve())


def _stored_dtypes(files: Sequence[OutputFile], shards: Sequence[ShardPlan]) -> str:
    changed = {name for shard in shards for name in shard.changed}
    return ", ".join(sorted({info.dtype for file in files for info in file.tensors if info.name in changed}))


def quantized_training(runs: Sequence[Run], base_view: str | None) -> list[Finding]:
    """QLoRA trains on a rounded base; merging into the full one is another model than was trained.

    Args:
        runs: whose settings to look at.
        base_view: how the base is seen; None for as it is stored.
    """
    found = []
    for run in runs:
        for name in _QUANTIZED_SETTINGS:
            value = run.hyperparameters.get(name)
            if value not in (None, False, "", 0, "none", "None") and base_view is None:
                params = {"run": run.path, "setting": name, "value": value}
                found.append(Finding(code="trained_on_quantized_base", severity="warning", params=params))
                break
    return found


def assets_of(
    run: Run | None, checkpoint: RunCheckpoint | None, model: Checkpoint
) -> tuple[tuple[Asset, ...], list[Finding]]:
    """Small files: the tokenizer whole from one place (the run, where it has one), the rest from the base.

    Args:
        run: the run; None for a model that comes alone.
        checkpoint: which of its adapters; None without a run.
        model: the base.

    Returns:
        The files, and what the user should know of them.
    """
    warnings = []
    alone = run is None or checkpoint is None
    holder = model.path if run is None or checkpoint is None else tokenizer_dir(run, checkpoint, model.path)
    if holder is None:
        warnings.append(Finding(code="no_tokenizer_anywhere", severity="warning"))
    elif holder == model.path and not alone:
        warnings.append(Finding(code="tokenizer_from_base", severity="warning"))
    assets = [
        Asset(filename=name, source=str(holder / name), origin="base" if holder == model.path else "run")
        for name in TOKENIZER_FILES
        if holder and (holder / name).is_file()
    ]
    own_generation = None if checkpoint is None else storage_path(checkpoint.path) / "generation_config.json"
    if own_generation is not None and own_generation.is_file():
        assets.append(Asset(filename=own_generation.name, source=str(own_generation), origin="run"))
    taken = {asset.filename for asset in assets}
    assets += [
        Asset(filename=file.name, source=str(file), origin="base")
        for file in sorted(model.path.iterdir())
        if file.is_file() and file.name not in taken and any(fnmatch(file.name, pattern) for pattern in _BASE_FILES)
    ]
    return tuple(assets), warnings


def _read_bytes(
    files: Sequence[OutputFile], base: Checkpoint, stack: Stack, binding: Binding, *, view: BaseView | None
) -> int:
    """Every byte of the base and of the adapters that the work asks for: where both are in a storage, once."""
    total = sum(header.data_start for header in base.shards.values())
    total += sum(adapter.header.file_bytes for adapter in stack.adapters)
    for piece in (piece for _, pieces in pieces_of(files, base, binding, view=view) for piece in pieces):
        if isinstance(piece, Copy):
            total += piece.count
        elif isinstance(piece, Compute) and piece.task.source_info is not None:
            total += piece.task.source_info.size_bytes
    return total


def _memory(files: Sequence[OutputFile], binding: Binding, *, feedback: bool) -> int:
    """The largest unit's working set: the factors of one tensor or block in float64, and some tiles."""
    by_name = binding.by_name
    most, widest = 0, 0
    for info in (info for file in files for info in file.tensors if info.name in by_name):
        lows = [update for update in by_name[info.name] if isinstance(update, LowRank)]
        in_blocks = any(update.block is not None for update in lows)
        shape = info.shape[1:] if in_blocks else info.shape
        rows, columns = (shape[0] if shape else 1), math.prod(shape[1:])
        ranks = max((update.r for update in lows), default=0) if in_blocks else sum(update.r for update in lows)
        whole = 8 * columns if any(isinstance(update, Magnitude) for update in by_name[info.name]) else 0
        spaces = 3 * 8 * ranks * columns if feedback else 0
        most, widest = max(most, 2 * 8 * ranks * (rows + columns) + whole + spaces), max(widest, columns)
    return most + 12 * 8 * max(TILE_ELEMENTS * (FEEDBACK_TILES if feedback else 1), widest)


def _seconds(files: Sequence[OutputFile], binding: Binding, rounding: str) -> float:
    """Two cores: what is computed takes some nanoseconds a number, everything is read and written."""
    by_name = binding.by_name
    computed = sum(info.elements for file in files for info in file.tensors if info.name in by_name)
    each = 2e-9 if rounding == "nearest" else 3e-7 if rounding in CALIBRATED else 6e-9
    return 1.0 + computed * each + sum(file.size_bytes for file in files) / 1.5e9
