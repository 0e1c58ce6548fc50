"""``tunesmith chat``."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

import tunesmith as ts
from tunesmith.cli.options import (
    BaseOption,
    DtypeOption,
    EndpointOption,
    MaxNewTokensOption,
    MinPOption,
    RepetitionPenaltyOption,
    RunArgument,
    SeedOption,
    StopOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
)
from tunesmith.cli.output import console, print_json, progress_bar, stoppable

if TYPE_CHECKING:
    from tunesmith.cli.screen import Screen


def chat(
    run: RunArgument,
    base: BaseOption = None,
    checkpoint: Annotated[
        str,
        typer.Option(
            "--checkpoint",
            metavar="NAME",
            help="final, checkpoint-N, N, none for the base model, or the directory of an adapter or a merged model.",
        ),
    ] = "final",
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask once and exit.")] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Go on from the text as it is, without the chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option("--system", help="A system prompt.")] = None,
    max_new_tokens: MaxNewTokensOption = 1024,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the most likely token.")] = False,
    temperature: TemperatureOption = 0.7,
    top_p: TopPOption = 0.9,
    top_k: TopKOption = 0,
    min_p: MinPOption = 0.0,
    repetition_penalty: RepetitionPenaltyOption = 1.0,
    stop: StopOption = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = "auto",
    quantization: Annotated[
        str | None,
        typer.Option(
            "--quantization",
            metavar="NAME",
            help="Quantize the model while it is loaded, by bitsandbytes, and write nothing: nf4, fp4 or int8.",
        ),
    ] = None,
    endpoint: EndpointOption = None,
    model: Annotated[str | None, typer.Option("--model", metavar="MODEL", help="The model of that server.")] = None,
    show_prompt: Annotated[
        bool, typer.Option("--show-prompt", help="Also show what the model is really given, and its token ids.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document a reply, on one line.")] = False,
) -> None:
    """Talk to the tuned model, a checkpoint, a merged model, or the base model.

    Reads questions from standard input where that is a pipe. Ctrl-C stops a reply; twice, or an empty line, ends.

    Example: tunesmith chat out/security --checkpoint 200 --prompt "What is SQL injection?"
    """
    if len(endpoint or ()) > 1:
        raise ts.TunesmithError(
            "A conversation is held with one server.",
            found=", ".join(endpoint or ()),
            next_step="pass --endpoint once; compare and evaluate ask several",
        )
    for given in (prompt, system):
        _require_text(given or "")
    settings = ts.GenerationSettings(
        max_new_tokens=max_new_tokens,
        greedy=greedy,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
        seed=seed,
    )
    name = "base" if checkpoint == "none" else checkpoint
    models = (model,) if model is not None else ()
    with progress_bar() as progress:
        engine, infos = ts.load_engine(
            run,
            (name,),
            base=base,
            dtype=dtype,
            quantization=quantization,
            endpoint=endpoint,
            models=models,
            progress=progress,
        )
    talk = _Talk(engine, infos[0].name, settings, as_json=as_json, show_prompt=show_prompt)
    history = [ts.Message(role="system", content=system)] if system else []
    for question in _questions(prompt, infos[0].name):
        if plain:
            talk.ask(question, question)
            continue
        history.append(ts.Message(role="user", content=question))
        reply = talk.ask(question, tuple(history))
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


class _Talk:
    """One variant that is asked one thing after another."""

    def __init__(
        self, engine: ts.Engine, name: str, settings: ts.GenerationSettings, *, as_json: bool, show_prompt: bool
    ) -> None:
        self._engine, self._name, self._settings = engine, name, settings
        self._as_json, self._show_prompt = as_json, show_prompt

    def ask(self, question: str, prompt: tuple[ts.Message, ...] | str) -> ts.Generation:
        """Ask, and show the answer as it comes."""
        from tunesmith.cli.screen import clean

        def show(_row: int, text: str) -> None:
            sys.stdout.write(clean(text))
            sys.stdout.flush()

        rendered = ts.rendered_prompt(self._engine, self._name, prompt) if self._show_prompt else None
        if rendered is not None and not self._as_json:
            console(stderr=True).say(f"{rendered.text}\n{list(rendered.token_ids)}", style="dim")
        with stoppable(signal.SIGINT) as cancellation:
            reply = self._engine.generate(
                [ts.Request(self._name, prompt)],
                self._settings,
                on_text=None if self._as_json else show,
                cancellation=cancellation,
            )[0]
        if self._as_json:
            print_json(ts.ChatTurn.of(self._name, question, reply, rendered), indent=None)
        else:
            show(0, "\n")
            console(stderr=True).say(self._note(reply), style="dim")
        return reply

    def _note(self, reply: ts.Generation) -> str:
        speed = f", {reply.tokens_per_s:.1f} tokens/s" if reply.tokens_per_s else ""
        first = f", first after {reply.time_to_first_token_s:.2f} s" if reply.time_to_first_token_s else ""
        note = f"[{ts.text(f'stop.{reply.stop_reason}')}; {reply.tokens} tokens{speed}{first}]"
        if reply.stop_reason == "length":
            note += f" For the rest, raise --max-new-tokens (now {self._settings.max_new_tokens})."
        return note
