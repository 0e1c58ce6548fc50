"""Hashes on a cluster: a file is a unit, begun when all of it may be read."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

import tunesmith as ts
from tests.executors.work import Model, certified, planned, until
from tunesmith.checkpoint import TrailingHashes, hash_files, hashing
from tunesmith.errors import CheckpointError, OutputError
from tunesmith.executors import WorkerLostError
from tunesmith.executors.on_dask import DaskExecutor

SIZES = (0, 1, 1 << 20, 3_000_001, 5)


class Counting(DaskExecutor):
    """Dask of two slots, which keeps what it is given."""

    def __init__(self, client: Any) -> None:
        super().__init__(client)
        self.given: list[Path] = []
        self.futures: list[Future[Any]] = []
        self.most = 0

    @property
    def slots(self) -> int:
        """Two."""
        return 2

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Submit the same, and keep the file."""
        future = super().submit(fn, *args, **kwargs)
        if fn is hashing.hash_file:
            self.given.append(Path(args[0]))
            self.futures.append(future)
        self.most = max(self.most, len(self._open))
        return future


@pytest.fixture
def cluster(dask_threads: DaskExecutor) -> Counting:
    """A cluster."""
    return Counting(dask_threads._client)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Files of odd sizes, the first of them empty."""
    found = {str(number): tmp_path / f"{number}.bin" for number in range(len(SIZES))}
    for path, size in zip(found.values(), SIZES, strict=True):
        path.write_bytes(os.urandom(size))
    return found


def expected(files: dict[str, Path]) -> dict[str, str]:
    """Their hashes, from all their bytes at once."""
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def test_they_are_the_hashes_of_the_bytes(
    cluster: Counting, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, in the order that was given, no more at once than there are slots; workers are told where files are."""
    digest = hashing._digest

    def first_is_last(path: Path, *rest: Any) -> str | None:
        time.sleep(0.3 * (path == files["0"]))
        return digest(path, *rest)

    monkeypatch.setattr(hashing, "_digest", first_is_last)
    monkeypatch.chdir(tmp_path)
    here = {name: Path(path.name) for name, path in files.items()}
    with TrailingHashes(here, cluster) as hashes:
        assert list(hashes.result().items()) == list(expected(files).items())
    assert (cluster.given, cluster.most <= 2) == (list(files.values()), True)
    ticks: list[int] = []
    assert list(hash_files(files, executor=cluster, tick=ticks.append).items()) == list(expected(files).items())
    assert set(ticks) <= {0}
    assert len(cluster.given) == 2 * len(files)


def test_no_file_is_begun_before_all_of_it_may_be_read(cluster: Counting, files: dict[str, Path]) -> None:
    """Neither by a byte nor by a file."""
    path = files["3"]
    data = path.read_bytes()
    path.write_bytes(b"\0" * len(data))
    with TrailingHashes(files, cluster) as hashes:
        hashes.allow(sum(SIZES[:4]) - 1)
        until(lambda: len(cluster.given) == 3)
        until(lambda: not cluster._open)
        path.write_bytes(data)
        hashes.allow(sum(SIZES[:4]))
        until(lambda: len(cluster.given) == 4)
        assert hashes.result() == expected(files)


def test_what_cannot_be_read_is_tried_three_times(cluster: Counting, files: dict[str, Path]) -> None:
    """And what became shorter, once."""
    with TrailingHashes(files, cluster) as hashes:
        files["2"].unlink()
        with pytest.raises(FileNotFoundError):
            hashes.result()
    assert cluster.retried == 2
    files["2"].write_bytes(b"x" * SIZES[2])
    with TrailingHashes(files, cluster) as hashes:
        files["2"].write_bytes(b"x")
        with pytest.raises(CheckpointError, match="became shorter"):
            hashes.result()
    assert cluster.retried == 2


def test_nothing_is_under_way_behind_its_block(
    cluster: Counting, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it is made of may be removed next."""
    begun, ended = threading.Event(), threading.Event()

    def slow(*_: object) -> str:
        begun.set()
        ended.wait(0.5)
        ended.set()
        return ""

    monkeypatch.setattr(hashing, "_digest", slow)
    threads = threading.active_count()
    with TrailingHashes(files, cluster) as hashes:
        hashes.allow(1 << 30)
        begun.wait(10)
    assert ended.is_set()
    assert cluster.futures[0].cancelled()
    assert not cluster._open
    assert threading.active_count() <= threads


def test_certificates_are_those_of_threads(models: dict[str, Model], tmp_path: Path, cluster: Counting) -> None:
    """Merged, verified and quantized; the weights are hashed by the cluster."""
    model = models["experts"]
    mine = certified(model, tmp_path / "1", None)
    assert certified(model, tmp_path / "2", cluster) == mine
    assert [bool(json.loads(text)["subject"]) for text in mine.values()] == [True] * 3
    for file in model.base.glob("*.safetensors"):
        assert cluster.given.count(file) == 3, "once a verb"
    places = [path.parent for path in cluster.given]
    merged, int8 = tmp_path / "2" / "merged", tmp_path / "2" / "int8"
    shards = len(list(merged.glob("*.safetensors")))
    in_stages = sum(place not in (model.base, model.run, merged, int8) for place in places)
    assert (shards > 1, places.count(merged), in_stages) == (True, shards, shards), "verified, and as it was written"


def test_a_lost_cluster_is_said(
    models: dict[str, Model], tmp_path: Path, cluster: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge keeps what it has and goes on from there; a quantization stands, without a certificate."""
    model = models["llama"]

    def lost(*_: object) -> str:
        raise WorkerLostError("the node went")

    plan = planned(model, tmp_path / "merged")
    with monkeypatch.context() as patch:
        patch.setattr(hashing, "_digest", lost)
        with pytest.raises(OutputError, match="worker of the executor died"):
            ts.merge(plan, executor=cluster)
        codes = ts.plan_quantization(model.run, tmp_path / "int8", scheme="int8", base=str(model.base))
        quantized = ts.quantize(codes, executor=cluster)
    assert "certificate_not_written" in [finding.code for finding in quantized.findings]
    assert quantized.retried_units > 0
    merged = ts.merge(plan, executor=cluster)
    assert merged.resumed_bytes > 0
    with monkeypatch.context() as patch:
        patch.setattr(hashing, "_digest", lost)
        with pytest.raises(ts.TunesmithError, match="worker of the executor died"):
            ts.verify(model.run, merged, base=str(model.base), levels=["weights"], executor=cluster)
