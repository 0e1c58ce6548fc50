"""Tests of the jobs' kinds: each is the public verb, with the equal command, and no path that leads out."""

from __future__ import annotations

import inspect
import json
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.main import get_command

import tunesmith as ts
from tests.web.conftest import Page, served
from tunesmith.cli.app import app as command_line
from tunesmith.web import Settings
from tunesmith.web.jobs import Kind
from tunesmith.web.places import Places
from tunesmith.web.verbs import VERBS, typed_prompts
from tunesmith.web.work import Desk, Work, command, defaults_of

RECIPE = """\
# a comment
model_name_or_path: base
dataset: rows.jsonl
output_dir: out
max_steps: 2
per_device_train_batch_size: 2
template: null
"""


def no_record(job: str) -> Any:
    """A desk without finished jobs."""
    raise AssertionError(job)


def prepare(page: Page, kind: str, **params: object) -> Work:
    """What a job would do, not begun."""
    verb = VERBS[kind]
    return verb.prepare(verb.params.model_validate(params), Places(page.root), Desk(no_record))


def test_every_kind_is_known_to_the_door() -> None:
    """The schema names the same kinds as the table."""
    assert set(get_args(Kind)) == set(VERBS)


@pytest.mark.parametrize(
    ("kind", "params", "line"),
    [
        ("demo", {}, "tunesmith demo"),
        ("demo", {"force": True}, "tunesmith demo --force"),
        ("checkpoints", {"run": "run"}, "tunesmith checkpoints run"),
        (
            "checkpoints",
            {"run": "run", "base": "base", "data": "rows.jsonl", "answers": 0},
            "tunesmith checkpoints run --data rows.jsonl --base base --answers 0",
        ),
        ("compare", {"run": "run"}, "tunesmith compare run"),
        ("compare", {"run": "run", "variants": ["base", "final"]}, "tunesmith compare run"),
        (
            "compare",
            {"run": "run", "variants": ["base", "run-merged"], "prompts_file": "prompts.txt", "max_prompts": 3},
            "tunesmith compare run --variants base,run-merged --prompts prompts.txt --max-prompts 3",
        ),
        ("compare", {"run": "run", "prompts_file": "general-en"}, "tunesmith compare run --prompts general-en"),
        (
            "compare",
            {"run": "run", "settings": {"temperature": 0.5, "stop": ["a b", "c"]}},
            "tunesmith compare run --sample --temperature 0.5 --stop 'a b' --stop c",
        ),
        ("compare", {"run": "run", "settings": {"greedy": True, "seed": 3}}, "tunesmith compare run --seed 3"),
        (
            "evaluate",
            {"run": "run", "variants": ["final"], "answers": 3, "general": False, "tasks": 8},
            "tunesmith evaluate run --variants final --no-general --answers 3",
        ),
        ("merge", {"run": "run", "out": "new"}, "tunesmith merge run --out new"),
        (
            "merge",
            {"run": "run", "out": "new", "dtype": "auto", "rounding": "nearest", "shard_size": "5GB", "dry_run": True},
            "tunesmith merge run --out new --rounding nearest --shard-size 5GB --dry-run",
        ),
        ("quantize", {"run": "run", "out": "new"}, "tunesmith quantize run --out new"),
        (
            "quantize",
            {"directory": "run-merged", "out": "new", "scheme": "int8", "rounding": "auto", "dry_run": True},
            "tunesmith quantize run-merged --out new --scheme int8 --dry-run",
        ),
        (
            "drift",
            {"run": "run", "schemes": ["int8", "int4:32"], "rounding": "nearest", "max_rows": 4, "data": "rows.jsonl"},
            "tunesmith quantize run --compare int8,int4:32 --data rows.jsonl --max-rows 4 --rounding nearest",
        ),
        (
            "drift",
            {"run": "run", "base": "base", "directories": ["run-merged"]},
            "tunesmith drift run run-merged --base base",
        ),
        (
            "gguf",
            {"directory": "run-merged", "out": "m.gguf", "type": "q8_0", "ollama": True, "verify": False},
            "tunesmith gguf run-merged --out m.gguf --type q8_0 --ollama --no-verify",
        ),
        (
            "gguf",
            {"run": "run", "adapter_only": True, "base": "base", "out": "lora.gguf"},
            "tunesmith gguf run --out lora.gguf --adapter-only --base base",
        ),
        (
            "verify_gguf",
            {"directory": "run-merged", "file": "rows.jsonl", "levels": ["weights"]},
            "tunesmith gguf run-merged --check rows.jsonl --level weights",
        ),
        (
            "push",
            {
                "directory": "run-merged",
                "repo_id": "me/x",
                "private": True,
                "licence": "mit",
                "run": "run",
                "dry_run": True,
            },
            "tunesmith push run-merged me/x --private --license mit --run run --dry-run",
        ),
        (
            "push",
            {
                "directory": "run",
                "repo_id": "me/x",
                "to": "modelscope",
                "card_text": "x",
                "data": "a b",
                "dry_run": True,
            },
            "tunesmith push run me/x --to modelscope --data 'a b' --card card.md --dry-run",
        ),
        ("verify", {"run": "run", "directory": "run-merged"}, "tunesmith verify run run-merged"),
        (
            "verify",
            {"run": "run", "directory": "run-merged", "levels": ["structure", "weights"], "checkpoint": "10"},
            "tunesmith verify run run-merged --checkpoint 10 --level structure --level weights",
        ),
        ("report", {"run": "run", "merged": "run-merged"}, "tunesmith report run run-merged"),
        ("report", {"run": "run", "out": "my page.html"}, "tunesmith report run --out 'my page.html'"),
        ("cleanup", {"run": "run"}, "tunesmith inspect run --cleanup"),
        ("cleanup", {"run": "run", "apply": True}, "tunesmith inspect run --cleanup --apply --yes"),
        (
            "train",
            {"recipe_text": RECIPE, "overrides": ["learning_rate=1e-4"], "resume": True},
            "tunesmith train recipe.yaml learning_rate=1e-4 --resume",
        ),
        (
            "plan_training",
            {"recipe_text": RECIPE, "recipe_path": "mine.yaml"},
            "tunesmith train mine.yaml --dry-run",
        ),
    ],
)
def test_a_job_shows_the_equal_command(page: Page, kind: str, params: dict[str, Any], line: str) -> None:
    """Only what differs from the defaults, as it would be typed in the root; and the command line takes it."""
    work = prepare(page, kind, **params)
    assert work.command == line
    words = shlex.split(line)
    verb = get_command(command_line).commands[words[1]]  # type: ignore[attr-defined]
    verb.make_parser(verb.make_context("x", [], resilient_parsing=True)).parse_args(words[2:])


