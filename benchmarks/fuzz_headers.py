"""Read 100,000 spoilt safetensors files and indexed directories, beside the safetensors package; print what came of it.

    python benchmarks/fuzz_headers.py [--cases 100000] [--seed 0] [--long-bytes 10000000]

Four in five cases are single files, the others directories with an index and shards; a case is made from its seed
alone, so that a bad one can be made again.  A case that takes ten seconds counts as hung.  While a directory is read,
every file that the process opens is noted; none may lie outside it.  Last come a few files whose size is the attack.

The exit status is 1 unless these are all 0: what we accept and safetensors refuses, what is read differently, refusals
without a stated reason, crashes, hangs, and files opened outside the directory.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.checkpoint.mutations import (
    LONG,
    STRICTER,
    framed,
    judged_directory,
    judged_file,
    spoilt_directory,
    spoilt_file,
)

from tunesmith.checkpoint import read_header
from tunesmith.errors import CheckpointError

GOOD = {
    "both read the same": "same",
    "both refuse": "both refuse",
    "we refuse alone": "we alone",
    "read as it was written": "read",
    "refused": "refused",
}
BAD = {
    "we accept what safetensors refuses": "they alone",
    "read differently": "differ",
    "unexplained refusal": "no reason",
    "crash": "crash",
    "hang": "hang",
    "left the directory": "outside",
}
SECONDS = 10


class Hang(BaseException):
    """A case took too long."""


class Watch:
    """The files that are opened while a directory is watched."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.outside: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self.folder is not None and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(arguments[0]))  # noqa: PTH100 - links are not to be followed
            if Path(path).parent != self.folder:
                self.outside.append(path)

    @contextmanager
    def on(self, folder: Path) -> Iterator[None]:
        """Note what is opened outside the folder."""
        self.folder, self.outside = folder, []
        try:
            yield
        finally:
            self.folder = None


class Table:
    """Outcomes by kind of case, the slowest case, and the seeds of what must not be."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.reasons: Counter[str] = Counter()
        self.slowest: dict[str, float] = defaultdict(float)
        self.bad: list[str] = []

    def add(self, kind: str, seed: int, judge: Callable[[], str]) -> None:
        """Judge one case."""
        started = time.perf_counter()
        outcome = judged(judge)
        self.slowest[kind] = max(self.slowest[kind], time.perf_counter() - started)
        outcome, _, reason = outcome.partition(": ")
        if reason and reason not in STRICTER and outcome == "we refuse alone":
            outcome = "unexplained refusal"
        elif reason and outcome == "we refuse alone":
            self.reasons[reason] += 1
        self.counts[kind][outcome] += 1
        if outcome not in GOOD:
            self.bad.append(f"seed {seed}, {kind}: {outcome} {reason}")

    def show(self) -> None:
        """Print it."""
        columns = {name: short for name, short in {**GOOD, **BAD}.items() if name in BAD or self._has(name)}
        print(f"{'case':<30}" + "".join(f"{short:>{len(short) + 2}}" for short in columns.values()) + f"{'ms':>9}")
        total: Counter[str] = Counter()
        for kind, row in sorted(self.counts.items()):
            total += row
            self._line(kind, row, columns, self.slowest[kind])
        self._line(f"all {sum(total.values()):,}", total, columns, max(self.slowest.values()))
        print()

    def _has(self, outcome: str) -> bool:
        return any(row[outcome] for row in self.counts.values())

    def _line(self, label: str, row: Counter[str], columns: dict[str, str], seconds: float) -> None:
        cells = "".join(f"{row[name]:>{len(short) + 2}}" for name, short in columns.items())
        print(f"{label:<30}{cells}{1000 * seconds:>9.1f}")


def judged(judge: Callable[[], str]) -> str:
    """The outcome of a case; a crash or a hang is one too."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return judge()
    except Hang:
        return "hang: "
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a crash is what is looked for; a panic of Rust's is no Exception
        return f"crash: {error!r}"[:300]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def judged_long(path: Path, content: bytes) -> str:
    """Read a file whose size is the attack."""
    path.write_bytes(content)
    try:
        read_header(path)
    except CheckpointError:
        return "refused"
    return "read as it was written"


def run(cases: int, seed: int, long_bytes: int, work: Path) -> list[Table]:
    """All cases."""
    b"x".decode("utf-8-sig")  # Python loads a codec from its file when it is first used
    files, directories, long = Table(), Table(), Table()
    file, folder, watch = work / "x.safetensors", work / "outer" / "model", Watch()
    for number in range(seed, seed + cases - cases // 5):
        case = spoilt_file(number)
        files.add(case.kind, number, lambda content=case.content: judged_file(file, content))  # type: ignore[misc]

    def judge() -> str:
        with watch.on(folder):
            outcome = judged_directory(folder)
        return f"left the directory: {watch.outside}" if watch.outside else outcome

    for number in range(seed, seed + cases // 5):
        directories.add(spoilt_directory(number, folder), number, judge)
    for kind, make in LONG.items():
        content = framed(make(long_bytes), b"x" if "ones" in kind else b"")
        long.add(kind, 0, lambda content=content: judged_long(file, content))  # type: ignore[misc]
    return [files, directories, long]


def _hung(*_: object) -> None:
    raise Hang


def main() -> int:
    """Run, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--long-bytes", type=int, default=10_000_000)
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, _hung)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        tables = run(options.cases, options.seed, options.long_bytes, Path(work).resolve())
    titles = ("Single files", "Directories", f"Headers of {options.long_bytes:,} bytes")
    for title, table in zip(titles, tables, strict=True):
        print(title)
        table.show()
    print("ms: the slowest case.  they alone: refused by safetensors alone.  outside: another's file was opened.")
    print("Refused by us alone, and why:")
    for reason, why in STRICTER.items():
        print(f"{tables[0].reasons[reason]:>8}  {reason}: {why}")
    bad = [line for table in tables for line in table.bad]
    print(f"\n{len(bad)} that must not be, in {time.perf_counter() - started:.0f} s", *bad[:20], sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
