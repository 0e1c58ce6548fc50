"""open_run: every shape of run directory, what it tells, and what is wrong with it."""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runs.making import EMPTY_PICKLE, adapter, evaluations, factory_row, history, jsonl, llama_factory, state
from tunesmith.errors import RunError
from tunesmith.runs import Run, as_run, checkpoint_of, open_run


def codes(run: Run) -> list[str]:
    """The findings' codes."""
    return [finding.code for finding in run.findings]


def test_a_llama_factory_run_is_understood_and_quiet(tmp_path: Path) -> None:
    """Everything that it left is found, and a healthy run has no findings."""
    root = llama_factory(tmp_path / "run")
    run = open_run(root)
    assert (run.kind, run.writer, run.base_model, run.name) == ("run", "llamafactory", "org/base", "run")
    assert [(point.name, point.step) for point in run.checkpoints] == [
        ("checkpoint-10", 10), ("checkpoint-20", 20), ("final", 30),
    ]  # fmt: skip
    assert [(point.loss, point.eval_loss) for point in run.checkpoints] == [(2.0, 1.9), (1.5, 1.6), (1.2, 1.4)]
    assert [point.is_best for point in run.checkpoints] == [False, True, False]
    assert [(row.step, row.loss, row.eval_loss) for row in run.log] == [(10, 2.0, 1.9), (20, 1.5, 1.6), (30, 1.2, 1.4)]
    assert run.hyperparameters["r"] == 8
    assert run.hyperparameters["do_train"] is True
    assert run.hyperparameters["max_steps"] == 30
    assert run.metrics == {"train_loss": 1.56, "eval_loss": 1.4, "epoch": 3.0}
    assert run.findings == ()


def test_a_trl_run_is_understood(tmp_path: Path) -> None:
    """save_model at the root without a state of its own: the last checkpoint's state counts."""
    root = adapter(tmp_path / "run")
    state(adapter(root / "checkpoint-30"), history(2.0, 1.5, 1.2))
    (root / "training_args.bin").write_bytes(EMPTY_PICKLE)
    run = open_run(root)
    assert (run.kind, run.writer) == ("run", "trainer")
    assert [(point.name, point.step) for point in run.checkpoints] == [("checkpoint-30", 30), ("final", 30)]
    assert [row.loss for row in run.log] == [2.0, 1.5, 1.2]
    assert run.findings == ()


def test_a_bare_peft_adapter_is_a_run_of_one(tmp_path: Path) -> None:
    """Nothing is known of its training, and nothing is made up."""
    run = open_run(adapter(tmp_path / "a"))
    assert (run.kind, run.writer, run.log, run.metrics) == ("adapter", "peft", (), {})
    (point,) = run.checkpoints
    assert (point.name, point.step, point.loss, point.is_best) == ("final", None, None, False)
    assert codes(run) == []


def test_one_checkpoint_of_a_run_can_be_opened(tmp_path: Path) -> None:
    """As an adapter at its root, with the state that it was saved with; that more steps followed is no illness."""
    root = llama_factory(tmp_path / "run")
    run = open_run(root / "checkpoint-20")
    assert (run.kind, run.writer) == ("checkpoint", "trainer")
    assert [(point.name, point.step) for point in run.checkpoints] == [("final", 20)]
    assert [row.loss for row in run.log] == [2.0, 1.5]
    assert codes(run) == []


def test_an_interrupted_run_is_told_and_still_of_use(tmp_path: Path) -> None:
    """Only checkpoints: the last one stands for the run."""
    root = tmp_path / "run"
    for step in (10, 9, 100):
        state(adapter(root / f"checkpoint-{step}"), history(2.0), global_step=step, max_steps=300)
    jsonl(root / "trainer_log.jsonl", [factory_row(10, loss=2.0), factory_row(110, loss=1.0)])
    run = open_run(root)
    assert [point.step for point in run.checkpoints] == [9, 10, 100]
    assert codes(run) == ["run_unfinished", "steps_missing"]
    assert run.findings[0].params == {"checkpoint": "checkpoint-100"}
    assert run.findings[1].params == {"done": 100, "planned": 300}
    assert [(row.step, row.sources) for row in run.log] == [
        (10, ("checkpoint-100/trainer_state.json",)), (110, ("trainer_log.jsonl",)),
    ]  # fmt: skip


