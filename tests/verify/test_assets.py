"""Level 2: configuration, tokenizer, chat template and decoding settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer, processors
from transformers import AutoTokenizer

from tests.tiny_models import SPECIAL, TinyRun, edit_json
from tunesmith.record import Finding
from tunesmith.report import finding_text
from tunesmith.verify.assets import check_assets
from tunesmith.verify.assets.configuration import NOISE
from tunesmith.verify.assets.template import CONVERSATIONS, DEFAULT, chat_templates, render
from tunesmith.verify.assets.tokenizer import PROBES, loaded_tokenizer

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
    ("reason", "written"),
    [
        ("writer", {"transformers_version": "4.40.0", "unsloth_fixed": True}),
        ("dtype", {"torch_dtype": "bfloat16"}),
        ("speed", {"use_cache": False, "_attn_implementation_autoset": True}),
        ("outputs", {"output_hidden_states": True}),
        ("training", {"initializer_range": 0.5, "attention_dropout": 0.1}),
        ("padding", {"pad_token_id": 2}),
        ("tokenizer", {"eos_token_id": 2}),
        ("spelling", {"num_labels": 2}),
    ],
)
def test_what_was_passed_over_is_said_with_the_reason(
    reason: str, written: dict[str, Any], pair: tuple[Path, Path]
) -> None:
    """A reader sees which fields differ all the same, and why that is no difference, in both languages."""
    for folder in pair:
        edit_json(folder / "tokenizer_config.json", eos_token=SPECIAL[2])
    edit_json(pair[0] / "config.json", **written)
    assert problems(*pair) == {}
    findings = [f for f in check_assets(*pair, pair[1]) if f.code.startswith("config_noise_")]
    assert [(f.code, f.severity) for f in findings] == [(f"config_noise_{reason}", "info")]
    assert findings[0].params["fields"] == ", ".join(sorted(written))
    assert all(next(iter(written)) in finding_text(findings[0], lang) for lang in ("en", "zh"))


def test_every_reason_to_pass_over_a_field_has_a_text() -> None:
    """The code of the finding is made of the reason's name."""
    for reason in (*NOISE, "defaults", "spelling", "tokenizer"):
        finding = Finding(code=f"config_noise_{reason}", severity="info", params={"fields": "x"})
        assert all(finding_text(finding, lang) for lang in ("en", "zh"))


def test_padding_tells_a_classifier_where_the_text_ends(pair: tuple[Path, Path]) -> None:
    """It reads the last token that is no padding, so there the field is no noise."""
    for folder in pair:
        edit_json(folder / "config.json", architectures=["LlamaForSequenceClassification"], pad_token_id=0)
    edit_json(pair[0] / "config.json", pad_token_id=2)
    assert problems(*pair)["config_differs"]["field"] == "pad_token_id"


def test_an_end_in_the_configuration_that_is_not_the_tokenizers_is_a_difference(pair: tuple[Path, Path]) -> None:
    """Only the run's own token excuses it."""
    edit_json(pair[0] / "config.json", eos_token_id=2)
    assert problems(*pair)["config_differs"]["field"] == "eos_token_id"


