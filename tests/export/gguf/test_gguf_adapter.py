"""LoRA as a GGUF adapter: whatever PEFT's scale is, llama.cpp's alpha / r comes to the same; the rest is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf", reason="needs gguf (the extra gguf)")

import gguf

import tunesmith as ts
from tests.tiny_models import build_adapter
from tests.verify.gguf.drafts import Draft, build_model, draft_of, interleave

# What llama.cpp's script does with PEFT's directory, in a few lines.
CONVERTS = """
import json, sys
from pathlib import Path
import gguf, numpy as np
from safetensors.numpy import load_file
lora, out = Path(sys.argv[1]), sys.argv[sys.argv.index("--outfile") + 1]
base = json.loads((Path(sys.argv[sys.argv.index("--base") + 1]) / "config.json").read_text())
config = json.loads((lora / "adapter_config.json").read_text())
names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "down_proj": "ffn_down"}
writer = gguf.GGUFWriter(None, "llama")
writer.add_type("adapter")
writer.add_string("adapter.type", "lora")
writer.add_float32("adapter.lora.alpha", float(config["lora_alpha"]))
for name, values in load_file(lora / "adapter_model.safetensors").items():
    parts = name.split(".")
    module, half = parts[-3], parts[-2][-1].lower()
    heads = {"q_proj": base["num_attention_heads"], "k_proj": base["num_key_value_heads"]}.get(module)
    if heads and half == "b":
        values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
    writer.add_tensor(f"blk.{parts[4]}.{names[module]}.weight.lora_{half}", np.ascontiguousarray(values))
writer.write_header_to_file(path=out)
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 8},
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"down_proj": 3}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return build_model(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


@pytest.fixture
def converter(tmp_path: Path) -> Path:
    """A llama.cpp checkout of one script."""
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / "convert_lora_to_gguf.py").write_text(CONVERTS)
    return folder


def of_file(path: Path, name: str) -> np.ndarray[Any, Any]:
    """What llama.cpp adds: alpha / r · B·A."""
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor.data.astype(np.float64) for tensor in reader.tensors}
    a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
    return float(reader.fields["adapter.lora.alpha"].contents()) / a.shape[0] * (b @ a)


@pytest.mark.parametrize("kind", KINDS)
def test_every_scale_of_pefts_is_kept(tmp_path: Path, base: Path, converter: Path, kind: str) -> None:
    """rsLoRA, patterns of ranks and of alphas: the file adds what PEFT's own merge adds."""
    import torch
    from transformers import LlamaForCausalLM

    from tests.tiny_models import peft_alone

    run = build_adapter(base, tmp_path / "run", seed=1, target_modules=["q_proj", "v_proj", "down_proj"], **KINDS[kind])
    out = tmp_path / "lora.gguf"
    export = ts.write_gguf(run, out, adapter_only=True, base=str(base), converter=converter)
    assert export.adapter
    assert export.type == "f32"
    plain = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = peft_alone(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), run).merge_and_unload()
    for module, target in (
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.v_proj", "attn_v"),
        ("mlp.down_proj", "ffn_down"),
    ):
        name = f"model.layers.1.{module}.weight"
        wanted = (merged.state_dict()[name] - plain.state_dict()[name]).numpy()
        wanted = interleave(wanted, 4) if target == "attn_q" else wanted
        assert np.allclose(of_file(out, f"blk.1.{target}.weight"), wanted, atol=1e-6)
    verdict = ts.verify_gguf(run, out, base=str(base))
    assert verdict.good


