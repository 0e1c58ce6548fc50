"""An evaluation for people: every finding has its sentence, every figure its digits, and nothing from outside obeys."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import pytest

from tunesmith.compare import Estimate, Evaluation, Figure, VariantInfo
from tunesmith.compare.evaluation import _findings
from tunesmith.compare.evaluation_records import Unit
from tunesmith.compare.faults import Faults
from tunesmith.compare.general import LANGUAGES as GENERAL
from tunesmith.compare.metrics import METRICS
from tunesmith.models import Capabilities
from tunesmith.record import Finding
from tunesmith.report import LANGUAGES, evaluation_markdown, finding_text, render_report, templates, text, to_svg
from tunesmith.report.charts import evaluation_spec
from tunesmith.report.evaluation import answer_of, evaluation_view, measure_about, measure_name, measure_rows
from tunesmith.runs import Run

from .conftest import evaluation_of, measured, of_itself
from .test_html import HOSTILE, shape_of

# What an evaluation takes beside its metrics and the faults of replies.
LIKELIHOODS = ("loss", "perplexity", "token_accuracy", "general_loss", "general_kl")
BY_HEART = ("verbatim_trained", "verbatim_more", "overfit_gap")
UNITS: tuple[Unit, ...] = ("nats", "perplexity", "points", "share", "ratio", "score")


def found_by(**changes: object) -> list[Finding]:
    """What the evaluation itself finds in a record."""
    return _findings(evaluation_of().model_copy(update=changes))


def every_finding() -> Iterator[Finding]:
    """Findings of every code that an evaluation makes, with the parameters that it gives them."""

    def loss(value: float, half: float | None = 0.1) -> tuple[object, ...]:
        return (measured("effect", "loss", 2.5, value, unit="nats", better=False, half=half),)

    for value, half in ((1.2, 0.1), (3.0, 0.1), (2.5, 0.1), (2.5, None)):
        yield from found_by(measures=loss(value, half))
    for language in GENERAL:
        worse = measured("damage", "general_loss", 3.0, 3.5, unit="nats", better=False, about=language)
        yield from found_by(measures=(worse,))
    for fault in Faults.model_fields:
        yield from found_by(measures=(measured("damage", fault, 0.1, 0.6, unit="share", better=False),))
    yield from found_by(measures=(measured("damage", "cut", 0.1, 0.1, unit="share", better=False),))
    for more in (0.5, 0.0):
        by_heart = (of_itself("verbatim_more", more, unit="share"), of_itself("verbatim_trained", 0.5, unit="share"))
        yield from found_by(measures=by_heart)
    chosen = {"chosen": "final", "candidates": ("checkpoint-10", "final"), "chosen_by": "clear", "chosen_on_rows": 12}
    yield from found_by(**chosen, engine=Capabilities(kind="endpoint", where="http://localhost", scores=False))
    yield Finding(code="engine_in_turn", severity="info", params={"name": "final", "module": "DoRA"})
    yield Finding(code="engine_full_models", severity="info", params={"budget": 3 << 30})
    yield Finding(code="engine_rounds", severity="info", params={"dtype": "bfloat16"})


FINDINGS = {(finding.code, finding.params.get("about")): finding for finding in every_finding()}


def test_every_code_of_an_evaluation_is_among_those_that_are_tried() -> None:
    """The list that the next test goes through is whole: what can be found, and no text for what cannot."""
    faults = {f"evaluation_more_{fault}" for fault in Faults.model_fields}
    expected = {
        *("evaluation_helped", "evaluation_hurt", "evaluation_no_difference", "evaluation_effect_unknown"),
        *("evaluation_forgot", "evaluation_nothing_broken", "evaluation_memorised", "evaluation_not_memorised"),
        *("evaluation_chosen", "evaluation_unscored", "engine_in_turn", "engine_full_models", "engine_rounds"),
        *faults,
    }
    assert {code for code, _ in FINDINGS} == expected
    with_text = {
        key.split(".")[1] for key in templates("en") if key.startswith(("finding.evaluation_", "finding.engine_"))
    }
    assert with_text == expected


@pytest.mark.parametrize("lang", LANGUAGES)
@pytest.mark.parametrize("finding", list(FINDINGS.values()), ids=lambda finding: finding.code)
def test_every_finding_of_an_evaluation_has_a_sentence_without_a_hole(finding: Finding, lang: str) -> None:
    """The text names only what the finding has: a hole would be shown as a dash."""
    told = finding_text(finding, lang)
    assert "–" not in told
    assert "{" not in told
    assert len(told) > 20


def test_what_was_forgotten_is_named_in_words() -> None:
    """A language code says nothing to a layman; a language that has no sentence of its own is named by its code."""
    sentences = {about: finding_text(FINDINGS["evaluation_forgot", about]) for about in GENERAL}
    assert "some English" in sentences["en"]
    assert "some Chinese" in sentences["zh"]
    assert "some programming" in sentences["code"]
    assert "忘掉了一些中文" in finding_text(FINDINGS["evaluation_forgot", "zh"], "zh")
    other = FINDINGS["evaluation_forgot", "zh"]
    assert "(fr)" in finding_text(other.model_copy(update={"params": {**other.params, "about": "fr"}}))


@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_measure_has_a_name_and_says_which_direction_is_good(lang: str) -> None:
    """All that an evaluation measures is spoken for, and so are the units and their figures."""
    for name in (*METRICS, *Faults.model_fields, *LIKELIHOODS, *BY_HEART):
        assert text(f"measure.{name}", lang)
        assert text(f"measure.{name}.about", lang).rstrip("。.") != text(f"measure.{name}", lang)
    for about in GENERAL:
        measure = measured("damage", "general_loss", 1, 2, unit="nats", better=False, about=about)
        assert text(f"measure.of.{about}", lang) in measure_name(measure, lang)
    scorer = measured("effect", "my_module:polite", 1, 2, unit="score", better=True)
    assert measure_name(scorer, lang) == "my_module:polite"
    assert measure_about(scorer, lang) == text("measure.scorer.about", lang)
    for unit in UNITS:
        assert text(f"unit.{unit}", lang)
        assert text(f"unit.{unit}.value", lang, value=0.5)
        assert text(f"unit.{unit}.range", lang, low=0.25, high=0.5)


@pytest.mark.parametrize(
    ("unit", "value", "shown", "change"),
    [
        ("nats", 2.51449, "2.514", "+2.514"),
        ("nats", -0.00123, "-0.0012", "-0.0012"),
        ("nats", 0.0, "0.000", "0.000"),
        ("nats", math.nan, "NaN", "NaN"),
        ("perplexity", -0.734, "-0.734", "-73.4%"),
        ("perplexity", 1e304, "1.0×10³⁰⁴", "+1.0×10³⁰⁶%"),
        ("points", -0.66, "-0.7", "-0.7"),
        ("share", 0.345, "34.5%", "+34.5 pp"),
        ("share", -1e-9, "0.0%", "0.0 pp"),
        ("ratio", math.inf, "∞", "+∞"),
        ("score", -math.inf, "-∞", "-∞"),
    ],
)
def test_figures_have_the_digits_and_the_unit_that_they_are_read_in(
    unit: str, value: float, shown: str, change: str
) -> None:
    """Shares are in per cent, their differences in points of it, and a perplexity's difference is relative."""
    assert text(f"unit.{unit}.value", value=value) == shown
    assert text(f"unit.{unit}.change", value=value) == change


