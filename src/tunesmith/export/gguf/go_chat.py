"""A chat template as Ollama's Go templates can say it: derived from what it shows, then checked by rendering both.

Whatever a chat template does, it shows turns: a beginning, what stands around every turn's text, what the answer is
written after.  These pieces are read off a few conversations whose texts are found again.  What they make is only a
guess; it is taken where :mod:`~tunesmith.export.gguf.go_template`, which renders as Ollama does, makes the same texts
as the chat template of every conversation of :func:`probe_conversations`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from itertools import product

from tunesmith.conversations import Message
from tunesmith.export.gguf.go_pieces import EMPTY, Edit, Pieces, go_source, has_date, on_day
from tunesmith.export.gguf.go_template import GoTemplateError, collate, parse

# The text of these turns, with what asks for an answer or without it; Refused where the chat template refuses them.
Show = Callable[[Sequence[Message], bool], str]

_S, _U, _A, _V, _B, _W = "sYs7text", "uSr1text", "aNs1text", "uSr2text", "aNs2text", "uSr3text"
_PAD = " \n\t"
_THOUGHT_END = re.compile(r"</[\w:]*thin?k(?:ing)?>|</thought>|\[/THINK\]|◁/think▷")
# What templates trip over: nothing, blanks of every kind, marks of their own and of Go's, thoughts, switches.
_WORDS = (
    *("ab", "", "  \n a b \t\n", "他说“好”\u3000", "\u3000\u00a0x\u2003", "{{ .Content }} {% if x %} {# c #}"),
    *('"""q\\n"\'`', "<|im_end|></s><s>[INST]", "<think>\nt\n</think>\n\nab", "a</think>b</think> \nc", "</think>"),
    *("\n\nab\n\n", "🙂e\u0301 \x0b\x1c", "[THINK]t[/THINK]u", "<thought>t</thought> u", "x\ufeff", "false"),
    *("a /no_think", "<<SYS>>\n/think\n<</SYS>>"),
)
# Turns by their first letters: as in a chat, with an answer begun, with roles in a row, with a system's text in
# between, and as Ollama shortens a chat that is too long.
_ORDERS = (
    *("u", "su", "uau", "suau", "uauau", "suauau", "suauauauauau", "ua", "sua", "uaua", "suaua"),
    *("uu", "ssu", "uaau", "suu", "uasu", "suasu", "au", "sau", "auau"),
)
_DAYS = (date(2026, 2, 7), date(2031, 12, 25))


class Refused(Exception):  # noqa: N818 - an answer, not an error
    """The chat template refuses these turns."""


@dataclass(frozen=True)
class GoChat:
    """A chat template in Go, and what it was checked on.

    Attributes:
        source: the Go template; None where none was found that renders the same.
        conversations: how many conversations were rendered by both.
        refuses_system: whether a system's text ends in an error, as in the chat template.
        dated: whether it shows today's date, which Ollama 0.11.1 and later know.
        loops: whether it counts through texts to take blanks or thoughts away, which Ollama 0.5.13 and later can.
        wants: the prompt of the first conversation in which the nearest guess differs; None where none does.
        gives: what that guess renders there.
        roles: the roles of that conversation's turns.
    """

    source: str | None
    conversations: int
    refuses_system: bool = False
    dated: bool = False
    loops: bool = False
    wants: str | None = None
    gives: str | None = None
    roles: tuple[str, ...] = ()


def go_chat(show: Show, *, template: str, added: str = "") -> GoChat:
    """Find the Go template that shows what a chat template shows.

    Args:
        show: the chat template.
        template: its text, in which the ends of thoughts are looked for.
        added: what the tokenizer begins a prompt with by itself, so that the Go template does not.
    """
    probes = [(turns, wanted and wanted.removeprefix(added)) for turns, wanted in _expected(show)]
    nearest: GoChat | None = None
    best = -1
    for pieces in _guesses(show, template):
        found, equal = _checked(pieces, added, probes)
        if found.source is not None:
            return found
        if equal > best:
            nearest, best = found, equal
    return nearest or GoChat(None, len(probes))


