"""What a push would send: a model's files and nothing else, proved, without paths of this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import tunesmith as ts
from tests.tiny_models import TinyRun
from tunesmith.errors import CheckpointError, DataError, OutputError, TunesmithError

REPO = "me/tuned"
STRAY = (
    ".env", ".git-credentials", "training_args.bin", "optimizer.pt", "trainer_state.json", "all_results.json",
    "train.log", "events.out.tfevents.1", "data.jsonl", "notes.md", "secret.json", "pytorch_model.bin", "run.sh",
)  # fmt: skip


def names(plan: ts.PushPlan) -> list[str]:
    """What goes up."""
    return [file.name for file in plan.files]


def reasons(plan: ts.PushPlan) -> dict[str, str]:
    """What stays, and why."""
    return {left.name: left.reason for left in plan.left_out}


def codes(plan: ts.PushPlan) -> set[str]:
    """The findings' codes."""
    return {finding.code for finding in plan.findings}


def test_a_verified_model_goes_up_with_its_certificate_and_a_card(merged: Path) -> None:
    """All that the certificate names, and the card; the directory is as it was."""
    before = {path.name: path.stat().st_mtime_ns for path in merged.iterdir()}
    plan = ts.plan_push(merged, REPO)
    assert names(plan)[0] == "model.safetensors"
    assert set(names(plan)) == {*before, "README.md"}
    assert (plan.kind, plan.verified, plan.card_from) == ("model", "identical", "records")
    assert plan.size_bytes == sum(file.size_bytes for file in plan.files)
    assert {path.name: path.stat().st_mtime_ns for path in merged.iterdir()} == before
    assert ts.PushPlan.model_validate_json(plan.to_json()) == plan


@pytest.mark.parametrize("name", STRAY)
def test_what_is_no_models_file_never_goes_up(merged: Path, name: str) -> None:
    """Whatever lies beside the weights; what a loader would read beside them breaks the certificate besides."""
    (merged / name).write_text("secret")
    plan = ts.plan_push(merged, REPO, unverified=True)
    assert name not in names(plan)
    assert name in reasons(plan)


def test_folders_links_out_and_nameless_things_stay(merged: Path, tmp_path: Path) -> None:
    """A checkpoint, a link to a key, a link to a folder; each with its reason."""
    (merged / "checkpoint-3").mkdir()
    (merged / "checkpoint-3" / "model.safetensors").write_text("x")
    (tmp_path / "id_rsa").write_text("key")
    (merged / "LICENSE").symlink_to(tmp_path / "id_rsa")
    (merged / "tokenizer.model").symlink_to(merged / "tokenizer.json")
    (merged / "away").symlink_to(tmp_path)
    plan = ts.plan_push(merged, REPO, unverified=True)
    assert "tokenizer.model" in names(plan)
    found = reasons(plan)
    assert (found["checkpoint-3/"], found["LICENSE"], found["away/"]) == ("folder", "link_out", "link_out")


def test_weights_that_are_links_out_of_the_directory_are_refused(merged: Path, tmp_path: Path) -> None:
    """As in the hub's own cache: the copy to push is named."""
    (merged / "model.safetensors").rename(tmp_path / "blob")
    (merged / "model.safetensors").symlink_to(tmp_path / "blob")
    with pytest.raises(CheckpointError, match="cannot go up") as caught:
        ts.plan_push(merged, REPO, unverified=True)
    assert caught.value.details == ("model.safetensors",)


def test_nobodys_proof_is_no_push_but_on_request(merged: Path) -> None:
    """Without a certificate; and where it is pushed all the same, the card says so."""
    (merged / "tunesmith-certificate.json").unlink()
    with pytest.raises(CheckpointError, match="Nobody has verified"):
        ts.plan_push(merged, REPO)
    plan = ts.plan_push(merged, REPO, unverified=True)
    assert plan.verified is None
    assert "push_unverified" in codes(plan)
    assert "Nobody has verified these files." in plan.card


def test_the_proof_to_make_first_is_of_the_view_that_it_was_made_from(tiny: TinyRun, tmp_path: Path) -> None:
    """What was quantized from a view of the base is no other model's, so the command names the view."""
    run, out = tiny.adapters["final"], tmp_path / "out"
    ts.quantize(ts.plan_quantization(run, out, scheme="int8", base=str(tiny.base), base_view="nf4"))
    with pytest.raises(CheckpointError) as caught:
        ts.plan_push(out, REPO)
    assert str(caught.value.next_step).startswith(f"tunesmith verify RUN {out} --base-view nf4")
    verdict = ts.verify(run, out, base=str(tiny.base), base_view="nf4", levels=("structure", "assets", "weights"))
    assert verdict.good
    assert ts.plan_push(out, REPO).verified == "equal_within_quantization"


