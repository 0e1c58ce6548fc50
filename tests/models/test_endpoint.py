"""Variants behind a server: a real one, over a real tiny model, with the manners and the faults of those in use."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaForCausalLM

from tests.openai_server import NAMES, Server, serve
from tests.tiny_models import TinyRun, build_tokenizer, chat, peft_alone, row
from tunesmith.conversations import Conversation, Text, encode
from tunesmith.errors import DataError, PromptError, TunesmithError
from tunesmith.models.detokenize import StopTexts
from tunesmith.models.endpoint import Endpoint
from tunesmith.models.engine import Generation, GenerationSettings, Request
from tunesmith.models.remember import RememberingEngine
from tunesmith.progress import Cancellation, Progress
from tunesmith.report import LANGUAGES, finding_text

GREEDY = GenerationSettings(greedy=True, max_new_tokens=24)
MODELS = {"base": "base-model", "final": "tuned-model"}


@pytest.fixture(scope="module")
def models(tiny: TinyRun) -> dict[str, Any]:
    """The base, and the base with its adapter, by the ids that the server has for them."""

    def base() -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(tiny.base, dtype=torch.float32).eval()

    return {"base-model": base(), "tuned-model": peft_alone(base(), tiny.adapters["final"]).eval()}


@pytest.fixture(scope="module")
def running(models: dict[str, Any]) -> Iterator[Server]:
    """One server for all tests of this file."""
    with serve(models, build_tokenizer()) as server:
        yield server


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server with its best manners, reached without a proxy and without a key of the environment."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    running.behave()
    return running


@pytest.fixture(scope="module")
def probed(running: Server) -> Endpoint:
    """Both variants, of a server that has shown its best manners already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.delenv("OPENAI_API_KEY", raising=False)
        running.behave()
        engine = endpoint(running)
        assert engine.capabilities.kind == "endpoint"
    return engine


@pytest.fixture
def engine(server: Server, probed: Endpoint) -> Endpoint:  # noqa: ARG001 - whose manners are the best again
    """It, for one test."""
    return probed


def endpoint(server: Server, **options: Any) -> Endpoint:
    """An endpoint of both variants."""
    return Endpoint(server.url, **{"models": MODELS, **options})


def ask(*texts: str, variant: str = "base") -> list[Request]:
    """Conversations of one turn, for one variant."""
    return [Request(variant, chat(text)) for text in texts]


def codes(endpoint: Endpoint) -> set[str]:
    """The findings of an endpoint, with the setting that they are about."""
    found = endpoint.capabilities.findings
    return {f"{f.code} {f.params['setting']}" if "setting" in f.params else f.code for f in found}


def greedy_ids(model: Any, ids: list[int], count: int) -> list[int]:
    """Plain greedy decoding, without the end-of-turn token."""
    now = list(ids)
    for _ in range(count):
        with torch.inference_mode():
            token = int(model(input_ids=torch.tensor([now])).logits[0, -1].argmax())
        if token in (0, 2):
            break
        now.append(token)
    return now[len(ids) :]


# What is generated


def test_answers_are_those_of_the_model_behind_each_name(engine: Endpoint, models: dict[str, Any]) -> None:
    """Rows of two variants side by side: each is answered by its own model, token for token."""
    tokenizer, texts = build_tokenizer(), ("hello", "你好")
    requests = [Request(name, chat(text)) for text in texts for name in MODELS]
    answers = engine.generate(requests, GREEDY)
    for request, answer in zip(requests, answers, strict=True):
        turns = [turn.model_dump() for turn in request.prompt if not isinstance(turn, str)]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt)["input_ids"]
        expected = greedy_ids(models[MODELS[request.variant]], ids, GREEDY.max_new_tokens)
        assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)
        assert answer.prompt_tokens == len(ids)
        assert answer.stop_reason == ("length" if len(expected) == GREEDY.max_new_tokens else "eos")
        assert answer.tokens in (len(expected), len(expected) + 1)
    assert len({answer.text for answer in answers}) == 4


def test_plain_text_is_gone_on_from_as_it_is(engine: Endpoint, models: dict[str, Any]) -> None:
    """A plain prompt reaches the model without a template."""
    (answer,) = engine.generate([Request("final", "abc")], GREEDY)
    ids = build_tokenizer()("abc")["input_ids"]
    assert answer.text == build_tokenizer().decode(greedy_ids(models["tuned-model"], ids, 24), skip_special_tokens=True)
    assert answer.prompt_tokens == 3


