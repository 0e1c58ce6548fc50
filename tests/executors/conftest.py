"""Two models in small units, what they come to on threads, and clusters that are started once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.executors.work import Model, everything
from tests.oracle.zoo import Zoo
from tests.tiny_models import TinyRun
from tunesmith.executors.on_dask import DaskExecutor
from tunesmith.merge import units
from tunesmith.verify.weights import check, parts

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}


@pytest.fixture(scope="package", autouse=True)
def _small_units() -> Iterator[None]:
    """Many units from tiny models; only who plans them must know."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "UNIT_BYTES", 16 << 10)
        patch.setattr(check, "_PART_ELEMENTS", 4 << 10)
        patch.setattr(parts, "_BATCH_ELEMENTS", 8 << 10)
        yield


@pytest.fixture(scope="session")
def models(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """A small Llama, and a mixture of experts in several shards."""
    zoo = Zoo(tmp_path_factory.mktemp("experts"))
    base = _in_shards(zoo.base_of("mixtral-both"), tmp_path_factory.mktemp("shards") / "base")
    return {
        "llama": Model(tiny.adapters["final"], tiny.base),
        "experts": Model(zoo.adapter("mixtral-both"), base),
    }


def _in_shards(base: Path, out: Path) -> Path:
    """A copy of a model whose tensors lie in three files, neighbours in different ones."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {name: value for file in base.glob("*.safetensors") for name, value in load_file(file).items()}
    shards = {name: f"model-{place % 3 + 1:05}-of-00003.safetensors" for place, name in enumerate(sorted(tensors))}
    for shard in set(shards.values()):
        mine = {name: value for name, value in tensors.items() if shards[name] == shard}
        save_file(mine, out / shard, metadata={"format": "pt"})
    size = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": shards}
    (out / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return out


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
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # Ray's client server forks, and gRPC breaks some of that
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
