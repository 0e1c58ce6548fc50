"""Open 10,000 damaged run directories, and print what came of it.

    python benchmarks/fuzz_runs.py [--count 10000] [--seed 0] [--processes 2] [--kind KIND] [--surface SURFACE]

The directories are copies of those that real tools left (``tests/runs/corpus``), damaged as ``tests/runs/damage.py``
says; a case is made from its seed alone, so that a bad one can be made again.  Each is opened with ``open_run``; every
second one is also described with ``inspect``, shown on a screen, or written as a page, in turn.

What must not be: an exception that is not ours, a case that takes a second (a page excepted; the fastest of three
tries counts, for other programs may be at work) or 300 MB of memory beyond what the process had, one that ends only
with its process (after ten seconds), a directory that is another afterwards, a pickle that was run, what lies outside
the run in the record, and control characters of a file on the screen.  The exit status is 1 if any of it was.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.runs.damage import GOOD, KINDS, SURFACES, Case, Verdict, cleared, damaged, drawn_kind, judged

SECONDS = 1.0
EXTRA_BYTES = 300 * 10**6
HARD_SECONDS = 10.0
MAKING_SECONDS = 120.0  # of a case; 20,000 files take their time on a busy disk
HARD_BYTES = 6 * 2**30  # of a worker's own memory
TRIES = 3
TIMED = ("run", "inspect", "screen")


@dataclass(frozen=True)
class Result:
    """One case.

    Attributes:
        seed: what it was made from.
        surface: what was made of it.
        kind: how it was damaged.
        verdict: what came of it.
        steps: what was done to it.
    """

    seed: int
    surface: str
    kind: str
    verdict: Verdict
    steps: str


class Worker:
    """A process that judges seeds one by one, and can be ended when one does not end.

    Args:
        place: a folder for its cases.
        kind: of the cases; None for all.
        surface: what is made of them; None for all in turn.
    """

    def __init__(self, place: Path, kind: str | None, surface: str | None) -> None:
        self.place, self.kind, self.surface = place, kind, surface
        self.seed: int | None = None
        self.ends = 0.0
        self._begin()

    def _begin(self) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        options = (theirs, self.place, self.kind, self.surface)
        self.process = multiprocessing.Process(target=work, args=options, daemon=True)
        self.process.start()
        theirs.close()
        self.connection.recv()  # it is warm

    def give(self, seed: int | None) -> None:
        """Send the next seed; None to end."""
        self.seed, self.ends = seed, time.monotonic() + MAKING_SECONDS
        self.connection.send(seed)

    def taken(self) -> Result | None:
        """Its answer, of which the process's own end is one; None where it tells which limit begins."""
        try:
            answer: Result | float = self.connection.recv()
        except (EOFError, OSError):
            return self.ended("the process died")
        if isinstance(answer, Result):
            return answer
        self.ends = time.monotonic() + answer
        return None

    def ended(self, outcome: str) -> Result:
        """End the process, begin another, and say why."""
        self.process.kill()
        self.process.join()
        self.connection.close()
        self._begin()
        verdict = Verdict(outcome, "", HARD_SECONDS, 0)
        seed = self.seed or 0
        kind = self.kind or drawn_kind(Random(seed))  # noqa: S311 - not for secrets
        return Result(seed, self.surface or surface_of(seed), kind, verdict, "")


