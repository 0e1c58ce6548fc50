"""What cancelled generations leave behind: threads, hooks, tensors and memory, of the model of the demo.

    python benchmarks/leaks.py [COUNT]

Every generation is of the base and its adapters beside each other, and is cancelled after a few tokens, as by Ctrl-C.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import threading
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import psutil
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tunesmith.checkpoint import locate_base
from tunesmith.models import GenerationSettings, Request, VariantSet, generate
from tunesmith.models.quiet import quiet_loading
from tunesmith.progress import Cancellation, Progress

TOKENS = 12  # of all rows together, before somebody has had enough


def build(base: Path, folder: Path) -> VariantSet:
    """The base and three random adapters."""
    paths = {f"checkpoint-{seed}": folder / str(seed) for seed in range(3)}
    for seed, path in enumerate(paths.values()):
        torch.manual_seed(seed)
        with quiet_loading():
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            peft = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
            peft.save_pretrained(path)
    return VariantSet.load(base, adapters=paths, tokenizer_dir=base)


def left(variants: VariantSet) -> dict[str, float]:
    """What there is now."""
    gc.collect()
    with variants.active("base") as (model, _):
        modules = list(model.modules())
    return {
        "threads": threading.active_count(),
        "hooks": sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules),
        "replaced forwards": sum("forward" in module.__dict__ for module in modules),
        "tensors": sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects()),
        "memory, MiB": psutil.Process().memory_info().rss / 2**20,
    }


def cancelled(variants: VariantSet) -> None:
    """One generation that somebody stops."""
    cancellation = Cancellation()

    def progress(step: Progress) -> None:
        if step.detail.endswith("tokens") and int(step.detail.split()[-2]) >= TOKENS:
            cancellation.cancel()

    requests = [Request(name, "Once upon a time") for name in variants.names]
    found = generate(
        variants, requests, GenerationSettings(max_new_tokens=200), progress=progress, cancellation=cancellation
    )
    if "cancelled" not in {item.stop_reason for item in found}:
        raise SystemExit("nothing was cancelled, so nothing was measured")


def main() -> None:
    """Print what is left after some, and after all of them."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory() as folder:
        variants = build(locate_base("demo"), Path(folder))
        print(f"{'cancelled':>10}", *(f"{name:>18}" for name in left(variants)))
        for done in range(count + 1):
            if done in (1, 10) or (done and done % 50 == 0):  # the first one builds what stays
                print(f"{done:>10}", *(f"{number:>18.0f}" for number in left(variants).values()), flush=True)
            if done < count:
                cancelled(variants)


if __name__ == "__main__":
    main()
