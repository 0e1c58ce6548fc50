"""Every sentence that report and page show, in English and in Chinese.

The texts are flat maps from a key to a ``str.format`` template, one JSON file a language.  To add one, put the same
key with the same placeholders into ``texts/en.json`` and ``texts/zh.json``; a finding's key is ``finding.<code>``.

Format specifications are kept to a few, so that the page's JavaScript can render the same templates: ``,`` (thousands),
``.3f``, ``.3g``, ``.1%``, and some of our own: ``bytes`` (``9.3 MiB``), ``nats`` (``1.234``, and ``0.00012`` below a
hundredth), ``figure`` (three significant digits), ``percent`` (``12.3%`` of 0.123) and ``points`` (``12.3`` of 0.123).
A ``+`` before one of these, as before Python's, shows the sign of what is above 0.
"""

from __future__ import annotations

import difflib
import json
import math
import string
from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from typing import Any

from tunesmith.record import Finding
from tunesmith.report.units import figure, human_bytes, nats, percent, points

LANGUAGES = ("en", "zh")

_OURS: Mapping[str, Callable[[float], str]] = {
    "bytes": human_bytes,
    "nats": nats,
    "figure": figure,
    "percent": percent,
    "points": points,
}


def text(key: str, lang: str = "en", **params: object) -> str:
    """One interface text.

    Args:
        key: its key, such as ``verdict.identical``.
        lang: one of :data:`LANGUAGES`.
        params: what its placeholders stand for.  A value that does not fit its format specification (None, or text
            where a number is usual) is shown as it is.

    Raises:
        KeyError: an unknown key or language, with the nearest known ones, or a missing parameter.
    """
    known = templates(lang)
    if key not in known:
        raise KeyError(f"no text {key!r}; nearest: {', '.join(difflib.get_close_matches(key, known, n=3)) or 'none'}")
    try:
        return _FORMATTER.vformat(known[key], (), params)
    except KeyError as error:
        raise KeyError(f"the text {key!r} needs the parameter {error}; given: {', '.join(params) or 'none'}") from error


def finding_text(finding: Finding, lang: str = "en") -> str:
    """The sentence of a finding.

    A parameter that the finding lacks is shown as a dash: a record may come from another version of Tunesmith.  What a
    finding is about (``about``, such as a language) may have a text of its own: ``finding.<code>.<about>``.

    Raises:
        KeyError: its code has no text; the nearest are named.
    """
    key = f"finding.{finding.code}"
    special = f"{key}.{finding.params.get('about')}"
    key = special if special in templates(lang) else key
    named = {name: None for _, name, _, _ in _FORMATTER.parse(templates(lang).get(key, "")) if name}
    return text(key, lang, **{**named, **finding.params})


@cache
def templates(lang: str) -> Mapping[str, str]:
    """All templates of one language by key; for the page, which renders them itself.

    Raises:
        KeyError: the language is not one of :data:`LANGUAGES`.
    """
    if lang not in LANGUAGES:
        raise KeyError(f"no language {lang!r}; known: {', '.join(LANGUAGES)}")
    source = resources.files("tunesmith.report.texts") / f"{lang}.json"
    loaded: dict[str, str] = json.loads(source.read_text(encoding="utf-8"))
    return loaded


class _Formatter(string.Formatter):
    """``str.format`` over named plain values, with a unit of our own."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        return self.get_value(field_name, args, kwargs), field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            return "–"
        try:
            ours = _OURS.get(format_spec.removeprefix("+"))
            if ours is None and (not isinstance(value, float) or math.isfinite(value)):
                return format(value, format_spec)
            # A terminal that lacks the real minus sign would show no sign at all.
            shown = (ours or figure)(value).replace("−", "-")
            return f"+{shown}" if format_spec.startswith("+") and value > 0 else shown
        except (TypeError, ValueError):
            return str(value)


_FORMATTER = _Formatter()
