"""The hub as a storage: read by range, written shard by shard, and what is written down of it kept elsewhere."""

from __future__ import annotations

import errno
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfFileSystem, constants
from huggingface_hub.utils import _http

import tunesmith as ts
from tests.export.push.fake_hub import TOKEN, Entry, FakeHub
from tests.storage.conftest import files_of
from tests.tiny_models import TinyRun
from tunesmith.errors import Cancelled, OutputError

# The client's own: of how it sends a file by LFS.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

BASE, OUT = "hf://org/base", "hf://me/merged"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: TinyRun) -> Iterator[FakeHub]:
    """A hub that holds the tiny base and an empty repository, and a user who is logged in there."""
    served = FakeHub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spool"))
    (tmp_path / "spool").mkdir()
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda _: None, time=time.time))
    monkeypatch.setattr("tunesmith.checkpoint.storage._HUB_FIRST_WAIT_S", 0.001)
    HfFileSystem.clear_instance_cache()
    base = served.add_repo("org/base", private=True)
    base.commit("main", {name: Entry(content) for name, content in files_of(tiny.base).items()})
    served.add_repo("me/merged", private=True)
    yield served
    HfFileSystem.clear_instance_cache()
    served.close()


def held(hub: FakeHub, revision: str = "main") -> dict[str, bytes]:
    """What lies in the target's repository, by name."""
    files = hub.files("me/merged", revision).items()
    return {name: hub.content(entry) for name, entry in files if name != ".gitattributes"}


def local(tiny: TinyRun, out: Path, **options: Any) -> dict[str, bytes]:
    """The files of the same merge on a disk."""
    ts.merge(ts.plan_merge(tiny.adapters["final"], out, base=str(tiny.base), **options), certificate=False)
    return files_of(out)


def test_a_merge_from_the_hub_has_the_bytes_of_a_local_one(hub: FakeHub, tiny: TinyRun, tmp_path: Path) -> None:
    """And each byte of the weights is read once, but for the header."""
    plan = ts.plan_merge(tiny.adapters["final"], tmp_path / "far", base=BASE)
    hub.ranges.clear()
    ts.merge(plan, certificate=False)
    assert files_of(tmp_path / "far") == local(tiny, tmp_path / "near")
    name, size = "model.safetensors", (tiny.base / "model.safetensors").stat().st_size
    read = sum(end - begin for file, begin, end in hub.ranges if file == name)
    assert size <= read <= size + 100_000


@pytest.mark.parametrize("out", [OUT, f"{OUT}/deep/er"])
def test_a_merge_into_the_hub_has_the_bytes_of_a_local_one(
    hub: FakeHub, tiny: TinyRun, tmp_path: Path, out: str
) -> None:
    """A commit for every shard, and one for all that is small; no trace of the work is left."""
    merged = ts.merge(ts.plan_merge(tiny.adapters["final"], out, base=BASE, shard_size="150KB"))
    folder = out.removeprefix(OUT).lstrip("/")
    expected = local(tiny, tmp_path / "near", shard_size="150KB")
    assert held(hub) == {f"{folder}/{name}" if folder else name: data for name, data in expected.items()}
    assert len(hub.repos["me/merged"].commits) == 1 + len(merged.receipts) + 1
    assert len(merged.receipts) > 2
    assert list((tmp_path / "spool").iterdir()) == []
    assert [file for file in (tmp_path / "home").rglob("*") if file.is_file() and "merges" in file.parts] == []
    answer = ts.verify(tiny.adapters["final"], out, base=BASE, levels=("structure", "assets", "weights")).answer
    assert answer in ("identical", "equal_within_rounding")


def test_a_merge_that_the_hub_refuses_goes_on(hub: FakeHub, tiny: TinyRun, tmp_path: Path) -> None:
    """Whole shards stay in their commits, nothing looks finished, and the second one sends what is left."""
    options: dict[str, Any] = {"base": BASE, "shard_size": "100KB"}
    plan = ts.plan_merge(tiny.adapters["final"], OUT, **options)
    hub.fail(r"PUT /store", 403, times=10_000)
    before = len(hub.repos["me/merged"].commits)
    with pytest.raises(OutputError, match="refuses access") as caught:
        ts.merge(plan, certificate=False)
    assert "repeat the same command" in str(caught.value.next_step)
    assert TOKEN not in str(caught.value)
    assert len(hub.repos["me/merged"].commits) == before
    hub.faults.clear()

    def soon(_: ts.Progress) -> None:
        if len(hub.repos["me/merged"].commits) >= before + 2:
            hub.fail(r"POST .*/commit/", 403, times=10_000)

    with pytest.raises(OutputError, match="refuses access"):
        ts.merge(ts.plan_merge(tiny.adapters["final"], OUT, **options), certificate=False, progress=soon)
    hub.faults.clear()
    left = held(hub)
    assert left
    assert "config.json" not in left
    merged = ts.merge(ts.plan_merge(tiny.adapters["final"], OUT, **options), certificate=False)
    assert merged.resumed_bytes > 0
    assert held(hub) == local(tiny, tmp_path / "near", shard_size="100KB")


