"""What the tests of executors have run elsewhere: functions that a worker finds by their name."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tunesmith as ts
from tunesmith.errors import CheckpointError
from tunesmith.executors.on_dask import DaskExecutor
from tunesmith.executors.on_ray import RayExecutor
from tunesmith.verify import CERTIFICATE_FILE


@dataclass(frozen=True)
class Model:
    """A run and its base."""

    run: Path
    base: Path


def hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in a directory."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def planned(model: Model, out: Path) -> ts.MergePlan:
    """A merge into files of 100 KB."""
    return ts.plan_merge(model.run, out, base=str(model.base), shard_size="100KB")


def everything(model: Model, out: Path, executor: Executor | None) -> dict[str, Any]:
    """Merge, verify and quantize; what all of it comes to, but for times."""
    return {**proved(model, out, executor), **coded(model, out, executor)}


def proved(model: Model, out: Path, executor: Executor | None) -> dict[str, Any]:
    """Merge and verify."""
    merged = ts.merge(planned(model, out / "merged"), executor=executor, certificate=False)
    verdict = ts.verify(
        model.run,
        merged,
        base=str(model.base),
        levels=["structure", "weights"],
        executor=executor,
        certificate=False,
    )
    return {"merged": hashes(merged.path), "kept": merged.kept, "answer": (verdict.answer, verdict.tensors)}


def coded(model: Model, out: Path, executor: Executor | None) -> dict[str, Any]:
    """Quantize and verify."""
    plan = ts.plan_quantization(model.run, out / "int8", scheme="int8", base=str(model.base), shard_size="100KB")
    quantized = ts.quantize(plan, executor=executor, certificate=False)
    codes = ts.verify(
        model.run, quantized, base=str(model.base), levels=["weights"], executor=executor, certificate=False
    )
    return {
        "quantized": hashes(quantized.path),
        "rounded": quantized.tensors,
        "codes": (codes.answer, codes.quantized),
    }


def certified(model: Model, out: Path, executor: Executor | None) -> dict[str, str]:
    """Merge, verify and quantize; the certificate after each."""
    merged = ts.merge(planned(model, out / "merged"), executor=executor)
    found = {"merge": (merged.path / CERTIFICATE_FILE).read_text()}
    levels = ["structure", "assets", "weights"]
    ts.verify(model.run, merged, base=str(model.base), levels=levels, executor=executor)
    found["verify"] = (merged.path / CERTIFICATE_FILE).read_text()
    plan = ts.plan_quantization(model.run, out / "int8", scheme="int8", base=str(model.base), shard_size="100KB")
    quantized = ts.quantize(plan, executor=executor)
    return {**found, "quantize": (quantized.path / CERTIFICATE_FILE).read_text()}


def told(folder: Path) -> int:
    """Leave a trace of having been called."""
    (folder / f"{time.monotonic_ns()}-{os.getpid()}").touch()
    return len(list(folder.iterdir()))


def flaky(folder: Path, failures: int) -> int:
    """Fail to read so many times, then say how often it was called."""
    calls = told(folder)
    if calls <= failures:
        raise PermissionError(13, "not now", str(folder))
    return calls


def wrong(folder: Path) -> None:
    """Find something wrong with a model."""
    told(folder)
    raise CheckpointError("A tensor is not finite.", where=folder, found="NaN")


def lost(folder: Path, losses: int) -> int:
    """Take the worker along so many times."""
    calls = told(folder)
    if calls <= losses:
        os._exit(9)
    return calls


def slow(folder: Path, seconds: float) -> None:
    """Take a while, in steps, and leave a trace of the beginning and of the end, however that comes."""
    mine = f"{os.getpid()}-{threading.get_ident()}-{time.monotonic_ns()}"
    (folder / f"begun-{mine}").touch()
    try:
        for _ in range(int(seconds / 0.05)):
            time.sleep(0.05)
    finally:
        time.sleep(0.3)  # what a unit does when it is stopped: it closes its file
        (folder / f"ended-{mine}").touch()


def slowly(work: Callable[..., Any], seconds: float, *args: Any) -> Any:
    """Do something after a while."""
    time.sleep(seconds)
    return work(*args)


class SlowRay(RayExecutor):
    """Ray, with units that take a while."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Submit the same, slowly."""
        return super().submit(slowly, fn, 0.5, *args, **kwargs)


class OneSlot(DaskExecutor):
    """Dask, said to be of one slot; counts what is under way."""

    submitted = most = 0

    @property
    def slots(self) -> int:
        """One."""
        return 1

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Submit the same, and count."""
        future = super().submit(fn, *args, **kwargs)
        self.submitted, self.most = self.submitted + 1, max(self.most, len(self._open))
        return future


def until(holds: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait for something to come true."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)
