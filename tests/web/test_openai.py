"""``/v1`` as OpenAI's own client sees it, against what the engine itself says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

import tunesmith as ts
from tests.tiny_models import TinyRun, chat, row
from tests.web.live_server import PLAIN, Served, engine_of, said, serve, tiny_root, until
from tunesmith.conversations import Text

HELLO: Any = [{"role": "user", "content": "hello"}]
ENDLESS: Any = [{"role": "user", "content": "2"}]


@pytest.fixture(scope="module")
def served(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server over a tiny run that was named on its command line."""
    root = tiny_root(tiny, tmp_path_factory.mktemp("v1"))
    with serve(root, run=str(root / "out" / "run")) as served:
        yield served


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    """OpenAI's client."""
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def engine(served: Served) -> ts.Engine:
    """The same variants without a server."""
    return engine_of(served)


def test_models_are_the_variants(client: openai.OpenAI) -> None:
    """The base, the run's own adapters, and what was merged from it; each can be had alone."""
    names = ["base", "final", "checkpoint-10", "out/run-merged"]
    assert [model.id for model in client.models.list()] == names
    assert client.models.retrieve("checkpoint-10").id == "checkpoint-10"


@pytest.mark.parametrize("variant", ["base", "final", "checkpoint-10", "out/run-merged"])
def test_one_word_makes_it_another_model(client: openai.OpenAI, engine: ts.Engine, variant: str) -> None:
    """The same question, the engine's own answers, and true counts."""
    answer = client.chat.completions.create(model=variant, messages=HELLO, max_tokens=12, temperature=0)
    expected = said(engine, variant.removeprefix("out/"), chat("hello"), greedy=True, max_new_tokens=12)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == {"eos": "stop"}.get(expected.stop_reason, expected.stop_reason)
    assert answer.model == variant
    assert answer.usage is not None
    counts = answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens
    assert counts == (expected.prompt_tokens, expected.tokens, (expected.prompt_tokens or 0) + expected.tokens)


def test_an_answer_s_own_end_is_told_from_its_limit(client: openai.OpenAI) -> None:
    """``base`` ends by itself here after 13 tokens."""
    ended = client.chat.completions.create(model="base", messages=HELLO, max_completion_tokens=100, temperature=0)
    assert ended.choices[0].finish_reason == "stop"
    cut = client.chat.completions.create(model="base", messages=HELLO, max_completion_tokens=5, temperature=0)
    assert cut.choices[0].finish_reason == "length"


