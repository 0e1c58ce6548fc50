"""What a training costs, beside LLaMA-Factory 0.9.5 that does the same.

    python benchmarks/train_cost.py --llamafactory VENV/bin/llamafactory-cli [--seeds 3] [--steps 60] [--threads 1]
    python benchmarks/train_cost.py --llamafactory VENV/bin/llamafactory-cli --bf16 --steps 8 --seeds 1

One recipe in LLaMA-Factory's keys, the embedded model, the demo's training rows behind a ``dataset_info.json``: rank 8,
all linear layers, batches of 4.  CMD is LLaMA-Factory's command, as a rule in a venv of its own; where one venv holds
both (``benchmarks/beside_llamafactory.py``), ``--tunesmith 'VENV/bin/python -m tunesmith'`` gives both the same torch.
Whole processes in turn, one seed after the other: LLaMA-Factory as its users have it, with gradient checkpointing,
which is its default; LLaMA-Factory without; and ``tunesmith train``.  There are as many rows as the steps take, so that
every training sees every row equally often and the supervised tokens are the same ones, whatever the order.

- Threads: one, and more if asked for; those that wait do not spin, on either side, lest waiting be counted as work.
- CPU seconds, user and system, of the process and all that it started (``wait4``); of training alone, those between the
  first and the last row of ``trainer_log.jsonl``, in which both write every step, so that reading, loading, the first
  step's building of kernels, saving and drawing are left out.
- Memory: the peak resident set (``wait4``), or, where it is more, what a process and its children were seen to hold at
  once.  The torch builds are printed: one with CUDA takes 300 MB more, if only to be imported.
- Supervised tokens are those of this project's encoder, for both.  LLaMA-Factory's own labels are made by its own code
  in its own venv and compared, row by row: ids, and what counts in the loss.
- Held-out loss: one engine scores all the adapters on the demo's held-out rows, in float32, as the mean over answer
  tokens; what either tool says of itself is a mean of another kind.  Noise is what seeds make of it: the difference of
  the two means is held against Student's interval of two samples (Welch), and each seed's own difference is shown.

float32: LLaMA-Factory loads a base in the dtype in which it is stored, whatever the recipe says of bf16
(``torch_dtype="auto"`` in its ``model/loader.py``).  It is therefore given a float32 copy of the same numbers, and we
are told ``dtype=float32``.  With ``--bf16`` the recipe says ``bf16: true`` (and ``use_cpu: true``, without which
Transformers refuses that on a CPU): LLaMA-Factory obeys, and we follow the measured compute dtype and say so.

The bars: at least 1.5 × LLaMA-Factory's supervised tokens a CPU second, at most 0.8 × its peak memory, both against
its default; the held-out losses apart by no more than noise.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import psutil
import yaml

MIN_SPEED, MAX_MEMORY = 1.5, 0.8
BATCH = 4
LOOK_EVERY_S = 0.1
OURS, DEFAULT, PLAIN = "Tunesmith", "LLaMA-Factory", "LLaMA-Factory, no checkpointing"

# The system text that the model's own template puts before a conversation; the named template has one more full stop.
RECIPE: dict[str, Any] = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "dataset": "workshop",
    "template": "smollm2",
    "default_system": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "cutoff_len": 1024,
    "logging_steps": 1,
    "plot_loss": True,
    "overwrite_output_dir": True,
    "report_to": "none",
    "per_device_train_batch_size": BATCH,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1.0e-3,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
}

FLOAT32 = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
base, out = sys.argv[1:]
AutoModelForCausalLM.from_pretrained(base, dtype="float32").save_pretrained(out)
AutoTokenizer.from_pretrained(base).save_pretrained(out)
"""

