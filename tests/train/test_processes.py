"""Several processes that train as one: what they share, what they agree on, and how an error of one ends all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tunesmith.errors import RecipeError, TunesmithError
from tunesmith.train import Manifest, Recipe, refuse_unbuilt_launch
from tunesmith.train import fit as fitting
from tunesmith.train.processes import Peers, SaidElsewhere, is_main_process, processes
from tunesmith.train.resume import refuse_other_processes
from tunesmith.train.strategy import asked_for, refuse_other_strategy

from .conftest import CPU
from .test_trainer import REL_FLOAT32

ADAPTER = "adapter_model.safetensors"
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}

Launch = Callable[..., subprocess.Popen[str]]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture
def recipe_file(base_dir: Path, data_file: Path, tmp_path: Path) -> Path:
    """Twenty-three rows of which five are held out, so that steps of four rows do not come out even."""
    values = {
        "model_name_or_path": str(base_dir), "dataset": str(data_file), "val_size": 5, "num_train_epochs": 2,
        "save_steps": 3, "logging_steps": 1, "learning_rate": 1e-3, "dtype": "float32", "use_cpu": True,
        "per_device_train_batch_size": 2, "output_dir": str(tmp_path / "two"),
    }  # fmt: skip
    path = tmp_path / "two.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Starts a command of Python's; what still runs at the end is ended."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        known = {**os.environ, "TUNESMITH_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        started.append(
            subprocess.Popen(
                [sys.executable, *words], env=known | dict(env or {}), cwd=tmp_path, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()  # a launcher ends its own
        process.communicate()


def torchrun(*words: str) -> tuple[str, ...]:
    """The words of a training by two processes."""
    return ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tunesmith", *words)


def one_process(recipe_file: Path, base_dir: Path, output_dir: Path, **changes: object) -> Path:
    """The same training, in this process, with as many rows a step."""
    values = json.loads(recipe_file.read_text(encoding="utf-8"))
    values |= {"per_device_train_batch_size": 4, "output_dir": str(output_dir)}
    recipe = Recipe.of(values | changes)
    return fitting.train(recipe, base_dir=base_dir, base_name="tiny", base_sha256="ab" * 32, machine=CPU)


def losses(run_dir: Path) -> list[tuple[int, str, float]]:
    """Every loss of a log, with its step and kind."""
    rows = [json.loads(line) for line in (run_dir / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(row["current_steps"], kind, row[kind]) for row in rows for kind in ("loss", "eval_loss") if kind in row]


def distance(one: Path, other: Path) -> float:
    """The largest relative difference of two adapters' tensors."""
    from safetensors.torch import load_file

    ours, theirs = (load_file(folder / ADAPTER) for folder in (one, other))
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours)


def test_two_processes_are_one_to_the_end_of_every_pass(
    launch: Launch, recipe_file: Path, base_dir: Path, tmp_path: Path
) -> None:
    """Under torchrun, twice over rows that do not come out even: no row counts twice; one process writes and speaks."""
    output, errors = launch(*torchrun("train", str(recipe_file))).communicate(timeout=120)
    two = tmp_path / "two"
    assert output.count("Run directory:") == 1, errors
    assert [errors.count(f"{stage} ...") for stage in ("read", "encode", "load", "train")] == [1] * 4
    alone = one_process(recipe_file, base_dir, tmp_path / "one")
    expected = losses(alone)
    assert [row[:2] for row in losses(two)] == [row[:2] for row in expected]
    assert [row[2] for row in losses(two)] == pytest.approx([row[2] for row in expected], rel=REL_FLOAT32)
    assert distance(two, alone) < 1e-4
    manifest = Manifest.read(two / "tunesmith_run.json")
    assert (manifest.processes, manifest.total_train_batch_size, manifest.steps) == (2, 4, expected[-1][0])


def test_refusal_of_one_process_ends_all_with_one_message(launch: Launch, recipe_file: Path, tmp_path: Path) -> None:
    """By no launcher, which would end the others: only the first process looks at the directory."""
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "notes.txt").write_text("mine", encoding="utf-8")
    where = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    both = [
        launch("-m", "tunesmith", "train", str(recipe_file), env={**where, "RANK": rank, "LOCAL_RANK": rank})
        for rank in "01"
    ]
    first, second = (process.communicate(timeout=60) for process in both)
    assert [process.returncode for process in both] == [2, 2], second
    assert "not empty" in first[1]
    assert second == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"packing": True, "cutoff_len": 64}, {"flash_attn": "disabled"}])
