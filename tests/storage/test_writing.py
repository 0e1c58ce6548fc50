"""A merge into a storage: the bytes of a local one, there as a model at its end or not at all, and gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

import tunesmith as ts
from tests.storage.conftest import Asked, files_of, upload
from tests.tiny_models import TinyRun
from tunesmith.errors import Cancelled, CheckpointError, OutputError

BASE, ADAPTER, OUT = "memory://bucket/base", "memory://bucket/run/adapter", "memory://bucket/merged"


@pytest.fixture
def stored(asked: Asked, tiny: TinyRun) -> Asked:
    """The tiny base and its adapter, in memory."""
    upload(tiny.base, BASE)
    upload(tiny.adapters["final"], ADAPTER)
    return asked


def objects(url: str = OUT) -> dict[str, bytes]:
    """All objects below an address, by their names relative to it."""
    fs, key = fsspec.url_to_fs(url)
    key = "/" + key.strip("/")
    return {
        name.removeprefix(key + "/"): bytes(file.getvalue())
        for name, file in fs.store.items()
        if name.startswith(key + "/")
    }


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("shard_size", [None, "150KB"])
def test_a_merge_into_a_storage_has_the_bytes_of_a_local_one(
    tiny: TinyRun, tmp_path: Path, far: bool, shard_size: str | None
) -> None:
    """Whatever it is read from; nothing else is there at the end."""
    local = ts.plan_merge(tiny.adapters["final"], tmp_path / "local", base=str(tiny.base), shard_size=shard_size)
    done = ts.merge(local, certificate=False, sha256=True)
    source = {"run": ADAPTER, "base": BASE} if far else {"run": tiny.adapters["final"], "base": str(tiny.base)}
    plan = ts.plan_merge(out=OUT, shard_size=shard_size, **source)
    assert plan.out == OUT
    merged = ts.merge(plan)
    assert objects() == files_of(tmp_path / "local")
    assert merged.receipts == done.receipts
    assert merged.kept == done.kept
    assert [finding.code for finding in merged.findings if finding.severity == "warning"] == ["certificate_not_written"]
    assert ts.verify(source["run"], merged, base=source["base"], levels=("structure", "assets", "weights")).answer in (
        "identical",
        "equal_within_rounding",
    )


@pytest.mark.usefixtures("stored")
def test_a_target_with_objects_is_refused(tiny: TinyRun) -> None:
    """With --force too; and so is one that is read."""
    upload(tiny.base, OUT)
    before = objects()
    with pytest.raises(OutputError, match="objects at the target already"):
        ts.plan_merge(ADAPTER, OUT, base=BASE)
    with pytest.raises(OutputError, match="is not replaced"):
        ts.plan_merge(ADAPTER, OUT, base=BASE, force=True)
    with pytest.raises(OutputError, match="overlaps the base model"):
        ts.plan_merge(ADAPTER, f"{BASE}/merged", base=BASE)
    assert objects() == before


@pytest.mark.usefixtures("stored")
def test_calibrated_rounding_is_refused() -> None:
    """The live model is loaded from a disk alone."""
    with pytest.raises(OutputError, match="which must lie on a disk"):
        ts.plan_merge(ADAPTER, OUT, base=BASE, rounding="calibrated", dtype="bf16")
    assert not objects()


class Breaking:
    """The storage in memory, which fails at one of its writes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> None:
        plain, self.writes = MemoryFile.write, 0

        def write(file: Any, data: bytes) -> int:
            if isinstance(file, MemoryFile) and "model-" in str(file.path):
                self.writes += 1
                if self.writes == at:
                    raise error
            return plain(file, data)

        monkeypatch.setattr(MemoryFile, "write", write, raising=False)


