"""Level 1: the directory as a loader sees it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import TinyRun, build_base
from tunesmith.adapter import Binding, Copied, Replaced
from tunesmith.checkpoint import Checkpoint
from tunesmith.record import Finding
from tunesmith.verify.structure import check_structure

WEIGHTS = "model.safetensors"
QUERY = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
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


def bound(folder: Path, base: Path, **binding: Any) -> dict[str, Finding]:
    """The findings by code, against what an adapter makes of the base."""
    return {f.code: f for f in check_structure(folder, Checkpoint(base), Binding(**{"updates": (), **binding}))[1]}


def test_new_and_dropped_and_resized_tensors_are_as_the_adapter_has_them(tiny: TinyRun, merged: Path) -> None:
    """A score that the base lacks, a norm that is gone, a longer embedding: all of it expected, and nothing else."""
    score = Replaced(name="score.weight", module="score", tensor="x")
    binding = {"updates": (score,), "shapes": {"score.weight": (3, 64), EMBEDDING: (300, 64)}, "dropped": (NORM,)}
    assert {"tensors_missing", "tensors_extra", "shape_differs"} <= set(bound(merged, tiny.base, **binding))

    def change(tensors: Tensors) -> None:
        tensors.pop(NORM)
        tensors["score.weight"] = torch.zeros(3, 64)
        tensors[EMBEDDING] = torch.zeros(300, 64)

    rewrite(merged, change)
    assert set(bound(merged, tiny.base, **binding)) == {"structure_ok"}
    rewrite(merged, lambda tensors: tensors.update({"score.weight": torch.zeros(2, 64)}))
    assert bound(merged, tiny.base, **binding)["shape_differs"].params["expected"] == "[3, 64]"
    rewrite(merged, lambda tensors: tensors.update({"score.weight": torch.zeros(3, 64, dtype=torch.int32)}))
    assert bound(merged, tiny.base, **binding)["dtype_unknown"].params["found"] == "I32"


def test_a_head_that_the_adapter_unties_must_be_there(tiny: TinyRun, merged: Path) -> None:
    """A loader would make it of the embedding, or at random."""
    head = Copied(name="lm_head.weight", source=EMBEDDING)
    binding = {"updates": (head,), "shapes": {head.name: (259, 64)}, "config": {"tie_word_embeddings": False}}
    finding = bound(merged, tiny.base, **binding)["tied_head_missing"]
    assert (finding.severity, finding.params["name"]) == ("error", "lm_head.weight")
    rewrite(merged, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING] + 1}))
    assert set(bound(merged, tiny.base, **binding)) == {"structure_ok"}


def test_a_tied_head_that_the_base_holds_all_the_same_may_be_left_out(tmp_path: Path) -> None:
    """A loader does not read it; where the base is not tied, it does."""
    for tied, code in ((True, "tied_head_left_out"), (False, "tensors_missing")):
        base = tmp_path / f"base-{tied}"
        build_base(base, tie_word_embeddings=False)
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
        merged = shutil.copytree(base, tmp_path / f"merged-{tied}")
        rewrite(merged, lambda tensors: tensors.pop("lm_head.weight"))
        assert code in seen(merged, base)


def test_integers_must_stay_what_they_are(tiny: TinyRun, tmp_path: Path) -> None:
    """An int8 tensor of the base may stay one; as a float it could not be compared."""
    base = Path(shutil.copytree(tiny.base, tmp_path / "base"))
    rewrite(base, lambda tensors: tensors.update({"mask": torch.zeros(4, dtype=torch.int8)}))
    merged = Path(shutil.copytree(base, tmp_path / "merged"))
    assert set(seen(merged, base)) == {"structure_ok"}
    rewrite(merged, lambda tensors: tensors.update({"mask": torch.zeros(4)}))
    assert seen(merged, base)["dtype_unknown"].params["found"] == "F32"


def test_names_that_differ_in_a_known_prefix_are_the_bases(tiny: TinyRun, merged: Path) -> None:
    """As Transformers writes a GPT-2 that was published without it; half of them renamed is no spelling."""

    def strip(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    rewrite(merged, strip)
    findings = seen(merged, tiny.base)
    assert set(findings) == {"structure_ok", "tensors_renamed"}
    assert findings["tensors_renamed"].params["count"] == 20
    opened, _ = check_structure(merged, Checkpoint(tiny.base))
    assert opened is not None
    assert opened.read(QUERY).tobytes() == Checkpoint(tiny.merged).read(QUERY).tobytes()
    rewrite(merged, lambda tensors: tensors.pop("norm.weight"))
    assert "tensors_missing" in seen(merged, tiny.base)


def test_a_strange_prefix_is_no_spelling(tiny: TinyRun, merged: Path) -> None:
    """No loader finds such names."""

    def prefix(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[f"base_model.{name}"] = tensors.pop(name)

    rewrite(merged, prefix)
    assert {"tensors_missing", "tensors_extra"} <= set(seen(merged, tiny.base))


def test_the_head_of_another_class_may_be_left_out_whole(tiny: TinyRun, tmp_path: Path) -> None:
    """A classifier has no use for the old head; without a change of class, every tensor is needed."""
    base = Path(shutil.copytree(tiny.base, tmp_path / "base"))
    rewrite(base, lambda tensors: tensors.update({"cls.bias": torch.zeros(4), "cls.weight": torch.zeros(4, 2)}))
    another = {"config": {"architectures": ("LlamaForSequenceClassification",)}}
    assert set(bound(tiny.merged, base, **another)) == {"structure_ok", "old_head_left_out"}
    assert "tensors_missing" in bound(tiny.merged, base)
    half = Path(shutil.copytree(base, tmp_path / "half"))
    rewrite(half, lambda tensors: tensors.pop("cls.bias"))
    assert "tensors_missing" in bound(half, base, **another)


def test_a_head_of_the_embeddings_bytes_in_another_dtype_is_no_copy(tiny: TinyRun, merged: Path) -> None:
    """The same bytes, read as integers, are other numbers."""
    rewrite(merged, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING].view(torch.int32).clone()}))
    assert seen(merged, tiny.base)["tensors_extra"].params["names"] == "lm_head.weight"


def test_a_spelling_that_may_mean_two_tensors_means_none(tiny: TinyRun, tmp_path: Path) -> None:
    """Nothing is guessed where the base has a name with the prefix and without."""
    base = Path(shutil.copytree(tiny.base, tmp_path / "base"))
    rewrite(base, lambda tensors: tensors.update({"norm.weight": tensors[NORM].clone()}))
    merged = Path(shutil.copytree(base, tmp_path / "merged"))

    def change(tensors: Tensors) -> None:
        tensors["transformer.norm.weight"] = tensors.pop(NORM)
        tensors.pop("norm.weight")

    rewrite(merged, change)
    findings = seen(merged, base)
    assert "tensors_renamed" not in findings
    assert findings["tensors_missing"].params["count"] == 2
