"""A merge that is stopped at any step: nothing half made under the target's name, and the rest is done later."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.merge.conftest import Bench
from tests.merge.test_merge import hashes
from tunesmith.checkpoint import TrailingHashes, sha256_of, weights_sha256
from tunesmith.checkpoint.publish import resumable_stage
from tunesmith.errors import Cancelled, CheckpointError, OutputError
from tunesmith.merge import Merged, MergePlan, merge, plan_merge, units, write
from tunesmith.merge.units import Unit
from tunesmith.progress import Cancellation, Progress

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process of its own, by POSIX's means")

Way = Literal["kill", "torn", "error"]

UNIT_BYTES = 40_000

# All by which the merge changes anything outside its own memory.
STEPS = ("pwrite", "write", "copy_file_range", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several units a file."""
    monkeypatch.setattr(units, "UNIT_BYTES", UNIT_BYTES)


@contextmanager
def stop_at(step: int, way: Way) -> Iterator[list[str]]:
    """Let the ``step``-th change of the disk fail, kill the process before it, or kill it amid a write."""
    taken: list[str] = []

    def hook(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def stepping(*args: Any, **options: Any) -> Any:
            taken.append(name)
            if len(taken) == step:
                if way == "error":
                    raise OSError(errno.EIO, "Input/output error")
                if way == "torn" and name in ("pwrite", "write"):
                    real(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return stepping

    def opening(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        return (hook("open", real_open) if set(mode) & set("wa+") else real_open)(file, mode, *args, **options)

    real_open = io.open
    with pytest.MonkeyPatch.context() as patch:
        for name in STEPS:
            patch.setattr(os, name, hook(name, getattr(os, name)))
        patch.setattr(io, "open", opening)
        yield taken


def killed(plan: MergePlan, step: int, way: Way) -> bool:
    """Merge in a process of its own and kill it at a step; False where it came to its end before."""
    child = os.fork()
    if child == 0:
        try:
            with stop_at(step, way):
                merge(plan)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def same_model(one: Path, other: Path) -> bool:
    """Whether two directories hold the same files."""
    ours, theirs = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in (one, other))
    return ours == theirs


@pytest.fixture(scope="module")
def expected(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    """A merge that nothing disturbs."""
    out = tmp_path_factory.mktemp("expected") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "UNIT_BYTES", UNIT_BYTES)
        return merge(plan_merge(bench.runs["plain"], out, base=str(bench.bases["BF16", "sharded"])))


@pytest.fixture
def plan(bench: Bench, tmp_path: Path) -> MergePlan:
    """The same merge, to be disturbed."""
    return plan_merge(bench.runs["plain"], tmp_path / "out", base=str(bench.bases["BF16", "sharded"]))


def steps_of(bench: Bench, tmp_path: Path, *, force: bool = False) -> int:
    """How many changes of the disk a whole merge makes."""
    out = tmp_path / "count"
    if force:
        out.mkdir()
        (out / "old").write_text("old")
    with stop_at(-1, "error") as taken:
        merge(plan_merge(bench.runs["plain"], out, base=str(bench.bases["BF16", "sharded"]), force=force))
    shutil.rmtree(out)
    return len(taken)


@pytest.mark.parametrize("way", ["kill", "torn"])
def test_a_merge_killed_at_any_step_is_resumed_to_the_same_bytes(
    bench: Bench, plan: MergePlan, expected: Merged, tmp_path: Path, way: Way
) -> None:
    """SIGKILL before each step, or amid each write; the target is not there or is whole; inputs are untouched."""
    inputs = (bench.bases["BF16", "sharded"], bench.runs["plain"])
    before, out = hashes(*inputs), Path(plan.out)
    last = steps_of(bench, tmp_path)
    assert last > 30
    resumed = 0
    for step in range(1, last + 1, 1 if way == "kill" else 3):
        stopped = killed(plan, step, way)
        assert not out.exists() or same_model(out, expected.path), step
        if not out.exists():
            merged = merge(plan)
            assert merged.receipts == expected.receipts, step
            resumed += merged.resumed_bytes > 0
        assert same_model(out, expected.path), step
        assert stopped or step > last - 3  # threads may take a step fewer than was counted
        shutil.rmtree(out)
        shutil.rmtree(tmp_path / ".out.partial", ignore_errors=True)
    assert resumed > last // 10
    assert hashes(*inputs) == before


def test_a_step_that_fails_keeps_the_stage_and_the_next_merge_goes_on(
    bench: Bench, plan: MergePlan, expected: Merged, tmp_path: Path
) -> None:
    """EIO at each step in turn: our own error, which names the stage; then the same bytes."""
    out, last = Path(plan.out), steps_of(bench, tmp_path)
    failed = named = 0
    for step in range(1, last + 1):
        stage, told = tmp_path / ".out.partial", ""
        try:
            with stop_at(step, "error"):
                merge(plan)
        except OutputError as error:
            told = str(error)
        if told:
            failed += 1
            assert not out.exists(), step
            assert (str(stage) in told) == stage.exists(), step
            named += stage.exists()
            assert merge(plan).receipts == expected.receipts, step
        assert same_model(out, expected.path), step
        shutil.rmtree(out)
        shutil.rmtree(tmp_path / ".out.partial", ignore_errors=True)
    assert named > last // 2
    assert failed - named < 4


def test_a_replacement_killed_at_any_step_loses_neither_the_old_nor_the_new(
    bench: Bench, expected: Merged, tmp_path: Path
) -> None:
    """Between the two renames the old one lies in the stage; the next merge puts it back, or replaces it."""
    base, out = str(bench.bases["BF16", "sharded"]), tmp_path / "out"
    last, aside = steps_of(bench, tmp_path, force=True), 0
    for step in range(last - 25, last + 1):
        out.mkdir()
        (out / "old").write_text("old")
        plan = plan_merge(bench.runs["plain"], out, base=base, force=True)
        killed(plan, step, "kill")
        if not out.exists():
            aside += 1
            assert (tmp_path / ".out.partial" / "replaced" / "old").read_text() == "old"
            with pytest.raises(OutputError, match="not empty"):
                merge(plan_merge(bench.runs["plain"], out, base=base))
        assert (out / "old").exists() or same_model(out, expected.path), step
        assert merge(plan).receipts == expected.receipts
        assert same_model(out, expected.path), step
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        shutil.rmtree(out)
    assert aside


def stop_half_way(plan: MergePlan) -> Path:
    """Leave a stage with some units done, as a full disk does; returns it."""
    written = sum(shard.size_bytes for shard in plan.shards) // 2

    def full(told: Progress) -> None:
        if told.done > written:
            raise OSError(errno.ENOSPC, "No space left on device")

    with ThreadPoolExecutor(1) as one_by_one, pytest.raises(OutputError, match="disk is full") as caught:
        merge(plan, executor=one_by_one, progress=full)
    stage = Path(plan.out).parent / f".{Path(plan.out).name}.partial"
    assert str(stage) in str(caught.value)
    assert "same command" in str(caught.value.next_step)
    return stage


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Unit]:
    """The units that are run from now on."""
    seen: list[Unit] = []
    real = write.run_unit

    def noted(unit: Unit, tick: Any = None) -> Any:
        seen.append(unit)
        return real(unit, tick)

    monkeypatch.setattr(write, "run_unit", noted)
    return seen


def test_what_the_journal_says_is_done_is_not_computed_again(
    plan: MergePlan, expected: Merged, computed: list[Unit]
) -> None:
    """And the report of what rounding kept is as complete as of a merge in one go."""
    stage = stop_half_way(plan)
    done = (stage / "journal.jsonl").read_text().count("\n") - 1
    assert done >= 2
    computed.clear()
    merged = merge(plan)
    assert merged.resumed_bytes > 0
    assert len(computed) == sum(1 for _ in all_units(plan)) - done
    assert (merged.receipts, merged.kept) == (expected.receipts, expected.kept)
    assert same_model(merged.path, expected.path)
    assert not stage.exists()


def all_units(plan: MergePlan) -> list[Unit]:
    """Every unit of a plan."""
    base, files = write._checked(plan)
    adapters = tuple((one.adapter, one.weight) for one in plan.adapters)
    context = units.Context(plan.base, adapters, rounding=plan.rounding)
    return units.units_of(files, base, plan.binding, stage=Path("stage"), context=context)


@pytest.mark.parametrize("damage", ["first byte", "cut short", "missing", "journal torn", "journal garbage"])
def test_what_does_not_match_the_journal_is_computed_again(plan: MergePlan, expected: Merged, damage: str) -> None:
    """A journal is believed only where the bytes have its hash."""
    stage = stop_half_way(plan)
    journal = stage / "journal.jsonl"
    file = stage / "new" / json.loads(journal.read_text().splitlines()[1])["file"]
    if damage == "first byte":
        data = bytearray(file.read_bytes())
        data[0] ^= 1
        file.write_bytes(data)
    elif damage == "cut short":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "missing":
        file.unlink()
    elif damage == "journal torn":
        journal.write_bytes(journal.read_bytes()[:-20])
    else:
        journal.write_bytes(os.urandom(1000))
    merged = merge(plan)
    assert merged.receipts == expected.receipts
    assert same_model(merged.path, expected.path)


def test_a_lie_in_the_journal_is_found(plan: MergePlan, expected: Merged) -> None:
    """Lines that are JSON, and are not what a merge wrote."""
    stage = stop_half_way(plan)
    journal = stage / "journal.jsonl"
    lines = journal.read_text().splitlines()
    for lie in ({"sums": {"w": [1]}}, {"sums": 7}, {"checksum": None}, {"end": "x"}, {"file": 3}):
        told = [json.dumps({**json.loads(line), **lie}) for line in lines[1:]]
        journal.write_text("\n".join([lines[0], *told]) + "\n")
        merged = merge(plan)
        assert merged.receipts == expected.receipts, lie
        shutil.rmtree(plan.out)
        stop_half_way(plan)


OTHERWISE: dict[str, dict[str, Any]] = {
    "dtype": {"dtype": "fp32"}, "rounding": {"rounding": "nearest"}, "seed": {"rounding": "stochastic", "seed": 1},
}  # fmt: skip


@pytest.mark.parametrize("change", ["dtype", "base", "adapter", "rounding", "seed"])
def test_a_stage_of_another_merge_is_thrown_away(
    bench: Bench, tmp_path: Path, computed: list[Unit], change: str
) -> None:
    """Another dtype, rounding or seed; or the same paths with other weights in them."""
    run, base = tmp_path / "in" / "run", tmp_path / "in" / "base"
    shutil.copytree(bench.runs["plain"], run)
    shutil.copytree(bench.bases["BF16", "sharded"], base)
    out = tmp_path / "out"
    stop_half_way(plan_merge(run, out, base=str(base), rounding="stochastic" if change == "seed" else "auto"))
    computed.clear()
    if change == "base":
        file = sorted(base.glob("*.safetensors"))[0]
        os.utime(file, ns=(1, 1))
    elif change == "adapter":
        file = run / "adapter_model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    plan = plan_merge(run, out, base=str(base), **OTHERWISE.get(change, {}))
    merged = merge(plan)
    assert merged.resumed_bytes == 0
    assert len(computed) == len(all_units(plan))
    fresh = merge(plan.model_copy(update={"out": str(tmp_path / "fresh")}))
    assert fresh.receipts == merged.receipts


def test_a_file_that_is_no_longer_wanted_does_not_come_along(plan: MergePlan, expected: Merged) -> None:
    """What lay in the stage by an earlier plan's assets."""
    stage = stop_half_way(plan)
    (stage / "new" / "LICENSE").write_text("stale")
    assert same_model(merge(plan).path, expected.path)


def test_a_second_merge_into_the_same_target_is_refused(plan: MergePlan, tmp_path: Path) -> None:
    """While the first is at work; afterwards it may."""
    tried: list[str] = []

    def intrude(_: Progress) -> None:
        if not tried:
            with pytest.raises(OutputError, match="Another process") as caught:
                merge(plan)
            tried.append(str(caught.value.where))

    merge(plan, progress=intrude)
    assert tried == [str(tmp_path / ".out.partial")]
    assert Path(plan.out).is_dir()


def test_a_cancelled_resumption_leaves_nothing(plan: MergePlan, tmp_path: Path) -> None:
    """Who stops a merge on purpose does not want its remains."""
    stop_half_way(plan)
    cancellation = Cancellation()
    cancellation.cancel()
    with pytest.raises(Cancelled):
        merge(plan, cancellation=cancellation)
    assert list(tmp_path.iterdir()) == []


def test_what_an_earlier_merge_had_done_is_hashed_too(plan: MergePlan, expected: Merged) -> None:
    """Behind units that end in any order, from the bytes as they are on the disk."""
    stop_half_way(plan)
    merged = merge(plan, sha256=True)
    assert merged.resumed_bytes > 0
    assert {receipt.filename: receipt.sha256 for receipt in merged.receipts} == {
        receipt.filename: sha256_of(expected.path / receipt.filename) for receipt in expected.receipts
    }


def test_units_that_end_out_of_order_are_hashed_in_order(
    plan: MergePlan, expected: Merged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of every file last: until then the file holds zeros there."""
    real = write.run_unit

    def late(unit: Unit, *more: Any) -> Any:
        if unit.begin == 0:
            time.sleep(0.1)
        return real(unit, *more)

    monkeypatch.setattr(write, "run_unit", late)
    merged = merge(plan, sha256=True)
    assert {receipt.filename: receipt.sha256 for receipt in merged.receipts} == {
        receipt.filename: sha256_of(expected.path / receipt.filename) for receipt in expected.receipts
    }


def test_a_merge_that_is_cancelled_while_it_hashes_leaves_nothing(
    plan: MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All units are done then, and nothing is in place yet."""
    cancellation = Cancellation()
    monkeypatch.setattr(TrailingHashes, "allow", lambda *_: None)  # so that there is no end to it
    threads = threading.active_count()

    def stop(event: Progress) -> None:
        if event.detail == "hashing":
            cancellation.cancel()

    with pytest.raises(Cancelled):
        merge(plan, sha256=True, progress=stop, cancellation=cancellation)
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads


def test_a_base_that_changes_while_it_is_read_is_refused(bench: Bench, tmp_path: Path) -> None:
    """Half of the old and half of the new would be neither."""
    base = tmp_path / "in" / "base"
    shutil.copytree(bench.bases["BF16", "single"], base)
    plan = plan_merge(bench.runs["plain"], tmp_path / "out", base=str(base))
    with pytest.raises(CheckpointError, match="changed while it was read"):
        merge(plan, progress=lambda _: os.utime(base / "model.safetensors", ns=(1, 1)))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_stage_needs_only_the_space_that_is_left(
    plan: MergePlan, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a merge that ran out of space could never go on, once just enough was freed."""
    stop_half_way(plan)
    usage = shutil.disk_usage(Path(plan.out).parent)
    done = sum(file.stat().st_size for file in (Path(plan.out).parent / ".out.partial" / "new").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=plan.write_bytes - done // 4))
    again = plan_merge(bench.runs["plain"], plan.out, base=plan.base)
    merge(again)


def test_symlinked_read_only_snapshots_are_read_and_stay(bench: Bench, tmp_path: Path, expected: Merged) -> None:
    """The hub's cache: a snapshot's files are links into a folder of blobs that is not ours to write."""
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in bench.bases["BF16", "sharded"].iterdir():
        blob = blobs / str(abs(hash(file.name)))
        blob.write_bytes(file.read_bytes())
        blob.chmod(0o444)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob.name))
    before = hashes(tmp_path / "hub")
    merged = merge(plan_merge(bench.runs["plain"], tmp_path / "out", base=str(snapshot)))
    assert weights_sha256(merged.path) == weights_sha256(expected.path)
    assert not any(file.is_symlink() for file in merged.path.iterdir())
    assert hashes(tmp_path / "hub") == before


def test_a_stage_keeps_the_old_directory_when_a_new_target_came_meanwhile(tmp_path: Path) -> None:
    """Three directories for two names: a person must say which."""
    out, root = tmp_path / "out", tmp_path / ".out.partial"
    for folder in (out, root / "new", root / "replaced"):
        folder.mkdir(parents=True)
        (folder / "x").write_text(folder.name)
    with pytest.raises(OutputError, match="another target was made"), resumable_stage(out, force=True):
        pytest.fail("not reached")
    assert (root / "replaced" / "x").read_text() == "replaced"
    assert (out / "x").read_text() == "out"
