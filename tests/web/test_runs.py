"""Tests of what the page reads: session, folders, runs, one run, texts, recipes, rows."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml

import tunesmith as ts
from tests.web.conftest import Page, served
from tests.web.test_verbs import RECIPE
from tunesmith.web import Settings
from tunesmith.web.runs import Known, library_defaults

RUN = "/api/v1/run?path=run&base=base"


def test_the_session_says_what_the_page_is_about(page: Page) -> None:
    """Root, run, languages, and the library's own defaults, once they have been read."""
    library_defaults()
    session = page.get("/api/v1/session").json
    assert session["version"] == ts.__version__
    assert session["root"] == str(page.root)
    assert session["run"] == "run"
    assert session["languages"] == ["en", "zh"]
    assert session["memory_free_bytes"] > 0
    assert session["disk_free_bytes"] > 0
    assert session["holder"] is None
    assert session["demo"] == {"ready": False, "run": None}
    assert session["defaults"]["generation"]["max_new_tokens"] == ts.GenerationSettings().max_new_tokens
    assert session["defaults"]["merge"]["rounding"] == "auto"
    assert session["defaults"]["verify"]["dtype"] == "fp32"


def test_the_session_knows_a_demo_that_was_made(tmp_path: Path) -> None:
    """Only one that is whole."""
    library_defaults()
    (tmp_path / "tunesmith-demo" / "run").mkdir(parents=True)
    with served(Settings(root=tmp_path)) as page:
        assert page.get("/api/v1/session").json["demo"] == {"ready": False, "run": None}
        (tmp_path / "tunesmith-demo" / "report.html").write_text("")
        assert page.get("/api/v1/session").json["demo"] == {"ready": True, "run": "tunesmith-demo/run"}


def test_folders_are_browsed_from_the_root_down(page: Page) -> None:
    """With the way back up, which ends at the root."""
    top = page.get("/api/v1/folders").json
    assert (top["path"], top["parent"]) == (".", None)
    assert {one["name"]: one["is_run"] for one in top["folders"] if one["name"] != "link"} == {
        "base": False, "run": True, "run-merged": False,
    }  # fmt: skip
    below = page.get("/api/v1/folders?path=run").json
    assert (below["path"], below["parent"]) == ("run", ".")
    assert [one["path"] for one in below["folders"]] == ["run/checkpoint-10"]


@pytest.mark.parametrize("path", ["..", "%2e%2e", "..%2f..", "/etc", "%2Fetc", "a%00b", "x" * 4097, "run%5C..%5C.."])
def test_no_listing_leads_out(page: Page, path: str) -> None:
    """However it is encoded."""
    assert page.get(f"/api/v1/folders?path={path}").status in (400, 422)


def test_runs_are_listed_with_what_tells_them_apart(page: Page) -> None:
    """Base, tool, checkpoints and age; a model and a base are no runs."""
    (listed,) = page.get("/api/v1/runs").json["runs"]
    assert listed["path"] == "run"
    assert listed["tool"] == "trainer"
    assert listed["checkpoints"] == 2
    assert abs(time.time() - listed["modified_s"]) < 3600


def test_a_run_that_changed_is_read_again(own_root: Path) -> None:
    """What was found out holds only as long as the files do."""
    with served(Settings(root=own_root)) as page:
        assert page.get("/api/v1/runs").json["runs"][0]["last_loss"] is None
        rows = [{"step": step, "loss": 2.0 - step / 10} for step in (10, 20)]
        (own_root / "run" / "trainer_state.json").write_text(json.dumps({"global_step": 20, "log_history": rows}))
        assert page.get("/api/v1/runs").json["runs"][0]["last_loss"] == 0.0
        charts = page.get(RUN).json["charts"]
        assert charts["loss"]["layer"]
        shutil.rmtree(own_root / "run")
        assert page.get("/api/v1/runs").json["runs"] == []
        assert page.get(RUN).status == 404


def test_a_run_is_inspected_by_the_librarys_own_record(page: Page) -> None:
    """The record, its health, its pictures, what may go, and the command."""
    told = page.get(RUN).json
    record = {key: value for key, value in told["inspection"].items() if key != "health"}
    assert ts.Inspection.model_validate(record).run.name == "run"
    assert {one["code"] for one in told["inspection"]["health"]} >= {"tokenizer_missing"}
    assert told["charts"]["loss"] is None
    assert told["charts"]["heatmap"]["layer"]
    assert told["cleanup"]["files"] == []
    assert told["command"] == "tunesmith inspect run --base base"
    about = {"kind": "model", "scheme": None, "certificate": None, "checkpoints": []}
    assert told["merged"] == [{"path": "run-merged", **about}]
    assert told["gguf"] == []


def test_pictures_speak_the_language_that_is_asked_for(page: Page) -> None:
    """Chinese labels for Chinese readers; another language than there is does not fit."""
    assert "层" in page.get(f"{RUN}&lang=zh").body.decode()
    assert page.get(f"{RUN}&lang=xx").status == 422


