"""A mixture of experts of 671 B, planned from headers: the files are sparse, and their numbers are never read."""

from __future__ import annotations

import pickle
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.mixtures import MIXTURES, Form, Mixture, write_hollow_adapter, write_hollow_mixture

from tunesmith.merge import Context, MergePlan, Unit, plan_merge
from tunesmith.merge import units as room

write = sys.modules["tunesmith.merge.write"]

FORMS: tuple[Form, ...] = ("modules", "parameters")
TINY = Mixture(64, 8, 0, 32, 32, 32, 2, 16, 16, 128, 64, 128, 1000, shards=4)


@pytest.fixture(autouse=True)
def _endless_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No disk here takes what is planned."""
    monkeypatch.setattr(sys.modules["tunesmith.merge.plan"], "check_free_space", lambda *_: None)


def planned(folder: Path, shape: Mixture, form: Form) -> MergePlan:
    """Write the files, and plan a merge of them."""
    base = write_hollow_mixture(folder / "base", shape)
    return plan_merge(write_hollow_adapter(folder / form, shape, base, form=form), folder / "out")


def units_of(plan: MergePlan) -> list[Unit]:
    """Every unit of a plan."""
    base, files = write._checked(plan)
    context = Context(plan.base, tuple((one.adapter, one.weight) for one in plan.adapters))
    return room.units_of(files, base, plan.binding, stage=Path("stage"), context=context)


def check(plan: MergePlan, units: list[Unit], shape: Mixture, form: Form) -> None:
    """What holds of a plan of any size."""
    tensors = shape.tensors()
    routers = sum(".mlp.gate." in name for name in tensors)
    kept = 2 + routers + sum(name.endswith("norm.weight") for name in tensors)
    # Fused parameters are the routed experts alone: no dense layer, no shared expert.
    kept += 3 * shape.layers if form == "parameters" else 0
    assert (plan.tensors, plan.changed) == (len(tensors), len(tensors) - kept)
    for shard in plan.shards:
        mine = [unit for unit in units if Path(unit.target).name == shard.filename]
        assert [unit.begin for unit in mine] == [0, *(unit.end for unit in mine[:-1])]
        assert mine[-1].end == shard.size_bytes
    assert sum(shard.size_bytes for shard in plan.shards) <= plan.write_bytes
    # A worker is sent what it does and nothing of the rest.
    assert max(len(pickle.dumps(unit)) for unit in units) < 40_000
    assert plan.memory_bytes < 250e6


@pytest.mark.parametrize("form", FORMS)
def test_six_layers_are_planned_and_cut(tmp_path: Path, form: Form) -> None:
    """76 GB, of which nothing is on the disk but headers."""
    shape = MIXTURES["671b-6"]
    plan = planned(tmp_path, shape, form)
    units = units_of(plan)
    check(plan, units, shape, form)
    assert plan.write_bytes > 76e9
    assert len(units) >= plan.write_bytes // room.UNIT_BYTES
    assert sum(file.stat().st_blocks for file in tmp_path.rglob("*")) * 512 < 4e6


def test_a_plan_of_many_files_is_no_more_work_than_one_of_few(tmp_path: Path) -> None:
    """The same tensors in four files and in a hundred: what is known of all updates is made once, not once a file."""
    few, many = (_calls(tmp_path / str(shards), replace(TINY, shards=shards)) for shards in (4, 100))
    assert few > 100_000
    assert many < 1.2 * few


def _calls(folder: Path, shape: Mixture) -> int:
    """How many functions a plan and its units call, Python's and built-in ones."""
    count = 0

    def told(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(told)
    try:
        units_of(planned(folder, shape, "parameters"))
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.slow
def test_all_671_billion(tmp_path: Path) -> None:
    """1.34 TB in 163 files, in seconds and within two gigabytes of memory."""
    shape, began = MIXTURES["671b"], time.process_time()
    plan = planned(tmp_path, shape, "parameters")
    units = units_of(plan)
    seconds = time.process_time() - began
    check(plan, units, shape, "parameters")
    assert plan.write_bytes > 1.34e12
    assert len(units) > 19_000
    assert seconds < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2 << 20  # in KiB