def test_pieces_joined_are_the_answer_and_everything_is_called_back(engine: Endpoint) -> None:
    """What streams, what is done and what is shown as progress agree with what is returned."""
    pieces: dict[int, list[str]] = {}
    done: dict[int, Generation] = {}
    steps: list[Progress] = []
    answers = engine.generate(
        ask("a", "b", "c"),
        GREEDY,
        on_text=lambda index, text: pieces.setdefault(index, []).append(text),
        on_done=done.__setitem__,
        progress=steps.append,
    )
    assert ["".join(pieces[index]) for index in range(3)] == [answer.text for answer in answers]
    assert any(len(parts) > 3 for parts in pieces.values())
    assert [done[index] for index in range(3)] == answers
    assert [(step.stage, step.done, step.total, step.unit) for step in steps] == [
        ("generate", count, 3, "prompts") for count in (1, 2, 3)
    ]


def test_times_and_speed_are_of_the_answer_alone(server: Server, engine: Endpoint) -> None:
    """A token every 20 ms: the first comes before the others, and the speed counts those after it."""
    server.behave(pause_s=0.02)
    (answer,) = engine.generate(ask("a"), GREEDY)
    assert answer.time_to_first_token_s is not None
    assert 0 < answer.time_to_first_token_s < answer.seconds
    assert answer.tokens_per_s == pytest.approx(
        (answer.tokens - 1) / (answer.seconds - answer.time_to_first_token_s), rel=1e-6
    )
    assert answer.tokens_per_s < 51


