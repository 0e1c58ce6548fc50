"""Charts: one Vega-Lite specification each, the same on paper, in the report and in the page."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tunesmith.adapter.records import READING_ORDER, AdapterFacts
from tunesmith.compare import CheckpointChoice, Drift, Evaluation
from tunesmith.models import BASE
from tunesmith.report.escaping import visible
from tunesmith.report.evaluation import (
    SECTIONS,
    MeasureRow,
    measure_name,
    measure_rows,
    only_variant,
    shown,
    shown_interval,
)
from tunesmith.report.texts import text
from tunesmith.report.units import human_bytes
from tunesmith.runs import Run
from tunesmith.verify import Verdict

Spec = dict[str, Any]
Points = list[tuple[int, float]]

_SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json"
_VEGA_LITE = "5.21"
_VERDICTS = {  # colour, shape, and whether it is filled: none of them alone has to be told apart
    "better": ("#3f9b6c", "triangle-up", True),
    "worse": ("#d9534a", "triangle-down", True),
    "different": ("#4c7fd9", "diamond", True),
    "no_difference": ("#8b949e", "circle", False),
    "unknown": ("#8b949e", "square", False),
}
_LONGEST_NAME = 28  # characters of a label
_FONT = "PingFang SC, Microsoft YaHei, Noto Sans CJK SC, sans-serif"
# Ink becomes currentColor in an SVG; the other hues read on white and on near-black alike.
_INK = "#24292f"
_TRAIN = "#4c7fd9"
_TRAIN_RAW = "#8fa9d0"
_QUIET = "#8b949e"
_HELD_OUT = "#d0812c"
_FIELD = ("#dce7f7", "#2456a8")
_ALARM = ("#e2685e", "#a31a12")
_CALM = ("rgba(76,127,217,0.15)", "rgba(52,104,200,1)")  # lets the page through, light or dark
_MOST_OTHER = 0.5  # no way of rounding takes the further neighbour more often than the nearer
_LAYERS_AT_EASE = 40  # up to so many, a row is high enough for its label
_HATCH = "M-1,0.2L-0.2,1M-1,-0.6L0.6,1M-0.6,-1L1,0.6M0.2,-1L1,-0.2"
_CROSS = "M-0.6,-0.6L0.6,0.6M-0.6,0.6L0.6,-0.6"
_HATCH_STYLE = {"size": 150, "strokeWidth": 1, "color": _INK, "opacity": 0.3}
_FIRST_NUMBER = re.compile(r"^(?:.*?\.)??(\d+)\.(.+)$")
_ID = re.compile(r'\bid="([^"]+)"')
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_PARAMETER = re.compile(r"\.(?:weight|bias)$")
_FURTHER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def smooth(values: Sequence[float]) -> list[float]:
    """The exponential moving average that LLaMA-Factory draws.

    Its weight grows with the number of points: 1.8·(σ(0.05·n) − ½).

    Source: LLaMA-Factory, ``src/llamafactory/extras/ploting.py``, ``smooth``.
    """
    if not values:
        return []
    weight = 1.8 * (1 / (1 + math.exp(-0.05 * len(values))) - 0.5)
    smoothed, last = [], values[0]
    for value in values:
        last = last * weight + (1 - weight) * value
        smoothed.append(last)
    return smoothed


def loss_spec(run: Run, lang: str = "en") -> Spec | None:
    """The loss curve: training as logged and smoothed, held-out loss, and a rule at every saved checkpoint.

    Args:
        run: the run; losses that are not finite are left out.
        lang: language of its labels.

    Returns:
        A Vega-Lite specification, or None where no loss was logged.
    """
    train = _finite((row.step, row.loss) for row in run.log)
    held_out = _finite((row.step, row.eval_loss) for row in run.log)
    if not train and not held_out:
        return None
    step = text("chart.step", lang)
    series = [
        ("checkpoint", _QUIET, _checkpoint_layer(run, step)),
        ("train", _TRAIN_RAW, _curve(train, {"type": "line", "strokeWidth": 1})),
        ("smoothed", _TRAIN, _curve(_smoothed(train), {"type": "line", "strokeWidth": 2.25})),
        (
            "eval",
            _HELD_OUT,
            _curve(held_out, {"type": "line", "strokeWidth": 1.75, "point": {"size": 42, "filled": True}}),
        ),
    ]
    drawn = [(text(f"chart.loss.{name}", lang), color, layer) for name, color, layer in series if layer]
    # Checkpoints are drawn first, under the curves, and named last.
    named = drawn[1:] + drawn[:1] if series[0][2] else drawn
    scale = {"domain": [name for name, _, _ in named], "range": [color for _, color, _ in named]}
    for name, _, layer in drawn:
        layer["encoding"]["color"] = {"datum": name, "type": "nominal", "scale": scale}
        layer["encoding"]["x"] |= {"title": step, "axis": {"tickMinStep": 1, "tickCount": 10, "grid": False}}
        if "y" in layer["encoding"]:
            layer["encoding"]["y"]["title"] = text("chart.loss.y", lang)
    return _chart({"width": 800, "height": 250, "layer": [layer for _, _, layer in drawn]})


def choice_spec(choice: CheckpointChoice, lang: str = "en") -> Spec | None:
    """Held-out loss by step with 95 % intervals, the base as a line across, and the recommended checkpoint filled.

    Args:
        choice: which checkpoint to take.
        lang: language of its labels.

    Returns:
        A Vega-Lite specification, or None where fewer than two checkpoints were scored.
    """
    points = [
        {
            "step": one.step,
            "loss": one.loss.value,
            "low": one.loss.value if one.loss.low is None else one.loss.low,
            "high": one.loss.value if one.loss.high is None else one.loss.high,
            "taken": one.name == choice.recommended,
        }
        for one in choice.candidates
        if one.step is not None and one.loss is not None and one.same_as is None and math.isfinite(one.loss.value)
    ]
    base = next((one.loss.value for one in choice.candidates if one.name == BASE and one.loss), None)
    if len(points) < 2:
        return None
    x = {"field": "step", "type": "quantitative", "title": text("chart.step", lang), "scale": {"zero": False}}
    y = {"field": "loss", "type": "quantitative", "title": text("chart.loss.y", lang), "scale": {"zero": False}}
    fill = {"condition": {"test": "datum.taken", "value": _HELD_OUT}, "value": "transparent"}
    layers: list[Spec] = [
        {"mark": {"type": "line", "strokeWidth": 1.5, "color": _HELD_OUT}, "encoding": {"x": x, "y": y}},
        {
            "mark": {"type": "rule", "strokeWidth": 1.5, "color": _HELD_OUT, "opacity": 0.55},
            "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}},
        },
        {
            "mark": {"type": "point", "size": 90, "stroke": _HELD_OUT, "strokeWidth": 2, "opacity": 1},
            "encoding": {"x": x, "y": y, "fill": fill},
        },
    ]
    if base is not None and math.isfinite(base):
        across = {"y": {"datum": base, "type": "quantitative", "scale": {"zero": False}}}
        words = {
            "type": "text",
            "text": text("chart.choice.base", lang),
            "align": "left",
            "dx": 6,
            "dy": -7,
            "color": _INK,
        }
        layers += [
            {
                "data": {"values": [{}]},
                "mark": {"type": "rule", "strokeDash": [4, 4], "color": _QUIET},
                "encoding": across,
            },
            {"data": {"values": [{}]}, "mark": words, "encoding": {**across, "x": {"value": 0}}},
        ]
    return _chart({"width": 800, "height": 200, "data": {"values": points}, "layer": layers})


def evaluation_spec(evaluation: Evaluation, lang: str = "en") -> Spec | None:
    """Every difference to the base with its 95 % interval, about a line at zero: better is right of it, worse left.

    Differences of one unit share a scale within their section; units cannot be compared with each other.

    Args:
        evaluation: the evaluation; what is not finite is left out.
        lang: language of its labels.

    Returns:
        A Vega-Lite specification, or None where no difference was taken.
    """
    several = only_variant(evaluation) is None
    fields = []
    for section in SECTIONS:
        rows = [row for row in measure_rows(evaluation, section) if row.figure.difference]
        points = _interval_points(rows, lang, several=several)
        if points:
            fields.append(_interval_field(points, text(f"evaluation.section.{section}", lang)))
    if not fields:
        return None
    sides = {"data": {"values": [{}]}, "width": 480, "height": 14, "layer": _sides(lang)}
    spec = _chart({"vconcat": [sides, *fields], "spacing": 14})
    spec["config"]["axis"]["labelLimit"] = 0
    return spec


def _interval_points(rows: Sequence[MeasureRow], lang: str, *, several: bool) -> list[Spec]:
    """Lines of the chart, turned and scaled: −1 to 1, better to the right."""
    widest: dict[str, float] = {}
    finite = []
    for row in rows:
        change = row.figure.difference
        ends = [end for end in (change.value, change.low, change.high) if end is not None] if change else []
        if change and all(map(math.isfinite, ends)):
            widest[row.measure.unit] = max([widest.get(row.measure.unit, 0.0), *map(abs, ends)])
            finite.append((row, change))
    points = []
    for row, change in finite:
        turn = (-1 if row.measure.higher_is_better is False else 1) / (widest[row.measure.unit] or 1.0)
        name = _shortened(measure_name(row.measure, lang))
        interval = "" if row.interval is None else f" ({shown_interval(row, lang)})"
        told = f"{shown(row.measure, 'change', lang, value=change.value)}{interval}"
        points.append(
            {
                "name": f"{name} · {_shortened(row.figure.variant)}" if several else name,
                "at": turn * change.value,
                "low": turn * (change.value if change.low is None else change.low),
                "high": turn * (change.value if change.high is None else change.high),
                "verdict": row.figure.verdict or "unknown",
                "told": told.replace("-", "−"),
            }
        )
    return points


def _interval_field(points: list[Spec], title: str) -> Spec:
    """One section: a line a difference, in the order of the tables."""
    names = list(dict.fromkeys(point["name"] for point in points))
    bare = {"domain": False, "ticks": False, "title": None}
    y = {"field": "name", "type": "ordinal", "scale": {"domain": names}, "axis": {**bare, "minExtent": 170}}
    scale = {"domain": [-1.08, 1.08], "nice": False}
    x = {"field": "at", "type": "quantitative", "scale": scale, "axis": None}
    domain = list(_VERDICTS)
    of_verdict = {"field": "verdict", "type": "nominal", "legend": None}
    color = {**of_verdict, "scale": {"domain": domain, "range": [_VERDICTS[name][0] for name in domain]}}
    shape = {**of_verdict, "scale": {"domain": domain, "range": [_VERDICTS[name][1] for name in domain]}}
    hollow = " || ".join(f"datum.verdict == '{name}'" for name in domain if not _VERDICTS[name][2])
    fill = {"condition": {"test": hollow, "value": "transparent"}, **color}
    zero = {"data": {"values": [{"at": 0}]}, "mark": {"type": "rule", "strokeDash": [4, 4], "color": _QUIET}}
    return {
        "width": 480,
        "height": 22 * len(names),
        "title": {"text": title, "anchor": "start", "fontSize": 12, "fontWeight": 600, "frame": "bounds"},
        "data": {"values": points},
        "layer": [
            {**zero, "encoding": {"x": x}},
            {
                "mark": {"type": "rule", "strokeWidth": 4, "opacity": 0.4, "strokeCap": "round"},
                "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}, "y": y, "color": color},
            },
            {
                "mark": {"type": "point", "size": 80, "opacity": 1, "strokeWidth": 1.75},
                "encoding": {"x": x, "y": y, "stroke": color, "fill": fill, "shape": shape},
            },
            {
                "mark": {"type": "text", "align": "left", "color": _INK, "opacity": 0.85, "fontSize": 11},
                "encoding": {"x": {"value": 492}, "y": y, "text": {"field": "told"}},
            },
        ],
    }


def _sides(lang: str) -> list[Spec]:
    """What lies left and right of the line."""
    drawn = []
    for place, align, key in ((234, "right", "worse"), (246, "left", "better")):
        mark = {"type": "text", "align": align, "color": _INK, "opacity": 0.75, "fontSize": 11}
        words = text(f"evaluation.chart.{key}", lang)
        drawn.append({"mark": {**mark, "text": words}, "encoding": {"x": {"value": place}, "y": {"value": 7}}})
    return drawn


def drift_spec(drift: Drift, lang: str = "en") -> Spec | None:
    """KL to the live adapter on a log scale, a line a model, in domain and on general texts, with 95 % intervals.

    Args:
        drift: the models, in their order; figures that are not finite or not above 0 are left out.
        lang: language of its labels.

    Returns:
        A Vega-Lite specification, or None where no model has a figure to draw.
    """
    points = _drift_points(drift, lang)
    if not any(point["kind"] != BASE for point in points):
        return None
    domain = _decades([end for point in points for end in (point["kl"], point["high"])] + [drift.kl_at_most])
    for point in points:  # a log scale has no 0
        point["low"] = max(point["low"], domain[0])
    decades = range(round(math.log10(domain[0])), round(math.log10(domain[1])) + 1)
    x = {
        "type": "quantitative",
        "title": text("chart.drift.x", lang),
        "scale": {"type": "log", "domain": domain, "nice": False},
        "axis": {"format": "~g", "values": [10.0**place for place in decades]},
    }
    names = list(dict.fromkeys(point["label"] for point in points))
    y = {
        "field": "label",
        "type": "ordinal",
        "scale": {"domain": names},
        "axis": {"title": None, "domain": False, "ticks": False, "grid": True},
    }
    layers = _drift_limit(drift, x, lang)
    for name in ("in_domain", "general"):
        layers += _drift_series([point for point in points if point["set"] == name], x, y, drift, lang)
    spec = _chart({"width": 640, "height": 30 * len(names), "layer": layers})
    spec["config"]["axis"]["labelLimit"] = 0
    return spec


def _drift_limit(drift: Drift, x: Spec, lang: str) -> list[Spec]:
    """What the advice asks of general texts, as a line across with its name."""
    values, at = {"values": [{"at": drift.kl_at_most}]}, {"x": {**x, "field": "at"}}
    low, high = x["scale"]["domain"]
    side = ("right", -4) if drift.kl_at_most > math.sqrt(low * high) else ("left", 4)  # where there is more room
    words = {"type": "text", "baseline": "bottom", "align": side[0], "dx": side[1]}
    words |= {"text": text("chart.drift.limit", lang), "color": _INK, "opacity": 0.75}
    return [
        {"data": values, "mark": {"type": "rule", "strokeDash": [4, 4], "color": _QUIET}, "encoding": at},
        {"data": values, "mark": words, "encoding": {**at, "y": {"value": -2}}},
    ]


def _drift_points(drift: Drift, lang: str) -> list[Spec]:
    points = []
    for row in drift.rows:
        label = f"{_shortened(row.name)} · {human_bytes(row.model.size_bytes)}"
        for name, departure in (("in_domain", row.in_domain), ("general", row.general)):
            kl = departure.kl if departure else None
            if kl is None or not math.isfinite(kl.value) or kl.value <= 0:
                continue
            points.append(
                {
                    "kind": row.model.kind,
                    "label": label,
                    "set": name,
                    "texts": text(f"chart.drift.{name}", lang),
                    "kl": kl.value,
                    "low": kl.value if kl.low is None else kl.low,
                    "high": kl.value if kl.high is None else kl.high,
                }
            )
    return points


def _drift_series(points: list[Spec], x: Spec, y: Spec, drift: Drift, lang: str) -> list[Spec]:
    """One set of texts: bars and points, the two sets a little above each other."""
    if not points:
        return []
    inside = points[0]["set"] == "in_domain"
    both = any(row.in_domain for row in drift.rows) and any(row.general for row in drift.rows)
    shift = (-5 if inside else 5) if both else 0
    color = _HELD_OUT if inside else _TRAIN
    mark = {"type": "point", "size": 75, "strokeWidth": 2, "opacity": 1, "yOffset": shift}
    words = {"field": "texts", "type": "nominal", "title": None}
    names = [text(f"chart.drift.{name}", lang) for name in ("in_domain", "general")]
    colors, shapes = [_HELD_OUT, _TRAIN], ["circle", "diamond"]
    if not both:
        kept = slice(0, 1) if inside else slice(1, 2)
        names, colors, shapes = names[kept], colors[kept], shapes[kept]
    return [
        {
            "data": {"values": points},
            "mark": {"type": "rule", "strokeWidth": 2, "opacity": 0.5, "color": color, "yOffset": shift},
            "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}, "y": y},
        },
        {
            "data": {"values": points},
            "mark": {**mark, "filled": inside},
            "encoding": {
                "x": {**x, "field": "kl"},
                "y": y,
                "shape": {**words, "scale": {"domain": names, "range": shapes}},
                "color": {**words, "scale": {"domain": names, "range": colors}},
            },
        },
    ]


def _shortened(name: str) -> str:
    name = " ".join(visible(name).split())
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"  # paths differ at their end


def heatmap_spec(source: Verdict | AdapterFacts, lang: str = "en") -> Spec | None:
    """A layer × module field on a log scale: the merge's relative error, or the update's size |Δ| / |W|.

    Hatched where there is no adapter; crossed where it never moved, or where a merge holds numbers that are not finite;
    blank where it was not measured.

    Args:
        source: a verdict with its tensors, or an adapter whose base norms are known.
        lang: language of its labels.

    Returns:
        A Vega-Lite specification, or None where there is nothing to show.
    """
    cells = _error_cells(source) if isinstance(source, Verdict) else _update_cells(source)
    if not cells:
        return None
    crossed, unread = (_ruined(source), set()) if isinstance(source, Verdict) else _without_a_size(source)
    adapted = cells.keys() | crossed | unread
    layers = sorted({layer for layer, _ in adapted})
    modules = sorted({module for _, module in adapted}, key=_reading_order)
    gaps = {(layer, module) for module in modules for layer in layers} - adapted
    rows = [{"layer": layer, "module": module, "value": value} for (layer, module), value in cells.items()]
    bare = {"domain": False, "ticks": False}
    color = {
        "field": "value",
        "type": "quantitative",
        "title": text("chart.heatmap.error" if isinstance(source, Verdict) else "chart.heatmap.update", lang),
        "scale": {"type": "log", "domain": _decades(cells.values()), "range": list(_FIELD), "clamp": True},
        "legend": {"orient": "right", "format": ".1~g", "gradientLength": 110, "tickCount": 3},
    }
    x = {"field": "layer", "type": "ordinal", "title": text("chart.heatmap.layer", lang), "scale": {"domain": layers}}
    y = {"field": "module", "type": "ordinal", "title": None, "scale": {"domain": modules}, "axis": bare}
    return _chart(
        {
            "width": max(180, min(780, 26 * len(layers))),
            "height": 24 * len(modules),
            "encoding": {"x": {**x, "axis": {**bare, "labelAngle": 0, "labelOverlap": True}}, "y": y},
            "layer": [
                {
                    "data": {"values": rows},
                    "mark": {"type": "rect", "cornerRadius": 2, "width": {"band": 0.92}, "height": {"band": 0.92}},
                    "encoding": {"color": color, "tooltip": [{"field": name} for name in ("module", "layer", "value")]},
                },
                _marked(gaps, _HATCH),
                *([_marked(crossed, _CROSS)] if crossed else []),
            ],
        }
    )


def _marked(places: Collection[tuple[int, str]], shape: str) -> Spec:
    rows = [{"layer": layer, "module": module} for layer, module in sorted(places)]
    return {"data": {"values": rows}, "mark": {"type": "point", "shape": shape, **_HATCH_STYLE}}


@dataclass
class _Field:
    """Numbers of the tensors that share one place of the map."""

    elements: int = 0
    other: int = 0
    outside: int = 0


def weights_map_spec(verdict: Verdict, lang: str = "en") -> Spec | None:
    """The model as a map, a row a layer and a column a kind of module: where every number is what it should be.

    Blue is the share of numbers that are the exact value's other neighbour or were rounded twice; red, with a cross,
    the share that no rounding explains.  What lies outside of the layers is a bar across: embeddings above them, the
    last norm and the head below.  Experts share a field, and so do a layer's norms.

    Args:
        verdict: a verdict with its tensors.
        lang: language of its labels.

    Returns:
        A Vega-Lite specification, or None where no tensor was looked at.
    """
    norms = text("chart.weights.norms", lang)
    fields, bars = _map_fields(verdict, norms)
    if not fields and not bars:
        return None
    layers = sorted({layer for layer, _ in fields})
    modules = sorted(
        {module for _, module in fields},
        key=lambda name: (name == norms, "expert" in name, "shared" in name, _reading_order(name)),
    )
    short = _short_names(modules)
    above = [name for name in bars if "emb" in name or name in ("wte", "wpe")]
    below = sorted((name for name in bars if name not in above), key=lambda name: ("norm" not in name, name))
    rows = [*above, *map(str, layers), *below]
    every = 1 if len(layers) <= _LAYERS_AT_EASE else 5
    shown = [row for row in rows if not row.isdecimal() or int(row) % every == 0]
    plain = {"domain": False, "ticks": False, "title": None, "grid": False}
    columns = {**plain, "orient": "top", "labelAngle": -45, "labelAlign": "left"}
    x = {"field": "module", "type": "ordinal", "scale": {"domain": list(short.values()) or [""]}, "axis": columns}
    y_axis = {**plain, "values": shown, "labelOverlap": False, "labelPadding": 6}
    y = {"field": "row", "type": "ordinal", "scale": {"domain": rows}, "axis": y_axis}
    cells = [
        {"row": str(layer), "module": short[module], **_shares(field)} for (layer, module), field in fields.items()
    ]
    lines = [{"row": name, **_shares(field)} for name, field in bars.items()]
    across = {"x": {"value": 0}, "x2": {"value": "width"}, "y": y}
    spec = _chart(
        {
            "width": 34 * max(6, len(modules)),
            "height": (15 if every == 1 else 10) * len(rows),
            "layer": [*_map_layers(cells, {"x": x, "y": y}, lang), *_map_layers(lines, across, None)],
            "resolve": {"scale": {"color": "independent"}, "legend": {"color": "independent"}},
        }
    )
    spec["config"]["legend"]["layout"] = {"bottom": {"direction": "vertical", "anchor": "start", "margin": 10}}
    return spec


def _map_layers(values: list[Spec], place: Spec, lang: str | None) -> list[Spec]:
    """Blue fields, and red ones with a cross; with legends where a language is given."""
    mark = {"type": "rect", "cornerRadius": 1.5, "height": {"band": 0.88}}
    mark |= {"width": {"band": 0.92}} if lang else {}
    common = {"orient": "bottom", "direction": "horizontal", "gradientLength": 220, "gradientThickness": 10}
    common |= {"titleLimit": 0, "titlePadding": 6, "offset": 14}
    calm_scale = {"domain": [0, _MOST_OTHER], "range": list(_CALM), "clamp": True}
    alarm_scale = {"type": "log", "domain": [1e-6, 1], "range": list(_ALARM), "clamp": True}
    legends: list[Spec | None] = [None, None]
    if lang:
        legends = [
            {
                **common,
                "title": text("chart.weights.other", lang),
                "format": "%",
                "values": [0, 0.1, 0.2, 0.3, 0.4, 0.5],
            },
            {**common, "title": text("chart.weights.outside", lang), "values": [1e-6, 1e-4, 1e-2, 1], "format": "~%"},
        ]
    drawn = []
    for name, scale, legend in (("other", calm_scale, legends[0]), ("outside", alarm_scale, legends[1])):
        chosen = [value for value in values if bool(value["outside"]) == (name == "outside")]
        if not chosen:
            continue
        color = {"field": name, "type": "quantitative", "scale": scale, "legend": legend}
        drawn.append({"data": {"values": chosen}, "mark": mark, "encoding": {**place, "color": color}})
        if name == "outside":
            cross = {"type": "text", "text": "×", "color": "#ffffff", "fontWeight": "bold", "fontSize": 11}
            middle = (
                {"x": place["x"], "y": place["y"]} if lang else {"x": {"value": {"expr": "width / 2"}}, "y": place["y"]}
            )
            drawn.append({"data": {"values": chosen}, "mark": cross, "encoding": middle})
    return drawn


def _map_fields(verdict: Verdict, norms: str) -> tuple[dict[tuple[int, str], _Field], dict[str, _Field]]:
    """The fields by layer and module, and those outside of the layers by name."""
    fields: dict[tuple[int, str], _Field] = {}
    bars: dict[str, _Field] = {}
    for tensor in verdict.tensors:
        name = _PARAMETER.sub("", tensor.name)
        place = _place(name)
        if place is None:
            field = bars.setdefault(visible(name.rsplit(".", 1)[-1]), _Field())
        else:
            layer, module = place
            field = fields.setdefault((layer, norms if "norm" in module else module), _Field())
        field.elements += tensor.elements
        field.other += tensor.faithful + tensor.twice_rounded
        field.outside += tensor.outside
    return fields, bars


def _shares(field: _Field) -> Spec:
    elements = field.elements or 1
    return {"other": field.other / elements, "outside": field.outside / elements}


def _short_names(modules: Sequence[str]) -> dict[str, str]:
    """Names for the columns: the last part of a module's, and more where two would be the same (experts)."""
    last = {module: module.rsplit(".", 1)[-1] for module in modules}
    taken = list(last.values())
    return {
        module: short if taken.count(short) == 1 else module.replace(".*", "").partition(".")[2] or module
        for module, short in last.items()
    }


