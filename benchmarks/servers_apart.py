"""How far one model's likelihoods are apart on two machines, and how far two models' are: what tells servers apart.

    python benchmarks/servers_apart.py RUN [--base BASE]

A fleet of servers is asked for the likelihood of one row (:mod:`tunesmith.models.endpoint.alike`).  Here the base and
every checkpoint of a run score that row in float32, bfloat16 and float16: the same model in two number formats is the
most that two servers of it may be apart, and checkpoints that follow each other are the least that two models are.
The limits must lie between.
"""

from __future__ import annotations

import argparse
import os
from itertools import combinations, pairwise

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import tunesmith as ts
from tunesmith.api.engines import load_variants
from tunesmith.conversations import Conversation, Message
from tunesmith.models import score
from tunesmith.models.endpoint.alike import _ANOTHER, _NOISE, _apart
from tunesmith.models.endpoint.probe import _SCORED, Said

DTYPES = ("fp32", "bf16", "fp16")


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--base")
    arguments = parser.parse_args()
    run = ts.open_run(arguments.run)
    names = ["base", *(checkpoint.name for checkpoint in run.checkpoints)]
    turns = (Message(role="user", content=_SCORED), Message(role="assistant", content=_SCORED))  # as the probe's row
    row = Conversation(id="probe", messages=turns)
    said: dict[tuple[str, str], Said] = {}
    for dtype in DTYPES:
        variants, _ = load_variants(run, names, base=arguments.base, dtype=dtype)
        for name, (told,) in score(variants, names, [row]).items():
            said[name, dtype] = Said(text=None, prompt_tokens=None, log_probs=told.log_probs)
    print("| | | nats a token |\n| --- | --- | ---: |")
    formats = list(combinations(DTYPES, 2))
    same = [(name, f"{a} and {b}", _apart(said[name, a], said[name, b])) for name in names for a, b in formats]
    # The final adapter mostly is the last checkpoint once more.
    models = [one for one, next_ in pairwise(names) if _apart(said[one, "fp32"], said[next_, "fp32"])] + names[-1:]
    others = [(f"{a} and {b}", d, _apart(said[a, d], said[b, d])) for a, b in pairwise(models) for d in DTYPES]
    for who, what, nats in (*same, *others):
        print(f"| {who} | {what} | {nats:.3g} |")
    most, least = (pick(nats or 0.0 for *_, nats in rows) for pick, rows in ((max, same), (min, others)))
    print(f"\none model: at most {most:.3g}; two models: at least {least:.3g}")
    print(f"the limits: a warning beyond {_NOISE:g}, an error beyond {_ANOTHER:g}")


if __name__ == "__main__":
    main()