def test_a_stream_is_the_same_answer_in_pieces(client: openai.OpenAI) -> None:
    """Role first, then text as it comes, the reason, and the usage where it is asked for."""
    asked: Any = {"model": "final", "messages": HELLO, "max_tokens": 40, "seed": 5}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 5
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert set(reasons[:-1]) == {None}
    assert chunks[-1].usage == whole.usage
    assert not chunks[-1].choices
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    plain = list(client.chat.completions.create(**asked, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in plain)


def test_a_seed_makes_an_answer_again_and_none_another_one(client: openai.OpenAI, engine: ts.Engine) -> None:
    """As OpenAI has it; with the seed it is the library's answer to the same settings."""

    def ask(**more: Any) -> Any:
        asked: Any = {"model": "base", "messages": ENDLESS, "max_tokens": 12, "temperature": 2, "top_p": 1, **more}
        return client.chat.completions.create(**asked).choices[0].message.content

    expected = said(engine, "base", chat("2"), seed=3, temperature=2, top_p=1, max_new_tokens=12).text
    assert ask(seed=3) == ask(seed=3) == expected
    assert len({ask() for _ in range(4)} | {ask(seed=4)}) > 3


def test_several_answers_are_drawn_side_by_side(client: openai.OpenAI) -> None:
    """They differ, the first is the one that is had alone, and the prompt counts once; also in a stream."""
    asked: Any = {"model": "base", "messages": ENDLESS, "max_tokens": 8, "temperature": 2, "seed": 1}
    alone = client.chat.completions.create(**asked)
    three = client.chat.completions.create(**asked, n=3)
    texts = [choice.message.content for choice in three.choices]
    assert texts[0] == alone.choices[0].message.content
    assert len(set(texts)) == 3
    assert three.usage is not None
    assert alone.usage is not None
    assert three.usage.prompt_tokens == alone.usage.prompt_tokens
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(client: openai.OpenAI, engine: ts.Engine) -> None:
    """One, or one of four."""
    whole = said(engine, "base", chat("2"), greedy=True, max_new_tokens=60).text
    stop = whole[20:22]
    for stops in (stop, ["never, ever", stop]):
        asked: Any = {"model": "base", "messages": ENDLESS, "max_tokens": 60, "temperature": 0, "stop": stops}
        choice = client.chat.completions.create(**asked).choices[0]
        assert choice.message.content == whole[: whole.index(stop)]
        assert choice.finish_reason == "stop"


def test_log_probabilities_are_what_the_engine_scores(client: openai.OpenAI, engine: ts.Engine) -> None:
    """Of the answer's tokens, and of the likeliest ones; in a stream too."""
    asked: Any = {"model": "final", "prompt": "hello", "max_tokens": 6, "temperature": 0}
    text = "".join(chr(code) for code in range(ord("a"), ord("z")))
    (score,) = engine.score(["final"], [Text(id="row", text=text)])["final"]
    echoed = client.completions.create(model="final", prompt=text, max_tokens=0, echo=True, logprobs=2)
    told = echoed.choices[0].logprobs
    assert told is not None
    assert told.token_logprobs is not None
    assert told.token_logprobs[0] is None
    assert told.token_logprobs[1:] == pytest.approx(score.log_probs, abs=1e-5)
    assert "".join(told.tokens or ()) == text == echoed.choices[0].text
    assert told.text_offset == list(range(len(text)))
    answer = client.completions.create(**asked, logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.token_logprobs == pytest.approx([max(top.values()) for top in logprobs.top_logprobs])
    assert len(logprobs.tokens or ()) == 6
    (chunk, _) = client.completions.create(**asked, logprobs=3, stream=True)
    assert chunk.choices[0].logprobs == logprobs


def test_a_conversation_s_log_probabilities_are_those_of_its_answer(client: openai.OpenAI, engine: ts.Engine) -> None:
    """The end of the turn is one of them; the bytes joined are the answer's."""
    asked: Any = {"model": "base", "messages": HELLO, "temperature": 0, "max_tokens": 100}
    choice = client.chat.completions.create(**asked, logprobs=True, top_logprobs=4).choices[0]
    assert choice.logprobs is not None
    tokens = choice.logprobs.content or []
    data = b"".join(bytes(token.bytes or ()) for token in tokens[:-1])
    assert data.decode(errors="replace") == choice.message.content
    assert all(token.logprob == max(top.logprob for top in token.top_logprobs) for token in tokens)
    assert {len(token.top_logprobs) for token in tokens} == {4}
    prompt = ts.rendered_prompt(engine, "base", chat("hello")).token_ids
    (generation,) = ts.continue_tokens(engine, [("base", prompt)], ts.GenerationSettings(greedy=True))
    chances = ts.token_chances(engine, "base", [*prompt, *generation.token_ids], start=len(prompt))
    assert [token.logprob for token in tokens] == pytest.approx([one.log_prob for one in chances], abs=1e-5)


def test_token_ids_go_in_and_come_back_as_they_are(client: openai.OpenAI) -> None:
    """Any ids, also such as no text has; their log-probabilities are complete."""
    prompts = [[40, 200, 2, 130], [1, 1, 7]]
    more = {"return_token_ids": True}
    answer = client.completions.create(
        model="base", prompt=prompts, max_tokens=0, echo=True, logprobs=1, extra_body=more
    )
    assert [choice.prompt_token_ids for choice in answer.choices] == prompts  # type: ignore[attr-defined]
    assert [len(choice.logprobs.token_logprobs or ()) for choice in answer.choices if choice.logprobs] == [4, 3]
    assert all(value is not None for choice in answer.choices for value in choice.logprobs.token_logprobs[1:])  # type: ignore[union-attr,index]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 0)
    going = client.completions.create(model="base", prompt=prompts[0], max_tokens=3, temperature=0, extra_body=more)
    assert len(going.choices[0].token_ids) == 3  # type: ignore[attr-defined]


def test_texts_are_answered_each(client: openai.OpenAI, engine: ts.Engine) -> None:
    """Several prompts, several answers to each, in their order; 16 tokens where nothing is said."""
    answer = client.completions.create(model="base", prompt=["2", "hello"], n=2, temperature=0)
    texts = [said(engine, "base", text, greedy=True, max_new_tokens=16).text for text in ("2", "hello")]
    assert [choice.text for choice in answer.choices] == [texts[0], texts[0], texts[1], texts[1]]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    echoed = client.completions.create(model="base", prompt="2", echo=True, max_tokens=4, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in echoed).startswith("2")


def test_an_unknown_model_is_told_what_there_is(client: openai.OpenAI) -> None:
    """With the list, as 404."""
    with pytest.raises(openai.NotFoundError, match="base, final, checkpoint-10, out/run-merged") as caught:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("checkpoint-11")


@pytest.mark.parametrize(
    ("more", "code", "param"),
    [
        ({"frequency_penalty": 0.5}, "unsupported_parameter", "frequency_penalty"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "unsupported_parameter", "tools"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        ({"logit_bias": {"5": 1}}, "unsupported_parameter", "logit_bias"),
        ({"extra_body": {"nonsense": 1}}, "unsupported_parameter", "nonsense"),
        ({"temperature": -1}, "invalid_value", "temperature"),
        ({"n": 0}, "invalid_value", "n"),
        ({"top_logprobs": 2}, "invalid_value", None),
        ({"stop": ["a", "b", "c", "d", "e"]}, "invalid_value", "stop"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_value", "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "invalid_value", "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x" * 25_000}]}, "context_length_exceeded", None),
    ],
)
def test_what_is_not_there_is_refused_and_never_ignored(
    client: openai.OpenAI, more: dict[str, Any], code: str, param: str | None
) -> None:
    """In OpenAI's shape, before anything streams."""
    asked: Any = {"model": "base", "messages": HELLO, "max_tokens": 2, **more}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**asked, stream=stream)
        assert caught.value.code == code
        assert caught.value.type == "invalid_request_error"
        assert param is None or (caught.value.param or "").startswith(param)


