"""Level 2: configuration, tokenizer, chat template and decoding settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from tests.tiny_models import SPECIAL, TinyRun, edit_json
from tunesmith.record import Finding
from tunesmith.verify.assets import chat_template, check_assets

GOOD = {"config_same", "tokenizer_same", "chat_template_same", "generation_config_same"}


@pytest.fixture
def pair(tiny: TinyRun, tmp_path: Path) -> tuple[Path, Path]:
    """The small files of one model, twice: as shipped and as they should be."""
    for name in ("ours", "theirs"):
        shutil.copytree(tiny.base, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "ours", tmp_path / "theirs"


def problems(ours: Path, theirs: Path, **options: Any) -> dict[str, dict[str, Any]]:
    """What is not good, by code."""
    findings = check_assets(ours, theirs, theirs, **options)
    return {finding.code: dict(finding.params) for finding in findings if finding.severity in ("error", "warning")}


def test_the_same_files_are_found_the_same(pair: tuple[Path, Path]) -> None:
    """Each part is looked at and said to be good."""
    assert {finding.code for finding in check_assets(*pair, pair[1])} == GOOD


@pytest.mark.parametrize(
    "noise",
    [
        {"transformers_version": "4.40.0"},
        {"_name_or_path": "/somewhere/else"},
        {"torch_dtype": "bfloat16", "dtype": None},
        {"use_cache": False},
        {"unsloth_version": "2025.1"},
    ],
)
def test_a_writers_own_fields_are_no_difference(noise: dict[str, Any], pair: tuple[Path, Path]) -> None:
    """They change nothing that the model computes."""
    edit_json(pair[0] / "config.json", **noise)
    assert problems(*pair) == {}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rms_norm_eps", 1e-5),
        ("hidden_act", "gelu"),
        ("num_attention_heads", 2),
        ("architectures", ["MistralForCausalLM"]),
        ("eos_token_id", 1),
        ("tie_word_embeddings", False),
        ("a_field_that_no_one_knows", 7),
    ],
)
def test_a_field_with_meaning_is_a_difference(field: str, value: object, pair: tuple[Path, Path]) -> None:
    """It is named with both values."""
    before = json.loads((pair[1] / "config.json").read_text()).get(field)
    edit_json(pair[0] / "config.json", **{field: value})
    found = problems(*pair)["config_differs"]
    assert found == {"field": field, "expected": json.dumps(before), "found": json.dumps(value)}


@pytest.mark.parametrize("field", ["rms_norm_eps", "attention_bias", "head_dim", "mlp_bias"])
def test_a_default_that_one_side_leaves_out_is_no_difference(field: str, pair: tuple[Path, Path]) -> None:
    """An older writer left it to the loader; what the loader makes of it counts."""
    for folder in pair:
        document = json.loads((folder / "config.json").read_text())
        document.pop(field)
        (folder / "config.json").write_text(json.dumps(document))
        assert problems(*pair) == {}


def test_a_field_that_is_left_out_and_was_no_default_is_a_difference(pair: tuple[Path, Path]) -> None:
    """The loader would fill in another value."""
    edit_json(pair[1] / "config.json", rms_norm_eps=0.5)
    document = json.loads((pair[0] / "config.json").read_text())
    document.pop("rms_norm_eps")
    (pair[0] / "config.json").write_text(json.dumps(document))
    assert problems(*pair)["config_differs"]["field"] == "rms_norm_eps"


OLD = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}
NEW = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}}


@pytest.mark.parametrize(("ours", "theirs"), [(OLD, NEW), (NEW, OLD), (OLD, OLD), ({**OLD, **NEW}, NEW)])
def test_both_spellings_of_rope_mean_the_same(
    ours: dict[str, Any], theirs: dict[str, Any], pair: tuple[Path, Path]
) -> None:
    """Transformers 4 writes it flat, Transformers 5 nested, we both."""
    for folder, rope in zip(pair, (ours, theirs), strict=True):
        document = json.loads((folder / "config.json").read_text())
        document.pop("rope_parameters", None)
        document.update({key: value for key, value in rope.items() if value is not None})
        (folder / "config.json").write_text(json.dumps(document))
    assert problems(*pair) == {}


@pytest.mark.parametrize("change", [{"rope_theta": 1e6}, {"factor": 4.0}, {"rope_type": "dynamic"}])
def test_another_rope_is_a_difference_in_either_spelling(change: dict[str, Any], pair: tuple[Path, Path]) -> None:
    """The base, the factor and the kind all count."""
    edit_json(pair[1] / "config.json", **NEW)
    edit_json(pair[0] / "config.json", rope_parameters={**NEW["rope_parameters"], **change})
    assert "config_differs" in problems(*pair)


@pytest.mark.parametrize("flat", [500.0, 10000.0])
def test_spellings_of_rope_that_contradict_each_other_are_a_difference(flat: float, pair: tuple[Path, Path]) -> None:
    """Different loaders would load different models, whichever of the two is the right one."""
    nested = 10500.0 - flat
    edit_json(pair[0] / "config.json", rope_theta=flat, rope_parameters={"rope_theta": nested, "rope_type": "default"})
    assert "config_differs" in problems(*pair)


def test_a_configuration_that_cannot_be_read_is_an_error(pair: tuple[Path, Path]) -> None:
    """Not JSON, or not there."""
    (pair[0] / "config.json").write_text("{")
    assert "config_unreadable" in problems(*pair)


def test_a_tied_head_that_is_written_out_need_not_be_declared_tied(pair: tuple[Path, Path]) -> None:
    """Only where it is there as a copy."""
    edit_json(pair[0] / "config.json", tie_word_embeddings=False)
    assert problems(*pair)["config_differs"]["field"] == "tie_word_embeddings"
    assert problems(*pair, head_written_out=True) == {}


def tokenizer_document(folder: Path) -> dict[str, Any]:
    """The parsed ``tokenizer.json``."""
    return json.loads((folder / "tokenizer.json").read_text())


def write_tokenizer(folder: Path, document: dict[str, Any]) -> None:
    """Write ``tokenizer.json`` anew."""
    (folder / "tokenizer.json").write_text(json.dumps(document))


def test_truncation_padding_and_layout_are_no_difference(pair: tuple[Path, Path]) -> None:
    """They are left behind by whatever was encoded last."""
    tokenizer = Tokenizer.from_file(str(pair[0] / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding()
    tokenizer.save(str(pair[0] / "tokenizer.json"), pretty=False)
    assert problems(*pair) == {}


def test_two_swapped_tokens_are_a_difference(pair: tuple[Path, Path]) -> None:
    """Every text that holds them becomes other numbers."""
    document = tokenizer_document(pair[0])
    vocabulary = document["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    write_tokenizer(pair[0], document)
    assert problems(*pair)["tokenizer_differs"] == {"where": "model"}


def test_another_post_processor_is_a_difference(pair: tuple[Path, Path]) -> None:
    """It would put a token before every text."""
    tokenizer = Tokenizer.from_file(str(pair[0] / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 0)]
    )
    tokenizer.save(str(pair[0] / "tokenizer.json"))
    assert problems(*pair)["tokenizer_differs"] == {"where": "post_processor"}


def test_an_added_token_is_a_difference(pair: tuple[Path, Path]) -> None:
    """Its embedding was never trained."""
    tokenizer = Tokenizer.from_file(str(pair[0] / "tokenizer.json"))
    tokenizer.add_tokens(["<mystery>"])
    tokenizer.save(str(pair[0] / "tokenizer.json"))
    assert "added_tokens" in problems(*pair)["tokenizer_differs"]["where"]


def test_a_tokenizer_that_is_not_one_is_a_difference(pair: tuple[Path, Path]) -> None:
    """The library's own words say why."""
    (pair[0] / "tokenizer.json").write_text("[]")
    assert "tokenizer_differs" in problems(*pair)


