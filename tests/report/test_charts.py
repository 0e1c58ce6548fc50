"""Charts: the smoothing that LLaMA-Factory's users know, and pictures that draw."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from tunesmith.adapter.records import AdapterFacts
from tunesmith.report import (
    eval_loss_png,
    heatmap_spec,
    loss_png,
    loss_spec,
    smooth,
    to_png,
    to_svg,
    weights_map_spec,
)
from tunesmith.runs import LogRow, Run
from tunesmith.verify import TensorVerdict, Verdict

PNG = b"\x89PNG\r\n\x1a\n"


def test_smoothing_equals_the_closed_form_of_the_moving_average() -> None:
    """s_n = w^n·x_0 + (1−w)·Σ w^(n−k)·x_k, with LLaMA-Factory's weight, written without its recursion."""
    values = [3.08, 2.51, 2.47, 1.9, 2.2, 1.4, 1.31, 0.96]
    weight = 1.8 * (1 / (1 + math.exp(-0.05 * 8)) - 0.5)
    expected = [
        weight ** (n + 1) * values[0] + (1 - weight) * sum(weight ** (n - k) * values[k] for k in range(n + 1))
        for n in range(len(values))
    ]
    assert smooth(values) == pytest.approx(expected, rel=1e-12)
    assert smooth([]) == []


@pytest.mark.parametrize(
    ("losses", "drawn"),
    [
        ([2.0, 1.0], {0: 2.0, 1: 1.0449625374620921}),
        (
            [4.385, 4.0014, 3.5599, 3.4589, 3.387, 3.1831, 3.16, 3.1433, 3.1912, 3.1756, 3.0378, 3.0817],
            {0: 4.385, 1: 4.101972766322787, 6: 3.1825168354118727, 10: 3.0743229628040565, 11: 3.0797658784200674},
        ),
        (
            [round(3 / (1 + i / 20) + ((i * 7919) % 13 - 6) / 20, 4) for i in range(200)],
            {1: 2.695706494376579, 100: 0.5348124789303484, 198: 0.2634146568853911, 199: 0.27448222780684883},
        ),
    ],
    ids=["two", "demo", "long"],
)
def test_smoothing_equals_llama_factorys(losses: list[float], drawn: dict[int, float]) -> None:
    """What ``llamafactory.extras.ploting.smooth`` of LLaMA-Factory 0.9.5 returned for these losses."""
    smoothed = smooth(losses)
    assert len(smoothed) == len(losses)
    assert {place: smoothed[place] for place in drawn} == pytest.approx(drawn, rel=1e-14)


def test_the_loss_chart_draws_every_logged_loss_and_every_checkpoint(run: Run) -> None:
    """Sixty training losses, as many smoothed ones, six held-out losses and three rules."""
    spec = loss_spec(run)
    assert spec is not None
    assert [len(layer["data"]["values"]) for layer in spec["layer"]] == [3, 60, 60, 6]


def test_losses_that_are_not_finite_are_left_out_of_the_chart(run: Run) -> None:
    """A specification is JSON, which has no NaN."""
    broken = (LogRow(step=61, loss=math.nan, sources=("log",)), LogRow(step=62, eval_loss=math.inf, sources=("log",)))
    spec = loss_spec(run.model_copy(update={"log": run.log + broken}))
    assert spec == loss_spec(run)
    json.dumps(spec, allow_nan=False)