def test_a_command_quotes_what_a_shell_would_take_apart() -> None:
    """Spaces, quotes and dollars stay what they are."""
    line = command("compare", "my run; rm -rf $HOME", prompts="it's.txt", sample=True, fresh=False, data=None)
    assert shlex.split(line) == [
        "tunesmith", "compare", "my run; rm -rf $HOME", "--prompts", "it's.txt", "--sample",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", VERBS)
def test_parameters_have_the_librarys_names_and_no_defaults_of_their_own(kind: str) -> None:
    """What is not given is left to the library; what is named is one of its parameters, or explained."""
    functions = {
        "merge": [ts.plan_merge], "cleanup": [ts.apply_cleanup], "quantize": [ts.plan_quantization],
        "drift": [ts.drift, ts.compare_schemes], "gguf": [ts.write_gguf], "push": [ts.plan_push],
    }  # fmt: skip
    does = functions.get(kind) or [getattr(ts, kind)]
    names = {name for function in does for name in inspect.signature(function).parameters}
    ours = {
        "recipe_text", "recipe_path", "overwrite_recipe", "run", "directory", "prompts_text", "prompts_file",
        "comparison_job", "verdict_job", "evaluation_job", "choice_job", "dry_run", "apply", "rounding", "verify",
        "card_text", "plan_job", "drift_job",
    }  # fmt: skip
    for name, field in VERBS[kind].params.model_fields.items():
        assert name in names | ours, name
        assert field.is_required() or field.default in (None, False, ()), name


def test_defaults_are_read_from_the_signature() -> None:
    """Those that there are, and no more."""

    def function(one: int, two: str = "b", *, three: float = 3.0) -> None:
        """Three parameters."""

    assert defaults_of(function) == {"two": "b", "three": 3.0}


def lead_out(page: Page, folder: Path) -> None:
    """A link in the root to a folder elsewhere, in which there is something."""
    (folder / "x").mkdir()
    link = page.root / "link"
    if not link.is_symlink():
        link.symlink_to(folder)


OUTSIDE = ["../secret", "/etc/passwd", "~/x", "link/x"]


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize(
    ("kind", "params", "field"),
    [
        ("checkpoints", {}, "run"),
        ("checkpoints", {"run": "run"}, "base"),
        ("checkpoints", {"run": "run"}, "data"),
        ("compare", {"run": "run"}, "prompts_file"),
        ("compare", {"run": "run"}, "variants"),
        ("evaluate", {"run": "run"}, "variants"),
        ("evaluate", {"run": "run"}, "data"),
        ("merge", {"run": "run"}, "out"),
        ("quantize", {"run": "run"}, "out"),
        ("quantize", {"out": "x"}, "directory"),
        ("quantize", {"run": "run", "out": "x"}, "calibration"),
        ("drift", {"run": "run"}, "directories"),
        ("drift", {"run": "run", "schemes": ["int8"]}, "data"),
        ("gguf", {"directory": "run-merged"}, "out"),
        ("gguf", {"out": "x.gguf"}, "directory"),
        ("verify_gguf", {"directory": "run-merged"}, "file"),
        ("verify_gguf", {"file": "rows.jsonl"}, "directory"),
        ("push", {"repo_id": "me/x", "dry_run": True}, "directory"),
        ("push", {"directory": "run", "repo_id": "me/x", "dry_run": True}, "card"),
        ("push", {"directory": "run", "repo_id": "me/x", "dry_run": True}, "model"),
        ("verify", {"run": "run"}, "directory"),
        ("verify", {"run": "run", "directory": "run-merged"}, "prompts_file"),
        ("report", {"run": "run"}, "merged"),
        ("report", {"run": "run"}, "out"),
        ("cleanup", {}, "run"),
        ("train", {}, "run"),
        ("train", {"recipe_text": RECIPE}, "recipe_path"),
    ],
)
def test_no_parameter_leads_out_of_the_root(
    page: Page, kind: str, params: dict[str, Any], field: str, path: str, tmp_path: Path
) -> None:
    """Told when the job is asked for, before anything is read or written."""
    lead_out(page, tmp_path)
    value: Any = [path] if field in ("variants", "directories") else path
    answer = page.post("/api/v1/jobs", {"kind": kind, "params": {**params, field: value}})
    assert answer.status == 400, answer.body
    assert answer.error["error"] == "TunesmithError"
    assert "within" in answer.error["expected"]


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize(
    "key", ["model_name_or_path", "dataset", "eval_dataset", "dataset_dir", "output_dir", "resume_from_checkpoint"]
)
@pytest.mark.parametrize("kind", ["train", "plan_training", "preview"])
def test_no_key_of_a_recipe_leads_out_of_the_root(page: Page, kind: str, key: str, path: str, tmp_path: Path) -> None:
    """Neither in its text nor in an override, nor in a list."""
    lead_out(page, tmp_path)
    lines = [line for line in RECIPE.splitlines() if not line.startswith(f"{key}:")]
    value = f"[rows.jsonl, {path}]" if key.endswith("dataset") else path
    asked = [
        {"recipe_text": "\n".join([*lines, f"{key}: {value}"])},
        {"recipe_text": RECIPE, "overrides": [f"{key}={value}"]},
    ]
    for params in asked:
        answer = (
            page.post("/api/v1/data/preview", params)
            if kind == "preview"
            else page.post("/api/v1/jobs", {"kind": kind, "params": params})
        )
        assert answer.status == 400, (params, answer.body)
        assert answer.error["error"] == "TunesmithError"


def test_a_run_that_was_handed_over_does_not_train_elsewhere(own_root: Path, tmp_path: Path) -> None:
    """Its own recipe is a stranger's text as well: where it would write is held to the root."""
    for line, status in ((f"output_dir: {tmp_path / 'home'}", 400), ("output_dir: ../../home", 400)):
        (own_root / "run" / "training_args.yaml").write_text(
            RECIPE.replace("output_dir: out", line).replace(": base", ": ../base").replace(": rows", ": ../rows")
        )
        (own_root / "run" / "tunesmith_run.json").write_text("{}")
        with served(Settings(root=own_root)) as page:
            answer = page.post("/api/v1/jobs", {"kind": "train", "params": {"run": "run", "resume": True}})
            assert answer.status == status
            assert "outside" in answer.error["what"]
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("kind", "params", "what"),
    [
        ("merge", {"run": "run"}, "out"),
        ("merge", {"run": "run", "out": "x", "unknown": 1}, "unknown"),
        ("merge", {"run": 3, "out": "x"}, "run"),
        ("compare", {"run": "run", "max_prompts": -1}, "max_prompts"),
        ("compare", {"run": "run", "max_prompts": 10**30}, "max_prompts"),
        ("compare", {"run": "run", "variants": []}, "variants"),
        ("compare", {"run": "run", "variants": ["x"] * 17}, "variants"),
        ("compare", {"run": "run", "settings": {"temperature": -1}}, "temperature"),
        ("compare", {"run": "run", "settings": {"seed": "x"}}, "seed"),
        ("compare", {"run": "run", "settings": {"trust_remote_code": True}}, "trust_remote_code"),
        ("compare", {"run": "run", "prompts_text": " \n "}, "prompt"),
        ("compare", {"run": "run", "prompts_text": "a", "prompts_file": "prompts.txt"}, "leave one out"),
        ("quantize", {"out": "x"}, "run, directory"),
        ("quantize", {"run": "run", "directory": "run-merged", "out": "x"}, "run, directory"),
        ("drift", {"run": "run"}, "schemes"),
        ("drift", {"run": "run", "schemes": ["int8"], "directories": ["run-merged"]}, "schemes"),
        ("drift", {"run": "run", "directories": ["run-merged"], "rounding": "nearest"}, "rounding"),
        ("drift", {"run": "run", "schemes": ["int8"], "max_rows": 1}, "max_rows"),
        ("gguf", {"run": "run", "out": "x.gguf"}, "adapter_only"),
        ("gguf", {"directory": "run-merged", "adapter_only": True, "out": "x.gguf"}, "adapter_only"),
        ("push", {"directory": "run", "repo_id": "me/x"}, "dry run"),
        ("push", {"directory": "run", "repo_id": "me/x", "endpoint": "http://10.0.0.1", "dry_run": True}, "endpoint"),
        ("push", {"directory": "run", "repo_id": "me/x", "token": "hf_x", "dry_run": True}, "token"),
        ("push", {"directory": "run", "repo_id": "me/x", "card": "rows.jsonl", "card_text": "x"}, "leave one out"),
        ("verify", {"run": "run", "directory": "run-merged", "levels": ["soul"]}, "levels"),
        ("train", {}, "recipe"),
        ("train", {"recipe_text": RECIPE, "run": "run"}, "recipe"),
        ("report", {"run": "run", "comparison_job": "none"}, "job"),
        ("nothing", {}, "kind"),
    ],
)
def test_parameters_that_do_not_fit_are_told_by_name(page: Page, kind: str, params: dict[str, Any], what: str) -> None:
    """With a 4xx in our shape."""
    answer = page.post("/api/v1/jobs", {"kind": kind, "params": params})
    assert answer.status in (404, 422)
    assert what in json.dumps(answer.error)


