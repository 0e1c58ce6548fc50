"""Experts in stacks, seen as the base has them one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tunesmith.checkpoint import Checkpoint
from tunesmith.record import Finding
from tunesmith.verify.structure.check import check_structure

EXPERTS, INNER, OUTER = 3, 5, 8
PARENT = "model.layers.{}.mlp.experts"
Tensors = dict[str, torch.Tensor]
Layout = Callable[[Tensors], Tensors]


def matrix(*shape: int, seed: int) -> torch.Tensor:
    """Numbers that are nowhere twice."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def apart(names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"), *, inner: int = INNER) -> Tensors:
    """Two layers of experts, each matrix a tensor of its own, with a norm and an embedding."""
    tensors = {"model.norm.weight": matrix(OUTER, seed=1), "model.embed_tokens.weight": matrix(9, OUTER, seed=2)}
    for layer in range(2):
        for expert in range(EXPERTS):
            for number, name in enumerate(names):
                shape = (OUTER, inner) if number == 2 else (inner, OUTER)
                seed = 100 + 10 * (layer * EXPERTS + expert) + number
                tensors[f"{PARENT.format(layer)}.{expert}.{name}.weight"] = matrix(*shape, seed=seed)
    return tensors


def stacked(stacks: dict[str, tuple[str, ...]], *, turned: bool = False) -> Layout:
    """The experts of every layer in one tensor a kind, gate above up where they share one."""

    def layout(tensors: Tensors) -> Tensors:
        fused = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
        for layer in range(2):
            parent = PARENT.format(layer)
            for stack, parts in stacks.items():
                blocks = [
                    torch.cat([tensors[f"{parent}.{expert}.{part}.weight"] for part in parts])
                    for expert in range(EXPERTS)
                ]
                whole = torch.stack(blocks)
                fused[stack.format(parent)] = (whole.mT if turned else whole).contiguous()
        return fused

    return layout


PLAIN = ("gate_proj", "up_proj", "down_proj")
MIXTRAL = ("w1", "w3", "w2")
LAYOUTS: dict[str, tuple[tuple[str, str, str], Layout]] = {
    "transformers": (PLAIN, stacked({"{}.gate_up_proj": PLAIN[:2], "{}.down_proj": PLAIN[2:]})),
    "with-weight": (PLAIN, stacked({"{}.gate_up_proj.weight": PLAIN[:2], "{}.down_proj.weight": PLAIN[2:]})),
    "mixtral-fused": (MIXTRAL, stacked({"{}.gate_up_proj": MIXTRAL[:2], "{}.down_proj": MIXTRAL[2:]})),
    "vllm": (MIXTRAL, stacked({"{}.w13_weight": MIXTRAL[:2], "{}.w2_weight": MIXTRAL[2:]})),
    "apart-by-kind": (PLAIN, stacked({f"{{}}.{name}.weight": (name,) for name in PLAIN})),
}


def mlx(names: tuple[str, str, str]) -> Layout:
    """``switch_mlp`` in the place of ``experts``; gate, up and down in stacks of their own."""

    def layout(tensors: Tensors) -> Tensors:
        stacks = {f"{{}}.{kind}.weight": (name,) for kind, name in zip(PLAIN, names, strict=True)}
        fused = stacked(stacks)(tensors)
        return {name.replace(".experts.", ".switch_mlp."): tensor for name, tensor in fused.items()}

    return layout


LAYOUTS |= {"mlx": (PLAIN, mlx(PLAIN)), "mlx-mixtral": (MIXTRAL, mlx(MIXTRAL))}


def write(folder: Path, tensors: Tensors) -> Path:
    """A model directory."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral", "tie_word_embeddings": True}))
    return folder


def look(tmp_path: Path, base: Tensors, merged: Tensors) -> tuple[Checkpoint, dict[str, Finding]]:
    """The merged model as it is seen, and the findings by code."""
    opened, findings = check_structure(write(tmp_path / "out", merged), Checkpoint(write(tmp_path / "base", base)))
    assert opened is not None
    return opened, {finding.code: finding for finding in findings}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_matrix_of_a_stack_is_seen_under_the_bases_name(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Byte for byte, and read row by row as well."""
    names, layout = LAYOUTS[kind]
    base = {name: tensor.to(dtype) for name, tensor in apart(names).items()}
    opened, findings = look(tmp_path, base, layout(base))
    assert set(findings) == {"structure_ok", "experts_fused"}
    assert set(opened.tensors) == set(base)
    for name, tensor in base.items():
        expected = tensor.view(torch.int16 if dtype == torch.bfloat16 else torch.int32).numpy()
        assert opened.info(name).shape == tuple(tensor.shape)
        assert opened.read(name).tobytes() == expected.tobytes()
        assert opened.read(name, 1, 3).tobytes() == expected[1:3].tobytes()