def to_svg(spec: Mapping[str, Any]) -> str:
    """Draw a chart as SVG whose ink is ``currentColor``, so that it reads in a dark and in a light page alike.

    Ids are made unique to the chart: several may stand in one document.  Nothing is read from the network.
    """
    return _svg(json.dumps(spec, sort_keys=True))


@lru_cache(maxsize=32)
def _svg(document: str) -> str:
    import vl_convert

    svg: str = vl_convert.vegalite_to_svg(document, vl_version=_VEGA_LITE, allowed_base_urls=[])
    svg = svg.replace(f'"{_INK}"', '"currentColor"')
    # The engine numbers ids by a counter of the process; here they depend on the chart alone.
    mark = hashlib.sha256(document.encode()).hexdigest()[:8]
    numbers = {name: f"c{mark}-{number}" for number, name in enumerate(dict.fromkeys(_ID.findall(svg)))}
    svg = _ID.sub(lambda match: f'id="{numbers[match[1]]}"', svg)
    return _REFERENCE.sub(lambda match: f"url(#{numbers.get(match[1], match[1])})", svg)


def to_png(spec: Mapping[str, Any], scale: float = 2) -> bytes:
    """Draw a chart as PNG on white.

    Args:
        spec: a Vega-Lite specification.
        scale: pixels a unit of the chart.
    """
    import vl_convert

    on_white = {**spec, "background": "white", "padding": 16}
    png: bytes = vl_convert.vegalite_to_png(on_white, vl_version=_VEGA_LITE, scale=scale, allowed_base_urls=[])
    return png


