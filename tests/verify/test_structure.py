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

from tests.tiny_models import TinyRun, build_base, edit_json
from tunesmith.adapter import Binding, Copied, Replaced
from tunesmith.checkpoint import INDEX_FILE, Checkpoint
from tunesmith.record import Finding
from tunesmith.report import finding_text
from tunesmith.verify.structure.check import check_structure

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


def test_a_head_that_is_no_copy_is_counted_row_by_row(tiny: TinyRun, merged: Path) -> None:
    """One bit apart is apart: a loader that reads it computes something else than one that ties it."""

    def change(tensors: Tensors) -> None:
        head = tensors[EMBEDDING].clone()
        head[-1, -1] = torch.nextafter(head[-1, -1], torch.tensor(9.0))
        tensors["lm_head.weight"] = head

    rewrite(merged, change)
    finding = seen(merged, tiny.base)["tied_head_differs"]
    assert finding.severity == "error"
    assert dict(finding.params) == {"name": "lm_head.weight", "embedding": EMBEDDING, "rows": 1, "total": 259}


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


def split(folder: Path, shards: dict[str, list[str]]) -> None:
    """Spread the one file over several, by hand."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, names in shards.items() for name in names}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def halves(folder: Path) -> dict[str, list[str]]:
    """All names in two shards."""
    names = sorted(load_file(folder / WEIGHTS))
    return {"model-00001-of-00002.safetensors": names[:10], "model-00002-of-00002.safetensors": names[10:]}


def what(folder: Path, base: Path) -> str:
    """What is said of a directory that cannot be opened."""
    opened, findings = check_structure(folder, Checkpoint(base))
    assert opened is None
    assert [finding.code for finding in findings] == ["structure_broken"]
    return str(findings[0].params["what"])


def test_a_tensor_in_two_shards_is_named(tiny: TinyRun, merged: Path) -> None:
    """Which of the two is loaded would be chance."""
    shards = halves(merged)
    files = list(shards)
    index = {name: file for file, names in shards.items() for name in names}
    twice = shards[files[1]][0]
    shards[files[0]].append(twice)
    split(merged, shards)
    (merged / INDEX_FILE).write_text(json.dumps({"weight_map": index}))
    assert f"{twice}: {files[0]}, {files[1]}" in what(merged, tiny.base)


def test_an_index_that_names_a_shard_without_the_tensor_says_what_both_say(tiny: TinyRun, merged: Path) -> None:
    """The tensor, what the index says, and what the files say."""
    split(merged, halves(merged))
    index = json.loads((merged / INDEX_FILE).read_text())
    index["weight_map"][NORM] = "model-00001-of-00002.safetensors"
    (merged / INDEX_FILE).write_text(json.dumps(index))
    said = what(merged, tiny.base)
    assert NORM in said
    assert "model-00001-of-00002.safetensors" in said
    assert "model-00002-of-00002.safetensors" in said


@pytest.mark.parametrize("cut", [-4096, 7], ids=["truncated", "trailing"])
def test_a_file_of_another_length_is_told_with_both_lengths(cut: int, tiny: TinyRun, merged: Path) -> None:
    """A copy that was cut off, or something behind the last tensor."""
    data = (merged / WEIGHTS).read_bytes()
    (merged / WEIGHTS).write_bytes(data[:cut] if cut < 0 else data + bytes(cut))
    said = what(merged, tiny.base)
    assert f"expected {len(data)} bytes" in said
    assert f"{len(data) + cut} bytes" in said.partition("expected")[2]


def test_a_shard_that_no_index_names_and_a_pickle_beside_are_stray(tiny: TinyRun, merged: Path) -> None:
    """Some loaders take every file; a GGUF beside is another product and no weight file of this model."""
    split(merged, halves(merged))
    assert set(seen(merged, tiny.base)) == {"structure_ok"}
    shutil.copy(merged / "model-00001-of-00002.safetensors", merged / "model-00003-of-00002.safetensors")
    (merged / "pytorch_model.bin").write_bytes(b"never opened")
    (merged / "model-q4.gguf").write_bytes(b"GGUF")
    names = seen(merged, tiny.base)["stray_weights"].params["names"]
    assert names == "model-00003-of-00002.safetensors, pytorch_model.bin"


def test_an_index_beside_the_single_file_is_stray_unless_it_is_that_files(tiny: TinyRun, merged: Path) -> None:
    """mlx-lm writes one; that of another layout leads loaders apart."""
    names = list(load_file(merged / WEIGHTS))
    for file, stray in ((WEIGHTS, False), ("model-00001-of-00002.safetensors", True)):
        (merged / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))
        assert ("stray_weights" in seen(merged, tiny.base)) == stray


def test_an_adapter_beside_the_weights_is_an_error(tiny: TinyRun, merged: Path) -> None:
    """Transformers then loads base and adapter, and never these weights."""
    shutil.copy(tiny.adapters["final"] / "adapter_config.json", merged)
    assert seen(merged, tiny.base)["adapter_beside_weights"].severity == "error"


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("pytorch_model.bin", "weights_pickled"),
        ("pytorch_model-00001-of-00002.bin", "weights_pickled"),
        ("consolidated.00.pth", "weights_pickled"),
        ("model.pt", "weights_pickled"),
        ("model-q4_k_m.gguf", "weights_gguf"),
    ],
)
def test_weights_in_another_format_are_named_and_never_opened(
    file: str, code: str, tiny: TinyRun, merged: Path
) -> None:
    """With what to do about it; opening a named pipe would keep us waiting for ever."""
    (merged / WEIGHTS).unlink()
    (merged / file).write_bytes(b"\x80\x04cos\nsystem\n")
    before = (merged / file).stat().st_atime_ns
    opened, findings = check_structure(merged, Checkpoint(tiny.base))
    assert opened is None
    assert [(finding.code, finding.severity) for finding in findings] == [(code, "error")]
    assert dict(findings[0].params) == {"names": file, "folder": "merged"}
    assert (merged / file).stat().st_atime_ns == before
    says = [finding_text(Finding(code=c, severity="error", params=findings[0].params)) for c in (code, CAUSES[code])]
    assert all(("save_pretrained('merged-safetensors')" in text) == (code == "weights_pickled") for text in says)


def test_what_training_leaves_beside_is_no_model(tiny: TinyRun, merged: Path) -> None:
    """A folder without weights is just that, whatever pickles of the trainer lie in it."""
    (merged / WEIGHTS).unlink()
    (merged / "training_args.bin").write_bytes(b"never opened")
    (merged / "optimizer.pt").write_bytes(b"never opened")
    assert set(seen(merged, tiny.base)) == {"structure_broken"}


CAUSES = {"weights_pickled": "cause_pickled", "weights_gguf": "cause_gguf"}


@pytest.mark.parametrize(
    ("parts", "method"),
    [
        (("weight.absmax", "weight.quant_map"), "bitsandbytes"),
        (("qweight", "qzeros", "scales"), "GPTQ / AWQ"),
        (("weight_packed", "weight_scale"), "FP8 / compressed-tensors"),
        (("weight", "scales", "biases"), "MLX"),
    ],
)
def test_quantized_weights_are_called_so(parts: tuple[str, ...], method: str, tiny: TinyRun, merged: Path) -> None:
    """By what their parts are called, rather than as tensors that are missing."""

    def quantize(tensors: Tensors) -> None:
        if "weight" not in parts:
            tensors.pop(QUERY)
        for part in parts:
            tensors[f"{QUERY.removesuffix('weight')}{part}"] = torch.zeros(8, 8, dtype=torch.uint8)

    rewrite(merged, quantize)
    opened, findings = check_structure(merged, Checkpoint(tiny.base))
    assert opened is None
    assert [(finding.code, finding.params["method"]) for finding in findings] == [("weights_quantized", method)]


def test_a_padded_vocabulary_is_told_with_its_rows_and_the_others_are_compared(tiny: TinyRun, merged: Path) -> None:
    """A multiple of 64; what stands in the rows that should be is still the model's."""

    def pad(tensors: Tensors) -> None:
        tensors[EMBEDDING] = torch.cat([tensors[EMBEDDING], torch.zeros(61, 64)])

    before = load_file(merged / WEIGHTS)[EMBEDDING]
    rewrite(merged, pad)
    opened, findings = check_structure(merged, Checkpoint(tiny.base))
    assert [(finding.code, dict(finding.params)) for finding in findings] == [
        ("vocabulary_padded", {"name": EMBEDDING, "expected": 259, "found": 320})
    ]
    assert opened is not None
    assert opened.info(EMBEDDING).shape == (259, 64)
    assert opened.read(EMBEDDING).tobytes() == before.numpy().tobytes()