def test_a_missing_tokenizer_is_named(pair: tuple[Path, Path]) -> None:
    """The file that is lacking."""
    (pair[0] / "tokenizer.json").unlink()
    assert problems(*pair)["tokenizer_missing_in_merged"] == {"names": "tokenizer.json"}


def test_a_slow_tokenizer_is_held_byte_for_byte(pair: tuple[Path, Path]) -> None:
    """Where there is only a SentencePiece model."""
    for folder in pair:
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes(b"pieces")
    assert problems(*pair) == {}
    (pair[0] / "tokenizer.model").write_bytes(b"Pieces")
    assert problems(*pair)["tokenizer_differs"] == {"where": "tokenizer.model"}


def test_special_tokens_are_compared_whichever_way_they_are_written(pair: tuple[Path, Path]) -> None:
    """As a text, as an object, or in a file of their own."""
    edit_json(pair[0] / "tokenizer_config.json", eos_token={"content": SPECIAL[0], "lstrip": False})
    assert problems(*pair) == {}
    edit_json(pair[0] / "tokenizer_config.json", eos_token=None)
    assert problems(*pair)["tokenizer_differs"] == {"where": "eos_token"}
    (pair[0] / "special_tokens_map.json").write_text(json.dumps({"eos_token": SPECIAL[0]}))
    assert problems(*pair) == {}
    edit_json(pair[0] / "tokenizer_config.json", eos_token=SPECIAL[2])
    assert problems(*pair)["tokenizer_differs"] == {"where": "eos_token"}


