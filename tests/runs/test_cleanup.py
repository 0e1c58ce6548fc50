"""What may be deleted of a run, what never is, and that deleting checks every file again."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.runs import making
from tunesmith.errors import RunError
from tunesmith.runs import Run, open_run
from tunesmith.runs.cleanup import Cleaned, Cleanup, Removable, apply_cleanup, plan_cleanup

STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
HOUR = 3600


def aged(root: Path, seconds: float = HOUR) -> Path:
    """A run that nothing has written to lately."""
    then = time.time() - seconds
    for path in root.rglob("*"):
        if not path.is_dir():
            os.utime(path, (then, then), follow_symlinks=False)
    return root


def finished(root: Path, *, best: int | None = 20) -> Path:
    """A finished run of three checkpoints."""
    making.adapter(root)
    for step in (10, 20, 30):
        folder = making.adapter(root / f"checkpoint-{step}")
        making.state(folder, making.history(2.0), global_step=step)
        for name in STATES:
            (folder / name).write_bytes(b"x" * 100)
        (folder / "training_args.bin").write_bytes(b"the same")
    recorded = {} if best is None else {"best_model_checkpoint": f"{root}/checkpoint-{best}"}
    making.state(root, making.history(2.0, 1.5, 1.2), **recorded)
    (root / "training_args.bin").write_bytes(b"the same")
    (root / "notes.docx").write_bytes(b"x")
    return aged(root)


def planned(root: Path) -> dict[str, str]:
    """What may go, with the reasons."""
    return {file.path: file.reason for file in plan_cleanup(open_run(root)).files}


def kept(plan: Cleanup) -> dict[str, str | None]:
    """Why files stay, with the checkpoint."""
    return {one.reason: one.checkpoint for one in plan.kept}


def everything(root: Path) -> set[str]:
    """All files below a directory."""
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir()}


def test_only_state_of_other_than_the_best_checkpoint_may_go(tmp_path: Path) -> None:
    """And the records that the root holds too."""
    run = finished(tmp_path / "run")
    expected = {f"checkpoint-{step}/{name}": "resuming" for step in (10, 30) for name in STATES}
    expected |= {f"checkpoint-{step}/training_args.bin": "duplicate" for step in (10, 30)}
    assert planned(run) == expected
    plan = plan_cleanup(open_run(run))
    assert plan.frees_bytes == 2 * (3 * 100 + len(b"the same"))
    assert kept(plan) == {"best_checkpoint": "checkpoint-20", "inference": None, "record": None, "unknown": None}
    assert sum(one.files for one in plan.kept) + len(plan.files) == len(everything(run))


def test_applying_deletes_what_was_planned_and_nothing_else(tmp_path: Path) -> None:
    """The whole best checkpoint, every adapter, tokenizer, log and unknown file is there afterwards."""
    run = finished(tmp_path / "run")
    before, plan = everything(run), plan_cleanup(open_run(run))
    done = apply_cleanup(plan)
    assert set(done.removed) == {file.path for file in plan.files} == before - everything(run)
    assert (done.freed_bytes, done.errors) == (plan.frees_bytes, ())
    after = open_run(run)
    assert [checkpoint.name for checkpoint in after.checkpoints] == [
        "checkpoint-10",
        "checkpoint-20",
        "checkpoint-30",
        "final",
    ]
    assert plan_cleanup(after).files == ()


def test_without_a_recorded_best_every_state_may_go(tmp_path: Path) -> None:
    """No adapter is lost by it."""
    run = finished(tmp_path / "run", best=None)
    assert sum(reason == "resuming" for reason in planned(run).values()) == 9


@pytest.mark.parametrize("broken_off", ["no final adapter", "steps lacking", "crashed"])
def test_training_that_did_not_end_can_still_be_resumed(tmp_path: Path, broken_off: str) -> None:
    """The state of its last checkpoint stays, and it is said why."""
    run = finished(tmp_path / "run", best=10)
    if broken_off == "no final adapter":
        for name in ("adapter_config.json", "adapter_model.safetensors", "trainer_state.json"):
            (run / name).unlink()
        making.state(run / "checkpoint-30", making.history(2.0), global_step=30, max_steps=90)
    elif broken_off == "crashed":
        (run / "running_log.txt").write_text("Traceback (most recent call last):\n  ...\nRuntimeError: out of memory\n")
    else:
        making.state(run, making.history(2.0), max_steps=90, best_model_checkpoint=f"{run}/checkpoint-10")
    aged(run)
    plan = plan_cleanup(open_run(run))
    assert kept(plan)["resumable"] == "checkpoint-30"
    assert not [file for file in plan.files if file.path.startswith("checkpoint-30/")]
    assert [file for file in plan.files if file.path == "checkpoint-20/optimizer.pt"]


def test_state_without_an_adapter_beside_it_stays(tmp_path: Path) -> None:
    """DeepSpeed's and FSDP's model state may be all that there is of an adapter."""
    run = finished(tmp_path / "run")
    for step in (10, 30):
        state = run / f"checkpoint-{step}" / f"global_step{step}"
        state.mkdir()
        (state / "mp_rank_00_model_states.pt").write_bytes(b"x")
    (run / "checkpoint-30" / "adapter_model.safetensors").unlink()
    aged(run)
    plan = plan_cleanup(open_run(run))
    assert "checkpoint-10/global_step10/mp_rank_00_model_states.pt" in {file.path for file in plan.files}
    assert not [file for file in plan.files if file.path.startswith("checkpoint-30/") and file.reason == "resuming"]
    assert "no_adapter" in kept(plan)


def test_an_empty_adapter_counts_as_none(tmp_path: Path) -> None:
    """A full disk leaves files without a byte."""
    run = finished(tmp_path / "run")
    (run / "checkpoint-30" / "adapter_model.safetensors").write_bytes(b"")
    assert not [path for path in planned(aged(run)) if path.startswith("checkpoint-30/optimizer")]


def test_state_in_folders_of_nobody_stays(tmp_path: Path) -> None:
    """Another run below this one, or a copy that somebody put aside."""
    run = finished(tmp_path / "run")
    (run / "checkpoint-30" / "aside").mkdir()
    (run / "checkpoint-30" / "aside" / "optimizer.pt").write_bytes(b"x")
    assert "checkpoint-30/aside/optimizer.pt" not in planned(aged(run))


def test_a_record_that_differs_from_the_roots_stays(tmp_path: Path) -> None:
    """Training that was resumed with other settings leaves another one."""
    run = finished(tmp_path / "run")
    (run / "checkpoint-30" / "training_args.bin").write_bytes(b"another!")
    paths = planned(aged(run))
    assert "checkpoint-10/training_args.bin" in paths
    assert "checkpoint-30/training_args.bin" not in paths


def test_a_file_with_another_name_elsewhere_frees_nothing(tmp_path: Path) -> None:
    """Deleting one of two hard links frees no byte; deleting both frees them once."""
    run = finished(tmp_path / "run")
    os.link(run / "checkpoint-10" / "optimizer.pt", tmp_path / "elsewhere.pt")
    (run / "checkpoint-30" / "scheduler.pt").unlink()
    os.link(run / "checkpoint-10" / "scheduler.pt", run / "checkpoint-30" / "scheduler.pt")
    plan = plan_cleanup(open_run(aged(run)))
    assert plan.frees_bytes == 2 * len(b"the same") + 4 * 100
    assert apply_cleanup(plan).freed_bytes == plan.frees_bytes
    assert (tmp_path / "elsewhere.pt").read_bytes() == b"x" * 100


def test_folders_of_state_go_when_they_are_empty(tmp_path: Path) -> None:
    """DeepSpeed's and FSDP's; a checkpoint's own folder never, nor one that still holds something."""
    run = finished(tmp_path / "run")
    for folder, name in (("global_step10", "mp_rank_00_model_states.pt"), ("optimizer_0", "__0_0.distcp")):
        (run / "checkpoint-10" / folder).mkdir()
        (run / "checkpoint-10" / folder / name).write_bytes(b"x")
    (run / "checkpoint-10" / "optimizer_0" / "mine.txt").write_text("x")
    apply_cleanup(plan_cleanup(open_run(aged(run))))
    assert not (run / "checkpoint-10" / "global_step10").exists()
    assert everything(run / "checkpoint-10" / "optimizer_0") == {"mine.txt"}