def probe_conversations() -> Iterator[tuple[Message, ...]]:
    """Conversations as Ollama may be sent: every order of turns, and texts that templates trip over."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    for order in _ORDERS:
        for shift in range(len(_WORDS)):
            yield tuple(
                Message(role=roles[turn], content=_WORDS[(shift + step * (1 + shift % 3)) % len(_WORDS)])
                for step, turn in enumerate(order)
            )


def _expected(show: Show) -> Iterator[tuple[tuple[Message, ...], str | None]]:
    """Conversations with the prompt that each should make; None where a system's text alone makes it refused."""
    for turns in probe_conversations():
        _, collated = collate(turns)
        held = collated[-1].content if collated[-1].role == "assistant" else ""
        asked = collated[:-1] if collated[-1].role == "assistant" else collated
        try:
            yield turns, show(asked, True) + held
        except Refused:
            without = [turn for turn in asked if turn.role != "system"]
            if len(without) == len(asked):
                continue  # Ollama shows what the chat template refuses: nothing to compare
            try:
                show(collate(without)[1], True)
            except Refused:
                continue
            yield turns, None


def _checked(pieces: Pieces, added: str, probes: list[tuple[tuple[Message, ...], str | None]]) -> tuple[GoChat, int]:
    """The Go template of these pieces, without its source where it differs, and how many conversations it got right."""
    source = go_source(pieces, added)
    template = parse(source)
    told = GoChat(
        source,
        len(probes),
        refuses_system=pieces.first_system is None and pieces.system_at == "place",
        dated="currentDate" in source,
        loops="range len " in source or ":= len " in source,
    )
    for place, (turns, wanted) in enumerate(probes):
        for day in _DAYS if has_date(wanted or "") else _DAYS[:1]:
            given: str | None
            try:
                given = template.render(turns, today=day)
            except GoTemplateError:
                given = None
            if given != (None if wanted is None else on_day(day, wanted)):
                roles = tuple(turn.role for turn in turns)
                return replace(told, source=None, wants=wanted, gives=given, roles=roles), place
    return told, len(probes)


# Guessing.


def _guesses(show: Show, template: str) -> Iterator[Pieces]:
    """Sets of pieces, the plainest first."""
    try:
        seen = (*_turn_by_turn(show), _in_between(show), _system_last(show))
    except (Refused, _Lost):
        return
    edits, refuses_later = _edits(show, template), _refuses_later(show)
    swapped = tuple((role, replace(edit, trims_first=bool(edit.thought_end))) for role, edit in edits)
    for shape in dict.fromkeys(shape for shape in seen if shape is not None):
        places = ("place", "front") if shape.system_at == "place" and shape.first_system else (shape.system_at,)
        joins = (False, True) if shape.system_at == "inside" and "user" in dict(edits) else (False,)
        for kept, joined, place, empty in product(dict.fromkeys((edits, swapped)), joins, places, EMPTY):
            yield replace(
                shape, edits=kept, joined=joined, system_at=place, empty_system=empty, refuses_later=refuses_later
            )


class _Lost(Exception):  # noqa: N818 - a guess that does not apply
    """The texts do not stand where they were looked for."""


def _cut(text: str, *marks: str) -> list[str]:
    """What stands before, between and after marks that each stand there once, in this order."""
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise _Lost
        pieces.append(before)
    return [*pieces, text]


def _turns(*texts: str) -> list[Message]:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [Message(role=roles[text[0]], content=text) for text in texts]


@dataclass(frozen=True)
class _Between:
    """What stands around a first user's text, an answer and a second user's text.

    Attributes:
        before: before the first user's text.
        user_end: after a user's text, whatever follows.
        asks: what the answer is written after.
        header: what stands there once the answer is there.
        to_user: from an answer to the next user's text.
    """

    before: str
    user_end: str
    asks: str
    header: str
    to_user: str


