"""Every way to spoil a merge that we know of, each with the cause that verify must name first.

A mutant is a function that spoils a copy of a sound merge; its registration says what has to be answered.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.sabotage.workshop import (
    ALPHA,
    LAYERS,
    R,
    Tensors,
    Workshop,
    deltas,
    flip_bit,
    peft_merge,
    remerge,
    rewrite,
    tunesmith_merge,
)
from tests.tiny_models import SPECIAL, edit_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
QUERY = "model.layers.0.self_attn.q_proj.weight"
KEY = "model.layers.1.self_attn.k_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"

Spoil = Callable[[Path, Workshop], object]


@dataclass(frozen=True)
class Mutant:
    """One way to spoil a merge.

    Attributes:
        name: what was done.
        spoil: does it to a copy of the sound merge.
        cause: code of the cause that must come first.
        params: what that cause must say at least; floats to 0.1 %, texts as a part of what is said.
        then: codes of the causes that must follow.
        roundings: how the sound merges are rounded that it is done to; the product's own way where it makes no odds.
    """

    name: str
    spoil: Spoil
    cause: str
    params: Mapping[str, str | int | float] = field(default_factory=dict)
    then: tuple[str, ...] = ()
    roundings: tuple[str, ...] = ("faithful",)


BOTH = ("faithful", "nearest")

MUTANTS: list[Mutant] = []


def mutant(
    cause: str,
    /,
    *then: str,
    named: str | None = None,
    roundings: tuple[str, ...] | None = None,
    **params: str | int | float,
) -> Callable[[Spoil], Spoil]:
    """Register a function as a mutant that must be told by this cause."""

    def register(spoil: Spoil) -> Spoil:
        # One number must be found among those that are rounded in whatever way.
        ways = roundings or (BOTH if cause == "cause_one_element" else BOTH[:1])
        MUTANTS.append(Mutant(named or spoil.__name__, spoil, cause, params, then, ways))
        return spoil

    return register


# What was added, and where.


@mutant("cause_not_applied")
def adapter_never_applied(out: Path, shop: Workshop) -> None:
    """The base under another name."""
    shutil.copy(shop.base / WEIGHTS, out)


def _without(*parts: str) -> Spoil:
    return lambda out, shop: remerge(
        out, shop, lambda name, delta: None if any(part in name for part in parts) else delta
    )


mutant("cause_partly_applied", named="one_module_missing", modules="layers.0.self_attn.q_proj", count=1)(
    _without("layers.0.self_attn.q_proj")
)
mutant("cause_partly_applied", named="two_modules_missing", modules="layers.1.mlp.down_proj", count=2)(
    _without("layers.0.self_attn.k_proj", "layers.1.mlp.down_proj")
)
mutant("cause_partly_applied", named="one_layer_missing", modules="model.layers.1.*", count=7)(_without("layers.1."))
mutant("cause_partly_applied", named="one_kind_missing_everywhere", modules="up_proj", count=LAYERS)(
    _without("up_proj")
)


def _scaled(factor: float) -> Spoil:
    return lambda out, shop: remerge(out, shop, lambda _, delta: factor * delta)


mutant("cause_merged_twice", named="merged_twice", factor=2.0)(_scaled(2))
mutant("cause_sign", named="subtracted")(_scaled(-1))
mutant("cause_rslora", named="scaled_by_root_r", factor=math.sqrt(R))(_scaled(math.sqrt(R)))
mutant("cause_rslora", named="scaled_by_1_over_root_r", factor=1 / math.sqrt(R))(_scaled(1 / math.sqrt(R)))
mutant("cause_scaling_ignored", named="alpha_over_r_left_out", factor=R / ALPHA)(_scaled(R / ALPHA))
mutant("cause_not_divided", named="alpha_not_divided_by_r", factor=float(R))(_scaled(float(R)))
mutant("cause_rslora", named="scaled_by_root_2_as_after_a_fusion", factor=math.sqrt(2))(_scaled(math.sqrt(2)))
for _factor in (1 / R, 0.7, 1.3, 0.9, 1.05, -0.4, 3.0):
    mutant("cause_scaled", named=f"scaled_by_{_factor:g}", factor=_factor)(_scaled(_factor))


def _merged_again(rounding: str) -> Spoil:
    """The merge of a merge: what really happens."""

    def spoil(out: Path, shop: Workshop) -> None:
        once = out.parent / f"{out.name}-once"
        out.rename(once)
        tunesmith_merge(shop.run, once, out, rounding=rounding)

    return spoil


mutant("cause_merged_twice", named="merged_twice_with_a_rounding_between", factor=2.0)(_merged_again("faithful"))
mutant("cause_merged_twice", named="merged_twice_to_nearest", roundings=("nearest",), factor=2.0)(
    _merged_again("nearest")
)


@mutant("cause_other_checkpoint", checkpoint="checkpoint-20")
def another_checkpoint(out: Path, shop: Workshop) -> None:
    """The one before."""
    shutil.rmtree(out)
    tunesmith_merge(shop.run, shop.base, out, checkpoint=20)


@mutant("cause_base_is", base="other", count=20)
def another_base(out: Path, shop: Workshop) -> None:
    """The right adapter on a base of the same form, which lies beside the right one."""
    shutil.rmtree(out)
    tunesmith_merge(shop.run, shop.other, out)


@mutant("cause_other_base")
def another_base_that_is_not_at_hand(out: Path, shop: Workshop) -> None:
    """As before, and nothing tells which it was."""
    elsewhere = shutil.copytree(shop.other, out.parent / "elsewhere" / "base")
    rewrite(elsewhere, lambda tensors: tensors.update({name: 1.01 * weight for name, weight in tensors.items()}))
    shutil.rmtree(out)
    tunesmith_merge(shop.run, elsewhere, out)


def _on_a_view(kind: str) -> Spoil:
    def spoil(out: Path, shop: Workshop) -> None:
        shutil.rmtree(out)
        tunesmith_merge(shop.run, shop.base, out, base_view=kind)

    return spoil


for _view in ("nf4", "nf4-double", "int8"):
    mutant("cause_base_dequantized", named=f"base_dequantized_from_{_view}", view=_view, count=7 * LAYERS)(
        _on_a_view(_view)
    )


@mutant("cause_other_adapter", count=7 * LAYERS)
def another_adapter(out: Path, shop: Workshop) -> None:
    """Updates of the right size that are not the run's."""
    generator = torch.Generator().manual_seed(5)

    def noise(_: str, delta: torch.Tensor) -> torch.Tensor:
        return torch.randn(delta.shape, generator=generator, dtype=torch.float64) * delta.std()

    remerge(out, shop, noise)