def test_the_folder_of_a_checkpoint_stays(tmp_path: Path) -> None:
    """Even where somebody took all else out of it meanwhile: it is not ours to remove."""
    run = finished(tmp_path / "run")
    plan = plan_cleanup(open_run(run))
    for path in (run / "checkpoint-10").iterdir():
        if path.name not in (*STATES, "training_args.bin"):
            path.unlink()
    assert apply_cleanup(plan).errors == ()
    assert (run / "checkpoint-10").is_dir()
    assert everything(run / "checkpoint-10") == set()


def test_a_run_that_may_still_be_training_is_refused(tmp_path: Path) -> None:
    """Its next checkpoint may be half-written; whoever knows better may say so."""
    run = finished(tmp_path / "run")
    plan = plan_cleanup(open_run(run))
    (run / "trainer_state.json").touch()
    before = everything(run)
    with pytest.raises(RunError, match="may still be training") as refused:
        apply_cleanup(plan)
    assert "trainer_state.json" in str(refused.value.where)
    assert everything(run) == before
    assert apply_cleanup(plan, allow_recent=True).errors == ()


def test_a_run_that_is_gone_is_an_error(tmp_path: Path) -> None:
    """A plan may be older than what it plans."""
    run = finished(tmp_path / "run")
    plan = plan_cleanup(open_run(run))
    run.rename(tmp_path / "moved")
    with pytest.raises(RunError, match="not there"):
        apply_cleanup(plan)


