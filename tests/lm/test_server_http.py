"""The server's HTTP interface in one process, with scripted answers: errors, limits, slow clients, streams."""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASK = {"messages": [{"role": "user", "content": "x"}]}
CALL = ['<tool_call>{"name": "f", ', '"arguments": {}}', "</tool_call>"]


class Tokenizer(Namespace):
    """The smallest tokenizer that the server accepts: characters are tokens."""

    has_chat_template = has_tool_calling = True
    has_thinking = False
    response_initial_state = structural_markers = None
    response_transitions: dict[str, Any] = {}
    tool_call_start, tool_call_end = "<tool_call>", "</tool_call>"

    def tool_parser(self, text: str, tools: Any) -> Any:
        return json.loads(text)

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        self.seen = options
        tools = json.dumps(options["tools"]) if options["tools"] and self.has_tool_calling else ""
        return tools + "".join(message["content"] for message in messages)

    def encode(self, text: str, **_: Any) -> list[int]:
        return list(map(ord, text))

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


class Script:
    """An engine that answers with the texts of `script`, and raises the exceptions in it."""

    vocabulary = 128
    stopping = False

    def __init__(self) -> None:
        self.tokenizer = Tokenizer()
        self.script: list[Any] = []
        self.finish = "stop"
        self.waiting = 0

    def submit(self, request: Any, ids: list[int]) -> Any:
        self.waiting += 1
        return Namespace(request=request, ids=ids, cached=1)

    def leave(self, answer: Any) -> None:
        self.waiting -= 1

    def pieces(self, answer: Any, check_client: Any, progress: Any) -> Iterator[Any]:
        from ringattn.lm.server.engine import AnswerPiece

        progress(0, len(answer.ids))
        for i, text in enumerate(self.script, 1):
            check_client()
            if isinstance(text, Exception):
                raise text
            logprob = None if answer.request.logprobs is None else -float(i)
            top = [(65 + k, -float(k) - 0.5) for k in range(answer.request.logprobs or 0)]
            yield AnswerPiece(text, 64 + i, logprob, top, self.finish if i == len(self.script) else None)


class Client:
    """A running server and requests to it."""

    def __init__(self, port: int, engine: Script):
        self.port = port
        self.engine = engine

    def ask(self, path: str, body: Any = None, method: str = "POST", **headers: str) -> tuple[int, Any]:
        text = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            connection.request(method, path, text, headers)
            answer = connection.getresponse()
            found = answer.read().decode()
        return answer.status, json.loads(found) if answer.headers["Content-Type"] == "application/json" else found

    def say(self, path: str, script: list[Any], **body: Any) -> Any:
        self.engine.script = script
        return self.ask(path, body)[1]

    def stream(self, path: str, script: list[Any], **body: Any) -> list[Any]:
        """Ask for a stream; return its chunks."""
        text = self.say(path, script, stream=True, **body)
        events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        return [json.loads(event) if event != "[DONE]" else event for event in events]

    def open(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)


@pytest.fixture
def client() -> Iterator[Client]:
    from ringattn.lm.server import Settings, open_server

    engine = Script()
    settings = Settings("folder/tiny", {"max_tokens": 9}, {"enable_thinking": False, "more": 1}, ("a", "b"), 1 << 20)
    server = open_server(engine, settings, "127.0.0.1", 0)  # type: ignore[arg-type]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield Client(server.server_address[1], engine)
    server.shutdown()
    server.server_close()
    deadline = time.monotonic() + 5
    while engine.waiting and time.monotonic() < deadline:
        time.sleep(0.02)
    assert engine.waiting == 0  # every request that was queued has left