@mutant("cause_transposed", tensor=QUERY, count=1)
def update_transposed_on_a_square_layer(out: Path, shop: Workshop) -> None:
    """Fits, and is wrong."""
    remerge(out, shop, lambda name, delta: delta.T if name == QUERY else delta)


@mutant("cause_other_module", tensor="o_proj", source="q_proj", count=2)
def factors_of_another_module(out: Path, shop: Workshop) -> None:
    """Two modules of a layer hold each other's A and B."""
    every = deltas(shop.run)
    pair = {QUERY: QUERY.replace("q_proj", "o_proj"), QUERY.replace("q_proj", "o_proj"): QUERY}
    remerge(out, shop, lambda name, delta: every[pair[name]] if name in pair else delta)


@mutant("cause_other_module", source="layers.", count=7 * LAYERS)
def updates_one_layer_off(out: Path, shop: Workshop) -> None:
    """Every layer was given the update of the next."""
    every = deltas(shop.run)

    def next_layer(name: str, _: torch.Tensor) -> torch.Tensor:
        layer = int(name.split(".")[2])
        return every[name.replace(f".{layer}.", f".{(layer + 1) % LAYERS}.")]

    remerge(out, shop, next_layer)


# Weights that changed after the merge.


@mutant("cause_one_element", roundings=("nearest",), tensor=QUERY, count=1)
def low_bit_flipped_towards_the_exact_value(out: Path, shop: Workshop) -> None:
    """The other of the two neighbours, which no other number took: where many do, nobody can tell."""
    _flip_low_bit(out, shop, towards=True)


@mutant("cause_one_element", tensor=QUERY, count=1)
def low_bit_flipped_away_from_the_exact_value(out: Path, shop: Workshop) -> None:
    """One step outside the two neighbours."""
    _flip_low_bit(out, shop, towards=False)


