"""Adapter and Stack: tensors as updates by name; what does not fit, or is not understood, is refused and named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file

from tests.adapter.making import PREFIX, Q, V, pair, write_adapter, write_base
from tests.tiny_models import TinyRun, build_adapter
from tunesmith.adapter import Adapter, Binding, LowRank, Stack
from tunesmith.checkpoint import Checkpoint
from tunesmith.errors import AdapterError, AdapterMismatchError, UnsupportedAdapterError

SHAPES: dict[str, tuple[int, ...]] = {f"{Q}.weight": (4, 6), f"{V}.weight": (4, 6), "model.norm.weight": (6,)}


def bind(path: Path, base: Checkpoint, **options: Any) -> Binding:
    """One adapter, with its whole weight, on a base."""
    return Stack([(path, 1.0)]).bind(base, **options)


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    """A base that ``making.pair`` fits."""
    return Checkpoint(write_base(tmp_path / "base", SHAPES))


def test_an_adapter_of_peft_is_read_whole(tiny: TinyRun) -> None:
    """Every tensor of the file is a factor of one update, and every update has a place in the base."""
    adapter = Adapter(tiny.adapters["final"])
    updates = [update for update in bind(adapter.path, Checkpoint(tiny.base)).updates if isinstance(update, LowRank)]
    used = [name for update in updates for name in (update.lora_A, update.lora_B)]
    assert sorted(used) == sorted(adapter.header.tensors)
    assert {update.module.rpartition(".")[2] for update in updates} == {"q_proj", "v_proj", "down_proj"}
    assert adapter.base_model == str(tiny.base)


@pytest.mark.parametrize("prefix", [PREFIX, ""])
@pytest.mark.parametrize("infix", ["", ".default"])
def test_names_with_and_without_prefix_and_adapter_name_mean_the_same(
    tmp_path: Path, base: Checkpoint, prefix: str, infix: str
) -> None:
    """All four forms exist in the wild."""
    tensors = {name.replace(".weight", f"{infix}.weight"): value for name, value in pair(Q, prefix=prefix).items()}
    (update,) = bind(write_adapter(tmp_path / "a", tensors), base).updates
    assert isinstance(update, LowRank)
    assert (update.name, update.module, update.r, update.scaling) == (f"{Q}.weight", Q, 2, 4.0)
    assert {update.lora_A, update.lora_B} == set(tensors)


def test_two_tensors_for_one_factor_are_refused(tmp_path: Path) -> None:
    """Both forms of one name in one file: one of them would be dropped in silence."""
    for index, twin in enumerate((pair(Q, prefix=""), {f"{PREFIX}{Q}.lora_A.default.weight": np.ones((2, 6))})):
        with pytest.raises(AdapterError, match="same factor") as caught:
            Adapter(write_adapter(tmp_path / str(index), {**pair(Q), **twin}))
        assert len(caught.value.details) == 2


def test_factors_are_read_exactly(tmp_path: Path) -> None:
    """In float64, from the dtype they are stored in."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        directory = write_adapter(tmp_path / str(dtype))
        a, b = torch.randn(2, 6).to(dtype), torch.randn(4, 2).to(dtype)
        names = (f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight")
        save_file(dict(zip(names, (a, b), strict=True)), directory / "adapter_model.safetensors")
        (adapted,) = Adapter(directory).adapted
        update = LowRank(name=f"{Q}.weight", module=Q, r=2, scaling=1, lora_A=adapted.lora_A, lora_B=adapted.lora_B)
        stack = Stack([(directory, 1.0)])
        a_ri, b_or = stack.factors(update)
        assert a_ri.dtype == b_or.dtype == np.float64
        assert np.array_equal(a_ri, a.double().numpy())
        assert np.array_equal(b_or, b.double().numpy())
        turned = stack.factors(update.model_copy(update={"transposed": True}))
        assert [np.array_equal(*pair) for pair in zip(turned, (b_or.T, a_ri.T), strict=True)] == [True, True]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_factor_that_is_not_finite_is_refused_by_name(tmp_path: Path, bad: float, factor: str) -> None:
    """A diverged run must not become a model."""
    tensors = pair(Q)
    tensors[f"{PREFIX}{Q}.lora_{factor}.weight"][1, 1] = bad
    adapter = Adapter(write_adapter(tmp_path / "a", tensors))
    with pytest.raises(AdapterError, match="NaN or infinity") as caught:
        [adapter.finite(name) for name in adapter.header.tensors]
    assert f"{Q}.lora_{factor}" in str(caught.value.where)


def test_a_rank_that_is_not_the_configs_is_refused(tmp_path: Path) -> None:
    """The scaling would be wrong; both figures are shown."""
    with pytest.raises(AdapterError, match="rank") as caught:
        Adapter(write_adapter(tmp_path / "a", pair(Q, r=3)))
    assert "r = 2" in str(caught.value.expected)
    assert "r = 3" in str(caught.value.found)


@pytest.mark.parametrize("factor", ["A", "B"])
def test_half_an_update_is_refused(tmp_path: Path, factor: str) -> None:
    """A file that was cut or merged by hand."""
    tensors = pair(Q)
    del tensors[f"{PREFIX}{Q}.lora_{factor}.weight"]
    with pytest.raises(AdapterError, match="lack one of") as caught:
        Adapter(write_adapter(tmp_path / "a", {**tensors, **pair(V)}))
    assert caught.value.details == (Q,)


@pytest.mark.parametrize(("a", "b"), [((2, 6), (4, 3)), ((2,), (4, 2)), ((0, 6), (4, 0)), ((2, 6, 1), (4, 2))])
def test_factors_that_do_not_fit_each_other_are_refused(tmp_path: Path, a: Any, b: Any) -> None:
    """Other ranks, other dimensions, or none at all."""
    tensors = {f"{PREFIX}{Q}.lora_A.weight": np.zeros(a), f"{PREFIX}{Q}.lora_B.weight": np.zeros(b)}
    with pytest.raises(AdapterError, match="do not fit each other"):
        Adapter(write_adapter(tmp_path / "a", tensors))


def test_factors_of_a_quantized_dtype_are_refused(tmp_path: Path) -> None:
    """When it is opened, so before anything is written."""
    tensors = {name: value.astype(np.int8) for name, value in pair(Q).items()}
    with pytest.raises(AdapterError, match="dtype") as caught:
        Adapter(write_adapter(tmp_path / "a", tensors))
    assert "I8" in str(caught.value.found)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        """What unpickling calls."""
        return (Path.touch, (self.path,))


def test_a_pickled_adapter_is_refused_and_never_opened(tmp_path: Path) -> None:
    """With advice; the trap in it does not spring."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(AdapterError, match="pickle") as caught:
        Adapter(tmp_path)
    assert "safe_serialization=True" in str(caught.value.next_step)
    assert not (tmp_path / "sprung").exists()


def test_missing_files_are_told_apart(tmp_path: Path) -> None:
    """No configuration: no adapter.  A configuration without weights: weights are missing."""
    with pytest.raises(AdapterError, match="holds no adapter"):
        Adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match="weights are missing"):
        Adapter(tmp_path)


def test_an_adapter_without_tensors_is_refused(tmp_path: Path) -> None:
    """It would merge into a copy of the base."""
    with pytest.raises(AdapterError, match="no tensors"):
        Adapter(write_adapter(tmp_path / "a", {}))


UNMERGEABLE = {
    f"{PREFIX}{Q}.lora_C.weight": "does not know",
    f"{PREFIX}{Q}.lora_diag.default": "KaSA",
    f"{PREFIX}{Q}.lora_E": "AdaLoRA",
    "something": "does not know",
}


@pytest.mark.parametrize("name", UNMERGEABLE)
def test_a_tensor_that_is_not_known_is_refused_with_its_meaning(tmp_path: Path, base: Checkpoint, name: str) -> None:
    """Whatever the configuration says: no tensor of the file is left out in silence."""
    path = write_adapter(tmp_path / "a", {**pair(Q), name: np.ones((2, 6), np.float32)})
    with pytest.raises(UnsupportedAdapterError) as caught:
        bind(path, base)
    (line,) = caught.value.details
    assert line.startswith(f"{name}: ")
    assert UNMERGEABLE[name] in line


def test_a_whole_tensor_without_a_place_is_a_mismatch_with_its_nearest_name(tmp_path: Path, base: Checkpoint) -> None:
    """Only a module that modules_to_save names may be new."""
    name = f"{PREFIX}{Q}s.weight"
    tensors = {**pair(Q), name: np.ones((4, 6), np.float32)}
    with pytest.raises(AdapterMismatchError) as caught:
        bind(write_adapter(tmp_path / "a", tensors), base)
    (line,) = caught.value.details
    assert f"{Q}s.weight is not in the base (nearest: {Q}.weight)" in line
    with pytest.raises(UnsupportedAdapterError, match="refused") as unexplained:
        bind(write_adapter(tmp_path / "b", tensors, modules_to_save=["q_projs"]), base)
    assert "task_type" in unexplained.value.details[0]
    saved = bind(write_adapter(tmp_path / "c", tensors, modules_to_save=["q_projs"], task_type="SEQ_CLS"), base)
    assert saved.shapes == {f"{Q}s.weight": (4, 6)}


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_on_a_changed_base_needs_that_base(tiny: TinyRun, tmp_path: Path, init: str) -> None:
    """Real adapters of the installed PEFT; the way out is named, and taken where the user says so."""
    path = build_adapter(tiny.base, tmp_path / "a", seed=4, init_lora_weights=init)
    with pytest.raises(UnsupportedAdapterError) as caught:
        bind(path, Checkpoint(tiny.base))
    assert any(init in line and "--base-is-residual" in line for line in caught.value.details)
    assert bind(path, Checkpoint(tiny.base), base_is_residual=True).updates


def test_dora_without_its_magnitudes_is_refused(tmp_path: Path) -> None:
    """And magnitudes without DoRA: one of the two is not of this adapter."""
    for index, (tensors, dora) in enumerate(
        ((pair(Q), True), ({**pair(Q), f"{PREFIX}{Q}.lora_magnitude_vector": np.ones(4, np.float32)}, False))
    ):
        with pytest.raises(AdapterError, match="disagree about DoRA") as caught:
            Adapter(write_adapter(tmp_path / str(index), tensors, use_dora=dora))
        assert caught.value.details == (Q,)


def test_a_file_of_several_adapters_is_refused(tmp_path: Path) -> None:
    """A raw state dict of a model with two adapters."""
    first, second = (
        {n.replace(".weight", f".{k}.weight"): v for n, v in pair(m).items()} for k, m in zip("xy", (Q, V), strict=True)
    )
    with pytest.raises(AdapterError, match="several adapters") as caught:
        Adapter(write_adapter(tmp_path / "a", {**first, **second}))
    assert caught.value.found == "x, y"


def test_all_names_that_the_base_lacks_are_listed_with_their_nearest(tmp_path: Path, base: Checkpoint) -> None:
    """One message for all; the nearest name shows what differs."""
    other = Q.replace("model.layers", "model.language.layers")
    tensors = {**pair(other), **pair(V, outputs=5), **pair("ЖЖЖЖЖЖЖЖЖЖЖЖЖЖЖЖ")}
    with pytest.raises(AdapterMismatchError, match="3 of 3") as caught:
        bind(write_adapter(tmp_path / "a", tensors), base)
    details = {line.split(":")[0]: line for line in caught.value.details}
    assert f"(nearest: {Q}.weight)" in details[f"{other}.weight"]
    assert "B [5, 2]" in details[V]
    assert "[4, 6]" in details[V]
    assert "nearest" not in details["ЖЖЖЖЖЖЖЖЖЖЖЖЖЖЖЖ.weight"]
    assert caught.value.expected == "base model org/base"
    assert str(base.path) in str(caught.value.found)


def test_names_of_megatron_are_refused_with_what_would_help(tmp_path: Path, base: Checkpoint) -> None:
    """Its fused layers interleave heads, so that no cut of the factors would be sure."""
    with pytest.raises(AdapterMismatchError) as caught:
        bind(write_adapter(tmp_path / "a", pair("decoder.layers.0.self_attention.linear_qkv")), base)
    assert "a layer of Megatron; convert the adapter" in caught.value.details[0]


def test_many_mismatches_are_counted_beyond_the_first_eight(tmp_path: Path, base: Checkpoint) -> None:
    """Hundreds of lines help nobody, and their nearest names are slow to find."""
    tensors: dict[str, Any] = {}
    for index in range(11):
        tensors |= pair(f"model.layers.{index}.other")
    with pytest.raises(AdapterMismatchError, match="11 of 11") as caught:
        bind(write_adapter(tmp_path / "a", tensors), base)
    assert len(caught.value.details) == 9
    assert caught.value.details[-1] == "… and 3 more"


def test_a_base_tensor_that_is_transposed_is_a_mismatch(tmp_path: Path) -> None:
    """Shapes are compared in order."""
    base = Checkpoint(write_base(tmp_path / "base", {f"{Q}.weight": (6, 4)}))
    with pytest.raises(AdapterMismatchError):
        bind(write_adapter(tmp_path / "a"), base)


def test_a_quantized_base_is_refused_by_its_config_and_by_its_dtype(tmp_path: Path) -> None:
    """Declared, or only seen in the file."""
    path = write_adapter(tmp_path / "a")
    declared = write_base(tmp_path / "b1", SHAPES, quantization_config={"quant_method": "gptq"})
    with pytest.raises(UnsupportedAdapterError, match="quantized"):
        bind(path, Checkpoint(declared))
    seen = write_base(tmp_path / "b2", SHAPES, dtype=np.int8)
    with pytest.raises(UnsupportedAdapterError) as caught:
        bind(path, Checkpoint(seen))
    assert "I8" in caught.value.details[0]


@pytest.mark.parametrize("model_type", ["gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"])
def test_a_square_conv1d_is_told_by_the_architecture_and_the_module(tmp_path: Path, model_type: str) -> None:
    """A square weight fits either way, and the flag fan_in_fan_out may be wrong either way."""
    shapes = {"h.0.attn.c_attn.weight": (6, 6), "lm_head.weight": (6, 6)}
    base = Checkpoint(write_base(tmp_path / "base", shapes, model_type=model_type, tie_word_embeddings=False))
    tensors = {**pair("transformer.h.0.attn.c_attn", outputs=6), **pair("lm_head", outputs=6)}
    for flag in (False, True):
        path = write_adapter(tmp_path / str(flag), tensors, fan_in_fan_out=flag)
        turned = {u.name: u.transposed for u in bind(path, base).updates if isinstance(u, LowRank)}
        assert turned == {"h.0.attn.c_attn.weight": True, "lm_head.weight": False}


def test_every_conv1d_architecture_of_transformers_is_known() -> None:
    """Fails when transformers adds one: its square layers would be merged transposed."""
    import transformers

    from tunesmith.adapter.bind import _CONV1D_MODELS

    models = Path(transformers.__file__).parent / "models"
    using = {
        file.parent.name for file in models.glob("*/modeling_*.py") if "import Conv1D" in file.read_text("utf-8")
    } | {
        file.parent.name
        for file in models.glob("*/modeling_*.py")
        if "pytorch_utils" in (text := file.read_text("utf-8")) and " Conv1D(" in text and "class Conv1D" not in text
    }
    assert "gpt2" in using
    assert {{"openai": "openai-gpt"}.get(name, name) for name in using} <= _CONV1D_MODELS


@pytest.mark.parametrize("stored", [False, True])
def test_an_update_of_a_tied_head_unties_it(tmp_path: Path, *, stored: bool) -> None:
    """The head begins as the embedding, also where the file holds a copy of that."""
    directory = write_base(tmp_path / "base", {"model.embed_tokens.weight": (4, 6)}, tie_word_embeddings=True)
    if stored:
        embedding = Checkpoint(directory).read("model.embed_tokens.weight")
        tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
        save_numpy(tensors, directory / "model.safetensors")
    binding = bind(write_adapter(tmp_path / "a", pair("lm_head")), Checkpoint(directory))
    assert [(update.kind, update.name) for update in binding.updates] == [
        ("copied", "lm_head.weight"),
        ("low_rank", "lm_head.weight"),
    ]
    assert binding.config == {"tie_word_embeddings": False}
    assert binding.shapes == ({} if stored else {"lm_head.weight": (4, 6)})
    assert [finding.code for finding in binding.findings] == ["head_untied"]


def test_a_head_that_differs_from_what_it_is_tied_to_is_its_own(tmp_path: Path) -> None:
    """As transformers 5 reads it; the configuration then says so to every other loader."""
    shapes = {"model.embed_tokens.weight": (4, 6), "lm_head.weight": (4, 6)}
    base = Checkpoint(write_base(tmp_path / "base", shapes, tie_word_embeddings=True))
    binding = bind(write_adapter(tmp_path / "a", pair("lm_head")), base)
    assert [update.kind for update in binding.updates] == ["low_rank"]
    assert binding.config == {"tie_word_embeddings": False}


def test_an_update_of_an_untied_head_is_merged(tmp_path: Path) -> None:
    """It is a linear layer like any other."""
    base = Checkpoint(write_base(tmp_path / "base", {"lm_head.weight": (4, 6)}, tie_word_embeddings=False))
    assert bind(write_adapter(tmp_path / "a", pair("lm_head")), base).updates[0].name == "lm_head.weight"