@pytest.mark.parametrize(
    "method, path, status, code",
    [
        ("GET", "/nothing", 404, "not_found"),
        ("POST", "/v1/embeddings", 404, "not_found"),
        ("PUT", "/nothing", 404, "not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", TEXT, 405, "method_not_allowed"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/gpt", 404, "model_not_found"),
        ("BREW", CHAT, 501, "bad_request"),
    ],
)
def test_a_wrong_address_or_method_is_an_error_in_json(
    client: Client, method: str, path: str, status: int, code: str
) -> None:
    found, answer = client.ask(path, b"", method)
    assert found == status and answer["error"]["code"] == code and answer["error"]["message"]
    assert answer["error"]["type"] == ("server_error" if status > 500 else "invalid_request_error")


def test_head_is_get_without_the_body(client: Client) -> None:
    """Balancers of load ask for the health of a server by HEAD."""
    with closing(client.open()) as one:
        one.sendall(b"HEAD /health HTTP/1.1\r\n\r\n")
        answer = one.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.0 200 ") and b"\r\nContent-Length: 16\r\n" in answer
    assert answer.endswith(b"\r\n\r\n")


def test_a_wrong_method_is_told_the_right_ones(client: Client) -> None:
    with closing(client.open()) as one:
        one.sendall(b"PUT /health HTTP/1.1\r\n\r\n")
        assert b"\r\nAllow: GET, HEAD, OPTIONS\r\n" in one.makefile("rb").read()


def test_an_error_in_the_form_of_openai(client: Client) -> None:
    status, found = client.ask(CHAT, {**ASK, "n": 2})
    message = "n: 2, expected 1: a request has one answer"
    error = {"message": message, "type": "invalid_request_error", "param": "n", "code": "invalid_value"}
    assert (status, found) == (400, {"error": error})
    status, found = client.ask(CHAT, {**ASK, "model": "gpt"})
    assert (
        status == 404 and found["error"]["code"] == "model_not_found" and "'folder/tiny'" in found["error"]["message"]
    )


def test_half_of_a_surrogate_pair(client: Client) -> None:
    status, found = client.ask(TEXT, {"prompt": "w1 \ud83d"})
    message = "the prompt has \\ud83d, half of a surrogate pair, expected Unicode text"
    assert (status, found["error"]["message"]) == (400, message)


def test_models_health_and_origins(client: Client) -> None:
    assert client.ask("/health", method="GET") == (200, {"status": "ok"})
    assert client.ask("/v1/models", method="GET")[1]["data"][0]["id"] == "folder/tiny"
    assert client.ask("/v1/models/tiny?x=y", method="GET")[1]["id"] == "folder/tiny"
    with closing(client.open()) as one:
        one.sendall(b"OPTIONS /health HTTP/1.1\r\nOrigin: b\r\n\r\n")
        assert b"Access-Control-Allow-Origin: b\r\n" in one.recv(1 << 12)
    client.engine.stopping = True
    assert client.ask("/health", method="GET")[0] == 503


def test_a_whole_answer(client: Client) -> None:
    found = client.say(CHAT, ["It ", "is"], **ASK)
    assert found["model"] == "folder/tiny" and found["object"] == "chat.completion"
    choice = {"index": 0, "message": {"role": "assistant", "content": "It is"}}
    assert found["choices"] == [{**choice, "logprobs": None, "finish_reason": "stop"}]
    tokens = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    assert found["usage"] == {**tokens, "prompt_tokens_details": {"cached_tokens": 1}}
    found = client.say(TEXT, ["<tool_call>", "a"], prompt="x")  # a text has no markers
    assert found["object"] == "text_completion" and found["choices"][0]["text"] == "<tool_call>a"


def test_a_stream_of_chunks(client: Client) -> None:
    *chunks, usage, done = client.stream(CHAT, ["It <", "is>"], **ASK, stream_options={"include_usage": True})
    assert [c["choices"][0]["delta"] for c in chunks] == [
        {"role": "assistant", "content": "It "},
        {"content": "<is>"},
    ]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, "stop"]
    assert {c["object"] for c in [*chunks, usage]} == {"chat.completion.chunk"} and done == "[DONE]"
    assert {c["model"] for c in [*chunks, usage]} == {"folder/tiny"} and len({c["id"] for c in [*chunks, usage]}) == 1
    assert all(c["usage"] is None for c in chunks) and usage["usage"]["total_tokens"] == 3 and usage["choices"] == []
    *chunks, done = client.stream(TEXT, ["It ", "is"], prompt="x")
    assert [c["choices"][0]["text"] for c in chunks] == ["It ", "is"] and "usage" not in chunks[0]


@pytest.mark.parametrize("template", [True, False])
def test_tools_need_a_template_that_knows_them(client: Client, monkeypatch: pytest.MonkeyPatch, template: bool) -> None:
    """Else the model would not hear of them."""
    monkeypatch.setattr(Tokenizer, "has_tool_calling", False)
    monkeypatch.setattr(Tokenizer, "has_chat_template", template)
    tools = [{"type": "function", "function": {"name": "f"}}]
    status, found = client.ask(CHAT, {**ASK, "tools": tools})
    assert (status, found["error"]["param"]) == (400, "tools") and "knows no tools" in found["error"]["message"]
    assert client.say(CHAT, ["so"], **ASK, tools=tools, tool_choice="none")["choices"][0]["message"]["content"] == "so"


