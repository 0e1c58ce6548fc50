"""What a chat template writes around the texts of turns, and the Go template that writes the same."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from tunesmith.export.gguf.go_template import quoted

REFUSAL = "this model's chat template takes no system text here"
# Around a date in a chat template's text, which stands there as its strftime pattern; nobody's characters.
DATE_MARKS = ("\ue0f1", "\ue0f2")
_DATE = re.compile("{0}([^{0}{1}]*){1}".format(*DATE_MARKS))
EMPTY = ("text", "none", "silent", "blank is none", "blank is silent")
_MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "October", "November", "December"),
)
# What Python's str.strip takes away, by how many bytes of UTF-8 it is.
_BLANKS = tuple(
    tuple(letter for letter in map(chr, range(0x3001)) if letter.isspace() and len(letter.encode()) == size)
    for size in (1, 2, 3)
)


@dataclass(frozen=True)
class Edit:
    """What a chat template does to a turn's text.

    Attributes:
        thought_end: all up to the last of these is left out; "" for none.
        after_thought: the blanks that are taken away after it; None for none, "" for every kind.
        left: likewise at the beginning of every text.
        right: likewise at the end.
        trims_first: whether blanks are taken away before thoughts.
    """

    thought_end: str = ""
    after_thought: str | None = None
    left: str | None = None
    right: str | None = None
    trims_first: bool = False


@dataclass(frozen=True)
class Pieces:
    """What a chat template writes around the texts.

    Attributes:
        bare: before the first turn, where no system's text is shown.
        first_system: around the system's text at the beginning; None where it is refused.
        later_system: likewise after other turns.
        user: around a user's text.
        asks: what the answer is written after.
        header: what stands there once it is history.
        answer_end: after an answer.
        system_at: where system texts are shown: at their ``place``, all at the ``front``, ``inside`` a first user's
            turn or inside the ``last`` one; or that they are ``never``.
        empty_system: whether an empty one is shown as a ``text``, is as ``none``, or is ``silent``: it only keeps the
            default out; or so where it is empty once its blanks are taken away.
        edits: of the texts, by role.
        refuses_later: whether a system's text after other turns is refused.
        default_inside: in a first user's turn, where there is no system's text.
        joined: whether what is done to a user's text is done to the system's text before it, too.
    """

    bare: str
    first_system: tuple[str, str] | None
    later_system: tuple[str, str] | None
    user: tuple[str, str]
    asks: str
    header: str
    answer_end: str
    system_at: str = "place"
    empty_system: str = "text"
    edits: tuple[tuple[str, Edit], ...] = ()
    refuses_later: bool = False
    default_inside: str = ""
    joined: bool = False


def go_source(pieces: Pieces, added: str) -> str:
    """The Go template of these pieces.

    Args:
        pieces: what is written around the texts.
        added: what the tokenizer adds at the beginning by itself, so that it is not written there.
    """
    if pieces.system_at == "front":
        return _in_front(pieces, added)
    first_user = (pieces.bare + pieces.user[0]).removeprefix(added)
    first_header = (pieces.bare + pieces.header).removeprefix(added)
    first_asks = (pieces.bare + pieces.asks).removeprefix(added)
    system = pieces.first_system and (pieces.first_system[0].removeprefix(added), pieces.first_system[1])
    tracks = first_user != pieces.user[0] or first_header != pieces.header or pieces.system_at == "inside"
    tracks = tracks or (pieces.system_at == "place" and system != pieces.later_system)
    held = _held_system(pieces)
    start, joined = "", ""
    if pieces.joined:
        joined = f'{{{{ if eq .Role "user" }}}}{held}{{{{ end }}}}'
    elif pieces.system_at == "inside":
        start = f"{_other(first_user, pieces.user[0])}{{{{ if not $begun }}}}{held}{{{{ $begun = true }}}}{{{{ end }}}}"
    user = (start or _first(first_user, pieces.user[0], tracks=tracks) + ("" if joined else held)) + "{{ $text }}"
    answer = (
        f"{{{{ if $last }}}}{_first(first_asks, pieces.asks, tracks=tracks)}{{{{ .Content }}}}"
        f"{{{{ else }}}}{_first(first_header, pieces.header, tracks=tracks)}{{{{ $text }}}}"
        f"{_text(pieces.answer_end)}{{{{ end }}}}"
    )
    variables = "{{ $begun := false }}" if tracks else ""
    variables += '{{ $system := "" }}{{ $held := false }}' if held else ""
    shown = _system(pieces, system, tracks=tracks)
    return variables + _loop(pieces, joined, shown, user + _text(pieces.user[1]), answer)


def _in_front(pieces: Pieces, added: str) -> str:
    """All system texts before all turns."""
    opening = _text(pieces.bare.removeprefix(added))
    if pieces.first_system is not None:
        shown = _around(pieces.first_system, ".System", added)
        opening = f"{{{{ if .System }}}}{shown}{{{{ else }}}}{opening}{{{{ end }}}}"
    user = _around(pieces.user, "$text")
    answer = (
        f"{{{{ if $last }}}}{_text(pieces.asks)}{{{{ .Content }}}}"
        f"{{{{ else }}}}{_around((pieces.header, pieces.answer_end), '$text')}{{{{ end }}}}"
    )
    return opening + _loop(pieces, "", "", user, answer)


def _loop(pieces: Pieces, joined: str, system: str, user: str, answer: str) -> str:
    return (
        "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}{{ $text := .Content }}"
        f"{joined}{_edited(pieces.edits)}"
        f'{{{{ if eq .Role "system" }}}}{system}{{{{ else if eq .Role "user" }}}}{user}'
        f'{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}'
        f'{{{{ if and $last (ne .Role "assistant") }}}}{_text(pieces.asks)}{{{{ end }}}}{{{{ end }}}}'
    )


def _around(around: tuple[str, str], value: str, added: str = "") -> str:
    return f"{_text(around[0].removeprefix(added))}{{{{ {value} }}}}{_text(around[1])}"


def _other(first: str, later: str) -> str:
    """A text that is another one where nothing was shown yet."""
    if first == later:
        return _text(later)
    if first.endswith(later):
        return f"{{{{ if not $begun }}}}{_text(first.removesuffix(later))}{{{{ end }}}}{_text(later)}"
    return f"{{{{ if $begun }}}}{_text(later)}{{{{ else }}}}{_text(first)}{{{{ end }}}}"


def _first(first: str, later: str, *, tracks: bool) -> str:
    """Likewise, and something was shown then."""
    return _other(first, later) + ("{{ $begun = true }}" if tracks else "")


def _held_system(pieces: Pieces) -> str:
    """The system's text inside a user's turn: written there, or put before the user's text."""
    if pieces.system_at not in ("inside", "last") or pieces.first_system is None:
        return ""
    before, after = pieces.first_system
    there = "$held" if pieces.empty_system == "text" else "$system"
    if pieces.system_at == "last":
        there = f"and {there} (le (len (slice $.Messages $i)) 2)"
    shown = _around((before, after), "$system")
    if pieces.joined:
        there = f"and {there} (not $begun)"
        shown = f"{{{{ $text = print {quoted(before)} $system {quoted(after)} $text }}}}"
    default = f"{{{{ else }}}}{_text(pieces.default_inside)}" if pieces.default_inside else ""
    return f"{{{{ if {there} }}}}{shown}{default}{{{{ end }}}}"


