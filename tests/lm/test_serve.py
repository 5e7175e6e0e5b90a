"""``ringattn serve``: the endpoints of mlx_lm.server, answered by several ranks."""

from __future__ import annotations

import http.client
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import families
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from odd_requests import FUZZ_SECONDS, bodies
from tiny_model import make_folder

from ringattn.cli import main

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WORDS = [{"role": "user", "content": "w1 w2 w3"}]
END = 38  # the token that ends the answer of the model of words
LONG = {"prompt": "w1 w2", "max_tokens": 100000, "logit_bias": {str(END): -100}}


class Server:
    """A running ``ringattn serve -n 2``."""

    def __init__(self, model: str, *options: str) -> None:
        self.model = model
        line = [sys.executable, "-m", "ringattn.cli", "serve", "-n", "2", "--model", model, "--dtype", "float32"]
        self.process = subprocess.Popen([*line, "--port", "0", *options], stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        said: list[str] = []
        for line_of_it in self.process.stderr:
            said.append(line_of_it)
            if found := re.search(r"http://127.0.0.1:(\d+)/v1 \(2 ranks\)", line_of_it):
                break
        else:
            pytest.fail("".join(said))
        self.port = int(found[1])
        threading.Thread(target=self.process.stderr.read, daemon=True).start()  # the log of requests

    def close(self) -> None:
        self.process.terminate()
        assert self.process.wait(20) == 128 + signal.SIGTERM

    def open(self, path: str, body: Any, **headers: str) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
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
def smollm2() -> Iterator[Server]:
    """A server of SmolLM2, whose answers make sense."""
    one = Server("smollm2", "--prefill-step-size", "64")
    yield one
    one.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a tiny random model whose tokens are words."""
    folder = families.save(tmp_path_factory.mktemp("words"), eos_token_id=END)
    one = Server(str(folder), "--prefill-step-size", "64")
    yield one
    one.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a tiny random model whose tokens are bytes, with tools and thinking, for odd requests."""
    one = Server(str(make_folder(tmp_path_factory.mktemp("model"))))
    yield one
    one.close()


@pytest.fixture(scope="module")
def expected(server: Server) -> str:
    """The answer of plain mlx-lm in one process, with the model of words."""
    import mlx.core as mx
    import mlx_lm

    from ringattn import lm

    loaded, tokenizer = lm.load(server.model, mx.float32)
    prompt = tokenizer.apply_chat_template(WORDS, add_generation_prompt=True)
    return str(mlx_lm.generate(loaded, tokenizer, prompt, max_tokens=20))


@pytest.mark.model
def test_a_chat(smollm2: Server) -> None:
    server = smollm2
    status, found = server.ask(CHAT, {"messages": QUESTION, "max_tokens": 20, "logprobs": True})
    expected = found["choices"][0]["message"]["content"]
    assert status == 200 and found["choices"][0]["message"] == {"role": "assistant", "content": expected}
    tokens = [entry["token"] for entry in found["choices"][0]["logprobs"]["content"]]
    assert "Paris" in expected and "".join(tokens) == expected, tokens
    assert found["choices"][0]["finish_reason"] == "stop" and found["object"] == "chat.completion"
    # The same question again, and a next turn, use the tokens in the cache.
    messages = [*QUESTION, {"role": "assistant", "content": expected}, {"role": "user", "content": "And of Italy?"}]
    for more, least in ((QUESTION, found["usage"]["prompt_tokens"] - 1), (messages, found["usage"]["prompt_tokens"])):
        _, again = server.ask(CHAT, {"messages": more, "max_tokens": 20})
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= least
    assert "Rome" in again["choices"][0]["message"]["content"]


@pytest.mark.ranks
def test_a_stream(server: Server, expected: str) -> None:
    body = {"messages": WORDS, "max_tokens": 20, "stream": True, "stream_options": {"include_usage": True}}
    status, text = server.ask(CHAT, body)
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert status == 200 and events.pop() == "[DONE]"
    usage, *chunks = (json.loads(event) for event in reversed(events))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in reversed(chunks)) == expected
    assert chunks[0]["choices"][0]["finish_reason"] == "stop" and usage["usage"]["completion_tokens"] > 1


