"""The same bytes and the same verdicts, wherever the units run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import tunesmith as ts
from tests.executors.work import Model, OneSlot, certified, coded, everything, proved
from tunesmith.executors.on_dask import DaskExecutor


@pytest.mark.parametrize("name", ["llama", "experts"])
def test_threads_of_the_callers(
    models: dict[str, Model], expected: dict[str, dict[str, Any]], tmp_path: Path, name: str
) -> None:
    """An executor of Python's own."""
    with ThreadPoolExecutor(3) as pool:
        assert everything(models[name], tmp_path, pool) == expected[name]


def test_processes(models: dict[str, Model], expected: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """A pool is opened by its address and serves several verbs; what quantizes loads torch, which takes long."""
    with ts.executor_of("processes:2") as pool:
        for name, model in models.items():
            found = proved(model, tmp_path / name, pool)
            assert found == {key: expected[name][key] for key in found}


def test_dask_in_threads(
    models: dict[str, Model], expected: dict[str, dict[str, Any]], tmp_path: Path, dask_threads: DaskExecutor
) -> None:
    """Dask's scheduler, and everything pickled."""
    assert everything(models["experts"], tmp_path, dask_threads) == expected["experts"]


def test_what_is_under_way_is_bounded_by_the_slots(
    models: dict[str, Model], expected: dict[str, dict[str, Any]], tmp_path: Path, dask_threads: DaskExecutor
) -> None:
    """A few times as many, for every verb, however many units there are and processors this machine has."""
    executor = OneSlot(dask_threads._client)
    assert proved(models["experts"], tmp_path, executor)["merged"] == expected["experts"]["merged"]
    assert executor.submitted > 12
    assert executor.most <= 4
    executor.most = 0
    assert coded(models["experts"], tmp_path, executor)["quantized"] == expected["experts"]["quantized"]
    assert executor.most <= 4
    executor.shutdown()


@pytest.mark.cluster
def test_dask_in_processes(models: dict[str, Model], expected: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """Workers of their own, behind a scheduler's address."""
    from distributed import LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0") as cluster,
        ts.executor_of(f"dask://{cluster.scheduler_address.removeprefix('tcp://')}") as executor,
    ):
        for name, model in models.items():
            assert everything(model, tmp_path / name, executor) == expected[name]


@pytest.mark.cluster
def test_ray_on_two_nodes(
    models: dict[str, Model],
    expected: dict[str, dict[str, Any]],
    tmp_path: Path,
    ray_nodes: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The cluster that ``RAY_ADDRESS`` names."""
    monkeypatch.setenv("RAY_ADDRESS", ray_nodes.address)
    with ts.executor_of("ray") as executor:
        for name, model in models.items():
            assert everything(model, tmp_path / name, executor) == expected[name]
        found = certified(models["experts"], tmp_path / "there", executor)
    assert found == certified(models["experts"], tmp_path / "here", None)


@pytest.mark.cluster
def test_ray_through_its_client(
    models: dict[str, Model], expected: dict[str, dict[str, Any]], tmp_path: Path, ray_nodes: Any
) -> None:
    """``ray://``: the driver is no part of the cluster."""
    port = ray_nodes.head_node._ray_params.ray_client_server_port
    with ts.executor_of(f"ray://127.0.0.1:{port}") as executor:
        assert everything(models["experts"], tmp_path, executor) == expected["experts"]
