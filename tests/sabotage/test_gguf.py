"""Ways in which GGUF files break in the field, each done on purpose: the proof notices, and says what it is.

None of them needs a llama.cpp to be seen; that it would also be seen in one is shown at the end.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf", reason="needs gguf (the extra gguf)")

import tunesmith as ts
from tests.verify.gguf.drafts import Draft, build_model, draft_of
from tunesmith.verify.gguf import GgufVerdict, verify_gguf

STATIC = ("structure", "weights")
Breaking = Callable[[Draft], None]


@dataclass(frozen=True)
class Model:
    """A model, and the right draft of its file."""

    folder: Path
    family: str

    def broken(self, breaking: Breaking, path: Path, *, levels: tuple[str, ...], kind: str = "BF16") -> GgufVerdict:
        """The verdict of a file that was broken."""
        draft = draft_of(self.folder, self.family, kind=kind)
        breaking(draft)
        return verify_gguf(self.folder, draft.write(path), levels=levels, threads=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """A model of each kind that something can go wrong with."""
    root = tmp_path_factory.mktemp("models")
    untied = build_model(root / "untied", "llama", tie_word_embeddings=False)
    return {
        "untied": Model(untied, "llama"),
        **{family: Model(build_model(root / family, family), family) for family in ("llama", "gemma", "qwen2")},
    }


def codes(verdict: GgufVerdict) -> set[str]:
    """The codes of all errors, every one of which can be said in both languages."""
    found = [one for level in verdict.levels for one in level.findings]
    assert all(ts.finding_text(one, lang) for one in found for lang in ts.LANGUAGES)
    return {one.code for one in found if one.severity == "error"}


def _swap(draft: Draft, first: str, second: str) -> None:
    draft.tensors[first], draft.tensors[second] = draft.tensors[second], draft.tensors[first]


def not_interleaved(draft: Draft) -> None:
    """The rows of query and key as the model has them."""
    for name in [name for name in draft.tensors if name.endswith(("attn_q.weight", "attn_k.weight"))]:
        values = draft.tensors[name]
        heads = 4 if "attn_q" in name else 2
        size = values.shape[0] // heads // 2
        draft.tensors[name] = values.reshape(heads, size, 2, -1).swapaxes(1, 2).reshape(values.shape)


def key_in_the_querys_heads(draft: Draft) -> None:
    """Grouped-query attention forgotten: the key's rows interleaved in as many heads as the query's."""
    values = draft.tensors["blk.0.attn_k.weight"]
    draft.tensors["blk.0.attn_k.weight"] = values.reshape(4, 4, 2, -1).swapaxes(1, 2).reshape(values.shape)


def norms_without_one(draft: Draft) -> None:
    """Gemma's norms as they are stored."""
    for name in [name for name in draft.tensors if name.endswith("norm.weight")]:
        draft.tensors[name] = draft.tensors[name] - np.float32(1)


def norms_with_one(draft: Draft) -> None:
    """Gemma's 1 in a model that is none."""
    for name in [name for name in draft.tensors if name.endswith("norm.weight")]:
        draft.tensors[name] = draft.tensors[name] + np.float32(1)


def head_dropped(draft: Draft) -> None:
    """An output head of its own left out."""
    del draft.tensors["output.weight"]


def head_of_zeros(draft: Draft) -> None:
    """A tied head written out, as nothing."""
    draft.tensors["output.weight"] = np.zeros_like(draft.tensors["token_embd.weight"])
    draft.kinds["output.weight"] = "BF16"


def layers_swapped(draft: Draft) -> None:
    """Two layers' tensors in each other's place."""
    _swap(draft, "blk.0.ffn_gate.weight", "blk.1.ffn_gate.weight")


def gate_and_up_swapped(draft: Draft) -> None:
    """Two matrices of one shape in each other's place."""
    _swap(draft, "blk.0.ffn_gate.weight", "blk.0.ffn_up.weight")


