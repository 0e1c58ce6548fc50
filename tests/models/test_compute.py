"""compute_dtype: what is fastest here, measured once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.errors import DataError
from tunesmith.models import ComputeDtype, avoid_cudnn_attention, compute, compute_dtype

on_cpu = pytest.mark.skipif(compute._device() != "cpu", reason="this machine computes on a GPU")


@pytest.mark.parametrize(
    ("requested", "dtype"),
    [("bf16", "bfloat16"), ("float16", "float16"), ("fp16", "float16"), ("fp32", "float32"), ("bfloat16", "bfloat16")],
)
def test_a_requested_dtype_is_taken_unmeasured(requested: str, dtype: str) -> None:
    """Short and long names."""
    decision = compute_dtype(requested)
    assert (decision.dtype, decision.reason, decision.gemm_ms) == (dtype, "requested", {})


def test_an_unknown_dtype_is_refused_with_the_known_ones() -> None:
    """The message is enough to choose one."""
    with pytest.raises(DataError, match="auto, bf16, bfloat16, fp16, float16, fp32, float32"):
        compute_dtype("int8")


@on_cpu
@pytest.mark.parametrize(
    ("float32_ms", "bfloat16_ms", "dtype"), [(10, 5, "bfloat16"), (10, 8.1, "float32"), (10, 200, "float32")]
)
def test_bfloat16_must_win_clearly(
    monkeypatch: pytest.MonkeyPatch, float32_ms: float, bfloat16_ms: float, dtype: str
) -> None:
    """By a quarter at least, for it is less precise."""
    times = iter([float32_ms, bfloat16_ms])
    monkeypatch.setattr(compute, "_fastest_ms", lambda *_, **__: next(times))
    decision = compute_dtype()
    assert decision.dtype == dtype
    assert decision.gemm_ms == {"float32": float32_ms, "bfloat16": bfloat16_ms}


@on_cpu
def test_the_measurement_is_kept_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call measures nothing."""
    first = compute_dtype(cache_dir=tmp_path / "new")
    monkeypatch.setattr(compute, "_measure", lambda _: pytest.fail("measured again"))
    assert compute_dtype(cache_dir=tmp_path / "new") == first
    assert first.reason == "measured"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["compute.json"]


@on_cpu
def test_another_machine_is_measured_and_both_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home directory may be shared between machines."""
    here = compute_dtype(cache_dir=tmp_path)
    monkeypatch.setattr(compute, "machine_name", lambda: "another")
    there = compute_dtype(cache_dir=tmp_path)
    assert set(json.loads((tmp_path / "compute.json").read_text())["machines"]) == {here.machine, there.machine}


@on_cpu
@pytest.mark.parametrize("text", ["", "{", "[]", '{"machines": []}', '{"machines": {"x": 1}}', "\xff", "[" * 100_000])
def test_a_corrupted_cache_is_measured_anew(tmp_path: Path, text: str) -> None:
    """Never a crash, and it is whole again afterwards."""
    (tmp_path / "compute.json").write_text(text, encoding="latin-1")
    decision = compute_dtype(cache_dir=tmp_path)
    stored = json.loads((tmp_path / "compute.json").read_text())["machines"][decision.machine]
    assert ComputeDtype.model_validate(stored) == decision


@on_cpu
def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    """A file stands where the directory should be."""
    (tmp_path / "file").touch()
    assert compute_dtype(cache_dir=tmp_path / "file").reason == "measured"


@on_cpu
def test_a_cpu_without_bfloat16_units_computes_in_float32() -> None:
    """Simulated by hiding the vector units from PyTorch and oneDNN."""
    code = "from tunesmith.models import compute_dtype; print(compute_dtype().dtype)"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "float32"


def test_importing_the_rooms_imports_no_heavy_library() -> None:
    """``tunesmith --help`` must not wait for torch."""
    code = (
        "import sys, tunesmith.models, tunesmith.compare;"
        "print([name for name in ('torch', 'transformers', 'peft', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_attention_is_cudnns_on_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for a CPU, nothing is changed in the process."""
    import torch

    asked: list[bool] = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", asked.append)
    avoid_cudnn_attention("cpu")
    assert asked == []
    avoid_cudnn_attention("cuda:1")
    assert asked == [False]
