"""What it costs to ask base and three checkpoints, against one variant alone, beside PEFT doing the same.

    python benchmarks/variants_cost.py RUN [--base BASE] [--rounds 3]

RUN must have three checkpoints, as the demo's has.  Float32, one thread, CPU seconds of the process.  All
configurations take turns, so that a machine that drifts drifts for all of them; the median of the rounds is shown.
Every row writes exactly so many tokens: nothing may end it, on either side.

PEFT's side is what its documentation shows: ``set_adapter`` and ``disable_adapter`` before each ``generate``, or
``adapter_names`` for one mixed batch; ``labels`` are given to score, as a training loop does.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch

import tunesmith as ts
from tunesmith.api.engines import load_variants
from tunesmith.conversations import encode, encode_prompt
from tunesmith.models import LocalEngine, VariantSet
from tunesmith.runs import held_out_rows

loop = importlib.import_module("tunesmith.models.generate")  # the room has a function of that name
ROWS_AT_ONCE = 4  # of scoring, on both sides


class Ours:
    """This project's engine."""

    def __init__(self, variants: VariantSet, names: list[str], rows: list[ts.Conversation], tokens: int) -> None:
        self.variants, self.names, self.rows = variants, names, rows
        self.settings = ts.GenerationSettings(greedy=True, max_new_tokens=tokens)

    def write(self, names: list[str], prompts: int) -> None:
        """Let variants answer the first prompts."""
        requests = [ts.Request(name, row.prompt) for row in self.rows[:prompts] for name in names]
        done = loop.generate(self.variants, requests, self.settings)
        if any(one.tokens != self.settings.max_new_tokens for one in done):
            raise SystemExit("a row has ended before its last token")

    def score(self, names: list[str]) -> None:
        """Score all rows."""
        LocalEngine(self.variants).score(names, self.rows)


class Peft:
    """PEFT as its documentation shows it."""

    def __init__(
        self, base: str, adapters: dict[str, str], tokenizer: Any, rows: list[ts.Conversation], tokens: int
    ) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        for name, path in adapters.items():
            if isinstance(model, PeftModel):
                model.load_adapter(path, name)
            else:
                model = PeftModel.from_pretrained(model, path, adapter_name=name)
        self.model, self.tokenizer, self.rows, self.tokens = model.eval(), tokenizer, rows, tokens
        self.pad = tokenizer.pad_token_id

    def write(self, name: str, prompts: int) -> None:
        """Let one variant answer the first prompts."""
        with self._active(name):
            self._generate([row.prompt for row in self.rows[:prompts]])

    def write_mixed(self, names: list[str], prompts: int) -> None:
        """Let variants answer in one batch of ``adapter_names``."""
        asked = [(name, row.prompt) for row in self.rows[:prompts] for name in names]
        with torch.no_grad():
            self._generate(
                [prompt for _, prompt in asked],
                adapter_names=["__base__" if name == "base" else name for name, _ in asked],
            )

    def score(self, name: str) -> None:
        """Take the loss of all rows, as a training loop does."""
        encoded = sorted((encode(self.tokenizer, row) for row in self.rows), key=lambda one: len(one.input_ids))
        with self._active(name):
            for start in range(0, len(encoded), ROWS_AT_ONCE):
                batch = encoded[start : start + ROWS_AT_ONCE]
                width = max(len(one.input_ids) for one in batch)
                pads = [width - len(one.input_ids) for one in batch]
                labels = [
                    [token if counts else -100 for token, counts in zip(one.input_ids, one.supervised, strict=True)]
                    for one in batch
                ]
                self.model(
                    input_ids=torch.tensor(
                        [one.input_ids + [self.pad] * n for one, n in zip(batch, pads, strict=True)]
                    ),
                    attention_mask=torch.tensor(
                        [[1] * len(one.input_ids) + [0] * n for one, n in zip(batch, pads, strict=True)]
                    ),
                    labels=torch.tensor([one + [-100] * n for one, n in zip(labels, pads, strict=True)]),
                )

    def _generate(self, prompts: list[Any], **kwargs: Any) -> None:
        ids = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        width = max(map(len, ids))
        self.model.generate(
            input_ids=torch.tensor([[self.pad] * (width - len(one)) + one for one in ids]),
            attention_mask=torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in ids]),
            max_new_tokens=self.tokens,
            min_new_tokens=self.tokens,
            do_sample=False,
            pad_token_id=self.pad,
            **kwargs,
        )

    def _active(self, name: str) -> Any:
        import contextlib

        stack = contextlib.ExitStack()
        stack.enter_context(torch.no_grad())
        if name == "base":
            stack.enter_context(self.model.disable_adapter())
        else:
            self.model.set_adapter(name)
        return stack