LABELS = """
import json, sys, yaml
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer
recipe, out = sys.argv[1:]
model, data, training, _, _ = get_train_args(yaml.safe_load(open(recipe)))
tokens = load_tokenizer(model)
template = get_template_and_fix_tokenizer(tokens["tokenizer"], data)
rows = get_dataset(template, model, data, training, stage="sft", **tokens)["train_dataset"]
json.dump([[row["input_ids"], row["labels"]] for row in rows], open(out, "w"))
"""


# One training.


@dataclass(frozen=True)
class Cost:
    """One process: CPU and wall seconds of the whole and of training alone, and the peak of its memory."""

    cpu_s: float
    wall_s: float
    train_cpu_s: float
    train_wall_s: float
    train_steps: int
    peak_mb: float


@dataclass
class Watch:
    """What is seen of a process and its children while they run: memory, and CPU seconds at each step's log row."""

    pid: int
    log: Path
    peak_bytes: int = 0
    seen: dict[int, tuple[float, float]] = field(default_factory=dict)

    def look(self) -> None:
        """Take the measure of the tree once."""
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.pid)
            times = root.cpu_times()
            cpu = times.user + times.system + times.children_user + times.children_system
            resident = root.memory_info().rss
            for child in root.children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    cpu += sum(child.cpu_times()[:2])
                    resident += child.memory_info().rss
            self.peak_bytes = max(self.peak_bytes, resident)
            self.seen.setdefault(self.step(), (cpu, time.perf_counter()))

    def step(self) -> int:
        """The last step that the log tells of; 0 before any."""
        try:
            lines = self.log.read_text(encoding="utf-8").split("\n")[:-1]
        except FileNotFoundError:
            return 0
        return int(json.loads(lines[-1])["current_steps"]) if lines else 0


