"""Tests of the exports over the page: each kind done for real on the tiny run, and nothing sent but what was shown."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import tunesmith as ts
from tests.export.push.fake_hub import TOKEN, FakeHub
from tests.web.conftest import Page, served
from tunesmith.checkpoint import VIEW_KINDS
from tunesmith.export.gguf.types import ADAPTER, CONVERTER, PACKAGE, PROGRAM
from tunesmith.export.quantize.schemes import SCHEMES
from tunesmith.web import Settings

RUN = "/api/v1/run?path=run&base=base"
PAGES = Path(__file__).parents[2] / "src" / "tunesmith" / "web" / "static" / "pages"
OF_RUN = {"run": "run", "base": "base"}


@pytest.fixture
def own(own_root: Path) -> Iterator[Page]:
    """A page whose root a test may change."""
    with served(Settings(root=own_root, dtype="fp32")) as page:
        yield page


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub that the server's environment names, and its login."""
    one = FakeHub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_XET_CACHE", str(tmp_path / "xet"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", one.url)
    yield one
    one.close()


def test_a_quantization_is_planned_done_proved_and_listed(own: Page) -> None:
    """A plan writes nothing; what is there is not replaced unasked; the list says how it is stored."""
    asked: dict[str, Any] = {**OF_RUN, "out": "run-small", "scheme": "int4:32"}
    plan = own.done("quantize", **asked, dry_run=True)["result"]
    assert not (own.root / "run-small").exists()
    assert plan["scheme"] == "int4:32"
    assert plan["preflight"]["fits"]
    assert 0 < plan["changed"] < plan["tensors"]
    assert "binding" not in plan
    done = own.done("quantize", **asked)["result"]
    assert Path(done["path"]) == own.root / "run-small"
    assert done["plan"]["changed"] == plan["changed"] == sum(done["rounded"].values())
    assert own.done("quantize", **asked, dry_run=True)["result"]["preflight"]["target_not_empty"]
    assert own.job(own.start("quantize", **asked))["error"]["error"] == "OutputError"
    proof = own.done("verify", **OF_RUN, directory="run-small", levels=["structure", "assets", "weights"])["result"]
    assert proof["answer"] == "equal_within_quantization"
    listed = {one["path"]: one for one in own.get(RUN).json["merged"]}
    assert (listed["run-small"]["kind"], listed["run-small"]["scheme"]) == ("quantized", "int4:32")
    assert listed["run-small"]["certificate"] == "equal_within_quantization"
    assert (listed["run-merged"]["kind"], listed["run-merged"]["scheme"]) == ("model", None)
    (own.root / "run-small" / "tunesmith-certificate.json").unlink()
    listed = {one["path"]: one for one in own.get(RUN).json["merged"]}
    assert listed["run-small"]["scheme"] == "int4:32"  # by its configuration alone


def test_drift_of_schemes_leaves_no_model_and_can_be_had_as_a_page(own: Page) -> None:
    """A row a scheme besides the base's, a picture in both languages, and the files that the command line writes."""
    before = sorted(own.root.iterdir())
    job = own.done("drift", **OF_RUN, schemes=["int8", "int4:32"], data="rows.jsonl", max_rows=3)
    assert [row["model"]["name"] for row in job["result"]["rows"]] == ["base", "int8", "int4:32"]
    assert set(job["result"]["charts"]) == set(ts.LANGUAGES)
    assert job["result"]["in_domain_rows"] == 3
    assert sorted(own.root.iterdir()) == before
    download = f"/api/v1/jobs/{job['id']}/download?format="
    assert b"| int8 " in own.get(download + "md").body
    assert own.get(download + "html").body.startswith(b"<!DOCTYPE html>")
    assert ts.Drift.model_validate_json(own.get(download + "json").body).rows[1].name == "int8"


def test_drift_of_a_model_that_is_there(own: Page) -> None:
    """A merged model is next to nothing away from its adapter."""
    result = own.done("drift", **OF_RUN, directories=["run-merged"], data="rows.jsonl", max_rows=2)["result"]
    row = result["rows"][1]
    assert row["model"]["name"] == "run-merged"
    assert row["general"]["kl"]["value"] < 1e-6 < result["rows"][0]["general"]["kl"]["value"]


def test_an_adapter_becomes_a_gguf_file_that_is_proved_and_listed(own: Page) -> None:
    """Written, proved at once and again; a file that is there is not replaced unasked; the list has it."""
    asked: dict[str, Any] = {**OF_RUN, "adapter_only": True, "out": "run-lora.gguf"}
    outcome = own.done("gguf", **asked)["result"]
    assert outcome["export"]["adapter"]
    assert outcome["verdict"]["answer"] in ("identical", "equal_within_rounding")
    assert own.job(own.start("gguf", **asked))["error"]["what"] == "The file is there already."
    again = own.done("verify_gguf", directory="run", base="base", file="run-lora.gguf")["result"]
    assert again["answer"] == outcome["verdict"]["answer"]
    size = (own.root / "run-lora.gguf").stat().st_size
    assert own.get(RUN).json["gguf"] == [{"path": "run-lora.gguf", "size_bytes": size}]


