"""The cost of a merge and of its proof on any number of machines, from what a plan says and what was measured here.

A run takes as long as the slowest of what goes on at once:

- *arithmetic*: changed numbers × seconds a number, and copied bytes ÷ copying rate, over all cores, or over as many as
  there are units;
- *bytes*: read and written, ÷ the rate of the storage, or of the machines' network together, whichever is less;
- *driver*: units × what handing one out costs the one process that does it;
- *hashes*: the certificate's, of all that is read and written.  On one machine they are two threads; on a cluster every
  file is a unit of work: arithmetic for its cores, as many at once as there are files, and bytes that are read once
  more; of an object storage there are none, for there the workers hash what they upload.

To that comes what is done alone: to start, to plan, for a merge to hash the adapter, for a proof on a cluster to open
the models, and on a cluster the hash of the file that was written last.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

BATCHES_A_CORE = 4  # of a proof, at least


@dataclass(frozen=True)
class Rates:
    """What was measured.

    Attributes:
        nearest_ns: a core's nanoseconds for a changed number, merged and rounded to nearest.
        faithful_ns: the same for faithful rounding.
        verify_ns: the same for its proof.
        copy_gbs: 10⁹ bytes that a core copies in a second.
        sha256_gbs: 10⁹ bytes that a core hashes in a second.
        unit_ms: milliseconds of the driver for one unit on a cluster (Ray).
        plan_us: microseconds of planning, and of making units, for a tensor.
        start_s: seconds until a verb's first unit is under way, without the plan.
    """

    nearest_ns: float
    faithful_ns: float
    verify_ns: float
    copy_gbs: float
    sha256_gbs: float
    unit_ms: float
    plan_us: float
    start_s: float


RATES = tuple(field.name for field in fields(Rates))


@dataclass(frozen=True)
class Work:
    """What a plan says of a model.

    Attributes:
        name: the model.
        elements: numbers that change.
        copied_bytes: bytes that do not.
        read_bytes: all that a merge reads.
        write_bytes: all that it writes.
        units: units of work.
        files: files of weights; each is one unit where it goes to an object storage.
        parts: what a proof is cut into.
        batches: what it is handed out in, where there are few workers.
        open_s: seconds that a cluster's worker takes, once, to open what a proof needs.
        memory_bytes: what one unit works in, as planned.
        tensors: tensors.
        rank: of the adapter.
    """

    name: str
    elements: int
    copied_bytes: int
    read_bytes: int
    write_bytes: int
    units: int
    files: int
    parts: int
    batches: int
    open_s: float
    memory_bytes: int
    tensors: int
    rank: int

    @property
    def flops(self) -> float:
        """Of B·A and the sum: 2·r + 1 a number."""
        return self.elements * (2.0 * self.rank + 1)


@dataclass(frozen=True)
class Place:
    """Where it runs.

    Attributes:
        name: what it is called.
        machines: how many.
        cores: of each.
        network_gbs: 10⁹ bytes a second that one machine reads and writes together.
        storage_gbs: the same of the storage that all share.
        objects: whether that is an object storage, such as S3.
    """

    name: str
    machines: int
    cores: int
    network_gbs: float
    storage_gbs: float
    objects: bool = False

    @property
    def bytes_gbs(self) -> float:
        """What all machines move together."""
        return min(self.storage_gbs, self.machines * self.network_gbs)


@dataclass(frozen=True)
class Cost:
    """Seconds of each part; they go on at once, but for what is done alone."""

    alone_s: float
    arithmetic_s: float
    bytes_s: float
    driver_s: float
    hashes_s: float

    @property
    def seconds(self) -> float:
        """From beginning to end."""
        return self.alone_s + max(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        """What goes on at once."""
        return {
            "arithmetic": self.arithmetic_s,
            "bytes": self.bytes_s,
            "driver": self.driver_s,
            "hashes": self.hashes_s,
        }

    @property
    def held_by(self) -> str:
        """What it waits for."""
        return max(self.parts, key=lambda name: self.parts[name])


def cost_of(work: Work, place: Place, rates: Rates, *, verb: str, certificate: bool) -> Cost:
    """What a verb costs.

    Args:
        work: what there is to do.
        place: where.
        rates: what was measured.
        verb: ``nearest`` or ``faithful`` for a merge, ``verify`` for its proof.
        certificate: whether everything is hashed besides.
    """
    moved = work.read_bytes + work.write_bytes  # a proof reads what the merge wrote
    hashed = certificate and not place.objects
    there = hashed and place.machines > 1  # by the cluster
    cores = place.machines * place.cores
    batches = min(work.parts, max(work.batches, BATCHES_A_CORE * cores))
    pieces = batches if verb == "verify" else work.files if place.objects else work.units
    adapter_bytes = max(0, work.read_bytes - work.write_bytes)
    all_s = moved / rates.sha256_gbs / 1e9 if hashed else 0.0
    return Cost(
        alone_s=rates.start_s
        + work.tensors * rates.plan_us / 1e6
        + (work.open_s if verb == "verify" and place.machines > 1 else 0.0)
        + (0.0 if verb == "verify" else adapter_bytes / rates.sha256_gbs / 1e9)
        + (work.write_bytes / work.files / rates.sha256_gbs / 1e9 if there else 0.0),
        arithmetic_s=_core_s(work, place, rates, verb) / min(cores, pieces) + (all_s / cores if there else 0.0),
        bytes_s=moved * (2 if there else 1) / 1e9 / place.bytes_gbs,
        driver_s=pieces * rates.unit_ms / 1e3 if place.machines > 1 else 0.0,
        hashes_s=all_s / (min(cores, 2 * work.files) if there else 2),
    )


def _core_s(work: Work, place: Place, rates: Rates, verb: str) -> float:
    """Seconds of one core for all of it."""
    each_ns = {"nearest": rates.nearest_ns, "faithful": rates.faithful_ns, "verify": rates.verify_ns}[verb]
    seconds = (work.elements * each_ns + work.copied_bytes / rates.copy_gbs) / 1e9
    if verb != "verify" and place.objects:
        seconds += work.write_bytes / rates.sha256_gbs / 1e9
    return seconds


def useful_machines(work: Work, place: Place, rates: Rates, *, verb: str, certificate: bool) -> int:
    """How many machines of that kind it takes until twice as many save less than a tenth of the time."""
    count = 1
    while count < 1 << 16:
        now, twice = (
            cost_of(work, replace(place, machines=machines), rates, verb=verb, certificate=certificate).seconds
            for machines in (count, 2 * count)
        )
        if twice > 0.9 * now:
            return count
        count *= 2
    return count
