"""Model text and file names as a person may safely see them.

HTML escaping alone is not enough: a terminal escape, a right-to-left override or a NUL in a model's answer would
still change what the page shows.  Every such character is replaced by a visible name for itself.
"""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markupsafe import Markup

# Kept as they are: tab, line feed, and the joiners that Indic scripts, Persian and emoji need.
_KEPT = frozenset("\t\n\u200c\u200d")
_CODE = re.compile(r"`([^`]+)`")


def visible(text: str) -> str:
    """Replace characters that are unseen or steer the display by visible ones.

    C0 controls and DEL become their control pictures (``␀``, ``␛``); other control, format, bidirectional, private,
    unassigned and surrogate code points become ``⟨U+202E⟩``.  Carriage returns before a line feed are dropped.
    """
    if text.isprintable():
        return text
    return "".join(map(_shown, text.replace("\r\n", "\n")))


def _shown(character: str) -> str:
    if character.isprintable() or character in _KEPT or unicodedata.category(character) == "Zs":
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def prose(text: str) -> Markup:
    """Interface text as HTML: shown safely, with ```code``` between backticks set as code."""
    from markupsafe import Markup, escape

    safe = str(escape(visible(text)))
    return Markup(_CODE.sub(r'<code translate="no">\1</code>', safe))  # noqa: S704 - escaped one line above