def test_what_asks_for_nothing_is_taken(client: openai.OpenAI) -> None:
    """Clients send neutral values along."""
    neutral: Any = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "user": "somebody",
        "n": None,
        "extra_body": {"top_k": -1, "min_p": 0, "repetition_penalty": 1.0},
    }
    answer = client.chat.completions.create(model="base", messages=HELLO, max_tokens=1, **neutral)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"model": "base", "prompt": "\\ud800"}',
        b'{"model": "\\udfff", "prompt": "x"}',
        b'{"model": "base", "prompt": [-1]}',
        b'{"model": "base", "prompt": [999999]}',
        b'{"model": "base", "prompt": [true]}',
        b'{"model": "base", "prompt": []}',
        b'{"model": "base", "prompt": ""}',
        b'{"model": "base", "prompt": ["x", [1]]}',
        b'{"model": "base", "prompt": "x", "max_tokens": 0}',
        b'{"model": "base", "prompt": "x", "temperature": NaN}',
        b'{"model": "base", "prompt": "x", "stop": "\\ud800"}',
        b'{"model": "base", "prompt": "x", "seed": 99999999999999999999999999}',
        b"[" * 100_000,
    ],
)
def test_hostile_bodies_are_refused_in_openai_s_shape(served: Served, body: bytes) -> None:
    """Whatever they hold, the fault is the client's."""
    headers = {"content-type": "application/json"}
    answer = httpx2.post(f"{served.url}/v1/completions", content=body, headers=headers, verify=PLAIN)
    assert answer.status_code in (400, 404)
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_concurrent_calls_are_answered_one_after_another(client: openai.OpenAI, engine: ts.Engine) -> None:
    """Each with its own answer."""
    prompts = [f"question {place}" for place in range(8)]

    def ask(prompt: str) -> str:
        return client.completions.create(model="final", prompt=prompt, max_tokens=6, temperature=0).choices[0].text

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, prompts))
    assert answers == [said(engine, "final", prompt, greedy=True, max_new_tokens=6).text for prompt in prompts]


