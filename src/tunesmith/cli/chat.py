"""``tunesmith chat``."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

import tunesmith as ts
from tunesmith.cli.options import BaseOption, DtypeOption, RunArgument
from tunesmith.cli.output import console, print_json, progress_bar

if TYPE_CHECKING:
    from tunesmith.cli.screen import Screen


def chat(
    run: RunArgument,
    base: BaseOption = None,
    checkpoint: Annotated[
        str,
        typer.Option("--checkpoint", metavar="NAME", help="final, checkpoint-N, N, or none for the base model."),
    ] = "final",
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask once and exit.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Limit of every reply, in tokens.")] = 1024,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the most likely token.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the sampling.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="Of the sampling.")] = 0.9,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the sampling.")] = 0,
    dtype: DtypeOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document a reply, on one line.")] = False,
) -> None:
    """Talk to the tuned model, a checkpoint, or the base model.

    Reads questions from standard input where that is a pipe. Ctrl-C stops a reply; twice, or an empty line, ends.

    Example: tunesmith chat out/security --checkpoint 200 --prompt "What is SQL injection?"
    """
    for given in (prompt, system):
        _require_text(given or "")
    name = "base" if checkpoint == "none" else checkpoint
    settings = ts.GenerationSettings(
        max_new_tokens=max_new_tokens, greedy=greedy, temperature=temperature, top_p=top_p, seed=seed
    )
    with progress_bar() as progress:
        variants, infos = ts.load_variants(run, (name,), base=base, dtype=dtype, progress=progress)
    history = [ts.Message(role="system", content=system)] if system else []
    for question in _questions(prompt, infos[0].name):
        history.append(ts.Message(role="user", content=question))
        reply = _reply(variants, infos[0].name, history, settings, as_json=as_json)
        history.append(ts.Message(role="assistant", content=reply.text))


def _questions(prompt: str | None, name: str) -> Iterator[str]:
    if prompt is not None:
        yield prompt
    elif sys.stdin.isatty():
        yield from _typed(name)
    else:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
        for line in sys.stdin:
            _require_text(line)
            if question := line.strip():
                yield question


def _require_text(question: str) -> None:
    """Refuse bytes that are no text; Python hands them on as lone surrogates, which no tokenizer takes."""
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise ts.TunesmithError(
            "The question is not UTF-8 text.",
            found=ascii(question.strip())[:80],
            next_step="convert it: iconv -t utf-8",
        ) from error


def _typed(name: str) -> Iterator[str]:
    with suppress(ImportError):
        import readline  # noqa: F401 - input() then edits lines and remembers them
    screen = console(stderr=True)
    screen.say(f"Talking to {name}. Ctrl-C stops a reply; an empty line ends.", style="dim")
    with suppress(EOFError):
        while question := _line(screen).strip():
            _require_text(question)
            yield question


def _line(screen: Screen) -> str:
    try:
        return _prompted(screen)
    except KeyboardInterrupt:
        # It may have been meant for a reply that ended just before.
        screen.say("\nCtrl-C again, or an empty line, ends.", style="dim")
        return _prompted(screen)


def _prompted(screen: Screen) -> str:
    screen.say()
    if sys.stdout.isatty():
        return input("> ")  # readline must know the prompt to redraw the line
    screen.print("> ", end="")
    return input()


def _reply(
    variants: ts.VariantSet, name: str, history: list[ts.Message], settings: ts.GenerationSettings, *, as_json: bool
) -> ts.Generation:
    from tunesmith.cli.screen import clean

    def show(_row: int, text: str) -> None:
        sys.stdout.write(clean(text))
        sys.stdout.flush()

    with _stoppable() as cancellation:
        reply = ts.generate(
            variants, name, [history], settings, on_text=None if as_json else show, cancellation=cancellation
        )[0]
    if as_json:
        print_json(_turn(name, history[-1].content, reply), indent=None)
        return reply
    show(0, "\n")
    reason = ts.text(f"stop.{reply.stop_reason}")
    speed = f", {reply.tokens_per_s:.1f} tokens/s" if reply.tokens_per_s else ""
    note = f"[{reason}; {len(reply.token_ids)} tokens{speed}]"
    if reply.stop_reason == "length":
        note += f" For the rest, raise --max-new-tokens (now {settings.max_new_tokens})."
    console(stderr=True).say(note, style="dim")
    return reply


def _turn(name: str, question: str, reply: ts.Generation) -> ts.ChatTurn:
    return ts.ChatTurn(
        variant=name,
        question=question,
        text=reply.text,
        tokens=len(reply.token_ids),
        stop_reason=reply.stop_reason,
        seconds=reply.seconds,
        tokens_per_s=reply.tokens_per_s,
    )


@contextmanager
def _stoppable() -> Iterator[ts.Cancellation]:
    """Ctrl-C stops the reply that is being written; a second one ends the program."""
    cancellation = ts.Cancellation()

    def stop(_signal: int, _frame: FrameType | None) -> None:
        if cancellation.requested:
            raise KeyboardInterrupt
        cancellation.cancel()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield cancellation
    finally:
        signal.signal(signal.SIGINT, before)