def loss_png(run: Run) -> bytes | None:
    """The picture ``training_loss.png``, drawn as LLaMA-Factory draws it; None where no training loss was logged."""
    return _picture(_finite((row.step, row.loss) for row in run.log), "chart.loss.title", "loss")


def eval_loss_png(run: Run) -> bytes | None:
    """The picture ``training_eval_loss.png``; None where no held-out loss was logged."""
    return _picture(_finite((row.step, row.eval_loss) for row in run.log), "chart.eval_loss.title", "eval_loss")


def _picture(points: Points, title_key: str, label: str) -> bytes | None:
    original = _curve(points, {"type": "line", "strokeWidth": 1.5})
    smoothed = _curve(_smoothed(points), {"type": "line", "strokeWidth": 2})
    if original is None or smoothed is None:
        return None
    # LLaMA-Factory draws with matplotlib, whose first colour this is.
    scale = {"domain": ["original", "smoothed"], "range": ["#a5c8e1", "#1f77b4"]}
    for name, layer in (("original", original), ("smoothed", smoothed)):
        legend = {"orient": "top-right"}
        layer["encoding"]["color"] = {"datum": name, "type": "nominal", "scale": scale, "legend": legend}
        layer["encoding"]["x"]["title"] = text("chart.step")
        layer["encoding"]["y"]["title"] = label
    return to_png(_chart({"width": 560, "height": 360, "title": text(title_key), "layer": [original, smoothed]}))


