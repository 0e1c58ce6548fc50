"""What a proof costs and what it catches, beside two other ways to look at a merge.

    python benchmarks/verify_cost.py --work DIR [--size 1.5b] [--size 7b] [--rounds 3] [--deltalint DIR]
        [--without-transformers] [--without-numba] [--one-worker]
    python benchmarks/verify_cost.py --work DIR --run RUN [--base demo] [--deltalint DIR] [--only PATTERN]

The three ways:

- ``tunesmith verify`` on its first three levels, with the certificate that it writes;
- deltalint 0.1.0, ``deltalint check --base --adapter --merged``; DIR is where it is installed, as by
  ``pip install --no-deps --target DIR deltalint==0.1.0``;
- what scripts do: load both by Transformers, the base with the live adapter and the merged model, in float32, and
  compare logits and greedy texts of a few prompts.  One is loaded after the other, which is kind to its memory.

Without a run: whole processes in turn, on a base of random bf16 weights in the shapes of Qwen2.5 and an adapter of rank
16 on all linear layers (``benchmarks/synthetic.py``), beside the merges' own time in the same run.  Medians over the
rounds; memory is the peak resident set of the process.  The bars: at most 1.5 × the time of the merge that is proved,
at most 400 MB, the same for 7 B as for 1.5 B.

With a run: every mutant of ``sabotage_mutants.py`` is shown to all three, and some sound merges too.  The merges that
are spoilt are PEFT's own where PEFT merges the kind rightly, since deltalint holds a merge against PEFT's rounding.
The scripts' thresholds are those of ``torch.allclose`` as they are found in them, equal greedy texts, and the least one
that accuses none of the sound merges shown here, which nobody can know beforehand.  "?" is deltalint's own "could not
tell".
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}

import synthetic
from merge_cost import Cost, measure
from synthetic import SIZES

ROUNDINGS = ("nearest", "faithful")
THRESHOLDS = (1e-3, 1e-2, 1e-1)
MAX_TIMES, MAX_MB = 1.5, 400
_LEVELS = ("structure", "assets", "weights")
_DELTALINT = "deltalint 0.1.0"
_SCRIPT = "load both, compare"
_NEW_TOKENS = 24
_CANNOT_TELL = 3  # deltalint's exit code
_PLAIN = "import sys; sys.modules['numba'] = None; import runpy; runpy.run_module('tunesmith', run_name='__main__')"

# Random prompts, for a base of random weights that has no tokenizer.
LOAD_BOTH = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, adapter, merged = sys.argv[1:]
torch.manual_seed(0)
ids = torch.randint(10, 10000, (4, 24))
settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 24}
def answers(model):
    with torch.no_grad():
        return model(ids).logits, model.generate(ids, **settings)
live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
logits, texts = answers(live.eval())
del live
other, their_texts = answers(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval())
print(torch.allclose(logits, other, atol=1e-3), torch.equal(texts, their_texts))
"""


# What it costs.


def commands(work: Path, size: str, options: argparse.Namespace) -> dict[str, list[str]]:
    """The contenders in the order in which they run: a merge comes before what looks at it."""
    base, adapter = work / f"base-{size}", work / f"adapter-{size}"
    found = {}
    for rounding in ROUNDINGS:
        out = work / f"out-{size}-{rounding}"
        merge = ["merge", str(adapter), "--base", str(base), "--rounding", rounding, "--force", "--out", str(out)]
        verify = ["verify", str(adapter), str(out), "--base", str(base), "--quiet"]
        verify += [word for level in _LEVELS for word in ("--level", level)]
        for label, start in starts(options).items():
            found[f"merge, {rounding}{label}"] = [*start, *merge]
            found[f"verify, {rounding}{label}"] = [*start, *verify]
    of = [str(base), str(adapter), str(work / f"out-{size}-nearest")]
    if options.deltalint:
        found[_DELTALINT] = ["sh", "-c", f"{shlex.join(deltalint(*of))} || test $? = 1"]  # it holds to PEFT's rounding
    if not options.without_transformers:
        found[_SCRIPT] = [sys.executable, "-c", LOAD_BOTH, *of]
    return found


def starts(options: argparse.Namespace) -> dict[str, list[str]]:
    """The ways to start our own command line."""
    ours = [sys.executable, "-m", "tunesmith"]
    found = {"": ours}
    if options.without_numba:
        found[", no numba"] = [sys.executable, "-c", _PLAIN]
    if options.one_worker:
        found[", one core"] = ["taskset", "-c", "0", *ours]
    return found


def deltalint(base: str, adapter: str, merged: str) -> list[str]:
    """Its command line."""
    return [sys.executable, "-m", "deltalint.cli", "check", "--base", base, "--adapter", adapter, "--merged", merged]


