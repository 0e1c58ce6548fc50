"""The records of what is typed to serve a run's variants."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from tunesmith.adapter import Adapter
from tunesmith.record import Finding, Part, Record

ServingEngine = Literal["vllm", "sglang", "llama.cpp", "ollama"]
ENGINES: tuple[ServingEngine, ...] = get_args(ServingEngine)


@dataclass(frozen=True)
class Source:
    """What is to be served, and where.

    Attributes:
        run: the run's directory.
        run_name: what it is called.
        adapters: the adapters, by their variants' names.
        base: the base as the server is told it: a directory or a hub id.
        base_dir: its directory; None where it is not at hand.
        base_option: what the run's commands are told by ``--base``; None where the adapter names the base.
        revision: of a hub id; None for the newest.
        template: a file with the chat template, where the base's own is another one or not known.
        port: where the server listens.
        out: the directory for files that must be written before.
    """

    run: Path
    run_name: str
    adapters: dict[str, Adapter]
    base: str
    base_dir: Path | None
    base_option: str | None
    revision: str | None
    template: Path | None
    port: int
    out: Path


class ServedVariant(Part):
    """One variant that the server will hold.

    Attributes:
        name: what it is called here.
        model: what the server calls it.
        kind: whether it is the base, an adapter on it, or merged first.
    """

    name: str
    model: str
    kind: Literal["base", "adapter", "merged"]


class ServeFile(Part):
    """A file that the server reads.

    Attributes:
        path: where it is to be.
        text: what it holds, the final newline included.
    """

    path: str
    text: str


class ServeCommand(Record):
    """What is typed to serve a run's variants by their names, and to compare them there.

    Attributes:
        engine: the server's program.
        url: the base address of its OpenAI-compatible interface.
        variants: what it will hold, the base first.
        left_out: variants that it cannot serve; the findings say why, and what to do.
        before: commands to run first, each as its words.
        files: files to write after them.
        serve: the command that serves, which does not end by itself.
        after: commands to run once it serves.
        compare: the command that compares the variants there.
        findings: what a person must know.
    """

    engine: ServingEngine
    url: str
    variants: tuple[ServedVariant, ...]
    left_out: tuple[str, ...] = ()
    before: tuple[tuple[str, ...], ...] = ()
    files: tuple[ServeFile, ...] = ()
    serve: tuple[str, ...]
    after: tuple[tuple[str, ...], ...] = ()
    compare: tuple[str, ...]
    findings: tuple[Finding, ...] = ()

    @property
    def preparation(self) -> tuple[str, ...]:
        """What is typed before the server, as lines for a shell."""
        write = [f"printf %s {shlex.quote(file.text)} > {shlex.quote(file.path)}" for file in self.files]
        return (*map(shlex.join, self.before), *write)

    @property
    def compare_line(self) -> str:
        """What compares, as a line for a shell."""
        return shlex.join(self.compare)

    @property
    def serve_line(self) -> str:
        """What serves, as a line for a shell."""
        return shlex.join(self.serve)

    @property
    def after_lines(self) -> tuple[str, ...]:
        """What is typed once it serves, as lines for a shell."""
        return tuple(map(shlex.join, self.after))


def shell(*words: object) -> tuple[str, ...]:
    """The words of a command."""
    return tuple(map(str, words))


def tunesmith(verb: str, *words: object, base: str | None = None) -> tuple[str, ...]:
    """The words of a command of this program.

    Args:
        verb: its verb.
        words: what follows.
        base: what its ``--base`` is told, where anything is.
    """
    return shell("tunesmith", verb, *words, *(("--base", base) if base is not None else ()))


def compare_words(source: Source, url: str, variants: Sequence[ServedVariant]) -> tuple[str, ...]:
    """The command that compares variants at a server."""
    named = [one.model if one.model == one.name else f"{one.name}={one.model}" for one in variants]
    models = [word for name in named for word in ("--model", name)]
    return tunesmith("compare", source.run, "--endpoint", url, *models, base=source.base_option)