@pytest.mark.parametrize("breaking", ["alpha", "rows", "missing", "factor"])
def test_a_wrong_adapter_is_noticed(tmp_path: Path, base: Path, converter: Path, breaking: str) -> None:
    """Another alpha, rows that were not interleaved, a pair left out, a factor of another."""
    run = build_adapter(base, tmp_path / "run", seed=1)
    right = ts.write_gguf(run, tmp_path / "lora.gguf", adapter_only=True, base=str(base), converter=converter).path
    reader = gguf.GGUFReader(right)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    draft = Draft("llama", {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": alpha})
    draft.tensors = {tensor.name: tensor.data.copy() for tensor in reader.tensors}
    draft.kinds = dict.fromkeys(draft.tensors, "F32")
    if breaking == "alpha":
        draft.fields["adapter.lora.alpha"] = alpha / 2
    elif breaking == "rows":
        values = draft.tensors["blk.0.attn_q.weight.lora_b"]
        draft.tensors["blk.0.attn_q.weight.lora_b"] = interleave(values, 4)
    elif breaking == "missing":
        del draft.tensors["blk.1.ffn_down.weight.lora_b"]
    else:
        draft.tensors["blk.1.attn_v.weight.lora_a"] = draft.tensors["blk.0.attn_v.weight.lora_a"]
    verdict = ts.verify_gguf(run, draft.write(tmp_path / "wrong.gguf"), base=str(base))
    assert verdict.answer == "different"


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"use_dora": True}, "magnitude"),
        ({"modules_to_save": ["lm_head"]}, "replaced"),
        ({"trainable_token_indices": [3, 4]}, "rows"),
    ],
)
def test_what_has_no_place_is_refused_with_its_reason(
    tmp_path: Path, base: Path, converter: Path, config: dict[str, Any], named: str
) -> None:
    """DoRA, saved modules and token rows: refused, with the way that works."""
    run = build_adapter(base, tmp_path / "run", seed=1, **config)
    with pytest.raises(ts.TunesmithError, match="no place for all") as caught:
        ts.write_gguf(run, tmp_path / "lora.gguf", adapter_only=True, base=str(base), converter=converter)
    assert any(named in line for line in caught.value.details)
    assert "merge" in str(caught.value.next_step)
    assert not (tmp_path / "lora.gguf").exists()


def test_an_adapter_has_types_of_its_own(tmp_path: Path, base: Path, converter: Path) -> None:
    """Four bits are none of them."""
    with pytest.raises(ts.TunesmithError, match="cannot be written in this GGUF type"):
        ts.write_gguf(
            build_adapter(base, tmp_path / "run", seed=1), tmp_path / "lora.gguf", adapter_only=True, base=str(base),
            converter=converter, type="q4_0",
        )  # fmt: skip


@pytest.mark.parametrize(("kind", "alpha", "code"), [
    ("F32", 1, "gguf_behaves"), ("Q8_0", 1, "gguf_behaves_as_stored"), ("F32", 6, "gguf_behaves_otherwise"),
])  # fmt: skip
def test_llama_cpp_computes_with_the_adapter_as_peft_does(
    tmp_path: Path, base: Path, converter: Path, kind: str, alpha: int, code: str
) -> None:
    """On a GGUF file of the base, of whatever type, it predicts what the live adapter does; another alpha does not."""
    pytest.importorskip("xllamacpp", reason="needs xllamacpp (the extra gguf)")
    run = build_adapter(base, tmp_path / "run", seed=1, target_modules=["q_proj", "v_proj", "down_proj"])
    right = ts.write_gguf(run, tmp_path / "lora.gguf", adapter_only=True, base=str(base), converter=converter).path
    reader = gguf.GGUFReader(right, "r+")
    field = reader.fields["adapter.lora.alpha"]
    field.parts[field.data[0]][0] *= alpha
    reader.data.flush()
    del reader, field
    on = draft_of(base, "llama", kind=kind).write(tmp_path / "base.gguf")
    verdict = ts.verify_gguf(run, right, base=str(base), base_gguf=on, levels=["behaviour"])
    level = verdict.levels[-1]
    assert [finding.code for finding in level.findings] == [code]
    assert (level.status == "pass") == (alpha == 1)
    assert verdict.engine
    assert len(verdict.behaviour) == 4


def test_an_adapter_is_run_only_on_a_file_of_its_base(tmp_path: Path, base: Path, converter: Path) -> None:
    """Without one the behaviour is not looked at, and says so; asked for, it is an error that names the way."""
    run = build_adapter(base, tmp_path / "run", seed=1)
    right = ts.write_gguf(run, tmp_path / "lora.gguf", adapter_only=True, base=str(base), converter=converter).path
    verdict = ts.verify_gguf(run, right, base=str(base))
    assert verdict.good
    assert [(level.name, level.status) for level in verdict.levels][-1] == ("behaviour", "skipped")
    assert verdict.levels[-1].findings[0].code == "gguf_adapter_not_run"
    with pytest.raises(ts.TunesmithError, match="GGUF file of its base") as caught:
        ts.verify_gguf(run, right, base=str(base), levels=["behaviour"])
    assert "--base-gguf" in str(caught.value.expected)
    with pytest.raises(ts.TunesmithError, match="no meaning for a GGUF file that is an adapter"):
        ts.verify_gguf(run, right, base=str(base), levels=["assets"])
