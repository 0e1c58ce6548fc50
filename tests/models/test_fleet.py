"""Several servers that hold the same models: who answers what, what becomes of one that goes, what is remembered."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.openai_server import Server, serve
from tests.tiny_models import TinyRun, build_tokenizer, chat, peft_alone, row
from tunesmith.errors import DataError, PromptError, TunesmithError
from tunesmith.models.endpoint import Endpoint
from tunesmith.models.endpoint.answers import Habits
from tunesmith.models.endpoint.fleet import _Lane, _Work
from tunesmith.models.endpoint.probe import Probed
from tunesmith.models.endpoint.refusals import Contact
from tunesmith.models.engine import Generation, GenerationSettings, Request
from tunesmith.models.remember import RememberingEngine
from tunesmith.progress import Cancellation

GREEDY = GenerationSettings(greedy=True, max_new_tokens=8)
MODELS = {"base": "base-model", "final": "tuned-model"}
REQUESTS = [Request(name, chat(f"question {i}")) for i in range(12) for name in MODELS]


@pytest.fixture(scope="module")
def models(tiny: TinyRun) -> dict[str, Any]:
    """The base, and the base with its adapter."""

    def base() -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(tiny.base, dtype=torch.float32).eval()

    return {"base-model": base(), "tuned-model": peft_alone(base(), tiny.adapters["final"]).eval()}


@pytest.fixture
def servers(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Server]]:
    """Two servers of both models."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with ExitStack() as stack:
        yield [stack.enter_context(serve(models, build_tokenizer())) for _ in range(2)]


def fleet(servers: list[Server], **options: Any) -> Endpoint:
    """An endpoint over servers, probed while they had their best manners."""
    engine = Endpoint([server.url for server in servers], **{"models": MODELS, "parallel": 3, **options})
    assert engine.capabilities.kind == "endpoint"
    for server in servers:
        server.behave()
    return engine


def texts(answers: list[Generation]) -> list[str]:
    """What was said."""
    return [answer.text for answer in answers]


def codes(engine: Endpoint) -> set[str]:
    """What is found of an engine."""
    return {finding.code for finding in engine.capabilities.findings}


@pytest.fixture(scope="module")
def expected(models: dict[str, Any]) -> list[str]:
    """What one server answers."""
    with pytest.MonkeyPatch.context() as patch, serve(models, build_tokenizer()) as server:
        patch.setenv("NO_PROXY", "127.0.0.1")
        return texts(Endpoint(server.url, models=MODELS).generate(REQUESTS, GREEDY))


def test_work_is_shared_by_who_is_free(servers: list[Server], expected: list[str]) -> None:
    """A slow server is asked for less, nobody for anything twice, and callbacks come in the thread that asked."""
    engine = fleet(servers)
    servers[0].behave(pause_s=0.05)
    told: list[tuple[int, Any]] = []
    pieces: dict[int, list[str]] = {}
    answers = engine.generate(
        REQUESTS,
        GREEDY,
        on_done=lambda index, _: told.append((index, threading.current_thread())),
        on_text=lambda index, piece: pieces.setdefault(index, []).append(piece),
    )
    assert texts(answers) == expected
    assert servers[0].asked + servers[1].asked == len(REQUESTS)
    assert 0 < servers[0].asked < servers[1].asked
    assert max(server.most_active for server in servers) <= 3
    assert sorted(index for index, _ in told) == list(range(len(REQUESTS)))
    assert {thread for _, thread in told} == {threading.current_thread()}
    assert ["".join(pieces.get(index, [])) for index in range(len(REQUESTS))] == expected


def test_scores_are_those_of_one_server(servers: list[Server], tiny: TinyRun) -> None:
    """Rows of both variants, shared out."""
    rows = [row(index, "hi", "yes" * (index + 1)) for index in range(6)]
    one = Endpoint(servers[0].url, models=MODELS, tokenizer_dir=tiny.base).score(list(MODELS), rows)
    engine = fleet(servers, tokenizer_dir=tiny.base)
    assert engine.score(list(MODELS), rows) == one
    assert min(server.asked for server in servers) > 0