def test_typed_prompts_are_read_as_a_file_of_them_is(tmp_path: Path) -> None:
    """A prompt a line, blank ones left out."""
    text = "One?\n\n  Two?  \n三？\n"
    (tmp_path / "typed.txt").write_text(text, encoding="utf-8")
    assert typed_prompts(text) == ts.read_conversations(tmp_path / "typed.txt")


# What is really done, on the tiny run.


def test_compare_answers_and_can_be_had_in_every_form(page: Page) -> None:
    """The record with its marks; as CSV, JSON lines, Markdown, HTML and JSON."""
    job = page.done(
        "compare", run="run", base="base", prompts_text="One?\nTwo?", settings={"greedy": True, "max_new_tokens": 4}
    )
    result = job["result"]
    assert [variant["name"] for variant in result["variants"]] == ["base", "final"]
    assert {(mark["prompt_id"], mark["variant"]) for mark in result["marks"]} == {
        (f"row-{row}", name) for row in range(2) for name in ("base", "final")
    }
    assert job["command"].startswith("tunesmith compare run --prompts prompts.txt --base base")
    there = {form: page.get(f"/api/v1/jobs/{job['id']}/download?format={form}") for form in ("csv", "jsonl", "md")}
    assert all(answer.status == 200 for answer in there.values())
    assert there["csv"].body.startswith(b"\xef\xbb\xbf")
    lines = [json.loads(line) for line in there["jsonl"].body.splitlines()]
    assert [line["question"] for line in lines] == ["One?", "One?", "Two?", "Two?"]
    record = page.get(f"/api/v1/jobs/{job['id']}/download?format=json")
    assert ts.Comparison.model_validate_json(record.body).prompts[0].question == "One?"
    assert "attachment" in record.headers["content-disposition"]
    html = page.get(f"/api/v1/jobs/{job['id']}/download?format=html")
    assert html.status == 200
    assert html.headers["content-type"].startswith("text/html")
    assert "sandbox allow-scripts" in html.headers["content-security-policy"]
    assert "frame-ancestors 'self'" in html.headers["content-security-policy"]
    assert html.headers["x-frame-options"] == "SAMEORIGIN"


