"""``tunesmith compare --vote``: replies two by two, without their names, and what the votes add up to.

The result goes to standard output.  So do the pairs where that is a terminal; else they go to standard error, so that
the result can be piped.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import tunesmith as ts
from tunesmith.cli.output import console, print_json

if TYPE_CHECKING:
    from rich.text import Text

    from tunesmith.cli.screen import Screen
    from tunesmith.compare.votes import BallotPair, BlindVote, Choice, Voting

_CHOICES: dict[str, Choice] = {"a": "left", "1": "left", "b": "right", "2": "right", "t": "tie", "s": "skip"}
_SAID = {"left": "A is better.", "right": "B is better.", "tie": "A tie.", "skip": "Skipped."}
_KEYS = "a: A is better   b: B is better   t: tie   s: skip   u: undo   q: quit"
_UNDO, _QUIT, _NOTHING = "u", "q", ""
_SIDE_BY_SIDE = 80  # columns: below, two texts beside each other are ribbons
_ESCAPE, _END_OF_INPUT = b"\x1b", b"\x04"
_AT_ONCE = 256  # bytes that one press or one paste may bring


def ask_for_votes(comparison: ts.Comparison, file: Path, *, as_json: bool = False) -> None:
    """Show pairs of replies blindly until all are voted on, keep the votes, and print what they say.

    Args:
        comparison: the replies.
        file: where votes are kept; it may hold some already.
        as_json: print the result as a JSON document.

    Raises:
        TunesmithError: the file holds something else, or cannot be written.
    """
    vote_on(ts.Voting(comparison, file), as_json=as_json)


def vote_on(voting: Voting, *, as_json: bool = False) -> None:
    """The same for a voting that is under way.

    Args:
        voting: pairs and votes.
        as_json: print the result as a JSON document.

    Raises:
        KeyboardInterrupt: somebody pressed Ctrl-C; votes are kept, and how to go on is said.
        TunesmithError: a vote cannot be written.
    """
    screen = console(stderr=not sys.stdout.isatty())
    try:
        _ask_all(screen, voting)
    except KeyboardInterrupt:
        _say_what_is_left(screen, voting)
        raise
    _say_what_is_left(screen, voting)
    if as_json:
        print_json(voting.result())
    else:
        _result(console(), voting.result())


def _ask_all(screen: Screen, voting: Voting) -> None:
    if voting.current is None:
        return
    if isinstance(sys.stdin, io.TextIOWrapper):  # bytes that are no text are no key, and no reason to end
        sys.stdin.reconfigure(errors="replace")
    screen.say(
        f"{_pairs(len(voting.ballot.pairs))} to vote on, A and B at random. Votes are kept in {voting.file.path}"
    )
    if voting.done:
        screen.say(f"{voting.done} voted on before.", style="dim")
    shown = None
    while (pair := voting.current) is not None:
        if pair != shown:
            _pair(screen, voting, pair)
            shown = pair
        key = _key(screen)
        if key == _QUIT:
            return
        if key == _UNDO:
            screen.say(
                "The last vote is taken back." if voting.undo() else "There is no vote to take back.", style="dim"
            )
        elif key in _CHOICES:
            voting.choose(_CHOICES[key])
            screen.say(_SAID[_CHOICES[key]], style="dim")
        elif key != _NOTHING:
            screen.say(f"No such key: {key[:20]}", style="dim")


def _pair(screen: Screen, voting: Voting, pair: BallotPair) -> None:
    """One question and two replies; nothing that tells whose they are."""
    prompt, left, right = voting.shown(pair)
    screen.say()
    screen.say(f"[{voting.done + 1} of {len(voting.ballot.pairs)}]", style="dim")
    for turn in prompt.prompt[:-1]:
        screen.say(f"{turn.role}: {turn.content}", style="dim")
    screen.say(prompt.prompt[-1].content, style="bold")
    if screen.is_terminal and screen.width >= _SIDE_BY_SIDE:
        from rich.table import Table

        table = Table(expand=True)
        for name in ("A", "B"):
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(_reply(left), _reply(right))
        screen.print(table)
        return
    for name, reply in (("A", left), ("B", right)):
        screen.say(f"\n--- {name} ---", style="bold")
        screen.print(_reply(reply))
    screen.say()


def _reply(reply: ts.Reply) -> Text:
    from rich.text import Text

    from tunesmith.cli.screen import clean

    text = Text(clean(reply.text.strip()) or ts.text("outputs.empty"))
    if reply.stop_reason == "length":
        text.append(f"\n[{ts.text('stop.length')}]", style="dim")
    return text


def _key(screen: Screen) -> str:
    """What was pressed, in lower case; nothing for a key without a letter, and ``q`` at the end of the input."""
    with _listening() as read:
        screen.say(_KEYS, style="dim")
        return read()


@contextmanager
def _listening() -> Iterator[Callable[[], str]]:
    """Single keys on a terminal, else lines.

    On a terminal, what was pressed before the pair was there to be read is no vote, and is thrown away.
    """
    try:
        import termios
        import tty
    except ImportError:  # Windows
        yield _line
        return
    if sys.stdin is None or not sys.stdin.isatty():
        yield _line
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor, termios.TCSAFLUSH)
        yield lambda: _press(descriptor)
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _press(descriptor: int) -> str:
    pressed = os.read(descriptor, _AT_ONCE)
    if not pressed or pressed.startswith(_END_OF_INPUT):
        return _QUIT
    if pressed.startswith(_ESCAPE):  # an arrow, a function key
        return _NOTHING
    return pressed.decode(errors="replace").strip()[:1].lower()  # a key that is held is one vote


def _line() -> str:
    line = sys.stdin.readline() if sys.stdin is not None else ""
    return line.strip().lower() if line else _QUIT


def _say_what_is_left(screen: Screen, voting: Voting) -> None:
    left = len(voting.ballot.pairs) - voting.done
    if left:
        screen.say(
            f"\n{_pairs(left)} left; votes are kept, and the same command goes on with what is left.", style="dim"
        )


def _pairs(count: int) -> str:
    return f"{count} pair" if count == 1 else f"{count} pairs"


def _result(screen: Screen, result: BlindVote) -> None:
    for tally in result.tallies:
        screen.say(f"\n{tally.variant} against {tally.other}", style="bold")
        counts = {name: getattr(tally, name) for name in ("wins", "losses", "ties", "skipped", "alike", "open")}
        screen.say(ts.text("vote.counts", **counts))
        screen.say(ts.finding_text(tally.finding))
    for finding in result.findings:
        mark = "note" if finding.severity == "info" else finding.severity
        screen.say(f"\n{mark}: {ts.finding_text(finding)}")