@pytest.mark.ranks
@pytest.mark.parametrize(
    "stop, left",
    [
        ("w11", "w59 w59 "),
        (["xyz", "9 w59 w1"], "w5"),  # spread over several tokens
        ("w11 w11 w", "w59 w59 w11 w11"),  # begins where the answer ends
    ],
)
def test_a_stop_word(server: Server, expected: str, stop: str | list[str], left: str) -> None:
    assert expected == "w59 w59 w11 w11"
    body = {"messages": WORDS, "max_tokens": 20, "stop": stop}
    choice = server.ask(CHAT, body)[1]["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (left, "stop")
    _, text = server.ask(CHAT, {**body, "stream": True})
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == left


@pytest.mark.ranks
def test_a_text(server: Server) -> None:
    body = {"prompt": "w1 w2 w3", "max_tokens": 3, "logprobs": True, "top_logprobs": 2}
    _, found = server.ask(TEXT, body)
    choice = found["choices"][0]
    likeliest = choice["text"].split()[0]
    assert len(choice["text"].split()) == 3 and choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["content"]) == 3 and len(choice["logprobs"]["content"][0]["top_logprobs"]) == 2
    seeded = {"prompt": "w1", "max_tokens": 12, "temperature": 1.5, "seed": 5}
    one, two = (server.ask(TEXT, seeded)[1]["choices"][0]["text"] for _ in range(2))
    assert one == two != server.ask(TEXT, {**seeded, "seed": 6})[1]["choices"][0]["text"]
    banned = {**body, "logit_bias": {likeliest[1:]: -100}, "logprobs": False, "top_logprobs": -1}
    assert likeliest not in server.ask(TEXT, banned)[1]["choices"][0]["text"]


@pytest.mark.ranks
def test_models_and_health(server: Server) -> None:
    assert [m["id"] for m in server.ask("/v1/models")[1]["data"]] == [server.model]
    assert server.ask(f"/v1/models/{os.path.basename(server.model)}")[1]["id"] == server.model
    assert server.ask("/v1/models/other")[0] == 404
    assert server.ask("/health") == (200, {"status": "ok"})


@pytest.mark.ranks
@pytest.mark.parametrize(
    "body, param",
    [
        ({"prompt": "x", "top_logprobs": True}, "top_logprobs"),
        ({"prompt": "x", "xtc_probability": 1, "xtc_threshold": 0.9, "temperature": 1}, "xtc_threshold"),
        ({"prompt": "x", "top_k": 262, "temperature": 1}, "top_k"),
        ({"prompt": "x", "logit_bias": {"262": 1}}, "logit_bias"),
        ({"prompt": "x", "repetition_penalty": 1e300}, "repetition_penalty"),
        ({"prompt": "\ud800"}, None),
        ({"prompt": "x", "stop": json.loads("[" * 400 + "]" * 400)}, "stop"),
    ],
)
def test_a_bad_request_leaves_the_ranks_in_step(tiny: Server, body: Any, param: str | None) -> None:
    status, found = tiny.ask(TEXT, body)
    assert (status, found["error"]["param"]) == (400, param), found
    assert tiny.ask(TEXT, {"prompt": "x", "max_tokens": 3})[0] == 200


class Fuzz:
    """Odd requests to a server, and between them a plain one that must get its usual answer."""

    plain = {"prompt": "Once upon a time", "max_tokens": 4, "logprobs": 2}

    def __init__(self, server: Server):
        self.server = server
        self.count = 0
        self.usual = self.ask_plain()

    def ask_plain(self) -> Any:
        status, found = self.server.ask(TEXT, self.plain)
        assert status == 200, found
        return found["choices"]

    def ask(self, path: str, body: dict[str, Any]) -> None:
        status, found = self.server.ask(path, body)
        assert status in (200, 400, 404, 413), (status, body)
        assert status == 200 or found["error"]["message"], body
        self.count += 1
        if self.count % 10 == 0:
            assert self.ask_plain() == self.usual, body


def few_tokens(body: dict[str, Any]) -> dict[str, Any]:
    """A body whose answer is short, unless its number of tokens is refused."""
    for name in ("max_tokens", "max_completion_tokens"):
        value = body.get(name)
        if value is None or (isinstance(value, int) and value > 8):
            body[name] = 3
    if "prompt" in body:
        del body["max_completion_tokens"]
    return body


@pytest.mark.ranks
def test_odd_requests_leave_the_usual_answer(tiny: Server) -> None:
    """Send odd requests for RINGATTN_FUZZ_SECONDS seconds, or somewhat longer where requests are slow."""
    fuzz = Fuzz(tiny)
    end = time.monotonic() + FUZZ_SECONDS

    @settings(max_examples=20 * FUZZ_SECONDS, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.tuples(st.just(CHAT), bodies("chat")) | st.tuples(st.just(TEXT), bodies("text")))
    def odd(request: tuple[str, dict[str, Any]]) -> None:
        if time.monotonic() < end:
            fuzz.ask(request[0], few_tokens(request[1]))

    odd()
    assert fuzz.count > 5 and fuzz.ask_plain() == fuzz.usual


