"""Interface texts: the same keys and placeholders in both languages, and no text that is lacking."""

from __future__ import annotations

import ast
import re
import string
from pathlib import Path
from typing import get_args

import pytest

from tunesmith.record import Finding
from tunesmith.report import LANGUAGES, finding_text, templates, text, texts
from tunesmith.runs.cleanup import FailedReason, KeptReason, Reason
from tunesmith.runs.files import CATALOGUE, LINK, SPECIAL, UNKNOWN
from tunesmith.verify.records import Answer, Status

CJK = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef]")
CAUSE = re.compile(r"cause_[a-z_]+")


def placeholders(template: str) -> set[tuple[str, str]]:
    """Every placeholder of a template with its format specification."""
    return {(name, spec or "") for _, name, spec, _ in string.Formatter().parse(template) if name is not None}


def codes_in(source: str) -> set[str]:
    """Every code that a module gives to a finding as text, and every cause that it names."""
    tree = ast.parse(source)
    codes = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and is_cause(node.value)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Finding":
            given = [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            parts = [part for code in given for part in outcomes(code)]
            codes |= {part.value for part in parts if isinstance(part, ast.Constant)}
    return codes


def outcomes(expression: ast.expr) -> list[ast.expr]:
    """What an expression may come to: both sides of a condition, else itself."""
    return [expression.body, expression.orelse] if isinstance(expression, ast.IfExp) else [expression]


def is_cause(value: object) -> bool:
    """Whether a constant is the code of a cause."""
    return isinstance(value, str) and CAUSE.fullmatch(value) is not None


def test_both_languages_have_the_same_keys() -> None:
    """A key that one language lacks would fail only where that language is read."""
    assert templates("en").keys() == templates("zh").keys()


def test_both_languages_name_the_same_placeholders() -> None:
    """A figure that one language shows is shown by the other, in the same form."""
    english, chinese = templates("en"), templates("zh")
    assert [key for key in english if placeholders(english[key]) != placeholders(chinese[key])] == []


def test_english_texts_hold_no_chinese_and_chinese_texts_do() -> None:
    """Each file holds its own language; names and formulas are the same in both."""
    assert [key for key, template in templates("en").items() if CJK.search(template)] == []
    untranslated = {key for key, template in templates("zh").items() if not CJK.search(template)}
    names = {key for key in untranslated if key.startswith(("writer.", "written.", "unit."))}
    assert untranslated - names <= {
        "chart.heatmap.update",
        "effect.better_of",
        "fact.scaling_plain",
        "merge.sha256",
        "merge.updated_of",
        "page.export.tab.gguf",
        "page.push.role.modelfile",
        "page.push.to.huggingface",
    }


def test_every_finding_that_the_source_writes_out_has_a_text() -> None:
    """A report must not fail because a new finding was given no sentence."""
    folder = Path(texts.__file__).parents[2]
    used = {code for path in folder.rglob("*.py") for code in codes_in(path.read_text("utf-8"))}
    assert len(used) > 20
    assert sorted(code for code in used if f"finding.{code}" not in templates("en")) == []


def test_every_file_kind_answer_and_status_has_a_text() -> None:
    """The closed lists of the other rooms are all spoken for."""
    for lang in LANGUAGES:
        for known in (*CATALOGUE, UNKNOWN, LINK, SPECIAL):
            assert text(f"file.{known.kind}", lang)
            assert text(f"needed.{known.needed_for}", lang)
            assert known.written_by is None or text(f"written.{known.written_by}", lang)
        for group, reasons in (("reason", Reason), ("kept", KeptReason), ("failed", FailedReason)):
            assert all(f"cleanup.{group}.{reason}" in templates(lang) for reason in get_args(reasons))
        assert all(text(f"verdict.{answer}", lang) for answer in get_args(Answer))
        assert all(text(f"status.{status}", lang) for status in get_args(Status))


def test_an_unknown_key_is_an_error_that_names_the_nearest() -> None:
    """A typing mistake is found when it is made, not read by a user."""
    with pytest.raises(KeyError, match=r"verdict\.identical"):
        text("verdict.identicall")
    with pytest.raises(KeyError, match="no language 'fr'"):
        text("verdict.identical", "fr")


def test_a_missing_parameter_is_an_error_that_names_it() -> None:
    """A sentence of ours is never shown with a hole in it."""
    with pytest.raises(KeyError, match="limit"):
        text("outputs.greedy", dtype="float32")


def test_a_finding_that_lacks_a_parameter_shows_a_dash() -> None:
    """A record of another version must not keep the report from being written; an unknown code is an error."""
    assert "– times" in finding_text(Finding(code="cause_scaled", severity="error"))
    with pytest.raises(KeyError, match=r"finding\.cause_scaled"):
        finding_text(Finding(code="cause_scald", severity="error"))


def test_values_are_formatted_with_the_units_of_people() -> None:
    """Sizes have units; a value that does not fit its specification is shown as it is."""
    assert text("files.summary", "en", count=1234, size=9_752_000) == "All 1,234 files, 9.3 MiB"
    assert "NaN times" in text("finding.cause_scaled", "en", tensor="w", count=1, factor="NaN")
    assert "– times" in text("finding.cause_scaled", "en", tensor="w", count=1, factor=None)


def test_a_parameter_is_never_read_as_a_template() -> None:
    """Braces in a file's name stay braces."""
    assert "{x.__class__}" in text("finding.file_unreadable", file="{x.__class__}")


def test_chinese_verdicts_are_the_words_that_the_page_promises() -> None:
    """The banner's words are part of the design."""
    words = [text(f"verdict.{answer}", "zh") for answer in get_args(Answer)]
    assert words == ["一致", "有差异但可接受", "量化误差范围内一致", "不一致", "未验证"]