def one_number_changed(draft: Draft) -> None:
    """One number of one matrix by the least that bf16 can show."""
    values = draft.tensors["blk.1.attn_output.weight"].copy()
    values.view(np.uint32)[5, 9] += 1 << 16
    draft.tensors["blk.1.attn_output.weight"] = values


def too_large_for_float16(draft: Draft) -> None:
    """A matrix stored as float16 with a number beyond its range."""
    draft.kinds["blk.0.ffn_down.weight"] = "F16"
    values = draft.tensors["blk.0.ffn_down.weight"].copy()
    values[0, 0] = 1e6
    draft.tensors["blk.0.ffn_down.weight"] = values


def bias_left_out(draft: Draft) -> None:
    """Qwen's biases forgotten."""
    for name in [name for name in draft.tensors if name.endswith(".bias")]:
        del draft.tensors[name]


def embedding_cut(draft: Draft) -> None:
    """Tokens that were added lost from the embedding."""
    draft.tensors["token_embd.weight"] = draft.tensors["token_embd.weight"][:-1]


def tensor_of_nobody(draft: Draft) -> None:
    """A further tensor, which a loader may take for something."""
    draft.tensors["blk.0.attn_q.bias"] = np.ones(64, dtype=np.float32)
    draft.kinds["blk.0.attn_q.bias"] = "F32"


def field(key: str, value: object) -> Breaking:
    """One field changed, or left out for None."""

    def change(draft: Draft) -> None:
        assert value != draft.fields.get(key)
        draft.fields[key] = value
        if value is None:
            del draft.fields[key]

    change.__name__ = f"{key.partition('.')[2]}={value}"
    return change


def tokens_shifted(draft: Draft) -> None:
    """Two ordinary tokens in each other's place."""
    tokens = draft.fields["tokenizer.ggml.tokens"]
    tokens[40], tokens[41] = tokens[41], tokens[40]


def merges_turned(draft: Draft) -> None:
    """The merges in another order."""
    draft.fields["tokenizer.ggml.merges"] = draft.fields["tokenizer.ggml.merges"][::-1]


def special_token_ordinary(draft: Draft) -> None:
    """A token of the template marked as text, which llama.cpp then cuts into letters."""
    draft.fields["tokenizer.ggml.token_type"][1] = 1


WEIGHTS = [
    ("llama", not_interleaved, {"gguf_weights_outside", "gguf_cause_not_permuted"}),
    ("llama", key_in_the_querys_heads, {"gguf_weights_outside"}),
    ("gemma", norms_without_one, {"gguf_weights_outside", "gguf_cause_norm_without_one"}),
    ("llama", norms_with_one, {"gguf_weights_outside", "gguf_cause_norm_with_one"}),
    ("untied", head_dropped, {"gguf_head_missing"}),
    ("llama", head_of_zeros, {"gguf_weights_outside"}),
    ("llama", layers_swapped, {"gguf_weights_outside", "gguf_cause_of_another"}),
    ("llama", gate_and_up_swapped, {"gguf_weights_outside"}),
    ("llama", one_number_changed, {"gguf_weights_outside"}),
    ("llama", too_large_for_float16, {"gguf_weights_outside", "gguf_cause_not_finite"}),
    ("qwen2", bias_left_out, {"gguf_tensors_missing"}),
    ("llama", embedding_cut, {"gguf_shape_differs"}),
    ("llama", tensor_of_nobody, {"gguf_tensors_unexpected"}),
]
SETTINGS = [
    field("llama.rope.freq_base", 500000.0),
    field("llama.rope.freq_base", 10001.0),
    field("llama.rope.scaling.type", "linear"),
    field("llama.rope.scaling.factor", 4.0),
    field("llama.rope.dimension_count", 8),
    field("llama.attention.head_count_kv", None),
    field("llama.attention.layer_norm_rms_epsilon", 1e-5),
    field("llama.context_length", 256),
]
ASSETS = [
    (field("tokenizer.ggml.eos_token_id", 0), "gguf_special_id_differs"),
    (field("tokenizer.ggml.eos_token_id", None), "gguf_special_id_differs"),
    (field("tokenizer.ggml.add_bos_token", True), "gguf_add_token_differs"),
    (field("tokenizer.ggml.pre", "gpt-2"), "gguf_cut_differs"),
    (field("tokenizer.chat_template", "{{ messages[0].content }}"), "gguf_template_differs"),
    (field("tokenizer.chat_template", None), "gguf_template_missing"),
    (tokens_shifted, "gguf_tokens_differ"),
    (merges_turned, "gguf_merges_differ"),
    (special_token_ordinary, "gguf_token_types_differ"),
]