@pytest.mark.ranks
def test_clients_of_openai(server: Server, expected: str) -> None:
    """Answers, streams and errors as OpenAI's own library reads them."""
    openai = pytest.importorskip("openai") if "CI" not in os.environ else importlib.import_module("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
    ask = {"model": server.model, "messages": WORDS, "max_tokens": 20}
    whole = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2, n=None, user="me")
    assert whole.choices[0].message.content == expected and whole.model == server.model
    chosen = whole.choices[0].logprobs.content
    assert " ".join(entry.token for entry in chosen) == expected  # a token is a word
    assert all(entry.top_logprobs[0].token == entry.token for entry in chosen)
    chunks = list(client.chat.completions.create(**ask, stream=True, logprobs=True))
    parts = [entry.token for chunk in chunks for entry in (chunk.choices[0].logprobs or Namespace(content=[])).content]
    assert " ".join(parts) == expected == "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    with client.chat.completions.stream(**ask) as stream:
        stream.until_done()
        assert stream.get_final_completion().choices[0].message.content == expected
    text = client.completions.create(model=server.model, prompt="w1 w2 w3", max_tokens=2, logprobs=1)
    assert text.choices[0].text == " ".join(text.choices[0].logprobs.tokens)
    assert [model.id for model in client.models.list()] == [server.model]
    with pytest.raises(openai.BadRequestError, match="n: 2, expected 1") as wrong:
        client.chat.completions.create(**ask, n=2)
    assert (wrong.value.param, wrong.value.type) == ("n", "invalid_request_error")
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here"):
        client.chat.completions.create(**{**ask, "model": "gpt"})
    with pytest.raises(openai.NotFoundError, match="no such address"):
        client.embeddings.create(model=server.model, input="x")


@pytest.mark.ranks
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(server: Server, stream: bool) -> None:
    """A client leaves while its answer is generated, while its prompt is read, and while it waits for its turn."""
    long_answer = {**LONG, "stream": stream}
    long_prompt = {**long_answer, "prompt": "w1 " * 60000}
    for body in (long_answer, long_prompt):
        leaving, queued = server.open(TEXT, body), server.open(TEXT, body)
        time.sleep(1.0)
        leaving.close()
        queued.close()
        begin = time.monotonic()
        assert server.ask(TEXT, {"prompt": "w1 w2", "max_tokens": 2})[0] == 200
        assert time.monotonic() - begin < 20  # the answers alone would have taken minutes


@pytest.mark.ranks
def test_requests_wait_for_their_turn(tiny: Server) -> None:
    """Each of fifty requests at the same moment gets its answer."""
    body = {"prompt": "Once", "max_tokens": 4}
    expected = tiny.ask(TEXT, body)[1]["choices"]
    with ThreadPoolExecutor(50) as pool:
        found = list(pool.map(lambda _: tiny.ask(TEXT, body), range(50)))
    assert all(status == 200 and answer["choices"] == expected for status, answer in found)


def test_template_arguments_that_are_no_object_are_one_line() -> None:
    found = CliRunner().invoke(main, ["serve", "--model", "none.gguf", "--chat-template-args", "5"])
    assert found.exit_code == 2 and "'5', expected a JSON object such as" in found.stderr, found.stderr


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Restore the signal handlers that a server replaces."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_port_in_use_is_one_line_before_the_model_is_loaded(own_signals: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = CliRunner().invoke(main, ["serve", "--model", "none.gguf", "--port", str(port)])
    assert found.exit_code == 1 and found.stderr.count("\n") == 1, found.stderr
    assert f"cannot listen on 127.0.0.1:{port}" in found.stderr


class Plain:
    """A cache of a number of tokens."""

    def __init__(self, tokens: int, trimmable: bool = True):
        self.tokens = tokens
        self.trimmable = trimmable

    def size(self) -> int:
        return self.tokens

    def restorable(self, size: int) -> int:
        return min(size, self.tokens) if self.trimmable or size >= self.tokens else 0

    loss = "it is not trimmable"

    def trim(self, n: int) -> None:
        self.tokens -= n


def test_a_pool_of_caches() -> None:
    from ringattn.lm.reuse import Reuse
    from ringattn.lm.server.cache_pool import PromptCachePool

    pool = PromptCachePool(2)
    first, second = Plain(6), Plain(4)
    pool.push([1, 2, 3, 4, 5], [first])
    assert first.size() == 5  # one token more than was given out
    pool.push([1, 9, 9, 9], [second])
    assert pool.pop([1, 2, 7]) == (None, Reuse(0, 0, 3))  # too little of either
    assert pool.pop([1, 2, 3, 4, 5]) == ([first], Reuse(4, 4, 5)) and first.size() == 4  # the last token is read again
    assert len(pool) == 1 and pool.pop([1, 2, 3, 4, 5]) == (None, Reuse(0, 0, 5))
    pool.push([1, 2, 3, 4], [first])
    assert pool.pop([1, 2, 3, 7, 8]) == ([first], Reuse(3, 3, 5))
    window = Plain(3, trimmable=False)
    pool.push([5, 6, 7], [window])
    cache, reuse = pool.pop([5, 6, 8, 9])
    assert cache is None and reuse.line == (
        "Prompt of 4 tokens: 0 are reused and 4 read, 2 of these again: it is not trimmable."
    )
    assert pool.pop([5, 6, 7, 8]) == ([window], Reuse(3, 3, 4))
    for tokens in ([1], [2], [3]):
        pool.push(tokens, [Plain(1)])
    assert len(pool) == 2 and pool.pop([1, 1]) == (None, Reuse(0, 0, 2))
