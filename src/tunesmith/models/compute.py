"""Which dtype this machine computes in fastest, measured once and remembered.

A CPU with bfloat16 units multiplies matrices in bfloat16 about twice as fast as in float32; a CPU without them emulates
it and is 4 to 30 times slower.  No flag tells the two apart on every platform, so we time one product that is shaped
like a layer of a small language model.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from tunesmith.errors import DataError
from tunesmith.record import Record

DtypeName = Literal["bfloat16", "float16", "float32"]
DeviceName = Literal["cpu", "cuda", "mps"]

_DTYPES: dict[str, DtypeName] = {
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
    "fp32": "float32",
    "float32": "float32",
}
# bfloat16 keeps 8 bits of precision where float32 keeps 24; a smaller gain is not worth them.
_BF16_MUST_WIN_BY = 1.25
_TOKENS, _IN_FEATURES, _OUT_FEATURES = 320, 576, 1536
_REPETITIONS = 6
_GIVE_UP_FACTOR = 3.0
_CACHE_FILE = "compute.json"


class ComputeDtype(Record):
    """The dtype and the device that models are run in.

    Attributes:
        dtype: the dtype of weights and activations.
        device: where they live.
        reason: ``measured`` (timed on this CPU), ``requested`` (somebody asked for it) or ``gpu`` (what the GPU does).
        gemm_ms: milliseconds of one forward and one backward product by dtype; empty where nothing was measured.
        machine: what the measurement holds for: processor, its vector units, torch's version and thread count.
    """

    dtype: DtypeName
    device: DeviceName
    reason: Literal["measured", "requested", "gpu"]
    gemm_ms: dict[str, float] = {}
    machine: str


def compute_dtype(requested: str = "auto", *, cache_dir: Path | None = None) -> ComputeDtype:
    """Decide which dtype to run models in.

    Args:
        requested: ``auto``, or a dtype: ``bf16``, ``bfloat16``, ``fp16``, ``float16``, ``fp32`` or ``float32``.
        cache_dir: where the measurement is kept between processes (``compute.json``); None keeps nothing.

    Returns:
        The decision and what it rests on.

    Raises:
        DataError: ``requested`` is no dtype that we know.
    """
    wanted = None if requested == "auto" else dtype_name(requested)
    device, machine = _device(), machine_name()
    if wanted is not None:
        return ComputeDtype(dtype=wanted, device=device, reason="requested", machine=machine)
    if device != "cpu":
        return ComputeDtype(dtype=_gpu_dtype(device), device=device, reason="gpu", machine=machine)
    known = _known(cache_dir) if cache_dir is not None else {}
    if machine in known:
        return known[machine]
    decision = _measure(machine)
    if cache_dir is not None:
        machines = {key: value.model_dump(mode="json") for key, value in {**known, machine: decision}.items()}
        write_measurements(cache_dir / _CACHE_FILE, machines)
    return decision


def flops_per_s(dtype: str, device: str = "cpu") -> float | None:
    """Multiplications and additions a second, measured now: the machine may be busier than it was.

    Args:
        dtype: of the numbers, torch's name.
        device: only ``cpu`` is measured; None for others.
    """
    if device != "cpu":
        return None
    import torch

    milliseconds = _fastest_ms(_products(getattr(torch, dtype)))
    return 2 * 2 * _TOKENS * _IN_FEATURES * _OUT_FEATURES / (milliseconds * 1e-3)


def free_bytes(device: str = "cpu") -> int:
    """Memory that is free now, in bytes: a CUDA device's own, else the machine's.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
    """
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def avoid_cudnn_attention(device: str) -> None:
    """Have attention computed by torch's own kernels, in the whole process, where it would otherwise be cuDNN's.

    On Hopper and Blackwell GPUs torch asks cuDNN first, which builds a plan for every batch size and length that it has
    not seen, and text has many lengths.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``; only CUDA devices have cuDNN.

    Source: https://github.com/pytorch/pytorch/pull/155958
    """
    if device.startswith("cuda"):
        import torch

        torch.backends.cuda.enable_cudnn_sdp(False)


def dtype_name(name: str) -> DtypeName:
    """The full name of a dtype that may be given by its short one.

    Raises:
        DataError: it is no dtype that we know.
    """
    if name not in _DTYPES:
        raise DataError("This dtype is not known.", expected=", ".join(["auto", *_DTYPES]), found=name)
    return _DTYPES[name]


def _device() -> DeviceName:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _gpu_dtype(device: DeviceName) -> DtypeName:
    import torch

    if device == "cuda":
        # Emulated bfloat16 counts as supported unless we say otherwise, and is slow.
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    try:
        torch.zeros(1, dtype=torch.bfloat16, device=device)
    except (RuntimeError, TypeError):
        return "float32"
    return "bfloat16"


def machine_name() -> str:
    """What a measurement holds for: the processor, its vector units, torch's version and thread count."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    return f"{_cpu_name()} · {capability} · torch {torch.__version__} · {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _measure(machine: str) -> ComputeDtype:
    import torch

    float32_ms = _fastest_ms(_products(torch.float32))
    bfloat16_ms = _fastest_ms(_products(torch.bfloat16), give_up_above_ms=_GIVE_UP_FACTOR * float32_ms)
    wins = bfloat16_ms * _BF16_MUST_WIN_BY <= float32_ms
    return ComputeDtype(
        dtype="bfloat16" if wins else "float32",
        device="cpu",
        reason="measured",
        gemm_ms={"float32": round(float32_ms, 3), "bfloat16": round(bfloat16_ms, 3)},
        machine=machine,
    )


