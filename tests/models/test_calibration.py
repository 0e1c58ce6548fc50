"""Calibration: text that the model itself wrote, and exactly what its layers are given on it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

from tests.oracle.bases import build_base as build_zoo_base
from tests.tiny_models import (
    TEMPLATE,
    WINDOW,
    TinyRun,
    build_adapter,
    build_base,
    build_tokenizer,
    chat,
    edit_json,
    row,
)
from tunesmith.conversations import Conversation, Message, encode, encode_prompt
from tunesmith.errors import Cancelled, CheckpointError, DataError, OutputError, PromptError
from tunesmith.models import (
    GenerationSettings,
    RecordedInputs,
    Request,
    VariantSet,
    encode_calibration_rows,
    generate,
    record_inputs,
    write_calibration_text,
)
from tunesmith.models.calibration import INPUTS_FILE, SEEDS
from tunesmith.models.quiet import quiet_loading
from tunesmith.progress import Cancellation, Progress

MODULE: Any = sys.modules["tunesmith.models.calibration"]

# float32 activations of size 1 to 10; batches of other sizes multiply in another order.
CLOSE = 1e-5
END = 2

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
MODULES = [
    f"model.layers.{layer}.{'self_attn' if kind in ATTENTION else 'mlp'}.{kind}" for layer in (0, 1) for kind in LINEAR
]
# Two of one length and one apart, the longest first, so that both batches and their order matter.
SEQUENCES = [(5, 6, 7, 8, 9, 10, 11), (50, 60, 70, 80), (3, 4, 5, 6), (200, 100, 7, 9, 30)]


def load(base: Path, **adapters: Path) -> VariantSet:
    """Variants with their tokenizer in the base's directory."""
    return VariantSet.load(base, adapters=adapters, tokenizer_dir=base)


def inputs_of(recorded: RecordedInputs, module: str) -> np.ndarray[Any, Any]:
    """What was recorded of a module, read as the merge reads it: from the index alone."""
    index = json.loads((recorded.folder / INPUTS_FILE).read_text())
    file = index["modules"][module]
    x: np.ndarray[Any, Any] = np.load(recorded.folder / file, allow_pickle=False)
    assert x.dtype == np.dtype("<f4")
    assert index["files"][file] == {"rows": x.shape[0], "features": x.shape[1]}
    return x


def naive_inputs(model: nn.Module, module: str, sequences: Sequence[Sequence[int]]) -> np.ndarray[Any, Any]:
    """The oracle: plain PEFT, one sequence after the other, shortest first, a hook on one module."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(module).register_forward_hook(lambda _, args, __: seen.append(args[0].clone()))
    with torch.no_grad():
        for ids in sorted(sequences, key=len):
            model(input_ids=torch.tensor([ids]))
    handle.remove()
    result: np.ndarray[Any, Any] = torch.cat([x[0] for x in seen]).numpy()
    return result


def plain_peft(base: Path, adapter: Path) -> nn.Module:
    """One adapter by PEFT on a model of its own; the tuned model inside its wrapper."""
    from peft import PeftModel

    with quiet_loading():
        model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
        inner: nn.Module = PeftModel.from_pretrained(model, adapter).eval().base_model.model
    return inner


def without_base_layers(adapter: Path) -> Path:
    """The adapter without the base's own embedding, which PEFT saves beside an adapter on it."""
    weights = load_file(adapter / "adapter_model.safetensors")
    kept = {key: tensor for key, tensor in weights.items() if ".base_layer." not in key}
    save_file(kept, adapter / "adapter_model.safetensors", {"format": "pt"})
    return adapter


# ---------------------------------------------------------------------------------------------------------------------
# what is recorded


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_modules": list(LINEAR), "use_dora": True},
        {"target_modules": list(LINEAR), "modules_to_save": ["lm_head", "input_layernorm"]},
    ],
)
def test_inputs_are_those_of_plain_peft_one_sequence_at_a_time(
    tiny: TinyRun, tmp_path: Path, config: dict[str, Any]
) -> None:
    """Every linear layer's, also of layers without an adapter, of DoRA, and behind modules that were trained whole."""
    adapter = build_adapter(tiny.base, tmp_path / "adapter", seed=5, **config)
    recorded = record_inputs(load(tiny.base, a=adapter), "a", SEQUENCES, MODULES, tmp_path / "inputs")
    oracle = plain_peft(tiny.base, adapter)
    for module in MODULES:
        expected = naive_inputs(oracle, module, SEQUENCES)
        np.testing.assert_allclose(inputs_of(recorded, module), expected, rtol=CLOSE, atol=CLOSE, err_msg=module)
    assert (recorded.tokens, recorded.left_out) == (sum(map(len, SEQUENCES)), ())