def test_the_answer_is_what_the_findings_say(evaluation: Evaluation) -> None:
    """A fine-tune that helped and broke something is not simply a good one."""

    def answer(*codes: str) -> str:
        found = tuple(Finding(code=f"evaluation_{code}", severity="info") for code in codes)
        return answer_of(evaluation.model_copy(update={"findings": found}))

    assert answer_of(evaluation) == "mixed"
    assert answer("helped", "nothing_broken", "not_memorised") == "helped"
    assert answer("helped", "more_refused") == answer("helped", "forgot") == answer("helped", "memorised") == "mixed"
    assert answer("hurt", "forgot") == "hurt"
    assert answer("no_difference", "more_cut") == "no_difference"
    assert answer() == answer("effect_unknown") == "unknown"


def test_the_base_stands_beside_every_variant_and_is_no_line_of_its_own() -> None:
    """But for an evaluation of the base alone, whose figures are all there is."""
    several = evaluation_of(("checkpoint-100", "final"))
    rows = measure_rows(several, "effect")
    assert [row.figure.variant for row in rows[:2]] == ["checkpoint-100", "final"]
    assert [row.first for row in rows[:2]] == [True, False]
    assert all(row.base and row.base.variant == "base" for row in rows)
    measure = rows[0].measure
    alone = several.model_copy(update={"measures": (measure.model_copy(update={"figures": measure.figures[:1]}),)})
    (row,) = measure_rows(alone, "effect")
    assert (row.base, row.figure.variant) == (None, "base")


