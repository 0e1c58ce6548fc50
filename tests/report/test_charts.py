"""Charts: the smoothing that LLaMA-Factory's users know, and pictures that draw."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree

import pytest

from tunesmith.adapter.records import AdapterFacts
from tunesmith.report import eval_loss_png, heatmap_spec, loss_png, loss_spec, smooth, to_png, to_svg
from tunesmith.runs import LogRow, Run
from tunesmith.verify import Verdict

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


def test_the_loss_chart_draws_every_logged_loss_and_every_checkpoint(run: Run) -> None:
    """Sixty training losses, as many smoothed ones, six held-out losses and three rules."""
    spec = loss_spec(run)
    assert spec is not None
    assert [len(layer["data"]["values"]) for layer in spec["layer"]] == [3, 60, 60, 6]


def test_losses_that_are_not_finite_are_left_out_of_the_chart(run: Run) -> None:
    """A specification is JSON, which has no NaN."""
    broken = (LogRow(step=61, loss=math.nan, source="log"), LogRow(step=62, eval_loss=math.inf, source="log"))
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


def test_the_heatmap_hatches_where_there_is_no_adapter(adapter: AdapterFacts) -> None:
    """A module that one layer lacks is a gap, not a zero."""
    spec = heatmap_spec(adapter.model_copy(update={"modules": adapter.modules[1:]}))
    assert spec is not None
    assert spec["layer"][1]["data"]["values"] == [{"layer": 0, "module": "self_attn.q_proj"}]


def test_an_adapter_without_base_norms_has_no_heatmap(adapter: AdapterFacts) -> None:
    """Without the base there is no proportion to show."""
    modules = tuple(module.model_copy(update={"base_norm": None}) for module in adapter.modules)
    assert heatmap_spec(adapter.model_copy(update={"modules": modules})) is None


def test_pictures_are_png(run: Run) -> None:
    """The two pictures that a run directory holds, and any chart on request."""
    spec = loss_spec(run)
    assert spec is not None
    for picture in (loss_png(run), eval_loss_png(run), to_png(spec, scale=1)):
        assert picture is not None
        assert picture.startswith(PNG)
