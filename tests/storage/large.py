"""A model of some hundred megabytes without a framework, and a merge of it in a process whose memory is looked at."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HIDDEN = 1024


def write_large(folder: Path, *, megabytes: int) -> tuple[Path, Path]:
    """Write a base of F16 matrices in four shards, and an adapter on all of them."""
    base, adapter = folder / "large", folder / "large-adapter"
    base.mkdir()
    adapter.mkdir()
    rng = np.random.default_rng(0)
    layers = megabytes * 10**6 // (2 * 4 * HIDDEN * HIDDEN)
    names = [f"model.layers.{n}.self_attn.{kind}_proj" for n in range(layers) for kind in "qkvo"]
    weight_map = {}
    for shard in range(4):
        file = f"model-{shard + 1:05d}-of-00004.safetensors"
        mine = [name for number, name in enumerate(names) if number * 4 // len(names) == shard]
        tensors = {
            f"{name}.weight": rng.standard_normal((HIDDEN, HIDDEN), np.float32).astype(np.float16) for name in mine
        }
        save_file(tensors, base / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers}
    (base / "config.json").write_text(json.dumps({**config, "hidden_size": HIDDEN, "num_attention_heads": 8}))
    factors = {}
    for name in names:
        factors[f"base_model.model.{name}.lora_A.weight"] = rng.standard_normal((8, HIDDEN), np.float32) * 0.01
        factors[f"base_model.model.{name}.lora_B.weight"] = rng.standard_normal((HIDDEN, 8), np.float32) * 0.01
    save_file(factors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16}
    targets = {"target_modules": [f"{kind}_proj" for kind in "qkvo"], "base_model_name_or_path": "large"}
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, **targets}))
    return base, adapter


def _peak() -> int:
    """Of this program alone: what ``getrusage`` says begins with the parent's."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    import tunesmith as ts

    plan = ts.plan_merge(sys.argv[1], sys.argv[3], base=sys.argv[2])
    before = _peak()
    ts.merge(plan, certificate=False)
    sys.stdout.write(f"{plan.read_bytes} {before} {_peak()}\n")
