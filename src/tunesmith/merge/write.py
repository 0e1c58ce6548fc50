"""Carry out a plan: its units of work side by side, hashed and journalled as they are done, the small files last."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from tunesmith.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Binding, Stack
from tunesmith.checkpoint import (
    CONFIG_FILE,
    INDEX_FILE,
    Checkpoint,
    Stage,
    TrailingHashes,
    put_all,
    read_json_object,
    resumable_stage,
    sha256_of,
    stamp_of,
    storage_path,
    stored_path,
    view_of,
)
from tunesmith.errors import CheckpointError, OutputError
from tunesmith.executors import Workers, retried_by, workers_of
from tunesmith.merge.fidelity import fidelity_of, judged, kept_of
from tunesmith.merge.journal import JOURNAL_FILE, FileLedger, Journal
from tunesmith.merge.kernel import available, prepare
from tunesmith.merge.layout import OutputFile, index_of, layout_of
from tunesmith.merge.plan import shards_of
from tunesmith.merge.records import Merged, MergePlan, Receipt
from tunesmith.merge.remote import StorageJournal, StorageLedger, StorageStage, storage_stage
from tunesmith.merge.rounders import CALIBRATED, rounding_of
from tunesmith.merge.tiles import TileSums
from tunesmith.merge.units import UNIT_BYTES, Compute, Context, TensorTask, units_of
from tunesmith.merge.work import Tick, UnitReceipt, checksum_of, run_unit
from tunesmith.progress import Cancellation, ProgressCallback, SharedProgress, no_progress

COMPILE_FROM_BYTES = 200 << 20
_LOOK_EVERY_S = 0.2

_CONFIG_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def merge(
    plan: MergePlan,
    *,
    executor: Executor | None = None,
    inputs: Path | None = None,
    sha256: bool = False,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> Merged:
    """Carry out a plan.  The target appears whole at the end, or not at all.

    A merge that was killed, or that the system failed, is gone on with by the next one of the same plan: what its
    journal says is done is checked, and not computed again.

    Args:
        plan: what :func:`plan_merge` found.
        executor: what runs the units of work; None for a pool of threads, one a core.
        inputs: for calibrated rounding: the directory of the recorded inputs of the adapted modules.
        sha256: also hash the weights, those that are read and those that are written, behind the units that are
            complete: in two threads, or on the cluster that the executor is of.
        progress: told of bytes written.
        cancellation: read between tiles, or between units where an executor was given.

    Returns:
        What was written, and what rounding kept of the update.

    Raises:
        Cancelled: stopped on request; nothing is left behind.
        OutputError: the disk is full or cannot be written, and what was done stays in a stage that the message names;
            or another process merges into the same target.
        CheckpointError: a tensor is not finite, or does not stay finite in its dtype; or the base or the adapter is
            no longer what was planned with.
    """
    started, retried = time.monotonic(), retried_by(executor)
    if plan.rounding in CALIBRATED and inputs is None:
        raise OutputError("Calibrated rounding needs the recorded inputs of the adapted modules.", where=plan.out)
    compiled = _pays_to_compile(plan)
    if compiled:  # meanwhile, for to load the compiler takes a moment
        threading.Thread(target=prepare, args=(plan.rounding not in ("nearest", "stochastic"),), daemon=True).start()
    base, files = _checked(plan)
    stamps = stamps_of(base)
    fingerprint = _fingerprint(plan, files, stamps, inputs)
    far = stored_path(plan.out) is not None
    with storage_stage(plan, fingerprint) if far else resumable_stage(Path(plan.out), force=plan.force) as stage:
        size = sum(shard.size_bytes for shard in plan.shards)
        report = SharedProgress("merge", size, "bytes", progress=progress, cancellation=cancellation or Cancellation())
        work = _Work(plan, stage, report, inputs)
        journal = (
            StorageJournal(stage)
            if isinstance(stage, StorageStage)
            else Journal(stage.root / JOURNAL_FILE, fingerprint)
        )
        try:
            ledgers = work.ledgers(files, base, fingerprint=fingerprint, compiled=compiled)
            resumed = work.resume(ledgers, journal)
            # Threads of BLAS would fight ours.
            with (
                threadpool_limits(1),
                workers_of(executor) as workers,
                _Hashes(ledgers, base, sha256, executor) as hashes,
            ):
                work.run(ledgers, journal, workers=workers, hashes=hashes)
                written, read = hashes.result(lambda: work.report.advance(0, "hashing"))
        except BrokenExecutor as error:
            stage.keep = True
            raise OutputError("A worker of the executor died.", where=stage.root, found=error) from error
        finally:
            journal.close()
        if stamps_of(base) != stamps:
            raise CheckpointError("The base model changed while it was read.", where=plan.base)
        if isinstance(stage, StorageStage):
            stage.check()
        put_all(stage.new, _small_files(plan))
        stage.publish()
    rounding = {task.info.name: rounding_of(plan.rounding, task.info.dtype, task.updates) for task in _tasks(ledgers)}
    receipts = tuple(
        _receipt(file, ledger, written.get(file.filename) or ledger.sha256, rounding)
        for file, ledger in zip(files, ledgers, strict=True)
    )
    total = sum((sums for ledger in ledgers for sums in ledger.sums.values()), TileSums())
    kept, nearest = kept_of(total)
    return Merged(
        plan=plan,
        receipts=receipts,
        base_sha256=read,
        seconds=time.monotonic() - started,
        kept=kept,
        nearest=nearest,
        resumed_bytes=resumed,
        retried_units=retried_by(executor) - retried,
        findings=judged(plan, kept, nearest),
    )


class _Hashes:
    """SHA-256 of what a merge writes and of what it reads, behind the units that are complete.

    Args:
        ledgers: the files to be written, each of them there at its full size.
        base: the base.
        wanted: whether to hash at all.
        executor: what runs the units.
    """

    def __init__(
        self, ledgers: Sequence[FileLedger], base: Checkpoint, wanted: bool, executor: Executor | None
    ) -> None:
        near = [ledger for ledger in ledgers if wanted and not isinstance(ledger, StorageLedger)]
        files = {ledger.path.name: ledger.path for ledger in near}
        self._units = [(ledger, number) for ledger in ledgers for number in range(len(ledger.units))]
        self._next, self._complete = 0, 0
        near_base = wanted and stored_path(base.path) is None
        shards = {shard: base.path / shard for shard in base.shards} if near_base else {}
        self._written = TrailingHashes(files, executor)
        self._read = TrailingHashes(shards, executor)
        self.advance()  # what an earlier merge has done is there already

    def advance(self) -> None:
        """Let those units be hashed before which none is undone."""
        while self._next < len(self._units):
            ledger, number = self._units[self._next]
            if number not in ledger.done:
                break
            unit = ledger.units[number]
            self._complete, self._next = self._complete + unit.end - unit.begin, self._next + 1
        self._written.allow(self._complete)
        self._read.follow(self._complete / max(1, self._written.total_bytes))

    def result(self, check: Callable[[], None]) -> tuple[dict[str, str], dict[str, str]]:
        """Wait for the hashes of what was written and of what was read, by file name; empty where not wanted.

        Args:
            check: called while waiting; what it raises ends the wait.
        """
        return self._written.result(check), self._read.result(check)

    def __enter__(self) -> _Hashes:
        return self

    def __exit__(self, *_: object) -> None:
        self._written.close()
        self._read.close()


@dataclass
class _Work:
    """One merge under way in its stage."""

    plan: MergePlan
    stage: Stage | StorageStage
    report: SharedProgress
    inputs: Path | None = None

    def ledgers(
        self, files: Sequence[OutputFile], base: Checkpoint, *, fingerprint: str, compiled: bool
    ) -> list[FileLedger]:
        adapters = tuple((one.adapter, one.weight) for one in self.plan.adapters)
        context = Context(
            self.plan.base,
            adapters,
            rounding=self.plan.rounding,
            seed=self.plan.seed,
            inputs=None if self.inputs is None else str(self.inputs.resolve()),
            compiled=compiled,
            fingerprint=fingerprint,
        )
        view = view_of(self.plan.base_view)
        far = isinstance(self.stage, StorageStage)
        units = units_of(files, base, self.plan.binding, stage=self.stage.new, context=context, view=view, whole=far)
        kind = StorageLedger if far else FileLedger
        return [kind(storage_path(target), list(mine)) for target, mine in groupby(units, key=lambda unit: unit.target)]

    def resume(self, ledgers: Sequence[FileLedger], journal: Journal) -> int:
        """Believe what of an earlier merge is still so; returns how many bytes that is."""
        self.report.advance(0, "making ready")
        told = [
            (ledger, number, entry)
            for ledger in ledgers
            if ledger.whole()
            for number, unit in enumerate(ledger.units)
            if (entry := journal.entries.get((ledger.path.name, unit.begin))) is not None
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            held = list(pool.map(lambda one: self._holds(*one), told))
        mine = {ledger.path.name for ledger in ledgers}
        self.stage.keep_only(mine)
        journal.begin([entry for (_, _, entry), holds in zip(told, held, strict=True) if holds])
        for ledger in ledgers:
            ledger.prepare()
        done = sum(
            unit.end - unit.begin for ledger in ledgers for n, unit in enumerate(ledger.units) if n in ledger.done
        )
        if done:
            self.report.advance(done, "already done")
        return done

    def _holds(self, ledger: FileLedger, number: int, entry: dict[str, Any]) -> bool:
        self.report.advance(0, "checking what is already done")
        return ledger.holds(number, entry)

    def run(self, ledgers: Sequence[FileLedger], journal: Journal, *, workers: Workers, hashes: _Hashes) -> None:
        """Run every unit that is not done, a bounded number at once."""
        pool, own = workers.pool, workers.own
        todo = [(ledger, n) for ledger in ledgers for n in range(len(ledger.units)) if n not in ledger.done]
        todo.reverse()
        tick: Tick | None = self.report.advance if own else None
        running: dict[Future[Any], tuple[FileLedger, int] | None] = {}  # no place: flushing
        with ThreadPoolExecutor(1) as flusher:
            flushed: Future[Any] = flusher.submit(int)
            try:
                while todo or running:
                    most = 2 * workers.slots
                    while todo and len(running) < most:
                        ledger, number = todo.pop()
                        unit = ledger.units[number]
                        future = pool.submit(run_unit, unit, tick) if own else pool.submit(run_unit, unit)
                        running[future] = ledger, number
                    done, _ = wait(running, timeout=_LOOK_EVERY_S, return_when=FIRST_COMPLETED)
                    if not done:  # a cluster may take its time
                        self.report.advance(0, "units under way")
                    for future in [future for future in running if future in done]:
                        place, receipt = running.pop(future), future.result()
                        if place is None:
                            continue
                        self._written(*place, receipt, journal, own=own)
                        hashes.advance()
                        if flushed.done():  # the disk works while the cores do, not after them
                            flushed = flusher.submit(place[0].flush)
                            running[flushed] = None
            except BaseException:
                self.report.failed.cancel()  # so that the other units stop before their directory goes
                for future in running:
                    future.cancel()
                wait(running)
                raise

    def _written(self, ledger: FileLedger, number: int, receipt: UnitReceipt, journal: Journal, *, own: bool) -> None:
        if not own:
            unit = ledger.units[number]
            self.report.advance(unit.end - unit.begin, ledger.path.name)
        ledger.written(number, receipt, journal)


def _pays_to_compile(plan: MergePlan) -> bool:
    """Whether the compiled arithmetic is there, and saves more time than it takes to load."""
    return plan.write_bytes >= COMPILE_FROM_BYTES and available()


def _fingerprint(plan: MergePlan, files: Sequence[OutputFile], stamps: list[list[Any]], inputs: Path | None) -> str:
    """A hash of all that decides the bytes of the weights."""
    recorded = sorted(path for path in inputs.iterdir() if path.is_file()) if inputs is not None else []
    facts = {
        "version": importlib.metadata.version("tunesmith"),
        "unit_bytes": UNIT_BYTES,
        "options": [plan.base, plan.base_view, plan.base_is_residual, plan.convert_to, plan.shard_bytes, plan.rounding],
        "seed": plan.seed if plan.rounding == "stochastic" else None,
        "inputs": [[path.name, checksum_of(path, 0, path.stat().st_size)] for path in recorded],
        "adapters": [
            [one.adapter, one.weight]
            + [_identity(storage_path(one.adapter) / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
            for one in plan.adapters
        ],
        "base": stamps,
        "files": [[file.filename, hashlib.sha256(file.header).hexdigest()] for file in files],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def stamps_of(base: Checkpoint) -> list[list[Any]]:
    """Size and time of every file of weights of a model, or its storage's tag."""
    return [[name, *stamp_of(base.path / name)] for name in base.shards]


