"""A drift for people: every finding has its sentence, every figure its digits, and nothing from outside obeys."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator

import pytest
from rich.console import Console

from tests.report.test_html import HOSTILE, shape_of
from tunesmith.cli.drift import print_drift
from tunesmith.cli.screen import Screen
from tunesmith.compare import Departure, Drift, DriftModel, DriftRow, Estimate
from tunesmith.compare.drift import _findings
from tunesmith.record import Finding
from tunesmith.report import LANGUAGES, drift_markdown, finding_text, render_report, templates, text, to_svg
from tunesmith.report.charts import drift_spec
from tunesmith.report.drift import drift_lines
from tunesmith.runs import Run


def around(value: float, half: float) -> Estimate:
    """A figure with a symmetric interval, which does not go below 0."""
    return Estimate(value=value, low=max(0.0, value - half), high=value + half)


def line(name: str, size: int, kl: float, kept: float | None, *, kind: str = "export", close: bool = False) -> DriftRow:
    """One model, as far off on general texts as on answers."""
    departure = Departure(kl=around(kl, kl / 5), p99=around(9 * kl, kl), top1=around(1 - kl / 2, 0.01))
    model = {"name": name, "kind": kind, "path": f"/{name}", "scheme": name, "rounding": "faithful", "size_bytes": size}
    return DriftRow(
        model=DriftModel.model_validate(model),
        size_ratio=size / (256 << 20),
        in_domain=departure,
        general=departure,
        loss=around(1.2, 0.1),
        kept=None if kept is None else around(kept, 0.02),
        close=close,
        seconds=1.0,
    )


def drift_with(**changes: object) -> Drift:
    """Three schemes of one run."""
    found = Drift(
        run="security",
        base_model="org/base",
        checkpoint="final",
        dtype="float32",
        rows=(
            line("base", 256 << 20, 1.1, None, kind="base"),
            line("int8", 163 << 20, 0.004, 0.998, close=True),
            line("int4:32", 122 << 20, 0.045, 0.97, close=True),
            line("int4:64", 116 << 20, 0.09, 0.88),
        ),
        rows_from="held_out",
        in_domain_rows=40,
        in_domain_tokens=3200,
        general_rows=60,
        general_tokens=6100,
        gain=around(1.5, 0.2),
        adapter_loss=around(1.2, 0.1),
        recommended="int4:32",
        comparisons=3,
    ).model_copy(update=changes)
    return found.model_copy(update={"findings": tuple(_findings(found))})


@pytest.fixture
def drift() -> Drift:
    """As measured."""
    return drift_with()


def every_finding() -> Iterator[Finding]:
    """Findings of every code that a drift makes."""
    yield from drift_with().findings
    yield from drift_with(recommended=None).findings
    yield from drift_with(gain=None).findings
    yield from drift_with(gain=around(0.1, 0.3)).findings
    unknown = line("int8", 163 << 20, 0.004, None, close=True)
    yield from drift_with(rows=(line("base", 1, 1.1, None, kind="base"), unknown), recommended="int8").findings
    broken = line("int8", 163 << 20, math.nan, None)
    far = line("int4", 163 << 20, 1.2, None)
    yield from drift_with(rows=(line("base", 1, 1.1, None, kind="base"), broken, far), recommended=None).findings


def test_every_finding_has_its_sentence_with_all_its_figures() -> None:
    """In both languages, without a dash where a figure should be."""
    found = list(every_finding())
    codes = {f"finding.{one.code}" for one in found}
    assert codes == {key for key in templates("en") if re.fullmatch(r"finding\.drift_\w+", key)}
    for one in found:
        for lang in LANGUAGES:
            assert "– " not in finding_text(one, lang)
            assert "–," not in finding_text(one, lang)


def test_lines_show_figures_with_their_intervals(drift: Drift) -> None:
    """The base is the yardstick, and a dash stands where nothing was measured."""
    lines = drift_lines(drift)
    assert [one.tag for one in lines] == [
        "drift.tag.yardstick",
        "drift.tag.close",
        "drift.tag.recommended",
        "",
    ]
    assert lines[0].kept.value is None
    assert lines[1].kl_in.value is not None
    assert lines[1].kl_in.interval is not None
    assert text(lines[1].kl_in.value.key, **lines[1].kl_in.value.params) == "0.0040"
    assert text(lines[1].kl_in.interval.key, **lines[1].kl_in.interval.params) == "0.0032 to 0.0048"
    assert [name for name, *_ in lines[1].sets] == ["drift.texts.in_domain", "drift.texts.general"]


def test_markdown_is_one_table_with_the_advice_before_it(drift: Drift) -> None:
    """For a model card."""
    document = drift_markdown(drift)
    rows = [row for row in document.splitlines() if row.startswith("|")]
    assert len(rows) == 2 + 4
    assert len({row.count("|") for row in rows}) == 1
    assert "int4:32 (recommended)" in rows[4]
    assert document.index("Take `int4:32`") < document.index(rows[0])
    assert "97.0% (95.0% to 99.0%)" in rows[4]


def test_nothing_from_outside_obeys(drift: Drift, run: Run) -> None:
    """A directory may be called anything."""
    renamed = [row.model_copy(update={"model": row.model.model_copy(update={"name": HOSTILE})}) for row in drift.rows]
    hostile = drift_with(rows=(drift.rows[0], *renamed[1:]), recommended=HOSTILE, run=HOSTILE)
    for document in (drift_markdown(hostile), render_report(run=run, adapter=None, drift=hostile)):
        assert "\x1b" not in document
        assert "\u202e" not in document
    assert "<script>alert" not in render_report(run=run, adapter=None, drift=hostile)
    assert not re.search(r"(?<!\\)<script>", drift_markdown(hostile).replace("`<script>", ""))
    assert len([row for row in drift_markdown(hostile).splitlines() if row.startswith("| ")]) == 6


def test_the_report_has_a_section_and_leads_with_it_where_it_is_alone(drift: Drift, run: Run) -> None:
    """In both languages; and without a drift there is none of it."""
    document = render_report(run=run, adapter=None, drift=drift)
    shape_of(document)
    assert 'href="#drift"' in document
    for lang in LANGUAGES:
        assert text("drift.answer.close", lang, name="int4:32") in document
        assert text("drift.column.kept", lang) in document
    assert document.count("<svg") >= 1 + len(LANGUAGES)
    assert text("drift.answer.none") in render_report(run=run, adapter=None, drift=drift_with(recommended=None))
    assert 'id="drift"' not in render_report(run=run, adapter=None)


def test_the_chart_draws_each_model_on_both_sets_of_texts(drift: Drift) -> None:
    """On a log scale, so that what is not above 0, or not finite, is left out."""
    spec = drift_spec(drift)
    assert spec is not None
    drawn = [layer for layer in spec["layer"] if layer["mark"]["type"] == "point"]
    assert [len(layer["data"]["values"]) for layer in drawn] == [4, 4]
    domain = drawn[0]["encoding"]["x"]["scale"]["domain"]
    assert domain[0] <= 0.0032
    assert domain[1] >= 1.32
    assert drift_spec(drift_with(rows=(drift.rows[0], line("twin", 1, 0.0, 1.0)))) is None
    assert drift_spec(drift_with(rows=(drift.rows[0], line("broken", 1, math.nan, None)))) is None
    for lang in LANGUAGES:
        named = drift_spec(drift, lang)
        assert named is not None
        assert "int4:32" in to_svg(named)


@pytest.mark.parametrize("width", [None, 80, 200])
def test_the_terminal_shows_the_table_from_which_to_choose(width: int | None, drift: Drift) -> None:
    """In a pipe a line a model; on a narrow terminal an interval below its figure."""
    screen = Terminal(width)
    print_drift(screen, drift)
    shown = screen.kept.getvalue()
    (taken,) = [row for row in shown.splitlines() if "→" in row]
    assert "int4:32" in taken
    assert "Take `int4:32`" in shown
    if width != 80:
        assert "97.0% (95.0% to 99.0%)" in taken
    if width is None:
        table = shown[shown.index("model ") : shown.index("held-out rows")]
        assert len([row for row in table.splitlines() if "faithful" in row]) == 4


class Terminal(Screen):
    """A terminal of so many columns, without colours, that keeps what it is shown; None for a pipe."""

    def __init__(self, width: int | None) -> None:
        self.kept = io.StringIO()
        Console.__init__(
            self,
            file=self.kept,
            force_terminal=width is not None,
            width=width or 1 << 14,
            color_system=None,
            highlight=False,
            emoji=False,
            markup=False,
        )
        self.soft_wrap = width is None