def test_another_prefix_before_the_layers_is_the_same_layer(tmp_path: Path) -> None:
    """As a tower within a larger model has it."""
    base = apart()
    fused = LAYOUTS["transformers"][1](base)
    renamed = {name.replace("model.", "transformer."): tensor for name, tensor in fused.items()}
    opened, findings = look(tmp_path, base, renamed)
    assert {"structure_ok", "experts_fused", "tensors_renamed"} == set(findings)
    assert set(opened.tensors) == set(base)


@pytest.mark.parametrize(("old", "new"), [("_proj", "_proj.weight"), (".experts.", ".switch_mlp.")])
def test_a_stack_of_the_base_may_go_by_another_name(old: str, new: str, tmp_path: Path) -> None:
    """The same leaf, in the same layer and of the same shape."""
    fused = LAYOUTS["transformers"][1](apart())
    renamed = {name.replace(old, new): tensor for name, tensor in fused.items()}
    opened, findings = look(tmp_path, fused, renamed)
    assert set(findings) == {"structure_ok", "tensors_renamed"}
    assert {name: opened.read(name).tobytes() for name in opened.tensors} == {
        name: tensor.numpy().tobytes() for name, tensor in fused.items()
    }


def test_a_transposed_stack_is_an_error_that_names_it(tmp_path: Path) -> None:
    """No range of its bytes is a matrix of the base; nothing else is said to be missing or too many."""
    base = apart()
    layout = stacked({"{}.gate_up_proj": PLAIN[:2], "{}.down_proj": PLAIN[2:]}, turned=True)
    opened, findings = look(tmp_path, base, layout(base))
    assert set(findings) == {"experts_transposed"}
    assert findings["experts_transposed"].severity == "error"
    name = f"{PARENT.format(0)}.down_proj"
    assert dict(findings["experts_transposed"].params) == {"name": name, "found": "[3, 5, 8]", "rows": 8}
    assert "model.norm.weight" in opened.tensors


@pytest.mark.parametrize(("way", "leaf"), [("one-by-one", "down_proj"), ("gate-and-up-apart", "gate_up_proj")])
def test_a_stack_of_the_base_that_lies_in_pieces_is_an_error_that_names_it(way: str, leaf: str, tmp_path: Path) -> None:
    """It would have to be put together of several tensors; a stack that is whole is compared all the same."""
    pieces = apart()
    fused = LAYOUTS["transformers"][1](pieces)
    merged = pieces if way == "one-by-one" else mlx(PLAIN)(pieces)
    opened, findings = look(tmp_path, fused, merged)
    assert {code for code, finding in findings.items() if finding.severity == "error"} == {"experts_apart"}
    assert findings["experts_apart"].params["name"] == f"{PARENT.format(0)}.{leaf}"
    assert (f"{PARENT.format(0)}.down_proj" in opened.tensors) == (way != "one-by-one")


def test_a_stack_of_other_numbers_of_experts_is_no_layout_of_the_bases(tmp_path: Path) -> None:
    """Then tensors are missing and others too many."""
    base = apart()
    fused = LAYOUTS["transformers"][1](base)
    fused = {name: tensor[:2].clone() if ".experts." in name else tensor for name, tensor in fused.items()}
    _, findings = look(tmp_path, base, fused)
    assert set(findings) == {"tensors_missing", "tensors_extra"}


def test_experts_of_several_widths_are_no_stack(tmp_path: Path) -> None:
    """Their blocks would not lie one behind the other."""
    base, wide = apart(), apart(inner=INNER + 2)
    fused = LAYOUTS["transformers"][1](base)
    uneven = {name: wide[name] if ".experts.2." in name else tensor for name, tensor in base.items()}
    _, findings = look(tmp_path, uneven, fused)
    assert set(findings) == {"tensors_missing", "tensors_extra"}


def test_a_layer_that_lacks_one_expert_is_incomplete(tmp_path: Path) -> None:
    """A stack does not stand for what is there besides."""
    base = apart()
    fused = LAYOUTS["transformers"][1](base)
    lacking = {name: tensor for name, tensor in fused.items() if name != f"{PARENT.format(1)}.down_proj"}
    _, findings = look(tmp_path, base, lacking)
    assert findings["tensors_missing"].params["count"] == EXPERTS