def _identity(path: Path) -> str:
    """What tells one file from another: of the disk, its hash; of a storage, its tag, for it is not read twice."""
    return sha256_of(path) if stored_path(path) is None else json.dumps(stamp_of(path))


def _small_files(plan: MergePlan) -> dict[str, bytes]:
    """All that is no weights, by name; the configuration last, so that a directory without it was never finished."""
    files = {asset.filename: storage_path(asset.source).read_bytes() for asset in plan.assets}
    if plan.index is not None:
        files[INDEX_FILE] = plan.index.encode()
    config = config_of(storage_path(plan.base), plan.binding, convert_to=plan.convert_to)
    return files | {CONFIG_FILE: config_text(config).encode()}


def _checked(plan: MergePlan) -> tuple[Checkpoint, tuple[OutputFile, ...]]:
    """The base and the layout, found again; they must be what the plan says."""
    base = Checkpoint(plan.base)
    stack = Stack([(one.adapter, one.weight) for one in plan.adapters])
    binding = stack.bind(base, base_is_residual=plan.base_is_residual)
    files = layout_of(base, binding, stack, convert_to=plan.convert_to, shard_bytes=plan.shard_bytes)
    shards = shards_of(files, base, binding, view=view_of(plan.base_view))
    if (binding, shards, index_of(base, files)) != (plan.binding, plan.shards, plan.index):
        raise CheckpointError(
            "The base model or the adapter has changed since the merge was planned.",
            where=plan.adapters[0].adapter,
            found=f"base model {plan.base}",
            next_step="plan the merge again",
        )
    return base, files