def test_a_server_that_goes_away_loses_no_request(models: dict[str, Any], expected: list[str], tmp_path: Path) -> None:
    """Its requests, those under way among them, are answered by the other, told and kept once, and that is said."""
    with pytest.MonkeyPatch.context() as patch, serve(models, build_tokenizer()) as stays:
        patch.setenv("NO_PROXY", "127.0.0.1")
        with serve(models, build_tokenizer()) as goes:
            engine = fleet([goes, stays])
            # Answers break off in the middle, and then nobody takes a request.
            goes.behave(fault="end", pause_s=0.01)
            done: list[int] = []

            def told(index: int, _: Generation) -> None:
                done.append(index)
                if len(done) == 4:
                    goes.behave(key="another")

            kept, pieces = RememberingEngine(engine, tmp_path, named=True), [""] * len(REQUESTS)

            def heard(index: int, piece: str) -> None:
                pieces[index] += piece

            answers = kept.generate(REQUESTS, GREEDY, on_done=told, on_text=heard)
    assert texts(answers) == pieces == expected
    assert sorted(done) == list(range(len(REQUESTS)))
    assert kept.written == len(REQUESTS)
    lost = [finding for finding in engine.capabilities.findings if finding.code == "endpoint_server_lost"]
    assert [finding.params["where"] for finding in lost] == [goes.url]


def test_where_all_servers_are_gone_the_usual_error_names_them(servers: list[Server]) -> None:
    """And says how many requests have no answer."""
    engine = fleet(servers)
    for server in servers:
        server.behave(key="another")
    with pytest.raises(TunesmithError, match="wants another key") as caught:
        engine.generate(REQUESTS, GREEDY)
    assert "24 of 24 requests" in str(caught.value)
    assert caught.value.where == f"{servers[0].url}, {servers[1].url}"
    for server in servers:
        server.behave()
    assert len(engine.generate(REQUESTS[:2], GREEDY)) == 2  # they may come back


@pytest.mark.parametrize("drops_with", ["busy", "reset"])
def test_a_server_that_drops_every_third_request_costs_time_only(
    servers: list[Server], expected: list[str], drops_with: str
) -> None:
    """Each answer once, all of them."""
    engine = fleet(servers)
    servers[0].behave(drops=3, drops_with=drops_with)
    done: list[int] = []
    assert texts(engine.generate(REQUESTS, GREEDY, on_done=lambda index, _: done.append(index))) == expected
    assert sorted(done) == list(range(len(REQUESTS)))


def test_what_one_server_fails_another_is_asked_and_what_all_refuse_is_said(servers: list[Server]) -> None:
    """Whether a prompt fits must not depend on who is asked."""
    engine = fleet(servers)
    servers[0].behave(window=40)
    long = [Request("base", "x" * 60), Request("base", "x" * 700)]
    done: list[int] = []
    with pytest.raises(PromptError) as caught:
        engine.generate([*long, *REQUESTS[:4]], GREEDY, on_done=lambda index, _: done.append(index))
    assert "prompt 1 (base)" in str(caught.value)
    assert "prompt 0" not in str(caught.value)
    assert sorted(done) == [0, 2, 3, 4, 5]


def test_a_server_that_mixes_models_is_asked_for_one_at_a_time_whatever_the_others_do(
    servers: list[Server], expected: list[str]
) -> None:
    """Habits are a server's own."""
    servers[0].behave(mixes=True)
    engine = Endpoint([server.url for server in servers], models=MODELS, parallel=3)
    assert "endpoint_mixes_models" in codes(engine)
    unlike = [one for one in engine.capabilities.findings if one.code == "endpoint_servers_unlike"]
    assert unlike[0].params["which"] == f"endpoint_mixes_models: {servers[0].url}"
    together: list[set[str]] = []

    class Watched(list[str]):
        def append(self, model: str) -> None:
            super().append(model)
            together.append(set(self))

    servers[0].running = Watched()
    assert texts(engine.generate(REQUESTS, GREEDY)) == expected
    assert {len(models) for models in together} == {1}


def test_a_server_that_lacks_a_model_is_refused(models: dict[str, Any], servers: list[Server]) -> None:
    """Every server must list every model."""
    with (
        serve({"base-model": models["base-model"]}, build_tokenizer()) as other,
        pytest.raises(DataError, match="does not list a model") as caught,
    ):
        assert Endpoint([servers[0].url, other.url], models=MODELS).capabilities
    assert caught.value.where == other.url


@pytest.mark.parametrize("scores", [True, False])
def test_a_server_that_holds_another_model_by_the_name_is_refused(
    models: dict[str, Any], servers: list[Server], tiny: TinyRun, scores: bool
) -> None:
    """Told by likelihoods, or by what it says where there are none: here the adapter is missing."""
    same = {"base-model": models["base-model"], "tuned-model": models["base-model"]}
    with serve(same, build_tokenizer()) as other:
        tokens = tiny.base if scores else None
        engine = Endpoint([servers[0].url, other.url], models=MODELS, tokenizer_dir=tokens)
        with pytest.raises(DataError, match="different models by the same name") as caught:
            assert engine.capabilities
    assert caught.value.found == "what base says"
    assert caught.value.expected == "the same tuned-model"


