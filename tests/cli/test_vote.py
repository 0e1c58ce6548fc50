"""Blind voting in a terminal and from a pipe: nobody sees whose reply is whose before the votes are counted."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.cli.test_output import HOSTILE, Terminal
from tests.tiny_models import row
from tunesmith.cli.vote import vote_on
from tunesmith.compare import Comparison, Reply, VariantInfo
from tunesmith.compare.votes import BlindVote, Voting
from tunesmith.conversations import Conversation, Message
from tunesmith.models import Capabilities, GenerationSettings

NAMES = ("base", "final")
PROGRAM = """
import sys
from tunesmith.cli.app import main
from tunesmith.cli import app
from tunesmith.cli.vote import vote_on
from tunesmith.compare import Comparison
from tunesmith.compare.votes import Voting

@app.app.command("vote-on")
def vote_on_file(comparison: str, file: str) -> None:
    vote_on(Voting(Comparison.read(comparison), file))

main()
"""


def comparison(prompts: int, **texts: str) -> Comparison:
    """Replies that do not say whose they are; ``texts`` gives others: ``final_3="same"``."""
    asked = tuple(row(i, f"Question {i}?") for i in range(prompts))
    replies = [
        Reply(
            prompt_id=prompt.id,
            variant=name,
            text=texts.get(f"{name}_{i}", f"{('one', 'two')[place]} of {i}"),
            tokens=3 + place,
            stop_reason="eos",
        )
        for i, prompt in enumerate(asked)
        for place, name in enumerate(NAMES)
    ]
    return Comparison(
        run="run",
        variants=tuple(VariantInfo(name=name, kind="adapter", path="p") for name in NAMES),
        prompts=asked,
        replies=tuple(replies),
        settings=GenerationSettings(),
        engine=Capabilities(kind="local", where="cpu"),
    )


class Piped:
    """Voting with letters from a pipe, in this process.

    Args:
        monkeypatch: gives it its standard input.
        capsys: takes its output.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, voting: Voting, letters: str | bytes, *, as_json: bool = False) -> tuple[str, str]:
        """Vote; what is on standard output and on standard error."""
        data = letters if isinstance(letters, bytes) else "".join(f"{letter}\n" for letter in letters).encode()
        self._monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        vote_on(voting, as_json=as_json)
        return tuple(self._capsys.readouterr())  # type: ignore[return-value]


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Piped:
    """The command with letters from a pipe."""
    return Piped(monkeypatch, capsys)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where votes are kept."""
    return tmp_path / "votes.jsonl"


def test_letters_from_a_pipe_are_votes(piped: Piped, file: Path) -> None:
    """One a line, by letter or by number; the result alone is on standard output."""
    out, err = piped(Voting(comparison(5), file), "a1b2t")
    kept = [json.loads(line)["choice"] for line in file.read_text().splitlines()]
    assert kept == ["left", "left", "right", "right", "tie"]
    assert "final against base" in out
    assert "1 tied" in out
    assert "Question" not in out
    assert [f"[{i} of 5]" in err for i in range(1, 6)] == [True] * 5
    assert "left" not in err


def test_nothing_tells_whose_a_reply_is(piped: Piped, file: Path) -> None:
    """Neither names, nor kinds, nor lengths in tokens; and A is the one half of the time the base."""
    voting = Voting(comparison(12), file)
    _, err = piped(voting, "a" * 12)
    shown = err.replace(str(file), "")
    assert not any(word in shown for word in ("base", "final", "adapter", "eos", "token", "ended by itself"))
    order = [err.index(f"one of {i}") < err.index(f"two of {i}") for i in range(12)]
    assert sum(order) == 6
    for i in range(12):
        pair = next(pair for pair in voting.ballot.pairs if pair.prompt_id == f"row-{i}")
        assert order[i] == (pair.left == "base")


def test_a_vote_is_for_the_reply_under_its_letter(piped: Piped, file: Path) -> None:
    """Whoever always finds the tuned reply better gets it preferred, wherever it stands."""
    voting = Voting(comparison(8), file)
    letters = ["a" if pair.left == "final" else "b" for pair in voting.ballot.pairs]
    out, _ = piped(voting, "".join(letters))
    assert "8 of 8 decided votes for `final` over `base`: 100.0% (67.6% to 100.0% at 95%)" in out
    assert "`final` is preferred" in out


def test_the_end_of_the_input_keeps_what_was_voted_and_says_how_to_go_on(piped: Piped, file: Path) -> None:
    """Then what is left is asked, and nothing else."""
    _, err = piped(Voting(comparison(4), file), "a")
    assert "3 pairs left; votes are kept, and the same command goes on" in err
    out, err = piped(Voting(comparison(4), file), "bbbaaa")
    assert "1 voted on before." in err
    assert "[1 of 4]" not in err
    assert "[2 of 4]" in err
    assert "0 not voted on" in out
    assert "pairs left" not in err
    assert len(file.read_text().splitlines()) == 4
    _, err = piped(Voting(comparison(4), file), "aaa")
    assert err == ""


def test_quit_and_undo_and_other_keys(piped: Piped, file: Path) -> None:
    """A vote that is taken back is asked again; what is no key is said; after ``q`` nothing is read."""
    voting = Voting(comparison(3), file)
    _, err = piped(voting, "uaxubAqa")
    assert "There is no vote to take back." in err
    assert "No such key: x" in err
    assert "The last vote is taken back." in err
    assert err.count("[1 of 3]") == 2
    assert [json.loads(line)["choice"] for line in file.read_text().splitlines()] == [
        "left", "undone", "right", "left",
    ]  # fmt: skip
    assert "1 pair left" in err


def test_bytes_that_are_no_text_are_no_vote_and_no_crash(piped: Piped, file: Path) -> None:
    """Nor are blank lines."""
    voting = Voting(comparison(2), file)
    _, err = piped(voting, b"\xff\xfe\n\n  \nab\na\n")
    assert voting.done == 1
    assert "No such key: ab" in err


def test_json_is_the_result_alone(piped: Piped, file: Path) -> None:
    """It reads back as its record."""
    out, err = piped(Voting(comparison(2), file), "at", as_json=True)
    result = BlindVote.model_validate_json(out)
    assert (result.decided, result.tallies[0].ties) == (1, 1)
    assert "Question" in err


def test_a_cut_reply_is_marked_and_an_empty_one_is_seen(piped: Piped, file: Path) -> None:
    """The one thing beside the text that a voter must know."""
    shown = comparison(1, base_0=" ")
    cut = shown.replies[1].model_copy(update={"stop_reason": "length"})
    shown = shown.model_copy(update={"replies": (shown.replies[0], cut)})
    _, err = piped(Voting(shown, file), "a")
    assert "two of 0\n[cut at the limit]" in err
    assert "(empty answer)" in err
    assert err.count("[cut at the limit]") == 1


def test_earlier_turns_are_shown(piped: Piped, file: Path) -> None:
    """A reply is judged by the whole conversation; the expected answer is not shown."""
    turns = [("system", "Be short."), ("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "expected")]
    messages = tuple(Message(role=role, content=content) for role, content in turns)
    prompt = Conversation(id="row-0", messages=messages)
    _, err = piped(Voting(comparison(1).model_copy(update={"prompts": (prompt,)}), file), "a")
    assert "system: Be short.\nuser: One?\nassistant: 1\nTwo?\n" in err
    assert "expected" not in err


def test_model_text_is_cleaned(piped: Piped, file: Path) -> None:
    """A model may write escape sequences; nobody's terminal heeds them."""
    _, err = piped(Voting(comparison(1, final_0=HOSTILE), file), "a")
    assert "[/bold][red]" in err
    assert not {"\x1b", "\x07", "\x9b", "\r", "\u202e"}.intersection(err)


