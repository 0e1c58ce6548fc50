"""What rounding to bf16 costs a fine-tune: KL divergence of merged models to the live adapter, by way of rounding.

    python benchmarks/rounding.py --work DIR [--runs demo,small-lr,…] [--seeds 2] [--tokens 48] [--prompts 48]
    python benchmarks/rounding.py --work DIR --figure docs/rounding.svg

Tunes the embedded model on the demo's data in seven ways (what is there already is kept), merges every run by every
rounding, and prints one table a run.  The reference is the base with the live, unmerged adapter; everything is computed
in float32.  Prompts: the demo's held-out rows (in-domain) and ``general_prompts.txt``; neither was used to choose
anything in the program.  For every prompt the live adapter answers greedily; its KL(adapter ‖ merged) is the mean over
the answer's tokens, in nats.  "gain" is the ratio of the mean KL of rounding to nearest, which is what PEFT and all
other tools do, to that of the row; its 95 % interval is of 2,000 bootstrap samples of the prompts.  Where a way of
rounding has a seed, its KL is the mean over the seeds.  "seconds" are the merge's own; calibrated rounding needs the
tuned model's text and its inputs first.

Rows: ``random subspace`` is the control, feedback as in ``faithful`` but within the row space of random matrices of A's
shapes; ``nearest, fp16`` is not bf16 at all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tunesmith.api.merging import recorded_inputs
from tunesmith.checkpoint import Float64
from tunesmith.conversations import Conversation, encode_prompt, read_conversations
from tunesmith.demo import story
from tunesmith.merge import Kept, Merged, MergePlan, TensorFidelity, plan_merge
from tunesmith.merge import merge as merge_weights
from tunesmith.merge import work as merge_work
from tunesmith.models import GenerationSettings, VariantSet, generate
from tunesmith.report.charts import to_svg

RECIPES: dict[str, tuple[str, ...]] = {
    "demo": (),
    "mid-lr": ("learning_rate=3.0e-4",),
    "small-lr": ("learning_rate=1.0e-4",),
    "attention": ("lora_target=q_proj,k_proj,v_proj,o_proj",),
    "rslora": ("lora_rank=16", "use_rslora=true"),
    "r64": ("lora_rank=64", "lora_alpha=128", "learning_rate=3.0e-4"),
    "dora": ("use_dora=true",),
}
SETS = ("in-domain", "general")
SAMPLES = 2000
BATCH = 8

Rows = list[tuple[list[int], list[int]]]


@dataclass
class Row:
    """One way of rounding on one run.

    Attributes:
        name: the way.
        kl: by set of prompts, KL(adapter ‖ merged) of every prompt, mean over the seeds.
        kept: what rounding kept of the update; None where that is another dtype.
        seconds: wall time of the merge, the mean over the seeds.
    """

    name: str
    kl: dict[str, Float64]
    kept: Kept | None
    seconds: float


@dataclass
class Lab:
    """One run with its reference.

    Attributes:
        run: the run directory.
        base: the base model's directory.
        prompts: by set.
        tokens: the most tokens of an answer.
    """

    run: Path
    base: Path
    prompts: dict[str, list[Conversation]]
    tokens: int
    rows: dict[str, Rows] = field(default_factory=dict)
    live: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    effect: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        variants = VariantSet.load(self.base, adapters={"final": self.run}, tokenizer_dir=self.run, dtype="float32")
        settings = GenerationSettings(greedy=True, max_new_tokens=self.tokens)
        for name, prompts in self.prompts.items():
            turns = [prompt.prompt for prompt in prompts]
            answers = generate(variants, "final", turns, settings)
            with variants.active("final") as (model, tokenizer):
                ids = [encode_prompt(tokenizer, turn) for turn in turns]
                self.rows[name] = [(row, list(answer.token_ids)) for row, answer in zip(ids, answers, strict=True)]
                self.live[name] = _log_probabilities(model, self.rows[name])
            with variants.active("base") as (model, _):
                self.effect[name] = float(self._kl(name, _log_probabilities(model, self.rows[name])).mean())

    def measure(self, merged: Path) -> dict[str, Float64]:
        """KL(adapter ‖ merged) of every prompt, by set."""
        model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32, local_files_only=True)
        return {name: self._kl(name, _log_probabilities(model, rows)) for name, rows in self.rows.items()}

    def _kl(self, name: str, others: list[torch.Tensor]) -> Float64:
        pairs = zip(self.live[name], others, strict=True)
        return np.array([float((p.double().exp() * (p.double() - q.double())).sum(-1).mean()) for p, q in pairs])


@torch.no_grad()
def _log_probabilities(model: Any, rows: Rows) -> list[torch.Tensor]:
    """Log-probabilities (answer tokens, vocabulary) of every row; batches are padded on the right, where none looks."""
    found = []
    for first in range(0, len(rows), BATCH):
        batch = rows[first : first + BATCH]
        longest = max(len(prompt) + len(answer) for prompt, answer in batch)
        ids = [prompt + answer + [0] * (longest - len(prompt) - len(answer)) for prompt, answer in batch]
        logits = model(input_ids=torch.tensor(ids), use_cache=False).logits
        for place, (prompt, answer) in enumerate(batch):
            end = len(prompt) + len(answer) - 1
            found.append(logits[place, len(prompt) - 1 : end].log_softmax(-1))
    return found


def trained(work: Path, name: str) -> Path:
    """The run of that name, tuned now where it is not there."""
    run = work / "runs" / name
    if not (run / "adapter_config.json").is_file():
        recipe = work / "recipe.yaml"
        source = Path(story.__file__).parent
        for file in ("recipe.yaml", "workshop_train.jsonl", "workshop_held_out.jsonl"):
            (work / file).write_bytes((source / file).read_bytes())
        command = [sys.executable, "-m", "tunesmith", "train", str(recipe), f"output_dir={run}", "save_steps=1000"]
        subprocess.run([*command, *RECIPES[name]], check=True, stdout=subprocess.DEVNULL)  # noqa: S603
    return run


def rows_of(lab: Lab, out: Path, seeds: int) -> Iterator[Row]:
    """Merge a run by every rounding, and measure each."""
    plan = plan_of(lab.run, out)
    yield row("nearest", lab, [lambda: merge_weights(plan(rounding="nearest"))])
    drawn = [lambda seed=seed: merge_weights(plan(rounding="stochastic", seed=seed)) for seed in range(seeds)]
    yield row("stochastic", lab, drawn)
    with random_subspaces():
        yield row("random subspace (control)", lab, [lambda: merge_weights(plan(rounding="faithful"))])
    yield row("faithful", lab, [lambda: merge_weights(plan(rounding="faithful"))])
    with ExitStack() as folders:
        inputs = []
        for seed in range(seeds):
            text = plan_merge(lab.run, out.with_name(f"text-{seed}"), rounding="calibrated", seed=seed)
            inputs.append(folders.enter_context(recorded_inputs(text)))
        for name in ("calibrated", "calibrated-free"):
            drawn = [
                lambda place=place, name=name: merge_weights(plan(rounding=name), inputs=place) for place in inputs
            ]
            yield row(name, lab, drawn)
    yield row("nearest, fp16", lab, [lambda: merge_weights(plan(rounding="nearest", dtype="fp16"))])


def plan_of(run: Path, out: Path) -> Callable[..., MergePlan]:
    """Plan a merge of a run into one directory, over and over."""
    return lambda **options: plan_merge(run, out, force=True, **options)


def row(name: str, lab: Lab, merges: Sequence[Callable[[], Merged]]) -> Row:
    """Merge, and measure; once a seed."""
    found, seconds, merged = [], [], None
    for merge in merges:
        started = time.perf_counter()
        merged = merge()
        seconds.append(time.perf_counter() - started)
        found.append(lab.measure(merged.path))
    assert merged is not None, "at least one seed"  # noqa: S101
    kl = {name: np.mean([each[name] for each in found], axis=0) for name in lab.rows}
    return Row(name, kl, merged.kept if "fp16" not in name else None, float(np.mean(seconds)))


@contextmanager
def random_subspaces() -> Iterator[None]:
    """Feedback within the row space of random matrices of the same shapes."""
    random, right = np.random.default_rng(0), merge_work.faithful

    def wrong(a_RI: Float64, beside_RI: Sequence[Float64] = ()) -> Any:
        made = right(random.standard_normal(a_RI.shape), [random.standard_normal(a.shape) for a in beside_RI])
        made.basis_IM, made.inside_of_state = right(a_RI).basis_IM, None
        return made

    with patch.object(merge_work, "faithful", wrong):
        yield


def interval(reference: Float64, kl: Float64) -> tuple[float, float, float]:
    """The ratio of the means, and its 95 % interval over resampled prompts."""
    random = np.random.default_rng(0)
    picks = random.integers(0, len(kl), (SAMPLES, len(kl)))
    ratios = reference[picks].mean(1) / kl[picks].mean(1)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(reference.mean() / kl.mean()), float(low), float(high)


def report(name: str, lab: Lab, rows: list[Row]) -> None:
    """Print one run's table."""
    effect = ", ".join(f"{lab.effect[key]:.3g} {key}" for key in lab.rows)
    print(f"\n## {name}\n\nKL(adapter ‖ base), the tuning's own effect: {effect}.\n")
    print("| rounding | in-domain KL | gain | general KL | gain | kept | unchanged | error inside | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for each in rows:
        cells = []
        for key in lab.rows:
            ratio, low, high = interval(rows[0].kl[key], each.kl[key])
            cells += [f"{each.kl[key].mean():.2e}", f"{ratio:.1f} × ({low:.1f}–{high:.1f})"]
        kept = each.kept
        inside = f"{kept.error_inside:.3f}" if kept is not None and kept.error_inside is not None else "–"
        facts = [f"{kept.gain:.1%}", f"{kept.share_unchanged:.0%}", inside] if kept is not None else ["–"] * 3
        print(f"| {' | '.join([each.name, *cells, *facts, f'{each.seconds:.1f}'])} |", flush=True)


def figure(run: Path, out: Path) -> str:
    """How much of the update arrives in every layer, rounded to nearest and faithfully; an SVG."""
    points = []
    tensors = [tensor for receipt in merge_weights(plan_of(run, out)()).receipts for tensor in receipt.tensors]
    for layer, mine in groupby(sorted(tensors, key=_layer), key=_layer):
        each = [(tensor.delta_norm**2, tensor.nearest or tensor, tensor) for tensor in mine]
        whole = sum(weight for weight, _, _ in each)
        for place, name in ((1, "rounded to nearest"), (2, "rounded faithfully")):
            gain = sum(parts[0] * parts[place].gain for parts in each) / whole  # type: ignore[union-attr]
            points.append({"layer": layer, "gain": gain, "rounding": name})
    scale = {"domain": ["rounded faithfully", "rounded to nearest"], "range": ["#4c7fd9", "#d0812c"]}
    encoding = {
        "x": {"field": "layer", "type": "quantitative", "title": "layer", "axis": {"grid": False, "tickMinStep": 1}},
        "y": {
            "field": "gain",
            "type": "quantitative",
            "title": "share of the update that arrives",
            "axis": {"format": ".0%"},
            "scale": {"domain": [0, 1.1]},
        },
        "color": {"field": "rounding", "type": "nominal", "scale": scale, "legend": {"title": None, "orient": "top"}},
    }
    content = {"width": 460, "height": 280, "background": "white", "padding": 12, "data": {"values": points}}
    mark = {"type": "line", "strokeWidth": 2.5, "point": {"size": 30}}
    return to_svg(
        {"$schema": "https://vega.github.io/schema/vega-lite/v5.json", **content, "mark": mark, "encoding": encoding}
    )


def _layer(tensor: TensorFidelity) -> int:
    return next(int(part) for part in tensor.name.split(".") if part.isdigit())


def main() -> None:
    """Tune, merge, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where runs and merged models go")
    parser.add_argument("--runs", default=",".join(RECIPES), help="which of the runs")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=48, help="the most tokens of an answer")
    parser.add_argument("--prompts", type=int, default=48, help="the most prompts of a set")
    parser.add_argument("--figure", type=Path, help="only draw the figure of the documentation, from small-lr")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.figure is not None:
        options.figure.write_text(figure(trained(options.work, "small-lr"), options.work / "merged"), encoding="utf-8")
        return
    held_out = read_conversations(Path(story.__file__).parent / "workshop_held_out.jsonl")
    general = read_conversations(Path(__file__).parent / "general_prompts.txt")
    prompts = dict(zip(SETS, (held_out[: options.prompts], general[: options.prompts]), strict=True))
    for name in options.runs.split(","):
        run = trained(options.work, name)
        lab = Lab(run, Path(plan_merge(run, options.work / "merged", force=True).base), prompts, options.tokens)
        rows = list(rows_of(lab, options.work / "merged", options.seeds))
        report(name, lab, rows)
        record = [{"name": r.name, "seconds": r.seconds, "kl": {k: v.tolist() for k, v in r.kl.items()}} for r in rows]
        (options.work / f"{name}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main()
