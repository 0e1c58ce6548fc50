"""One batch of many variants: every row is what it is alone in plain PEFT, whatever runs beside it."""

from __future__ import annotations

import gc
import math
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from tests.models.rows_alone import END, NATS, Alone, assert_rows_alone, generate_with_logits
from tests.oracle.bases import VOCABULARY
from tests.oracle.zoo import Zoo, altered, load, randomize
from tunesmith.conversations import Text
from tunesmith.models import GenerationSettings, RowScore, VariantSet, continue_rows, score
from tunesmith.models.quiet import quiet_loading
from tunesmith.models.rows import NotRowwiseError, Routing
from tunesmith.progress import Cancellation, Progress

ROWS: Any = sys.modules["tunesmith.models.rows"]

GREEDY = GenerationSettings(greedy=True, max_new_tokens=8)
# Adapters that PEFT lets live beside each other, by their kinds in the oracle's zoo.
BESIDE = (
    ("plain", "rslora", "patterns", "patterns-rslora", "layers-to-transform", "saved-head", "saved-embedding",
     "saved-norms", "dora", "adapter-bf16"),
    ("plain", "embedding-head", "dora-embedding"),
    ("plain", "tokens"),
    ("tokens-dict",),
    ("tokens-and-saved-head",),
    ("saved-container",),
    ("lora-bias",),
    ("saved-embedding-tied", "saved-head-tied"),
    ("embedding-tied", "dora-head-tied"),
    ("head-tying", "embedding-tied"),
    ("tokens-tied",),
    ("tokens-unlike-tied",),
    ("qwen2", "dora-rslora"),
    ("gemma2",),
    ("gemma3", "gemma3-embedding"),
    ("gemma3-tokens",),
    ("gpt2", "dora-gpt2", "gpt2-lora-bias"),
    ("gpt2-embedding", "gpt2-mixed"),
    ("phi3",),
    ("gpt-neox",),
    ("bloom",),
    ("qwen3-moe-attention",),
)  # fmt: skip
# Adapters that change what is not given the batch's rows, and by which kind of module that is known.
IN_TURN = {
    "mixtral-both": "ParamWrapper",
    "mixtral-router": "ParamWrapper",
    "saved-router": "ModulesToSaveWrapper",
    "gpt-oss-both": "ParamWrapper",
    "qwen2-moe": "ParamWrapper",
}
MANY = BESIDE[0]


def texts(rows: Sequence[Sequence[int]]) -> list[Text]:
    """Token ids as text of the words' tokenizer."""
    return [Text(id=str(index), text=" ".join(f"t{token:02}" for token in row)) for index, row in enumerate(rows)]


def some_rows(count: int) -> list[list[int]]:
    """Prompts of many lengths, in no order, none of which holds the end."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(2, VOCABULARY, (3 + 5 * i % 7,), generator=generator).tolist() for i in range(count)]


def zoo_adapter(zoo: Zoo, kind: str) -> Path:
    """An adapter without the base's own embedding, which PEFT saves beside an adapter on it."""
    out = zoo.root / f"bare-{kind}"
    if not out.exists():
        altered(
            zoo.adapter(kind),
            out,
            tensors=lambda file: {name: one for name, one in file.items() if not name.endswith(".base_layer.weight")},
        )
    return out


def zoo_variants(zoo: Zoo, words: Path, kinds: Sequence[str]) -> tuple[VariantSet, Alone]:
    """Adapters of these kinds beside each other, and each of them alone."""
    base, adapters = zoo.base_of(kinds[0]), {kind: zoo_adapter(zoo, kind) for kind in kinds}
    return stacked(base, adapters, words), Alone(base, adapters)


def stacked(base: Path, adapters: dict[str, Path], words: Path) -> VariantSet:
    """Variants whose factors lie beside each other too, although they are not small against a base this tiny."""
    variants = VariantSet.load(base, adapters=adapters, tokenizer_dir=words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ROWS, "_STACKED_SHARE", math.inf)
        assert not variants.in_turn or len(adapters) == 1
    return variants