def _system(pieces: Pieces, around: tuple[str, str] | None, *, tracks: bool) -> str:
    """What a system's turn shows at its place."""
    refusal = f"{{{{ index $.Messages {quoted(REFUSAL)} }}}}"
    if pieces.system_at != "place":
        held = "{{ $system = $text }}{{ $held = true }}" if pieces.system_at in ("inside", "last") else ""
        return (f"{{{{ if $i }}}}{refusal}{{{{ end }}}}" if pieces.refuses_later else "") + held
    if around is None:
        return refusal
    begins = "{{ $begun = true }}" if tracks else ""
    first = _around(around, "$text")
    there = "$text" if pieces.empty_system.startswith("blank") else ".Content"
    if pieces.empty_system.endswith("none"):
        first = f"{{{{ if {there} }}}}{first}{begins}{{{{ end }}}}"
    elif pieces.empty_system.endswith("silent"):
        first = f"{{{{ if {there} }}}}{first}{{{{ end }}}}{begins}"
    else:
        first += begins
    if not tracks or around == pieces.later_system:
        return first
    later = refusal if pieces.later_system is None else _around(pieces.later_system, "$text")
    return f"{{{{ if $begun }}}}{later}{{{{ else }}}}{first}{{{{ end }}}}"


def _edited(edits: Sequence[tuple[str, Edit]]) -> str:
    """What takes away of a text what the chat template takes away."""
    roles: dict[Edit, list[str]] = {}
    for role, edit in edits:
        roles.setdefault(edit, []).append(role)
    written = []
    for edit, names in roles.items():
        thought = _after_thought(edit) if edit.thought_end else ""
        trims = _trim(edit.left, left=True) + _trim(edit.right, left=False)
        steps = trims + thought if edit.trims_first else thought + trims
        if len(names) < 3:
            steps = f"{{{{ if eq .Role {' '.join(quoted(name) for name in names)} }}}}{steps}{{{{ end }}}}"
        written.append(steps)
    return "".join(written)


