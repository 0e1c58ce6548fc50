"""Quantize a model with llmcompressor; run by ``quantize_drift.py`` in llmcompressor's own environment.

    python benchmarks/quantize_peer.py MODEL OUT rtn|gptq int8|w8a8|int4:GROUP [ROWS.jsonl]

ROWS are token ids, ``{"ids": […]}`` a line, for GPTQ.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def modifier(method: str, scheme: str) -> Any:
    """The recipe of a scheme, all linear layers but the head, symmetric."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    name, _, group = scheme.partition(":")
    bits = 4 if name == "int4" else 8
    strategy: dict[str, Any] = {"strategy": "group", "group_size": int(group)} if group else {"strategy": "channel"}
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, **strategy)
    inputs = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    groups = {
        "all": QuantizationScheme(
            targets=["Linear"], weights=weights, input_activations=inputs if name == "w8a8" else None
        )
    }
    kind = GPTQModifier if method == "gptq" else QuantizationModifier
    return kind(config_groups=groups, ignore=["lm_head"])


def main() -> None:
    """Read the command line."""
    model_dir, out, method, scheme, *rows = sys.argv[1:]
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    asked: dict[str, Any] = {"model": model, "recipe": modifier(method, scheme)}
    if rows:
        ids = [json.loads(line)["ids"] for line in Path(rows[0]).read_text(encoding="utf-8").splitlines()]
        asked["dataset"] = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids])
        asked |= {"num_calibration_samples": len(ids), "max_seq_length": max(map(len, ids))}
    oneshot(**asked)
    model.save_pretrained(out, save_compressed=True)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(out)


if __name__ == "__main__":
    main()
