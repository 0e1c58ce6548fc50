"""``tunesmith push``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import tunesmith as ts
from tunesmith.cli.options import JsonOption
from tunesmith.cli.output import command, console, human_bytes, print_json, progress_bar, stoppable

if TYPE_CHECKING:
    from tunesmith.cli.screen import Screen


def push(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="A merged or quantized model, an adapter, a folder of GGUF files, or one such file."
        ),
    ],
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository; made where it is not there.")],
    to: Annotated[str, typer.Option("--to", metavar="HUB", help="huggingface or modelscope.")] = "huggingface",
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="The branch to write. Default: the main one.")
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option("--endpoint", metavar="URL", help="The hub's address. Default: HF_ENDPOINT, or the hub."),
    ] = None,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Send also what no certificate vouches for; the card says so.")
    ] = False,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace", help="In the same commit, remove what an earlier model left there for loaders to read."
        ),
    ] = False,
    run: Annotated[
        Path | None, typer.Option("--run", metavar="RUN", help="The run it was made from: its settings go on the card.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="DIR", help="The model that GGUF files were made from: they are proved first."),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model", metavar="OWNER/NAME", help="The base's hub id, where the records know a path only."
        ),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="The hub's word for the licence, such as apache-2.0."),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option("--evaluation", metavar="FILE.json", help="A record of evaluate: its figures go on the card."),
    ] = None,
    drift: Annotated[
        Path | None,
        typer.Option(
            "--drift",
            metavar="FILE.json",
            help="A record of drift with a row of DIR: what DIR keeps of the fine-tune goes on the card.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="TEXT", help="What it was trained on, in words or hub ids; nothing is guessed."),
    ] = None,
    card: Annotated[
        Path | None,
        typer.Option(
            "--card",
            metavar="FILE",
            help="A card to send as README.md. With --dry-run, a FILE that is not there is written, to be edited.",
        ),
    ] = None,
    language: Annotated[str, typer.Option("--language", metavar="LANG", help="Of the card: en or zh.")] = "en",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the files and the card, and send nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Push a model to a hub: its files alone, proved, with a card from the records, in one commit.

    The token is the one of `hf auth login`, or HF_TOKEN; for ModelScope that of `modelscope login`, or
    MODELSCOPE_API_TOKEN.
    A push that broke goes on where it was when the same command is given again.

    Example: tunesmith push out/security-merged me/security --private --dry-run
    """
    to_write = card if dry_run and card is not None and not card.exists() else None
    if to_write is not None:
        to_write = ts.output_file(to_write, suffixes=(".md",))
    with progress_bar() as progress, stoppable() as cancellation:
        plan = ts.plan_push(
            directory,
            repo_id,
            to=to,
            private=private,
            revision=revision,
            endpoint=endpoint,
            unverified=unverified,
            replace=replace,
            run=run,
            model=model,
            base_model=base_model,
            licence=licence,
            evaluation=evaluation,
            drift=drift,
            data=data,
            card=None if to_write is not None else card,
            language=language,
            progress=progress,
            cancellation=cancellation,
        )
        if not as_json:
            _plan(console(), plan, card=dry_run)
        pushed = None if dry_run else ts.push(plan, progress=progress, cancellation=cancellation)
    if to_write is not None:
        to_write.write_text(plan.card, encoding="utf-8")
    if as_json:
        print_json(pushed or plan)
    elif pushed is not None:
        _result(console(), pushed)
    else:
        console().say("Nothing was sent (--dry-run).")
        if to_write is not None:
            edited = command("push", directory, repo_id, "--card", to_write)
            console().say(f"The card is in {to_write}. Edit it, then: {edited}", style="dim")


def _plan(screen: Screen, plan: ts.PushPlan, *, card: bool) -> None:
    """What goes up and what stays, before anything is sent; with the card where nothing will be."""
    where = f"{plan.repo_id}{f'@{plan.revision}' if plan.revision else ''} of {plan.endpoint}"
    screen.say(f"{plan.directory} -> {where}{', private where it is new' if plan.private else ''}")
    for file in plan.files:
        screen.say(f"{human_bytes(file.size_bytes):>10}  {file.name}{'  (rewritten)' if file.text else ''}", indent=2)
    screen.say(f"{len(plan.files)} files, {human_bytes(plan.size_bytes)}")
    for left in plan.left_out:
        screen.say(f"stays here: {left.name} ({ts.text(f'push.left.{left.reason}')})", indent=2)
    if plan.verified is not None:
        what = "Against the model" if plan.kind == "gguf" else "Certificate holds"
        screen.say(f"{what}: {ts.text(f'verdict.{plan.verified}')}")
    for finding in plan.findings:
        screen.say(f"{'note' if finding.severity == 'info' else finding.severity}: {ts.finding_text(finding)}")
    if card:
        screen.say()
        screen.say(plan.card)


def _result(screen: Screen, pushed: ts.Pushed) -> None:
    if pushed.unchanged:
        screen.say("All of it lay there already; nothing was committed.")
    else:
        screen.say(f"Pushed in {pushed.seconds:.1f} s, as one commit: {pushed.commit}")
    screen.say(f"{pushed.files} files, {human_bytes(pushed.size_bytes)}: the hashes there are those of the files here.")
    for name in pushed.removed:
        screen.say(f"removed there: {name}", indent=2)
    screen.say(pushed.url)
