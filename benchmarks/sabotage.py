"""Spoil a real merge in known ways and print what ``tunesmith verify`` says of each, beside merges that are sound.

The merge that is spoilt is rounded as Tunesmith does by default: in bf16 every number is one of the two neighbours of
the exact one.  One that is pushed from the one to the other cannot be told; one that is pushed beyond them must be.

Usage: ``python benchmarks/sabotage.py RUN --base demo``; everything is made in a temporary directory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import tunesmith as ts
from tunesmith.adapter import ADAPTER_WEIGHTS, LowRank, Stack
from tunesmith.checkpoint import Checkpoint, locate_base

LEVELS = ("structure", "assets", "weights")
Change = Callable[[dict[str, torch.Tensor]], object]


class Bench:
    """One run, its base, and a sound merge that is copied and spoilt."""

    def __init__(self, run: str, base: str, root: Path) -> None:
        self.run, self.base, self.root = ts.open_run(run), base, root
        self.base_dir = locate_base(base, relative_to=Path(self.run.path).parent)
        self.stack = Stack([(self.run.checkpoints[-1].path, 1.0)])
        updates = self.stack.bind(Checkpoint(self.base_dir)).updates
        self.updates = [update for update in updates if isinstance(update, LowRank)]
        self.merged = root / "tunesmith"
        self.plan = ts.plan_merge(self.run, self.merged, base=base)
        ts.merge(self.plan)

    def row(self, name: str, out: Path) -> tuple[str, str, str, float]:
        """Verify one directory."""
        started = time.monotonic()
        verdict = ts.verify(self.run, out, base=self.base, levels=LEVELS)
        return name, verdict.answer, ts.verdict_sentence(verdict), time.monotonic() - started

    @contextmanager
    def spoilt(self) -> Iterator[Path]:
        """A copy of the sound merge, gone afterwards."""
        out = self.root / "spoilt"
        shutil.copytree(self.merged, out)
        try:
            yield out
        finally:
            shutil.rmtree(out)

    def shard(self, name: str) -> str:
        """The file that holds a tensor."""
        return Checkpoint(self.base_dir).shard_of(name)

    def rewrite(self, out: Path, file: str, change: Change) -> None:
        """Change tensors of one weights file."""
        tensors = {name: weight.clone() for name, weight in load_file(out / file).items()}
        change(tensors)
        save_file(tensors, out / file, {"format": "pt"})

    def other_checkpoint(self) -> str | None:
        """The first adapter of the run that is not a copy of the last; None where there is none."""
        held = {one.name: Path(one.path, ADAPTER_WEIGHTS).read_bytes() for one in self.run.checkpoints}
        last = held[self.run.checkpoints[-1].name]
        return next((name for name, weights in held.items() if weights != last), None)

    def beyond(self, name: str) -> int:
        """An element of the sound merge that its lowest bit, flipped, takes beyond the exact value's neighbours."""
        factors = load_file(self.stack.adapters[0].header.path)
        delta = sum(
            update.scaling * factors[update.lora_B].double() @ factors[update.lora_A].double()
            for update in self.updates
            if update.name == name
        )
        exact = (load_file(self.base_dir / self.shard(name))[name].double() + delta).reshape(-1)
        stored = load_file(self.merged / self.shard(name))[name].reshape(-1)
        flipped = (stored.view(torch.int16) ^ 1).view(stored.dtype).double()
        share = (exact - stored.double()) / (flipped - stored.double())  # 0 where it stands, 1 where it would go
        return int(((share < -0.2) & (share > -0.4)).nonzero()[0])

    def scaled(self, out: Path, factor: float) -> None:
        """Every update times a factor, rounded to nearest."""
        factors = load_file(self.stack.adapters[0].header.path)
        for file in Checkpoint(self.base_dir).shards:
            tensors = load_file(self.base_dir / file)
            for update in self.updates:
                if update.name in tensors:
                    delta = update.scaling * factors[update.lora_B].double() @ factors[update.lora_A].double()
                    before = tensors[update.name]
                    tensors[update.name] = (before.double() + factor * delta).float().to(before.dtype)
            save_file(tensors, out / file, {"format": "pt"})

    def peft(self, out: Path, *, safe: bool) -> Path:
        """What a PEFT script makes of the run."""
        with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
            model = AutoModelForCausalLM.from_pretrained(self.base_dir, dtype="auto")
            merged = PeftModel.from_pretrained(model, self.run.checkpoints[-1].path).merge_and_unload(safe_merge=safe)
            merged.save_pretrained(out)
            AutoTokenizer.from_pretrained(self.run.path).save_pretrained(out)
        return out


