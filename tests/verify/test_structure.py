"""Level 1: the directory as a loader sees it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import TinyRun, build_base
from tunesmith.checkpoint import Checkpoint
from tunesmith.record import Finding
from tunesmith.verify.structure import check_structure

WEIGHTS = "model.safetensors"
QUERY = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def merged(tiny: TinyRun, tmp_path: Path) -> Path:
    """A copy of the tiny merged model."""
    return shutil.copytree(tiny.merged, tmp_path / "merged")


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Change the tensors of the one weights file."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def seen(folder: Path, base: Path) -> dict[str, Finding]:
    """The findings by code."""
    return {finding.code: finding for finding in check_structure(folder, Checkpoint(base))[1]}


def test_a_whole_model_is_said_to_be_whole(tiny: TinyRun, merged: Path) -> None:
    """With its counts."""
    findings = seen(merged, tiny.base)
    assert list(findings) == ["structure_ok"]
    assert dict(findings["structure_ok"].params) == {"tensors": 20, "shards": 1}


def test_all_missing_and_all_extra_tensors_are_counted_and_some_named(tiny: TinyRun, merged: Path) -> None:
    """Both lists at once."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if "layers.1." in name]:
            tensors[name.replace("layers.1.", "layers.2.")] = tensors.pop(name)

    rewrite(merged, change)
    findings = seen(merged, tiny.base)
    assert findings["tensors_missing"].params["count"] == findings["tensors_extra"].params["count"] == 9
    assert "layers.1." in str(findings["tensors_missing"].params["names"])
    assert str(findings["tensors_extra"].params["names"]).endswith("…")
    assert "structure_ok" not in findings


def test_a_misshapen_tensor_is_named_with_both_shapes(tiny: TinyRun, merged: Path) -> None:
    """What it has and what it should have."""
    rewrite(merged, lambda tensors: tensors.update({QUERY: tensors[QUERY].reshape(32, 128)}))
    assert dict(seen(merged, tiny.base)["shape_differs"].params) == {
        "name": QUERY,
        "expected": "[64, 64]",
        "found": "[32, 128]",
    }


def test_another_float_dtype_is_a_warning_and_an_integer_one_an_error(tiny: TinyRun, merged: Path) -> None:
    """bf16 in place of fp32 can be compared; a quantized tensor cannot."""
    rewrite(merged, lambda tensors: tensors.update({QUERY: tensors[QUERY].bfloat16()}))
    finding = seen(merged, tiny.base)["dtype_differs"]
    assert (finding.severity, dict(finding.params)) == ("warning", {"expected": "F32", "found": "BF16"})
    rewrite(merged, lambda tensors: tensors.update({QUERY: tensors[QUERY].to(torch.int8)}))
    finding = seen(merged, tiny.base)["dtype_unknown"]
    assert (finding.severity, finding.params["found"]) == ("error", "I8")


def test_a_head_that_is_a_copy_of_the_embedding_is_only_mentioned(tiny: TinyRun, merged: Path) -> None:
    """Tied or written out, it computes the same."""
    rewrite(merged, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING].clone()}))
    findings = seen(merged, tiny.base)
    assert findings["tied_head_written_out"].severity == "info"
    assert "tensors_extra" not in findings


def test_a_head_that_is_no_copy_is_an_extra_tensor(tiny: TinyRun, merged: Path) -> None:
    """One bit apart is apart."""

    def change(tensors: Tensors) -> None:
        head = tensors[EMBEDDING].clone()
        head[-1, -1] = torch.nextafter(head[-1, -1], torch.tensor(9.0))
        tensors["lm_head.weight"] = head

    rewrite(merged, change)
    assert seen(merged, tiny.base)["tensors_extra"].params["names"] == "lm_head.weight"


def test_a_missing_head_of_an_untied_base_is_missing(tmp_path: Path) -> None:
    """The same file without it is no longer the model."""
    build_base(tmp_path / "base", tie_word_embeddings=False)
    merged = shutil.copytree(tmp_path / "base", tmp_path / "merged")
    rewrite(merged, lambda tensors: tensors.pop("lm_head.weight"))
    assert seen(merged, tmp_path / "base")["tensors_missing"].params["names"] == "lm_head.weight"


def test_stray_weight_files_are_named(tiny: TinyRun, merged: Path) -> None:
    """A loader may pick them up."""
    shutil.copy(merged / WEIGHTS, merged / "model-00001-of-00002.safetensors")
    finding = seen(merged, tiny.base)["stray_weights"]
    assert (finding.severity, finding.params["names"]) == ("warning", "model-00001-of-00002.safetensors")


@pytest.mark.parametrize("wrong", ["lacks a tensor", "names a missing file", "has no map"])
def test_an_index_that_does_not_fit_its_files_breaks_the_model(wrong: str, tiny: TinyRun, merged: Path) -> None:
    """The directory cannot be opened, and the reason is given in one line."""
    shard = "model-00001-of-00001.safetensors"
    (merged / WEIGHTS).rename(merged / shard)
    names = dict.fromkeys(load_file(merged / shard), shard)
    if wrong == "lacks a tensor":
        names.pop(QUERY)
    elif wrong == "names a missing file":
        names[QUERY] = "model-00002-of-00002.safetensors"
    document = {} if wrong == "has no map" else {"weight_map": names}
    (merged / "model.safetensors.index.json").write_text(json.dumps(document))
    opened, findings = check_structure(merged, Checkpoint(tiny.base))
    assert opened is None
    assert [(finding.code, finding.severity) for finding in findings] == [("structure_broken", "error")]
    assert "\n" not in str(findings[0].params["what"])
