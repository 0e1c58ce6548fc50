"""generate: what is said, when it stops, and that nothing else shows."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tests.tiny_models import SPECIAL, WINDOW, TinyRun, build_tokenizer, chat, edit_json
from tunesmith.conversations import Message, encode_prompt
from tunesmith.errors import DataError, PromptError
from tunesmith.models import Generation, GenerationSettings, Request, VariantSet, generate
from tunesmith.models.rows import NotRowwiseError
from tunesmith.progress import Cancellation, Progress

BATCH: Any = sys.modules["tunesmith.models.generate"]._Batch  # the package's attribute is the function

GREEDY = GenerationSettings(greedy=True, max_new_tokens=24)
PROMPTS = [chat("hi"), chat("a longer question"), chat("one", "two", "three"), chat("猫?"), chat("x" * 50)]
EOS = {0, 2}


def ask(
    variants: VariantSet,
    name: str,
    prompts: Sequence[tuple[Message, ...]],
    settings: GenerationSettings | None = None,
    **changes: Any,
) -> list[Generation]:
    """Every prompt for one variant."""
    return generate(variants, [Request(name, prompt) for prompt in prompts], settings, **changes)


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
    generations = ask(variants, name, PROMPTS, GREEDY)
    assert [item.token_ids for item in generations] == [naive_greedy(variants, name, p, 24) for p in PROMPTS]


@pytest.mark.parametrize("rows_at_once", [1, 4])
def test_greedy_rows_do_not_depend_on_their_batch(variants: VariantSet, rows_at_once: int) -> None:
    """One at a time or together."""
    assert said(ask(variants, "final", PROMPTS, GREEDY, rows_at_once=rows_at_once)) == said(
        ask(variants, "final", PROMPTS, GREEDY, rows_at_once=8)
    )


def test_length_stops_at_the_limit(variants: VariantSet) -> None:
    """Exactly."""
    (item,) = ask(variants, "base", PROMPTS[:1], GenerationSettings(greedy=True, max_new_tokens=3))
    assert (item.stop_reason, len(item.token_ids)) == ("length", 3)


def test_eos_ends_each_row_by_itself_and_is_counted_but_not_shown(ends_soon: VariantSet) -> None:
    """The template's end-of-turn token ends an answer, though neither config nor tokenizer names it as eos."""
    (item,) = ask(ends_soon, "base", [chat("hi")], GREEDY)
    assert (item.stop_reason, item.text, item.token_ids[-1]) == ("eos", "abc", 2)
    assert len(item.token_ids) == 4


@pytest.mark.parametrize("place", ["generation_config", "tokenizer"])
def test_every_declared_eos_ends_an_answer(tiny: TinyRun, tmp_path: Path, place: str) -> None:
    """The model's list of eos ids, and the tokenizer's own."""
    plain = VariantSet.load(tiny.base, adapters={}, tokenizer_dir=tiny.base)
    (free,) = ask(plain, "base", PROMPTS[:1], GREEDY)
    stop = free.token_ids[5]
    base = shutil.copytree(tiny.base, tmp_path / "base")
    if place == "generation_config":
        edit_json(base / "generation_config.json", eos_token_id=[0, stop])
    else:
        tokenizer = build_tokenizer()
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop)
        tokenizer.save_pretrained(base)
    variants = VariantSet.load(base, adapters={}, tokenizer_dir=base)
    (item,) = ask(variants, "base", PROMPTS[:1], GREEDY)
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
        assert said(ask(odd, "base", PROMPTS, settings)) == said(ask(plain, "base", PROMPTS, settings))
    with odd.active("base") as (model, _):
        assert model.generation_config.no_repeat_ngram_size == 2


def test_all_tokens_can_be_drawn_unless_top_k_says_otherwise(variants: VariantSet) -> None:
    """Transformers would draw from 50 where nothing is said."""
    hot = GenerationSettings(max_new_tokens=1, temperature=100.0, top_p=1.0)
    generations = ask(variants, "base", [chat("hi")] * 400, hot, rows_at_once=400)
    assert len({item.token_ids[0] for item in generations}) > 120
    one = hot.model_copy(update={"top_k": 1, "max_new_tokens": 24})
    assert said(ask(variants, "base", PROMPTS, one)) == said(ask(variants, "base", PROMPTS, GREEDY))