def measure(command: Sequence[str], *, log: Path, output: Path, threads: int) -> Cost:
    """Run a training to its end; what it prints goes to a file."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(output.parent / "datasets"),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "MKL_NUM_THREADS": str(threads),
    }
    if log.exists():
        raise SystemExit(f"{log} is of an earlier training, and would be taken for this one's")
    started = time.perf_counter()
    with output.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment)  # noqa: S603
    watch = Watch(process.pid, log)
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        watch.look()
        time.sleep(LOOK_EVERY_S)
    wall, usage = time.perf_counter() - started, ended[2]
    process.returncode = os.waitstatus_to_exitcode(ended[1])
    if process.returncode:
        tail = "\n".join(output.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])
        raise SystemExit(f"failed ({process.returncode}): {shlex.join(command)}\n{tail}")
    steps = sorted(step for step in watch.seen if step)
    if len(steps) < 2:
        raise SystemExit(f"{log} did not grow while it was watched: too few steps, or too quick ones")
    (cpu_from, wall_from), (cpu_to, wall_to) = watch.seen[steps[0]], watch.seen[steps[-1]]
    return Cost(
        cpu_s=usage.ru_utime + usage.ru_stime,
        wall_s=wall,
        train_cpu_s=cpu_to - cpu_from,
        train_wall_s=wall_to - wall_from,
        train_steps=steps[-1] - steps[0],
        peak_mb=max(usage.ru_maxrss * 1024, watch.peak_bytes) / 1e6,
    )


# What is trained.


def write_data(folder: Path, *, steps: int) -> tuple[Path, int]:
    """The demo's first rows, as many as the steps take in whole passes, behind a registry; the file and its rows."""
    demo = resources.files("tunesmith") / "demo"
    lines = (demo / "workshop_train.jsonl").read_text(encoding="utf-8").splitlines()
    passes = next(n for n in range(1, steps + 1) if steps % n == 0 and steps // n * BATCH <= len(lines))
    rows = steps // passes * BATCH
    folder.mkdir(parents=True)
    file = folder / "workshop.jsonl"
    file.write_text("".join(f"{line}\n" for line in lines[:rows]), encoding="utf-8")
    registry = {"workshop": {"file_name": file.name}}
    (folder / "dataset_info.json").write_text(json.dumps(registry), encoding="utf-8")
    return file, passes


def write_recipe(path: Path, *, base: Path | str, data: Path, options: argparse.Namespace, **more: Any) -> Path:
    """One recipe file; ``more`` are further keys."""
    precision = {"bf16": True, "use_cpu": True} if options.bf16 else {"bf16": False}
    recipe = RECIPE | precision | more
    recipe |= {"max_steps": options.steps, "save_steps": options.steps, "output_dir": str(path.with_suffix(""))}
    recipe |= {"model_name_or_path": str(base), "dataset_dir": str(data)}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def contenders(work: Path, *, base: Path, seed: int, options: argparse.Namespace) -> dict[str, tuple[list[str], Path]]:
    """The commands of one seed by name, each with the run directory that it makes."""
    theirs = base if options.bf16 else work / "base-float32"
    found: dict[str, tuple[list[str], Path]] = {}
    common: dict[str, Any] = {"data": work / "data", "options": options, "seed": seed}
    without: dict[str, Any] = {"disable_gradient_checkpointing": True}
    for name, slug, more in ((DEFAULT, "theirs", {}), (PLAIN, "theirs-plain", without)):
        recipe = write_recipe(work / f"{slug}-{seed}.yaml", base=theirs, **common, **more)
        found[name] = ([*shlex.split(options.llamafactory), "train", str(recipe)], recipe.with_suffix(""))
    recipe = write_recipe(work / f"ours-{seed}.yaml", base="demo", **common)
    asked = [] if options.bf16 else ["dtype=float32"]
    found[OURS] = ([*shlex.split(options.tunesmith), "train", str(recipe), *asked], recipe.with_suffix(""))
    return found


# What comes of it.  torch is imported here, after the last measurement: what a process holds when it starts another
# counts, until that has its own program, as the other's memory.


def held_out_losses(runs: dict[str, list[Path]], base: Path) -> dict[str, list[float]]:
    """The mean loss over the answers' tokens of the demo's held-out rows, in nats, of every run; and of the base."""
    import tunesmith as ts
    from tunesmith.conversations import read_conversations

    with resources.as_file(resources.files("tunesmith") / "demo" / "workshop_held_out.jsonl") as file:
        rows = read_conversations(file)

    first, *others = [*runs[OURS], *(run for name, each in runs.items() if name != OURS for run in each)]
    places = {"final": first} | {f"{number}-{run.name}": run for number, run in enumerate(others)}
    named = ["base", "final", *(f"{name}={run}" for name, run in places.items() if run is not first)]
    engine, infos = ts.load_engine(first, named, base=str(base), dtype="fp32")
    scores = engine.score([info.name for info in infos], rows)
    losses = {name: sum(one.nll for one in each) / sum(one.tokens for one in each) for name, each in scores.items()}
    of_run = {run: losses[name] for name, run in places.items()}
    return {name: [of_run[run] for run in each] for name, each in runs.items()} | {"base": [losses["base"]]}


def our_labels(file: Path, base: Path) -> list[tuple[list[int], list[bool]]]:
    """Token ids of every row, and which of them count in the loss."""
    from transformers import AutoTokenizer

    from tunesmith.conversations import encode, read_conversations

    tokenizer = AutoTokenizer.from_pretrained(base)
    encoded = [encode(tokenizer, row) for row in read_conversations(file)]
    return [(one.input_ids, one.supervised) for one in encoded]


def their_labels(recipe: Path, options: argparse.Namespace) -> list[tuple[list[int], list[bool]]]:
    """The same, by LLaMA-Factory's own code."""
    out = recipe.with_suffix(".labels.json")
    python = python_of(options.llamafactory)
    done = subprocess.run(  # noqa: S603
        [python, "-c", LABELS, recipe, out], env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"LLaMA-Factory's labels cannot be made:\n{done.stderr[-2000:]}")
    rows = json.loads(out.read_text(encoding="utf-8"))
    return [(ids, [label != -100 for label in labels]) for ids, labels in rows]


def agreement(
    ours: list[tuple[list[int], list[bool]]], theirs: list[tuple[list[int], list[bool]]], base: Path
) -> list[str]:
    """How the two sides' rows differ, in lines."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    same = sum(mine == other for (mine, _), (other, _) in zip(ours, theirs, strict=True))
    lines = [f"Token ids: the same in {same} of {len(ours)} rows."]
    extra: dict[str, int] = {}
    for (ids, mine), (other_ids, other) in zip(ours, theirs, strict=True):
        for token, ours_counts, theirs_counts in zip(ids, mine, other, strict=False):
            if ids == other_ids and ours_counts != theirs_counts:
                who = "only theirs" if theirs_counts else "only ours"
                key = f"{who} counts {tokenizer.decode([token])!r}"
                extra[key] = extra.get(key, 0) + 1
    count = [sum(map(sum, (supervised for _, supervised in side))) for side in (ours, theirs)]
    lines.append(f"Supervised tokens: {count[0]:,} by our encoder, {count[1]:,} by LLaMA-Factory's labels.")
    return lines + [f"{key}: {number} times." for key, number in extra.items()]


def difference(ours: list[float], theirs: list[float]) -> str:
    """The difference of two means, with Welch's interval, and whether nothing lies within."""
    apart = statistics.mean(ours) - statistics.mean(theirs)
    if min(len(ours), len(theirs)) < 2:
        return f"{apart:+.4f} nats (one seed: no interval)"
    from scipy.stats import t

    parts = [statistics.variance(each) / len(each) for each in (ours, theirs)]
    freedom = sum(parts) ** 2 / sum(p**2 / (len(each) - 1) for p, each in zip(parts, (ours, theirs), strict=True))
    reach = t.ppf(0.975, freedom) * math.sqrt(sum(parts))
    verdict = "within noise" if abs(apart) <= reach else "NOT within noise"
    each = ", ".join(f"{mine - other:+.4f}" for mine, other in zip(ours, theirs, strict=True))
    return f"{apart:+.4f} ± {reach:.4f} nats (95 %): {verdict}; by seed {each}"


# The tables.


def table(costs: dict[str, list[Cost]], losses: dict[str, list[float]], *, tokens: int, steps: int) -> None:
    """Print medians over the seeds as Markdown; ``tokens`` are the supervised ones of a whole training."""
    print("| | CPU s | of these training | tokens / CPU s | training alone | tokens / s | peak MB | held-out loss |")
    print(f"| --- |{' ---: |' * 7}")
    for name, rows in costs.items():
        cpu, train, wall, peak = (
            statistics.median(getattr(row, key) for row in rows)
            for key in ("cpu_s", "train_cpu_s", "train_wall_s", "peak_mb")
        )
        trained = tokens * rows[0].train_steps / steps
        spread = f" ± {statistics.stdev(losses[name]):.4f}" if len(rows) > 1 else ""
        print(
            f"| {name} | {cpu:.1f} | {train:.1f} | {tokens / cpu:.1f} | {trained / train:.1f} | {trained / wall:.1f} "
            f"| {peak:,.0f} | {statistics.mean(losses[name]):.4f}{spread} |"
        )


def ratios(costs: dict[str, list[Cost]], losses: dict[str, list[float]]) -> None:
    """Print ours against each of theirs; a ratio is of one seed's pair, and the median over the seeds is shown."""
    verdicts: dict[str, list[str]] = {}
    print("\n| Tunesmith against | tokens / CPU s | training alone | tokens / s | peak memory | held-out loss |")
    print(f"| --- |{' ---: |' * 5}")
    for name in (DEFAULT, PLAIN):
        pairs = list(zip(costs[OURS], costs[name], strict=True))
        whole, train, wall = (
            statistics.median(getattr(theirs, key) / getattr(ours, key) for ours, theirs in pairs)
            for key in ("cpu_s", "train_cpu_s", "train_wall_s")
        )
        memory = statistics.median(ours.peak_mb / theirs.peak_mb for ours, theirs in pairs)
        apart = difference(losses[OURS], losses[name])
        print(f"| {name} | {whole:.2f} × | {train:.2f} × | {wall:.2f} × | {memory:.2f} × | {apart} |")
        met = [whole >= MIN_SPEED, train >= MIN_SPEED, memory <= MAX_MEMORY]
        verdicts[name] = ["met" if each else "NOT met" for each in met]
    speed, alone, memory_bar = verdicts[DEFAULT]
    print(
        f"\nThe bars, against the default: ≥ {MIN_SPEED} × tokens a CPU second {speed}, training alone {alone}; "
        f"≤ {MAX_MEMORY} × memory {memory_bar}."
    )


def python_of(command: str) -> Path:
    """The interpreter of the venv that a command lies in."""
    return Path(shutil.which(shlex.split(command)[0]) or command).with_name("python")


def torch_of(command: str) -> str:
    """The torch, Transformers and PEFT that a command runs on."""
    code = "import importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in ('torch','transformers','peft')))"
    told = subprocess.run([python_of(command), "-c", code], check=True, capture_output=True, text=True)  # noqa: S603
    return told.stdout.strip()


def prepare(work: Path, options: argparse.Namespace) -> tuple[Path, Path, int]:
    """The base's directory, the data file, and how many passes over it the steps make."""
    from tunesmith.checkpoint import locate_base

    base = locate_base("demo")
    if not options.bf16:
        command = [sys.executable, "-c", FLOAT32, str(base), str(work / "base-float32")]
        subprocess.run(command, check=True, capture_output=True)  # noqa: S603
    file, passes = write_data(work / "data", steps=options.steps)
    return base, file, passes


def run(work: Path, options: argparse.Namespace) -> None:
    """All trainings in turn, then what comes of them."""
    base, file, passes = prepare(work, options)
    costs: dict[str, list[Cost]] = {}
    runs: dict[str, list[Path]] = {}
    for seed in range(options.seeds):
        for name, (command, directory) in contenders(work, base=base, seed=seed, options=options).items():
            log, output = directory / "trainer_log.jsonl", directory.with_suffix(".txt")
            cost = measure(command, log=log, output=output, threads=options.threads)
            costs.setdefault(name, []).append(cost)
            runs.setdefault(name, []).append(directory)
            print(f"seed {seed}, {name}: {cost}", file=sys.stderr, flush=True)
    ours, theirs = our_labels(file, base), their_labels(work / "theirs-0.yaml", options)
    tokens = passes * sum(sum(supervised) for _, supervised in ours)
    losses = held_out_losses(runs, base)
    print(f"{options.steps} steps of {BATCH} rows, {passes} × {len(ours)} rows, {tokens:,} supervised tokens; "
          f"{options.threads} threads; {'bf16: true' if options.bf16 else 'float32'}; {options.seeds} seeds, medians.  "
          f"Held-out loss of the base: {losses['base'][0]:.4f}.\n"
          f"Ours: {torch_of(options.tunesmith)}.  LLaMA-Factory's: {torch_of(options.llamafactory)}.\n")  # fmt: skip
    table(costs, losses, tokens=tokens, steps=options.steps)
    ratios(costs, losses)
    print("", *agreement(ours, theirs, base), sep="\n")


def main() -> None:
    """Read the command line, and run in a folder that is removed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llamafactory", required=True, metavar="CMD", help="its command")
    parser.add_argument("--tunesmith", default=f"{sys.executable} -m tunesmith", metavar="CMD", help="ours")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="a recipe of `bf16: true`")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave runs, recipes and outputs there")
    options = parser.parse_args()
    if options.keep:
        options.keep.mkdir(parents=True)
        run(options.keep.resolve(), options)
        return
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), options)


if __name__ == "__main__":
    main()
