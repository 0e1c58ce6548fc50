"""``tunesmith compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import tunesmith as ts
from tunesmith.cli.options import BaseOption, DtypeOption, JsonOption, RunArgument
from tunesmith.cli.output import console, print_json, progress_bar

if TYPE_CHECKING:
    from rich.text import Text

    from tunesmith.cli.screen import Screen


def compare(
    run: RunArgument,
    variants: Annotated[
        str,
        typer.Option("--variants", metavar="A,B,...", help="base, final, checkpoint-N, or a merged model's directory."),
    ] = "base,final",
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="Prompts to answer (.txt, .jsonl or .json).")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="Rows with answers to score. Default: the run's held-out rows."),
    ] = None,
    base: BaseOption = None,
    greedy: Annotated[
        bool, typer.Option("--greedy/--sample", help="Always take the most likely token, or draw one.")
    ] = True,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Limit of every reply, in tokens.")] = 1024,
    max_prompts: Annotated[int, typer.Option(min=0, help="How many rows of the data are answered.")] = 8,
    dtype: DtypeOption = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Also write it: .json, .md or .html by the name.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what variants answer to the same prompts, side by side, and what held-out rows say.

    Example: tunesmith compare out/security --variants base,checkpoint-100,final --prompts questions.txt
    """
    if out is not None:
        ts.output_file(out, suffixes=(".json", ".md", ".html"))
    with progress_bar() as progress:
        comparison = ts.compare(
            run,
            [name.strip() for name in variants.split(",") if name.strip()],
            prompts,
            data=data,
            base=base,
            greedy=greedy,
            max_new_tokens=max_new_tokens,
            max_prompts=max_prompts,
            dtype=dtype,
            progress=progress,
        )
    if out is not None:
        ts.write_comparison(comparison, run, out)
    if as_json:
        print_json(comparison)
        return
    screen = console()
    for prompt in comparison.prompts:
        (_side_by_side if screen.is_terminal else _one_by_one)(screen, comparison, prompt)
    _scores(screen, comparison)
    if out is not None:
        screen.say(f"Written: {out}", style="dim")


def _one_by_one(screen: Screen, comparison: ts.Comparison, prompt: ts.Conversation) -> None:
    screen.say(f"# {prompt.question}")
    for variant in comparison.variants:
        reply = comparison.reply(prompt.id, variant.name)
        screen.say(f"\n## {variant.name} {_how_it_ended(reply)}")
        screen.say(reply.text)
    screen.say()


def _side_by_side(screen: Screen, comparison: ts.Comparison, prompt: ts.Conversation) -> None:
    from rich.table import Table
    from rich.text import Text

    from tunesmith.cli.screen import clean

    table = Table(title=Text(clean(prompt.question)), title_justify="left", title_style="bold", expand=True)
    names = [variant.name for variant in comparison.variants]
    replies = [comparison.reply(prompt.id, name) for name in names]
    for name in names:
        table.add_column(clean(name), ratio=1, overflow="fold")
    table.add_row(
        Text(clean(replies[0].text)), *(_diffed(clean(replies[0].text), clean(reply.text)) for reply in replies[1:])
    )
    table.add_row(*(Text(_how_it_ended(reply), style="dim") for reply in replies))
    screen.print(table)
    screen.say()


def _how_it_ended(reply: ts.Reply) -> str:
    return f"[{ts.text(f'stop.{reply.stop_reason}')}; {reply.tokens} tokens]"


def _diffed(left: str, right: str) -> Text:
    """The right text, with the words that the left one does not have in bold."""
    from rich.text import Text

    text = Text()
    for segment in ts.word_diff(left, right):
        if segment.kind != "left":
            text.append(segment.text, style="bold green" if segment.kind == "right" else "")
    return text


def _scores(screen: Screen, comparison: ts.Comparison) -> None:
    for score in comparison.scores:
        line = f"{score.variant}: held-out loss {score.loss:.3f} over {score.rows} rows ({score.tokens} answer tokens)"
        if score.difference is not None:
            line += f", {score.difference:+.3f} against the base"
        if score.difference_low is not None and score.difference_high is not None:
            line += f" (95 % interval {score.difference_low:+.3f} to {score.difference_high:+.3f})"
        if score.better_rows is not None:
            line += f", better on {score.better_rows} of {score.rows} rows"
        screen.say(line)