def test_tool_calls(client: Client) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    choice = client.say(CHAT, ["so", *CALL], **ASK, tools=tools)["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert (choice["message"]["content"], choice["finish_reason"]) == ("so", "tool_calls")
    *chunks, _ = client.stream(CHAT, [*CALL, *CALL], **ASK, tools=tools)
    calls = [call for c in chunks for call in c["choices"][0]["delta"].get("tool_calls", ())]
    assert [call["index"] for call in calls] == [0, 1] and chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    for stream in (True, False):  # a stop word ended it within the call
        ask = client.stream if stream else lambda *a, **b: [client.say(*a, **b)]
        choices = [c["choices"][0] for c in ask(CHAT, CALL[:1], **ASK, tools=tools) if c != "[DONE]"]
        parts = [choice.get("delta") or choice.get("message") for choice in choices]
        assert "".join(part.get("content") or "" for part in parts) == '{"name": "f", '
        assert choices[-1]["finish_reason"] == "stop" and not any("tool_calls" in part for part in parts)


def test_logprobs(client: Client) -> None:
    found = client.say(CHAT, ["a", "b"], **ASK, logprobs=True, top_logprobs=1)["choices"][0]["logprobs"]
    likeliest = [{"id": 65, "token": "A", "logprob": -0.5, "bytes": [65]}]
    first = {"id": 65, "token": "A", "logprob": -1.0, "bytes": [65], "top_logprobs": likeliest}
    second = {"id": 66, "token": "B", "logprob": -2.0, "bytes": [66], "top_logprobs": likeliest}
    assert found == {"content": [first, second], "refusal": None}
    # In a stream they come with the text that they belong to, also where it was held back for a marker.
    *chunks, _ = client.stream(CHAT, ["a<", "b"], **ASK, logprobs=True, top_logprobs=1)
    assert [c["choices"][0]["logprobs"]["content"] for c in chunks] == [[first], [second]]
    *chunks, _ = client.stream(CHAT, ["<", "b"], **ASK, logprobs=True, top_logprobs=1)
    assert [c["choices"][0]["logprobs"]["content"] for c in chunks] == [[first, second]]
    text = client.say(TEXT, ["a", "b"], prompt="x", logprobs=1)["choices"][0]["logprobs"]
    assert (text["tokens"], text["token_logprobs"], text["text_offset"]) == (["A", "B"], [-1.0, -2.0], [0, 1])
    assert text["top_logprobs"] == [{"A": -0.5}] * 2 and text["content"] == [first, second]


def test_an_answer_that_breaks_off(client: Client) -> None:
    client.engine.script = ["a", RuntimeError("broken")]
    status, found = client.ask(CHAT, ASK)
    assert status == 500 and found["error"]["message"] == "RuntimeError: broken"
    assert found["error"]["type"] == "server_error"
    *_, last = client.stream(CHAT, ["a", RuntimeError("broken")], **ASK)
    assert last["error"]["message"] == "RuntimeError: broken"


def test_arguments_for_the_chat_template(client: Client) -> None:
    """Arguments come from the command line, and a request may change some of them."""
    client.say(CHAT, ["a"], **ASK, chat_template_kwargs={"enable_thinking": True}, reasoning_effort="low")
    seen = client.engine.tokenizer.seen
    assert (seen["enable_thinking"], seen["more"], seen["reasoning_effort"]) == (True, 1, "low")
    status, found = client.ask(CHAT, {**ASK, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}})
    assert status == 400 and "'chat_template', expected one of" in found["error"]["message"]


def test_a_template_that_fails_or_says_too_much(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, *_: Any, **__: Any) -> str:
        raise TypeError("roles must alternate")

    monkeypatch.setattr(Tokenizer, "apply_chat_template", fail)
    status, found = client.ask(CHAT, ASK)
    assert status == 400 and "TypeError: roles must alternate" in found["error"]["message"]
    monkeypatch.setattr(Tokenizer, "apply_chat_template", lambda *_, **__: "x" * (2 << 20) + "x")
    status, found = client.ask(CHAT, ASK)
    assert status == 413 and "expected at most 2097152" in found["error"]["message"]
    status, found = client.ask(TEXT, {"prompt": ""})
    assert status == 400 and found["error"]["message"] == "prompt: no token, expected at least one"