def test_faulty_and_memorised_replies_are_picked_out(evaluation: Evaluation) -> None:
    """A held-out row is neither, whatever was answered; the base's own faults bring no task onto the page."""
    view = evaluation_view(evaluation)
    assert [each.conversation.id for each in view.faulty.exchanges] == ["general-zh-01"]
    assert [column.tags for column in view.faulty.exchanges[0].columns] == [(), ("fault.cut",)]
    assert [each.conversation.id for each in view.memorised.exchanges] == ["trained-7"]
    assert [column.tags for column in view.memorised.exchanges[0].columns] == [(), ("evaluation.memorised.tag",)]
    assert (view.faulty.count, view.memorised.count) == (1, 1)
    only_the_bases = tuple(
        reply.model_copy(update={"stop_reason": "length" if reply.variant == "base" else "eos"})
        for reply in evaluation.replies
    )
    calm = evaluation_view(evaluation.model_copy(update={"replies": only_the_bases})).faulty
    assert (calm.count, calm.exchanges) == (0, ())


def test_many_faulty_replies_are_cut_short_the_gravest_first(evaluation: Evaluation) -> None:
    """A page stays readable; that replies were cut says least of all."""
    (cut,) = (prompt for prompt in evaluation.prompts if prompt.id == "general-zh-01")
    ids = [f"general-{language}-{number:02}" for language in GENERAL for number in range(1, 21)]
    replies = [
        reply.model_copy(update={"prompt_id": name, **({"text": "", "stop_reason": "eos"} if name == ids[-1] else {})})
        for name in ids
        for reply in evaluation.replies
        if reply.prompt_id == "general-zh-01"
    ]
    many = evaluation.model_copy(
        update={
            "answered": 0,
            "prompts": tuple(cut.model_copy(update={"id": name}) for name in ids),
            "replies": tuple(replies),
        }
    )
    shown = evaluation_view(many).faulty
    assert shown.exchanges[0].conversation.id == ids[-1]
    assert shown.count == len(ids)
    assert len(shown.exchanges) + shown.hidden == len(ids)
    assert shown.hidden > 0


def cells(line: str) -> list[str]:
    """The cells of a line of a table, parted as GitHub parts them: at bars that no backslash stands before."""
    return re.split(r"(?<!\\)\|", line.strip().strip("|"))


@pytest.mark.parametrize("variants", [("final",), ("checkpoint-100", "final")])
def test_markdown_holds_the_answer_and_whole_tables(variants: tuple[str, ...]) -> None:
    """Every line of a table has as many cells as its head, and every measure is there."""
    evaluation = evaluation_of(variants)
    document = evaluation_markdown(evaluation)
    assert document.startswith("# security007: Did it help, and what did it break?\n\n**It helped, and something else")
    tables = [part.splitlines() for part in document.split("\n\n") if part.startswith("| ")]
    assert len(tables) == 3
    assert all({len(cells(line)) for line in table} == {7 + (len(variants) > 1)} for table in tables)
    assert sum(len(table) - 2 for table in tables) == len(evaluation.measures) * len(variants)
    assert document.index("The fine-tune helped") < document.index("some Chinese")
    assert "| loss, Chinese | " in document
    assert "▼ worse" in document
    assert "about one in twenty" in document
    assert document.endswith(".\n")


