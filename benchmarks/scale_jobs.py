"""What ``scale.py`` measures: one job a process, asked for in JSON and answered in JSON.

A process of its own has a peak of memory of its own, and no job warms another one's caches but the system's.
"""

from __future__ import annotations

import json
import operator
import os
import pickle
import resource
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import tunesmith as ts
from tunesmith.adapter import Stack
from tunesmith.checkpoint import Checkpoint
from tunesmith.merge import Context, Unit, layout_of, run_unit
from tunesmith.merge.units import Compute, Copy, units_of
from tunesmith.verify.weights import Expectation
from tunesmith.verify.weights.check import parts_of, tally_part
from tunesmith.verify.weights.parts import batched

LEVELS = ("structure", "weights")
_READ_OF = "rchar"  # of /proc/self/io: all that was asked of the system, from its cache or not


def asked(job: str, **options: Any) -> dict[str, Any]:
    """Do a job in a process of its own.

    Args:
        job: its name.
        options: its arguments; paths as strings.

    Raises:
        SystemExit: it failed.
    """
    os.sync()
    command = [sys.executable, __file__, json.dumps({"job": job, **options})]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise SystemExit(f"failed ({done.returncode}): {command[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def plan(run: str, base: str, out: str) -> dict[str, Any]:
    """Plan a merge from headers alone, and make its units; whatever the disk has free."""
    module = sys.modules["tunesmith.merge.plan"]
    module.check_free_space = lambda *_: None  # type: ignore[attr-defined]
    started = time.perf_counter()
    made = ts.plan_merge(run, out, base=base)
    planned = time.perf_counter()
    units = _units(made)
    ended = time.perf_counter()
    computed = sum(_elements(piece) for unit in units for piece in unit.pieces)
    sizes = sorted(len(pickle.dumps(unit)) for unit in units)
    return {
        "plan_s": planned - started,
        "units_s": ended - planned,
        "peak_mb": _peak_mb(),
        "units": len(units),
        "unit_bytes": statistics.median(sizes),
        "largest_unit_bytes": sizes[-1],
        "all_units_bytes": sum(sizes),
        "plan_bytes": len(made.to_json(indent=None)),
        "tensors": made.tensors,
        "changed": made.changed,
        "computed": computed,
        "files": len(made.shards),
        "read_bytes": made.read_bytes,
        "write_bytes": made.write_bytes,
        "memory_bytes": made.memory_bytes,
        "seconds": made.seconds,
        **_proof(made),
    }


def _proof(made: ts.MergePlan) -> dict[str, Any]:
    """What verifying the weights sends: how many parts, and what goes with each; the base stands for both models."""
    base = Checkpoint(made.base)
    stack = Stack([(Path(one.adapter), one.weight) for one in made.adapters])
    expectation = Expectation(base, stack, made.binding)
    parts = [part for name in expectation.names for part in parts_of(expectation, name, sample=False)]
    job = pickle.dumps(partial(tally_part, base, expectation))
    began = time.perf_counter()
    pickle.dumps(partial(tally_part, base, expectation))
    packed = time.perf_counter()
    pickle.loads(job)  # noqa: S301 - our own
    opened = time.perf_counter()
    pickle.loads(job)  # noqa: S301 - our own
    ended = time.perf_counter()
    return {
        "parts": len(parts),
        "batches": len(list(batched(parts, 1))),
        "job_bytes": len(job),
        "pack_ms": 1e3 * (packed - began),
        "open_s": opened - packed,
        "unpack_ms": 1e3 * (ended - opened),
    }


def receipts(run: str, base: str, out: str) -> dict[str, Any]:
    """Run a few units, each rounded both ways: what comes back from them, and what they cost a core."""
    found: dict[str, Any] = {}
    for rounding in ("nearest", "faithful"):
        made = ts.plan_merge(run, out, base=base, rounding=rounding)
        Path(out).mkdir(parents=True, exist_ok=True)
        costs: list[tuple[int, int, float, int]] = []
        for unit in _units(made, rounding=rounding):
            with Path(unit.target).open("ab") as file:
                file.truncate(max(file.tell(), unit.end))
            run_unit(unit)  # brings what it reads into the system's cache, and what is compiled into memory
            began = time.process_time()
            receipt = run_unit(unit)
            cpu = time.process_time() - began
            copied = sum(piece.count for piece in unit.pieces if isinstance(piece, Copy))
            costs.append((sum(map(_elements, unit.pieces)), copied, cpu, len(pickle.dumps(receipt))))
        for file in Path(out).glob("*.safetensors"):
            file.unlink()
        computing = [cost for cost in costs if cost[0] and cost[1] < cost[0] / 10]
        found[f"{rounding}_ns"] = 1e9 * sum(cost[2] for cost in computing) / sum(cost[0] for cost in computing)
        found["receipt_bytes"] = max(cost[3] for cost in costs)
        copying = [cost for cost in costs if not cost[0] and cost[1]]
        if copying:
            found["copy_gbs"] = sum(cost[1] for cost in copying) / max(1e-9, sum(cost[2] for cost in copying)) / 1e9
    return found


def merge(run: str, base: str, out: str, *, kind: str, workers: int, rounding: str = "nearest") -> dict[str, Any]:
    """Merge, by so many workers of a kind."""
    made = ts.plan_merge(run, out, base=base, rounding=rounding)
    before, read, began = _cpu(), _io(_READ_OF), _peak_mb()
    with _pool(kind, workers) as pool:
        started = time.perf_counter()
        merged = ts.merge(made, executor=pool, certificate=False)
        seconds = time.perf_counter() - started
    return {
        "wall_s": seconds,
        "cpu_s": _cpu() - before,
        "peak_mb": _peak_mb(),
        "before_mb": began,
        "worker_mb": _peak_mb(resource.RUSAGE_CHILDREN),
        "read_bytes": _io(_READ_OF) - read,
        "written_bytes": sum(file.stat().st_size for file in merged.path.iterdir()),
        "planned_read_bytes": made.read_bytes,
        "planned_write_bytes": made.write_bytes,
        "planned_memory_bytes": made.memory_bytes,
        "planned_s": made.seconds,
        "elements": sum(sums.elements for receipt in merged.receipts for sums in receipt.tensors),
    }


def verify(run: str, base: str, out: str, *, kind: str, workers: int) -> dict[str, Any]:
    """Verify, by so many workers of a kind."""
    before, read = _cpu(), _io(_READ_OF)
    with _pool(kind, workers) as pool:
        started = time.perf_counter()
        verdict = ts.verify(run, out, base=base, levels=LEVELS, executor=pool, certificate=False)
        seconds = time.perf_counter() - started
    if not verdict.good:
        raise SystemExit(f"verify says {verdict.answer}")
    return {
        "wall_s": seconds,
        "cpu_s": _cpu() - before,
        "peak_mb": _peak_mb(),
        "worker_mb": _peak_mb(resource.RUSAGE_CHILDREN),
        "read_bytes": _io(_READ_OF) - read,
    }


def overhead(run: str, base: str, out: str, *, address: str, calls: int) -> dict[str, Any]:
    """Send units of a real plan to an executor that only looks at them."""
    units = _units(ts.plan_merge(run, out, base=base))
    units = [units[number % len(units)] for number in range(calls)]
    look = operator.attrgetter("end")
    began = time.perf_counter()
    with _pool(address, 2) as pool:
        assert pool is not None, "an address of an executor"  # noqa: S101
        started = time.perf_counter()
        pool.submit(look, units[0]).result()
        ready = time.perf_counter()
        alone = []
        for unit in units[: max(1, calls // 10)]:
            sent = time.perf_counter()
            pool.submit(look, unit).result()
            alone.append(time.perf_counter() - sent)
        _through(pool, look, units[:20], most=4)  # so that every worker has begun
        many = time.perf_counter()
        _through(pool, look, units, most=4)
        ended = time.perf_counter()
    return {
        "start_s": started - began,
        "first_s": ready - started,
        "alone_ms": 1e3 * statistics.median(alone),
        "unit_ms": 1e3 * (ended - many) / calls,
    }


def _through(pool: Executor, look: Any, units: Sequence[Unit], *, most: int) -> None:
    """As a merge does it: so many under way, no more."""
    todo, running = deque(units), set[Future[int]]()
    while todo or running:
        while todo and len(running) < most:
            running.add(pool.submit(look, todo.popleft()))
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for one in done:
            one.result()


def hashing(base: str) -> dict[str, Any]:
    """How quickly one thread hashes a file of the system's cache, as a certificate wants it."""
    from tunesmith.checkpoint import sha256_of

    file = max(Path(base).glob("*.safetensors"), key=lambda file: file.stat().st_size)
    sha256_of(file)
    began = time.process_time()
    sha256_of(file)
    return {"sha256_gbs": file.stat().st_size / (time.process_time() - began) / 1e9}


@contextmanager
def _pool(kind: str, workers: int) -> Iterator[Executor | None]:
    if kind == "own":
        yield None
    elif kind == "threads":
        with ThreadPoolExecutor(workers) as pool:
            yield pool
    else:
        with ts.executor_of(f"processes:{workers}" if kind == "processes" else kind) as executor:
            yield executor


def _units(made: ts.MergePlan, *, rounding: str = "nearest") -> list[Unit]:
    base = Checkpoint(made.base)
    adapters = tuple((one.adapter, one.weight) for one in made.adapters)
    files = layout_of(base, made.binding, Stack([(Path(path), weight) for path, weight in adapters]))
    context = Context(made.base, adapters, rounding=rounding, compiled=True, fingerprint="scale")
    return units_of(files, base, made.binding, stage=Path(made.out), context=context)


def _elements(piece: object) -> int:
    return (piece.stop - piece.start) * piece.task.matrix[1] if isinstance(piece, Compute) else 0


def _cpu() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def _peak_mb(who: int = resource.RUSAGE_SELF) -> float:
    if who == resource.RUSAGE_SELF:  # of this program alone: getrusage begins with the parent's
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    return resource.getrusage(who).ru_maxrss * 1024 / 1e6


def _io(key: str) -> int:
    text = Path("/proc/self/io").read_text(encoding="utf-8")
    return int(text.split(f"{key}: ")[1].split()[0])


_JOBS = {job.__name__: job for job in (plan, receipts, merge, verify, overhead, hashing)}

if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    answer = _JOBS[wanted.pop("job")](**wanted)
    sys.stdout.write(json.dumps(answer) + "\n")