def test_the_same_seed_gives_the_same_text_and_leaves_the_process_alone(variants: VariantSet) -> None:
    """Another seed gives another, and the caller's random numbers go on as if nothing had happened."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    settings = GenerationSettings(max_new_tokens=24, temperature=1.5)
    first = said(ask(variants, "final", PROMPTS, settings))
    assert torch.equal(torch.rand(3), expected)
    assert said(ask(variants, "final", PROMPTS, settings)) == first
    assert said(ask(variants, "final", PROMPTS, settings.model_copy(update={"seed": 1}))) != first


def test_temperature_zero_is_greedy(variants: VariantSet) -> None:
    """As every chat API has it."""
    zero = GenerationSettings(max_new_tokens=24, temperature=0)
    assert said(ask(variants, "base", PROMPTS, zero)) == said(ask(variants, "base", PROMPTS, GREEDY))


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"x": 1}])
def test_settings_without_a_meaning_are_refused(wrong: dict[str, Any]) -> None:
    """When they are made, not when they are used."""
    with pytest.raises(ValidationError):
        GenerationSettings(**wrong)


@pytest.mark.parametrize("rows_at_once", [1, 3])
def test_streamed_pieces_joined_are_the_text(variants: VariantSet, rows_at_once: int) -> None:
    """Random bytes, so many half characters, which never show in the middle of a valid one."""
    pieces: dict[int, str] = dict.fromkeys(range(len(PROMPTS)), "")

    def on_text(index: int, piece: str) -> None:
        assert piece
        pieces[index] += piece

    settings = GenerationSettings(max_new_tokens=40, temperature=2.0)
    generations = ask(variants, "base", PROMPTS, settings, on_text=on_text, rows_at_once=rows_at_once)
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
    generations = ask(
        variants, "final", PROMPTS, settings, progress=on_progress, cancellation=cancellation, rows_at_once=1
    )
    expected = ask(variants, "final", PROMPTS[:1], GREEDY)[0]
    assert 3 <= len(generations[0].token_ids) <= 4
    assert generations[0].token_ids == expected.token_ids[: len(generations[0].token_ids)]
    assert [item.stop_reason for item in generations] == ["cancelled"] * len(PROMPTS)
    assert said(generations[1:]) == [("", (), "cancelled")] * (len(PROMPTS) - 1)


def test_cancelling_before_the_start_generates_nothing(variants: VariantSet) -> None:
    """Not one token."""
    cancellation = Cancellation()
    cancellation.cancel()
    assert said(ask(variants, "base", PROMPTS[:2], cancellation=cancellation)) == [("", (), "cancelled")] * 2


def test_a_finished_row_stays_finished_when_others_are_cancelled(ends_soon: VariantSet) -> None:
    """``eos`` is what happened to it; the other had one token to go."""
    cancellation = Cancellation()
    done: list[int] = []

    def on_text(index: int, piece: str) -> None:
        if (index, piece) == (0, "c"):
            cancellation.cancel()

    generations = generate(
        ends_soon,
        [Request("base", "a"), Request("base", "b")],
        GREEDY,
        on_text=on_text,
        on_done=lambda index, _: done.append(index),
        cancellation=cancellation,
    )
    assert said(generations) == [("bc", generations[0].token_ids, "cancelled"), ("c", generations[1].token_ids, "eos")]
    assert done == [1], "a cancelled answer is not done"


def test_a_prompt_without_room_is_refused_with_its_length_and_the_window(variants: VariantSet) -> None:
    """Before anything is generated, and every such prompt."""
    prompts = [chat("x"), chat("x" * WINDOW), chat("y" * WINDOW)]
    with pytest.raises(PromptError, match=r"(?s)prompt 1: \d+ tokens.*prompt 2.*512"):
        ask(variants, "base", prompts, GREEDY)


def test_the_limit_is_cut_to_the_room_that_is_left(variants: VariantSet) -> None:
    """For the long prompt only; the short one beside it keeps its limit."""
    with variants.active("base") as (_, tokenizer):
        overhead = len(encode_prompt(tokenizer, chat("")))
    long = chat("x" * (WINDOW - overhead - 5))
    settings = GREEDY.model_copy(update={"max_new_tokens": 12})
    short_item, long_item = ask(variants, "base", [chat("hi"), long], settings)
    for item, limit in ((short_item, 12), (long_item, 5)):
        assert len(item.token_ids) == limit or item.stop_reason == "eos"
        assert len(item.token_ids) <= limit


def test_an_error_in_a_callback_comes_out_and_leaves_the_variants_usable(variants: VariantSet) -> None:
    """The next generation is as if it had not happened."""
    expected = said(ask(variants, "base", PROMPTS, GREEDY))

    def on_text(_: int, __: str) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ask(variants, "final", PROMPTS, GREEDY, on_text=on_text)
    assert said(ask(variants, "base", PROMPTS, GREEDY)) == expected


def test_times_are_told(variants: VariantSet) -> None:
    """The first token comes no later than the last."""
    (item,) = ask(variants, "base", PROMPTS[:1], GenerationSettings(greedy=True, max_new_tokens=5))
    assert item.time_to_first_token_s is not None
    assert 0 < item.time_to_first_token_s <= item.seconds
    assert item.tokens_per_s is not None
    assert item.tokens_per_s > 0


def test_progress_counts_prompts(variants: VariantSet) -> None:
    """After every token, and up to all of them."""
    seen: list[Progress] = []
    ask(variants, "base", PROMPTS, GREEDY, progress=seen.append, rows_at_once=2)
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
        ask(variants, "base", PROMPTS, GREEDY)


def test_nothing_is_written_to_the_terminal(variants: VariantSet, capfd: pytest.CaptureFixture[str]) -> None:
    """Greedy and sampled, alone and batched, no prompts at all."""
    for settings in (GREEDY, GenerationSettings(max_new_tokens=4)):
        for rows_at_once in (1, 4):
            ask(variants, "merged", PROMPTS, settings, rows_at_once=rows_at_once)
    assert ask(variants, "base", []) == []
    assert capfd.readouterr() == ("", "")


def test_two_threads_do_not_disturb_each_other(variants: VariantSet) -> None:
    """Each gets its own variant's answers."""
    expected = {name: said(ask(variants, name, PROMPTS, GREEDY)) for name in ("base", "final")}
    results: dict[str, object] = {}
    threads = [
        threading.Thread(target=lambda name=name: results.update({name: said(ask(variants, name, PROMPTS, GREEDY))}))
        for name in expected
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == expected


# ---------------------------------------------------------------------------------------------------------------------
# several variants at once, and what ends an answer


def test_requests_of_all_variants_are_answered_in_their_order(variants: VariantSet) -> None:
    """Adapters, base and a full model, mixed; each as if it had been asked alone, and told once when it is done."""
    names = ["merged", "base", "final", "checkpoint-10", "base"]
    requests = [Request(name, prompt) for prompt in PROMPTS for name in names]
    done: dict[int, Generation] = {}
    found = generate(variants, requests, GREEDY, on_done=lambda index, item: done.update({index: item}), rows_at_once=7)
    assert [done[index] for index in range(len(requests))] == found
    alone = {name: said(ask(variants, name, PROMPTS, GREEDY, rows_at_once=1)) for name in set(names)}
    assert said(found) == [alone[name][place] for place in range(len(PROMPTS)) for name in names]


def test_a_plain_text_is_gone_on_from_as_it_is(variants: VariantSet) -> None:
    """No template; an empty one has nothing to go on from."""
    (item,) = generate(variants, [Request("final", "abc")], GREEDY)
    with variants.active("final") as (model, tokenizer):
        ids = tokenizer("abc")["input_ids"]
        assert item.prompt_tokens == len(ids) == 3
        assert item.token_ids[0] == int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    with pytest.raises(DataError, match="empty text"):
        generate(variants, [Request("final", "")], GREEDY)


def test_prompt_and_answer_are_counted(variants: VariantSet) -> None:
    """In tokens, the end included; an answer that never began has no times."""
    (item,) = ask(variants, "base", PROMPTS[:1], GREEDY)
    assert item.prompt_tokens == len(encode_prompt(variants.tokenizer("base"), PROMPTS[0]))
    assert item.tokens == len(item.token_ids)
    cancellation = Cancellation()
    cancellation.cancel()
    (none,) = ask(variants, "base", PROMPTS[:1], GREEDY, cancellation=cancellation)
    assert (none.tokens, none.time_to_first_token_s, none.tokens_per_s) == (0, None, None)


@pytest.fixture
def says(tiny: TinyRun) -> Callable[[str], VariantSet]:
    """A model that says a text byte by byte, whatever it is asked with a prompt of one token, and then ends."""

    def make(text: str) -> VariantSet:
        variants = VariantSet.load(tiny.base, adapters={}, tokenizer_dir=tiny.base)
        with variants.active("base") as (model, tokenizer):
            ids = [*tokenizer(text)["input_ids"], 0]

            def forward(*_: Any, input_ids: torch.Tensor, **__: Any) -> Any:
                logits = torch.zeros(*input_ids.shape, len(tokenizer))
                for place in range(input_ids.shape[1]):
                    logits[:, place, ids[place]] = 50.0
                return type("Output", (dict,), {"logits": logits, "__getattr__": dict.get})(logits=logits)

            model.forward = forward
        return variants

    return make


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("three", "e t"), "on"),
        ("one two three", ("one",), ""),
        ("one two three", ("o",), ""),
        ("one two three", ("four", "twofold"), None),
        ("one two three", ("three!",), None),
        ("one two thre", ("three",), None),
        ("aab aaab", ("aaab",), "aab "),
        ("ababac", ("abac",), "ab"),
        ("猫和狗,和鸟", ("狗",), "猫和"),
        ("猫和狗,和鸟", (",和", "鸟"), "猫和狗"),
        ("\nQ: x\nQ: y", ("\nQ: y",), "\nQ: x"),
        ("abc", ("", "b"), "a"),
    ],
)
def test_a_stop_text_ends_an_answer_and_no_part_of_it_is_said(
    says: Callable[[str], VariantSet], text: str, stop: tuple[str, ...], expected: str | None
) -> None:
    """Every byte is a token here, so every stop text lies across tokens; None is where it never comes."""
    variants, pieces = says(text), []
    settings = GenerationSettings(greedy=True, max_new_tokens=60, stop=stop)
    done: list[Generation] = []
    for on_text in (None, lambda _, piece: pieces.append(piece)):
        (item,) = generate(
            variants, [Request("base", "x")], settings, on_text=on_text, on_done=lambda _, one: done.append(one)
        )
        assert (item.text, item.stop_reason) == ((text, "eos") if expected is None else (expected, "stop"))
        assert done.pop() == item
        if expected is not None:  # it stops with the token that makes the stop text whole
            longest = len((expected + next(one for one in stop if one and text.startswith(expected + one))).encode())
            assert item.tokens == longest
    assert "".join(pieces) == (text if expected is None else expected)
    assert all(pieces)


