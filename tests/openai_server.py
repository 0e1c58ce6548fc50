"""A small server that speaks OpenAI's protocol over tiny real models, with real servers' manners and faults."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

KNOWN = {
    *("model", "messages", "prompt", "stream", "stream_options", "max_tokens", "temperature", "top_p", "seed", "stop"),
    *("echo", "logprobs"),
}
NAMES = {"top_k", "min_p", "repetition_penalty"}


@dataclass(frozen=True)
class Manners:
    """How a server behaves.

    Attributes:
        lists: whether ``/models`` exists.
        list_fails: whether ``/models`` fails, as transformers' does without a hub's cache; a number for so many times.
        list_breaks: at which of such requests the connection is closed instead.
        listed: the models that it lists; None lists all.
        any_name: whether it answers to every name, with its first model, as llama.cpp does.
        chat: whether conversations are answered.
        plain: whether plain text is.
        echo: whether a prompt's log-probabilities are told, as OpenAI did.
        prompt_logprobs: whether they are told as vLLM does.
        token_ids: whether a prompt may be token ids.
        beginning: tokens that the server puts before every plain text.
        strict: whether unknown settings are refused; else they are ignored.
        names: the settings beyond OpenAI's that it knows.
        heeds: those of them, and of temperature and seed, that do anything.
        stops: ``told``, ``included`` or ``hidden``.
        usage: ``asked``, ``always`` or ``never``.
        window: tokens of the context window.
        key: the key that is wanted.
        pause_s: rest after every token.
        fault: what goes wrong in answers.
        fault_on: a text that a prompt must hold for it to go wrong.
        interrupts: whether an answer is broken off when the next request comes, as llama-cpp-python does.
        failures: with how many 503 a request is met before it is answered.
        drops: of how many requests each last one is dropped; 0 drops none.
        drops_with: ``busy`` for a 503, ``reset`` for a connection that is closed.
        children: ``listed`` lists adapters below the first model, as vLLM does; ``prefixed`` has them asked for as
            ``base:adapter`` besides, where any other name reaches the base, as SGLang does.
        mixes: whether the first model's prompts that run beside another's are answered by the last, as vLLM's CPU
            kernels do.
        foreign: whether a prompt's tokens are told as others than were sent.
    """

    lists: bool = True
    list_fails: bool | int = False
    list_breaks: tuple[int, ...] = ()
    listed: tuple[str, ...] | None = None
    any_name: bool = False
    chat: bool = True
    plain: bool = True
    echo: bool = True
    prompt_logprobs: bool = False
    token_ids: bool = True
    beginning: tuple[int, ...] = ()
    strict: bool = True
    names: frozenset[str] = frozenset(NAMES)
    heeds: frozenset[str] = frozenset(NAMES | {"temperature", "seed"})
    stops: str = "told"
    usage: str = "asked"
    window: int = 512
    key: str | None = None
    pause_s: float = 0.0
    fault: str | None = None
    fault_on: str = ""
    interrupts: bool = False
    failures: int = 0
    drops: int = 0
    drops_with: str = "busy"
    children: str = ""
    mixes: bool = False
    foreign: bool = False


@dataclass(eq=False)
class Server:
    """A running server.

    Attributes:
        url: its base address.
        manners: how it behaves; may be replaced while it runs.
        seen: every request's path and body.
        generated: how many tokens it has generated.
        active: how many requests it is answering.
        most_active: the most that it has answered at once.
        asked: how many prompts it was given.
        listings: how often it was asked for its models.
        running: the models whose prompts it is answering.
    """

    models: Mapping[str, Any]
    tokenizer: Any
    url: str = ""
    manners: Manners = Manners()
    seen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    generated: int = 0
    active: int = 0
    most_active: int = 0
    asked: int = 0
    listings: int = 0
    running: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    failures: dict[str, int] = field(default_factory=dict)

    def behave(self, **changes: Any) -> None:
        """Take on other manners than the default, and forget what was seen."""
        self.manners = replace(Manners(), **changes)
        self.seen, self.generated, self.most_active, self.failures, self.asked = [], 0, 0, {}, 0
        self.listings = 0


@contextmanager
def serve(models: Mapping[str, Any], tokenizer: Any) -> Iterator[Server]:
    """Serve models at a free port of this machine until the block ends."""
    server = Server(models, tokenizer)

    class Handler(_Handler):
        state = server

    class Http(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that hangs up is no error."""

    with Http(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()


class _RefusalError(Exception):
    def __init__(self, status: int, message: str, **more: Any) -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": {"message": message, **more}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    state: Server

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """List the models."""
        self._answer({}, self._list)

    def do_POST(self) -> None:
        """Answer a prompt."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(body, lambda: self._complete(body))

    def _answer(self, body: dict[str, Any], work: Callable[[], None]) -> None:
        state = self.state
        with state.lock:
            state.seen.append((self.path, body))
            state.active += 1
            state.most_active = max(state.most_active, state.active)
        try:
            if state.manners.key and self.headers["Authorization"] != f"Bearer {state.manners.key}":
                raise _RefusalError(401, f"Incorrect key: {self.headers['Authorization']}")
            work()
        except _RefusalError as refused:
            self._json(refused.status, refused.body)
        except OSError:
            self.close_connection = True
        finally:
            with state.lock:
                state.active -= 1

    def _json(self, status: int, document: Any) -> None:
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(data)

    def _list(self) -> None:
        self.state.listings += 1
        if self.state.manners.list_fails:
            if self.state.listings in self.state.manners.list_breaks:
                raise OSError  # the connection is closed without a word
            if self.state.manners.list_fails is True or self.state.listings <= self.state.manners.list_fails:
                raise _RefusalError(500, "Internal Server Error")
        if self.state.manners.fault == "web page":
            self._json(200, b"<html>welcome</html>")
        elif not self.state.manners.lists or self.path != "/v1/models":
            raise _RefusalError(404, "Not Found")
        else:
            names = self.state.models if self.state.manners.listed is None else self.state.manners.listed
            first = next(iter(self.state.models))
            below = {"parent": first} if self.state.manners.children else {}
            data = [{"id": name, "object": "model", **({} if name == first else below)} for name in names]
            self._json(200, {"object": "list", "data": data})

    def _complete(self, body: dict[str, Any]) -> None:
        manners, state = self.state.manners, self.state
        chat = self.path == "/v1/chat/completions"
        if not (manners.chat if chat else manners.plain and self.path == "/v1/completions"):
            raise _RefusalError(404, "Not Found")
        if manners.any_name and body["model"] not in state.models:
            body["model"] = next(iter(state.models))
        if manners.children == "prefixed":
            _, _, child = body["model"].partition(":")
            body["model"] = child if child in state.models else next(iter(state.models))
        if body["model"] not in state.models:
            raise _RefusalError(404, f"The model {body['model']!r} does not exist.")
        known = KNOWN | manners.names | ({"prompt_logprobs"} if manners.prompt_logprobs else set())
        if manners.strict and (unknown := set(body) - known):
            raise _RefusalError(400, f"Unrecognized request argument supplied: {', '.join(sorted(unknown))}")
        with state.lock:
            state.asked += 1
            dropped = manners.drops and state.asked % manners.drops == 0
        if dropped and manners.drops_with == "busy":
            raise _RefusalError(503, "Busy")
        if dropped:
            raise OSError  # the connection is closed without a word
        with state.lock:
            name = json.dumps(body, sort_keys=True)
            state.failures[name] = state.failures.get(name, 0) + 1
            if state.failures[name] <= manners.failures:
                raise _RefusalError(503, "Loading model")
        ids = self._ids(body, chat=chat)
        if len(ids) + body["max_tokens"] > manners.window:
            raise _RefusalError(
                400,
                f"This model's maximum context length is {manners.window} tokens. However, you requested "
                f"{len(ids) + body['max_tokens']} tokens ({len(ids)} in the messages, {body['max_tokens']} in the "
                "completion).",
                code="context_length_exceeded",
            )
        fault = manners.fault if manners.fault_on in json.dumps(body, ensure_ascii=False) else None
        with self._beside(body):
            if body.get("stream"):
                self._stream(body, ids, chat=chat, fault=fault)
            else:
                self._whole(body, ids)

    @contextmanager
    def _beside(self, body: dict[str, Any]) -> Iterator[None]:
        """Answer by the last model what runs beside it, where that is the server's manner."""
        state, model, models = self.state, body["model"], list(self.state.models)
        with state.lock:
            state.running.append(model)
        try:
            if state.manners.mixes:
                time.sleep(0.03)  # others that were sent at once are there now
                with state.lock:
                    others = set(state.running) - {model}
                if model == models[0] and others:
                    body["model"] = models[-1]
                time.sleep(0.03)
            yield
        finally:
            with state.lock:
                state.running.remove(model)

    def _ids(self, body: dict[str, Any], *, chat: bool) -> list[int]:
        tokenizer, prompt = self.state.tokenizer, body.get("prompt")
        if chat:
            text = tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if isinstance(prompt, list):
            if not self.state.manners.token_ids:
                raise _RefusalError(400, "prompt must be a string")
            return prompt
        return [*self.state.manners.beginning, *tokenizer(prompt)["input_ids"]]

    def _whole(self, body: dict[str, Any], ids: list[int]) -> None:
        manners = self.state.manners
        token = next(self._tokens(body, ids))
        choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": "length", "logprobs": None}
        with torch.inference_mode():
            logits = self.state.models[body["model"]](input_ids=torch.tensor([[*ids, token]])).logits[0]
        table = torch.log_softmax(logits.double(), -1)
        own = [table[place - 1, index].item() for place, index in enumerate([*ids, token]) if place]
        best = table.max(-1)
        if body.get("echo") and manners.echo:
            tops = [{f"token_id:{i}": v} for v, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
            told = [f"token_id:{index + self.state.manners.foreign}" for index in [*ids, token]]
            choice["logprobs"] = {"tokens": told, "token_logprobs": [None, *own], "top_logprobs": [None, *tops[:-1]]}
        elif body.get("logprobs"):
            choice["logprobs"] = {"token_logprobs": own[-1:], "top_logprobs": [{"x": own[-1]}]}
        if body.get("prompt_logprobs") and manners.prompt_logprobs:
            ranks = (table[:-1] > table[:-1].gather(1, torch.tensor([*ids, token])[1:, None])).sum(-1) + 1
            choice["prompt_logprobs"] = [
                None,
                *({str(i): {"logprob": v, "rank": int(r)}} for i, v, r in zip(ids[1:], own, ranks, strict=False)),
            ]
        self._json(200, {"choices": [choice], "usage": {"prompt_tokens": len(ids), "completion_tokens": 1}})

    def _tokens(self, body: dict[str, Any], ids: list[int]) -> Iterator[int]:
        heeds, given = self.state.manners.heeds, self.state.manners.names & set(body)
        seed = body.get("seed") if "seed" in heeds else None
        generator = torch.Generator()
        generator.manual_seed(seed if seed is not None else time.monotonic_ns() % 2**31)
        temperature = body.get("temperature", 1.0) if "temperature" in heeds else 0.0
        now = list(ids)
        for _ in range(body["max_tokens"]):
            with torch.no_grad():
                logits = self.state.models[body["model"]](input_ids=torch.tensor([now])).logits[0, -1].float().clone()
            if "repetition_penalty" in given & heeds:
                at = torch.tensor(sorted(set(now)))
                penalty = body["repetition_penalty"]
                logits[at] = torch.where(logits[at] > 0, logits[at] / penalty, logits[at] * penalty)
            if temperature == 0:
                token = int(logits.argmax())
            else:
                odds = torch.softmax(logits / temperature, -1)
                if "top_k" in given & heeds and body["top_k"] < len(odds):
                    odds[odds < odds.topk(body["top_k"]).values[-1]] = 0
                if "min_p" in given & heeds:
                    odds[odds < body["min_p"] * odds.max()] = 0
                token = int(torch.multinomial(odds, 1, generator=generator))
            with self.state.lock:
                self.state.generated += 1
            now.append(token)
            yield token

    def _stream(self, body: dict[str, Any], ids: list[int], *, chat: bool, fault: str | None) -> None:
        manners = self.state.manners
        if fault == "silence":
            time.sleep(manners.pause_s or 30)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.close_connection = True
        self.end_headers()
        stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or []
        text, sent, count, ending = "", 0, 0, {"finish_reason": "length"}
        made: list[int] = []
        for token in self._tokens(body, ids):
            count += 1
            if token in (0, self.state.tokenizer.convert_tokens_to_ids("<|im_end|>")):
                ending = {"finish_reason": "stop"} | ({"stop_reason": None} if manners.stops == "told" else {})
                break
            made.append(token)
            text = self.state.tokenizer.decode(made, skip_special_tokens=True)
            hit = next((stop for stop in stops if stop in text), None)
            if hit is not None:
                text = text[: text.find(hit) + (len(hit) if manners.stops == "included" else 0)]
                ending = {"finish_reason": "stop"} | ({"stop_reason": hit} if manners.stops == "told" else {})
                break
            whole = len(text) - max((len(stop) - 1 for stop in stops), default=0)
            if not text.endswith("\ufffd") and whole > sent:
                self._piece(text[sent:whole], {"finish_reason": None}, chat=chat)
                sent = whole
            time.sleep(manners.pause_s)
            if manners.interrupts and self.state.seen[-1][1] is not body:
                return
            if fault and count == 3:
                self._go_wrong(fault)
                return
        self._piece(text[sent:], {"finish_reason": None}, chat=chat)
        self._piece("", ending, chat=chat)
        if manners.usage == "always" or (
            manners.usage == "asked" and (body.get("stream_options") or {}).get("include_usage")
        ):
            self._event({"choices": [], "usage": {"prompt_tokens": len(ids), "completion_tokens": count}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _go_wrong(self, fault: str) -> None:
        documents: dict[str, Any] = {
            "not json": b"data: {nonsense\n\n",
            "a number": b"data: 5\n\n",
            "wrong types": {"choices": [{"index": 0, "delta": {"content": 7}, "text": 7, "finish_reason": 7}]},
            "error event": {"error": {"message": "out of memory\x1b[31m"}},
            "filter": {"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": "content_filter"}]},
            "flood": {"choices": [{"index": 0, "delta": {"content": "x" * 9_000_000}, "text": "x" * 9_000_000}]},
        }
        if fault in documents:
            document = documents[fault]
            self.wfile.write(document) if isinstance(document, bytes) else self._event(document)
            self.wfile.write(b"data: [DONE]\n\n")
        elif fault == "hang":
            time.sleep(30)
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.connection.close()
        # "end": the stream simply ends

    def _piece(self, text: str, ending: dict[str, Any], *, chat: bool) -> None:
        if text or ending["finish_reason"]:
            said = {"delta": {"content": text}} if chat else {"text": text}
            self._event({"object": "chunk", "choices": [{"index": 0, **said, **ending}]})

    def _event(self, document: Any) -> None:
        self.wfile.write(f"data: {json.dumps(document)}\n\n".encode())
