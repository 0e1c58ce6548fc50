"""Bases of every dtype, in one file and in shards, with an adapter that has every kind of scaling."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.merge.exact import TORCH
from tests.tiny_models import build_adapter, build_base

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {r"layers\.1\..*\.q_proj": 3},
    },
    "rslora": {"r": 3, "lora_alpha": 7, "use_rslora": True},
}


@dataclass(frozen=True)
class Bench:
    """Base directories by (dtype, layout), and run directories by adapter."""

    bases: dict[tuple[str, str], Path]
    runs: dict[str, Path]


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """One model in six forms, three runs."""
    root = tmp_path_factory.mktemp("bench")
    model = build_base(root / "float32", rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    bases = {}
    for dtype, kind in TORCH.items():
        for layout, size in (("single", "1GB"), ("sharded", "150KB")):
            directory = root / f"{dtype}-{layout}"
            copy = LlamaForCausalLM.from_pretrained(root / "float32", dtype=kind)
            copy.save_pretrained(directory, max_shard_size=size)
            for file in (root / "float32").glob("*token*"):
                (directory / file.name).write_bytes(file.read_bytes())
            (directory / "chat_template.jinja").write_text("the base's own template")
            bases[dtype, layout] = directory
    runs = {}
    for name, config in ADAPTERS.items():
        runs[name] = build_adapter(root / "float32", root / "runs" / name / "run", seed=11, **config)
        for file in [*(root / "float32").glob("*token*"), root / "float32" / "chat_template.jinja"]:
            (runs[name] / file.name).write_bytes(file.read_bytes())
    assert not torch.isnan(next(model.parameters())).any()
    return Bench(bases, runs)