def hostile_evaluation() -> Evaluation:
    """The hostile text wherever somebody else chooses the text."""
    name = f"`{HOSTILE}|\n# x"
    evaluation = evaluation_of((name,))
    scorer = measured("effect", f"{HOSTILE}|:f", 1, 2, unit="score", better=True, variants=(name,))
    replies = tuple(reply.model_copy(update={"text": HOSTILE, "stop_reason": "length"}) for reply in evaluation.replies)
    refused = Finding(code="endpoint_no_chat", severity="warning", params={"found": HOSTILE})
    return evaluation.model_copy(
        update={
            "run": HOSTILE,
            "measures": (scorer, *evaluation.measures),
            "replies": replies,
            "findings": (refused, *evaluation.findings),
            "engine": Capabilities(kind="endpoint", where=HOSTILE),
        }
    )


def test_markdown_obeys_nothing_from_outside() -> None:
    """No markup, no heading, no further cell, and no character that steers a display."""
    document = evaluation_markdown(hostile_evaluation())
    assert not set("\x00\x1b\u202e\u2066") & set(document)
    outside_code = re.sub(r"`[^`\n]*`", "", document)
    assert "\\<script\\>" in outside_code
    assert not re.search(r"(?<!\\)<", outside_code)
    assert [line for line in document.splitlines() if line.startswith("# ")] == [document.splitlines()[0]]
    tables = [part.splitlines() for part in document.split("\n\n") if part.startswith("| ")]
    assert all(len({len(cells(line)) for line in table}) == 1 for table in tables)


def test_the_page_obeys_nothing_from_outside(run: Run) -> None:
    """Names of variants and scorers, replies and a server's words are shown as they are."""
    document = render_report(run=run, adapter=None, evaluation=hostile_evaluation())
    assert shape_of(document).seen["script"] == 1
    assert "<script>alert" not in document
    assert not set("\x00\x1b\u202e\u2066") & set(document)


def test_an_evaluation_alone_is_a_whole_page_that_leads_with_its_answer(run: Run, evaluation: Evaluation) -> None:
    """Nothing was merged, so the page does not begin with a proof that nobody asked for."""
    document = render_report(run=run, adapter=None, evaluation=evaluation)
    shape_of(document)
    banner = document.split('id="verdict"')[1].split("</section>")[0]
    assert "It helped, and something else got worse" in banner
    assert banner.index("微调有效") < banner.index("忘掉了一些中文")
    assert "Not verified" not in document
    assert 'id="effect"' not in document
    section = document.split('<section id="evaluation">')[1].split("</section>\n")[0]
    assert section.count("<svg") == 2 + section.count('<svg class="icon"')
    for shown in ("−1.311", "−73.0%", "+30.0 pp", "+30.0 个百分点", "▼", "▲", "≈", "judges:polite"):
        assert shown in section, shown


def test_an_evaluation_beside_a_proof_stands_below_it(parts: dict[str, object], evaluation: Evaluation) -> None:
    """The banner answers whether the merge is right; the evaluation's sentences stand in its own section."""
    document = render_report(**parts, evaluation=evaluation)  # type: ignore[arg-type]
    banner = document.split('id="verdict"')[1].split("</section>")[0]
    assert "It helped" not in banner
    section = document.split('<section id="evaluation">')[1]
    assert "It helped, and something else got worse" in section
    assert document.index('<section id="effect">') < document.index('<section id="evaluation">')