def test_packs_and_padded_rows_are_shared_out_too(
    launch: Launch, recipe_file: Path, base_dir: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    """Packs, and rows grouped by length, in the order of one process."""
    words = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    launch(*torchrun("train", str(recipe_file), *words)).communicate(timeout=120)
    alone = one_process(recipe_file, base_dir, tmp_path / "one", **changes)
    assert [row[2] for row in losses(tmp_path / "two")] == pytest.approx(
        [row[2] for row in losses(alone)], rel=REL_FLOAT32
    )
    assert distance(tmp_path / "two", alone) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("ended", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_the_launcher_it_goes_on_with_as_many(
    launch: Launch, recipe_file: Path, tmp_path: Path, ended: signal.Signals
) -> None:
    """Ctrl-C at the launcher leaves one checkpoint; one process cannot go on with it, two can, as if unbroken."""
    unbroken = ["train", str(recipe_file), "max_steps=200", "save_steps=1000", "stop_on_divergence=false"]
    process = launch(*torchrun(*unbroken))
    log = tmp_path / "two" / "trainer_log.jsonl"
    until = time.monotonic() + 60
    while not (log.is_file() and log.read_text(encoding="utf-8").count("\n") > 4) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(ended)
    errors = process.communicate(timeout=60)[1]
    assert errors.count("Stopped. checkpoint-") == 1, errors
    (checkpoint,) = (tmp_path / "two").glob("checkpoint-*")
    alone = launch("-m", "tunesmith", "train", str(tmp_path / "two"), "--resume")
    assert "another number of processes" in alone.communicate(timeout=60)[1]
    assert alone.returncode == 2
    launch(*torchrun("train", str(tmp_path / "two"), "--resume")).communicate(timeout=120)
    launch(*torchrun(*unbroken, f"output_dir={tmp_path / 'whole'}")).communicate(timeout=120)
    assert losses(tmp_path / "two") == losses(tmp_path / "whole")
    assert int(checkpoint.name.rpartition("-")[2]) < 200


@pytest.mark.slow
def test_killed_process_ends_the_others(launch: Launch, recipe_file: Path, tmp_path: Path) -> None:
    """They say that it is gone, once, and do not wait for it."""
    where = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = ("-m", "tunesmith", "train", str(recipe_file), "max_steps=3000", "save_steps=5000")
    both = [launch(*words, env={**where, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    log = tmp_path / "two" / "trainer_log.jsonl"
    until = time.monotonic() + 60
    while not log.is_file() and time.monotonic() < until:
        time.sleep(0.05)
    both[1].kill()
    errors = both[0].communicate(timeout=60)[1]
    assert both[0].returncode == 2
    assert errors.count("has ended without a word") == 1


@pytest.mark.slow
def test_fsdp_that_became_ddp_is_refused(launch: Launch, recipe_file: Path, tmp_path: Path) -> None:
    """Accelerate passes over FSDP where it computes on a CPU, and says nothing."""
    process = launch(*torchrun("train", str(recipe_file)), env=FSDP2)
    errors = process.communicate(timeout=120)[1]
    assert errors.count("What was set up is not what the launcher was asked for.") == 1, errors
    assert not list((tmp_path / "two").glob("*"))


@pytest.mark.slow
def test_accelerate_on_a_cpu_that_starts_one_of_two_is_refused(launch: Launch, recipe_file: Path) -> None:
    """``accelerate launch --cpu --num_processes 2`` starts one process, unless by MPI."""
    words = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "tunesmith", "train")
    errors = launch(*words, str(recipe_file)).communicate(timeout=120)[1]
    assert errors.count("The launcher was asked for several processes and started one.") == 1, errors


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs an MPI's mpirun (pip install mpich)")
def test_accelerate_on_a_cpu_trains_by_mpi(launch: Launch, recipe_file: Path, base_dir: Path, tmp_path: Path) -> None:
    """The losses of one process; a second time, one refusal."""
    (tmp_path / "hosts").write_text("localhost:2\n")
    words = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--mpirun_hostfile", "hosts")
    words += ("--main_process_port", str(free_port()), "-m", "tunesmith", "train", str(recipe_file))
    output, errors = launch(*words).communicate(timeout=120)
    assert output.count("Run directory:") == 1, errors
    expected = losses(one_process(recipe_file, base_dir, tmp_path / "one"))
    assert [row[2] for row in losses(tmp_path / "two")] == pytest.approx([row[2] for row in expected], rel=REL_FLOAT32)
    errors = launch(*words).communicate(timeout=120)[1]
    assert errors.count("The output directory is not empty.") == 1, errors


@pytest.mark.slow
def test_sharded_training_saves_a_plain_adapter(launch: Launch, recipe_file: Path, tmp_path: Path) -> None:
    """FSDP2 over gloo, which accelerate has for GPUs only and is made to take: losses and adapter are DDP's."""
    forced = tmp_path / "forced.py"
    forced.write_text(FORCED, encoding="utf-8")
    words = torchrun("train", str(recipe_file), f"output_dir={tmp_path / 'fsdp'}")
    forced_words = [*words[: words.index("2") + 1], str(forced), *words[words.index("train") :]]
    errors = launch(*forced_words, env=FSDP2).communicate(timeout=120)[1]
    assert (tmp_path / "fsdp" / ADAPTER).is_file(), errors
    launch(*torchrun("train", str(recipe_file))).communicate(timeout=120)
    assert [row[2] for row in losses(tmp_path / "fsdp")] == pytest.approx(
        [row[2] for row in losses(tmp_path / "two")], rel=REL_FLOAT32
    )
    assert distance(tmp_path / "fsdp", tmp_path / "two") < 1e-4


FORCED = """
import sys
import accelerate.state as state
from accelerate.utils import DistributedType

begun = state.AcceleratorState.__init__

def begin(self, *args, fsdp_plugin=None, **options):
    begun(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None:
        for known in (state.AcceleratorState._shared_state, state.PartialState._shared_state, self.__dict__):
            known["distributed_type"] = DistributedType.FSDP
        for known in (state.AcceleratorState._shared_state, self.__dict__):
            known["fsdp_plugin"] = fsdp_plugin

state.AcceleratorState.__init__ = begin
from tunesmith.cli.app import main
main()
"""


@pytest.fixture
def peers() -> Sequence[Peers]:
    """Two processes of one training, both in this one, at a store of torch's."""
    import torch.distributed as dist

    port = free_port()
    held = dist.TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
    joined = dist.TCPStore("127.0.0.1", port, 2, is_master=False, timeout=timedelta(seconds=10))
    return [Peers(store, own_rank=rank, size=2, patience_s=0.3) for rank, store in enumerate((held, joined))]


def test_peers_tell_each_other(peers: Sequence[Peers]) -> None:
    """Each is given what all of them told, by rank."""
    with ThreadPoolExecutor(2) as threads:
        told = list(threads.map(lambda at: peers[at].agree("dtype", f"of {at}"), range(2)))
    assert told == [["of 0", "of 1"]] * 2


def test_peer_that_fails_first_speaks_and_others_follow(
    peers: Sequence[Peers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that waits for it leaves with its exit code, and so does one that fails afterwards."""
    monkeypatch.setattr("atexit.register", lambda call: call())
    peers[1].end(RecipeError("Training diverged."))
    with pytest.raises(SaidElsewhere) as waited:
        peers[0].agree("made")
    with pytest.raises(SaidElsewhere) as failed:
        peers[0].end(KeyboardInterrupt())
    assert waited.value.code == failed.value.code == 2
    assert peers[0].why(RuntimeError("Connection closed by peer")) == "Training diverged."


def test_peer_that_does_not_come_is_not_waited_for_without_end(peers: Sequence[Peers]) -> None:
    """It is said which of them is missing."""
    with pytest.raises(TunesmithError, match="does not come") as caught:
        peers[0].agree("made")
    assert caught.value.found == "none of rank 1"


def test_one_process_waits_for_nobody() -> None:
    """It has no store, and is its own first process."""
    alone = Peers()
    assert alone.agree("made", "mine") == ["mine"]
    alone.end(RecipeError("No."))
    assert processes() == 1
    assert is_main_process()


def test_processes_of_mpi_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its launchers have names of their own, which accelerate hears as well."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "2")
    assert processes() == 3
    assert not is_main_process()


@pytest.mark.parametrize(
    ("env", "asked"),
    [
        ({}, "one process"),
        ({"WORLD_SIZE": "2"}, "DDP"),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "FSDP2"),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, "FSDP1"),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "True"}, "Megatron-LM"),
    ],
)
def test_what_the_launcher_was_asked_for(monkeypatch: pytest.MonkeyPatch, env: dict[str, str], asked: str) -> None:
    """By accelerate's own variables; what is not built in is refused before anything is read."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert asked_for() == asked
    if asked in ("one process", "DDP", "FSDP2"):
        refuse_unbuilt_launch()
        return
    with pytest.raises(RecipeError, match="not built in"):
        refuse_unbuilt_launch()


@pytest.mark.parametrize(
    ("env", "kind", "number", "dtype", "precision", "sentence"),
    [
        ({}, "NO", 1, "float32", "no", None),
        ({"WORLD_SIZE": "2"}, "MULTI_CPU", 2, "bfloat16", "bf16", None),
        ({"WORLD_SIZE": "2"}, "NO", 1, "float32", "no", "What was set up"),
        ({"WORLD_SIZE": "2", **FSDP2}, "FSDP", 2, "float32", "no", None),
        ({"WORLD_SIZE": "2", **FSDP2}, "MULTI_CPU", 2, "float32", "no", "What was set up"),
        ({"WORLD_SIZE": "2"}, "MULTI_CPU", 2, "float32", "bf16", "another number format"),
    ],
)
def test_what_was_set_up_is_held_against_it(
    monkeypatch: pytest.MonkeyPatch,
    env: dict[str, str],
    kind: str,
    number: int,
    dtype: str,
    precision: str,
    sentence: str | None,
) -> None:
    """Strategy, number of processes, and number format."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    accelerator: Any = SimpleNamespace(
        distributed_type=SimpleNamespace(value=kind), num_processes=number, is_fsdp2=True, mixed_precision=precision,
        device=SimpleNamespace(type="cpu"),
    )  # fmt: skip
    if sentence is None:
        refuse_other_strategy(accelerator, dtype=dtype)
        return
    with pytest.raises(RecipeError, match=sentence):
        refuse_other_strategy(accelerator, dtype=dtype)


@pytest.mark.parametrize(
    ("states", "fits"), [(("rng_state.pth",), True), (("rng_state_0.pth", "rng_state_1.pth"), False)]
)
def test_run_goes_on_with_as_many_processes(tmp_path: Path, states: tuple[str, ...], fits: bool) -> None:
    """A checkpoint holds the random numbers of each."""
    for name in states:
        (tmp_path / name).touch()
    if fits:
        refuse_other_processes(tmp_path)
        return
    with pytest.raises(RecipeError, match="another number of processes") as caught:
        refuse_other_processes(tmp_path)
    assert (caught.value.expected, caught.value.found) == ("2", "1")


@pytest.mark.parametrize(("rows", "blanks"), [(8, 0), (9, 3), (3, 1)])
def test_blank_rows_fill_up_the_last_step(rows: int, blanks: int) -> None:
    """Each process has as many whole batches; the blank rows come last in every pass and count in no loss."""
    from tunesmith.train.batches import Layout, collate
    from tunesmith.train.rows import IGNORED
    from tunesmith.train.shares import BlanksLast, shared_out

    examples = [{"input_ids": [7, 8, 9 + row], "labels": [IGNORED, 8, 9 + row]} for row in range(rows)]
    shared = shared_out(examples, rows_a_pass=2, processes=2)
    assert len(shared) == rows + blanks
    assert shared_out(examples, rows_a_pass=2, processes=1) == examples
    order = list(BlanksLast(reversed(range(rows)), rows=rows, blanks=blanks, epoch=int))
    assert order == [*reversed(range(rows)), *range(rows, rows + blanks)]
    if blanks:
        for flat in (True, False):
            assert collate([examples[0], shared[-1]], layout=Layout(0, flat=flat))["labels"].tolist() == [
                examples[0]["labels"]
            ]
            only_blank = collate([shared[-1]], layout=Layout(0, flat=flat))
            assert (only_blank["shift_labels"] == IGNORED).all()