def _flip_low_bit(out: Path, shop: Workshop, *, towards: bool) -> None:
    exact = load_file(shop.base / WEIGHTS)[QUERY].double() + deltas(shop.run)[QUERY]
    stored = load_file(out / WEIGHTS)[QUERY]
    flipped = (stored.view(torch.int16) ^ 1).view(torch.bfloat16).double()
    error = exact - stored.double()
    share = error / (flipped - stored.double())
    fits = (share > 0.2) & (share < 0.4) if towards else (share < -0.2) & (share > -0.4)
    flip_bit(out, QUERY, int(fits.view(-1).nonzero()[-1]), 0)


mutant("cause_one_element", named="sign_bit_flipped_in_an_adapted_tensor", tensor=DOWN, count=1)(
    lambda out, _: flip_bit(out, DOWN, 77, 15)
)
mutant("cause_one_element", named="exponent_bit_flipped_in_an_adapted_tensor", tensor=DOWN, count=1)(
    lambda out, _: flip_bit(out, DOWN, 7000, 10)
)
for _kind, _bit in (("low", 0), ("middle", 4), ("exponent", 11), ("top_exponent", 14), ("sign", 15)):
    mutant("cause_one_element", named=f"{_kind}_bit_flipped_in_an_untouched_tensor", tensor=EMBEDDING, count=1)(
        lambda out, _, bit=_bit: flip_bit(out, EMBEDDING, 5001, bit)
    )
mutant("cause_one_element", named="low_bit_flipped_in_a_norm", tensor=NORM, count=1)(
    lambda out, _: flip_bit(out, NORM, 0, 0)
)


@mutant("cause_one_element", tensor=KEY, count=1)
def one_element_one_step_beyond_its_neighbours(out: Path, _: Workshop) -> None:
    """Two steps from the nearest value."""

    def change(tensors: Tensors) -> None:
        tensors[KEY].view(-1).view(torch.int16)[321] += 2

    rewrite(out, change)


@mutant("cause_not_finite", tensor=DOWN, count=1)
def one_element_is_nan(out: Path, _: Workshop) -> None:
    """Not a number."""
    _set(out, DOWN, float("nan"))


@mutant("cause_not_finite", tensor=DOWN, count=1)
def one_element_is_infinite(out: Path, _: Workshop) -> None:
    """As after an overflow."""
    _set(out, DOWN, float("inf"))


@mutant("cause_one_element", tensor=DOWN, count=1)
def one_element_is_the_largest_number(out: Path, _: Workshop) -> None:
    """Beside it stands infinity, which no allowance may be measured by."""
    _set(out, DOWN, float(torch.finfo(torch.bfloat16).max))


def _set(out: Path, name: str, value: float) -> None:
    rewrite(out, lambda tensors: tensors[name].view(-1).__setitem__(99, value))


@mutant("cause_tensors_outside", worst=KEY, count=1)
def two_rows_swapped(out: Path, _: Workshop) -> None:
    """Within one tensor."""
    rewrite(out, lambda tensors: tensors.update({KEY: tensors[KEY][[1, 0, *range(2, len(tensors[KEY]))]]}))


@mutant("cause_tensors_outside", worst=EMBEDDING, count=1)
def rows_rotated_in_the_embedding(out: Path, _: Workshop) -> None:
    """Every token means its neighbour; no adapted tensor is touched, and it is no other base."""
    rewrite(out, lambda tensors: tensors.update({EMBEDDING: tensors[EMBEDDING].roll(1, 0)}))


@mutant("cause_misplaced", tensor="layers.", source="layers.")
def layers_swapped(out: Path, _: Workshop) -> None:
    """All tensors of layer 0 in layer 1, and the other way round."""

    def change(tensors: Tensors) -> None:
        before = dict(tensors)
        for name in before:
            if ".layers.0." in name:
                twin = name.replace(".layers.0.", ".layers.1.")
                tensors[name], tensors[twin] = before[twin], before[name]

    rewrite(out, change)


@mutant("cause_misplaced", tensor="gate_proj", source="up_proj", count=2)
def gate_and_up_swapped(out: Path, _: Workshop) -> None:
    """Two tensors of one shape."""

    def change(tensors: Tensors) -> None:
        gate = "model.layers.0.mlp.gate_proj.weight"
        up = gate.replace("gate", "up")
        tensors[gate], tensors[up] = tensors[up], tensors[gate]

    rewrite(out, change)