@pytest.mark.parametrize("how", ["changed", "missing", "came since"])
def test_a_certificate_that_does_not_hold_stops_a_push(merged: Path, how: str) -> None:
    """All that is wrong is named; with --unverified the certificate stays here."""
    if how == "changed":
        (merged / "chat_template.jinja").write_text("{{ x }}")
    elif how == "missing":
        (merged / "chat_template.jinja").unlink()
    else:
        (merged / "vocab.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not what its certificate says") as caught:
        ts.plan_push(merged, REPO)
    assert [line for line in caught.value.details if line.startswith(how)]
    plan = ts.plan_push(merged, REPO, unverified=True)
    assert reasons(plan)["tunesmith-certificate.json"] == "certificate"
    assert "tunesmith-certificate.json" not in names(plan)


def test_a_certified_file_that_would_stay_here_stops_a_push(tiny: TinyRun, merged: Path) -> None:
    """Its download would lack it, and the certificate not hold."""
    (merged / "trainer_state.json").write_text("{}")
    ts.verify(tiny.adapters["final"], merged, base=str(tiny.base), levels=("structure", "assets", "weights"))
    with pytest.raises(CheckpointError) as caught:
        ts.plan_push(merged, REPO)
    assert caught.value.details == ("certified, but does not go up: trainer_state.json",)


def test_a_certified_readme_that_another_card_replaces_stops_a_push(
    tiny: TinyRun, merged: Path, tmp_path: Path
) -> None:
    """A person's goes up as it is; another one would make the certificate a lie."""
    (merged / "README.md").write_text("# Mine\n")
    ts.verify(tiny.adapters["final"], merged, base=str(tiny.base), levels=("structure", "assets", "weights"))
    plan = ts.plan_push(merged, REPO)
    assert (plan.card, plan.card_from) == ("# Mine\n", "directory")
    (tmp_path / "card.md").write_text("# Other\n")
    with pytest.raises(CheckpointError, match="certificate names the card"):
        ts.plan_push(merged, REPO, card=tmp_path / "card.md")


def test_paths_of_this_machine_stop_a_push(merged: Path, tmp_path: Path) -> None:
    """Those that lie here or under the user's home; not those that a model's makers left long ago."""
    config = json.loads((merged / "config.json").read_text())
    nested = {"auto": [{"from": str(tmp_path)}]}
    (merged / "config.json").write_text(json.dumps({**config, "_name_or_path": str(merged), "x": nested}))
    tokenizer = json.loads((merged / "tokenizer_config.json").read_text())
    tokenizer |= {"special_tokens_map_file": "/home/patrick/cache/map.json", "slash": "/", "dev": "/dev"}
    (merged / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="paths of this machine") as caught:
        ts.plan_push(merged, REPO, unverified=True)
    assert [line.split(": ")[:2] for line in caught.value.details] == [
        ["config.json", "_name_or_path"],
        ["config.json", "x.auto.from"],
    ]


def edit(path: Path, **values: Any) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_an_adapter_names_its_base_as_others_can(tiny_adapter: Path, tmp_path: Path) -> None:
    """A path becomes the base's last name, or its hub id where that is given; the card never shows the path."""
    (tmp_path / "models" / "llama").mkdir(parents=True)
    edit(tiny_adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "models" / "llama"))
    for base_model, expected in ((None, "llama"), ("org/llama", "org/llama")):
        plan = ts.plan_push(tiny_adapter, REPO, base_model=base_model)
        (config,) = (file for file in plan.files if file.name == "adapter_config.json")
        assert json.loads(config.text or "")["base_model_name_or_path"] == expected
        assert str(tmp_path) not in plan.card
        assert plan.base_model == base_model
        assert ("push_base_unknown" in codes(plan)) == (base_model is None)
    edit(tiny_adapter / "adapter_config.json", base_model_name_or_path="org/base")
    plan = ts.plan_push(tiny_adapter, REPO)
    assert (plan.base_model, plan.relation) == ("org/base", "adapter")
    assert all(file.text is None for file in plan.files if file.name != "README.md")


def test_an_adapter_that_is_not_healthy_is_not_pushed(tiny_adapter: Path) -> None:
    """Its weights are damaged: refused whatever is asked."""
    weights = tiny_adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(TunesmithError):
        ts.plan_push(tiny_adapter, REPO)


def test_a_run_with_grave_findings_needs_the_users_word(tiny_adapter: Path) -> None:
    """A factor of not-a-numbers; --unverified sends it."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    weights = tiny_adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    first = next(iter(tensors))
    save_file({**tensors, first: np.full_like(tensors[first], np.nan)}, weights)
    with pytest.raises(CheckpointError, match="not healthy"):
        ts.plan_push(tiny_adapter, REPO)
    assert "push_unverified" in codes(ts.plan_push(tiny_adapter, REPO, unverified=True))


def test_gguf_files_go_up_alone_or_together(tmp_path: Path) -> None:
    """A folder of them with its Modelfile, or one by name; a Modelfile's own path is told."""
    for name in ("a-q4.gguf", "a-q8.gguf"):
        (tmp_path / name).write_bytes(b"GGUF" + name.encode())
    (tmp_path / "Modelfile").write_text("FROM ./a-q4.gguf\n")
    with pytest.raises(CheckpointError, match="Nobody has verified"):
        ts.plan_push(tmp_path, REPO)
    plan = ts.plan_push(tmp_path, REPO, unverified=True, base_model="org/base")
    assert names(plan) == ["a-q4.gguf", "a-q8.gguf", "Modelfile", "README.md"]
    assert (plan.kind, plan.relation) == ("gguf", "quantized")
    one = ts.plan_push(tmp_path / "a-q8.gguf", REPO, unverified=True)
    assert names(one) == ["a-q8.gguf", "Modelfile", "README.md"]
    assert reasons(one) == {"a-q4.gguf": "gguf"}
    (tmp_path / "Modelfile").write_text(f"FROM {tmp_path}/a-q4.gguf\n")
    with pytest.raises(CheckpointError, match="paths of this machine"):
        ts.plan_push(tmp_path, REPO, unverified=True)