def test_inputs_equal_the_models_own_arithmetic(tiny: TinyRun, variants: VariantSet, tmp_path: Path) -> None:
    """No hook in the oracle: embedding and norm for the first layer, and what the mlp multiplies for its last one."""
    modules = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"]
    recorded = record_inputs(variants, "final", SEQUENCES, modules, tmp_path / "inputs")
    first = plain_peft(tiny.base, tiny.adapters["final"]).model
    with torch.no_grad():
        ids = torch.tensor([token for sequence in sorted(SEQUENCES, key=len) for token in sequence])
        q_input = first.layers[0].input_layernorm(first.embed_tokens(ids)).numpy()
        mlp_input = torch.from_numpy(inputs_of(recorded, modules[2]))
        mlp = first.layers[0].mlp
        down_input = (nn.functional.silu(mlp.gate_proj(mlp_input)) * mlp.up_proj(mlp_input)).numpy()
    np.testing.assert_allclose(inputs_of(recorded, modules[0]), q_input, rtol=CLOSE, atol=CLOSE)
    np.testing.assert_allclose(inputs_of(recorded, modules[1]), down_input, rtol=CLOSE, atol=CLOSE)


def test_the_variant_that_is_named_is_the_one_recorded(variants: VariantSet, tmp_path: Path) -> None:
    """An adapter changes what the layers behind it are given; the merged model is given the same as the live one."""
    last = MODULES[-1]
    x = {
        name: inputs_of(record_inputs(variants, name, SEQUENCES, [last], tmp_path / name), last)
        for name in ("base", "final", "merged")
    }
    assert np.abs(x["base"] - x["final"]).max() > 0.1
    np.testing.assert_allclose(x["merged"], x["final"], rtol=1e-3, atol=1e-3)


def test_layers_that_are_given_the_same_tensor_share_a_file(variants: VariantSet, tmp_path: Path) -> None:
    """q/k/v and gate/up of one layer; o, down, and other layers have their own."""
    recorded = record_inputs(variants, "final", SEQUENCES, MODULES, tmp_path / "inputs")
    shared: dict[str, list[str]] = {}
    for module, file in recorded.modules.items():
        shared.setdefault(file, []).append(module.removeprefix("model.layers."))
    assert sorted(shared.values()) == sorted(
        [f"{layer}.{room}.{kind}" for kind in kinds]
        for layer in (0, 1)
        for room, kinds in (
            ("self_attn", ATTENTION[:3]),
            ("self_attn", ATTENTION[3:]),
            ("mlp", LINEAR[4:6]),
            ("mlp", LINEAR[6:]),
        )
    )
    assert {path.name for path in recorded.folder.iterdir()} == {*shared, INPUTS_FILE}


class Twice(nn.Module):
    """An mlp whose layers are given one tensor that is written to between them, and one layer that is run twice."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(features, features, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Not the same input for first and second; third sees both."""
        x = x.clone()
        y = self.first(x) + self.third(x)
        x.mul_(2)
        return y + self.second(x) + self.third(x)


def test_a_tensor_that_is_written_to_or_a_layer_run_twice_is_not_taken_for_shared(
    tiny: TinyRun, tmp_path: Path
) -> None:
    """The same object is not enough."""
    variants = load(tiny.base)
    with variants.active("base") as (model, _):
        model.model.layers[0].mlp = Twice(64)
    names = [f"model.layers.0.mlp.{name}" for name in ("first", "second", "third")]
    recorded = record_inputs(variants, "base", SEQUENCES[:1], names, tmp_path / "inputs")
    first, second, third = (inputs_of(recorded, name) for name in names)
    np.testing.assert_array_equal(2 * first, second)
    np.testing.assert_array_equal(third, np.concatenate([first, second]))


