"""generate: what is said, when it stops, and that nothing else shows."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tests.tiny_models import SPECIAL, WINDOW, TinyRun, build_tokenizer, chat, edit_json
from tunesmith.conversations import Message, encode_prompt
from tunesmith.errors import DataError, PromptError
from tunesmith.models import Generation, GenerationSettings, VariantSet, generate
from tunesmith.progress import Cancellation, Progress

GREEDY = GenerationSettings(greedy=True, max_new_tokens=24)
PROMPTS = [chat("hi"), chat("a longer question"), chat("one", "two", "three"), chat("猫?"), chat("x" * 50)]
EOS = {0, 2}


def said(generations: list[Generation]) -> list[tuple[object, ...]]:
    """What does not depend on time."""
    return [(item.text, item.token_ids, item.stop_reason) for item in generations]


def naive_greedy(variants: VariantSet, name: str, prompt: tuple[Message, ...], limit: int) -> tuple[int, ...]:
    """The oracle: one argmax after the other, with no cache, no batch and no library generator."""
    with variants.active(name) as (model, tokenizer):
        ids = encode_prompt(tokenizer, prompt)
        start = len(ids)
        while len(ids) < start + limit and not (len(ids) > start and ids[-1] in EOS):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[start:])


@pytest.fixture
def ends_soon(tiny: TinyRun, tmp_path: Path) -> VariantSet:
    """A model whose next token's score hangs on the last: it counts a→b→c, and ends after ``c``."""
    base = shutil.copytree(tiny.base, tmp_path / "ends-soon")
    variants = VariantSet.load(base, adapters={}, tokenizer_dir=base)
    with variants.active("base") as (model, tokenizer):
        a, b, c = tokenizer("abc", add_special_tokens=False)["input_ids"]
        follow = {a: b, b: c, c: 2, 2: c}

        def forward(*_: Any, input_ids: torch.Tensor, **__: Any) -> Any:
            logits = torch.zeros(*input_ids.shape, len(tokenizer))
            for row, ids in enumerate(input_ids.tolist()):
                for place, token in enumerate(ids):
                    logits[row, place, follow.get(token, a)] = 50.0
            return type("Output", (dict,), {"logits": logits, "__getattr__": dict.get})(logits=logits)

        model.forward = forward
    return variants


@pytest.mark.parametrize("name", ["base", "final", "checkpoint-10", "merged"])
def test_greedy_equals_a_naive_loop_of_argmax(variants: VariantSet, name: str) -> None:
    """Left padding and the cache change nothing, in a batch of different lengths."""
    generations = generate(variants, name, PROMPTS, GREEDY)
    assert [item.token_ids for item in generations] == [naive_greedy(variants, name, p, 24) for p in PROMPTS]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_greedy_rows_do_not_depend_on_their_batch(variants: VariantSet, batch_size: int) -> None:
    """One at a time or together."""
    assert said(generate(variants, "final", PROMPTS, GREEDY, batch_size=batch_size)) == said(
        generate(variants, "final", PROMPTS, GREEDY, batch_size=8)
    )


def test_length_stops_at_the_limit(variants: VariantSet) -> None:
    """Exactly."""
    (item,) = generate(variants, "base", PROMPTS[:1], GenerationSettings(greedy=True, max_new_tokens=3))
    assert (item.stop_reason, len(item.token_ids)) == ("length", 3)


def test_eos_ends_each_row_by_itself_and_is_counted_but_not_shown(ends_soon: VariantSet) -> None:
    """The template's end-of-turn token ends an answer, though neither config nor tokenizer names it as eos."""
    (item,) = generate(ends_soon, "base", [chat("hi")], GREEDY)
    assert (item.stop_reason, item.text, item.token_ids[-1]) == ("eos", "abc", 2)
    assert len(item.token_ids) == 4


@pytest.mark.parametrize("place", ["generation_config", "tokenizer"])
def test_every_declared_eos_ends_an_answer(tiny: TinyRun, tmp_path: Path, place: str) -> None:
    """The model's list of eos ids, and the tokenizer's own."""
    plain = VariantSet.load(tiny.base, adapters={}, tokenizer_dir=tiny.base)
    (free,) = generate(plain, "base", PROMPTS[:1], GREEDY)
    stop = free.token_ids[5]
    base = shutil.copytree(tiny.base, tmp_path / "base")
    if place == "generation_config":
        edit_json(base / "generation_config.json", eos_token_id=[0, stop])
    else:
        tokenizer = build_tokenizer()
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop)
        tokenizer.save_pretrained(base)
    variants = VariantSet.load(base, adapters={}, tokenizer_dir=base)
    (item,) = generate(variants, "base", PROMPTS[:1], GREEDY)
    assert item.stop_reason == "eos"
    assert item.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]