def test_the_same_seed_gives_the_same_text_and_another_another(server: Server, engine: Endpoint) -> None:
    """What is drawn is told to the server in full, neutral settings included, so that none of its defaults is used."""
    drawn = [
        engine.generate(ask("x"), GenerationSettings(seed=seed, temperature=1.0, max_new_tokens=16))[0].text
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    _, body = server.seen[-1]
    assert {name: body[name] for name in ("temperature", "top_p", "seed", "min_p", "repetition_penalty")} == {
        "temperature": 1.0,
        "top_p": 0.9,
        "seed": 2,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    assert body["top_k"] >= 1_000_000


def test_so_many_requests_are_in_flight_and_no_more(server: Server) -> None:
    """Rows run side by side, as many as was asked for."""
    engine = endpoint(server, parallel=3)
    assert engine.capabilities
    server.behave(pause_s=0.005)
    engine.generate(ask(*"abcdefgh"), GenerationSettings(greedy=True, max_new_tokens=12))
    assert server.most_active == 3


def test_a_server_that_drops_an_answer_for_the_next_is_asked_for_one_at_a_time(server: Server) -> None:
    """As llama-cpp-python does by default: measured and said, and every answer is had."""
    server.behave(interrupts=True, pause_s=0.01)
    engine = endpoint(server)
    assert codes(engine) == {"endpoint_template", "endpoint_no_tokenizer", "endpoint_one_at_a_time"}
    answers = engine.generate(ask("a", "b", "c"), GREEDY)
    assert all(answer.stop_reason in ("eos", "length") for answer in answers)


def test_a_running_event_loop_is_no_hindrance(engine: Endpoint) -> None:
    """A notebook calls from within a loop."""

    async def cell() -> list[Generation]:
        return engine.generate(ask("a"), GREEDY)

    (within,), (without,) = asyncio.run(cell()), engine.generate(ask("a"), GREEDY)
    assert within.text == without.text != ""


# How answers end


@pytest.mark.parametrize("stops", ["told", "included", "hidden"])
def test_a_stop_text_ends_an_answer_whatever_a_server_tells_of_it(server: Server, engine: Endpoint, stops: str) -> None:
    """It is cut off, the reason is ``stop``; an answer that ended by itself or by length has its own reason."""
    (whole,) = engine.generate(ask("a"), GREEDY)
    stop = whole.text[6:8]
    server.behave(stops=stops)
    engine = endpoint(server)
    assert ("endpoint_stop_hidden" in codes(engine)) == (stops == "hidden")
    settings = GREEDY.model_copy(update={"stop": (stop, "never to be seen")})
    pieces: list[str] = []
    (ended,) = engine.generate(ask("a"), settings, on_text=lambda _, piece: pieces.append(piece))
    assert ended.text == "".join(pieces) == whole.text[: whole.text.find(stop)]
    assert ended.stop_reason == "stop"
    (other,) = engine.generate(ask("a"), GREEDY.model_copy(update={"stop": ("never to be seen",)}))
    assert (other.text, other.stop_reason) == (whole.text, whole.stop_reason)


def test_a_stop_text_is_found_over_pieces_and_its_beginning_is_not_lost() -> None:
    """What may be the beginning of a stop text is held back, and given out where it was none."""
    stops = StopTexts(("STOP", "##"))
    assert [stops.add(piece) for piece in ("a S", "TO", "x #", "b S", "T", "OP c", "d")] == [
        "a ", "", "STOx ", "#b ", "", "", ""
    ]  # fmt: skip
    assert stops.hit
    assert stops.finish() == ""
    unfinished = StopTexts(("STOP",))
    assert unfinished.add("a ST") + unfinished.finish() == "a ST"
    assert not unfinished.hit


def test_where_the_window_leaves_less_room_the_answer_is_shorter(engine: Endpoint) -> None:
    """Servers refuse a prompt whose longest answer would not fit; the local engine would answer as far as it goes."""
    (answer,) = engine.generate(ask("x" * 400), GenerationSettings(greedy=True, max_new_tokens=1024))
    assert answer.prompt_tokens is not None
    assert answer.tokens <= 512 - answer.prompt_tokens
    assert answer.stop_reason in ("eos", "length")


def test_prompts_over_the_window_are_all_named_and_the_others_answered(engine: Endpoint) -> None:
    """One error for all, with their lengths; what fits was handed out before."""
    done: dict[int, Generation] = {}
    with pytest.raises(PromptError) as caught:
        engine.generate(ask("x" * 600, "short", "y" * 700), GREEDY, on_done=done.__setitem__)
    assert len(caught.value.details) == 2
    assert all(" tokens" in line for line in caught.value.details)
    assert caught.value.expected == "at most 511 tokens"
    assert list(done) == [1]


def test_thinking_is_put_back_where_models_write_it() -> None:
    """A server that takes thinking out of the text would make an answer look shorter than it is."""
    from tunesmith.models.endpoint.answers import Answer, Habits
    from tunesmith.models.endpoint.refusals import Contact

    said: list[str] = []
    answer = Answer(
        Contact("http://127.0.0.1:9/v1", None, 1.0),
        "m",
        prompt="p",
        settings=GREEDY,
        habits=Habits(),
        on_text=said.append,
    )
    for delta in ({"reasoning_content": "I"}, {"reasoning_content": " think"}, {"content": "so"}, {"content": "."}):
        answer._take({"delta": delta})
    answer._take({"delta": {}, "finish_reason": "stop"})
    assert answer.text == "".join(said) == "<think>\nI think\n</think>\n\nso."


# Stopping


def test_a_cancellation_closes_every_connection_at_once(server: Server, engine: Endpoint) -> None:
    """What had come is returned as cancelled, rows that were not begun are empty, and the server stops."""
    engine = endpoint(server, parallel=3)
    assert engine.capabilities
    server.behave(pause_s=0.02)
    stop, texts, done = Cancellation(), [], []

    def on_text(index: int, text: str) -> None:
        texts.append((index, text))
        if len(texts) == 15:
            stop.cancel()

    answers = engine.generate(
        ask(*"abcdef"),
        GenerationSettings(temperature=2.0, max_new_tokens=400),
        on_text=on_text,
        on_done=lambda *all_of_it: done.append(all_of_it),
        cancellation=stop,
    )
    generated = server.generated
    cancelled = [answer for answer in answers if answer.stop_reason == "cancelled"]
    assert len(cancelled) == len(answers) - len(done) >= 4
    assert answers[5].text == ""
    for index, answer in enumerate(answers):
        assert answer.text == "".join(text for place, text in texts if place == index)
    time.sleep(0.3)
    assert server.active == 0
    assert server.generated - generated <= 3 * 4  # a write or two until the server sees it


def test_a_server_that_says_nothing_is_left_at_once(server: Server, engine: Endpoint) -> None:
    """The wish to stop is heard while nothing arrives, in the probe as in an answer."""
    server.behave(fault="silence", pause_s=3)
    for asked in (engine, endpoint(server)):
        stop = Cancellation()
        timer = threading.Timer(0.2, stop.cancel)
        timer.start()
        began = time.monotonic()
        (answer,) = asked.generate(ask("a"), GREEDY, cancellation=stop)
        assert time.monotonic() - began < 2
        assert (answer.text, answer.stop_reason) == ("", "cancelled")
        timer.join()


@pytest.mark.parametrize(
    ("count", "most_bytes"), [(40, 12 * 2**20), pytest.param(200, 24 * 2**20, marks=pytest.mark.slow)]
)
def test_cancelled_generations_leak_nothing(server: Server, engine: Endpoint, count: int, most_bytes: int) -> None:
    """No thread, no socket, no memory that grows with their number."""
    server.behave(pause_s=0.002)

    def cancelled_one() -> None:
        stop = Cancellation()
        engine.generate(
            ask("a"),
            GenerationSettings(temperature=2.0, max_new_tokens=400),
            on_text=lambda *_: stop.cancel(),
            cancellation=stop,
        )

    def held() -> tuple[int, int, int]:
        gc.collect()
        deadline = time.monotonic() + 5  # the server's own threads end when they next write
        while server.active and time.monotonic() < deadline:
            time.sleep(0.05)
        process = psutil.Process(os.getpid())
        return threading.active_count(), process.num_fds(), process.memory_info().rss

    for _ in range(20):
        cancelled_one()
    threads, files, memory = held()
    for _ in range(count):
        cancelled_one()
    threads_after, files_after, memory_after = held()
    assert threads_after <= threads + 1
    assert files_after <= files + 2
    assert memory_after - memory < most_bytes  # a client's SSL context alone takes about half a megabyte


def test_what_a_callback_raises_is_raised_and_ends_the_rest(server: Server, engine: Endpoint) -> None:
    """A caller's own mistake is not taken for the server's."""
    server.behave(pause_s=0.01)

    def mistaken(*_: object) -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        engine.generate(ask("a", "b"), GenerationSettings(greedy=True, max_new_tokens=300), on_text=mistaken)
    time.sleep(0.3)
    assert server.active == 0


# What a server is and can


def test_a_well_mannered_server_has_little_to_be_said_of_it(server: Server) -> None:
    """It can all that is asked; what is always so is said."""
    engine = endpoint(server)
    assert codes(engine) == {"endpoint_template", "endpoint_no_tokenizer"}
    assert (engine.capabilities.kind, engine.capabilities.where) == ("endpoint", server.url)
    asked = len(server.seen)
    assert engine.capabilities.findings
    engine.generate(ask("a"), GREEDY)
    assert len(server.seen) == asked + 1  # it is asked about itself once


def in_order(value: object) -> str:
    """A name that is the same in every process, as workers' tests must be: sets have no order of their own."""
    if isinstance(value, dict):
        return ", ".join(f"{key}={in_order(one)}" for key, one in value.items())
    return ", ".join(sorted(value)) if isinstance(value, (set, frozenset)) else str(value)


@pytest.mark.parametrize(
    ("manners", "said"),
    [
        ({"lists": False}, set()),
        ({"list_fails": True}, set()),
        ({"list_fails": True, "list_breaks": (1,)}, set()),
        ({"list_fails": True, "list_breaks": (6,)}, set()),
        ({"lists": False, "any_name": True}, {"endpoint_models_unlisted"}),
        ({"listed": (), "any_name": False}, set()),
        ({"chat": False}, {"endpoint_no_chat"}),
        ({"plain": False}, {"endpoint_no_completions"}),
        ({"usage": "never"}, {"endpoint_tokens_counted"}),
        ({"usage": "always"}, set()),
        ({"names": frozenset()}, {f"endpoint_setting_refused {name}" for name in NAMES}),
        ({"strict": False, "names": frozenset()}, {f"endpoint_setting_ignored {name}" for name in NAMES}),
        ({"heeds": frozenset({*NAMES, "temperature"})}, {"endpoint_seed_ignored"}),
        (
            {"heeds": frozenset()},
            {
                "endpoint_sampling_ignored",
                "endpoint_setting_untold top_k",
                "endpoint_setting_untold min_p",
                "endpoint_setting_ignored repetition_penalty",
            },
        ),
        ({"stops": "hidden"}, {"endpoint_stop_hidden"}),
    ],
    ids=in_order,
)
def test_what_a_server_cannot_or_ignores_is_measured_and_said(
    server: Server, manners: dict[str, Any], said: set[str]
) -> None:
    """Each lack on its own: nothing else is said, and an answer is had all the same."""
    server.behave(**manners)
    engine = endpoint(server)
    # The tiny model's text holds no token that its prompt holds, so a penalty may do nothing.
    usual = {"endpoint_template", "endpoint_no_tokenizer", "endpoint_setting_ignored repetition_penalty"} - said
    assert codes(engine) - usual == said
    prompt = "a" if manners.get("chat") is False else chat("a")
    assert engine.generate([Request("base", prompt)], GREEDY)[0].tokens > 0
    assert all(finding_text(finding, lang) for finding in engine.capabilities.findings for lang in LANGUAGES)


def test_without_token_counts_the_pieces_are_counted(server: Server, engine: Endpoint) -> None:
    """About right, and said to be so."""
    (exact,) = engine.generate(ask("a"), GREEDY)
    server.behave(usage="never")
    (counted,) = endpoint(server).generate(ask("a"), GREEDY)
    assert counted.prompt_tokens is None
    assert exact.tokens / 2 <= counted.tokens <= exact.tokens + 1


@pytest.mark.parametrize("any_name", [False, True], ids=["an honest server", "a server that answers to any name"])
def test_a_model_that_the_server_does_not_list_is_refused_with_those_that_it_has(
    server: Server, *, any_name: bool
) -> None:
    """A server that answers to any name would be compared with itself."""
    server.behave(any_name=any_name)
    with pytest.raises(DataError) as caught:
        endpoint(server, models=["base-model", "tuned", "other"]).generate(ask("a", variant="tuned"), GREEDY)
    assert caught.value.expected == "tuned, other"
    assert caught.value.found == "base-model, tuned-model"


def test_an_adapter_below_its_base_is_asked_for_with_the_base(server: Server) -> None:
    """SGLang lists it by its bare name, by which it answers as the base: that would be compared with itself."""
    requests = [*ask("a"), *ask("a", variant="final")]
    expected = [one.text for one in endpoint(server).generate(requests, GREEDY)]
    server.behave(children="prefixed")
    named = endpoint(server, models={"base": "base-model", "final": "base-model:tuned-model"})
    assert [one.text for one in named.generate(requests, GREEDY)] == expected
    assert len(set(expected)) == 2
    with pytest.raises(DataError, match="must be named with its base") as caught:
        endpoint(server).generate(ask("a"), GREEDY)
    assert caught.value.expected == "base-model:tuned-model"
    assert caught.value.next_step == "pass --model tuned-model=base-model:tuned-model"
    server.behave(children="listed")
    assert [one.text for one in endpoint(server).generate(requests, GREEDY)] == expected


@pytest.mark.parametrize("scored", [True, False], ids=["by likelihoods", "by text"])
def test_a_server_that_mixes_models_up_is_asked_for_one_at_a_time(
    server: Server, tiny: TinyRun, *, scored: bool
) -> None:
    """Beside the other model's prompts the base's would be answered by that model, and nothing would say so."""
    server.behave(mixes=True)
    engine = endpoint(server, tokenizer_dir=tiny.base if scored else None)
    assert "endpoint_mixes_models" in codes(engine)
    requests = [Request(name, chat(text)) for text in ("a", "b") for name in MODELS]
    done: list[int] = []
    mixed = engine.generate(requests, GREEDY, on_done=lambda index, _: done.append(index))
    server.behave()
    assert [one.text for one in mixed] == [one.text for one in endpoint(server).generate(requests, GREEDY)]
    assert sorted(done) == [0, 1, 2, 3]
    if scored:
        rows = [row(index, "hi", "yes") for index in range(2)]
        apart = endpoint(server, tokenizer_dir=tiny.base).score(list(MODELS), rows)
        server.behave(mixes=True)
        beside = engine.score(list(MODELS), rows)
        for name in MODELS:
            assert [one.log_probs for one in beside[name]] == [pytest.approx(one.log_probs) for one in apart[name]]


def test_a_server_that_answers_alike_is_asked_at_once(server: Server, tiny: TinyRun) -> None:
    """Nothing is said of it, and several models' prompts are in flight together."""
    engine = endpoint(server, tokenizer_dir=tiny.base)
    assert "endpoint_mixes_models" not in codes(engine)


def test_a_server_that_drops_every_third_request_can_what_it_can(server: Server, tiny: TinyRun) -> None:
    """What is dropped is asked again; nothing is taken for a lack, and no score is another."""
    server.behave()
    steady = endpoint(server, tokenizer_dir=tiny.base)
    rows = [row(index, "hi", "yes" * (index + 1)) for index in range(4)]
    expected = steady.score(list(MODELS), rows)
    server.behave(drops=3)
    engine = endpoint(server, tokenizer_dir=tiny.base)
    assert codes(engine) == codes(steady)
    assert engine.score(list(MODELS), rows) == expected


@pytest.mark.parametrize("drops_with", ["busy", "reset"])
def test_answers_of_a_server_that_drops_requests_are_each_kept_once(
    server: Server, tmp_path: Path, drops_with: str
) -> None:
    """Every answer is told once and kept once, and the same work asks for nothing again."""
    engine = endpoint(server)
    requests = [Request(name, chat(text)) for text in "abcd" for name in MODELS]
    expected = [one.text for one in engine.generate(requests, GREEDY)]
    server.behave(drops=3, drops_with=drops_with)
    kept = RememberingEngine(engine, tmp_path, named=True)
    done: list[int] = []
    got = kept.generate(requests, GREEDY, on_done=lambda index, _: done.append(index))
    assert [one.text for one in got] == expected
    assert sorted(done) == list(range(len(requests)))
    files = {file.name: file.read_text().splitlines() for file in tmp_path.glob("*.jsonl")}  # one a variant
    lines = [(name, json.loads(line)["key"]) for name, written in files.items() for line in written]
    assert len(lines) == len(set(lines)) == kept.written == len(requests)
    server.behave()
    again = RememberingEngine(engine, tmp_path, named=True)
    assert [one.text for one in again.generate(requests, GREEDY)] == expected
    assert (again.remembered, again.written, server.asked) == (len(requests), 0, 0)


def test_a_list_that_fails_once_is_had_at_the_second_try(server: Server) -> None:
    """A model that it lacks is then refused, and not tried out."""
    server.behave(list_fails=1, any_name=True)
    with pytest.raises(DataError, match="does not list a model"):
        endpoint(server, models=["base-model", "other"]).generate(ask("a", variant="other"), GREEDY)
    assert server.listings == 2


def test_a_kind_of_prompt_that_the_server_lacks_is_refused(server: Server) -> None:
    """Before anything is asked, in words that say which kind it does take."""
    server.behave(plain=False)
    with pytest.raises(DataError, match="no plain text, only conversations"):
        endpoint(server).generate([Request("base", "plain")], GREEDY)
    server.behave(chat=False)
    with pytest.raises(DataError, match="no conversations, only plain text"):
        endpoint(server).generate(ask("a"), GREEDY)


@pytest.mark.parametrize(
    "settings", [{"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.2}], ids=lambda settings: next(iter(settings))
)
def test_a_setting_that_the_server_refuses_is_named(server: Server, settings: dict[str, Any]) -> None:
    """It is not left out in silence; at its neutral value it is, for then nothing is lost."""
    server.behave(names=frozenset())
    with pytest.raises(DataError, match=f"does not take the setting {next(iter(settings))}"):
        endpoint(server).generate(ask("a"), GenerationSettings(max_new_tokens=4, **settings))
    assert endpoint(server).generate(ask("a"), GenerationSettings(max_new_tokens=4))


def test_an_unknown_variant_is_refused_and_identity_is_unknown(engine: Endpoint) -> None:
    """What is behind a name can change overnight, so no hash stands for it."""
    assert engine.names == ("base", "final")
    assert engine.identity("final") is None
    for ask_for in (lambda: engine.identity("nobody"), lambda: engine.generate(ask("a", variant="nobody"))):
        with pytest.raises(DataError) as caught:
            ask_for()
        assert caught.value.found == "nobody"


# Scores


@pytest.mark.parametrize(
    "manners",
    [
        {},
        {"echo": False, "prompt_logprobs": True},
        {"token_ids": False},
    ],
    ids=["echo", "prompt_logprobs", "echo of text"],
)
def test_scores_are_those_of_the_model(
    server: Server, models: dict[str, Any], tiny: TinyRun, manners: dict[str, Any]
) -> None:
    """Each token's log-likelihood, and how many were the most likely, by the logits of the model itself."""
    server.behave(**manners)
    engine = endpoint(server, tokenizer_dir=tiny.base)
    rows = [row(0, "hi", "yes"), row(1, "你", "好", "c", "dd"), Text(id="text-0", text="some text")]
    seen: list[tuple[str, int]] = []
    scores = engine.score(["base", "final"], rows, on_done=lambda name, index, _: seen.append((name, index)))
    tokenizer = build_tokenizer()
    for name, of_rows in scores.items():
        for scored, asked in zip(of_rows, rows, strict=True):
            if isinstance(asked, Conversation):
                ids, counts = (lambda e: (e.input_ids, e.supervised))(encode(tokenizer, asked))
            else:
                ids = tokenizer(asked.text)["input_ids"]
                counts = [place > 0 for place in range(len(ids))]
            with torch.inference_mode():
                table = torch.log_softmax(models[MODELS[name]](input_ids=torch.tensor([ids])).logits[0].double(), -1)
            places = [place for place, counted in enumerate(counts) if counted]
            assert scored.id == asked.id
            assert scored.log_probs == pytest.approx([table[p - 1, ids[p]].item() for p in places], abs=1e-5)
            assert scored.correct == sum(int(table[p - 1].argmax()) == ids[p] for p in places)
            assert scored.kl is None
    assert sorted(seen) == [(name, index) for name in ("base", "final") for index in range(3)]
    assert engine.capabilities.scores
    assert "endpoint_no_kl" in codes(engine)


@pytest.mark.parametrize(
    ("manners", "tokenizer", "said"),
    [
        ({"echo": False}, True, "endpoint_no_scores"),
        ({"plain": False}, True, "endpoint_no_scores"),
        ({"token_ids": False, "beginning": (1,)}, True, "endpoint_no_scores"),
        ({"foreign": True}, True, "endpoint_no_scores"),
        ({}, False, "endpoint_no_tokenizer"),
    ],
    ids=["no echo", "no completions", "another tokenization", "other tokens", "no tokenizer"],
)
def test_where_likelihoods_cannot_be_had_that_is_said(
    server: Server, tiny: TinyRun, manners: dict[str, Any], *, tokenizer: bool, said: str
) -> None:
    """A server that answers with the log-probabilities of something else is not believed."""
    server.behave(**manners)
    engine = endpoint(server, tokenizer_dir=tiny.base if tokenizer else None)
    assert said in codes(engine)
    assert not engine.capabilities.scores
    with pytest.raises(DataError, match="does not tell how likely"):
        engine.score(["base"], [row(0, "hi", "yes")])


def test_rows_over_the_window_are_all_named(server: Server, tiny: TinyRun) -> None:
    """As the local engine does."""
    engine = endpoint(server, tokenizer_dir=tiny.base)
    with pytest.raises(PromptError) as caught:
        engine.score(["base"], [row(0, "a" * 600, "b"), row(1, "a", "b"), row(2, "c" * 700, "d")])
    assert [line.split(" ")[0] for line in caught.value.details] == ["row-0", "row-2"]


# What goes wrong


def test_nobody_at_the_address() -> None:
    """Said at once, with the address and what to do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    began = time.monotonic()
    with pytest.raises(TunesmithError, match="cannot be reached") as caught:
        Endpoint(url, models=["m"]).generate(ask("a", variant="m"))
    assert time.monotonic() - began < 3
    assert caught.value.where == url
    assert caught.value.exit_code == 2


def test_a_wrong_key_is_said_and_never_shown(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers repeat a wrong key in their answer; it must not reach a terminal or a report."""
    server.behave(key="sk-right")
    with pytest.raises(TunesmithError, match="another key") as caught:
        endpoint(server, api_key="sk-wrong-secret").generate(ask("a"), GREEDY)
    engine = endpoint(server, api_key="sk-right")
    for shown in (str(caught.value), str(caught.value.as_dict()), repr(engine), engine.capabilities.model_dump_json()):
        assert "secret" not in shown
        assert "sk-right" not in shown
    monkeypatch.setenv("OPENAI_API_KEY", "sk-right")
    assert endpoint(server).generate(ask("a"), GREEDY)[0].tokens > 0


def test_a_password_in_the_address_is_never_shown() -> None:
    """Neither it nor a query, which may hold a key."""
    engine = Endpoint("http://me:hush@127.0.0.1:9/v1?key=hush", models=["m"])
    with pytest.raises(TunesmithError) as caught:
        engine.generate(ask("a", variant="m"))
    assert "hush" not in f"{caught.value} {engine!r}"
    assert caught.value.where == "http://127.0.0.1:9/v1"


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host/v1", "http://", "http://host:port/v1"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    """Before anything is sent anywhere."""
    with pytest.raises(DataError, match="not an address"):
        Endpoint(url, models=["m"])


@pytest.mark.parametrize("path", ["", "/v2"])
def test_a_wrong_path_is_said_with_what_to_try(server: Server, path: str) -> None:
    """The likeliest mistake is that /v1 is lacking."""
    with pytest.raises(TunesmithError) as caught:
        Endpoint(server.url.removesuffix("/v1") + path, models=["base-model"]).generate(ask("a", variant="base-model"))
    assert caught.value.exit_code == 2
    assert caught.value.next_step is not None
    assert "/v1" in caught.value.next_step


def test_a_web_page_is_no_server(server: Server) -> None:
    """Some other program answers at that address."""
    server.behave(fault="web page")
    with pytest.raises(TunesmithError, match="not what OpenAI's protocol says") as caught:
        endpoint(server).generate(ask("a"), GREEDY)
    assert caught.value.next_step is not None
    assert "/v1" in caught.value.next_step


def test_a_busy_server_is_asked_again(server: Server, engine: Endpoint) -> None:
    """A server that is loading its model answers a little later."""
    server.behave(failures=2)
    assert engine.generate(ask("a"), GREEDY)[0].tokens > 0
    server.behave(failures=100)
    with pytest.raises(TunesmithError, match="asked 5 times") as caught:
        engine.generate(ask("b"), GREEDY)
    assert "503: Loading model" in caught.value.details[0]
    assert len(server.seen) == 5


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("end", "no reason for their end"),
        ("reset", ""),
        ("not json", ""),
        ("a number", "no reason for their end"),
        ("wrong types", "ended because of 7"),
        ("error event", "out of memory"),
        ("filter", "content_filter"),
        ("flood", "more text than"),
    ],
)
def test_a_broken_answer_is_not_done_and_the_others_are(
    server: Server, engine: Endpoint, fault: str, found: str
) -> None:
    """It is named after the rest is finished, so that resumed work asks for it again."""
    server.behave(fault=fault, fault_on="unlucky")
    done: dict[int, Generation] = {}
    with pytest.raises(TunesmithError) as caught:
        engine.generate(ask("a", "unlucky", "b"), GREEDY, on_done=done.__setitem__)
    assert sorted(done) == [0, 2]
    assert "1 of 3 requests have no answer" in caught.value.what
    (detail,) = caught.value.details
    assert detail.startswith("prompt 1 (base): ")
    assert found in detail
    assert "\x1b" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("fault", ["silence", "hang"])
def test_a_server_that_falls_silent_is_given_up(server: Server, fault: str) -> None:
    """Before its first word or in the middle; what was done is kept, and no more is asked of it."""
    engine = endpoint(server, timeout_s=1.0, parallel=1)
    assert engine.capabilities
    server.behave(fault=fault, fault_on="unlucky")
    done: dict[int, Generation] = {}
    began = time.monotonic()
    with pytest.raises(TunesmithError, match="does not answer") as caught:
        engine.generate(ask("a", "unlucky", "b", "c"), GREEDY, on_done=done.__setitem__)
    assert time.monotonic() - began < 5
    assert list(done) == [0]
    assert "3 of 4 requests have no answer" in caught.value.what
    assert "nothing for 1 s" in caught.value.details[0]


def test_a_missing_package_is_said_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client is an extra."""
    import sys

    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(TunesmithError) as caught:
        Endpoint("http://127.0.0.1:9/v1", models=["m"])
    assert caught.value.next_step == 'pip install "tunesmith[endpoint]"'


def test_a_tokenizer_that_is_none_is_said(server: Server, tmp_path: Path) -> None:
    """Before the server is asked."""
    with pytest.raises(DataError, match="tokenizer cannot be loaded"):
        endpoint(server, tokenizer_dir=tmp_path).score(["base"], [row(0, "a", "b")])
    assert server.seen == []
