"""The page's own files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tunesmith

PACKAGE = Path(tunesmith.__file__).parent
# A report is one file and inlines its style; the page serves its own.  What means the same must look the same.
STYLES = (PACKAGE / "report" / "report.css", PACKAGE / "web" / "static" / "style.css")


def palette(style: Path, block: str) -> dict[str, str]:
    """The colours that a rule sets, by name."""
    rule = re.search(block + r"\s*\{(.*?)\}", style.read_text(encoding="utf-8"), re.DOTALL)
    assert rule, style
    return dict(re.findall(r"--([\w-]+):\s*(#[0-9a-f]{6})", rule[1]))


@pytest.mark.parametrize("block", [r"^:root|\n:root", r':root\[data-theme="?dark"?\]'], ids=["light", "dark"])
def test_page_and_report_mean_the_same_by_a_colour(block: str) -> None:
    """Of every name that both have."""
    report, page = (palette(style, f"(?:{block})") for style in STYLES)
    shared = report.keys() & page.keys()
    assert {"accent", "pass", "warn", "fail", "left", "right"} <= shared
    assert {name: report[name] for name in shared} == {name: page[name] for name in shared}