class Routed(nn.Module):
    """An mlp with five experts: rows of short sequences go to two, of long ones to two others, none to the last."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(features, features, bias=False) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """By the sign of the first feature."""
        rows = x.reshape(-1, x.shape[-1])
        result = torch.empty_like(rows)
        first = 0 if x.shape[1] < 5 else 2
        for expert, chosen in ((first, rows[:, 0] < 0), (first + 1, rows[:, 0] >= 0)):
            result[chosen] = self.experts[expert](rows[chosen])
        return result.reshape(x.shape)


def test_routed_experts_have_only_the_rows_that_reached_them(tiny: TinyRun, tmp_path: Path) -> None:
    """No token that is not text is routed anywhere; experts that the first sequence does not reach share nothing."""
    variants = load(tiny.base)
    with variants.active("base") as (model, _):
        model.model.layers[0].mlp = Routed(64)
    names = [f"model.layers.0.mlp.experts.{i}" for i in range(5)]
    recorded = record_inputs(variants, "base", SEQUENCES, names, tmp_path / "inputs")
    assert recorded.left_out == (names[4],)
    x = [inputs_of(recorded, name) for name in names[:4]]
    assert all(len(rows) > 0 for rows in x)
    assert all((x[i][:, 0] < 0).all() and (x[i + 1][:, 0] >= 0).all() for i in (0, 2))
    assert (len(x[0]) + len(x[1]), len(x[2]) + len(x[3])) == (8, 12)


def test_what_is_no_linear_layer_is_left_out(tiny: TinyRun, tmp_path: Path) -> None:
    """Embeddings see ids; a name that the live model lacks has no inputs.  The others are recorded all the same."""
    adapter = without_base_layers(
        build_adapter(tiny.base, tmp_path / "adapter", seed=6, target_modules=["embed_tokens", "q_proj"])
    )
    strangers = ["model.embed_tokens", "model.layers.0", "model.layers.9.mlp.up_proj", "model.norm"]
    asked = [strangers[0], MODULES[0], *strangers[1:]]
    recorded = record_inputs(load(tiny.base, a=adapter), "a", SEQUENCES, asked, tmp_path / "inputs")
    assert list(recorded.modules) == [MODULES[0]]
    assert recorded.left_out == tuple(strangers)


def test_fused_experts_are_left_out_and_attention_beside_them_is_recorded(tmp_path: Path) -> None:
    """Experts in one three-dimensional tensor, as Transformers 5 has them, are no linear layers."""
    base = build_zoo_base(tmp_path / "base", "mixtral")
    build_tokenizer().save_pretrained(base)
    modules = ["model.layers.0.mlp.experts", "model.layers.0.mlp.gate", MODULES[0]]
    recorded = record_inputs(load(base), "base", [(1, 2, 3)], modules, tmp_path / "inputs")
    assert recorded.left_out == tuple(modules[:2])
    assert inputs_of(recorded, MODULES[0]).shape == (3, 32)


def test_gpt2s_transposed_layers_are_recorded(tmp_path: Path) -> None:
    """Conv1D is a linear layer whose weight lies the other way round."""
    base = build_zoo_base(tmp_path / "base", "gpt2")
    build_tokenizer().save_pretrained(base)
    modules = ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"]
    recorded = record_inputs(load(base), "base", [(1, 2, 3), (4, 5)], modules, tmp_path / "inputs")
    assert [inputs_of(recorded, module).shape for module in modules] == [(5, 32), (5, 128)]


def test_a_head_with_an_adapter_sees_every_position(tiny: TinyRun, tmp_path: Path) -> None:
    """Though the head is otherwise spared all positions but one, because logits are large."""
    adapter = without_base_layers(
        build_adapter(tiny.base, tmp_path / "adapter", seed=6, target_modules=["lm_head", "q_proj"])
    )
    recorded = record_inputs(load(tiny.base, a=adapter), "a", SEQUENCES, ["lm_head"], tmp_path / "inputs")
    expected = naive_inputs(plain_peft(tiny.base, adapter), "lm_head", SEQUENCES)
    np.testing.assert_allclose(inputs_of(recorded, "lm_head"), expected, rtol=CLOSE, atol=CLOSE)


def test_logits_are_not_computed_where_nobody_needs_them(
    variants: VariantSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One position a sequence; all of a large vocabulary would be most of the memory."""
    with variants.active("final") as (model, _):
        shapes: list[int] = []
        forward = model.lm_head.forward
        monkeypatch.setattr(model.lm_head, "forward", lambda x: shapes.append(x.shape[1]) or forward(x))
        record_inputs(variants, "final", SEQUENCES, MODULES[:1], tmp_path / "inputs")
    assert set(shapes) == {1}