def test_our_own_manifest_is_read(tmp_path: Path) -> None:
    """Who wrote it, on which base, with which versions, and which rows it kept."""
    root = adapter(tmp_path / "run")
    manifest = {"base_sha256": "ab" * 32, "seed": 42, "versions": {"torch": "2.13"}, "nested": {"x": 1}}
    (root / "tunesmith_run.json").write_text(json.dumps(manifest))
    jsonl(root / "held_out.jsonl", [{"messages": []}])
    run = open_run(root)
    assert (run.writer, run.base_sha256, run.held_out) == ("tunesmith", "ab" * 32, "held_out.jsonl")
    assert run.hyperparameters["seed"] == 42
    assert run.hyperparameters["version_torch"] == "2.13"
    assert "nested" not in run.hyperparameters


@pytest.mark.parametrize(
    "path", ["{root}/checkpoint-20", r"C:\runs\x\checkpoint-20", "checkpoint-20", "out/checkpoint-20/"]
)
def test_the_best_checkpoint_is_known_by_its_name(tmp_path: Path, path: str) -> None:
    """Runs are copied between machines, so only the last part of its path means anything."""
    root = llama_factory(tmp_path / "run")
    state(root, [], best_model_checkpoint=path.format(root=root))
    assert [point.name for point in open_run(root).checkpoints if point.is_best] == ["checkpoint-20"]


def test_a_checkpoint_folder_without_an_adapter_is_no_checkpoint(tmp_path: Path) -> None:
    """Nor is a folder whose name only begins like one."""
    root = adapter(tmp_path / "run")
    (root / "checkpoint-10").mkdir()
    adapter(root / "checkpoint-20-old")
    adapter(root / "checkpoint-last")
    assert [point.name for point in open_run(root).checkpoints] == ["final"]


# -- refusals


def full_model(path: Path) -> Path:
    """A merged model."""
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"x")
    return path


def empty(path: Path) -> Path:
    """An empty directory."""
    path.mkdir()
    return path


