"""One self-contained HTML file: both languages, both themes, no request to anywhere."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from tunesmith.adapter.records import AdapterFacts
from tunesmith.compare import CheckpointChoice, Comparison, Drift, Evaluation, Measure
from tunesmith.merge import Forecast, Merged
from tunesmith.record import Finding
from tunesmith.report import charts, units, view
from tunesmith.report.codes import codes_view
from tunesmith.report.drift import drift_lines, drift_notes
from tunesmith.report.escaping import prose, visible
from tunesmith.report.evaluation import MARKS, evaluation_view, measure_about, measure_name, shown
from tunesmith.report.texts import LANGUAGES, finding_text, text
from tunesmith.report.view import Line
from tunesmith.runs import Run
from tunesmith.verify import Verdict

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup
    from typing_extensions import NotRequired, Unpack

_HTML_LANGUAGE = {"en": "en", "zh": "zh-Hans"}


class Parts(TypedDict):
    """What a report is made of; only the run is always there.

    Attributes:
        run: the run.
        adapter: what its adapter is.
        forecast: what rounding would keep of the update in a merge.
        health: what looks unhealthy, the gravest first; None for the run's own findings.
        choice: which checkpoint to take.
        comparison: replies and scores of base and fine-tune.
        merged: the merge.
        verdict: its verification.
        evaluation: whether the fine-tune helped, and what it broke.
        drift: how far exports are from the live adapter.
    """

    run: Run
    adapter: AdapterFacts | None
    forecast: NotRequired[Forecast | None]
    health: NotRequired[Sequence[Finding] | None]
    choice: NotRequired[CheckpointChoice | None]
    comparison: NotRequired[Comparison | None]
    merged: NotRequired[Merged | None]
    verdict: NotRequired[Verdict | None]
    evaluation: NotRequired[Evaluation | None]
    drift: NotRequired[Drift | None]


def render_report(
    *,
    run: Run,
    adapter: AdapterFacts | None,
    forecast: Forecast | None = None,
    health: Sequence[Finding] | None = None,
    choice: CheckpointChoice | None = None,
    comparison: Comparison | None = None,
    merged: Merged | None = None,
    verdict: Verdict | None = None,
    evaluation: Evaluation | None = None,
    drift: Drift | None = None,
) -> str:
    """Render the records as one HTML document.

    A part that is None becomes one line that says which command adds it; where there is none of comparison, evaluation,
    drift, merge and verification, the document is about the run directory and its health alone.  An evaluation leads
    where nothing was merged or verified, and a drift where it is alone.  Text of models, file names and data is
    escaped, and characters that would steer the display are shown by name.  The document asks no server for
    anything; its content security policy forbids any script but its own.

    Returns:
        The document, UTF-8 text.
    """
    script = _asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    facts: dict[str, Any] = {
        "run_only": not any((comparison, evaluation, drift, merged, verdict)),
        "state_of_run": view.health_state(run.findings if health is None else health),
        "health": run.findings if health is None else health,
        "headline": view.headline(run, merged, verdict),
        "kinds": adapter.by_kind() if adapter else (),
        "choice": choice,
        "choice_charts": _drawn(charts.choice_spec, choice),
        "effect": view.effect(comparison) if comparison else None,
        "exchanges": view.exchanges(comparison) if comparison else ([], []),
        "evaluated": evaluation_view(evaluation) if evaluation else None,
        "evaluation_leads": evaluation is not None and merged is None and verdict is None,
        "evaluation_charts": _drawn(charts.evaluation_spec, evaluation),
        "drift_leads": drift is not None and not any((comparison, evaluation, merged, verdict)),
        "drift_lines": drift_lines(drift) if drift else [],
        "drift_notes": drift_notes(drift) if drift else [],
        "drift_charts": _drawn(charts.drift_spec, drift),
        "fact_groups": view.fact_groups(run, adapter, forecast),
        "files": view.file_groups(run),
        "needs": view.file_needs(run),
        "merge": view.merge_view(merged) if merged else None,
        "levels": view.levels(verdict) if verdict else (),
        "tensors": view.tensors_view(verdict) if verdict else None,
        "codes": codes_view(verdict) if verdict else None,
        "behaviour": view.behaviour_rows(verdict) if verdict else [],
        "weights_maps": _drawn(charts.weights_map_spec, verdict),
        "loss_charts": _drawn(charts.loss_spec, run),
        "heatmaps": _drawn(charts.heatmap_spec, verdict) or _drawn(charts.heatmap_spec, adapter),
        "heatmap_shows_error": bool(verdict and charts.heatmap_spec(verdict)),
    }
    return _template().render(
        run=run,
        adapter=adapter,
        comparison=comparison,
        evaluation=evaluation,
        drift=drift,
        merged=merged,
        verdict=verdict,
        style=_markup(_asset("report.css")),
        script=_markup(script),
        script_sha256=digest,
        version=_version(),
        **facts,
    )


def write_report(path: str | os.PathLike[str], **parts: Unpack[Parts]) -> Path:
    """Write the report whole or not at all.

    Args:
        path: the HTML file.
        parts: as for :func:`render_report`.

    Returns:
        The path that was written.
    """
    target = Path(path)
    document = render_report(**parts)
    beside = target.with_name(f".{target.name}.partial")
    beside.write_text(document, encoding="utf-8")
    beside.replace(target)
    return target


@cache
def _template() -> Template:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(_asset),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.globals |= {
        "t": _both,
        "line": _both_of_line,
        "finding": _both_of_finding,
        "raw_text": text,
        "verdict_mark": MARKS.__getitem__,
        "measured": _both_measured,
        "measure_name": _both_names,
        "measure_about": _both_meanings,
        "command": view.command,
        "differing_texts": view.differing_texts,
        "mark_counts": view.mark_counts,
        "plain": view.plain,
    }
    environment.filters |= {
        "figure": units.figure,
        "loss": units.loss_figure,
        "size": units.human_bytes,
        "count": units.human_count,
        "duration": units.human_seconds,
        "share": units.human_share,
    }
    return environment.get_template("template.html.j2")


def _finalize(value: object) -> object:
    """Every output of the template passes here: text that is not yet markup loses its unseen characters."""
    if value is None:
        return "–"
    return value if hasattr(value, "__html__") else visible(str(value))


def _both(key: str, **params: Any) -> Markup:
    return _spans([(lang, prose(text(key, lang, **params))) for lang in LANGUAGES])


def _both_of_line(of: Line | Finding) -> Markup:
    return _both_of_finding(of) if isinstance(of, Finding) else _both(of.key, **of.params)


def _both_of_finding(of: Finding) -> Markup:
    return _spans([(lang, prose(finding_text(of, lang))) for lang in LANGUAGES])


def _both_measured(measure: Measure, form: str, **figures: float | None) -> Markup:
    return _spans([(lang, prose(shown(measure, form, lang, **figures).replace("-", "−"))) for lang in LANGUAGES])


def _both_names(measure: Measure) -> Markup:
    return _spans([(lang, prose(measure_name(measure, lang))) for lang in LANGUAGES])


def _both_meanings(measure: Measure) -> Markup:
    return _spans([(lang, prose(measure_about(measure, lang))) for lang in LANGUAGES])


def _spans(pairs: list[tuple[str, Markup]]) -> Markup:
    """The languages' texts, of which the page shows one; a text that is the same in all of them once."""
    if len({content for _, content in pairs}) == 1:
        return pairs[0][1]
    return _markup("").join(
        _markup('<span lang="{}">{}</span>').format(_HTML_LANGUAGE[lang], content) for lang, content in pairs
    )


def _drawn(spec: Any, source: object) -> list[tuple[str, Markup]]:
    """A chart in every language, as (HTML language, SVG); empty where there is nothing to draw."""
    specs = [(lang, spec(source, lang)) for lang in LANGUAGES] if source is not None else []
    return [(_HTML_LANGUAGE[lang], _markup(charts.to_svg(drawn))) for lang, drawn in specs if drawn is not None]


def _markup(trusted: str) -> Markup:
    from markupsafe import Markup

    return Markup(trusted)  # noqa: S704 - our own files, and charts whose labels vl-convert escapes


def _asset(name: str) -> str:
    return (resources.files("tunesmith.report") / name).read_text(encoding="utf-8")


def _version() -> str:
    try:
        return metadata.version("tunesmith")
    except metadata.PackageNotFoundError:
        return "(source)"
