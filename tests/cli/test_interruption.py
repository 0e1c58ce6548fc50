"""Work that ends before its time: Ctrl-C, SIGTERM, a full disk, a reader that has gone."""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import Cli, tree

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")


@pytest.fixture(scope="module")
def large(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """A merge that takes seconds: a base of 12 zero layers in a sparse file, and an adapter on all of it."""
    root = tmp_path_factory.mktemp("large")
    hidden, layers, r = 2048, 12, 4
    base, adapter = root / "base", root / "run"
    weights = {f"model.layers.{i}.self_attn.q_proj.weight": (hidden, hidden) for i in range(layers)}
    factors = {}
    for name in weights:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        factors |= {f"{module}.lora_A.weight": (r, hidden), f"{module}.lora_B.weight": (hidden, r)}
    for folder, tensors, file in ((base, weights, "model"), (adapter, factors, "adapter_model")):
        folder.mkdir()
        write_zeros(folder / f"{file}.safetensors", tensors)
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    config = json.loads((run_dir / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": str(base), "target_modules": ["q_proj"], "r": r}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return ["merge", adapter, "--out"]


def write_zeros(path: Path, tensors: dict[str, tuple[int, int]]) -> None:
    """A safetensors file of float32 zeros that takes no space."""
    header, end = {}, 0
    for name, (rows, columns) in tensors.items():
        header[name] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [end, end + 4 * rows * columns]}
        end += 4 * rows * columns
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stopped_merge_leaves_nothing(cli: Cli, large: list[object], tmp_path: Path, signum: int) -> None:
    """Exit 130, one line, no traceback, and neither the target nor a part of it."""
    process = cli.start(*large, tmp_path / "new" / "out")
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("new/.out.partial/new/*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signum)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert out == ""
    assert err.splitlines() == ["merge ...", "Stopped."]
    assert tree(tmp_path) == {}


def limit() -> None:
    """No file may grow beyond 64 KiB; a write beyond fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, 64 << 10))


def test_merge_that_runs_out_of_space_goes_on_when_there_is_some(cli: Cli, run_dir: Path, tmp_path: Path) -> None:
    """Exit 2 and the reason, as the system gives it; what stays is named, and the same command takes it up."""
    stage = tmp_path / ".out.partial"
    done = cli("merge", run_dir, "--out", tmp_path / "out", preexec=limit)
    assert done.code == 2, done.err
    assert "cannot be written" in done.err
    assert "Traceback" not in done.err
    assert f"stays in {stage}" in done.err
    assert [path.name for path in tmp_path.iterdir()] == [stage.name]
    again = cli("merge", run_dir, "--out", tmp_path / "out")
    assert again.code == 0, again.err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_output_that_cannot_be_written_is_no_bug_of_ours(cli: Cli, run_dir: Path, more: list[str]) -> None:
    """A full disk behind ``>`` is said once."""
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tunesmith", "inspect", run_dir, *more],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=cli.environment(),
            check=False,
        )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("Error: There is no space left")
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_reader_that_has_gone_is_no_error(cli: Cli, run_dir: Path, more: list[str]) -> None:
    """``| head -1``: silence, and the exit code that the shell knows from any program."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith", "inspect", run_dir, *more],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        env=cli.environment(),
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