@mutant("cause_through_fp16")
def detour_through_fp16(out: Path, _: Workshop) -> None:
    """bf16 → fp16 → bf16 loses the numbers that are small."""
    rewrite(out, lambda tensors: tensors.update({name: weight.half().bfloat16() for name, weight in tensors.items()}))


# Files that are damaged, lacking or too many.


@mutant("cause_unreadable")
def shard_truncated(out: Path, _: Workshop) -> None:
    """The last 4 KiB are gone."""
    data = (out / WEIGHTS).read_bytes()
    (out / WEIGHTS).write_bytes(data[:-4096])


@mutant("cause_tensors_missing", names=KEY)
def tensor_missing(out: Path, _: Workshop) -> None:
    """A loader would make one up at random."""
    rewrite(out, lambda tensors: tensors.pop(KEY))


@mutant("cause_tensors_extra", names="model.mystery.weight")
def tensor_extra(out: Path, _: Workshop) -> None:
    """Something that the base does not have."""
    rewrite(out, lambda tensors: tensors.update({"model.mystery.weight": torch.ones(2, 2)}))


@mutant("cause_shape", name=QUERY, found="[32, 128]")
def tensor_of_another_shape(out: Path, _: Workshop) -> None:
    """As many numbers in other rows."""
    rewrite(out, lambda tensors: tensors.update({QUERY: tensors[QUERY].reshape(32, 128)}))