def configurations(ours: Ours, peft: Peft, names: list[str]) -> dict[str, Callable[[], None]]:
    """Everything that is timed, by name."""
    one, found = names[-1], {}
    for prompts in (1, 8):
        found |= {
            f"ours one, {prompts}": lambda n=prompts: ours.write([one], n),
            f"ours all, {prompts}": lambda n=prompts: ours.write(names, n),
            f"PEFT one, {prompts}": lambda n=prompts: peft.write(one, n),
            f"PEFT in turn, {prompts}": lambda n=prompts: [peft.write(name, n) for name in names],
            f"PEFT adapter_names, {prompts}": lambda n=prompts: peft.write_mixed(names, n),
        }
    return found | {
        "ours one, score": lambda: ours.score([one]),
        "ours all, score": lambda: ours.score(names),
        "ours all but the base, score": lambda: ours.score(names[1:]),
        "PEFT one, score": lambda: peft.score(one),
        "PEFT in turn, score": lambda: [peft.score(name) for name in names],
    }


def measure(found: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of every configuration."""
    times: dict[str, list[float]] = {name: [] for name in found}
    for number in range(rounds + 1):
        for name, run in found.items():
            started = time.process_time()
            run()
            if number:  # the first round builds kernels and fills caches
                times[name].append(time.process_time() - started)
        print(f"round {number} of {rounds}", file=sys.stderr)
    return {name: statistics.median(each) for name, each in times.items()}


def peak_bytes(run: str, base: str | None, variants: str) -> int:
    """The most memory of a process that lets variants answer eight prompts."""
    code = (
        "import resource, sys, tunesmith as ts\n"
        "engine, infos = ts.load_engine(sys.argv[1], sys.argv[2].split(','), base=sys.argv[3] or None, dtype='fp32')\n"
        "from tunesmith.runs import held_out_rows\n"
        "rows = held_out_rows(ts.open_run(sys.argv[1]))[:8]\n"
        "engine.generate([ts.Request(i.name, r.prompt) for r in rows for i in infos],"
        " ts.GenerationSettings(greedy=True, max_new_tokens=64))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"
    )
    done = subprocess.run(  # noqa: S603 - our own code, with the arguments that were given
        [sys.executable, "-c", code, run, variants, base or ""], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--base")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--scored-rows", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run = ts.open_run(arguments.run)
    checkpoints = [one.name for one in run.checkpoints if one.name != "final"][:3]
    names = ["base", *checkpoints]
    variants, infos = load_variants(run, names, base=arguments.base, dtype="fp32")
    rows = held_out_rows(run)[: max(8, arguments.scored_rows)]
    loop._eos_ids = lambda *_: frozenset()  # every row is to write all its tokens, as min_new_tokens has it in PEFT
    ours = Ours(variants, names, rows, arguments.new_tokens)
    adapters = {info.name: info.path for info in infos if info.kind == "adapter"}
    peft = Peft(infos[0].path, adapters, variants.tokenizer("base"), rows, arguments.new_tokens)
    cpu = measure(configurations(ours, peft, names), arguments.rounds)
    table(cpu, arguments.new_tokens)
    one, every = (peak_bytes(arguments.run, arguments.base, each) for each in (names[-1], ",".join(names)))
    print(f"\nMemory, peak: one variant {one / 2**20:.0f} MiB, base and 3 checkpoints {every / 2**20:.0f} MiB: "
          f"{every / one:.2f} x")  # fmt: skip


def table(cpu: dict[str, float], tokens: int) -> None:
    """Print CPU seconds and ratios as Markdown."""
    print(f"CPU seconds, float32, one thread, {tokens} new tokens a row; base and 3 checkpoints against one.\n")
    print("| | 1 prompt | 8 prompts | scoring |\n| --- | ---: | ---: | ---: |")
    for label in ("ours one", "ours all", "PEFT one", "PEFT in turn", "PEFT adapter_names"):
        cells = [f"{cpu[key]:.2f}" if (key := f"{label}, {what}") in cpu else "–" for what in ("1", "8", "score")]
        print(f"| {label} | {' | '.join(cells)} |")
    print(f"| ours all, the base's scores at hand | – | – | {cpu['ours all but the base, score']:.2f} |")
    for label, top, bottom in (
        ("ours all / ours one", "ours all", "ours one"),
        ("ours all / PEFT one", "ours all", "PEFT one"),
        ("ours one / PEFT one", "ours one", "PEFT one"),
        ("ours all / PEFT in turn", "ours all", "PEFT in turn"),
        ("PEFT in turn / PEFT one", "PEFT in turn", "PEFT one"),
        ("PEFT adapter_names / PEFT one", "PEFT adapter_names", "PEFT one"),
    ):
        pairs = [(f"{top}, {what}", f"{bottom}, {what}") for what in ("1", "8", "score")]
        cells = [f"{cpu[a] / cpu[b]:.2f}" if a in cpu and b in cpu else "–" for a, b in pairs]
        print(f"| {label} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