@pytest.mark.parametrize("positions", [1, 8, 10_000])
def test_the_size_of_batches_changes_nothing(
    variants: VariantSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, positions: int
) -> None:
    """Memory is one batch's, whatever its size; the rows and their order are the same."""
    expected = record_inputs(variants, "final", SEQUENCES, MODULES, tmp_path / "expected")
    monkeypatch.setattr(MODULE, "_POSITIONS_AT_ONCE", positions)
    recorded = record_inputs(variants, "final", SEQUENCES, MODULES, tmp_path / "inputs")
    assert recorded.modules == expected.modules
    for module in MODULES:
        x, y = inputs_of(recorded, module), inputs_of(expected, module)
        np.testing.assert_allclose(x, y, rtol=CLOSE, atol=CLOSE, err_msg=module)


def test_the_model_is_the_same_afterwards(variants: VariantSet, tmp_path: Path) -> None:
    """No hook stays, and it says what it said."""
    settings = GenerationSettings(greedy=True, max_new_tokens=12)

    def said() -> list[str]:
        return [
            item.text
            for item in generate(variants, [Request("final", chat("hi")), Request("final", chat("猫"))], settings)
        ]

    before = said()
    write_calibration_text(variants, "final", sequences=4, tokens=64)
    record_inputs(variants, "final", SEQUENCES, MODULES, tmp_path / "inputs")
    assert said() == before
    assert not hooks_of(variants)


def hooks_of(variants: VariantSet) -> list[object]:
    """All forward hooks in the model."""
    with variants.active("final") as (model, _):
        return [hook for module in model.modules() for hook in (*module._forward_pre_hooks, *module._forward_hooks)]


# ---------------------------------------------------------------------------------------------------------------------
# what is left behind when it fails


def cancel_at(done: int) -> dict[str, Any]:
    """Arguments that cancel once so many tokens are done."""
    cancellation = Cancellation()

    def on_progress(step: Progress) -> None:
        if step.done >= done:
            cancellation.cancel()

    return {"progress": on_progress, "cancellation": cancellation}


@pytest.mark.parametrize("existed", [True, False])
def test_cancelling_leaves_the_folder_as_it_was_and_no_hooks(
    variants: VariantSet, tmp_path: Path, *, existed: bool
) -> None:
    """After the first batch was written."""
    folder = tmp_path / "inputs"
    if existed:
        folder.mkdir()
    with pytest.raises(Cancelled):
        record_inputs(variants, "final", SEQUENCES, MODULES, folder, **cancel_at(4))
    assert list(tmp_path.rglob("*")) == ([folder] if existed else [])
    assert not hooks_of(variants)


def test_an_error_leaves_no_file_and_no_hooks(variants: VariantSet, tmp_path: Path) -> None:
    """Whatever it is; the next recording works."""

    def fail(_: Progress) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        record_inputs(variants, "final", SEQUENCES, MODULES, tmp_path / "inputs", progress=fail)
    assert not list(tmp_path.iterdir())
    assert not hooks_of(variants)
    assert record_inputs(variants, "final", SEQUENCES, MODULES, tmp_path / "inputs").tokens == 20


