"""The model card: front matter that the hub takes, prose in two languages, and nothing that the records do not say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

import tunesmith as ts
from tests.report.conftest import evaluation_of
from tests.report.test_drift import drift_with
from tunesmith.errors import DataError
from tunesmith.export.push import CardFacts, Licence, a_tool_wrote, licence_of, settings_of, write_card

REPO = "me/tuned"


def said(card: str) -> dict[str, Any]:
    """The front matter, as the hub's own client reads it."""
    found: dict[str, Any] = ModelCard(card).data.to_dict()  # type: ignore[no-untyped-call]
    assert found == yaml.safe_load(card.split("---\n")[1])
    return found


def say(key: str, **params: object) -> str:
    """English."""
    return ts.text(key, "en", **params)


def facts(**more: Any) -> CardFacts:
    """What is known of some model."""
    return CardFacts(**{"kind": "model", "to": "huggingface", "repo_id": REPO, "fine_tuned": True, **more})


@pytest.mark.parametrize("kind", ["model", "quantized", "adapter", "gguf"])
@pytest.mark.parametrize("to", ["huggingface", "modelscope"])
@pytest.mark.parametrize("tuned", [True, False])
def test_every_kind_has_a_card_that_the_hub_takes(kind: str, to: str, tuned: bool) -> None:
    """With the base, its relation and its licence; and the commands of the right hub."""
    relation = {"adapter": "adapter", "quantized": "quantized"}.get(kind, "finetune")
    licence = Licence("apache-2.0", "LICENSE")
    known = {"base_model": "org/base", "relation": relation, "licence": licence, "weights": ["a.gguf"]}
    card = write_card(facts(kind=kind, to=to, fine_tuned=tuned, pipeline="text-generation", **known), say)
    found = said(card)
    assert (found["base_model"], found["base_model_relation"]) == ("org/base", relation)
    assert (found["license"], found["pipeline_tag"]) == ("apache-2.0", "text-generation")
    assert "tunesmith" in found["tags"]
    assert ("lora" in found["tags"]) == (tuned or kind == "adapter")
    assert not re.search(r"hf download|huggingface\.co|hf\.co" if to == "modelscope" else "modelscope", card)
    for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        compile(block, "card", "exec")


def test_nothing_is_said_that_is_not_known() -> None:
    """No base, licence, data, task: none of their keys, and no section but what always holds."""
    found = said(write_card(facts(), say))
    assert set(found) == {"library_name", "tags"}


def test_a_licence_that_the_hub_has_no_word_for_is_named() -> None:
    """``other``, with its name."""
    found = said(write_card(facts(licence=Licence("qwen-research", "LICENSE")), say))
    assert (found["license"], found["license_name"]) == ("other", "qwen-research")


def test_names_and_values_mean_nothing_in_markdown() -> None:
    """What comes from outside is shown and never obeyed."""
    known = {"base_name": "a](http://x)<b>|", "data": "# my | data", "settings": [("lora_target", "q|v <x>")]}
    card = write_card(facts(**known), say)
    assert "](http://x)" not in card.replace(r"\]", "")
    assert r"\# my \| data" in card
    assert r"q\|v \<x\>" in card


def test_datasets_are_named_only_by_the_user() -> None:
    """Hub ids become ``datasets``; words stay prose."""
    card = write_card(facts(data="org/set, my own mails"), say)
    assert said(card)["datasets"] == ["org/set"]
    assert "my own mails" in card


def test_settings_hold_no_path() -> None:
    """Those that a reader asks for alone."""
    found = settings_of(
        {"lora_alpha": 16, "output_dir": "/home/me/out", "lora_target": "/home/me/x", "use_dora": False}
    )
    assert found == [("lora_alpha", "16")]


