"""What people read: charts, one self-contained HTML report, and every interface text in English and Chinese.

Charts and pages are loaded when they are drawn: what only prints a sentence needs neither.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tunesmith.report.texts import LANGUAGES, finding_text, templates, text

if TYPE_CHECKING:
    from tunesmith.report.charts import drift_spec as drift_spec
    from tunesmith.report.charts import eval_loss_png as eval_loss_png
    from tunesmith.report.charts import heatmap_spec as heatmap_spec
    from tunesmith.report.charts import loss_png as loss_png
    from tunesmith.report.charts import loss_spec as loss_spec
    from tunesmith.report.charts import smooth as smooth
    from tunesmith.report.charts import to_png as to_png
    from tunesmith.report.charts import to_svg as to_svg
    from tunesmith.report.charts import weights_map_spec as weights_map_spec
    from tunesmith.report.drift import drift_markdown as drift_markdown
    from tunesmith.report.evaluation import evaluation_markdown as evaluation_markdown
    from tunesmith.report.html import render_report as render_report
    from tunesmith.report.html import write_report as write_report

_HOME = {
    **dict.fromkeys(("render_report", "write_report"), "html"),
    **dict.fromkeys(("loss_spec", "heatmap_spec", "drift_spec", "weights_map_spec", "smooth"), "charts"),
    "drift_markdown": "drift",
    "evaluation_markdown": "evaluation",
    **dict.fromkeys(("to_svg", "to_png", "loss_png", "eval_loss_png"), "charts"),
}

__all__ = ["LANGUAGES", "finding_text", "templates", "text", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tunesmith.report' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"tunesmith.report.{_HOME[name]}"), name)
    globals()[name] = value
    return value