def test_too_little_disk_space_is_refused_before_anything_is_written(
    variants: VariantSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files that layers share are counted once."""
    recorded = record_inputs(variants, "final", SEQUENCES, MODULES, tmp_path / "whole")
    arrays = sum(np.load(recorded.folder / file).nbytes for file in set(recorded.modules.values()))
    for free, enough in ((arrays, True), (arrays - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        folder = tmp_path / f"inputs-{free}"
        if enough:
            record_inputs(variants, "final", SEQUENCES, MODULES, folder)
        else:
            with pytest.raises(OutputError, match="disk space"):
                record_inputs(variants, "final", SEQUENCES, MODULES, folder)
            assert not folder.exists()


def test_a_folder_that_holds_something_or_cannot_be_made_is_refused(variants: VariantSet, tmp_path: Path) -> None:
    """What is there stays."""
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(OutputError, match="empty"):
        record_inputs(variants, "final", SEQUENCES, MODULES, tmp_path)
    with pytest.raises(OutputError, match="empty"):
        record_inputs(variants, "final", SEQUENCES, MODULES, tmp_path / "mine")
    with pytest.raises(OutputError):
        record_inputs(variants, "final", SEQUENCES, MODULES, tmp_path / "absent" / "inputs")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


def test_inputs_that_are_not_finite_are_refused(tiny: TinyRun, tmp_path: Path) -> None:
    """Rather than a Hessian of nothing but NaN."""
    variants = load(tiny.base)
    with variants.active("base") as (model, _), torch.no_grad():
        model.model.embed_tokens.weight[50] = torch.inf
    with pytest.raises(CheckpointError, match="not finite"):
        record_inputs(variants, "base", SEQUENCES, MODULES, tmp_path / "inputs")
    assert not list(tmp_path.iterdir())


def test_sequences_that_cannot_be_run_are_refused(variants: VariantSet, tmp_path: Path) -> None:
    """None at all, longer than the window, or of other tokens than the model's."""
    for sequences, error in (
        ([], DataError),
        ([()], DataError),
        ([(1,) * (WINDOW + 1)], PromptError),
        ([(10_000,)], CheckpointError),
    ):
        with pytest.raises(error):
            record_inputs(variants, "final", sequences, MODULES, tmp_path / "inputs")
    with pytest.raises(DataError, match="no such variant"):
        record_inputs(variants, "nobody", SEQUENCES, MODULES, tmp_path / "inputs")
    assert not list(tmp_path.iterdir())


def test_recording_tells_how_many_tokens_are_done(variants: VariantSet, tmp_path: Path) -> None:
    """After every batch; the two sequences of one length are one."""
    seen: list[Progress] = []
    record_inputs(variants, "final", SEQUENCES, MODULES[:1], tmp_path / "inputs", progress=seen.append)
    assert [(step.stage, step.done, step.total, step.unit) for step in seen] == [
        ("record inputs", done, 20, "tokens") for done in (8, 13, 20)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# text


def test_text_is_the_seeds_and_hangs_on_nothing_else(variants: VariantSet) -> None:
    """The same seed writes the same again; another seed, temperature or variant writes another text."""
    first = write_calibration_text(variants, "final", sequences=6)
    torch.manual_seed(11)
    assert write_calibration_text(variants, "final", sequences=6) == first
    assert write_calibration_text(variants, "final", sequences=6, seed=1) != first
    assert write_calibration_text(variants, "final", sequences=6, temperature=1.5) != first
    assert write_calibration_text(variants, "base", sequences=6) != first


def test_a_sequence_is_the_template_with_both_turns_written_by_the_model(variants: VariantSet) -> None:
    """User turns from nothing and from seeds of both languages by turns, and room for an answer."""
    text = write_calibration_text(variants, "final", sequences=16, tokens=72)
    with variants.active("final") as (_, tokenizer):
        shown = [tokenizer.decode(ids) for ids in text]
    before, after = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    for index, one in enumerate(shown):
        assert one.startswith(before + (SEEDS[index // 2] if index % 2 else "")), one
        user, answer = one.removeprefix(before).split(after)
        assert user
        assert answer
        assert "<|im_start|>" not in user
    assert {len(one) for one in text} <= set(range(40, 73))
    assert len(set(text)) == len(text)


def test_the_seeds_are_short_and_in_two_languages() -> None:
    """A dozen each, all different."""
    chinese = [seed for seed in SEEDS if not seed.isascii()]
    assert len(set(SEEDS)) == len(SEEDS) == 24
    assert len(chinese) == 12
    assert all(len(seed.split()) <= 2 and len(seed) <= 10 for seed in SEEDS)


def scripted(base: Path, next_token: Callable[[list[int]], int]) -> VariantSet:
    """A base model that says what a function of the tokens so far tells it to say."""
    variants = load(base)
    with variants.active("base") as (model, tokenizer):
        history: list[list[int]] = [[] for _ in range(99)]

        def forward(*_: Any, input_ids: torch.Tensor, **__: Any) -> Any:
            logits = torch.zeros(*input_ids.shape, len(tokenizer))
            if input_ids.shape[1] > 1:  # a new prompt; afterwards only the last token is given
                history[:] = [[] for _ in input_ids]
            for index, ids in enumerate(input_ids.tolist()):
                history[index] += ids
                logits[index, -1, next_token(history[index])] = 1000.0
            return type("Output", (dict,), {"logits": logits, "__getattr__": dict.get})(logits=logits)

        model.forward = forward
    return variants


def test_a_model_that_ends_at_once_gives_seeds_as_user_turns(tiny: TinyRun) -> None:
    """Never an empty turn, never an empty sequence."""
    variants = scripted(tiny.base, lambda _: END)
    text = write_calibration_text(variants, "base", sequences=6)
    with variants.active("base") as (_, tokenizer):
        prompts = [encode_prompt(tokenizer, chat(SEEDS[index // 2])) for index in range(6)]
    assert text == [(*prompt, END) for prompt in prompts]


def test_a_model_that_never_ends_is_cut_at_the_length(tiny: TinyRun) -> None:
    """All sequences are as long as was asked for, and so run together."""
    text = write_calibration_text(scripted(tiny.base, lambda _: 40), "base", sequences=5, tokens=80)
    assert [len(ids) for ids in text] == [80] * 5


def test_tokens_are_drawn_from_all(tiny: TinyRun) -> None:
    """The least likely too; the likeliest that hold 0.9 of the probability would end at token 211."""
    variants = scripted(tiny.base, lambda _: 40)
    with variants.active("base") as (model, tokenizer):
        forward, slope = model.forward, -torch.arange(len(tokenizer)) / 200

        def falling(**arguments: Any) -> Any:
            output = forward(**arguments)
            output.logits.copy_(slope)
            return output

        model.forward = falling
    text = write_calibration_text(variants, "base", sequences=24, tokens=80, temperature=1.0)
    assert max(token for ids in text for token in ids) > 250


def test_special_tokens_of_the_models_own_end_a_user_turn(tiny: TinyRun) -> None:
    """A model that opens another turn inside the user's does not write two turns into one."""
    variants = scripted(tiny.base, lambda ids: 1 if ids[-2:] == [40, 40] else 40)  # 1 is <|im_start|>
    text = write_calibration_text(variants, "base", sequences=1, tokens=80)[0]
    with variants.active("base") as (_, tokenizer):
        user = tokenizer.decode([40, 40])
        assert text[: len(encode_prompt(tokenizer, chat(user)))] == tuple(encode_prompt(tokenizer, chat(user)))


def test_the_models_own_end_is_no_part_of_a_user_turn(tiny: TinyRun, tmp_path: Path) -> None:
    """Its config may name a token that is not special."""
    base = shutil.copytree(tiny.base, tmp_path / "base")
    edit_json(base / "generation_config.json", eos_token_id=[41])
    variants = scripted(base, lambda ids: 41 if ids[-2:] == [40, 40] else 40)
    text = write_calibration_text(variants, "base", sequences=1)[0]
    with variants.active("base") as (_, tokenizer):
        prompt = encode_prompt(tokenizer, chat(tokenizer.decode([40, 40])))
    assert text == (*prompt, 40, 40, 41)


def with_template(tiny: TinyRun, folder: Path, template: str | None, **config: Any) -> Path:
    """The tiny base with another chat template, or none, and another config."""
    base = shutil.copytree(tiny.base, folder)
    if template is None:
        (base / "chat_template.jinja").unlink()
    else:
        (base / "chat_template.jinja").write_text(template)
    edit_json(base / "config.json", **config)
    return base


def test_a_template_without_special_tokens_ends_a_user_turn_by_its_own_words(tiny: TinyRun, tmp_path: Path) -> None:
    """``[/INST]`` and its like are no tokens that stop a generation."""
    base = with_template(tiny, tmp_path / "base", "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}")
    tokenizer = build_tokenizer()
    end = tokenizer(" [/INST]", add_special_tokens=False)["input_ids"]

    def next_token(ids: list[int]) -> int:
        said = ids[len(tokenizer("[INST] ")["input_ids"]) :]
        return 40 if len(said) < 3 else (end + [50] * 99)[len(said) - 3]

    text = write_calibration_text(scripted(base, next_token), "base", sequences=1)[0]
    letter = tokenizer.decode([40])
    assert tokenizer.decode(text).startswith(f"[INST] {letter * 3} [/INST]")
    assert tokenizer.decode(text).count("[/INST]") == 1


def test_a_template_that_refuses_a_lone_user_turn_is_given_a_system_text(tiny: TinyRun, tmp_path: Path) -> None:
    """Some insist on one."""
    insists = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    base = with_template(tiny, tmp_path / "base", insists)
    variants = load(base)
    for ids in write_calibration_text(variants, "base", sequences=4, tokens=128):
        assert build_tokenizer().decode(ids).startswith("<|im_start|>system\n")


@pytest.mark.parametrize("template", [None, "{{ raise_exception('never') }}", "always the same"])
@pytest.mark.parametrize("first", ["bos", "eos", "none"])
def test_without_a_usable_template_the_model_goes_on_from_its_first_token(
    tiny: TinyRun, tmp_path: Path, template: str | None, first: str
) -> None:
    """From bos, else from eos, and from seeds; a base model that never ends is cut at the length."""
    base = with_template(tiny, tmp_path / "base", template)
    tokenizer = build_tokenizer()
    tokenizer.bos_token = "<|im_start|>" if first == "bos" else None
    tokenizer.eos_token = None if first == "none" else "<|endoftext|>"
    tokenizer.chat_template = template
    tokenizer.save_pretrained(base)
    seen: list[Progress] = []
    text = write_calibration_text(scripted(base, lambda _: 40), "base", sequences=4, tokens=32, progress=seen.append)
    assert (seen[-1].done, seen[-1].total) == (4, 4)
    begin = {"bos": [1], "eos": [0], "none": []}[first]
    assert [len(ids) for ids in text] == [32] * 4
    for index, ids in enumerate(text):
        seed = SEEDS[index // 2] if index % 2 or not begin else ""
        start = begin + tokenizer(seed, add_special_tokens=False)["input_ids"]
        assert ids == tuple(start + [40] * (32 - len(start)))


@pytest.mark.parametrize("window", [2, 16, 45, 60])
def test_a_small_context_window_is_never_exceeded(tiny: TinyRun, tmp_path: Path, window: int) -> None:
    """With a template that does not fit, and one that just fits."""
    base = with_template(tiny, tmp_path / "base", TEMPLATE, max_position_embeddings=window)
    variants = load(base)
    text = write_calibration_text(variants, "base", sequences=6)
    assert all(0 < len(ids) <= window for ids in text)
    assert record_inputs(variants, "base", text, MODULES, tmp_path / "inputs").tokens == sum(map(len, text))


def test_a_long_template_still_leaves_room_for_text(tiny: TinyRun, tmp_path: Path) -> None:
    """Half of the tokens that were asked for, at least."""
    base = with_template(tiny, tmp_path / "base", "x" * 200 + TEMPLATE)
    variants = scripted(base, lambda _: 40)
    with variants.active("base") as (_, tokenizer):
        frame = len(encode_prompt(tokenizer, chat("")))
    assert [len(ids) for ids in write_calibration_text(variants, "base", sequences=3)] == [frame + 32] * 3


def test_writing_tells_turns_and_can_be_cancelled(variants: VariantSet) -> None:
    """User turns, then answers."""
    seen: list[Progress] = []
    write_calibration_text(variants, "final", sequences=3, progress=seen.append)
    assert {(step.stage, step.total, step.unit) for step in seen} == {("write calibration text", 6, "turns")}
    assert [step.done for step in seen] == sorted(step.done for step in seen)
    assert seen[-1].done == 6
    for done in (0, 3):
        with pytest.raises(Cancelled):
            write_calibration_text(variants, "final", sequences=3, **cancel_at(done))
    assert write_calibration_text(variants, "final", sequences=0) == []


# ---------------------------------------------------------------------------------------------------------------------
# the user's rows


def test_rows_are_encoded_as_they_are_trained_and_asked(variants: VariantSet) -> None:
    """With an answer, its end included; without one, up to where it is to begin."""
    rows = [row(0, "hi", "hello"), row(1, "what"), row(2, "a", "b", "c", "d")]
    tokenizer = build_tokenizer()
    assert sorted(encode_calibration_rows(variants, "final", rows)) == sorted(
        [
            tuple(encode(tokenizer, rows[0]).input_ids),
            tuple(encode_prompt(tokenizer, rows[1].messages)),
            tuple(encode(tokenizer, rows[2]).input_ids),
        ]
    )


def test_rows_are_cut_to_the_budget_and_come_from_all_over_the_file(variants: VariantSet) -> None:
    """Long rows do not take it all, and a file sorted by subject is not read from one end."""
    rows = [row(index, f"{index:03}" + "x" * 400, "y") for index in range(100)]
    text = encode_calibration_rows(variants, "final", rows, tokens_at_most=1000)
    assert sum(map(len, text)) == 1000
    assert [len(ids) for ids in text] == [125] * 8
    tokenizer = build_tokenizer()
    places = [int(tokenizer.decode(ids).split("user\n")[1][:3]) for ids in text]
    assert max(places) > 50 > min(places)
    assert encode_calibration_rows(variants, "final", rows, tokens_at_most=1000) == text
    assert [len(ids) for ids in encode_calibration_rows(variants, "final", rows[:1])] == [
        len(encode(tokenizer, rows[0]).input_ids)
    ]


def test_a_row_longer_than_the_window_is_cut_to_it(variants: VariantSet) -> None:
    """One row, so the whole budget is its, and no eighth."""
    text = encode_calibration_rows(variants, "final", [row(0, "x" * 2000, "y")], tokens_at_most=1000)
    assert [len(ids) for ids in text] == [WINDOW]


def test_rows_under_a_template_that_rewrites_earlier_turns_are_taken_as_asked_and_answered(
    tiny: TinyRun, tmp_path: Path
) -> None:
    """Such a template cannot be supervised, which calibration does not need."""
    rewrites = "{{ messages|length }}" + TEMPLATE
    base = with_template(tiny, tmp_path / "base", rewrites)
    item = row(0, "hi", "hello")
    (ids,) = encode_calibration_rows(load(base), "base", [item])
    assert build_tokenizer().decode(ids) == "1<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello"


def test_rows_that_leave_nothing_are_refused(tiny: TinyRun, variants: VariantSet, tmp_path: Path) -> None:
    """No rows, no budget, no template, and a template that refuses the row, which is named."""
    with pytest.raises(DataError, match="no tokens"):
        encode_calibration_rows(variants, "final", [])
    with pytest.raises(DataError, match="no tokens"):
        encode_calibration_rows(variants, "final", [row(0, "hi")], tokens_at_most=0)
    bare = load(with_template(tiny, tmp_path / "bare", None))
    for item in (row(0, "hi"), row(0, "hi", "hello")):
        with pytest.raises(DataError, match="chat template"):
            encode_calibration_rows(bare, "base", [item])
    picky = load(with_template(tiny, tmp_path / "picky", "{{ raise_exception('no system, please') }}"))
    item = Conversation(id="row-7", messages=(Message(role="system", content="s"), *chat("hi")))
    with pytest.raises(DataError, match=r"(?s)row-7.*no system, please"):
        encode_calibration_rows(picky, "base", [item])


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    """For the user's rows as for the model's own text."""
    build_base(tmp_path / "base", vocab_size=200)
    variants = load(tmp_path / "base")
    with pytest.raises(CheckpointError, match="no embedding"):
        encode_calibration_rows(variants, "base", [row(0, "猫", "猫")])
    with pytest.raises(CheckpointError, match="no embedding"):
        write_calibration_text(variants, "base")


def test_nothing_is_written_to_the_terminal(
    variants: VariantSet, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Text, rows and pass."""
    text = write_calibration_text(variants, "final", sequences=2)
    text += encode_calibration_rows(variants, "final", [row(0, "hi")])
    record_inputs(variants, "final", text, MODULES, tmp_path / "inputs")
    assert capfd.readouterr() == ("", "")


def test_bare_text_comes_after_the_conversations_and_outside_of_them(variants: VariantSet) -> None:
    """The conversations are those that there are without it; what is bare does not begin as they all do."""
    chats = write_calibration_text(variants, "final", sequences=3, tokens=32)
    both = write_calibration_text(variants, "final", sequences=3, bare=5, tokens=32)
    assert both[:3] == chats
    opening = next(n for n in range(1, 32) if len({text[: n + 1] for text in chats}) > 1)
    assert opening > 1
    assert [text for text in both[3:] if text[:opening] == chats[0][:opening]] == []
    assert [len(text) <= 32 for text in both[3:]] == [True] * 5


def test_bare_text_begins_with_no_token_that_opens_a_turn(variants: VariantSet) -> None:
    """As in ChatML, whose first token is a turn's first too; elsewhere it begins as every text does."""
    with variants.active("final") as (_, tokenizer):
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        usual = MODULE._plain_starts(tokenizer, 4, None)
        loose = MODULE._plain_starts(tokenizer, 4, None, opens_turns={first})
    assert [row[0] for row in usual] == [first] * 4
    assert [first in row for row in loose] == [False] * 4
    assert all(loose)