def test_a_merge_is_planned_done_verified_and_reported(own_root: Path) -> None:
    """The story of the page: a plan writes nothing; the merge is proved; the report is one file."""
    with served(Settings(root=own_root, dtype="fp32")) as page:
        asked = {"run": "run", "base": "base", "out": "new"}
        plan = page.done("merge", **asked, dry_run=True)["result"]
        assert plan["preflight"] == {
            "fits": True,
            "write_bytes": plan["write_bytes"],
            "free_bytes": plan["free_bytes"],
            "target_not_empty": False,
            "quantized_base": False,
        }
        assert plan["changed"] == len(
            [*ts.plan_merge(own_root / "run", own_root / "new", base=str(own_root / "base")).binding.updates]
        )
        assert not (own_root / "new").exists()
        merged = page.done("merge", **asked)
        assert Path(merged["result"]["path"]) == own_root / "new"
        assert merged["progress"]["stage"] == "merge"
        occupied = page.done("merge", **asked, dry_run=True)["result"]["preflight"]["target_not_empty"]
        assert occupied
        refused = page.job(page.start("merge", **asked))
        assert refused["error"]["error"] == "OutputError"
        proof = page.done("verify", run="run", base="base", directory="new", levels=["structure", "weights"])
        assert proof["result"]["sentence"].keys() == {"en", "zh"}
        assert proof["result"]["charts"]["heatmap"]["zh"]["layer"]
        compared = page.done("compare", run="run", base="base", prompts_text="One?", settings={"max_new_tokens": 2})
        made = page.done(
            "report",
            run="run",
            base="base",
            merged="new",
            comparison_job=compared["id"],
            verdict_job=proof["id"],
            out="page.html",
        )
        assert made["result"]["path"] == "page.html"
        html = page.get(f"/api/v1/jobs/{made['id']}/download?format=html")
        assert html.body == (own_root / "page.html").read_bytes()
        wrong = page.post("/api/v1/jobs", {"kind": "report", "params": {"run": "run", "verdict_job": compared["id"]}})
        assert wrong.status == 422
        assert wrong.error["expected"] == "Verdict"
        listed = page.get("/api/v1/run?path=run&base=base").json["merged"]
        assert {one["path"] for one in listed} == {"new", "run-merged"}