def _finite(logged: Iterable[tuple[int, float | None]]) -> Points:
    return [(step, loss) for step, loss in logged if loss is not None and math.isfinite(loss)]


def _smoothed(points: Points) -> Points:
    return list(zip((step for step, _ in points), smooth([loss for _, loss in points]), strict=True))


def _curve(points: Points, mark: Spec) -> Spec | None:
    if not points:
        return None
    return {
        "data": {"values": [{"step": step, "loss": loss} for step, loss in points]},
        "mark": mark,
        "encoding": {
            "x": {"field": "step", "type": "quantitative"},
            "y": {"field": "loss", "type": "quantitative", "scale": {"zero": False}},
        },
    }


def _checkpoint_layer(run: Run, title: str) -> Spec | None:
    steps = sorted({saved.step for saved in run.checkpoints if saved.step is not None and saved.name != "final"})
    if not steps:
        return None
    return {
        "data": {"values": [{"step": step} for step in steps]},
        "mark": {"type": "rule", "strokeDash": [3, 3], "strokeWidth": 1},
        "encoding": {"x": {"field": "step", "type": "quantitative", "title": title}},
    }


def _error_cells(verdict: Verdict) -> dict[tuple[int, str], float]:
    cells: dict[tuple[int, str], float] = {}
    for tensor in verdict.tensors:
        place = _place(tensor.module or "")
        error = tensor.relative_error
        if place and error is not None and math.isfinite(error):
            cells[place] = max(cells.get(place, 0.0), error, 1e-9)
    return {place: error for place, error in cells.items() if place not in _ruined(verdict)}