def test_losses_of_a_run_that_keeps_a_log_alone_are_the_logs(own_root: Path) -> None:
    """LLaMA-Factory's log is there before the Trainer's own state is."""
    rows = [
        {"current_steps": 5, "loss": 2.5},
        {"current_steps": 10, "loss": 2.0, "eval_loss": 2.2},
        {"current_steps": 15},
    ]
    log = "".join(json.dumps(row) + "\n" for row in rows)
    (own_root / "run" / "trainer_log.jsonl").write_text(log, encoding="utf-8")
    with served(Settings(root=own_root)) as page:
        (listed,) = page.get("/api/v1/runs").json["runs"]
    assert (listed["last_loss"], listed["eval_loss"], listed["steps"]) == (2.0, 2.2, 10)


def test_one_of_a_runs_checkpoints_is_inspected(page: Page) -> None:
    """By its name; one that is not there is told with those that are."""
    assert page.get(f"{RUN}&checkpoint=checkpoint-10").json["inspection"]["checkpoint"] == "checkpoint-10"
    wrong = page.get(f"{RUN}&checkpoint=checkpoint-11")
    assert wrong.status == 400
    assert wrong.error["error"] == "RunError"


def test_a_folder_that_is_no_run_is_told_as_such(page: Page) -> None:
    """An error of the library's, in its own words."""
    wrong = page.get("/api/v1/run?path=base")
    assert wrong.status == 400
    assert wrong.error["error"] == "RunError"
    assert "whole model" in wrong.error["what"]


def test_a_certificate_names_its_run_and_verdict(own_root: Path) -> None:
    """A model that was merged from another run is left out, whatever it is called; a broken certificate is none."""
    certificate = own_root / "run-merged" / "tunesmith-certificate.json"

    def write(text: str) -> None:
        beside = certificate.with_suffix(".partial")  # as verification writes it
        beside.write_text(text)
        beside.replace(certificate)

    def written(run: str) -> Any:
        adapters = [{"run": run, "checkpoint": "final"}]
        write(json.dumps({"predicate": {"adapters": adapters, "verdict": {"answer": "identical"}}}))
        return page.get(RUN).json["merged"]

    with served(Settings(root=own_root)) as page:
        about = {"certificate": "identical", "checkpoints": ["final"], "kind": "model", "scheme": None}
        assert written("run") == [{"path": "run-merged", **about}]
        assert written("another") == []
        for broken in ("", "[]", '{"predicate": 3}', "[" * 100_000):
            write(broken)
            assert page.get(RUN).json["merged"][0]["certificate"] is None


def test_hostile_names_and_logs_come_back_as_text(own_root: Path) -> None:
    """HTML in names, a name that is no UTF-8, and numbers that JSON lacks: the answer is strict JSON all the same."""
    run = own_root / "run"
    (run / "<img src=x onerror=alert(1)>.txt").write_text("")
    (run / os.fsdecode(b"odd-\xff\xfe.txt")).write_text("")
    rows = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": float("inf")}, {"step": 3, "loss": 1e308}]
    (run / "trainer_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with served(Settings(root=own_root)) as page:
        told = page.get(RUN)
        assert told.status == 200
        assert told.headers["content-type"] == "application/json"
        names = [file["path"] for file in told.json["inspection"]["run"]["files"]]
        assert "<img src=x onerror=alert(1)>.txt" in names
        assert any(name.startswith("odd-") for name in names)


def test_a_training_that_has_saved_nothing_shows_its_log(tmp_path: Path) -> None:
    """Though it cannot be opened as a run yet."""
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "trainer_log.jsonl").write_text('{"current_steps": 5, "loss": 1.5, "total_steps": 9}\n{"curr')
    with served(Settings(root=tmp_path)) as page:
        assert page.get("/api/v1/run?path=new").status == 400
        log = page.get("/api/v1/run/log?path=new").json["log"]
        assert [(row["step"], row["loss"]) for row in log] == [(5, 1.5)]


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_texts_are_those_of_the_report_and_come_once(page: Page, lang: str) -> None:
    """A browser that has them is told so; another language is not there."""
    texts = page.get(f"/api/v1/texts/{lang}")
    assert texts.json == dict(ts.templates(lang))
    again = page.get(f"/api/v1/texts/{lang}", **{"If-None-Match": texts.headers["etag"]})
    assert (again.status, again.body) == (304, b"")
    assert page.get("/api/v1/texts/..%2f").status == 404
    assert page.get("/api/v1/texts/xx").status == 404


def test_a_recipe_is_read_with_what_becomes_of_each_key(page: Page) -> None:
    """Values for the form, uses for the reader, and problems that do not hide the rest."""
    told = page.post("/api/v1/recipe/read", {"text": RECIPE + "bf16: true\nlora_rnak: 3\n"}).json
    assert told["values"]["max_steps"] == 2
    assert told["values"]["template"] is None
    assert {use["key"]: use["use"] for use in told["keys"]}["lora_rnak"] == "refused"
    (problem,) = told["problems"]
    assert "lora_rank" in problem
    assert page.post("/api/v1/recipe/read", {"text": RECIPE}).json["problems"] == []
    assert page.post("/api/v1/recipe/read", {"text": "lora_rank: 4"}).json["values"] == {"lora_rank": 4}