def test_a_server_of_another_dtype_is_said(models: dict[str, Any], servers: list[Server], tiny: TinyRun) -> None:
    """Nearly the same model: figures of both are mixed, and how far they are apart is told."""
    tuned = peft_alone(LlamaForCausalLM.from_pretrained(tiny.base, dtype=torch.float32), tiny.adapters["final"]).eval()
    with torch.no_grad():
        tuned.get_output_embeddings().weight.mul_(1.05)
    near = {"base-model": models["base-model"], "tuned-model": tuned}
    with serve(near, build_tokenizer()) as other:
        engine = Endpoint([servers[0].url, other.url], models=MODELS, tokenizer_dir=tiny.base)
        (apart,) = [one for one in engine.capabilities.findings if one.code == "endpoint_servers_apart"]
    assert apart.params["variant"] == "final"
    assert apart.params["where"] == other.url
    assert 0.035 < float(apart.params["nats"]) <= 0.2  # type: ignore[arg-type]


def test_what_not_all_can_is_not_done(servers: list[Server], tiny: TinyRun) -> None:
    """Scores where all score, settings that all take, and the address of the one that does not."""
    servers[1].behave(echo=False, strict=True, names=frozenset())
    engine = Endpoint([server.url for server in servers], models=MODELS, tokenizer_dir=tiny.base)
    assert not engine.capabilities.scores
    with pytest.raises(DataError, match="how likely"):
        engine.score(["base"], [row(0, "hi", "yes")])
    with pytest.raises(DataError, match="top_k"):
        engine.generate(REQUESTS, GenerationSettings(top_k=5))


def test_a_cancellation_closes_the_connections_to_all(servers: list[Server]) -> None:
    """What came until then is returned, and its text was told."""
    engine, stop = fleet(servers, parallel=8), Cancellation()
    for server in servers:
        server.behave(pause_s=0.05)
    threading.Timer(0.3, stop.cancel).start()
    pieces: dict[int, str] = {}
    answers = engine.generate(REQUESTS, GREEDY, on_text=pieces.__setitem__, cancellation=stop)
    assert any(answer.stop_reason == "cancelled" and answer.text for answer in answers)
    assert [pieces.get(index, "") for index in range(len(answers))] == texts(answers)


def test_answers_are_found_whichever_server_is_asked_later(servers: list[Server], tmp_path: Path) -> None:
    """The fleet grows, shrinks and moves: what was answered by one that it was seen to be like is not asked again."""
    a, b = servers

    def remembered(asked: list[Server], count: int) -> RememberingEngine:
        engine = RememberingEngine(fleet(asked), tmp_path, named=True)
        engine.generate(REQUESTS[:count], GREEDY)
        return engine

    assert remembered([a], 4).written == 4  # a alone
    assert (both := remembered([a, b], 8)).remembered == 4
    assert both.written == 4
    assert (alone := remembered([b], 12)).remembered == 8  # b alone, which did not answer all of them
    assert alone.written == 4
    assert remembered([b, a], 12).remembered == 12
    assert remembered([a], 12).remembered == 12
    lines = sum(len(file.read_text().splitlines()) for file in tmp_path.glob("*.jsonl"))
    assert lines == 12 + 2 * 2  # and one a file that says which others it is like


def test_scores_against_a_reference_are_found_whichever_server_is_first(
    servers: list[Server], tiny: TinyRun, tmp_path: Path
) -> None:
    """A key holds no address."""
    rows = [row(index, "hi", "yes" * (index + 1)) for index in range(3)]
    counts = []
    for order in (servers, servers[::-1], servers[1:]):
        kept = RememberingEngine(fleet(list(order), tokenizer_dir=tiny.base), tmp_path, named=True)
        kept.score(list(MODELS), rows, reference="base")
        counts.append((kept.remembered, kept.written))
    assert counts == [(0, 6), (6, 0), (6, 0)]


def test_a_server_that_is_named_twice_is_one(servers: list[Server]) -> None:
    """With and without the last slash."""
    engine = Endpoint([servers[0].url, f"{servers[0].url}/"], models=MODELS)
    assert engine.capabilities.where == servers[0].url
    assert engine.capabilities.servers == ()


def test_a_server_that_mixes_models_waits_until_one_is_done_before_it_gets_another() -> None:
    """The others are given what comes first."""
    contact, one = Contact("http://127.0.0.1:9/v1", None, 1.0), Probed(Habits(), (), {})
    apart = _Lane(contact, Probed(Habits(apart=True), (), {}), None, 8)
    work: _Work[Any] = _Work(["a", "b", "a", "b", "a"], lambda _lane, _index: None)
    assert work.take(apart) == 0
    apart.running, apart.model = 1, "a"
    assert work.take(_Lane(contact, one, None, 8)) == 1
    assert [work.take(apart) for _ in range(3)] == [2, 4, None]
    apart.running = 0
    assert [work.take(apart), work.take(apart)] == [3, None]
