"""The part of Go's ``text/template`` that chat templates are written in here, read and carried out as Ollama does.

Strict: whatever is not in this part is an error, so that nothing is shown here which Go would show otherwise.  Texts
are bytes, as in Go: lengths and slices count bytes of UTF-8.

Source: https://pkg.go.dev/text/template; Ollama's ``template/template.go`` (``Execute``, ``collate``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import TypeAlias

from tunesmith.conversations import Message

Value: TypeAlias = "bytes | int | bool | Mapping[str, Value] | list[Value]"

_TOKEN = re.compile(
    r"""\s*(?:(?P<text>"(?:[^"\\\n]|\\.)*")|(?P<number>\d+)|(?P<mark>:=|=|,|\(|\))"""
    r"""|(?P<path>\$\w*(?:\.\w+)*|(?:\.\w+)+)|(?P<word>[A-Za-z]\w*))"""
)
_JOINED = "\n\n"
_ESCAPES = {"\n": "\\n", "\t": "\\t"}
_ESCAPED = {"n": "\n", "t": "\t", '"': '"', "\\": "\\"}


class GoTemplateError(Exception):
    """A template outside this part of the language, or one that stops while it is carried out, as Go's would."""


def collate(messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """What Ollama does to turns before a template sees them.

    Returns:
        All system texts joined by an empty line, and the turns, those of one role in a row joined likewise.

    Source: ``collate`` in Ollama's ``template/template.go``.
    """
    turns: list[Message] = []
    for message in messages:
        if turns and turns[-1].role == message.role:
            turns[-1] = Message(role=message.role, content=turns[-1].content + _JOINED + message.content)
        else:
            turns.append(message)
    return _JOINED.join(turn.content for turn in messages if turn.role == "system"), turns


@dataclass(frozen=True)
class GoTemplate:
    """A template, read.

    Attributes:
        source: its text.
    """

    source: str
    _body: list[_Node] = field(repr=False)

    def render(self, messages: Sequence[Message], *, today: date | None = None) -> str:
        """What Ollama sends to the model for these turns.

        Args:
            messages: the turns, as they were sent; they are collated here.
            today: what ``currentDate`` says; None for the real one.

        Raises:
            GoTemplateError: the template stops, so that Ollama answers with an error.
        """
        system, turns = collate(messages)
        shown: list[Value] = [{"Role": turn.role.encode(), "Content": turn.content.encode()} for turn in turns]
        root: dict[str, Value] = {"System": system.encode(), "Messages": shown, "Response": b""}
        out: list[bytes] = []
        _run(self._body, _Scope({"$": root}, today or date.today()), root, out)
        try:
            return b"".join(out).decode()
        except UnicodeDecodeError as error:
            raise GoTemplateError("a character was cut in two") from error


def parse(source: str) -> GoTemplate:
    """Read a template.

    Raises:
        GoTemplateError: it holds something outside this part of the language, or does not read ``.Messages``, which
            makes Ollama carry it out otherwise.
    """
    pieces = list(_pieces(source))
    body, rest, word = _block(pieces, 0)
    if word is not None or rest != len(pieces):
        raise GoTemplateError(f"unexpected {word or 'action'}")
    if not any(".Messages" in token for kind, tokens in pieces if kind == "action" for token in tokens):
        raise GoTemplateError("the template does not read .Messages")
    return GoTemplate(source, body)


# Nodes: what a template is made of.


@dataclass(frozen=True)
class _Text:
    data: bytes


@dataclass(frozen=True)
class _Shown:
    value: _Expression


@dataclass(frozen=True)
class _Set:
    name: str
    value: _Expression
    declares: bool


@dataclass(frozen=True)
class _If:
    condition: _Expression
    then: list[_Node]
    other: list[_Node]


@dataclass(frozen=True)
class _Range:
    names: tuple[str, ...]
    over: _Expression
    body: list[_Node]


@dataclass(frozen=True)
class _Break:
    pass


@dataclass(frozen=True)
class _Constant:
    value: Value


@dataclass(frozen=True)
class _Path:
    start: str  # "." or a variable
    fields: tuple[str, ...]


@dataclass(frozen=True)
class _Call:
    function: str
    arguments: tuple[_Expression, ...]


_Node: TypeAlias = "_Text | _Shown | _Set | _If | _Range | _Break"
_Expression: TypeAlias = "_Constant | _Path | _Call"
_Piece: TypeAlias = tuple[str, tuple[str, ...]]


def _pieces(source: str) -> Iterator[_Piece]:
    """Texts, and actions as their tokens."""
    place = 0
    while (start := source.find("{{", place)) >= 0:
        if start > place:
            yield "text", (source[place:start],)
        place = start + 2
        tokens: list[str] = []
        while not (end := re.compile(r"\s*\}\}").match(source, place)):
            found = _TOKEN.match(source, place)
            if found is None:
                raise GoTemplateError(f"unknown at {source[place : place + 20]!r}")
            tokens.append(found[0].strip(" \t\r\n"))
            place = found.end()
        yield "action", tuple(tokens)
        place = end.end()
    if place < len(source):
        yield "text", (source[place:],)


def _block(pieces: list[_Piece], place: int) -> tuple[list[_Node], int, str | None]:
    """Nodes up to an ``end`` or ``else``, which is left at the place returned; None at the end of the template."""
    nodes: list[_Node] = []
    while place < len(pieces):
        kind, tokens = pieces[place]
        if kind == "text":
            nodes.append(_Text(tokens[0].encode()))
            place += 1
        elif tokens[:1] in (("end",), ("else",)):
            return nodes, place, tokens[0]
        elif tokens[:1] in (("if",), ("range",)):
            node, place = _branch(pieces, place, tokens)
            nodes.append(node)
        else:
            nodes.append(_simple(tokens))
            place += 1
    return nodes, place, None


def _branch(pieces: list[_Piece], place: int, tokens: tuple[str, ...]) -> tuple[_Node, int]:
    """An ``if`` or ``range`` with all that belongs to it; ``else if`` is an ``if`` in the other branch."""
    then, place, word = _block(pieces, place + 1)
    if tokens[0] == "range":
        if word != "end" or pieces[place][1] != ("end",):
            raise GoTemplateError("a range ends with {{ end }}")
        names: tuple[str, ...] = ()
        rest = tokens[1:]
        if ":=" in rest:
            split = rest.index(":=")
            names, rest = tuple(name for name in rest[:split] if name != ","), rest[split + 1 :]
        return _Range(names, _expression(rest), then), place + 1
    condition = _expression(tokens[1:])
    if word == "else" and pieces[place][1][1:2] == ("if",):
        nested, place = _branch(pieces, place, pieces[place][1][1:])
        return _If(condition, then, [nested]), place
    other: list[_Node] = []
    if word == "else":
        other, place, word = _block(pieces, place + 1)
    if word != "end" or pieces[place][1] != ("end",):
        raise GoTemplateError("an if ends with {{ end }}")
    return _If(condition, then, other), place + 1


def _simple(tokens: tuple[str, ...]) -> _Node:
    if tokens == ("break",):
        return _Break()
    if len(tokens) > 2 and tokens[0].startswith("$") and tokens[1] in (":=", "="):
        return _Set(tokens[0], _expression(tokens[2:]), declares=tokens[1] == ":=")
    return _Shown(_expression(tokens))


def _expression(parts: Sequence[str]) -> _Expression:
    operands: list[_Expression] = []
    place = 0
    while place < len(parts):
        part = parts[place]
        place += 1
        if part == "(":
            depth, start = 1, place
            while depth and place < len(parts):
                depth += {"(": 1, ")": -1}.get(parts[place], 0)
                place += 1
            if depth:
                raise GoTemplateError("a bracket is not closed")
            operands.append(_expression(parts[start : place - 1]))
        elif not operands and part in _FUNCTIONS:
            operands.append(_Call(part, ()))
        else:
            operands.append(_operand(part))
    if len(operands) == 1:
        return operands[0]
    first = operands[0] if operands else None
    if not isinstance(first, _Call) or first.arguments or parts[0] == "(":
        raise GoTemplateError(f"not an expression: {' '.join(parts)!r}")
    return _Call(first.function, tuple(operands[1:]))


def _operand(part: str) -> _Expression:
    if part[0] == '"':
        return _Constant(unquoted(part).encode())
    if part.isdigit():
        return _Constant(int(part))
    if part in ("true", "false"):
        return _Constant(part == "true")
    if part[0] in "$.":
        start, *fields = part.split(".")
        return _Path(start or ".", tuple(fields))
    raise GoTemplateError(f"unknown word {part!r}")


def quoted(text: str) -> str:
    """A text as a Go string; what Go does not print is escaped, for a Modelfile's reader drops it."""
    return '"' + "".join(_escaped(letter) for letter in text) + '"'


def _escaped(letter: str) -> str:
    if letter in '"\\':
        return "\\" + letter
    if letter.isprintable():
        return letter
    code = ord(letter)
    return _ESCAPES.get(letter) or (f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}")


def unquoted(literal: str) -> str:
    """The text of a Go string as :func:`quoted` writes them.

    Raises:
        GoTemplateError: it holds an escape that :func:`quoted` does not write.
    """

    def one(found: re.Match[str]) -> str:
        if found[1] is None:
            raise GoTemplateError(f"unknown escape in {literal}")
        return _ESCAPED.get(found[1]) or chr(int(found[1][1:], 16))

    return re.sub(r'\\(?:(u[0-9a-f]{4}|U[0-9a-f]{8}|[nt"\\])|.)', one, literal[1:-1])


# Carrying out.


class _Scope:
    """Variables, innermost first, and today's date."""

    def __init__(self, names: dict[str, Value], today: date, outer: _Scope | None = None) -> None:
        self.names, self.today, self.outer = names, today, outer

    def inner(self, **names: Value) -> _Scope:
        return _Scope(dict(names), self.today, self)

    def home(self, name: str) -> dict[str, Value]:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names
            scope = scope.outer
        raise GoTemplateError(f"undefined variable {name}")


class _Stopped(Exception):  # noqa: N818 - a break, not an error
    pass


def _run(nodes: list[_Node], scope: _Scope, dot: Value, out: list[bytes]) -> None:
    for node in nodes:
        match node:
            case _Text(data):
                out.append(data)
            case _Shown(value):
                out.append(_printed(_value(value, scope, dot)))
            case _Set(name, value, declares):
                home = scope.names if declares else scope.home(name)
                home[name] = _value(value, scope, dot)
            case _If(condition, then, other):
                _run(then if _truth(_value(condition, scope, dot)) else other, scope.inner(), dot, out)
            case _Range():
                _loop(node, scope, dot, out)
            case _Break():
                raise _Stopped


def _loop(node: _Range, scope: _Scope, dot: Value, out: list[bytes]) -> None:
    over = _value(node.over, scope, dot)
    if isinstance(over, bool) or not isinstance(over, int | list):
        raise GoTemplateError("range wants a list or a number")
    items: Sequence[Value] = list(range(over)) if isinstance(over, int) else over
    for index, item in enumerate(items):
        names = (index, item) if len(node.names) == 2 else (item,)
        try:
            _run(node.body, scope.inner(**dict(zip(node.names, names, strict=False))), item, out)
        except _Stopped:
            return


def _value(expression: _Expression, scope: _Scope, dot: Value) -> Value:
    match expression:
        case _Constant(value):
            return value
        case _Path(start, fields):
            found = dot if start == "." else scope.home(start)[start]
            for name in fields:
                if not isinstance(found, Mapping) or name not in found:
                    raise GoTemplateError(f"can't evaluate field {name}")
                found = found[name]
            return found
        case _Call("and" | "or" as function, arguments):
            for argument in arguments:
                last = _value(argument, scope, dot)
                if _truth(last) == (function == "or"):
                    break
            return last
        case _Call(function, arguments):
            given = [_value(argument, scope, dot) for argument in arguments]
            if function == "currentDate":
                return scope.today.isoformat().encode()
            try:
                return _FUNCTIONS[function](*given)
            except TypeError as error:
                raise GoTemplateError(f"error calling {function}: wrong number or type of arguments") from error


def _truth(value: Value) -> bool:
    return bool(value)


def _printed(value: Value) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, bool):
        return b"true" if value else b"false"
    if isinstance(value, int):
        return str(value).encode()
    raise GoTemplateError("a list or a turn is not shown as text")