def flip(weight: torch.Tensor, index: int, bit: int) -> None:
    """Flip one bit of one number of two bytes."""
    weight.view(-1).view(torch.int16)[index] ^= 1 << bit if bit < 15 else -(1 << 15)


def swap_two_merges(out: Path) -> None:
    """The last two merges of a BPE in the other order."""
    document = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    merges = document["model"]["merges"]
    merges[-1], merges[-2] = merges[-2], merges[-1]
    (out / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


def change_template(out: Path) -> None:
    """One full stop goes into the chat template."""
    path = out / "chat_template.jinja"
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: len(text) // 2] + "." + text[len(text) // 2 :], encoding="utf-8")


def mutants(bench: Bench) -> list[tuple[str, Callable[[Path], object]]]:
    """What to do to a copy of the sound merge, by name."""
    touched = bench.updates[len(bench.updates) // 2].name
    untouched = next(
        name for name in Checkpoint(bench.base_dir).tensors if name not in {update.name for update in bench.updates}
    )
    base = bench.base_dir
    shards = list(Checkpoint(base).shards)
    other = bench.other_checkpoint()

    def another_checkpoint(out: Path) -> None:
        ts.merge(ts.plan_merge(bench.run, out, base=bench.base, checkpoint=str(other), force=True))

    def restore(tensors: dict[str, torch.Tensor]) -> None:
        tensors[touched] = load_file(base / bench.shard(touched))[touched]

    def flipped(name: str, bit: int, index: int = 4321) -> Callable[[Path], None]:
        return lambda out: bench.rewrite(out, bench.shard(name), lambda tensors: flip(tensors[name], index, bit))

    return [
        ("adapter not applied", lambda out: [shutil.copy(base / shard, out) for shard in shards]),
        ("one module missing", lambda out: bench.rewrite(out, bench.shard(touched), restore)),
        ("scaling × 2 (merged twice)", lambda out: bench.scaled(out, 2.0)),
        ("scaling × 0.7", lambda out: bench.scaled(out, 0.7)),
        ("subtracted", lambda out: bench.scaled(out, -1.0)),
        *([(f"another checkpoint ({other})", another_checkpoint)] if other else []),
        ("tokenizer: two merges swapped", swap_two_merges),
        ("template: one full stop", change_template),
        ("lowest bit flipped, adapted tensor", flipped(touched, 0, bench.beyond(touched))),
        ("sign bit flipped, adapted tensor", flipped(touched, 15)),
        ("lowest bit flipped, untouched tensor", flipped(untouched, 0)),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="a run directory, with checkpoints beside its adapter")
    parser.add_argument("--base", default="demo", help="the base model")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(arguments.run, arguments.base, Path(root))
        same, sound, spoilt = ("identical",), ("identical", "equal_within_rounding"), ("different",)
        default = bench.plan.rounding
        expected = same if default == "nearest" else sound[1:]
        rows = [(expected, bench.row(f"sound: tunesmith merge ({default})", bench.merged))]
        if default != "nearest":
            out = Path(root, "nearest")
            ts.merge(ts.plan_merge(bench.run, out, base=bench.base, rounding="nearest"))
            rows.append((same, bench.row("sound: tunesmith merge --rounding nearest", out)))
            shutil.rmtree(out)
        for safe in (False, True):
            out = bench.peft(Path(root, f"peft-{safe}"), safe=safe)
            rows.append((sound, bench.row(f"sound: PEFT, safe_merge={safe}", out)))
            shutil.rmtree(out)
        for name, spoil in mutants(bench):
            with bench.spoilt() as out:
                spoil(out)
                rows.append((spoilt, bench.row(name, out)))
    print("| merge | answer | seconds | what it says |\n| --- | --- | --- | --- |")
    wrong = 0
    for right, (name, answer, sentence, seconds) in rows:
        wrong += answer not in right
        print(f"| {name} | {answer} | {seconds:.1f} | {sentence} |")
    print(f"\n{len(rows)} merges, {wrong} judged wrongly")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
