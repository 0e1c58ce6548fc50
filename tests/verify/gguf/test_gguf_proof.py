"""The proof of a GGUF file: what is right is found to be, family by family and type by type."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.verify.gguf.drafts import CONFIGS, build_model, draft_of
from tunesmith.errors import CheckpointError
from tunesmith.verify.gguf import GgufVerdict, verify_gguf

pytest.importorskip("gguf", reason="needs gguf (the extra gguf)")

STATIC = ("structure", "weights")


def told(verdict: GgufVerdict) -> list[str]:
    """Every finding that is not good."""
    return [
        f"{finding.code} {dict(finding.params)}"
        for level in verdict.levels
        for finding in level.findings
        if finding.severity not in ("ok", "info")
    ]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return build_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.mark.parametrize("family", CONFIGS)
def test_a_right_file_is_identical_whatever_the_family(tmp_path: Path, family: str) -> None:
    """Interleaved rows, 1 more in norms, biases, fused and untied matrices: each family's own ways are undone."""
    model = build_model(tmp_path / "model", family)
    verdict = verify_gguf(model, draft_of(model, family).write(tmp_path / "model.gguf"), levels=STATIC)
    assert not told(verdict)
    assert verdict.tensors
    assert all(one.exact == one.elements for one in verdict.tensors)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_a_types_own_rounding_is_explained(tmp_path: Path, llama: Path, kind: str) -> None:
    """Every number is within its type's bound, and the types that lose something are seen to."""
    verdict = verify_gguf(llama, draft_of(llama, "llama", kind=kind).write(tmp_path / "model.gguf"), levels=STATIC)
    assert not told(verdict)
    assert verdict.type == kind
    worst = max(one.relative_error or 0 for one in verdict.tensors)
    assert (worst < 1e-6) == (kind in ("F32", "F16"))  # float16 has no room for the smallest


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_the_bound_is_tight(tmp_path: Path, llama: Path, kind: str) -> None:
    """A number that is one code off is outside, in every type."""
    path = draft_of(llama, "llama", kind=kind).write(tmp_path / "model.gguf")
    name = "blk.1.ffn_up.weight"
    import gguf

    reader = gguf.GGUFReader(path, "r+")
    tensor = next(one for one in reader.tensors if one.name == name)
    row = tensor.data[3]
    place = gguf.GGML_QUANT_SIZES[tensor.tensor_type][1] - 7  # a byte of codes in the first block
    code = int(row[place]) & 15
    row[place] = (int(row[place]) & 240) | ((code + 1) & 15 if code < 12 else code - 1)
    reader.data.flush()
    del reader, tensor, row
    verdict = verify_gguf(llama, path, levels=STATIC)
    assert verdict.answer == "different"
    assert [(one.name, one.outside) for one in verdict.tensors if one.outside] == [(name, 1)]


def test_a_huge_step_hides_nothing(tmp_path: Path, llama: Path) -> None:
    """A block whose step is larger than its numbers warrant is outside, though every number is within half of it."""
    path = draft_of(llama, "llama", kind="Q8_0").write(tmp_path / "model.gguf")
    import gguf

    reader = gguf.GGUFReader(path, "r+")
    tensor = next(one for one in reader.tensors if one.name == "blk.0.ffn_up.weight")
    block = tensor.data[0]
    block[0:2] = np.frombuffer(np.float16(4.0).tobytes(), dtype=np.uint8)
    block[2:34] = 0
    reader.data.flush()
    del reader, tensor, block
    verdict = verify_gguf(llama, path, levels=STATIC)
    assert [(one.name, one.outside) for one in verdict.tensors if one.outside] == [("blk.0.ffn_up.weight", 32)]


def test_a_real_llama_cpp_agrees(tmp_path: Path, llama: Path) -> None:
    """Loaded, tokenizing and writing in llama.cpp it is the model; all four levels pass."""
    pytest.importorskip("xllamacpp", reason="needs xllamacpp (the extra gguf)")
    # In float32: a random model's bf16 products are noise beside which nothing can be seen.
    verdict = verify_gguf(llama, draft_of(llama, "llama", kind="F32").write(tmp_path / "model.gguf"), threads=1)
    assert not told(verdict)
    assert verdict.answer == "identical"
    assert verdict.engine
    assert [level.status for level in verdict.levels] == ["pass"] * 4
    assert max(row.mean_kl for row in verdict.behaviour) < 1e-2
    assert GgufVerdict.model_validate_json(verdict.to_json()) == verdict


def test_an_unknown_architecture_is_not_passed_over(tmp_path: Path) -> None:
    """What this version cannot undo is not verified, and named."""
    from tests.tiny_models import edit_json

    model = build_model(tmp_path / "model", "llama")
    path = draft_of(model, "llama").write(tmp_path / "model.gguf")
    edit_json(model / "config.json", architectures=["GPTNeoXForCausalLM"])
    verdict = verify_gguf(model, path, levels=STATIC)
    assert verdict.answer == "not_verified"
    assert told(verdict)[0].startswith("gguf_architecture_unproven")


def test_rope_scaling_of_llama_3_is_recomputed(tmp_path: Path) -> None:
    """The divisors of the frequencies must be there and right where the configuration asks for them."""
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }  # fmt: skip
    model = build_model(tmp_path / "model", "llama", rope_parameters=rope)
    draft = draft_of(model, "llama")
    assert "rope_freqs.weight" in " ".join(told(verify_gguf(model, draft.write(tmp_path / "a.gguf"), levels=STATIC)))
    # From transformers' own initialisation, which is not what verify computes with.
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig.from_pretrained(model)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 500000.0 ** (-np.arange(0, 16, 2) / 16)
    draft.tensors["rope_freqs.weight"] = (plain / scaled.numpy()).astype(np.float32)
    draft.kinds["rope_freqs.weight"] = "F32"
    assert not told(verify_gguf(model, draft.write(tmp_path / "b.gguf"), levels=STATIC))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGML" + bytes(64), b"GGUF\x03\0\0\0" + b"\xff" * 64])
def test_what_is_no_gguf_file_is_an_error(tmp_path: Path, llama: Path, content: bytes) -> None:
    """Empty, cut, of another kind, or full of lengths that lead out of the file."""
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        verify_gguf(llama, path, levels=STATIC)