@mutant("cause_unreadable", what="safetensors")
def header_says_a_shape_that_its_bytes_do_not_fill(out: Path, _: Workshop) -> None:
    """The header alone is changed."""
    data = (out / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[QUERY]["shape"] = [65, 64]
    text = json.dumps(header).encode()
    (out / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@mutant("cause_config_unreadable")
def config_missing(out: Path, _: Workshop) -> None:
    """No configuration at all."""
    (out / "config.json").unlink()


@mutant("cause_pickled", names="pytorch_model.bin")
def weights_replaced_by_a_pickle(out: Path, _: Workshop) -> None:
    """A file that must not even be opened."""
    (out / WEIGHTS).rename(out / "pytorch_model.bin")


@mutant("cause_gguf", names="model-q8_0.gguf")
def only_a_gguf_export_is_there(out: Path, _: Workshop) -> None:
    """Another product, of which nothing can be said number by number."""
    (out / WEIGHTS).unlink()
    (out / "model-q8_0.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(64))


@mutant("cause_unreadable", what="bytes")
def bytes_behind_the_last_tensor(out: Path, _: Workshop) -> None:
    """A file that was written over a longer one."""
    with (out / WEIGHTS).open("ab") as file:
        file.write(bytes(1024))


@mutant("cause_unreadable", what=NORM)
def one_tensor_in_two_shards(out: Path, _: Workshop) -> None:
    """Which of the two is loaded would be chance."""
    _split(out, twice=NORM)


@mutant("cause_unreadable", what=KEY)
def index_names_a_shard_that_lacks_the_tensor(out: Path, _: Workshop) -> None:
    """The index of one export beside the shards of another."""
    _split(out)
    index = json.loads((out / INDEX).read_text())
    wrong = next(file for file in index["weight_map"].values() if file != index["weight_map"][KEY])
    index["weight_map"][KEY] = wrong
    (out / INDEX).write_text(json.dumps(index))


@mutant("cause_unreadable", what="00002-of-00002")
def one_shard_is_not_there(out: Path, _: Workshop) -> None:
    """A download that stopped half way."""
    _split(out)
    (out / "model-00002-of-00002.safetensors").unlink()


@mutant("cause_tensors_missing", names="model.")
def an_index_without_half_of_the_shards(out: Path, _: Workshop) -> None:
    """Half of the tensors are in a file that no loader is told of."""
    _split(out)
    index = json.loads((out / INDEX).read_text())
    index["weight_map"] = {n: file for n, file in index["weight_map"].items() if "00001-of" in file}
    (out / INDEX).write_text(json.dumps(index))


@mutant("cause_unreadable", what="disagree")
def shards_of_two_exports(out: Path, shop: Workshop) -> None:
    """The second shard is another merge's, that was cut at another place."""
    _split(out)
    tensors = load_file(shop.other / WEIGHTS)
    last = sorted(tensors)[len(tensors) // 2 + 2 :]
    save_file({name: tensors[name] for name in last}, out / "model-00002-of-00002.safetensors", {"format": "pt"})


@mutant("cause_quantized", method="bitsandbytes")
def merged_into_four_bits(out: Path, _: Workshop) -> None:
    """What ``merge_and_unload`` on a QLoRA base saves."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if "_proj" in name]:
            weight = tensors.pop(name)
            tensors[name] = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
            tensors[f"{name}.absmax"] = torch.ones(weight.numel() // 64)
            tensors[f"{name}.quant_map"] = torch.ones(16)

    rewrite(out, change)
    edit_json(out / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


@mutant("cause_quantized", method="GPTQ")
def quantized_by_gptq(out: Path, _: Workshop) -> None:
    """Packed integers in the place of weights."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if "_proj" in name]:
            weight = tensors.pop(name)
            for part in ("qweight", "qzeros"):
                tensors[name.replace("weight", part)] = torch.zeros(weight.shape[0] // 8, 4, dtype=torch.int32)

    rewrite(out, change)


@mutant("cause_vocabulary_padded", expected=320, found=384)
def vocabulary_padded(out: Path, _: Workshop) -> None:
    """To a multiple of 128, as trainers for clusters do; the configuration does not know."""
    rewrite(out, lambda tensors: tensors.update({EMBEDDING: _longer(tensors[EMBEDDING], 384)}))


@mutant("cause_vocabulary_padded", "cause_config", expected=320, found=384)
def vocabulary_padded_and_declared(out: Path, _: Workshop) -> None:
    """A model that loads, and can give tokens that do not exist."""
    vocabulary_padded(out, _)
    edit_json(out / "config.json", vocab_size=384)


@mutant("cause_one_element", "cause_vocabulary_padded", tensor=EMBEDDING, count=1)
def vocabulary_padded_and_a_bit_flipped(out: Path, _: Workshop) -> None:
    """Padding does not hide what is wrong in the rows that should be there."""
    flip_bit(out, EMBEDDING, 5001, 9)
    vocabulary_padded(out, _)


@mutant("cause_vocabulary_short", expected=320, found=317)
def rows_of_the_last_tokens_missing(out: Path, _: Workshop) -> None:
    """The embedding from before tokens were added."""
    rewrite(out, lambda tensors: tensors.update({EMBEDDING: tensors[EMBEDDING][:317].clone()}))


@mutant("cause_head_differs", rows=320, total=320)
def tied_head_written_out_and_changed(out: Path, _: Workshop) -> None:
    """A head of its own, where the base has none: the update of another run went into it."""
    rewrite(out, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING] * 1.01}))


@mutant("cause_adapter_beside")
def adapter_left_beside_the_weights(out: Path, shop: Workshop) -> None:
    """Transformers then loads the base and the adapter, and never these weights."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(shop.run / name, out)


def _longer(weight: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([weight, torch.zeros(rows - len(weight), weight.shape[1], dtype=weight.dtype)])


def _split(out: Path, *, twice: str | None = None) -> None:
    """Spread the one file over two, with an index; one tensor into both."""
    tensors = load_file(out / WEIGHTS)
    (out / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[: len(names) // 2]}
    parts["model-00002-of-00002.safetensors"] = names[len(names) // 2 :]
    weight_map = {name: file for file, members in parts.items() for name in members}
    for file, members in parts.items():
        more = [twice] if twice and twice not in members else []
        save_file({name: tensors[name] for name in [*members, *more]}, out / file, {"format": "pt"})
    (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# Everything that is not weights.


@mutant("cause_config", field="rms_norm_eps")
def norm_epsilon_changed(out: Path, _: Workshop) -> None:
    """The classic: 1e-6 for 1e-5."""
    edit_json(out / "config.json", rms_norm_eps=1e-5)


@mutant("cause_config", field="rope_theta")
def rope_theta_changed(out: Path, _: Workshop) -> None:
    """In both spellings."""
    edit_json(out / "config.json", rope_theta=500.0, rope_parameters={"rope_theta": 500.0, "rope_type": "default"})


@mutant("cause_config", field="rope_")
def new_spelling_of_rope_contradicts(out: Path, _: Workshop) -> None:
    """Transformers 4 would load the right model, Transformers 5 another."""
    edit_json(out / "config.json", rope_parameters={"rope_theta": 500.0, "rope_type": "default"})


@mutant("cause_config", field="rope_")
def old_spelling_of_rope_contradicts(out: Path, _: Workshop) -> None:
    """Transformers 5 would load the right model, Transformers 4 another."""
    edit_json(out / "config.json", rope_theta=500.0)


@mutant("cause_config", field="tie_word_embeddings")
def tied_head_declared_untied(out: Path, _: Workshop) -> None:
    """Then a loader makes up a head at random."""
    edit_json(out / "config.json", tie_word_embeddings=False)


def _edit_tokenizer(out: Path, change: Callable[[dict[str, object]], object]) -> None:
    document = json.loads((out / "tokenizer.json").read_text())
    change(document["model"])
    (out / "tokenizer.json").write_text(json.dumps(document))


@mutant("cause_tokenizer", where="model")
def two_vocabulary_entries_swapped(out: Path, _: Workshop) -> None:
    """Two tokens have each other's numbers."""

    def change(model: dict[str, dict[str, int]]) -> None:
        model["vocab"]["a"], model["vocab"]["e"] = model["vocab"]["e"], model["vocab"]["a"]

    _edit_tokenizer(out, change)


@mutant("cause_tokenizer", where="model")
def two_merges_swapped(out: Path, _: Workshop) -> None:
    """The last two merges of a BPE in the other order."""
    _edit_tokenizer(out, lambda model: model["merges"].append(model["merges"].pop(-2)))


@mutant("cause_tokenizer", where="eos_token")
def eos_token_changed(out: Path, _: Workshop) -> None:
    """Answers would not stop."""
    edit_json(out / "tokenizer_config.json", eos_token=SPECIAL[0])


@mutant("cause_tokenizer", names="tokenizer.json")
def tokenizer_missing(out: Path, _: Workshop) -> None:
    """No tokenizer at all."""
    (out / "tokenizer.json").unlink()


@mutant("cause_chat_template", position=15)
def template_off_by_one_character(out: Path, _: Workshop) -> None:
    """One space."""
    path = out / "chat_template.jinja"
    text = path.read_text()
    path.write_text(text[:15] + " " + text[15:])


@mutant("cause_chat_template")
def template_missing(out: Path, _: Workshop) -> None:
    """Nothing puts prompts in form."""
    (out / "chat_template.jinja").unlink()


@mutant("cause_generation_config", fields="eos_token_id")
def eos_id_of_generation_changed(out: Path, _: Workshop) -> None:
    """Answers would not stop, though the tokenizer is right."""
    edit_json(out / "generation_config.json", eos_token_id=0)


@mutant("cause_quantization_declared", field="quantization_config")
def quantization_declared_for_full_weights(out: Path, _: Workshop) -> None:
    """What a dequantized merge keeps of its base's configuration."""
    edit_json(out / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


@mutant("cause_config", field="max_position_embeddings", found="2048")
def longer_context_declared(out: Path, _: Workshop) -> None:
    """The length that was trained with, in the place of the model's own."""
    edit_json(out / "config.json", max_position_embeddings=2048)


@mutant("cause_config", field="architectures")
def another_class_declared(out: Path, _: Workshop) -> None:
    """The tower alone is loaded, without its head."""
    edit_json(out / "config.json", architectures=["LlamaModel"])


@mutant("cause_config", field="eos_token_id")
def end_of_the_configuration_is_another_token(out: Path, _: Workshop) -> None:
    """Neither the base's nor the tokenizer's."""
    edit_json(out / "config.json", eos_token_id=0)


def _edit_added(out: Path, token: str, **flags: bool) -> None:
    document = json.loads((out / "tokenizer.json").read_text())
    next(added for added in document["added_tokens"] if added["content"] == token).update(flags)
    (out / "tokenizer.json").write_text(json.dumps(document))


for _flag in ("lstrip", "rstrip", "single_word"):
    mutant("cause_tokenizer", named=f"special_token_given_{_flag}", where="added_tokens")(
        lambda out, _, flag=_flag: _edit_added(out, SPECIAL[2], **{flag: True})
    )


@mutant("cause_tokenizer", where="added_tokens")
def settings_beside_the_tokenizer_change_a_token(out: Path, _: Workshop) -> None:
    """``tokenizer.json`` is the run's own; what lies beside it makes a token take the spaces before it."""
    stated = {"content": SPECIAL[1], "lstrip": True, "normalized": False, "special": True}
    edit_json(out / "tokenizer_config.json", added_tokens_decoder={"1": stated})


def _edit_part(out: Path, part: str, value: object) -> None:
    document = json.loads((out / "tokenizer.json").read_text())
    document[part] = value
    (out / "tokenizer.json").write_text(json.dumps(document))


_STRIPPING = {
    "type": "Sequence",
    "decoders": [
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}

mutant("cause_tokenizer", named="a_normalizer_composes_letters", where="normalizer")(
    lambda out, _: _edit_part(out, "normalizer", {"type": "NFKC"})
)
mutant("cause_tokenizer", named="a_decoder_strips_spaces", where="decoder")(
    lambda out, _: _edit_part(out, "decoder", _STRIPPING)
)
mutant("cause_tokenizer", named="a_space_is_put_before_every_text", where="pre_tokenizer")(
    lambda out, _: _edit_part(
        out, "pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    )
)


def _edit_template(out: Path, old: str, new: str) -> None:
    path = out / "chat_template.jinja"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


for _named, _old, _new in (
    ("template_trims_what_people_write", "{{ m.content }}", "{{ m.content | trim }}"),
    ("template_lacks_a_line_break", "<|im_end|>\n", "<|im_end|>"),
    ("template_adds_a_system_text", "{% for m", "{% if messages[0].role != 'system' %}Be kind.{% endif %}{% for m"),
    ("template_without_the_beginning_of_an_answer", "{% if add_generation_prompt %}", "{% if false %}"),
    ("template_opens_a_thought", "assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"),
):
    mutant("cause_chat_template", named=_named)(lambda out, _, old=_old, new=_new: _edit_template(out, old, new))


@mutant("cause_config", "cause_generation_config", field="eos_token_id")
def generation_settings_missing_and_the_configuration_ends_elsewhere(out: Path, _: Workshop) -> None:
    """Answers would not stop."""
    (out / "generation_config.json").unlink()
    edit_json(out / "config.json", eos_token_id=0)


# Several at once: weights are named first.


@mutant("cause_partly_applied", "cause_chat_template", modules="layers.0.self_attn.q_proj", count=1)
def module_missing_and_template_changed(out: Path, shop: Workshop) -> None:
    """Both are named."""
    _without("layers.0.self_attn.q_proj")(out, shop)
    template_off_by_one_character(out, shop)


@mutant("cause_partly_applied", "cause_scaled", modules="model.layers.1.*", count=7)
def layer_missing_and_the_rest_scaled(out: Path, shop: Workshop) -> None:
    """A wrong factor in one layer, nothing in the other."""
    remerge(out, shop, lambda name, delta: None if ".layers.1." in name else 0.7 * delta)


@mutant("cause_scaled", factor=0.7)
def scaled_in_one_layer_only(out: Path, shop: Workshop) -> None:
    """The other layer is right."""
    remerge(out, shop, lambda name, delta: delta * (0.7 if ".layers.1." in name else 1.0))


@mutant("cause_not_applied", "cause_tokenizer", "cause_chat_template")
def base_shipped_with_tokenizer_and_template_wrong(out: Path, shop: Workshop) -> None:
    """Nothing is right."""
    adapter_never_applied(out, shop)
    eos_token_changed(out, shop)
    template_missing(out, shop)


@mutant("cause_partly_applied", "cause_one_element", modules="q_proj", count=1)
def module_missing_and_a_bit_flipped(out: Path, shop: Workshop) -> None:
    """A wrong number does not hide a missing module."""
    _without("layers.0.self_attn.q_proj")(out, shop)
    flip_bit(out, EMBEDDING, 5001, 9)


@mutant("cause_one_element", tensor=QUERY)
def bit_flipped_in_a_shard(out: Path, _: Workshop) -> None:
    """The same weights in several files."""
    tensors = load_file(out / WEIGHTS)
    (out / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({name: tensors[name] for name in members}, out / file, {"format": "pt"})
    weight_map = {name: file for file, members in parts.items() for name in members}
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    rewrite(out, lambda part: part[QUERY].view(-1).view(torch.int16)[3:4].add_(2), file=weight_map[QUERY])


@mutant("cause_merged_twice", "cause_rslora", factor=2.0, count=7)
def one_layer_twice_and_the_other_scaled_by_root_r(out: Path, shop: Workshop) -> None:
    """Two wrong factors, each in its place."""
    remerge(out, shop, lambda name, delta: delta * (2.0 if ".layers.0." in name else math.sqrt(R)))


@mutant("cause_scaled", "cause_transposed", factor=0.7)
def the_rest_scaled_and_one_update_transposed(out: Path, shop: Workshop) -> None:
    """A square tensor by itself among many."""
    remerge(out, shop, lambda name, delta: delta.T if name == QUERY else 0.7 * delta)


@mutant("cause_sign", "cause_one_element", count=7)
def one_layer_subtracted_and_a_bit_flipped_elsewhere(out: Path, shop: Workshop) -> None:
    """A single number does not hide among many."""
    remerge(out, shop, lambda name, delta: -delta if ".layers.1." in name else delta)
    flip_bit(out, EMBEDDING, 5001, 9)


@mutant("cause_other_checkpoint", "cause_misplaced", checkpoint="checkpoint-20")
def another_checkpoint_and_two_embedding_rows_apart(out: Path, shop: Workshop) -> None:
    """The older adapter, and two norms in each other's place."""
    shutil.rmtree(out)
    tunesmith_merge(shop.run, shop.base, out, checkpoint=20)
    first, second = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"
    rewrite(out, lambda tensors: tensors.update({first: tensors[second], second: tensors[first]}))


@mutant("cause_scaled", "cause_scaled", factor=0.7, count=7)
def two_layers_scaled_by_factors_of_their_own(out: Path, shop: Workshop) -> None:
    """The same mistake twice, by two measures."""
    remerge(out, shop, lambda name, delta: delta * (0.7 if ".layers.0." in name else 1.4))


@mutant("cause_one_element", tensor=DOWN, count=64)
def a_few_numbers_are_zero(out: Path, _: Workshop) -> None:
    """As where a disk lost a sector: zero has neighbours so near that it looks like its own rounding."""
    rewrite(out, lambda tensors: tensors[DOWN].view(-1)[640:704].zero_())


@mutant("cause_tensors_outside", worst=DOWN, count=1)
def a_block_of_zeros(out: Path, _: Workshop) -> None:
    """Four kilobytes that were never written."""
    rewrite(out, lambda tensors: tensors[DOWN].view(-1)[:2048].zero_())


@mutant("cause_not_finite", "cause_scaled", count=3)
def scaled_and_overflown(out: Path, shop: Workshop) -> None:
    """NaN in some numbers does not hide what became of the others."""
    remerge(out, shop, lambda _, delta: 0.7 * delta)
    rewrite(out, lambda tensors: tensors[DOWN].view(-1)[5:8].fill_(float("nan")))


def _stored_wider(dtype: torch.dtype) -> Spoil:
    def spoil(out: Path, shop: Workshop) -> None:
        shutil.rmtree(out)
        peft_merge(shop.run, shop.base, out, dtype=dtype)
        rewrite(out, lambda tensors: tensors.update({name: weight.float() for name, weight in tensors.items()}))

    return spoil


mutant("cause_stored_wider", named="merged_in_bf16_and_stored_in_float32", dtype="BF16")(_stored_wider(torch.bfloat16))
mutant("cause_stored_wider", named="merged_in_fp16_and_stored_in_float32", dtype="F16")(_stored_wider(torch.float16))


@mutant("cause_other_adapter")
def another_adapter_in_bf16_stored_in_float32(out: Path, shop: Workshop) -> None:
    """That all numbers are on the narrower grid explains nothing where they are the wrong ones."""
    another_adapter(out, shop)
    rewrite(out, lambda tensors: tensors.update({name: weight.float() for name, weight in tensors.items()}))


@mutant("cause_other_base")
def another_revision_of_the_base(out: Path, shop: Workshop) -> None:
    """So near to the right one that each number is within a few steps."""
    elsewhere = shutil.copytree(shop.base, out.parent / "elsewhere" / "base")

    def moved(tensors: Tensors) -> None:
        for name, weight in tensors.items():
            patterns = weight.view(torch.int16)
            steps = torch.randint(0, 3, patterns.shape, generator=torch.Generator().manual_seed(1))
            tensors[name] = (patterns + steps.short()).view(torch.bfloat16)

    rewrite(elsewhere, moved)
    shutil.rmtree(out)
    tunesmith_merge(shop.run, elsewhere, out)