@pytest.mark.parametrize("size", [(1 << 20) + 1, 20 << 20])
def test_a_body_that_is_too_long(client: Client, size: int) -> None:
    """The client reads the answer although the server has not read the body."""
    status, found = client.ask(TEXT, b" " * size)
    assert status == 413 and f"{size} bytes, expected at most 1048576" in found["error"]["message"]
    assert "--max-body" in found["error"]["message"]


@pytest.mark.parametrize(
    "head, status",
    [
        (b"Content-Length: -1", 400),
        (b"Content-Length: many", 400),
        (b"Content-Length: 99999999999999999999999", 413),
        (b"Transfer-Encoding: chunked", 411),
        (b"X: y", 411),
    ],
)
def test_a_wrong_length(client: Client, head: bytes, status: int) -> None:
    with closing(client.open()) as one:
        one.sendall(f"POST {CHAT} HTTP/1.1\r\n".encode() + head + b"\r\n\r\n")
        answer = one.makefile("rb").read()
    assert f" {status} ".encode() in answer and b'{"error": {"message": "' in answer


def test_what_is_no_http_is_an_error_in_json(client: Client) -> None:
    for line in (b"hello\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"x" * 70000 + b" HTTP/1.1\r\n\r\n"):
        with closing(client.open()) as one:
            one.sendall(line)
            answer = one.makefile("rb").read()
        assert b'"error": {"message": ' in answer


def test_many_clients_at_once(client: Client) -> None:
    """None is reset: 100 ask at the same moment, some with a body."""
    client.engine.script = ["a"]
    barrier = threading.Barrier(100)

    def one(i: int) -> int:
        barrier.wait()
        return client.ask(CHAT, ASK)[0] if i % 2 else client.ask("/health", method="GET")[0]

    with ThreadPoolExecutor(100) as pool:
        assert set(pool.map(one, range(100))) == {200}


def test_slow_clients_time_out_and_do_not_block_others(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from ringattn.lm.server import http as server_http

    monkeypatch.setattr(server_http, "CLIENT_TIMEOUT", 1.5)
    client.engine.script = ["a"]
    slow = [client.open() for _ in range(40)]
    for one in slow:
        one.sendall(f"POST {CHAT} HTTP/1.1\r\nContent-Length: 1000\r\n\r\n".encode())
    begin = time.monotonic()
    assert client.ask(CHAT, ASK)[0] == 200 and time.monotonic() - begin < 1.4
    while time.monotonic() - begin < 1.2:  # a drip does not help
        slow[0].sendall(b" ")
        time.sleep(0.2)
    for one in slow:
        assert b" 408 " in one.makefile("rb").read(1000)
        one.close()
    assert time.monotonic() - begin < 10
    with closing(client.open()) as silent:
        assert silent.recv(10) == b""  # it never sent a request


def test_a_client_that_never_reads_does_not_block_others(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from ringattn.lm.server import http as server_http

    monkeypatch.setattr(server_http, "CLIENT_TIMEOUT", 1.5)
    client.engine.script = ["x" * 4_000_000] * 4
    body = json.dumps({**ASK, "stream": True}).encode()
    with closing(client.open()) as deaf:
        deaf.sendall(f"POST {CHAT} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        time.sleep(0.3)
        assert client.engine.waiting == 1
        assert client.ask("/health", method="GET")[0] == 200
        deadline = time.monotonic() + 10
        while client.engine.waiting and time.monotonic() < deadline:
            time.sleep(0.05)
        assert client.engine.waiting == 0


def test_more_connections_than_there_are_places(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from ringattn.lm.server import listener

    opened = [client.open() for _ in range(listener.MOST_CONNECTIONS)]
    deadline = time.monotonic() + 10
    found: Any = (0, None)
    while found[0] != 503 and time.monotonic() < deadline:
        found = client.ask("/health", method="GET")
    assert found[0] == 503 and found[1]["error"]["code"] == "overloaded"
    for one in opened:
        one.close()
    while client.ask("/health", method="GET")[0] != 200 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert client.ask("/health", method="GET")[0] == 200
