"""adapter_config.json: nothing of it is skipped in silence, and scaling is PEFT's own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest

from tests.adapter.making import Q, V, pair, write_adapter
from tests.tiny_models import TinyRun, build_adapter, peft_alone
from tunesmith.adapter import Adapter
from tunesmith.adapter.bind import replicated_layers
from tunesmith.adapter.config import HARMLESS, REFUSED, USED, Scaling, listed, refusals, residual_init
from tunesmith.errors import AdapterError, UnsupportedAdapterError

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}


def test_every_field_of_the_installed_peft_is_in_exactly_one_table() -> None:
    """Fails when PEFT adds a field: then somebody has to say what it means for a merge."""
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields - (USED | HARMLESS | REFUSED.keys()) == set()
    assert set() == USED & HARMLESS
    assert (USED | HARMLESS) & REFUSED.keys() == set()


@pytest.mark.parametrize("field", REFUSED)
def test_each_refused_field_refuses_with_its_meaning(tmp_path: Path, field: str) -> None:
    """Through the door that a merge takes; the reason names the field, its value and what it is."""
    adapter = Adapter(write_adapter(tmp_path / "a", **{field: True}))
    with pytest.raises(UnsupportedAdapterError) as caught:
        adapter.require_mergeable()
    assert [line for line in caught.value.details if line.startswith(f"{field} = ") and REFUSED[field] in line]


@pytest.mark.parametrize("field", REFUSED)
def test_a_refused_field_that_says_nothing_is_no_reason(field: str) -> None:
    """PEFT writes every field, most of them empty."""
    for nothing in (None, False, [], {}, ""):
        assert refusals({**PLAIN, field: nothing}) == []


def test_a_bias_that_peft_does_not_know_is_refused() -> None:
    """The three that it knows are the tensors' to tell."""
    for known in (None, "none", "all", "lora_only"):
        assert refusals({**PLAIN, "bias": known}) == []
    assert "bias = 'some'" in refusals({**PLAIN, "bias": "some"})[0]


def test_a_plain_config_as_peft_writes_it_is_merged(tmp_path: Path) -> None:
    """All of the installed PEFT's defaults, through its own writer."""
    peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    import json

    assert refusals(json.loads((tmp_path / "adapter_config.json").read_text())) == []


def test_an_unknown_field_that_says_something_is_refused() -> None:
    """A newer PEFT may mean by it what changes the merge; where it is empty it means nothing."""
    (reason,) = refusals({**PLAIN, "use_hyperlora": True})
    assert "use_hyperlora = True" in reason
    assert refusals({**PLAIN, "use_hyperlora": False, "hyper_config": None}) == []


OTHER_TYPES = sorted(str(kind.value) for kind in peft.PeftType if kind.value != "LORA")


@pytest.mark.parametrize("kind", [*OTHER_TYPES, None, 3])
def test_other_methods_are_refused_by_name(kind: object) -> None:
    """Every method of the installed PEFT but LoRA."""
    (reason,) = refusals({"peft_type": kind, "use_dora": True})
    assert repr(kind) in reason


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "new", ["x"]])
def test_an_init_on_a_changed_base_is_told(init: object) -> None:
    """B·A is then relative to what is left of the base; unknown inits are taken for such."""
    assert residual_init({**PLAIN, "init_lora_weights": init}) == f"init_lora_weights = {init!r}"