def _products(dtype: Any) -> Callable[[], object]:
    """One linear layer forward, and its input gradient: x (tokens, in), W (out, in), gradient (tokens, out)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_TOKENS, _IN_FEATURES, generator=generator).to(dtype)
    weight = torch.randn(_OUT_FEATURES, _IN_FEATURES, generator=generator).to(dtype)
    gradient = torch.randn(_TOKENS, _OUT_FEATURES, generator=generator).to(dtype)

    def run() -> object:
        with torch.inference_mode():
            return torch.nn.functional.linear(x, weight), gradient @ weight

    return run


def _fastest_ms(run: Callable[[], object], *, give_up_above_ms: float = float("inf")) -> float:
    """The fastest of a few runs in milliseconds; stops after two runs that both take longer than the limit."""
    fastest = float("inf")
    for repetition in range(_REPETITIONS):
        started = time.perf_counter()
        run()
        elapsed_ms = (time.perf_counter() - started) * 1e3
        # The first run also builds its kernels, so it alone proves nothing unless it is slow beyond all building.
        fastest = min(fastest, elapsed_ms)
        if fastest > give_up_above_ms * (10 if repetition == 0 else 1):
            break
    return fastest


def _known(cache_dir: Path) -> dict[str, ComputeDtype]:
    try:
        machines = read_measurements(cache_dir / _CACHE_FILE)
        return {key: ComputeDtype.model_validate(value) for key, value in machines.items()}
    except ValidationError:
        return {}  # an unreadable measurement is taken again


def read_measurements(file: Path) -> dict[str, Any]:
    """What was measured before, by machine; nothing where it cannot be read, so that it is taken again."""
    try:
        return dict(json.loads(file.read_bytes())["machines"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def write_measurements(file: Path, machines: Mapping[str, Any]) -> None:
    """Keep what was measured, whole or not at all; what cannot be kept costs a measurement a process, no more."""
    document = json.dumps({"machines": machines}, indent=2, ensure_ascii=False) + "\n"
    beside = file.with_name(f".{file.name}.{os.getpid()}.partial")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(document, encoding="utf-8")
        beside.replace(file)
    with suppress(OSError):
        beside.unlink(missing_ok=True)