def test_nothing_is_sent_but_what_was_shown(own: Page, hub: FakeHub) -> None:
    """A dry run shows files and card and asks nobody; only its own plan is sent, and the token is in no answer."""
    own.done("verify", **OF_RUN, directory="run-merged", levels=["structure", "assets", "weights"])
    asked = {"directory": "run-merged", "repo_id": "me/tuned", "private": True, "card_text": "# By hand\n"}
    look = own.done("push", **asked, dry_run=True)
    plan = look["result"]
    assert plan["card"] == "# By hand\n"
    assert {"model.safetensors", "README.md", "tunesmith-certificate.json"} <= {file["name"] for file in plan["files"]}
    assert not any(file["text"] for file in plan["files"])
    assert plan["endpoint"] == hub.url
    assert not hub.seen
    push = {"kind": "push", "params": {**asked, "plan_job": look["id"]}}
    for wrong in ({"repo_id": "me/other"}, {"private": False}, {"directory": "run"}, {"plan_job": None}):
        answer = own.post("/api/v1/jobs", {"kind": "push", "params": {**push["params"], **wrong}})  # type: ignore[dict-item]
        assert answer.status == 422, wrong
        assert answer.error["where"] == "plan_job"
    assert not hub.seen
    pushed = own.done("push", **asked, plan_job=look["id"])
    assert pushed["result"]["files"] == len(plan["files"])
    assert hub.repos["me/tuned"].private
    assert hub.content(hub.files("me/tuned")["README.md"]) == b"# By hand\n"
    every = [f"/api/v1/jobs/{job}{rest}" for job in (look["id"], pushed["id"]) for rest in ("", "/events?after=0")]
    assert not any(TOKEN.encode() in own.get(address).body for address in (*every, "/api/v1/jobs", "/api/v1/session"))


def test_a_drift_of_this_session_goes_on_the_card(own: Page, hub: FakeHub) -> None:
    """Measured for real; the command is whole, and what the card shows is the directory's own row."""
    asked: dict[str, Any] = {"directory": "run-merged", "repo_id": "me/tuned", "unverified": True, "run": "run"}
    job = own.done("drift", **OF_RUN, directories=["run-merged"], data="rows.jsonl", max_rows=2)
    look = own.done("push", **asked, drift_job=job["id"], language="zh", dry_run=True)
    section = look["result"]["card"].split(f"## {ts.text('card.drift', 'zh')}")[1].split("\n## ")[0]
    assert re.findall(r"^\| (base|run-merged) ", section, re.MULTILINE) == ["base", "run-merged"]
    words = shlex.split(look["command"])
    assert words[:4] == ["tunesmith", "push", "run-merged", "me/tuned"]
    assert words[words.index("--drift") + 1] == f"drift-{job['id']}.json"
    pushed = own.done("push", **asked, drift_job=job["id"], language="zh", plan_job=look["id"])
    assert f"--drift drift-{job['id']}.json" in pushed["command"]
    assert hub.content(hub.files("me/tuned")["README.md"]).decode() == look["result"]["card"]
    of_schemes = own.done("drift", **OF_RUN, schemes=["int8"], data="rows.jsonl", max_rows=2)
    error = own.job(own.start("push", **asked, drift_job=of_schemes["id"], dry_run=True))["error"]
    assert error["what"] == "The drift holds no row of the directory that is pushed."
    wrong = own.post("/api/v1/jobs", {"kind": "push", "params": {**asked, "drift_job": look["id"], "dry_run": True}})
    assert wrong.status == 422
    assert wrong.error["expected"] == "Drift"


def test_a_base_is_quantized_as_the_training_saw_it(own: Page) -> None:
    """The command says from which view; a whole model has none."""
    asked: dict[str, Any] = {**OF_RUN, "out": "run-small", "scheme": "int8", "base_view": "nf4"}
    plan = own.done("quantize", **asked, dry_run=True)
    assert plan["result"]["base_view"] == "nf4"
    assert "--base-view nf4" in plan["command"]
    assert own.done("quantize", **asked)["result"]["plan"]["base_view"] == "nf4"
    alone = {"directory": "run-merged", "out": "b", "scheme": "int8", "base_view": "nf4", "dry_run": True}
    assert own.job(own.start("quantize", **alone))["error"]["what"] == "A whole model has no base."


def test_what_nobody_verified_is_not_even_planned(own: Page, hub: FakeHub) -> None:
    """Unless that is asked for, which the plan then says."""
    asked = {"directory": "run-merged", "repo_id": "me/tuned"}
    assert own.job(own.start("push", **asked, dry_run=True))["error"]["error"] == "CheckpointError"
    plan = own.done("push", **asked, unverified=True, dry_run=True)["result"]
    assert "push_unverified" in {finding["code"] for finding in plan["findings"]}
    assert not hub.seen


def test_the_forms_offer_what_there_is() -> None:
    """The schemes are the library's; so are the GGUF types, of which the rarer ones are left out."""

    def listed(file: str, name: str) -> list[str]:
        text = (PAGES / file).read_text(encoding="utf-8")
        return re.findall(r'"([\w:-]+)"', text.split(f"const {name} =")[1].split(";")[0])

    assert listed("quantize.js", "SCHEMES") == list(SCHEMES)
    assert listed("quantize.js", "VIEWS") == list(VIEW_KINDS)
    assert set(listed("quantize.js", "ROUNDINGS")) == {"auto", "faithful", "nearest", "calibrated"}
    assert set(listed("gguf.js", "TYPES")) <= {*CONVERTER, *PACKAGE, *PROGRAM}
    assert set(listed("gguf.js", "OF_ADAPTERS")) == set(ADAPTER)