def _between(show: Show) -> _Between:
    before, asks = _cut(show(_turns(_U), True), _U)
    _, to_answer, to_user, _ = _cut(show(_turns(_U, _A, _V), True), _U, _A, _V)
    user_end = _cut(show(_turns(_U), False), _U)[1]
    if not (to_answer.startswith(user_end) and asks.startswith(user_end)):
        user_end = _user_end(show, to_answer, asks)
    return _Between(before, user_end, asks[len(user_end) :], to_answer[len(user_end) :], to_user)


def _user_end(show: Show, to_answer: str, asks: str) -> str:
    """What ends a user's turn, seen where an answer comes first, or all that a prompt and history share."""
    with suppress(Refused, _Lost):
        header = _common_end(_cut(show(_turns(_A, _U), True), _A, _U)[0], to_answer)
        if header and asks.startswith(to_answer.removesuffix(header)):
            return to_answer.removesuffix(header)
    return _common_start(to_answer, asks)


def _common_start(one: str, other: str) -> str:
    return next((one[:end] for end in range(len(one), 0, -1) if other.startswith(one[:end])), "")


def _common_end(one: str, other: str) -> str:
    return next((one[start:] for start in range(len(one)) if other.endswith(one[start:])), "")


def _system_pieces(show: Show) -> tuple[tuple[str, str] | None, bool]:
    """What stands before the system's text, and from there to the user's; whether it is shown at all."""
    try:
        text = show(_turns(_S, _U), True)
    except Refused:
        return None, True
    if _S not in text:
        return None, False
    before, between, _ = _cut(text, _S, _U)
    return (before, between), True


def _in_between(show: Show) -> Pieces | None:
    """All that stands between two texts as one piece: what needs no knowledge of where a turn ends."""
    seen = _between(show)
    try:
        system, shown = _system_pieces(show)
    except _Lost:
        return None
    return Pieces(
        bare=seen.before,
        first_system=system,
        later_system=None,
        user=("", seen.user_end),
        asks=seen.asks,
        header=seen.header,
        answer_end=seen.to_user,
        system_at="place" if shown else "never",
    )


def _turn_by_turn(show: Show) -> Iterator[Pieces]:
    """A beginning and an end for every turn, so that they may come in any order."""
    shape = _in_between(show)
    begins = None if shape is None else _user_begins(show, shape)
    if shape is None or begins is None:
        return
    if not shape.bare.endswith(begins):
        yield from _default_inside(shape, begins)
        return
    end = shape.answer_end.removesuffix(begins)
    told = replace(shape, bare=shape.bare.removesuffix(begins), user=(begins, shape.user[1]), answer_end=end)
    if shape.first_system is None:
        yield told
        return
    before, after = shape.first_system
    if after.endswith(begins):
        later = _later_system(show, end, begins)
        yield replace(told, first_system=(before, after.removesuffix(begins)), later_system=later)
    if before.startswith(shape.bare):
        yield replace(told, first_system=(before.removeprefix(shape.bare), after), system_at="inside")


def _default_inside(shape: Pieces, begins: str) -> Iterator[Pieces]:
    """A first user's turn that holds the system's text, or a default one."""
    bare, found, default = shape.bare.partition(begins)
    if not found or shape.first_system is None or not shape.first_system[0].startswith(bare + begins):
        return
    before, after = shape.first_system
    yield replace(
        shape,
        bare=bare,
        first_system=(before.removeprefix(bare + begins), after),
        user=(begins, shape.user[1]),
        answer_end=shape.answer_end.removesuffix(begins),
        system_at="inside",
        default_inside=default,
    )