@pytest.mark.parametrize(
    ("text", "word", "restrictive"),
    [
        ("Apache License\n   Version 2.0, January 2004", "apache-2.0", False),
        ("MIT License\n\nPermission is hereby granted, free of charge", "mit", False),
        ("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT", "llama3.1", True),
        ("Gemma Terms of Use", "gemma", True),
        ("Qwen RESEARCH LICENSE AGREEMENT", "qwen-research", True),
        ("Creative Commons Attribution-NonCommercial 4.0", "cc-by-nc-4.0", True),
        ("Our own terms", "other", True),
    ],
)
def test_a_licence_is_read_from_its_text(tmp_path: Path, text: str, word: str, restrictive: bool) -> None:
    """What restricts nobody is told from what does; unknown terms count as restrictive."""
    (tmp_path / "LICENSE").write_text(text)
    found = licence_of([tmp_path], None)
    assert found is not None
    assert (found.name, found.restrictive, found.source) == (word, restrictive, "LICENSE")


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("meta-llama/Llama-3.2-1B", "llama3.2"),
        ("meta-llama/Llama-2-7b", "llama2"),
        ("google/gemma-2-2b", "gemma"),
        ("Qwen/Qwen3-0.6B", None),
    ],
)
def test_gated_families_are_known_by_name(name: str, word: str | None) -> None:
    """Where no file is at hand; of others nothing is guessed."""
    found = licence_of([], name)
    assert (found and found.name) == word


def test_a_card_tells_the_licence_before_its_text_does(tmp_path: Path) -> None:
    """The base's card is what its makers say; the user's word goes before all."""
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: Qwen-Research\n---\n")
    (tmp_path / "LICENSE").write_text("MIT License")
    found = licence_of([tmp_path], None)
    assert found == Licence("qwen-research", "README.md")
    assert licence_of([tmp_path], None, given="mit") == Licence("mit", "given")
    (tmp_path / "README.md").write_text("---\nlicense: [a\n---\n")
    assert licence_of([tmp_path], None) == Licence("mit", "LICENSE")


def test_what_restricts_is_said_before_the_upload(tiny_adapter: Path) -> None:
    """A warning in the plan; and the Llama licences' wish for a name."""
    plan = ts.plan_push(tiny_adapter, REPO, base_model="meta-llama/Llama-3.1-8B")
    found = {finding.code: finding for finding in plan.findings}
    assert found["push_licence_restrictive"].params["licence"] == "llama3.1"
    assert "push_llama_name" in found
    assert said(plan.card)["license"] == "llama3.1"
    named = ts.plan_push(tiny_adapter, "me/Llama-tuned", base_model="meta-llama/Llama-3.1-8B")
    assert "push_llama_name" not in {finding.code for finding in named.findings}


STUBS = {
    "PEFT": "---\nlibrary_name: peft\n---\n# Model Card for Model ID\n- **Developed by:** [More Information Needed]\n",
    "the Trainer": "<!-- This model card has been generated automatically according to the information the Trainer "
    "had access to. You should probably proofread it. -->\n",
    "TRL": "# Model Card\nIt has been trained using [TRL](https://github.com/huggingface/trl).\n",
}


@pytest.mark.parametrize("tool", STUBS)
def test_what_a_tool_left_is_replaced_and_what_a_person_wrote_is_kept(tiny_adapter: Path, tool: str) -> None:
    """Both are said; neither file is touched."""
    readme = tiny_adapter / "README.md"
    readme.write_text(STUBS[tool])
    plan = ts.plan_push(tiny_adapter, REPO)
    assert plan.card_from == "records"
    assert "push_card_replaced" in {finding.code for finding in plan.findings}
    assert readme.read_text() == STUBS[tool]
    readme.write_text("# By hand\n")
    plan = ts.plan_push(tiny_adapter, REPO)
    assert (plan.card_from, plan.card) == ("directory", "# By hand\n")
    assert a_tool_wrote(write_card(facts(), say))


