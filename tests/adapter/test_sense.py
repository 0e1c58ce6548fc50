"""What the figures of an adapter give away; and that a sound one gives away nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.adapter.making import PREFIX, Arrays, Q, V, pair, write_adapter, write_base
from tests.tiny_models import TinyRun
from tunesmith.adapter import Adapter, AdapterFacts, describe
from tunesmith.checkpoint import Checkpoint
from tunesmith.record import Finding
from tunesmith.report import LANGUAGES, finding_text

LAYERS = 6


def facts_of(path: Path, base: Path | None = None) -> AdapterFacts:
    """An adapter's facts."""
    return describe(Adapter(path), Checkpoint(base) if base else None)


def only(facts: AdapterFacts) -> Finding:
    """The one finding, whose text can be had in every language, with all its figures."""
    (finding,) = facts.findings
    for lang in LANGUAGES:
        assert "–" not in finding_text(finding, lang)
    return finding


def layers(*, still: tuple[int, ...] = (), size: float = 1.0, large: int | None = None, r: int = 2) -> Arrays:
    """Two kinds in six layers; in those of ``still`` B of q_proj is zero, and one layer's may be a hundredfold."""
    tensors: Arrays = {}
    for layer in range(LAYERS):
        for kind in ("q_proj", "v_proj"):
            name = f"model.layers.{layer}.self_attn.{kind}"
            one = pair(name, r=r, inputs=32, outputs=32, seed=layer)
            factor = 0 if kind == "q_proj" and layer in still else 100 if layer == large else 1
            one[f"{PREFIX}{name}.lora_B.weight"] *= np.float32(factor * size)
            tensors |= one
    return tensors


def base_of(tmp_path: Path) -> Path:
    """A base whose weights have a norm of 32."""
    path = write_base(tmp_path / "base", {})
    names = [name.removeprefix(PREFIX).replace("lora_A.", "") for name in layers() if "lora_A" in name]
    save_file({name: np.ones((32, 32), np.float32) for name in names}, path / "model.safetensors")
    return path


def test_a_sound_adapter_gives_no_finding(tiny: TinyRun) -> None:
    """Real ones, with their base and without; the tiny run's other one is nearly half as large as its base."""
    final, other = (Adapter(tiny.adapters[name]) for name in ("final", "checkpoint-10"))
    assert describe(final).findings == describe(other).findings == ()
    assert describe(final, Checkpoint(tiny.base)).findings == ()
    assert only(describe(other, Checkpoint(tiny.base))).code == "update_very_large"


def test_modules_that_never_moved_are_counted_by_kind_and_layer(tmp_path: Path) -> None:
    """Frozen layers: the evidence says which."""
    finding = only(facts_of(write_adapter(tmp_path / "a", layers(still=(0, 1, 2, 5)))))
    assert (finding.code, finding.severity) == ("modules_never_moved", "warning")
    assert finding.params == {
        "count": 4,
        "measured": 12,
        "share": pytest.approx(1 / 3),
        "kinds": "q_proj 4/6",
        "layers": "0-2, 5",
    }


def test_a_module_that_hardly_moved_beside_the_others_never_moved(tmp_path: Path) -> None:
    """Not zero, and yet nothing: 1e-8 of what the others changed by; 1e-3 is a change."""
    for size, code in ((1e-8, ["modules_never_moved"]), (1e-3, [])):
        tensors = layers()
        tensors[f"{PREFIX}model.layers.3.self_attn.v_proj.lora_B.weight"] *= np.float32(size)
        facts = facts_of(write_adapter(tmp_path / f"{size}", tensors))
        assert [finding.code for finding in facts.findings] == code


def test_an_adapter_that_changes_nothing_is_told_of_unless_training_had_not_begun(tmp_path: Path) -> None:
    """All of B zero: after training a mistake, before its first step as it must be."""
    tensors = layers(size=0)
    assert only(facts_of(write_adapter(tmp_path / "a", tensors))).code == "update_zero"
    assert facts_of(write_adapter(tmp_path / "checkpoint-0", tensors)).findings == ()


def test_what_a_magnitude_may_have_done_alone_is_not_called_still(tmp_path: Path) -> None:
    """DoRA: B zero, and the magnitude trained."""
    tensors = layers(still=(1,)) | {
        f"{PREFIX}model.layers.{layer}.self_attn.{kind}.lora_magnitude_vector": np.ones(32, np.float32)
        for layer in range(LAYERS)
        for kind in ("q_proj", "v_proj")
    }
    facts = facts_of(write_adapter(tmp_path / "a", tensors, use_dora=True))
    assert [module.moved for module in facts.modules].count(None) == 1
    assert facts.findings == ()