@pytest.mark.parametrize("key", ["quantization_config", "quantization"])
def test_a_quantization_that_is_only_declared_is_an_error(key: str, tiny: TinyRun, pair: tuple[Path, Path]) -> None:
    """What a dequantized merge keeps of its base: a loader would quantize the weights, or refuse them."""
    shutil.copy(tiny.merged / "model.safetensors", pair[0])
    edit_json(pair[0] / "config.json", **{key: {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    assert problems(*pair)["quantization_declared"] == {"field": key, "method": '"bitsandbytes"'}
    edit_json(pair[0] / "config.json", **{key: None})
    assert problems(*pair) == {}


def test_a_section_that_the_top_repeats_is_no_difference(pair: tuple[Path, Path]) -> None:
    """As ms-swift writes it for DeepSpeed; another value than the section's is one."""
    for folder in pair:
        edit_json(folder / "config.json", text_config={"vocab_size": 259, "a_width": 64})
    edit_json(pair[0] / "config.json", a_width=64)
    assert problems(*pair) == {}
    edit_json(pair[0] / "config.json", a_width=65)
    assert problems(*pair)["config_differs"]["field"] == "a_width"
    for folder, width in zip(pair, (64, 65), strict=True):  # stated on both sides, and once against its own section
        edit_json(folder / "config.json", a_width=width)
    assert problems(*pair)["config_differs"]["field"] == "a_width"


def test_layer_types_that_a_loader_works_out_are_no_difference(pair: tuple[Path, Path]) -> None:
    """Transformers 5 writes the list that it derives; another list is another model."""
    qwen = {"model_type": "qwen2", "use_sliding_window": False, "num_hidden_layers": 2}
    for folder in pair:
        edit_json(folder / "config.json", **qwen)
    edit_json(pair[0] / "config.json", layer_types=["full_attention", "full_attention"])
    assert problems(*pair) == {}
    assert "layer_types" in {f.code: f for f in check_assets(*pair, None)}["config_noise_defaults"].params["fields"]
    edit_json(pair[0] / "config.json", layer_types=["full_attention", "sliding_attention"])
    assert problems(*pair)["config_differs"]["field"] == "layer_types"


def test_a_longer_context_is_no_noise(pair: tuple[Path, Path]) -> None:
    """Unsloth and others write what they trained with; RoPE of some kinds is computed from it."""
    edit_json(pair[0] / "config.json", max_position_embeddings=1024)
    assert problems(*pair)["config_differs"]["field"] == "max_position_embeddings"


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


def add_token(folder: Path, **flags: bool) -> None:
    """A token that stands within a text, with its ways."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("<tool>", **{"normalized": False, **flags})])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "special"])
@pytest.mark.parametrize("place", ["tokenizer.json", "settings"])
def test_what_an_added_token_does_with_its_surroundings_is_seen(flag: str, place: str, pair: tuple[Path, Path]) -> None:
    """Spaces that it takes, words that it is found in, texts that leave it out; wherever it is said."""
    add_token(pair[1])
    add_token(pair[0], **({flag: True} if place == "tokenizer.json" else {}))
    if place == "settings":
        stated = {"content": "<tool>", "normalized": False, flag: True}
        edit_json(pair[0] / "tokenizer_config.json", added_tokens_decoder={"259": stated})
    assert problems(*pair)["tokenizer_differs"] == {"where": "added_tokens"}


def test_the_settings_beside_it_may_say_what_the_tokenizer_says_anyway(pair: tuple[Path, Path]) -> None:
    """Transformers 4 wrote every added token twice."""
    add_token(pair[1], lstrip=True)
    add_token(pair[0])
    stated = {"content": "<tool>", "lstrip": True, "normalized": False}
    edit_json(pair[0] / "tokenizer_config.json", added_tokens_decoder={"259": stated})
    assert problems(*pair) == {}


def test_a_token_that_the_settings_alone_add_is_a_difference(pair: tuple[Path, Path]) -> None:
    """It would stand for what was several tokens, and be left out of every answer."""
    edit_json(pair[0] / "tokenizer_config.json", extra_special_tokens=[*SPECIAL[1:], "<tool>"])
    assert problems(*pair)["tokenizer_differs"] == {"where": "added_tokens"}


@pytest.mark.parametrize(
    "stated",
    [
        {},
        {"extra_special_tokens": ["<tool>"]},
        {"extra_special_tokens": ["<new>", SPECIAL[1]]},
        {"additional_special_tokens": [{"content": "<tool>"}]},
        {"eos_token": "a"},
        {"eos_token": {"__type": "AddedToken", "content": "<end>", "normalized": False, "special": True}},
        {"added_tokens_decoder": {"259": {"content": "<tool>", "lstrip": True, "special": False}}},
        {"added_tokens_decoder": {"1": {"content": SPECIAL[1], "rstrip": True, "special": True}}},
        {"added_tokens_decoder": {"260": {"content": "<more>", "special": False}}},
    ],
)
def test_a_tokenizer_is_made_as_transformers_makes_it(stated: dict[str, Any], pair: tuple[Path, Path]) -> None:
    """The same added tokens with the same ways, whatever the settings beside it say."""
    add_token(pair[0])
    for token in stated.get("added_tokens_decoder", {}).values():
        token.update({"normalized": False, "single_word": False, "rstrip": token.get("rstrip", False)})
        token.setdefault("lstrip", False)
    edit_json(pair[0] / "tokenizer_config.json", **stated)
    theirs = AutoTokenizer.from_pretrained(pair[0]).backend_tokenizer
    ours = loaded_tokenizer(pair[0])
    assert added_tokens(ours) == added_tokens(theirs)


def added_tokens(tokenizer: Tokenizer) -> list[tuple[Any, ...]]:
    """Every added token with its ways."""
    return [
        (number, token.content, token.lstrip, token.rstrip, token.normalized, token.single_word, token.special)
        for number, token in sorted(tokenizer.get_added_tokens_decoder().items())
    ]


def test_another_decoder_is_seen_in_the_texts_that_come_back(pair: tuple[Path, Path]) -> None:
    """The ids are the same; what a person reads is not."""
    document = tokenizer_document(pair[0])
    document["decoder"] = {
        "type": "Sequence",
        "decoders": [document["decoder"], {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
    }
    write_tokenizer(pair[0], document)
    assert problems(*pair)["tokenizer_differs"] == {"where": "decoder"}


@pytest.mark.parametrize("within", ["<TOOL>", "a<tool>b", "x <tool> y", "<tool>\n", "中<tool>文", "<tool><tool>"])
def test_texts_around_every_added_token_are_looked_at(within: str, pair: tuple[Path, Path]) -> None:
    """What a normalizer does there, and nowhere else, is seen."""
    for folder in pair:
        add_token(folder, normalized=True)
    document = tokenizer_document(pair[0])
    document["normalizer"] = {"type": "Replace", "pattern": {"String": within}, "content": "!"}
    write_tokenizer(pair[0], document)
    assert problems(*pair)["tokenizer_differs"] == {"where": "normalizer"}


def test_a_part_that_is_spelled_otherwise_and_does_the_same_is_a_warning(pair: tuple[Path, Path]) -> None:
    """As after a conversion by another release; the number of texts that say so is told."""
    document = tokenizer_document(pair[0])
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [document["pre_tokenizer"]]}
    write_tokenizer(pair[0], document)
    finding = next(f for f in check_assets(*pair, pair[1]) if f.code == "tokenizer_respelled")
    assert (finding.severity, finding.params["parts"]) == ("warning", "pre_tokenizer")
    assert int(str(finding.params["probes"])) > len(PROBES)
    document["pre_tokenizer"]["pretokenizers"].append({"type": "Digits", "individual_digits": True})
    write_tokenizer(pair[0], document)
    assert "tokenizer_respelled" in problems(*pair)  # of single bytes nothing can be split
    document["pre_tokenizer"]["pretokenizers"][0]["add_prefix_space"] = True
    write_tokenizer(pair[0], document)
    assert problems(*pair)["tokenizer_differs"] == {"where": "pre_tokenizer"}


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


def test_another_template_is_shown_by_what_it_writes(pair: tuple[Path, Path]) -> None:
    """The first probe conversation that comes out otherwise, and where; errors are told by their own words."""
    template = (pair[1] / "chat_template.jinja").read_text()
    (pair[0] / "chat_template.jinja").write_text(template.replace("{{ m.content }}", "{{ m.content | trim }}"))
    found = problems(*pair)["chat_template_differs"]
    written = CONVERSATIONS[int(found["probe"]) // 2]["messages"]
    assert written[0]["content"] != written[0]["content"].strip()
    assert (found["place"], found["should_write"], found["writes"]) == (
        len("<|im_start|>user\n"),
        json.dumps(written[0]["content"][:30], ensure_ascii=False),
        json.dumps(f"{written[0]['content'].strip()}<|im_end|>"[:30], ensure_ascii=False),
    )
    (pair[0] / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    assert problems(*pair)["chat_template_differs"]["writes"] == '"TemplateError: no"'


@pytest.mark.parametrize(
    "spelled",
    [
        ("{{ m.content }}", "{{ m['content'] }}"),
        ("{% for", "{# a comment #}{% for"),
        ("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}"),
    ],
    ids=["access", "comment", "generation"],
)
def test_a_template_that_writes_the_same_of_every_probe_is_a_warning(
    spelled: tuple[str, str], pair: tuple[Path, Path]
) -> None:
    """Tools reformat templates; nothing that the model reads changes."""
    template = (pair[1] / "chat_template.jinja").read_text()
    (pair[0] / "chat_template.jinja").write_text(template.replace(*spelled))
    finding = next(f for f in check_assets(*pair, pair[1]) if f.code == "chat_template_respelled")
    assert (finding.severity, finding.params["probes"]) == ("warning", 2 * len(CONVERSATIONS))


@pytest.mark.parametrize(
    "added",
    [
        "{% if messages[0].role != 'system' %}You are helpful.{% endif %}",
        "{% if messages[0].role == 'system' and not messages[0].content %}?{% endif %}",
        "{% if tools %}{{ tools | tojson }}{% endif %}",
        "{% if not enable_thinking | default(true) %}<think></think>{% endif %}",
        "{{ bos_token }}",
        "{{ strftime_now('%d %B %Y') }}",
        "{% if add_generation_prompt %} {% endif %}",
        "{% if messages | length > 3 %} {% endif %}",
        "{% if messages[-1].role == 'assistant' %} {% endif %}",
        "{% if messages[0].content is not string %} {% endif %}",
    ],
)
def test_the_probes_reach_what_templates_treat_apart(added: str, pair: tuple[Path, Path]) -> None:
    """A default system text, an empty one, tools, thinking, special tokens, dates, turns and parts."""
    for folder in pair:
        edit_json(folder / "tokenizer_config.json", bos_token=SPECIAL[1])
    template = (pair[1] / "chat_template.jinja").read_text()
    (pair[0] / "chat_template.jinja").write_text(template + added)
    assert "chat_template_differs" in problems(*pair)


FEATURES = """
{%- if tools %}{% for tool in tools %}
    {{ tool | tojson(indent=2) }}
{% endfor %}{% endif -%}
  {% for m in messages %}
  {% if m.role == "tool" %}{% continue %}{% endif %}
{% generation %}{{ m.content if m.content is string else m.content[0].text }}{% endgeneration %}
{%- set ns = namespace(n=0) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m.tool_calls | default([]) | tojson }}
  {% endfor %}
{% if messages | length == 2 %}{{ raise_exception("two turns") }}{% endif %}
{{ "<b>&" | tojson }}{% if add_generation_prompt %}{{ eos_token }}{% endif %}
"""


@pytest.mark.parametrize("probe", CONVERSATIONS)
def test_templates_may_use_all_that_transformers_gives_them(probe: dict[str, Any]) -> None:
    """JSON unescaped, loop controls, the mark for training, special tokens, and errors that a template raises."""
    tokens = {"eos_token": "</s>"}
    if len(probe["messages"]) == 2:
        with pytest.raises(TemplateError, match="two turns"):
            render(FEATURES, **probe, **tokens)
        return
    closed, opened = (render(FEATURES, **probe, **tokens, add_generation_prompt=opened) for opened in (False, True))
    assert '"<b>&"' in closed
    assert opened == closed + "</s>"


def test_named_templates_are_compared_too(pair: tuple[Path, Path]) -> None:
    """One for tools in a folder of its own; the usual one is told first."""
    for folder in pair:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages[0].content }}")
    assert problems(*pair) == {}
    named = pair[0] / "additional_chat_templates" / "tool_use.jinja"
    named.write_text("{{ messages[0].content }}!")
    assert problems(*pair)["chat_template_differs"]["name"] == "tool_use"
    named.unlink()
    assert problems(*pair)["chat_template_missing"] == {"name": "tool_use"}


def test_a_missing_template_and_a_template_that_should_not_be_are_differences(pair: tuple[Path, Path]) -> None:
    """Both ways round."""
    (pair[0] / "chat_template.jinja").unlink()
    assert "chat_template_missing" in problems(*pair)
    assert "chat_template_differs" in problems(pair[1], pair[0])


def test_the_template_is_found_in_every_place_where_a_loader_looks(tmp_path: Path) -> None:
    """Its own file goes before the tokenizer's configuration; of several by name the default counts."""
    assert chat_templates(tmp_path).get(DEFAULT) is None
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert chat_templates(tmp_path).get(DEFAULT) == "D"
    edit_json(tmp_path / "tokenizer_config.json", chat_template="C")
    assert chat_templates(tmp_path).get(DEFAULT) == "C"
    edit_json(tmp_path / "tokenizer_config.json", chat_template={"default": "N", "tool_use": "T"})
    assert chat_templates(tmp_path) == {"default": "N", "tool_use": "T"}
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "L"}))
    assert chat_templates(tmp_path).get(DEFAULT) == "L"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert chat_templates(tmp_path) == {"default": "J"}


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
    assert severities == {"end": "error", "heat": "warning"}