def test_a_given_card_goes_up_as_it_is_or_is_refused_with_the_reason(tiny_adapter: Path, tmp_path: Path) -> None:
    """Front matter that the hub would refuse is found before anything is sent."""
    card = tmp_path / "card.md"
    card.write_text("---\nbase_model: org/base\n---\n# Mine\n")
    plan = ts.plan_push(tiny_adapter, REPO, card=card)
    assert (plan.card_from, plan.card) == ("file", card.read_text())
    card.write_text("---\nbase_model: [/home/me/llama]\nbase_model_relation: child\n---\n")
    with pytest.raises(DataError, match="front matter") as caught:
        ts.plan_push(tiny_adapter, REPO, card=card)
    assert len(caught.value.details) == 2


def test_figures_stand_with_their_intervals(tiny_adapter: Path, tmp_path: Path) -> None:
    """Of a record or of its file: the tuned model's figure beside the base's, in both languages."""
    evaluation = evaluation_of()
    evaluation.write(tmp_path / "evaluation.json")
    card = ts.plan_push(tiny_adapter, REPO, evaluation=tmp_path / "evaluation.json").card
    assert card == ts.plan_push(tiny_adapter, REPO, evaluation=evaluation).card
    assert "## Results" in card
    assert "| loss | final | 2.514 | 1.203 | -1.411 to -1.211 | ▲ better | 24 |" in card
    chinese = ts.plan_push(tiny_adapter, REPO, evaluation=evaluation, language="zh").card
    assert "## 评测结果" in chinese
    assert said(chinese) == said(card)


def drift_of(directory: Path, *, name: str = "tuned-int4", **changes: Any) -> ts.Drift:
    """A drift in which a directory, as it is, has a row; two others were measured beside it."""
    found = drift_with()
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    own = {"name": name, "path": str(directory), "scheme": "int4:32", "size_bytes": size, **changes}
    row = found.rows[2].model_copy(update={"model": found.rows[2].model.model_copy(update=own)})
    return found.model_copy(update={"rows": (*found.rows[:2], row, found.rows[3]), "recommended": name})


def section_of(card: str, title: str) -> str:
    """A section of a card, with its heading."""
    return f"## {title}" + card.split(f"## {title}")[1].split("\n## ")[0]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_what_the_model_keeps_stands_beside_the_base(merged: Path, tmp_path: Path, language: str) -> None:
    """Its own row and the base's, no other; the advice among all of them is none of a reader's business."""
    drift = drift_of(merged)
    drift.write(tmp_path / "drift.json")
    card = ts.plan_push(merged, REPO, drift=drift, language=language).card
    assert card == ts.plan_push(merged, REPO, drift=tmp_path / "drift.json", language=language).card
    section = section_of(card, ts.text("card.drift", language))
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    columns = ("model", "scheme", "size", "kept", "kl_in", "kl_out", "top1")
    assert lines[0] == [ts.text(f"drift.column.{name}", language) for name in columns]
    assert [cells[0] for cells in lines[2:]] == [f"base ({ts.text('drift.tag.yardstick', language)})", "tuned-int4"]
    kept, kl = drift.rows[2].kept, drift.rows[2].general
    assert kept is not None
    assert kl is not None

    def figure(unit: str, estimate: ts.Estimate) -> str:
        ends = ts.text(f"unit.{unit}.range", language, low=estimate.low, high=estimate.high)
        return f"{ts.text(f'unit.{unit}.value', language, value=estimate.value)} ({ends})"

    assert lines[3][3] == figure("share", kept)
    assert lines[3][4:] == [figure("nats", kl.kl), figure("nats", kl.kl), figure("share", kl.top1)]
    assert "40 " in section.splitlines()[-1]
    assert "3,200 " in section.splitlines()[-1]
    assert said(card) == said(ts.plan_push(merged, REPO).card)