def _ruined(verdict: Verdict) -> set[tuple[int, str]]:
    """Places of tensors that hold numbers that are not finite, so that their error is none either."""
    return {
        place
        for tensor in verdict.tensors
        if tensor.relative_error is not None and not math.isfinite(tensor.relative_error)
        if (place := _place(tensor.module or ""))
    }


def _update_cells(facts: AdapterFacts) -> dict[tuple[int, str], float]:
    cells: dict[tuple[int, str], float] = {}
    for module in facts.modules:
        place, size = _place(module.module), module.relative_update
        if place and size and math.isfinite(size) and module.moved is not False:
            cells[place] = max(cells.get(place, 0.0), size, 1e-9)
    return cells


def _without_a_size(facts: AdapterFacts) -> tuple[set[tuple[int, str]], set[tuple[int, str]]]:
    """Places of modules that never moved, and of all others whose size is not known."""
    places = [(place, module.moved) for module in facts.modules if (place := _place(module.module))]
    sized = _update_cells(facts).keys()
    still = {place for place, moved in places if moved is False} - sized
    return still, {place for place, _ in places} - still - sized


def _place(module: str) -> tuple[int, str] | None:
    """``model.layers.3.self_attn.q_proj`` → (3, ``self_attn.q_proj``); experts share one row."""
    match = _FIRST_NUMBER.match(module)
    return (int(match[1]), _FURTHER_NUMBER.sub("*", visible(match[2]))) if match else None