def test_a_short_vocabulary_is_told_with_its_rows(tiny: TinyRun, merged: Path) -> None:
    """The tokens that were added last have no row; another width is another shape."""
    rewrite(merged, lambda tensors: tensors.update({EMBEDDING: tensors[EMBEDDING][:256].clone()}))
    finding = seen(merged, tiny.base)["vocabulary_short"]
    assert dict(finding.params) == {"name": EMBEDDING, "expected": 259, "found": 256}
    rewrite(merged, lambda tensors: tensors.update({EMBEDDING: tensors[EMBEDDING][:, :32].clone()}))
    assert "shape_differs" in seen(merged, tiny.base)


def test_a_head_declared_untied_must_be_there(tiny: TinyRun, merged: Path) -> None:
    """A loader would make one up; a base that is untied itself has it among its tensors."""
    edit_json(merged / "config.json", tie_word_embeddings=False)
    assert seen(merged, tiny.base)["untied_head_missing"].params["embedding"] == EMBEDDING
    rewrite(merged, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING].clone()}))
    assert set(seen(merged, tiny.base)) == {"structure_ok", "tied_head_written_out"}


@pytest.mark.parametrize(
    ("name", "shape", "is_buffer"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (8,), True),
        ("h.0.attn.bias", (1, 1, 32, 32), True),
        ("h.0.attn.masked_bias", (), True),
        ("embeddings.position_ids", (1, 32), True),
        ("h.0.attn.bias", (64,), False),
        ("h.0.attn.bias", (2, 1, 32, 32), False),
        ("model.layers.0.self_attn.q_proj.bias", (64,), False),
    ],
)
def test_what_a_loader_works_out_by_itself_may_be_there_or_not(
    name: str, shape: tuple[int, ...], is_buffer: bool, tiny: TinyRun, tmp_path: Path
) -> None:
    """Old releases saved buffers, new ones drop them; a trained bias is none."""
    with_it = Path(shutil.copytree(tiny.base, tmp_path / "with"))
    rewrite(with_it, lambda tensors: tensors.update({name: torch.ones(shape)}))
    for folder, base, code in ((tiny.base, with_it, "tensors_missing"), (with_it, tiny.base, "tensors_extra")):
        assert set(seen(folder, base)) == ({"structure_ok", "buffers_apart"} if is_buffer else {code})


def bound(folder: Path, base: Path, **binding: Any) -> dict[str, Finding]:
    """The findings by code, against what an adapter makes of the base."""
    return {f.code: f for f in check_structure(folder, Checkpoint(base), Binding(**{"updates": (), **binding}))[1]}


def test_new_and_dropped_and_resized_tensors_are_as_the_adapter_has_them(tiny: TinyRun, merged: Path) -> None:
    """A score that the base lacks, a norm that is gone, a longer embedding: all of it expected, and nothing else."""
    score = Replaced(name="score.weight", module="score", tensor="x")
    binding = {"updates": (score,), "shapes": {"score.weight": (3, 64), EMBEDDING: (300, 64)}, "dropped": (NORM,)}
    assert {"tensors_missing", "tensors_extra", "vocabulary_short"} <= set(bound(merged, tiny.base, **binding))

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