def _tasks(ledgers: Sequence[FileLedger]) -> Iterator[TensorTask]:
    return (
        piece.task for ledger in ledgers for unit in ledger.units for piece in unit.pieces if isinstance(piece, Compute)
    )


def _receipt(file: OutputFile, ledger: FileLedger, sha256: str | None, rounding: Mapping[str, str]) -> Receipt:
    sums = ledger.sums
    return Receipt(
        filename=file.filename,
        size_bytes=file.size_bytes,
        sha256=sha256,
        tensors=tuple(
            fidelity_of(info.name, sums[info.name], rounding[info.name]) for info in file.tensors if info.name in sums
        ),
    )


def config_of(base: Path, binding: Binding, *, convert_to: str | None = None) -> dict[str, Any]:
    """The base's configuration with the binding's changes, its dtype, and RoPE in both spellings.

    Args:
        base: the base's directory.
        binding: what the adapters make of it.
        convert_to: the dtype of every floating-point tensor; None for the base's own.
    """
    config = read_json_object(base / CONFIG_FILE)
    for key, value in binding.config.items():
        *path, last = key.split(".")
        section = config
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    sections = (config, *(value for value in config.values() if isinstance(value, dict)))
    for section in sections:
        _spell_rope_twice(section)
    if convert_to is not None:
        named = [(section, key) for section in sections for key in ("dtype", "torch_dtype") if key in section]
        for section, key in named or [(config, "torch_dtype")]:
            section[key] = _CONFIG_DTYPES[convert_to]
    return config


def config_text(config: Mapping[str, Any]) -> str:
    """A configuration as its file holds it."""
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _spell_rope_twice(section: dict[str, Any]) -> None:
    """RoPE as transformers 5 and 4 spell it; the latter would silently take the default ``rope_theta``."""
    rope = section.get("rope_parameters")
    if isinstance(rope, dict) and isinstance(rope.get("rope_theta"), int | float) and "rope_theta" not in section:
        section["rope_theta"] = rope["rope_theta"]
        if "partial_rotary_factor" in rope:
            section.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
        scaled = {key: value for key, value in rope.items() if key != "rope_theta"}
        if scaled.get("rope_type", "default") != "default":
            section.setdefault("rope_scaling", scaled)