def test_another_padding_token_is_a_warning_only(pair: tuple[Path, Path]) -> None:
    """Padding is masked, so no answer changes."""
    edit_json(pair[0] / "tokenizer_config.json", pad_token=SPECIAL[1])
    findings = [finding for finding in check_assets(*pair, pair[1]) if finding.code == "tokenizer_differs"]
    assert [(finding.severity, finding.params["where"]) for finding in findings] == [("warning", "pad_token")]


def test_a_template_that_departs_by_one_character_is_shown_where_it_does(pair: tuple[Path, Path]) -> None:
    """With what stands there and what should."""
    text = (pair[0] / "chat_template.jinja").read_text()
    (pair[0] / "chat_template.jinja").write_text(text[:40] + "." + text[40:])
    found = problems(*pair)["chat_template_differs"]
    assert found["position"] == 40
    assert str(found["found"])[1] == "."
    (pair[0] / "chat_template.jinja").write_text(text + " ")
    assert problems(*pair)["chat_template_differs"]["position"] == len(text)


def test_a_missing_template_and_a_template_that_should_not_be_are_differences(pair: tuple[Path, Path]) -> None:
    """Both ways round."""
    (pair[0] / "chat_template.jinja").unlink()
    assert "chat_template_missing" in problems(*pair)
    assert "chat_template_differs" in problems(pair[1], pair[0])


def test_the_template_is_found_in_every_place_where_a_loader_looks(tmp_path: Path) -> None:
    """Its own file goes before the tokenizer's configuration; of several by name the default counts."""
    assert chat_template(tmp_path) is None
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert chat_template(tmp_path) == "D"
    edit_json(tmp_path / "tokenizer_config.json", chat_template="C")
    assert chat_template(tmp_path) == "C"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert chat_template(tmp_path) == "J"


def test_decoding_settings_are_compared_by_meaning(pair: tuple[Path, Path]) -> None:
    """A list of one is the one; another end is an error, another temperature a warning, a lacking file a warning."""
    ours, theirs = (folder / "generation_config.json" for folder in pair)
    theirs.write_text(json.dumps({"eos_token_id": 0, "temperature": 0.7}))
    ours.write_text(json.dumps({"eos_token_id": [0], "temperature": 0.7, "transformers_version": "1"}))
    assert problems(*pair) == {}
    severities = {}
    for name, settings in {"end": {"eos_token_id": 2, "temperature": 0.7}, "heat": {"eos_token_id": 0}}.items():
        ours.write_text(json.dumps(settings))
        severities[name] = next(f.severity for f in check_assets(*pair, None) if f.code == "generation_config_differs")
    ours.unlink()
    severities["none"] = next(f.severity for f in check_assets(*pair, None) if f.code == "generation_config_differs")
    assert severities == {"end": "error", "heat": "warning", "none": "warning"}


