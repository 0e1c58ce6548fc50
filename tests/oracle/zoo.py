"""The zoo: bases, adapters that PEFT itself wrote, live models and merges."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import tunesmith as ts
from tests.oracle.bases import build_base, rewrite
from tests.oracle.kinds import KINDS, Kind
from tunesmith.models.quiet import quiet_loading

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def load(directory: Path, auto: str, *, dtype: torch.dtype = torch.float32, **loading: Any) -> Any:
    """A model by plain Transformers."""
    with quiet_loading():
        return getattr(transformers, auto).from_pretrained(directory, dtype=dtype, **loading).eval()


def build_adapter(base: Path, directory: Path, kind: Kind, *, seed: int = 7) -> PeftModel:
    """Write an adapter, every trained number of it random, and hand back the live, unmerged model."""
    torch.manual_seed(seed)
    model = load(base, kind.auto, **kind.loading)
    if kind.prepare:
        kind.prepare(model)
    settings = {"r": 4, "lora_alpha": 6, **kind.lora}
    with quiet_loading():
        peft = get_peft_model(model, LoraConfig(**settings))
    randomize(peft, kind.dtype, grid=kind.grid)
    with quiet_loading():
        peft.save_pretrained(directory)
    rewrite(directory / WEIGHTS, kind.rename or str, dtype=kind.dtype)
    return peft.eval()


@torch.no_grad()
def randomize(peft: nn.Module, dtype: torch.dtype = torch.float32, *, grid: float | None = None) -> None:
    """Give every number that training would change a random one, exact in a dtype, on a grid where one is given."""
    for name, weight in peft.named_parameters():
        if not weight.requires_grad and "trainable_tokens" not in name:
            continue
        if "magnitude" in name:
            weight.mul_(1 + 0.3 * torch.rand_like(weight))
        elif "lora_" in name:
            weight.normal_(std=0.2)
        elif "trainable_tokens_delta" in name or weight.requires_grad:
            weight.add_(torch.randn_like(weight) * 0.2)
        weight.copy_(weight.to(dtype))
        if grid:
            weight.copy_((weight / grid).round() * grid)


class Zoo:
    """Bases, adapters, live models and merges, each made when first asked for.

    Args:
        root: an empty directory.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._live: dict[str, PeftModel] = {}
        self._merged: dict[str, tuple[Any, dict[str, Any]]] = {}
        self._base_logits: dict[str, torch.Tensor] = {}

    def base(self, kind: str, dtype: torch.dtype = torch.float32) -> Path:
        """A base; in bf16 it is cut into many shards, so that every kind meets them."""
        short = str(dtype).removeprefix("torch.")
        directory = self.root / f"base-{kind}-{short}"
        if not directory.exists():
            build_base(directory, kind, dtype=dtype, **({"max_shard_size": "20KB"} if short == "bfloat16" else {}))
        return directory

    def base_of(self, kind: str) -> Path:
        """The base of a kind of adapter, in float32."""
        return self.base(KINDS[kind].base)

    def adapter(self, kind: str) -> Path:
        """An adapter's directory."""
        self.live(kind)
        return self.root / f"adapter-{kind}"

    def live(self, kind: str) -> PeftModel:
        """The model that PEFT has in memory, unmerged, in float32."""
        if kind not in self._live:
            directory, base = self.root / f"adapter-{kind}", self.base(KINDS[kind].base)
            self._live[kind] = build_adapter(base, directory, KINDS[kind])
        return self._live[kind]

    def merged(self, kind: str, dtype: torch.dtype = torch.float32, *, rounding: str = "nearest") -> Path:
        """What Tunesmith makes of it."""
        short = str(dtype).removeprefix("torch.")
        out = self.root / f"merged-{kind}-{short}-{rounding}"
        if not out.exists():
            base = str(self.base(KINDS[kind].base, dtype))
            ts.merge(ts.plan_merge(self.adapter(kind), out, base=base, rounding=rounding))
        return out

    def load_merged(self, kind: str) -> tuple[Any, dict[str, Any]]:
        """The merged directory by plain Transformers, and what the loader missed or had too much."""
        if kind not in self._merged:
            cls = getattr(transformers, KINDS[kind].auto)
            with quiet_loading():
                model, info = cls.from_pretrained(self.merged(kind), dtype=torch.float32, output_loading_info=True)
            self._merged[kind] = (model.eval(), info)
        return self._merged[kind]

    def base_logits(self, kind: str) -> torch.Tensor:
        """What the base says in the tuned model's class; a head that it lacks is random."""
        made = KINDS[kind]
        key = f"{made.base} {made.auto} {made.loading}"
        if key not in self._base_logits:
            torch.manual_seed(0)
            self._base_logits[key] = logits_of(load(self.base_of(kind), made.auto, **made.loading))
        return self._base_logits[key]


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    """A model's logits of some random tokens, or of a random picture, as float64."""
    generator = torch.Generator().manual_seed(3)
    if getattr(model.config.get_text_config(), "pad_token_id", 0) is None:
        model.config.pad_token_id = 0  # a classifier looks for the last token that is none
    if model.main_input_name == "pixel_values":
        output = model(pixel_values=torch.randn(2, 3, 32, 32, generator=generator))
    else:
        ids = torch.randint(1, 40, (2, 12), generator=generator)
        more = {"decoder_input_ids": ids.flip(0)} if model.config.is_encoder_decoder else {}
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more)
    return (output.prediction_logits if "prediction_logits" in output else output.logits).double()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, by the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


def altered(
    adapter: Path,
    out: Path,
    *,
    tensors: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = dict,
    **config: Any,
) -> Path:
    """A copy of an adapter with other tensors, or other fields in its configuration."""
    out.mkdir(parents=True)
    changed = {name: tensor.contiguous() for name, tensor in tensors(load_file(adapter / WEIGHTS)).items()}
    save_file(changed, out / WEIGHTS, metadata={"format": "pt"})
    settings = {**json.loads((adapter / CONFIG).read_text()), **config}
    (out / CONFIG).write_text(json.dumps(settings))
    return out