def test_closing_a_stream_ends_the_generation(served: Served, client: openai.OpenAI) -> None:
    """Within two seconds, and so does a client that waits for a whole answer and gives up."""
    asked: Any = {"model": "base", "messages": ENDLESS, "max_tokens": 15_000, "temperature": 0}
    with client.chat.completions.create(**asked, stream=True) as stream:
        assert any(chunk.choices[0].delta.content for chunk in stream)
        assert served.live.slot.holder is not None
        assert served.live.slot.holder.kind == "v1"
    until("the slot is free", lambda: served.live.slot.holder is None, seconds=2)
    with pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(**asked, timeout=0.3)
    until("the slot is free", lambda: served.live.slot.holder is None, seconds=2)


def test_a_job_has_the_model_to_itself(served: Served, client: openai.OpenAI) -> None:
    """Who asks meanwhile is told to come again."""
    with served.live.slot.hold("verify", "job-1"), pytest.raises(openai.InternalServerError, match="verify") as caught:
        client.chat.completions.create(model="base", messages=HELLO, max_tokens=1)
    assert caught.value.status_code == 503
    assert caught.value.code == "model_busy"


def test_without_a_run_there_is_no_model(tmp_path: Path) -> None:
    """Nothing to list, and 404 for every name."""
    with serve(tmp_path) as served, openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client:
        assert not list(client.models.list())
        with pytest.raises(openai.NotFoundError, match="no run is opened"):
            client.completions.create(model="base", prompt="x")


def test_our_own_client_finds_here_what_it_finds_without_a_server(served: Served, engine: ts.Engine) -> None:
    """``--endpoint`` with this address: answers, stop texts and likelihoods."""
    run = served.root / "out" / "run"
    remote, _ = ts.load_engine(run, endpoint=f"{served.url}/v1", models=["base", "final"])
    assert not [found for found in remote.capabilities.findings if found.severity == "warning"]
    rows = [row(0, "a question", "an answer"), row(1, "another", "and another")]
    local = engine.score(["base", "final"], rows)
    for name, scores in remote.score(["base", "final"], rows).items():
        for ours, theirs in zip(local[name], scores, strict=True):
            assert theirs.log_probs == pytest.approx(ours.log_probs, abs=1e-4)
            assert theirs.correct == ours.correct
    settings = ts.GenerationSettings(seed=7, max_new_tokens=10, top_k=20, min_p=0.01, repetition_penalty=1.1)
    requests = [ts.Request("final", chat("hello")), ts.Request("base", "hello")]
    answers = [[one.text for one in which.generate(requests, settings)] for which in (engine, remote)]
    assert answers[0] == answers[1]


def test_the_document_tells_of_these_addresses(served: Served) -> None:
    """With the schemas of their bodies."""
    document = json.loads(httpx2.get(f"{served.url}/api/v1/openapi.json", verify=PLAIN).text)
    assert {"/v1/models", "/v1/chat/completions", "/v1/completions"} <= set(document["paths"])
    assert "prompt" in document["components"]["schemas"]["CompletionBody"]["properties"]