def run_size(size: str, options: argparse.Namespace) -> None:
    """One size: all contenders, in turn, and the table."""
    # In a process of its own: what starts another counts, until that has its own program, as the other's memory.
    arguments = [size, options.work / f"base-{size}", options.work / f"adapter-{size}"]
    subprocess.run([sys.executable, synthetic.__file__, *arguments], check=True)  # noqa: S603
    contenders = commands(options.work, size, options)
    costs: dict[str, list[Cost]] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, command in contenders.items():
            costs[name].append(measure(command))
    for old in options.work.glob(f"out-{size}-*"):
        shutil.rmtree(old)
    print(f"\n{size}: {options.rounds} rounds, medians")
    print(f"{'':<30}{'wall s':>9}{'CPU s':>9}{'peak MB':>9}{'/ merge':>9}   bars        rounds")
    walls = {name: statistics.median(cost.wall_s for cost in rows) for name, rows in costs.items()}
    for name, rows in costs.items():
        cpu, peak = (statistics.median(getattr(cost, key) for cost in rows) for key in ("cpu_s", "peak_mb"))
        times = walls[name] / walls[name.replace("verify", "merge") if "verify" in name else "merge, nearest"]
        ours = name.startswith("verify")
        kept = ("kept" if times <= MAX_TIMES and peak <= MAX_MB else "NOT KEPT") if ours else "-"
        each = ", ".join(f"{cost.wall_s:.2f}" for cost in rows)
        print(f"{name:<30}{walls[name]:>9.2f}{cpu:>9.2f}{peak:>9.0f}{times:>9.2f}   {kept:<12}{each}")


# What it catches.


@dataclass(frozen=True)
class Sight:
    """What the three ways say of one merge.

    Attributes:
        name: the merge.
        spoilt: whether it is wrong.
        ours: our answer.
        deltalint: its exit code; None where it was not asked.
        apart: the largest difference of the logits; None where they cannot be compared at all.
        same_text: whether the greedy texts are the same.
    """

    name: str
    spoilt: bool
    ours: str
    deltalint: int | None
    apart: float | None
    same_text: bool

    def alarms(self, least: float) -> dict[str, bool | None]:
        """Which way calls it wrong; None where it says that it cannot tell.

        Args:
            least: the least threshold that accuses no sound merge.
        """
        found: dict[str, bool | None] = {"tunesmith verify": self.ours == "different"}
        if self.deltalint is not None:
            found[_DELTALINT] = None if self.deltalint == _CANNOT_TELL else self.deltalint != 0
        for threshold in (*THRESHOLDS, least):
            found[f"logits, atol {threshold:.2g}"] = self.apart is None or not self.apart <= threshold
        return found | {"greedy texts": not self.same_text}


_shop: Any
_deltalint: Path | None


def _start(shop: Any, place: Path | None) -> None:
    """What every worker process begins with."""
    import torch

    global _shop, _deltalint
    _shop, _deltalint = shop, place
    torch.set_num_threads(1)


def _prepare(kind: str) -> None:
    from sabotage_mutants import MUTANTS

    _shop.prepare(kind, merged=any(mutant.kind == kind for mutant in MUTANTS))


def _look_at_mutant(number: int) -> Sight:
    from sabotage_mutants import MUTANTS

    mutant = MUTANTS[number]
    with _shop.draft(mutant.kind) as draft:
        mutant.spoil(draft)
        return _look(mutant.name, draft.claim, mutant.kind, spoilt=True)


def _look_at_sound(number: int) -> Sight:
    from sabotage_sound import SOUND

    made = SOUND[number]
    with tempfile.TemporaryDirectory(dir=_shop.root) as root:
        return _look(made.name, made.make(_shop, Path(root)), made.kind, spoilt=False)