class Table:
    """Outcomes by kind of case, the slowest of each, and what must not be."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.slowest: dict[str, Result] = {}
        self.largest: dict[str, int] = defaultdict(int)
        self.bad: list[Result] = []

    def add(self, result: Result) -> None:
        """Count one."""
        kind, verdict = result.kind, result.verdict
        self.counts[kind][verdict.outcome if verdict.outcome in GOOD else "bad"] += 1
        if result.surface in TIMED:
            slowest = self.slowest.get(kind)
            if slowest is None or slowest.verdict.seconds < verdict.seconds:
                self.slowest[kind] = result
            self.largest[kind] = max(self.largest[kind], verdict.extra_bytes)
        if verdict.outcome not in GOOD:
            self.bad.append(result)
            print(f"seed {result.seed}, {result.surface}, {kind}: {verdict.outcome}", flush=True)
            print(f"    {result.steps!a}\n    {verdict.reason[:300]!a}", flush=True)

    def show(self) -> None:
        """Print it."""
        print(f"{'damage':<18}{'cases':>8}{'a record':>10}{'refused':>9}{'bad':>6}{'slowest':>10}{'memory':>9}")
        for kind in [kind for kind in KINDS if kind in self.counts]:
            self._line(kind, self.counts[kind], self.slowest.get(kind), self.largest[kind])
        slowest = max(self.slowest.values(), key=lambda result: result.verdict.seconds)
        total: Counter[str] = sum(self.counts.values(), Counter())
        self._line("all", total, slowest, max(self.largest.values()))
        print(f"\nslowest: seed {slowest.seed}, {slowest.surface}: {slowest.steps}")

    def _line(self, label: str, row: Counter[str], slowest: Result | None, memory: int) -> None:
        counted = f"{sum(row.values()):>8,}{row['a record']:>10,}{row['refused']:>9,}{row['bad']:>6,}"
        seconds = slowest.verdict.seconds if slowest else 0.0
        print(f"{label:<18}{counted}{1000 * seconds:>7.0f} ms{memory / 10**6:>6.0f} MB")


def surface_of(seed: int) -> str:
    """Every second case is opened only; the others are shown in one of three ways."""
    return "run" if seed % 2 else list(SURFACES)[seed // 2 % len(SURFACES)]


def work(connection: Connection, within: Path, kind: str | None, surface: str | None) -> None:
    """Judge the seeds that come, each in a folder of its own."""
    resource.setrlimit(resource.RLIMIT_DATA, (HARD_BYTES, HARD_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    place = Path(tempfile.mkdtemp(dir=within))
    try:
        for one in [surface] if surface else SURFACES:  # what is imported first is no case's own time
            judged_in(place, 0, one, "truncated")
        connection.send(None)
        while (seed := connection.recv()) is not None:
            connection.send(result_of(place, seed, kind, surface or surface_of(seed), told=connection.send))
    except EOFError:
        return
    finally:
        cleared(place)


def result_of(place: Path, seed: int, kind: str | None, surface: str, *, told: Callable[[float], None]) -> Result:
    """Judge one seed; a slow one again, for other programs may be at work."""
    case, verdict = judged_in(place, seed, surface, kind, told)
    for _ in range(TRIES - 1):
        if verdict.outcome in GOOD and verdict.seconds > SECONDS:
            again = judged_in(place, seed, surface, kind, told)[1]
            verdict = min(verdict, again, key=lambda one: one.seconds)
    if verdict.outcome in GOOD and surface in TIMED:
        if verdict.seconds > SECONDS:
            verdict = replace(verdict, outcome="slow")
        elif verdict.extra_bytes > EXTRA_BYTES:
            verdict = replace(verdict, outcome="memory")
    return Result(seed, surface, case.kind, verdict, f"{case.source}: {'; '.join(case.steps)}"[:300])


def judged_in(
    place: Path, seed: int, surface: str, kind: str | None, told: Callable[[float], None] = float
) -> tuple[Case, Verdict]:
    """Make a case, judge it, and clear it away; tell how long each may take."""
    folder = place / "case"
    folder.mkdir()
    try:
        case = damaged(seed, folder, kind=kind)
        told(HARD_SECONDS)
        verdict = judged(case, surface)
        told(MAKING_SECONDS)
        return case, verdict
    finally:
        cleared(folder)


def results(seeds: Iterator[int], workers: list[Worker]) -> Iterator[Result]:
    """Judge all seeds."""
    for worker in workers:
        worker.give(next(seeds, None))
    while busy := [worker for worker in workers if worker.seed is not None]:
        ready = wait([worker.connection for worker in busy], timeout=0.5)
        for worker in busy:
            result = worker.taken() if worker.connection in ready else None
            if result is None and time.monotonic() > worker.ends:
                result = worker.ended("hung")
            if result is not None:
                yield result
                worker.give(next(seeds, None))
    for worker in workers:
        worker.process.join()


def main() -> int:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kind", choices=list(KINDS))
    parser.add_argument("--surface", choices=list(SURFACES))
    options = parser.parse_args()
    started, table = time.perf_counter(), Table()
    seeds = iter(range(options.seed, options.seed + options.count))
    place = Path(tempfile.mkdtemp(prefix="fuzz-runs-")).resolve()
    try:
        workers = [Worker(place, options.kind, options.surface) for _ in range(options.processes)]
        for number, result in enumerate(results(seeds, workers), 1):
            table.add(result)
            if sys.stderr.isatty():
                print(f"\r{number:,} of {options.count:,}", end="", file=sys.stderr)
    finally:
        cleared(place)
    print()
    table.show()
    print(f"{len(table.bad)} that must not be, in {time.perf_counter() - started:.0f} s")
    return 1 if table.bad else 0


if __name__ == "__main__":
    sys.exit(main())
