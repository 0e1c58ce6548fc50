"""Every verb from beginning to end: what it prints where, what it writes, and the exit code it ends with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tunesmith as ts
from tests.cli.conftest import Cli, Result, tree
from tests.tiny_models import TinyRun
from tunesmith.cli.app import app
from tunesmith.compare import Comparison

ESCAPE = "\x1b"
GREEDY = ("--dtype", "fp32", "--max-new-tokens", "8")


def here(*arguments: object) -> str:
    """The standard output of a command run in this process, where torch is loaded already."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return str(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this module's commands write."""
    return tmp_path_factory.mktemp("verbs")


@pytest.fixture(scope="module")
def rows(folder: Path) -> Path:
    """Two rows with answers."""
    path = folder / "rows.jsonl"
    rows = [{"instruction": f"Question {i}?", "output": f"Answer {i}."} for i in (1, 2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def merged(cli: Cli, run_dir: Path, folder: Path) -> Path:
    """The run, merged by the command line, with its record beside it."""
    out = folder / "merged"
    done = cli("merge", run_dir, "--out", out, "--record", folder / "merge.json", fresh=True)
    assert done.code == 0, done.err
    return out


@pytest.fixture(scope="module")
def compared(cli: Cli, run_dir: Path, rows: Path, folder: Path) -> Result:
    """One comparison, as JSON on stdout and in a file."""
    variants = "base,final,checkpoint-10"
    out = folder / "comparison.json"
    options = ("--variants", variants, "--data", rows, "--out", out, "--json", *GREEDY)
    return cli("compare", run_dir, *options)


@pytest.fixture(scope="module")
def verified(cli: Cli, run_dir: Path, merged: Path, folder: Path, rows: Path) -> Result:
    """A full verification."""
    return cli("verify", run_dir, merged, "--prompts", rows, "--out", folder / "verdict.json")


def test_inspect_prints_facts_and_the_next_command(cli: Cli, run_dir: Path) -> None:
    """A person sees the adapter, the files and what to type next; a pipe gets no escape codes."""
    done = cli("inspect", run_dir, fresh=True)
    assert (done.code, done.err) == (0, "")
    assert "r = 2, alpha = 8, scaling = 4" in done.out or "r = 4, alpha = 8, scaling = 2" in done.out
    assert "adapter_model.safetensors" in done.out
    assert "checkpoint-10" in done.out
    assert f"Next: tunesmith checkpoints {run_dir}" in done.out
    assert ESCAPE not in done.out


def test_inspect_json_reads_back_as_its_record(cli: Cli, run_dir: Path) -> None:
    """One document with a schema version, and nothing else on stdout."""
    done = cli("inspect", run_dir, "--checkpoint", "10", "--json")
    inspection = ts.Inspection.model_validate_json(done.out)
    assert json.loads(done.out)["schema_version"] == 1
    assert inspection.checkpoint == "checkpoint-10"
    assert inspection.adapter.r == 2


def test_chat_answers_once_and_says_that_the_reply_was_cut(cli: Cli, run_dir: Path) -> None:
    """The reply alone is on stdout; why it ended and how to get the rest is on stderr."""
    done = cli("chat", run_dir, "--prompt", "Hello", "--greedy", *GREEDY)
    assert done.code == 0, done.err
    assert done.out.endswith("\n")
    assert "cut at the limit; 8 tokens" in done.err
    assert "raise --max-new-tokens (now 8)" in done.err
    assert ESCAPE not in done.out + done.err
    assert done.out.strip() not in done.err


def test_chat_reads_questions_from_a_pipe_and_answers_in_json_lines(cli: Cli, run_dir: Path) -> None:
    """One document a reply, each on a line of its own; blank lines are no questions."""
    done = cli("chat", run_dir, "--checkpoint", "none", "--json", *GREEDY, stdin="One?\n\n  \nTwo?\n")
    turns = [ts.ChatTurn.model_validate_json(line) for line in done.out.splitlines()]
    assert [(turn.question, turn.variant) for turn in turns] == [("One?", "base"), ("Two?", "base")]
    assert all(turn.stop_reason in ("eos", "length") and turn.tokens <= 8 for turn in turns)
    assert done.code == 0


def test_compare_writes_what_it_prints(compared: Result, folder: Path) -> None:
    """--json and --out hold the same record: replies of every variant, and their scores."""
    assert compared.code == 0, compared.err
    comparison = Comparison.model_validate_json(compared.out)
    assert comparison == Comparison.read(folder / "comparison.json")
    assert [variant.name for variant in comparison.variants] == ["base", "final", "checkpoint-10"]
    assert [score.variant for score in comparison.scores] == ["base", "final", "checkpoint-10"]
    assert {reply.stop_reason for reply in comparison.replies} <= {"eos", "length"}


def test_compare_progress_stays_on_stderr(compared: Result) -> None:
    """Stages are named on stderr, one line each, without escape codes."""
    assert "load ..." in compared.err
    assert ESCAPE not in compared.err


def test_compare_answers_a_file_of_prompts_and_writes_markdown(run_dir: Path, folder: Path) -> None:
    """Without --json a pipe gets plain text, one reply after another."""
    prompts, out = folder / "prompts.txt", folder / "comparison.md"
    prompts.write_text("Who are you?\n")
    shown = here("compare", run_dir, "--prompts", prompts, "--out", out, *GREEDY)
    assert "# Who are you?" in shown
    assert "## base [" in shown
    assert "## final [" in shown
    assert ESCAPE not in shown
    assert "Who are you?" in out.read_text()


def test_compare_with_a_merged_model_writes_html(run_dir: Path, rows: Path, merged: Path) -> None:
    """A variant may be the directory of a merged model."""
    out = merged.parent / "comparison.html"
    shown = here("compare", run_dir, "--variants", f"final,{merged}", "--prompts", rows, "--out", out, *GREEDY)
    assert "## merged [" in shown
    assert out.read_text().lstrip().lower().startswith("<!doctype html>")


def test_merge_records_what_it_did(merged: Path, run_dir: Path, tiny: TinyRun) -> None:
    """The record names the run, and the weights are PEFT's own merge up to rounding."""
    record = ts.Merged.read(merged.parent / "merge.json")
    assert record.plan.run == str(run_dir)
    ours = load_file(merged / "model.safetensors")
    theirs = load_file(tiny.merged / "model.safetensors")
    assert all(float((ours[name] - theirs[name]).abs().max()) < 1e-6 for name in theirs)


def test_merge_names_the_verification_of_the_same_checkpoint(cli: Cli, run_dir: Path, tmp_path: Path) -> None:
    """The next command can be pasted: paths in quotes, the same checkpoint."""
    out = tmp_path / "a merged model"
    done = cli("merge", run_dir, "--out", out, "--checkpoint", "10")
    assert f"Next: tunesmith verify {run_dir} '{out}' --checkpoint 10" in done.out
    assert done.code == 0


def test_merge_passes_every_option_on(cli: Cli, run_dir: Path, tmp_path: Path) -> None:
    """Weights, adapters, dtype, rounding and file size; and the next command repeats what verify must know."""
    other = run_dir / "checkpoint-10"
    options = ["--adapter", f"{other}:-0.25", "--dtype", "bf16", "--shard-size", "60KB"]
    options += ["--rounding", "stochastic", "--seed", "5"]
    merge = ["merge", f"{run_dir}:0.5", "--out", tmp_path / "out", *options]
    plan = ts.MergePlan.model_validate_json(cli(*merge, "--dry-run", "--json").out)
    assert [(one.run, one.weight) for one in plan.adapters] == [(str(run_dir), 0.5), (str(other), -0.25)]
    assert (plan.convert_to, plan.shard_bytes, len(plan.shards) > 1) == ("BF16", 60_000, True)
    assert (plan.rounding, plan.seed, plan.calibration) == ("stochastic", 5, None)
    done = cli(*merge)
    assert done.code == 0, done.err
    assert f"final of {run_dir}, times 0.5" in done.out
    assert f"Next: tunesmith verify {run_dir}:0.5 {tmp_path / 'out'} --adapter {other}:-0.25" in done.out
    refused = cli("merge", run_dir, "--out", tmp_path / "x", "--base-view", "nf5")
    assert (refused.code, "nf4, nf4-double, int8" in refused.err) == (2, True)


def test_merge_dry_run_writes_nothing(cli: Cli, run_dir: Path, tmp_path: Path) -> None:
    """A plan is printed, as text or as its record; no directory is made."""
    out = tmp_path / "deep" / "merged"
    text = cli("merge", run_dir, "--out", out, "--dry-run")
    document = cli("merge", run_dir, "--out", out, "--dry-run", "--json")
    assert (text.code, document.code) == (0, 0)
    assert "Nothing was written" in text.out
    for fact in ("tensors change", "disk: ", " free\n", "memory: about", "time: about"):
        assert fact in text.out
    assert ts.MergePlan.model_validate_json(document.out).checkpoint == "final"
    assert tree(tmp_path) == {}


def test_verify_proves_our_merge(verified: Result, folder: Path) -> None:
    """All four levels, exit 0, and the verdict in a file."""
    assert verified.code == 0, verified.out + verified.err
    assert all(f"\n{level}  pass" in verified.out for level in ("structure", "assets", "weights", "behaviour"))
    assert ts.Verdict.read(folder / "verdict.json").good


def test_verify_names_the_cause_and_exits_3(cli: Cli, run_dir: Path, merged: Path, tmp_path: Path) -> None:
    """A merge that was never done is an answer, not an error: the cause in one sentence, on stdout."""
    damaged = Path(shutil.copytree(merged, tmp_path / "damaged"))
    base = Path(ts.inspect(run_dir).base or "")
    shutil.copy(base / "model.safetensors", damaged / "model.safetensors")
    done = cli("verify", run_dir, damaged, "--level", "structure", "--level", "weights", "--json")
    verdict = ts.Verdict.model_validate_json(done.out)
    assert done.code == 3
    assert verdict.answer == "different"
    assert verdict.causes[0].code == "cause_not_applied"
    shown = cli("verify", run_dir, damaged, "--level", "weights")
    assert shown.code == 3
    assert "FAIL" in shown.out
    assert ts.verdict_sentence(verdict) in shown.out


def test_verify_without_the_weights_proves_nothing_and_exits_2(cli: Cli, run_dir: Path, merged: Path) -> None:
    """What was not looked at is not vouched for."""
    done = cli("verify", run_dir, merged, "--level", "structure")
    assert done.code == 2
    assert "Not verified" in done.out


def test_report_needs_no_model_where_all_records_are_given(
    cli: Cli, run_dir: Path, merged: Path, compared: Result, verified: Result
) -> None:
    """The report is made of the three records alone, and says where it is."""
    folder = merged.parent
    assert compared.code == verified.code == 0
    records = ("--comparison", "comparison.json", "--verdict", "verdict.json", "--merge-record", "merge.json")
    done = cli("report", run_dir, merged, *records, "--out", "report.html", "--json", cwd=folder, fresh=True)
    assert done.code == 0, done.err
    report = ts.Report.model_validate_json(done.out)
    assert report.path == "report.html"
    assert (folder / "report.html").stat().st_size > 50_000
    assert "..." not in done.err  # no stage ran


def test_doctor_shows_the_machine(cli: Cli) -> None:
    """Versions, memory and what is missing, as text and as a record."""
    done = cli("doctor", "--dtype", "fp32", "--json", fresh=True)
    health = ts.Health.model_validate_json(done.out)
    assert (done.code, done.err) == (0, "")
    assert health.versions["tunesmith"] == ts.__version__
    shown = here("doctor", "--dtype", "fp32")
    assert "compute dtype" in shown
    assert "float32 (requested)" in shown


def test_train_ends_with_a_run_that_inspect_reads(cli: Cli, tiny: TinyRun, rows: Path, tmp_path: Path) -> None:
    """Two steps of a tiny recipe; overrides replace its keys, relative paths are the recipe's."""
    recipe = tmp_path / "recipe.yaml"
    keys = {
        "model_name_or_path": str(tiny.base),
        "dataset": str(rows),
        "output_dir": str(tmp_path / "not-this"),
        "lora_rank": 2,
        "max_steps": 9,
        "logging_steps": 1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "dtype": "fp32",
    }
    recipe.write_text(json.dumps(keys))
    out = tmp_path / "out"
    done = cli("train", recipe, "max_steps=2", f"output_dir={out}")
    assert done.code == 0, done.err
    assert f"Next: tunesmith inspect {out}" in done.out
    assert "2 steps, training loss" in done.out
    assert not (tmp_path / "not-this").exists()
    assert ts.open_run(out).checkpoints[-1].step == 2


def test_damage_that_was_not_planned_is_noticed(cli: Cli, run_dir: Path, merged: Path, tmp_path: Path) -> None:
    """Sabotage: one number of one tensor, and the exit code is 3."""
    damaged = Path(shutil.copytree(merged, tmp_path / "damaged"))
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.norm.weight"][3] += 0.01
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    assert cli("verify", run_dir, damaged, "--level", "weights").code == 3