def test_the_adapters_own_decoding_settings_go_before_the_bases(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """As a merge takes them."""
    run = tmp_path / "adapter"
    run.mkdir()
    (pair[1] / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    for folder in (run, pair[0]):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    assert "generation_config_differs" in problems(*pair)
    assert problems(*pair, generation_from=run) == {}


def adapted(ours: Path, theirs: Path, changes: dict[str, object]) -> dict[str, Finding]:
    """The findings on the configuration, by code."""
    findings = check_assets(ours, theirs, None, config_changes=changes)
    return {finding.code: finding for finding in findings if finding.code.startswith(("config", "head"))}


@pytest.mark.parametrize(
    ("changes", "written"),
    [
        ({"vocab_size": 300}, {"vocab_size": 300}),
        ({"tie_word_embeddings": False}, {"tie_word_embeddings": False}),
        ({"num_hidden_layers": 3}, {"num_hidden_layers": 3}),
        ({"architectures": ("LlamaForTokenClassification",)}, {"architectures": ["LlamaForTokenClassification"]}),
        ({"num_labels": 3}, {"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}}),
        (
            {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}},
            {"id2label": {"0": "no", "1": "yes"}},
        ),
    ],
    ids=["vocabulary", "untied", "layers", "class", "labels", "named-labels"],
)
def test_what_the_adapter_changes_in_the_configuration_must_be_changed(
    changes: dict[str, object], written: dict[str, object], pair: tuple[Path, Path]
) -> None:
    """With the change it is right and said to be; without it, or with one more, it is not."""
    assert {finding.severity for finding in adapted(*pair, changes).values()} == {"error"}
    edit_json(pair[0] / "config.json", **written)
    findings = adapted(*pair, changes)
    assert findings["config_adapted"].severity == "info"
    assert findings["config_adapted"].params["fields"] == ", ".join(sorted(changes))
    assert {finding.severity for finding in adapted(*pair, {}).values()} == {"error"}
    edit_json(pair[0] / "config.json", rms_norm_eps=1e-3)
    assert adapted(*pair, changes)["config_differs"].params["field"] == "rms_norm_eps"


def test_a_setting_of_a_section_is_changed_in_that_section(pair: tuple[Path, Path]) -> None:
    """By dotted key; a difference within a section is named by its key, not by the whole section."""
    for folder in pair:
        edit_json(folder / "config.json", text_config={"vocab_size": 259, "hidden_size": 64})
    changes = {"text_config.vocab_size": 300}
    finding = adapted(*pair, changes)["config_differs"]
    assert dict(finding.params) == {"field": "text_config.vocab_size", "expected": "300", "found": "259"}
    edit_json(pair[0] / "config.json", text_config={"vocab_size": 300, "hidden_size": 64})
    assert "config_adapted" in adapted(*pair, changes)


def test_a_head_that_is_untied_and_still_declared_tied_has_a_code_of_its_own(pair: tuple[Path, Path]) -> None:
    """A loader would not read the head that is there; a copy of the embedding excuses nothing then."""
    findings = check_assets(*pair, None, head_written_out=True, config_changes={"tie_word_embeddings": False})
    assert "head_declared_tied" in [finding.code for finding in findings if finding.severity == "error"]


def test_label_names_that_contradict_each_other_are_a_difference(pair: tuple[Path, Path]) -> None:
    """Both directions are read, by different loaders."""
    names = {"0": "no", "1": "yes"}
    edit_json(pair[1] / "config.json", id2label=names, label2id={"no": 0, "yes": 1})
    edit_json(pair[0] / "config.json", id2label=names)
    assert problems(*pair) == {}
    edit_json(pair[0] / "config.json", id2label=names, label2id={"no": 1, "yes": 0})
    assert "config_differs" in problems(*pair)