def _user_begins(show: Show, shape: Pieces) -> str | None:
    """What a user's turn begins with, seen where an answer ends without one, or where two users' turns meet."""
    between = shape.answer_end
    with suppress(Refused, _Lost):
        end = _cut(show(_turns(_U, _A), False), _U, _A)[2]
        if end and between.startswith(end):
            return between.removeprefix(end)
    with suppress(Refused, _Lost):
        meets = _cut(show(_turns(_U, _V), True), _U, _V)[1]
        if meets.startswith(shape.user[1]):
            return meets.removeprefix(shape.user[1])
    return None


def _later_system(show: Show, end: str, begins: str) -> tuple[str, str] | None:
    try:
        _, _, before, after, _ = _cut(show(_turns(_U, _A, _S, _V), True), _U, _A, _S, _V)
    except (Refused, _Lost):
        return None
    if not before.startswith(end) or not after.endswith(begins):
        return None
    return before.removeprefix(end), after.removesuffix(begins)


def _refuses_later(show: Show) -> bool:
    try:
        show(_turns(_U, _A, _S, _V), True)
    except Refused:
        return True
    return False


def _system_last(show: Show) -> Pieces | None:
    """The system's text in the last user's turn."""
    seen = _between(show)
    try:
        first, _, to_system, to_text, _ = _cut(show(_turns(_S, _U, _A, _V), True), _U, _A, _S, _V)
    except (Refused, _Lost):
        return None
    begins = _common_end(seen.before, seen.to_user)
    if first != seen.before or not to_system.startswith(seen.to_user):
        return None
    return Pieces(
        bare=seen.before.removesuffix(begins),
        first_system=(to_system.removeprefix(seen.to_user), to_text),
        later_system=None,
        user=(begins, seen.user_end),
        asks=seen.asks,
        header=seen.header,
        answer_end=seen.to_user.removesuffix(begins),
        system_at="last",
    )


def _edits(show: Show, template: str) -> tuple[tuple[str, Edit], ...]:
    """What becomes of blanks around a text, and of thoughts in an answer."""
    edits = {}
    for role, mark, turns in (
        ("system", _S, [_S, _U]),
        ("user", _U, [_U]),
        ("assistant", _A, [_U, _A, _V]),
    ):
        try:
            edits[role] = _edit(show, template, mark, turns)
        except (Refused, _Lost):
            edits[role] = Edit()
    return tuple((role, edit) for role, edit in edits.items() if edit != Edit())


def _edit(show: Show, template: str, mark: str, texts: list[str]) -> Edit:
    plain = show(_turns(*texts), True)

    def becomes(text: str) -> str:
        """What a text is shown as, in the place of the mark."""
        turns = [_with_text(turn, text) if turn.content == mark else turn for turn in _turns(*texts)]
        before, after = _cut(plain, mark)
        shown = show(turns, True)
        if not shown.startswith(before) or not shown.endswith(after) or len(shown) < len(before) + len(after):
            raise _Lost
        return shown[len(before) : len(shown) - len(after)]

    edit = _blanks_of(becomes, "")
    for end in dict.fromkeys(_THOUGHT_END.findall(template)):
        if "thought" not in becomes(f"thought{end}{mark}"):
            return replace(edit, thought_end=end, after_thought=_blanks_of(becomes, f"t{end}").left)
    return edit


def _with_text(turn: Message, text: str) -> Message:
    """The same turn with another text."""
    return Message(role=turn.role, content=text)


def _blanks_of(becomes: Callable[[str], str], before: str) -> Edit:
    left = [kept for kept in (None, "\n", "") if becomes(f"{before}{_PAD}x") == f"{_stripped(_PAD, kept)}x"]
    right = [
        kept for kept in (None, "\n", "") if becomes(f"{before}x{_PAD[::-1]}") == f"x{_stripped(_PAD, kept)[::-1]}"
    ]
    newline = becomes(f"{before}\nx") == "x"
    if left[:1] == [None] and newline:
        left = ["\n"]
    return Edit(left=left[0] if left else None, right=right[0] if right else None)


def _stripped(text: str, blanks: str | None) -> str:
    return text if blanks is None else text.lstrip(blanks or None)