def test_sampling_settings_of_the_model_are_not_inherited(tiny: TinyRun, tmp_path: Path) -> None:
    """A shipped generation_config with penalties and its own sampling changes nothing, and is put back."""
    base = shutil.copytree(tiny.base, tmp_path / "base")
    edit_json(
        base / "generation_config.json",
        do_sample=True,
        temperature=3.0,
        top_k=2,
        repetition_penalty=5.0,
        no_repeat_ngram_size=2,
        max_length=20,
        suppress_tokens=[5, 6, 7],
    )
    odd = VariantSet.load(base, adapters={}, tokenizer_dir=base)
    plain = VariantSet.load(tiny.base, adapters={}, tokenizer_dir=tiny.base)
    sampled = GenerationSettings(max_new_tokens=24, temperature=1.0, top_p=1.0)
    for settings in (GREEDY, sampled):
        assert said(generate(odd, "base", PROMPTS, settings)) == said(generate(plain, "base", PROMPTS, settings))
    with odd.active("base") as (model, _):
        assert model.generation_config.no_repeat_ngram_size == 2


def test_all_tokens_can_be_drawn_unless_top_k_says_otherwise(variants: VariantSet) -> None:
    """Transformers would draw from 50 where nothing is said."""
    hot = GenerationSettings(max_new_tokens=1, temperature=100.0, top_p=1.0)
    generations = generate(variants, "base", [chat("hi")] * 400, hot, batch_size=400)
    assert len({item.token_ids[0] for item in generations}) > 120
    one = hot.model_copy(update={"top_k": 1, "max_new_tokens": 24})
    assert said(generate(variants, "base", PROMPTS, one)) == said(generate(variants, "base", PROMPTS, GREEDY))


def test_the_same_seed_gives_the_same_text_and_leaves_the_process_alone(variants: VariantSet) -> None:
    """Another seed gives another, and the caller's random numbers go on as if nothing had happened."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    settings = GenerationSettings(max_new_tokens=24, temperature=1.5)
    first = said(generate(variants, "final", PROMPTS, settings))
    assert torch.equal(torch.rand(3), expected)
    assert said(generate(variants, "final", PROMPTS, settings)) == first
    assert said(generate(variants, "final", PROMPTS, settings.model_copy(update={"seed": 1}))) != first


def test_temperature_zero_is_greedy(variants: VariantSet) -> None:
    """As every chat API has it."""
    zero = GenerationSettings(max_new_tokens=24, temperature=0)
    assert said(generate(variants, "base", PROMPTS, zero)) == said(generate(variants, "base", PROMPTS, GREEDY))


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"x": 1}])
def test_settings_without_a_meaning_are_refused(wrong: dict[str, Any]) -> None:
    """When they are made, not when they are used."""
    with pytest.raises(ValidationError):
        GenerationSettings(**wrong)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_streamed_pieces_joined_are_the_text(variants: VariantSet, batch_size: int) -> None:
    """Random bytes, so many half characters, which never show in the middle of a valid one."""
    pieces: dict[int, str] = dict.fromkeys(range(len(PROMPTS)), "")

    def on_text(index: int, piece: str) -> None:
        assert piece
        pieces[index] += piece

    settings = GenerationSettings(max_new_tokens=40, temperature=2.0)
    generations = generate(variants, "base", PROMPTS, settings, on_text=on_text, batch_size=batch_size)
    assert pieces == {index: item.text for index, item in enumerate(generations)}
    assert not any(token in item.text for token in SPECIAL for item in generations)


def test_cancelling_stops_within_one_token_and_keeps_what_was_said(variants: VariantSet) -> None:
    """From another thread's point of view: the flag is read after every token."""
    cancellation = Cancellation()
    steps: list[int] = []

    def on_progress(step: Progress) -> None:
        if step.detail.endswith("tokens"):
            steps.append(int(step.detail.split()[-2]))
            if len(steps) == 3:
                cancellation.cancel()

    settings = GenerationSettings(greedy=True, max_new_tokens=200)
    generations = generate(
        variants, "final", PROMPTS, settings, progress=on_progress, cancellation=cancellation, batch_size=1
    )
    expected = generate(variants, "final", PROMPTS[:1], GREEDY)[0]
    assert 3 <= len(generations[0].token_ids) <= 4
    assert generations[0].token_ids == expected.token_ids[: len(generations[0].token_ids)]
    assert [item.stop_reason for item in generations] == ["cancelled"] * len(PROMPTS)
    assert said(generations[1:]) == [("", (), "cancelled")] * (len(PROMPTS) - 1)


