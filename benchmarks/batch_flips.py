"""How often arithmetic alone changes a greedy reply: alone in its batch against beside others, in bfloat16 and float32.

    python benchmarks/batch_flips.py RUN [--base BASE] [--prompts 24] [--new-tokens 96]

Base and final adapter answer held-out rows and general instructions, once one row at a time and once all together,
padded.  Where the two texts part, the first tokens that differ are counted, and how many tokens were the same before:
one parting every so many tokens.  The last line holds bfloat16 against float32, both alone.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import tunesmith as ts
from tunesmith.api.engines import load_variants
from tunesmith.compare import built_in_set
from tunesmith.models import Generation, Request, generate
from tunesmith.runs import held_out_rows

NAMES = ("base", "final")


def partings(one: Sequence[Generation], other: Sequence[Generation]) -> tuple[int, int]:
    """How many replies part, and the tokens that were the same until they did or ended."""
    parted = same = 0
    for left, right in zip(one, other, strict=True):
        pairs = zip(left.token_ids, right.token_ids, strict=False)
        common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(left.tokens, right.tokens))
        parted += left.token_ids != right.token_ids
        same += common
    return parted, same


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--base")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=96)
    arguments = parser.parse_args()
    run = ts.open_run(arguments.run)
    half = arguments.prompts // 2
    prompts = [*held_out_rows(run)[:half], *(built_in_set("general-en") or ())[: arguments.prompts - half]]
    requests = [Request(name, row.prompt) for row in prompts for name in NAMES]
    settings = ts.GenerationSettings(greedy=True, max_new_tokens=arguments.new_tokens)
    alone, print_row = {}, "| {} | {} of {} | {} |".format
    print("| | replies that part | tokens to a parting |\n| --- | ---: | ---: |")
    for dtype in ("fp32", "bf16"):
        variants, _ = load_variants(run, NAMES, base=arguments.base, dtype=dtype)
        alone[dtype] = generate(variants, requests, settings, rows_at_once=1)
        together = generate(variants, requests, settings)
        parted, same = partings(alone[dtype], together)
        print(
            print_row(f"{dtype}: alone, and {len(requests)} rows together", parted, len(requests), rate(parted, same))
        )
    parted, same = partings(alone["fp32"], alone["bf16"])
    print(print_row("fp32 and bf16, both alone", parted, len(requests), rate(parted, same)))


def rate(parted: int, same: int) -> str:
    """One parting every so many tokens."""
    return f"{same / parted:.0f}" if parted else f"none in {same}"


if __name__ == "__main__":
    main()