def _look(name: str, claim: Any, kind: str, *, spoilt: bool) -> Sight:
    code = None
    if _deltalint is not None:
        command = deltalint(str(_shop.base_dir), str(claim.run), str(claim.merged))
        environment = {**os.environ, "PYTHONPATH": str(_deltalint), "OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, env=environment, capture_output=True, check=False).returncode  # noqa: S603
    apart, same_text = _compare(_live(kind), claim.merged)
    sight = Sight(name, spoilt, _shop.judge(claim).answer, code, apart, same_text)
    print(f"{sight}", file=sys.stderr, flush=True)
    return sight


@lru_cache(maxsize=4)
def _live(kind: str) -> tuple[list[Any], list[str]]:
    """Logits and greedy texts of the base with the live adapter."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tunesmith.models.quiet import quiet_loading

    adapter = _shop.adapter(kind)
    with quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(_shop.base_dir, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(adapter)
        if len(tokenizer) > model.config.vocab_size:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        return _answers(PeftModel.from_pretrained(model, adapter).eval(), tokenizer)


def _answers(model: Any, tokenizer: Any) -> tuple[list[Any], list[str]]:
    import torch

    from tunesmith.conversations import built_in_prompts

    logits, texts = [], []
    for prompt in built_in_prompts()[:4]:
        turns = [message.model_dump(include={"role", "content"}) for message in prompt.prompt]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            logits.append(model(**ids).logits)
            tokens = model.generate(**ids, do_sample=False, max_new_tokens=_NEW_TOKENS)
        texts.append(tokenizer.decode(tokens[0, ids["input_ids"].shape[1] :]))
    return logits, texts


def _compare(live: tuple[list[Any], list[str]], merged: Path) -> tuple[float | None, bool]:
    """The merged model alone against it; what cannot be loaded or has another form is apart."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tunesmith.models.quiet import quiet_loading

    try:
        with quiet_loading():
            model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
            logits, texts = _answers(model, AutoTokenizer.from_pretrained(merged))
        pairs = list(zip(live[0], logits, strict=True))
        apart = max(float((one - other).abs().max()) for one, other in pairs)
        return (float("nan") if any(bool(other.isnan().any()) for _, other in pairs) else apart), texts == live[1]
    except Exception:  # noqa: BLE001 - whatever a loader or a template says, a script ends here, and that is a catch
        return None, False


def run_catch(options: argparse.Namespace) -> None:
    """Show every mutant and some sound merges to all three, and print who caught what."""
    from sabotage_mutants import MUTANTS
    from sabotage_shop import PEFT, RUN, Shop
    from sabotage_sound import SOUND

    sound = [number for number, made in enumerate(SOUND) if _is_shown(made.name)]
    chosen = [number for number, mutant in enumerate(MUTANTS) if re.search(options.only, mutant.name)]
    kinds = {RUN, *(MUTANTS[number].kind for number in chosen), *(SOUND[number].kind for number in sound)}
    with tempfile.TemporaryDirectory(dir=options.work) as root:
        shop = Shop.open(options.run, options.base, Path(root), rounding=PEFT)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(2, mp_context=context, initializer=_start, initargs=(shop, options.deltalint)) as pool:
            list(pool.map(_prepare, sorted(kinds)))
            spoilt = list(pool.map(_look_at_mutant, chosen))
            good = list(pool.map(_look_at_sound, sound))
    _print_sights([*spoilt, *good])


def _is_shown(name: str) -> bool:
    """Whether a sound merge is one that all three may be asked about: of the run or a kind of its base, in one go."""
    ours = ("Tunesmith, nearest", "Tunesmith, faithful", "Tunesmith, into fp16", "Tunesmith, embedding, nearest")
    return name in ours or (
        name.startswith("PEFT, ") and name.endswith(("bf16", "fp16", "fp32", "safe_merge")) and "base" not in name
    )


def _print_sights(sights: Sequence[Sight]) -> None:
    least = max((sight.apart or 0.0 for sight in sights if not sight.spoilt), default=0.0)
    alarms = [sight.alarms(least) for sight in sights]
    ways = list(alarms[0])
    print(f"\n| merge | {' | '.join(ways)} | max \\|Δ logit\\| |\n| --- | {'--- | ' * (len(ways) + 1)}")
    marks = {(True, True): "caught", (True, False): "**missed**", (False, True): "**false**", (False, False): "-"}
    for sight, said in zip(sights, alarms, strict=True):
        shown = " | ".join("?" if alarm is None else marks[sight.spoilt, alarm] for alarm in said.values())
        print(f"| {sight.name} | {shown} | {'-' if sight.apart is None else f'{sight.apart:.2g}'} |")
    for spoilt, title in ((True, "caught"), (False, "false alarms")):
        asked = [said for sight, said in zip(sights, alarms, strict=True) if sight.spoilt is spoilt]
        counts = [f"{sum(said[way] is True for said in asked)} of {len(asked)}" for way in ways]
        print(f"| **{title}** | {' | '.join(counts)} | |")


def main() -> None:
    """Print a table for every size, or for a run what each way catches."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a directory with four times the model's size free")
    parser.add_argument("--size", action="append", choices=SIZES, help="1.5b by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--deltalint", type=Path, metavar="DIR", help="where deltalint is installed")
    parser.add_argument("--without-transformers", action="store_true")
    parser.add_argument("--without-numba", action="store_true", help="ours without the extra 'fast' too")
    parser.add_argument("--one-worker", action="store_true", help="ours on one core too")
    parser.add_argument("--run", type=Path, help="a run to spoil merges of, in place of the sizes")
    parser.add_argument("--base", default="demo", help="its base model")
    parser.add_argument("--only", default="", metavar="PATTERN", help="mutants whose names match this")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.deltalint:
        os.environ["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(options.deltalint.resolve()), os.environ.get("PYTHONPATH")])
        )
        options.deltalint = options.deltalint.resolve()
    if options.run:
        run_catch(options)
        return
    for size in options.size or ["1.5b"]:
        run_size(size, options)


if __name__ == "__main__":
    main()
