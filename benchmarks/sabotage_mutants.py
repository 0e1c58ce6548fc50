"""Ways to spoil a merge, each a mistake that a published tool made or that a disk can make, with its true cause.

A mutant spoils a draft, a copy of a sound merge; its registration says which cause must be named first, what that must
say, and what else must be named.  Where two names are equally right, both are given.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from sabotage_shop import ALPHA, NEAREST, RANK, RUN, TRAINED_ROWS, Draft, Judgement, Tensors, pick
from safetensors.torch import load_file

from tunesmith.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tunesmith.checkpoint import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, BaseView, Checkpoint

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
GENERATION = "generation_config.json"
BLOCK = 4096

Spoil = Callable[[Draft], object]
Param = str | int | float


@dataclass(frozen=True)
class Mutant:
    """One way to spoil a merge.

    Attributes:
        name: what was done.
        spoil: does it.
        causes: codes of the causes that are right, any of which must come first.
        params: what that cause must say at least; floats to 0.1 %, texts as a part of what is said.
        then: codes that must be named too.
        kind: of which adapter the merge is.
    """

    name: str
    spoil: Spoil
    causes: tuple[str, ...]
    params: Mapping[str, Param] = field(default_factory=dict)
    then: tuple[str, ...] = ()
    kind: str = RUN

    @property
    def expected(self) -> str:
        """What must be named, for a table."""
        shown = " or ".join(code.removeprefix("cause_") for code in self.causes)
        said = ", ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else str(value) for key, value in self.params.items()
        )
        then = "".join(f" + {code.removeprefix('cause_')}" for code in self.then)
        return f"{shown}{f' ({said})' if said else ''}{then}"

    def rightly_named(self, judgement: Judgement) -> bool:
        """Whether the first cause, what it says, and those after it are right."""
        if not judgement.causes or judgement.causes[0].code not in self.causes:
            return False
        first = judgement.causes[0]
        said = all(_says(first.params.get(key), value) for key, value in self.params.items())
        return said and set(self.then) <= {cause.code for cause in judgement.causes}


MUTANTS: list[Mutant] = []


def mutant(*causes: str, then: str = "", kind: str = RUN, named: str = "", **params: Param) -> Callable[[Spoil], Spoil]:
    """Register a function as a mutant, by its own name unless another is given."""

    def register(spoil: Spoil) -> Spoil:
        name = named or spoil.__name__.replace("_", " ")
        codes = tuple(f"cause_{cause}" for cause in causes)
        follow = tuple(f"cause_{cause}" for cause in then.split())
        MUTANTS.append(Mutant(name, spoil, codes, params, follow, kind))
        return spoil

    return register


def _says(said: object, expected: Param) -> bool:
    if isinstance(expected, float):
        return isinstance(said, float) and math.isclose(said, expected, rel_tol=1e-3)
    return expected in str(said) if isinstance(expected, str) else said == expected


def _middle(draft: Draft, part: str) -> str:
    """An updated tensor in the middle of the model."""
    return pick(list(draft.updates), part)


def _twin(name: str, part: str, other: str) -> str:
    """The tensor of another module beside it, or of the next layer."""
    return name.replace(part, other)


def _next_layer(name: str) -> str:
    number = next(part for part in name.split(".") if part.isdecimal())
    return name.replace(f".{number}.", f".{int(number) + 1}.")


# What was added, and where.


@mutant("not_applied")
def adapter_never_applied(draft: Draft) -> None:
    """Keys with another prefix are passed over in silence (vLLM #34186, unsloth #611)."""
    for file in draft.base.shards:
        shutil.copy(draft.shop.base_dir / file, draft.path)


mutant("partly_applied", named="one module left out", modules="self_attn.q_proj", count=1)(
    lambda draft: draft.restore(_middle(draft, "q_proj"))
)
mutant("partly_applied", named="one layer left out", modules="layers.7.*", count=7)(
    lambda draft: draft.restore(".layers.7.")
)
mutant("partly_applied", named="up_proj left out everywhere", modules="up_proj", count=30)(
    lambda draft: draft.restore("up_proj")
)
mutant("partly_applied", named="attention alone was applied", modules="mlp", count=90)(
    lambda draft: draft.restore(".mlp.")
)
mutant("partly_applied", named="the last ten layers left out", modules="layers.20.*", count=70)(
    lambda draft: draft.restore(*(f".layers.{layer}." for layer in range(20, 30)))
)


def _scaled(factor: float) -> Spoil:
    return lambda draft: draft.remerge(lambda _, delta: factor * delta)


mutant("merged_twice", named="scaling × 2", factor=2.0)(_scaled(2))
mutant("sign", named="subtracted")(_scaled(-1))
mutant("rslora", named="scaling × √r", factor=math.sqrt(RANK))(_scaled(math.sqrt(RANK)))
mutant("rslora", named="scaling × 1/√r", factor=1 / math.sqrt(RANK))(_scaled(1 / math.sqrt(RANK)))
mutant("scaling_ignored", named="α/r left out (× ½)", factor=RANK / ALPHA)(_scaled(RANK / ALPHA))
mutant("not_divided", named="α not divided by r (× 8)", factor=float(RANK))(_scaled(RANK))
mutant("scaled", named="α left out, 1/r kept (× 1/16)", factor=1 / ALPHA)(_scaled(1 / ALPHA))
mutant("scaled", named="weight 0.95 of a merge recipe", factor=0.95)(_scaled(0.95))
mutant("scaled", named="weight 1.3 of a merge recipe", factor=1.3)(_scaled(1.3))


@mutant("merged_twice")
def merged_into_a_merge(draft: Draft) -> None:
    """The adapter again, on a base that already holds it."""
    _merge_again(draft, base=str(draft.shop.sound(draft.kind)))


@mutant("merged_twice")
def o_proj_added_twice(draft: Draft) -> None:
    """PEFT #3774, where it befalls one projection of every layer."""
    draft.remerge(lambda name, delta: 2 * delta if "o_proj" in name else None)


@mutant("other_checkpoint", checkpoint="checkpoint-")
def another_checkpoint(draft: Draft) -> None:
    """The one before the last."""
    _merge_again(draft, checkpoint=draft.shop.checkpoint)


def _merge_again(draft: Draft, **options: str) -> None:
    spare = draft.path.with_name(f"{draft.path.name}-again")
    draft.shop.merge(draft.kind, spare, rounding=draft.shop.own_rounding, **options)
    shutil.rmtree(draft.path)
    spare.rename(draft.path)


@mutant("other_adapter", count=210)
def the_adapter_of_another_run(draft: Draft) -> None:
    """Of the same form and size."""
    factors = load_file(draft.shop.other_run / ADAPTER_WEIGHTS)

    def other(name: str, _: torch.Tensor) -> torch.Tensor:
        update = draft.updates[name]
        return update.scaling * factors[update.lora_B] @ factors[update.lora_A]

    draft.remerge(other)


@mutant("transposed", tensor="q_proj", count=30)
def the_update_of_square_layers_transposed(draft: Draft) -> None:
    """Fits, and is wrong."""
    draft.remerge(lambda name, delta: delta.T if "q_proj" in name else None)


@mutant("other_module", tensor="o_proj", source="q_proj", count=2)
def the_updates_of_q_and_o_swapped(draft: Draft) -> None:
    """Two square modules of a layer were given each other's factors."""
    query = _middle(draft, "q_proj")
    output = _twin(query, "q_proj", "o_proj")
    twins = {query: output, output: query}
    draft.remerge(lambda name, _: draft.delta(twins[name]) if name in twins else None)


@mutant("other_module", tensor="layers.", source="layers.")
def the_updates_one_layer_off(draft: Draft) -> None:
    """Layers counted from one."""

    def shifted(name: str, _: torch.Tensor) -> torch.Tensor:
        after = _next_layer(name)
        return draft.delta(after if after in draft.updates else name.replace(".29.", ".0."))

    draft.remerge(shifted)


# What it was added to.


@mutant("other_base")
def another_revision_of_the_base(draft: Draft) -> None:
    """One number in fifty of every tensor is a step away."""
    generator = torch.Generator().manual_seed(1)
    for name in draft.base.tensors:
        moved = draft.tensor(name)
        moved.view(torch.int16)[torch.rand(moved.shape, generator=generator) < 0.02] ^= 1
        draft.put(name, moved)


@mutant("other_base")
def the_pretrained_model_instead_of_its_instruct_version(draft: Draft) -> None:
    """Every weight a few percent away."""
    generator = torch.Generator().manual_seed(2)
    for name in draft.base.tensors:
        start = draft.original(name).float()
        start += 0.05 * start.std() * torch.randn(start.shape, generator=generator)
        draft.put(name, (start + draft.delta(name) if name in draft.updates else start).bfloat16())


def _on_view(kind: str) -> Spoil:
    """The base as a quantized training saw it, dequantized, is merged into (unsloth, axolotl's default for QLoRA)."""

    def spoil(draft: Draft) -> None:
        view = BaseView(kind)
        draft.remerge(lambda _, delta: delta, start=lambda name: torch.from_numpy(view.rows(draft.base, name)))

    return spoil


mutant("base_dequantized", named="base dequantized from nf4", view="nf4")(_on_view("nf4"))
mutant("base_dequantized", named="base dequantized from nf4, double quantization", view="nf4-double")(
    _on_view("nf4-double")
)
mutant("base_dequantized", named="base dequantized from int8", view="int8")(_on_view("int8"))


# Roundings that are more than one.


@mutant("through_fp16")
def a_detour_through_fp16(draft: Draft) -> None:
    """Of all weights; what is small is lost."""
    for name in draft.base.tensors:
        draft.put(name, draft.tensor(name).half().bfloat16())


@mutant("tensors_outside", "beyond_neighbours")
def one_tensor_through_int8(draft: Draft) -> None:
    """Quantized row by row, and back."""
    name = _middle(draft, "down_proj")
    weight = draft.tensor(name).float()
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    draft.put(name, ((weight / step).round() * step).bfloat16())


@mutant("beyond_neighbours")
def two_bits_fewer_in_one_layer(draft: Draft) -> None:
    """The mantissa's last two bits are zero."""
    for name in draft.updates:
        if ".layers.12." in name:
            stored = draft.tensor(name)
            stored.view(torch.int16).bitwise_and_(~3)
            draft.put(name, stored)


@mutant("stored_wider")
def merged_in_bf16_and_stored_in_float32(draft: Draft) -> None:
    """What ``infer_dtype: float32`` on a merge in bf16 leaves behind: a file twice as large that holds no more."""
    draft.rewrite(lambda tensors: tensors.update({name: weight.float() for name, weight in tensors.items()}))


# Tensors in each other's places.


@mutant("misplaced", tensor="layers.", source="layers.")
def two_layers_swapped(draft: Draft) -> None:
    """All their tensors."""
    for name in [name for name in draft.base.tensors if ".layers.9." in name]:
        _swap(draft, name, _next_layer(name))


@mutant("misplaced", tensor="gate_proj", source="up_proj", count=2)
def gate_and_up_swapped(draft: Draft) -> None:
    """A fused projection, split in the other order."""
    name = _middle(draft, "gate_proj")
    _swap(draft, name, _twin(name, "gate_proj", "up_proj"))


@mutant("misplaced", tensor="k_proj", source="v_proj", count=60)
def k_and_v_swapped_everywhere(draft: Draft) -> None:
    """Likewise, of a fused attention."""
    for name in [name for name in draft.updates if "k_proj" in name]:
        _swap(draft, name, _twin(name, "k_proj", "v_proj"))


def _swap(draft: Draft, first: str, second: str) -> None:
    one, other = draft.tensor(first), draft.tensor(second)
    draft.put(first, other)
    draft.put(second, one)


@mutant("tensors_outside", worst="_proj", count=60)
def q_and_k_in_the_order_of_the_original_llama(draft: Draft) -> None:
    """RoPE's halves interleaved, as ``convert_llama_weights_to_hf`` undoes it."""
    for name in [name for name in draft.updates if "q_proj" in name or "k_proj" in name]:
        weight = draft.tensor(name)
        halves = weight.view(-1, 2, 32, weight.shape[1])
        draft.put(name, halves.transpose(1, 2).reshape(weight.shape))


@mutant("tensors_outside", worst="k_proj", count=1)
def two_rows_swapped(draft: Draft) -> None:
    """Within one tensor."""
    name = _middle(draft, "k_proj")
    weight = draft.tensor(name)
    draft.put(name, weight[[1, 0, *range(2, len(weight))]])


@mutant("tensors_outside", worst="k_proj", count=1)
def one_row_permuted(draft: Draft) -> None:
    """The right numbers of one neuron in the wrong order."""
    name = _middle(draft, "k_proj")
    weight = draft.tensor(name)
    weight[17] = weight[17].roll(1)
    draft.put(name, weight)


@mutant("tensors_outside", worst=EMBEDDING, count=1)
def every_token_means_its_neighbour(draft: Draft) -> None:
    """The embedding's rows are one off."""
    draft.put(EMBEDDING, draft.tensor(EMBEDDING).roll(1, 0))


# What a disk, a memory or a copy does.


def _flipped(part: str, bit: int) -> Spoil:
    """One bit of one number."""

    def spoil(draft: Draft) -> None:
        name = _middle(draft, part) if part.endswith("proj") else part
        weight = draft.tensor(name)
        weight.view(-1).view(torch.int16)[4321 % weight.numel()] ^= 1 << bit if bit < 15 else -(1 << 15)
        draft.put(name, weight)

    return spoil


mutant("one_element", named="lowest bit flipped, untouched tensor", tensor=EMBEDDING, count=1)(_flipped(EMBEDDING, 0))
mutant("one_element", named="lowest bit flipped, a norm", tensor=NORM, count=1)(_flipped(NORM, 0))
mutant("one_element", named="sign flipped, adapted tensor", tensor="o_proj", count=1)(_flipped("o_proj", 15))
mutant("one_element", named="exponent bit flipped, adapted tensor", tensor="o_proj", count=1)(_flipped("o_proj", 10))
mutant("one_element", named="top exponent bit flipped, untouched", tensor=EMBEDDING, count=1)(_flipped(EMBEDDING, 14))


@mutant("one_element", tensor="q_proj", count=1)
def one_element_one_ulp_outside_its_two_neighbours(draft: Draft) -> None:
    """The least damage that can be told where every number may be either neighbour."""
    _step_away(draft)


@mutant("one_element", kind=NEAREST, tensor="q_proj", count=1)
def one_element_one_ulp_from_the_nearest(draft: Draft) -> None:
    """In a merge that is the nearest everywhere else."""
    _step_away(draft)


def _step_away(draft: Draft) -> None:
    name = _middle(draft, "q_proj")
    stored, exact = draft.tensor(name), draft.exact(name)
    patterns = stored.view(torch.int16)
    below = (patterns - 1).view(torch.bfloat16)
    above_exact = (exact - stored.double()) / (stored.double() - below.double())
    rows, columns = ((stored > 0) & (above_exact > 0.2) & (above_exact < 0.45)).nonzero()[0].tolist()
    patterns[rows, columns] -= 1
    draft.put(name, stored)


def _set(part: str, value: float) -> Spoil:
    def spoil(draft: Draft) -> None:
        name = _middle(draft, part)
        weight = draft.tensor(name)
        weight.view(-1)[99] = value
        draft.put(name, weight)

    return spoil


mutant("not_finite", named="one NaN", tensor="up_proj", count=1)(_set("up_proj", math.nan))
mutant("not_finite", named="one infinity", tensor="up_proj", count=1)(_set("up_proj", math.inf))


def _block(part: str, *, of: str = "", size: int = BLOCK) -> Spoil:
    """A block of the file is zero, or another's."""

    def spoil(draft: Draft) -> None:
        merged = Checkpoint(draft.path)
        name = part if part in merged.tensors else _middle(draft, part)
        data = (draft.path / of).read_bytes()[-size:] if of else bytes(size)
        draft.patch(merged.shard_of(name), -(-merged.info(name).begin // BLOCK) * BLOCK, data)

    return spoil


mutant("tensors_outside", "damaged_block", named="4 KiB of zeros in an adapted tensor", worst="v_proj", count=1)(
    _block("v_proj")
)
mutant("tensors_outside", "damaged_block", named="4 KiB of zeros in the embedding", worst=EMBEDDING, count=1)(
    _block(EMBEDDING)
)
mutant("tensors_outside", "damaged_block", named="4 KiB of another file", worst="gate_proj", count=1)(
    _block("gate_proj", of=TOKENIZER)
)
mutant("tensors_outside", "damaged_block", named="128 KiB of another file", worst="gate_proj", count=1)(
    _block("gate_proj", of=TOKENIZER, size=32 * BLOCK)
)


@mutant("unreadable")
def the_last_4_KiB_missing(draft: Draft) -> None:  # noqa: N802
    """A copy onto a full disk."""
    _cut(draft, -BLOCK)


@mutant("unreadable")
def an_empty_weights_file(draft: Draft) -> None:
    """A name without data, as after a crash."""
    _cut(draft, 0)


def _cut(draft: Draft, size: int) -> None:
    with (draft.path / SINGLE_FILE).open("r+b") as file:
        file.truncate(size if size >= 0 else file.seek(0, 2) + size)


@mutant("tensors_outside", "tensors_zero", "damaged_block")
def the_second_half_never_downloaded(draft: Draft) -> None:
    """The file has its full length, and zeros where nothing arrived."""
    size = (draft.path / SINGLE_FILE).stat().st_size
    _cut(draft, size // 2)
    with (draft.path / SINGLE_FILE).open("r+b") as file:
        file.truncate(size)


@mutant("unreadable")
def a_bit_flipped_in_the_header(draft: Draft) -> None:
    """Of its length."""
    draft.patch(SINGLE_FILE, 2, b"\x42")


# Files and tensors that are lacking or too many.


@mutant("tensors_missing", names="k_proj")
def a_tensor_missing(draft: Draft) -> None:
    """A loader would make one up at random."""
    name = _middle(draft, "k_proj")
    draft.rewrite(lambda tensors: tensors.pop(name))


@mutant("tensors_extra", names="lora_A")
def factors_left_among_the_weights(draft: Draft) -> None:
    """Saved without being merged away (unsloth #611)."""
    draft.rewrite(lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(8, 576)}))


@mutant("unreadable")
def a_shard_missing(draft: Draft) -> None:
    """One of four."""
    (draft.path / draft.shard(4)[2]).unlink()


@mutant("unreadable")
def one_shard_twice(draft: Draft) -> None:
    """Copied over another."""
    files = draft.shard(4)
    shutil.copy(draft.path / files[0], draft.path / files[1])


@mutant("tensors_outside", "other_adapter", "partly_other_adapter", "other_module")
def a_shard_from_another_run(draft: Draft) -> None:
    """Of the same model, tuned otherwise."""
    files = draft.shard(4)
    factors = load_file(draft.shop.other_run / ADAPTER_WEIGHTS)
    for name in draft.load(files[1]):
        if name in draft.updates:
            update = draft.updates[name]
            delta = update.scaling * factors[update.lora_B] @ factors[update.lora_A]
            draft.put(name, (draft.original(name).float() + delta).bfloat16())


@mutant("other_checkpoint", checkpoint="checkpoint-")
def a_shard_of_another_checkpoint(draft: Draft) -> None:
    """Uploaded while the training went on."""
    files = draft.shard(4)
    factors = load_file(draft.shop.run / draft.shop.checkpoint / ADAPTER_WEIGHTS)
    for name in draft.load(files[3]):
        if name in draft.updates:
            update = draft.updates[name]
            delta = update.scaling * factors[update.lora_B] @ factors[update.lora_A]
            draft.put(name, (draft.original(name).float() + delta).bfloat16())


@mutant("unreadable")
def an_index_that_names_the_wrong_file(draft: Draft) -> None:
    """For one tensor."""
    files, name = draft.shard(4), _middle(draft, "q_proj")

    def change(index: dict[str, dict[str, str]]) -> None:
        index["weight_map"][name] = next(file for file in files if file != index["weight_map"][name])

    draft.edit(INDEX_FILE, change)


@mutant("shape", found="[576, 1536]")
def a_tensor_of_another_shape(draft: Draft) -> None:
    """Transposed, as a Conv1D would be."""
    name = _middle(draft, "up_proj")
    draft.rewrite(lambda tensors: tensors.update({name: tensors[name].T}))


@mutant("pickled")
def weights_as_a_pickle(draft: Draft) -> None:
    """A file that must not even be opened."""
    (draft.path / SINGLE_FILE).rename(draft.path / "pytorch_model.bin")


@mutant("adapter_beside")
def the_adapter_left_beside_the_merge(draft: Draft) -> None:
    """Transformers would load it on top."""
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copy(draft.shop.run / file, draft.path)


@mutant("vocabulary_padded", found=49216)
def the_vocabulary_padded(draft: Draft) -> None:
    """To another multiple, with rows that no tokenizer knows."""
    _resize(draft, 49216)


@mutant("vocabulary_short", found=49100)
def the_vocabulary_cut_to_the_tokenizers_length(draft: Draft) -> None:
    """The last rows were thought to be padding."""
    _resize(draft, 49100)


def _resize(draft: Draft, size: int) -> None:
    def change(tensors: Tensors) -> None:
        rows = tensors[EMBEDDING]
        tensors[EMBEDDING] = torch.cat([rows, rows[-64:] * 0])[:size]

    draft.rewrite(change)
    draft.configure(vocab_size=size)


@mutant("head_differs")
def a_head_that_is_not_the_embedding(draft: Draft) -> None:
    """Written out from a model whose tie was broken."""
    draft.rewrite(lambda tensors: tensors.update({HEAD: (tensors[EMBEDDING].float() * 1.01).bfloat16()}))


# Adapters of other kinds.


@mutant("magnitude_ignored", kind="dora", count=210)
def the_magnitude_of_dora_ignored(draft: Draft) -> None:
    """W + s·B·A, and no more."""
    draft.remerge(lambda _, delta: delta)


@mutant("partly_applied", kind="embedding", modules="embed_tokens", count=1)
def the_update_of_the_embedding_dropped(draft: Draft) -> None:
    """With a warning at most (axolotl, unsloth)."""
    draft.put(EMBEDDING, draft.original(EMBEDDING))


@mutant("tied_head", kind="embedding")
def embedding_and_head_written_as_one(draft: Draft) -> None:
    """Where the adapter changes the embedding alone (PEFT)."""
    draft.rewrite(lambda tensors: tensors.pop(HEAD))
    draft.configure(tie_word_embeddings=True)


@mutant("tied_head", kind="head")
def the_update_of_the_head_in_the_embedding(draft: Draft) -> None:
    """Likewise, where it changes the head alone (PEFT)."""
    draft.rewrite(lambda tensors: tensors.update({EMBEDDING: tensors.pop(HEAD)}))
    draft.configure(tie_word_embeddings=True)


@mutant("partly_applied", kind="norms", count=31)
def the_saved_modules_left_out(draft: Draft) -> None:
    """What the adapter stores whole (modules_to_save)."""
    for name in draft.base.tensors:
        if "input_layernorm" in name or name == NORM:
            draft.put(name, draft.original(name))


@mutant("rows_missing", kind="tokens")
def trained_token_rows_left_out(draft: Draft) -> None:
    """The base's own rows are there."""
    draft.put(EMBEDDING, draft.original(EMBEDDING))


@mutant("tensors_outside", kind="tokens", worst=EMBEDDING)
def trained_token_rows_in_each_others_places(draft: Draft) -> None:
    """The indices were sorted otherwise."""
    rows = draft.tensor(EMBEDDING)
    rows[TRAINED_ROWS] = rows[TRAINED_ROWS[1:] + TRAINED_ROWS[:1]]
    draft.put(EMBEDDING, rows)


@mutant("vocabulary_short", kind="added")
def added_rows_missing(draft: Draft) -> None:
    """The vocabulary has the base's size, the tokenizer three tokens more."""
    _resize(draft, 49152)


# Everything that is not weights.


def _configured(**fields: object) -> Spoil:
    return lambda draft: draft.configure(**fields)


mutant("config", named="norm epsilon 1e-6 for 1e-5", field="rms_norm_eps")(_configured(rms_norm_eps=1e-6))
mutant("config", named="activation gelu for silu", field="hidden_act")(_configured(hidden_act="gelu"))
mutant("config", named="another RoPE base, in both spellings", field="rope_theta")(
    _configured(rope_theta=10000.0, rope_parameters={"rope_theta": 10000.0, "rope_type": "default"})
)
mutant("config", named="RoPE scaled", field="rope")(
    _configured(rope_parameters={"rope_theta": 100000.0, "rope_type": "linear", "factor": 4.0})
)
mutant("config", named="the old spelling of RoPE contradicts the new", field="rope_")(_configured(rope_theta=10000.0))
mutant("config", named="a tied head declared untied, and none there", field="tie_word_embeddings")(
    _configured(tie_word_embeddings=False)
)
mutant("config", named="end of text of another model", field="eos_token_id")(_configured(eos_token_id=0))
mutant("quantization_declared", named="quantization_config left over from QLoRA", field="quantization_config")(
    _configured(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
)


@mutant("config_unreadable")
def config_missing(draft: Draft) -> None:
    """No configuration at all."""
    (draft.path / CONFIG_FILE).unlink()


@mutant("tokenizer", where="model")
def two_merges_of_the_tokenizer_swapped(draft: Draft) -> None:
    """The last two of the BPE."""
    draft.edit(TOKENIZER, lambda document: document["model"]["merges"].append(document["model"]["merges"].pop(-2)))


@mutant("tokenizer", where="model")
def two_entries_of_the_vocabulary_swapped(draft: Draft) -> None:
    """Two tokens have each other's numbers."""

    def change(document: dict[str, dict[str, dict[str, int]]]) -> None:
        vocabulary = document["model"]["vocab"]
        vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]

    draft.edit(TOKENIZER, change)


@mutant("tokenizer", where="normalizer")
def a_tokenizer_that_lowers_the_case(draft: Draft) -> None:
    """Converted with a default that the run's does not have."""
    draft.edit(TOKENIZER, lambda document: document.update(normalizer={"type": "Lowercase"}))


@mutant("tokenizer", where="eos_token")
def the_end_of_text_of_the_tokenizer_changed(draft: Draft) -> None:
    """Answers would not stop."""
    draft.edit(SETTINGS, lambda settings: settings.update({"eos_token": "<|endoftext|>"}))


@mutant("tokenizer", kind="added")
def the_tokenizer_of_the_base(draft: Draft) -> None:
    """Without the tokens that the run added."""
    for file in (TOKENIZER, SETTINGS):
        shutil.copy(draft.shop.base_dir / file, draft.path)


@mutant("tokenizer", names=TOKENIZER)
def tokenizer_missing(draft: Draft) -> None:
    """Not saved with the model."""
    (draft.path / TOKENIZER).unlink()


def _template(change: Callable[[str], str]) -> Spoil:
    def spoil(draft: Draft) -> None:
        path = draft.path / TEMPLATE
        path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")

    return spoil


mutant("chat_template", named="template one space off")(
    _template(lambda text: text.replace("system\n", "system \n", 1))
)
mutant("chat_template", named="template one full stop off")(_template(lambda text: text.replace("Face<", "Face.<", 1)))
mutant("chat_template", named="template without its default system message")(
    _template(lambda text: text[text.index("{% endif %}") :].replace("{% endif %}", "{% for message in messages %}", 1))
)


@mutant("chat_template")
def template_missing(draft: Draft) -> None:
    """Nothing puts prompts in form."""
    (draft.path / TEMPLATE).unlink()


@mutant("generation_config", fields="eos_token_id")
def the_end_of_text_of_the_decoding_settings_changed(draft: Draft) -> None:
    """Answers would not stop, though the tokenizer is right."""
    draft.edit(GENERATION, lambda settings: settings.update(eos_token_id=0))


# Several at once.


@mutant("partly_applied", then="chat_template", modules="q_proj", count=1)
def a_module_left_out_and_the_template_changed(draft: Draft) -> None:
    """Both are named."""
    draft.restore(_middle(draft, "q_proj"))
    _template(lambda text: text.replace("system\n", "system \n", 1))(draft)


@mutant("partly_applied", then="scaled", modules="layers.7.*", count=7)
def a_layer_left_out_and_the_rest_scaled(draft: Draft) -> None:
    """Nothing in one, too little in the others."""
    draft.remerge(lambda name, delta: 0 * delta if ".layers.7." in name else 0.7 * delta)


@mutant("other_checkpoint", then="config", checkpoint="checkpoint-")
def another_checkpoint_with_another_epsilon(draft: Draft) -> None:
    """Weights and configuration."""
    another_checkpoint(draft)
    draft.configure(rms_norm_eps=1e-6)


@mutant("partly_applied", then="one_element", modules="q_proj", count=1)
def a_module_left_out_and_a_bit_flipped(draft: Draft) -> None:
    """A wrong number does not hide a missing module."""
    draft.restore(_middle(draft, "q_proj"))
    _flipped(EMBEDDING, 9)(draft)


@mutant("misplaced", "merged_twice", then="misplaced merged_twice")
def gate_and_up_swapped_and_o_proj_added_twice(draft: Draft) -> None:
    """Two mistakes in the weights, in different tensors."""
    o_proj_added_twice(draft)
    gate_and_up_swapped(draft)


@mutant("not_applied", then="tokenizer chat_template")
def the_base_shipped_with_tokenizer_and_template_wrong(draft: Draft) -> None:
    """Nothing is right."""
    adapter_never_applied(draft)
    the_end_of_text_of_the_tokenizer_changed(draft)
    template_missing(draft)


@mutant("unreadable", then="generation_config")
def a_file_cut_off_and_the_end_of_text_changed(draft: Draft) -> None:
    """What can still be read is still looked at."""
    the_last_4_KiB_missing(draft)
    the_end_of_text_of_the_decoding_settings_changed(draft)