def test_without_decoding_settings_it_is_told_what_a_loader_does(pair: tuple[Path, Path]) -> None:
    """It ends where the configuration says; where that is no end of the base's at all, answers do not end."""
    (pair[1] / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [0, 2], "temperature": 0.7, "top_k": 50})
    )
    (pair[0] / "generation_config.json").unlink()
    finding = next(f for f in check_assets(*pair, None) if f.code == "generation_config_missing")
    assert finding.severity == "warning"
    assert dict(finding.params) == {"expected_eos": "[0, 2]", "eos": "[0]", "fields": "temperature"}
    (pair[1] / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    finding = next(f for f in check_assets(*pair, None) if f.code == "generation_config_missing")
    assert finding.severity == "error"


def test_ends_are_a_set_and_defaults_may_be_written_out(pair: tuple[Path, Path]) -> None:
    """The order of the ends is nothing; nor is what a loader takes anyway, the writer's version, or padding."""
    theirs = {"eos_token_id": [0, 2], "do_sample": True, "temperature": 0.7}
    more = {"eos_token_id": [2, 0], "top_p": 1.0, "num_beams": 1, "transformers_version": "5", "pad_token_id": 1}
    (pair[1] / "generation_config.json").write_text(json.dumps(theirs))
    (pair[0] / "generation_config.json").write_text(json.dumps({**theirs, **more}))
    assert problems(*pair) == {}
    (pair[0] / "generation_config.json").write_text(json.dumps({**theirs, "min_p": 0.1}))
    assert problems(*pair)["generation_config_differs"] == {"fields": "min_p"}


def test_an_end_that_a_trainer_added_is_a_warning(pair: tuple[Path, Path]) -> None:
    """Trainers add the tokenizer's own end to the base's; any other one would cut answers short."""
    severities = []
    (pair[1] / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    for ends in ([2, 0], [2, 1], [0]):
        (pair[0] / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        findings = check_assets(*pair, pair[1])
        severities.append(next(f.severity for f in findings if f.code == "generation_config_differs"))
    assert severities == ["warning", "error", "error"]


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
