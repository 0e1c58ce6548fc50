"""What may reach a terminal: our own colours on request, nobody else's control characters ever."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.cli.conftest import Cli
from tests.tiny_models import edit_json
from tunesmith.cli.chat import _typed
from tunesmith.cli.output import command, human_bytes
from tunesmith.cli.screen import Screen, clean

HOSTILE = "\x1b]0;owned\x07\x1b[2J[/bold][red]\x9b31m\r\u202e"


class Terminal:
    """A command in a terminal of 100 columns.

    Args:
        cli: where it runs.
        arguments: the command.
    """

    def __init__(self, cli: Cli, *arguments: object, **environment: str) -> None:
        self.fd, child = pty.openpty()
        os.set_blocking(self.fd, False)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tunesmith", *map(str, arguments)],
            stdin=child,
            stdout=child,
            stderr=child,
            start_new_session=True,
            env=cli.environment(TERM="xterm-256color", COLUMNS="100", **environment),
        )
        os.close(child)
        self.seen = ""

    def read_until(self, text: str, *, seconds: float = 120) -> str:
        """What has appeared since the last call, up to and with ``text``; the empty text waits for the end."""
        deadline = time.monotonic() + seconds
        while not (text and text in self.seen):
            assert time.monotonic() < deadline, f"{text!r} not in {self.seen!r}"
            if not self._read():
                assert not text, f"{text!r} not in {self.seen!r}"
                break
        head, found, tail = self.seen.partition(text) if text else (self.seen, "", "")
        self.seen = tail
        return head + found

    def wait_for_anything(self) -> None:
        """Wait until something new has appeared."""
        while not self.seen and self._read():
            pass

    def wait_until_it_listens(self, *, seconds: float = 120) -> None:
        """Wait until the command sleeps: readline shows a prompt a moment before it waits for keys or signals."""
        process, asleep = psutil.Process(self.process.pid), 0
        deadline = time.monotonic() + seconds
        while asleep < 10:  # looks in a row
            assert time.monotonic() < deadline, "it never came to rest"
            asleep = asleep + 1 if process.status() == psutil.STATUS_SLEEPING else 0
            time.sleep(0.02)

    def _read(self) -> bool:
        """Take in what is there, for at most a moment; False at the end."""
        if not select.select([self.fd], [], [], 0.1)[0]:
            return True
        try:
            chunk = os.read(self.fd, 65536)
        except OSError:  # Linux's way of saying that the other side has closed
            chunk = b""
        self.seen += chunk.decode(errors="replace")
        return bool(chunk)

    def type(self, text: str) -> None:
        """Type a line."""
        os.write(self.fd, text.encode() + b"\n")


@contextmanager
def terminal(cli: Cli, *arguments: object, **environment: str) -> Iterator[Terminal]:
    """A command in a terminal, ended with the test."""
    shown = Terminal(cli, *arguments, **environment)
    try:
        yield shown
    finally:
        if shown.process.poll() is None:
            shown.process.kill()
        shown.process.wait()
        os.close(shown.fd)


@pytest.mark.parametrize("character", ["\x1b", "\x07", "\r", "\x9b", "\u202e", "\x00", "\udcff"])
def test_control_characters_are_replaced(character: str) -> None:
    """Escape, bell, return, C1, bidi override, NUL and bytes that are no text; line breaks and tabs stay."""
    assert clean(f"a{character}b\n\tc") == "a\ufffdb\n\tc"


def test_text_that_looks_like_markup_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Square brackets from a file name are no style, and never an error."""
    screen = Screen()
    screen.print("[/bold] [red]x[/red]")
    screen.say("[/bold] :smile:", indent=2)
    assert capsys.readouterr().out == "[/bold] [red]x[/red]\n  [/bold] :smile:\n"


def test_command_can_be_pasted_into_a_shell() -> None:
    """What a shell would take apart is in quotes."""
    assert command("inspect", Path("a b/$x")) == "tunesmith inspect 'a b/$x'"


def test_addresses_in_a_command_are_whole() -> None:
    """Also where the command line made a ``Path`` of what was typed."""
    for address in ("s3://b/x", "hf://me/x@main", "s3://b/x:0.5"):
        assert command("verify", Path(address), address) == f"tunesmith verify {address} {address}"
    assert command("verify", Path("a/s3:/b"), "file:/a") == "tunesmith verify a/s3:/b file:/a"


def test_sizes_are_in_binary_units() -> None:
    """Bytes whole, the rest with decimals."""
    assert [human_bytes(size) for size in (0, 1023, 1536, 5 << 20, 3 << 30)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 MiB",
        "3.00 GiB",
    ]