@pytest.mark.parametrize(("model", "breaking", "wanted"), WEIGHTS, ids=lambda value: getattr(value, "__name__", ""))
def test_broken_weights_are_noticed(
    tmp_path: Path, models: dict[str, Model], model: str, breaking: Breaking, wanted: set[str]
) -> None:
    """Each is an error, with its cause where that is known."""
    verdict = models[model].broken(breaking, tmp_path / "model.gguf", levels=STATIC)
    assert verdict.answer == "different"
    assert codes(verdict) == wanted


@pytest.mark.parametrize("breaking", SETTINGS, ids=lambda breaking: breaking.__name__)
def test_a_wrong_setting_is_noticed(tmp_path: Path, models: dict[str, Model], breaking: Breaking) -> None:
    """Whatever the weights are, another position or another norm is another model."""
    verdict = models["llama"].broken(breaking, tmp_path / "model.gguf", levels=STATIC)
    assert verdict.answer == "different"
    assert codes(verdict) == {"gguf_setting_differs"}


@pytest.mark.parametrize(("breaking", "wanted"), ASSETS, ids=lambda value: getattr(value, "__name__", ""))
def test_broken_assets_are_noticed(
    tmp_path: Path, models: dict[str, Model], breaking: Breaking, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens, ends, template and the way text is cut: seen in the file alone, where no llama.cpp is installed."""
    monkeypatch.setattr(importlib.import_module("tunesmith.verify.gguf.run"), "engine_missing", lambda: "xllamacpp")
    verdict = models["llama"].broken(breaking, tmp_path / "model.gguf", levels=("assets",))
    assert verdict.answer == "different"
    assert wanted in codes(verdict)


@pytest.mark.parametrize("breaking", [not_interleaved, field("llama.rope.freq_base", 500000.0)], ids=["rows", "rope"])
def test_llama_cpp_itself_shows_what_is_broken(tmp_path: Path, models: dict[str, Model], breaking: Breaking) -> None:
    """Behaviour alone tells positions that are wrong."""
    pytest.importorskip("xllamacpp", reason="needs xllamacpp (the extra gguf)")
    verdict = models["llama"].broken(breaking, tmp_path / "model.gguf", levels=("behaviour",), kind="F32")
    assert codes(verdict) == {"gguf_behaves_otherwise"}


def test_llama_cpp_itself_shows_text_that_is_cut_otherwise(tmp_path: Path, models: dict[str, Model]) -> None:
    """Another pre-tokenizer gives other token ids of the probe texts."""
    pytest.importorskip("xllamacpp", reason="needs xllamacpp (the extra gguf)")
    verdict = models["llama"].broken(field("tokenizer.ggml.pre", "gpt-2"), tmp_path / "model.gguf", levels=("assets",))
    assert codes(verdict) == {"gguf_cut_differs", "gguf_tokenizes_differently"}


def test_a_file_that_llama_cpp_cannot_bear_is_an_answer(tmp_path: Path, models: dict[str, Model]) -> None:
    """It ends the process that was asked, and not this one."""
    pytest.importorskip("xllamacpp", reason="needs xllamacpp (the extra gguf)")

    def half(draft: Draft) -> None:
        del draft.tensors["blk.1.attn_v.weight"]

    verdict = models["llama"].broken(half, tmp_path / "model.gguf", levels=("behaviour",))
    assert codes(verdict) == {"gguf_engine_failed"}