def test_gguf_files_are_proved_against_their_model(tmp_path: Path) -> None:
    """Those that are it go up with the verdict; another's do not, but on request."""
    drafts = pytest.importorskip("tests.verify.gguf.drafts", reason="needs gguf")
    model = drafts.build_model(tmp_path / "model", "llama")
    draft = drafts.draft_of(model, "llama")
    (tmp_path / "gguf").mkdir()
    file = draft.write(tmp_path / "gguf" / "tuned.gguf")
    plan = ts.plan_push(file, REPO, model=model, base_model="org/base")
    assert plan.verified == "identical"
    assert "held these files against the model" in plan.card
    assert names(plan) == ["tuned.gguf", "README.md"]
    draft.tensors["output_norm.weight"] += 1
    draft.write(file)
    with pytest.raises(CheckpointError, match="not the model") as caught:
        ts.plan_push(file, REPO, model=model)
    assert caught.value.details == ("tuned.gguf: Different",)
    assert "push_unverified" in codes(ts.plan_push(file, REPO, model=model, unverified=True))


def test_a_quantized_model_says_how(merged: Path) -> None:
    """Its kind and scheme come from the configuration; its relation from what the user names."""
    edit(merged / "config.json", quantization_config={"quant_method": "compressed-tensors", "format": "pack-quantized"})
    plan = ts.plan_push(merged, REPO, unverified=True, base_model="me/merged")
    assert (plan.kind, plan.relation) == ("quantized", "quantized")
    assert "compressed-tensors, pack-quantized" in plan.card
    assert "vllm serve me/tuned" in plan.card


def test_code_that_comes_with_a_model_is_said(merged: Path) -> None:
    """Others will run it."""
    (merged / "modeling_x.py").write_text("pass\n")
    plan = ts.plan_push(merged, REPO, unverified=True)
    assert "modeling_x.py" in names(plan)
    assert "push_code" in codes(plan)
    assert "trust_remote_code=True" in plan.card


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ({"repo_id": "tuned"}, DataError),
        ({"repo_id": "me/../x"}, DataError),
        ({"repo_id": "me/x.git"}, DataError),
        ({"to": "nowhere"}, DataError),
        ({"revision": "a..b"}, DataError),
        ({"revision": "-x"}, DataError),
        ({"base_model": "llama"}, DataError),
        ({"language": "fr"}, DataError),
        ({"endpoint": "huggingface.co"}, OutputError),
        ({"endpoint": "https://me:secret@hub"}, OutputError),
        ({"endpoint": "https://hf-mirror.com"}, OutputError),
        ({"card": "none.md"}, DataError),
    ],
)
def test_what_cannot_be_is_refused(merged: Path, how: dict[str, Any], error: type[TunesmithError]) -> None:
    """Before anything is read that takes time; a password in an address is not repeated."""
    with pytest.raises(error) as caught:
        ts.plan_push(merged, **{"repo_id": REPO, **how})
    assert "secret" not in str(caught.value)


def test_the_endpoint_comes_from_the_environment(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the hub's own client has it; a mirror there is said with what to pass instead; plain HTTP is said."""
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.intern:8080/")
    plan = ts.plan_push(merged, REPO)
    assert plan.endpoint == "http://hub.intern:8080"
    assert "push_plain_http" in codes(plan)
    monkeypatch.setenv("HF_ENDPOINT", "https://hf-mirror.com")
    with pytest.raises(OutputError, match="mirror") as caught:
        ts.plan_push(merged, REPO)
    assert "--endpoint https://huggingface.co" in str(caught.value.next_step)
    assert ts.plan_push(merged, REPO, to="modelscope").endpoint == "https://modelscope.cn"


def test_what_is_not_there_or_nothing_to_push(tmp_path: Path, tiny: TinyRun, merged: Path) -> None:
    """Absent, empty, and an adapter beside a whole model."""
    for folder, said in ((tmp_path / "none", "is not there"), (tmp_path, "nothing to push")):
        with pytest.raises(CheckpointError, match=said):
            ts.plan_push(folder, REPO)
    shutil.copy(tiny.adapters["final"] / "adapter_config.json", merged)
    with pytest.raises(CheckpointError, match="an adapter and a whole model"):
        ts.plan_push(merged, REPO, unverified=True)