@pytest.mark.parametrize("status", [409, 412, 429, 503])
def test_a_hub_without_time_is_asked_again(hub: FakeHub, tiny: TinyRun, tmp_path: Path, status: int) -> None:
    """Other commits, too many requests, or a hub that fails."""
    plan = ts.plan_merge(tiny.adapters["final"], OUT, base=BASE, shard_size="150KB")
    hub.fail(r"POST .*/commit/", status, times=3)
    ts.merge(plan, certificate=False)
    assert held(hub) == local(tiny, tmp_path / "near", shard_size="150KB")


def test_what_is_stopped_leaves_nothing(hub: FakeHub, tiny: TinyRun, tmp_path: Path) -> None:
    """What was committed goes in a further commit."""
    stop = ts.Cancellation()

    def soon(_: ts.Progress) -> None:
        if len(hub.repos["me/merged"].commits) > 2:
            stop.cancel()

    plan = ts.plan_merge(tiny.adapters["final"], OUT, base=BASE, shard_size="100KB")
    with pytest.raises(Cancelled):
        ts.merge(plan, certificate=False, progress=soon, cancellation=stop)
    assert len(hub.repos["me/merged"].commits) > 3
    assert held(hub) == {}
    assert list((tmp_path / "spool").iterdir()) == []


def test_a_disk_without_room_for_a_shard_is_told(
    hub: FakeHub, tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the way out; nothing is committed, and nothing stays on the disk."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    plan = ts.plan_merge(tiny.adapters["final"], OUT, base=BASE)
    with monkeypatch.context() as patched:
        patched.setattr(tempfile._TemporaryFileWrapper, "write", full, raising=False)
        with pytest.raises(OutputError, match="disk is full") as caught:
            ts.merge(plan, certificate=False)
    assert "TMPDIR" in str(caught.value.next_step)
    assert held(hub) == {}
    assert list((tmp_path / "spool").iterdir()) == []


def test_a_hub_that_holds_another_file_is_told(hub: FakeHub, tiny: TinyRun) -> None:
    """Its SHA-256 is held against what was written."""
    plan = ts.plan_merge(tiny.adapters["final"], OUT, base=BASE)
    hub.tamper = lambda name, digest: digest[::-1] if name.endswith(".safetensors") else digest
    with pytest.raises(OutputError, match="holds other bytes than were written"):
        ts.merge(plan, certificate=False)
    assert held(hub) == {}


def test_repositories_are_not_made_and_not_overwritten(hub: FakeHub, tiny: TinyRun) -> None:
    """To make one is to publish."""
    with pytest.raises(OutputError, match="no such repository") as caught:
        ts.plan_merge(tiny.adapters["final"], "hf://me/another", base=str(tiny.base))
    assert "hf repos create me/another --private" in str(caught.value.next_step)
    with pytest.raises(OutputError, match="no such repository"):
        ts.plan_merge(tiny.adapters["final"], "hf://me/merged@nobranch", base=str(tiny.base))
    hub.repos["me/merged"].commit("main", {"config.json": Entry(b"{}")})
    with pytest.raises(OutputError, match="objects at the target already"):
        ts.plan_merge(tiny.adapters["final"], OUT, base=str(tiny.base))


def test_a_base_that_changes_on_the_hub_is_noticed(hub: FakeHub, tiny: TinyRun, tmp_path: Path) -> None:
    """By the hash that the hub has of it."""
    plan = ts.plan_merge(tiny.adapters["final"], tmp_path / "out", base=BASE)
    done = False

    def once(_: ts.Progress) -> None:
        nonlocal done
        if not done:
            done = True
            files = dict(hub.files("org/base"))
            data = bytearray(files["model.safetensors"].content or b"")
            data[-1] ^= 1
            files["model.safetensors"] = Entry(bytes(data))
            hub.repos["org/base"].commit("main", files)

    with pytest.raises(ts.TunesmithError, match="base model changed"):
        ts.merge(plan, certificate=False, progress=once)
    assert not (tmp_path / "out").exists()