@pytest.mark.parametrize("init", [None, True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_an_init_that_leaves_the_base_alone_is_merged(init: object) -> None:
    """These only choose where training starts; so do settings of a method that was not chosen."""
    assert residual_init({**PLAIN, "init_lora_weights": init, "lora_ga_config": {"scale": "stable"}}) is None
    assert refusals({**PLAIN, "init_lora_weights": init}) == []


def test_settings_of_a_changed_base_without_a_choice_are_told() -> None:
    """A configuration that leaves the choice out, but configures LoftQ."""
    assert residual_init({**PLAIN, "loftq_config": {"loftq_bits": 4}}) == "loftq_config = {'loftq_bits': 4}"


CONFIGS: dict[str, dict[str, Any]] = {
    "alpha over r": {"r": 4, "lora_alpha": 8},
    "alpha that r does not divide": {"r": 3, "lora_alpha": 7},
    "rslora": {"r": 3, "lora_alpha": 7, "use_rslora": True},
    "a rank pattern": {"rank_pattern": {"q_proj": 2}},
    "an alpha pattern": {"alpha_pattern": {"v_proj": 5}},
    "both, and rslora": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\..*\.v_proj": 6},
        "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 3, "down_proj": 32},
        "use_rslora": True,
    },
    "a whole name": {"rank_pattern": {"model.layers.1.mlp.down_proj": 1}},
    "an anchored name": {"alpha_pattern": {"^model.layers.1.mlp.down_proj": 9}},
    "an end that is not a whole part": {"rank_pattern": {"proj": 2}, "alpha_pattern": {"_proj": 3}},
    "a pattern that fits nothing": {"alpha_pattern": {"o_proj": 3}},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_rank_and_scaling_are_pefts_own(tiny: TinyRun, tmp_path: Path, name: str) -> None:
    """Against the live layers of the installed PEFT, module by module."""
    from transformers import LlamaForCausalLM

    path = build_adapter(tiny.base, tmp_path / "a", seed=3, **CONFIGS[name])
    live = peft_alone(LlamaForCausalLM.from_pretrained(tiny.base), path)
    theirs = {
        module.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
        for module, layer in live.named_modules()
        if hasattr(layer, "lora_A")
    }
    adapter = Adapter(path)
    adapter.require_mergeable()
    assert {adapted.module: (adapted.r, adapted.scaling) for adapted in adapter.adapted} == theirs
    assert len(theirs) == 6


def test_patterns_that_overlap_are_told(tmp_path: Path) -> None:
    """Saved JSON is sorted by key, so training may have resolved them the other way; agreeing ones are no matter."""
    patterns = {"q_proj": 4, r"layers\.0\..*": 6}
    adapter = Adapter(write_adapter(tmp_path / "a", pair(Q), alpha_pattern=patterns))
    assert [finding.code for finding in adapter.findings] == ["overlapping_patterns"]
    assert adapter.findings[0].params == {"module": Q}
    assert adapter.adapted[0].scaling == 2.0
    same = Adapter(write_adapter(tmp_path / "b", pair(Q), alpha_pattern=dict.fromkeys(patterns, 4)))
    assert same.findings == []
    other = Adapter(write_adapter(tmp_path / "c", pair("model.x.v_proj"), alpha_pattern=patterns))
    assert other.findings == []


@pytest.mark.parametrize("field", ["r", "lora_alpha"])
@pytest.mark.parametrize("value", [None, 0, -1, "8", True, [8], float("nan"), float("inf")])
def test_a_number_that_is_none_is_refused_by_its_name(field: str, value: object) -> None:
    """Rather than a scaling of nonsense."""
    with pytest.raises(AdapterError) as caught:
        Scaling({**PLAIN, field: value})
    assert str(caught.value.where).endswith(field)


@pytest.mark.parametrize("table", [[1], "x", {"(": 1}, {"q": None}, {"q": "much"}, {"q": [1]}, {"q": float("nan")}])
def test_a_pattern_table_that_is_none_is_refused(table: object) -> None:
    """Of another type, with a broken pattern, or without a number."""
    for field in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(AdapterError) as caught:
            Scaling({**PLAIN, field: table})
        assert caught.value.where == field


@pytest.mark.parametrize("pattern", [r"(([a-z0-9_]|\.)*)*!", "(q+)+$", "(q{1,9})*x"])
def test_a_pattern_that_could_take_for_ever_is_refused(pattern: str) -> None:
    """A configuration from anywhere must not hang whoever looks at it."""
    with pytest.raises(AdapterError, match="for ever"):
        Scaling({**PLAIN, "rank_pattern": {pattern: 4}})
    Scaling({**PLAIN, "rank_pattern": {r"^model\.layers\.(0|1|2)\..*(q|v)_proj$": 4}})


@pytest.mark.parametrize("field", ["modules_to_save", "target_parameters"])
@pytest.mark.parametrize("value", [3, {"a": 1}, [1], [None]])
def test_a_list_of_names_that_is_none_is_refused(field: str, value: object) -> None:
    """One name alone is taken for a list of one."""
    with pytest.raises(AdapterError, match="list of names"):
        listed({field: value}, field)
    assert listed({field: "lm_head"}, field) == ["lm_head"]
    assert listed({field: None}, field) == []


@pytest.mark.parametrize(
    "value", [[None], {"q": -1}, [[0, 1.5]], ["ab"], [[0, 10**7]], [[3, 1]], [[-1, 2]], 5, [[0, 1, 2]]]
)
def test_a_layer_replication_that_is_none_is_refused(tmp_path: Path, value: object) -> None:
    """Also one of more layers than memory has room for."""
    adapter = Adapter(write_adapter(tmp_path / "a", layer_replication=value))
    with pytest.raises(AdapterError, match="layer_replication"):
        replicated_layers(adapter)


def test_a_whole_number_as_a_float_is_the_same_number() -> None:
    """YAML and hand-written files hold 8.0."""
    scaling = Scaling({**PLAIN, "r": 8.0, "lora_alpha": 16.0, "rank_pattern": {"v_proj": 4.0}})
    assert (scaling.rank(Q), scaling.rank(V), scaling.scaling(Q, 8)) == (8, 4, 2.0)
