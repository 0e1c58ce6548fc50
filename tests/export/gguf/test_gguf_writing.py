"""Writing GGUF files: the converter's process, its last words, what is refused, and that nothing is left half written.

The converter here is a script like llama.cpp's, since the real one loads torch for many seconds; tests marked ``slow``
run the real one.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf", reason="needs gguf (the extra gguf)")

import tunesmith as ts
from tests.tiny_models import TinyRun, edit_json
from tests.verify.gguf.drafts import build_model, draft_of
from tunesmith.export.gguf.converter import explained, find_converter, safe_view
from tunesmith.export.gguf.quantize import quantize_file
from tunesmith.progress import no_progress

LEVELS = ("structure", "assets", "weights")
# Copies a file that was prepared, and says what it was given.
COPIES = """
import json, os, shutil, sys
from pathlib import Path
arguments = sys.argv[1:]
model, out = Path(arguments[0]), Path(arguments[arguments.index("--outfile") + 1])
seen = {
    "files": sorted(file.name for file in model.iterdir()),
    "config": json.loads((model / "config.json").read_text()),
    "environment": {name: os.environ.get(name) for name in ("HF_HUB_OFFLINE", "HF_TOKEN")},
    "type": arguments[arguments.index("--outtype") + 1],
    "name": model.name,
}
(Path(__file__).parent / "seen.json").write_text(json.dumps(seen))
shutil.copy(Path(__file__).parent / "ready.gguf", out)
"""
FAILS = """
import sys
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--outfile") + 1])
out.write_bytes(b"GGUF half")
print("INFO:hf-to-gguf:gguf: context length = 512", file=sys.stderr)
raise {error}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return build_model(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


def script(folder: Path, text: str) -> Path:
    """A converter of this text."""
    folder.mkdir()
    path = folder / "convert_hf_to_gguf.py"
    path.write_text(text)
    return path


def left_over(folder: Path) -> list[str]:
    """Hidden files."""
    return [file.name for file in folder.iterdir() if file.name.startswith(".")]


def test_the_converter_runs_apart_and_sees_no_code(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, without tokens, through a folder without Python files, ``auto_map`` or paths of this machine."""
    import shutil

    source = shutil.copytree(model, tmp_path / "model")
    (source / "modeling_evil.py").write_text("raise SystemExit('was run')")
    edit_json(source / "config.json", auto_map={"AutoConfig": "modeling_evil.Evil"}, _name_or_path="/home/me/run")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    path = script(tmp_path / "llama.cpp", COPIES)
    draft_of(model, "llama").write(path.parent / "ready.gguf")
    export = ts.write_gguf(source, tmp_path / "model.gguf", converter=path.parent)
    seen = json.loads((path.parent / "seen.json").read_text())
    assert "modeling_evil.py" not in seen["files"]
    assert "model.safetensors" in seen["files"]
    assert not {"auto_map", "_name_or_path"} & seen["config"].keys()
    assert seen["environment"] == {"HF_HUB_OFFLINE": "1", "HF_TOKEN": None}
    assert (seen["type"], seen["name"]) == ("bf16", "model")
    assert export.path.read_bytes() == (path.parent / "ready.gguf").read_bytes()
    assert export.size_bytes == export.path.stat().st_size
    assert not left_over(tmp_path)
    assert ts.verify_gguf(source, export.path, levels=LEVELS).answer == "identical"


@pytest.mark.parametrize("kind", ["q4_0", "q5_1"])
def test_four_and_five_bits_are_written_without_a_binary(tmp_path: Path, model: Path, kind: str) -> None:
    """By the official package, from the full-precision file, which goes; norms stay, the embedding is finer."""
    path = script(tmp_path / "llama.cpp", COPIES)
    draft_of(model, "llama").write(path.parent / "ready.gguf")
    export = ts.write_gguf(model, tmp_path / "model.gguf", type=kind, converter=path)
    verdict = ts.verify_gguf(model, export.path, levels=LEVELS)
    assert verdict.answer == "equal_within_rounding"
    assert export.kept == {"Q8_0": 1}
    kinds = {one.name: one.type for one in verdict.tensors}
    assert kinds["token_embd.weight"] == "Q8_0"  # noqa: S105 - a tensor
    assert kinds["output_norm.weight"] == "F32"
    assert kinds["blk.0.attn_q.weight"] == kind.upper()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["llama.cpp", "model.gguf"]
    import gguf

    fields = gguf.GGUFReader(export.path).fields
    assert fields["general.file_type"].contents() == gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]
    assert fields["tokenizer.ggml.merges"].contents() == ["1 2", "t h", "th e", "Ġ the"]


def test_quantizing_in_tiles_is_quantizing_at_once(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small the tiles, the file is the same."""
    from tunesmith.export.gguf import quantize

    source = draft_of(model, "llama").write(tmp_path / "full.gguf")
    cancellation = ts.Cancellation()
    for name, tile in (("once.gguf", 1 << 22), ("tiles.gguf", 200)):
        monkeypatch.setattr(quantize, "_TILE", tile)
        quantize_file(source, tmp_path / name, "q4_1", progress=no_progress, cancellation=cancellation)
    assert (tmp_path / "once.gguf").read_bytes() == (tmp_path / "tiles.gguf").read_bytes()


@pytest.mark.parametrize(
    ("error", "what"),
    [
        ("NotImplementedError('BPE pre-tokenizer was not recognized - update get_vocab_base_pre()')", "cuts text"),
        ("SystemExit('ERROR:hf-to-gguf:Model FooForCausalLM is not supported')", "does not know this architecture"),
        ("ModuleNotFoundError(\"No module named 'sentencepiece'\")", "needs a package"),
        ("ValueError(\"Can not map tensor 'model.layers.0.foo.weight'\")", "no place for a tensor"),
        ("RuntimeError('something else')", "converter stopped"),
    ],
)
def test_a_converter_that_fails_leaves_nothing_and_is_translated(
    tmp_path: Path, model: Path, error: str, what: str
) -> None:
    """One sentence, its last meaningful line, what to do; and no file, not even half of one."""
    path = script(tmp_path / "llama.cpp", FAILS.format(error=error))
    with pytest.raises(ts.TunesmithError, match=what) as caught:
        ts.write_gguf(model, tmp_path / "model.gguf", converter=path)
    assert caught.value.next_step
    assert sorted(file.name for file in tmp_path.iterdir()) == ["llama.cpp"]


def test_the_last_meaningful_line_is_told() -> None:
    """Of a traceback its last line; progress bars and logs are none."""
    said = "INFO:hf-to-gguf:x\nTraceback\n  File\nValueError: bad shape\nWriting:  10%\rWriting:  20%\n"
    assert explained(said).found == "ValueError: bad shape"


def test_what_is_there_is_not_replaced_unasked(tmp_path: Path, model: Path) -> None:
    """Neither the file nor a Modelfile; and a conversion that fails keeps the old one whole."""
    out = tmp_path / "model.gguf"
    out.write_bytes(b"old")
    path = script(tmp_path / "llama.cpp", FAILS.format(error="RuntimeError('no')"))
    with pytest.raises(ts.TunesmithError, match="there already"):
        ts.write_gguf(model, out, converter=path)
    with pytest.raises(ts.TunesmithError, match="stopped"):
        ts.write_gguf(model, out, converter=path, force=True)
    assert out.read_bytes() == b"old"
    (tmp_path / "Modelfile").write_text("FROM x")
    with pytest.raises(ts.TunesmithError, match="there already"):
        ts.write_gguf(model, tmp_path / "other.gguf", converter=path, ollama=True)


def test_a_cancelled_conversion_ends_the_converter(tmp_path: Path, model: Path) -> None:
    """Its process is gone, and so is what it wrote."""
    text = FAILS.format(error="RuntimeError()").replace("raise", "import time; time.sleep(60); raise")
    path = script(tmp_path / "llama.cpp", text)
    cancellation = ts.Cancellation()
    threading.Timer(0.5, cancellation.cancel).start()
    with pytest.raises(ts.Cancelled):
        ts.write_gguf(model, tmp_path / "model.gguf", converter=path, cancellation=cancellation)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["llama.cpp"]


def test_a_quantized_model_is_refused(tmp_path: Path, model: Path) -> None:
    """Its rounding would be rounded again."""
    import shutil

    source = shutil.copytree(model, tmp_path / "model")
    edit_json(source / "config.json", quantization_config={"quant_method": "compressed-tensors"})
    with pytest.raises(ts.TunesmithError, match="made of the merged model") as caught:
        ts.write_gguf(source, tmp_path / "model.gguf")
    assert caught.value.found == "compressed-tensors"


def test_a_run_is_merged_first(tmp_path: Path, tiny: TinyRun) -> None:
    """The message is the two commands."""
    with pytest.raises(ts.TunesmithError, match="this is a run") as caught:
        ts.write_gguf(tiny.adapters["final"], tmp_path / "model.gguf")
    assert "tunesmith merge" in str(caught.value.next_step)


def test_k_types_need_llama_cpps_program(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is converted, with how to have it; with it on PATH it does the work."""
    path = script(tmp_path / "llama.cpp", COPIES)
    draft_of(model, "llama").write(path.parent / "ready.gguf")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(ts.TunesmithError, match="not on PATH") as caught:
        ts.write_gguf(model, tmp_path / "model.gguf", type="q4_k_m", converter=path)
    assert "q4_0" in str(caught.value.next_step)
    assert not (path.parent / "seen.json").exists()
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "llama-quantize"
    program.write_text(
        f"#!{sys.executable}\nimport shutil, sys\nassert sys.argv[3] == 'Q4_K_M'\nshutil.copy(*sys.argv[1:3])\n"
    )
    program.chmod(0o755)
    export = ts.write_gguf(model, tmp_path / "model.gguf", type="q4_k_m", converter=path)
    assert export.path.read_bytes() == (path.parent / "ready.gguf").read_bytes()
    assert export.kept == {"BF16": 15}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bin", "llama.cpp", "model.gguf"]


@pytest.mark.parametrize(
    ("out", "kind", "what"),
    [("model.bin", "bf16", "known format"), ("none/model.gguf", "bf16", "directory"), ("a.gguf", "q9", "GGUF type")],
)
def test_what_cannot_be_written_is_said_first(tmp_path: Path, model: Path, out: str, kind: str, what: str) -> None:
    """Before a converter is even looked for."""
    with pytest.raises(ts.TunesmithError, match=what):
        ts.write_gguf(model, tmp_path / out, type=kind, converter=tmp_path / "nowhere")


def test_a_converter_must_be_one(tmp_path: Path) -> None:
    """A path that leads to none is an error, not a reason to look elsewhere."""
    with pytest.raises(ts.TunesmithError, match="converter is not there"):
        find_converter(tmp_path / "nowhere")
    (tmp_path / "other.py").touch()
    with pytest.raises(ts.TunesmithError, match="converter is not there"):
        find_converter(tmp_path / "other.py")


def test_the_view_of_a_sharded_model_has_its_shards(tmp_path: Path, model: Path) -> None:
    """Every shard and the index, and nothing that the index does not name."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(folder, max_shard_size="50KB")
    (folder / "model-old.safetensors").touch()
    with safe_view(folder, name="..") as view:
        names = {file.name for file in view.iterdir()}
        assert view.name == "model"
    assert "model.safetensors.index.json" in names
    assert "model-old.safetensors" not in names
    assert np.sum([name.endswith(".safetensors") for name in names]) > 1