def assert_scores_alone(alone: Alone, rows: Sequence[Sequence[int]], found: dict[str, list[RowScore]]) -> None:
    """Likelihoods, most likely tokens, and KL against the base, of every row."""
    for name, scores in found.items():
        for row, item in zip(rows, scores, strict=True):
            logits = alone.logits(name, row[:-1])
            log_p, tokens = logits.double().log_softmax(-1), torch.tensor(row[1:])
            torch.testing.assert_close(
                torch.tensor(item.log_probs).double(), log_p.gather(1, tokens[:, None])[:, 0], rtol=0, atol=NATS
            )
            assert item.correct == int((logits.argmax(-1) == tokens).sum()), name
            if name == "base":
                assert item.kl is None
                continue
            base = alone.logits("base", row[:-1]).double().log_softmax(-1)
            assert item.kl == pytest.approx(float((base.exp() * (base - log_p)).sum() / len(tokens)), abs=NATS), name


@pytest.mark.parametrize("kinds", BESIDE, ids="+".join)
def test_every_kind_of_adapter_is_plain_pefts_row_by_row(zoo: Zoo, words: Path, kinds: tuple[str, ...]) -> None:
    """In one batch of all of them and the base, at every token; and when rows are scored."""
    variants, alone = zoo_variants(zoo, words, kinds)
    names = ["base", *kinds, *kinds, "base", kinds[0]]
    rows = some_rows(len(names))
    assert len(variants.companies(names)) == 1
    assert_rows_alone(alone, names, rows, *generate_with_logits(variants, names, rows, GREEDY))
    assert_scores_alone(alone, rows[:3], score(variants, ["base", *kinds], texts(rows[:3]), reference="base"))
    assert not variants.in_turn
    effects = [(alone.logits(kind, rows[0]) - alone.logits("base", rows[0])).abs().max() for kind in kinds]
    assert min(effects) > 0.1, "an adapter without an effect proves nothing"


@pytest.mark.parametrize("kind", IN_TURN)
def test_adapters_of_experts_and_routers_run_in_turn_and_are_said_to(zoo: Zoo, words: Path, kind: str) -> None:
    """Known from the kind of module or from what it is given; the answers are right either way, the base's too."""
    variants, alone = zoo_variants(zoo, words, (kind,))
    names = ["base", kind, kind, "base"]
    rows = some_rows(len(names))
    pieces = dict.fromkeys(range(4), "")

    def on_text(index: int, piece: str) -> None:
        pieces[index] += piece

    generations, steps = generate_with_logits(variants, names, rows, GREEDY, on_text=on_text)
    assert_rows_alone(alone, names, rows, generations, steps)
    assert pieces == {index: item.text for index, item in enumerate(generations)}
    assert dict(variants.in_turn) == {kind: IN_TURN[kind]}
    assert variants.companies(names) == [("base",), (kind,)]
    assert_scores_alone(alone, rows[:2], score(variants, ["base", kind], texts(rows[:2]), reference="base"))


# ---------------------------------------------------------------------------------------------------------------------
# architectures

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
MAMBA = {"mamba_d_state": 4, "mamba_expand": 2}
# Windows that the rows outgrow, soft-capped logits, scaled embeddings, convolutions, states in caches and in modules.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "sliding window": ("Mistral", {"sliding_window": 5}),
    "scaled embedding": ("Gemma", {"head_dim": 8, "tie_word_embeddings": True}),
    "soft cap, both windows": ("Gemma2", {"head_dim": 12, "sliding_window": 5, "final_logit_softcapping": 2.0}),
    "short convolutions": ("Lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "state in cache": (
        "Jamba",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_d_conv": 3, "mamba_dt_rank": 4,
         "use_mamba_kernels": False, **MAMBA},
    ),
    "state in modules": (
        "RecurrentGemma",
        {"lru_width": 32, "attention_window_size": 5, "block_types": ["recurrent", "attention"]},
    ),
    "no cache": ("Rwkv", {"attention_hidden_size": 32, "context_length": 64}),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_of_other_architectures_are_alone_too(tmp_path: Path, words: Path, name: str) -> None:
    """Of two lengths, in one batch where they may be, and leaving it one after another."""
    cls, config = ARCHITECTURES[name]
    torch.manual_seed(3)
    with quiet_loading():
        base_model = getattr(transformers, f"{cls}ForCausalLM")(
            getattr(transformers, f"{cls}Config")(**{**SMALL, **config})
        )
        base_model.save_pretrained(tmp_path / "base")
    adapters = {}
    for seed, adapter in enumerate("ab"):
        with quiet_loading():
            targets = ["key", "value", "output"] if cls == "Rwkv" else "all-linear"
            peft = get_peft_model(
                load(tmp_path / "base", "AutoModelForCausalLM"), LoraConfig(r=4, lora_alpha=6, target_modules=targets)
            )
            torch.manual_seed(seed)
            randomize(peft)
            peft.save_pretrained(tmp_path / adapter)
        adapters[adapter] = tmp_path / adapter
    alone = Alone(tmp_path / "base", adapters)
    names = ["base", "a", "a", "base", "b", "b", "a"]
    rows = [some_rows(7)[index][:3] if index in (0, 2, 5) else some_rows(7)[4] for index in range(7)]
    free = continue_rows(
        VariantSet.load(tmp_path / "base", adapters=adapters, tokenizer_dir=words), names, rows, GREEDY
    )
    transformers.GenerationConfig(eos_token_id=[free[0].token_ids[2], free[1].token_ids[1]]).save_pretrained(
        tmp_path / "base"
    )
    variants = VariantSet.load(tmp_path / "base", adapters=adapters, tokenizer_dir=words)
    generations, steps = generate_with_logits(variants, names, rows, GREEDY)
    assert len({item.tokens for item in generations}) > 1, "no row left before the others"
    assert_rows_alone(alone, names, rows, generations, steps)
    assert not variants.in_turn


