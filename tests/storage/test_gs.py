"""Google's storage, where an emulator of it is installed (``pip install gcsfs gcp-storage-emulator``)."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

import tunesmith as ts
from tests.storage.conftest import files_of, upload
from tests.tiny_models import TinyRun

pytest.importorskip("gcsfs", reason="needs gcsfs (the scale extra)")
emulator = pytest.importorskip("gcp_storage_emulator.server", reason="needs gcp-storage-emulator")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket of a server on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="models")
    server.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    yield "gs://models"
    server.stop()


def test_a_merge_from_and_to_gs_has_the_bytes_of_a_local_one(bucket: str, tiny: TinyRun, tmp_path: Path) -> None:
    """Both ways, several shards, and verified where it lies."""
    base, adapter, out = f"{bucket}/base", f"{bucket}/adapter", f"{bucket}/merged"
    upload(tiny.base, base)
    upload(tiny.adapters["final"], adapter)
    near = ts.plan_merge(tiny.adapters["final"], tmp_path / "near", base=str(tiny.base), shard_size="150KB")
    ts.merge(near, certificate=False)
    ts.merge(ts.plan_merge(adapter, tmp_path / "far", base=base, shard_size="150KB"), certificate=False)
    assert files_of(tmp_path / "far") == files_of(tmp_path / "near")
    ts.merge(ts.plan_merge(adapter, out, base=base, shard_size="150KB"), certificate=False)
    fs, key = fsspec.url_to_fs(out)
    assert {name.rsplit("/", 1)[1]: fs.cat_file(name) for name in fs.find(key)} == files_of(tmp_path / "near")
    answer = ts.verify(adapter, out, base=base, levels=("structure", "assets", "weights")).answer
    assert answer in ("identical", "equal_within_rounding")