def test_a_relative_path_and_two_names_of_one_directory_are_found(
    merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``tunesmith drift`` was given it, from where it was typed."""
    monkeypatch.chdir(merged.parent)
    drift = drift_of(merged)
    rows = [
        row.model_copy(update={"model": row.model.model_copy(update={"name": name, "path": merged.name})})
        for row, name in ((drift.rows[2], "one"), (drift.rows[2], "two"))
    ]
    card = ts.plan_push(merged, REPO, drift=drift.model_copy(update={"rows": (drift.rows[0], *rows)})).card
    assert re.findall(r"^\| (one|two) ", card, re.MULTILINE) == ["one", "two"]


def test_without_answers_the_card_shows_general_texts_alone(merged: Path) -> None:
    """No column of dashes, and a sentence that says so."""
    drift = drift_of(merged)
    rows = [row.model_copy(update={"in_domain": None, "kept": None, "loss": None}) for row in drift.rows]
    none = {"rows": tuple(rows), "rows_from": "none", "in_domain_rows": 0, "in_domain_tokens": 0, "gain": None}
    section = section_of(ts.plan_push(merged, REPO, drift=drift.model_copy(update=none)).card, ts.text("card.drift"))
    assert "| model | stored as | size | KL, general | same first choice |" in section
    assert "no rows with known answers" in section


def test_names_in_a_drift_mean_nothing_in_markdown(merged: Path) -> None:
    """A directory may be called anything."""
    card = ts.plan_push(merged, REPO, drift=drift_of(merged, name="a|b](http://x)<b>\u202e")).card
    assert r"a\|b\](http://x)\<b\>" in card
    assert "\u202e" not in card


def test_a_drift_without_the_directory_names_those_it_has_and_the_line_to_type(
    merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it was of schemes alone, whose models are gone: an empty path is no directory."""
    with pytest.raises(DataError, match="no row of the directory") as caught:
        ts.plan_push(merged, REPO, drift=drift_with(), run="out/my run")
    assert caught.value.details == ("/int8", "/int4:32", "/int4:64")
    assert caught.value.next_step == f"tunesmith drift 'out/my run' {merged} --out drift.json"
    gone = drift_of(merged, path="")
    monkeypatch.chdir(merged)
    with pytest.raises(DataError, match="no row of the directory") as caught:
        ts.plan_push(".", REPO, drift=gone)
    assert "tuned-int4: made for the comparison, and gone" in caught.value.details
    assert str(caught.value.next_step).startswith("tunesmith drift RUN ")


def test_a_drift_of_the_base_is_none_of_the_model(merged: Path) -> None:
    """The yardstick's own directory has no row to show."""
    drift = drift_of(merged)
    base = drift.rows[0].model_copy(update={"model": drift.rows[0].model.model_copy(update={"path": str(merged)})})
    with pytest.raises(DataError, match="no row of the directory"):
        ts.plan_push(merged, REPO, drift=drift.model_copy(update={"rows": (base, *drift_with().rows[1:])}))


def test_a_model_that_was_replaced_since_is_not_the_one_that_was_measured(merged: Path) -> None:
    """Told by its size."""
    with pytest.raises(DataError, match="another model") as caught:
        ts.plan_push(merged, REPO, drift=drift_of(merged, size_bytes=1234))
    assert "1,234 bytes" in str(caught.value.expected)
    assert "tunesmith drift" in str(caught.value.next_step)


def test_a_drift_is_of_models_alone(tiny_adapter: Path, merged: Path, tmp_path: Path) -> None:
    """An adapter is what the others are held against; of GGUF files nothing was measured."""
    with pytest.raises(DataError, match="merged and quantized models alone") as caught:
        ts.plan_push(tiny_adapter, REPO, drift=drift_of(merged))
    assert caught.value.found == "adapter"
    (tmp_path / "gguf").mkdir()
    file = tmp_path / "gguf" / "model.gguf"
    file.write_bytes(b"GGUF")
    for target in (file, file.parent):
        with pytest.raises(DataError, match="merged and quantized models alone"):
            ts.plan_push(target, REPO, model=merged, unverified=True, drift=drift_of(merged))


def test_an_adapters_card_tells_how_it_was_trained(tiny_adapter: Path) -> None:
    """Its rank and scale, which its own configuration holds."""
    card = ts.plan_push(tiny_adapter, REPO).card
    assert re.search(r"\| `r` \| \d+ \|", card)
    assert re.search(r"\| `lora_alpha` \| \d+ \|", card)
