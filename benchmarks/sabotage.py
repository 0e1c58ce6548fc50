"""Spoil a real merge in every known way and see what ``tunesmith verify`` says of each; then accuse no sound merge.

    python benchmarks/sabotage.py RUN [--base demo] [--behaviour] [--only PATTERN] [--llamafactory COMMAND]

RUN is a run of the demo's form: SmolLM2-135M-Instruct, rank 8, alpha 16, all linear layers.  The merge that is spoilt
is rounded as Tunesmith does of itself: in bf16 every number is one of the two neighbours of the exact one.  One that is
pushed from the one to the other cannot be told; one that is pushed beyond them must be.  The mutants are in
``sabotage_mutants.py``, the sound merges in ``sabotage_sound.py``.  Where the run has no checkpoint but its last, one
that may have been before it is made up.

Structure, assets and weights are looked at; ``--behaviour`` adds the fourth level, which takes many times as long.
The exit code is 1 where a mutant passes, where fewer than 55 causes are named right, or where a sound merge is accused.
``--llamafactory`` is the ``llamafactory-cli`` of an environment of its own (LLaMA-Factory wants other versions of PEFT
and Transformers than ours), whose exports are then among the sound merges, and one with a template that is not the
run's among the mutants.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

# Two processes share the cores: threads that spin while they wait would take the other's time.
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}

import torch
from sabotage_mutants import MUTANTS, Mutant
from sabotage_shop import RUN, Claim, Judgement, Shop
from sabotage_sound import SOUND, Sound, export, llamafactory

MUST_NAME = 55
_SHOWN = 3
_GOOD = ("identical", "equal_within_rounding")
_EXPORT = Mutant("LLaMA-Factory's export with another template", lambda _: None, ("cause_chat_template",))


@dataclass(frozen=True)
class Row:
    """One merge and what was said of it.

    Attributes:
        name: what it is.
        expected: what should be said.
        judgement: what was.
        caught: whether a mutant is called different, or a sound merge is not.
        named: whether the cause is right.
    """

    name: str
    expected: str
    judgement: Judgement
    caught: bool
    named: bool

    @property
    def causes(self) -> str:
        """What was named, with its figures."""
        named = [
            cause.code.removeprefix("cause_") + (f" ({said})" if (said := _figures(cause.params)) else "")
            for cause in self.judgement.causes
        ]
        return " + ".join([*named[:_SHOWN], *([f"{len(named) - _SHOWN} more"] if len(named) > _SHOWN else [])])


def _figures(params: dict[str, object]) -> str:
    shown = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in params.values()]
    return ", ".join(text if len(text) < 40 else f"{text[:36]} …" for text in shown[:3])


_shop: Shop
_command: Path | None


def _start(shop: Shop, command: Path | None) -> None:
    """What every worker process begins with."""
    global _shop, _command
    _shop, _command = shop, command
    torch.set_num_threads(1)


def _prepare(kind: str) -> str:
    _shop.prepare(kind, merged=any(mutant.kind == kind for mutant in MUTANTS))
    return kind


def _judged(make: Callable[[], Claim]) -> Judgement:
    """What is said of a merge; what cannot be made or looked at is an answer too, and not the right one."""
    try:
        return _shop.judge(make())
    except Exception as error:  # noqa: BLE001 - the other merges are still to be judged
        traceback.print_exc()
        return Judgement(f"{type(error).__name__}", (), str(error), 0.0)


def _spoil(number: int) -> Row:
    mutant = MUTANTS[number]
    with _shop.draft(mutant.kind) as draft:

        def make() -> Claim:
            mutant.spoil(draft)
            return draft.claim

        judgement = _judged(make)
    return Row(
        mutant.name, mutant.expected, judgement, judgement.answer == "different", mutant.rightly_named(judgement)
    )


def _accuse(number: int) -> Row:
    made = _sound(_command)[number]
    with tempfile.TemporaryDirectory(dir=_shop.root) as root:
        judgement = _judged(lambda: made.make(_shop, Path(root)))
    good = judgement.answer in _GOOD and not judgement.causes
    return Row(made.name, "–", judgement, good, good)


def _export(_: int) -> Row:
    command = _command
    assert command is not None  # noqa: S101 - asked for only with one
    with tempfile.TemporaryDirectory(dir=_shop.root) as root:
        judgement = _judged(lambda: export(_shop, Path(root), command, template="default"))
    right = _EXPORT.rightly_named(judgement)
    return Row(_EXPORT.name, _EXPORT.expected, judgement, judgement.answer == "different", right)


def _sound(command: Path | None) -> list[Sound]:
    return [*SOUND, *(llamafactory(command) if command else [])]


def work(shop: Shop, options: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """Make and judge everything, two merges at a time; returns the mutants and the sound merges."""
    chosen = [number for number, mutant in enumerate(MUTANTS) if re.search(options.only, mutant.name)]
    sound = [number for number, made in enumerate(_sound(options.llamafactory)) if re.search(options.only, made.name)]
    kinds = {MUTANTS[number].kind for number in chosen}
    kinds |= {_sound(options.llamafactory)[number].kind for number in sound} | {RUN}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        options.workers, mp_context=context, initializer=_start, initargs=(shop, options.llamafactory)
    ) as pool:
        print(f"prepared: {', '.join(pool.map(_prepare, sorted(kinds)))}", file=sys.stderr, flush=True)
        spoilt = pool.map(_spoil, chosen)
        accused = pool.map(_accuse, sound)
        exported = pool.map(_export, [0] if options.llamafactory and re.search(options.only, _EXPORT.name) else [])
        rows = [_told(row) for row in spoilt], [_told(row) for row in accused]
        return [*rows[0], *exported], rows[1]


def _told(row: Row) -> Row:
    mark = " " if row.caught and row.named else "!"
    print(f"{mark} {row.name}: {row.judgement.answer}, {row.causes or '–'}", file=sys.stderr, flush=True)
    return row


def print_rows(rows: Sequence[Row], *, heading: str) -> None:
    """A table of Markdown."""
    print(f"\n{heading}\n\n| merge | answer | cause named | cause expected | seconds |")
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        answer = row.judgement.answer if row.caught else f"**{row.judgement.answer}**"
        causes = (row.causes or "–") if row.named else f"**{row.causes or '–'}**"
        print(f"| {row.name} | {answer} | {causes} | {row.expected} | {row.judgement.seconds:.1f} |".replace("\n", " "))


def main() -> None:
    """Print the tables and the totals."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--base", default="demo", help="the base model")
    parser.add_argument("--only", default="", metavar="PATTERN", help="merges whose names match this")
    parser.add_argument("--behaviour", action="store_true", help="look at the behaviour level too")
    parser.add_argument("--llamafactory", type=Path, metavar="COMMAND", help="llamafactory-cli of its own environment")
    parser.add_argument("--workers", type=int, default=2, help="merges at a time")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        shop = replace(Shop.open(options.run, options.base, Path(root)), behaviour=options.behaviour)
        mutants, sound = work(shop, options)
    print_rows(mutants, heading="Spoilt merges")
    print_rows(sound, heading="Sound merges")
    caught, named, accused = (
        sum(row.caught for row in mutants),
        sum(row.caught and row.named for row in mutants),
        sum(not row.caught for row in sound),
    )
    print(f"\ncaught {caught} of {len(mutants)}, cause right {named} of {len(mutants)}, ", end="")
    print(f"false alarms {accused} of {len(sound)}; {time.monotonic() - started:.0f} s, {options.workers} at a time")
    too_few = named < (min(MUST_NAME, len(mutants)) if not options.only else 0)
    sys.exit(bool(caught < len(mutants) or accused or too_few))


if __name__ == "__main__":
    main()