def _reading_order(module: str) -> tuple[int, str]:
    """Attention before feed-forward, in the order in which they compute; other names after them."""
    last = module.rsplit(".", 1)[-1]
    return (READING_ORDER.index(last) if last in READING_ORDER else len(READING_ORDER), module)


def _decades(values: Collection[float]) -> list[float]:
    low, high = min(values), max(values)
    bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**bottom, 10.0 ** max(top, bottom + 1)]


def _chart(content: Spec) -> Spec:
    """A specification with the house's axes, legend and fonts."""
    words = {
        "labelColor": _INK,
        "titleColor": _INK,
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
    }
    axis = {
        "labelOpacity": 0.75,
        "titleOpacity": 0.75,
        "titlePadding": 8,
        "gridColor": _INK,
        "gridOpacity": 0.1,
        "domainColor": _INK,
        "domainOpacity": 0.3,
        "tickColor": _INK,
        "tickOpacity": 0.3,
    }
    legend = {"title": None, "orient": "top", "symbolType": "stroke", "symbolStrokeWidth": 2.5}
    return {
        "$schema": _SCHEMA,
        "background": None,
        "padding": 2,
        **content,
        "config": {
            "font": _FONT,
            "aria": False,
            "view": {"stroke": None},
            "axis": {**words, **axis},
            "legend": {**words, **legend},
            "title": {"color": _INK, "fontSize": 14, "fontWeight": "normal"},
        },
    }
