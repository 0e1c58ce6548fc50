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
    remerge,
    rewrite,
    tunesmith_merge,
)
from tests.tiny_models import SPECIAL, edit_json

WEIGHTS = "model.safetensors"
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
assert R / ALPHA == 0.5  # so that leaving alpha / r out is one of these
for _factor in (0.5, float(R), 1 / R, 0.7, 1.3, 0.9, 1.05, -0.4, 3.0):
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


@mutant("cause_other_base")
def another_base(out: Path, shop: Workshop) -> None:
    """The right adapter on a base of the same form."""
    shutil.rmtree(out)
    tunesmith_merge(shop.run, shop.other, out)


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


@mutant("cause_one_element", tensor=DOWN, count=1)
def one_element_is_nan(out: Path, _: Workshop) -> None:
    """Not a number."""
    _set(out, DOWN, float("nan"))


@mutant("cause_one_element", tensor=DOWN, count=1)
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


@mutant("cause_unreadable", what="pickle")
def weights_replaced_by_a_pickle(out: Path, _: Workshop) -> None:
    """A file that must not even be opened."""
    (out / WEIGHTS).rename(out / "pytorch_model.bin")


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