def test_every_file_is_checked_again_before_it_goes(tmp_path: Path) -> None:
    """What was written to, replaced by a link, or put outside stays; the others go all the same."""
    run = finished(tmp_path / "run")
    plan = plan_cleanup(open_run(run))
    precious = tmp_path / "precious"
    precious.mkdir()
    for name in (*STATES, "training_args.bin"):
        (run / "checkpoint-30" / name).rename(precious / name)
    outside = everything(precious)
    (run / "checkpoint-30").rename(tmp_path / "old")
    (run / "checkpoint-30").symlink_to(precious)
    (run / "checkpoint-10" / "optimizer.pt").write_bytes(b"y" * 100)
    (run / "checkpoint-10" / "scheduler.pt").unlink()
    (run / "checkpoint-10" / "scheduler.pt").symlink_to(precious / "scheduler.pt")
    (run / "checkpoint-10" / "rng_state.pth").unlink()
    done = apply_cleanup(plan, allow_recent=True)
    assert {error.path: error.reason for error in done.errors} == {
        "checkpoint-10/optimizer.pt": "changed",
        "checkpoint-10/scheduler.pt": "not_a_file",
        "checkpoint-10/rng_state.pth": "gone",
        **{f"checkpoint-30/{name}": "outside" for name in (*STATES, "training_args.bin")},
    }
    assert done.removed == ("checkpoint-10/training_args.bin",)
    assert everything(precious) == outside


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("adapter_model.safetensors", "protected"),
        ("checkpoint-20/tokenizer.json", "protected"),
        ("notes.docx", "protected"),
        ("../outside/optimizer.pt", "outside"),
        ("checkpoint-10/../../outside/optimizer.pt", "outside"),
        ("{tmp_path}/outside/optimizer.pt", "outside"),
    ],
)
def test_a_plan_that_was_tampered_with_deletes_nothing(tmp_path: Path, path: str, reason: str) -> None:
    """A plan is a document, and may come from anybody."""
    run = finished(tmp_path / "run")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "optimizer.pt").write_bytes(b"x")
    path = path.format(tmp_path=tmp_path)
    status = (run / path).stat()
    forged = Removable(
        path=path, size_bytes=status.st_size, kind="optimizer", reason="resuming", modified_ns=status.st_mtime_ns
    )
    done = apply_cleanup(Cleanup(path=str(run), files=(forged,), frees_bytes=1, kept=()), allow_recent=True)
    assert [error.reason for error in done.errors] == [reason]
    assert (run / path).exists()


def test_links_in_a_run_are_never_planned(tmp_path: Path) -> None:
    """What they lead to may be another run's."""
    run = finished(tmp_path / "run")
    (tmp_path / "foreign.pt").write_bytes(b"x" * 100)
    (run / "checkpoint-30" / "optimizer.pt").unlink()
    (run / "checkpoint-30" / "optimizer.pt").symlink_to(tmp_path / "foreign.pt")
    assert "checkpoint-30/optimizer.pt" not in planned(aged(run))


def test_a_single_checkpoint_of_finished_training_may_lose_its_state(tmp_path: Path) -> None:
    """What is opened may be a checkpoint itself."""
    run = finished(tmp_path / "run")
    making.state(run / "checkpoint-30", making.history(2.0), global_step=30)
    assert set(STATES) <= set(planned(aged(run) / "checkpoint-30"))


def test_plan_and_result_survive_json(tmp_path: Path) -> None:
    """The command line prints them, times in nanoseconds and all."""
    plan = plan_cleanup(open_run(finished(tmp_path / "run")))
    assert Cleanup.model_validate_json(plan.to_json()) == plan
    done = apply_cleanup(plan)
    assert Cleaned.model_validate_json(done.to_json()) == done


def test_a_run_record_from_elsewhere_plans_nothing(tmp_path: Path) -> None:
    """A record of a run that is not on this machine: its files are not here to be deleted."""
    run: Run = open_run(finished(tmp_path / "run"))
    (tmp_path / "run").rename(tmp_path / "moved")
    assert plan_cleanup(run).files == ()