def test_a_run_without_a_log_has_no_loss_chart(run: Run) -> None:
    """Nothing is drawn rather than an empty frame."""
    bare = run.model_copy(update={"log": ()})
    assert loss_spec(bare) is None
    assert loss_png(bare) is None
    assert eval_loss_png(bare) is None


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_an_svg_takes_its_ink_from_the_page(run: Run, lang: str) -> None:
    """Text is drawn in currentColor, so one picture is readable on dark and on light."""
    spec = loss_spec(run, lang)
    assert spec is not None
    root = ElementTree.fromstring(to_svg(spec))  # noqa: S314 - our own drawing
    inks = {node.get("fill") for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert inks == {"currentColor"}


def test_two_charts_in_one_document_share_no_id(good_verdict: Verdict, adapter: AdapterFacts) -> None:
    """A gradient of one chart must not colour the legend of another."""
    ids = []
    for source in (good_verdict, adapter):
        spec = heatmap_spec(source)
        assert spec is not None
        svg = to_svg(spec)
        ids.append({part.split('"')[0] for part in svg.split(' id="')[1:]})
        assert all(f"url(#{name})" in svg or f'href="#{name}"' in svg for name in ids[-1])
    assert ids[0]
    assert not ids[0] & ids[1]


def test_the_heatmap_has_a_cell_for_every_adapted_module(bad_verdict: Verdict) -> None:
    """Thirty layers by seven modules; tensors that the adapter does not touch are no cells."""
    spec = heatmap_spec(bad_verdict)
    assert spec is not None
    cells, gaps = (layer["data"]["values"] for layer in spec["layer"])
    assert len(cells) == 210
    assert gaps == []
    assert {cell["value"] for cell in cells if cell["layer"] == 1} == {1.0}


def test_the_heatmap_crosses_where_a_merge_holds_no_finite_number(bad_verdict: Verdict) -> None:
    """The worst of all must not look as if it had not been measured, nor stretch the scale."""
    first, *rest = bad_verdict.tensors
    ruined = first.model_copy(update={"relative_error": math.inf})
    spec = heatmap_spec(bad_verdict.model_copy(update={"tensors": (ruined, *rest)}))
    assert spec is not None
    cells, gaps, crosses = (layer["data"]["values"] for layer in spec["layer"])
    assert (len(cells), gaps, len(crosses)) == (209, [], 1)
    assert crosses[0] not in [{"layer": cell["layer"], "module": cell["module"]} for cell in cells]


def test_the_heatmap_hatches_where_there_is_no_adapter(adapter: AdapterFacts) -> None:
    """A module that one layer lacks is a gap, not a zero."""
    spec = heatmap_spec(adapter.model_copy(update={"modules": adapter.modules[1:]}))
    assert spec is not None
    assert spec["layer"][1]["data"]["values"] == [{"layer": 0, "module": "self_attn.q_proj"}]


def test_the_heatmap_crosses_what_never_moved_and_leaves_blank_what_was_not_measured(adapter: AdapterFacts) -> None:
    """Neither is a gap, and neither stretches the scale of colours down to nothing."""
    still, unread, *rest = adapter.modules
    still = still.model_copy(update={"delta_norm": 1e-9, "moved": False})
    unread = unread.model_copy(update={"delta_norm": None, "base_norm": None})
    spec = heatmap_spec(adapter.model_copy(update={"modules": (still, unread, *rest)}))
    assert spec is not None
    cells, gaps, crosses = (layer["data"]["values"] for layer in spec["layer"])
    assert len(cells) == len(rest)
    assert gaps == []
    assert crosses == [{"layer": 0, "module": "self_attn.q_proj"}]
    assert spec["layer"][0]["encoding"]["color"]["scale"]["domain"][0] == 0.001


def test_an_adapter_without_base_norms_has_no_heatmap(adapter: AdapterFacts) -> None:
    """Without the base there is no proportion to show."""
    modules = tuple(module.model_copy(update={"base_norm": None}) for module in adapter.modules)
    assert heatmap_spec(adapter.model_copy(update={"modules": modules})) is None


def fields_of(verdict: Verdict) -> list[dict[str, Any]]:
    """Every field of the map of the weights, cells and bars; each is drawn once, crosses aside."""
    spec = weights_map_spec(verdict)
    assert spec is not None
    assert spec["resolve"]["scale"]["color"] == "independent"  # blue and red are two scales
    return [row for layer in spec["layer"] if layer["mark"]["type"] == "rect" for row in layer["data"]["values"]]


def tensor(name: str, **counts: int) -> TensorVerdict:
    """A tensor of a thousand numbers, exact where nothing else is said."""
    rest = {"faithful": 0, "twice_rounded": 0, "outside": 0, **counts}
    return TensorVerdict(name=name, module=None, elements=1000, exact=1000 - sum(rest.values()), unchanged=0, **rest)


def test_the_map_of_the_weights_has_a_field_for_every_module_and_one_for_a_layers_norms(good_verdict: Verdict) -> None:
    """Thirty layers by seven modules and norms, also where all is calm: there are no crosses then."""
    fields = fields_of(good_verdict)
    assert len(fields) == 30 * 7 + 31
    assert {field["outside"] for field in fields} == {0.0}
    assert all(field["other"] == pytest.approx(31 / 331_776) for field in fields if field["module"] == "q_proj")
    spec = weights_map_spec(good_verdict)
    assert spec is not None
    assert "text" not in {layer["mark"]["type"] for layer in spec["layer"]}


def test_numbers_that_nothing_explains_are_drawn_in_alarm_and_crossed(bad_verdict: Verdict) -> None:
    """One number of many is enough."""
    one = tensor("model.layers.2.mlp.down_proj.weight", outside=1)
    verdict = bad_verdict.model_copy(update={"tensors": (one, tensor("model.layers.2.mlp.up_proj.weight"))})
    spec = weights_map_spec(verdict)
    assert spec is not None
    calm, alarm, cross = spec["layer"]
    assert [row["module"] for row in calm["data"]["values"]] == ["up_proj"]
    assert [(row["row"], row["module"]) for row in alarm["data"]["values"]] == [("2", "down_proj")]
    assert cross["data"] == alarm["data"]
    assert (cross["mark"]["type"], cross["mark"]["text"]) == ("text", "×")
    assert calm["encoding"]["color"]["scale"] != alarm["encoding"]["color"]["scale"]


def test_experts_of_a_layer_share_a_field_of_the_map(good_verdict: Verdict) -> None:
    """Of four experts, one is half wrong and one took neighbours: shares are of all their numbers."""
    experts = [
        tensor("model.layers.0.mlp.experts.0.up_proj.weight", outside=500),
        tensor("model.layers.0.mlp.experts.1.up_proj.weight", faithful=200, twice_rounded=40),
        tensor("model.layers.0.mlp.experts.2.up_proj.weight"),
        tensor("model.layers.0.mlp.experts.3.up_proj.weight"),
        tensor("model.layers.0.mlp.shared_expert.up_proj.weight"),
    ]
    fields = fields_of(good_verdict.model_copy(update={"tensors": tuple(experts)}))
    assert sorted((field["module"], field["outside"], field["other"]) for field in fields) == [
        ("experts.up_proj", 0.125, 0.06),
        ("shared_expert.up_proj", 0.0, 0.0),
    ]


def test_what_lies_outside_of_the_layers_is_a_bar_embeddings_first_and_the_head_last(good_verdict: Verdict) -> None:
    """In the order in which the model computes, whatever the order of the file."""
    names = ("lm_head.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight")
    verdict = good_verdict.model_copy(update={"tensors": tuple(tensor(name) for name in names)})
    spec = weights_map_spec(verdict)
    assert spec is not None
    assert spec["layer"][0]["encoding"]["y"]["scale"]["domain"] == ["embed_tokens", "0", "norm", "lm_head"]


def test_a_verdict_without_the_weights_has_no_map(good_verdict: Verdict) -> None:
    """Nothing is drawn rather than an empty frame."""
    assert weights_map_spec(good_verdict.model_copy(update={"tensors": ()})) is None


@pytest.mark.parametrize("layers", [1, 80])
def test_a_map_stays_drawable_for_models_of_any_depth(layers: int, good_verdict: Verdict) -> None:
    """Eighty layers take lower rows and fewer labels."""
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(layers)]
    spec = weights_map_spec(good_verdict.model_copy(update={"tensors": tuple(tensor(name) for name in names)}))
    assert spec is not None
    root = ElementTree.fromstring(to_svg(spec))  # noqa: S314 - our own drawing
    assert float(root.attrib["height"]) < 1000
    labels = {node.text for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {str(layer) for layer in range(0, layers, 5)} <= labels


def test_pictures_are_png(run: Run) -> None:
    """The two pictures that a run directory holds, and any chart on request."""
    spec = loss_spec(run)
    assert spec is not None
    for picture in (loss_png(run), eval_loss_png(run), to_png(spec, scale=1)):
        assert picture is not None
        assert picture.startswith(PNG)
