"""How merging and verifying grow: with the model, with workers, with machines.

    python benchmarks/scale.py --work DIR [--quick] [--only TABLE ...] [--rounds 3]
    python benchmarks/scale.py --work DIR --model [--rate verify_ns=2.5 ...]

Each table is in Markdown, under its name, with the machine's load when it began and ended; ``--into docs/scale.md``
also puts it there:

- ``plan``: a mixture of 671 B, DeepSeek-V3's shapes in sparse files of true headers: planned, and cut into units, from
  headers alone; and what of it has to travel.
- ``workers``: a merge and a verification of 1.5 B by 1, 2 and 4 threads and processes.
- ``overhead``: what an executor costs a unit that does nothing.
- ``planned``: what a plan says beside what is measured: 135 M, 1.5 B, 7 B.
- ``rates``: what a core does in a second; kept in ``rates.json`` in DIR.
- ``check``: what the model of costs says of this machine, beside what is measured.
- ``ceilings``: from those rates and from plans of 7 B, 70 B and 671 B (``benchmarks/scale_model.py``): how long it
  takes on some machines, what it then waits for, and how many machines are of use.  ``--model`` prints this one alone;
  ``--rate`` puts another figure in place of a measured one.

``--quick`` takes small shapes throughout, to see that it runs.  Every measurement is a process of its own; seconds are
wall time, medians over the rounds; what is read lies in the system's cache where that is large enough.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}

import synthetic
from merge_cost import disk_rate
from mixtures import MIXTURES, RANK, write_hollow_adapter, write_hollow_mixture
from scale_jobs import asked
from scale_model import RATES, Place, Rates, Work, cost_of, useful_machines

WORKERS = (1, 2, 4)
_NO_LIMIT = 1e6
EXECUTORS = ("processes:2", "ray", "dask")
PLACES = (
    Place("1 machine, 16 cores, disk of 3 GB/s", 1, 16, 3.0, 3.0),
    Place("8 machines, 25 Gb/s each, file system of 20 GB/s", 8, 16, 3.1, 20.0),
    Place("64 machines, 25 Gb/s each, object storage", 64, 16, 3.1, _NO_LIMIT, objects=True),
)
VERBS = ("nearest", "faithful", "verify")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table in Markdown; the first column is text."""
    print("| " + " | ".join(head) + " |")
    print("|" + "|".join([" --- "] + [" ---: "] * (len(head) - 1)) + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


def figure(value: float) -> str:
    """A number with three digits that count."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def model(options: argparse.Namespace, size: str) -> tuple[str, str]:
    """A base and an adapter of true numbers."""
    base, adapter = options.work / f"base-{size}", options.work / f"adapter-{size}"
    subprocess.run([sys.executable, synthetic.__file__, size, base, adapter], check=True)  # noqa: S603
    return str(adapter), str(base)


def hollow(options: argparse.Namespace, size: str) -> tuple[str, str]:
    """A base of holes, and an adapter."""
    base, adapter = options.work / f"hollow-{size}", options.work / f"hollow-{options.form}-{size}"
    if size in MIXTURES:
        write_hollow_mixture(base, MIXTURES[size])
        write_hollow_adapter(adapter, MIXTURES[size], base, form=options.form)
    else:
        synthetic.write_base(base, size, hollow=True)
        synthetic.write_adapter(adapter, size, base, hollow=True)
    return str(adapter), str(base)


def fresh(options: argparse.Namespace) -> str:
    """A place to merge into, empty."""
    out = options.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    return str(out)


def plan(options: argparse.Namespace) -> None:
    """A plan of 671 B, from headers."""
    rows, proofs = [], []
    for size in ("671b-6",) if options.quick else ("671b-6", "671b"):
        run, base = hollow(options, size)
        found = asked("plan", run=run, base=base, out=fresh(options))
        rows.append(
            (
                size,
                f"{found['write_bytes'] / 1e12:.3g} TB",
                f"{found['tensors']:,} in {found['files']:,} files",
                figure(found["plan_s"]),
                figure(found["units_s"]),
                figure(found["peak_mb"]),
                f"{found['units']:,}",
                figure(found["unit_bytes"]),
                f"{figure(found['all_units_bytes'] / 1e6)} MB",
                f"{figure(found['plan_bytes'] / 1e6)} MB",
            )
        )
        sent = (figure(found[key]) for key in ("pack_ms", "unpack_ms", "open_s"))
        proofs.append((size, f"{found['parts']:,}", f"{found['batches']:,}", f"{found['job_bytes']:,}", *sent))
    head = ("model", "written", "tensors", "plan s", "units s", "peak MB", "units")
    table((*head, "bytes a unit", "all units", "the plan's record"), rows)
    print("\nWhat goes with every batch of a verification's parts, on processes and clusters:\n")
    table(
        ("model", "parts", "batches", "bytes", "to pack, ms", "to unpack, ms", "to open the models, once a worker, s"),
        proofs,
    )
    run, base = model(options, "1.5b-1")
    bytes_of = asked("receipts", run=run, base=base, out=fresh(options))["receipt_bytes"]
    print(f"\nA unit's receipt: {bytes_of:,} bytes at most, of units of one layer of 1.5 B.")


def workers(options: argparse.Namespace) -> None:
    """Merge and verify by more and more workers."""
    size = "1.5b-1" if options.quick else "1.5b"
    run, base = model(options, size)
    rows, alone = [], {}
    for kind in ("threads", "processes"):
        for count in WORKERS:
            merges, proofs = [], []
            for _ in range(options.rounds):
                out = fresh(options)
                merges.append(asked("merge", run=run, base=base, out=out, kind=kind, workers=count))
                proofs.append(asked("verify", run=run, base=base, out=out, kind=kind, workers=count))
            row: list[object] = [f"{kind}: {count}"]
            for verb, costs in (("merge", merges), ("verify", proofs)):
                wall, cpu = (statistics.median(cost[key] for cost in costs) for key in ("wall_s", "cpu_s"))
                alone.setdefault((kind, verb), wall)
                share = alone[kind, verb] / wall / count
                memory = max(cost["worker_mb" if kind == "processes" else "peak_mb"] for cost in costs)
                row += [f"{wall:.2f}", f"{cpu:.2f}", f"{100 * share:.0f} %", f"{memory:.0f}"]
            rows.append(row)
    head = ["merge s", "CPU s", "efficiency", "peak MB", "verify s", "CPU s", "efficiency", "peak MB"]
    print(f"{size}, {os.cpu_count()} cores; memory is of one worker process, or of all threads together\n")
    table(["workers", *head], rows)


def overhead(options: argparse.Namespace) -> None:
    """What an executor costs a unit."""
    run, base = hollow(options, "1.5b")
    rows = []
    for address in ("threads", *EXECUTORS):
        found = asked("overhead", run=run, base=base, out=fresh(options), address=address, calls=_calls(options))
        rows.append((address, *(figure(found[key]) for key in ("start_s", "first_s", "alone_ms", "unit_ms"))))
    table(("executor", "to start, s", "first unit, s", "one unit alone, ms", "a unit among many, ms"), rows)


def planned(options: argparse.Namespace) -> None:
    """What a plan says, beside what was."""
    rows = []
    for size in ("135m", "1.5b-1") if options.quick else ("135m", "1.5b", "7b"):
        run, base = model(options, size)
        out = fresh(options)
        cost = asked("merge", run=run, base=base, out=out, kind="own", workers=0, rounding="faithful")
        proof = asked("verify", run=run, base=base, out=out, kind="own", workers=0)
        working = cost["peak_mb"] - cost["before_mb"]
        rows.append(
            (
                size,
                *(f"{cost[key] / 1e9:.2f}" for key in ("planned_read_bytes", "read_bytes")),
                *(f"{cost[key] / 1e9:.2f}" for key in ("planned_write_bytes", "written_bytes")),
                f"{cost['planned_memory_bytes'] / 1e6:.0f}",
                f"{working:.0f}",
                *(f"{cost[key]:.1f}" for key in ("planned_s", "wall_s")),
                f"{proof['read_bytes'] / 1e9:.2f}",
                f"{proof['wall_s']:.1f}",
                f"{proof['peak_mb']:.0f}",
            )
        )
        shutil.rmtree(out)
    told = ("read GB, planned", "measured", "written GB, planned", "measured", "MB a unit, planned")
    more = ("measured, all threads", "merge s, planned", "measured", "verify: read GB", "s", "peak MB")
    print("faithful rounding, threads, one a core\n")
    table(("model", *told, *more), rows)


def rates(options: argparse.Namespace) -> None:
    """What a core does."""
    found: dict[str, Any] = asked("receipts", **_named(model(options, "1.5b-1")), out=fresh(options))
    proofs = []
    for size in ("1.5b-3", "1.5b-6" if options.quick else "1.5b"):  # both large enough for compiled arithmetic
        named, out = _named(model(options, size)), fresh(options)
        merged = asked("merge", **named, out=out, kind="own", workers=0)
        proof = asked("verify", **named, out=out, kind="threads", workers=1)
        proofs.append((merged["elements"], proof["cpu_s"], proof["wall_s"]))
    found |= asked("hashing", base=named["base"])
    (few, short, first), (many, long, _) = proofs
    found["verify_ns"] = 1e9 * (long - short) / (many - few)
    found["start_s"] = max(0.0, first - few * found["verify_ns"] / 1e9)
    dispatch = asked("overhead", **named, out=fresh(options), address="ray", calls=_calls(options))
    found["unit_ms"] = dispatch["unit_ms"]
    size = "671b-6" if options.quick else "671b"
    mixture = asked("plan", **_named(hollow(options, size)), out=fresh(options))
    found["plan_us"] = 1e6 * (mixture["plan_s"] + mixture["units_s"]) / mixture["tensors"]
    kept = {name: found[name] for name in RATES}
    (options.work / "rates.json").write_text(json.dumps(kept, indent=2))
    table(("rate", "measured"), [(name, figure(value)) for name, value in kept.items()])


def check(options: argparse.Namespace) -> None:
    """The model of costs beside the clock: on this machine, from the system's cache, written to its disk."""
    measured, size = _rates(options), "1.5b-3" if options.quick else "1.5b"
    run, base = model(options, size)
    work, disk = _work(options, size), disk_rate(options.work) / 1e3
    cores = os.cpu_count() or 1
    here = Place("here", 1, cores, disk, disk)
    rows = []
    for verb in VERBS:
        walls = []
        for _ in range(options.rounds):
            if verb != "verify":
                out = fresh(options)
                walls.append(asked("merge", run=run, base=base, out=out, kind="own", workers=0, rounding=verb))
            else:
                walls.append(asked("verify", run=run, base=base, out=out, kind="own", workers=0))
        cached = replace(work, read_bytes=0, write_bytes=0 if verb == "verify" else work.write_bytes)
        cost = cost_of(cached, here, measured, verb=verb, certificate=False)
        wall = statistics.median(one["wall_s"] for one in walls)
        rows.append((verb, figure(cost.arithmetic_s), figure(cost.bytes_s), figure(cost.seconds), figure(wall)))
    print(f"{size}, {cores} cores, disk {disk:.2g} GB/s\n")
    table(("", "arithmetic s", "disk s", "model s", "measured s"), rows)


def ceilings(options: argparse.Namespace) -> None:
    """How long it takes elsewhere, and what for."""
    measured = _rates(options)
    print("with " + ", ".join(f"{name} = {figure(getattr(measured, name))}" for name in RATES) + "\n")
    works = [_work(options, size) for size in (("7b", "671b-6") if options.quick else ("7b", "70b", "671b"))]
    head = (
        "model",
        "changed numbers",
        "read GB",
        "written GB",
        "10¹² operations",
        "units",
        "files",
        "batches of a proof",
    )
    rows = []
    for work in works:
        sizes = (work.elements, work.read_bytes / 1e9, work.write_bytes / 1e9, work.flops / 1e12)
        counts = (f"{count:,}" for count in (work.units, work.files, work.batches))
        rows.append((work.name, *map(figure, sizes), *counts, f"{work.memory_bytes / 1e6:.0f}"))
    table((*head, "MB a unit"), rows)
    for certificate in (False, True):
        print(f"\nSeconds, and what it waits for, {'with' if certificate else 'without'} a certificate:\n")
        places = [place.name for place in PLACES]
        lines = []
        for work in works:
            for verb in VERBS:
                costs = [cost_of(work, place, measured, verb=verb, certificate=certificate) for place in PLACES]
                most = useful_machines(work, PLACES[-1], measured, verb=verb, certificate=certificate)
                cells = [f"{figure(cost.seconds)} ({cost.held_by})" for cost in costs]
                lines.append((f"{work.name}, {verb}", *cells, most))
        table(("", *places, "machines of use"), lines)


def _work(options: argparse.Namespace, size: str) -> Work:
    found = asked("plan", **_named(hollow(options, size)), out=fresh(options))
    return Work(
        name=size,
        elements=found["computed"],
        copied_bytes=found["write_bytes"] - 2 * found["computed"],
        read_bytes=found["read_bytes"],
        write_bytes=found["write_bytes"],
        units=found["units"],
        files=found["files"],
        parts=found["parts"],
        batches=found["batches"],
        open_s=found["open_s"],
        memory_bytes=found["memory_bytes"],
        tensors=found["tensors"],
        rank=RANK,
    )


def _rates(options: argparse.Namespace) -> Rates:
    file = options.work / "rates.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    known |= {name: float(value) for name, _, value in (one.partition("=") for one in options.rate)}
    if missing := [name for name in RATES if name not in known]:
        raise SystemExit(f"run --only rates first, or pass --rate: {', '.join(missing)}")
    return Rates(**{name: known[name] for name in RATES})


def _named(pair: tuple[str, str]) -> dict[str, str]:
    return {"run": pair[0], "base": pair[1]}


def _calls(options: argparse.Namespace) -> int:
    return 50 if options.quick else 1000


TABLES: dict[str, Callable[[argparse.Namespace], None]] = {
    table.__name__: table for table in (plan, workers, overhead, planned, rates, check, ceilings)
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a directory; 45 GB free for 7 B, else 10")
    parser.add_argument("--quick", action="store_true", help="small shapes, one round")
    parser.add_argument("--only", action="append", choices=TABLES, help="this table; may be repeated")
    parser.add_argument("--model", action="store_true", help="the table of ceilings alone, from rates that are known")
    parser.add_argument("--rate", action="append", default=[], metavar="NAME=NUMBER", help=", ".join(RATES))
    parser.add_argument(
        "--form",
        choices=("parameters", "modules"),
        default="parameters",
        help="whether a mixture's adapter has a pair of factors a layer, or one for every matrix of every expert",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--into", type=Path, metavar="FILE.md", help="also put each table into a document, by its name")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    options.rounds = 1 if options.quick else options.rounds
    for name in ["ceilings"] if options.model else options.only or TABLES:
        before, text = os.getloadavg()[0], io.StringIO()
        print(f"\n### {name}{' (quick)' if options.quick else ''}\n", flush=True)
        with redirect_stdout(text):
            TABLES[name](options)
            loads = f"{before:.1f} before, {os.getloadavg()[0]:.1f} after"
            print(f"\n*{date.today()}, {os.cpu_count()} cores, load {loads}{'; quick' if options.quick else ''}.*")
        print(text.getvalue(), flush=True)
        if options.into:
            put_in(options.into, name, text.getvalue())
    shutil.rmtree(options.work / "out", ignore_errors=True)


def put_in(document: Path, name: str, text: str) -> None:
    """Put a table into a document, between the comments that name it."""
    begin, end = f"<!-- scale.py: {name} -->\n", f"<!-- /{name} -->"
    head, _, rest = document.read_text(encoding="utf-8").partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise SystemExit(f"{document} has no place for {name}: {begin.strip()} … {end}")
    document.write_text(f"{head}{begin}\n{text.strip()}\n\n{end}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