def test_a_recipe_is_written_as_yaml_that_reads_the_same(page: Page) -> None:
    """In the form's order, Chinese as it is; comments are said to be lost."""
    values = {"output_dir": "out", "default_system": "你是工匠：yes", "lora_target": "all", "rank_pattern": {"a.b": 4}}
    told = page.post("/api/v1/recipe/write", {"values": values}).json
    assert told["comments_lost"]
    assert list(yaml.safe_load(told["text"])) == list(values)
    assert "你是工匠" in told["text"]
    assert page.post("/api/v1/recipe/read", {"text": told["text"]}).json["values"] == values


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{after}: &{after} [{','.join(f'*{before}' for _ in range(9))}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        "- a list", "3", "'text'", "", "a: [", "\t", "a: &a [*a]", "? [1, 2]\n: 3" + "\0", BOMB,
        "a: " + "9" * 5000, "a: " + "9" * 40, "a: 2001-99-99", "a: !!int ''", "a: !!timestamp x", "a: !!bool x",
        "a: !!python/object/apply:os.system ['true']", "a: " + "[" * 3000, "a: !!binary x", "<<: 3",
    ],
    ids=range(19),
)  # fmt: skip
def test_a_recipe_that_is_none_is_an_error_in_our_shape(page: Page, text: str) -> None:
    """References that grow without end, dates and numbers that there are not, tags that would run code."""
    answer = page.post("/api/v1/recipe/read", {"text": text})
    assert answer.status == 400, answer.body
    assert answer.error["error"] == "RecipeError"


def test_the_forms_keys_have_types_defaults_and_bounds(page: Page) -> None:
    """As the recipe has them; nothing is repeated by hand."""
    keys = {one["key"]: one for one in page.get("/api/v1/recipe/keys").json["keys"]}
    assert keys["model_name_or_path"]["required"]
    assert (keys["lora_rank"]["type"], keys["lora_rank"]["default"], keys["lora_rank"]["minimum"]) == ("int", 8, 1)
    assert keys["learning_rate"]["type"] == "float"
    assert keys["packing"]["type"] == "bool"
    assert keys["dataset"]["type"] == "list"
    assert keys["rank_pattern"]["type"] == "mapping"
    assert "cosine" in keys["lr_scheduler_type"]["choices"]
    assert keys["lora_dropout"]["maximum"] == 1
    assert keys["quantization_bit"]["choices"] == [4, 8]
    assert keys["cutoff_len"]["minimum"] == 8


def test_a_row_is_shown_with_what_counts(page: Page) -> None:
    """The answer counts, the question does not; rows that there are not are told."""
    told = page.post("/api/v1/data/preview", {"recipe_text": RECIPE, "row": 1}).json
    assert told["rows"] == 5
    assert told["row"]["index"] == 1
    counted = "".join(piece["text"] for piece in told["row"]["pieces"] if piece["supervised"])
    other = "".join(piece["text"] for piece in told["row"]["pieces"] if not piece["supervised"])
    assert counted.startswith("two")
    assert "Say two." in other
    assert page.post("/api/v1/data/preview", {"recipe_text": RECIPE, "row": 5}).error["error"] == "DataError"
    assert page.post("/api/v1/data/preview", {"recipe_text": RECIPE, "row": -1}).status == 422
    assert page.post("/api/v1/data/preview", {}).status == 422
    assert not list(page.root.glob(".tunesmith-recipe-*"))


def test_what_is_known_is_found_out_once_by_many(tmp_path: Path) -> None:
    """Those who ask at once wait for the first; a change of the folder is noticed; few are kept."""
    known, made = Known(most=2), []

    def seen() -> object:
        return sorted(tmp_path.iterdir())

    def make() -> int:
        time.sleep(0.05)
        made.append(1)
        return len(made)

    threads = [threading.Thread(target=lambda: known.get("a", seen, make)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    (tmp_path / "new").write_text("x")
    assert known.get("a", seen, make) == 2
    assert known.get("a", seen, make) == 2
    for key in ("b", "c"):
        known.get(key, seen, make)
    assert known.get("a", seen, make) == 5
    assert not known._making


def test_paths_with_odd_letters_are_found(own_root: Path) -> None:
    """Chinese, spaces, percent signs and emoji are letters of names."""
    name = "我的 run 100%25 é🎻"
    (own_root / "run").rename(own_root / name)
    with served(Settings(root=own_root)) as page:
        assert page.get(f"/api/v1/run?path={quote(name)}&base=base").json["inspection"]["run"]["path"].endswith(name)
        assert page.get("/api/v1/runs").json["runs"][0]["path"] == name
