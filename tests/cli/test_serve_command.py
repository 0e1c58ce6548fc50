"""``tunesmith serve-command``: lines to stdout, what is to be known to stderr, and 3 where something is left out."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from tests.cli.conftest import Cli
from tests.tiny_models import TinyRun, build_adapter
from tunesmith.export.serving import ServeCommand


def test_lines_can_be_copied(cli: Cli, run_dir: Path, tiny: TinyRun) -> None:
    """Comments apart, every line is one command; nothing is said where there is nothing to say."""
    result = cli("serve-command", run_dir)
    assert (result.code, result.err) == (0, "")
    serve, compare = [line for line in result.out.splitlines() if not line.startswith("#")]
    assert shlex.split(serve)[:3] == ["vllm", "serve", str(tiny.base)]
    assert shlex.split(compare)[:3] == ["tunesmith", "compare", str(run_dir)]


def test_its_own_lines_are_taken_by_the_program(cli: Cli, run_dir: Path, tmp_path: Path) -> None:
    """What is to be typed before the server is what the verbs take: merging is run, comparing finds no server."""
    result = cli("serve-command", run_dir, "--engine", "ollama", "--checkpoint", "10", "--out", tmp_path / "o")
    lines = [shlex.split(line) for line in result.out.splitlines() if line.startswith("tunesmith ")]
    (merge,) = [words[1:] for words in lines if words[1] == "merge"]
    (tmp_path / "o" / "checkpoint-10").mkdir(parents=True)
    assert cli(*merge).code == 0
    answered = cli(*lines[-1][1:], NO_PROXY="127.0.0.1")
    assert answered.code == 2
    assert "The server cannot be reached" in answered.err


def test_what_is_left_out_is_the_answer_no(cli: Cli, tiny: TinyRun, tmp_path: Path) -> None:
    """The reason and the way around go to stderr, so that stdout can be copied whole; JSON holds both."""
    adapter = build_adapter(tiny.base, tmp_path / "adapter", seed=3, use_dora=True)
    result = cli("serve-command", adapter)
    assert result.code == 3
    assert "DoRA" in result.err
    assert "tunesmith merge" in result.err
    assert "DoRA" not in result.out
    document = cli("serve-command", adapter, "--json")
    assert document.code == 3
    command = ServeCommand.model_validate(json.loads(document.out))
    assert command.left_out == ("final",)


def test_an_engine_that_is_none_is_told_what_there_is(cli: Cli, run_dir: Path) -> None:
    """As any wrong word."""
    result = cli("serve-command", run_dir, "--engine", "tgi")
    assert result.code == 2
    assert "vllm, sglang, llama.cpp, ollama" in result.err