def a_file(path: Path) -> Path:
    """A file."""
    path.write_text("x")
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (full_model, "whole model"),
        (empty, "holds no adapter"),
        (a_file, "is a file"),
        (lambda path: path, "is not there"),
    ],
)
def test_what_is_no_run_is_refused_with_what_it_is(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    """Four mistakes, four messages."""
    with pytest.raises(RunError, match=message) as caught:
        open_run(make(tmp_path / "x"))
    assert caught.value.where == str(tmp_path / "x")


def test_a_checkpoint_is_chosen_by_name_or_number(tmp_path: Path) -> None:
    """And where there is none of that name, those that there are get listed."""
    run = as_run(llama_factory(tmp_path / "run"))
    assert as_run(run) is run
    assert checkpoint_of(run, 20) == checkpoint_of(run, "20") == checkpoint_of(run, "checkpoint-20")
    assert checkpoint_of(run, "final").step == 30
    with pytest.raises(RunError, match="no checkpoint-15") as caught:
        checkpoint_of(run, 15)
    assert caught.value.expected == "checkpoint-10, checkpoint-20, final"
    assert caught.value.next_step == "pass --checkpoint final"


# -- findings


def run_with(tmp_path: Path, rows: list[dict[str, Any]], **fields: Any) -> Run:
    """A trainer's run with this history."""
    root = adapter(tmp_path / "run")
    state(root, rows, **fields)
    return open_run(root)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error_with_its_step(tmp_path: Path, bad: float) -> None:
    """The first step where it happened."""
    run = run_with(tmp_path, history(2.0, bad, bad))
    (finding,) = run.findings
    assert (finding.code, finding.severity, finding.params["step"]) == ("loss_not_finite", "error", 20)


def test_a_run_with_nan_travels_through_json(tmp_path: Path) -> None:
    """JSON has no NaN; the record does."""
    run = run_with(tmp_path, history(2.0, math.nan))
    again = Run.read(run.write(tmp_path / "run.json"))
    assert again.log[1].loss is not None
    assert math.isnan(again.log[1].loss)
    assert again.findings == run.findings


def test_overfitting_is_told_with_its_best_step(tmp_path: Path) -> None:
    """Held-out loss that turned round by more than 2 %."""
    run = run_with(tmp_path, history(2.0, 1.0, 0.5) + evaluations(2.0, 1.5, 1.8))
    (finding,) = run.findings
    assert finding.code == "overfitting"
    assert finding.params == {"step": 20, "best": 1.5, "last": 1.8}


@pytest.mark.parametrize("held_out", [(2.0, 1.5, 1.4), (2.0, 1.5, 1.52), (1.5, 1.8), (2.0, 1.5, math.nan)])
def test_a_held_out_loss_that_falls_or_wavers_is_no_overfitting(tmp_path: Path, held_out: tuple[float, ...]) -> None:
    """Falling, within 2 %, too few points to tell, or not finite."""
    assert codes(run_with(tmp_path, history(2.0, 1.0, 0.5) + evaluations(*held_out))) == []


def test_a_loss_that_rose_is_told(tmp_path: Path) -> None:
    """From the first quarter to the last."""
    run = run_with(tmp_path, history(1.0, 1.1, 1.2, 1.3))
    (finding,) = run.findings
    assert (finding.code, finding.params) == ("loss_rose", {"first": 1.0, "last": 1.3})


@pytest.mark.parametrize("losses", [(2.0, 1.0), (2.0, 1.5, 1.8, 1.9), (1.0, 1.0, 1.0, 1.0), (1.0, 2.0, 3.0), ()])
def test_a_loss_that_fell_stayed_or_is_too_short_is_quiet(tmp_path: Path, losses: tuple[float, ...]) -> None:
    """No finding where there is nothing to say."""
    assert codes(run_with(tmp_path, history(*losses))) == []


def test_a_missing_tokenizer_is_told(tmp_path: Path) -> None:
    """Neither at the root nor with the last adapter."""
    assert codes(open_run(adapter(tmp_path / "a", tokenizer=False))) == ["tokenizer_missing"]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"])
def test_any_vocabulary_counts_as_a_tokenizer(tmp_path: Path, name: str) -> None:
    """The same files that a merge takes for one."""
    root = adapter(tmp_path / "a", tokenizer=False)
    (root / name).write_text("{}")
    assert codes(open_run(root)) == []


def test_missing_weights_are_told(tmp_path: Path) -> None:
    """A configuration alone is what an interrupted copy leaves."""
    root = adapter(tmp_path / "a")
    (root / "adapter_model.safetensors").unlink()
    assert codes(open_run(root)) == ["adapter_weights_missing"]


# -- damage

DAMAGED = [b"", b"{", b"[]", b"\xff\xfe\x00", b'{"log_history": ', b"[" * 100_000, b"null", b'"x"']


@pytest.mark.parametrize("content", DAMAGED)
@pytest.mark.parametrize(
    "name", ["trainer_state.json", "all_results.json", "tunesmith_run.json", "adapter_config.json"]
)
def test_a_damaged_json_file_is_a_finding_and_no_crash(tmp_path: Path, name: str, content: bytes) -> None:
    """A run is still a run without it."""
    root = adapter(tmp_path / "a")
    (root / name).write_bytes(content)
    run = open_run(root)
    assert [finding.params for finding in run.findings if finding.code == "file_unreadable"] == [{"file": name}]


@pytest.mark.parametrize(
    "document",
    [
        {"log_history": 5, "global_step": "x", "max_steps": None, "best_model_checkpoint": 7},
        {"log_history": [None, 3, "x", [], {}, {"step": None}, {"step": "1"}, {"step": True, "loss": 1}]},
        {"log_history": [{"step": math.nan, "loss": 1.0}, {"step": math.inf, "loss": 1.0}]},
        {"log_history": [{"step": 10**400, "loss": 1.0}, {"step": 1, "loss": 10**400}]},
        {"log_history": [{"step": 1, "loss": None, "eval_loss": "x", "epoch": {}}]},
    ],
)
def test_a_state_of_odd_types_is_read_without_a_crash(tmp_path: Path, document: dict[str, Any]) -> None:
    """Valid JSON that means nothing: no row comes of it."""
    root = adapter(tmp_path / "a")
    (root / "trainer_state.json").write_text(json.dumps(document))
    assert open_run(root).log == ()


def test_results_of_odd_types_are_left_out(tmp_path: Path) -> None:
    """Only numbers are metrics."""
    root = adapter(tmp_path / "a")
    (root / "all_results.json").write_text(json.dumps({"a": 1, "b": "x", "c": True, "d": None, "e": 10**400, "f": []}))
    assert open_run(root).metrics == {"a": 1.0}


@pytest.mark.parametrize("content", [b"{", b"a: [", b"\x00", b"x: !!python/object:os.system {}", b"[" * 5000])
def test_a_damaged_yaml_file_is_a_finding(tmp_path: Path, content: bytes) -> None:
    """Python tags are not obeyed."""
    root = adapter(tmp_path / "a")
    (root / "training_args.yaml").write_bytes(content)
    assert codes(open_run(root)) == ["file_unreadable"]


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        """What unpickling calls."""
        return (Path.touch, (self.path,))


def test_nothing_is_ever_unpickled(tmp_path: Path) -> None:
    """A trap in every pickle that trainers leave, at the root and in a checkpoint; none springs."""
    root = llama_factory(tmp_path / "run")
    names = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "adapter_model.bin")
    for folder in (root, root / "checkpoint-20"):
        for name in names:
            (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    assert open_run(root).checkpoints
    assert not (tmp_path / "sprung").exists()
    pickle.loads((root / "training_args.bin").read_bytes())  # noqa: S301 - the trap itself is sound
    assert (tmp_path / "sprung").exists()


# -- the catalogue


def test_every_file_is_listed_with_its_kind_and_use(tmp_path: Path) -> None:
    """By name alone, folders below too, in order."""
    root = llama_factory(tmp_path / "run")
    (root / "notes.xyz").write_text("mine")
    files = {file.path: file for file in open_run(root).files}
    on_disk = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    assert files.keys() == on_disk.keys()
    assert all(file.size_bytes == on_disk[path].stat().st_size for path, file in files.items())
    kinds = {path: (file.kind, file.needed_for) for path, file in files.items()}
    assert kinds["adapter_model.safetensors"] == ("adapter_weights", "inference")
    assert kinds["checkpoint-20/optimizer.pt"] == ("optimizer", "resuming")
    assert kinds["checkpoint-20/rng_state.pth"] == ("rng_state", "resuming")
    assert kinds["training_args.bin"] == ("training_args_bin", "record")
    assert kinds["all_results.json"] == ("results", "record")
    assert kinds["training_loss.png"] == ("loss_chart", "record")
    assert kinds["notes.xyz"] == ("unknown", "unknown")


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_a_file_name_that_is_not_utf8_is_no_hindrance(tmp_path: Path) -> None:
    """An archive of another system leaves such names."""
    root = adapter(tmp_path / "a")
    try:
        (Path(os.fsdecode(os.fsencode(root) + b"/\xd6\xd0\xce\xc4.txt"))).write_text("x")
    except OSError:
        pytest.skip("this file system refuses such names")
    run = open_run(root)
    assert Run.read(run.write(tmp_path / "run.json")) == run
    assert any(file.path.endswith(".txt") for file in run.files)


def test_links_to_directories_are_not_followed(tmp_path: Path) -> None:
    """A link to its own parent has no end."""
    root = adapter(tmp_path / "a")
    (root / "loop").symlink_to(root)
    (root / "broken").symlink_to(root / "nowhere")
    run = open_run(root)
    assert [(file.path, file.kind) for file in run.files] == [
        ("adapter_config.json", "adapter_config"), ("adapter_model.safetensors", "adapter_weights"),
        ("broken", "link"), ("loop", "link"), ("tokenizer.json", "tokenizer"),
    ]  # fmt: skip
    assert codes(run) == ["link_leads_out"]


# -- runs inside, and runs half-made


def test_the_one_run_inside_stands_for_the_directory(tmp_path: Path) -> None:
    """ms-swift puts a version folder between; a note says which."""
    root = tmp_path / "output"
    state(adapter(root / "v0-20261126" / "checkpoint-30"), history(2.0, 1.0), global_step=30)
    run = open_run(root)
    assert (Path(run.path).name, [point.name for point in run.checkpoints]) == ("v0-20261126", ["checkpoint-30"])
    assert (run.findings[0].code, run.findings[0].params) == ("run_inside", {"folder": "v0-20261126"})


def test_of_several_runs_inside_none_is_guessed(tmp_path: Path) -> None:
    """They are listed, and the newest version is the next command."""
    root = tmp_path / "output"
    for version in ("v2-x", "v10-x", "v1-x"):
        adapter(root / version / "checkpoint-30")
    (root / "notes").mkdir()
    with pytest.raises(RunError, match="several runs") as caught:
        open_run(root)
    assert caught.value.details == ("v1-x", "v2-x", "v10-x")
    assert caught.value.next_step == f"tunesmith inspect {root / 'v10-x'}"


def test_training_that_reached_its_end_needs_no_adapter_at_the_root(tmp_path: Path) -> None:
    """ms-swift leaves none there."""
    root = tmp_path / "run"
    state(adapter(root / "checkpoint-30"), history(2.0, 1.0), global_step=30, max_steps=30)
    assert codes(open_run(root)) == []


def test_a_configuration_without_weights_beside_checkpoints_is_no_adapter(tmp_path: Path) -> None:
    """Axolotl writes it before it trains."""
    root = adapter(tmp_path / "run")
    (root / "adapter_model.safetensors").unlink()
    state(adapter(root / "checkpoint-10"), history(2.0), global_step=10)
    run = open_run(root)
    assert [point.name for point in run.checkpoints] == ["checkpoint-10"]
    assert codes(run) == ["run_unfinished", "steps_missing"]


def test_a_checkpoint_that_was_being_written_is_passed_over(tmp_path: Path) -> None:
    """The one before is whole."""
    root = tmp_path / "run"
    state(adapter(root / "checkpoint-10"), history(2.0), global_step=10)
    (adapter(root / "checkpoint-20") / "adapter_model.safetensors").unlink()
    assert [point.name for point in open_run(root).checkpoints] == ["checkpoint-10"]


def test_a_run_with_200_checkpoints_is_soon_open(tmp_path: Path) -> None:
    """Not one file of the others is read: only the last one's state."""
    root = tmp_path / "run"
    for step in range(1, 201):
        folder = adapter(root / f"checkpoint-{step}")
        state(folder, history(*[2.0] * step, every=1), global_step=step, max_steps=200)
    run = open_run(root)
    assert len(run.checkpoints) == 200
    assert [row.step for row in run.log] == list(range(1, 201))


# -- the hub


def cached_adapter(hub: Path, *, weights: bool = True) -> Path:
    """An adapter as the hub's client caches it."""
    repo = hub / "models--org--lora"
    snapshot = repo / "snapshots" / ("a" * 40)
    made = adapter(repo / "made")
    (repo / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(made.iterdir())):
        if weights or file.suffix != ".safetensors":
            (repo / "blobs" / str(number)).write_bytes(file.read_bytes())
            (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    return snapshot


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, offline."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return cache


@pytest.mark.parametrize("name", ["org/lora", "org/lora@main"])
def test_an_adapter_of_the_hub_is_opened_from_the_cache(hub: Path, name: str) -> None:
    """Its files are links to blobs, which is no finding."""
    snapshot = cached_adapter(hub)
    run = open_run(name)
    assert (run.path, run.name, run.kind, run.findings) == (str(snapshot), "org/lora", "adapter", ())
    assert {file.kind for file in run.files} == {"adapter_config", "adapter_weights", "tokenizer"}
    assert all(file.size_bytes > 0 for file in run.files)


@pytest.mark.usefixtures("hub")
def test_an_adapter_that_is_not_cached_is_refused_offline_with_the_command() -> None:
    """As a directory that is not there, and as a name of the hub's."""
    with pytest.raises(RunError, match="neither a directory here nor in the hub's cache") as caught:
        open_run("org/lora")
    assert "hf download org/lora" in str(caught.value.next_step)


def test_half_an_adapter_in_the_cache_is_refused(hub: Path) -> None:
    """Its missing file is named."""
    cached_adapter(hub, weights=False)
    with pytest.raises(RunError, match="in part") as caught:
        open_run("org/lora")
    assert caught.value.details == ("missing: adapter_model.safetensors",)


def test_a_directory_goes_before_the_hub(hub: Path, tmp_path: Path) -> None:
    """``org/lora`` here is what was meant."""
    cached_adapter(hub)
    adapter(tmp_path / "org" / "lora")
    assert open_run("org/lora").path == str(tmp_path / "org" / "lora")
