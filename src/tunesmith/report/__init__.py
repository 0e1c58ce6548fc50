"""What people read: charts, one self-contained HTML report, and every interface text in English and Chinese."""

from tunesmith.report.charts import (
    eval_loss_png,
    heatmap_spec,
    loss_png,
    loss_spec,
    smooth,
    to_png,
    to_svg,
    weights_map_spec,
)
from tunesmith.report.html import render_report, write_report
from tunesmith.report.texts import LANGUAGES, finding_text, templates, text

__all__ = [
    "render_report",
    "write_report",
    "loss_spec",
    "heatmap_spec",
    "weights_map_spec",
    "to_svg",
    "to_png",
    "loss_png",
    "eval_loss_png",
    "smooth",
    "text",
    "finding_text",
    "templates",
    "LANGUAGES",
]