# ---------------------------------------------------------------------------------------------------------------------
# compositions


@pytest.fixture(scope="module")
def many(zoo: Zoo, words: Path) -> tuple[VariantSet, Alone]:
    """Ten kinds of adapters on one base."""
    return zoo_variants(zoo, words, MANY)


ROW = st.tuples(st.sampled_from(("base", *MANY)), st.lists(st.integers(2, VOCABULARY - 1), min_size=1, max_size=63))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.lists(ROW, min_size=1, max_size=9),
    limit=st.integers(1, 6),
    rows_at_once=st.integers(1, 9),
    stacked_tokens=st.sampled_from((0, 64, 10**6)),
    ends=st.sets(st.integers(0, VOCABULARY - 1), max_size=12),
)
def test_any_batch_of_rows_is_each_row_alone(
    many: tuple[VariantSet, Alone],
    batch: list[tuple[str, list[int]]],
    limit: int,
    rows_at_once: int,
    stacked_tokens: int,
    ends: set[int],
) -> None:
    """Which variants and prompts, in which order, how padded, how limited (by the window too), and who ends when."""
    variants, alone = many
    names, rows = [name for name, _ in batch], [row for _, row in batch]
    greedy = GenerationSettings(greedy=True, max_new_tokens=limit)
    with pytest.MonkeyPatch.context() as patch, variants.active("base") as (model, _):
        patch.setattr(ROWS, "_STACKED_TOKENS", stacked_tokens)
        patch.setattr(model.generation_config, "eos_token_id", sorted(ends))
        generations, steps = generate_with_logits(variants, names, rows, greedy, rows_at_once=rows_at_once)
    assert_rows_alone(alone, names, rows, generations, steps)
    for row, item in zip(rows, generations, strict=True):
        most = min(limit, 64 - len(row))
        ended = [token in ends | {END} for token in item.token_ids]
        assert not any(ended[:-1])
        assert item.stop_reason == ("eos" if ended[-1] else "length")
        assert item.tokens == len(item.token_ids) <= most
        assert ended[-1] or item.tokens == most