@pytest.mark.usefixtures("stored")
def test_a_storage_that_fails_keeps_whole_shards_and_the_merge_goes_on(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No shard is half there, nothing looks finished, and the same command computes what is left."""
    options: dict[str, Any] = {"base": BASE, "shard_size": "100KB"}
    with monkeypatch.context() as patched:
        Breaking(patched, 9, ConnectionResetError("reset by peer"))
        with pytest.raises(OutputError, match="storage") as caught:
            ts.merge(ts.plan_merge(ADAPTER, OUT, **options), certificate=False)
    assert "repeat the same command" in str(caught.value.next_step)
    left = objects()
    assert "config.json" not in left
    local = ts.merge(
        ts.plan_merge(tiny.adapters["final"], tmp_path / "local", base=str(tiny.base), shard_size="100KB"),
        certificate=False,
    )
    whole = files_of(tmp_path / "local")
    shards = {name for name in left if name.endswith(".safetensors")}
    assert shards
    assert all(left[name] == whole[name] for name in shards)
    merged = ts.merge(ts.plan_merge(ADAPTER, OUT, **options), certificate=False)
    assert merged.resumed_bytes >= sum(len(left[name]) for name in shards if f".tunesmith/{name}.json" in left) > 0
    assert merged.kept == local.kept
    assert objects() == whole


@pytest.mark.usefixtures("stored")
def test_a_shard_that_was_changed_meanwhile_is_made_again(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A receipt is believed with the storage's tag of just that object."""
    options: dict[str, Any] = {"base": BASE, "shard_size": "100KB"}
    with monkeypatch.context() as patched:
        Breaking(patched, 9, ConnectionResetError("reset by peer"))
        with pytest.raises(OutputError):
            ts.merge(ts.plan_merge(ADAPTER, OUT, **options), certificate=False)
    name = next(
        name.removeprefix(".tunesmith/").removesuffix(".json") for name in objects() if ".safetensors.json" in name
    )
    fsspec.filesystem("memory").pipe_file(f"bucket/merged/{name}", b"\0" * len(objects()[name]))
    ts.merge(ts.plan_merge(ADAPTER, OUT, **options), certificate=False)
    plan = ts.plan_merge(tiny.adapters["final"], tmp_path / "local", base=str(tiny.base), shard_size="100KB")
    ts.merge(plan, certificate=False)
    assert objects() == files_of(tmp_path / "local")


@pytest.mark.usefixtures("stored")
def test_another_merge_begins_anew_where_one_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """With --force; what the first one left is removed, and no object of it is in the result."""
    with monkeypatch.context() as patched:
        Breaking(patched, 9, ConnectionResetError("reset by peer"))
        with pytest.raises(OutputError):
            ts.merge(ts.plan_merge(ADAPTER, OUT, base=BASE, shard_size="100KB"), certificate=False)
    before = objects()
    with pytest.raises(OutputError, match="unfinished merge of something else") as caught:
        ts.merge(ts.plan_merge(ADAPTER, OUT, base=BASE), certificate=False)
    assert "--force" in str(caught.value.next_step)
    assert objects() == before
    merged = ts.merge(ts.plan_merge(ADAPTER, OUT, base=BASE, force=True), certificate=False)
    assert merged.resumed_bytes == 0
    assert [name for name in objects() if name.endswith((".safetensors", ".index.json"))] == ["model.safetensors"]
    assert not [name for name in objects() if name.startswith(".tunesmith")]


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize("error", [Cancelled(), KeyboardInterrupt(), CheckpointError("The base tensor holds NaN.")])
def test_what_is_stopped_or_refused_leaves_nothing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """As on a disk: what was done goes."""
    with monkeypatch.context() as patched:
        Breaking(patched, 9, error)
        with pytest.raises((type(error), OutputError)):
            ts.merge(ts.plan_merge(ADAPTER, OUT, base=BASE, shard_size="100KB"), certificate=False)
    assert not objects()


@pytest.mark.usefixtures("stored")
def test_the_configuration_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader takes no model without it."""
    names: list[str] = []
    plain = MemoryFileSystem.pipe_file

    def pipe_file(self: Any, path: str, value: bytes, **options: Any) -> None:
        names.append(path.rsplit("/", 1)[1])
        plain(self, path, value, **options)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", pipe_file)
    ts.merge(ts.plan_merge(ADAPTER, OUT, base=BASE, shard_size="100KB"), certificate=False)
    assert names[0] == "merge.json"
    assert names[-1] == "config.json"


@pytest.mark.usefixtures("stored")
def test_shards_of_another_weight_are_not_taken(tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the same names and sizes, of another merge: what decides the bytes is another."""
    options: dict[str, Any] = {"shard_size": "100KB"}
    with monkeypatch.context() as patched:
        Breaking(patched, 9, ConnectionResetError("reset by peer"))
        with pytest.raises(OutputError):
            ts.merge(ts.plan_merge(ADAPTER, OUT, base=BASE, **options), certificate=False)
    assert any(name.endswith(".safetensors.json") for name in objects())
    merged = ts.merge(ts.plan_merge(ADAPTER, OUT, base=BASE, weight=0.5, force=True, **options), certificate=False)
    assert merged.resumed_bytes == 0
    local = tmp_path / "local"
    ts.merge(
        ts.plan_merge(tiny.adapters["final"], local, base=str(tiny.base), weight=0.5, **options), certificate=False
    )
    assert objects() == files_of(local)


@pytest.mark.usefixtures("stored")
def test_the_first_of_two_merges_into_one_address_gives_way() -> None:
    """It notices the other, which was told to go ahead, and leaves what that one wrote."""
    begun = False

    def other(step: ts.Progress) -> None:
        nonlocal begun
        if not begun and step.done:
            begun = True
            ts.merge(ts.plan_merge(ADAPTER, OUT, base=BASE, weight=0.5, force=True), certificate=False)

    plan = ts.plan_merge(ADAPTER, OUT, base=BASE, shard_size="100KB")
    with pytest.raises(OutputError, match="Another merge has begun"):
        ts.merge(plan, certificate=False, progress=other)
    assert {"config.json", "model.safetensors"} <= objects().keys()
