"""``ringattn serve``: the endpoints of mlx_lm.server, given by several ranks."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.model

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
LONG = {"prompt": "Once upon a time", "max_tokens": 5000}


class Server:
    """A running ``ringattn serve -n 2``."""

    def __init__(self) -> None:
        line = [sys.executable, "-m", "ringattn.cli", "serve", "-n", "2", "--model", "smollm2", "--dtype", "float32"]
        self.process = subprocess.Popen(
            [*line, "--port", "0", "--prefill-step-size", "64"], stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        said = self.process.stderr.readline()
        found = re.search(r"http://127.0.0.1:(\d+)/v1 \(2 ranks\)", said)
        assert found, said
        self.port = int(found[1])

    def open(self, path: str, body: Any, **headers: str) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("GET" if body is None else "POST", path, None if body is None else text, headers)
        return connection

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        connection = self.open(path, body, **headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, text if answer.headers["Content-Type"] == "text/event-stream" else json.loads(text)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.process.terminate()
    assert one.process.wait(20) == 128 + signal.SIGTERM


@pytest.fixture(scope="module")
def expected() -> str:
    """What plain mlx-lm answers in one process."""
    import mlx.core as mx
    import mlx_lm

    from ringattn import lm

    model, tokenizer = lm.load("smollm2", mx.float32)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)
    return str(mlx_lm.generate(model, tokenizer, prompt, max_tokens=20))


def test_a_chat(server: Server, expected: str) -> None:
    status, found = server.ask(CHAT, {"messages": QUESTION, "max_tokens": 20})
    assert status == 200 and found["choices"][0]["message"] == {"role": "assistant", "content": expected}
    assert found["choices"][0]["finish_reason"] == "stop" and found["object"] == "chat.completion"
    # The same again, and a next turn, go on from what was read.
    messages = [*QUESTION, {"role": "assistant", "content": expected}, {"role": "user", "content": "And of Italy?"}]
    for more, least in ((QUESTION, found["usage"]["prompt_tokens"] - 1), (messages, found["usage"]["prompt_tokens"])):
        _, again = server.ask(CHAT, {"messages": more, "max_tokens": 20})
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= least
    assert "Rome" in again["choices"][0]["message"]["content"]


def test_a_stream(server: Server, expected: str) -> None:
    body = {"messages": QUESTION, "max_tokens": 20, "stream": True, "stream_options": {"include_usage": True}}
    status, text = server.ask(CHAT, body)
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert status == 200 and events.pop() == "[DONE]"
    usage, *chunks = (json.loads(event) for event in reversed(events))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in reversed(chunks)) == expected
    assert chunks[0]["choices"][0]["finish_reason"] == "stop" and usage["usage"]["completion_tokens"] > 1


@pytest.mark.parametrize("stop, left", [("Paris", "The capital of France is"), (["xyz", "tal of Fr"], "The capi")])
def test_a_stop_word(server: Server, stop: str | list[str], left: str) -> None:
    """Also one that is spread over several tokens."""
    _, found = server.ask(CHAT, {"messages": QUESTION, "max_tokens": 20, "stop": stop})
    choice = found["choices"][0]
    assert (choice["message"]["content"].strip(), choice["finish_reason"]) == (left, "stop")


def test_a_text(server: Server) -> None:
    body = {"prompt": "The capital of France is", "max_tokens": 3, "logprobs": True, "top_logprobs": 2}
    _, found = server.ask(TEXT, body)
    choice = found["choices"][0]
    assert choice["text"].strip().startswith("Paris") and choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["content"]) == 3 and len(choice["logprobs"]["content"][0]["top_logprobs"]) == 2
    seeded = {"prompt": "Once", "max_tokens": 12, "temperature": 1.5, "seed": 5}
    one, two = (server.ask(TEXT, seeded)[1]["choices"][0]["text"] for _ in range(2))
    assert one == two != server.ask(TEXT, {**seeded, "seed": 6})[1]["choices"][0]["text"]
    banned = {**body, "logit_bias": {"7042": -100}, "logprobs": False, "top_logprobs": -1}
    assert "Paris" not in server.ask(TEXT, banned)[1]["choices"][0]["text"]


def test_models_and_health(server: Server) -> None:
    assert [m["id"] for m in server.ask("/v1/models")[1]["data"]] == ["smollm2"]
    assert server.ask("/v1/models/smollm2")[1]["id"] == "smollm2"
    assert server.ask("/v1/models/other")[0] == 404
    assert server.ask("/health") == (200, {"status": "ok"})


@pytest.mark.parametrize(
    "path, body, status, told",
    [
        (CHAT, b"{", 400, "Invalid JSON"),
        (CHAT, b"\xff", 400, "not UTF-8"),
        (CHAT, [], 400, "JSON dictionary"),
        (CHAT, {}, 400, "messages: expected a list"),
        (CHAT, {"messages": []}, 400, "messages: expected a list"),
        (CHAT, {"messages": [{"content": "x"}]}, 400, "messages[0].role: None"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content: 5"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "parts of type 'text'"),
        (CHAT, {"messages": QUESTION, "model": "gpt"}, 404, "model: 'gpt' is not served here, expected 'smollm2'"),
        (CHAT, {"messages": QUESTION, "n": 2}, 400, "n: 2, expected 1"),
        (CHAT, {"messages": QUESTION, "adapters": "x"}, 400, "adapters: 'x'"),
        (CHAT, {"messages": QUESTION, "stream": True, "stream_options": 1}, 400, "stream_options: 1"),
        (CHAT, {"messages": QUESTION, "max_tokens": "many"}, 400, "max_tokens must be"),
        (CHAT, {"messages": QUESTION, "temperature": -1}, 400, "temperature must be"),
        (CHAT, b'{"messages": ' + b"[" * 10**5, 400, "nested too deep"),
        (CHAT, b'{"stop": ' + b'{"a": ' * 900 + b"1" + b"}" * 901, 400, "messages: expected a list"),
        (TEXT, {"prompt": "x", "stop": json.loads("[" * 400 + "]" * 400)}, 400, "stop: [[["),
        (CHAT, b'{"seed": ' + b"9" * 5000 + b"}", 400, "request body: Exceeds the limit"),
        (TEXT, b'{"prompt": "x", "temperature": NaN}', 400, "NaN, which is not JSON"),
        (TEXT, b'{"prompt": "x", "temperature": 1e999}', 400, "1e999, expected finite numbers"),
        (TEXT, {"prompt": "x", "temperature": 10**400}, 400, "temperature: 1000"),
        (TEXT, {"prompt": "x", "presence_penalty": -(10**400)}, 400, "presence_penalty: -1000"),
        (TEXT, {"prompt": "x", "logit_bias": {"5": "nan"}}, 400, "logit_bias: nan for token 5"),
        (TEXT, {"prompt": "x", "top_k": 49152, "temperature": 1}, 400, "top_k: 49152, expected less than 49152"),
        (TEXT, {"prompt": "x", "seed": -1}, 400, "seed: -1, expected a whole number from 0 to 18446744073709551615"),
        (TEXT, {"prompt": "x", "seed": 10**30}, 400, "seed: 1000000000000000000000000000000, expected"),
        (TEXT, {"prompt": "x", "seed": True}, 400, "seed: True"),
        (TEXT, {"prompt": "x", "max_tokens": 10**30}, 400, "max_tokens: 1000"),
        (TEXT, {"prompt": "x", "repetition_penalty": 2, "repetition_context_size": 10**30}, 400, "context_size: 1000"),
        (TEXT, {}, 400, "prompt"),
        (TEXT, {"prompt": 5}, 400, "prompt: of type int"),
        (TEXT, {"prompt": ""}, 400, "prompt: no token"),
        (TEXT, {"prompt": "x", "stop": 5}, 400, "stop: 5"),
        (TEXT, {"prompt": "x", "stop": [""]}, 400, "stop: ['']"),
        (TEXT, {"prompt": "x", "logit_bias": {"999999": 1}}, 400, "logit_bias: token 999999"),
    ],
)
def test_a_bad_request_is_told_why(server: Server, path: str, body: Any, status: int, told: str) -> None:
    found, answer = server.ask(path, body)
    assert found == status and told in answer["error"], answer


@pytest.mark.parametrize("length, status", [("-1", 400), ("99999999999", 413), ("many", 400)])
def test_a_wrong_length_is_told_why(server: Server, length: str, status: int) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as one:
        one.sendall(f"POST {CHAT} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n".encode())
        assert f" {status} ".encode() in one.recv(100)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(server: Server, stream: bool) -> None:
    """While its answer is generated, while its prompt is read, and while it waits for its turn."""
    patient, long_prompt = {**LONG, "stream": stream}, {**LONG, "prompt": "word " * 7000, "stream": stream}
    for body in (patient, long_prompt):
        leaving, queued = server.open(TEXT, body), server.open(TEXT, body)
        time.sleep(1.0)
        leaving.close()
        queued.close()
        begin = time.monotonic()
        assert server.ask(TEXT, {"prompt": "One, two,", "max_tokens": 2})[0] == 200
        assert time.monotonic() - begin < 20  # the answers alone would have taken minutes


def test_requests_wait_for_their_turn(server: Server) -> None:
    with ThreadPoolExecutor(4) as pool:
        body = {"messages": QUESTION, "max_tokens": 20}
        found = list(pool.map(lambda _: server.ask(CHAT, body)[1]["choices"][0]["message"]["content"], range(4)))
    assert len(set(found)) == 1 and "Paris" in found[0]


def test_arguments_for_the_chat_template() -> None:
    """Those of the command line, which a request may change."""
    from argparse import Namespace

    from ringattn.lm.server import Engine

    seen = {}

    class Tokenizer:
        has_chat_template, has_tool_calling, has_thinking, response_initial_state = True, False, False, None

        def apply_chat_template(self, messages: Any, **options: Any) -> list[int]:
            seen.update(options)
            return [1, 2]

    arguments = Namespace(chat_template_args={"enable_thinking": False, "more": 1})
    engine = Engine(Namespace(ring=None), Tokenizer(), arguments, 0)  # type: ignore[arg-type]
    request = Namespace(request_type="chat", messages=[{"role": "assistant", "content": "x"}], tools=None)
    request.role_mapping = None
    assert engine.tokens(request, {"more": 2})[0] == [1, 2]
    assert (seen["enable_thinking"], seen["more"]) == (False, 2)


def test_template_arguments_that_are_no_object_are_one_line() -> None:
    line = [sys.executable, "-m", "ringattn.cli", "serve", "--model", "none.gguf", "--chat-template-args", "5"]
    found = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert found.returncode == 2 and "'5', expected a JSON object such as" in found.stderr, found.stderr


def test_a_port_in_use_is_one_line(server: Server) -> None:
    line = [sys.executable, "-m", "ringattn.cli", "serve", "--model", "smollm2", "--dtype", "float32"]
    line += ["--port", str(server.port)]
    found = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert found.returncode == 1 and found.stderr.count("\n") == 1, found.stderr
    assert f"cannot listen on 127.0.0.1:{server.port}" in found.stderr


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3), st.data())
def test_stop_words_end_where_the_text_says(text: str, words: list[str], data: Any) -> None:
    from ringattn.lm.server.stop_words import StopWords

    stops, end = StopWords(words), None
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    done = 0
    for start, stop in zip([0, *cuts], [*cuts, len(text)]):
        cut = stops.cut(text[start:stop])
        if cut is not None:
            end = start + len(cut)
            break
        done = stop
    ends = [text.find(word) + len(word) for word in words if word in text]
    assert end == min(ends, default=None) if ends else (end is None and done == len(text))


class Plain:
    """A cache that holds as many tokens as it was given."""

    def __init__(self, tokens: int, trimmable: bool = True):
        self.tokens, self.trimmable = tokens, trimmable

    def size(self) -> int:
        return self.tokens

    def is_trimmable(self) -> bool:
        return self.trimmable

    def trim(self, n: int) -> None:
        self.tokens -= n


def test_kept_caches() -> None:
    from ringattn.lm.server.cache_pool import KeptCaches

    kept = KeptCaches(2)
    first, second = Plain(6), Plain(4)
    kept.give([1, 2, 3, 4, 5], [first])
    assert first.size() == 5  # one token more than was given out
    kept.give([1, 9, 9, 9], [second])
    assert kept.take([1, 2, 7]) == (None, 0)  # too little of either
    assert kept.take([1, 2, 3, 4, 5]) == ([first], 4) and first.size() == 4  # the last token is computed again
    assert len(kept) == 1 and kept.take([1, 2, 3, 4, 5]) == (None, 0)
    kept.give([1, 2, 3, 4], [first])
    assert kept.take([1, 2, 3, 7, 8]) == ([first], 3)
    window = Plain(3, trimmable=False)
    kept.give([5, 6, 7], [window])
    assert kept.take([5, 6, 8, 9]) == (None, 0)
    assert kept.take([5, 6, 7, 8]) == ([window], 3)
    for tokens in ([1], [2], [3]):
        kept.give(tokens, [Plain(1)])
    assert len(kept) == 2 and kept.take([1, 1]) == (None, 0)