def test_cancelling_before_the_start_generates_nothing(variants: VariantSet) -> None:
    """Not one token."""
    cancellation = Cancellation()
    cancellation.cancel()
    assert said(generate(variants, "base", PROMPTS[:2], cancellation=cancellation)) == [("", (), "cancelled")] * 2


def test_a_finished_row_stays_finished_when_others_are_cancelled(ends_soon: VariantSet) -> None:
    """``eos`` is what happened to it."""
    cancellation = Cancellation()

    def on_text(_: int, piece: str) -> None:
        if piece == "c":
            cancellation.cancel()

    prompts = [chat("hi"), (Message(role="user", content="hi"),)]
    generations = generate(ends_soon, "base", prompts, GREEDY, on_text=on_text, cancellation=cancellation)
    assert {item.stop_reason for item in generations} == {"eos"}


def test_a_prompt_without_room_is_refused_with_its_length_and_the_window(variants: VariantSet) -> None:
    """Before anything is generated, and every such prompt."""
    prompts = [chat("x"), chat("x" * WINDOW), chat("y" * WINDOW)]
    with pytest.raises(PromptError, match=r"(?s)prompt 1: \d+ tokens.*prompt 2.*512"):
        generate(variants, "base", prompts, GREEDY)


def test_the_limit_is_cut_to_the_room_that_is_left(variants: VariantSet) -> None:
    """For the long prompt only; the short one beside it keeps its limit."""
    with variants.active("base") as (_, tokenizer):
        overhead = len(encode_prompt(tokenizer, chat("")))
    long = chat("x" * (WINDOW - overhead - 5))
    settings = GREEDY.model_copy(update={"max_new_tokens": 12})
    short_item, long_item = generate(variants, "base", [chat("hi"), long], settings)
    for item, limit in ((short_item, 12), (long_item, 5)):
        assert len(item.token_ids) == limit or item.stop_reason == "eos"
        assert len(item.token_ids) <= limit


def test_an_error_in_a_callback_comes_out_and_leaves_the_variants_usable(variants: VariantSet) -> None:
    """The next generation is as if it had not happened."""
    expected = said(generate(variants, "base", PROMPTS, GREEDY))

    def on_text(_: int, __: str) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        generate(variants, "final", PROMPTS, GREEDY, on_text=on_text)
    assert said(generate(variants, "base", PROMPTS, GREEDY)) == expected


def test_times_are_told(variants: VariantSet) -> None:
    """The first token comes no later than the last."""
    (item,) = generate(variants, "base", PROMPTS[:1], GenerationSettings(greedy=True, max_new_tokens=5))
    assert item.time_to_first_token_s is not None
    assert 0 < item.time_to_first_token_s <= item.seconds
    assert item.tokens_per_s is not None
    assert item.tokens_per_s > 0


def test_progress_counts_prompts(variants: VariantSet) -> None:
    """After every token, and up to all of them."""
    seen: list[Progress] = []
    generate(variants, "base", PROMPTS, GREEDY, progress=seen.append, batch_size=2)
    assert {(step.stage, step.total, step.unit) for step in seen} == {("generate", 5, "prompts")}
    assert [step.done for step in seen] == sorted(step.done for step in seen)
    assert seen[-1].done == 5
    assert len(seen) > 20


def test_no_template_is_a_data_error(tiny: TinyRun, tmp_path: Path) -> None:
    """A conversation cannot be rendered then."""
    base = shutil.copytree(tiny.base, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    variants = VariantSet.load(base, adapters={}, tokenizer_dir=base)
    with pytest.raises(DataError, match="chat template"):
        generate(variants, "base", PROMPTS, GREEDY)


def test_nothing_is_written_to_the_terminal(variants: VariantSet, capfd: pytest.CaptureFixture[str]) -> None:
    """Greedy and sampled, alone and batched, no prompts at all."""
    for settings in (GREEDY, GenerationSettings(max_new_tokens=4)):
        for batch_size in (1, 4):
            generate(variants, "merged", PROMPTS, settings, batch_size=batch_size)
    assert generate(variants, "base", []) == []
    assert capfd.readouterr() == ("", "")


def test_two_threads_do_not_disturb_each_other(variants: VariantSet) -> None:
    """Each gets its own variant's answers."""
    expected = {name: said(generate(variants, name, PROMPTS, GREEDY)) for name in ("base", "final")}
    results: dict[str, object] = {}
    threads = [
        threading.Thread(
            target=lambda name=name: results.update({name: said(generate(variants, name, PROMPTS, GREEDY))})
        )
        for name in expected
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == expected
