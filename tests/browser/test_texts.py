"""The page fills its texts and shows what is unseen exactly as the report does."""

from __future__ import annotations

import json
import math
import string
import unicodedata
from typing import Any

import pytest

from tests.chromium import CJK, NEEDS_CHROMIUM
from tunesmith.record import Finding
from tunesmith.report import texts
from tunesmith.report.escaping import visible
from tunesmith.report.texts import LANGUAGES, finding_text, templates, text

from .conftest import Visit

pytestmark = NEEDS_CHROMIUM

# What the page's own code asks for beside the texts.
OWN_SPECS = (".6g", ".2%", ".1%")
# Not among the values of a bare `{name}` and of `{name:,}`: a float that is whole or beyond 1e16, for neither JSON nor
# JavaScript tells 1.0 from 1; true, false and lists, whose Python spelling no text is meant to show.
BARE = ["a name", "", 0, 7, 12345, -3, 0.25, -123.456, 1e-5, 3.25e-7, None, math.nan, math.inf, -math.inf]
NUMBERS = [
    *BARE, 1, 42, 999, 1000, 1234567, -12345, 0.5, 0.05, 0.123456, 2.675, 1.5, -0.3, -1e-9, 0.0099, 0.00995, 0.01,
    0.999, 0.9995, 0.125, 0.375, 2.5, 99.95, 999.5, 9999.5, 1234.5, 123456.789,
]  # fmt: skip
WHOLE = [1.0, 2.5e9, 3e12, 1e6, 1e16]
CALL = """async ([lang, name, text]) => {
  const core = await import('/static/core.js');
  await core.setLang(lang);
  const told = { NaN, Infinity, '-Infinity': -Infinity };
  const cases = JSON.parse(text, (key, value) => (value?.odd ? told[value.odd] : value));
  return JSON.stringify(cases.map((given) => core[name](...given)));
}"""


def told(value: Any) -> Any:
    """A value in JSON, which has no word for what is no number."""
    odd = isinstance(value, float) and not math.isfinite(value)
    return {"odd": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"} if odd else value


def called(visit: Visit, name: str, cases: list[tuple[Any, ...]], lang: str = "en") -> list[str]:
    """What a function of the page's core says, case by case."""
    sent = [
        [{k: told(v) for k, v in given.items()} if isinstance(given, dict) else given for given in case]
        for case in cases
    ]
    answered: list[str] = json.loads(visit("#/open", lang=lang).evaluate(CALL, [lang, name, json.dumps(sent)]))
    assert len(answered) == len(cases) > 0
    return answered


def differing(cases: list[Any], mine: list[str], theirs: list[str]) -> list[Any]:
    """Where the page says something else."""
    return [each for each in zip(cases, mine, theirs, strict=True) if each[1] != each[2]]


def placeholders(template: str) -> dict[str, str]:
    """The placeholders of a template and how each is written."""
    return {name: spec or "" for _, name, spec, _ in string.Formatter().parse(template) if name}


@pytest.mark.parametrize("lang", LANGUAGES)
def test_texts_are_filled_as_python_fills_them(visit: Visit, lang: str) -> None:
    """Every key: counts, shares, losses, small and large, names, and what is missing."""
    cases: list[tuple[Any, ...]] = []
    rounds: list[list[Any]] = [[12345, 0.25, 1e-5], [0, -0.123456, 7], [None, "a name", 1.5]]
    for turn, numbers in enumerate(rounds):
        for place, (key, template) in enumerate(templates(lang).items()):
            known = placeholders(template)
            if known or not turn:
                cases.append((key, {name: numbers[(place + at) % 3] for at, name in enumerate(known)}))
    wanted = [text(key, lang, **values) for key, values in cases]
    assert differing(cases, wanted, called(visit, "t", cases, lang)) == []


def test_every_kind_of_placeholder_takes_every_kind_of_number(visit: Visit) -> None:
    """Also halves, which go to the even neighbour, and what is just below the next unit."""
    specs = {spec for template in templates("en").values() for spec in placeholders(template).values()} | {*OWN_SPECS}
    assert {"", ",", ".3f", ".3g", "bytes", "+nats", "figure", "percent", "+points"} <= specs
    cases = []
    for spec in sorted(specs):
        values = BARE if spec in ("", ",") else NUMBERS + WHOLE
        if spec == "bytes":  # of a size that is no number neither says anything sensible
            values = [value for value in values if not isinstance(value, float) or math.isfinite(value)]
        cases += [(f"<{{v:{spec}}}>" if spec else "<{v}>", {"v": value}) for value in values]
    wanted = [texts._FORMATTER.vformat(template, (), values) for template, values in cases]
    assert differing(cases, wanted, called(visit, "fill", cases)) == []


def test_what_a_finding_lacks_is_a_dash_as_in_the_report(visit: Visit) -> None:
    """A record may come from another version; neither side says "undefined"."""
    codes = [key.removeprefix("finding.") for key in templates("en") if key.startswith("finding.")]
    wanted = [finding_text(Finding(code=code, severity="info", params={}), "en") for code in codes]
    cases: list[tuple[Any, ...]] = [(f"finding.{code}", {}) for code in codes]
    assert differing(cases, wanted, called(visit, "t", cases)) == []


def test_unseen_characters_are_shown_as_in_the_report(visit: Visit) -> None:
    """Controls, marks of direction, private and unassigned ones alike; joiners, tabs and line ends stay."""
    spans = (
        range(0x3100),
        range(0xE000, 0x10000),
        range(0x1F300, 0x1F700),
        range(0xE0000, 0xE0200),
        (0xF0000, 0x10FFFF),
    )
    codes = [code for span in spans for code in span]
    # A browser may know letters that this Python's Unicode does not have yet; each then judges by what it knows.
    newer = {code for code in codes if unicodedata.category(chr(code)) == "Cn" and code & 0xFFFE != 0xFFFE}
    lines = ["one\r\ntwo\r\n", "\r", "\x1b[31mred\x1b[0m", "\u202etxt.exe", "क्‍ष", "👩‍💻", "<b>&amp;</b>", "plain", ""]
    cases = [(f"a{chr(code)}b",) for code in codes] + [(line,) for line in lines]
    wrong = differing(cases, [visible(given) for (given,) in cases], called(visit, "visible", cases))
    assert [each for each in wrong if ord(each[0][0][1:2] or "a") not in newer or each[2] != each[0][0]] == []
    assert len(wrong) < 200


def test_an_errors_sentence_is_said_in_the_pages_language(visit: Visit) -> None:
    """Whole ones, those with something filled in, and one that nobody translated, which stays as it is."""
    sentences = ["The run has no final.", "Two variants have the same name.", "Nobody wrote this sentence."]
    cases: list[tuple[Any, ...]] = [(sentence,) for sentence in sentences]
    assert called(visit, "sentence", cases, "en") == sentences
    filled, whole, unknown = called(visit, "sentence", cases, "zh")
    assert "final" in filled
    assert whole == text("what.Two variants have the same name.", "zh")
    assert all(CJK.search(said) for said in (filled, whole))
    assert unknown == sentences[2]