def test_a_stop_text_of_one_row_does_not_end_another(variants: VariantSet) -> None:
    """Rows that run beside each other end by themselves."""
    free = ask(variants, "final", PROMPTS, GREEDY)
    stop = next(item.text[3] for item in free if len(item.text) > 5 and item.text[3].isascii())
    found = ask(variants, "final", PROMPTS, GREEDY.model_copy(update={"stop": (stop,)}))
    for before, after in zip(free, found, strict=True):
        assert after.text == before.text.partition(stop)[0]
        assert (after.stop_reason == "stop") == (stop in before.text)
    assert {item.stop_reason for item in found} >= {"stop"}


def test_pieces_are_said_once_where_a_batch_begins_again(variants: VariantSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer may be seen only late not to be given the rows: what was said stays said, and goes on from there."""
    original, calls = BATCH._forward, []

    def forward(batch: Any, cache: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise NotRowwiseError("Expert")
        logits: torch.Tensor = original(batch, cache)
        return logits

    expected = said(ask(variants, "base", PROMPTS, GREEDY))
    monkeypatch.setattr(BATCH, "_forward", forward)
    monkeypatch.setattr(VariantSet, "run_in_turn", lambda *_: None)
    pieces = dict.fromkeys(range(len(PROMPTS)), "")

    def on_text(index: int, piece: str) -> None:
        pieces[index] += piece

    found = ask(variants, "base", PROMPTS, GREEDY, on_text=on_text)
    assert said(found) == expected
    assert pieces == {index: item.text for index, item in enumerate(found)}