def test_an_adapter_relative_to_another_base_is_not_judged_by_its_size(tmp_path: Path) -> None:
    """PiSSA begins at the base's own largest directions; zero would mean nothing there either."""
    path = write_adapter(tmp_path / "a", layers(size=50, still=(1,)), init_lora_weights="pissa")
    assert facts_of(path, base_of(tmp_path)).findings == ()


@pytest.mark.parametrize(
    ("config", "code", "scaling"),
    [
        ({"lora_alpha": 16}, None, 8.0),
        ({"lora_alpha": 0.5}, None, 0.25),
        ({"lora_alpha": 0.4}, "scaling_low", 0.2),
        ({"lora_alpha": 64}, "scaling_high", 32.0),
        ({"lora_alpha": 11, "use_rslora": True}, None, 11 / math.sqrt(2)),
        ({"lora_alpha": 16, "use_rslora": True}, "rslora_scaling_high", 16 / math.sqrt(2)),
    ],
)
def test_a_scaling_out_of_the_usual_is_told_of(tmp_path: Path, config: Any, code: str | None, scaling: float) -> None:
    """At the bounds it is not; rsLoRA divides by the root, and so has a bound of its own."""
    facts = facts_of(write_adapter(tmp_path / "a", layers(), **config))
    assert [finding.code for finding in facts.findings] == ([code] if code else [])
    if code:
        assert only(facts).params["scaling"] == pytest.approx(scaling)


def test_a_rank_above_the_layers_own_size_is_told_of(tmp_path: Path) -> None:
    """A router of two experts, with r = 3; a rank of its whole size is none too many."""
    router = "model.layers.0.mlp.gate"
    tensors = {**pair(router, r=3, inputs=6, outputs=2), **pair(Q, r=3, inputs=6, outputs=3)}
    finding = only(facts_of(write_adapter(tmp_path / "a", tensors, r=3)))
    assert finding.code == "rank_exceeds_module"
    assert finding.params == {"count": 1, "module": router, "r": 3, "size": 2}


@pytest.mark.parametrize(("used", "told"), [(1, True), (2, True), (8, False)])
def test_a_rank_that_is_hardly_used_is_told_of(tmp_path: Path, used: int, told: bool) -> None:
    """Sixteen dimensions of which one or two do all."""
    tensors = layers(r=16)
    for name, value in tensors.items():
        if "lora_B" in name:
            value[:, used:] *= np.float32(1e-4)
    facts = facts_of(write_adapter(tmp_path / "a", tensors, r=16, lora_alpha=32))
    assert [finding.code for finding in facts.findings] == (["effective_rank_low"] if told else [])
    if told:
        params = only(facts).params
        assert params["r"] == 16
        assert params["effective_rank"] == pytest.approx(used, rel=0.2)
        assert used <= int(str(params["suggested"])) <= 4 * used


@pytest.mark.parametrize(("size", "code"), [(0.0005, None), (0.3, "update_very_large"), (1e-9, "update_negligible")])
def test_an_update_out_of_proportion_is_told_of(tmp_path: Path, size: float, code: str | None) -> None:
    """Against a base whose norm is known."""
    facts = facts_of(write_adapter(tmp_path / "a", layers(size=size)), base_of(tmp_path))
    assert [finding.code for finding in facts.findings] == ([code] if code else [])
    if code:
        assert only(facts).params["relative"] == facts.relative_update


def test_one_layer_far_beyond_the_others_is_named(tmp_path: Path) -> None:
    """All in all the update is small, and one layer is nothing like its base any more."""
    tensors = layers(size=0.001, large=4)
    tensors |= {name: value / 100 for name, value in tensors.items() if ".4." in name and "v_proj.lora_B" in name}
    finding = only(facts_of(write_adapter(tmp_path / "a", tensors), base_of(tmp_path)))
    assert finding.code == "module_update_very_large"
    assert finding.params["module"] == "model.layers.4.self_attn.q_proj"


def test_overlapping_patterns_are_told_of_once(tmp_path: Path) -> None:
    """The file's own findings are among the facts, however many modules they are about."""
    path = write_adapter(tmp_path / "a", {**pair(Q), **pair(V)}, alpha_pattern={"self_attn.*": 2, ".*_proj": 4})
    assert [finding.code for finding in facts_of(path).findings] == ["overlapping_patterns"]