@pytest.fixture
def hostile_run(own_run: Path) -> Path:
    """A run whose names and logs hold escape sequences and markup."""
    edit_json(own_run / "adapter_config.json", base_model_name_or_path=HOSTILE)
    state = {"log_history": [{"loss": 1.0, "step": 1}, {HOSTILE: HOSTILE}], "best_model_checkpoint": HOSTILE}
    (own_run / "trainer_state.json").write_text(json.dumps(state))
    (own_run / "trainer_log.jsonl").write_text(json.dumps({"loss": HOSTILE}) + f"\n{HOSTILE}\n")
    (own_run / f"x{HOSTILE.replace('/', '')}").write_text("x")
    return own_run.rename(own_run.with_name("run \x1b[31m[red]"))


def test_hostile_names_do_not_reach_the_terminal(cli: Cli, hostile_run: Path) -> None:
    """In a pipe nor in a terminal, in an answer nor in an error."""
    for arguments in (["inspect", hostile_run], ["merge", hostile_run, "--out", hostile_run / "x"]):
        done = cli(*arguments)
        assert "Traceback" not in done.err
        assert done.out + done.err
        assert not {"\x1b", "\x07", "\x9b", "\r", "\u202e"}.intersection(done.out + done.err)
    document = cli("inspect", hostile_run, "--json")
    assert json.loads(document.out)["run"]["base_model"] == HOSTILE
    assert "\x1b" not in document.out
    with terminal(cli, "inspect", hostile_run) as shown:
        text = shown.read_until("")
    assert "\x1b[1m" in text  # our own bold
    assert not any(part in text for part in ("\x1b]0", "\x1b[2J", "\x07", "\x9b", "\u202e"))


def test_no_color_is_honoured_in_a_terminal(cli: Cli, tmp_path: Path) -> None:
    """NO_COLOR takes colours away."""
    for environment, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        with terminal(cli, "inspect", tmp_path / "nope", **environment) as shown:
            text = shown.read_until("")
            assert shown.process.wait() == 2
        assert ("31m" in text) is coloured
        assert "Error: " in text


def test_terminal_without_unicode_loses_characters_but_no_answer(cli: Cli, run_dir: Path) -> None:
    """An ASCII terminal gets question marks; JSON is UTF-8 everywhere."""
    done = cli("inspect", run_dir, PYTHONIOENCODING="ascii")
    assert done.code == 0, done.err
    assert done.out.isascii()
    assert json.loads(cli("inspect", run_dir, "--json", PYTHONIOENCODING="ascii").out)


def test_pipe_gets_one_line_a_file(cli: Cli, run_dir: Path) -> None:
    """Nothing is folded where grep and awk read."""
    lines = cli("inspect", run_dir, COLUMNS="40").out.splitlines()
    assert any("adapter_model.safetensors" in line and "KiB" in line and "matrices" in line for line in lines)


def test_ctrl_c_stops_the_reply_and_keeps_the_session(cli: Cli, run_dir: Path) -> None:
    """The first stops what is being written; the next question is answered; an empty line ends."""
    with terminal(cli, "chat", run_dir, "--dtype", "fp32", "--max-new-tokens", "400", "--seed", "3") as shown:
        shown.read_until("an empty line ends.")
        stopped = False
        for _ in range(5):  # a random model may end by itself before we can stop it
            shown.read_until("> ")
            shown.type("Hello?")
            shown.read_until("Hello?\r\n")
            shown.wait_for_anything()
            shown.process.send_signal(signal.SIGINT)
            if stopped := "stopped by hand" in shown.read_until("tokens"):
                break
        assert stopped
        shown.read_until("> ")
        shown.type("Still there?")
        shown.read_until(" tokens")
        shown.read_until("> ")
        shown.type("")
        shown.read_until("")
        assert shown.process.wait() == 0


def test_second_ctrl_c_at_the_prompt_ends_chat(cli: Cli, run_dir: Path) -> None:
    """The first may have come too late for the reply it was meant for, so it only says how to end."""
    with terminal(cli, "chat", run_dir, "--dtype", "fp32") as shown:
        for expected in ("Ctrl-C again", ""):
            shown.read_until("> ")
            shown.wait_until_it_listens()
            shown.process.send_signal(signal.SIGINT)
            text = shown.read_until(expected)
        assert shown.process.wait() == 130
    assert "Stopped." in text
    assert "Traceback" not in text


@pytest.mark.parametrize("ending", ["", "  ", EOFError()], ids=["empty line", "blank line", "Ctrl-D"])
def test_chat_ends_in_peace(monkeypatch: pytest.MonkeyPatch, ending: str | EOFError) -> None:
    """An empty line, a blank one, or the end of the input."""
    typed = iter(["One?", ending])

    def answer(*_: object) -> str:
        line = next(typed)
        if isinstance(line, EOFError):
            raise line
        return line

    monkeypatch.setattr("builtins.input", answer)
    assert list(_typed("final")) == ["One?"]