def _equal(first: Value, *others: Value) -> bool:
    if not others or any(type(other) is not type(first) for other in others) or isinstance(first, list | Mapping):
        raise GoTemplateError("error calling eq: incompatible types for comparison")
    return any(first == other for other in others)


def _slice(value: Value, *bounds: Value) -> Value:
    if not isinstance(value, bytes | list) or not 1 <= len(bounds) <= 2:
        raise GoTemplateError("error calling slice: wrong arguments")
    length = len(value)
    start, end = (*bounds, length)[:2]
    if type(start) is not int or type(end) is not int or not 0 <= start <= end <= length:
        raise GoTemplateError("error calling slice: index out of range")
    return value[start:end]


def _length(value: Value) -> int:
    if not isinstance(value, bytes | list):
        raise GoTemplateError("error calling len: a number or a turn has none")
    return len(value)


def _index(value: Value, place: Value) -> Value:
    if not isinstance(value, list) or type(place) is not int or not 0 <= place < len(value):
        raise GoTemplateError("error calling index: cannot index so")
    return value[place]


def _print(*values: Value) -> bytes:
    if not all(isinstance(value, bytes) for value in values):
        raise GoTemplateError("only texts are joined here")  # Go puts blanks between two that are none
    return b"".join(_printed(value) for value in values)


def _ordered(compare: Callable[[int, int], bool]) -> Callable[[Value, Value], bool]:
    def checked(one: Value, other: Value) -> bool:
        if type(one) is not int or type(other) is not int:
            raise GoTemplateError("only numbers are ordered here")
        return compare(one, other)

    return checked


_FUNCTIONS: dict[str, Callable[..., Value]] = {
    "and": lambda *given: given[-1],
    "or": lambda *given: given[-1],
    "not": lambda value: not _truth(value),
    "eq": _equal,
    "ne": lambda one, other: not _equal(one, other),
    "len": _length,
    "slice": _slice,
    "index": _index,
    "print": _print,
    "le": _ordered(lambda one, other: one <= other),
    "ge": _ordered(lambda one, other: one >= other),
    "currentDate": lambda: b"",
}
