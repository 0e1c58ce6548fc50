"""``tunesmith compare``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import tunesmith as ts
from tunesmith.cli.options import (
    AskingExecutorOption,
    BaseOption,
    DtypeOption,
    EndpointsOption,
    FreshOption,
    JsonOption,
    MaxNewTokensOption,
    MinPOption,
    ModelsOption,
    ParallelOption,
    RecordsOption,
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
    from rich.text import Text

    from tunesmith.cli.screen import Screen

    Seen = Mapping[tuple[str, str], ts.Marks]

_FORMATS = (".json", ".csv", ".md", ".html")


def compare(
    run: RunArgument,
    variants: Annotated[
        str,
        typer.Option(
            "--variants",
            metavar="A,B,...",
            help="base, final, checkpoint-N, or the directory of another adapter or of a merged model (NAME=DIR).",
        ),
    ] = "base,final",
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Prompts to answer (.txt, .jsonl, .json), or a built-in set: general, general-en, general-zh, "
            "general-code.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="Rows with answers to score. Default: the run's held-out rows."),
    ] = None,
    base: BaseOption = None,
    greedy: Annotated[
        bool, typer.Option("--greedy/--sample", help="Always take the most likely token, or draw one.")
    ] = True,
    max_new_tokens: MaxNewTokensOption = 1024,
    temperature: TemperatureOption = 0.7,
    top_p: TopPOption = 0.9,
    top_k: TopKOption = 0,
    min_p: MinPOption = 0.0,
    repetition_penalty: RepetitionPenaltyOption = 1.0,
    stop: StopOption = None,
    seed: SeedOption = 0,
    max_prompts: Annotated[int, typer.Option(min=0, help="How many rows of the data are answered.")] = 8,
    only: Annotated[
        str | None,
        typer.Option(
            "--only", metavar="MARK,...", help="Show prompts with such a reply: different, truncated, regressed."
        ),
    ] = None,
    vote: Annotated[
        Path | None,
        typer.Option("--vote", metavar="FILE", help="Show pairs blindly and keep your votes in a .jsonl file."),
    ] = None,
    dtype: DtypeOption = "auto",
    endpoint: EndpointsOption = None,
    models: ModelsOption = None,
    parallel: ParallelOption = 8,
    executor: AskingExecutorOption = None,
    records: RecordsOption = None,
    fresh: FreshOption = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Also write it: .json, .csv, .md or .html by the name."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what variants answer to the same prompts, side by side, and what held-out rows say.

    Ctrl-C stops; what is done is kept, and the same command goes on from there.

    Example: tunesmith compare out/security --variants base,checkpoint-100,final --prompts questions.txt
    """
    if out is not None:
        out = ts.output_file(out, suffixes=_FORMATS)
    if vote is not None:
        ts.VoteFile(vote)  # a wrong file is told before the work, not after
    settings = ts.GenerationSettings(
        greedy=greedy,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
        seed=seed,
    )
    with progress_bar() as progress, stoppable() as cancellation, ts.executor_of(executor) as pool:
        comparison = ts.compare(
            run,
            [name.strip() for name in variants.split(",") if name.strip()],
            prompts,
            data=data,
            base=base,
            settings=settings,
            max_prompts=max_prompts,
            dtype=dtype,
            endpoint=endpoint,
            models=models or (),
            parallel=parallel,
            executor=pool,
            records=records,
            fresh=fresh,
            progress=progress,
            cancellation=cancellation,
        )
    if out is not None:
        ts.write_comparison(comparison, run, out)
    shown = comparison if only is None else ts.filtered(comparison, [name.strip() for name in only.split(",")])
    if vote is not None:
        from tunesmith.cli.vote import ask_for_votes

        ask_for_votes(shown, vote, as_json=as_json)
        return
    if as_json:
        print_json(shown)
        return
    _show(comparison, shown, out)


def _show(comparison: ts.Comparison, shown: ts.Comparison, out: Path | None) -> None:
    """Replies, marks, scores, and what is to be known of the engine."""
    screen = console()
    marks = ts.marks_of(shown)
    for prompt in shown.prompts:
        (_side_by_side if screen.is_terminal else _one_by_one)(screen, shown, prompt, marks)
    if len(shown.prompts) < len(comparison.prompts):
        screen.say(f"{len(shown.prompts)} of {len(comparison.prompts)} prompts shown.", style="dim")
    _scores(screen, comparison)
    for finding in comparison.engine.findings:
        screen.say(f"note: {ts.finding_text(finding)}", style="dim")
    if out is not None:
        screen.say(f"Written: {out}", style="dim")


def _one_by_one(screen: Screen, comparison: ts.Comparison, prompt: ts.Conversation, marks: Seen) -> None:
    screen.say(f"# {prompt.question}")
    for variant in comparison.variants:
        reply = comparison.reply(prompt.id, variant.name)
        screen.say(f"\n## {variant.name} {_how_it_ended(reply, marks)}")
        screen.say(reply.text)
    screen.say()


def _side_by_side(screen: Screen, comparison: ts.Comparison, prompt: ts.Conversation, marks: Seen) -> None:
    from rich.table import Table
    from rich.text import Text

    from tunesmith.cli.screen import clean

    table = Table(title=Text(clean(prompt.question)), title_justify="left", title_style="bold", expand=True)
    names = [variant.name for variant in comparison.variants]
    replies = [comparison.reply(prompt.id, name) for name in names]
    for name in names:
        table.add_column(clean(name), ratio=1, overflow="fold")
    first = clean(replies[0].text)
    cut = any(reply.stop_reason == "length" for reply in replies)
    table.add_row(Text(first), *(_diffed(first, clean(reply.text), cut=cut) for reply in replies[1:]))
    table.add_row(*(Text(_how_it_ended(reply, marks), style=_style(reply)) for reply in replies))
    screen.print(table)
    screen.say()


def _style(reply: ts.Reply) -> str:
    return "yellow" if reply.stop_reason == "length" else "dim"


def _how_it_ended(reply: ts.Reply, marks: Seen) -> str:
    speed = f"; {reply.tokens_per_s:.1f} tokens/s" if reply.tokens_per_s else ""
    worse = f"; {ts.text('mark.regressed')}" if marks[reply.prompt_id, reply.variant].regressed else ""
    return f"[{ts.text(f'stop.{reply.stop_reason}')}; {reply.tokens} tokens{speed}{worse}]"


def _diffed(left: str, right: str, *, cut: bool) -> Text:
    """The right text, with the words that the left one does not have in bold.

    After the end of a side that was cut nothing can be compared, so nothing is marked there.
    """
    from rich.text import Text

    text = Text()
    segments = ts.word_diff(left, right)
    last = max((place for place, segment in enumerate(segments) if segment.kind == "same"), default=-1)
    for place, segment in enumerate(segments):
        if segment.kind != "left":
            marked = segment.kind == "right" and not (cut and place > last)
            text.append(segment.text, style="bold green" if marked else "")
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