def degenerate() -> Iterator[Evaluation]:
    """Evaluations that hold little, or what is no number."""
    whole = evaluation_of()
    for half, value in ((None, 1.0), (math.nan, math.nan), (math.inf, 2.0), (0.0, math.inf), (0.1, -math.inf)):
        loss = measured("effect", "loss", 2.5, value, unit="nats", better=False, half=half, rows=1)
        perplexity = measured("effect", "perplexity", 2.5, value, unit="perplexity", better=False, half=half, rows=1)
        yield whole.model_copy(update={"measures": (loss, perplexity), "rows": 1})
    without_base = tuple(
        measure.model_copy(
            update={
                "figures": tuple(
                    figure.model_copy(update={"difference": None, "verdict": None}) for figure in measure.figures[-1:]
                )
            }
        )
        for measure in whole.measures
    )
    yield whole.model_copy(update={"measures": without_base, "variants": whole.variants[1:], "differences": 0})
    base = VariantInfo(name="base", kind="base", path="/models/base")
    alone = tuple(measure.model_copy(update={"figures": measure.figures[:1]}) for measure in whole.measures)
    yield whole.model_copy(update={"measures": alone, "variants": (base,), "findings": (), "differences": 0})
    yield whole.model_copy(update={"prompts": (), "replies": (), "answered": 0})
    yield whole.model_copy(update={"replies": ()})
    yield whole.model_copy(update={"measures": (), "findings": (), "rows": 0, "rows_from": "none", "differences": 0})


@pytest.mark.parametrize("evaluation", list(degenerate()), ids=lambda _: "evaluation")
def test_an_evaluation_that_holds_little_is_shown_all_the_same(run: Run, evaluation: Evaluation) -> None:
    """One row, figures that are no numbers, no base, no replies, nothing at all: no error, and no broken page."""
    document = render_report(run=run, adapter=None, evaluation=evaluation)
    shape_of(document)
    assert 'id="evaluation"' in document
    assert "nan" not in re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", document, flags=re.DOTALL).split()
    assert evaluation_markdown(evaluation).endswith("\n")


def chart_points(spec: dict[str, object] | None) -> list[dict[str, object]]:
    """What a chart of differences draws."""
    assert spec is not None
    fields = spec["vconcat"]
    assert isinstance(fields, list)
    return [point for field in fields[1:] for point in field["data"]["values"]]


def test_the_chart_draws_better_to_the_right_whichever_direction_is_good() -> None:
    """A loss that fell and a score that rose lie on the same side; what cannot be told crosses the line."""
    points = {point["name"]: point for point in chart_points(evaluation_spec(evaluation_of()))}
    assert points["loss"]["low"] > 0  # type: ignore[operator]
    assert points["loss, Chinese"]["high"] < 0  # type: ignore[operator]
    assert points["judges:polite"]["at"] > 0  # type: ignore[operator]
    bleu = sorted((points["BLEU"]["low"], points["BLEU"]["high"]))  # type: ignore[type-var]
    assert bleu[0] < 0 < bleu[1]  # type: ignore[operator]
    assert all(abs(float(str(point[end]))) <= 1 for point in points.values() for end in ("low", "at", "high"))
    assert {point["verdict"] for point in points.values()} == {
        "better",
        "worse",
        "different",
        "no_difference",
        "unknown",
    }


def test_the_chart_tells_verdicts_apart_by_colour_and_by_shape() -> None:
    """Whoever sees no colours sees shapes; and the chart draws, in both languages."""
    for lang in LANGUAGES:
        svg = to_svg(evaluation_spec(evaluation_of(("checkpoint-100", "final")), lang) or {})
        assert text("evaluation.chart.better", lang) in svg
        assert "checkpoint-100" in svg
    field = (evaluation_spec(evaluation_of()) or {})["vconcat"][1]
    for channel, count in (("stroke", 4), ("shape", 5)):  # both hollow ones are grey
        assert len(set(field["layer"][2]["encoding"][channel]["scale"]["range"])) == count


def test_the_chart_leaves_out_what_is_no_number() -> None:
    """A specification is JSON, which has no NaN; without any difference there is no chart."""
    wrong = measured("effect", "loss", 2.5, math.nan, unit="nats", better=False, half=None)
    evaluation = evaluation_of()
    some = evaluation.model_copy(update={"measures": (wrong, *evaluation.measures[1:])})
    assert "loss" not in {point["name"] for point in chart_points(evaluation_spec(some))}
    assert evaluation_spec(evaluation.model_copy(update={"measures": (wrong,)})) is None
    plain = Figure(variant="final", value=Estimate(value=1.0))
    alone = evaluation.measures[0].model_copy(update={"figures": (plain,)})
    assert evaluation_spec(evaluation.model_copy(update={"measures": (alone,)})) is None