def test_a_cleanup_is_listed_before_it_is_done(own_root: Path) -> None:
    """Nothing goes but on the second asking."""
    state = own_root / "run" / "checkpoint-10" / "optimizer.pt"
    state.write_bytes(b"x" * 100)
    (own_root / "run" / "trainer_state.json").write_text(json.dumps({"global_step": 20, "max_steps": 20}))
    with served(Settings(root=own_root)) as page:
        listed = page.done("cleanup", run="run")["result"]
        assert [file["path"] for file in listed["files"]] == ["checkpoint-10/optimizer.pt"]
        assert state.exists()


def test_a_training_is_planned_without_a_file_left_behind(page: Page) -> None:
    """The recipe is the page's text, its paths are the root's, and nothing is written."""
    before = sorted(page.root.iterdir())
    plan = page.done("plan_training", recipe_text=RECIPE)["result"]
    assert (plan["train_rows"], plan["steps"]) == (5, 2)
    assert plan["output_dir"] == str(page.root / "out")
    assert sorted(page.root.iterdir()) == before


def test_a_training_keeps_its_recipe_where_it_is_told_to(own_root: Path) -> None:
    """Another text that lies there is not lost, unless that is asked for."""
    with served(Settings(root=own_root)) as page:
        (own_root / "mine.yaml").write_text("another: text\n")
        asked = {"recipe_text": RECIPE, "recipe_path": "mine.yaml"}
        answer = page.post("/api/v1/jobs", {"kind": "train", "params": asked})
        assert answer.status == 400
        assert (own_root / "mine.yaml").read_text() == "another: text\n"
        (own_root / "folder.yaml").mkdir()
        for name in ("mine.txt", "none/mine.yaml", "run/training_args.yaml", "folder.yaml"):
            wrong = page.post("/api/v1/jobs", {"kind": "train", "params": {**asked, "recipe_path": name}})
            assert wrong.status == 400