def test_stacked_factors_and_pieces_agree(many: tuple[VariantSet, Alone], monkeypatch: pytest.MonkeyPatch) -> None:
    """The two ways to add what adapters add are the same numbers up to rounding, and both are used."""
    variants, _ = many
    names = ["base", *MANY]
    rows = some_rows(len(names))
    calls: list[int] = []
    original = Routing.others
    monkeypatch.setattr(Routing, "others", lambda *args: (calls.append(1), original(*args))[1])
    steps = {}
    for tokens in (0, 10**6):
        calls.clear()
        monkeypatch.setattr(ROWS, "_STACKED_TOKENS", tokens)
        _, steps[tokens] = generate_with_logits(variants, names, rows, GREEDY)
        assert bool(calls) == bool(tokens)
    for index in range(len(names)):
        torch.testing.assert_close(torch.stack(steps[0][index]), torch.stack(steps[10**6][index]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_broken_adapter_does_not_change_other_rows_by_a_bit(
    zoo: Zoo, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: str, poison: float
) -> None:
    """A training that diverged leaves NaN and infinity, which times zero is NaN."""

    def poisoned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: torch.full_like(one, poison) if factor in name else one for name, one in tensors.items()}

    if factor == "lora_B":  # which keeps factors apart, and that adds in another order
        monkeypatch.setattr(ROWS, "_STACKED_TOKENS", 0)
    base, sound = zoo.base_of("plain"), {kind: zoo_adapter(zoo, kind) for kind in ("plain", "rslora")}
    broken = altered(zoo.adapter("patterns"), tmp_path / "broken", tensors=poisoned)
    names = ["base", "plain", "third", "rslora", "third", "plain"]
    rows, found = some_rows(6), []
    for third in (zoo_adapter(zoo, "patterns"), broken):
        variants = stacked(base, {**sound, "third": third}, words)
        found.append(generate_with_logits(variants, names, rows, GREEDY))
    for index, name in enumerate(names):
        if name != "third":
            assert found[0][0][index].token_ids == found[1][0][index].token_ids
            assert torch.equal(torch.stack(found[0][1][index]), torch.stack(found[1][1][index])), name
    assert not torch.isfinite(found[1][1][2][0]).all()
    assert found[1][0][2].tokens == 8


def wrappers(model: Any) -> list[tuple[object, ...]]:
    """What a batch changes for its time: forwards, hooks, and which adapters act, of every module."""
    return [
        (
            name,
            "forward" in module.__dict__,
            len(module._forward_hooks) + len(module._forward_pre_hooks),
            list(getattr(module, "_active_adapter", [])),
            getattr(module, "_disable_adapters", None),
        )
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        else (name, "forward" in module.__dict__, len(module._forward_hooks) + len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("way", ["callback", "cancelled", "not rows", "done"])
def test_nothing_is_left_behind_however_a_generation_ends(many: tuple[VariantSet, Alone], way: str) -> None:
    """PEFT's own mixed batch leaves hooks behind after an exception, and the next call mixes without a word."""
    variants, alone = many
    names = ["base", *MANY]
    rows = some_rows(len(names))
    with variants.active("saved-norms") as (model, _):
        before = wrappers(model)
        if way == "done":
            continue_rows(variants, names, rows, GREEDY)
        elif way == "cancelled":
            cancellation = Cancellation()
            continue_rows(
                variants, names, rows, GREEDY, progress=lambda _: cancellation.cancel(), cancellation=cancellation
            )
        elif way == "callback":

            def on_text(*_: object) -> None:
                raise ZeroDivisionError

            with pytest.raises(ZeroDivisionError):
                continue_rows(variants, names, rows, GREEDY, on_text=on_text)
        else:
            with (
                pytest.raises(NotRowwiseError),
                variants.running(["base", "plain"]) as (inner, _, _),
            ):
                inner(input_ids=torch.ones(3, 2, dtype=torch.long))
        assert wrappers(model) == before
        expected = alone.logits("saved-norms", rows[0])
        assert torch.equal(model(input_ids=torch.tensor([rows[0]])).logits[0], expected)
    for name in ("base", "plain", "dora"):
        with variants.active(name) as (model, _):
            assert torch.equal(model(input_ids=torch.tensor([rows[0]])).logits[0], alone.logits(name, rows[0])), name


def test_gathered_tokens_that_are_as_many_as_rows_are_not_taken_for_rows(many: tuple[VariantSet, Alone]) -> None:
    """An expert may be given as many tokens as there are rows, in any order."""
    variants, _ = many
    with variants.running(["base", "plain", "saved-norms"]) as (model, _, _):
        for module in (model.model.layers[0].mlp.up_proj, model.model.norm):
            with pytest.raises(NotRowwiseError):
                module(torch.ones(3, 32))
    with variants.running(["plain"] * 3) as (model, _, _):
        assert model.model.layers[0].mlp.up_proj(torch.ones(5, 32)).shape == (5, 40)


def test_many_cancelled_generations_leave_nothing(many: tuple[VariantSet, Alone]) -> None:
    """No tensors, no threads: the short form of ``benchmarks/leaks.py``."""
    variants, _ = many
    names = ["base", *MANY]
    rows = some_rows(len(names))

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())

    def cancelled() -> None:
        cancellation = Cancellation()

        def progress(step: Progress) -> None:
            if step.detail.endswith("tokens"):
                cancellation.cancel()

        found = continue_rows(variants, names, rows, GREEDY, progress=progress, cancellation=cancellation)
        assert {item.stop_reason for item in found} <= {"cancelled", "eos"}

    cancelled()
    before = tensors(), threading.active_count()
    for _ in range(10):
        cancelled()
    assert (tensors(), threading.active_count()) == before
