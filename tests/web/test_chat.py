"""Chat, several variants side by side, and blind votes, as the page asks for them."""

from __future__ import annotations

import json
import shlex
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tunesmith as ts
from tests.tiny_models import TinyRun, chat, row
from tests.web.live_server import Served, engine_of, said, serve, tiny_root, until
from tunesmith.cli.app import app as command_line

HELLO: Any = [{"role": "user", "content": "hello"}]
GREEDY: Any = {"greedy": True, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def served(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server over a tiny run."""
    root = tiny_root(tiny, tmp_path_factory.mktemp("chat"))
    with serve(root) as served:
        yield served


@pytest.fixture(scope="module")
def engine(served: Served) -> ts.Engine:
    """The same variants without a server."""
    return engine_of(served)


def ask(served: Served, **body: Any) -> list[tuple[str, Any]]:
    """All events of a question."""
    return served.events("/api/v1/chat", {"run": "out/run", "messages": HELLO, "settings": GREEDY, **body})


@pytest.mark.parametrize("variant", ["base", "final", "10", "out/run-merged"])
def test_a_variant_answers_as_it_does_without_a_server(served: Served, engine: ts.Engine, variant: str) -> None:
    """The text in pieces, then the whole turn."""
    events = ask(served, variant=variant)
    name = {"10": "checkpoint-10", "out/run-merged": "run-merged"}.get(variant, variant)
    expected = said(engine, name, chat("hello"), **GREEDY)
    assert "".join(data["text"] for kind, data in events if kind == "text") == expected.text
    kind, turn = events[-1]
    assert kind == "done"
    assert (turn["text"], turn["tokens"], turn["stop_reason"]) == (
        expected.text,
        expected.tokens,
        expected.stop_reason,
    )
    assert turn["variant"] == variant
    assert ts.ChatTurn.model_validate({key: turn[key] for key in ts.ChatTurn.model_fields}).question == "hello"


def test_loading_is_told_once(served: Served) -> None:
    """What is in memory already needs no bar."""
    served.live.unload()
    steps = [data["progress"] for kind, data in ask(served) if kind == "loading"]
    assert [step["done"] for step in steps] == list(range(len(steps)))
    assert steps[-1]["done"] == steps[-1]["total"]
    assert not [kind for kind, _ in ask(served) if kind == "loading"]


def test_the_prompt_is_shown_as_the_model_is_given_it(served: Served, engine: ts.Engine) -> None:
    """Special tokens and ids; a plain text is itself."""
    rendered = ts.rendered_prompt(engine, "final", chat("hello"))
    events = ask(served, show_prompt=True)
    shown = dict(events)["prompt"]
    assert shown == {"text": rendered.text, "token_ids": list(rendered.token_ids)}
    assert [kind for kind, _ in events].index("prompt") < [kind for kind, _ in events].index("text")
    assert events[-1][1]["prompt"] == rendered.text
    plain = ask(served, plain=True, show_prompt=True)
    assert dict(plain)["prompt"]["text"] == "hello"
    assert plain[-1][1]["text"] == said(engine, "final", "hello", **GREEDY).text


def test_earlier_turns_are_part_of_the_question(served: Served, engine: ts.Engine) -> None:
    """All of them, the system's first."""
    turns = [("system", "Be kind."), ("user", "a"), ("assistant", "b"), ("user", "c")]
    messages = [{"role": role, "content": text} for role, text in turns]
    turn = ask(served, messages=messages)[-1][1]
    prompt = tuple(ts.Message(role=role, content=text) for role, text in turns)
    assert turn["text"] == said(engine, "final", prompt, **GREEDY).text
    assert turn["question"] == "c"
    assert turn["command_is_partial"]


def test_the_command_that_is_shown_says_the_same(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Typed in the root, with its quotes; nothing in a question is taken for an option or by the shell."""
    settings = {"max_new_tokens": 9, "temperature": 1.5, "seed": 4, "stop": ["q", "--x"], "top_k": 50}
    question = 'it\'s "$HOME" `id`; rm --greedy\n中文'
    messages = [{"role": "system", "content": "Be $kind."}, {"role": "user", "content": question}]
    turn = ask(served, variant="10", messages=messages, settings=settings)[-1][1]
    assert not turn["command_is_partial"]
    words = shlex.split(turn["command"])
    assert words[:3] == ["tunesmith", "chat", "out/run"]
    assert question in words
    monkeypatch.chdir(served.root)
    result = CliRunner().invoke(command_line, [*words[1:], "--dtype", "fp32", "--json"])
    assert result.exit_code == 0, result.output
    typed = json.loads(result.stdout)
    assert (typed["text"], typed["stop_reason"]) == (turn["text"], turn["stop_reason"])


@pytest.mark.parametrize("plain", [False, True])
def test_the_curl_that_is_shown_says_the_same(served: Served, plain: bool) -> None:
    """By a real shell, over ``/v1``."""
    messages = [{"role": "user", "content": "it's $HOME 中文"}]
    turn = ask(served, variant="10", messages=messages, plain=plain, settings={**GREEDY, "min_p": 0.1})[-1][1]
    command = turn["curl"].replace("curl ", "curl --silent --noproxy '*' ", 1).replace('"10"', '"checkpoint-10"')
    answer = json.loads(subprocess.run(["sh", "-c", command], capture_output=True, check=True).stdout)
    (choice,) = answer["choices"]
    assert (choice["text"] if plain else choice["message"]["content"]) == turn["text"]


def test_several_answer_side_by_side(served: Served, engine: ts.Engine) -> None:
    """Their texts come mixed, each is whole, and what they share is told word by word."""
    variants = ["base", "final", "10", "out/run-merged"]
    settings = {"greedy": True, "max_new_tokens": 60}
    body = {
        "run": "out/run",
        "variants": variants,
        "messages": [{"role": "user", "content": "2"}],
        "settings": settings,
    }
    events = served.events("/api/v1/chat/compare", body)
    names = ["base", "final", "checkpoint-10", "run-merged"]
    expected = {v: said(engine, name, chat("2"), **settings) for v, name in zip(variants, names, strict=True)}
    pieces = [(data["variant"], data["text"]) for kind, data in events if kind == "text"]
    for variant in variants:
        assert "".join(text for name, text in pieces if name == variant) == expected[variant].text
    order = [name for name, _ in pieces]
    assert order.index("final") < len(order) - 1 - order[::-1].index("base")  # beside each other, not in turn
    replies = {data["variant"]: data for kind, data in events if kind == "reply"}
    assert {name: reply["stop_reason"] for name, reply in replies.items()} == {
        name: reply.stop_reason for name, reply in expected.items()
    }
    done = events[-1][1]
    for diff in done["diffs"]:
        left = "".join(part["text"] for part in diff["segments"] if part["kind"] != "right")
        right = "".join(part["text"] for part in diff["segments"] if part["kind"] != "left")
        assert (left, right) == (expected[diff["left"]].text, expected[diff["right"]].text)
        assert diff["similarity"] == ts.similarity(left, right)
    assert len(done["diffs"]) == 6
    assert done["marks"]["base"] == {"different": False, "truncated": True, "regressed": False}
    assert done["marks"]["final"]["different"]


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"variant": "checkpoint-11"}, "NotThereError"),
        ({"messages": [{"role": "user", "content": "x" * 25_000}]}, "PromptError"),
    ],
)
def test_what_goes_wrong_later_is_an_event(served: Served, body: dict[str, Any], error: str) -> None:
    """With the way out."""
    kind, told = ask(served, **body)[-1]
    assert kind == "error"
    assert told["error"]["error"] == error
    assert told["error"]["next"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"variant": "../../etc"}, 400),
        ({"variant": "out/nowhere"}, 404),
        ({"run": "/etc"}, 400),
        ({"run": "nowhere"}, 404),
        ({"base": "/"}, 400),
        ({"messages": []}, 422),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 422),
        ({"messages": [{"role": "tool", "content": "x"}]}, 422),
        ({"settings": {"max_new_tokens": 0}}, 422),
        ({"settings": {"warmth": 1}}, 422),
        ({"settings": {"stop": ["\ud800"]}}, 422),
        ({"settings": {"seed": "\ud800"}}, 422),
        ({"nonsense": 1}, 422),
    ],
)
def test_what_is_wrong_at_once_is_a_refusal(served: Served, body: dict[str, Any], status: int) -> None:
    """With a status, before a stream begins."""
    answer = served.post("/api/v1/chat", {"run": "out/run", "messages": HELLO, **body})
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["what"]
    assert served.live.slot.holder is None


def test_one_variant_twice_is_no_comparison(served: Served) -> None:
    """By whatever names."""
    body = {"run": "out/run", "variants": ["10", "checkpoint-10"], "messages": HELLO}
    assert served.post("/api/v1/chat/compare", body).status_code == 400
    assert served.post("/api/v1/chat/compare", {**body, "variants": ["10"]}).status_code == 422


def test_a_job_has_the_model_and_is_named(served: Served) -> None:
    """409, with the job's id."""
    with served.live.slot.hold("merge", "job-9"):
        answer = served.post("/api/v1/chat", {"run": "out/run", "messages": HELLO})
        assert answer.status_code == 409
        assert answer.json()["error"]["holder"]["job"] == "job-9"
        assert served.post("/api/v1/unload", {}).status_code == 409
    assert served.post("/api/v1/unload", {}).status_code == 200
    assert served.live.loaded is None


def test_a_job_waits_for_the_generation_and_then_has_its_turn(served: Served) -> None:
    """And a question that comes meanwhile is refused, for it would wait for the job."""
    held = threading.Event()

    def job() -> None:
        with served.live.slot.hold("merge", "job-7"):
            held.set()

    body = {
        "run": "out/run",
        "variant": "base",
        "messages": [{"role": "user", "content": "2"}],
        "settings": {"greedy": True, "max_new_tokens": 19_000},
    }
    with served.stream("/api/v1/chat", body) as events:
        assert any(kind == "text" for kind, _ in events)
        thread = threading.Thread(target=job, daemon=True)
        thread.start()
        until("the job waits", lambda: len(served.live.slot._line) == 2)
        assert not held.is_set()
        assert served.post("/api/v1/chat", {"run": "out/run", "messages": HELLO}).status_code == 409
    assert held.wait(10)  # the whole answer would take longer
    thread.join()


@pytest.fixture
def compared(served: Served) -> str:
    """A comparison that a job returned."""
    run = served.root / "out" / "run"
    prompts = [row(index, f"question {index}") for index in range(3)]
    settings = ts.GenerationSettings(**GREEDY)
    comparison = ts.compare(run, ["base", "final"], prompts, settings=settings, dtype="fp32")
    jobs = served.app.state.jobs
    job = jobs.start("compare", {"run": "out/run", "prompts_text": "x", "settings": GREEDY})
    until("the job has ended", lambda: job.ended)
    job.record = comparison
    return str(job.id)


def test_votes_are_cast_blindly_and_told_at_the_end(served: Served, compared: str) -> None:
    """No name before all is voted on; a stale pair is not voted on twice; a vote can be taken back."""
    state = served.post("/api/v1/votes/open", {"job": compared}).json()
    assert state["progress"] == {"done": 0, "total": 3}
    assert state["tally"] is None
    assert "base" not in json.dumps(state["pair"])
    assert {len(state["pair"]["left"]["text"]) > 0, state["pair"]["prompt"][-1]["role"] == "user"} == {True}
    first = state["pair"]["id"]
    voted = served.post("/api/v1/votes/cast", {"job": compared, "choice": "left", "pair": first})
    assert voted.json()["progress"]["done"] == 1
    again = served.post("/api/v1/votes/cast", {"job": compared, "choice": "left", "pair": first})
    assert again.status_code == 400
    back = served.post("/api/v1/votes/cast", {"job": compared, "choice": "undo"}).json()
    assert (back["progress"]["done"], back["pair"]["id"]) == (0, first)
    for choice in ("right", "tie", "skip"):
        state = served.post("/api/v1/votes/cast", {"job": compared, "choice": choice}).json()
    assert state["pair"] is None
    (tally,) = state["tally"]["tallies"]
    assert (tally["wins"] + tally["losses"], tally["ties"], tally["skipped"]) == (1, 1, 1)
    assert tally["finding"]["code"] == "vote_too_few"
    assert Path(state["path"]).read_text().count("\n") == 5
    assert served.post("/api/v1/votes/cast", {"job": compared, "choice": "tie"}).status_code == 400
    Path(state["path"]).unlink()


def test_names_are_told_to_who_asks(served: Served, compared: str) -> None:
    """And votes are kept where that is said, within the root."""
    asked = {"job": compared, "path": "mine.jsonl"}
    state = served.post("/api/v1/votes/open?reveal=1", asked).json()
    assert {state["tally"]["tallies"][0][name] for name in ("variant", "other")} == {"base", "final"}
    served.post("/api/v1/votes/cast", {"job": compared, "choice": "left"})
    assert (served.root / "mine.jsonl").is_file()
    assert served.post("/api/v1/votes/open", {**asked, "path": "../mine.jsonl"}).status_code == 400
    assert served.post("/api/v1/votes/open", {"job": "nothing"}).status_code == 404
