"""Bodies of requests: wrong ones are refused by the field's name, and accepted ones can be generated."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_requests import FUZZ_SECONDS, MESSAGES, bodies

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

EXAMPLES = 30 * FUZZ_SECONDS
VOCABULARY = 50


def read(kind: str, /, **body: Any) -> Any:
    from ringattn.lm.server.api.requests import Served, read_request

    return read_request(kind, body, Served(("tiny", "default_model"), VOCABULARY, {"max_tokens": 7, "top_p": 1.0}))


def error(kind: str, /, **body: Any) -> Any:
    from ringattn.lm.server.api.fields import RequestError

    with pytest.raises(RequestError) as found:
        read(kind, **body)
    return found.value


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.data())
def test_odd_bodies_are_refused_by_name_or_can_be_generated(data: Any) -> None:
    import mlx.core as mx
    from mlx_lm.sample_utils import make_logits_processors, make_sampler

    from ringattn.lm.server.api.fields import RequestError

    kind = data.draw(st.sampled_from(["chat", "text"]))
    body = data.draw(bodies(kind))
    try:
        request = read(kind, **body)
    except RequestError as refused:
        assert refused.status in (400, 404) and len(str(refused)) < 1000
        assert refused.param is None or str(refused).startswith((refused.param, f"{refused.param}["))
        json.dumps(str(refused))
        return
    sampling = {{"temperature": "temp"}.get(name, name): value for name, value in request.sampling.items()}
    logits = mx.random.normal((1, VOCABULARY))
    for processor in make_logits_processors(**request.processors):
        logits = processor(mx.array([1, 2, 1]), logits)
    token = make_sampler(**sampling, xtc_special_tokens=[0])(logits - mx.logsumexp(logits)).item()
    assert 0 <= token < VOCABULARY and mx.isfinite(logits).all().item()
    assert 1 <= request.max_tokens < 2**31 and all(isinstance(word, str) and word for word in request.stop)
    assert request.logprobs is None or 0 <= request.logprobs <= 20


@settings(deadline=None)  # the first call imports the server
@given(st.sampled_from(["chat", "text"]), st.data())
def test_nulls_are_absent(kind: str, data: Any) -> None:
    from ringattn.lm.server.api.requests import RULES

    needed = {"messages": MESSAGES} if kind == "chat" else {"prompt": "x"}
    names = data.draw(st.lists(st.sampled_from(sorted(set(RULES[kind]) - set(needed))), max_size=5))
    assert read(kind, **needed, **dict.fromkeys([*names, "functions"])) == read(kind, **needed)


def test_harmless_options_are_accepted() -> None:
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "stream_options": {}}
    assert read("chat", messages=MESSAGES, **harmless) == read("chat", messages=MESSAGES)
    plain = {"response_format": {"type": "text"}, "n": 1, "tool_choice": "auto", "parallel_tool_calls": True}
    assert read("chat", messages=MESSAGES, **plain) == read("chat", messages=MESSAGES)


@pytest.mark.parametrize(("body", "given"), [({}, False), ({"max_tokens": 7}, True), ({"max_tokens": None}, False)])
def test_a_length_of_the_clients_own_is_known(body: dict, given: bool) -> None:
    assert read("text", prompt="x", **body).gives_max_tokens is given
    assert read("chat", messages=MESSAGES, max_completion_tokens=3).gives_max_tokens


def test_values_become_what_the_engine_needs() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    found = read("chat", messages=MESSAGES, tools=tools, stop="x", max_completion_tokens=3, reasoning_effort="low")
    assert (found.stop, found.max_tokens, found.tools, found.template) == (
        ("x",),
        3,
        tools,
        {"reasoning_effort": "low"},
    )
    assert read("chat", messages=MESSAGES, tools=tools, tool_choice="none").tools is None
    assert read("text", prompt="x", temperature=1e-9).sampling["temperature"] == 0  # 1 / 1e-9 overflows in float32
    assert read("text", prompt="x", stream_options={"include_usage": True}).include_usage
    assert read("text", prompt="x", logit_bias={"5": -100}).processors["logit_bias"] == {5: -100.0}


@pytest.mark.parametrize(
    "kind, asked, found",
    [
        ("chat", {"logprobs": True}, 0),
        ("chat", {"logprobs": True, "top_logprobs": 3}, 3),
        ("chat", {"top_logprobs": 3}, 3),
        ("chat", {"logprobs": False}, None),
        ("chat", {"logprobs": True, "top_logprobs": -1}, 0),  # mlx-lm's "none"
        ("text", {"logprobs": 2}, 2),
        ("text", {"logprobs": 1}, 1),
        ("text", {"logprobs": 0}, 0),
        ("text", {"logprobs": True}, 0),
        ("text", {"logprobs": False}, None),
        ("text", {}, None),
    ],
)
def test_wanted_logprobs(kind: str, asked: dict[str, Any], found: int | None) -> None:
    needed = {"messages": MESSAGES} if kind == "chat" else {"prompt": "x"}
    assert read(kind, **needed, **asked).logprobs == found


@pytest.mark.parametrize(
    "kind, body, message",
    [
        ("chat", {}, "messages: missing"),
        ("text", {}, "prompt: missing"),
        ("chat", {"messages": []}, "messages: [], expected at least one message"),
        ("chat", {"messages": [{"content": "x"}]}, "messages[0].role: None, expected a text"),
        ("chat", {"messages": [{"role": "user", "content": 5}]}, "messages[0].content: 5"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content: {'type'"),
        ("chat", {"messages": [{"role": "a", "tool_calls": [{"function": 5}]}]}, "messages[0].tool_calls.function: 5"),
        ("chat", {"messages": [{"role": "u"}] * 5000}, "messages: 5000 of them, expected at most 4096"),
        ("text", {"prompt": ["x"]}, "prompt: ['x'], expected a text"),
        ("text", {"prompt": "x", "n": 2}, "n: 2, expected 1: a request has one answer"),
        ("text", {"prompt": "x", "adapters": "y"}, "adapters: 'y', expected none"),
        ("text", {"prompt": "x", "echo": True}, "echo: True, expected False"),
        ("text", {"prompt": "x", "max_tokens": 0}, "max_tokens: 0, expected a whole number from 1"),
        ("text", {"prompt": "x", "max_tokens": 5.0}, "max_tokens: 5.0, expected a whole number"),
        ("text", {"prompt": "x", "temperature": 10**400}, "temperature: 1000"),
        ("text", {"prompt": "x", "temperature": -1}, "temperature: -1, expected a number from 0"),
        ("text", {"prompt": "x", "top_k": VOCABULARY}, "top_k: 50, expected less than 50"),
        ("text", {"prompt": "x", "top_logprobs": True}, "top_logprobs: True, expected a whole number from -1 to 20"),
        ("text", {"prompt": "x", "top_logprobs": 21}, "top_logprobs: 21"),
        ("text", {"prompt": "x", "top_logprobs": "5"}, "top_logprobs: '5'"),
        ("chat", {"messages": MESSAGES, "logprobs": 2}, "logprobs: 2, expected true or false"),
        ("text", {"prompt": "x", "xtc_threshold": 0.7}, "xtc_threshold: 0.7, expected a number from 0 to 0.5"),
        ("text", {"prompt": "x", "seed": True}, "seed: True"),
        ("text", {"prompt": "x", "seed": 2**64}, "seed: 18446744073709551616"),
        ("text", {"prompt": "x", "repetition_context_size": 0}, "repetition_context_size: 0"),
        ("text", {"prompt": "x", "logit_bias": {"5": "nan"}}, "logit_bias: 'nan', expected a number"),
        ("text", {"prompt": "x", "logit_bias": {"five": 1}}, "logit_bias: token 'five'"),
        ("text", {"prompt": "x", "logit_bias": {"50": 1}}, "logit_bias: token 50, expected 0 to 49"),
        ("text", {"prompt": "x", "stop": [""]}, "stop: [''], expected"),
        ("text", {"prompt": "x", "stop": ["x"] * 65}, "stop: ['x'"),
        ("text", {"prompt": "x", "stream": 1}, "stream: 1, expected true or false"),
        ("text", {"prompt": "x", "stream_options": 1}, "stream_options: 1, expected an object"),
        (
            "text",
            {"prompt": "x", "response_format": {"type": "json_object"}},
            "response_format: {'type': 'json_object'}",
        ),
        ("chat", {"messages": MESSAGES, "tool_choice": "required"}, "tool_choice: 'required', expected 'auto'"),
        ("chat", {"messages": MESSAGES, "tools": [5]}, "tools: [5], expected a list of objects"),
        ("chat", {"messages": MESSAGES, "functions": []}, "functions: not supported"),
        ("chat", {"messages": MESSAGES, "chat_template_kwargs": 5}, "chat_template_kwargs: 5, expected an object"),
    ],
)
def test_what_is_wrong_is_named(kind: str, body: dict[str, Any], message: str) -> None:
    found = error(kind, **body)
    assert str(found).startswith(message) and found.status == 400
    assert found.param and message.startswith(found.param)


@pytest.mark.parametrize(
    "options",
    [{"chat_template": "{{ 1 }}"}, {"padding": "max_length"}, {"max_length": 3e8}, {"tokenize": True}]
    + [{"enable_thinking": [1]}, {"date_string": "x" * 201}, {"thinking_budget": 2**31}, {"thinking": 0.5}],
)
def test_options_of_the_chat_template_are_named_and_short(options: dict[str, Any]) -> None:
    assert "chat_template_kwargs" in str(error("chat", messages=MESSAGES, chat_template_kwargs=options))


def test_another_model_is_not_found() -> None:
    found = error("text", prompt="x", model="gpt")
    assert (found.status, found.param, found.code) == (404, "model", "model_not_found")
    assert read("text", prompt="x", model="tiny") == read("text", prompt="x", model=None)


@pytest.mark.parametrize(
    "body, message",
    [
        (b"{", "not JSON"),
        (b"\xff", "not UTF-8 (invalid start byte at byte 0)"),
        (b'{"a": ' + b"[" * 10**5, "nested too deep"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b'{"temperature": NaN}', "NaN, which is not JSON"),
        (b'{"temperature": 1e999}', "1e999, expected finite numbers"),
    ],
)
def test_a_body_that_is_no_json(body: bytes, message: str) -> None:
    from ringattn.lm.server.api.fields import RequestError
    from ringattn.lm.server.api.requests import read_json

    with pytest.raises(RequestError) as found:
        read_json(body)
    assert message in str(found.value)


@pytest.mark.parametrize("body", [[], 5, None, "x"])
def test_a_body_that_is_no_object(body: Any) -> None:
    from ringattn.lm.server.api.fields import RequestError
    from ringattn.lm.server.api.requests import Served, read_request

    with pytest.raises(RequestError, match="expected a JSON object"):
        read_request("chat", body, Served(("tiny",), VOCABULARY, {}))
