"""Two models in small units, what they come to on threads, and clusters that are started once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.executors.work import Model, everything
from tests.oracle.zoo import Zoo
from tests.tiny_models import TinyRun
from tunesmith.executors.on_dask import DaskExecutor
from tunesmith.merge import units
from tunesmith.verify.weights import check

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}


@pytest.fixture(scope="package", autouse=True)
def _small_units() -> Iterator[None]:
    """Many units from tiny models; only who plans them must know."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "UNIT_BYTES", 16 << 10)
        patch.setattr(check, "_PART_ELEMENTS", 4 << 10)
        yield


@pytest.fixture(scope="session")
def models(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """A small Llama, and a mixture of experts."""
    zoo = Zoo(tmp_path_factory.mktemp("experts"))
    return {
        "llama": Model(tiny.adapters["final"], tiny.base),
        "experts": Model(zoo.adapter("mixtral-both"), zoo.base_of("mixtral-both")),
    }


@pytest.fixture(scope="package")
def expected(models: dict[str, Model], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What both models come to on threads of ours."""
    root = tmp_path_factory.mktemp("expected")
    return {name: everything(model, root / name, None) for name, model in models.items()}


@pytest.fixture(scope="session")
def dask_threads() -> Iterator[DaskExecutor]:
    """Dask's own scheduler and three workers, all in threads of this process."""
    distributed = pytest.importorskip("distributed", reason="needs distributed (the dask extra)")
    options = {"n_workers": 3, "threads_per_worker": 1, "processes": False, "dashboard_address": "127.0.0.1:0"}
    with (
        distributed.LocalCluster(**options) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        executor = DaskExecutor(client)
        yield executor
        executor.shutdown()


@pytest.fixture(scope="session")
def ray_nodes() -> Iterator[Any]:
    """A Ray cluster of two nodes on this machine, with a Ray Client server, that notices losses soon."""
    pytest.importorskip("ray", reason="needs ray (the ray extra)")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    soon = {"health_check_period_ms": 500, "health_check_timeout_ms": 500, "health_check_failure_threshold": 3}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**NODE, "_system_config": soon, "ray_client_server_port": free_port()},
    )
    cluster.add_node(**NODE)
    yield cluster
    cluster.shutdown()


def free_port() -> int:
    """A port that nobody listens on."""
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