def _after_thought(edit: Edit) -> str:
    size = len(edit.thought_end.encode())
    trimmed = _trim(edit.after_thought, left=True)
    # Every place is looked at, so that what follows the last one stays.
    return (
        "{{ $all := $text }}{{ $cut := false }}{{ range $at := len $all }}{{ $rest := slice $all $at }}"
        f"{{{{ if and (ge (len $rest) {size}) (eq (slice $rest 0 {size}) {quoted(edit.thought_end)}) }}}}"
        f"{{{{ $text = slice $rest {size} }}}}{{{{ $cut = true }}}}{{{{ end }}}}{{{{ end }}}}"
        + (f"{{{{ if $cut }}}}{trimmed}{{{{ end }}}}" if trimmed else "")
    )


def _trim(blanks: str | None, *, left: bool) -> str:
    """Take one blank after another away, however many bytes each has."""
    if blanks is None:
        return ""
    cases = []
    for size, kinds in enumerate((tuple(blanks), (), ()) if blanks else _BLANKS, start=1):
        if not kinds:
            continue
        if left:
            edge, rest = f"slice $text 0 {size}", f"slice $text {size}"
        else:
            kept = f"(len (slice $text {size}))"
            edge, rest = f"slice $text {kept}", f"slice $text 0 {kept}"
        words = " ".join(quoted(kind) for kind in kinds)
        cases.append(f"if and (ge (len $text) {size}) (eq ({edge}) {words}) }}}}{{{{ $text = {rest} }}}}")
    taken = "{{ else ".join(cases)
    return f"{{{{ range len $text }}}}{{{{ {taken}{{{{ else }}}}{{{{ break }}}}{{{{ end }}}}{{{{ end }}}}"


def _text(text: str) -> str:
    """A text of the template's own; what Go would take for an action, or a Modelfile's reader lose, is a string."""
    return "".join(_dated(piece) if place % 2 else _plain(piece) for place, piece in enumerate(_DATE.split(text)))


def _plain(text: str) -> str:
    parts = re.split(r'(\{\{|"{2,}|"$|[^\n\t\x20-\x7e]+)', text)
    return "".join(
        f"{{{{ {quoted(part)} }}}}" if place % 2 and (part.isascii() or not part.isprintable()) else part
        for place, part in enumerate(parts)
    )


def _dated(pattern: str) -> str:
    """Today's date in Go, from Ollama's ``currentDate``, which is always YYYY-MM-DD."""
    out = []
    for part in re.split("(%.)", pattern):
        if part in ("%b", "%B"):
            names = [name[:3] if part == "%b" else name for name in _MONTHS]
            cases = [f'(eq (slice (currentDate) 5 7) "{month:02d}") }}}}{name}' for month, name in enumerate(names, 1)]
            out.append("{{ if " + "{{ else if ".join(cases) + "{{ end }}")
        elif part in ("%d", "%m", "%Y"):
            start, end = {"%Y": (0, 4), "%m": (5, 7), "%d": (8, 10)}[part]
            out.append(f"{{{{ slice (currentDate) {start} {end} }}}}")
        else:
            out.append(_plain(part))
    return "".join(out)


def on_day(day: date, text: str) -> str:
    """The text with that day's dates, in English; an unknown mark stays, so that no Go template equals it."""
    names = {"%b": _MONTHS[day.month - 1][:3], "%B": _MONTHS[day.month - 1]}
    names |= {"%d": f"{day.day:02d}", "%m": f"{day.month:02d}", "%Y": f"{day.year:04d}"}

    def said(found: re.Match[str]) -> str:
        return re.sub("%.", lambda mark: names.get(mark[0], DATE_MARKS[0]), found[1])

    return _DATE.sub(said, text)


def has_date(text: str) -> bool:
    """Whether a date stands in a text."""
    return DATE_MARKS[0] in text
