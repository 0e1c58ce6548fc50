"""Layers that no language model of the zoo has: convolutions of one and three dimensions, and fused attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

import tunesmith as ts
from tests.oracle import formula
from tests.oracle.zoo import randomize
from tunesmith.errors import TunesmithError
from tunesmith.models.quiet import quiet_loading

SHAPES = {"line": (2, 4, 9), "point": (2, 4, 9), "cube": (2, 4, 5, 5, 5), "groups": (2, 4, 9, 9)}


class Layers(nn.Module):
    """One layer of each kind, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(4, 6, 3, bias=False)
        self.point = nn.Conv1d(4, 6, 1)
        self.cube = nn.Conv3d(4, 6, (2, 1, 3), stride=2)
        self.groups = nn.Conv2d(4, 6, 3, groups=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, **inputs: Tensor) -> Tensor:
        """All outputs in one row."""
        results = [getattr(self, name)(value) for name, value in inputs.items() if name != "attention"]
        if "attention" in inputs:
            results.append(self.attention(*[inputs["attention"]] * 3)[0])
        return torch.cat([result.reshape(-1) for result in results])


def inputs_of(*names: str) -> dict[str, Tensor]:
    """Random inputs of the layers that are asked for."""
    generator = torch.Generator().manual_seed(2)
    shapes = {**SHAPES, "attention": (2, 5, 8)}
    return {name: torch.randn(shapes[name], generator=generator) for name in names}


def tune(root: Path, *targets: str, **settings: Any) -> tuple[Path, Path, PeftModel]:
    """A base directory, an adapter on some of its layers, and the live model."""
    torch.manual_seed(1)
    base, adapter = root / "base", root / "adapter"
    base.mkdir()
    model = Layers()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
    save_file(model.state_dict(), base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text(json.dumps({"model_type": "layers", "architectures": ["Layers"]}))
    with quiet_loading():
        live = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=list(targets), **settings))
        randomize(live)
        live.save_pretrained(adapter)
    return base, adapter, live.eval()


@pytest.mark.parametrize("dora", [False, True])
def test_convolutions_of_one_and_three_dimensions(tmp_path: Path, dora: bool) -> None:
    """A kernel's change is B·A over the kernel of A; with DoRA, every output channel has one norm."""
    names = ("line", "point", "cube")
    base, adapter, live = tune(tmp_path, *names, use_dora=dora)
    ts.merge(ts.plan_merge(adapter, tmp_path / "out", base=str(base)))
    merged = formula.read(tmp_path / "out")
    formula.assert_same(merged, formula.merge(formula.read(base), formula.read(adapter), formula.Truth()))
    plain = Layers()
    plain.load_state_dict(merged)
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs_of(*names)), live(**inputs_of(*names)), rtol=1e-5, atol=1e-5)


def test_convolution_in_groups_is_refused(tmp_path: Path) -> None:
    """A group sees its own inputs only, so B·A is no change of the stored kernel."""
    base, adapter, _ = tune(tmp_path, "groups", "line")
    with pytest.raises(TunesmithError, match="groups"):
        ts.plan_merge(adapter, tmp_path / "out", base=str(base))
    assert not (tmp_path / "out").exists()


def test_fused_attention_adds_the_output_projection_once_where_peft_adds_it_twice(tmp_path: Path) -> None:
    """``nn.MultiheadAttention``: in_proj by lora_A of the module, out_proj by its own; PEFT's merge doubles the latter.

    PEFT's unmerged model does too: it merges for every forward pass (#3774).
    """
    base, adapter, live = tune(tmp_path, "attention")
    ts.merge(ts.plan_merge(adapter, tmp_path / "out", base=str(base)))
    merged, before, tensors = formula.read(tmp_path / "out"), formula.read(base), formula.read(adapter)
    for name, module in {"in_proj_weight": "attention", "out_proj.weight": "attention.base_layer.out_proj"}.items():
        delta = 6 / 4 * formula.low_rank(*(tensors[f"base_model.model.{module}.lora_{f}.weight"] for f in "BA"))
        start = before.pop(f"attention.{name}").double()
        ours = merged.pop(f"attention.{name}")
        assert torch.equal(ours, formula.round_once(start + delta, torch.float32))
        if name == "out_proj.weight":
            theirs = live.merge_and_unload().attention.out_proj.weight
            torch.testing.assert_close(theirs.double() - start, 2 * delta, rtol=1e-4, atol=1e-5)
    formula.assert_same(merged, before)