class VoteTerminal(Terminal):
    """Voting in a terminal.

    Args:
        cli: where it runs.
        shown: the comparison's file.
        file: where votes are kept.
        columns: the terminal's.
    """

    def __init__(self, cli: Cli, shown: Path, file: Path, *, columns: int = 100) -> None:
        self.fd, child = pty.openpty()
        os.set_blocking(self.fd, False)
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "vote-on", shown, file],
            stdin=child,
            stdout=child,
            stderr=child,
            start_new_session=True,
            env=cli.environment(TERM="xterm-256color", COLUMNS=str(columns)),
        )
        os.close(child)
        self.seen = ""

    def press(self, *keys: bytes) -> None:
        """Press keys, at once and without a return."""
        os.write(self.fd, b"".join(keys))


@pytest.fixture
def shown(cli: Cli, file: Path) -> Iterator[VoteTerminal]:
    """Four pairs in a terminal, ended with the test."""
    source = file.with_name("comparison.json")
    started = VoteTerminal(cli, comparison(4).write(source), file)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.process.kill()
        started.process.wait()
        os.close(started.fd)


def kept(file: Path) -> list[str]:
    """The choices in the file."""
    return [json.loads(line)["choice"] for line in file.read_text().splitlines()] if file.exists() else []


def test_single_keys_vote_in_a_terminal(shown: VoteTerminal, file: Path) -> None:
    """No return is needed, arrows do nothing, a key that is held is one vote, and the tally ends it."""
    text = shown.read_until("q: quit")
    assert "│" in text  # side by side
    assert text.index("A") < text.index("B")
    shown.press(b"\x1b[A")
    assert "No such key" not in shown.read_until("q: quit")
    shown.press(b"aaaa")
    assert "A is better." in shown.read_until("[2 of 4]")
    shown.read_until("q: quit")
    assert kept(file) == ["left"]
    shown.press(b"u")
    assert "taken back" in shown.read_until("[1 of 4]")
    shown.read_until("q: quit")
    for key, said in ((b"B", "B is better."), (b"t", "A tie."), (b"s", "Skipped.")):
        shown.press(key)
        shown.read_until(said)
        shown.read_until("q: quit")
    shown.press(b"q")
    text = shown.read_until("")
    assert "1 pair left" in text
    assert "final against base" in text
    assert "1 tied, 1 skipped, 1 not voted on" in text
    assert shown.process.wait() == 0
    assert kept(file) == ["left", "undone", "right", "tie", "skip"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stopped_voting_keeps_its_votes_and_gives_the_terminal_back(
    shown: VoteTerminal, file: Path, signum: int
) -> None:
    """Exit 130; what was voted stays, and the terminal shows again what is typed."""
    import termios

    shown.read_until("q: quit")
    before = termios.tcgetattr(shown.fd)[3]
    assert not before & termios.ECHO
    shown.press(b"a")
    shown.read_until("q: quit")
    shown.process.send_signal(signum)
    text = shown.read_until("Stopped.")
    assert termios.tcgetattr(shown.fd)[3] & termios.ECHO
    assert "3 pairs left" in text
    assert "against" not in text
    assert shown.process.wait() == 130
    assert kept(file) == ["left"]


def test_ctrl_d_ends_voting_in_peace(shown: VoteTerminal, file: Path) -> None:
    """As ``q`` does."""
    shown.read_until("q: quit")
    shown.press(b"\x04")
    assert "No vote" not in shown.read_until("")
    assert shown.process.wait() == 0
    assert kept(file) == []


def test_narrow_terminals_show_one_reply_below_the_other(cli: Cli, file: Path) -> None:
    """Two ribbons of text cannot be read."""
    source = file.with_name("comparison.json")
    narrow = VoteTerminal(cli, comparison(1).write(source), file, columns=60)
    text = narrow.read_until("q: quit")
    assert "--- A ---" in text
    assert "│" not in text
    narrow.press(b"a")
    narrow.read_until("")
    assert narrow.process.wait() == 0
    os.close(narrow.fd)
